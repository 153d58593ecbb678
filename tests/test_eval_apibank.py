"""API-Bank: agreement with the official tools, what the model is shown, the files of `score`, the sentences
of errors.
"""

import gzip
import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from test_apibank_check import make_case, reply
from test_prompts import llama, qwen

import eval_apibank
from eval_apibank import main, prompt_cases, score_predictions
from evals import apibank_check
from evals.apibank_data import EvalError, load_cases
from prompts import build_messages, render_calls, render_prompt

SHARED = Path(__file__).parents[2] / "shared"
DATA, GOLDEN = SHARED / "data" / "apibank", SHARED / "golden" / "apibank_verdicts.jsonl.gz"
needs_shared = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"{DATA} is not there; it holds the cases and verdicts"
)


# ----------------------------------------------------------------------------------------- the official tools


@needs_shared
def test_agrees_with_the_official_tools():
    with gzip.open(GOLDEN, "rt") as file:
        rows = [json.loads(line) for line in file]
    verdicts, _ = score_predictions(rows, DATA)
    assert [v["id"] for v in verdicts] == [row["id"] for row in rows]
    residual = Counter()
    for row, verdict in zip(rows, verdicts):
        if row["correct"] != verdict["correct"]:
            # The row's kind says what was done to the gold call; only a database could tell these from the
            # others.
            residual[row["id"].split("/")[-1].split("-")[0], row["kind"], row["correct"]] += 1
    by_cause = Counter()
    for (_, kind, accepted), count in residual.items():
        if kind == "wrong_value:token" and accepted:
            by_cause["another user's valid token is accepted"] += count
        elif kind.split(":")[-1] == "content" and not accepted:
            by_cause["a reminder of this text must exist"] += count
        elif kind.startswith("extra_known_arg") and not accepted:
            by_cause["a blank optional argument is counted"] += count
        else:
            by_cause["unexplained"] += count
    agreement = 1 - sum(residual.values()) / len(rows)
    print(f"{agreement:.4%} of {len(rows)}; residual: {dict(by_cause)}")
    assert agreement >= 0.998
    assert not by_cause["unexplained"], residual


@needs_shared
def test_gold_calls_score_as_the_official_tools_say():
    """24 golds are rejected officially; without that gate every gold passes, device_id included."""
    cases = load_cases(DATA)
    rows = [{"id": case.id, "output": render_calls([case.gold])} for case in cases.values()]
    _, scores = score_predictions(rows, DATA)
    levels = [scores[f"level-{level}"]["official"] for level in (1, 2, 3)]
    assert [(level["correct"], level["n"]) for level in levels] == [(367, 389), (117, 119), (131, 131)]
    assert scores["all"]["corrected"]["accuracy"] == scores["all"]["exact"]["accuracy"] == 100.0
    assert scores["all"]["official"]["cases"] == scores["all"]["of"] == 639
    scenarios = scores["level-3 scenarios"]
    assert scenarios["of"] == scenarios["official"]["correct"] == scenarios["official"]["n"] == 50


@needs_shared
def test_table_of_comparisons_is_that_of_the_data():
    """Every parameter that match_rules.json names has a comparison here, and no other has one."""
    rules = json.loads((DATA / "match_rules.json").read_text())
    named = {
        f"{api}.{key}"
        for group in ("level1_2", "level3")
        for api, keys in rules[group].items()
        for key in keys
    }
    assert set(apibank_check.COMPARISONS) == named


# ------------------------------------------------------------------------------------ what the model is shown


@needs_shared
@pytest.mark.parametrize("family", [qwen, llama])
def test_templates_print_every_dialogue_whole(family):
    """Most dialogues end with the assistant's announcement of its call: two turns of the assistant in a
    row.
    """
    tokenizer = family()
    prompts = prompt_cases(
        [*load_cases(DATA).values(), *load_cases(DATA / "hammer_apibank_l1.json.gz").values()]
    )
    assert sum(p.messages[-1]["role"] == "assistant" for p in prompts[:508]) == 346
    for prompt in prompts:
        text = render_prompt(tokenizer, prompt.messages, prompt.tools)
        at = 0
        for message in build_messages(prompt.messages, prompt.tools)[1:]:
            if message["role"] != "tool":  # each template writes results in its own way
                at = text.index(message["content"].strip(), at)
        assert text.rstrip().endswith(("assistant", "assistant<|end_header_id|>"))


