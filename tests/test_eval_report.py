"""evals/report.py: intervals and p-values against slow, obvious versions; files, tables, two models."""

import gzip
from contextlib import nullcontext
from fractions import Fraction
from math import comb, erfc, sqrt

import pytest
from bfcl_cases import write_jsonl

from config import UserError
from corpus.sources import read_jsonl
from evals import report
from evals.report import compare, interval, mcnemar, read_predictions, sampled_interval, tally

HALF = [b'{"id": "b", "output": "', b'{"id": "\xc3', b"\0" * 9, b"{\n"]


@pytest.mark.parametrize("cut", HALF)
def test_rows_may_share_an_id_and_know_their_place(tmp_path, capsys, cut):
    """A killed `generate` leaves a half-written last line; what came before it is worth scoring."""
    rows = [{"id": "a", "output": "x"}, {"id": "a", "output": "y", "sample": 1}]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    with path.open("ab") as file:
        file.write(cut)
    placed = [{**row, "place": f"{path}:{i}"} for i, row in enumerate(rows, 1)]
    assert read_predictions(path, "BFCL v4") == placed
    assert capsys.readouterr().err == f"warning: {path}:3: half-written last line left out\n"
    packed = write_jsonl(tmp_path / "p.jsonl.gz", rows)
    assert [row["output"] for row in read_predictions(packed, "BFCL v4")] == ["x", "y"]


PACKED = gzip.compress(b'{"id": "a", "output": "x"}\n' * 9)
DAMAGED = [  # name, content, the sentence
    ("p.jsonl", b'{"id": "a"\n{"id": "b", "output": ""}\n', "p.jsonl:1: not a JSON object"),
    ("p.jsonl", b"7\n", 'p.jsonl:1: not a JSON object with the strings "id" and "output"'),
    ("p.jsonl.gz", PACKED[:-9], "p.jsonl.gz cannot be read"),
    ("p.jsonl", b'{"id": "a", "output": "x"}\n\0\0\n{"id": "b", "output": "x"}\n', "p.jsonl:2: not a JSON"),
    ("p.jsonl", b'{"id": "a", "output": "x", "sample": null}\n', "p.jsonl:1: sample is no number"),
    ("p.jsonl", b"\0\0\0", "p.jsonl holds no whole prediction"),
    ("p.jsonl", b"[]", "p.jsonl holds no whole prediction"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), DAMAGED)
