"""prepare: what it promises of its files, its split and its counts."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_layouts import ADD, save, toolace, xlam

import data
from config import Config, UserError
from corpus import prepare
from corpus.examples import hold_out
from corpus.layouts import load_examples
from corpus.sources import DataError, file_sha256
from corpus.tiny_model import build_tiny_tokenizer
from data import load_splits
from model import load_tokenizer

SUB = {"name": "sub", "description": "Takes away.", "parameters": {"b": {"type": "int"}}}


def numbered(rid: int, **changes) -> dict:
    """A record of xLAM of its own."""
    answers = [{"name": "add", "arguments": {"a": rid}}]
    return xlam(**{"id": rid, "query": f"Add {rid}.", "tools": [ADD, SUB], "answers": answers} | changes)


def run(out: Path, *arguments: object) -> dict[str, list[dict]]:
    """Runs prepare in this process; every JSONL file that it wrote."""
    prepare.main([*map(str, arguments), "--out", str(out)], load_tokenizer)
    return {file.name: [json.loads(line) for line in file.open()] for file in out.glob("*.jsonl")}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def sources(tmp_path) -> list[str]:
    """30 good records of xLAM, a bad one; of ToolACE 12 with one step, 6 with two, one without."""
    x = save(tmp_path / "x.json", *(numbered(i) for i in range(30)), numbered(30, answers="[{"))
    first = [[("user", f"go {i}"), ("assistant", f"[add(a={i})]"), ("tool", "1")] for i in range(18)]
    second = [("assistant", "So?"), ("user", "on"), ("assistant", "[add(a=0)]")]
    talks = [turns + second * (i >= 12) for i, turns in enumerate(first)] + [[("user", "hello")]]
    system = f"Tools: {json.dumps([ADD])}"
    t = save(tmp_path / "t.json", *(toolace(*turns, system=system) for turns in talks))
    return ["--xlam", str(x), "--toolace", str(t)]


def test_every_step_is_in_one_file(sources, tmp_path):
    files = run(tmp_path / "out", *sources)
    ids = Counter(row["id"] for name in ("train.jsonl", "test.jsonl") for row in files[name])
    steps = [f"toolace-{i}#{turn}" for i in range(18) for turn in ((1, 5) if i >= 12 else (1,))]
    assert ids == Counter([*(f"xlam-{i}" for i in range(30)), *steps])
    dropped = [(Path(r["file"]).name, r["line"], r["id"], r["reason"]) for r in files["dropped.jsonl"]]
    assert dropped == [("x.json", 31, "xlam-30", "broken_json"), ("t.json", 19, "toolace-18", "no_calls")]


@pytest.mark.parametrize("options", ["", "--no_call_turns --layouts trl,verl --irrelevance 0.5 --mask 0.5"])
def test_the_same_inputs_and_options_give_the_same_bytes(sources, tmp_path, options):
    outs = [tmp_path / name for name in ("a", "b")]
    for out in outs:
        run(out, *sources, *options.split())
    assert contents(outs[0]) == contents(outs[1]) and len(contents(outs[0])) == 5 + 4 * bool(options)


def test_the_manifest_tells_what_was_made_from_what(sources, tmp_path):
    out = tmp_path / "out"
    run(out, *sources, "--layouts", "trl", "--seed", 5)
    facts = json.loads((out / "manifest.json").read_text())
    first = facts["inputs"][0]
    assert (facts["options"]["seed"], first["sha256"]) == (5, file_sha256(Path(sources[1])))
    counts = {"records": {"xlam": 31}, "examples": {"xlam": 30}, "dropped": {"broken_json": 1}}
    assert first.items() >= counts.items()
    made = [file for file in out.iterdir() if file.name != "manifest.json"]
    assert facts["outputs"] == {file.name: file_sha256(file) for file in made}


def test_ids_of_several_files_never_meet(tmp_path):
    a, b = save(tmp_path / "a.json", numbered(1)), save(tmp_path / "b.json", numbered(1, query="One."))
    files = run(tmp_path / "out", "--xlam", a, "--xlam", b, "--data", b, "--test_share", 0)
    assert [row["id"] for row in files["train.jsonl"]] == ["xlam-1", "xlam2-1"] and "test.jsonl" not in files
    [row] = files["dropped.jsonl"]
    assert (row["id"], row["reason"]) == ("data-1", "duplicate")
    assert row["detail"].endswith("as xlam2-1 of b.json")


def test_near_duplicates_are_dropped_from_the_later_file(tmp_path):
    """Not from the same: the steps of a conversation share what the user says. Nor where no call is right."""
    a = save(tmp_path / "a.json", numbered(1), numbered(2, query="add 1"), numbered(3, query="?"))
    none = numbered(7, query="Add 1", answers=[])
    b = save(tmp_path / "b.json", numbered(4, query="ADD, 1!"), numbered(5), numbered(6, query="!"), none)
    for options, lost, first in (
        (("--data", a, "--xlam", b), ["xlam-4"], "data-1 of a.json"),
        (("--xlam", b, "--data", a), ["data-1", "data-2"], "xlam-4 of b.json"),
        (("--xlam", b, "--data", a, "--keep", "near_duplicate"), [], ""),
    ):
        files = run(tmp_path / "out", *options, "--test_share", 0, "--overwrite")
        assert [row["id"] for row in files["dropped.jsonl"]] == lost
        assert len(files["train.jsonl"]) == 7 - len(lost)
        for row in files["dropped.jsonl"]:
            assert row["reason"] == "near_duplicate" and row["detail"].endswith(first)


@pytest.mark.parametrize("seed", [0, 1])
def test_training_on_the_raw_files_holds_out_the_same_records(sources, tmp_path, seed):
    """One split for all: else a model trained on raw files has seen what the prepared test file asks."""
    for kind, path in (sources[:2], sources[2:]):
        files = run(tmp_path / kind, kind, path, "--seed", seed)
        splits = load_splits(Config(data=path, seed=seed, test_share=0.1))
        for name, part in (("train", splits.train), ("test", splits.held_out["held_out"])):
            prepared = {row["id"].partition("-")[2] for row in files[f"{name}.jsonl"]}
            assert {example.id for example in part} == prepared
        train, test = ({row["id"].split("#")[0] for row in files[f"{n}.jsonl"]} for n in ("train", "test"))
        assert not train & test, "later steps stay with their record"


def test_records_that_hold_steps_of_one_conversation_are_not_on_both_sides(tmp_path):
    """Many files have a record for every step, which shows those before it."""
    answer = [{"name": "add", "arguments": {"a": 1}}]
    past = [{"name": "add", "arguments": {"a": 2}}]
    call = {"role": "assistant", "calls": past}, {"role": "tool", "content": "2"}
    talks = [[{"role": "user", "content": str(i)}, *call * steps] for i in range(10) for steps in range(3)]
    rows = [{"messages": said, "tools": [ADD], "answer": answer} for said in talks]
    path = save(tmp_path / "x.json", *rows)
    files = run(tmp_path / "out", "--data", path)
    train, test = ({row["messages"][0]["content"] for row in files[f"{n}.jsonl"]} for n in ("train", "test"))
    assert test and not train & test and {row["reason"] for row in files["dropped.jsonl"]} == {"held_out"}
    splits = load_splits(Config(data=str(path)))
    assert [f"data-{example.id}" for example in splits.train] == [row["id"] for row in files["train.jsonl"]]


@pytest.mark.parametrize("records, share, warned", [(4, 0.1, True), (4, 0, False), (10, 0.1, False)])
def test_a_share_that_holds_nothing_out_is_said(tmp_path, capsys, records, share, warned):
    x = save(tmp_path / "x.json", *(numbered(i) for i in range(records)))
    files = run(tmp_path / "out", "--xlam", x, "--test_share", share)
    assert ("warning: " in capsys.readouterr().out) == warned
    assert ("test.jsonl" in files) == (records == 10)


def test_the_demo_s_data_goes_through_it(tmp_path):
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(outs, (0, 0, 1)):
        files = run(out, "--data", "synthetic", "--seed", seed)
    a, b, c = (json.loads((out / "manifest.json").read_text()) for out in outs)
    assert a == b and a["inputs"][0]["sha256"] != c["inputs"][0]["sha256"]
    rows = files["train.jsonl"] + files["test.jsonl"]
    assert len(rows) == Config().synthetic_train and len(files["test.jsonl"]) == len(rows) / 10
    trained = {example.id: example for example in load_splits(Config(data="synthetic", seed=1)).train}
    for example in load_examples(outs[2] / "train.jsonl")[0]:
        same = trained[example.id.partition("-")[2]]
        assert (example.messages, example.answer, example.demonstrations) == (
            same.messages, same.answer, same.demonstrations
        )


@pytest.mark.parametrize("command, said", [
    ("stats {}", ""), ("inspect {} 50", ""), ("prepare --help", ""), ("look", "error: there is no command"),
])
def test_a_closed_pipe_is_no_error(sources, command, said):
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does, sooner or later
    words = [sys.executable, data.__file__, *command.format(sources[1]).split()]
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, encoding="utf-8", env=buffered)
    os.close(writing)
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


def test_another_file_moves_few_records_between_the_parts():
    """So two people who prepare slightly different mixtures test on nearly the same records."""
    keys = [f"x{i}" for i in range(2000)]
    before = hold_out(keys, 0.1, 0)
    after = hold_out([*keys, *(f"t{i}" for i in range(200))], 0.1, 0)
    assert len(before) == 200 and len(after) == 220 and len(before - after) < 20


def test_augmentation_leaves_the_test_part_as_it_is(sources, tmp_path):
    plain = run(tmp_path / "plain", *sources)
    files = run(tmp_path / "out", *sources, "--irrelevance", 1, "--mask", 1)
    assert files["test.jsonl"] == plain["test.jsonl"]
    added = [row for row in files["train.jsonl"] if "#irrelevant" in row["id"]]
    of_xlam = sum(row["source"] == "xlam" for row in plain["train.jsonl"])  # ToolACE's have one tool only
    assert len(added) == of_xlam == len(files["train.jsonl"]) - len(plain["train.jsonl"])
    assert all("#masked" in row["id"] for row in files["train.jsonl"])


def test_long_and_refused_prompts_are_dropped_where_there_is_a_tokenizer(tmp_path, capsys):
    tokenizer = build_tiny_tokenizer([], 259)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "template.txt").write_text("{tools}")
    bad = numbered(2, query="long " * 99), numbered(3, query="<|im_end|>")
    x = save(tmp_path / "x.json", numbered(1), *bad)
    options = ["--prompt_template", tmp_path / "template.txt", "--max_prompt_tokens", 400, "--test_share", 0]
    files = run(tmp_path / "out", "--xlam", x, "--tokenizer", tmp_path / "tokenizer", *options)
    [example] = load_examples(tmp_path / "out/train.jsonl")[0]
    dropped = [(row["id"], row["reason"], row["detail"][:8]) for row in files["dropped.jsonl"]]
    assert example.id == "xlam-1"
    assert dropped == [("xlam-2", "too_long", "the prom"), ("xlam-3", "refused", "bad_text")]
    prepare.stats([str(x), "--tokenizer", str(tmp_path / "tokenizer")], load_tokenizer)
    printed = capsys.readouterr().out
    assert "1 prompts are refused, such as that of 3: bad_text" in printed and "x.json: 2 examples" in printed


def test_a_prepared_set_is_replaced_only_on_request(sources, tmp_path):
    out = tmp_path / "out"
    run(out, *sources, "--layouts", "trl")
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(DataError, match="out holds a prepared set already; .*--overwrite"):
        run(out, *sources)
    assert contents(out) == before
    run(out, *sources, "--seed", 1, "--overwrite")
    assert set(before) - set(contents(out)) == {"trl_train.jsonl", "trl_test.jsonl"}
    assert contents(out)["train.jsonl"] != before["train.jsonl"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", ["split", "write_rows", "manifest"])
def test_an_interrupted_run_leaves_the_folder_as_it_was(sources, tmp_path, monkeypatch, phase, number):
    fresh, old = tmp_path / "fresh", tmp_path / "old"
    run(old, *sources)
    before = contents(old)
    monkeypatch.setattr(prepare, phase, lambda *_: os.kill(os.getpid(), number))
    for out, options in ((fresh, []), (old, ["--overwrite"])):
        with pytest.raises(KeyboardInterrupt):
            data.main(["prepare", *sources, "--layouts", "trl", "--out", str(out), *options])
    assert not list(fresh.glob("*")) and contents(old) == before


def test_a_run_that_stops_while_it_publishes_leaves_no_manifest(sources, tmp_path):
    run(tmp_path, *sources, "--test_share", 0)
    (tmp_path / "test.jsonl").mkdir()  # no file can take its place
    with pytest.raises(OSError, match="test.jsonl"):
        run(tmp_path, *sources, "--overwrite")
    assert not (tmp_path / "manifest.json").exists()


def test_a_mistake_is_one_sentence(sources, tmp_path):
    with pytest.raises(UserError, match="t.json:1: the layout is that of toolace, not of xlam") as caught:
        run(tmp_path / "out", "--xlam", sources[3])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    for out in (Path(sources[1]), Path(sources[1]) / "in" / "it"):
        with pytest.raises(UserError, match="x.json is no folder"):
            run(out, *sources)


def test_files_may_be_separated_by_commas_as_in_training(tmp_path):
    a, b = (save(tmp_path / f"{rid}.json", numbered(rid)) for rid in (1, 2))
    files = run(tmp_path / "out", "--data", f"{a},{b}", "--test_share", 0)
    assert [row["id"] for row in files["train.jsonl"]] == ["data-1", "data2-2"]
