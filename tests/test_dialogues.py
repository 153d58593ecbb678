"""Dialogues in every dialect: what calls is a call, what may have called is no refusal, none is skipped."""

import json

import pytest
from test_layouts import ADD, SYSTEM, read_with, save, toolace, xlam

from corpus.layouts import load_examples
from corpus.rules import STRICT, Rules
from prompts import ToolCall

PAST_CALL = {"name": "add", "arguments": '{"a": 1}'}  # as OpenAI writes it
WRAPPED = {"type": "function", "function": ADD}


@pytest.mark.parametrize("text", [
    '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',  # Hermes
    "<functioncall> {\"name\": \"add\", \"arguments\": '{\"a\": 1}'} <|endoftext|>",  # Glaive
    '{"arguments": {"a": 1}, "name": "add"}', '```json\n[{"name": "add", "arguments": {"a": 1}}]\n```',
    "<think>One number.</think>\n[ add(a=1)]", "Or [add(a=2)]?</think>\n\n[add(a=1)]",
    f"<tool_call>[{json.dumps(PAST_CALL)}]</tool_call>",
])
@pytest.mark.parametrize("who", ["tool", "human"])
def test_calls_in_an_assistants_text_are_calls(tmp_path, text, who):
    results = "<tool_response>2</tool_response> <tool_response> </tool_response>\n<tool_response>\n3\n"
    result = (who, f"{results}</tool_response>")
    record = toolace(("human", "go"), ("gpt", text), result, ("gpt", "2."))
    path = save(tmp_path / "t.json", record)
    [example], reasons = read_with(STRICT, path)
    assert (example.id, example.answer, reasons) == ("0#1", [ToolCall("add", {"a": 1})], [])
    later = read_with(Rules(no_call_turns=True), path)[0][-1]
    assert later.messages[1:] == [
        {"role": "assistant", "content": "", "calls": example.answer}, {"role": "tool", "content": "2\n\n3"},
    ]


@pytest.mark.parametrize("text", [
    "Let me look. add(a=1)", 'Action: add\nAction Input: {"a": 1}',
    '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\n<tool_call>{"name": "add"',  # half
    "<function=add><parameter=a>1</parameter>", '{"a": 1} is what I give to add',
    '<think>Or <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>',  # a thought
    'add["1"]', "add:\n  a: 1", "tool: add\na: 1",
    "I look it up.",  # only a result shows that it called
])
@pytest.mark.parametrize("result", [True, False])
def test_a_turn_that_calls_in_an_unknown_notation_is_never_a_refusal(tmp_path, text, result):
    turns = ("human", "go"), ("gpt", text), *([("tool", "2")] if result else [])
    path = save(tmp_path / "t.json", toolace(*turns))
    refused = text == "I look it up." and not result
    examples, reasons = read_with(Rules(no_call_turns=True), path)
    assert [one.answer for one in examples] == [[]] * refused and len(reasons) == 1 - refused
    assert read_with(STRICT, path) == ([], ["no_calls" if refused else "unparsable_calls"])


def test_a_row_without_tools_is_dropped_alone(tmp_path):
    row = {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "calls": [PAST_CALL]}]}
    path = save(tmp_path / "t.json", row | {"tools": [ADD]}, row | {"tools": None}, row)
    examples, reasons = read_with(STRICT, path)
    assert (len(examples), reasons) == (1, ["no_tools", "no_tools"])


@pytest.mark.parametrize("none", [[], "[]"])
def test_an_empty_list_of_calls_is_none(tmp_path, none):
    said = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "Add it?", "tool_calls": none}]
    path = save(tmp_path / "t.json", {"messages": said, "tools": [ADD]})
    assert read_with(STRICT, path)[0] == [] and len(read_with(Rules(no_call_turns=True), path)[0]) == 1


def test_a_reply_in_json_and_a_result_of_role_function_are_no_calls(tmp_path):
    record = toolace(
        ("human", "add"), ("gpt", '{"name": "Which number?"}'), ("human", "1"), ("gpt", "[add(a=1)]"),
        ("function", '{"name": "sum", "value": 2}'), ("function", "[2]"), ("gpt", "2"),
    )
    examples, reasons = read_with(Rules(no_call_turns=True), save(tmp_path / "t.json", record))
    assert ([len(one.answer) for one in examples], reasons) == ([0, 1, 0], [])
    assert [message["role"] for message in examples[-1].messages][-2:] == ["tool", "tool"]


