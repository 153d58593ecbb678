"""ToolACE: its notation for calls, `[Tool Name(param="value", n=[1, 2]), other()]`, and its records."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from prompts import ToolCall, strict_json

ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}

_STRING = r"""(?s:"[^"\\]*(?:\\.[^"\\]*)*"|'[^'\\]*(?:\\.[^'\\]*)*')"""
_TOKEN = re.compile(rf"\s*({_STRING}|[\[\]{{}},:]|[\w.+-]+)")
_ESCAPE = re.compile(
    r"""\\(?:x[\da-fA-F]{2}|u[\da-fA-F]{4}|U[\da-fA-F]{8}|[0-3]?[0-7]{1,2}|[abfnrtv'"\\\n])"""
)
_LIST = re.compile(r"\[\s*")
_PARAMETER = re.compile(r"""([^=,()"']+)=""")  # not only identifiers: "from", "7SN.pj", "filter[id]"
_SEPARATOR = re.compile(r"\s*(?:,|(?=[\])]))\s*")  # a comma, or the closing bracket is next
_OPEN = re.compile(r"\s*\(\s*")
_ANY_CALL = re.compile(r"""([^()="']*[^()="'\s])\s*\(\s*""")
_JSON_WORDS = {
    "True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null",
}


def _match(pattern: re.Pattern, text: str, at: int) -> re.Match:
    if not (match := pattern.match(text, at)):
        raise ValueError(f"unexpected text at {at}")
    return match


def _to_json(token: str) -> str:
    """One token of a Python or JSON literal as JSON. What is neither raises here or in strict_json."""
    if token[0] in "\"'":
        # Escape by escape: raw line breaks and unknown escapes ("\d") would be errors in a Python literal.
        text = _ESCAPE.sub(lambda escape: ast.literal_eval(f'"{escape[0]}"'), token[1:-1])
        # Joins the surrogate pairs with which JSON writes emoji; refuses halves, which no tokenizer takes.
        return json.dumps(text.encode("utf-16", "surrogatepass").decode("utf-16"))
    if token in "[]{},:" or token in _JSON_WORDS:
        return _JSON_WORDS.get(token, token)
    try:
        return str(int(token, 0))
    except ValueError:
        if not token.strip("+-_0123456789"):
            raise  # 007 is no Python literal; as the float 7.0 it would be a different value
        return json.dumps(float(token))


def _read_value(text: str, at: int) -> tuple[Any, int]:
    """(the value at `at`, the position after it). Brackets only tell its end; strict_json checks the rest."""
    tokens = []
    depth = 0
    while not tokens or depth > 0:
        match = _match(_TOKEN, text, at)
        token, at = match[1], match.end()
        depth += (token in "[{") - (token in "]}")
        if token in "]}" and len(tokens) > 1 and tokens[-1] == "," and tokens[-2] not in "[{":
            tokens.pop()  # Python allows a comma after the last item
        tokens.append(_to_json(token))
    return strict_json(" ".join(tokens)), at


def _read_name(text: str, at: int, names: Sequence[str], any_name: bool) -> tuple[str, int]:
    """(the name of the call at `at`, the position after its opening bracket).

    No pattern of all names: compiling one for every record would take longer than all the rest.
    """
    for name in names:
        if text.startswith(name, at) and (opened := _OPEN.match(text, at + len(name))):
            return name, opened.end()
    if not any_name:
        raise ValueError(f"no known name at {at}")
    match = _match(_ANY_CALL, text, at)
    return match[1], match.end()


def parse_toolace_calls(
    text: str, tool_names: Sequence[str], any_name: bool = False
) -> list[ToolCall] | None:
    """Calls written as `[Tool Name(param="value", other=[1, 2]), second()]`; None for any other text.

    Names contain spaces, brackets and quotes, so only those in `tool_names` are recognised (`any_name`:
    others too, if plain). Values are JSON, or Python literals that JSON can hold. Reads forwards only, so the
    time is linear in the text; never raises. Source: ToolACE's data.
    """
    # The longest first: "User Feed" must not win over "User Feed (Video Posts) V2".
    names = sorted(tool_names, key=len, reverse=True)
    text = text.strip()
    calls = []
    try:
        at = _match(_LIST, text, 0).end()
        while not text.startswith("]", at):
            name, at = _read_name(text, at, names, any_name)
            arguments = {}
            while not text.startswith(")", at):
                parameter = _match(_PARAMETER, text, at)
                if not (key := parameter[1].strip()) or key in arguments:
                    return None
                arguments[key], at = _read_value(text, parameter.end())
                at = _match(_SEPARATOR, text, at).end()
            calls.append(ToolCall(name, arguments))
            at = _match(_SEPARATOR, text, at + 1).end()
    except (ValueError, SyntaxError, RecursionError):
        return None
    return calls if at + 1 == len(text) else None


# ---------------------------------------------------------------------------------------------------- records


def role_of(turn: Any) -> str | None:
    """user, assistant, tool or system, in either dialect; None for what is no turn."""
    speaker = turn.get("from") if isinstance(turn, dict) and isinstance(turn.get("value"), str) else None
    return ROLES.get(speaker) if isinstance(speaker, str) else None


def is_call_turn(turn: Any) -> bool:
    """Whether a turn holds calls: a function_call, or an assistant's text that opens a list."""
    if role_of(turn) != "assistant":
        return False
    return turn["from"] == "function_call" or turn["value"].lstrip().startswith("[")


def is_text_step(turns: list, index: int, names: Sequence[str]) -> bool:
    """Whether turn `index`, an assistant's plain text, shows that no call was right: then the target is [].

    It must answer a user or the results of calls, and say something. Not so a text after which the assistant
    goes on by itself ("One moment, I will look that up."), nor one that quotes a call of a listed tool.
    """
    text = turns[index]["value"]
    before, after = [role_of(turns[i]) if 0 <= i < len(turns) else None for i in (index - 1, index + 1)]
    quotes = any(f"[{name}(" in text for name in names)
    return bool(text.strip()) and before in ("user", "tool") and after != "assistant" and not quotes


def is_single_turn(record: Any) -> bool:
    """Whether a record has at most one call turn, after at most one user message (without calls: in all)."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    turns = turns if isinstance(turns, list) else []
    calls = [index for index, turn in enumerate(turns) if is_call_turn(turn)]
    asked = turns[: calls[0]] if calls else turns
    return len(calls) <= 1 and sum(role_of(turn) == "user" for turn in asked) <= 1


def find_tools(text: str) -> list[dict] | None:
    """The first JSON list of tools inside `text`, or None. Other brackets ("[func1(...)]") are skipped."""
    decoder, at = json.JSONDecoder(), text.find("[")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            value, end = None, at + 1
        # "parameters" tells tools from a list of named things inside a tool list that is itself broken.
        if value and is_named(value) and all("parameters" in tool for tool in value):
            return value
        at = text.find("[", end)
    return None


def is_named(value: Any) -> bool:
    """Whether `value` is a list of objects with names, as tools and calls are."""
    if not isinstance(value, list):
        return False
    return all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in value)
