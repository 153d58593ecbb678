"""BFCL's multi-turn part: gold dialogues, what a dialogue does, and that a model's text is never run as code.

The worlds and the checker are bfcl-eval's, so these tests are skipped where it is not installed.
"""

import json
import shutil
from types import SimpleNamespace

import pytest

pytest.importorskip("bfcl_eval", reason="pip install --no-deps bfcl-eval==2026.3.23")

from bfcl_cases import gold_steps, reply, write_data, write_jsonl  # noqa: E402
from helpers import chatty_model  # noqa: E402

import eval_bfcl  # noqa: E402
import rollout  # noqa: E402
from corpus.tiny_model import build_tiny_tokenizer  # noqa: E402
from evals import bfcl_multi_turn  # noqa: E402
from evals.bfcl_multi_turn import (  # noqa: E402
    Dialogue,
    Player,
    allowed_calls,
    find_fault,
    load_scenarios,
    official_result,
    package,
    play,
    read_calls,
)
from model import load_tokenizer  # noqa: E402
from ops.export import export  # noqa: E402
from prompts import ToolCall, build_messages  # noqa: E402

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


def test_half_a_surrogate_pair_does_no_harm():
    """In a call, in other text and in what a tool says back: no prompt and no official file can have one."""
    scenario = ALL["multi_turn_base_0"]
    dialogue = Dialogue(scenario)
    dialogue.take(reply(("touch", {"file_name": "\ud83d"}), ("echo", {"content": "\ud83d", "\ud83d": 1})))
    dialogue.take("done \ud83d")
    "".join(message["content"] for message in build_messages(dialogue.messages, [])).encode()
    assert "\\ud83d" not in str(official_result(scenario, dialogue.outputs)).lower()
    assert "\\ufffd" in str(official_result(scenario, dialogue.outputs)).lower()
    dialogue.stop("")


def test_long_context_has_larger_worlds():
    said = []
    for name in ("multi_turn_base_0", "multi_turn_long_context_0"):
        dialogue = Dialogue(ALL[name])
        dialogue.take(reply(("cd", {"folder": "document"}), ("ls", {"a": True})))
        said.append(dialogue.messages[-1]["content"])
        dialogue.stop("")
    assert len(said[1]) > 2 * len(said[0])


def test_a_seed_for_every_place():
    """Of run, sample, turn and step, and of nothing else."""
    scenario = ALL["multi_turn_base_0"]
    first, again, other = Dialogue(scenario), Dialogue(scenario), Dialogue(scenario, 1)
    assert first.seed(0) == again.seed(0)
    seeds = [first.seed(0), first.seed(1), other.seed(0)]
    for text in (reply(("pwd", {})), NOTHING):
        first.take(text)
        seeds.append(first.seed(0))
    assert len(set(seeds)) == 5
    first.stop("")


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
        ("is_empty_execute_response", {"input_list": []}),
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


