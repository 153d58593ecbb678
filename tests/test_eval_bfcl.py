"""eval_bfcl.py: columns and the paper's table, files in and out, what is asked, and errors in one
sentence.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from bfcl_cases import DATA, RIGHT, WRONG, needs_shared, reply, score, write_data, write_jsonl

import eval_bfcl
from eval_bfcl import aggregates, main, score_predictions
from evals import bfcl_data
from evals.bfcl_check import BfclError
from evals.bfcl_data import load_problems
from evals.report import interval

ROOT = Path(__file__).parents[1]

# ------------------------------------------------------------------------------------------------ aggregates

SIZES = dict(
    zip(bfcl_data.CATEGORIES, (400, 100, 50, 200, 200, 200, 240, 258, 1053, 16, 24, 884, 16), strict=True)
)
LIVE_CASES = {"6": 2251, "4": 1351}


def table_2(name):
    """Categories of one row of Table 2; the languages of "simple" are not given apart, so each gets the
    mean.
    """
    row = next(row for row in eval_bfcl.PAPER if row[0] == name)
    figures = dict(
        zip((*bfcl_data.NON_LIVE_AST, *bfcl_data.LIVE_AST), (row[1], row[1], *row[1:9]), strict=True)
    )
    return {
        name: {"accuracy": figure, "low": 0.0, "high": 100.0, "n": SIZES[name]}
        for name, figure in figures.items()
    }


def column(categories, group, name):
    rows = [
        row for row in aggregates(categories, SIZES) if row["group"] == group and row["name"].startswith(name)
    ]
    return rows[0]["accuracy"]


# Where the paper's averages are not those of its own columns, each by the figure that the columns give.
DEVIATIONS = {("ToolACE-8B", "Overall"): 83.07}


@pytest.mark.parametrize("row", eval_bfcl.PAPER, ids=[row[0] for row in eval_bfcl.PAPER])
def test_table_2_through_the_aggregation(row):
    """Live of 4 follows from the columns. Live of 6 has 900 further cases, whose right ones must be a whole
    number.
    """
    name, non_live, live, overall, live_of = row[0], *row[9:13]
    categories = table_2(name)
    right = sum(round(categories[part]["accuracy"] * SIZES[part] / 100) for part in bfcl_data.LIVE_AST)
    if live_of == "6":
        others = round(live * 2251 / 100) - right
        for part in ("live_irrelevance", "live_relevance"):
            categories[part] = {"accuracy": 100 * others / 900, "low": 0.0, "high": 100.0, "n": SIZES[part]}
    fits = {n: column(categories, "paper", f"Live ({n}") for n in LIVE_CASES}
    assert column(categories, "paper", "Non-live") == pytest.approx(non_live, abs=0.011)
    if live_of == "-":  # Hammer: no number of right cases gives its Live
        assert all(abs(100 * round(live * n / 100) / n - live) > 0.005 for n in LIVE_CASES.values())
        return
    assert fits[live_of] == pytest.approx(live, abs=0.01)
    wanted = DEVIATIONS.get((name, "Overall"), overall)
    assert column(categories, "paper", f"Overall (Live of {live_of})") == pytest.approx(wanted, abs=0.011)
    assert wanted == overall or abs(wanted - overall) > 0.4


def test_the_two_rows_of_tool_n1_do_not_fit_six_categories():
    """Hence both Lives are printed. 84.10 for the 14B's live simple is a typo, too: 217 of 258 are 84.11."""
    for name, right, live in (("Tool-N1-7B", 1086, 80.385), ("Tool-N1-14B", 1100, 81.421)):
        assert column(table_2(name), "paper", "Live (4") == pytest.approx(live, abs=0.01)
        assert column(table_2(name), "v4 official", "Live overall") == pytest.approx(
            100 * right / 1351, abs=0.01
        )
        assert column(table_2(name), "paper", "Live (6") is None  # irrelevance did not run
    assert round(100 * 217 / 258, 2) == 84.11