@needs_shared
def test_prompts_say_what_the_official_prompts_say():
    """45 golds need a year that no turn names; of level 2 only what a search found is known; no order gives
    hints.
    """
    cases = load_cases(DATA)
    prompts = {prompt.id: prompt for prompt in prompt_cases(cases.values())}
    year = [p.category for p in prompts.values() if "2023" in p.messages[0]["content"]]
    assert Counter(year) == {"level-1": 389, "level-2": 119}
    untold = [c for c in cases.values() if "2023" in str(c.gold.arguments) and "2023" not in str(c.history)]
    assert Counter(case.level for case in untold) == {1: 32, 2: 13}
    told = {2: Counter(), 3: Counter()}
    for case in cases.values():
        names = [tool["name"] for tool in prompts[case.id].tools]
        if case.level == 1:
            assert names == sorted(case.shown) and case.gold.name in names
        else:
            told[case.level][case.gold.name in names] += 1
    assert told == {
        2: {True: 106, False: 13},
        3: {True: 131},
    }  # 13 golds of level 2 call what no search has found
    first = prompts["level-2-toolsearcher/DeleteMeeting-level-3-1.jsonl#2"]
    assert [tool["name"] for tool in first.tools] == ["ToolSearcher"]


# -------------------------------------------------------------------------------------- files and the scripts


@pytest.fixture
def data_dir(tmp_path):
    """The smallest data folder: one case of level 1 and 2, and two of level 3 with their dialogues as
    ToolRL's prompts.
    """
    parameter = {"type": "str", "description": "x"}
    add = {"name": "Add", "description": "adds", "input_parameters": {"x": parameter}, "required": ["x"]}
    many = {"xs": {"type": "list(str)", "description": "more"}}
    look = {"name": "Look", "description": "looks", "input_parameters": many, "required": []}
    result = {"api_name": "Look", "input": None, "output": {"a": 1}, "exception": None}
    history = [{"role": "User", "text": "please"}, {"role": "AI", "text": "fine"}]
    past = {"role": "API", "api_name": "Look", "param_dict": {}, "result": result}
    base = {"api_name": "Add", "arguments": {"x": "1"}}
    cases = [
        {"id": "a#1", "level": 1, "tools": ["Look", "Add"], "history": [*history, past], **base},
        {"id": "b#1", "level": 2, "tools": ["Add"], "history": history, **base, "arguments": {"y": "1"}},
        {"id": "level-3#0", "level": 3, **base},
        {"id": "level-3#1", "level": 3, **base},
    ]
    call = '<tool_call>\n{"name": "Look", "parameters": {}}\n</tool_call>'
    last = "<user> Based on our conversation above, please only make one tool call to solve my need.</user>"
    dialogue = f"<user>please</user>\n{call}\n<obs> {result} </obs>\n{last}"
    answer = [{"name": "Add", "parameters": {"x": "1"}}]
    prompt = {"system": "Tools\n1. Add: adds\n\n1. **Think:** now", "user": dialogue, "answer": answer}
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "cases.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(c) + "\n" for c in cases).encode())
    )
    (folder / "api_descriptions.json").write_text(
        json.dumps({"level1_2": [add, look], "level3": [add, look]})
    )
    prompts = [{**prompt, "other": {"sample_id": 7, "api_id": n}} for n in (1, 2)]
    (folder / "toolrl_level-3-api_processed.json").write_text(json.dumps(prompts))
    return folder


def row(case: str, right: bool = True, **more) -> str:
    return json.dumps({"id": case, "output": reply("Add", {"x": "1"}) if right else "no", **more})


GOOD = row("a#1")


def run_score(tmp_path, data_dir, text: str, out: str = "out") -> int:
    path = tmp_path / "predictions.jsonl"
    path.write_text(text)
    return main(["score", "--predictions", str(path), "--data", str(data_dir), "--out", str(tmp_path / out)])


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_score_writes_verdicts_tables_and_cases(tmp_path, data_dir, capsys):
    gated = json.dumps({"id": "b#1", "output": reply("Add", {"y": "1", "x": "1"})})
    lines = [gated, GOOD, row("a#1", False, category="level-1"), row("a#1", level=1)]
    assert run_score(tmp_path, data_dir, "\n".join(lines) + "\n") == 0
    out = tmp_path / "out"
    verdicts = read_rows(out / "verdicts.jsonl")
    assert [(v["id"], v["correct"], v["reason"]) for v in verdicts] == [
        ("b#1", False, "unknown_argument"),
        ("a#1", True, "correct"),
        ("a#1", False, "no_tool_call"),
        ("a#1", True, "correct"),
    ]
    assert verdicts[1] == {
        "id": "a#1", "level": 1, "correct": True, "reason": "correct", "corrected": True, "exact": True, "loose": True,
    }
    scores = json.loads((out / "scores.json").read_text())["scores"]
    line = scores["level-1"]["official"]
    assert (line["correct"], line["n"], line["cases"], scores["level-1"]["of"]) == (2, 3, 1, 1)
    assert line["low"] < 66.6 < line["accuracy"] < 66.7 < line["high"]
    assert scores["level-3"]["official"]["n"] == 0 and scores["level-3"]["official"]["accuracy"] is None
    table = (out / "scores.csv").read_text().splitlines()
    assert table[0] == "group,name,accuracy,low,high,correct,n"
    assert table[1].startswith("level-1,official,66.6667,") and table[-1].startswith(
        "paper,Llama-3.1-8B,60.41"
    )
    wrong = read_rows(out / "cases.jsonl")[2]
    assert wrong["came"] == "no" and wrong["expected"] == {"name": "Add", "arguments": {"x": "1"}}
    assert "there is no closed tool-call section" in (out / "failures.txt").read_text()
    printed = capsys.readouterr().out
    assert "81.28" in printed and "not state its denominator" in printed
    heading = next(line for line in printed.splitlines() if "official %" in line).split()
    assert [word for word in heading if word != "%"] == [
        "n",
        "cases",
        "official",
        "corrected",
        "exact",
        "loose",
    ]


