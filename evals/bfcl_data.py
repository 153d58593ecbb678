"""BFCL's single-turn cases: where they lie, how v3 and v4 differ, what the model is shown; official files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path

from config import first_line
from evals.bfcl_check import LANGUAGES, TYPES, Problem, decode, find_block
from evals.report import Case, ReportError, find, read_objects, write_rows

SIMPLE = ("simple_python", *LANGUAGES)
NON_LIVE_AST = (*SIMPLE, "multiple", "parallel", "parallel_multiple")
NON_LIVE = (*NON_LIVE_AST, "irrelevance")
LIVE_AST = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
LIVE = (*LIVE_AST, "live_irrelevance", "live_relevance")
CATEGORIES = (*NON_LIVE, *LIVE)  # named as in v4
V3_NAMES = {"simple": "simple_python", "java": "simple_java", "javascript": "simple_javascript"}
MULTI_TURN = tuple(f"multi_turn_{part}" for part in ("base", "miss_func", "miss_param", "long_context"))
KNOWN = {name: name for name in (*CATEGORIES, *MULTI_TURN)}
GROUPS = {"single_turn": CATEGORIES, "non_live": NON_LIVE, "live": LIVE, "multi_turn": MULTI_TURN}
SUITE = "berkeley-function-call-leaderboard"
DATA_FOLDERS = (".", "bfcl_eval/data", "data", f"{SUITE}/bfcl_eval/data", f"{SUITE}/data")
HUB_ID = "gorilla-llm/Berkeley-Function-Calling-Leaderboard"  # a data set of the hub, in v3's names


def category_of(case_id: str) -> str:
    """v4's name of the category in an id of v3 or v4; "#2" (see load_problems) may follow the id."""
    name = case_id.rpartition("_")[0]
    return V3_NAMES.get(name, name)


def file_category(category: str, version: str) -> str:
    """The name under which the files of a version have a category."""
    return next((old for old, new in V3_NAMES.items() if new == category and version == "v3"), category)


def select_categories(names: Iterable[str]) -> set[str]:
    """Category names of v3 or v4 and names of GROUPS, each possibly several with commas -> v4 names."""
    chosen: set[str] = set()
    for name in ",".join(names).split(","):
        name = V3_NAMES.get(name, name)
        if name not in GROUPS and name not in KNOWN:
            known = ", ".join((*GROUPS, *KNOWN))
            raise ReportError(f"--categories: unknown {name!r}; choose from {known}")
        chosen.update(GROUPS.get(name, (name,)))
    return chosen


def _download() -> str:
    """The folder into which the hub's copy was fetched, now or earlier."""
    names = [f"BFCL_v3_{file_category(name, 'v3')}.json" for name in CATEGORIES]
    files = [*names, *(f"possible_answer/{name}" for name in names)]
    try:
        from huggingface_hub import snapshot_download  # here, because a folder does without it

        return snapshot_download(HUB_ID, repo_type="dataset", allow_patterns=files)
    except Exception as error:  # the hub's errors have no common class, and differ between its versions
        what = f"cannot be fetched from the Hugging Face hub ({first_line(error)})"
        raise ReportError(f"--data {HUB_ID}: {what}; give a folder with the files of {SUITE}") from None


def find_data(folder: str | Path | None) -> tuple[Path, str]:
    """(folder with the questions, "v3" or "v4") in `folder`, a checkout or package of BFCL, or HUB_ID."""
    if folder is None:
        raise ReportError(f"--data is missing: the folder with BFCL_v4_*.json, or {HUB_ID}")
    if not Path(folder).is_dir():
        if str(folder) != HUB_ID:
            raise ReportError(f"{folder}: no such folder; --data is one with BFCL_v4_*.json, or {HUB_ID}")
        folder = _download()
    for place in (Path(folder) / inner for inner in DATA_FOLDERS):
        for version in ("v4", "v3"):
            if any(place.glob(f"BFCL_{version}_*.json*")):
                return place, version
    what = "holds no BFCL_v4_*.json or BFCL_v3_*.json"
    raise ReportError(f"{folder}: {what}; point --data at the folder that does")


def _load_category(folder: Path, version: str, file_name: str) -> Iterator[Problem]:
    name = f"BFCL_{version}_{file_name}.json"
    path, answer_path = find(folder / name), find(folder / "possible_answer" / name)
    questions = read_objects(path) if path else []
    answers = read_objects(answer_path) if answer_path else []
    if "relevance" in file_name:
        answers = [(number, {**question, "ground_truth": []}) for number, question in questions]
    if len(answers) != len(questions):
        counts = f"{len(questions)} questions, but {len(answers)} answers in possible_answer"
        raise ReportError(f"{folder}: {name} has {counts}; fetch both files again")
    # By row and not by id: v3 has a repeated id, and an answer under a wrong id.
    for (number, question), (_, answer) in zip(questions, answers):
        try:
            case_id, functions, wanted = question["id"], question["function"], answer["ground_truth"]
            messages = [message for turn in question["question"] for message in turn]
        except (KeyError, TypeError) as error:
            what = f"not a BFCL case: {error} is missing"
            raise ReportError(f"{path}:{number}: {what}; fetch the file again") from None
        yield Problem(case_id, V3_NAMES.get(file_name, file_name), messages, functions, wanted)