def test_live_over_six_categories_and_the_official_overalls():
    """GPT-4o: 1797 of 2251 live cases in all, so 706 of 900 without the four AST categories."""
    categories = table_2("GPT-4o")
    assert column(categories, "v3 official", "Live overall") == pytest.approx(80.75 * 1351 / 2251, abs=0.01)
    bounds = {"low": 0.0, "high": 100.0}
    categories["live_irrelevance"] = {"accuracy": 100 * 692 / 884, "n": 884, **bounds}
    categories["live_relevance"] = {"accuracy": 100 * 14 / 16, "n": 16, **bounds}
    assert column(categories, "paper", "Live (6") == pytest.approx(79.83, abs=0.01)
    assert column(categories, "paper", "Overall (Live of 6)") == pytest.approx(83.97, abs=0.01)
    # irrelevance did not run: a column of its own says so, an Overall column counts 0
    assert column(categories, "v4 official", "Irrelevance") is None
    assert column(categories, "v3 official", "Non-live overall") == pytest.approx(4 * 88.105 / 5, abs=0.01)
    categories["irrelevance"] = {"accuracy": 80.0, "n": 240, **bounds}
    v3_non_live = (4 * 88.105 + 80) / 5
    assert column(categories, "v3 official", "Non-live overall") == pytest.approx(v3_non_live, abs=0.01)
    assert column(categories, "v3 official", "Overall") == pytest.approx((v3_non_live + 79.83) / 3, abs=0.01)
    irrelevance = (80 + 100 * 692 / 884) / 2
    assert column(categories, "v4 official", "Irrelevance") == pytest.approx(irrelevance)
    overall = 0.1 * (88.105 + 80.75 + irrelevance)
    assert column(categories, "v4 official", "Overall") == pytest.approx(overall, abs=0.01)


def test_simple_weighs_its_languages_equally():
    categories = table_2("GPT-4o")
    for name, accuracy in zip(bfcl_data.SIMPLE, (90.0, 60.0, 30.0)):
        categories[name]["accuracy"] = accuracy
    assert column(categories, "paper", "Non-live") == pytest.approx((60 + 95.5 + 94 + 83.5) / 4)


# ------------------------------------------------------------------------------------------- files and errors


def test_score_keeps_the_order_and_counts_every_sample(tmp_path, capsys):
    read = score(tmp_path, [WRONG, RIGHT, RIGHT, RIGHT], write_data(tmp_path / "d"))
    verdicts = read("verdicts.jsonl")
    assert verdicts[0] == {"id": "simple_python_1", "valid": False, "error_type": "value_error:others"}
    assert [verdict["valid"] for verdict in verdicts] == [False, True, True, True]
    scores = json.loads((tmp_path / "o" / "scores.json").read_text())
    category = scores["categories"]["simple_python"]
    counts = {key: category[key] for key in ("accuracy", "correct", "n", "cases", "errors")}
    assert counts == {"accuracy": 75, "correct": 3, "n": 4, "cases": 2, "errors": {"value_error:others": 1}}
    assert scores["data"] == "v4" and scores["paper"]["rows"][2]["model"] == "GPT-4o"
    low, high = category["low"], category["high"]
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["category", "simple_python", "75.00", f"{low:.2f}", "-", f"{high:.2f}", "3", "4"] in table
    assert ["category", "parallel", "n/a", "0", "0"] in table
    assert (
        f"category,simple_python,75.0000,{low:.4f},{high:.4f},3,4"
        in (tmp_path / "o" / "scores.csv").read_text()
    )


def test_the_interval_is_over_cases_not_samples(tmp_path):
    """Four samples of one case are not four cases: their interval would claim to know too much."""
    data = write_data(tmp_path / "d", count=10)
    rows = [{"id": f"simple_python_{i}", "output": (RIGHT if i < 6 else WRONG)["output"]} for i in range(10)]
    once, often = (score_predictions(rows * k, data)[1]["categories"]["simple_python"] for k in (1, 4))
    assert (once["low"], once["high"]) == interval(6, 10)
    assert often["accuracy"] == once["accuracy"] and often["n"] == 40
    assert often["high"] - often["low"] > once["high"] - once["low"]


