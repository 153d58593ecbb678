"""ToolACE's notation; what training makes of examples: repetitions, splits, token ids; the command line."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_layouts import ADD, ids_of, save, shared, xlam

import data
from config import Config
from corpus.examples import Example, Splits, record_of
from corpus.layouts import load_examples
from corpus.sources import DataError
from corpus.tiny_model import build_tiny_tokenizer
from corpus.toolace import parse_toolace_calls
from data import load_splits, tokenize_splits
from prompts import ToolCall, encode_prompt


def parsed(value: str):
    calls = parse_toolace_calls(f"[f(x={value})]", ["f"])
    return None if calls is None else calls[0].arguments["x"]


def test_every_golden_call_string_gives_the_intended_calls():
    with gzip.open(shared("golden/toolace_parse_cases.jsonl.gz"), "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows:
        calls = parse_toolace_calls(row["text"], row["tool_names"])
        got = None if calls is None else [call.as_dict() for call in calls]
        assert json.dumps(got, sort_keys=True) == json.dumps(row["expected"], sort_keys=True), row["text"]
    assert len(rows) == 790


@pytest.mark.parametrize("text, value", [
    ("'it\\'s (a) [b], c=1'", "it's (a) [b], c=1"),
    ('"two\nlines"', "two\nlines"),
    (r'"\d \\d \a\x41 \u00e9 \U0001f600 \ud83d\ude00 \101"', "\\d \\d \aA é 😀 😀 A"),
    ("{'a': [True, null, {\"b\": .5}], 'c': {},}", {"a": [True, None, {"b": 0.5}], "c": {}}),
    ("-3", -3), ("1e3", 1000.0), ("[ ]", []),
    # What has no quotes and is no number is a text.
    ("Paris", "Paris"), (" New York ", "New York"), ("2024-05-16", "2024-05-16"), ("007", "007"),
    ("[Paris, 'Rome', 1]", ["Paris", "Rome", 1]), ("true", True),
])
def test_values_are_python_or_json_literals_or_plain_text(text, value):
    assert parsed(text) == value and type(parsed(text)) is type(value)


@pytest.mark.parametrize("text", [
    "1e999", "nan", "[1 2]", "'a", "[1}", "{1: 2}", "{'a': 1, 'a': 2}", '"\\ud83d"',
    "9" * 5000, "[" * 9999 + "]" * 9999, "", "(1)", "1, x=2", "1, 2", "1]", "g(y=1)",
])
def test_what_is_no_json_value_does_not_parse(text):
    assert parsed(text) is None


@pytest.mark.parametrize("text", "| [|f()|[f()|[f()].|[f()] [f()]|[f() f()]|[g()]|[f(=1)]|[,]".split("|"))
def test_what_is_no_call_list_does_not_parse(text):
    assert parse_toolace_calls(text, ["f"]) is None


def test_white_space_and_trailing_commas_do_not_matter_and_the_longest_name_wins():
    calls = parse_toolace_calls(" [ f ( a = 1 , b.c = 'x' , ) ,\n g( ) , ] ", ["f", "g"])
    assert calls == [ToolCall("f", {"a": 1, "b.c": "x"}), ToolCall("g", {})]
    calls = parse_toolace_calls("[f(x) V2(), f(x)(), f(x=1)]", ["f", "f(x)", "f(x) V2"])
    assert [call.name for call in calls] == ["f(x) V2", "f(x)", "f"]


def test_repeated_examples_name_the_first_one(tmp_path):
    calls = [{"name": "add", "arguments": {"a": value}} for value in (1, 2)]
    a = save(tmp_path / "a.json", xlam(id="first", answers=calls), xlam(id="turned", answers=calls[::-1]))
    b = save(tmp_path / "b.json", xlam(id="again", answers=calls), xlam(id="other", answers=calls[:1]))
    seen: dict[bytes, str] = {}
    (kept, dropped), (rest, more) = (load_examples(path, seen) for path in (a, b))
    assert ids_of(kept) == ["first"] and rest == []
    # A reward compares multisets of calls.
    reasons = [("turned", "duplicate"), ("again", "duplicate"), ("other", "contradiction")]
    assert [(drop.id, drop.reason) for drop in dropped + more] == reasons
    assert all("as first of a.json" in drop.detail for drop in dropped + more)


def test_an_id_that_repeats_gets_its_line(tmp_path):
    path = save(tmp_path / "x.json", *(xlam(query=f"Add {i}.") for i in range(3)))
    assert ids_of(load_examples(path)[0]) == ["7", "7@2", "7@3"]
    rows = [xlam(id=rid, query=f"Add {i}.") for i, rid in enumerate(("a", "a@3", "a", ""))]
    assert ids_of(load_examples(save(tmp_path / "y.json", *rows))[0]) == ["a", "a@3", "a@3@3", "3"]


def save_numbered(path: Path, *ids: int) -> str:
    return str(save(path, *(xlam(id=rid, query=f"Add {rid}.") for rid in ids)))


def test_a_tenth_is_held_out_by_the_seed_alone(tmp_path):
    path = save_numbered(tmp_path / "x.json", *range(40))
    splits = load_splits(Config(data=path))
    train, held_out = ids_of(splits.train), ids_of(splits.held_out["held_out"])
    assert (len(train), len(held_out)) == (36, 4) and {*train, *held_out} == {str(i) for i in range(40)}
    assert train == sorted(train, key=int)  # the file's order; the order of training is batch_for_step's
    turned = save_numbered(tmp_path / "y.json", *reversed(range(40)))
    assert set(ids_of(load_splits(Config(data=turned)).held_out["held_out"])) == set(held_out)
    assert set(ids_of(load_splits(Config(data=path, seed=1)).held_out["held_out"])) != set(held_out)


def test_several_files_are_joined_and_a_test_file_replaces_the_split(tmp_path):
    a, b = save_numbered(tmp_path / "a.json", 1, 2), save_numbered(tmp_path / "b.json", 3)
    splits = load_splits(Config(data=f"{a}, {b}", test_share=0.0))
    assert ids_of(splits.train) == ["1", "2", "3"] and splits.held_out == {}
    test = save_numbered(tmp_path / "c.json", 20, 21, 22)
    splits = load_splits(Config(data=a, test_data=test, eval_cases=2))
    chosen = set(ids_of(splits.held_out["held_out"]))  # at random: the first might be all of one kind
    assert len(splits.train) == 2 and len(chosen) == 2 and chosen < {"20", "21", "22"}


def test_an_id_is_a_name_and_only_the_field_record_joins_steps(tmp_path):
    rows = [xlam(id=f"dump#{i}", query=f"Add {i}.") for i in range(40)]
    splits = load_splits(Config(data=str(save(tmp_path / "x.json", *rows))))
    assert (len(splits.train), len(splits.held_out["held_out"])) == (36, 4)
    said = [[{"role": "user", "content": str(i)}] for i in range(40)]
    rows = [dict(id=f"r{i}", record=i // 20, messages=one, tools=[], answer=[]) for i, one in enumerate(said)]
    splits = load_splits(Config(data=str(save(tmp_path / "y.json", *rows)), test_share=0.5))
    assert (len(splits.train), len(splits.held_out["held_out"])) == (20, 20)


def test_no_step_of_a_conversation_of_test_data_is_trained_on(tmp_path, capsys):
    """Neither a copy, nor a later step, which shows the answer, nor an earlier one."""
    def asked(texts: Sequence[str]) -> dict:
        said = [{"role": "user", "content": text} for text in texts]
        return {"messages": said, "tools": [ADD], "answer": []}

    train = save(tmp_path / "a.json", *map(asked, ("123", "12", "1", "13", "2")))
    test = save(tmp_path / "b.json", asked(("1 ", "2")) | {"tools": [ADD | {"description": ""}]})
    splits = load_splits(Config(data=str(train), test_data=str(test)))
    assert ids_of(splits.train) == ["3", "4"] and "data: 3 examples" in capsys.readouterr().out
    with pytest.raises(DataError, match="no example to train on"):
        load_splits(Config(data=str(test), test_data=str(test)))


def test_parts_of_the_training_data_share_nothing_and_lose_nothing(tmp_path):
    """SFT on one half and RL on the other must not see the same question, nor two steps of one dialogue."""
    ids = [f"r{i}#{step}" for i in range(40) for step in range(1 + i % 3)]  # records of 1, 2 or 3 steps
    said = [[{"role": "user", "content": rid}] for rid in ids]
    rows = [dict(id=i, messages=text, tools=[], answer=[]) for i, text in zip(ids, said)]
    rows = [row | {"record": row["id"].partition("#")[0]} for row in rows]
    path = str(save(tmp_path / "x.json", *rows))
    whole = load_splits(Config(data=path))
    pairs = [(0, 0.3), (0.3, 0.35), (0.35, 0.9), (0.9, 1)]
    parts = [load_splits(Config(data=path, data_from=a, data_to=b)) for a, b in pairs]
    assert sorted(rid for one in parts for rid in ids_of(one.train)) == sorted(ids_of(whole.train))
    records = [{record_of(example) for example in one.train} for one in parts]
    assert [len(one) for one in records] == [round(36 * b) - round(36 * a) for a, b in pairs]
    assert sum(map(len, records)) == len(set().union(*records)) == 36, "no record is cut in two"
    held_out = {record_of(example) for example in whole.held_out["held_out"]}
    assert len(held_out) == 4 and not held_out & set().union(*records)
    for one in parts:
        assert one.held_out == whole.held_out and one.train == [e for e in whole.train if e in one.train]


@pytest.mark.parametrize("settings, complaint", [
    ({}, "data: no training file given; use --data FILE"),
    ({"data": "bad.json"}, "bad.json leaves no example to train on; run: python data.py inspect"),
    ({"data": "x.json", "data_to": 0.1}, "the part from 0 to 0.1 of 1 training records is empty; widen"),
])
def test_without_training_data_there_is_no_run(tmp_path, monkeypatch, settings, complaint):
    monkeypatch.chdir(tmp_path)
    save(Path("bad.json"), xlam(answers="[{"))
    save(Path("x.json"), xlam())
    with pytest.raises(DataError, match=complaint):
        load_splits(Config(**settings))


def test_prompts_become_the_ids_of_encode_prompt_and_long_ones_are_skipped():
    tokenizer, template = build_tiny_tokenizer([], 259), "{tools}"
    asked = [[{"role": "user", "content": "x" * length}] for length in (5, 500, 6, 500)]
    *train, last = [Example(rid, "xlam", messages, [ADD], []) for rid, messages in zip("abcd", asked)]
    splits, ids = Splits(train, {"held_out": [last]}), encode_prompt(tokenizer, asked[2], [ADD], template)
    tokenized = tokenize_splits(splits, tokenizer, template, Config(max_prompt_tokens=len(ids)))
    assert ids_of(one.example for one in tokenized.train) == ["a", "c"] and tokenized.held_out == {}
    assert tokenized.train[1].ids == ids
    with pytest.raises(DataError, match=r"all 3 training prompts are longer than max_prompt_tokens \(9\)"):
        tokenize_splits(splits, tokenizer, template, Config(max_prompt_tokens=9), quiet=True)


def test_the_command_line(tmp_path):
    """What a user sees: prepare, then stats and inspect on its result; and a mistake."""
    out = tmp_path / "out"
    path = save(tmp_path / "x.json", xlam(), xlam(id=8, answers="[{"), xlam(id=9, query="More."))

    def data_py(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, str(Path(data.__file__)), *map(str, arguments)]
        offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        return subprocess.run(command, capture_output=True, encoding="utf-8", env=offline)

    done = data_py("prepare", "--xlam", path, "--test_share", 0, "--out", out)
    assert (done.returncode, done.stderr) == (0, "") and "1 dropped records and steps" in done.stdout
    done = data_py("stats", out / "train.jsonl")
    assert (done.returncode, done.stderr) == (0, "") and "prompt characters: min " in done.stdout
    done = data_py("inspect", path, 1)
    assert (done.returncode, done.stderr) == (0, "") and "2 examples (2 single)" in done.stdout
    assert "dropped: line 2, id 8: broken_json: " in done.stdout
    for wrong in (["look"], ["inspect", "somebody/something"]):  # the second: the hub, offline
        done = data_py(*wrong)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert done.stderr.startswith(("error: there is no command", "error: somebody/something is no"))
    for asked in ([], ["-h"], ["inspect", "--help"]):
        done = data_py(*asked)
        assert (done.returncode, done.stderr) == (0, "") and "usage: python data.py" in done.stdout


def test_what_is_printed_of_a_file_does_not_act_on_the_terminal(tmp_path, capsys):
    hostile = "\x1b[2K\r\x07\x9b"
    rows = xlam(id=hostile, query=hostile), xlam(id=f"{hostile}2", answers="[{")
    path = save(tmp_path / f"x{hostile}.json", *rows)
    data.load_files(str(path))
    for command in ("inspect", "stats"):
        data.main([command, str(path)])
    with pytest.raises(DataError, match=r"x\\x1b\[2K\\x0d") as caught:
        data.load_files(str(path) + "x")
    printed = "".join(capsys.readouterr()) + str(caught.value)
    assert printed.count("\\x1b[2K\\x0d\\x07\\x9b") > 5 and not set(printed) & set("\x1b\r\x07\x9b")
