"""Every record becomes an example or is listed with a reason; rows for other tools come back as they were."""

import json
from collections import Counter
from pathlib import Path

import pytest

from corpus.examples import Example
from corpus.layouts import load_examples, read_examples, trl_row, verl_row, write_examples, write_rows
from corpus.rules import STRICT, Rules
from prompts import SYSTEM_TEMPLATE, ToolCall

ADD = {"name": "add", "description": "Adds.", "parameters": {"a": {"type": "int"}}}
DEEP = json.loads("[" * 600 + "]" * 600)
ENUM = {"name": "add", "parameters": {"a": {"type": "int", "enum": [1, 2]}}}
QUERY = {"q": {"type": "string"}}
FEED = {"name": "Feed (Video) V2", "description": "", "parameters": {"type": "dict", "properties": QUERY}}
SYSTEM = f"Use [these], e.g. [func1(x=1)]:\n{json.dumps([ADD, FEED])}. \nWrite [func1(params)]"


def xlam(**changes) -> dict:
    answers = json.dumps([{"name": "add", "arguments": {"a": 1}}])
    return {"id": 7, "query": "Add 1.", "tools": json.dumps([ADD]), "answers": answers} | changes


def toolace(*turns: tuple[str, str], **changes) -> dict:
    said = [{"from": who, "value": text} for who, text in turns]
    return {"system": SYSTEM, "conversations": said} | changes


def save(path: Path, *records: dict) -> Path:
    path.write_text(json.dumps(records))
    return path


def shared(name: str) -> Path:
    path = Path(__file__).parents[2] / "shared" / name
    if not path.exists():
        pytest.skip(f"shared/{name} is not beside this checkout")
    return path


def ids_of(examples) -> list[str]:
    return [example.id for example in examples]


def read_with(rules: Rules, path: Path) -> tuple[list[Example], list[str]]:
    """The examples, and the reasons of what was dropped."""
    reads = list(read_examples(path, rules=rules))
    return [e for read in reads for e in read.examples], [d.reason for read in reads for d in read.dropped]


def test_xlam_record_becomes_one_example(tmp_path):
    records = xlam(), xlam(id="b", query="Hello.", tools=[ADD], answers=[])
    (first, second), dropped = load_examples(save(tmp_path / "x.json", *records))
    asked, answer = [{"role": "user", "content": "Add 1."}], [ToolCall("add", {"a": 1})]
    assert first == Example("7", "xlam", asked, [ADD], answer) and second.answer == [] and dropped == []


@pytest.mark.parametrize("changes, reason", [
    ({"answers": "[{"}, "broken_json"), ({"query": None}, "missing_field"), ({"tools": "[]"}, "no_tools"),
    ({"answers": '[{"name": "add", "arguments": {"a": NaN}}]'}, "broken_json"),
    ({"answers": '[{"name": "sub", "arguments": {}}]'}, "unknown_tool"),
    ({"answers": '[{"name": "add", "arguments": "{"}]'}, "broken_json"),
    ({"answers": '[{"name": "add", "arguments": "[]"}]'}, "bad_answer"),
    ({"answers": '[{"name": "add"}]'}, "missing_argument"), ({"query": " "}, "no_user"),
    ({"answers": '[{"name": "add", "arguments": {"a": 1, "b": 2}}]'}, "undeclared_argument"),
    ({"answers": '[{"name": "add", "arguments": {"a": 1, "b": null}}]'}, "undeclared_argument"),
    ({"tools": [ENUM], "answers": [{"name": "add", "arguments": {"a": 3}}]}, "not_in_enum"),
    ({"answers": '[{"name": "add", "arguments": {}}]'}, "missing_argument"),
    ({"answers": '[{"name": "add", "arguments": {"a": "1"}}]'}, "wrong_type"),
    ({"query": "half an emoji \ud83d"}, "bad_text"), ({"tools": [ADD | {"returns": DEEP}]}, "broken_json"),
    ({"tools": [ADD | {"parameters": {"a": {"type": "int", "x": None}}, "returns": DEEP}]}, "broken_json"),
])
def test_unusable_xlam_record_is_listed_with_its_reason(tmp_path, changes, reason):
    examples, [dropped] = load_examples(save(tmp_path / "x.json", xlam(), xlam(id=8, **changes)))
    assert ids_of(examples) == ["7"] and dropped.detail
    assert (dropped.line, dropped.id, dropped.reason) == (2, "8", reason)