def test_every_row_says_what_was_expected_what_came_and_why_it_failed(tmp_path):
    unread = {"id": "simple_python_0", "sample": 1, "output": "no " * 300}
    cases = score(tmp_path, [WRONG, RIGHT, unread], write_data(tmp_path / "d"))("cases.jsonl")
    assert cases[0] == {
        "id": "simple_python_1", "category": "simple_python", "valid": False, "error_type": "value_error:others",
        "expected": [{"f": {"p": [1]}}], "came": [{"f": {"p": 2}}], "why": "p is 2, but the allowed values are [1]",
    }
    assert (cases[1]["valid"], cases[1]["why"]) == (True, "")
    assert cases[2]["sample"] == 1 and cases[2]["came"].startswith("no no") and len(cases[2]["came"]) < 500
    failures = (tmp_path / "o" / "failures.txt").read_text()
    assert "simple_python_1 (simple_python): value_error:others\n  why:      p is 2, but" in failures


def test_no_output_stops_the_reports(tmp_path):
    """Half a surrogate pair is no UTF-8, and JSON that can just be read may be nested too deeply to be
    written.
    """
    outputs = [reply(("f", {"p": "\ud800"})), '<tool_call>[{"name": "\\udfff", "arguments": {}}]</tool_call>']
    outputs += [
        f'<tool_call>[{{"name": "f", "arguments": {{"p": {"[" * depth}{"]" * depth}}}}}]</tool_call>'
        for depth in range(940, 1000)
    ]
    rows = [{"id": "simple_python_0", "output": output} for output in outputs]
    cases = score(tmp_path, rows, write_data(tmp_path / "d"))("cases.jsonl")
    assert [type(case["came"]) for case in cases] == [list] * 2 + [
        str
    ] * 60  # what is deep is shown as it came


REPLIES = {
    "explicit []": reply(),
    "no tool-call section": "Sorry.",
    "unparsable": "<tool_call>[{]</tool_call>",
}


def test_refusals_are_split_and_calls_where_none_fits_are_counted(tmp_path):
    """All of REPLIES are officially correct refusals; only one of them was asked for."""
    data = write_data(write_data(tmp_path / "d"), name="irrelevance", count=4)
    outputs = [*REPLIES.values(), reply(("f", {"p": 1}))]
    rows = [{"id": f"irrelevance_{i}", "output": output} for i, output in enumerate(outputs)]
    _, scores = score_predictions([*rows, RIGHT, {**WRONG, "output": reply()}], data)
    found = {row["name"]: (row["accuracy"], row["correct"], row["n"]) for row in scores["replies"]}
    assert scores["categories"]["irrelevance"]["correct"] == 3
    assert all(found[f"irrelevance: {kind}"] == (25, 1, 4) for kind in (*REPLIES, "called"))
    assert found["over-calling: a call, none fits"] == (25, 1, 4)
    assert found["under-calling: [], a call fits"] == (50, 1, 2)


def test_unasked_cases_and_long_prompts_are_told(tmp_path, capsys):
    score(
        tmp_path, [RIGHT, {**WRONG, "output": "", "skipped": "prompt_too_long"}],
        write_data(tmp_path / "d", count=3),
    )
    out = capsys.readouterr().out
    assert "Not all cases were asked: simple_python 2 of 3." in out
    assert "1 of 2 prompts were too long to be asked" in out


def test_diff_compares_two_score_folders(tmp_path, capsys):
    data = write_data(tmp_path / "d")
    for name, rows in (("a", [RIGHT, WRONG]), ("b", [{**RIGHT, "id": "simple_python_1"}, RIGHT])):
        (tmp_path / name).mkdir()
        score(tmp_path / name, rows, data)
    capsys.readouterr()
    assert main(["--diff", str(tmp_path / "a" / "o"), str(tmp_path / "b" / "o"), "--show", "5"]) == 0
    out = capsys.readouterr().out
    assert ["simple_python", *"21210100"[:7], "1"] in [line.split() for line in out.splitlines()]
    assert "wrong in A, right in B: 1\n  simple_python_1\nright in A, wrong in B: 0" in out
    assert main(["--diff", str(tmp_path / "a" / "o"), str(tmp_path)]) == 2
    assert "verdicts.jsonl: no such file; give the --out folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])
    assert "choose one of generate, score and --diff A B" in capsys.readouterr().err


