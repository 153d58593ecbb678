"""API-Bank, call mode: generate -> predictions.jsonl (needs a GPU), then score (needs neither GPU nor torch).

    python eval_apibank.py generate --model M --data DIR --out DIR
    python eval_apibank.py score --predictions DIR/predictions.jsonl --data DIR --out DIR

A case is one gold call and the dialogue before it. The official scorer runs the predicted call on a toy database; the
table COMPARED_AS says the same without running it. Sources: API-Bank (arXiv 2304.08244), ToolRL (arXiv 2504.13958).
"""

from __future__ import annotations

import argparse
import ast
import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from operator import eq
from pathlib import Path
from typing import Any

from prompts import CALL, END_CALL, PromptError, ToolCall, load_template

Comparison = Callable[[Any, Any], bool]  # (predicted value, gold value) -> do they count as the same?
LEVELS = ("1", "2", "3")
JSON_TYPES = {
    "str": {"type": "string"}, "int": {"type": "integer"}, "float": {"type": "number"}, "bool": {"type": "boolean"},
    "list": {"type": "array"}, "list(str)": {"type": "array", "items": {"type": "string"}},
}  # fmt: skip
MODES = ("official", "corrected", "exact", "loose")  # see `check`
PAPER = {"Tool-N1-14B": 82.19, "Tool-N1-7B": 81.28, "GPT-4o": 77.16, "GPT-4o-mini": 73.10, "Llama-3.1-8B": 60.41}
PAPER_NOTE = "The paper (arXiv 2505.00024) does not state its denominator: compare with its figures in outline only."


class EvalError(ValueError):
    """Unusable input of the user's; the message names the file or option and what to do."""


@dataclass(frozen=True)
class GoldCall:
    """One case. `written`: the gold arguments as strings; `apis`: all of the level by name; `shown`: to the model."""

    id: str
    level: int
    gold: ToolCall
    written: dict[str, Any]
    apis: dict[str, dict]
    shown: list[str]
    history: list[dict]
    official_accepts_gold: bool


def after(normalise: Callable[[str], Any], same: Comparison = eq) -> Comparison:
    """Compares two texts after `normalise`. What is no text or cannot be normalised (ValueError) differs."""

    def compare_texts(predicted: Any, gold: Any) -> bool:
        try:
            return isinstance(predicted, str) and isinstance(gold, str) and same(normalise(predicted), normalise(gold))
        except ValueError:
            return False

    return compare_texts


def share_words(ours: str, theirs: str) -> bool:
    """More than half of all words (split at single spaces) that occur in either text occur in both."""
    left, right = set(ours.split(" ")), set(theirs.split(" "))
    return len(left & right) > 0.5 * len(left | right)


def month_and_day(text: str) -> tuple[int, int]:
    """Of MM-DD or YYYY-MM-DD. A leap year stands in where none is given, or 02-29 would not exist."""
    return datetime.strptime(text if text.count("-") == 2 else f"2000-{text}", "%Y-%m-%d").timetuple()[1:3]


def named_items(predicted: Any, gold: Any) -> bool:
    """A non-empty list of {"name", "value"} objects with different names. The official API looks no further."""
    items = predicted if isinstance(predicted, list) else []
    names = [item["name"] for item in items if isinstance(item, dict) and {"name", "value"} <= item.keys()]
    return 0 < len(items) == len(names) and all(isinstance(n, str) for n in names) and len(set(names)) == len(names)


