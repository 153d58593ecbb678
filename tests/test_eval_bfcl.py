"""eval_bfcl.py: columns and the paper's table, files in and out, what is asked, and the errors."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bfcl_cases import RIGHT, WRONG, reply, score, write_data, write_jsonl

import eval_bfcl
from eval_bfcl import main
from evals import acebench, bfcl_data, predict, report
from evals.bfcl_table import PAPER, aggregates

SIZES = dict(zip(bfcl_data.CATEGORIES, (400, 100, 50, 200, 200, 200, 240, 258, 1053, 16, 24, 884, 16)))
SIZES |= dict.fromkeys(bfcl_data.MULTI_TURN, 200)


def category(name, accuracy):
    return {"accuracy": accuracy, "low": 0.0, "high": 100.0, "n": SIZES[name]}


def table_2(model):
    """Categories of a row of Table 2, which gives the three languages of "simple" together."""
    row = next(row for row in PAPER if row[0] == model)
    names, figures = (*bfcl_data.NON_LIVE_AST, *bfcl_data.LIVE_AST), (row[1], row[1], *row[1:9])
    return {name: category(name, figure) for name, figure in zip(names, figures, strict=True)}


def column(categories, group, name):
    rows = [row for row in aggregates(categories, SIZES) if row["group"] == group]
    return next(row["accuracy"] for row in rows if row["name"].startswith(name))


DEVIATIONS = {"ToolACE-8B": 83.07}  # what the columns give where the paper's average is another


@pytest.mark.parametrize("row", PAPER, ids=[row[0] for row in PAPER])
def test_table_2_through_the_aggregation(row):
    """Live of 4 follows from the columns. Live of 6 takes a whole number of the 900 other cases."""
    name, non_live, live, overall, live_of = row[0], *row[9:13]
    categories = table_2(name)
    right = sum(round(categories[part]["accuracy"] * SIZES[part] / 100) for part in bfcl_data.LIVE_AST)
    if live_of == "6":
        others = round(live * 2251 / 100) - right
        for part in ("live_irrelevance", "live_relevance"):
            categories[part] = category(part, 100 * others / 900)
    assert column(categories, "paper", "Non-live") == pytest.approx(non_live, abs=0.011)
    if live_of == "-":  # Hammer: no number of right cases gives its Live
        assert all(abs(100 * round(live * n / 100) / n - live) > 0.005 for n in (2251, 1351))
        return
    assert column(categories, "paper", f"Live ({live_of}") == pytest.approx(live, abs=0.01)
    if live_of == "4":  # hence both Lives are printed
        assert column(categories, "v4 official", "Live Acc") == pytest.approx(live, abs=0.01)
        assert column(categories, "paper", "Live (6") is None  # irrelevance did not run
    wanted = DEVIATIONS.get(name, overall)
    assert column(categories, "paper", f"Overall (Live of {live_of})") == pytest.approx(wanted, abs=0.011)


def test_live_over_six_categories_and_the_official_overalls():
    """GPT-4o: 1797 of 2251 live cases in all, so 706 of 900 without the four AST categories."""
    categories = table_2("GPT-4o")
    assert column(categories, "v3 official", "Live Acc") == pytest.approx(80.75 * 1351 / 2251, abs=0.01)
    categories["live_irrelevance"] = category("live_irrelevance", 100 * 692 / 884)
    categories["live_relevance"] = category("live_relevance", 100 * 14 / 16)
    assert column(categories, "paper", "Live (6") == pytest.approx(79.83, abs=0.01)
    assert column(categories, "paper", "Overall (Live of 6)") == pytest.approx(83.97, abs=0.01)
    # irrelevance did not run: a column of its own says so, an Overall column counts 0
    assert column(categories, "v4 official", "Irrelevance Detection") is None
    v3_non_live = 4 * 88.105 / 5
    assert column(categories, "v3 official", "Non-Live Overall Acc") == pytest.approx(v3_non_live, abs=0.01)
    categories["irrelevance"] = category("irrelevance", 80.0)
    v3_non_live = (4 * 88.105 + 80) / 5
    assert column(categories, "v3 official", "Non-Live Overall Acc") == pytest.approx(v3_non_live, abs=0.01)
    v3_overall = (v3_non_live + 79.83) / 3
    assert column(categories, "v3 official", "Overall Acc") == pytest.approx(v3_overall, abs=0.01)
    irrelevance = (80 + 100 * 692 / 884) / 2
    assert column(categories, "v4 official", "Irrelevance Detection") == pytest.approx(irrelevance)
    overall = 0.1 * (88.105 + 80.75 + irrelevance)
    assert column(categories, "v4 official", "Overall Acc") == pytest.approx(overall, abs=0.01)
    for name, accuracy in zip(bfcl_data.SIMPLE, (90.0, 60.0, 30.0)):  # the three languages weigh the same
        categories[name]["accuracy"] = accuracy
    assert column(categories, "paper", "Non-live") == pytest.approx((60 + 95.5 + 94 + 83.5) / 4)


def test_the_columns_of_v4_are_the_official_ones():
    """A mean of categories by its name in data_overall.csv and beside it; compared once with real files."""
    names = bfcl_data.CATEGORIES
    categories = {name: category(name, float(2**i)) for i, name in enumerate(names)}
    columns = {
        "Non-Live Simple AST": names[:3], "Non-Live Multiple AST": ["multiple"],
        "Non-Live Parallel AST": ["parallel"], "Non-Live Parallel Multiple AST": ["parallel_multiple"],
        "Live Simple AST": ["live_simple"], "Live Multiple AST": ["live_multiple"],
        "Live Parallel AST": ["live_parallel"], "Live Parallel Multiple AST": ["live_parallel_multiple"],
        "Relevance Detection": ["live_relevance"],
        "Irrelevance Detection": ["irrelevance", "live_irrelevance"],
    }
    for name, parts in columns.items():
        mean = sum(categories[part]["accuracy"] for part in parts) / len(parts)
        assert column(categories, "v4 official", name) == pytest.approx(mean)
    whole = column(categories, "v4 official", "Live AST Summary")
    assert column(categories, "v4 official", "Live Acc") == whole
    del categories["live_parallel"]
    assert column(categories, "v4 official", "Live AST Summary") is None
    assert column(categories, "v4 official", "Live Acc") < whole


def test_score_keeps_the_order_and_counts_every_sample(tmp_path, capsys):
    again = RIGHT | {"sample": 2}
    unread = {**RIGHT, "sample": 1, "output": "no " * 300, "skipped": "prompt_too_long"}
    read = score(tmp_path, [WRONG, RIGHT, again, unread], write_data(tmp_path / "d", count=3))
    verdicts, cases = read("verdicts.jsonl"), read("cases.jsonl")
    assert verdicts[0] == {"id": "simple_python_1", "valid": False, "error_type": "value_error:others"}
    assert [verdict["valid"] for verdict in verdicts] == [False, True, True, False]
    details = {"category": "simple_python", "expected": [{"f": {"p": [1]}}], "came": [{"f": {"p": 2}}]}
    assert cases[0] == verdicts[0] | details | {"why": "p is 2, but the allowed values are [1]"}
    assert cases[3]["sample"] == 1 and len(cases[3]["came"]) < 500
    found = read("scores.json")["categories"]["simple_python"]
    assert (found["accuracy"], found["correct"], found["n"], found["cases"]) == (50, 2, 4, 2)
    assert found["errors"] == {"value_error:others": 1, "ast_decoder:decoder_failed": 1}
    assert "category,simple_python,50.0000" in (tmp_path / "o" / "scores.csv").read_text()
    assert "Not all cases were asked: simple_python 2 of 3." in capsys.readouterr().out


def test_no_output_stops_the_reports(tmp_path):
    """Half a surrogate pair is no UTF-8, and JSON that can be read may be nested too deeply to be written."""
    outputs = [reply(("f", {"p": "\ud800"})), '<tool_call>[{"name": "\\udfff", "arguments": {}}]</tool_call>']
    for depth in range(940, 1000):
        value = "[" * depth + "]" * depth
        outputs.append(f'<tool_call>[{{"name": "f", "arguments": {{"p": {value}}}}}]</tool_call>')
    rows = [{"id": "simple_python_0", "output": text, "sample": i} for i, text in enumerate(outputs)]
    cases = score(tmp_path, rows, write_data(tmp_path / "d"))("cases.jsonl")
    assert [type(case["came"]) for case in cases] == [list] * 2 + [str] * 60  # deep ones are shown as text


REPLIES = {"explicit []": reply(), "no tool-call section": "No.", "unparsable": "<tool_call>[{]</tool_call>"}


def test_refusals_are_split_and_calls_where_none_fits_are_counted(tmp_path):
    """All of REPLIES are officially correct refusals; only one of them was asked for."""
    data = write_data(write_data(tmp_path / "d"), name="irrelevance", count=4)
    outputs = [*REPLIES.values(), reply(("f", {"p": 1}))]
    rows = [{"id": f"irrelevance_{i}", "output": output} for i, output in enumerate(outputs)]
    scores = score(tmp_path, [*rows, RIGHT, {**WRONG, "output": reply()}], data)("scores.json")
    found = {row["name"]: (row["accuracy"], row["correct"], row["n"]) for row in scores["replies"]}
    assert scores["categories"]["irrelevance"]["correct"] == 3
    assert all(found[f"irrelevance: {kind}"] == (25, 1, 4) for kind in (*REPLIES, "called"))
    assert found["over-calling: a call, none fits"] == (25, 1, 4)
    assert found["under-calling: [], a call fits"] == (50, 1, 2)


def test_another_notation_is_told(tmp_path, capsys):
    """Hermes: an object for each call. It gave 0 and 100 %, and no word. Texts without calls are refusals."""
    data = write_data(write_data(tmp_path / "d"), name="irrelevance", count=4)
    hermes = '<tool_call>{"name": "f", "arguments": {"p": 1}}</tool_call>'
    texts = enumerate(["No.", "Sorry.", hermes])
    refusals = [{"id": f"irrelevance_{i}", "output": text} for i, text in texts]
    skipped = WRONG | {"output": "", "sample": 1, "skipped": "prompt_too_long"}
    rows = [RIGHT | {"output": hermes}, WRONG | {"output": "f(p=1)"}, skipped, *refusals]
    score(tmp_path, rows, data)
    told = f"3 of 5 replies hold no calls that can be read, the first one is\n  {hermes!r}"
    assert told in capsys.readouterr().out


def test_diff_refuses_verdicts_of_another_benchmark(tmp_path, capsys):
    """A folder of API-Bank's or ACEBench's `score`, and the reverse."""
    other = str(write_jsonl(tmp_path / "v.jsonl", [{"id": "en/atom_bool_0", "category": "x", "valid": True}]))
    ours = str(write_jsonl(tmp_path / "w.jsonl", [{"id": "simple_python_0", "valid": True}]))
    for script, place in ((main, other), (acebench.main, ours)):
        assert script(["--diff", place, place]) == 2
        assert f"{place} holds verdicts of another benchmark" in capsys.readouterr().err


def test_official_files_are_there_before_anything_is_printed(tmp_path, monkeypatch):
    """A reader of the table that has seen enough, like `| head -1`, ends the script."""
    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(report, "write_table", closed)
    data, rows = write_data(tmp_path / "d"), write_jsonl(tmp_path / "p.jsonl", [RIGHT])
    words = ["--predictions", str(rows), "--data", str(data), "--official_dir", str(tmp_path / "official")]
    with contextlib.suppress(BrokenPipeError, SystemExit):
        main(["score", *words, "--out", str(tmp_path / "o")])
    assert list((tmp_path / "official").rglob("*_result.json"))


def test_diff_goes_by_category(tmp_path, capsys):
    score(tmp_path, [RIGHT, WRONG], write_data(tmp_path / "d"))
    assert main(["--diff", str(tmp_path / "o"), str(tmp_path / "o")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "simple_python 2 1 1 0 0 1 1 1".split() in lines


def test_bad_predictions_are_told_in_one_sentence(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"id": "simple_0", "output": ""}\n')
    data, out = write_data(tmp_path / "d"), tmp_path / "o"
    paths = ["--predictions", str(tmp_path / "p.jsonl"), "--data", str(data), "--out", str(out)]
    assert main(["score", *paths]) == 2
    error = capsys.readouterr().err
    assert error.startswith("eval_bfcl: error: ") and error.count("\n") == 1
    assert f"p.jsonl:1: {data} has no case 'simple_0'" in error and not out.exists()
    paths[1] = str(write_jsonl(tmp_path / "predictions.jsonl", [RIGHT]))
    (tmp_path / "generated_with.json").write_text('{"benchmark": "BFCL v3"}')
    assert main(["score", *paths]) == 2 and "to BFCL v3, not to BFCL v4" in capsys.readouterr().err


def without_torch(tmp_path, *words):
    """As a user starts it. A torch that cannot be imported must not matter: it would take ten seconds."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not needed for that')\n")
    script, data = Path(eval_bfcl.__file__), write_data(tmp_path / "d")
    command = [sys.executable, script, *words, "--data", data, "--out", "o"]
    environment = {"PYTHONPATH": str(tmp_path)}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


