"""What both benchmarks share: the command line, predictions in, accuracies, tables, and two models compared.

Without torch, so that `score` starts at once. Accuracies and the bounds of intervals are in percent.
"""

from __future__ import annotations

import argparse
import csv
import json
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf, sqrt
from pathlib import Path
from typing import Any

from config import UserError, printable, quiet_pipe
from corpus.sources import REPAIR, read_records

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution: intervals are two-sided, 95 %
T_SMALL = {1: 12.7062, 2: 4.3027}  # the same of Student's t with 1 and 2 degrees of freedom: _t is too coarse
NOTE = "generated_with.json"  # lies beside the predictions
PREDICTIONS = ("predictions.jsonl", "predictions.jsonl.gz")
FIELDS = ("group", "name", "accuracy", "low", "high", "correct", "n")  # of a row of the table


class ReportError(UserError):
    """Input of an evaluation that a person must mend; the message is one sentence that says where and how."""


@dataclass(frozen=True)
class Case:
    """One benchmark case as a model is asked it; category is the benchmark's own name for its part."""

    id: str
    category: str
    messages: list[dict]
    tools: list[dict]


@dataclass(frozen=True)
class Script:
    """What an evaluation script adds to the command line. Options: flags -> keywords of add_argument."""

    name: str
    data: str  # what --data may be
    max_prompt_tokens: int
    generate: Callable[[argparse.Namespace], None]
    generate_options: dict[str, dict]
    score: Callable[[argparse.Namespace], None]
    score_options: dict[str, dict]
    right: str  # the key of a verdict that says whether the row is right
    group: Callable[[dict], str]  # a verdict's category, for --diff; KeyError: of another benchmark
    data_needed: bool = True


def at_least(least: int | float) -> Callable[[str], int | float]:
    """The type of an argument: a finite number of the type of `least`, and not below it."""

    def number(text: str) -> int | float:
        """The number that a text stands for. Raises ValueError or ArgumentTypeError, which argparse tells."""
        value = type(least)(text)
        if not least <= value < inf:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return value

    return number


def _parser(script: Script) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{script.name}.py")
    whole, count = at_least(0), at_least(1)
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="compare the --out folders of two runs")
    parser.add_argument("--show", type=whole, default=20, help="ids that --diff lists (default: %(default)s)")
    commands = parser.add_subparsers()
    ask = commands.add_parser("generate", help="model -> OUT/predictions.jsonl; resumes")
    score = commands.add_parser("score", help="predictions -> OUT/verdicts.jsonl, cases, tables")
    ask.set_defaults(run=script.generate)
    score.set_defaults(run=script.score)
    ask.add_argument("--model", required=True, help="folder or hub id of a model")
    ask.add_argument("--limit", type=count, help="first N cases of each category or level; default: all")
    ask.add_argument("--temperature", type=at_least(0.0), default=0.0, help="0: greedy (default: 0)")
    ask.add_argument("--samples", type=count, default=1, help="replies per case (default: %(default)s)")
    ask.add_argument("--prompt_template", default="", help="file with a {tools} slot; default: as trained")
    ask.add_argument("--chat_template_kwargs", default="", help="variables of its template; default: none")
    ask.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    limits = {"max_prompt_tokens": script.max_prompt_tokens, "max_new_tokens": 1024, "batch_size": 32}
    for name, default in limits.items():
        ask.add_argument(f"--{name}", type=count, default=default, help="(default: %(default)s)")
    score.add_argument("--predictions", required=True, type=Path, help=".jsonl or .jsonl.gz")
    for command, options in ((ask, script.generate_options), (score, script.score_options)):
        command.add_argument("--data", required=script.data_needed, help=script.data)
        command.add_argument("--out", required=True, type=Path, help="folder to write to")
        for flags, keywords in options.items():
            command.add_argument(*flags.split(), **keywords)
    return parser


