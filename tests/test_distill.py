"""Distilling: a file of right replies, from the training examples alone, whatever interrupted the run.

The teacher is the model of helpers.warmed_up_task, which is right in about a third of its samples: it copies
two digits well, but writes them as text in two of three cases, as its demonstrations did.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import ENVIRONMENT, ROOT, as_arguments, run_here, sum_example, warmed_up_task

import sft
from config import ConfigError, load_config
from corpus import distill
from corpus.distill import example_key, with_traces
from corpus.examples import Example
from corpus.layouts import load_examples
from corpus.sources import DataError, read_jsonl
from data import load_splits, tokenize_splits
from reward import score

torch.set_num_threads(1)

SAMPLES = 4
KEYS = "model data test_share prompt_template max_prompt_tokens max_response_tokens seed temperature".split()


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> dict[str, object]:
    return warmed_up_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def settings(task) -> dict[str, object]:
    """Of a distillation with a fifth of the 70 examples held out, 8 prompts at a time."""
    chosen = {key: task[key] for key in KEYS if key in task}
    return chosen | {"test_share": 0.2, "rollout_batch_size": 8 * SAMPLES, "samples": SAMPLES}


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory) -> tuple[Path, str]:
    """The file that a user's command writes, and what it prints."""
    out = tmp_path_factory.mktemp("straight") / "traces.jsonl"
    command = [sys.executable, "data.py", "distill", *as_arguments(settings | {"out": out})]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture
def left_over(straight, tmp_path) -> tuple[Path, Path]:
    """A copy of the file and the journal that the run left."""
    for path in straight[0].parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / "traces.jsonl", tmp_path / "traces.jsonl.tried"


def distil(settings: dict[str, object], out: Path, **changes: object) -> Path:
    distill.main(as_arguments(settings | {"out": out} | changes), load_splits, tokenize_splits)
    return out


@pytest.fixture(scope="module")
def training(settings) -> dict[str, Example]:
    own = {key: value for key, value in settings.items() if key != "samples"}
    return {example.id: example for example in load_splits(load_config(as_arguments(own))).train}


def test_every_trace_is_a_right_reply_to_its_training_example(straight, training):
    written, dropped = load_examples(straight[0])
    assert len(training) == 56 and 10 < len(written) < 56 and not dropped, "without the held-out cases"
    for example in written:
        assert example_key(example) == example_key(training[example.id])
        assert [score(trace, example.answer).total for trace in example.demonstrations] == [1.0]
    assert [e.id for e in written] == [rid for rid in training if rid in {e.id for e in written}], "in order"


def test_the_report_is_what_the_samples_say(straight, training):
    said, rows = straight[1], read_jsonl(Path(f"{straight[0]}.tried"))[1:]
    assert sorted(row["id"] for row in rows) == sorted(training)
    assert all(row["right"] + sum(row["reasons"].values()) == SAMPLES for row in rows)
    assert all(len(set(row["traces"])) == len(row["traces"]) <= row["right"] for row in rows)
    solved, right = sum(bool(row["traces"]) for row in rows), sum(row["right"] for row in rows)
    assert solved < right, "an equal reply is kept once"
    assert f"{solved} of 56 prompts have a right reply ({solved / 56:.1%}); {solved} traces kept" in said
    assert f"{right} of 224 samples are right ({right / 224:.1%})" in said
    for reason, count in sum((Counter(row["reasons"]) for row in rows), Counter()).items():
        assert re.search(rf"^ +{count} +[\d.]+%  {reason}$", said, re.MULTILINE)


def test_so_many_different_traces_are_kept():
    examples = [sum_example(i, i, i) for i in range(2)]
    tried = {example_key(examples[0]): {"traces": ["a", "b", "c"]}, example_key(examples[1]): {"traces": []}}
    (found,) = with_traces(examples, tried, keep=2)
    assert (found.id, found.demonstrations) == (examples[0].id, ("a", "b"))


def test_sft_on_the_traces_teaches_what_the_teacher_knew_sometimes(straight, task, tmp_path):
    """The teacher's own right replies are imitated, and the habit of its wrong ones goes."""
    changes = dict(data=straight[0], run_dir=tmp_path / "sft", steps=40, sft_lr=1e-3, sft_batch=8)
    log = read_jsonl(run_here(sft.main, task | changes) / "log.jsonl")
    assert log[-1]["held_out/accuracy"] > log[0]["held_out/accuracy"] + 0.3
    assert log[-1]["held_out/n"] == 30


def test_after_a_kill_only_the_missing_prompts_are_tried(left_over, settings, monkeypatch):
    """The kill cut a line in two. Prompts tried in vain count as tried; the file is the same to the byte."""
    out, journal = left_over
    whole, lines = out.read_bytes(), journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:40]) + lines[40][:30])
    out.unlink()
    asked, real = [], distill.sample_groups
    monkeypatch.setattr(distill, "sample_groups", lambda *a, **more: asked.extend(a[2]) or real(*a, **more))
    assert distil(settings, out).read_bytes() == whole and len(asked) == 57 - 40
    assert sorted(journal.read_bytes().splitlines(keepends=True)) == sorted(lines)
    monkeypatch.delattr(distill, "load_model")
    assert distil(settings, out).read_bytes() == whole, "nothing is left, so no model is loaded"


def test_what_is_found_before_ctrl_c_can_be_used(straight, settings, tmp_path, monkeypatch, capsys):
    calls, real = [], distill.sample_groups

    def interrupted(*args, **more):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(distill, "sample_groups", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distil(settings, tmp_path / "traces.jsonl")
    assert "32 prompts are not tried yet: the same command goes on" in capsys.readouterr().out
    assert 0 < len(load_examples(tmp_path / "traces.jsonl")[0]) <= 24
    assert distil(settings, tmp_path / "traces.jsonl").read_bytes() == straight[0].read_bytes()


@pytest.mark.parametrize("key, other", [("temperature", 0.9), ("samples", 2), ("reward", "no_reason")])
def test_samples_of_other_settings_are_not_mixed(left_over, settings, key, other):
    out, journal = left_over
    before = journal.read_bytes()
    with pytest.raises(ConfigError, match=f"traces.jsonl.tried was made with another {key}; give another"):
        distil(settings, out, **{key: other})
    assert journal.read_bytes() == before


def test_a_start_that_tried_nothing_binds_nobody(settings, tmp_path):
    with pytest.raises(DataError, match="all 6 training prompts are longer"):
        distil(settings, tmp_path / "traces.jsonl", max_prompt_tokens=1, data_to=0.1)
    assert load_examples(distil(settings, tmp_path / "traces.jsonl", data_to=0.1))[0]


def test_a_file_of_someone_else_is_not_overwritten(settings):
    """Above all not the training file itself."""
    with pytest.raises(ConfigError, match="train.jsonl exists, and was not written by distill"):
        distil(settings, settings["data"])


def test_nothing_right_is_an_error_and_writes_no_file(settings, tmp_path):
    (tmp_path / "own.py").write_text("def never(completion, answer, tools):\n    return 0")
    with pytest.raises(DataError, match="no reply of .* got full reward, so .*traces.jsonl is not written"):
        distil(settings, tmp_path / "traces.jsonl", reward=f"{tmp_path / 'own.py'}:never", data_to=0.1)
    assert not (tmp_path / "traces.jsonl").exists() and (tmp_path / "traces.jsonl.tried").exists()
