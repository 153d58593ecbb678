"""eval_apibank.py: agreement with the official tools, what the model is shown, files, errors."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from bfcl_cases import score, write_jsonl
from test_apibank_check import reply
from test_prompts import llama, qwen

import eval_apibank
from eval_apibank import main
from evals import predict
from evals.apibank_data import ONE_CALL, load_cases, prompt_cases
from prompts import build_messages, render_calls, render_prompt

SHARED = Path(__file__).parents[2] / "shared"
DATA, GOLDEN = SHARED / "data" / "apibank", SHARED / "golden" / "apibank_verdicts.jsonl.gz"
needs_shared = pytest.mark.skipif(not DATA.is_dir(), reason="the cases and verdicts in ../shared are absent")


@needs_shared
def test_agrees_with_the_official_tools():
    """All of 11,369 verdicts but four, which would need the tools' database: a reminder is found there by its
    text or by its time, and one gold call changes the time.
    """
    with gzip.open(GOLDEN, "rt") as file:
        rows = [json.loads(line) for line in file]
    verdicts, _ = eval_apibank.judge_rows(rows, load_cases(DATA))
    assert [row["id"] for row in rows] == [verdict["id"] for verdict in verdicts]
    pairs = zip(rows, verdicts, strict=True)
    different = [(row["id"], row["correct"]) for row, v in pairs if row["correct"] != v["correct"]]
    assert len(rows) == 11369
    assert different == [("level-2-toolsearcher/ModifyReminder-level-3-1.jsonl#12", False)] * 4


@needs_shared
def test_gold_calls_score_as_the_official_tools_say():
    """24 golds are rejected officially; without that gate every gold passes, device_id included."""
    cases = load_cases(DATA)
    rows = [{"id": case.id, "output": render_calls([case.gold])} for case in cases.values()]
    _, scores = eval_apibank.judge_rows(rows, cases)
    levels = [scores[f"level-{level}"]["official"] for level in (1, 2, 3)]
    assert [(level["correct"], level["n"]) for level in levels] == [(367, 389), (117, 119), (131, 131)]
    assert scores["all"]["corrected"]["accuracy"] == scores["all"]["exact"]["accuracy"] == 100.0
    assert scores["all"]["official"]["cases"] == scores["all"]["of"] == 639
    scenarios = scores["level-3 scenarios"]
    assert scenarios["of"] == scenarios["official"]["correct"] == scenarios["official"]["n"] == 50


@needs_shared
def test_no_gold_call_with_a_list_passes_as_text():
    """The official evaluator reads every argument as a string, and so rejects 61 golds instead of 24."""
    cases = load_cases(DATA)
    rows = [{"id": case.id, "output": reply(case.gold.name, case.written)} for case in cases.values()]
    _, scores = eval_apibank.judge_rows(rows, cases)
    assert [scores[f"level-{level}"]["official"]["correct"] for level in (1, 2)] == [338, 109]


@needs_shared
@pytest.mark.parametrize("family", [qwen, llama])
def test_templates_print_every_dialogue_whole(family):
    """Most dialogues end with the assistant's announcement of its call: two of its turns in a row."""
    tokenizer, prompts = family(), prompt_cases(load_cases(DATA).values())
    assert sum(p.messages[-1]["role"] == "assistant" for p in prompts) == 346
    for prompt in prompts:
        text = render_prompt(tokenizer, prompt.messages, prompt.tools)
        at = 0
        for message in build_messages(prompt.messages, prompt.tools)[1:]:
            if message["role"] != "tool":  # each template writes results in its own way
                at = text.index(message["content"].strip(), at)
        assert text.rstrip().endswith(("assistant", "assistant<|end_header_id|>"))


@needs_shared
def test_prompts_say_what_the_official_prompts_say():
    """45 golds need a year that no turn names; of level 2 only what a search found is known."""
    cases = load_cases(DATA)
    prompts = {prompt.id: prompt for prompt in prompt_cases(cases.values())}
    year = [p.category for p in prompts.values() if "2023" in p.messages[0]["content"]]
    assert Counter(year) == {"level-1": 389, "level-2": 119}
    untold = [c for c in cases.values() if "2023" in str(c.gold.arguments) and "2023" not in str(c.history)]
    assert Counter(case.level for case in untold) == {1: 32, 2: 13}
    told = Counter()
    for case in cases.values():
        names = [tool["name"] for tool in prompts[case.id].tools]
        told[case.level, case.gold.name in names] += 1
        assert case.level != 1 or names == sorted(case.shown)  # the data's order would be a hint
    # 13 golds of level 2 call what no search has found.
    assert told == {(1, True): 389, (2, True): 106, (2, False): 13, (3, True): 131}


@pytest.fixture
def data_dir(tmp_path):
    """The smallest data folder: one case of level 1 and 2, and two of level 3 with ToolRL's prompts."""
    one, many = {"type": "str", "description": "x"}, {"type": "list(str)", "description": "more"}
    add = {"name": "Add", "description": "adds", "input_parameters": {"x": one}, "required": ["x"]}
    look = {"name": "Look", "description": "looks", "input_parameters": {"xs": many}, "required": []}
    result = {"api_name": "Look", "input": None, "output": {"a": 1}, "exception": None}
    past = {"role": "API", "api_name": "Look", "param_dict": {}, "result": result}
    history = [{"role": "User", "text": "please"}, {"role": "AI", "text": "fine"}, past]
    base = {"api_name": "Add", "arguments": {"x": "1"}}
    rejected = {"api_name": "Add", "arguments": {"y": "1"}}
    cases = [
        {"id": "a#1", "level": 1, "tools": ["Look", "Add"], "history": history, **base},
        {"id": "b#1", "level": 2, "tools": ["Add"], "history": history, **rejected},
        {"id": "level-3#0", "level": 3, **base},
        {"id": "level-3#1", "level": 3, **base},
    ]
    call = '<tool_call>\n{"name": "Look", "parameters": {}}\n</tool_call>'
    last = "<user> Based on our conversation above, please only make one tool call to solve my need.</user>"
    prompt = {
        "system": "Tools\n1. Add: adds\n\n1. **Think:** now", "other": {"sample_id": 7},
        "user": f"<user>please</user>\n{call}\n<obs> {result} </obs>\n{last}",
        "answer": [{"name": "Add", "parameters": {"x": "1"}}],
    }
    folder = tmp_path / "data"
    write_jsonl(folder / "cases.jsonl.gz", cases)
    apis = {"level1_2": [add, look], "level3": [add, look]}
    (folder / "api_descriptions.json").write_text(json.dumps(apis))
    (folder / "toolrl_level-3-api_processed.json").write_text(json.dumps([prompt, prompt]))
    return folder


