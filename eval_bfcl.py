"""BFCL, single and multi-turn, in two steps: `generate` asks a model, `score` judges without a GPU.

    python eval_bfcl.py generate --model M --data DIR --out DIR
    python eval_bfcl.py score --predictions FILE.jsonl --data DIR --out DIR
    python eval_bfcl.py --diff OUT_A OUT_B

The verdicts are those of the official checker: on single turns from evals/bfcl_check.py, on dialogues
(--categories multi_turn, which need no --data) from itself, see evals/bfcl_multi_turn.py.
"""

from __future__ import annotations
import distributed.start  # noqa: F401

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from evals import bfcl_data, bfcl_multi_turn, bfcl_table, predict, report
from evals.bfcl_check import Problem, decode, find_fault, reply_kind
from evals.bfcl_data import HUB_ID, MULTI_TURN
from evals.bfcl_multi_turn import Scenario, load_scenarios
from evals.report import ReportError, tally

MAX_BRACKETS = 300  # of a reply whose calls are written again as JSON; Python refuses about 1,000 levels
OFFICIAL_MODEL = "Salesforce/xLAM-2-3b-fc-r"  # the official command knows it, and reads a JSON list from it


@dataclass(frozen=True)
class Judged:
    """A row's verdict. fault: (error type, why in words), None if it is right. came: what reports show of it.

    kind: the kind of a reply, "" of a dialogue. unreadable: a text that may hold calls nobody can read, or
    None.
    """

    fault: tuple[str, str] | None
    came: object
    kind: str
    unreadable: str | None


def judge_reply(row: dict, problem: Problem) -> Judged:
    """A text without a tool-call section may hold calls only where one is right."""
    output, calls = row["output"], decode(row["output"])
    kind = reply_kind(output, calls)
    silent = kind == "no_block" and (problem.category in bfcl_table.REFUSALS or "skipped" in row)
    # JSON nested too deeply to be written again is shown as text.
    flat = output.count("[") + output.count("{") < MAX_BRACKETS
    came = calls if flat and kind in ("called", "empty_list") else report.shorten(output)
    unread = kind in ("no_block", "unparsable") and not silent
    return Judged(find_fault(problem, calls), came, kind, output if unread else None)


def judge_dialogue(row: dict, scenario: Scenario) -> Judged:
    """A dialogue may hold calls that cannot be read where no reply has one that can."""
    skipped = row.get("skipped", "")
    fault = bfcl_multi_turn.find_fault(scenario, row["output"], skipped)
    replies = [reply for turn in row["output"] for reply in turn]
    unread = not skipped and all(bfcl_multi_turn.read_calls(reply) is None for reply in replies)
    came = [list(map(report.shorten, turn)) for turn in row["output"]]
    return Judged(fault, came, "", "".join(replies[:1]) if unread else None)


def judge(
    pairs: Iterable[tuple[dict, Problem | Scenario]], problems: dict[str, Problem | Scenario]
) -> tuple[list[dict], dict]:
    """(cases, scores) of (row, case) pairs; several rows may share a case (samples).

    cases: per row, in order: id, category, valid, error_type, expected, came, why (see write_cases), "sample"
    if given. scores: "categories" (tally, and "errors": how often each type) for those that ran, "aggregates"
    and "replies" (see there), "sizes" (cases per category in the data), "unreadable" (see Judged).
    """
    cases: list[dict] = []
    verdicts: dict[str, list[tuple[str, bool]]] = {}
    kinds: dict[str, list[tuple[str, str]]] = {}
    errors: dict[str, Counter] = {name: Counter() for name in bfcl_data.KNOWN}
    unreadable: list[str] = []
    for row, problem in pairs:
        judged = (judge_dialogue if isinstance(problem, Scenario) else judge_reply)(row, problem)
        error_type, why = judged.fault or (None, "")
        verdicts.setdefault(problem.category, []).append((problem.id, error_type is None))
        if judged.kind:
            kinds.setdefault(problem.category, []).append((problem.id, judged.kind))
        if error_type:
            errors[problem.category][error_type] += 1
        if judged.unreadable is not None:
            unreadable.append(judged.unreadable)
        case = {
            "id": row["id"], "category": problem.category, "valid": not error_type, "error_type": error_type,
            "expected": "a call" if problem.category == "live_relevance" else problem.answer,
            "came": judged.came, "why": why,
        }
        cases.append(case | {"sample": row["sample"]} if "sample" in row else case)
    ran = [name for name in errors if name in verdicts]
    categories = {name: {**tally(verdicts[name]), "errors": dict(errors[name])} for name in ran}
    sizes = Counter(problem.category for problem in problems.values())
    listed, replies = bfcl_table.aggregates(categories, sizes), bfcl_table.reply_rows(kinds)
    scores = {"categories": categories, "aggregates": listed, "replies": replies, "sizes": sizes}
    return cases, scores | {"unreadable": unreadable}


