"""grpo.py: whole runs as users start them, on two processes, interrupted and resumed, and with bad input."""

import json
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ENVIRONMENT, ROOT, as_arguments, run_forked, run_here, weights, write_task
from safetensors.torch import load_file
from torch.testing import assert_close

import grpo
import session
from config import UserError
from corpus.sources import read_jsonl
from corpus.tiny_model import build_tiny_model
from model import load_tokenizer
from ops.export import export

SINGLE = [sys.executable, "grpo.py"]
DOUBLE = "-m torch.distributed.run --standalone --nproc_per_node=2 grpo.py".split()


def start(settings: dict) -> subprocess.CompletedProcess:
    """Runs the script as a user does."""
    return subprocess.run(
        SINGLE + as_arguments(settings), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
        timeout=600,
    )


def train_here(settings: dict) -> Path:
    """The same in this process, which saves the seconds that the imports take. Returns run_dir."""
    return run_here(grpo.main, settings)


@pytest.fixture(scope="module")
def settings(warmed) -> dict[str, object]:
    """A short run of the task of test_end_to_end.py, from a model whose samples are right now and then."""
    return warmed | dict(steps=4, prompts_per_step=4, minibatch_prompts=2, group_size=4, lr=2e-4, kl_coef=0.1)


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory) -> Path:
    """4 steps of 2 updates each, on one process, without a break."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    done = start(settings | {"run_dir": run_dir})
    assert done.returncode == 0, done.stderr
    log = read_jsonl(run_dir / "log.jsonl")
    # Otherwise the tests below would compare two runs in which nothing happens.
    assert sum(row["frac_reward_zero_std"] < 1 for row in log[1:]) >= 3
    assert all(row["updates"] == 2 for row in log[1:]) and log[-1]["kl"] > 0
    return run_dir


def samples_by_step(run_dir: Path) -> dict[int, list[tuple]]:
    steps: dict[int, list[tuple]] = {}
    for row in read_jsonl(run_dir / "samples.jsonl"):
        steps.setdefault(row["step"], []).append((row["prompt_id"], row["completion"], row["reward"]))
    return {step: sorted(rows) for step, rows in steps.items()}


@pytest.mark.parametrize("prompts", [4, 3])
def test_two_processes_do_what_one_does(settings, straight, tmp_path, prompts):
    """The same samples, and the same weights but for the order of float additions. Three prompts do not
    divide by two, and are one update; 1 prompt, and other ways of sharding: tests/test_fsdp.py.

    A key bias adds nearly the same to all scores of a query, so its gradient is almost rounding alone, and
    Adam makes full steps of it: only there may more than 1e-6 differ.
    """
    one, two = straight, tmp_path / "two"
    if prompts == 3:
        settings = settings | {"prompts_per_step": 3, "minibatch_prompts": 3}
        one = train_here(settings | {"run_dir": tmp_path / "one"})
    assert "2 process(es)" in run_forked(*DOUBLE, *as_arguments(settings | {"run_dir": two}))
    assert samples_by_step(two) == samples_by_step(one)
    assert {step: len(rows) for step, rows in samples_by_step(two).items()} == {
        step: 4 * prompts for step in (1, 2, 3, 4)
    }
    first, second = weights(one), weights(two)
    begin = load_file(settings["model"] / "model.safetensors")
    for name in first:
        assert_close(second[name], first[name], atol=1e-4 if name.endswith("k_proj.bias") else 1e-6, rtol=0)
    assert max((first[name] - begin[name]).abs().max() for name in first) > 3e-4, (
        "there was something to compare"
    )
    for row, other in zip(read_jsonl(one / "log.jsonl"), read_jsonl(two / "log.jsonl"), strict=True):
        same = {
            key
            for key in row
            if not key.startswith(("time/", "memory/")) and not key.endswith(("seconds", "per_s"))
        }
        assert {k: other[k] for k in same} == pytest.approx({k: row[k] for k in same}, rel=1e-3, abs=1e-5)


def test_a_run_that_skips_and_resamples_says_so_in_its_log(settings, tmp_path):
    run_dir = train_here(
        settings | {"skip_zero_variance": "rest", "resample_rounds": 1, "run_dir": tmp_path / "run"}
    )
    log = read_jsonl(run_dir / "log.jsonl")[1:]
    assert all(0 <= row["update/skipped_token_ratio"] < 1 for row in log)
    assert all(row["rollout/resampled_ratio"] == row["frac_reward_zero_std"] for row in log), (
        "each flat group, once"
    )
    assert 0 < sum(row["rollout/resampled_ratio"] for row in log) < 4
    assert all(row["rollout/tokens_per_s"] > 0 and row["memory/peak_gib"] > 0.1 for row in log)


def test_a_resumed_run_is_the_straight_run_to_the_bit(settings, straight, tmp_path):
    """Weights alone would not do: Adam's moments, data order, seeds and the reference count too."""
    run_dir = tmp_path / "run"
    train_here(settings | {"run_dir": run_dir, "steps": 2, "save_every": 2})
    # As if it had been killed in step 3, after its log line and before its checkpoint:
    with (run_dir / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "reward": 77}\n')
    train_here(settings | {"run_dir": run_dir, "steps": 4, "resume": "true"})
    resumed, whole = weights(run_dir), weights(straight)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    log = read_jsonl(run_dir / "log.jsonl")
    assert [row["step"] for row in log] == [0, 1, 2, 3, 4]
    assert log[3]["reward"] == read_jsonl(straight / "log.jsonl")[3]["reward"] != 77
    assert samples_by_step(run_dir) == samples_by_step(straight)
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 4
    seconds, flops = ([row[key] for row in log[1:]] for key in ("seconds", "flops"))
    assert seconds == sorted(seconds) and flops == sorted(flops), "the first part of the run counts"