# What the APIs do with their input before they look into their databases. Parameters not listed here: equal values.
COMPARED_AS: dict[Comparison, str] = {
    # more than half of the words in common
    after(str, share_words): "AddAgenda.content AddMeeting.meeting_topic ModifyMeeting.meeting_topic "
    "QueryMeeting.meeting_topic",
    after(str.lower, share_words): "AddReminder.content ModifyReminder.content QueryReminder.content",
    # not compared, or hardly
    lambda predicted, gold: True: "DeleteAgenda.location",
    after(str.strip, lambda ours, theirs: ours != ""): "DeleteReminder.content EmailReminder.content",
    named_items: "RecordHealthData.health_data",
    # equal but for spaces or letter case
    after(str.strip): "AppointmentRegistration.patient_name AppointmentRegistration.doctor_name "
    "ModifyRegistration.appointment_id ModifyRegistration.new_appointment_doctor QueryRegistration.patient_name "
    "CancelRegistration.appointment_id DocumentQA.url DocumentQA.question SendEmail.subject SendEmail.content",
    after(str.lower): "Translate.src_lang Translate.tgt_lang",
    after(lambda text: text.strip().lower()): "DeleteScene.name QueryScene.name TimedSwitch.name "
    "CancelTimedSwitch.name EmergencyKnowledge.symptom SymptomSearch.symptom SendEmail.receiver "
    "PlayMusic.music_name SearchEngine.keyword",
    after(lambda text: text.strip().upper()): "QueryHealthData.user_id RecordHealthData.user_id QueryStock.stock_code",
    after(lambda text: text.replace(" ", "")): "Calculator.formula",
    after(lambda text: text.replace("_", " ").strip().lower()): "Dictionary.keyword Wiki.keyword",
    # equal points in time; strptime takes unpadded months and days, but no slashes, no ISO T, no date alone
    after(lambda text: datetime.strptime(text.strip(), "%Y-%m-%d")): "AppointmentRegistration.date QueryStock.date "
    "ModifyRegistration.new_appointment_date QueryRegistration.date",
    after(lambda text: datetime.strptime(text.strip(), "%Y-%m-%d %H:%M:%S")): "QueryHealthData.start_time "
    "QueryHealthData.end_time RecordHealthData.time TimedSwitch.time CancelTimedSwitch.time",
    after(lambda text: month_and_day(text.strip())): "QueryHistoryToday.date",
}
COMPARISONS = {parameter: same for same, parameters in COMPARED_AS.items() for parameter in parameters.split()}

# These golds name the device `device_id`, but the schema that the model is shown says `name`: officially such a gold is
# rejected, and so is every answer. The other modes take either name.
RENAMED = {"TimedSwitch": {"device_id": "name"}, "CancelTimedSwitch": {"device_id": "name"}}


def coerce(value: Any, kind: str) -> Any:
    """A value as the official tool manager hands it on; ValueError, TypeError or OverflowError if it refuses."""
    if kind in ("int", "float"):  # strings must consist of digits (and one point, for a float): no "-3", no " 3"
        if isinstance(value, str) and not value.replace(".", "", kind == "float").isdigit():
            raise ValueError("not an unsigned number")
        return int(value) if kind == "int" else float(value)
    if kind == "bool":
        # Officially `value == "True"`; but there all golds with a truth value are rejected, so only other modes differ.
        return {"True": True, "False": False}.get(value, value) if isinstance(value, str) else value
    return value


def call_block(output: Any) -> str | None:
    """The text of the first closed tool-call section, in linear time however many tags there are; None without one."""
    inside, closed, _ = output.partition(CALL)[2].partition(END_CALL) if isinstance(output, str) else ("", "", "")
    return inside.strip() if closed else None


