"""BFCL single-turn in two steps: `generate` asks a model, `score` judges its answers without a GPU.

    python eval_bfcl.py generate --model M --data DIR --out DIR
    python eval_bfcl.py score --predictions FILE.jsonl --data DIR --out DIR
    python eval_bfcl.py --diff OUT_A OUT_B

The verdicts come from bfcl_check.py and are those of the official checker. `score` imports no torch.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from evals.bfcl_check import BfclError, Problem, check, decode, find_fault, reply_kind
from evals.bfcl_data import (
    CATEGORIES,
    HUB_ID,
    LIVE,
    LIVE_AST,
    NON_LIVE_AST,
    SIMPLE,
    V3_NAMES,
    category_of,
    choose_problems,
    file_category,
    find_data,
    load_problems,
    prompt_cases,
    write_official,
)
from evals.report import (
    ReportError,
    combined_interval,
    make_folder,
    positive,
    print_diff,
    read_predictions,
    shorten,
    tally,
    temperature,
    text_table,
    write_cases,
    write_rows,
    write_table,
)
from prompts import PromptError, load_template

__all__ = ["BfclError", "Problem", "check", "prompt_cases"]  # training evaluates with these

AST = (*NON_LIVE_AST, *LIVE_AST)
REFUSALS = ("irrelevance", "live_irrelevance")  # categories in which no function fits
REPLY_KINDS = {
    "empty_list": "explicit []", "no_block": "no tool-call section", "unparsable": "unparsable", "called": "called",
}
MAX_BRACKETS = 300  # of a reply whose calls are written again as JSON; Python refuses about 1,000 levels
OFFICIAL_MODEL = (
    "Salesforce/xLAM-2-3b-fc-r"  # a model that the official command knows, and reads a JSON list from
)

PAPER_SOURCE = (
    "quoted from arXiv 2505.00024, Table 2 (data of BFCL v3). Live of 6: the row fits a count over all 2,251 live cases; "
    "of 4: over the 1,351 of the four AST categories; -: neither. 82.57 is not the mean of its row, which is 83.07."
)
PAPER_COLUMNS = (
    "model", "simple", "mult.", "par.", "par.mult.", "L simple", "L mult.", "L par.", "L par.mult.", "Non-live", "Live",
    "Overall", "Live of",
)
PAPER = (
    ("GPT-4o", 79.42, 95.50, 94.00, 83.50, 84.88, 79.77, 87.50, 75.00, 88.10, 79.83, 83.97, "6"),
    ("GPT-4o-mini", 80.08, 90.50, 89.50, 87.00, 81.40, 76.73, 93.75, 79.17, 86.77, 76.50, 81.64, "6"),
    ("Qwen2.5-7B-Inst", 75.33, 94.50, 91.50, 84.50, 76.74, 74.93, 62.50, 70.83, 86.46, 67.44, 76.95, "6"),
    ("xLAM-2-70b-fc-r", 78.25, 94.50, 92.00, 89.00, 77.13, 71.13, 68.75, 58.33, 88.44, 72.95, 80.70, "6"),
    ("ToolACE-8B", 76.67, 93.50, 90.50, 89.50, 73.26, 76.73, 81.25, 70.83, 87.54, 78.59, 82.57, "6"),
    ("Hammer2.1-7B", 78.08, 95.00, 93.50, 88.00, 76.74, 77.40, 81.25, 70.83, 88.65, 75.11, 81.88, "-"),
    ("Tool-N1-7B", 77.00, 95.00, 94.50, 90.50, 82.17, 80.44, 62.50, 70.83, 89.25, 80.38, 84.82, "4"),
    ("Tool-N1-14B", 80.58, 96.00, 93.50, 92.00, 84.10, 81.10, 81.25, 66.67, 90.52, 81.42, 85.97, "4"),
)

# ----------------------------------------------------------------------------------------------------- scores


def _equal(*names: str) -> dict[str, float]:
    return {name: 1 / len(names) for name in names}


def _scaled(factor: float, weights: dict[str, float]) -> dict[str, float]:
    return {name: factor * weight for name, weight in weights.items()}


def _by_size(table: dict[str, dict], names: Iterable[str]) -> dict[str, float]:
    """Every case weighs the same: the accuracy over all cases together."""
    sizes = {name: table[name]["n"] for name in names if name in table}
    return {name: sizes.get(name, 0) / max(sum(sizes.values()), 1) for name in names}


def aggregates(categories: dict[str, dict], sizes: dict[str, int]) -> list[dict]:
    """Rows {"group", "name", "accuracy", "low", "high" (percent; None = n/a), "n"} from the tally of every
    category.

    The columns of BFCL v3, of BFCL v4, and of the paper (arXiv 2505.00024, Table 2), each a weighted sum of
    categories. sizes: full number of cases per category, because official Overall columns count what did not
    run as wrong.
    """
    empty = {"accuracy": 0.0, "low": 0.0, "high": 0.0}
    filled = {name: categories.get(name, {**empty, "n": sizes[name]}) for name in CATEGORIES}
    # The three languages of "simple" weigh the same, whatever their numbers of cases.
    non_live = _scaled(0.25, _equal(*SIMPLE)) | _scaled(
        0.75, _equal("multiple", "parallel", "parallel_multiple")
    )
    v3_non_live = _scaled(0.8, non_live) | {"irrelevance": 0.2}
    live_ast, live, refusals = _by_size(filled, LIVE_AST), _by_size(filled, LIVE), _equal(*REFUSALS)
    # Multi-turn (v3: a third, v4: 30 %) and agentic (v4: 40 %) are not run here and count 0.
    v3_overall = _scaled(1 / 3, v3_non_live) | _scaled(1 / 3, live)
    v4_overall = _scaled(0.1, non_live) | _scaled(0.1, live_ast) | _scaled(0.1, refusals)
    rows = [
        ("v3 official", "Non-live AST summary", non_live, categories),
        ("v3 official", "Non-live overall", v3_non_live, filled),
        ("v3 official", "Live overall", live, filled),
        ("v3 official", "Overall (multi-turn = 0)", v3_overall, filled),
        ("v4 official", "Non-live overall", non_live, filled),
        ("v4 official", "Live overall", live_ast, filled),
        ("v4 official", "Irrelevance", refusals, categories),
        ("v4 official", "Overall (multi-turn, agentic = 0)", v4_overall, filled),
        ("paper", "Non-live", non_live, categories),
        ("paper", "Live (4 AST categories)", live_ast, categories),
        ("paper", "Live (6 categories)", live, categories),
        ("paper", "Overall (Live of 4)", _scaled(0.5, non_live) | _scaled(0.5, live_ast), categories),
        ("paper", "Overall (Live of 6)", _scaled(0.5, non_live) | _scaled(0.5, live), categories),
    ]
    listed = []
    for group, name, weights, table in rows:
        n = sum(categories[part]["n"] for part in weights if part in categories)
        listed.append({"group": group, "name": name, **_weighted(weights, table if n else {}), "n": n})
    return listed


def _weighted(weights: dict[str, float], table: dict[str, dict]) -> dict:
    """Accuracy, low and high of a weighted sum of categories; None where one of them did not run."""
    if any(name not in table for name in weights):
        return dict.fromkeys(("accuracy", "low", "high"))
    return dict(
        zip(("accuracy", "low", "high"), combined_interval((w, table[name]) for name, w in weights.items()))
    )


def reply_rows(kinds: dict[str, list[tuple[str, str]]]) -> list[dict]:
    """What came where no call is right, the over-calling rate, and how often [] came where a call is right.

    kinds: category -> (case, reply_kind) of every row. Rows as of aggregates(), with "correct" for the count.
    """
    rows = []
    for name in (name for name in REFUSALS if name in kinds):
        for kind, label in REPLY_KINDS.items():
            share = tally((case, found == kind) for case, found in kinds[name])
            rows.append({"group": "replies", "name": f"{name}: {label}", **share})
    for name, parts, kind in (
        ("over-calling: a call, none fits", REFUSALS, "called"),
        ("under-calling: [], a call fits", AST, "empty_list"),
    ):
        pairs = [(case, found == kind) for part in parts for case, found in kinds.get(part, ())]
        rows.append({"group": "replies", "name": name, **tally(pairs)})
    return rows


def paper_rows(categories: dict[str, dict], listed: list[dict]) -> list[tuple]:
    """Our rows of the paper's table, with Live over six and over four categories. listed: aggregates()."""
    figures = [_weighted(_equal(*SIMPLE), categories)["accuracy"]]
    figures += [
        categories[name]["accuracy"] if name in categories else None
        for name in (*NON_LIVE_AST[3:], *LIVE_AST)
    ]
    means = {row["name"]: row["accuracy"] for row in listed if row["group"] == "paper"}
    live = (
        ("Live (6 categories)", "Overall (Live of 6)", "6"),
        ("Live (4 AST categories)", "Overall (Live of 4)", "4"),
    )
    return [
        ("these predictions", *figures, means["Non-live"], means[a], means[b], label) for a, b, label in live
    ]


