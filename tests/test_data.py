"""Loaders: every record becomes an example or is listed with a reason, and a file that is no data says so.

Then what training makes of them: splits, token ids, and the look at a file from the command line.
"""

import gzip
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from data import (
    DataError,
    Example,
    Splits,
    load_examples,
    load_splits,
    load_toolace,
    load_xlam,
    parse_toolace_calls,
    tokenize_splits,
    write_examples,
)
from model import build_tiny_tokenizer
from prompts import ToolCall, encode_prompt
from runtime import Config

SHARED = Path(__file__).parents[2] / "shared"
ADD = {"name": "add", "description": "Adds.", "parameters": {"a": {"type": "int"}}}
FEED = {"name": "Feed (Video) V2", "description": "", "parameters": {"type": "dict", "properties": {}}}
SYSTEM = f"Use [these], e.g. [func1(x=1)]:\n{json.dumps([ADD, FEED])}. \nPut it in the format of [func1(params)]"


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"shared/{name} is not beside this checkout")
    return path


def xlam(**changes) -> dict:
    answers = json.dumps([{"name": "add", "arguments": {"a": 1}}])
    return {"id": 7, "query": "Add 1.", "tools": json.dumps([ADD]), "answers": answers} | changes


def toolace(*turns: tuple[str, str], **changes) -> dict:
    return {"system": SYSTEM, "conversations": [{"from": who, "value": text} for who, text in turns]} | changes


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


# ------------------------------------------------------------------------------------------------ the notation


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
)  # fmt: skip
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
    assert [call.name for call in parse_toolace_calls("[f(x) V2(), f(x)(), f(x=1)]", names)] == ["f(x) V2", "f(x)", "f"]


def test_the_time_is_linear_whatever_the_text():
    n = 300_000
    start = time.perf_counter()
    for text in (" " * n, "[" * n, "[f(x='" + "\\" * n, "[f(x" + " " * n, "[f" + " " * n, "[f(x='" + "'x" * n,
                 "[" + "f(), " * n, "[f(x=[" + "[], " * n, "[f(x=" + "1, x" * n):  # fmt: skip
        parse_toolace_calls(text, ["f"], any_name=True)
    assert time.perf_counter() - start < 20  # about 3 s; a quadratic reader needs hours


# ----------------------------------------------------------------------------------------------------- records


def test_xlam_record_becomes_one_example(tmp_path):
    examples, dropped = load_xlam(save(tmp_path / "x.json", xlam(), xlam(id="b", tools=[ADD], answers=[])))
    call = ToolCall("add", {"a": 1})
    assert examples[0] == Example("7", "xlam", [{"role": "user", "content": "Add 1."}], [ADD], [call])
    assert examples[1].answer == [] and dropped == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answers": "[{"}, "broken_json"),
        ({"answers": '[{"name": "add", "arguments": {"a": NaN}}]'}, "broken_json"),
        ({"tools": "{]"}, "broken_json"),
        ({"query": None}, "missing_field"),
        ({"tools": "[]"}, "no_tools"),
        ({"tools": '[{"description": "nameless"}]'}, "no_tools"),
        ({"answers": '[{"name": "sub", "arguments": {}}]'}, "unknown_tool"),
        ({"answers": '[{"name": "add"}]'}, "bad_answer"),
        ({"answers": "{}"}, "bad_answer"),
        ({"answers": '[{"name": "add", "arguments": "{}"}]'}, "bad_answer"),
    ],
)
def test_unusable_xlam_record_is_listed_with_its_reason(tmp_path, changes, reason):
    examples, [dropped] = load_xlam(save(tmp_path / "x.json", xlam(), xlam(id=8, **changes)))
    assert len(examples) == 1
    assert (dropped.source, dropped.id, dropped.line, dropped.reason) == ("xlam", "8", 2, reason) and dropped.detail


@pytest.mark.parametrize("roles", [("user", "assistant", "tool"), ("human", "gpt", "observation")])
def test_trajectory_is_cut_at_every_call_turn(tmp_path, roles):
    user, assistant, tool = roles
    record = toolace(
        (user, "go"), (assistant, "[add(a=1)]"), (tool, "2"), (assistant, "It is 2."),
        (user, "feed"), (assistant, '[Feed (Video) V2(q="(x)"), add(a=2)]'),
    )  # fmt: skip
    [first, second], dropped = load_toolace(save(tmp_path / "t.json", record))
    assert dropped == [] and (first.id, second.id) == ("0#1", "0#5") and first.tools == [ADD, FEED]
    assert first.messages == [{"role": "user", "content": "go"}] and first.answer == [ToolCall("add", {"a": 1})]
    assert [message["role"] for message in second.messages] == ["user", "assistant", "tool", "assistant", "user"]
    assert second.messages[1] == {"role": "assistant", "content": "", "calls": first.answer}
    assert second.answer == [ToolCall("Feed (Video) V2", {"q": "(x)"}), ToolCall("add", {"a": 2})]


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[add(a=oops)]", "unparsable_calls"), ("[sub(a=1)]", "unknown_tool"), ("[]", "unparsable_calls")],
)
def test_bad_call_turn_drops_its_step_and_stays_as_text(tmp_path, text, reason):
    record = toolace(("user", "go"), ("assistant", text), ("tool", "2"), ("assistant", "[add(a=1)]"))
    [example], [dropped] = load_toolace(save(tmp_path / "t.json", record))
    assert (dropped.id, dropped.line, dropped.reason) == ("0#1", 1, reason)
    assert example.messages[1] == {"role": "assistant", "content": text}


