"""Single records -> single-step examples: the readers of every layout, what they refuse and why, and the rows they write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prompts import ToolCall, build_messages, strict_json
from schema import missing_arguments, wrong_types
from toolace import ROLES, find_tools, is_call_turn, is_named, is_text_step, parse_toolace_calls, role_of


@dataclass(frozen=True)
class Example:
    """One step to learn: the conversation so far, the tools, and the calls that are right now."""

    id: str
    source: str  # "xlam", "toolace", "synthetic", ...
    messages: list[dict]  # role (user, assistant, tool, system), content, and `calls` (list[ToolCall]) for past calls
    tools: list[dict]  # {"name", "description", "parameters"} as the record gives them
    answer: list[ToolCall]  # ground truth; [] = no call is right
    demonstrations: tuple[str, ...] = ()  # replies to imitate (sft.py), may be empty


@dataclass(frozen=True)
class Dropped:
    """A record or step left out. `line`: the line of a JSONL file, in a JSON array the record's position from 1."""

    source: str
    id: str
    line: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Rules:
    """How records are judged. keep: reasons, of KEEPABLE, for which nothing is dropped. no_call_turns: a turn of ToolACE
    that is plain text becomes an example, too, whose answer is [] (toolace.is_text_step says which)."""

    keep: tuple[str, ...] = ()
    no_call_turns: bool = False


STRICT = Rules()
KEEPABLE = ("missing_argument", "wrong_type", "contradiction")


class Unusable(Exception):
    """(reason, detail): the record or step at hand cannot become an example."""


# ------------------------------------------------------------------------------------------ records -> examples


def _require(record: dict, **types: Any) -> None:
    if bad := [field for field, wanted in types.items() if not isinstance(record.get(field), wanted)]:
        raise Unusable("missing_field", f"missing or of the wrong type: {', '.join(bad)}; found: {', '.join(record)}")


