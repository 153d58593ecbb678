"""ACEBench's atom and single-turn parts in two steps: `generate` asks a model, `score` judges without a GPU.

    python -m evals.acebench generate --model M --data DIR --out DIR
    python -m evals.acebench score --predictions DIR/predictions.jsonl --data DIR --out DIR
    python -m evals.acebench --diff DIR_A DIR_B

A verdict is that of the official normal_checker; comments marked "Oddity" name its rules that nobody would
invent. Source: ACEBench (arXiv 2501.12851) and model_eval/checker.py of its repository.
"""

from __future__ import annotations
import distributed.start  # noqa: F401

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus.toolace import parse_toolace_calls
from evals import predict, report
from evals.bfcl_check import decode, standard
from evals.report import Case, ReportError, combined, find, read_objects, tally
from prompts import ToolCall

ATOM = tuple(f"atom_{kind}" for kind in ("bool", "enum", "number", "list", "object_short", "object_deep"))
COLUMNS = {"atom": ATOM, "single_turn": ("single_turn_single_function", "single_turn_parallel_function")}
PARTS = (*COLUMNS["atom"], *COLUMNS["single_turn"])
PAPER = {"GPT-4o": 87.00, "Tool-N1-14B": 82.34, "Tool-N1-7B": 81.63}
PAPER_NOTE = (
    "The paper (arXiv 2505.00024) gives one figure for atom and single turn together and does not say how it "
    "is averaged: compare in outline only."
)

# Declared type -> type of the value. Oddity: a number is whole, and no value is of type enum; where the gold
# value is not either, its own type is asked for.
TYPES = {
    **dict.fromkeys(("string", "any"), str),
    **dict.fromkeys(("integer", "int", "number"), int),
    **dict.fromkeys(("array", "tuple", "list", "list(string)", "list(enum)", "objectArray"), list),
    **dict.fromkeys(("dict", "object"), dict),
    "float": float, "boolean": bool, "enum": enumerate,
}
# Those that have elements -> the type of these where the schema does not say.
NESTED = {
    **dict.fromkeys(("array", "tuple", "object", "objectArray"), dict),
    "list(string)": str, "list(enum)": enumerate,
}
TRUTH = {"true": True, "false": False}
NUMBERED = re.compile(r"_\d+$")  # several calls of one function in an answer: f_1, f_2

# What the official prompts say beside tools, time and dialogue.
RULES = {
    "en": "Take values from the user's own words unless a description asks for another form. "
    "Leave out arguments that the user does not mention. Make all calls that are needed now.",
    "zh": "除非参数说明要求其他格式，参数值请使用用户的原话。用户没有提到的参数不要填写。"
    "请一次给出当前需要的全部调用。",
}
TURN = re.compile(r"^(user|system|assistant|tool): ?", re.MULTILINE)
WHY = {
    "no_calls": "there is no closed tool-call section with a JSON list of calls",
    "wrong_count": "more or fewer calls than expected",
    "wrong_function": "another function is called",
    "no_arguments": "either the call or the function has no arguments",
    "missing_argument": "a required argument is missing",
    "unknown_argument": "the function has no such argument, or the answer does without it",
    "wrong_type": "the value has another type",
    "wrong_value": "the value differs",
}


@dataclass(frozen=True)
class Problem:
    """One test case. answers: each would do; of each {function, numbered where called again: arguments}."""

    id: str
    part: str
    question: str
    time: str  # a sentence, or ""
    tools: list[dict]
    answers: list[dict[str, dict]]


# ------------------------------------------------------------------------------------------------ the verdict


def truth(value: Any) -> Any:
    """The texts "true" and "false" as truth values; any other value as it is."""
    return TRUTH.get(value, value) if isinstance(value, str) else value


def same_object(value: Any, gold: Any) -> bool:
    """Equal keys, and every gold value is part of the other one, both as text."""
    if not (isinstance(value, dict) and isinstance(gold, dict)) or value.keys() != gold.keys():
        return False
    for key, wanted in gold.items():
        came = truth(value[key])
        if isinstance(wanted, dict):
            same = same_object(came, wanted)
        else:
            same = str(standard(wanted)) in str(standard(came))
        if not same:
            return False
    return True