def row(case: str, right: bool = True, **more) -> dict:
    return {"id": case, "output": reply("Add", {"x": "1"}) if right else "no", **more}


def test_score_writes_verdicts_tables_and_cases(tmp_path, data_dir, capsys):
    rows = [row("b#1"), row("a#1"), row("a#1", False, sample=1), row("a#1", sample=2)]
    read = score(tmp_path, rows, data_dir, main=main)
    assert "1 of 4 replies hold no calls that can be read" in capsys.readouterr().out
    verdicts = read("verdicts.jsonl")
    told = ["b#1 wrong_value:x", "a#1 correct", "a#1 no_tool_call", "a#1 correct"]
    assert [f"{v['id']} {v['reason']}" for v in verdicts] == told
    modes = {"corrected": True, "exact": True, "loose": True}
    assert verdicts[1] == {"id": "a#1", "level": 1, "correct": True, "reason": "correct", **modes}
    found = read("scores.json")["scores"]["level-1"]["official"]
    assert (found["correct"], found["n"], found["cases"]) == (2, 3, 1)
    wrong = read("cases.jsonl")[2]
    assert wrong["came"] == "no" and wrong["expected"] == {"name": "Add", "arguments": {"x": "1"}}


def test_a_scenario_counts_when_all_its_calls_are_right(tmp_path, data_dir):
    """Sample by sample, in whatever order the rows are. A scenario of which a call has no row is left out."""
    first, second = "level-3#0", "level-3#1"
    samples = [(second, False, 1), (first, True, 0), (first, False, 1), (second, True, 0)]
    rows = [row(case, right, sample=sample) for case, right, sample in samples]
    for listed, correct, n in ((rows, 1, 2), ([row(first)], 0, 0)):
        scores = score(tmp_path, listed, data_dir, main=main)("scores.json")["scores"]
        line = scores["level-3 scenarios"]
        assert (line["of"], line["official"]["correct"], line["official"]["n"]) == (1, correct, n)


def test_generate_asks_the_chosen_cases(tmp_path, data_dir, monkeypatch):
    asked, out = [], tmp_path / "new" / "out"
    monkeypatch.setattr(predict, "write_predictions", lambda *arguments: asked.append(arguments))
    options = ["--temperature", "0.5", "--samples", "3", "--seed", "9", "--limit", "1"]
    assert main(["generate", "--model", "m", "--data", str(data_dir), "--out", str(out), *options]) == 0
    ((name, cases, path, template, sampling, benchmark),) = asked
    assert (name, path, benchmark) == ("m", out / "predictions.jsonl", "API-Bank") and template == ""
    assert sampling == predict.Sampling(8192, 1024, 32, 0.5, 3, 9)
    ids = [("a#1", "level-1"), ("b#1", "level-2"), ("level-3#0", "level-3")]
    assert [(case.id, case.category) for case in cases] == ids
    built = build_messages(cases[0].messages, cases[0].tools)
    assert built[0]["content"].endswith("\n\nThe current year is 2023. " + ONE_CALL)
    call = '<tool_call>[{"name": "Look", "arguments": {}}]</tool_call>'
    turns = [("user", "please"), ("assistant", "fine"), ("assistant", call), ("tool", '{"a": 1}')]
    assert [(m["role"], m["content"]) for m in built[1:]] == turns
    assert [m["role"] for m in cases[2].messages] == ["system", "user", "assistant", "tool"]
    assert [[tool["name"] for tool in case.tools] for case in cases] == [["Add", "Look"], [], ["Add"]]
    listed = {"type": "array", "items": {"type": "string"}, "description": "more"}
    schema = {"type": "object", "properties": {"xs": listed}, "required": []}
    assert cases[0].tools[1]["parameters"] == schema


def test_errors_are_one_sentence(tmp_path, data_dir, capsys):
    paths = ["--data", str(data_dir), "--out", str(tmp_path)]
    write_jsonl(tmp_path / "p.jsonl", [row("a#1"), row("zzz")])
    assert main(["score", "--predictions", str(tmp_path / "p.jsonl"), *paths]) == 2
    assert "p.jsonl:2: unknown id 'zzz'; pass the --data" in capsys.readouterr().err
    verdicts = str(write_jsonl(tmp_path / "v.jsonl", [{"id": "a#1", "correct": True}]))
    assert main(["--diff", verdicts, verdicts]) == 2
    assert f"{verdicts} holds verdicts of another benchmark" in capsys.readouterr().err
    (data_dir / "toolrl_level-3-api_processed.json").unlink()
    assert main(["generate", "--model", "m", *paths]) == 2
    error = capsys.readouterr().err
    assert "choose --levels 1,2" in error and error.count("\n") == 1
