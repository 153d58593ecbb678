"""BFCL's single-turn cases: where they lie, how v3 and v4 differ, and what the model is shown of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from evals.bfcl_check import LANGUAGES, TYPES, BfclError, Problem, decode, find_block
from evals.report import make_folder, read_lines, write_rows

if TYPE_CHECKING:
    from evals.predict import Case

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
HUB_ID = (
    "gorilla-llm/Berkeley-Function-Calling-Leaderboard"  # a data set of the Hugging Face hub, in v3's names
)

# ---------------------------------------------------------------------------------------------------- finding


def category_of(case_id: str) -> str:
    """v4's name of the category that an id of v3 or v4 says it belongs to; "#2" (see load_problems) may
    follow.
    """
    name = case_id.rpartition("_")[0]
    return V3_NAMES.get(name, name)


def file_category(category: str, version: str) -> str:
    """The name under which the files of a version have a category."""
    return next((old for old, new in V3_NAMES.items() if new == category and version == "v3"), category)


def select_categories(names: Iterable[str]) -> set[str]:
    """Category names of v3 or v4 and names of GROUPS, each possibly several with commas -> v4 names."""
    chosen: set[str] = set()
    for name in (part.strip() for text in names for part in text.split(",") if part.strip()):
        name = V3_NAMES.get(name, name)
        if name not in GROUPS and name not in CATEGORIES:
            raise BfclError(
                f"--categories: unknown {name!r}; choose from {', '.join((*GROUPS, *CATEGORIES))}"
            )
        chosen.update(GROUPS.get(name, (name,)))
    return chosen


def _download() -> str:
    """The folder into which the hub's copy was fetched, now or earlier."""
    files = [
        f"{place}BFCL_v3_{file_category(name, 'v3')}.json"
        for place in ("", "possible_answer/")
        for name in CATEGORIES
    ]
    advice = f"fetch it on a machine with network, or give a folder with the files of {SUITE} as --data"
    try:
        from huggingface_hub import (
            snapshot_download,  # here, because a folder needs neither package nor network
        )

        return snapshot_download(HUB_ID, repo_type="dataset", allow_patterns=files)
    except Exception as error:  # the hub's errors have no common class, and differ between its versions
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise BfclError(
            f"--data {HUB_ID}: cannot be fetched from the Hugging Face hub ({reason}); {advice}"
        ) from None


def find_data(folder: str | Path) -> tuple[Path, str]:
    """(folder with the question files, "v3" or "v4") in `folder`, in a checkout or package of BFCL there, or
    of HUB_ID.
    """
    if not Path(folder).is_dir():
        if str(folder) != HUB_ID:
            raise BfclError(
                f"{folder}: no such folder; --data must be a folder with BFCL_v4_*.json, or {HUB_ID}"
            )
        folder = _download()
    for place in (Path(folder) / inner for inner in DATA_FOLDERS):
        for version in ("v4", "v3"):
            if any(place.glob(f"BFCL_{version}_*.json*")):
                return place, version
    raise BfclError(
        f"{folder}: holds no BFCL_v4_*.json or BFCL_v3_*.json; point --data at the folder that does"
    )


# ---------------------------------------------------------------------------------------------------- loading


def _load_records(stem: Path) -> list[tuple[str, dict]]:
    """(file and line, record) for all records of stem.json or stem.json.gz; [] where neither exists."""
    path = next((path for suffix in ("json", "json.gz") if (path := Path(f"{stem}.{suffix}")).exists()), None)
    records = []
    for number, line in read_lines(path) if path else ():
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
        raise BfclError(
            f"{folder}: BFCL_{version}_{file_name} has {len(questions)} questions, but {len(answers)} answers in "
            "possible_answer; fetch both files again"
        )
    # By row and not by id: v3 has a repeated id, and an answer under a wrong id.
    for (place, question), (_, answer) in zip(questions, answers):
        try:
            name, functions, wanted = question["id"], question["function"], answer["ground_truth"]
            messages = [message for turn in question["question"] for message in turn]
            if version == "v4" and answer["id"] != name:
                raise BfclError(
                    f"{place}: {name} stands beside the answer to {answer['id']}; fetch both files again"
                )
            for function in functions if wanted else ():
                for details in function["parameters"]["properties"].values():
                    TYPES[details["items"]["type"] if TYPES[details["type"]] is list else details["type"]]
        except (KeyError, TypeError) as error:
            raise BfclError(
                f"{place}: not a BFCL case: {error} is missing or unknown; fetch the file again"
            ) from None
        yield Problem(name, V3_NAMES.get(file_name, file_name), messages, functions, wanted)


