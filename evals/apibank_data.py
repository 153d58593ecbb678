"""API-Bank's cases, one per gold call, from the official checkout or a folder of cases; and what is asked.

The official checkout is the folder api-bank of AlibabaResearch/DAMO-ConvAI; facts below hold for its commit
483554ea. Nothing of it is executed: what the APIs look like is read from the literals of their classes.
Source: API-Bank (arXiv 2304.08244).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evals.report import Case, ReportError, find, read_objects
from prompts import ToolCall

LEVELS = ("1", "2", "3")
# What a broken file may raise: reading literals ends in the last two where they are nested too deeply.
BROKEN = (LookupError, TypeError, AttributeError, ValueError, SyntaxError, RecursionError, MemoryError)
# A turn of ToolRL's prompts: a user's, or a call with its result. None holds the tag that it begins with.
TURN = re.compile(
    r"<user>((?:(?!<user>).)*?)</user>"
    r"|<tool_call>(?:(?!<tool_call>).)*?</tool_call>\s*<obs>((?:(?!<obs>).)*?)</obs>",
    re.DOTALL,
)
FOLDERS = {"level-1-given-desc": 1, "level-2-toolsearcher": 2}  # of the official dialogues
TOOLRL = "toolrl_level-3-api_processed.json"
SEARCHER = "ToolSearcher"
JSON_TYPES = {
    "str": {"type": "string"}, "int": {"type": "integer"}, "float": {"type": "number"},
    "bool": {"type": "boolean"}, "list": {"type": "array"},
    "list(str)": {"type": "array", "items": {"type": "string"}},
}

# What the official prompts say beside the dialogue. 45 of the 508 gold dates need the year.
YEAR = "The current year is 2023."
ONE_CALL = "Answer with the one API call that the assistant makes next."

# Gold calls that the official evaluator rejects: API -> (arguments that tell them apart, why). A call is run
# on a fresh database, so name and arguments decide. Arguments outside the schema are found by code. As text,
# as officially, 37 more fail: those with a list.
PASSWORD = "the password is wrong unless an earlier call sets it"
REJECTED = {
    "QueryScene": [({}, "the scene in the database has other devices than the dialogue says")],
    "DeleteMeeting": [({}, "the official comparison looks for an argument `time`, which the API lacks")],
    "ForgotPassword": [
        ({"status": "Verification Code"}, "it needs an earlier call, which a fresh database forgets"),
    ],
    "RegisterUser": [({"username": "foo"}, "the user exists unless an earlier call deletes him")],
    "GetUserToken": [
        ({"username": "foo", "password": "newpassword"}, PASSWORD),
        ({"username": "user1", "password": "user1newpass"}, PASSWORD),
    ],
    "QueryRegistration": [
        ({"patient_name": "Mary", "date": "2023-11-15"}, "an earlier call makes the appointment"),
    ],
}


@dataclass(frozen=True)
class GoldCall:
    """One case. Turns of the history are {"role": "User" or "AI", "text"}, or {"role": "API", "api_name",
    "result": {"input", "output", "exception"}}.
    """

    id: str
    level: int
    gold: ToolCall
    written: dict[str, Any]  # the gold arguments as strings
    apis: dict[str, dict]  # all of the data by name
    shown: list[str]  # those that belong to the dialogue
    history: list[dict]
    rejected: str = ""  # why the official tools reject the gold call itself
    scenario: str = ""  # of level 3


def rejection(gold: ToolCall, api: dict) -> str:
    """Why the official evaluator rejects this gold call, or "" where it accepts it."""
    unknown = sorted(gold.arguments.keys() - api["input_parameters"].keys())
    if unknown:
        return f"the schema has no argument {unknown[0]}"
    for some, why in REJECTED.get(gold.name, []):
        if all(key in gold.arguments and gold.arguments[key] == value for key, value in some.items()):
            return why
    return ""


def load_cases(place: str | Path) -> dict[str, GoldCall]:
    """Every case by id, in the order of the data. Raises UserError.

    place: the checkout's folder api-bank or the folder around it, or a folder with cases.jsonl and
    api_descriptions.json; files plain or .gz.
    """
    path = Path(place)
    if find(path / "cases.jsonl"):
        return load_folder(path)
    for root in (path, path / "api-bank"):
        if (root / "lv1-lv2-samples").is_dir() and (root / "apis").is_dir():
            return load_checkout(root)
    what = "the official folder api-bank, or a folder with cases.jsonl and api_descriptions.json"
    raise ReportError(f"{path}: no API-Bank data; --data takes {what}")


def load_folder(folder: Path) -> dict[str, GoldCall]:
    """cases.jsonl and api_descriptions.json; level 3's dialogues are in ToolRL's file, if any."""
    described, path, cases = folder / "api_descriptions.json", find(folder / "cases.jsonl"), {}
    _, groups = read_objects(find(described) or described)[0]
    prompts = [row for _, row in read_objects(find(folder / TOOLRL))] if find(folder / TOOLRL) else []
    apis = {group: {api["name"]: api for api in groups[group]} for group in ("level1_2", "level3")}
    for number, row in read_objects(path):
        try:
            group = apis["level3" if row["level"] == 3 else "level1_2"]
            gold = ToolCall(row["api_name"], row["arguments"])
            written = row.get("arguments_as_written", row["arguments"])
            case = GoldCall(
                row["id"], row["level"], gold, written, group, row.get("tools", []), row.get("history", []),
                rejection(gold, group[gold.name]),
            )
            cases[case.id] = with_dialogue(case, prompts) if case.level == 3 and prompts else case
        except BROKEN as error:
            raise ReportError(f"{path}:{number}: no usable case ({error!r}); fetch the file again") from None
    return cases


def with_dialogue(case: GoldCall, prompts: list[dict]) -> GoldCall:
    """A level-3 case with the dialogue, APIs and scenario of its prompt, which is text, in ToolRL's file.

    ToolRL's own last sentence (only one call, please) is left out: it is no part of the dialogue.
    """
    item = prompts[int(case.id.partition("#")[2])]
    listed = re.findall(r"^\d+\. (\w+): ", item["system"], re.MULTILINE)
    history = []
    for user, seen in TURN.findall(item["user"]):
        if seen:
            result = ast.literal_eval(seen.strip())
            history.append({"role": "API", "api_name": result.get("api_name"), "result": result})
        elif "only make one tool call" not in user:
            history.append({"role": "User", "text": user.strip()})
    shown = [name for name in listed if name in case.apis]
    written, scenario = item["answer"][0]["parameters"], str(item["other"]["sample_id"])
    return replace(case, written=written, shown=shown, history=history, scenario=scenario)


def load_checkout(root: Path) -> dict[str, GoldCall]:
    """Levels 1 and 2, with ids as in cases.jsonl; no calls of level 3 are there."""
    apis, cases = read_apis(root / "apis"), []
    for folder, level in FOLDERS.items():
        for path in sorted((root / "lv1-lv2-samples" / folder).glob("*.jsonl")):
            if path.stat().st_size:  # one official file is empty
                cases += dialogue_cases(path, f"{folder}/{path.name}", level, apis)
    return {case.id: case for case in cases}


def dialogue_cases(path: Path, name: str, level: int, apis: dict[str, dict]) -> list[GoldCall]:
    """The cases of one dialogue: its calls, each with the turns before it. Raises ReportError."""
    rows, cases = read_objects(path), []
    turns = [row for _, row in rows]
    shown = list(dict.fromkeys(turn["api_name"] for turn in turns if "api_name" in turn))
    for i, (number, turn) in enumerate(rows):
        try:
            if turn["role"] == "API":
                gold = ToolCall(turn["api_name"], turn["result"]["input"] or {})
                why, case_id = rejection(gold, apis[gold.name]), f"{name}#{number - 1}"
                cases.append(GoldCall(case_id, level, gold, turn["param_dict"], apis, shown, turns[:i], why))
        except BROKEN as error:
            raise ReportError(f"{path}:{number}: no usable turn ({error!r}); fetch the file again") from None
    return cases


def read_apis(folder: Path) -> dict[str, dict]:
    """Every API class of a folder by name: description, input_parameters, output_parameters, required.

    Only literals are read, so nothing of the checkout runs. Raises ReportError.
    """
    apis = {}
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found = [read_class(node) for node in tree.body if isinstance(node, ast.ClassDef)]
        except BROKEN as error:
            raise ReportError(f"{path}: its API cannot be read ({error}); fetch the checkout again") from None
        apis |= {api["name"]: api for api in found if api}
    return apis


def read_class(node: ast.ClassDef) -> dict | None:
    """One API class; None for a class that describes none. Raises ValueError where a value is no literal.

    required: parameters of `call` without a default; with **kwargs the others of the schema may be left out.
    """
    api, needed = {"name": node.name}, []
    for item in node.body:
        if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
            if item.targets[0].id in ("description", "input_parameters", "output_parameters"):
                api[item.targets[0].id] = literal(item.value)
        elif isinstance(item, ast.FunctionDef) and item.name == "call":
            given = [argument.arg for argument in item.args.args]
            needed = given[1 : len(given) - len(item.args.defaults)]  # the first one is self
    if "input_parameters" not in api:
        return None
    return {**api, "required": [key for key in api["input_parameters"] if key in needed]}


def literal(node: ast.expr) -> Any:
    """The value of an expression of constants; texts may be joined with +. Raises ValueError otherwise."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return literal(node.left) + literal(node.right)
    if isinstance(node, ast.Dict):
        return {literal(key): literal(value) for key, value in zip(node.keys, node.values)}
    return ast.literal_eval(node)


