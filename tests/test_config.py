"""config.py: one configuration with a clear precedence, and one sentence for whatever cannot work."""

import dataclasses
from pathlib import Path

import pytest
from helpers import ROOT

from config import Config, ConfigError, load_config


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(arguments: list[str]) -> str:
    """The one sentence with which these arguments are refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_default_then_files_in_order_then_command_line(tmp_path):
    one = write(tmp_path / "1.yaml", "group_size: 6\nlr: 1e-5\nseed: 1\n")
    two = write(tmp_path / "2.yaml", "seed: 2\n")
    assert load_config([]).group_size == Config().group_size == 5
    files = ["--config", one, "--config", two]
    for arguments in ([*files, "--group_size", "7"], ["--group_size=7", *files]):
        loaded = load_config(arguments)
        assert (loaded.group_size, loaded.lr, loaded.seed) == (7, 1e-5, 2), "--key value wins anywhere"


def test_base_is_relative_to_the_file_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "configs" / "more").mkdir(parents=True)
    write(tmp_path / "configs" / "root.yaml", "seed: 1\nlr: 0.1\nsteps: 3\n")
    write(tmp_path / "configs" / "middle.yaml", "base: root.yaml\nseed: 2\nlr: 0.2\n")
    leaf = write(tmp_path / "configs" / "more" / "leaf.yaml", "base: ../middle.yaml\nseed: 3\n")
    monkeypatch.chdir(tmp_path / "configs")
    loaded = load_config(["--config", leaf])
    assert (loaded.seed, loaded.lr, loaded.steps) == (3, 0.2, 3)


def test_every_config_of_the_repository_loads():
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert paths and all(load_config(["--config", str(path)]) for path in paths)


def test_a_flag_without_a_value_is_true():
    loaded = load_config(["--overwrite", "--seed", "3", "--lenient", "False"])
    assert loaded.overwrite is True and loaded.seed == 3 and loaded.lenient is False
    assert refusal(["--run_dir", "--resume"]).startswith("--run_dir needs a value"), "which is no switch"


def test_every_value_has_the_type_of_its_default(tmp_path):
    """YAML reads 1e-6, without a dot, as a string."""
    text = "steps: '12'\nkl_coef: 0\nlr: 1e-6\nrun_dir: 7\nprompts_per_step: 512.0\nlenient: 1\n"
    loaded = load_config(["--config", write(tmp_path / "c.yaml", text)])
    for field in dataclasses.fields(Config):
        assert type(getattr(loaded, field.name)) is type(field.default), field.name
    values = (loaded.steps, loaded.lr, loaded.run_dir, loaded.prompts_per_step, loaded.lenient)
    assert values == (12, 1e-6, "7", 512, True) and loaded.skip_zero_variance == ""


REFUSED = {
    "--groupsize 4": "unknown setting 'groupsize'; did you mean 'group_size'?",
    "--group_size 3 4": "'4'",
    "--resume_step 3": "resume_step needs --resume true",
    "--lora_rank 4 --lora_alpha 0": "lora_alpha must be greater than 0",
    "--lora_targets q_proj": "lora_targets needs lora_rank",
    "--lora_rank 4 --offload reference": "offload reference has no use with lora_rank",
    "--reward none --kl_coef 0": "reward: none leaves the KL alone to train",
    "--reward none --kl k1": "reward: none leaves the KL alone to train",
    "--group_size 1": "group_size must be at least 2",
    "--prompts_per_step 10 --minibatch_prompts 4": "(10) must be a multiple of minibatch_prompts (4)",
    "--temperature nan": "temperature must be a number, not 'nan'",
    "--lr=-1e-6": "lr must not be negative",
    "--data_from 0.5 --data_to 0.5": "data_from (0.5) must be below data_to (0.5)",
    "--num_iterations 0": "num_iterations must be greater than 0",
    "--overlong_tokens 9 --max_response_tokens 8": "(9) must be at most max_response_tokens (8)",
    "--skip_zero_variance some": "skip_zero_variance must be rest or all, not 'some'",
    "--reference model --kl_coef 0": "reference is the model that the KL points at: it needs kl_coef above 0",
    "--sharding hybrid": "sharding must be full or hsdp",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_settings_that_cannot_work_are_refused(arguments):
    assert REFUSED[arguments] in refusal(arguments.split())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: 1.5\n", "steps must be a whole number, not "),
        ("lr: .nan\n", "lr must be a number, not "),
        ("overwrite: 2\n", "overwrite must be true or false, not "),
        ("seed: 1\nlr: [1\nsteps: 2\n", "(line 3)"),
        ("", "must hold `key: value` lines"),
        ("run_dir: läufe\n", "cannot read"),  # written as Latin-1
        ("seed: 1\nlr: 1e-6\nseed: 2\n", "seed stands 2 times"),
        ("base: ../other/broken.yaml\n", "must name another YAML file"),  # which names this one
        ('base: "a\\0"\n', "must name another YAML file"),
        ("- seed: 1\n", "must hold `key: value` lines"),
        ("sede: 1\n", "did you mean 'seed'?"),
        ("seed: 1\n\0\0\0", "broken.yaml is not YAML"),
        ("seed: 1\nmodel: 'Qw", "broken.yaml is not YAML"),
        ("lr: 2024-99-99\n", "broken.yaml is not YAML"),
        ("lr: !!bool maybe\n", "broken.yaml is not YAML"),
        ("lr: !!timestamp now\n", "broken.yaml is not YAML"),
        ("lr: " + "[" * 9999, "broken.yaml is not YAML"),
    ],
)
def test_broken_yaml_is_one_sentence(text, words, tmp_path):
    for name in ("here", "other"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "broken.yaml", "base: ../here/broken.yaml\n")
    path = tmp_path / "here" / "broken.yaml"
    path.write_bytes(text.encode("latin-1"))
    assert words in refusal(["--config", str(path)])


@pytest.mark.parametrize("key", ["lr", "steps", "overwrite", "model"])
@pytest.mark.parametrize(
    "value",
    ["2024-01-01", "2024-01-01 10:00:00Z", "!!set {a}", "!!binary MQ==", "[1]", "{a: 1}", "!!omap [a: 1]",
     "", '"1\\0"', "[" + "x, " * 999 + "x]"],
)
def test_no_value_that_yaml_can_give_passes_for_another_type(key, value, tmp_path):
    said = refusal(["--config", write(tmp_path / "c.yaml", f"{key}: {value}\n")])
    assert said.startswith(f"{key} must be ") and len(said) < 150
