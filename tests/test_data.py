"""ToolACE's notation; what training makes of examples: repetitions, splits, token ids; and the command
line.
"""

import gzip
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from config import Config
from corpus.examples import STRICT, Example, Rules, Splits
from corpus.layouts import load_examples, read_examples, without_repeats
from corpus.sources import DataError
from corpus.tiny_model import build_tiny_tokenizer
from corpus.toolace import parse_toolace_calls
from data import load_splits, load_unique, tokenize_splits
from prompts import ToolCall, encode_prompt

SHARED = Path(__file__).parents[2] / "shared"
ADD = {"name": "add", "description": "Adds.", "parameters": {"a": {"type": "int"}}}


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"shared/{name} is not beside this checkout")
    return path


def xlam(**changes) -> dict:
    answers = json.dumps([{"name": "add", "arguments": {"a": 1}}])
    return {"id": 7, "query": "Add 1.", "tools": json.dumps([ADD]), "answers": answers} | changes


def save(path: Path, *records: dict) -> Path:
    path.write_text(json.dumps(records))
    return path


def save_numbered(path: Path, *ids: int) -> str:
    return str(save(path, *(xlam(id=rid, query=f"Add {rid}.") for rid in ids)))


def ids_of(examples) -> list[str]:
    return [example.id for example in examples]


def parsed(value: str):
    calls = parse_toolace_calls(f"[f(x={value})]", ["f"])
    return None if calls is None else calls[0].arguments["x"]


# ----------------------------------------------------------------------------------------------- the notation


def test_every_golden_call_string_gives_the_intended_calls():
    with gzip.open(shared("golden/toolace_parse_cases.jsonl.gz"), "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows:
        calls = parse_toolace_calls(row["text"], row["tool_names"])
        got = None if calls is None else [asdict(call) for call in calls]
        assert json.dumps(got, sort_keys=True) == json.dumps(row["expected"], sort_keys=True), row["text"]
    assert len(rows) > 700


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("'it\\'s (a) [b], c=1'", "it's (a) [b], c=1"),
        ('"two\nlines"', "two\nlines"),
        (r'"\d \\d \a\x41 \u00e9 \U0001f600 \ud83d\ude00 \101"', "\\d \\d \aA é 😀 😀 A"),
        ("{'a': [True, null, {\"b\": .5}], 'c': {},}", {"a": [True, None, {"b": 0.5}], "c": {}}),
        ("-3", -3),
        ("1e3", 1000.0),
        ("[ ]", []),
    ],
)
def test_values_are_python_or_json_literals(text, value):
    assert parsed(text) == value and type(parsed(text)) is type(value)


@pytest.mark.parametrize(
    "text",
    ["007", "1e999", "nan", "Infinity", "word", "1 2", "[1 2]", "'a", "[1}", "[,]", "{1: 2}", "{'a': 1, 'a': 2}",
     '"\\ud83d"', '"\\UFFFFFFFF"', "0x" + "f" * 9999, "9" * 5000, "[" * 9999 + "]" * 9999, "", ":", "(1)", "1, x=2",
     "1, 2", "1]", "g(y=1)"],
)
def test_what_is_no_json_value_does_not_parse(text):
    assert parsed(text) is None


@pytest.mark.parametrize(
    "text", ["", "[", "f()", "[f()", "[f()].", "[f()] [f()]", "[f() f()]", "[g()]", "[f(=1)]", "[,]"]
)
def test_what_is_no_call_list_does_not_parse(text):
    assert parse_toolace_calls(text, ["f"]) is None


def test_white_space_and_trailing_commas_do_not_matter():
    calls = parse_toolace_calls(" [ f ( a = 1 , b.c = 'x' , ) ,\n g( ) , ] ", ["f", "g"])
    assert calls == [ToolCall("f", {"a": 1, "b.c": "x"}), ToolCall("g", {})]