def read_type(details: Any) -> type | None:
    """The type that a JSON schema declares; None where it declares none."""
    kind = details.get("type") if isinstance(details, dict) else None
    return TYPES.get(kind) if isinstance(kind, str) else None


def value_fault(value: Any, gold: Any, details: dict) -> str:
    """Says wrong_type or wrong_value for one argument, or "". details: its JSON schema."""
    declared, inner, read = read_type(details), None, truth(value)
    if declared and details["type"] in NESTED:
        inner = read_type(details.get("items")) or NESTED[details["type"]]
    if type(read) is not declared and not (declared is float and type(read) is int):
        return "" if gold != "" and (type(read) is type(gold) or read == gold) else "wrong_type"
    if inner and not (isinstance(gold, (list, dict, str)) and gold):
        return "wrong_type"  # Oddity: an empty gold list accepts nothing, not even itself
    if gold != "" and type(gold) is not declared:
        return ""  # Oddity: where the gold value is of another type than the declared one, any value will do
    if declared is dict:
        right = same_object(value, gold)
    elif declared is list and inner is dict:
        right = len(value) == len(gold) and all(map(same_object, value, gold))
    elif declared is list:
        right = list(map(standard, value)) == list(map(standard, gold))
    elif declared is str:
        right = standard(gold) in standard(value)  # Oddity: a longer text is right, and so is any for ""
    else:
        right = True  # Oddity: numbers and truth values are not compared
    return "" if right else "wrong_value"


def call_fault(tool: dict, call: ToolCall, gold: dict) -> str:
    """Why a call is not the gold call, or "". Gold arguments that are not required may be missing."""
    schema, known = tool["parameters"], tool["parameters"].get("properties", {})
    if not (call.arguments and schema):
        return "no_arguments" if call.arguments or schema else ""
    if not gold:
        return "no_arguments" if known else ""
    if tool["name"] != call.name:
        return "wrong_function"
    for key in schema.get("required", ()):
        if key not in call.arguments:
            return f"missing_argument:{key}"
    for key, value in call.arguments.items():
        if key not in known or key not in gold:
            return f"unknown_argument:{key}"
        if fault := value_fault(value, gold[key], known[key]):
            return f"{fault}:{key}"
    return ""


def calls_fault(tools: list[dict], calls: list[ToolCall], answer: dict[str, dict]) -> str:
    """Why calls, in any order, are not those of one answer, or ""."""
    names = {written: NUMBERED.sub("", written) for written in answer}
    if Counter(call.name for call in calls) != Counter(names.values()):
        return "wrong_function" if len(calls) == len(names) else "wrong_count"
    for written, name in names.items():
        # Oddity: the first tool whose name is part of the answer's. One call may be right for two answers.
        tool = next((tool for tool in tools if tool["name"] in written), None)
        if tool is None:
            return "wrong_function"
        faults = [call_fault(tool, call, answer[written]) for call in calls if call.name == name]
        if "" not in faults:
            return faults[0]
    return ""


def find_fault(problem: Problem, output: str) -> str:
    """Why a reply is wrong: one of WHY, maybe with a colon and the argument; "" if it is right."""
    decoded = decode(output)
    calls = [ToolCall(*call.popitem()) for call in decoded or ()]
    if decoded is None or not all(isinstance(call.arguments, dict) for call in calls):
        return "no_calls"
    try:
        faults = [calls_fault(problem.tools, calls, answer) for answer in problem.answers]
    except (RecursionError, TypeError):  # nested too deeply; a schema that the official checker cannot read
        return "wrong_value"
    return "" if "" in faults else faults[0]


# --------------------------------------------------------------------------------------------------- the data


