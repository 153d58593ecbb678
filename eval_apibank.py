"""API-Bank, call mode, in two steps: `generate` asks a model, `score` judges its answers without a GPU.

    python eval_apibank.py generate --model M --data DATA --out DIR
    python eval_apibank.py score --predictions DIR/predictions.jsonl --data DATA --out DIR
    python eval_apibank.py --diff DIR_A DIR_B

A case is one gold call and the dialogue before it; for DATA see evals.apibank_data.load_cases. The official
scorer runs the predicted call on a toy database; evals/apibank_check.py says the same without running it.
"""

from __future__ import annotations
import distributed.start  # noqa: F401

import argparse
import sys

from evals import predict, report
from evals.apibank_check import MODES, WHY, judge, read_call
from evals.apibank_data import LEVELS, GoldCall, choose_cases, load_cases, prompt_cases
from evals.report import ReportError, tally

PAPER = {
    "Tool-N1-14B": 82.19, "Tool-N1-7B": 81.28, "GPT-4o": 77.16, "GPT-4o-mini": 73.10, "Llama-3.1-8B": 60.41,
}
MAX_BRACKETS = 500  # of a reply whose call is written again as JSON
UNREADABLE = ("no_tool_call", "bad_json", "bad_call")  # reasons
PAPER_NOTE = (
    "The paper (arXiv 2505.00024) does not state its denominator: compare with its figures in outline only."
)
SCENARIO_NOTE = (
    "Scenarios: of level 3, right when all their calls are. Each call is asked for after the gold calls "
    "before it, and the searches, which the official 50 scenarios count too, are left out: not the official "
    "sample accuracy."
)


def judge_rows(rows: list[dict], cases: dict[str, GoldCall]) -> tuple[list[dict], dict[str, dict]]:
    """(verdicts, scores) of rows {"id", "output"}; several may share an id (samples).

    verdicts: per row, in order: id, level, correct and reason (official mode), true or false per other mode,
    and the row's sample if it has one. scores: for level-1 to level-3, all and the scenarios of level 3: "of"
    (how many the data holds) and per mode what report.tally says. Raises ReportError for an unknown id.
    """
    verdicts = []
    for row in rows:
        case = cases.get(row["id"])
        if case is None:
            what = f"unknown id {row['id'][:80]!r}"
            raise ReportError(f"{row['place']}: {what}; pass the --data that the predictions were made from")
        reasons = judge(case, row["output"])
        verdict = {"id": case.id, "level": case.level}
        verdict |= {"correct": reasons["official"] == "correct", "reason": reasons["official"]}
        verdict |= {mode: reasons[mode] == "correct" for mode in MODES[1:]}
        verdicts.append(verdict | {"sample": row["sample"]} if "sample" in row else verdict)
    scores = {}
    for level in (*LEVELS, "all"):
        own = [verdict for verdict in verdicts if level in (str(verdict["level"]), "all")]
        of = sum(level in (str(case.level), "all") for case in cases.values())
        by_mode = {mode: tally((verdict["id"], verdict[_key(mode)]) for verdict in own) for mode in MODES}
        scores["all" if level == "all" else f"level-{level}"] = {"of": of, **by_mode}
    by_mode = {mode: tally(whole_scenarios(verdicts, cases, mode)) for mode in MODES}
    scores["level-3 scenarios"] = {"of": len({case.scenario for case in cases.values()} - {""}), **by_mode}
    return verdicts, scores


def _key(mode: str) -> str:
    return "correct" if mode == "official" else mode


def whole_scenarios(verdicts: list[dict], cases: dict[str, GoldCall], mode: str) -> list[tuple[str, bool]]:
    """(scenario, are all its calls right?), once per sample. All of its calls need a verdict."""
    right: dict[str, list[bool]] = {}
    for verdict in sorted(verdicts, key=lambda one: one.get("sample", 0)):  # a resumed file is out of order
        right.setdefault(verdict["id"], []).append(verdict[_key(mode)])
    members: dict[str, list[list[bool]]] = {}
    for case in cases.values():
        if case.scenario:
            members.setdefault(case.scenario, []).append(right.get(case.id, []))
    return [(name, all(sample)) for name, calls in members.items() for sample in zip(*calls)]