def test_the_longest_known_name_wins():
    names = ["f", "f(x)", "f(x) V2"]
    assert [call.name for call in parse_toolace_calls("[f(x) V2(), f(x)(), f(x=1)]", names)] == [
        "f(x) V2",
        "f(x)",
        "f",
    ]


def test_the_time_is_linear_whatever_the_text():
    n = 300_000
    start = time.perf_counter()
    for text in (" " * n, "[" * n, "[f(x='" + "\\" * n, "[f(x" + " " * n, "[f" + " " * n, "[f(x='" + "'x" * n,
                 "[" + "f(), " * n, "[f(x=[" + "[], " * n, "[f(x=" + "1, x" * n):
        parse_toolace_calls(text, ["f"], any_name=True)
    assert time.perf_counter() - start < 20  # about 3 s; a quadratic reader needs hours


# ------------------------------------------------------------------------------------------------ repetitions


def test_repeated_examples_name_the_first_one(tmp_path):
    calls = [{"name": "add", "arguments": {"a": value}} for value in (1, 2)]
    a = save(tmp_path / "a.json", xlam(id="first", answers=calls), xlam(id="turned", answers=calls[::-1]))
    b = save(tmp_path / "b.json", xlam(id="again", answers=calls), xlam(id="other", answers=calls[:1]))
    seen: dict[bytes, str] = {}
    loaded = [load_unique(path, seen) for path in (a, b)]
    assert ids_of(loaded[0][0]) == ["first"] and loaded[1][0] == []
    assert [(drop.id, drop.reason) for _, dropped in loaded for drop in dropped] == [
        ("turned", "duplicate"),  # a verifier compares multisets
        ("again", "duplicate"),
        ("other", "contradiction"),
    ]
    assert all(drop.detail.count(f"{a}: first") == 1 for _, dropped in loaded for drop in dropped)


def test_contradictions_can_be_kept_but_their_repetitions_go(tmp_path):
    answers = [[{"name": "add", "arguments": {"a": value}}] for value in (1, 2, 2, 1)]
    path = save(tmp_path / "x.json", *(xlam(id=i, answers=answer) for i, answer in enumerate(answers)))
    rules = Rules(keep=("contradiction",))
    reads = list(without_repeats(read_examples(path, rules=rules), {}, rules))
    assert [e.id for read in reads for e in read.examples] == ["0", "1"]
    assert [d.detail[-1] for read in reads for d in read.dropped] == ["1", "0"]


@pytest.mark.parametrize("other", [{"a": 1.0}, {"a": True}, {"a": "1"}])
def test_values_of_another_type_are_no_duplicates(tmp_path, other):
    answers = [[{"name": "add", "arguments": arguments}] for arguments in ({"a": 1}, other)]
    path = save(tmp_path / "x.json", *(xlam(id=i, answers=answer) for i, answer in enumerate(answers)))
    reads = without_repeats(read_examples(path, rules=Rules(keep=("wrong_type",))), {}, STRICT)
    assert [drop.reason for read in reads for drop in read.dropped] == ["contradiction"]


def test_an_id_that_repeats_gets_its_line(tmp_path):
    path = save(tmp_path / "x.json", *(xlam(query=f"Add {i}.") for i in range(3)))
    assert ids_of(load_examples(path)[0]) == ["7", "7@2", "7@3"]


# ----------------------------------------------------------------------------------------------------- splits


def test_a_tenth_is_held_out_by_the_seed_alone(tmp_path):
    path = save_numbered(tmp_path / "x.json", *range(40))
    splits = load_splits(Config(data=path))
    train, held_out = ids_of(splits.train), ids_of(splits.held_out["held_out"])
    assert (len(train), len(held_out)) == (36, 4) and {*train, *held_out} == {str(i) for i in range(40)}
    assert train == sorted(train, key=int)  # the file's order; the order of training is batch_for_step's
    assert load_splits(Config(data=path)) == splits
    assert ids_of(load_splits(Config(data=path, seed=1)).held_out["held_out"]) != held_out