@pytest.mark.parametrize("call, result", [
    ("function-call", "function-response"), ("tool_call", "tool_response"), ("function", "ipython"),
    ("bot", "observation"),
])
@pytest.mark.parametrize("who, what", [("from", "value"), ("role", "content")])
def test_role_names_of_other_files(tmp_path, call, result, who, what):
    said = [("human", "go"), (call, "[add(a=1)]"), (result, "2"), ("gpt", "It is 2.")]
    said += [("user", "and 2"), (call, "[add(a=2)]")]
    record = toolace() | {"conversations": [{who: role, what: text} for role, text in said]}
    (first, second), dropped = load_examples(save(tmp_path / "t.json", record))
    assert (first.answer, second.answer) == ([ToolCall("add", {"a": 1})], [ToolCall("add", {"a": 2})])
    assert [m["role"] for m in second.messages] == ["user", "assistant", "tool", "assistant", "user"]


def test_calls_in_consecutive_turns_are_one_answer(tmp_path):
    record = toolace(
        ("human", "go"), ("function_call", "[add(a=1)]"), ("function_call", "[add(a=2)]"), ("tool", "2"),
        ("tool", "3"), ("gpt", "So."), ("human", "more"), ("gpt", "[add(a=3)]"), ("gpt", "[add(a=(4))]"),
    )
    [example], [dropped] = load_examples(save(tmp_path / "t.json", record))
    assert [call.arguments["a"] for call in example.answer] == [1, 2] and len(example.messages) == 1
    assert (dropped.id, dropped.reason) == ("0#7", "unparsable_calls"), "half an answer is none"


@pytest.mark.parametrize("past", [
    {"calls": [PAST_CALL]}, {"tool_calls": [{"id": "c", "type": "function", "function": PAST_CALL}]},
    {"function_call": PAST_CALL, "content": None}, {"tool_calls": json.dumps([PAST_CALL]), "name": "x"},
    {"calls": [PAST_CALL], "content": f"<think>Hm.</think><tool_call>{json.dumps(PAST_CALL)}</tool_call>"},
    {"calls": [{"name": "add", "parameters": {"a": 1}}], "from": None, "value": None},
])
def test_openais_messages_give_an_example_per_turn_with_calls(tmp_path, past):
    answer = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    asked = {"role": "user", "content": [{"type": "text", "text": "go"}]}
    result = {"role": "tool", "tool_call_id": "c", "content": "2"}
    rule = {"role": "developer", "content": "Be exact."}
    said = [rule, asked, {"role": "assistant", **past}, result, answer]
    path = save(tmp_path / "t.json", {"messages": said, "tools": [WRAPPED]})
    (first, second), dropped = load_examples(path)
    assert (first.id, second.id, dropped, first.tools) == ("0#2", "0#4", [], [ADD])
    assert first.messages == [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "go"}]
    shown = {"role": "assistant", "content": "", "calls": [ToolCall("add", {"a": 1})]}
    assert second.messages[2:] == [shown, {"role": "tool", "content": "2"}]
    ours = {"messages": said[:-1], "tools": [WRAPPED], "answer": [{"name": "add", "arguments": {"a": 2}}]}
    [same], _ = load_examples(save(tmp_path / "o.json", ours))
    assert (same.messages, same.answer) == (second.messages, second.answer)