def load_problems(folder: str | Path) -> dict[str, Problem]:
    """All cases in `folder` (see find_data) by id, in the order of CATEGORIES. Raises ReportError.

    The second case under one id (v3 has one) goes by that id with "#2" behind it.
    """
    place, version = find_data(folder)
    problems: dict[str, Problem] = {}
    for category in CATEGORIES:
        for problem in _load_category(place, version, file_category(category, version)):
            unique = f"{problem.id}#2" if problem.id in problems else problem.id
            problems[unique] = replace(problem, id=unique)
    return problems


def choose_problems(folder: str | Path, categories: Iterable[str], limit: int | None = None) -> list[Problem]:
    """The first `limit` cases of each category (or group, see select_categories). Raises ReportError."""
    chosen = select_categories(categories)
    wanted = []
    for name, listed in groupby(load_problems(folder).values(), key=lambda problem: problem.category):
        if name in chosen:
            wanted += islice(listed, limit)
    if not wanted:
        what = f"holds no case of {', '.join(categories)}"
        raise ReportError(f"{folder}: {what}; choose other --categories or fetch the rest of the data")
    return wanted


def _append(text: str, sentence: str) -> str:
    return f"{text.rstrip(' .')}. {sentence}" if text.strip() else sentence


def prompt_tools(functions: list[dict], language: str) -> list[dict]:
    """The documentation as the model sees it, with the language of the values; the checker has no such hints.

    For Java and JavaScript every parameter is a string that spells the value.
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
                item = details.pop("items")["type"]
                hint += f" Its elements are of type {item}, not each spelled as a string."
            if declared == "dict" and "properties" in details:
                hint += f" Its entries, as a JSON schema: {json.dumps(details.pop('properties'))}"
            details.update(type="string", description=_append(details.get("description", ""), hint))
    return tools


def prompt_cases(problems: Iterable[Problem]) -> list[Case]:
    """What a model is asked: messages as they are (system ones included), documentation with hints."""
    cases = []
    for problem in problems:
        tools = prompt_tools(problem.functions, LANGUAGES.get(problem.category, "python"))
        cases.append(Case(problem.id, problem.category, problem.messages, tools))
    return cases


# A pair of escapes, a lone one of them, another escape, a lone half as it is.
HALVES = re.compile(r"\\u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w|(\\u[dD][89a-fA-F]\w\w)|\\.|([\ud800-\udfff])")
HUGE_NUMBER = re.compile(r"\d{309}")  # beyond the range of floats: the official checker crashes on it


def whole_characters(text: str) -> str:
    """The text with U+FFFD for half surrogate pairs, also for those written as JSON escapes.

    Neither prompts nor the official command's files can have them; no answer does.
    """
    return HALVES.sub(lambda found: "\ufffd" if found[1] or found[2] else found[0], text)


def official_result(problem: Problem, output: str) -> str:
    """What the official command is told that the model answered: the JSON list of calls as text, or "null".

    "null" is no call: there is no readable list of calls, or it has a number that would crash the official
    checker (only where calls are expected: such an answer is wrong anyway).
    """
    calls = decode(output)
    if calls is None:
        return "null"
    text = whole_characters(find_block(output)) if calls else "[]"
    return "null" if "relevance" not in problem.category and HUGE_NUMBER.search(text) else text


def write_official(
    results: Iterable[tuple[dict, str, str | list]], version: str, folder: Path, model_name: str
) -> int:
    """Writes result files that the unmodified `bfcl evaluate` scores the same way; returns how many.

    results: (prediction, category, what the tool is told that came); the first of every case counts, because
    the tool knows no samples. model_name: one that it knows, and whose handler reads JSON lists of calls.
    """
    files: dict[Path, dict[str, dict]] = {}
    result = folder / "result" / model_name.replace("/", "_")
    names = {"input_tokens": "input_token_count", "output_tokens": "output_token_count", "latency": "latency"}
    for row, category, came in results:
        group = next(group for group in ("live", "multi_turn", "non_live") if category in GROUPS[group])
        place = result / ("" if version == "v3" else group)
        path = place / f"BFCL_{version}_{file_category(category, version)}_result.json"
        line = {"id": row["id"].partition("#")[0], "result": came}
        line |= {theirs: row[ours] for ours, theirs in names.items() if ours in row}
        files.setdefault(path, {}).setdefault(row["id"], line)
    for path, lines in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, lines.values())
    return len(files)