def test_several_files_are_joined_and_none_need_be_held_out(tmp_path, capsys):
    a, b = save_numbered(tmp_path / "a.json", 1, 2), save_numbered(tmp_path / "b.json", 3)
    splits = load_splits(Config(data=f"{a}, {b}", test_share=0.0))
    assert ids_of(splits.train) == ["1", "2", "3"] and splits.held_out == {}
    assert f"{a}: 2 examples\n" in capsys.readouterr().out


def test_a_test_file_replaces_the_split_up_to_eval_cases(tmp_path):
    train, test = (
        save_numbered(tmp_path / "a.json", *range(10)),
        save_numbered(tmp_path / "b.json", 20, 21, 22),
    )
    splits = load_splits(Config(data=train, test_data=test, eval_cases=2))
    chosen = ids_of(
        splits.held_out["held_out"]
    )  # a random part: the first ones would all be of the first file
    assert len(splits.train) == 10 and len(set(chosen)) == 2 and set(chosen) < {"20", "21", "22"}


def conversations(path: Path, count: int) -> str:
    """Records in our own layout of 1, 2 or 3 steps each; they are told apart by what stands before #."""
    ids = [f"r{i}#{step}" for i in range(count) for step in range(1 + i % 3)]
    records = [
        dict(id=rid, source="x", messages=[{"role": "user", "content": rid}], tools=[], answer=[])
        for rid in ids
    ]
    return str(save(path, *records))


def part(path: str, start: float, end: float, **settings) -> Splits:
    return load_splits(Config(data=path, data_from=start, data_to=end, **settings))


@pytest.mark.parametrize("bounds", [(0, 0.5, 1), (0, 0.3, 0.35, 0.9, 1)])
def test_parts_of_the_training_data_share_nothing_and_lose_nothing(tmp_path, bounds):
    """SFT on one half and RL on the other must not see the same question, nor two steps of one
    conversation.
    """
    path = conversations(tmp_path / "x.json", 40)
    whole = load_splits(Config(data=path))
    parts = [part(path, *pair) for pair in zip(bounds, bounds[1:])]
    assert sorted(rid for one in parts for rid in ids_of(one.train)) == sorted(ids_of(whole.train))
    records = [{rid.split("#")[0] for rid in ids_of(one.train)} for one in parts]
    assert [len(one) for one in records] == [
        round(36 * b) - round(36 * a) for a, b in zip(bounds, bounds[1:])
    ]
    assert sum(map(len, records)) == len(set().union(*records)) == 36, "no record is cut in two"
    for one in parts:
        assert one.held_out == whole.held_out and one.train == [e for e in whole.train if e in one.train]


def test_a_part_is_drawn_by_the_seed_alone(tmp_path):
    path = conversations(tmp_path / "x.json", 40)
    half = part(path, 0, 0.5, test_share=0.0)
    assert part(path, 0, 0.5, test_share=0.0) == half
    assert (
        ids_of(half.train) != ids_of(load_splits(Config(data=path, test_share=0.0)).train)[: len(half.train)]
    )
    assert ids_of(part(path, 0, 0.5, test_share=0.0, seed=1).train) != ids_of(half.train)


def test_generated_data_has_parts_too():
    size = dict(synthetic_train=20, eval_cases=3)
    whole, *halves = [part("synthetic", *bounds, **size) for bounds in ((0, 1), (0, 0.5), (0.5, 1))]
    assert [len(half.train) for half in halves] == [10, 10]
    assert sorted(ids_of([*halves[0].train, *halves[1].train])) == sorted(ids_of(whole.train))
    assert halves[0].held_out == halves[1].held_out == whole.held_out


def test_a_part_without_a_record_is_refused(tmp_path):
    path = save_numbered(tmp_path / "x.json", 1, 2)
    with pytest.raises(
        DataError, match="data_from, data_to: the part from 0 to 0.1 of 2 training records is empty; widen"
    ):
        part(path, 0, 0.1)