def official_results(pairs: Iterable[tuple[dict, Problem | Scenario]]) -> Iterator[tuple[dict, str, object]]:
    """(row, category, what the official tool is told that came) of (row, case) pairs."""
    for row, problem in pairs:
        if isinstance(problem, Scenario):
            told = bfcl_multi_turn.official_result(problem, row["output"], row.get("skipped", ""))
        else:
            told = bfcl_data.official_result(problem, row["output"])
        yield row, problem.category, told


def score(args: argparse.Namespace) -> None:
    """The command `score`: writes verdicts.jsonl, cases and tables to OUT, and prints the tables."""
    place, version = bfcl_data.find_data(args.data) if args.data else (None, "v4")
    rows = report.read_predictions(args.predictions, f"BFCL {version}")
    problems: dict[str, Problem | Scenario] = bfcl_data.load_problems(place) if place else {}
    if version == "v4" and any(bfcl_data.category_of(row["id"]) in MULTI_TURN for row in rows):
        problems |= {scenario.id: scenario for scenario in load_scenarios()}
    for row in rows:
        if row["id"] not in problems:
            what = f"{args.data} has no case" if args.data else "without --data there is no case"
            advice = "check that --data has all of BFCL, in the right version, v3 or v4"
            raise ReportError(f"{row['place']}: {what} {row['id'][:80]!r}; {advice}")
    pairs = [(row, problems[row["id"]]) for row in rows]
    cases, scores = judge(pairs, problems)
    args.out.mkdir(parents=True, exist_ok=True)
    keys = ("id", "valid", "error_type")
    report.write_rows(args.out / "verdicts.jsonl", ({key: case[key] for key in keys} for case in cases))
    report.write_cases(cases, args.out)
    if args.official_dir:
        files = bfcl_data.write_official(
            official_results(pairs), version, args.official_dir, args.model_name
        )
    categories, sizes, unreadable = scores["categories"], scores["sizes"], scores.pop("unreadable")
    listed = []
    for name in bfcl_data.KNOWN:
        listed.append({"group": "category", "name": name, **categories.get(name, tally(()))})
    columns, source = bfcl_table.PAPER_COLUMNS, bfcl_table.PAPER_SOURCE
    paper = [*bfcl_table.paper_rows(categories, scores["aggregates"]), *bfcl_table.PAPER]
    rows_by_name = [dict(zip(columns, row)) for row in paper]
    scores = {"data": version, **scores, "paper": {"source": source, "rows": rows_by_name}}
    report.write_table([*listed, *scores["aggregates"], *scores["replies"]], args.out, scores)
    if categories.keys() - set(MULTI_TURN):
        print(f"\nBeside the paper's ({source})\n{report.text_table(columns, paper)}")
    partial = report.tell_partial(categories, sizes)
    skipped = sum("skipped" in row for row in rows)
    effect = "They are wrong where a call is right, and right refusals in the irrelevance categories."
    report.tell_unreadable(unreadable, len(rows) - skipped, effect)
    if skipped:
        long = sum(row.get("skipped") == bfcl_multi_turn.TOO_LONG for row in rows)
        what = f"{skipped} of {len(rows)} prompts were too long ({long}; see --max_prompt_tokens) or refused"
        print(f"{what}; they count as answered without a call, and a dialogue as wrong.")
    if args.official_dir:
        names = ",".join(bfcl_data.file_category(name, version) for name in categories)
        print(
            f"{files} files for BFCL {version}'s own command, which scores them with:\n"
            f"BFCL_PROJECT_ROOT={quote(str(args.official_dir.resolve()))} bfcl evaluate "
            f"--model {quote(args.model_name)} --test-category {names}{' --partial-eval' if partial else ''}"
        )


def generate(args: argparse.Namespace) -> None:
    """The command `generate`: appends to predictions.jsonl; cases already there are not asked again."""
    chosen, version, cases = bfcl_data.select_categories(args.categories), "v4", []
    if chosen.difference(MULTI_TURN):
        place, version = bfcl_data.find_data(args.data)
        cases += bfcl_data.prompt_cases(bfcl_data.choose_problems(place, args.categories, args.limit))
    if dialogues := [name for name in MULTI_TURN if name in chosen]:
        if version != "v4":
            raise ReportError(f"--categories: {args.data} is BFCL v3, dialogues are v4's; ask for them apart")
        cases += load_scenarios(dialogues, args.limit)
    predict.generate(args, cases, f"BFCL {version}")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    which = {"nargs": "+", "default": ["single_turn"], "help": "categories or groups; commas allowed"}
    folder = {"type": Path, "help": "also write result files for `bfcl evaluate`"}
    name = {"default": OFFICIAL_MODEL, "help": "name there (%(default)s)"}
    script = report.Script(
        name="eval_bfcl", data=f"folder or checkout with BFCL_v4_*.json, or {HUB_ID}; not for multi_turn",
        data_needed=False, max_prompt_tokens=32768, generate=generate,
        generate_options={"--categories": which}, score=score, right="valid",
        score_options={"--official_dir --official-dir": folder, "--model_name --model-name": name},
        group=lambda verdict: bfcl_data.KNOWN[bfcl_data.category_of(verdict["id"])],
    )
    return report.run(script, arguments)


if __name__ == "__main__":
    sys.exit(main())
