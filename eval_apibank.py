"""API-Bank, call mode: generate -> predictions.jsonl (needs a model), then score (needs neither GPU nor
torch).

    python eval_apibank.py generate --model M --data DATA --out DIR
    python eval_apibank.py score --predictions DIR/predictions.jsonl --data DATA --out DIR
    python eval_apibank.py --diff DIR_A DIR_B

A case is one gold call and the dialogue before it; DATA is one of three things, see apibank_data.load_cases.
The official scorer runs the predicted call on a toy database; apibank_check says the same without running it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from evals.apibank_check import MODES, WHY, judge, read_call
from evals.apibank_data import JSON_TYPES, LEVELS, SEARCHER, EvalError, GoldCall, found_tools, load_cases
from evals.report import (
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
from prompts import PromptError, ToolCall, load_template

PAPER = {
    "Tool-N1-14B": 82.19,
    "Tool-N1-7B": 81.28,
    "GPT-4o": 77.16,
    "GPT-4o-mini": 73.10,
    "Llama-3.1-8B": 60.41,
}
MAX_BRACKETS = 500
PAPER_NOTE = (
    "The paper (arXiv 2505.00024) does not state its denominator: compare with its figures in outline only."
)
SCENARIO_NOTE = (
    "Scenarios: of level 3, right when all their calls are. Each call is asked for after the gold calls before it, and "
    "the searches, which the official 50 scenarios count too, are left out: not the official sample accuracy."
)

# What the official prompts say beside the dialogue. Without the year 45 of the 508 gold dates could not be
# known.
YEAR = "The current year is 2023."
ONE_CALL = "Answer with the one API call that the assistant makes next."


# --------------------------------------------------------------------------------------------------- generate


def tool_schema(api: dict) -> dict:
    """An API description as {"name", "description", "parameters"} with a JSON schema."""
    inputs = api["input_parameters"].items()
    properties = {
        key: {**JSON_TYPES[value["type"]], "description": value["description"]} for key, value in inputs
    }
    parameters = {"type": "object", "properties": properties, "required": api["required"]}
    return {"name": api["name"], "description": api["description"], "parameters": parameters}


def offered(case: GoldCall) -> list[str]:
    """Names of the APIs that the model is shown.

    Level 2 is about finding them: only the search and what it has found so far, as officially. Level 1: those
    of the dialogue by the alphabet, because the order of the data, that of the calls, would give the answer
    away.
    """
    if case.level == 2:
        searches = [turn["result"] for turn in case.history if turn.get("api_name") == SEARCHER]
        found = [SEARCHER, *(name for result in searches for name in found_tools(result))]
        return [name for name in dict.fromkeys(found) if name in case.apis]
    return sorted(case.shown) if case.level == 1 else case.shown


def to_messages(case: GoldCall) -> list[dict]:
    """The dialogue before the gold call as messages of prompts.build_messages.

    Nothing is merged or dropped. Two of three dialogues end with the assistant's announcement of the call; it
    stays a message of its own, as in the official evaluator, and the reply is the assistant's next message.
    """
    messages = [{"role": "system", "content": ONE_CALL if case.level == 3 else f"{YEAR} {ONE_CALL}"}]
    for turn in case.history:
        if turn["role"] == "API":
            # `input` has JSON types, where `param_dict` has strings only; it is null for an API without
            # parameters.
            past, error = (
                ToolCall(turn["api_name"], turn["result"]["input"] or {}),
                turn["result"]["exception"],
            )
            answer = json.dumps(
                {"exception": error} if error else turn["result"]["output"], ensure_ascii=False
            )
            messages += [
                {"role": "assistant", "content": "", "calls": [past]},
                {"role": "tool", "content": answer},
            ]
        else:
            messages.append(
                {"role": {"User": "user", "AI": "assistant"}[turn["role"]], "content": turn["text"]}
            )
    return messages


def prompt_cases(cases: Iterable[GoldCall]) -> list:
    """Cases as rollout.Case records, to be answered by a model. Imports torch."""
    from evals.predict import Case

    return [
        Case(
            case.id,
            f"level-{case.level}",
            to_messages(case),
            [tool_schema(case.apis[name]) for name in offered(case)],
        )
        for case in cases
    ]


def choose_cases(cases: Iterable[GoldCall], levels: str, limit: int | None) -> list[GoldCall]:
    """The first `limit` cases of each of the comma-separated levels ("" for all there are). Raises
    EvalError.
    """
    cases, chosen = list(cases), []
    there = [level for level in LEVELS if any(str(case.level) == level for case in cases)]
    for level in sorted(set(levels.replace(" ", "").split(","))) if levels else there:
        if level not in LEVELS:
            raise EvalError(f"--levels: unknown level {level!r}; choose among {','.join(LEVELS)}")
        if level not in there:
            raise EvalError(f"--levels: the data holds no level {level}; choose among {','.join(there)}")
        chosen += [case for case in cases if str(case.level) == level][:limit]
    if not all(case.history for case in chosen):
        raise EvalError(
            "--data: the dialogues of level 3 are not there; add ToolRL's file or choose --levels 1,2"
        )
    return chosen


def generate(args: argparse.Namespace) -> None:
    """Appends replies to OUT/predictions.jsonl; those that it holds already are not made again. Raises
    EvalError.
    """
    template = load_template(args.prompt_template)
    chosen = choose_cases(load_cases(args.data).values(), args.levels, args.limit)
    make_folder(args.out)
    from evals.predict import write_predictions
    from model import ModelError

    try:
        write_predictions(
            args.model, prompt_cases(chosen), args.out / "predictions.jsonl", template=template,
            max_prompt_tokens=args.max_prompt_tokens, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size,
            temperature=args.temperature, samples=args.samples, seed=args.seed,
        )
    except ModelError as error:
        raise EvalError(str(error)) from None


# ------------------------------------------------------------------------------------------------------ score


def score_predictions(rows: list[dict], place: str | Path) -> tuple[list[dict], dict[str, dict]]:
    """Judges rows {"id", "output"}, of which several may share an id, against the data at `place`; see
    judge_rows.
    """
    return judge_rows(rows, load_cases(place))


def judge_rows(rows: list[dict], cases: dict[str, GoldCall]) -> tuple[list[dict], dict[str, dict]]:
    """(verdicts, scores) of rows {"id", "output"}; several may share an id (samples).

    verdicts: per row, in order: id, level, correct and reason (official mode), true or false per other mode,
    and the row's sample if it has one. scores: for level-1 to level-3, all and the scenarios of level 3: "of"
    (how many the data holds) and per mode what eval_report.tally says. Raises EvalError, with the row's
    "place", for an id or a level that is not in the data.
    """
    verdicts = []
    for number, row in enumerate(rows, 1):
        place, case = row.get("place", f"row {number}"), cases.get(row["id"])
        if case is None:
            raise EvalError(f"{place}: unknown id {row['id'][:80]!r}; pass the --data it was made from")
        level = str(row.get("level", row.get("category", case.level))).removeprefix("level-")
        if level != str(case.level):
            raise EvalError(
                f"{place}: unknown level {level[:20]!r}, because {case.id} is of level {case.level}"
            )
        reasons = judge(case, row["output"])
        right = {mode: reason == "correct" for mode, reason in reasons.items()}
        verdict = {
            "id": case.id,
            "level": case.level,
            "correct": right.pop("official"),
            "reason": reasons["official"],
        }
        verdicts.append({**verdict, **right, **({"sample": row["sample"]} if "sample" in row else {})})
    scores = {}
    for level in (*LEVELS, "all"):
        own = [v for v in verdicts if level in (str(v["level"]), "all")]
        of = sum(level in (str(case.level), "all") for case in cases.values())
        by_mode = {mode: tally((v["id"], v[_key(mode)]) for v in own) for mode in MODES}
        scores["all" if level == "all" else f"level-{level}"] = {"of": of, **by_mode}
    by_mode = {mode: tally(whole_scenarios(verdicts, cases, mode)) for mode in MODES}
    scores["level-3 scenarios"] = {"of": len({case.scenario for case in cases.values()} - {""}), **by_mode}
    return verdicts, scores


def _key(mode: str) -> str:
    return "correct" if mode == "official" else mode


def whole_scenarios(verdicts: list[dict], cases: dict[str, GoldCall], mode: str) -> list[tuple[str, bool]]:
    """(scenario, are all its calls right?), once per sample; without scenarios that have a call without a
    verdict.
    """
    right: dict[str, list[bool]] = {}
    for verdict in sorted(
        verdicts, key=lambda verdict: verdict.get("sample", 0)
    ):  # a resumed file is out of order
        right.setdefault(verdict["id"], []).append(verdict[_key(mode)])
    members: dict[str, list[list[bool]]] = {}
    for case in cases.values():
        if case.scenario:
            members.setdefault(case.scenario, []).append(right.get(case.id, []))
    return [(name, all(sample)) for name, calls in members.items() for sample in zip(*calls)]


def report_rows(rows: list[dict], verdicts: list[dict], cases: dict[str, GoldCall]) -> list[dict]:
    """One row per verdict for eval_report.write_cases: what was expected, what came, and why it is wrong."""
    listed = []
    for row, verdict in zip(rows, verdicts):
        case, text = cases[verdict["id"]], row["output"].encode("utf-8", "backslashreplace").decode()
        # JSON nested too deeply, or with half a character, could not be written again: it is shown as text.
        odd = text.count("[") + text.count("{") > MAX_BRACKETS or "\\ud" in text.lower()
        call = None if odd else read_call(text)[0]
        name, _, argument = verdict["reason"].partition(":")
        why = WHY.get(name, "") + (f": {argument}" if argument else "")
        why += f" ({case.rejected})" if name == "official_rejects_gold" else ""
        came = shorten(text) if call is None else {"name": call.name, "arguments": call.arguments}
        expected = {"name": case.gold.name, "arguments": case.gold.arguments}
        listed.append({
            **{key: value for key, value in verdict.items() if key != "level"},
            "category": f"level-{case.level}", "expected": expected, "came": came, "why": why,
        })
    return listed


def score(args: argparse.Namespace) -> None:
    """Writes verdicts.jsonl, scores.json, scores.csv, cases.jsonl and failures.txt to OUT; prints. Raises
    EvalError.
    """
    rows, cases = read_predictions(args.predictions), load_cases(args.data)
    verdicts, scores = judge_rows(rows, cases)
    make_folder(args.out)
    write_rows(args.out / "verdicts.jsonl", verdicts)
    write_cases(report_rows(rows, verdicts, cases), args.out, right="correct", reason="reason")
    groups = [name for name, line in scores.items() if line["official"]["n"]]
    table = [{"group": name, "name": mode, **scores[name][mode]} for name in groups for mode in MODES]
    table += [
        {"group": "paper", "name": name, "accuracy": figure, "n": "not stated"}
        for name, figure in PAPER.items()
    ]
    write_table(table, args.out, {"scores": scores, "paper": PAPER, "notes": [PAPER_NOTE, SCENARIO_NOTE]})
    lines = []
    for name in groups:
        first = scores[name]["official"]
        counts = (first["n"], f"{first['cases']}/{scores[name]['of']}")
        lines.append((name, *counts, *(scores[name][mode]["accuracy"] for mode in MODES)))
    print(f"\n{text_table(('', 'n', 'cases', *(f'{mode} %' for mode in MODES)), lines)}\n{PAPER_NOTE}")
    if "level-3 scenarios" in groups:
        print(SCENARIO_NOTE)
    if skipped := sum("skipped" in row for row in rows):
        print(f"{skipped} of {len(rows)} rows are empty and so count as wrong: their prompts were too long.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="API-Bank calls: ask a model, judge its answers, compare two models."
    )
    parser.add_argument(
        "--diff", nargs=2, metavar=("A", "B"), help="compare the --out folders of two `score` runs"
    )
    parser.add_argument("--show", type=int, default=20, help="with --diff: how many ids to list (default 20)")
    commands = parser.add_subparsers(dest="command")
    ask = commands.add_parser("generate", help="model -> OUT/predictions.jsonl; resumes")
    ask.add_argument("--model", required=True, help="folder or name of a model")
    ask.add_argument("--levels", default="", help="such as 1,2; default: all that the data holds")
    ask.add_argument("--limit", type=positive, help="first N cases of each level")
    ask.add_argument("--temperature", type=temperature, default=0.0, help="0, the default, is greedy")
    ask.add_argument(
        "--samples", type=positive, default=1, help="replies per case; needs a temperature above 0"
    )
    ask.add_argument("--seed", type=int, default=0, help="of the samples")
    ask.add_argument(
        "--max_prompt_tokens", type=positive, default=8192, help="longer prompts get an empty reply"
    )
    ask.add_argument("--max_new_tokens", type=positive, default=1024)
    ask.add_argument("--batch_size", type=positive, default=32)
    ask.add_argument(
        "--prompt_template", default="", help="file with a {tools} slot instead of the project's prompt"
    )
    scoring = commands.add_parser("score", help="predictions -> OUT/verdicts.jsonl, cases, tables")
    scoring.add_argument("--predictions", required=True, type=Path, help=".jsonl or .jsonl.gz")
    for command in (ask, scoring):
        command.add_argument(
            "--data", required=True, type=Path, help="official api-bank, folder of cases or hub file"
        )
        command.add_argument("--out", required=True, type=Path)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 2, with one sentence on stderr, for what the user must put
    right.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if bool(args.diff) == bool(args.command):
        parser.error("choose one of generate, score and --diff A B")
    try:
        if args.diff:
            print_diff(*args.diff, args.show, right="correct", group=lambda row: f"level-{row.get('level')}")
        else:
            {"generate": generate, "score": score}[args.command](args)
    except (EvalError, PromptError) as error:
        print(f"eval_apibank: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