def run(script: Script, arguments: list[str] | None) -> int:
    """`generate`, `score` or --diff A B. Returns 0; 2 after an error, which is told in one sentence; 130 at
    Ctrl-C and SIGTERM.
    """
    parser = _parser(script)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with quiet_pipe():
            args = parser.parse_args(arguments)
            if bool(args.diff) == ("run" in args):
                parser.error("choose one of generate, score and --diff A B")
            if args.diff:
                print_diff(*args.diff, args.show, script.right, script.group)
            else:
                args.run(args)
    except (UserError, OSError) as error:
        print(printable(f"{script.name}: error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(printable(str(stopped) or "interrupted"), file=sys.stderr)
        return 130
    return 0


def find(path: Path) -> Path | None:
    """`path`, or else `path` with .gz, or else None."""
    return next((file for file in (path, path.with_name(f"{path.name}.gz")) if file.is_file()), None)


def read_objects(path: Path) -> list[tuple[int, dict]]:
    """(line number, object) of JSONL or a JSON array, plain or .gz. Raises ReportError and DataError."""
    rows = list(read_records(path))
    for number, row in rows:
        if not isinstance(row, dict):
            raise ReportError(f"{path}:{number}: not a JSON object; replace the file")
    return rows


def read_author(path: Path) -> dict:
    """What predictions were made with, by the note beside them; {} without one. Raises ReportError."""
    note = path.with_name(NOTE)
    try:
        author = json.loads(note.read_bytes()) if path.exists() and note.exists() else {}
    except (ValueError, RecursionError):
        author = None
    if not isinstance(author, dict):
        what = f"{note} is broken, so nobody knows what {path} was made with"
        raise ReportError(f"{what}; delete it if you know, or generate into another --out")
    return author


def read_predictions(path: Path, benchmark: str) -> list[dict]:
    """Rows of predictions, each with its "place" (file:line) for messages; one for every id and sample.

    Of several the last one counts, with a warning; a skipped row gives way to an answer without. A
    half-written last line, which a killed run leaves behind, is left out with a warning; anything else that
    is wrong raises ReportError or DataError, also a note that they were made for another benchmark.
    """
    made_for = read_author(path).get("benchmark", benchmark) if path.name in PREDICTIONS else benchmark
    if made_for != benchmark:
        what = f"{path} holds replies to {made_for}, not to {benchmark}"
        raise ReportError(f"{what}; take the script, --data and --language of these")
    records = list(read_records(path))
    if records and isinstance(records[-1][1], Exception):
        place = f"{path}:{records.pop()[0]}"
        print(printable(f"warning: {place}: half-written last line left out"), file=sys.stderr)
    rows, repeated = {}, []
    for number, row in records:
        if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not is_reply(row):
            wanted = 'not a JSON object with the strings "id" and "output" (in dialogues, lists of strings)'
            raise ReportError(f"{path}:{number}: {wanted}; {REPAIR}")
        if not isinstance(row.get("sample", 0), (int, float)):
            raise ReportError(f"{path}:{number}: sample is no number; {REPAIR}")
        key = row["id"], row.get("sample", 0)
        if key in rows and "skipped" not in rows[key]:
            repeated.append(number)
        if "skipped" not in row or "skipped" in rows.get(key, row):
            rows[key] = row | {"place": f"{path}:{number}"}
    if repeated:
        what = f"{len(repeated)} rows repeat the id and sample of another; the last one counts"
        print(printable(f"warning: {path}:{repeated[0]}: {what}"), file=sys.stderr)
    if not rows:
        raise ReportError(f"{path} holds no whole prediction; run generate again")
    return list(rows.values())


def is_reply(row: dict) -> bool:
    """Whether a row of predictions has a reply: a string, or for a dialogue a list of them for every turn."""
    output = row.get("output")
    if not row["id"].startswith("multi_turn_"):
        return isinstance(output, str)
    turns = output if isinstance(output, list) else [None]
    return all(isinstance(turn, list) and all(isinstance(reply, str) for reply in turn) for turn in turns)


def tell_partial(parts: dict[str, dict], sizes: dict[str, int]) -> list[str]:
    """Names and tells the parts that ran, but not with all cases of the data. parts: their tallies."""
    partial = [name for name, part in parts.items() if 0 < part["cases"] < sizes[name]]
    if partial:
        short = ", ".join(f"{name} {parts[name]['cases']} of {sizes[name]}" for name in partial)
        print(f"Not all cases were asked: {short}.")
    return partial


def tell_unreadable(outputs: Sequence[str], asked: int, effect: str) -> None:
    """Warns where more than a tenth of the replies hold no calls that can be read.

    A model that writes its calls in another notation would seem to be a weak one. effect: what they count as.
    """
    if len(outputs) > asked / 10:
        what = f"{len(outputs)} of {asked} replies hold no calls that can be read, the first one is"
        print(f"Warning: {what}\n  {shorten(outputs[0], 300)!r}\n{effect}")


_ENCODE = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make a new encoder for every row


def _write(path: Path, text: str) -> None:
    # A reply may hold half a surrogate pair, which is no UTF-8; its escape is right in JSON.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """One JSON object per line, in place of what was there."""
    _write(path, "".join(f"{_ENCODE(row)}\n" for row in rows))


def interval(correct: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of `correct` out of `n`, in percent (Wilson 1927); (0, 100) without cases."""
    if not n:
        return 0.0, 100.0
    p, factor = correct / n, 1 + Z * Z / n
    middle = (p + Z * Z / (2 * n)) / factor
    half = Z * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / factor
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def _t(freedom: int) -> float:
    """97.5 % quantile of Student's t, off by < 0.01 (expansion of Abramowitz and Stegun 26.7.5)."""
    if freedom in T_SMALL:
        return T_SMALL[freedom]
    first, second = (Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    fourth = (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160
    return Z + (first / freedom + second / freedom**2 + third / freedom**3 + fourth / freedom**4)


def sampled_interval(per_case_means: Sequence[float]) -> tuple[float, float]:
    """95 % interval, in percent, of the mean over cases of every case's share of right samples (0 to 1).

    The cases are the units, because samples of one case resemble each other: mean ± t · s / √cases. Where all
    cases agree s is 0 and says nothing: then Wilson's interval over the cases.
    """
    n = len(per_case_means)
    mean = sum(per_case_means) / n
    spread = sum((value - mean) ** 2 for value in per_case_means)
    if spread < 1e-12:  # also a single case
        return interval(mean * n, n)
    half = _t(n - 1) * sqrt(spread / (n - 1) / n)
    return 100 * max(0.0, mean - half), 100 * min(1.0, mean + half)


def tally(verdicts: Iterable[tuple[str, bool]]) -> dict:
    """{"accuracy", "low", "high", "correct", "n" (pairs), "cases"} of (case, is it right?) pairs.

    One pair per case: Wilson's interval. Several pairs for any case (samples): sampled_interval, in which
    cases weigh as their samples do. Without pairs accuracy, low and high are None.
    """
    n, right = Counter(), Counter()
    for case, is_right in verdicts:
        n[case] += 1
        right[case] += bool(is_right)
    total, correct = n.total(), right.total()
    accuracy = 100 * correct / total if total else None
    if total == len(n):
        low, high = interval(correct, total) if total else (None, None)
    else:
        share, scale = correct / total, len(n) / total
        low, high = sampled_interval([share + scale * (right[case] - share * n[case]) for case in n])
    return {"accuracy": accuracy, "low": low, "high": high, "correct": correct, "n": total, "cases": len(n)}


def combined(parts: Iterable[tuple[float, dict]]) -> dict[str, float]:
    """{"accuracy", "low", "high"} of a sum of independent (weight, tally) parts (Zou and Donner 2008)."""
    accuracy = below = above = 0.0
    for weight, part in parts:
        accuracy += weight * part["accuracy"]
        below += (weight * (part["accuracy"] - part["low"])) ** 2
        above += (weight * (part["high"] - part["accuracy"])) ** 2
    return {"accuracy": accuracy, "low": accuracy - sqrt(below), "high": accuracy + sqrt(above)}


def mcnemar(broken: int, fixed: int) -> float:
    """Exact two-sided p-value (McNemar 1947) of equal models; in whole numbers, so nothing overflows."""
    n, tail, term = broken + fixed, 0, 1
    for k in range(min(broken, fixed) + 1):
        tail += term
        term = term * (n - k) // (k + 1)  # n over k + 1
    return min(1.0, 2 * tail / 2**n)


def text_table(header: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """Columns in line: the first `left` ones to the left, the others to the right. None becomes "n/a"."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        aligned = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return "n/a" if value is None else str(value)


def write_table(rows: Sequence[dict], out: Path, scores: dict) -> None:
    """Writes scores.csv (`rows`: group, name, and what tally says) and scores.json; prints the table."""
    lines = []
    with open(out / "scores.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        for row in rows:
            values = [row.get(key) for key in FIELDS]
            writer.writerow([f"{v:.4f}" if isinstance(v, float) else v for v in values])
            bounds = "" if row.get("low") is None else f"{row['low']:.2f} - {row['high']:.2f}"
            lines.append((*values[:3], bounds, row.get("correct", ""), row["n"]))
    _write(out / "scores.json", json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    print(text_table(("group", "name", "accuracy %", "95 % interval", "correct", "n"), lines, left=2))


def shorten(text: str, limit: int = 400) -> str:
    """The text, its middle cut out where it is longer than `limit`: replies tell most at their ends."""
    half = limit // 2
    cut = f"{text[:half]} [… {len(text) - 2 * half} characters …] {text[-half:]}"
    return text if len(text) <= limit else cut


def write_cases(cases: Sequence[dict], out: Path, right: str = "valid", reason: str = "error_type") -> None:
    """Writes cases.jsonl (all rows) and failures.txt (the wrong ones, to be read by people) into `out`.

    cases: id, category, `right` (was it right?), `reason`, expected, came (the calls, or the raw text where
    they cannot be read) and why (in words; "" for right ones).
    """
    write_rows(out / "cases.jsonl", cases)
    wrong = [case for case in cases if not case[right]]
    told = [f"{len(wrong)} of {len(cases)} rows are wrong.\n"]
    for name, count in Counter(case[reason] for case in wrong).most_common():
        told.append(f"{count:>7}  {name}\n")
    for case in wrong:
        told.append(
            f"\n{case['id']} ({case['category']}): {case[reason]}\n  why:      {case['why']}\n"
            f"  expected: {_ENCODE(case['expected'])}\n  came:     {_ENCODE(case['came'])}\n"
        )
    _write(out / "failures.txt", printable("".join(told)))


def read_verdicts(place: str, right: str) -> list[dict]:
    """Rows of a verdicts.jsonl, given itself or as the --out folder of `score`. Raises ReportError."""
    path = Path(place) / "verdicts.jsonl" if Path(place).is_dir() else Path(place)
    rows = [row for _, row in read_objects(path)]
    if not all(isinstance(row.get("id"), str) and isinstance(row.get(right), bool) for row in rows):
        raise ReportError(f"--diff: {path} holds no verdicts; give the --out folder of a `score` run")
    return rows


def data_of(place: str) -> str:
    """The version of the data that scores.json beside the verdicts names, or "". Raises ReportError."""
    path = (Path(place) if Path(place).is_dir() else Path(place).parent) / "scores.json"
    try:
        return str(json.loads(path.read_bytes()).get("data", "")) if path.exists() else ""
    except (ValueError, AttributeError, RecursionError):
        raise ReportError(f"--diff: {path} is broken; run score again") from None


def compare(a: list[dict], b: list[dict], right: str) -> dict[str, tuple[bool | None, bool | None]]:
    """Case -> (right in a, right in b); None: missing. Of several samples more than half must be right."""
    sides: tuple[dict, dict] = {}, {}
    for side, rows in zip(sides, (a, b)):
        for row in rows:
            side.setdefault(row["id"], []).append(row[right])
    before, after = ({case: 2 * sum(votes) > len(votes) for case, votes in side.items()} for side in sides)
    return {case: (before.get(case), after.get(case)) for case in before | after}


def print_diff(a: str, b: str, show: int, right: str, group: Callable[[dict], str]) -> None:
    """The command --diff: two score folders by category, and the first `show` ids of every list."""
    data_a, data_b = data_of(a), data_of(b)
    if data_a and data_b and data_a != data_b:
        what = f"{a} was scored on {data_a}, {b} on {data_b}, where the same ids are other cases"
        raise ReportError(f"--diff: {what}; score both on the same data")
    rows_a, rows_b = read_verdicts(a, right), read_verdicts(b, right)
    names = {}
    for place, rows in ((a, rows_a), (b, rows_b)):
        try:
            names |= {row["id"]: group(row) for row in rows}
        except KeyError:
            raise ReportError(f"--diff: {place} holds verdicts of another benchmark") from None
    fates = compare(rows_a, rows_b, right)
    groups = defaultdict(Counter)
    for case, fate in fates.items():
        if None not in fate:
            groups[names[case]][fate] += 1
    if not groups:
        raise ReportError(f"--diff: {a} and {b} have no case in common; score the same data twice")
    lines = []
    for name, pairs in (*groups.items(), ("all", sum(groups.values(), Counter()))):
        still, broken, fixed, wrong = (pairs[pair] for pair in product((True, False), repeat=2))
        counts = (pairs.total(), still + broken, still + fixed, fixed, broken, still, wrong)
        lines.append((name, *counts, f"{mcnemar(broken, fixed):.3g}"))
    header = "category,n,A right,B right,fixed,broken,still right,still wrong,McNemar p".split(",")
    print(printable(f"A: {a}\nB: {b}\n{text_table(header, lines)}"))
    lists = {
        "wrong in A, right in B": [case for case, fate in fates.items() if fate == (False, True)],
        "right in A, wrong in B": [case for case, fate in fates.items() if fate == (True, False)],
        "only in A": [case for case, fate in fates.items() if fate[1] is None],
        "only in B": [case for case, fate in fates.items() if fate[0] is None],
    }
    for title, ids in lists.items():
        more = [f"… (--show {len(ids)} lists all)"] if len(ids) > show else []
        print(printable("\n  ".join([f"{title}: {len(ids)}", *ids[:show], *more])))