def find_data(place: str | Path, language: str) -> Path:
    """The folder with the files of a language in `place`: a checkout, its data_all, or that folder itself."""
    path = Path(place)
    for folder in (path / "data_all" / f"data_{language}", path / f"data_{language}", path):
        if any(find(folder / f"data_normal_{part}.json") for part in PARTS):
            if folder.resolve().name in {"data_en", "data_zh"} - {f"data_{language}"}:
                raise ReportError(f"{folder}: its cases are not in --language {language}; pass the other")
            return folder
    what = f"a checkout of ACEBench, or the folder of data_normal_atom_bool.json ({language})"
    raise ReportError(f"{path}: no ACEBench data; --data takes {what}")


def load_problems(place: str | Path, language: str) -> dict[str, Problem]:
    """All cases of PARTS that are there, by id. Raises ReportError and DataError."""
    folder, problems = find_data(place, language), {}
    for part in PARTS:
        name = f"data_normal_{part}.json"
        path, answer_path = find(folder / name), find(folder / "possible_answer" / name)
        questions = read_objects(path) if path else []
        answers = read_objects(answer_path) if answer_path else []
        if len(answers) != len(questions):
            counts = f"{len(questions)} cases, but {len(answers)} answers in possible_answer"
            raise ReportError(f"{folder}: {name} has {counts}; fetch both files again")
        for (number, row), (_, answer) in zip(questions, answers):  # by row, as officially
            try:
                problem = read_problem(row, answer["ground_truth"], part)
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                what = f"no usable case ({error!r})"
                raise ReportError(f"{path}:{number}: {what}; fetch the file again") from None
            problems[problem.id] = problem
    return problems


def read_problem(row: dict, gold: dict | list, part: str) -> Problem:
    """A row of the data and its answers. Raises LookupError, TypeError, AttributeError or ValueError."""
    functions, tools = row["function"], []
    for function in [functions] if isinstance(functions, dict) else functions:
        schema = function.get("parameters", function.get("arguments", {}))
        if not isinstance(function["name"], str) or not isinstance(schema.get("properties", {}), dict):
            raise ValueError("a function without a name or parameters")
        described = {"name": function["name"], "description": function.get("description", "")}
        tools.append(described | {"parameters": schema})
    answers = gold if isinstance(gold, list) else [gold]
    arguments = [list(answer.values()) for answer in answers]
    if not arguments or not all(isinstance(value, dict) for value in sum(arguments, [])):
        raise ValueError("the answer is not calls")
    question, time = str.strip(row["question"]), str.strip(row.get("time") or "")
    return Problem(str.strip(row["id"]), part, question, time, tools, answers)


def choose_parts(names: Iterable[str]) -> list[str]:
    """Names of PARTS, official ones too, or of COLUMNS, each possibly several with commas -> PARTS."""
    chosen: set[str] = set()
    for name in ",".join(names).split(","):
        short = name.removeprefix("normal_")
        if short not in COLUMNS and short not in PARTS:
            raise ReportError(f"--categories: unknown {name!r}; choose from {', '.join((*COLUMNS, *PARTS))}")
        chosen.update(COLUMNS.get(short, (short,)))
    return [part for part in PARTS if part in chosen]


# ------------------------------------------------------------------------------------------------- the prompt


def prompt_case(problem: Problem, language: str) -> Case:
    """What a model is asked: rules and time, then the dialogue; the data's "system" is the assistant."""
    messages = [{"role": "system", "content": f"{RULES[language]} {problem.time}".strip()}]
    names = [tool["name"] for tool in problem.tools]
    before, *turns = TURN.split(problem.question)
    if before:  # no dialogue
        turns = ["user", problem.question]
    for role, text in zip(turns[::2], turns[1::2]):
        message = {"role": "assistant" if role == "system" else role, "content": text.strip()}
        if message["role"] == "assistant" and (calls := parse_toolace_calls(text, names, any_name=True)):
            message |= {"content": "", "calls": calls}
        messages.append(message)
    return Case(problem.id, problem.part, messages, problem.tools)


def generate(args: argparse.Namespace) -> None:
    """The command `generate`: appends to predictions.jsonl; cases already there are not asked again."""
    problems, chosen = load_problems(args.data, args.language), []
    for part in choose_parts(args.categories):
        chosen += [problem for problem in problems.values() if problem.part == part][: args.limit]
    if not chosen:
        what = f"{args.data} holds no case of {', '.join(args.categories)}"
        raise ReportError(f"{what}; choose other --categories")
    cases = [prompt_case(problem, args.language) for problem in chosen]
    predict.generate(args, cases, f"ACEBench {args.language}")


