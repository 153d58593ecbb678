"""BFCL single-turn in two steps: `generate` asks a model, `score` judges its answers without a GPU.

    python eval_bfcl.py generate --model M --data DIR --out DIR
    python eval_bfcl.py score --predictions FILE.jsonl --data DIR --out DIR

The verdicts come from bfcl_check.py and are those of the official checker. `score` imports no torch.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path

from bfcl_check import LANGUAGES, TYPES, BfclError, Problem, check
from prompts import PromptError, load_template

SIMPLE = ("simple_python", *LANGUAGES)
NON_LIVE_AST = (*SIMPLE, "multiple", "parallel", "parallel_multiple")
NON_LIVE = (*NON_LIVE_AST, "irrelevance")
LIVE_AST = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
LIVE = (*LIVE_AST, "live_irrelevance", "live_relevance")
CATEGORIES = (*NON_LIVE, *LIVE)  # named as in v4
V3_NAMES = {"simple": "simple_python", "java": "simple_java", "javascript": "simple_javascript"}
GROUPS = {
    "single_turn": CATEGORIES,
    "all": CATEGORIES,
    "non_live": NON_LIVE,
    "live": LIVE,
    "python": tuple(name for name in CATEGORIES if name not in LANGUAGES),
    "non_python": tuple(LANGUAGES),
}
SUITE = "berkeley-function-call-leaderboard"
DATA_FOLDERS = (".", "bfcl_eval/data", "data", f"{SUITE}/bfcl_eval/data", f"{SUITE}/data")

# ------------------------------------------------------------------------------------------------------- data


def _read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of a text or .gz file, blank lines left out."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or f"damaged or half-written gzip file ({error})"
        raise BfclError(f"{path}: cannot be read: {reason}") from None


def find_data(folder: str | Path) -> tuple[Path, str]:
    """(folder with the question files, "v3" or "v4") in `folder`, or in a checkout or package of BFCL there."""
    if not Path(folder).is_dir():
        raise BfclError(f"{folder}: no such folder; --data must be a folder that holds BFCL_v4_*.json")
    for place in (Path(folder) / inner for inner in DATA_FOLDERS):
        for version in ("v4", "v3"):
            if any(place.glob(f"BFCL_{version}_*.json*")):
                return place, version
    raise BfclError(f"{folder}: holds no BFCL_v4_*.json or BFCL_v3_*.json; point --data at the folder that does")


def _load_records(stem: Path) -> list[tuple[str, dict]]:
    """(file and line, record) for all records of stem.json or stem.json.gz; [] where neither exists."""
    path = next((path for suffix in ("json", "json.gz") if (path := Path(f"{stem}.{suffix}")).exists()), None)
    records = []
    for number, line in _read_lines(path) if path else ():
        try:
            records.append((f"{path}:{number}", {**json.loads(line)}))
        except (ValueError, TypeError):
            raise BfclError(f"{path}:{number}: not a JSON object; fetch this file again") from None
    return records


def _load_category(folder: Path, version: str, file_name: str) -> Iterator[Problem]:
    questions = _load_records(folder / f"BFCL_{version}_{file_name}")
    answers = _load_records(folder / "possible_answer" / f"BFCL_{version}_{file_name}")
    if "relevance" in file_name:
        answers = [(place, {**question, "ground_truth": []}) for place, question in questions]
    if len(answers) != len(questions):
        raise BfclError(f"{folder}: BFCL_{version}_{file_name} has {len(questions)} questions, {len(answers)} answers")
    # By row and not by id: v3 has a repeated id, and an answer under a wrong id.
    for (place, question), (_, answer) in zip(questions, answers):
        try:
            name, functions, wanted = question["id"], question["function"], answer["ground_truth"]
            messages = [message for turn in question["question"] for message in turn]
            if version == "v4" and answer["id"] != name:
                raise BfclError(f"{place}: {name} stands beside the answer to {answer['id']}; fetch both files again")
            for function in functions if wanted else ():
                for details in function["parameters"]["properties"].values():
                    TYPES[details["items"]["type"] if TYPES[details["type"]] is list else details["type"]]
        except (KeyError, TypeError) as error:
            raise BfclError(f"{place}: not a BFCL case: {error} is missing or unknown; fetch the file again") from None
        yield Problem(name, V3_NAMES.get(file_name, file_name), messages, functions, wanted)


def load_problems(folder: str | Path) -> dict[str, Problem]:
    """All single-turn cases in `folder` (see find_data) by id, in the order of CATEGORIES. Raises BfclError.

    The second case under one id (v3 has one) goes by that id with "#2" behind it.
    """
    place, version = find_data(folder)
    old_names = {new: old for old, new in V3_NAMES.items()} if version == "v3" else {}
    problems: dict[str, Problem] = {}
    for category in CATEGORIES:
        for problem in _load_category(place, version, old_names.get(category, category)):
            unique = f"{problem.id}#2" if problem.id in problems else problem.id
            problems[unique] = replace(problem, id=unique)
    return problems


# ----------------------------------------------------------------------------------------------------- scores


def _mean(*values: float | None) -> float | None:
    return None if None in values else sum(values) / len(values)


def _accuracies(table: dict[str, dict], names: Iterable[str]) -> list[float | None]:
    return [table[name]["accuracy"] if name in table else None for name in names]


def _non_live(table: dict[str, dict]) -> list[float | None]:
    """The four non-live figures; the three languages of "simple" weigh the same, whatever their number of cases."""
    return [_mean(*_accuracies(table, SIMPLE)), *_accuracies(table, NON_LIVE_AST[len(SIMPLE) :])]


def _pooled(table: dict[str, dict], names: Iterable[str]) -> float | None:
    """Accuracy over all cases of the named categories together."""
    if any(name not in table for name in names):
        return None
    n = sum(table[name]["n"] for name in names)
    return sum(table[name]["accuracy"] * table[name]["n"] for name in names) / max(n, 1)


def aggregates(categories: dict[str, dict], sizes: dict[str, int]) -> list[dict]:
    """Rows {"group", "name", "accuracy" (percent; None = n/a), "n"} from {category: {"accuracy": percent, "n": n}}.

    The columns of BFCL v3, of BFCL v4, and of the paper (arXiv 2505.00024, Table 2). sizes: full number of cases per
    category, because the official Overall columns count what did not run as wrong.
    """
    ran = categories
    filled = {name: ran.get(name, {"accuracy": 0.0, "n": sizes[name]}) for name in CATEGORIES}
    both = ("irrelevance", "live_irrelevance")
    non_live, live_ast, live = _mean(*_non_live(ran)), _pooled(ran, LIVE_AST), _pooled(ran, LIVE)
    v3_non_live, v3_live = _mean(*_non_live(filled), filled["irrelevance"]["accuracy"]), _pooled(filled, LIVE)
    v4_non_live, v4_live = _mean(*_non_live(filled)), _pooled(filled, LIVE_AST)
    # Multi-turn (v3: a third, v4: 30 %) and agentic (v4: 40 %) are not run here and count 0.
    v3_overall = (v3_non_live + v3_live + 0.0) / 3
    v4_overall = 0.1 * v4_non_live + 0.1 * v4_live + 0.1 * _mean(*_accuracies(filled, both))
    rows = [
        ("v3 official", "Non-live AST summary", non_live, NON_LIVE_AST),
        ("v3 official", "Non-live overall", v3_non_live, NON_LIVE),
        ("v3 official", "Live overall", v3_live, LIVE),
        ("v3 official", "Overall (multi-turn = 0)", v3_overall, CATEGORIES),
        ("v4 official", "Non-live overall", v4_non_live, NON_LIVE_AST),
        ("v4 official", "Live overall", v4_live, LIVE_AST),
        ("v4 official", "Irrelevance", _mean(*_accuracies(ran, both)), both),
        ("v4 official", "Overall (multi-turn, agentic = 0)", v4_overall, (*NON_LIVE, *LIVE_AST, "live_irrelevance")),
        ("paper", "Non-live", non_live, NON_LIVE_AST),
        ("paper", "Live (4 AST categories)", live_ast, LIVE_AST),
        ("paper", "Live (6 categories)", live, LIVE),
        ("paper", "Overall (Live of 4)", _mean(non_live, live_ast), (*NON_LIVE_AST, *LIVE_AST)),
        ("paper", "Overall (Live of 6)", _mean(non_live, live), (*NON_LIVE_AST, *LIVE)),
    ]
    counts = [sum(ran[part]["n"] for part in parts if part in ran) for *_, parts in rows]
    return [
        {"group": group, "name": name, "accuracy": accuracy if n else None, "n": n}
        for (group, name, accuracy, _), n in zip(rows, counts)
    ]


def score_predictions(rows: Iterable[dict], data_dir: str | Path) -> tuple[list[dict], dict]:
    """Judges rows {"id", "output"}; several may share an id. Returns (verdicts, scores), raises BfclError.

    verdicts: {"id", "valid", "error_type"} per row, in order. scores: "categories" ({"accuracy" in percent, "correct",
    "n", "errors"} for each that ran) and "aggregates" (see there).
    """
    problems, verdicts = load_problems(data_dir), []
    tallies: dict[str, Counter] = {}
    for number, row in enumerate(rows, 1):
        place = row.get("place", f"prediction {number}")
        if not isinstance(row.get("id"), str) or not isinstance(row.get("output"), str):
            raise BfclError(f'{place}: needs "id" and "output", both strings; write one such object per line')
        if row["id"] not in problems:
            raise BfclError(f"{place}: {data_dir} has no case {row['id']!r}; check that --data has the right version")
        problem = problems[row["id"]]
        valid, error_type = check(problem, row["output"])
        verdicts.append({"id": row["id"], "valid": valid, "error_type": error_type})
        tallies.setdefault(problem.category, Counter())[error_type] += 1
    if not verdicts:
        raise BfclError("there are no predictions to score; run `generate` first")
    categories = {}
    for name in (name for name in CATEGORIES if name in tallies):
        n, correct = tallies[name].total(), tallies[name].pop(None, 0)
        categories[name] = {"accuracy": 100 * correct / n, "correct": correct, "n": n, "errors": dict(tallies[name])}
    sizes = Counter(problem.category for problem in problems.values())
    return verdicts, {"categories": categories, "aggregates": aggregates(categories, sizes)}


# --------------------------------------------------------------------------------------------------- commands


def read_predictions(path: Path) -> list[dict]:
    """Rows of a predictions file, each with its "place" for messages. A half-written last line is left out."""
    lines, rows = list(_read_lines(path)), []
    for number, line in lines:
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number != lines[-1][0]:
                raise BfclError(f"{place}: not JSON, so the file is damaged; repair or delete this line") from None
            print(f"eval_bfcl: warning: {place}: half-written last line left out", file=sys.stderr)
            continue
        if not isinstance(row, dict):
            raise BfclError(f'{place}: needs to be an object with "id" and "output"')
        rows.append({**row, "place": place})
    if not rows:
        raise BfclError(f"{path}: holds no predictions; run `generate` first")
    return rows


def _table(scores: dict) -> list[tuple]:
    """(group, name, accuracy or None, correct or "", n): categories that ran or not, then the aggregates."""
    empty = {"accuracy": None, "correct": "", "n": 0}
    listed = [("category", name, scores["categories"].get(name, empty)) for name in CATEGORIES]
    listed += [(row["group"], row["name"], {"correct": "", **row}) for row in scores["aggregates"]]
    return [(group, name, row["accuracy"], row["correct"], row["n"]) for group, name, row in listed]


def write_scores(verdicts: list[dict], scores: dict, out: Path) -> None:
    """Writes verdicts.jsonl, scores.json and scores.csv into `out`, and prints the table."""
    lines = "".join(json.dumps(verdict) + "\n" for verdict in verdicts)
    (out / "verdicts.jsonl").write_text(lines, encoding="utf-8")
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    with open(out / "scores.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("group", "name", "accuracy", "correct", "n"))
        for group, name, accuracy, correct, n in _table(scores):
            writer.writerow((group, name, "n/a" if accuracy is None else f"{accuracy:.4f}", correct, n))
    for group, name, accuracy, _, n in _table(scores):
        print(f"{group:12} {name:34} {'n/a' if accuracy is None else f'{accuracy:.2f}':>7}  n={n}")


def select_categories(names: list[str]) -> set[str]:
    """Category names of v3 or v4 and names of GROUPS, each possibly several with commas -> v4 names."""
    chosen: set[str] = set()
    for name in (part for text in names for part in text.split(",") if part):
        name = V3_NAMES.get(name, name)
        if name not in GROUPS and name not in CATEGORIES:
            raise BfclError(f"--categories: unknown {name!r}; choose from {', '.join((*GROUPS, *CATEGORIES))}")
        chosen.update(GROUPS.get(name, (name,)))
    return chosen


def _append(text: str, sentence: str) -> str:
    return f"{text.rstrip(' .')}. {sentence}" if text.strip() else sentence


def prompt_tools(functions: list[dict], language: str) -> list[dict]:
    """The documentation as the model sees it: with the language of the values, and for Java and JavaScript with every
    parameter as a string that spells the value. The checker uses the documentation without these hints."""
    label = {"python": "Python 3", "java": "Java 8 SDK", "javascript": "JavaScript"}[language]
    tools = json.loads(json.dumps(functions))
    for tool in tools:
        tool["description"] = _append(tool.get("description", ""), f"Argument values follow {label} syntax.")
        for details in tool["parameters"]["properties"].values() if language != "python" else ():
            declared = details["type"]
            kind = "object of any type" if declared == "any" else f"value of type {declared}"
            hint = f"Give this as a string that spells a {label} {kind}."
            if TYPES[declared] is list:
                hint += f" Its elements are of type {details.pop('items')['type']}, not each spelled as a string."
            if declared == "dict" and "properties" in details:
                hint += f" Its entries, as a JSON schema: {json.dumps(details.pop('properties'))}"
            details.update(type="string", description=_append(details.get("description", ""), hint))
    return tools


def generate(args: argparse.Namespace, out: Path) -> None:
    """Asks the model every chosen case and appends to predictions.jsonl; cases already there are not asked again."""
    chosen, problems = select_categories(args.categories), []
    for _, listed in groupby(load_problems(args.data).values(), key=lambda problem: problem.category):
        problems += [problem for problem in islice(listed, args.limit) if problem.category in chosen]
    if not problems:
        raise BfclError(f"{args.data}: holds no case of {', '.join(args.categories)}; choose others or raise --limit")
    import rollout  # here, so that `score` starts without torch

    cases = []
    for problem in problems:
        tools = prompt_tools(problem.functions, LANGUAGES.get(problem.category, "python"))
        cases.append(rollout.Case(id=problem.id, category=problem.category, messages=problem.messages, tools=tools))
    try:
        rollout.write_predictions(
            args.model, cases, out / "predictions.jsonl", template=load_template(args.prompt_template),
            max_prompt_tokens=args.max_prompt_tokens, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size,
        )  # fmt: skip
    except rollout.ModelError as error:
        raise BfclError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"needs a whole number above 0, not {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="BFCL single-turn: ask a model, then judge its answers.")
    commands = parser.add_subparsers(dest="command", required=True)
    ask = commands.add_parser("generate", help="model -> OUT/predictions.jsonl; resumes")
    ask.add_argument("--model", required=True, help="folder or name of a model")
    ask.add_argument("--categories", nargs="+", default=["single_turn"], help="categories or groups; commas allowed")
    ask.add_argument("--limit", type=_positive, help="first N cases of each category")
    ask.add_argument("--max_prompt_tokens", type=_positive, default=16384)
    ask.add_argument("--max_new_tokens", type=_positive, default=1024)
    ask.add_argument("--batch_size", type=_positive, default=32)
    ask.add_argument("--prompt_template", default="", help="file with a {tools} slot instead of the project's prompt")
    judge = commands.add_parser("score", help="predictions -> OUT/verdicts.jsonl, scores.json, scores.csv")
    judge.add_argument("--predictions", required=True, type=Path, help=".jsonl or .jsonl.gz")
    for command in (ask, judge):
        command.add_argument("--data", required=True, help="folder with BFCL_v4_*.json, or a checkout that has it")
        command.add_argument("--out", required=True, type=Path)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 after an error that is told in one sentence."""
    args = _parser().parse_args(arguments)
    try:
        if args.command == "score":
            verdicts, scores = score_predictions(read_predictions(args.predictions), args.data)
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BfclError(f"--out: cannot make the folder {args.out}: {error.strerror}") from None
        if args.command == "score":
            write_scores(verdicts, scores, args.out)
        else:
            generate(args, args.out)
    except (BfclError, PromptError) as error:
        print(f"eval_bfcl: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