# ---------------------------------------------------------------------------------------------------- judging


def pair_rows(
    rows: Iterable[dict], problems: dict[str, Problem], data: str | Path
) -> list[tuple[dict, Problem]]:
    """Every row {"id", "output"} beside its case. Raises BfclError for a row that has none.

    v3's repeated id is dealt in turn to its two cases, unless the rows call the second one "#2" as `generate`
    does.
    """
    rows = [row if "place" in row else {**row, "place": f"prediction {i}"} for i, row in enumerate(rows, 1)]
    if not rows:
        raise BfclError("there are no predictions to score; run `generate` first")
    told_apart, seen, pairs = any(str(row.get("id")).endswith("#2") for row in rows), Counter(), []
    present = {problem.category for problem in problems.values()}
    for row in rows:
        place, name = row["place"], row.get("id")
        if not isinstance(name, str) or not isinstance(row.get("output"), str):
            raise BfclError(f'{place}: needs "id" and "output", both strings; write one such object per line')
        if name not in problems:
            category, advice = category_of(name), "no category of BFCL's single-turn part has such an id"
            if category in CATEGORIES:
                missing = f"it has no file of {category}; fetch all of BFCL"
                advice = (
                    "check that --data has the right version, v3 or v4" if category in present else missing
                )
            raise BfclError(f"{place}: {data} has no case {name!r}; {advice}")
        seen[name] += 1
        if f"{name}#2" in problems and not told_apart and seen[name] % 2 == 0:
            name += "#2"
        category = str(row.get("category") or problems[name].category)
        if V3_NAMES.get(category, category) != problems[name].category:
            what = "category" if V3_NAMES.get(category, category) in CATEGORIES else "unknown category"
            raise BfclError(
                f"{place}: {what} {category!r}, but {name} is {problems[name].category}; repair the row"
            )
        pairs.append((row, problems[name]))
    return pairs