def _decode(value: Any, field: str) -> Any:
    """The JSON in a string field; a value that was never encoded stays as it is."""
    try:
        return strict_json(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise Unusable("broken_json", f"{field} is not JSON: {error}") from None


def _check_tools(tools: Any) -> list[dict]:
    if not tools or not is_named(tools):
        raise Unusable("no_tools", f"not a list of tools with names: {str(tools)[:80]}")
    return tools


def _check_calls(calls: Any, tools: list[dict]) -> list[ToolCall]:
    """JSON [{"name", "arguments"}, ...] -> calls, all of them of listed tools."""
    if not is_named(calls) or not all(isinstance(call.get("arguments"), dict) for call in calls):
        raise Unusable("bad_answer", f"not a list of name and arguments: {str(calls)[:80]}")
    if unknown := {call["name"] for call in calls} - {tool["name"] for tool in tools}:
        raise Unusable("unknown_tool", f"not among the tools: {', '.join(sorted(unknown))}")
    return [ToolCall(call["name"], call["arguments"]) for call in calls]


def _check_arguments(calls: list[ToolCall], tools: list[dict], rules: Rules) -> None:
    """Raises where a call contradicts the declaration of its tool; of tools with one name, it need fit one only."""
    for call in calls:
        found = [_complaint(call, tool, rules) for tool in tools if tool["name"] == call.name]
        if all(found):
            raise Unusable(*found[0])


def _complaint(call: ToolCall, tool: dict, rules: Rules) -> tuple[str, str] | None:
    if "missing_argument" not in rules.keep and (names := missing_arguments(call.arguments, tool)):
        return "missing_argument", f"{call.name} needs {', '.join(names)}"
    if "wrong_type" not in rules.keep and (wrong := wrong_types(call.arguments, tool)):
        return "wrong_type", f"{call.name}: {'; '.join(wrong)}"
    return None


def _from_xlam(record: dict, rid: str, line: int, rules: Rules) -> Iterator[Example | Dropped]:
    _require(record, id=(int, str), query=str, tools=(str, list), answers=(str, list))
    tools = _check_tools(_decode(record["tools"], "tools"))
    answer = _check_calls(_decode(record["answers"], "answers"), tools)
    _check_arguments(answer, tools, rules)
    yield Example(rid, "xlam", [{"role": "user", "content": record["query"]}], tools, answer)


def _calls_of_turn(text: str, tools: list[dict]) -> list[ToolCall]:
    """The calls of a call turn, in ToolACE's notation or, as re-packed files have it, in JSON."""
    # With any_name, because a call of an unknown tool deserves its own reason.
    calls = parse_toolace_calls(text, [tool["name"] for tool in tools], any_name=True)
    try:
        value = strict_json(text) if calls is None else [_plain(call) for call in calls]
        if value:  # an empty list is a failed conversion in the known files, not a refusal
            return _check_calls(value if isinstance(value, list) else [value], tools)
    except (ValueError, RecursionError):
        pass
    except Unusable as error:
        if error.args[0] == "unknown_tool":
            raise
    raise Unusable("unparsable_calls", f"cannot read the calls: {text[:80]!r}")


def _from_toolace(record: dict, rid: str, line: int, rules: Rules) -> Iterator[Example | Dropped]:
    """One example per call turn: all before it is context. The system text is left out, because it asks for ToolACE's
    own notation, and our prompt lists the tools already."""
    _require(record, conversations=list)
    messages, stepless, turns = [], True, record["conversations"]
    sources = [record.get(field, "") for field in ("tools", "system")]
    tools = find_tools("\n".join(source if isinstance(source, str) else json.dumps(source) for source in sources))
    if tools is None:
        raise Unusable("no_tools", "no JSON list of tools in `tools` or `system`")
    names = [tool["name"] for tool in tools]
    for index, turn in enumerate(turns):
        if (role := role_of(turn)) is None:
            raise Unusable("bad_turn", f"turn {index} has an unknown role or no text: {str(turn)[:80]}")
        message = {"role": role, "content": turn["value"]}
        if is_call_turn(turn):
            stepless = False
            try:
                calls = _calls_of_turn(turn["value"], tools)
                message = {"role": "assistant", "content": "", "calls": calls}
                _check_arguments(calls, tools, rules)  # calls that fail this are context all the same
                yield Example(f"{rid}#{index}", "toolace", list(messages), tools, calls)
            except Unusable as error:  # only this step: later ones keep calls that cannot be read as plain text
                yield Dropped("toolace", f"{rid}#{index}", line, *error.args)
        elif rules.no_call_turns and role == "assistant":
            stepless = False
            if is_text_step(turns, index, names):
                yield Example(f"{rid}#{index}", "toolace", list(messages), tools, [])
            else:
                detail = f"the text does not show that no call was right: {turn['value'][:80]!r}"
                yield Dropped("toolace", f"{rid}#{index}", line, "unclear_turn", detail)
        messages.append(message)
    if stepless:
        raise Unusable("no_calls", "no turn of the conversation is a call")


def _from_ours(record: dict, rid: str, line: int, rules: Rules) -> Iterator[Example | Dropped]:
    _require(record, id=str, source=str, messages=list, tools=list, answer=list)
    tools = record["tools"] and _check_tools(record["tools"])
    messages = []
    for message in record["messages"]:
        if not isinstance(message, dict) or message.get("role") not in ROLES.values():
            raise Unusable("bad_turn", f"unknown role: {str(message)[:80]}")
        if not isinstance(message.get("content", ""), str):
            raise Unusable("bad_turn", f"content is not a text: {str(message)[:80]}")
        # Past calls may name tools that are no longer listed; only the answer must not.
        past = message.get("calls") and {"calls": _check_calls(message["calls"], message["calls"])}
        messages.append(message | (past or {}))
    demonstrations = record.get("demonstrations") or []
    if not isinstance(demonstrations, list) or not all(isinstance(text, str) for text in demonstrations):
        raise Unusable("missing_field", "demonstrations must be a list of texts")
    yield Example(rid, record["source"], messages, tools, _check_calls(record["answer"], tools), tuple(demonstrations))


def _from_trl(record: dict, rid: str, line: int, rules: Rules) -> Iterator[Example | Dropped]:
    """A row of prepare.trl_row or, its columns gathered by _from_verl, of verl_row."""
    encoded = ("messages_json", "tools_json", "demonstrations_json", "ground_truth")
    if not all(isinstance(record.get(field), str) for field in ("id", "source", *encoded)):
        wanted = "no messages_json and tools_json beside the prompt, so its conversation and tools cannot be told apart"
        raise Unusable("foreign_row", f"the row was not written by `data.py prepare --layouts`: {wanted}")
    fields = {field.removesuffix("_json"): _decode(record[field], field) for field in encoded}
    yield from _from_ours(record | fields | {"answer": fields["ground_truth"]}, rid, line, rules)


def _from_verl(record: dict, rid: str, line: int, rules: Rules) -> Iterator[Example | Dropped]:
    extra, reward = record.get("extra_info"), record["reward_model"]
    gathered = dict(extra) if isinstance(extra, dict) else {}
    gathered |= {"ground_truth": reward.get("ground_truth") if isinstance(reward, dict) else None}
    yield from _from_trl(gathered, rid, line, rules)


LAYOUTS = {  # keys that tell a layout, and its reader
    "xlam": ({"query", "tools", "answers"}, _from_xlam),
    "toolace": ({"conversations"}, _from_toolace),
    "examples": ({"messages", "answer"}, _from_ours),
    "trl": ({"prompt", "ground_truth"}, _from_trl),
    "verl": ({"prompt", "reward_model"}, _from_verl),
}


# ------------------------------------------------------------------------------------------ examples -> rows


def _plain(call: Any) -> dict:
    """A call as JSON has it; the encoders below ask for it when they meet one."""
    if not isinstance(call, ToolCall):
        raise TypeError(f"{type(call).__name__} is not JSON")
    return {"name": call.name, "arguments": call.arguments}


# What was read from JSON holds no cycles, and looking for them costs a seventh of the time.
_ENCODER = json.JSONEncoder(default=_plain, check_circular=False)
_CANONICAL = json.JSONEncoder(default=_plain, check_circular=False, sort_keys=True, ensure_ascii=False, allow_nan=False)


def to_json(value: Any) -> str:
    """JSON of anything in an example, calls as {"name", "arguments"}."""
    return _ENCODER.encode(value)


def example_row(example: Example) -> dict:
    """An example in our own layout, which keeps everything as it is."""
    return {
        "id": example.id, "source": example.source, "messages": example.messages, "tools": example.tools,
        "answer": example.answer, "demonstrations": example.demonstrations,
    }  # fmt: skip


def trl_row(example: Example, template: str) -> dict:
    """A row for TRL's GRPOTrainer: a conversational `prompt` with our system prompt, and columns for reward functions.

    What the row was made from stands in JSON strings. Not in columns `tools` or `messages`: TRL hands the first to the
    chat template, which would print the tools a second time, and takes the second for the conversation itself.
    """
    return {
        "prompt": build_messages(example.messages, example.tools, template),
        "ground_truth": to_json(example.answer),
        "id": example.id,
        "source": example.source,
        "messages_json": to_json(example.messages),
        "tools_json": to_json(example.tools),
        "demonstrations_json": to_json(example.demonstrations),
    }


def verl_row(example: Example, template: str, split: str, index: int) -> dict:
    """A row for verl. Strings rather than nested columns: Parquet has one type per column and would make 1 of a 1.0."""
    row = trl_row(example, template)
    return {
        "data_source": example.source,
        "prompt": row.pop("prompt"),
        "ability": "tool_call",
        "reward_model": {"style": "rule", "ground_truth": row.pop("ground_truth")},
        "extra_info": {"split": split, "index": index} | row,
    }


def hashes_of(example: Example) -> tuple[bytes, bytes]:
    """Hashes of the prompt and of the answer, whose calls may stand in any order. Also the last check of an example:
    all of it must be JSON, and text that a tokenizer takes."""
    try:
        prompt = _CANONICAL.encode([example.messages, example.tools]).encode()
        answer = "\n".join(sorted(_CANONICAL.encode(call) for call in example.answer)).encode()
        "".join((example.id, example.source, *example.demonstrations)).encode()
    except UnicodeEncodeError as error:
        raise Unusable("bad_text", f"half a surrogate pair, which no tokenizer takes: {error.reason}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise Unusable("broken_json", f"not JSON: {error}") from None
    return hashlib.blake2b(prompt, digest_size=16).digest(), hashlib.blake2b(answer, digest_size=16).digest()