def load_problems(folder: str | Path) -> dict[str, Problem]:
    """All single-turn cases in `folder` (see find_data) by id, in the order of CATEGORIES. Raises BfclError.

    The second case under one id (v3 has one) goes by that id with "#2" behind it.
    """
    place, version = find_data(folder)
    problems: dict[str, Problem] = {}
    for category in CATEGORIES:
        for problem in _load_category(place, version, file_category(category, version)):
            unique = f"{problem.id}#2" if problem.id in problems else problem.id
            problems[unique] = replace(problem, id=unique) if unique != problem.id else problem
    return problems


def choose_problems(folder: str | Path, categories: Iterable[str], limit: int | None = None) -> list[Problem]:
    """The first `limit` cases of each of the categories (or groups, see select_categories). Raises
    BfclError.
    """
    chosen, problems, names = (
        select_categories(categories),
        load_problems(folder).values(),
        ", ".join(categories),
    )
    by_category = groupby(problems, key=lambda problem: problem.category)
    wanted = [problem for name, listed in by_category if name in chosen for problem in islice(listed, limit)]
    if not wanted:
        raise BfclError(
            f"{folder}: holds no case of {names}; choose other --categories or fetch the rest of the data"
        )
    return wanted


# ----------------------------------------------------------------------------------------------------- asking


def _append(text: str, sentence: str) -> str:
    return f"{text.rstrip(' .')}. {sentence}" if text.strip() else sentence


def prompt_tools(functions: list[dict], language: str) -> list[dict]:
    """The documentation as the model sees it: with the language of the values, and for Java and JavaScript
    with every parameter as a string that spells the value. The checker uses the documentation without these
    hints.
    """
    label = {"python": "Python 3", "java": "Java 8 SDK", "javascript": "JavaScript"}[language]
    tools = json.loads(json.dumps(functions))
    for tool in tools:
        tool["description"] = _append(tool.get("description", ""), f"Argument values follow {label} syntax.")
        for details in tool["parameters"]["properties"].values() if language != "python" else ():
            declared = details["type"]
            kind = "object of any type" if declared == "any" else f"value of type {declared}"
            hint = f"Give this as a string that spells a {label} {kind}."
            if TYPES[declared] is list:
                hint += (
                    f" Its elements are of type {details.pop('items')['type']}, not each spelled as a string."
                )
            if declared == "dict" and "properties" in details:
                hint += f" Its entries, as a JSON schema: {json.dumps(details.pop('properties'))}"
            details.update(type="string", description=_append(details.get("description", ""), hint))
    return tools


def prompt_cases(problems: Iterable[Problem]) -> list[Case]:
    """What rollout.py needs to ask a model: messages as they are (system ones included), documentation with
    hints.
    """
    from evals.predict import Case

    return [
        Case(
            id=problem.id, category=problem.category, messages=problem.messages,
            tools=prompt_tools(problem.functions, LANGUAGES.get(problem.category, "python")),
        )
        for problem in problems
    ]


# ----------------------------------------------------------------------------------- for the official command

HUGE_NUMBER = re.compile(r"\d{309}")  # beyond the range of floats: the official checker crashes on it


def official_result(problem: Problem, output: str) -> str:
    """What the official command is told that the model answered: the JSON list of calls as text, or "null".

    "null", which is no call, where there is no readable list of calls. A number that would crash the official
    checker becomes "null" as well, but only where calls are expected: both are wrong there.
    """
    calls = decode(output)
    if calls is None:
        return "null"
    text = find_block(output) if calls else "[]"
    return "null" if "relevance" not in problem.category and HUGE_NUMBER.search(text) else text


def write_official(
    pairs: Iterable[tuple[dict, Problem]], version: str, folder: Path, model_name: str
) -> list[Path]:
    """Writes result files that the unmodified `bfcl evaluate` scores to the same accuracies; returns their
    paths.

    pairs: (prediction, case); the first prediction of every case counts, because the official tool knows no
    samples. The tool goes by `model_name`, which must be one that it knows and whose handler reads JSON lists
    of calls.
    """
    rows: dict[str, dict] = {}
    files: dict[Path, list[dict]] = {}
    problems = {}
    for row, problem in pairs:
        rows.setdefault(problem.id, row)
        problems[problem.id] = problem
    result = folder / "result" / model_name.replace("/", "_")
    for name, row in rows.items():
        problem, group = problems[name], ""
        if version == "v4":
            group = "live" if problem.category in LIVE else "non_live"
        path = result / group / f"BFCL_{version}_{file_category(problem.category, version)}_result.json"
        line = {"id": name.partition("#")[0], "result": official_result(problem, row["output"])}
        for ours, theirs in (("input_tokens", "input_token_count"), ("output_tokens", "output_token_count")):
            line |= {theirs: row[ours]} if ours in row else {}
        files.setdefault(path, []).append(line | ({"latency": row["latency"]} if "latency" in row else {}))
    for path, lines in files.items():
        make_folder(path.parent)
        write_rows(path, lines)
    return list(files)