def test_a_resumed_run_uses_the_learning_rate_that_it_logs(settings, tmp_path):
    """The optimizer's saved state carries the old rate: --lr was logged, and silently not used."""
    run_dir = tmp_path / "run"
    before = weights(train_here(settings | {"run_dir": run_dir, "steps": 1}))
    train_here(settings | {"run_dir": run_dir, "steps": 2, "resume": "true", "lr": 0})
    assert read_jsonl(run_dir / "log.jsonl")[-1]["learning_rate"] == 0
    assert all(torch.equal(weight, before[name]) for name, weight in weights(run_dir).items())


def test_the_learning_rate_follows_its_schedule_through_a_resume(settings, tmp_path):
    """And the optimizer takes it: a quarter of the rate is a quarter of the way up to it, to the bit."""
    scheduled = settings | {"lr_warmup_steps": 2, "lr_schedule": "linear", "save_every": 2}
    run_dir = train_here(scheduled | {"run_dir": tmp_path / "run"})
    rates = [row["learning_rate"] for row in read_jsonl(run_dir / "log.jsonl")[1:]]
    assert rates == pytest.approx([1e-4, 1.5e-4, 1e-4, 0.5e-4])
    whole = weights(run_dir)
    train_here(scheduled | {"run_dir": run_dir, "resume": "true", "resume_step": 2})
    assert [row["learning_rate"] for row in read_jsonl(run_dir / "log.jsonl")[1:]] == rates
    assert all(torch.equal(weight, whole[name]) for name, weight in weights(run_dir).items())
    first = {"steps": 1, "run_dir": tmp_path / "first"}
    start, quarter = ({"lr_warmup_steps": 4}, {"lr": 2e-4 / 4, "overwrite": "true"})
    rising, low = (weights(train_here(settings | first | changes)) for changes in (start, quarter))
    assert all(torch.equal(rising[name], low[name]) for name in low)
    assert not all(torch.equal(low[name], whole[name]) for name in low)


def test_a_run_with_a_penalty_for_length_and_two_passes(settings, tmp_path):
    """The penalty is in the rewards that are learnt from, and says nothing else about a reply."""
    changes = dict(overlong_tokens=40, num_iterations=2, mask_truncated="true", steps=1, minibatch_prompts=4)
    run_dir = train_here(settings | changes | {"run_dir": tmp_path / "run"})
    (row,), samples = read_jsonl(run_dir / "log.jsonl")[1:], read_jsonl(run_dir / "samples.jsonl")
    assert row["updates"] == 2 and 0 < row["sampling/sampling_logp_difference/mean"] < 1e-4
    assert row["reward"] == pytest.approx(sum(sample["reward"] for sample in samples) / len(samples))
    for sample in samples:
        right = sample["reason"] == "correct"
        assert sample["reward"] == pytest.approx(right - len(sample["tokens"]) / 40)