def judge(pairs: Iterable[tuple[dict, Problem]], problems: dict[str, Problem]) -> tuple[list[dict], dict]:
    """(cases, scores) of (row, case) pairs; several rows may share a case (samples).

    cases: per row, in order: id, category, valid, error_type, expected, came, why (see write_cases), "sample"
    if given. scores: "categories" (tally, and "errors": how often each type) for those that ran, "aggregates"
    and "replies" (see there), "sizes" (cases per category in the data).
    """
    cases: list[dict] = []
    verdicts: dict[str, list[tuple[str, bool]]] = {}
    kinds: dict[str, list[tuple[str, str]]] = {}
    for row, problem in pairs:
        output, calls = row["output"], decode(row["output"])
        kind, (error_type, why) = reply_kind(output, calls), find_fault(problem, calls) or (None, "")
        verdicts.setdefault(problem.category, []).append((problem.id, error_type is None))
        kinds.setdefault(problem.category, []).append((problem.id, kind))
        # JSON nested too deeply to be written again is shown as text.
        readable = kind in ("called", "empty_list") and output.count("[") + output.count("{") < MAX_BRACKETS
        case = {
            "id": row["id"], "category": problem.category, "valid": error_type is None, "error_type": error_type,
            "expected": "a call" if problem.category == "live_relevance" else problem.answer,
            "came": calls if readable else shorten(output), "why": why,
        }
        cases.append(case | {"sample": row["sample"]} if "sample" in row else case)
    errors = Counter((case["category"], case["error_type"]) for case in cases if not case["valid"])
    categories = {
        name: {
            **tally(verdicts[name]),
            "errors": {key: n for (part, key), n in errors.items() if part == name},
        }
        for name in CATEGORIES
        if name in verdicts
    }
    sizes = Counter(problem.category for problem in problems.values())
    scores = {
        "categories": categories,
        "aggregates": aggregates(categories, sizes),
        "replies": reply_rows(kinds),
    }
    return cases, scores | {"sizes": dict(sizes)}