def choose_cases(cases: Iterable[GoldCall], levels: str, limit: int | None) -> list[GoldCall]:
    """The first `limit` cases of each of the levels, as in "1,2" (""  for all). Raises ReportError."""
    by_level: dict[str, list[GoldCall]] = {}
    for case in cases:
        by_level.setdefault(str(case.level), []).append(case)
    chosen = []
    for level in sorted(set(levels.replace(" ", "").split(",")) if levels else by_level):
        if level not in by_level:
            raise ReportError(f"--levels: the data has no level {level!r}; choose of {','.join(by_level)}")
        chosen += by_level[level][:limit]
    if not all(case.history for case in chosen):
        what = "the dialogues of level 3 are not there"
        raise ReportError(f"--data: {what}; add ToolRL's file or choose --levels 1,2")
    return chosen


def prompt_cases(cases: Iterable[GoldCall]) -> list[Case]:
    """What a model is asked: the dialogue before the gold call, and the APIs that it is shown."""
    prompts = []
    for case in cases:
        tools = [tool_schema(case.apis[name]) for name in offered(case)]
        prompts.append(Case(case.id, f"level-{case.level}", to_messages(case), tools))
    return prompts


def tool_schema(api: dict) -> dict:
    """An API description as {"name", "description", "parameters"} with a JSON schema."""
    properties = {}
    for key, value in api["input_parameters"].items():
        properties[key] = {**JSON_TYPES[value["type"]], "description": value["description"]}
    parameters = {"type": "object", "properties": properties, "required": api["required"]}
    return {"name": api["name"], "description": api["description"], "parameters": parameters}


def offered(case: GoldCall) -> list[str]:
    """Names of the APIs that the model is shown.

    Level 2 is about finding them: only the search and what it has found so far, as officially. Level 1: in
    alphabetical order, because their order in the data, that of the calls, gives the answer away.
    """
    if case.level == 2:
        found = [SEARCHER]
        for turn in case.history:
            if turn.get("api_name") == SEARCHER:
                output = turn["result"]["output"] or []  # one description, several or none
                found += [tool["name"] for tool in (output if isinstance(output, list) else [output])]
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
            # `input` has JSON types, `param_dict` only strings; it is null for an API without parameters.
            result, error = turn["result"], turn["result"]["exception"]
            past = ToolCall(turn["api_name"], result["input"] or {})
            answer = {"exception": error} if error else result["output"]
            messages.append({"role": "assistant", "content": "", "calls": [past]})
            messages.append({"role": "tool", "content": json.dumps(answer, ensure_ascii=False)})
        else:
            role = {"User": "user", "AI": "assistant"}[turn["role"]]
            messages.append({"role": role, "content": turn["text"]})
    return messages