def test_a_scenario_counts_when_all_its_calls_are_right(tmp_path, data_dir, capsys):
    """Sample by sample, in whatever order the rows are. A scenario of which a call has no row is left out."""
    samples = [
        ("level-3#1", False, 1),
        ("level-3#0", True, 0),
        ("level-3#0", False, 1),
        ("level-3#1", True, 0),
    ]
    lines = [row(case, right, sample=sample) for case, right, sample in samples]
    assert run_score(tmp_path, data_dir, "\n".join(lines)) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    line = scores["level-3 scenarios"]
    assert (line["official"]["correct"], line["official"]["n"], line["official"]["cases"], line["of"]) == (
        1,
        2,
        1,
        1,
    )
    assert (scores["level-3"]["official"]["correct"], scores["level-3"]["official"]["n"]) == (2, 4)
    assert [v["sample"] for v in read_rows(tmp_path / "out" / "verdicts.jsonl")] == [1, 0, 1, 0]
    assert "not the official sample accuracy" in capsys.readouterr().out
    assert run_score(tmp_path, data_dir, row("level-3#0")) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert scores["level-3 scenarios"]["official"]["n"] == 0


def test_report_says_why_the_gate_closed(tmp_path, data_dir):
    rejected = make_case("Get", {"x": "1"}, accepts=False)
    rows = [{"id": "case", "output": reply("Get", {"x": "1"})}]
    verdicts, _ = eval_apibank.judge_rows(rows, {"case": rejected})
    (line,) = eval_apibank.report_rows(rows, verdicts, {"case": rejected})
    assert line["why"] == "the official tools reject the gold call itself (a reason)"


def test_replies_that_cannot_be_written_as_json_are_reported_as_text(tmp_path, data_dir):
    nested = "[" * 400 + "]" * 400
    odd = ['"\\ud800"', nested, "NaN"]
    lines = [
        f'<tool_call>[{{"name": "Add", "arguments": {{"x": {value}}}}}]</tool_call>'
        for value in (*odd, '"\ud800"')
    ]
    assert (
        run_score(tmp_path, data_dir, "\n".join(json.dumps({"id": "a#1", "output": line}) for line in lines))
        == 0
    )
    came = [case["came"] for case in read_rows(tmp_path / "out" / "cases.jsonl")]
    assert [type(value).__name__ for value in came] == ["str", "dict", "dict", "str"]


