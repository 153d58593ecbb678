"""What both benchmarks report: files of predictions, accuracies with intervals, tables, cases, and two models
compared.

Pure functions for eval_bfcl.py and eval_apibank.py; no torch. All accuracies and interval bounds are in
percent.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from config import UserError

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution: intervals are two-sided, 95 %
T_SMALL = {
    1: 12.7062,
    2: 4.3027,
}  # the same of Student's t with 1 and 2 degrees of freedom, where _t is too coarse
FIELDS = ("group", "name", "accuracy", "low", "high", "correct", "n")  # of a row of scores.csv


class ReportError(UserError):
    """Input that a person must put right; the message is one sentence that says where and how."""


# ------------------------------------------------------------------------------------------------------ files


def positive(text: str) -> int:
    """A whole number above 0, for argparse. Raises argparse.ArgumentTypeError."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"needs a whole number above 0, not {text!r}")
    return int(text)


def temperature(text: str) -> float:
    """A sampling temperature, 0 or more, for argparse. Raises argparse.ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"needs a number of 0 (greedy) or more, not {text!r}")
    return value


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of a text or .gz file, blank lines left out. Raises ReportError if it cannot be
    read.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or f"damaged or half-written gzip file ({error})"
        raise ReportError(f"{path}: cannot be read: {reason}") from None


def read_predictions(path: Path, needs: Sequence[str] = ("id", "output")) -> list[dict]:
    """Rows of a .jsonl or .jsonl.gz file, each with its "place" (file:line) for messages; several may share
    an id.

    needs: the keys that every row must have, with strings as values. A half-written last line, which a killed
    run leaves behind, is left out with a warning; anything else that is wrong raises ReportError.
    """
    wanted = f"an object with the strings {' and '.join(json.dumps(key) for key in needs)}"
    lines, rows = list(read_lines(path)), []
    for number, line in lines:
        place = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            if number != lines[-1][0]:
                raise ReportError(
                    f"{place}: not JSON, so the file is damaged; repair or delete this line"
                ) from None
            print(f"warning: {place}: half-written last line left out", file=sys.stderr)
            continue
        if not isinstance(row, dict) or any(not isinstance(row.get(key), str) for key in needs):
            raise ReportError(f"{place}: needs to be {wanted}; repair or delete this line")
        row["place"] = place
        rows.append(row)
    if not rows:
        raise ReportError(f"{path}: holds no predictions; run `generate` first")
    return rows


def make_folder(folder: Path) -> None:
    """Makes the folder of --out. Raises ReportError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"--out: cannot make the folder {folder}: {error.strerror}; give another") from None


_ENCODE = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make a new encoder for every row


def _write(path: Path, text: str) -> None:
    # A reply may hold half a surrogate pair, which is no UTF-8; its escape is right in JSON.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """One JSON object per line."""
    _write(path, "".join(f"{_ENCODE(row)}\n" for row in rows))


# ------------------------------------------------------------------------------------------------- statistics


def interval(correct: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of `correct` out of `n`, in percent (Wilson 1927). Without cases it is (0,
    100).
    """
    if not n:
        return 0.0, 100.0
    p, factor = correct / n, 1 + Z * Z / n
    middle = (p + Z * Z / (2 * n)) / factor
    half = Z * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / factor
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def _t(freedom: int) -> float:
    """97.5 % quantile of Student's t (expansion in 1 / freedom, Abramowitz and Stegun 26.7.5; off by <
    0.01).
    """
    if freedom in T_SMALL:
        return T_SMALL[freedom]
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    )
    fourth = (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160
    return Z + sum(term / freedom**k for k, term in enumerate((*terms, fourth), 1))


def sampled_interval(per_case_means: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) in percent from the share of right samples (0 to 1) of every case.

    The cases are the units, because the samples of one case resemble each other: mean ± t · s / √cases with
    Student's t, cut off at 0 and 100. Where all cases agree s is 0 and says nothing: then Wilson's interval
    over the cases.
    """
    n = len(per_case_means)
    mean = sum(per_case_means) / n
    spread = sum((value - mean) ** 2 for value in per_case_means)
    if spread < 1e-12:  # also a single case
        return 100 * mean, *interval(mean * n, n)
    half = _t(n - 1) * sqrt(spread / (n - 1) / n)
    return 100 * mean, 100 * max(0.0, mean - half), 100 * min(1.0, mean + half)