@pytest.mark.parametrize("arguments", [
    {"base": 7, "exponent": 10**9}, {"base": 7, "exponent": 1e9}, {"base": 7, "exponent": -(10**9)},
    {"base": 10**19, "exponent": 1000},
])
def test_no_call_computes_for_hours(arguments):
    scenario = next(one for one in ALL.values() if "MathAPI" in one.entry["involved_classes"])
    assert allowed_calls(scenario, [ToolCall("power", arguments)])[0].name != "power"
    assert allowed_calls(scenario, [ToolCall("power", {"base": 7, "exponent": 2})])[0].name == "power"


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


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a tiny model, whose replies nobody can read."""
    tokenizer = build_tiny_tokenizer(["move the file to the folder"] * 3, 300)
    folder = tmp_path_factory.mktemp("model")
    export(chatty_model(tokenizer), tokenizer, folder)
    return str(folder)


def run(command, out, *options):
    return eval_bfcl.main([command, "--out", str(out), *options])


def rows_of(out):
    return [json.loads(row) for row in (out / "predictions.jsonl").read_text().splitlines()]


def test_generate_goes_on_scenario_by_scenario_and_score_agrees(model, tmp_path, monkeypatch, capsys):
    """A model that knows the gold calls, of all but one scenario, is stopped half way."""
    steps = {name: [[*turn, NOTHING] for turn in gold_steps(scenario)] for name, scenario in ALL.items()}
    steps["multi_turn_base_1"] = [[NOTHING]] * 99
    asked, over, stopped = [], [], []

    def answer(player, alive):
        if len(over) >= 3 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        asked.append(len(alive))
        for dialogue in alive:
            turn = steps[dialogue.scenario.id][len(dialogue.outputs) - 1]
            dialogue.take(turn[len(dialogue.outputs[-1])])
        over.extend(dialogue for dialogue in alive if dialogue.over)

    monkeypatch.setattr(bfcl_multi_turn.Player, "answer", answer)
    words = ["--model", model, "--categories", "multi_turn", "--limit", "2", "--batch_size", "3"]
    assert run("generate", tmp_path, *words) == 130
    assert f"{len(over)} of 8 replies" in capsys.readouterr().err
    assert run("generate", tmp_path, *words) == 0
    rows = rows_of(tmp_path)
    assert len({row["id"] for row in rows}) == len(rows) == 8 and max(asked) == 3
    official = ("--official_dir", str(tmp_path / "official"))
    assert run("score", tmp_path, "--predictions", str(tmp_path / "predictions.jsonl"), *official) == 0
    verdicts = [json.loads(row) for row in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert [row["id"] for row in verdicts if not row["valid"]] == ["multi_turn_base_1"]
    columns = {row["name"]: row for row in json.loads((tmp_path / "scores.json").read_text())["aggregates"]}
    assert columns["Base"]["accuracy"] == 50 and columns["Multi Turn Acc"]["accuracy"] == 87.5
    overall = columns["Overall Acc (non-live, live, irrelevance, agentic = 0)"]
    assert overall["accuracy"] == pytest.approx(0.3 * 87.5)
    (file,) = (tmp_path / "official").glob("result/*/multi_turn/BFCL_v4_multi_turn_miss_func_result.json")
    told = {row["id"]: row["result"] for row in map(json.loads, file.read_text().splitlines())}
    scenario = ALL["multi_turn_miss_func_0"]
    first = [json.loads(step)[0]["name"] for step in told[scenario.id][0][:-1]]
    assert first == [call.partition("(")[0] for call in scenario.answer[0]]
    assert told[scenario.id][0][-1] == "[]"  # the reply that ended the turn


def test_a_dialogue_that_was_cut_off_is_wrong():
    """Also where all gold calls had been made; officially an error of inference is no list of turns."""
    scenario = ALL["multi_turn_base_0"]
    outputs = played(scenario, gold_steps(scenario)).outputs
    assert find_fault(scenario, outputs) is None
    assert find_fault(scenario, outputs, "prompt_too_long")[0] == "multi_turn:inference_error"
    assert official_result(scenario, outputs, "prompt_too_long") == "prompt_too_long"


def test_a_prompt_that_is_too_long_ends_the_dialogue(model, tmp_path, monkeypatch, capsys):
    """For the limit or for the model; it is counted, and asked again under a larger limit."""
    words = ["--model", model, "--categories", "multi_turn_base", "--limit", "1", "--max_new_tokens", "4"]
    assert run("generate", tmp_path, *words, "--max_prompt_tokens", "900") == 0
    (row,) = rows_of(tmp_path)
    assert row["skipped"] == "prompt_too_long" and row["output"] == [[]] and row["input_tokens"] > 900
    assert run("score", tmp_path, "--predictions", str(tmp_path / "predictions.jsonl")) == 0
    assert "1 of 1 prompts were too long" in capsys.readouterr().out
    nothing = SimpleNamespace(texts=[""], responses=[[1]])
    monkeypatch.setattr(rollout, "sample_groups", lambda *given, **_: [nothing] * len(given[2]))  # at once
    more = ["--max_prompt_tokens", str(row["input_tokens"] + 4000)]
    assert run("generate", tmp_path, *words, *more) == 0
    turns = rows_of(tmp_path)[-1]["output"]
    assert [len(turn) for turn in turns] == [1] * len(ALL["multi_turn_base_0"].turns)
    assert run("score", tmp_path, "--predictions", str(tmp_path / "predictions.jsonl")) == 0
    assert "1 of 1 replies hold no calls that can be read" in capsys.readouterr().out


def test_what_no_limit_helps_is_not_asked_again(model, tmp_path):
    """Prompts beyond the model's positions, and text that would become a control token."""
    short = shutil.copytree(model, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 3000}))
    words = ["--model", str(short), "--categories", "multi_turn_base", "--limit", "1"]
    for _ in range(2):
        assert run("generate", tmp_path / "o", *words) == 0
    (row,) = rows_of(tmp_path / "o")
    assert "3000 positions" in row["skipped"]
    tokenizer = load_tokenizer(model)
    unlimited = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: None))
    dialogue = Dialogue(ALL["multi_turn_base_0"])
    dialogue.take("<|im_start|>user")
    Player(unlimited, tokenizer, "{tools}", SimpleNamespace(max_new_tokens=1), 10**6).answer([dialogue])
    assert dialogue.over and "<|im_start|>" in dialogue.skipped


@pytest.mark.parametrize("output", ["text", None, {}, [1], ["text"], [[1]], [["a"], None]])
def test_rows_that_are_no_dialogue_are_told(output, tmp_path, capsys):
    path = write_jsonl(tmp_path / "p.jsonl", [{"id": "multi_turn_base_0", "output": output}])
    assert run("score", tmp_path / "o", "--predictions", str(path)) == 2
    assert f"{path}:1: " in capsys.readouterr().err


def test_dialogues_are_not_mixed_with_v3(model, tmp_path, capsys):
    words = ["--model", model, "--data", str(write_data(tmp_path / "d", "v3", "simple"))]
    assert run("generate", tmp_path / "o", *words, "--categories", "simple,multi_turn") == 2
    assert "ask for them apart" in capsys.readouterr().err