def test_a_run_with_other_rows_of_the_tables(settings, straight, tmp_path):
    """Thoughts are counted where a loss asks for them, and their entropy is part of what is learnt."""
    rows = {"advantage": "egpo", "correction": "tis", "run_dir": tmp_path / "run"}
    run_dir = train_here(settings | rows)
    log, plain = (read_jsonl(folder / "log.jsonl")[1:] for folder in (run_dir, straight))
    assert all(row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4) for row in log)
    assert all(row["sampling/importance_sampling_ratio/bounded"] == 0 for row in log)
    same = [abs(row["grad_norm"] - other["grad_norm"]) < 1e-6 for row, other in zip(log, plain)]
    assert log[0]["reward"] == plain[0]["reward"] and not all(same)


def test_a_reference_of_ones_own(settings, tmp_path):
    """Of another shape, and not able to take packed groups; a resume notices that it has changed."""
    tokenizer = load_tokenizer(str(settings["model"]))
    model = build_tiny_model(tokenizer, 16, 3, seed=1)
    model.config.layer_types = ["sliding_attention", "full_attention", "full_attention"]
    model.config.sliding_window, model.config.use_sliding_window = 16, True
    export(model, tokenizer, tmp_path / "reference")
    own = settings | dict(reference=tmp_path / "reference", run_dir=tmp_path / "run", steps=1)
    with pytest.warns(UserWarning, match="sliding_attention"):
        train_here(own)
    assert read_jsonl(tmp_path / "run" / "log.jsonl")[-1]["kl"] > 0.1
    weights = tmp_path / "reference" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="the reference's model.safetensors.*--accept_changes true"):
        train_here(own | {"steps": 2, "resume": "true"})


def test_ctrl_c_saves_and_says_how_to_go_on(settings, tmp_path):
    run_dir = tmp_path / "run"
    long = settings | {"run_dir": run_dir, "steps": 2000}
    process = subprocess.Popen(
        SINGLE + as_arguments(long), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )
    try:
        deadline = time.monotonic() + 300
        while (
            process.poll() is None
            and time.monotonic() < deadline
            and len(read_jsonl(run_dir / "log.jsonl")) < 3
        ):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in stderr
    assert "--resume true" in stderr and str(run_dir) in stderr
    last = read_jsonl(run_dir / "log.jsonl")[-1]["step"]
    assert last >= 2 and (run_dir / f"step_{last}" / "manifest.json").exists()
    assert not (run_dir / "model").exists()
    train_here({"config": run_dir / "config.yaml", "resume": "true", "steps": last + 1, "run_dir": run_dir})
    assert [row["step"] for row in read_jsonl(run_dir / "log.jsonl")] == list(range(last + 2))
    assert (run_dir / "model").exists()


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> dict[str, object]:
    """A run that needs no model file; none of the tests below gets as far as a step."""
    folder = tmp_path_factory.mktemp("bad")
    return write_task(folder) | dict(model="tiny", tiny_hidden=16, run_dir=folder / "run")


BAD = {
    "a missing model folder": ({"model": "{tmp}/no-model"}, "no-model' does not exist"),
    "a missing reference": ({"reference": "{tmp}/no-model"}, "reference: the folder"),
    "a wrong key": ({"group_sise": 8}, "unknown setting 'group_sise'; did you mean 'group_size'?"),
    "an empty data file": ({"data": "{tmp}/empty.jsonl"}, "empty.jsonl is empty"),
    "a data file that is no data": ({"data": "{tmp}/prose.jsonl"}, "prose.jsonl"),
    "a run directory in use": ({"run_dir": "{tmp}/used"}, "used exists; add --"),
    "nothing to resume": ({"resume": "true"}, "to resume"),
    "prompts that are all too long": ({"max_prompt_tokens": 5}, "longer than max_prompt_tokens (5)"),
}