def tally(verdicts: Iterable[tuple[str, bool]]) -> dict:
    """{"accuracy", "low", "high", "correct", "n", "cases"} of (case, is it right?) pairs; n counts pairs,
    cases cases.

    accuracy is correct / n. One pair per case: Wilson's interval. Several pairs for any case (samples): the
    interval of sampled_interval; where some cases have more samples than others, its values are the accuracy
    plus every case's share in the deviation from it, so cases weigh as their samples do. Without pairs
    accuracy, low and high are None.
    """
    n, right = Counter(), Counter()
    for case, is_right in verdicts:
        n[case] += 1
        right[case] += bool(is_right)
    total, correct = n.total(), right.total()
    counts = {"correct": correct, "n": total, "cases": len(n)}
    if not total:
        return {"accuracy": None, "low": None, "high": None, **counts}
    if total > len(n):
        share, scale = correct / total, len(n) / total
        _, low, high = sampled_interval([share + scale * (right[case] - share * n[case]) for case in n])
    else:
        low, high = interval(correct, total)
    return {"accuracy": 100 * correct / total, "low": low, "high": high, **counts}


def combined_interval(parts: Iterable[tuple[float, dict]]) -> tuple[float, float, float]:
    """(accuracy, low, high) of a weighted sum of independent accuracies, from (weight, tally) pairs.

    The distances from each accuracy to its bounds are weighted, squared and added (Zou and Donner 2008).
    """
    accuracy = below = above = 0.0
    for weight, part in parts:
        accuracy += weight * part["accuracy"]
        below += (weight * (part["accuracy"] - part["low"])) ** 2
        above += (weight * (part["high"] - part["accuracy"])) ** 2
    return accuracy, accuracy - sqrt(below), accuracy + sqrt(above)


def mcnemar(broken: int, fixed: int) -> float:
    """Exact two-sided p-value that two models are equally good, from the cases in which only one of them is
    right.

    Binomial with probability 1/2 (McNemar 1947); in whole numbers, so thousands of cases neither overflow nor
    round.
    """
    n, tail, term = broken + fixed, 0, 1
    for k in range(min(broken, fixed) + 1):
        tail += term
        term = term * (n - k) // (k + 1)  # n over k + 1
    return min(1.0, 2 * tail / 2**n)


# ----------------------------------------------------------------------------------------------------- tables