@pytest.mark.parametrize("roles", ["user assistant tool", "human gpt observation"])
def test_trajectory_is_cut_at_every_call_turn(tmp_path, roles):
    user, assistant, tool = roles.split()
    record = toolace(
        (user, "go"), (assistant, "[add(a=1)]"), (tool, "2"), (assistant, "It is 2."),
        (user, "feed"), (assistant, '[Feed (Video) V2(q="(x)"), add(a=2)]'),
    )
    [first, second], dropped = load_examples(save(tmp_path / "t.json", record))
    assert dropped == [] and (first.id, second.id) == ("0#1", "0#5") and first.tools == [ADD, FEED]
    assert first.messages == [{"role": "user", "content": "go"}]
    assert first.answer == [ToolCall("add", {"a": 1})]
    assert [turn["role"] for turn in second.messages] == ["user", "assistant", "tool", "assistant", "user"]
    assert second.messages[1] == {"role": "assistant", "content": "", "calls": first.answer}
    assert second.answer == [ToolCall("Feed (Video) V2", {"q": "(x)"}), ToolCall("add", {"a": 2})]


@pytest.mark.parametrize("text, reason, past", [
    ("[add(a=(1))]", "unparsable_calls", None), ("[sub(a=1)]", "unknown_tool", [ToolCall("sub", {"a": 1})]),
    ('[add(a="1")]', "wrong_type", [ToolCall("add", {"a": "1"})]),  # a call all the same
])
def test_bad_call_turn_drops_its_step_and_stays_as_context(tmp_path, text, reason, past):
    record = toolace(("user", "go"), ("assistant", text), ("tool", "2"), ("assistant", "[add(a=1)]"))
    [example], [dropped] = load_examples(save(tmp_path / "t.json", record))
    assert (dropped.id, dropped.line, dropped.reason) == ("0#1", 1, reason)
    turn = {"content": "", "calls": past} if past else {"content": text}
    assert example.messages[1] == {"role": "assistant"} | turn


def test_function_call_turns_may_be_json_and_tools_a_field(tmp_path):
    turns = ("human", "go"), ("function_call", '{"name": "add", "arguments": {"a": 1}}')
    record = toolace(*turns, system="", tools=json.dumps([ADD]))
    assert load_examples(save(tmp_path / "t.json", record))[0][0].answer == [ToolCall("add", {"a": 1})]


def test_text_turns_become_empty_answers_on_request(tmp_path):
    record = toolace(
        ("user", "add"), ("assistant", "Which number?"), ("user", "1"), ("assistant", "[add(a=1)]"),
        ("tool", "2"), ("assistant", "It is 2."), ("user", "Thanks"), ("assistant", "You are welcome."),
    )
    path = save(tmp_path / "t.json", record)
    assert ids_of(read_with(STRICT, path)[0]) == ["0#3"]
    examples, dropped = read_with(Rules(no_call_turns=True), path)
    assert ids_of(examples) == ["0#1", "0#3", "0#5", "0#7"] and dropped == []
    assert [len(example.answer) for example in examples] == [0, 1, 0, 0]


@pytest.mark.parametrize("turns", [
    [("user", "go"), ("assistant", "One moment."), ("assistant", "[add(a=1)]")],  # a call was right
    [("user", "go"), ("assistant", "I would run [add(a=1)].")],  # so here
    [("user", "go"), ("assistant", "[add(a=(1))]")],  # calls that cannot be read
    [("assistant", "Hello!"), ("user", "go")],  # answers nobody
])
def test_text_turns_that_do_not_show_that_no_call_was_right(tmp_path, turns):
    examples, reasons = read_with(Rules(no_call_turns=True), save(tmp_path / "t.json", toolace(*turns)))
    assert [example for example in examples if not example.answer] == []
    assert reasons in (["unclear_turn"], ["unparsable_calls"])