def test_what_is_dropped_is_said(tmp_path, capsys):
    broken = [xlam(id=i, answers="[{") for i in (2, 3)]
    load_splits(Config(data=str(save(tmp_path / "x.json", xlam(), *broken, xlam(id=4, tools="[]")))))
    assert "x.json: 1 examples, dropped: 2 broken_json; 1 no_tools" in capsys.readouterr().out


def test_without_training_data_there_is_no_run(tmp_path):
    with pytest.raises(DataError, match="data: no training file given; use --data FILE"):
        load_splits(Config())
    with pytest.raises(DataError, match="does not exist"):
        load_splits(Config(data=str(tmp_path / "none.json")))
    with pytest.raises(DataError, match="x.json leaves no example to train on; run: python data.py inspect"):
        load_splits(Config(data=str(save(tmp_path / "x.json", xlam(answers="[{")))))


# ---------------------------------------------------------------------------------------------------- prompts


def example(rid: str, words: int) -> Example:
    return Example(rid, "xlam", [{"role": "user", "content": "x" * words}], [ADD], [])


def test_prompts_become_the_ids_of_encode_prompt_and_long_ones_are_counted(capsys):
    tokenizer, template = build_tiny_tokenizer([], 259), "{tools}"
    splits = Splits([example("a", 5), example("b", 500), example("c", 6)], {"held_out": [example("d", 500)]})
    limit = len(encode_prompt(tokenizer, splits.train[2].messages, [ADD], template))
    tokenized = tokenize_splits(splits, tokenizer, template, Config(max_prompt_tokens=limit))
    assert ids_of(one.example for one in tokenized.train) == ["a", "c"] and tokenized.held_out == {}
    assert tokenized.train[1].ids == encode_prompt(tokenizer, splits.train[2].messages, [ADD], template)
    assert f"2 prompts are longer than max_prompt_tokens ({limit}) and are skipped" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"all 3 training prompts are longer than max_prompt_tokens \(9\)"):
        tokenize_splits(splits, tokenizer, template, Config(max_prompt_tokens=9), quiet=True)


# ----------------------------------------------------------------------------------------------- command line


def data_py(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(Path(__file__).parents[1] / "data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=os.environ | environment)


def test_inspect_shows_counts_reasons_prompts_and_targets(tmp_path):
    records = xlam(), xlam(id=8, answers="[{"), xlam(id=9, query="Not shown.")
    run = data_py("inspect", save(tmp_path / "x.json", *records), 1)
    assert run.returncode == 0 and run.stderr == ""
    assert "2 examples (2 single)" in run.stdout
    assert "dropped: line 2, id 8: broken_json: answers is not JSON" in run.stdout
    assert f"<tools>\n{json.dumps({'type': 'function', 'function': ADD})}\n</tools>" in run.stdout
    assert (
        '--- user\nAdd 1.\n--- target\n<tool_call>[{"name": "add", "arguments": {"a": 1}}]</tool_call>'
        in run.stdout
    )
    assert "Not shown." not in run.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspect", "missing.json"], "error: missing.json does not exist; check the path\n"),
        (["inspect"], "error: usage: python data.py inspect PATH [COUNT]\n"),
        (
            ["look"],
            "error: usage: python data.py inspect, stats, prepare or overlap, each with its arguments or --help\n",
        ),
        (
            ["stats"],
            "error: stats: the following arguments are required: file; see python data.py stats --help\n",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(arguments, sentence):
    run = data_py(*arguments)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", sentence)


def test_the_hub_itself_is_out_of_reach_offline(tmp_path):
    for source in ("Salesforce/xlam-function-calling-60k", "somebody/something"):
        run = data_py("inspect", source, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
        assert (run.returncode, run.stdout) == (1, "")
        assert run.stderr == (
            f"error: {source} is no file here, and the Hugging Face hub is out of reach (no network, or HF_HUB_OFFLINE is "
            f"set); where there is a network, download the file at https://huggingface.co/datasets/{source} and give its "
            "path\n"
        )
