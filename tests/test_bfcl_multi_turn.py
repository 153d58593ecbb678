"""BFCL's multi-turn part: gold dialogues, what a dialogue does, and that a model's text is never run as code.

The worlds and the checker are bfcl-eval's, so these tests are skipped where it is not installed.
"""

import json

import pytest

pytest.importorskip("bfcl_eval", reason="pip install --no-deps bfcl-eval==2026.3.23")

from bfcl_cases import gold_steps, reply  # noqa: E402

from evals.bfcl_multi_turn import (  # noqa: E402
    Dialogue,
    allowed_calls,
    find_fault,
    load_scenarios,
    official_result,
    package,
    play,
    read_calls,
)

NOTHING = reply()
ALL = {scenario.id: scenario for scenario in load_scenarios()}


def played(scenario, steps):
    """The dialogue in which the model says `steps`, and nothing more in every turn."""
    dialogue = Dialogue(scenario)
    left = dict(enumerate(map(list, steps)))
    while not dialogue.over:
        turn = left.get(len(dialogue.outputs) - 1)
        dialogue.take(turn.pop(0) if turn else NOTHING)
    return dialogue


def fault(scenario, steps):
    found = find_fault(scenario, played(scenario, steps).outputs)
    return found and found[0]


def test_gold_calls_one_per_step_are_right():
    """But where a turn has 34 of them: more than the 20 steps that a turn may have."""
    wrong = {name for name, scenario in ALL.items() if fault(scenario, gold_steps(scenario))}
    assert len(ALL) == 800 and wrong == {"multi_turn_long_context_38", "multi_turn_long_context_46"}


def test_silence_and_a_missing_call_are_wrong():
    for scenario in list(ALL.values())[::16]:
        steps = gold_steps(scenario)
        assert fault(scenario, []) == "multi_turn:empty_turn_model_response"
        last = max(turn for turn, calls in enumerate(steps) if calls)
        assert fault(scenario, [*steps[:last], steps[last][:-1], *steps[last + 1 :]]), scenario.id


def test_all_calls_of_a_turn_in_one_reply():
    scenario = ALL["multi_turn_base_0"]
    calls = [[read_calls(step)[0] for step in turn] for turn in gold_steps(scenario)]
    steps = [[reply(*((call.name, call.arguments) for call in turn))] for turn in calls]
    assert not fault(scenario, steps)
    assert fault(scenario, [steps[0], steps[2], steps[1], steps[3]])


def test_a_step_shows_the_results_and_the_world_remembers():
    dialogue = Dialogue(ALL["multi_turn_base_0"])
    make = ("mkdir", {"dir_name": "temp"})
    dialogue.take(reply(("cd", {"folder": "document"}), make, make))
    said = dialogue.messages[-3:]
    assert [message["role"] for message in said] == ["tool"] * 3
    assert "document" in said[0]["content"] and "error" in said[2]["content"]
    assert [call.name for call in dialogue.messages[-4]["calls"]] == ["cd", "mkdir", "mkdir"]
    dialogue.take("<think>It is done.</think>Done.")
    assert dialogue.messages[-2] == {"role": "assistant", "content": "Done."}
    assert dialogue.messages[-1] == ALL["multi_turn_base_0"].turns[1][0]
    other = Dialogue(ALL["multi_turn_base_0"])  # has a world of its own
    other.take(reply(("cd", {"folder": "document"})))
    assert "error" not in other.messages[-1]["content"]
    dialogue.stop("prompt_too_long")
    other.stop("prompt_too_long")
    assert not [name for name in vars(package().execution) if name.startswith("world_")]


def test_withheld_tools_come_later():
    dialogue = Dialogue(ALL["multi_turn_miss_func_0"])
    names = lambda: [tool["name"] for tool in dialogue.tools]  # noqa: E731
    for _ in range(3):
        assert "sort" not in names()
        dialogue.take(NOTHING)
    assert "sort" in names() and len(set(names())) == len(names())
    assert dialogue.messages[-1] == {"role": "user", "content": package().new_tools}


