"""ToolACE's notation for calls, `[Tool Name(param="value", n=[1, 2]), other()]`, read exactly."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from prompts import ToolCall, strict_json

_STRING = r"""(?s:"[^"\\]*(?:\\.[^"\\]*)*"|'[^'\\]*(?:\\.[^'\\]*)*')"""
_TOKEN = re.compile(rf"\s*({_STRING}|[\[\]{{}},:]|[\w.+-]+)")
_ESCAPE = re.compile(r"""\\(?:x[\da-fA-F]{2}|u[\da-fA-F]{4}|U[\da-fA-F]{8}|[0-3]?[0-7]{1,2}|[abfnrtv'"\\\n])""")
_PARAMETER = re.compile(r"""([^=,()"']+)=""")  # not only identifiers: "from", "7SN.pj", "filter[id]"
_SEPARATOR = re.compile(r"\s*(?:,|(?=[\])]))\s*")  # a comma, or the closing bracket is next
_ANY_NAME = r"""[^()="']*[^()="'\s]"""
_JSON_WORDS = {"True": "true", "False": "false", "None": "null"} | {word: word for word in ("true", "false", "null")}


def _match(pattern: re.Pattern, text: str, at: int) -> re.Match:
    if not (match := pattern.match(text, at)):
        raise ValueError(f"unexpected text at {at}")
    return match


def _to_json(token: str) -> str:
    """One token of a Python or JSON literal as JSON. What is neither raises here or in strict_json."""
    if token[0] in "\"'":
        # Escape by escape, because raw line breaks and unknown escapes ("\d") would be errors in a Python literal.
        text = _ESCAPE.sub(lambda escape: ast.literal_eval(f'"{escape[0]}"'), token[1:-1])
        # Joins the surrogate pairs with which JSON writes emoji, and refuses halves, which no tokenizer takes.
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
    """(the value at `at`, the position after it). Brackets only tell where it ends; strict_json checks the rest."""
    tokens, depth = [], 0
    while not tokens or depth > 0:
        match = _match(_TOKEN, text, at)
        token, at = match[1], match.end()
        depth += (token in "[{") - (token in "]}")
        if token in "]}" and len(tokens) > 1 and tokens[-1] == "," and tokens[-2] not in "[{":
            tokens.pop()  # Python allows a comma after the last item
        tokens.append(_to_json(token))
    return strict_json(" ".join(tokens)), at


def parse_toolace_calls(text: str, tool_names: Sequence[str], any_name: bool = False) -> list[ToolCall] | None:
    """Calls written as `[Tool Name(param="value", other=[1, 2]), second()]`; None when the text is anything else.

    Names contain spaces, brackets and quotes, so only those in `tool_names` are recognised (`any_name`: others too,
    if plain). Values are JSON, or Python literals that JSON can hold. Reads forwards only, so the time is linear in
    the text; never raises. Source: ToolACE's data.
    """
    # The longest first: "User Feed" must not win over "User Feed (Video Posts) V2". (?!) matches nothing.
    names = [re.escape(name) for name in sorted(tool_names, key=len, reverse=True)]
    name = re.compile(rf"({'|'.join([*names, _ANY_NAME if any_name else '(?!)'])})\s*\(\s*")
    text, calls = text.strip(), []
    try:
        at = _match(re.compile(r"\[\s*"), text, 0).end()
        while not text.startswith("]", at):
            call, arguments = _match(name, text, at), {}
            at = call.end()
            while not text.startswith(")", at):
                parameter = _match(_PARAMETER, text, at)
                if not (key := parameter[1].strip()) or key in arguments:
                    return None
                arguments[key], at = _read_value(text, parameter.end())
                at = _match(_SEPARATOR, text, at).end()
            calls.append(ToolCall(call[1], arguments))
            at = _match(_SEPARATOR, text, at + 1).end()
    except (ValueError, SyntaxError, RecursionError):
        return None
    return calls if at + 1 == len(text) else None