def text_table(header: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """Columns in line: the first `left` ones to the left, the others to the right. None becomes "n/a"."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    aligned = (
        [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in cells
    )
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def _cell(value: Any) -> str:
    return "n/a" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def write_table(rows: Sequence[dict], out: Path, scores: dict) -> None:
    """Writes scores.csv (`rows`, with the columns FIELDS) and scores.json (`scores`) into `out`; prints the
    table.

    rows: group, name, and tally's accuracy, low, high, correct and n. None or a missing key means that there
    is none.
    """
    with open(out / "scores.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        for row in rows:
            values = [row.get(key) for key in FIELDS]
            writer.writerow([f"{v:.4f}" if isinstance(v, float) else v for v in values])
    (out / "scores.json").write_text(
        json.dumps(scores, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    lines = []
    for row in rows:
        low, high, correct = row.get("low"), row.get("high"), row.get("correct")
        bounds = "" if low is None else f"{low:.2f} - {high:.2f}"
        lines.append(
            (row["group"], row["name"], row["accuracy"], bounds, "" if correct is None else correct, row["n"])
        )
    print(text_table(("group", "name", "accuracy %", "95 % interval", "correct", "n"), lines, left=2))


# ----------------------------------------------------------------------------------------------- single cases


def shorten(text: str, limit: int = 400) -> str:
    """The text, its middle cut out where it is longer than `limit`: replies tell most at their ends."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} [… {len(text) - 2 * half} characters …] {text[-half:]}"


def write_cases(cases: Sequence[dict], out: Path, right: str = "valid", reason: str = "error_type") -> None:
    """Writes cases.jsonl (one line per row) and failures.txt (the wrong ones, to be read by people) into
    `out`.

    cases: rows with id, category, `right` (was it right?), `reason`, expected, came (what the model answered:
    its calls, or the raw text where they cannot be read) and why (in words; "" for right ones).
    """
    lines, told, texts = [], [], {}
    for case in cases:
        expected, came = case["expected"], _ENCODE(case["came"])
        if (
            id(expected) not in texts
        ):  # rows of one case share the object, and encoding is what takes the time here
            texts[id(expected)] = _ENCODE(expected)
        rest = {key: value for key, value in case.items() if key not in ("expected", "came")}
        lines.append(f'{_ENCODE(rest)[:-1]}, "expected": {texts[id(expected)]}, "came": {came}}}\n')
        if not case[right]:
            told.append(
                f"\n{case['id']} ({case['category']}): {case[reason]}\n  why:      {case['why']}\n"
                f"  expected: {texts[id(expected)]}\n  came:     {came}\n"
            )
    reasons = Counter(case[reason] for case in cases if not case[right]).most_common()
    head = [
        f"{len(told)} of {len(cases)} rows are wrong.\n",
        *(f"{count:>7}  {name}\n" for name, count in reasons),
    ]
    _write(out / "cases.jsonl", "".join(lines))
    _write(out / "failures.txt", "".join(head + told))


# ----------------------------------------------------------------------------------- two models, case by case


def read_verdicts(place: str | Path, right: str = "valid") -> list[dict]:
    """Rows of a verdicts.jsonl, given itself or as the --out folder of `score`; `right` is their truth
    value.
    """
    path, advice = Path(place), "give the --out folder of a `score` run, or its verdicts.jsonl"
    path = path / "verdicts.jsonl" if path.is_dir() else path
    if not path.exists():
        raise ReportError(f"{path}: no such file; {advice}")
    rows = read_predictions(path, ("id",))
    for row in rows:
        if not isinstance(row.get(right), bool):
            raise ReportError(
                f"{row['place']}: has no {json.dumps(right)}, so these are no verdicts; {advice}"
            )
    return rows


def _by_majority(rows: Iterable[dict], right: str) -> dict[str, bool]:
    """Case -> is it right? Of several samples more than half must be."""
    votes: dict[str, list[bool]] = {}
    for row in rows:
        votes.setdefault(row["id"], []).append(row[right])
    return {case: 2 * sum(listed) > len(listed) for case, listed in votes.items()}


def compare(
    a: Iterable[dict], b: Iterable[dict], right: str = "valid", group: Callable[[dict], str] | None = None
) -> dict:
    """Two models' verdicts, case by case. Where a case has several samples, more than half of them must be
    right.

    right: key of the truth value. group: row -> name of its category; None takes the id up to its last "_".
    Returns the lists of ids "fixed" (wrong in a, right in b), "broken", "only_a", "only_b", and "all" and
    "groups" (by name) with {"n", "a", "b" (right ones), "fixed", "broken", "unchanged_right",
    "unchanged_wrong", "p"}.
    """
    group, a, b = group or (lambda row: row["id"].rpartition("_")[0]), list(a), list(b)
    names = {row["id"]: group(row) for row in (*a, *b)}
    before, after = _by_majority(a, right), _by_majority(b, right)
    both = [case for case in before if case in after]

    def count(cases: list[str]) -> dict:
        pairs = Counter((before[case], after[case]) for case in cases)
        broken, fixed = pairs[True, False], pairs[False, True]
        return {
            "n": len(cases), "a": pairs[True, True] + broken, "b": pairs[True, True] + fixed,
            "fixed": fixed, "broken": broken, "unchanged_right": pairs[True, True],
            "unchanged_wrong": pairs[False, False], "p": mcnemar(broken, fixed),
        }

    return {
        "all": count(both),
        "groups": {
            name: count([case for case in both if names[case] == name])
            for name in dict.fromkeys(names.values())
        },
        "fixed": [case for case in both if after[case] > before[case]],
        "broken": [case for case in both if after[case] < before[case]],
        "only_a": [case for case in before if case not in after],
        "only_b": [case for case in after if case not in before],
    }


def print_diff(
    a: str | Path, b: str | Path, show: int = 20, right: str = "valid",
    group: Callable[[dict], str] | None = None,
) -> None:
    """The command --diff: what compare() says about two score folders, and the first `show` ids of every
    list.
    """
    result = compare(read_verdicts(a, right), read_verdicts(b, right), right, group)
    if not result["all"]["n"]:
        raise ReportError(
            f"--diff: {a} and {b} have no case in common; score the same benchmark and version twice"
        )
    keys = ("n", "a", "b", "fixed", "broken", "unchanged_right", "unchanged_wrong")
    rows = [
        [name, *(counts[key] for key in keys), f"{counts['p']:.3g}"]
        for name, counts in ({**result["groups"], "all": result["all"]}).items()
        if counts["n"]
    ]
    header = (
        "category",
        "n",
        "A right",
        "B right",
        "fixed",
        "broken",
        "still right",
        "still wrong",
        "McNemar p",
    )
    print(f"A: {a}\nB: {b}\n{text_table(header, rows)}")
    titles = {"fixed": "wrong in A, right in B", "broken": "right in A, wrong in B"}
    for key, title in (titles | {"only_a": "only in A", "only_b": "only in B"}).items():
        ids = result[key]
        more = f" … (--show {len(ids)} lists all)" if len(ids) > show else ""
        print(
            f"{title}: {len(ids)}"
            + "".join(f"\n  {case}" for case in ids[:show])
            + (f"\n {more}" if more else "")
        )