def test_function_call_turns_may_be_json_and_tools_a_field(tmp_path):
    call = '{"name": "add", "arguments": {"a": 1}}'
    record = toolace(("human", "go"), ("function_call", call), system="", tools=json.dumps([ADD]))
    [example], _ = load_toolace(save(tmp_path / "t.json", record))
    assert example.answer == [ToolCall("add", {"a": 1})]


def test_toolace_records_without_tools_or_calls_are_listed(tmp_path):
    plain = ("user", "hi"), ("assistant", "Which one?")
    cut_short = '[{"name": "add", "parameters": {"examples": [{"name": "not a tool"}]'
    records = [toolace(*plain, system=system) for system in ("No [tools].", cut_short, SYSTEM)]
    _, dropped = load_toolace(save(tmp_path / "t.json", *records))
    assert [drop.reason for drop in dropped] == ["no_tools", "no_tools", "no_calls"]


@pytest.mark.parametrize(
    ("name", "kept", "reasons"),
    [
        ("xlam_rawformat_repacked", 213, {}),
        ("toolace_first100_rawformat_reconstructed", 160, {"unknown_tool": 20, "unparsable_calls": 1, "no_calls": 1}),
        ("toolace_first100_sharegpt_converted", 33, {"unknown_tool": 147, "unparsable_calls": 1, "no_calls": 1}),
    ],
)
def test_genuine_files(name, kept, reasons):
    examples, dropped = load_examples(shared(f"data/train/{name}.json"))
    assert len(examples) == kept and Counter(drop.reason for drop in dropped) == reasons
    assert len({example.id for example in examples}) == kept


# ------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["e.jsonl", "e.jsonl.gz"])
def test_written_examples_come_back_equal(tmp_path, name):
    past = {"role": "assistant", "content": "", "calls": [ToolCall("add", {"a": 0})]}
    messages = [{"role": "user", "content": "a\u2028b é"}, past]
    examples = [
        Example("1", "synthetic", messages, [ADD], [ToolCall("add", {"a": [1, 1.0, None]})], ("<think>…",)),
        Example("2", "synthetic", messages[:1], [ADD], []),
    ]
    write_examples(tmp_path / name, examples)
    assert load_examples(tmp_path / name) == (examples, [])


def test_broken_lines_are_dropped_with_their_numbers(tmp_path):
    path = tmp_path / "x.jsonl"
    query = "line\u2028separator"  # str.splitlines() would cut this record in two
    lines = ["\ufeff" + json.dumps(xlam()), "5", '{"id": 1, "que', json.dumps(xlam(query=query), ensure_ascii=False)]
    path.write_text("\n".join(lines), encoding="utf-8")
    examples, dropped = load_examples(path)
    assert [(drop.line, drop.reason) for drop in dropped] == [(2, "broken_json"), (3, "broken_json")]
    assert [example.messages[0]["content"] for example in examples] == ["Add 1.", query]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "does not exist"),
        (b" \n", "is empty"),
        (b"[]", "no records"),
        (b"id,query\n1,hello\n", "x.json:1: .*JSON object per line"),
        (b'[{"id": 1},\n oops]', "not a JSON array: .* line 2"),
        (b'{"prompt": 1, "chosen": 2}', "x.json:1: .*prompt, chosen.*conversations"),
        (b"\xff\xfe\x00", "cannot be read.*UTF-8"),
    ],
)
def test_a_file_that_is_no_data_says_what_is_wrong(tmp_path, content, complaint):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        load_examples(path)


# ------------------------------------------------------------------------------------------------------ splits


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
    train, test = save_numbered(tmp_path / "a.json", *range(10)), save_numbered(tmp_path / "b.json", 20, 21, 22)
    splits = load_splits(Config(data=train, test_data=test, eval_cases=2))
    chosen = ids_of(splits.held_out["held_out"])  # a random part: the first ones would all be of the first file
    assert len(splits.train) == 10 and len(set(chosen)) == 2 and set(chosen) < {"20", "21", "22"}


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


# ------------------------------------------------------------------------------------------------------ prompts


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


# ------------------------------------------------------------------------------------------------- command line


def data_py(*arguments: object) -> subprocess.CompletedProcess:
    script = Path(__file__).parents[1] / "data.py"
    return subprocess.run([sys.executable, str(script), *map(str, arguments)], capture_output=True, encoding="utf-8")


def test_inspect_shows_counts_reasons_prompts_and_targets(tmp_path):
    records = xlam(), xlam(id=8, answers="[{"), xlam(id=9, query="Not shown.")
    run = data_py("inspect", save(tmp_path / "x.json", *records), 1)
    assert run.returncode == 0 and run.stderr == ""
    assert "2 examples (2 single)" in run.stdout
    assert "dropped: line 2, id 8: broken_json: answers is not JSON" in run.stdout
    assert f'<tools>\n{json.dumps({"type": "function", "function": ADD})}\n</tools>' in run.stdout
    assert '--- user\nAdd 1.\n--- target\n<tool_call>[{"name": "add", "arguments": {"a": 1}}]</tool_call>' in run.stdout
    assert "Not shown." not in run.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspect", "missing.json"], "error: missing.json does not exist; check the path\n"),
        (["inspect"], "error: usage: python data.py inspect PATH [COUNT]\n"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(arguments, sentence):
    run = data_py(*arguments)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", sentence)
