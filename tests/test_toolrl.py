"""ToolRL's rows: what each part becomes, and what is refused."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from test_layouts import ADD, read_with, save, shared

from corpus.layouts import load_examples, read_examples
from corpus.rules import STRICT, Rules
from prompts import THINK, ToolCall, render_completion
from reward import score

ODD = {  # what it holds looks like the list around it
    "name": 'say "it" 2. Name: x', "description": "Says.\n2. Name: y\nParameters: {}\n\n**Twice**\n3. it",
    "parameters": {"it": {"description": "a\nb", "type": "str"}},
}
USER = "<user> Add 1. </user>\n\n"
ASKED = {"role": "user", "content": "Add 1."}
ONE = '{"name": "add", "parameters": {"a": 1}}'
DIALOGUE = f"""{USER}<think> So </think>
<tool_call>
{ONE}
{{"name": "gone", "parameters": {{}}}}
</tool_call>
<obs> [{{"x": "</obs> <b>"}}] </obs>

<think> So </think>
<response> It is 1.
Else? </response>

<user> Add 2. </user>"""
SAID = [
    ASKED,
    {"role": "assistant", "content": "", "calls": [ToolCall("add", {"a": 1}), ToolCall("gone", {})]},
    {"role": "tool", "content": '[{"x": "</obs> <b>"}]'},
    {"role": "assistant", "content": "It is 1.\nElse?"},
    {"role": "user", "content": "Add 2."},
]
CALLS = [ToolCall("add", {"a": 1}), ToolCall(ODD["name"], {"it": "</tool_call>"})]
TEXT = Rules(no_call_turns=True)


def listed(*tools: dict) -> str:
    keys = ("Name", "name"), ("Description", "description")
    rows = ["\n".join(f"{key}: {tool[field]}" for key, field in keys) for tool in tools]
    parameters = [json.dumps(tool["parameters"]) for tool in tools]
    said = [f"{n}. {row}\nParameters: {one}\n" for n, (row, one) in enumerate(zip(rows, parameters), 1)]
    return f"Use these tools:\n{''.join(said)}\n**Steps for Each Turn**\n1. **Think:** first"


def row(output: str, history: str = USER, tools: str = listed(ADD, ODD)) -> dict:
    return {"instruction": tools, "input": f"**Dialogue Records History**\n{history}", "output": output}


def block(*calls: str) -> str:
    return "\n".join(["<tool_call>", *calls, "</tool_call>"])


def of_verl(plain: dict) -> dict:
    """The row as ToolRL's files for verl have it."""
    truth = {"style": "rule", "ground_truth": plain["output"]}
    extra = plain | {"output": "other", "index": 3, "split": "test"}
    return {"data_source": "rlla", "prompt": [], "reward_model": truth, "extra_info": extra}


@pytest.mark.parametrize("output, history, rules, said, answer, why", [
    (f"<think> So.\n1 </think>\n{block(ONE)}", USER, STRICT, [ASKED], CALLS[:1], "So.\n1"),
    (f"<think>So</think>{block(*(json.dumps({'name': c.name, 'parameters': c.arguments}) for c in CALLS))}",
     DIALOGUE, STRICT, SAID, CALLS, "So"),
    (f"<think> So </think> {block(ONE)} <response>Done</response>", USER, STRICT, [ASKED], CALLS[:1], "So"),
    ("<think> So </think>\n<response> Which? </response>", USER, TEXT, [ASKED], [], "So"),
    # Without a thought that the reward accepts, there is nothing to imitate.
    (f"<think> a <tool_call> </think>{block(ONE)}", USER, STRICT, [ASKED], CALLS[:1], None),
    (f"<think> </think>{block(ONE)}", USER, STRICT, [ASKED], CALLS[:1], None),
    (block(ONE), USER, STRICT, [ASKED], CALLS[:1], None),
])
def test_a_row_is_an_example_with_its_reply_to_imitate(tmp_path, output, history, rules, said, answer, why):
    plain = row(output, history)
    [example], reasons = read_with(rules, save(tmp_path / "t.json", plain))
    assert (example.messages, example.tools, example.answer) == (said, [ADD, ODD], answer) and reasons == []
    assert example.demonstrations == (() if why is None else (render_completion(answer, why),))
    [foreign], _ = read_with(rules, save(tmp_path / "v.json", of_verl(plain)))
    assert foreign == replace(example, demonstrations=())