def report_rows(rows: list[dict], verdicts: list[dict], cases: dict[str, GoldCall]) -> list[dict]:
    """One row per verdict for report.write_cases: what was expected, what came, and why it is wrong."""
    listed = []
    for row, verdict in zip(rows, verdicts):
        case, text = cases[verdict["id"]], row["output"].encode("utf-8", "backslashreplace").decode()
        # JSON nested too deeply, or with half a character, could not be written again: it is shown as text.
        odd = text.count("[") + text.count("{") > MAX_BRACKETS or "\\ud" in text.lower()
        call = None if odd else read_call(text)[0]
        name, _, argument = verdict["reason"].partition(":")
        why = WHY.get(name, "") + (f": {argument}" if argument else "")
        why += f" ({case.rejected})" if name == "official_rejects_gold" else ""
        listed.append({key: value for key, value in verdict.items() if key != "level"} | {
            "category": f"level-{case.level}", "expected": case.gold.as_dict(),
            "came": report.shorten(text) if call is None else call.as_dict(), "why": why,
        })
    return listed


def score(args: argparse.Namespace) -> None:
    """The command `score`: writes verdicts.jsonl, cases and tables to OUT, and prints the tables."""
    rows, cases = report.read_predictions(args.predictions, "API-Bank"), load_cases(args.data)
    verdicts, scores = judge_rows(rows, cases)
    args.out.mkdir(parents=True, exist_ok=True)
    report.write_rows(args.out / "verdicts.jsonl", verdicts)
    report.write_cases(report_rows(rows, verdicts, cases), args.out, right="correct", reason="reason")
    groups = [name for name, line in scores.items() if line["official"]["n"]]
    table = [{"group": name, "name": mode, **scores[name][mode]} for name in groups for mode in MODES]
    for name, figure in PAPER.items():
        table.append({"group": "paper", "name": name, "accuracy": figure, "n": "not stated"})
    notes = [PAPER_NOTE, SCENARIO_NOTE]
    report.write_table(table, args.out, {"scores": scores, "paper": PAPER, "notes": notes})
    lines = []
    for name in groups:
        first = scores[name]["official"]
        counts = (first["n"], f"{first['cases']}/{scores[name]['of']}")
        lines.append((name, *counts, *(scores[name][mode]["accuracy"] for mode in MODES)))
    print(f"\n{report.text_table(('', 'n', 'cases', *(f'{mode} %' for mode in MODES)), lines)}\n{PAPER_NOTE}")
    if "level-3 scenarios" in groups:
        print(SCENARIO_NOTE)
    pairs = [(row, verdict["reason"]) for row, verdict in zip(rows, verdicts) if "skipped" not in row]
    unreadable = [row["output"] for row, reason in pairs if reason in UNREADABLE]
    report.tell_unreadable(unreadable, len(pairs), "They count as wrong.")
    if skipped := sum("skipped" in row for row in rows):
        why = "their prompts were too long or refused"
        print(f"{skipped} of {len(rows)} rows are empty and so count as wrong: {why}.")


def generate(args: argparse.Namespace) -> None:
    """The command `generate`: appends to predictions.jsonl; cases already there are not asked again."""
    cases = choose_cases(load_cases(args.data).values(), args.levels, args.limit)
    predict.generate(args, prompt_cases(cases), "API-Bank")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    levels = {"default": "", "help": "such as 1,2; default: all that the data holds"}
    script = report.Script(
        name="eval_apibank", data="official folder api-bank, or a folder of cases", max_prompt_tokens=8192,
        generate=generate, generate_options={"--levels": levels}, score=score, score_options={},
        right="correct", group=lambda verdict: f"level-{verdict['level']}",
    )
    return report.run(script, arguments)


if __name__ == "__main__":
    sys.exit(main())
