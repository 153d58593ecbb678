"""BFCL single-turn in two steps: `generate` asks a model, `score` judges its answers without a GPU.

    python eval_bfcl.py generate --model M --data DIR --out DIR
    python eval_bfcl.py score --predictions FILE.jsonl --data DIR --out DIR
    python eval_bfcl.py --diff OUT_A OUT_B

The verdicts come from evals/bfcl_check.py and are those of the official checker.
"""

from __future__ import annotations
import distributed.start  # noqa: F401

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from evals import bfcl_data, bfcl_table, predict, report
from evals.bfcl_check import Problem, decode, find_fault, reply_kind
from evals.bfcl_data import CATEGORIES, HUB_ID
from evals.report import ReportError, tally

MAX_BRACKETS = 300  # of a reply whose calls are written again as JSON; Python refuses about 1,000 levels
OFFICIAL_MODEL = "Salesforce/xLAM-2-3b-fc-r"  # the official command knows it, and reads a JSON list from it


def judge(pairs: Iterable[tuple[dict, Problem]], problems: dict[str, Problem]) -> tuple[list[dict], dict]:
    """(cases, scores) of (row, case) pairs; several rows may share a case (samples).

    cases: per row, in order: id, category, valid, error_type, expected, came, why (see write_cases), "sample"
    if given. scores: "categories" (tally, and "errors": how often each type) for those that ran, "aggregates"
    and "replies" (see there), "sizes" (cases per category in the data), "unreadable" (outputs whose calls
    cannot be read; one without a tool-call section only where a call is right).
    """
    cases: list[dict] = []
    verdicts: dict[str, list[tuple[str, bool]]] = {}
    kinds: dict[str, list[tuple[str, str]]] = {}
    errors: dict[str, Counter] = {name: Counter() for name in CATEGORIES}
    unreadable: list[str] = []
    for row, problem in pairs:
        output, calls = row["output"], decode(row["output"])
        kind, (error_type, why) = reply_kind(output, calls), find_fault(problem, calls) or (None, "")
        verdicts.setdefault(problem.category, []).append((problem.id, error_type is None))
        kinds.setdefault(problem.category, []).append((problem.id, kind))
        if error_type:
            errors[problem.category][error_type] += 1
        silent = kind == "no_block" and (problem.category in bfcl_table.REFUSALS or "skipped" in row)
        if kind in ("no_block", "unparsable") and not silent:
            unreadable.append(output)
        # JSON nested too deeply to be written again is shown as text.
        readable = kind in ("called", "empty_list") and output.count("[") + output.count("{") < MAX_BRACKETS
        case = {
            "id": row["id"], "category": problem.category, "valid": not error_type, "error_type": error_type,
            "expected": "a call" if problem.category == "live_relevance" else problem.answer,
            "came": calls if readable else report.shorten(output), "why": why,
        }
        cases.append(case | {"sample": row["sample"]} if "sample" in row else case)
    ran = [name for name in CATEGORIES if name in verdicts]
    categories = {name: {**tally(verdicts[name]), "errors": dict(errors[name])} for name in ran}
    sizes = Counter(problem.category for problem in problems.values())
    listed, replies = bfcl_table.aggregates(categories, sizes), bfcl_table.reply_rows(kinds)
    scores = {"categories": categories, "aggregates": listed, "replies": replies, "sizes": sizes}
    return cases, scores | {"unreadable": unreadable}


def score(args: argparse.Namespace) -> None:
    """The command `score`: writes verdicts.jsonl, cases and tables to OUT, and prints the tables."""
    place, version = bfcl_data.find_data(args.data)
    rows = report.read_predictions(args.predictions, f"BFCL {version}")
    problems = bfcl_data.load_problems(place)
    for row in rows:
        if row["id"] not in problems:
            advice = "check that --data has all of BFCL, in the right version, v3 or v4"
            raise ReportError(f"{row['place']}: {args.data} has no case {row['id']!r}; {advice}")
    pairs = [(row, problems[row["id"]]) for row in rows]
    cases, scores = judge(pairs, problems)
    args.out.mkdir(parents=True, exist_ok=True)
    keys = ("id", "valid", "error_type")
    report.write_rows(args.out / "verdicts.jsonl", ({key: case[key] for key in keys} for case in cases))
    report.write_cases(cases, args.out)
    categories, sizes, unreadable = scores["categories"], scores["sizes"], scores.pop("unreadable")
    listed = [{"group": "category", "name": name, **categories.get(name, tally(()))} for name in CATEGORIES]
    columns, source = bfcl_table.PAPER_COLUMNS, bfcl_table.PAPER_SOURCE
    paper = [*bfcl_table.paper_rows(categories, scores["aggregates"]), *bfcl_table.PAPER]
    rows_by_name = [dict(zip(columns, row)) for row in paper]
    scores = {"data": version, **scores, "paper": {"source": source, "rows": rows_by_name}}
    report.write_table([*listed, *scores["aggregates"], *scores["replies"]], args.out, scores)
    print(f"\nBeside the paper's ({source})\n{report.text_table(columns, paper)}")
    partial = [name for name, row in categories.items() if row["cases"] < sizes[name]]
    if partial:
        short = ", ".join(f"{name} {categories[name]['cases']} of {sizes[name]}" for name in partial)
        print(f"Not all cases were asked: {short}.")
    skipped = sum("skipped" in row for row in rows)
    effect = "They are wrong where a call is right, and right refusals in the irrelevance categories."
    report.tell_unreadable(unreadable, len(rows) - skipped, effect)
    if skipped:
        what = "prompts were too long or refused; they count as answered without a call"
        print(f"{skipped} of {len(rows)} {what}.")
    if args.official_dir:
        files = bfcl_data.write_official(pairs, version, args.official_dir, args.model_name)
        names = ",".join(bfcl_data.file_category(name, version) for name in categories)
        print(
            f"{files} files for BFCL {version}'s own command, which scores them with:\n"
            f"BFCL_PROJECT_ROOT={args.official_dir.resolve()} bfcl evaluate --model {args.model_name} "
            f"--test-category {names}{' --partial-eval' if partial else ''}"
        )


def generate(args: argparse.Namespace) -> None:
    """The command `generate`: appends to predictions.jsonl; cases already there are not asked again."""
    place, version = bfcl_data.find_data(args.data)
    problems = bfcl_data.choose_problems(place, args.categories, args.limit)
    predict.generate(args, bfcl_data.prompt_cases(problems), f"BFCL {version}")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    which = {"nargs": "+", "default": ["single_turn"], "help": "categories or groups; commas allowed"}
    folder = {"type": Path, "help": "also write result files for `bfcl evaluate`"}
    name = {"default": OFFICIAL_MODEL, "help": "name there (%(default)s)"}
    script = report.Script(
        name="eval_bfcl", data=f"folder or checkout with BFCL_v4_*.json, or {HUB_ID}",
        max_prompt_tokens=16384, generate=generate, generate_options={"--categories": which},
        score=score, right="valid",
        score_options={"--official_dir --official-dir": folder, "--model_name --model-name": name},
        group=lambda verdict: bfcl_data.category_of(verdict["id"]),
    )
    return report.run(script, arguments)


if __name__ == "__main__":
    sys.exit(main())