def bad_settings(case: str, task: dict, tmp_path: Path) -> tuple[dict, str]:
    """(settings, what the message must contain), with the files that the case needs."""
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "prose.jsonl").write_text("This is a letter.\nTo nobody.\n")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "log.jsonl").touch()
    changes, words = BAD[case]
    changes = {key: str(value).replace("{tmp}", str(tmp_path)) for key, value in changes.items()}
    return task | {"run_dir": tmp_path / "run"} | changes, words


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_sentence(case, task, tmp_path, monkeypatch, capsys):
    settings, words = bad_settings(case, task, tmp_path)
    monkeypatch.setattr(sys, "argv", ["grpo.py", *as_arguments(settings)])
    with pytest.raises(SystemExit) as caught:  # any other exception would be a traceback
        run_here(lambda _: runpy.run_path(str(ROOT / "grpo.py"), run_name="__main__"), settings)
    code = caught.value.code  # a status, or a text that Python prints to stderr
    message = code if isinstance(code, str) else capsys.readouterr().err.strip().splitlines()[-1]
    assert code and message.startswith("error: ") and words in message and "\n" not in message


def test_the_sentence_arrives_on_stderr(task, tmp_path):
    settings, words = bad_settings("a missing model folder", task, tmp_path)
    done = start(settings)
    assert done.returncode not in (0, 130) and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and words in done.stderr
    # A mistake does not block the run directory.
    with pytest.raises(UserError, match="longer than max_prompt_tokens"):
        train_here(settings | {"model": "tiny", "max_prompt_tokens": 5})


def test_a_resume_with_nothing_left_to_do_evaluates_once(tmp_path):
    """Fewer steps end a run early: its last row has no accuracies, and the summary used to fail."""
    settings = write_task(tmp_path) | dict(
        model="tiny", tiny_hidden=16, warmup_steps=2, steps=3, prompts_per_step=4, minibatch_prompts=4,
        group_size=2, max_response_tokens=60, eval_every=0, save_every=2, run_dir=tmp_path / "run",
    )
    run_here(grpo.main, settings)
    for name in ("model", "summary.json", "step_3", "samples.html"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "run" / "latest").write_text("step_2")
    for _ in range(2):
        run_here(grpo.main, settings | {"resume": "true", "steps": 2})
        rows = read_jsonl(tmp_path / "run" / "log.jsonl")
        assert [row["step"] for row in rows] == [0, 1, 2, 2] and "held_out/accuracy" in rows[-1]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists() and (
        tmp_path / "run" / "samples.html"
    ).exists()


def test_an_old_run_stays_where_the_new_one_cannot_start(tmp_path):
    """With --overwrite, what is wrong with prompts or benchmarks must show before the old run is gone."""
    settings = write_task(tmp_path) | dict(model="tiny", tiny_hidden=16, warmup_steps=1)
    settings |= dict(steps=1, prompts_per_step=4, minibatch_prompts=4, group_size=2, max_response_tokens=60)
    settings["run_dir"] = tmp_path / "a"
    run_here(grpo.main, settings)
    again = settings | {"model": tmp_path / "a" / "model", "run_dir": tmp_path / "b"}
    run_here(grpo.main, again)
    for wrong in ({"max_prompt_tokens": 5}, {"bfcl": tmp_path / "nowhere"}, {"loss": "grop"}):
        with pytest.raises(UserError):
            run_here(grpo.main, again | wrong | {"overwrite": "true"})
        assert (tmp_path / "b" / "summary.json").exists()


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> dict[str, object]:
    """The settings of a finished run of one step, with a warm-up and a reward of its own."""
    folder = tmp_path_factory.mktemp("small")
    own = "def letters(completion, answer, tools):\n    return len(completion) % 7\n"
    (folder / "own.py").write_text(own)
    settings = write_task(folder) | dict(
        model="tiny", tiny_hidden=16, warmup_steps=1, steps=1, prompts_per_step=4, minibatch_prompts=4,
        group_size=2, max_response_tokens=20, run_dir=folder / "run", reward=f"{folder / 'own.py'}:letters",
    )
    run_here(grpo.main, settings)
    return settings | {"resume": "true", "steps": 2}