@pytest.mark.parametrize("changes, reason", [
    ({"output": f"<think> a </think>{block(ONE)} <think> b </think>{block(ONE)}"}, "unparsable_calls"),
    ({"output": f"<think> a </think> b </think>{block(ONE)}"}, "unparsable_calls"),
    ({"output": f"{block(ONE)} and {block(ONE)}"}, "unparsable_calls"),
    ({"output": f"<think> a {block(ONE)}"}, "unparsable_calls"),
    ({"output": "<think> a </think>"}, "unparsable_calls"),
    ({"output": block('{"name": "add", "parameters": {"a": 1')}, "unparsable_calls"),
    ({"output": block(ONE, '{"name": "add", "a": 1}')}, "unparsable_calls"),
    ({"output": block()}, "unparsable_calls"), ({"output": block("{'name': 'add'}")}, "unparsable_calls"),
    ({"output": block('{"name": "sub", "parameters": {}}')}, "unknown_tool"),
    ({"output": block('{"name": "add", "parameters": {"a": "1"}}')}, "wrong_type"),
    ({"output": "<think> a </think><response> Which? </response>"}, "no_calls"),
    ({"input": f"{USER}well"}, "bad_turn"), ({"input": f"{USER}<obs> 1"}, "bad_turn"),
    ({"input": ""}, "no_user"), ({"input": f"{USER}{block(ONE)}"}, "answered"),
    ({"input": f"{USER}{block('{')}<obs> 1 </obs>"}, "unparsable_calls"),
    ({"input": f"{USER}{block(ONE)}<obs> 1 </obs>"}, "answered"),
    ({"input": None}, "missing_field"), ({"instruction": "Translate."}, "no_tools"),
    ({"instruction": listed(ADD, ODD).replace("2. Name: say", "4. Name: say")}, "no_tools"),
    ({"instruction": listed(ADD, ODD | {"parameters": []})}, "no_tools"),
    ({"instruction": listed(ADD, ODD).replace("\n\n**Twice", "\n9. Name: ")}, "no_tools"),
    ({"instruction": listed(ADD).replace('{"a":', '{"a": 1, "a":')}, "broken_json"),
])
def test_an_unusable_row_is_listed_with_its_reason(tmp_path, changes, reason):
    good = row(block(ONE))
    examples, [dropped] = load_examples(save(tmp_path / "t.json", good, good | changes))
    assert [one.id for one in examples] == ["0"] and (dropped.id, dropped.reason) == ("1", reason)
    assert dropped.detail


@pytest.mark.parametrize("history, said", [
    ("", "Hello!"), (USER, "I call add(a=1)."), (f"{USER}<response> Wait. </response>", "Wait."), (USER, " "),
])
def test_texts_that_do_not_show_that_no_call_was_right(tmp_path, history, said):
    plain = row(f"<think> a </think><response> {said} </response>", history)
    assert read_with(TEXT, save(tmp_path / "t.json", plain)) == ([], ["unclear_turn"])


@pytest.mark.parametrize("name, rows, rules, kept, shown", [
    ("toolrl_rlla_sft.json.gz", 400, STRICT, 282, 269), ("toolrl_rlla_sft.json.gz", 400, TEXT, 332, 319),
    ("toolrl_rlla_test.json", 80, TEXT, 63, 0),
])
def test_genuine_rows_are_kept_or_counted_and_their_demonstrations_are_right(name, rows, rules, kept, shown):
    reads = list(read_examples(shared(f"data/train/{name}"), rules=rules))
    assert reads == list(read_examples(shared(f"data/train/{name}"), rules=rules))
    assert len(reads) == rows and {len(read.examples) + len(read.dropped) for read in reads} == {1}
    examples = [example for read in reads for example in read.examples]
    assert (len(examples), sum(bool(example.demonstrations) for example in examples)) == (kept, shown)
    assert all(score(text, one.answer).total == 1 for one in examples for text in one.demonstrations)
    assert not any(THINK in json.dumps(example.messages, default=vars) for example in examples)
    if rules is STRICT:
        lost = Counter(drop.reason for read in reads for drop in read.dropped)
        assert lost == {"wrong_type": 55, "no_calls": 54, "undeclared_argument": 8, "unknown_tool": 1}