@pytest.mark.parametrize("name, kept, reasons", [
    ("xlam_rawformat_repacked", 211, {"wrong_type": 2}),
    ("toolace_first100_rawformat_reconstructed", 151,
     {"unknown_tool": 20, "wrong_type": 9, "unparsable_calls": 1, "no_calls": 1}),
    ("toolace_first100_sharegpt_converted", 32,
     {"unknown_tool": 147, "wrong_type": 1, "unparsable_calls": 1, "no_calls": 1}),
    ("toolrl_rlla_test", 54, {"wrong_type": 16, "no_calls": 9, "unknown_tool": 1}),  # verl's layout, not ours
])
def test_genuine_files(name, kept, reasons):
    examples, dropped = load_examples(shared(f"data/train/{name}.json"))
    assert len(set(ids_of(examples))) == len(examples) == kept
    assert Counter(drop.reason for drop in dropped) == reasons


def test_a_call_need_fit_one_of_the_tools_with_its_name_only_and_a_kept_reason_drops_nothing(tmp_path):
    """A few genuine records list a tool twice."""
    words = {"name": "add", "parameters": {"a": {"type": "str"}}}
    answers = [[{"name": "add", "arguments": {"a": value}}] for value in (1, "1", 1.5)]
    records = [xlam(id=i, query=str(i), tools=[ADD, words], answers=one) for i, one in enumerate(answers)]
    path = save(tmp_path / "x.json", *records)
    for rules, kept in ((STRICT, ["0", "1"]), (Rules(keep=("wrong_type",)), ["0", "1", "2"])):
        examples, reasons = read_with(rules, path)
        assert ids_of(examples) == kept and reasons == ["wrong_type"] * (3 - len(kept))


GONE = ToolCall("gone", {"x": [1, 1.0, None, {"é": "\u2028"}]})
PAST = {"role": "assistant", "content": "", "calls": [GONE]}
ASKED = {"role": "user", "content": "天气 😀"}
NUMBERS = [ToolCall("add", {"a": 1}), ToolCall("add", {"a": 1.0})]
NESTED = [ToolCall("add", {"a": {"b": [True, "1", -0.5]}})]
MANY = [
    Example("a#1", "toolace", [ASKED, PAST, {"role": "tool", "content": "{}"}], [ADD], []),
    Example("b", "xlam", [ASKED], [ADD, FEED], NUMBERS),
    Example("c", "own", [{"role": "system", "content": "s"}, ASKED], [ADD], NESTED, ("<think>", "é")),
]


def rows_of(layout: str) -> list[dict]:
    if layout == "trl":
        return [trl_row(example, SYSTEM_TEMPLATE) for example in MANY]
    return [verl_row(example, SYSTEM_TEMPLATE, "train", index) for index, example in enumerate(MANY)]


@pytest.mark.parametrize("name", "own.jsonl trl.jsonl verl.jsonl verl.parquet".split())
def test_what_is_written_comes_back_equal(tmp_path, name):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    if name.startswith("own"):
        write_examples(tmp_path / name, MANY)
    else:
        write_rows(tmp_path / name, rows_of(name.split(".")[0]))
    examples, dropped = load_examples(tmp_path / name)
    assert repr(examples) == repr(MANY) and dropped == []  # == does not tell 1 from 1.0


def test_rows_for_other_tools_have_what_these_ask_for():
    for layout in ("trl", "verl"):
        for row, example in zip(rows_of(layout), MANY):
            assert row["prompt"][0]["role"] == "system" and json.dumps(ADD) in row["prompt"][0]["content"]
            assert all(set(message) == {"role", "content"} for message in row["prompt"])
            truth = row["ground_truth"] if layout == "trl" else row["reward_model"]["ground_truth"]
            assert [ToolCall(**call) for call in json.loads(truth)] == example.answer
    # TRL would hand `tools` to the chat template, or take one of the others for a column of its own.
    assert not set(rows_of("trl")[0]) & set("tools messages completion prompts completions".split())


@pytest.mark.parametrize("layout", ["trl", "verl"])
def test_rows_that_another_program_wrote_are_dropped(tmp_path, layout):
    rows = rows_of(layout)
    (rows[1] if layout == "trl" else rows[1]["extra_info"]).pop("messages_json")
    rows[2].pop("reward_model", None)
    write_rows(tmp_path / "rows.jsonl", rows)
    examples, dropped = load_examples(tmp_path / "rows.jsonl")
    assert examples == (MANY[::2] if layout == "trl" else MANY[:1])
    assert {drop.reason for drop in dropped} == {"foreign_row"} and dropped[0].line == 2
