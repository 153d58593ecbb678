"""config.py: one configuration with a clear precedence, and one sentence for whatever cannot work."""

import dataclasses
from pathlib import Path

import pytest

from config import Config, ConfigError, load_config

ROOT = Path(__file__).parents[1]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(arguments: list[str]) -> str:
    """The one sentence with which these arguments are refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------- where it is from


def test_default_then_yaml_then_command_line(tmp_path):
    config = write(tmp_path / "c.yaml", "group_size: 6\nlr: 1e-5\n")
    assert load_config([]).group_size == Config().group_size == 5
    assert load_config(["--config", config]).group_size == 6
    for arguments in (["--config", config, "--group_size", "7"], ["--group_size=7", "--config", config]):
        loaded = load_config(arguments)
        assert (loaded.group_size, loaded.lr) == (7, 1e-5), "--key value wins wherever it stands"


def test_a_later_file_wins_over_an_earlier_one(tmp_path):
    files = [write(tmp_path / f"{i}.yaml", f"seed: {i}\n" + "lr: 0.5\n" * (i == 1)) for i in (1, 2)]
    loaded = load_config(["--config", files[0], "--config", files[1]])
    assert (loaded.seed, loaded.lr) == (2, 0.5)


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
    assert paths
    for path in paths:
        assert isinstance(load_config(["--config", str(path)]), Config)


# -------------------------------------------------------------------------------------------- types of values


@pytest.mark.parametrize(
    ("value", "expected"),
    [("true", True), ("True", True), ("1", True), ("false", False), ("False", False), ("0", False)],
)
def test_bools(value, expected, tmp_path):
    assert load_config(["--shuffle_rewards", value]).shuffle_rewards is expected
    config = write(tmp_path / "c.yaml", f"shuffle_rewards: {value}\n")
    assert load_config(["--config", config]).shuffle_rewards is expected


def test_a_flag_without_a_value_is_true():
    loaded = load_config(["--overwrite", "--seed", "3"])
    assert loaded.overwrite is True and loaded.seed == 3
    assert refusal(["--run_dir", "--resume"]).startswith("--run_dir needs a value"), "which is no switch"


@pytest.mark.parametrize("text", ["1e-6", "1.0e-6", "0.000001", "'1e-6'"])
def test_floats_of_any_spelling(text, tmp_path):
    """YAML reads 1e-6, without a dot, as a string."""
    loaded = load_config(["--config", write(tmp_path / "c.yaml", f"lr: {text}\n")])
    assert loaded.lr == 1e-6 and isinstance(loaded.lr, float)


def test_every_value_has_the_type_of_its_default(tmp_path):
    config = write(tmp_path / "c.yaml", "steps: '12'\nkl_coef: 0\nrun_dir: 7\nprompts_per_step: 512.0\n")
    loaded = load_config(["--config", config])
    for field in dataclasses.fields(Config):
        assert type(getattr(loaded, field.name)) is type(field.default), field.name
    assert (loaded.steps, loaded.run_dir, loaded.prompts_per_step) == (12, "7", 512)


WRONG = {  # the kind of a setting: lines of YAML that do not give it one
    "a whole number": ["steps: true", "steps: 1.5", "steps: abc", "steps: .inf", "steps: [1]", "steps:"],
    "a number": ["lr: true", "lr: fast", "lr: .nan", "lr: {a: 1}"],
    "true or false": ["overwrite: 2", "overwrite: ja", "overwrite: [true]"],
    "text": ["model: [a, b]", "data:"],
}


@pytest.mark.parametrize(("kind", "line"), [(kind, line) for kind, lines in WRONG.items() for line in lines])
def test_wrong_types_in_yaml_are_refused(kind, line, tmp_path):
    message = refusal(["--config", write(tmp_path / "c.yaml", line + "\n")])
    assert message.startswith(f"{line.partition(':')[0]} must be {kind}, not ")


# -------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--learning_rte 1", "unknown setting 'learning_rte'; --help lists them"),
        ("--groupsize 4", "unknown setting 'groupsize'; did you mean 'group_size'?"),
        ("tiny.yaml", "'tiny.yaml'"),
        ("--group_size 3 4", "'4'"),
        ("--resume_step 3", "resume_step needs --resume true"),
        ("--group_size 1", "group_size must be at least 2"),
        ("--group_size 0", "group_size must be greater than 0"),
        ("--prompts_per_step 10 --minibatch_prompts 4", "(10) must be a multiple of minibatch_prompts (4)"),
        ("--temperature nan", "temperature must be a number, not 'nan'"),
        ("--steps 1.5", "steps must be a whole number, not '1.5'"),
        ("--max_tokens_per_micro_batch=-1", "max_tokens_per_micro_batch must be greater than 0"),
        ("--lr=-1e-6", "lr must not be negative"),
        ("--kl_coef=-1", "kl_coef must not be negative"),
        ("--test_share 1", "test_share must be from 0 to below 1"),
        ("--clip_eps 2", "clip_eps must be at most 1"),
        ("--data_from 0.5 --data_to 0.5", "data_from (0.5) must be below data_to (0.5)"),
        ("--sharding hybrid", "sharding must be full or hsdp"),
        ("--offload some", "offload must be reference or all"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments, words):
    assert words in refusal(arguments.split())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nlr: [1\nsteps: 2\n", "(line 3)"),
        ("seed: 1\n\tlr: 2\n", "(line 2)"),
        ("- seed\n", "must hold `key: value` lines"),
        ("", "must hold `key: value` lines"),
        ("run_dir: läufe\n", "cannot read"),  # written as Latin-1
        ("base: nowhere.yaml\n", "cannot read"),
        ("seed: 1\nlr: 1e-6\nseed: 2\n", "seed stands 2 times"),
        ("base: broken.yaml\n", "must name another YAML file"),
        ("base: ../other/broken.yaml\n", "must name another YAML file"),  # which names this one
    ],
)
def test_broken_yaml_is_one_sentence(text, words, tmp_path):
    for name in ("here", "other"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "broken.yaml", "base: ../here/broken.yaml\n")
    path = tmp_path / "here" / "broken.yaml"
    path.write_bytes(text.encode("latin-1"))
    message = refusal(["--config", str(path)])
    assert words in message and str(path.parent) in message