@pytest.mark.parametrize("messages, reason", [
    ([{"role": "assistant", "content": "Hello!"}], "no_user"),
    ([{"role": "system", "content": "s"}], "no_user"),
    ([ASK := {"role": "user", "content": "go"}, {"role": "assistant", "calls": [PAST_CALL]}], "answered"),
    ([ASK, {"role": "assistant", "content": "add(a=1)"}], "answered"),
    ([ASK, {"role": "assistant", "calls": [PAST_CALL]}, {"role": "tool", "content": "2"}], "answered"),
    ([ASK, {"role": "assistant", "content": "", "plan": "add"}], "bad_turn"),  # a key that may say something
    ([ASK, {"role": "assistant", "tool_calls": "add"}], "bad_turn"), ([{"role": "pilot"}], "bad_turn"),
    ([{"role": "user", "content": [{"type": "image", "image": "x"}]}], "bad_turn"),
    ([{"role": "user", "content": 0}], "bad_turn"),
    ([ASK, {"role": "assistant", "calls": [{"name": "add", "input": {"a": 1}}]}], "bad_turn"),
])
def test_a_prompt_that_asks_nothing_or_holds_its_answer_is_dropped(tmp_path, messages, reason):
    record = {"messages": messages, "tools": [ADD], "answer": [PAST_CALL]}
    assert read_with(STRICT, save(tmp_path / "t.json", record)) == ([], [reason])


def test_the_same_calls_may_be_right_again_after_others(tmp_path):
    """ls, cd, ls"""
    other = {"role": "assistant", "calls": [{"name": "sub"}]}
    said = [ASK, {"role": "assistant", "calls": [PAST_CALL]}, {"role": "tool"}, other, {"role": "tool"}]
    path = save(tmp_path / "t.json", {"messages": said, "tools": [ADD], "answer": [PAST_CALL]})
    assert len(read_with(STRICT, path)[0]) == 1


def test_past_thoughts_are_not_shown(tmp_path):
    said = ("human", "go"), ("gpt", "<think>a is?</think>\nWhat is a?"), ("human", "1"), ("gpt", "[add(a=1)]")
    [example], _ = load_examples(save(tmp_path / "t.json", toolace(*said)))
    assert example.messages[1]["content"] == "What is a?"


def test_the_system_text_stays_unless_it_lists_the_tools(tmp_path):
    policy, call = "Today is 2024-05-15; add() is for numbers above 4.", ("gpt", "[add(a=1)]")
    kept = toolace(("human", "go"), call, system=policy, tools=[WRAPPED])
    listing = toolace(("system", SYSTEM), ("human", "on"), call)
    (first, second), _ = load_examples(save(tmp_path / "t.json", kept, listing))
    for record in (xlam(query="go"), {"messages": kept["conversations"], "tools": [ADD]}):
        [example], _ = load_examples(save(tmp_path / "o.json", record | {"system": [policy]}))
        assert example.messages == first.messages
    assert [message["content"] for message in first.messages] == [policy, "go"]
    assert [message["content"] for message in second.messages] == ["on"]


@pytest.mark.parametrize("text", [
    f"<tools>{json.dumps(WRAPPED)}</tools>", f"<tools>\n{json.dumps(WRAPPED)}\n{json.dumps(ADD)}\n</tools>",
    f"Tools: {json.dumps([ADD])}",
])
@pytest.mark.parametrize("field", ["conversations", "messages"])
def test_tools_may_stand_in_the_system_turn_alone(tmp_path, text, field):
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}'
    turns = [("system", text), ("user", "go"), ("assistant", call)]
    record = {field: [{"role": role, "content": said} for role, said in turns]}
    [example], _ = load_examples(save(tmp_path / "t.json", record))
    assert (example.id, example.tools[0], len(example.messages)) == ("0#2", ADD, 1)


@pytest.mark.parametrize("wrap", [lambda tool: tool, lambda tool: {"type": "function", "function": tool}])
@pytest.mark.parametrize("filled", [{"b": None}, {"c": {"type": "str, optional", "enum": None}}])
def test_nulls_that_columns_fill_in_are_no_arguments(tmp_path, filled, wrap):
    """What `datasets` writes as JSON after reading records of different tools."""
    optional = {"type": "str, optional"}
    tool = {"name": "add", "parameters": {"a": {"type": "int", "default": None}, "c": optional} | filled}
    answers = [{"name": "add", "arguments": {"a": 1, "b": None, "c": None}}]
    [example], _ = load_examples(save(tmp_path / "x.json", xlam(tools=[wrap(tool)], answers=answers)))
    assert example.answer == [ToolCall("add", {"a": 1})]
    assert example.tools == [{"name": "add", "parameters": {"a": {"type": "int"}, "c": optional}}]