def test_errors_of_damaged_predictions_say_where(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_predictions(tmp_path / name, "BFCL v4")


@pytest.mark.parametrize(("correct", "n"), [(0, 16), (1, 16), (8, 16), (16, 16), (213, 258), (1, 1)])
def test_wilson_bounds_are_where_the_observed_share_is_exactly_z_away(correct, n):
    """The definition: a share p is inside while |observed - p| <= z * sqrt(p (1 - p) / n)."""
    for bound in interval(correct, n):
        p = bound / 100
        if 0 < p < 1:
            assert abs(correct / n - p) == pytest.approx(report.Z * sqrt(p * (1 - p) / n))
    low, high = interval(correct, n)
    assert 0 <= low <= 100 * correct / n <= high <= 100
    assert interval(81, 263) == pytest.approx((25.53, 36.62), abs=0.01)  # Newcombe 1998, Table I


def answer(text, **more):
    return {"id": "a", "output": text, **more}


TOO_LONG = {"skipped": "prompt_too_long"}


@pytest.mark.parametrize("rows, counted, repeated", [
    ([answer("x"), answer("y")], "y", 1), ([answer("x"), answer("y", sample=0), answer("z")], "z", 2),
    ([answer("", **TOO_LONG), answer("y")], "y", 0), ([answer("x"), answer("", **TOO_LONG)], "x", 1),
])
def test_a_sample_counts_once(tmp_path, capsys, rows, counted, repeated):
    """The last one, with a warning; an answer after a skipped row is what a larger limit has let in."""
    others = [answer("other", sample=1), answer("id") | {"id": "a#2"}]
    path = write_jsonl(tmp_path / "p.jsonl", [*rows, *others])
    assert [row["output"] for row in read_predictions(path, "BFCL v4")] == [counted, "other", "id"]
    warned = capsys.readouterr().err
    assert f"{repeated} rows repeat the id and sample" in warned if repeated else warned == ""


def test_predictions_for_another_benchmark_are_refused(tmp_path):
    """v3 and v4 share ids. A file of another name is not what the note beside it is about."""
    path = write_jsonl(tmp_path / "predictions.jsonl", [answer("x")])
    (tmp_path / "generated_with.json").write_text('{"benchmark": "BFCL v3"}')
    with pytest.raises(UserError, match="holds replies to BFCL v3, not to BFCL v4"):
        read_predictions(path, "BFCL v4")
    assert read_predictions(path, "BFCL v3")
    assert read_predictions(path.rename(tmp_path / "p.jsonl"), "BFCL v4")


@pytest.mark.parametrize("unreadable, told", [(1, False), (2, True)])
def test_more_than_a_tenth_that_cannot_be_read_is_told(capsys, unreadable, told):
    report.tell_unreadable(["f(x=1)\x1b"] * unreadable, 10, "They count as wrong.")
    out = capsys.readouterr().out
    assert all((words in out) is told for words in ("2 of 10", "f(x=1)", "count as wrong"))
    assert "\x1b" not in out


def test_several_samples_per_case_are_no_more_cases():
    """Four equal samples of each of 20 cases say no more than one: the interval must not shrink by half."""
    means = [1.0] * 12 + [0.0] * 8
    low, high = sampled_interval(means)
    half = 100 * 2.093 * sqrt(0.6 * 0.4 / 19)  # t with 19 degrees of freedom
    assert (low, high) == pytest.approx((60 - half, 60 + half), abs=0.05)
    result = tally([(f"c{i}", value == 1) for i, value in enumerate(means) for _ in range(4)])
    assert (result["low"], result["high"]) == pytest.approx((low, high))
    assert (result["accuracy"], result["correct"], result["n"], result["cases"]) == (60, 48, 80, 20)
    naive = interval(48, 80)
    assert high - low > 1.5 * (naive[1] - naive[0])
    assert sampled_interval([1.0] * 16) == interval(16, 16)  # no spread, but no proof of 100 % either


def test_one_sample_per_case_gives_wilson_and_unequal_samples_keep_the_share_of_rows():
    low, high = interval(1, 2)
    wanted = {"accuracy": 50, "low": low, "high": high, "correct": 1, "n": 2, "cases": 2}
    assert tally([("a", True), ("b", False)]) == wanted
    unequal = tally([("a", True)] * 3 + [("b", False)] + [("c", True), ("c", False)])
    assert unequal["accuracy"] == pytest.approx(100 * 4 / 6) and unequal["low"] < 66 < unequal["high"]
    assert tally([])["accuracy"] is None and tally([])["n"] == 0


def test_a_weighted_sum_of_one_part_has_its_interval_and_of_equal_parts_a_narrower_one():
    part = tally([(str(i), i < 30) for i in range(40)])
    alone, four = report.combined([(1.0, part)]), report.combined([(0.25, part)] * 4)
    assert alone == pytest.approx({key: part[key] for key in ("accuracy", "low", "high")})
    halves = ((75 - part["low"]) / 2, (part["high"] - 75) / 2)
    assert (75 - four["low"], four["high"] - 75) == pytest.approx(halves)


def test_mcnemar_equals_the_binomial_sum():
    for broken in range(12):
        for fixed in range(12):
            n = broken + fixed
            tail = sum(Fraction(comb(n, k), 2**n) for k in range(min(broken, fixed) + 1))
            assert mcnemar(broken, fixed) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)
    assert mcnemar(5000, 5000) == 1
    continuity_corrected = erfc(199 / sqrt(5000) / sqrt(2))  # the usual normal approximation
    assert mcnemar(2400, 2600) == pytest.approx(continuity_corrected, rel=0.01)
    assert 0 <= mcnemar(0, 20_000) < 1e-300  # 2 / 2**20000 is no float


