"""doctor.py and checks.py: every check has a case that it warns of, and all are content with the demo."""

import dataclasses
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_runtime import ONE, OneRank
from tokenizers import normalizers
from transformers import GenerationConfig

from config import Config, ConfigError
from corpus.examples import Example, Splits
from corpus.tiny_model import build_tiny_model, build_tiny_tokenizer
from data import load_splits, tokenize_splits
from distributed.ranks import Ranks
from ops import checks, doctor
from ops.checks import Check, Start
from ops.export import export
from prompts import ToolCall, load_template, render_prompt
from reward import Reward, reward_function

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
TEMPLATE = load_template(str(ROOT / "configs" / "tiny_prompt.txt"))
SMALL = Config(
    model="tiny", data="synthetic", synthetic_train=60, eval_cases=8, prompts_per_step=8, minibatch_prompts=8,
    group_size=4, rollout_batch_size=64, steps=20, max_prompt_tokens=400, max_response_tokens=100, save_every=0,
    prompt_template=str(ROOT / "configs" / "tiny_prompt.txt"), tiny_hidden=16,
)


def two_ranks(theirs) -> Ranks:
    """Two processes of which the other one always has `theirs`."""

    class Two(Ranks):
        def gather(self, item):
            return [item, theirs]

    return Two(0, 2, torch.device("cpu"))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Start:
    """A start of the demo in small, about which nothing is wrong."""
    folder = tmp_path_factory.mktemp("start")
    config = replace(SMALL, run_dir=str(folder / "run"))
    splits = load_splits(config)
    bare = build_tiny_tokenizer([], 0)
    tokenizer = build_tiny_tokenizer(
        [render_prompt(bare, e.messages, e.tools, TEMPLATE) for e in splits.train], 600
    )
    export(build_tiny_model(tokenizer, 16, 1, 0), tokenizer, folder / "model")
    tokenized = tokenize_splits(splits, tokenizer, TEMPLATE, config, quiet=True)
    reward = reward_function("binary")
    return Start(config, ONE, TEMPLATE, reward, splits, tokenized, tokenizer, str(folder / "model"), 20)


def with_config(start: Start, **changes) -> Start:
    return replace(start, config=replace(start.config, **changes))


def other_tokenizer(start: Start, change) -> Start:
    """The start with a tokenizer of its own, that `change` may break."""
    tokenizer = build_tiny_tokenizer(["some words"], 0)
    change(tokenizer)
    return replace(start, tokenizer=tokenizer)


def findings(start: Start) -> dict[str, str]:
    return {check.name: check.status for check in doctor.own_checks(start)}


def test_a_healthy_start_is_called_healthy(healthy):
    assert set(findings(healthy).values()) == {"ok"}
    assert len(findings(healthy)) == len(checks.CHECKS), "each check gives one line"


# -------------------------------------------------------------------------------------- machine and processes


def test_old_libraries_are_a_problem(monkeypatch):
    assert checks.check_versions().status == "ok"
    monkeypatch.setattr(checks.transformers, "__version__", "5.16.2")
    found = checks.check_versions()
    assert found.status == "problem" and "transformers >= 5.17" in found.remedy


def test_ranks_with_other_code_or_libraries_are_a_problem():
    assert checks.check_ranks(SMALL, ONE)[0].status == "ok"
    libraries = f"torch {torch.__version__}, transformers {checks.transformers.__version__}"
    for theirs, said in (
        (("far", "CPU", libraries, "another hash"), "rank 1 has another version of this project's files"),
        (
            ("far", "CPU", "torch 1", checks.code_hash()),
            "rank 1 has another version of torch or transformers",
        ),
    ):
        found = checks.check_ranks(SMALL, two_ranks(theirs))[0]
        assert found.status == "problem" and said in found.text and "far" in found.remedy


def test_processes_without_work_are_a_warning():
    theirs = (
        "far",
        "CPU",
        f"torch {torch.__version__}, transformers {checks.transformers.__version__}",
        checks.code_hash(),
    )
    found = checks.check_ranks(replace(SMALL, minibatch_prompts=1), two_ranks(theirs))[0]
    assert found.status == "warning" and "minibatch_prompts to 2" in found.remedy
    assert checks.check_ranks(replace(SMALL, minibatch_prompts=2), two_ranks(theirs))[0].status == "ok"