# ------------------------------------------------------------------------------------------------- the report


def column_rows(parts: dict[str, dict]) -> list[dict]:
    """The two columns, each the mean of its parts as officially, and two means of all, as rows of the table.

    parts: every part's tally. Accuracy None where a part did not run.
    """
    rows = []
    for name, members in (*COLUMNS.items(), ("mean of 8 parts", PARTS)):
        ran = [parts[part] for part in members if parts[part]["n"]]
        figures = combined((1 / len(members), part) for part in ran) if len(ran) == len(members) else {}
        n = sum(part["n"] for part in ran)
        rows.append({"group": "column", "name": name, "accuracy": None, **figures, "n": n})
    both = {} if rows[-1]["accuracy"] is None else combined((1 / 2, row) for row in rows[:2])
    return [*rows, {**rows[-1], **both, "name": "mean of both columns"}]


def score(args: argparse.Namespace) -> None:
    """The command `score`: writes verdicts.jsonl, cases and tables to OUT, and prints the table."""
    rows = report.read_predictions(args.predictions, f"ACEBench {args.language}")
    problems, cases = load_problems(args.data, args.language), []
    for row in rows:
        if row["id"] not in problems:
            what = f"{args.data} has no case {row['id'][:80]!r}"
            raise ReportError(f"{row['place']}: {what}; pass the --data that the predictions were made from")
        problem = problems[row["id"]]
        fault = find_fault(problem, row["output"])
        reason, _, argument = fault.partition(":")
        case = {"id": problem.id, "category": problem.part, "valid": not fault, "reason": fault or None}
        case |= {"sample": row["sample"]} if "sample" in row else {}
        why = WHY.get(reason, "") + (f": {argument}" if argument else "")
        cases.append(case | {"expected": problem.answers, "came": report.shorten(row["output"]), "why": why})
    args.out.mkdir(parents=True, exist_ok=True)
    shown = ("expected", "came", "why")
    verdicts = [{key: value for key, value in case.items() if key not in shown} for case in cases]
    report.write_rows(args.out / "verdicts.jsonl", verdicts)
    report.write_cases(cases, args.out, right="valid", reason="reason")
    parts = {part: tally((c["id"], c["valid"]) for c in cases if c["category"] == part) for part in PARTS}
    table = [{"group": "part", "name": part, **parts[part]} for part in PARTS] + column_rows(parts)
    for name, figure in PAPER.items():
        table.append({"group": "paper", "name": name, "accuracy": figure, "n": "not stated"})
    scores = {"data": f"ACEBench {args.language}", "parts": parts, "table": table, "note": PAPER_NOTE}
    report.write_table(table, args.out, scores)
    print(PAPER_NOTE)
    report.tell_partial(parts, Counter(problem.part for problem in problems.values()))
    asked = [(row["output"], case["reason"]) for row, case in zip(rows, cases) if "skipped" not in row]
    unread = [output for output, reason in asked if reason == "no_calls"]
    report.tell_unreadable(unread, len(asked), "They count as wrong.")
    if skipped := len(rows) - len(asked):
        print(f"{skipped} of {len(rows)} prompts were too long or refused; they count as wrong.")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    language = {"choices": list(RULES), "default": "en", "help": "of the cases (default: %(default)s)"}
    which = {"nargs": "+", "default": list(COLUMNS), "help": "atom, single_turn or parts; commas allowed"}
    script = report.Script(
        name="evals/acebench", data="checkout of ACEBench, or the folder of its files",
        max_prompt_tokens=16384, generate=generate,
        generate_options={"--categories": which, "--language": language}, score=score,
        score_options={"--language": language}, right="valid", group=lambda verdict: verdict["category"],
    )
    return report.run(script, arguments)


if __name__ == "__main__":
    sys.exit(main())