def score_predictions(rows: Iterable[dict], data_dir: str | Path) -> tuple[list[dict], dict]:
    """Judges rows {"id", "output"}; several may share an id. Returns (verdicts, scores), raises BfclError.

    verdicts: {"id", "valid", "error_type"} per row, in order. scores: see judge.
    """
    problems = load_problems(data_dir)
    cases, scores = judge(pair_rows(rows, problems, data_dir), problems)
    return verdict_rows(cases), scores


def verdict_rows(cases: Iterable[dict]) -> list[dict]:
    return [{key: case[key] for key in ("id", "valid", "error_type")} for case in cases]


# --------------------------------------------------------------------------------------------------- commands


def write_scores(cases: list[dict], scores: dict, out: Path) -> None:
    """Writes verdicts.jsonl, cases.jsonl, failures.txt, scores.json and scores.csv into `out`, and prints the
    tables.
    """
    write_rows(out / "verdicts.jsonl", verdict_rows(cases))
    write_cases(cases, out)
    categories, sizes = scores["categories"], scores["sizes"]
    listed = [{"group": "category", "name": name, **categories.get(name, tally(()))} for name in CATEGORIES]
    ours = paper_rows(categories, scores["aggregates"])
    quoted = [dict(zip(PAPER_COLUMNS, row)) for row in PAPER]
    scores |= {
        "paper": {"source": PAPER_SOURCE, "rows": [dict(zip(PAPER_COLUMNS, row)) for row in ours] + quoted}
    }
    write_table([*listed, *scores["aggregates"], *scores["replies"]], out, scores)
    print(f"\nBeside the paper's ({PAPER_SOURCE})\n{text_table(PAPER_COLUMNS, [*ours, *PAPER])}")
    short = [
        f"{name} {row['cases']} of {sizes[name]}"
        for name, row in categories.items()
        if row["cases"] < sizes[name]
    ]
    if short:
        print(f"Not all cases were asked: {', '.join(short)}.")


def score(args: argparse.Namespace) -> None:
    """The command `score`."""
    gc.disable()  # nothing is garbage before the end, and looking for it takes a fifth of the time
    rows = read_predictions(args.predictions)
    place, version = find_data(args.data)
    problems = load_problems(place)
    pairs = pair_rows(rows, problems, args.data)
    cases, scores = judge(pairs, problems)
    make_folder(args.out)
    write_scores(cases, {"data": version, **scores}, args.out)
    skipped = sum("skipped" in row for row in rows)
    if skipped:
        print(
            f"{skipped} of {len(rows)} prompts were too long to be asked; they count as answered without a call."
        )
    if args.official_dir:
        files = write_official(pairs, version, args.official_dir, args.model_name)
        names = ",".join(file_category(name, version) for name in scores["categories"])
        partial = any(row["cases"] < scores["sizes"][name] for name, row in scores["categories"].items())
        print(
            f"{len(files)} files for BFCL {version}'s own command, which scores them with:\n"
            f"BFCL_PROJECT_ROOT={args.official_dir.resolve()} bfcl evaluate --model {args.model_name} "
            f"--test-category {names}{' --partial-eval' * partial}"
        )