@needs_shared
def test_rows_with_the_repeated_id_are_dealt_to_its_two_cases_in_turn():
    """So the official v3 layout, which has the id twice, is scored case by case, with samples too."""
    rows = [{"id": "live_relevance_3-3-0", "output": output} for output in (reply(("f", {})), "no") * 2]
    verdicts, scores = score_predictions(rows, DATA / "v3")
    assert [verdict["id"] for verdict in verdicts] == ["live_relevance_3-3-0"] * 4
    assert scores["categories"]["live_relevance"]["cases"] == 2
    told_apart = [{**row, "id": f"live_relevance_3-3-0{mark}"} for row, mark in zip(rows, ("", "#2", "", ""))]
    problems = load_problems(DATA / "v3")
    paired = [case.id[-2:] for _, case in eval_bfcl.pair_rows(told_apart, problems, "")]
    assert paired == ["-0", "#2", "-0", "-0"]


def run_score(tmp_path, text, data=None):
    (tmp_path / "p.jsonl").write_text(text)
    data = data or write_data(tmp_path / "d")
    arguments = [
        "--predictions",
        str(tmp_path / "p.jsonl"),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "o"),
    ]
    return main(["score", *arguments])


GOOD_LINE = json.dumps(RIGHT) + "\n"
BAD_PREDICTIONS = [
    ("", "p.jsonl: holds no predictions"),
    ('{"id": "simpl', "p.jsonl: holds no predictions"),
    (GOOD_LINE + '{"id": "simpl\n' + GOOD_LINE, "p.jsonl:2: not JSON"),
    (GOOD_LINE + "[]\n", "p.jsonl:2: needs to be an object"),
    (
        GOOD_LINE + '{"id": "simple_python_0"}\n',
        'p.jsonl:2: needs to be an object with the strings "id" and "output"',
    ),
    ('{"id": "nobody_7", "output": ""}\n', "p.jsonl:1: "),
    (
        '{"id": "nobody_7", "output": ""}\n',
        "no case 'nobody_7'; no category of BFCL's single-turn part has such an id",
    ),
    (
        '{"id": "simple_0", "output": ""}\n',
        "no case 'simple_0'; check that --data has the right version, v3 or v4",
    ),
    (
        '{"id": "parallel_0", "output": ""}\n',
        "no case 'parallel_0'; it has no file of parallel; fetch all of BFCL",
    ),
    (
        json.dumps(RIGHT | {"category": "sample"}),
        "unknown category 'sample', but simple_python_0 is simple_python;",
    ),
    (
        json.dumps(RIGHT | {"category": "multiple"}),
        "category 'multiple', but simple_python_0 is simple_python; repair",
    ),
]


@pytest.mark.parametrize(("text", "sentence"), BAD_PREDICTIONS)
def test_bad_predictions_are_told_in_one_sentence(tmp_path, capsys, text, sentence):
    assert run_score(tmp_path, text) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("eval_bfcl: error: ") and sentence in last_line
    assert not (tmp_path / "o").exists()


def test_a_half_written_last_line_is_left_out_with_a_warning(tmp_path, capsys):
    assert run_score(tmp_path, GOOD_LINE + '{"id": "simpl') == 0
    captured = capsys.readouterr()
    assert "p.jsonl:2: half-written last line left out" in captured.err
    assert ["category", "simple_python", "100.00"] in [line.split()[:3] for line in captured.out.splitlines()]


def test_missing_and_damaged_files(tmp_path, capsys):
    assert run_score(tmp_path, GOOD_LINE, tmp_path / "nowhere") == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert run_score(tmp_path, GOOD_LINE, tmp_path) == 2
    assert "holds no BFCL_v4_*.json" in capsys.readouterr().err
    data = write_data(tmp_path / "d")
    assert (
        main(
            ["score", "--predictions", str(tmp_path / "x"), "--data", str(data), "--out", str(tmp_path / "o")]
        )
        == 2
    )
    assert "x: cannot be read: No such file" in capsys.readouterr().err
    (data / "possible_answer" / "BFCL_v4_simple_python.json").unlink()
    assert run_score(tmp_path, GOOD_LINE, data) == 2
    assert "has 2 questions, but 0 answers in possible_answer" in capsys.readouterr().err