def json_items(text: str) -> list | None:
    """A JSON list, or another JSON value as a list of one; None for what is unreadable."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else [value]


def read_call(output: Any) -> tuple[ToolCall | None, str]:
    """The one call of a reply -> (call, "") or (None, reason). Laxer than the reward: thoughts are not looked at."""
    block = call_block(output)
    items = json_items(block) if block is not None else None
    if items is None:
        return None, "no_tool_call" if block is None else "bad_json"
    if len(items) != 1:
        return None, "not_one_call"
    name, arguments = (items[0].get(key) if isinstance(items[0], dict) else None for key in ("name", "arguments"))
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None, "bad_call"
    return ToolCall(name, arguments), ""


def compare(call: ToolCall, case: GoldCall, comparisons: dict[str, Comparison]) -> str:
    """Says "correct", or the first reason why `call` is not the gold call of `case`."""
    if call.name != case.gold.name:
        return "wrong_name"
    api, renamed = case.apis[call.name], RENAMED.get(call.name, {})
    kinds = {key: parameter["type"] for key, parameter in api["input_parameters"].items()}
    predicted = {renamed.get(key, key): value for key, value in call.arguments.items()}
    gold = {renamed.get(key, key): value for key, value in case.gold.arguments.items()}
    if not predicted.keys() <= kinds.keys() or len(predicted) < len(call.arguments):
        return "unknown_argument"
    if not set(api["required"]) <= predicted.keys():
        return "missing_argument"
    try:
        predicted = {key: coerce(value, kinds[key]) for key, value in predicted.items()}
    except (ValueError, TypeError, OverflowError):
        return "wrong_type"
    try:
        gold = {key: coerce(value, kinds[key]) for key, value in gold.items()}
    except (ValueError, TypeError, OverflowError):
        pass  # a gold value that the official code refuses is compared as it stands
    for key in sorted(predicted.keys() | gold.keys()):
        ours, theirs = predicted.get(key), gold.get(key)
        both_blank = key not in api["required"] and ours in (None, "") and theirs in (None, "")
        if not both_blank and not comparisons.get(f"{call.name}.{key}", eq)(ours, theirs):
            return f"wrong_value:{key}"
    return "correct"


def compare_loosely(case: GoldCall, output: Any) -> str:
    """ToolRL's protocol: any of several calls, a missing name filled in, but values equal to the gold's strings."""
    block = call_block(output) or ""  # one JSON value, or one object per line
    items = [item for text in (block, *block.splitlines()) for item in json_items(text) or []]
    for call in (item for item in items if isinstance(item, dict)):
        arguments = call.get("arguments", call.get("parameters"))  # ToolRL's own prompt says "parameters"
        if call.get("name", case.gold.name) == case.gold.name and arguments == case.written:
            return "correct"
    return "no_call_equals_gold"


def check(case: GoldCall, output: Any, mode: str = "official") -> tuple[bool, str]:
    """Judges one reply -> (correct, reason). Nothing in `output` can raise.

    mode: "official" as the official tools judge, which accept no answer where they reject the gold call itself;
    "corrected" the same without that gate; "exact" equal values after type coercion; "loose" see compare_loosely.
    reason: correct, no_tool_call, bad_json, not_one_call, bad_call, wrong_name, unknown_argument, missing_argument,
    wrong_type, wrong_value:<parameter>, official_rejects_gold, and for loose no_call_equals_gold.
    Source: api-bank/evaluator.py, tool_manager.py and the APIs at 483554ea, without execution.
    """
    call, reason = read_call(output)
    if mode == "loose":
        reason = compare_loosely(case, output)
    elif call:
        reason = compare(call, case, {} if mode == "exact" else COMPARISONS)
    if reason == "correct" and mode == "official" and not case.official_accepts_gold:
        reason = "official_rejects_gold"
    return reason == "correct", reason


def read(path: Path, todo: str, may_be_cut: bool = False) -> Any:
    """The value of a .json file or the rows of a .jsonl file (row i is line i + 1), plain or .gz. Raises EvalError.

    todo: the message's advice. may_be_cut: a last line that a killed run left half-written is dropped with a warning.
    """
    if not path.parent.is_dir():
        raise EvalError(f"{path.parent}: no such folder; {todo}")
    found = path if path.is_file() else path.with_name(f"{path.name}.gz")
    try:
        raw = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise EvalError(f"{path}: {what}; {todo}") from None
    lines, rows = raw.splitlines() if ".jsonl" in path.name else [raw], []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            if not may_be_cut or number < len(lines):
                raise EvalError(f"{path}:{number}: not JSON: {line[:60]!r}; remove or repair this line") from None
            print(f"warning: {path}:{number}: the last line is half-written and was left out", file=sys.stderr)
    return rows if ".jsonl" in path.name else rows[0]


def load_cases(data_dir: str | Path) -> dict[str, GoldCall]:
    """Every case by id. Raises EvalError. A reader of another layout than cases.jsonl would return the same."""
    todo, cases = "--data must name the folder with the API-Bank cases", {}
    groups, path = read(Path(data_dir) / "api_descriptions.json", todo), Path(data_dir) / "cases.jsonl"
    apis = {group: {api["name"]: api for api in groups[group]} for group in ("level1_2", "level3")}
    for number, row in enumerate(read(path, todo), 1):
        try:
            cases[row["id"]] = GoldCall(
                row["id"], row["level"], ToolCall(row["api_name"], row["arguments"]),
                row.get("arguments_as_written", row["arguments"]), apis["level3" if row["level"] == 3 else "level1_2"],
                row.get("tools", []), row.get("history", []), row["official_accepts_gold"],
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise EvalError(f"{path}:{number}: no case ({error}); fetch the file again") from None
    return cases


def tool_schema(api: dict) -> dict:
    """An API description as {"name", "description", "parameters"} with a JSON schema."""
    inputs = api["input_parameters"].items()
    properties = {key: {**JSON_TYPES[value["type"]], "description": value["description"]} for key, value in inputs}
    parameters = {"type": "object", "properties": properties, "required": api["required"]}
    return {"name": api["name"], "description": api["description"], "parameters": parameters}


def to_messages(history: list[dict]) -> list[dict]:
    """The dialogue before the gold call as messages of prompts.build_messages."""
    messages = []
    for turn in history:
        if turn["role"] == "API":
            # `input` has JSON types, where `param_dict` has strings only; it is null for an API without parameters.
            past, error = ToolCall(turn["api_name"], turn["result"]["input"] or {}), turn["result"]["exception"]
            answer = json.dumps({"exception": error} if error else turn["result"]["output"], ensure_ascii=False)
            messages += [{"role": "assistant", "content": "", "calls": [past]}, {"role": "tool", "content": answer}]
        else:
            messages.append({"role": {"User": "user", "AI": "assistant"}[turn["role"]], "content": turn["text"]})
    return messages


def with_dialogue(case: GoldCall, prompts: list[dict]) -> GoldCall:
    """A level-3 case with the history and APIs of its prompt, which is text, in ToolRL's file."""
    item = prompts[int(case.id.partition("#")[2])]
    shown = [name for name in re.findall(r"^\d+\. (\w+): ", item["system"], re.MULTILINE) if name in case.apis]
    turn = re.compile(r"<user>(.*?)</user>|<tool_call>.*?</tool_call>\s*<obs>(.*?)</obs>", re.DOTALL)
    history = []
    for user, seen in turn.findall(item["user"]):
        result = ast.literal_eval(seen.strip()) if seen else {}
        called = {"role": "API", "api_name": result.get("api_name"), "result": result}
        history.append(called if seen else {"role": "User", "text": user.strip()})
    return replace(case, shown=shown, history=history)