def test_every_case_is_kept_and_the_wrong_ones_are_told(tmp_path):
    right = dict(id="a_0", category="a", valid=True, error_type=None, expected=[], came=[], why="")
    wrong = right | {"id": "a_1", "valid": False, "error_type": "bad", "came": "no\ncall", "why": "a reason"}
    report.write_cases([right, wrong], tmp_path)
    assert read_jsonl(tmp_path / "cases.jsonl") == [right, wrong]
    told = (tmp_path / "failures.txt").read_text()
    assert told.startswith("1 of 2 rows are wrong.") and "a_1 (a): bad" in told and "a_0" not in told


def verdicts(text, name="c"):
    """ "10x" -> case 0 right, case 1 wrong, case 2 missing."""
    return [{"id": f"{name}_{i}", "valid": mark == "1"} for i, mark in enumerate(text) if mark != "x"]


def diff(a, b):
    report.print_diff(str(a), str(b), 20, "valid", lambda row: row["id"].partition("_")[0])


def test_of_several_samples_more_than_half_must_be_right():
    a = verdicts("1") + verdicts("1") + verdicts("0")
    tie = verdicts("1") + verdicts("0")
    assert compare(a, tie, "valid") == {"c_0": (True, False)}
    assert compare(tie, a, "valid") == {"c_0": (False, True)}


@pytest.mark.parametrize("noted, sentence", [
    ('{"data": "v3"}', "scored on v4, .* on v3"), ("{", "scores.json is broken"),
    ("[]", "scores.json is broken"), ('{"data": "v4"}', ""), ("{}", ""),
])
def test_diff_takes_one_version_of_the_data(tmp_path, noted, sentence):
    """v3 and v4 share 3,069 ids, some of them with other questions or answers."""
    for name, scores in (("a", '{"data": "v4"}'), ("b", noted)):
        write_jsonl(tmp_path / name / "verdicts.jsonl", verdicts("1"))
        (tmp_path / name / "scores.json").write_text(scores)
    with pytest.raises(UserError, match=sentence) if sentence else nullcontext():
        diff(tmp_path / "a", tmp_path / "b" / "verdicts.jsonl")


def test_diff_counts_every_fate_of_a_case(tmp_path, capsys):
    a = write_jsonl(tmp_path / "a" / "verdicts.jsonl", verdicts("110011x0") + verdicts("0", "d"))
    b = write_jsonl(tmp_path / "b" / "verdicts.jsonl", verdicts("1011010x") + verdicts("1", "d"))
    diff(a.parent, b)
    out = capsys.readouterr().out
    # n, right in A and in B, fixed, broken, still right, still wrong, p
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[2:6]}
    assert rows["c"] == "6 4 4 2 2 2 0 1".split() and rows["d"] == "1 0 1 1 0 0 0 1".split()
    assert rows["all"] == [*"7 4 5 3 2 2 0".split(), f"{mcnemar(2, 3):.3g}"]
    assert out.endswith("right in A, wrong in B: 2\n  c_1\n  c_4\nonly in A: 1\n  c_7\nonly in B: 1\n  c_6\n")


@pytest.mark.parametrize("row, sentence", [
    ({"id": "c_0", "output": ""}, "b.jsonl holds no verdicts"), (*verdicts("1", "d"), "no case in common"),
])
def test_diff_of_what_cannot_be_compared(tmp_path, row, sentence):
    a, b = write_jsonl(tmp_path / "a.jsonl", verdicts("1")), write_jsonl(tmp_path / "b.jsonl", [row])
    with pytest.raises(UserError, match=sentence):
        diff(a, b)
