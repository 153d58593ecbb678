"""API-Bank's cases, one per gold call: from the official checkout, a folder of cases, or the hub's 399 items.

The official checkout is the folder api-bank of AlibabaResearch/DAMO-ConvAI; facts below hold for its commit
483554ea. Nothing of it is executed: what the APIs look like is read from the literals of their classes. No
torch here. Source: API-Bank (arXiv 2304.08244).
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evals.report import ReportError, read_lines
from prompts import ToolCall

EvalError = ReportError  # one error for all input that the user must put right

LEVELS = ("1", "2", "3")
FOLDERS = {"level-1-given-desc": 1, "level-2-toolsearcher": 2}  # of the official dialogues
SCENARIOS = (
    "test-data/level-3.json",
    "json_test_data/level-3.json",
    "test_data/level-3.json",
)  # its name over time
TOOLRL = "toolrl_level-3-api_processed.json"
SEARCHER = "ToolSearcher"
JSON_TYPES = {
    "str": {"type": "string"}, "int": {"type": "integer"}, "float": {"type": "number"}, "bool": {"type": "boolean"},
    "list": {"type": "array"}, "list(str)": {"type": "array", "items": {"type": "string"}},
}

# The hub's file does not say which parameters may be left out; the signatures of the official classes do.
OPTIONAL = {
    "ForgotPassword": ("username", "email", "verification_code", "new_password"),
    "ModifyRegistration": ("new_appointment_date", "new_appointment_doctor"),
    "RecordHealthData": ("health_data",),
    "Translate": ("src_lang", "tgt_lang"),
}

# Gold calls that the official evaluator rejects: API -> (arguments that tell them apart, why). A call is run
# on a fresh database, so its verdict depends on nothing but its name and arguments. Arguments outside the
# schema are found by code.
REJECTED = {
    "QueryScene": [({}, "the scene in the database has other devices than the dialogue says")],
    "DeleteMeeting": [
        ({}, "the official comparison looks for an argument `time`, which the API does not have")
    ],
    "ForgotPassword": [
        ({"status": "Verification Code"}, "it needs an earlier call, which a fresh database forgets")
    ],
    "RegisterUser": [({"username": "foo"}, "the user exists unless an earlier call deletes him")],
    "GetUserToken": [
        (
            {"username": "foo", "password": "newpassword"},
            "the password is wrong unless an earlier call sets it",
        ),
        (
            {"username": "user1", "password": "user1newpass"},
            "the password is wrong unless an earlier call sets it",
        ),
    ],
    "QueryRegistration": [
        ({"patient_name": "Mary", "date": "2023-11-15"}, "an earlier call makes the appointment")
    ],
}


@dataclass(frozen=True)
class GoldCall:
    """One case. `written`: the gold arguments as strings; `apis`: all of the data by name; `shown`: those
    that belong to the dialogue; `rejected`: why the official tools reject the gold call itself, or "";
    `scenario`: of level 3.

    history: turns before the call, in the official form: {"role": "User" or "AI", "text"} and {"role": "API",
    "api_name", "param_dict", "result": {"input", "output", "exception"}}.
    """

    id: str
    level: int
    gold: ToolCall
    written: dict[str, Any]
    apis: dict[str, dict]
    shown: list[str]
    history: list[dict]
    rejected: str = ""
    scenario: str = ""


def rejection(gold: ToolCall, api: dict) -> str:
    """Why the official evaluator rejects this gold call, or "" where it accepts it."""
    unknown = sorted(gold.arguments.keys() - api["input_parameters"].keys())
    if unknown:
        return f"the schema has no argument {unknown[0]}"
    for some, why in REJECTED.get(gold.name, []):
        if some.items() <= {key: gold.arguments[key] for key in some if key in gold.arguments}.items():
            return why
    return ""


# ---------------------------------------------------------------------------------------------------- reading


def find(path: Path) -> Path | None:
    """`path`, or else `path` with .gz, or else None."""
    return next((p for p in (path, path.with_name(f"{path.name}.gz")) if p.is_file()), None)


def read_json(path: Path) -> Any:
    """The value of a .json file, plain or .gz. Raises EvalError."""
    found = find(path)
    if found is None:
        raise EvalError(f"{path}: no such file; it belongs beside the other files of --data")
    try:
        return json.loads(b"".join(line for _, line in read_lines(found)))
    except (ValueError, RecursionError) as error:
        raise EvalError(f"{path}: not JSON ({error}); fetch the file again") from None


def read_rows(path: Path) -> list[tuple[int, dict]]:
    """(line number, object) of a .jsonl or .jsonl.gz file. Raises EvalError."""
    rows = []
    for number, line in read_lines(path):
        try:
            rows.append((number, dict(json.loads(line))))
        except (ValueError, TypeError, RecursionError):
            raise EvalError(f"{path}:{number}: not a JSON object; fetch the file again") from None
    return rows


def load_cases(place: str | Path) -> dict[str, GoldCall]:
    """Every case by id, in the order of the data. Raises EvalError.

    place: the checkout's folder api-bank or the folder around it, a folder with cases.jsonl and
    api_descriptions.json, or the hub's level-1 file of 399 items in query/tools/answers form. Plain files or
    .gz.
    """
    path = Path(place)
    if path.is_file():
        return load_hub(path)
    if find(path / "cases.jsonl"):
        return load_folder(path)
    for root in (path, path / "api-bank"):
        if (root / "lv1-lv2-samples").is_dir() and (root / "apis").is_dir():
            return load_checkout(root)
    raise EvalError(
        f"{path}: {'no API-Bank data' if path.is_dir() else 'no such file or folder'}; --data takes the official folder "
        "api-bank (with lv1-lv2-samples and apis), a folder with cases.jsonl and api_descriptions.json, or the hub's "
        "level-1 file"
    )


# ------------------------------------------------------------------------------------------ a folder of cases


def load_folder(folder: Path) -> dict[str, GoldCall]:
    """Levels 1 and 2 from cases.jsonl and api_descriptions.json; the dialogues of level 3 from ToolRL's file
    if there.
    """
    groups, path, cases = read_json(folder / "api_descriptions.json"), find(folder / "cases.jsonl"), {}
    prompts = read_json(folder / TOOLRL) if find(folder / TOOLRL) else []
    apis = {group: {api["name"]: api for api in groups[group]} for group in ("level1_2", "level3")}
    for number, row in read_rows(path):
        try:
            group, gold = (
                apis["level3" if row["level"] == 3 else "level1_2"],
                ToolCall(row["api_name"], row["arguments"]),
            )
            case = GoldCall(
                row["id"], row["level"], gold, row.get("arguments_as_written", row["arguments"]), group,
                row.get("tools", []), row.get("history", []), rejection(gold, group[gold.name]),
            )
            cases[case.id] = with_dialogue(case, prompts) if case.level == 3 and prompts else case
        except (KeyError, TypeError, IndexError, ValueError, SyntaxError) as error:
            raise EvalError(f"{path}:{number}: no usable case ({error!r}); fetch the file again") from None
    return cases


def with_dialogue(case: GoldCall, prompts: list[dict]) -> GoldCall:
    """A level-3 case with the dialogue, APIs and scenario of its prompt, which is text, in ToolRL's file.

    ToolRL's own last sentence (only one call, please) is left out: it is no part of the dialogue.
    """
    item = prompts[int(case.id.partition("#")[2])]
    shown = [
        name for name in re.findall(r"^\d+\. (\w+): ", item["system"], re.MULTILINE) if name in case.apis
    ]
    turn = re.compile(r"<user>(.*?)</user>|<tool_call>.*?</tool_call>\s*<obs>(.*?)</obs>", re.DOTALL)
    history = []
    for user, seen in turn.findall(item["user"]):
        result = ast.literal_eval(seen.strip()) if seen else {}
        called = {
            "role": "API",
            "api_name": result.get("api_name"),
            "param_dict": result.get("input"),
            "result": result,
        }
        history.append(called if seen else {"role": "User", "text": user.strip()})
    if "only make one tool call" in history[-1].get("text", ""):
        history.pop()
    written = item["answer"][0]["parameters"]
    return replace(
        case, written=written, shown=shown, history=history, scenario=str(item["other"]["sample_id"])
    )


# -------------------------------------------------------------------------------------- the official checkout


def load_checkout(root: Path) -> dict[str, GoldCall]:
    """Levels 1 and 2 from the dialogues, level 3 from the scenarios if they are there. ids as in
    cases.jsonl.
    """
    apis, cases = read_apis(root / "apis"), {}
    for folder, level in FOLDERS.items():
        for path in sorted((root / "lv1-lv2-samples" / folder).glob("*.jsonl")):
            for case in dialogue_cases(path, f"{folder}/{path.name}", level, apis):
                cases[case.id] = case
    if not cases:
        raise EvalError(
            f"{root / 'lv1-lv2-samples'}: holds no dialogues ({', '.join(FOLDERS)}); complete the checkout"
        )
    path = next((found for name in SCENARIOS if (found := find(root / name))), None)
    if path and (root / "lv3_apis").is_dir():
        cases |= {case.id: case for case in scenario_cases(path, read_apis(root / "lv3_apis"))}
    return cases


def dialogue_cases(path: Path, name: str, level: int, apis: dict[str, dict]) -> list[GoldCall]:
    """The cases of one dialogue: its calls, each with the turns before it. Raises EvalError."""
    rows, cases = read_rows(path), []
    turns = [row for _, row in rows]
    shown = list(dict.fromkeys(turn["api_name"] for turn in turns if "api_name" in turn))
    for i, (number, turn) in enumerate(rows):
        try:
            if turn["role"] == "API":
                gold = ToolCall(turn["api_name"], turn["result"]["input"] or {})
                why, case_id = rejection(gold, apis[gold.name]), f"{name}#{number - 1}"
                cases.append(GoldCall(case_id, level, gold, turn["param_dict"], apis, shown, turns[:i], why))
        except (KeyError, TypeError) as error:
            raise EvalError(f"{path}:{number}: no usable turn ({error!r}); fetch the file again") from None
    return cases


def scenario_cases(path: Path, apis: dict[str, dict]) -> list[GoldCall]:
    """Level 3: the calls of every scenario but the searches, as ToolRL counts them, which are not in its file
    either.
    """
    cases = []
    for number, scenario in enumerate(read_json(path)):
        try:
            history, shown = [{"role": "User", "text": scenario["requirement"].strip()}], []
            for call in scenario["apis"]:
                if call["api_name"] == SEARCHER:
                    shown = list(dict.fromkeys([*shown, *found_tools(call["output"])]))
                    continue
                name, written = call["api_name"], call["input"]
                gold = ToolCall(name, native(written, apis[name]))
                cases.append(GoldCall(
                    f"level-3#{len(cases)}", 3, gold, written, apis, shown, list(history), rejection(gold, apis[name]),
                    str(number),
                ))
                history.append(
                    {"role": "API", "api_name": name, "param_dict": written, "result": call["output"]}
                )
        except (KeyError, TypeError, AttributeError) as error:
            raise EvalError(
                f"{path}: scenario {number} is not usable ({error!r}); fetch the file again"
            ) from None
    return cases


def found_tools(result: dict) -> list[str]:
    """Names of the APIs in the result of a search, which may be one description, several or none."""
    output = result.get("output") or []
    return [tool["name"] for tool in (output if isinstance(output, list) else [output])]


def read_apis(folder: Path) -> dict[str, dict]:
    """Every API class of a folder by name: description, input_parameters, output_parameters, required.

    Only literals are read, so nothing of the checkout runs. required: parameters of `call` without a default;
    with **kwargs the others of the schema may be left out. Raises EvalError.
    """
    apis = {}
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
            found = {node.name: read_class(node) for node in classes}
        except (OSError, SyntaxError, ValueError, RecursionError) as error:
            raise EvalError(f"{path}: its API cannot be read ({error}); fetch the checkout again") from None
        apis |= {name: api for name, api in found.items() if api}
    if not apis:
        raise EvalError(f"{folder}: holds no API classes; complete the checkout")
    return apis


def read_class(node: ast.ClassDef) -> dict | None:
    """One API class; None for a class that describes none. Raises ValueError for values that are no
    literals.
    """
    values, signature = {}, None
    for item in node.body:
        targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and target.id in (
                "description",
                "input_parameters",
                "output_parameters",
            ):
                values[target.id] = literal(item.value)
        if isinstance(item, ast.FunctionDef) and item.name == "call":
            signature = item.args
    if "input_parameters" not in values:
        return None
    if "description" not in values or signature is None:
        raise ValueError(f"class {node.name} has no description or no method call")
    for key, parameter in values["input_parameters"].items():
        if parameter["type"] not in JSON_TYPES:
            raise ValueError(f"class {node.name}: parameter {key} has the unknown type {parameter['type']!r}")
    given = [*signature.posonlyargs, *signature.args]
    needed = given[1 : len(given) - len(signature.defaults)]  # the first one is self
    needed += [a for a, default in zip(signature.kwonlyargs, signature.kw_defaults) if default is None]
    names = {a.arg for a in needed}
    return {
        "name": node.name,
        **values,
        "required": [key for key in values["input_parameters"] if key in names],
    }


def literal(node: ast.expr | None) -> Any:
    """The value of an expression of constants; texts may be joined with +. Raises ValueError for anything
    else.
    """
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return str(literal(node.left)) + str(literal(node.right))
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {literal(key): literal(value) for key, value in zip(node.keys, node.values)}
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"line {getattr(node, 'lineno', '?')}: not a literal") from None


# --------------------------------------------------------------------------------------------- the hub's file


def native(written: dict[str, str], api: dict) -> dict[str, Any]:
    """Arguments that are all texts with the JSON types of their schema; what does not fit stays as it is."""
    kinds = {key: parameter["type"] for key, parameter in api["input_parameters"].items()}
    typed = dict(written)
    for key, text in written.items():
        if isinstance(text, str) and kinds.get(key, "str") not in ("str", "float"):
            try:
                typed[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                pass
    return typed


def load_hub(path: Path) -> dict[str, GoldCall]:
    """The hub's level-1 calls: a data set of its own, because 10 of its 399 items are repeats. Raises
    EvalError.
    """
    items, cases = read_json(path), {}
    for number, item in enumerate(items if isinstance(items, list) else [None]):
        case_id = f"hub-level-1#{number}"
        try:
            apis = {tool["name"]: hub_api(tool) for tool in item["tools"]}
            (answer,) = item["answers"]
            if answer["name"] not in apis or SEARCHER in apis:
                raise EvalError(
                    f"{path}: item {number} is not of level 1; --data takes the hub's level-1 file alone"
                )
            gold = ToolCall(answer["name"], native(answer["arguments"], apis[answer["name"]]))
            why = rejection(gold, apis[gold.name])
            history = hub_history(item["query"], apis)
            cases[case_id] = GoldCall(case_id, 1, gold, answer["arguments"], apis, list(apis), history, why)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, EvalError):
                raise
            raise EvalError(
                f"{path}: item {number} has not the keys query, tools and answers ({error!r})"
            ) from None
    return cases


def hub_api(tool: dict) -> dict:
    """An API description of the hub's file in the official form."""
    inputs = tool["parameters"]
    required = [key for key in inputs if key not in OPTIONAL.get(tool["name"], ())]
    return {
        "name": tool["name"],
        "description": tool["description"],
        "input_parameters": inputs,
        "required": required,
    }


def hub_history(query: list[dict], apis: dict[str, dict]) -> list[dict]:
    """The turns of an item in the official form; past calls are texts there, and so are their results."""
    history: list[dict] = []
    for message in query:
        role, text = message["role"], message["content"]
        if role in ("user", "agent"):
            # The last turn carries a request of the hub's own prompt.
            text = text.removesuffix("Generate API Request:").removesuffix("\n")
            history.append({"role": {"user": "User", "agent": "AI"}[role], "text": text})
        elif role == "assistant":
            (past,) = json.loads(text.strip("`"))
            name, written = past["name"], past["arguments"]
            inputs = native(written, apis[name]) if name in apis else written
            history.append(
                {"role": "API", "api_name": name, "param_dict": written, "result": {"input": inputs}}
            )
        else:
            try:
                output = ast.literal_eval(text.removesuffix("Generate API Request:").strip())
            except (ValueError, SyntaxError):
                output = text.removesuffix("Generate API Request:").removesuffix("\n")
            history[-1]["result"] |= {"output": output, "exception": None}
    return history