CHANGED = {  # a file below the task's folder, what is replaced in it, and the names that must be said
    "train.jsonl": ("add", "bdd", "data"),
    "test.jsonl": ("add", "bdd", "test_data"),
    "template.txt": ("{tools}", "Tools: {tools}", "prompt_template, prompts as token ids"),
    "own.py": ("7", "8", "the reward's file"),
    "run/warmup/model/model.safetensors": ("F32", "F16", "warmup/model/model.safetensors"),
    "run/warmup/model/chat_template.jinja": ("{{", "{{ ", "warmup/model/chat_template.jinja"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_resume_notices_that_an_input_has_changed(name, small_run):
    """Half a run on other data, or against another reference, would pass for the run that was asked for."""
    path = small_run["run_dir"].parent / name
    old, new, says = CHANGED[name]
    content = path.read_bytes()
    path.write_bytes(content.replace(old.encode(), new.encode(), 1))
    try:
        with pytest.raises(UserError, match=f"{says}.*--accept_changes true"):
            run_here(grpo.main, small_run)
    finally:
        path.write_bytes(content)


def test_a_run_whose_start_model_is_gone_is_refused(small_run, tmp_path):
    """A second warm-up would give another reference."""
    run_dir = shutil.copytree(small_run["run_dir"], tmp_path / "run")
    shutil.rmtree(run_dir / "warmup")
    with pytest.raises(UserError, match="warmup/model, which this run started from, is gone; put it back"):
        run_here(grpo.main, small_run | {"run_dir": run_dir, "accept_changes": "true"})


def test_accepted_changes_are_recorded(small_run, tmp_path):
    run_dir = shutil.copytree(small_run["run_dir"], tmp_path / "run")
    with pytest.raises(UserError, match="seed 0 -> 1"):
        run_here(grpo.main, small_run | {"run_dir": run_dir, "seed": 1})
    run_here(grpo.main, small_run | {"run_dir": run_dir, "seed": 1, "accept_changes": "true"})
    state = json.loads((run_dir / "step_2" / "state.json").read_text())["state"]
    [changes] = state["run"]["changes"]
    assert "after step 1: seed 0 -> 1" in changes and state["run"]["settings"]["seed"] == 1


def test_a_finished_run_is_left_as_it_is(small_run, tmp_path, capsys):
    run_dir = shutil.copytree(small_run["run_dir"], tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    run_here(grpo.main, small_run | {"run_dir": run_dir, "steps": 1})
    after = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed <= {"lock", run_dir.name}
    assert "nothing is left to do" in capsys.readouterr().out


def test_a_resume_says_which_rows_are_lost(small_run, tmp_path, capsys):
    """A power cut may take what was not on the disk yet; so may a hand."""
    run_dir = shutil.copytree(small_run["run_dir"], tmp_path / "run")
    samples = (run_dir / "samples.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "samples.jsonl").write_text("".join(samples[:-3]))
    run_here(grpo.main, small_run | {"run_dir": run_dir})
    said = capsys.readouterr().out
    assert f"samples.jsonl: 3 of {len(samples)} rows are lost" in said and "log.jsonl" not in said


def test_a_run_that_was_stopped_between_warm_up_and_first_save_goes_on(small_run, tmp_path):
    run_dir = shutil.copytree(small_run["run_dir"], tmp_path / "run")
    shutil.rmtree(run_dir / "step_1")
    (run_dir / "latest").unlink()
    run_here(grpo.main, small_run | {"run_dir": run_dir})
    assert (run_dir / "step_2").exists()


def test_a_run_whose_log_was_lost_still_ends_well(small_run, tmp_path):
    run_dir = shutil.copytree(small_run["run_dir"], tmp_path / "run")
    for name in ("log.jsonl", "summary.json"):
        (run_dir / name).unlink()
    run_here(grpo.main, small_run | {"run_dir": run_dir, "steps": 1})
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 0


def test_logs_are_on_the_disk_before_the_checkpoint_that_relies_on_them(small_run, tmp_path, monkeypatch):
    run_dir = shutil.copytree(small_run["run_dir"], tmp_path / "run")
    done, save = [], session.Saver.save
    monkeypatch.setattr(session, "sync", lambda path: done.append(path.name))
    monkeypatch.setattr(session.Saver, "save", lambda *arguments: done.append("save") or save(*arguments))
    run_here(grpo.main, small_run | {"run_dir": run_dir})
    assert done == ["log.jsonl", "samples.jsonl", "save"]
