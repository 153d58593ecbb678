"""Loaders: every record becomes an example or is listed with a reason, and a file that is no data says so."""

import gzip
import json
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from data import DataError, Example, load_examples, load_toolace, load_xlam, parse_toolace_calls, write_examples
from prompts import ToolCall

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
    ["007", "1e999", "nan", "Infinity", "word", "1 2", "[1 2]", "'a", "[1}", "[,]", "{1: 2}", "{'a': 1, 'a': 2}", '"\\ud83d"',
     '"\\UFFFFFFFF"', "0x" + "f" * 9999, "9" * 5000, "[" * 9999 + "]" * 9999, "", ":", "(1)", "1, x=2", "1, 2", "1]", "g(y=1)"],
)  # fmt: skip
def test_what_is_no_json_value_does_not_parse(text):
    assert parsed(text) is None


@pytest.mark.parametrize("text", ["", "[", "f()", "[f()", "[f()].", "[f()] [f()]", "[f() f()]", "[g()]", "[f(=1)]", "[,]"])
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
