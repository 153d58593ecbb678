"""Distilling: a file of right replies, from the training examples alone, whatever interrupted the run.

The teacher is the model of helpers.warmed_up_task, which is right in about a third of its samples: it copies
two digits well, but writes them as text in two of three cases, as its demonstrations did.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ENVIRONMENT, ROOT, as_arguments, run_here

import sft
from config import ConfigError, UserError, load_config
from corpus import distill
from corpus.distill import example_key, read_journal
from corpus.examples import Example
from corpus.layouts import load_examples
from corpus.sources import DataError, append_jsonl, read_jsonl
from data import load_splits, tokenize_splits
from reward import score

SAMPLES = 4
KEYS = "model data test_share prompt_template max_prompt_tokens max_response_tokens seed temperature".split()


@pytest.fixture(scope="module")
def settings(warmed) -> dict[str, object]:
    """Of a distillation with a fifth of the 70 examples held out, 8 prompts at a time."""
    chosen = {key: warmed[key] for key in KEYS if key in warmed}
    return chosen | {"test_share": 0.2, "rollout_batch_size": 8 * SAMPLES, "samples": SAMPLES}


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory) -> Path:
    """The file that a user's command writes."""
    out = tmp_path_factory.mktemp("straight") / "traces.jsonl"
    command = [sys.executable, "data.py", "distill", *as_arguments(settings | {"out": out})]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return out


def distil(settings: dict[str, object], out: Path, **changes: object) -> Path:
    distill.main(as_arguments(settings | {"out": out} | changes), load_splits, tokenize_splits)
    return out


@pytest.fixture(scope="module")
def training(settings) -> dict[str, Example]:
    own = {key: value for key, value in settings.items() if key != "samples"}
    return {example.id: example for example in load_splits(load_config(as_arguments(own))).train}


def test_every_trace_is_a_right_reply_to_its_training_example(straight, training):
    written, dropped = load_examples(straight)
    assert len(training) == 56 and 10 < len(written) < 56 and not dropped, "without the held-out cases"
    for example in written:
        assert example_key(example) == example_key(training[example.id])
        assert [score(trace, example.answer).total for trace in example.demonstrations] == [1.0]
    assert [e.id for e in written] == [rid for rid in training if rid in {e.id for e in written}], "in order"
    rows = read_jsonl(Path(f"{straight}.tried"))[1:]
    assert all(row["right"] + sum(row["reasons"].values()) == SAMPLES for row in rows) and len(rows) == 56


def test_sft_on_the_traces_teaches_what_the_teacher_knew_sometimes(straight, warmed, tmp_path):
    """The teacher's own right replies are imitated, and the habit of its wrong ones goes."""
    changes = dict(data=straight, run_dir=tmp_path / "sft", steps=40, sft_lr=1e-3, sft_batch=8)
    log = read_jsonl(run_here(sft.main, warmed | changes) / "log.jsonl")
    assert log[-1]["held_out/accuracy"] > log[0]["held_out/accuracy"] + 0.3


def test_what_was_found_can_be_used_and_is_not_tried_again(straight, settings, tmp_path, monkeypatch):
    """Ctrl-C first, then a kill that cuts a line in two. Prompts tried in vain count as tried, too."""
    out, journal = tmp_path / "traces.jsonl", tmp_path / "traces.jsonl.tried"
    batches, real = [], distill.sample_groups

    def sample(model, tokenizer, prompts, *rest, **more):
        batches.append(len(prompts))
        if len(batches) == 4:
            raise KeyboardInterrupt
        return real(model, tokenizer, prompts, *rest, **more)

    monkeypatch.setattr(distill, "sample_groups", sample)
    with pytest.raises(KeyboardInterrupt):
        distil(settings, out)
    assert 0 < len(load_examples(out)[0]) <= 24
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:20]) + lines[20][:30])
    assert distil(settings, out).read_bytes() == straight.read_bytes()
    assert sum(batches[4:]) == 57 - 20
    whole = Path(f"{straight}.tried").read_bytes().splitlines()
    assert sorted(journal.read_bytes().splitlines()) == sorted(whole)
    monkeypatch.delattr(distill, "load_model")
    assert distil(settings, out).read_bytes() == straight.read_bytes(), "nothing is left to try"


def test_samples_of_other_settings_and_a_file_of_someone_else_are_left_alone(straight, settings, tmp_path):
    before = Path(f"{straight}.tried").read_bytes()
    with pytest.raises(ConfigError, match="traces.jsonl.tried was made with another temperature"):
        distil(settings, straight, temperature=0.9)
    assert Path(f"{straight}.tried").read_bytes() == before
    (tmp_path / "own.jsonl").write_text("precious")
    with pytest.raises(ConfigError, match="own.jsonl exists, and was not written by distill"):
        distil(settings, tmp_path / "own.jsonl")


def test_nothing_right_is_an_error_and_writes_no_file(settings, tmp_path):
    (tmp_path / "own.py").write_text("def never(completion, answer, tools):\n    return 0")
    with pytest.raises(DataError, match="no reply of .* got full reward, so .*traces.jsonl is not written"):
        distil(settings, tmp_path / "traces.jsonl", reward=f"{tmp_path / 'own.py'}:never", data_to=0.1)
    assert not (tmp_path / "traces.jsonl").exists() and (tmp_path / "traces.jsonl.tried").exists()


@pytest.mark.parametrize("content, said", [
    ("precious", "was made with another model"), ('{"mine": 1}\n', "was made with another model"),
    ("\0\0", "was made with another model"), ("[1]\n", ".tried:1: not a JSON object"),
    (None, ".tried:3: not a JSON object"), ("{}", "the row of id None lacks key, reasons"),
])
def test_a_journal_that_is_broken_or_of_someone_else_is_left_alone(tmp_path, content, said):
    path, author = tmp_path / "traces.jsonl.tried", {"model": "m", "seed": 0}
    assert read_journal(path, author) == {}
    if content == "{}":  # a row among ours
        append_jsonl(path, [{}])
    elif content is None:
        append_jsonl(path, [{"key": "k"}])
        with path.open("a") as file:
            file.write("{\n")
    else:
        path.write_text(content)
    before = path.read_bytes()
    with pytest.raises(UserError, match=said):
        read_journal(path, author)
    assert path.read_bytes() == before
