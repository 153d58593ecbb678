"""ToolACE's notation for calls: `[Tool Name(param="value", n=[1, 2]), other()]`."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from corpus.strict_json import strict_json
from prompts import ToolCall

_STRING = r"""(?s:"[^"\\]*(?:\\.[^"\\]*)*"|'[^'\\]*(?:\\.[^'\\]*)*')"""
_PLAIN = re.compile(r"""\s*([^\s,()\[\]{}"'=][^,()\[\]{}"'=]*)(?=[,)])""")  # a value without quotes
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
    """One token of a Python or JSON literal as JSON; any other word is a text without quotes."""
    if token[0] in "\"'":
        # Escape by escape: raw line breaks and unknown escapes ("\d") would be errors in a Python literal.
        text = _ESCAPE.sub(lambda escape: ast.literal_eval(f'"{escape[0]}"'), token[1:-1])
        # Joins the surrogate pairs with which JSON writes emoji; refuses halves, which no tokenizer takes.
        return json.dumps(text.encode("utf-16", "surrogatepass").decode("utf-16"))
    if token in "[]{},:" or token in _JSON_WORDS:
        return _JSON_WORDS.get(token, token)
    for read in (lambda: int(token, 0), lambda: float(token)):
        try:
            number = read()
        except ValueError:
            continue
        # 007 is no number in Python; as the float 7.0 it would be a different value.
        zeros = isinstance(number, float) and token.isdigit() and token.startswith("0")
        return json.dumps(token if zeros else number)
    return json.dumps(token)


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


def _read_argument(text: str, at: int) -> tuple[Any, int]:
    """An argument's value, which may be a text without quotes, and the position after it."""
    if plain := _PLAIN.match(text, at):
        return strict_json(_to_json(plain[1].strip())), plain.end()
    return _read_value(text, at)


def read_literals(text: str) -> list[Any]:
    """JSON values or Python literals that JSON can hold, one after the other. Raises ValueError, SyntaxError
    or RecursionError.
    """
    values = []
    text = text.rstrip()
    at = 0
    while at < len(text):
        value, at = _read_value(text, at)
        values.append(value)
    return values


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
    others too, if plain). Values are JSON, Python literals that JSON can hold, or texts without quotes. Reads
    forwards only, so the time is linear in the text; never raises. Source: ToolACE's data.
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
                arguments[key], at = _read_argument(text, parameter.end())
                at = _match(_SEPARATOR, text, at).end()
            calls.append(ToolCall(name, arguments))
            at = _match(_SEPARATOR, text, at + 1).end()
    except (ValueError, SyntaxError, RecursionError):
        return None
    return calls if at + 1 == len(text) else None