def test_score_is_a_light_script(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(RIGHT))
    done = without_torch(tmp_path, "score", "--predictions", "p.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert "simple_python" in done.stdout and (tmp_path / "o" / "scores.json").is_file()


@pytest.mark.parametrize("options, said", [
    ("--samples 4", "4 equal replies"), ("--model runs/nope/model", "'runs/nope/model' does not exist"),
    ("--prompt_template nope", "cannot read nope"), ("--chat_template_kwargs a:b", "names and values such"),
    ("", "holds replies to BFCL v3, not to BFCL v4"),
])
def test_what_is_wrong_with_the_settings_is_told_before_torch_is_there(tmp_path, options, said):
    write_jsonl(tmp_path / "o" / "predictions.jsonl", [RIGHT])
    (tmp_path / "o" / "generated_with.json").write_text('{"benchmark": "BFCL v3"}')
    done = without_torch(tmp_path, "generate", "--model", ".", *options.split())
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_generate_asks_the_chosen_cases(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(predict, "write_predictions", lambda *arguments: asked.append(arguments))
    data = write_data(write_data(tmp_path / "d"), name="multiple", count=3)
    arguments = ["generate", "--model", "M", "--data", str(data), "--out", str(tmp_path / "o")]
    assert main([*arguments, "--limit", "1", "--max_new_tokens", "7", "--categories", "simple,multiple"]) == 0
    ((model, cases, path, template, sampling, benchmark),) = asked
    assert (model, path) == ("M", tmp_path / "o" / "predictions.jsonl") and template == ""
    assert benchmark == "BFCL v4"
    assert [case.id for case in cases] == ["simple_python_0", "multiple_0"]
    assert cases[0].messages == [{"role": "user", "content": "q"}]
    assert cases[0].tools[0]["description"] == "F. Argument values follow Python 3 syntax."
    assert sampling == predict.Sampling(32768, 7, 32, 0.0, 1, 0)
    assert main([*arguments, "--categories", "live"]) == 2
    assert "holds no case of live" in capsys.readouterr().err


@pytest.mark.parametrize("option", [
    "--samples 0", "--limit -1", "--limit 0", "--batch_size 0", "--max_new_tokens 0", "--max_prompt_tokens 0",
    "--temperature -0.5", "--temperature nan", "--temperature inf", "--samples 1.5",
])
def test_numbers_that_make_no_sense_are_refused(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--model", "M", "--data", "D", "--out", "o", *option.split()])
    assert f"argument {option.split()[0]}: " in capsys.readouterr().err


def test_an_interrupted_evaluation_ends_with_a_sentence(tmp_path, monkeypatch, capsys):
    """Ctrl-C and SIGTERM. What is there is counted, and can be gone on with."""
    data, out = write_data(tmp_path / "d"), tmp_path / "o"

    def stops(model, cases, path, *others):
        names = ("simple_python", "live")  # the second one is of another start
        write_jsonl(path, [RIGHT | {"category": name, "id": f"{name}_0"} for name in names])
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(predict, "write_predictions", stops)
    assert main(["generate", "--model", "M", "--data", str(data), "--out", str(out)]) == 130
    assert f"{out / 'predictions.jsonl'} holds 1 of 2 replies" in capsys.readouterr().err


def test_nothing_in_a_reply_acts_on_the_terminal(tmp_path, capsys):
    """Nor in an id, which --diff lists, or in the failures, which people look at with cat."""
    hostile = "\x1b[2K\r\x07\x08\x7f\x9b"
    wrong = RIGHT | {"output": hostile}
    score(tmp_path, [wrong], write_data(tmp_path / "d"))
    ours = write_jsonl(tmp_path / "a.jsonl", [{"id": f"simple_python_{hostile}", "valid": True}])
    assert main(["--diff", str(ours), str(ours)]) == 0
    rows = [{"id": f"x{hostile}", "output": ""}]
    predictions = str(write_jsonl(tmp_path / "p.jsonl", rows))
    assert main(["score", "--predictions", predictions, "--data", str(tmp_path / "d"), "--out", "o2"]) == 2
    told = "".join(capsys.readouterr()) + (tmp_path / "o" / "failures.txt").read_text(encoding="utf-8")
    assert not set(told) & set(hostile) - set("[2K")