def test_no_rows_and_rows_without_a_file(tmp_path):
    data = write_data(tmp_path)
    with pytest.raises(BfclError, match="no predictions"):
        score_predictions([], data)
    with pytest.raises(BfclError, match="prediction 2: .*no case 'x'"):
        score_predictions([RIGHT, {"id": "x", "output": ""}], data)


def test_score_is_a_light_script(tmp_path):
    """Scoring must not need torch, nor wait for it."""
    write_jsonl(tmp_path / "p.jsonl", [RIGHT])
    data = write_data(tmp_path / "d")
    arguments = [
        "score",
        "--predictions",
        str(tmp_path / "p.jsonl"),
        "--data",
        str(data),
        "--out",
        str(tmp_path),
    ]
    code = f"import sys, eval_bfcl; eval_bfcl.main({arguments!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


# -------------------------------------------------------------------------------------------------- generate


@pytest.fixture
def rollout(monkeypatch):
    """Stands in for rollout.py, which needs torch; remembers what it was asked."""
    module, asked = ModuleType("rollout"), {}
    module.Case, module.ModelError = SimpleNamespace, ValueError
    module.write_predictions = lambda model, cases, path, **options: asked.update(
        model=model, cases=cases, path=path, options=options
    )
    monkeypatch.setitem(sys.modules, "rollout", module)
    return asked


def test_generate_asks_the_chosen_cases(tmp_path, rollout):
    write_data(tmp_path / "d")
    write_data(tmp_path / "d", name="multiple", count=3)
    arguments = ["generate", "--model", "M", "--data", str(tmp_path / "d"), "--out", str(tmp_path / "o")]
    assert main([*arguments, "--limit", "1", "--max_new_tokens", "7"]) == 0
    assert [case.id for case in rollout["cases"]] == ["simple_python_0", "multiple_0"]
    assert rollout["options"]["temperature"] == 0 and rollout["options"]["samples"] == 1
    assert rollout["path"] == tmp_path / "o" / "predictions.jsonl"
    assert rollout["options"]["max_new_tokens"] == 7 and "{tools}" in rollout["options"]["template"]
    assert main([*arguments, "--categories", "simple,non_python"]) == 0
    assert [case.id for case in rollout["cases"]] == ["simple_python_0", "simple_python_1"]
    assert rollout["cases"][0].messages == [{"role": "user", "content": "q"}]
    assert rollout["cases"][0].tools[0]["description"] == "F. Argument values follow Python 3 syntax."


def test_sampling_options_reach_the_rollout(tmp_path, rollout):
    arguments = [
        "generate",
        "--model",
        "M",
        "--data",
        str(write_data(tmp_path / "d")),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main([*arguments, "--temperature", "0.7", "--samples", "4", "--seed", "3"]) == 0
    wanted = {"temperature": 0.7, "samples": 4, "seed": 3}
    assert wanted.items() <= rollout["options"].items()


def test_generate_errors(tmp_path, rollout, capsys):
    arguments = [
        "generate",
        "--model",
        "M",
        "--data",
        str(write_data(tmp_path)),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main([*arguments, "--categories", "simpel"]) == 2
    assert "unknown 'simpel'; choose from single_turn" in capsys.readouterr().err
    assert main([*arguments, "--categories", "live"]) == 2
    assert "holds no case of live" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--limit", "-1"])
    assert "--limit: needs a whole number above 0, not '-1'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--temperature", "warm"])
    assert "--temperature: needs a number of 0 (greedy) or more, not 'warm'" in capsys.readouterr().err
    assert main([*arguments, "--prompt_template", str(tmp_path / "no.txt")]) == 2
    assert "cannot read" in capsys.readouterr().err