def test_more_threads_than_cores_are_a_warning(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    found = checks.check_threads(ONE)
    assert found.status == "warning" and "--threads 3" in found.remedy
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert checks.check_threads(ONE).status == "ok"


@pytest.mark.parametrize("seconds, status", [(1.0, "warning"), (0.001, "ok")])
def test_a_slow_link_between_gpus_is_a_warning(monkeypatch, seconds, status):
    """64 MiB in a second is a network without RDMA. No GPU is needed to be told so: the device is only
    named.
    """
    times = iter([i * seconds for i in range(100)])
    monkeypatch.setattr(checks.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(checks.dist, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.empty(size, device="meta"))
    found = checks.check_bandwidth(Ranks(0, 2, torch.device("cuda")))
    assert found.status == status and "64 MiB" in found.text


# ------------------------------------------------------------------------------------- tokenizer and sampling


def test_a_tokenizer_that_drops_tags_is_a_problem(healthy):
    def drop_tags(tokenizer):
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("<think>", "")

    found = checks.check_template(other_tokenizer(healthy, drop_tags))
    assert found.status == "problem" and "do not survive" in found.text


def test_a_second_system_prompt_is_a_problem(healthy):
    def second_system_prompt(tokenizer):
        tokenizer.chat_template = (
            "<|im_start|>system\nYou are a helper.<|im_end|>\n" + tokenizer.chat_template
        )

    found = checks.check_template(other_tokenizer(healthy, second_system_prompt))
    assert found.status == "problem" and "second system prompt" in found.text


def test_a_turn_that_closes_with_another_token_is_a_warning(healthy):
    """A model that was taught to close with a token that we do not know never stops: every reply runs to the
    limit.
    """

    def other_end(tokenizer):
        tokenizer.add_tokens(["<|end|>"])
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|end|>")

    found = checks.check_end_tokens(other_tokenizer(healthy, other_end))
    assert found.status == "warning" and "<|end|>, with which its chat template" in found.text


def test_an_end_token_of_the_generation_config_that_we_lack_is_a_warning(healthy, tmp_path):
    GenerationConfig(eos_token_id=[1, 5]).save_pretrained(tmp_path)
    found = checks.check_end_tokens(replace(healthy, path=str(tmp_path)))
    assert found.status == "warning" and found.text.count("generation_config") == 1


def test_the_family_s_missing_end_tokens_are_named(healthy):
    def llama(tokenizer):
        tokenizer.add_tokens(["<|eot_id|>"])

    found = checks.check_end_tokens(other_tokenizer(healthy, llama))
    assert "lacks <|eom_id|>, <|end_of_text|> of the Llama 3 family" in found.text


def test_the_model_s_own_sampling_settings_are_named(healthy, tmp_path):
    """Qwen2.5-Instruct's; they must not be used, and a reader must see that they are not."""
    GenerationConfig(do_sample=True, top_k=20, top_p=0.8, repetition_penalty=1.05).save_pretrained(tmp_path)
    found = checks.check_sampling(replace(healthy, path=str(tmp_path)))
    assert found.text.endswith("not used: the model's own top_k 20, top_p 0.8, repetition_penalty 1.05")
    assert "not used" not in checks.check_sampling(healthy).text


def test_continuous_batching_on_a_cpu_is_a_warning(healthy):
    assert (
        checks.check_sampling(with_config(healthy, rollout_engine="continuous_batching")).status == "warning"
    )


# --------------------------------------------------------------------------------------------------- the data


def with_train(start: Start, examples: list[Example]) -> Start:
    splits = replace(start.splits, train=examples)
    return replace(
        start, splits=splits,
        tokenized=tokenize_splits(splits, start.tokenizer, TEMPLATE, start.config, quiet=True),
    )


def test_many_prompts_above_the_limit_are_a_warning(healthy):
    lengths = sorted(len(item.ids) for item in healthy.tokenized.train)
    short = with_config(healthy, max_prompt_tokens=lengths[len(lengths) // 2])
    found = checks.check_prompts(with_train(short, healthy.splits.train))
    assert found.status == "warning" and "max_prompt_tokens" in found.remedy


def test_right_replies_above_the_limit(healthy):
    """A prompt whose right reply is cut off can never be paid; where most are, training is pointless."""
    assert checks.check_replies(with_config(healthy, max_response_tokens=5)).status == "problem"
    long = replace(healthy.splits.train[0], id="long", answer=[ToolCall("f", {"x": "word " * 200})])
    found = checks.check_replies(with_train(healthy, [*healthy.splits.train, long]))
    assert found.status == "warning" and "cuts off 1 of 61: long" in found.text


def test_more_tokens_than_positions_are_a_problem(healthy):
    assert checks.check_limits(with_config(healthy, max_response_tokens=40000)).status == "problem"


def test_mostly_empty_answers_are_a_warning(healthy):
    empty = [replace(example, answer=[]) for example in healthy.splits.train[:30]]
    found = checks.check_labels(with_train(healthy, healthy.splits.train[:30] + empty))
    assert found.status == "warning" and "[]" in found.remedy


def deep(levels: int) -> list:
    return [deep(levels - 1)] if levels else []


def test_a_ground_truth_that_cannot_be_paid(healthy):
    """JSON nested deeper than the parser reads. A few such records are a warning, more than 1 % a problem."""
    bad = replace(healthy.splits.train[0], id="bad", answer=[ToolCall("f", {"x": deep(70)})])
    found = checks.check_truth(with_train(healthy, [*healthy.splits.train[:20], bad]))
    assert found.status == "problem" and "1 of 21 records: 0 (bad_json) for bad" in found.text
    found = checks.check_truth(with_train(healthy, [*healthy.splits.train * 4, bad]))
    assert found.status == "warning"


def test_a_reward_that_pays_silence_is_a_warning(healthy):
    found = checks.check_truth(
        replace(with_config(healthy, reward="tool_n1_llama"), reward=reward_function("tool_n1_llama"))
    )
    assert found.status == "warning" and "pays an empty reply" in found.text, (
        "the reference's reward for Llama does"
    )


def test_an_own_reward_is_called_less_often_at_a_start(healthy):
    """It may be slow; what it pays in full is not known, so only an answer that is paid like nothing is
    wrong.
    """
    calls = []

    def own(completion, answer, tools):
        calls.append(completion)
        return Reward(float(bool(completion)), True, True, "")

    own_start = replace(with_config(healthy, reward="own.py:own"), reward=own)
    assert checks.check_truth(own_start).status == "ok"
    assert len(calls) == 2 * checks.OWN_REWARD_EXAMPLES
    found = checks.check_truth(replace(own_start, reward=lambda *_: Reward(0.5, True, True, "")))
    assert found.status == "warning" and "does not pay it in full in 20 of 20 records: 0.5" in found.text


def test_a_schedule_without_held_out_cases_or_with_too_few_prompts_is_a_warning(healthy):
    blind = replace(healthy, tokenized=Splits(healthy.tokenized.train, {}))
    assert "test_share" in checks.check_schedule(blind).remedy
    assert "prompts_per_step to 60" in checks.check_schedule(with_config(healthy, prompts_per_step=64)).remedy


# -------------------------------------------------------------------------------------------- disk and memory


Usage = namedtuple("Usage", "total used free")


def test_a_disk_without_room(healthy, monkeypatch):
    """Not one checkpoint fits: a problem, unless the run may go on without. Not all of them fit: a
    warning.
    """
    size = 12 * sum(p.numel() for p in build_tiny_model(healthy.tokenizer, 16, 1, 0).parameters())
    start = with_config(healthy, save_every=5)  # 4 checkpoints in 20 steps, and the model is a third of one
    for share, status in ((0.9, "problem"), (1.1, "warning"), (4.2, "warning"), (4.4, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, share=share: Usage(0, 0, share * size))
        assert checks.check_disk(start).status == status, share
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    assert checks.check_disk(with_config(start)).status == "warning"


def test_a_cpu_without_memory_is_a_warning(healthy, monkeypatch):
    monkeypatch.setattr(checks, "_available_memory", lambda: 1000.0)
    assert checks.check_memory(healthy).status == "warning"
    monkeypatch.setattr(checks, "_available_memory", lambda: 0.0)
    assert checks.check_memory(healthy).status == "ok", "a system that does not tell is no reason to worry"


def test_gpu_memory_is_compared_with_the_plan(healthy, monkeypatch):
    """The plan's advice for a GPU that is too small, and what other processes hold; all figures are made
    up.
    """
    on_gpu = replace(healthy, ranks=OneRank(0, 1, torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    for total, free, status, said in (
        (80e9, 79e9, "ok", "fits"),
        (1e9, 1e9, "warning", "does not fit"),
        (80e9, 40e9, "warning", "38.0 GB"),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free, total=total: (free, total))
        found = checks.check_memory(on_gpu)
        assert found.status == status and said in found.text and bool(found.remedy) == (status != "ok")


def test_a_run_dir_that_cannot_be_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("")
    for run_dir, why in ((tmp_path / "file", "no folder"), (tmp_path / "file" / "run", "Not a directory")):
        folder, found = doctor.make_folder(replace(SMALL, run_dir=str(run_dir)), ONE)
        assert (folder, found.status) == (None, "problem") and why in found.text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_dir_that_is_read_only_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, who may write everywhere
    (tmp_path / "run").mkdir()
    folder, found = doctor.make_folder(replace(SMALL, run_dir=str(tmp_path / "run")), ONE)
    assert (folder, found.status) == (None, "problem")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_dir_that_a_start_would_refuse(tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    folders = [folder_and_status(used, tmp_path, resume=True)]
    (used / "log.jsonl").write_text("")
    folders += [folder_and_status(used, tmp_path), folder_and_status(used, tmp_path, overwrite=True)]
    assert folders == ["problem", "warning", "ok"]


def folder_and_status(run_dir: Path, above: Path, **changes) -> str:
    folder, found = doctor.make_folder(replace(SMALL, run_dir=str(run_dir), **changes), ONE)
    assert folder.parent == above, "on the same disk, but not inside"
    shutil.rmtree(folder)
    return found.status


def test_a_disk_that_another_rank_does_not_see_is_a_problem(tmp_path):
    found = checks.check_shared(tmp_path, tmp_path / "run", two_ranks(theirs=False))
    assert found.status == "problem" and "rank 1 does not see" in found.text
    assert checks.check_shared(tmp_path, tmp_path / "run", two_ranks(theirs=True)).status == "ok"


# ----------------------------------------------------------------------------------------------------- a step


METRICS = {
    "time/rollout_s": 1.0, "memory/peak_gib": 1.0, "sampling/sampling_logp_difference/mean": 1e-6, "reward": 0.5,
    "format_rate": 0.9, "completions/clipped_ratio": 0.1, "frac_reward_zero_std": 0.5, "updates_skipped_nonfinite": 0,
}


def step_statuses(start: Start, **changes) -> dict[str, str]:
    return {check.name: check.status for check in doctor.check_step(METRICS | changes, start, start.config)}


def test_what_a_step_may_show(healthy):
    assert set(step_statuses(healthy).values()) == {"ok"}
    assert step_statuses(healthy, updates_skipped_nonfinite=1)["dry run"] == "problem"
    wrong_temperature = {"sampling/sampling_logp_difference/mean": 0.33}
    assert step_statuses(healthy, **wrong_temperature)["sampler"] == "problem"
    for key, value in (("completions/clipped_ratio", 0.8), ("frac_reward_zero_std", 1.0)):
        assert step_statuses(healthy, **{key: value})["first replies"] == "warning"
        assert step_statuses(with_config(healthy, warmup_steps=5), **{key: value})["first replies"] == "ok"


def test_a_nearly_full_gpu_is_a_warning(healthy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 80 * 2**30))
    on_gpu = replace(healthy, ranks=OneRank(0, 1, torch.device("cuda")))
    assert step_statuses(on_gpu, **{"memory/peak_gib": 70.0})["peak memory"] == "ok"
    assert step_statuses(on_gpu, **{"memory/peak_gib": 76.0})["peak memory"] == "warning"


def test_a_model_that_cannot_be_packed_is_a_warning_and_bf16_weights_are_a_problem(healthy):
    model = build_tiny_model(healthy.tokenizer, 16, 1, 0)
    cpu = torch.device("cpu")
    assert [check.status for check in doctor.check_model(model, SMALL, cpu)] == ["ok", "ok"]
    for change in ({"shared_prefix": False}, {"head_only": False}):
        other = build_tiny_model(healthy.tokenizer, 16, 1, 0)
        other.abilities = dataclasses.replace(other.abilities, **change)
        found = doctor.check_model(other, SMALL, cpu)[0]
        assert found.status == "warning" and "rollouts by generate" in found.text
    assert doctor.check_model(model.to(torch.bfloat16), SMALL, cpu)[1].status == "problem"


def test_the_dry_run_gets_the_longest_prompts_and_settings_of_its_own(healthy, tmp_path):
    """Nothing of it may reach run_dir, a tracker or a benchmark; without a second update nothing is known of
    the sampler.
    """
    start = with_config(
        healthy, warmup_steps=9, resume=True, trackers="wandb", bfcl="there", prompts_per_step=6
    )
    seen = []

    def dry_run(config, ranks):
        seen.append(config)
        return build_tiny_model(healthy.tokenizer, 16, 1, 0), METRICS

    assert {check.status for check in doctor.try_one_step(start, tmp_path, dry_run)} == {"ok"}
    settings = seen[0]
    assert Path(settings.run_dir).parent == tmp_path
    assert (settings.warmup_steps, settings.resume, settings.trackers, settings.bfcl) == (0, False, "", "")
    assert (settings.prompts_per_step, settings.minibatch_prompts) == (6, 3)
    train = load_splits(settings).train
    longest = sorted((len(item.ids) for item in start.tokenized.train), reverse=True)[:6]
    again = tokenize_splits(Splits(train, {}), start.tokenizer, TEMPLATE, settings, quiet=True).train
    assert [len(item.ids) for item in again] == longest


@pytest.mark.parametrize(
    "error, said",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (KeyError("oh"), "KeyError: 'oh' (test_doctor.py:"),
        (ConfigError("x must be y"), "x must be y"),
    ],
)
def test_an_error_of_the_dry_run_is_a_line(healthy, tmp_path, error, said):
    def dry_run(config, ranks):
        raise error

    [found] = doctor.try_one_step(healthy, tmp_path, dry_run)
    assert found.status == "problem" and found.text.startswith(said) and found.remedy


# ------------------------------------------------------------------------------------------- the whole doctor


def test_a_check_that_fails_is_a_line():
    def check(argument):
        return {}[argument]

    [found] = doctor.guarded("mine", check, "key")
    assert found.status == "problem" and found.text.startswith(
        "check failed: KeyError: 'key' (test_doctor.py:"
    )


def test_brief_says_one_line_when_all_is_well(healthy, capsys):
    written = run_dir_of(healthy)
    doctor.brief(healthy)
    expected = len(checks.CHECKS) + 4  # versions, processes, threads, run_dir
    assert capsys.readouterr().out == f"doctor: {expected} checks ok\n"
    shutil.rmtree(written)


def run_dir_of(start: Start) -> Path:
    """The start's run directory as open_run leaves it."""
    run_dir = Path(start.config.run_dir)
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("")
    return run_dir


def test_brief_prints_warnings_and_stops_at_problems(healthy, capsys, monkeypatch):
    """A check that fails itself must not stop a run: that is the doctor's fault."""
    written = run_dir_of(healthy)
    monkeypatch.setitem(checks.CHECKS, "labels", lambda start: {}["oh"])
    doctor.brief(with_config(healthy, prompts_per_step=64, minibatch_prompts=64))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line[0] != " "] == [
        "warning  labels",
        "warning  schedule",
        "doctor",
    ]
    assert lines[-1] == "doctor: 13 checks ok, warnings: 2, problems: 0"
    with pytest.raises(ConfigError, match="^right replies: .*; raise max_response_tokens"):
        doctor.brief(with_config(healthy, max_response_tokens=5))
    shutil.rmtree(written)


def whole_doctor(tmp_path: Path, dry_run, capsys, **changes) -> tuple[list[str], int]:
    """Lines and exit code of a doctor run of the demo in small, without processes of its own."""
    config, code = replace(SMALL, run_dir=str(tmp_path / "run"), **changes), 0
    try:
        doctor.main(config, ONE, dry_run, lambda config, examples: config.steps)
    except SystemExit as stopped:
        code = stopped.code
    assert list(tmp_path.iterdir()) == [], "the doctor leaves nothing behind"
    return capsys.readouterr().out.splitlines(), code


def test_the_whole_doctor_and_what_it_renders(healthy, tmp_path, capsys):
    model = build_tiny_model(healthy.tokenizer, 16, 1, 0)
    lines, code = whole_doctor(tmp_path, lambda config, ranks: (model, METRICS), capsys)
    assert (code, lines[-1]) == (0, "doctor: 23 checks ok")
    titles = [line.split(",")[0] for line in lines if line.startswith("--- ")]
    assert titles == ["--- shortest prompt", "--- median prompt", "--- longest prompt"]
    replies = [line for line in lines if line.startswith("<think>…</think><tool_call>[")]
    assert len(replies) == 1 and replies[0].endswith("</tool_call><|im_end|>"), "the right reply, once"


def test_the_whole_doctor_after_a_step_that_raised(tmp_path, capsys):
    def dry_run(config, ranks):
        Path(config.run_dir).mkdir()
        (Path(config.run_dir) / "half_written").write_text("")
        raise torch.OutOfMemoryError("CUDA out of memory")

    lines, code = whole_doctor(tmp_path, dry_run, capsys)
    assert code == 1 and lines[-1].endswith("problems: 1")
    assert "lower rollout_batch_size" in lines[-2]


def test_the_whole_doctor_without_data(tmp_path, capsys):
    lines, code = whole_doctor(tmp_path, None, capsys, data=str(tmp_path / "none.json"))
    assert code == 1 and lines[-3].startswith("problem  data and model: ") and "none.json" in lines[-3]


def test_other_ranks_findings_are_printed_too(tmp_path, capsys, monkeypatch):
    """A rank whose own GPU is nearly full finds that alone."""
    monkeypatch.setattr(doctor, "make_folder", lambda config, ranks: (None, Check("run_dir", "ok", "")))
    theirs = [Check("peak memory", "warning", "79 GiB of 80", "lower something")]
    ranks = two_ranks(theirs)
    monkeypatch.setattr(doctor, "check_ranks", lambda config, ranks: [])
    monkeypatch.setattr(doctor, "check_bandwidth", lambda ranks: [])
    doctor.main(SMALL, ranks, None, None)
    assert "warning  peak memory, rank 1: 79 GiB of 80" in capsys.readouterr().out


@pytest.mark.skipif(
    "--doctor" not in (ROOT / "grpo.py").read_text(encoding="utf-8"), reason="grpo.py has no --doctor yet"
)
def test_a_doctor_run_as_users_start_it(tmp_path):
    """Two processes, one real step of the demo in small: exit code 0, and nothing is left behind."""
    settings = dict(
        synthetic_train=60, eval_cases=8, prompts_per_step=8, minibatch_prompts=8, group_size=4, steps=3,
        tiny_hidden=32, max_response_tokens=60,
    )
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(ROOT / "grpo.py"),
    ]
    command += [
        "--config",
        str(ROOT / "configs" / "tiny.yaml"),
        "--doctor",
        "--run_dir",
        str(tmp_path / "run"),
        *words,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("doctor: ") and "problems" not in lines[-1].replace("problems: 0", "")
    assert any(line.startswith("ok       sampler: ") for line in lines), "sampler and trainer were compared"
    assert list(tmp_path.iterdir()) == []