def test_a_turn_without_end_ends_the_dialogue():
    """At the step after the twentieth, as the official runner does it."""
    scenario = ALL["multi_turn_base_0"]
    dialogue = played(scenario, [[reply(("pwd", {}))] * 99])
    assert [len(turn) for turn in dialogue.outputs] == [21]
    assert find_fault(scenario, dialogue.outputs)[0] == "multi_turn:force_terminated"


@pytest.mark.parametrize(
    "call",
    [
        ("__import__('pathlib').Path('{0}').touch", {}),
        ("open", {"file": "{0}", "mode": "w"}),
        ("touch", {"file_name='x') or open('{0}','w') or str(object": "y"}),
        ("_load_scenario", {"scenario": {}}),
        ("pwd.__self__", {}),
        ("kill", {}),
        ("", {}),
    ],
)
def test_text_of_a_model_is_not_run(call, tmp_path):
    """Names that are no tool's, and arguments that are no names, come back as an error of execution."""
    file = str(tmp_path / "made")
    name, arguments = json.loads(json.dumps(call).replace("{0}", file))
    scenario = ALL["multi_turn_base_0"]
    steps = gold_steps(scenario)
    steps[0].insert(0, reply((name, arguments)))
    dialogue = played(scenario, steps)
    assert "Error during execution" in dialogue.messages[2]["content"]
    assert find_fault(scenario, dialogue.outputs) is None  # a failed call besides does no harm
    assert not (tmp_path / "made").exists()
    assert file not in json.dumps(official_result(scenario, dialogue.outputs))


@pytest.mark.parametrize("number", [10**9, 1e9, -(10**9)])
def test_no_call_computes_for_hours(number):
    scenario = next(one for one in ALL.values() if "MathAPI" in one.entry["involved_classes"])
    for call in (("power", {"base": 7, "exponent": number}), ("round_number", {"decimal_places": number})):
        assert allowed_calls(scenario, reply(call))[0].name != call[0]
    assert allowed_calls(scenario, reply(("power", {"base": 7, "exponent": 2})))[0].name == "power"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "null"),
        ("<tool_call>{}</tool_call>", "[]"),
        ("<tool_call>[{}]</tool_call>", "null"),
        ('<tool_call>{"a": {"name": "pwd"}}</tool_call>', "null"),
        ('<tool_call>[{"name": "pwd", "arguments": []}]</tool_call>', "null"),
        ('<tool_call>[{"name": "pwd", "arguments": "{}"}]</tool_call>', "null"),
        (NOTHING, "[]"),
        (reply(("pwd", {})), '[{"name": "pwd", "arguments": {}}]'),
    ],
)
def test_what_is_no_call_ends_the_turn(text, told):
    """A list of objects with a name and an object of arguments is a call; officially "null" is none."""
    scenario = ALL["multi_turn_base_0"]
    dialogue = Dialogue(scenario)
    dialogue.take(text)
    assert len(dialogue.outputs) == (1 if "pwd" in told else 2)  # the turn goes on after a call
    assert official_result(scenario, [[text]]) == [[told]]
    dialogue.stop("")


def test_dialogues_side_by_side():
    """A free place is taken at once, and who is over is handed out."""
    dialogues = [Dialogue(scenario) for scenario in list(ALL.values())[:5]]
    together, over = [], []

    def answer(alive):
        together.append(len(alive))
        for dialogue in alive:
            dialogue.stop("x") if dialogue is dialogues[1] else dialogue.take(NOTHING)

    for dialogue in play(iter(dialogues), answer, 2):
        over.append(dialogues.index(dialogue))
    assert over[0] == 1 and sorted(over) == [0, 1, 2, 3, 4] and set(together[:-4]) == {2}
    whole = [len(one.outputs) == len(one.scenario.turns) for one in dialogues]
    assert dialogues[1].skipped == "x" and whole == [True, False, True, True, True]