def generate(args: argparse.Namespace) -> None:
    """Appends greedy replies to OUT/predictions.jsonl; cases that it holds already are skipped. Raises EvalError."""
    template, cases, chosen = load_template(args.prompt_template), load_cases(args.data).values(), []
    for level in sorted(set(args.levels.replace(" ", "").split(","))):
        if level not in LEVELS:
            raise EvalError(f"--levels: unknown level {level!r}; choose among {','.join(LEVELS)}")
        of_level = [case for case in cases if str(case.level) == level][: args.limit]
        if level == "3":
            todo = "it holds the dialogues of level 3; add it or choose --levels 1,2"
            prompts = read(args.data / "toolrl_level-3-api_processed.json", todo)
            of_level = [with_dialogue(case, prompts) for case in of_level]
        chosen += of_level
    from model import ModelError  # here, so that `score` runs without torch
    from rollout import Case, write_predictions

    ready = [
        Case(case.id, f"level-{case.level}", to_messages(case.history), [tool_schema(case.apis[n]) for n in case.shown])
        for case in chosen
    ]
    try:
        write_predictions(
            args.model, ready, args.out / "predictions.jsonl", template=template,
            max_prompt_tokens=args.max_prompt_tokens, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size,
        )  # fmt: skip
    except ModelError as error:
        raise EvalError(str(error)) from None