def generate(args: argparse.Namespace) -> None:
    """The command `generate`: appends to predictions.jsonl; cases already there are not asked again."""
    problems, template = (
        choose_problems(args.data, args.categories, args.limit),
        load_template(args.prompt_template),
    )
    make_folder(args.out)
    import rollout  # here, so that `score` starts without torch

    try:
        rollout.write_predictions(
            args.model, prompt_cases(problems), args.out / "predictions.jsonl", template=template,
            max_prompt_tokens=args.max_prompt_tokens, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size,
            temperature=args.temperature, samples=args.samples, seed=args.seed,
        )
    except rollout.ModelError as error:
        raise BfclError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="BFCL single-turn: ask a model, judge its answers, compare two models."
    )
    parser.add_argument(
        "--diff", nargs=2, metavar=("A", "B"), help="compare the --out folders of two `score` runs"
    )
    parser.add_argument("--show", type=int, default=20, help="with --diff: how many ids to list (default 20)")
    commands = parser.add_subparsers(dest="command")
    ask = commands.add_parser("generate", help="model -> OUT/predictions.jsonl; resumes")
    ask.add_argument("--model", required=True, help="folder or name of a model")
    ask.add_argument(
        "--categories", nargs="+", default=["single_turn"], help="categories or groups; commas allowed"
    )
    ask.add_argument("--limit", type=positive, help="first N cases of each category")
    ask.add_argument("--temperature", type=temperature, default=0.0, help="0, the default, is greedy")
    ask.add_argument(
        "--samples", type=positive, default=1, help="replies per case; needs a temperature above 0"
    )
    ask.add_argument("--seed", type=int, default=0, help="of the samples")
    ask.add_argument(
        "--max_prompt_tokens", type=positive, default=16384, help="longer prompts get an empty reply"
    )
    ask.add_argument("--max_new_tokens", type=positive, default=1024)
    ask.add_argument("--batch_size", type=positive, default=32)
    ask.add_argument(
        "--prompt_template", default="", help="file with a {tools} slot instead of the project's prompt"
    )
    scoring = commands.add_parser("score", help="predictions -> OUT/verdicts.jsonl, cases, tables")
    scoring.add_argument("--predictions", required=True, type=Path, help=".jsonl or .jsonl.gz")
    scoring.add_argument(
        "--official-dir", "--official_dir", type=Path, help="also write result files for `bfcl evaluate`"
    )
    scoring.add_argument(
        "--model-name", "--model_name", default=OFFICIAL_MODEL, help="name there (%(default)s)"
    )
    for command in (ask, scoring):
        command.add_argument(
            "--data", required=True, help=f"folder or checkout with BFCL_v4_*.json, or {HUB_ID}"
        )
        command.add_argument("--out", required=True, type=Path)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 after an error that is told in one sentence."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if bool(args.diff) == bool(args.command):
        parser.error("choose one of generate, score and --diff A B")
    try:
        if args.diff:
            print_diff(*args.diff, args.show, group=lambda row: category_of(row["id"]))
        else:
            {"generate": generate, "score": score}[args.command](args)
    except (ReportError, PromptError) as error:
        print(f"eval_bfcl: error: {error}", file=sys.stderr)
        return 2
    finally:
        gc.enable()
    return 0


if __name__ == "__main__":
    sys.exit(main())
