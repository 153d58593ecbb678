"""What is refused, and why: the checks that every layout's records go through."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from corpus import schema
from corpus.examples import Example, Unusable
from prompts import ToolCall

# Reasons that Rules.keep may name.
KEEPABLE = (
    "missing_argument", "undeclared_argument", "wrong_type", "not_in_enum", "contradiction", "near_duplicate"
)

BESIDE = 80  # characters around a tool's name in which brackets, "=" or "parameter:" mean arguments
MENTIONS = 1000  # of a tool in one text that are looked at


@dataclass(frozen=True)
class Rules:
    """How records are judged."""

    keep: tuple[str, ...] = ()  # reasons, of KEEPABLE, for which nothing is dropped
    no_call_turns: bool = False  # text turns of dialogues become examples with answer []


STRICT = Rules()


def _read(reader: Callable, reason: str, *arguments: Any) -> Any:
    try:
        return reader(*arguments)
    except schema.NotJSON as error:
        raise Unusable("broken_json", str(error)) from None
    except ValueError as error:
        raise Unusable(reason, str(error)) from None


def decode(value: Any, field: str) -> Any:
    """The JSON in a string field; a value that was never encoded stays as it is. Raises Unusable."""
    return _read(schema.decoded, "broken_json", value, field)


def check_tools(value: Any) -> list[dict]:
    """The tools of a field, at least one. Raises Unusable."""
    if tools := _read(schema.read_tools, "no_tools", value):
        return tools
    raise Unusable("no_tools", "the list of tools is empty")


def check_calls(value: Any, tools: list[dict]) -> list[ToolCall]:
    """The calls of a field, all of them of listed tools. Raises Unusable."""
    calls = _read(schema.read_calls, "bad_answer", value)
    check_names(calls, tools)
    return calls


def check_names(calls: list[ToolCall], tools: list[dict]) -> None:
    """Raises where a call is of no listed tool."""
    if unknown := {call.name for call in calls} - {tool["name"] for tool in tools}:
        raise Unusable("unknown_tool", f"not among the tools: {', '.join(sorted(unknown))}")


def check_arguments(calls: list[ToolCall], tools: list[dict], rules: Rules) -> None:
    """Raises where a call contradicts its tool's declaration; of tools with one name it need fit only one."""
    for call in calls:
        found = [_complaint(call, tool, rules) for tool in tools if tool["name"] == call.name]
        if all(found):
            raise Unusable(*found[0])


def _complaint(call: ToolCall, tool: dict, rules: Rules) -> tuple[str, str] | None:
    found = {
        "missing_argument": [name for name in schema.required(tool) if name not in call.arguments],
        "undeclared_argument": schema.undeclared(call.arguments, tool),
        "wrong_type": schema.wrong_types(call.arguments, tool),
        "not_in_enum": schema.not_in_enum(call.arguments, tool),
    }
    for reason, wrong in found.items():
        if wrong and reason not in rules.keep:
            return reason, f"{call.name}: {'; '.join(wrong)}"
    return None


def check_prompt(example: Example) -> None:
    """Raises for a prompt that asks nothing, or that says already what is asked for."""
    messages, answer = example.messages, example.answer
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    asked = [i for i in users if (messages[i].get("content") or "").strip()]
    if not asked:
        raise Unusable("no_user", "no message of a user stands before the answer")
    if messages[-1]["role"] == "assistant":
        names = {call.name for call in answer}
        tools = [tool for tool in example.tools if tool["name"] in names]
        if messages[-1].get("calls") or names_call(messages[-1]["content"], tools):
            raise Unusable("answered", "the prompt ends in the assistant's own calls")
    made = [message["calls"] for message in messages[asked[-1] :] if message.get("calls")]
    if answer and made and sorted(call.key() for call in made[-1]) == sorted(call.key() for call in answer):
        raise Unusable("answered", "the calls before, since the last message of the user, were the same")


def names_call(text: str, tools: Sequence[dict]) -> bool:
    """Whether a text names one of the tools beside what looks like arguments, in whatever notation."""
    for name, tool in ((tool["name"], tool) for tool in tools):
        if name not in text:
            continue
        keys = "|".join(map(re.escape, schema.properties(tool))) or "(?!)"
        arguments = re.compile(rf"[({{\[<=>]|(?<!\w)(?:{keys})\W{{0,3}}:")
        for found in islice(re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text), MENTIONS):
            start, end = found.span()
            if arguments.search(text[max(0, start - BESIDE) : start] + text[end : end + BESIDE]):
                return True
    return False