def score_predictions(rows: list[dict], data_dir: str | Path, source: str = "row") -> tuple[list[dict], dict]:
    """Judges rows {"id", "output"}; several may share an id. -> (verdicts, scores).

    verdicts: per row, in order: id, level, correct and reason (official mode), and true or false per other mode.
    scores: per level and for "all": n (rows), cases (different ids), of (cases in the data), and per mode the correct
    rows in percent of n and as a number. Raises EvalError for unusable data or an unknown id, as `source`:number.
    """
    cases, verdicts, scores = load_cases(data_dir), [], {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("id", "output")):
            raise EvalError(f"{source}:{number}: not an object with the strings id and output; remove or repair it")
        case = cases.get(row["id"])
        if case is None:
            raise EvalError(f"{source}:{number}: unknown id {row['id'][:80]!r}; pass the --data it was made from")
        correct, reason = check(case, row["output"])
        others = {mode: check(case, row["output"], mode)[0] for mode in MODES[1:]}
        verdicts.append({"id": case.id, "level": case.level, "correct": correct, "reason": reason, **others})
    for name in (*LEVELS, "all"):
        own = [v for v in verdicts if name in (str(v["level"]), "all")]
        of = sum(name in (str(case.level), "all") for case in cases.values())
        line = {"n": len(own), "cases": len({v["id"] for v in own}), "of": of}
        for mode in MODES:
            right = sum(v["correct" if mode == "official" else mode] for v in own)
            line |= {mode: round(100 * right / len(own), 2) if own else None, f"{mode}_correct": right}
        scores["all" if name == "all" else f"level-{name}"] = line
    return verdicts, scores


def score(args: argparse.Namespace) -> None:
    """Writes verdicts.jsonl, scores.json and scores.csv to OUT and prints the table. Raises EvalError."""
    rows = read(args.predictions, "write the predictions with `generate` first", may_be_cut=True)
    if not rows:
        raise EvalError(f"{args.predictions}: is empty; write the predictions with `generate` first")
    verdicts, scores = score_predictions(rows, args.data, str(args.predictions))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "verdicts.jsonl").write_text("".join(json.dumps(verdict) + "\n" for verdict in verdicts))
    (args.out / "scores.json").write_text(json.dumps({"scores": scores, "paper": PAPER, "note": PAPER_NOTE}, indent=2))
    with (args.out / "scores.csv").open("w", newline="") as file:
        csv.writer(file).writerow(["level", *scores["all"]])
        csv.writer(file).writerows([name, *line.values()] for name, line in scores.items())
    print(f"{'':8}{'n':>7}{'cases':>10}" + "".join(f"{mode + ' %':>13}" for mode in MODES))
    for name, line in scores.items():
        cells = "".join(f"{'-' if line[mode] is None else format(line[mode], '.2f'):>13}" for mode in MODES)
        print(f"{name:8}{line['n']:>7}{line['cases']:>6}/{line['of']:<3}{cells}")
    print("paper: " + ", ".join(f"{name} {figure:.2f}" for name, figure in PAPER.items()) + f"\n{PAPER_NOTE}")


def main(argv: list[str]) -> int:
    """The command line. Returns the exit code: 2, with one sentence on stderr, for what the user must put right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    generating = commands.add_parser("generate", help="write OUT/predictions.jsonl with a model")
    generating.add_argument("--model", required=True, help="folder or hub id")
    generating.add_argument("--levels", default=",".join(LEVELS))
    generating.add_argument("--limit", type=int, help="only the first LIMIT cases of each level")
    generating.add_argument("--max_new_tokens", type=int, default=1024)
    generating.add_argument("--max_prompt_tokens", type=int, default=8192, help="longer prompts get an empty reply")
    generating.add_argument("--batch_size", type=int, default=32)
    generating.add_argument("--prompt_template", default="", help="file with a {tools} slot; default: our own")
    scoring = commands.add_parser("score", help="judge predictions; needs no GPU")
    scoring.add_argument("--predictions", type=Path, required=True, help=".jsonl or .jsonl.gz")
    for command in (generating, scoring):
        command.add_argument("--data", type=Path, required=True, help="folder with cases.jsonl.gz")
        command.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        {"generate": generate, "score": score}[args.command](args)
    except (EvalError, PromptError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