def test_diff_compares_two_scored_models_case_by_case(tmp_path, data_dir, capsys):
    run_score(tmp_path, data_dir, f"{GOOD}\n{row('level-3#0', False)}\n{row('level-3#1')}\n", "a")
    run_score(tmp_path, data_dir, f"{GOOD}\n{row('level-3#0')}\n{row('level-3#1')}\n", "b")
    capsys.readouterr()
    assert main(["--diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    assert "wrong in A, right in B: 1\n  level-3#0" in printed and "right in A, wrong in B: 0" in printed
    level_3 = next(line for line in printed.splitlines() if line.startswith("level-3 "))
    assert level_3.split()[:4] == ["level-3", "2", "1", "2"]  # n, right in A, right in B
    assert main(["--diff", str(tmp_path / "a"), str(tmp_path / "none")]) == 2
    assert "none: no such file; give the --out folder" in capsys.readouterr().err


def test_half_written_last_line_is_left_out(tmp_path, data_dir, capsys):
    assert run_score(tmp_path, data_dir, f"{GOOD}\n{GOOD[:20]}") == 0
    assert "predictions.jsonl:2: half-written last line" in capsys.readouterr().err
    assert len(read_rows(tmp_path / "out" / "verdicts.jsonl")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{GOOD[:20]}\n{GOOD}\n", "predictions.jsonl:1: not JSON"),
        (f"{GOOD}\n[1]\n", 'predictions.jsonl:2: needs to be an object with the strings "id" and "output"'),
        (
            f"{GOOD}\n{row('zzz')}\n",
            "predictions.jsonl:2: unknown id 'zzz'; pass the --data it was made from",
        ),
        (
            f"{GOOD}\n{row('a#1', level=4)}\n",
            "predictions.jsonl:2: unknown level '4', because a#1 is of level 1",
        ),
        ("", "predictions.jsonl: holds no predictions; run `generate` first"),
    ],
)
def test_error_of_predictions(tmp_path, data_dir, capsys, text, message):
    assert run_score(tmp_path, data_dir, text) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_error_of_files_and_options(tmp_path, data_dir, capsys):
    def sentence(command, predictions, data, *more):
        first = ["--predictions", str(predictions)] if command == "score" else ["--model", "m"]
        assert main([command, *first, "--data", str(data), "--out", str(tmp_path), *more]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    good = tmp_path / "good.jsonl"
    good.write_text(GOOD)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD.encode())[:-9])
    assert "none.jsonl: cannot be read: No such file" in sentence("score", tmp_path / "none.jsonl", data_dir)
    assert "cut.jsonl.gz: cannot be read: damaged" in sentence("score", tmp_path / "cut.jsonl.gz", data_dir)
    assert "nowhere: no such file or folder; --data takes" in sentence("score", good, tmp_path / "nowhere")
    assert "unknown level '4'; choose among 1,2,3" in sentence("generate", "", data_dir, "--levels", "1,4")
    with pytest.raises(EvalError, match="the data holds no level 2; choose among 1"):
        eval_apibank.choose_cases([make_case("Get", {})], "1,2", None)
    (data_dir / "toolrl_level-3-api_processed.json").unlink()
    assert "choose --levels 1,2" in sentence("generate", "", data_dir)
    for arguments in (["generate", "--limit", "0"], ["generate", "--temperature", "-1"], []):
        with pytest.raises(SystemExit):
            main(arguments)


def test_generate_hands_the_cases_to_the_rollout(tmp_path, data_dir, monkeypatch):
    calls = []
    rollout, model = ModuleType("rollout"), ModuleType("model")

    @dataclass(frozen=True)
    class Case:
        id: str
        category: str
        messages: list
        tools: list

    rollout.Case, rollout.write_predictions = Case, lambda *args, **options: calls.append((args, options))
    model.ModelError = type("ModelError", (ValueError,), {})
    monkeypatch.setitem(sys.modules, "rollout", rollout)
    monkeypatch.setitem(sys.modules, "model", model)
    out = tmp_path / "new" / "out"
    options = ["--batch_size", "4", "--temperature", "0.5", "--samples", "3", "--seed", "9", "--limit", "1"]
    assert main(["generate", "--model", "m", "--data", str(data_dir), "--out", str(out), *options]) == 0
    (((name, cases, path), options),) = calls
    assert (name, path) == ("m", out / "predictions.jsonl")
    assert "{tools}" in options.pop("template")
    assert options == {
        "batch_size": 4, "max_new_tokens": 1024, "max_prompt_tokens": 8192, "temperature": 0.5, "samples": 3, "seed": 9,
    }
    assert [(c.id, c.category) for c in cases] == [
        ("a#1", "level-1"),
        ("b#1", "level-2"),
        ("level-3#0", "level-3"),
    ]
    built = build_messages(cases[0].messages, cases[0].tools)
    assert built[0]["content"].endswith("\n\nThe current year is 2023. " + eval_apibank.ONE_CALL)
    assert [(m["role"], m["content"]) for m in built[1:]] == [
        ("user", "please"),
        ("assistant", "fine"),
        ("assistant", '<tool_call>[{"name": "Look", "arguments": {}}]</tool_call>'),
        ("tool", '{"a": 1}'),
    ]
    assert [m["role"] for m in cases[2].messages] == ["system", "user", "assistant", "tool"]
    assert [[tool["name"] for tool in case.tools] for case in cases] == [["Add", "Look"], [], ["Add"]]
    assert cases[0].tools[1]["parameters"] == {
        "type": "object",
        "properties": {"xs": {"type": "array", "items": {"type": "string"}, "description": "more"}},
        "required": [],
    }


def test_script_scores_without_torch(tmp_path, data_dir):
    """One run as a user starts it; a torch that cannot be imported must not matter."""
    (tmp_path / "torch.py").write_text("raise ImportError('score must not import torch')\n")
    (tmp_path / "good.jsonl").write_text(GOOD)
    script = Path(eval_apibank.__file__)
    command = [
        sys.executable,
        script,
        "score",
        "--predictions",
        "good.jsonl",
        "--data",
        data_dir,
        "--out",
        "out",
    ]
    environment = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "level-1" in done.stdout and (tmp_path / "out" / "scores.json").is_file()
