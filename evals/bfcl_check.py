"""The BFCL checker: one case and one model output -> the official verdict and error type.

The verdicts are those of the official checker (bfcl-eval 2026.3.23; the cases of April 2025, "v3", are judged
the same way), oddities included: comments marked "Oddity" name rules that nobody would invent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from evals.report import shorten
from prompts import CALL, END_CALL

LANGUAGES = {"simple_java": "java", "simple_javascript": "javascript"}  # every other category is Python

# Declared type -> type of the value. The three languages agree wherever they share a name.
TYPES = {
    **dict.fromkeys(("string", "any", "String", "char"), str),
    **dict.fromkeys(("integer", "long"), int),
    **dict.fromkeys(("float", "double"), float),
    **dict.fromkeys(("boolean", "Boolean"), bool),
    **dict.fromkeys(("array", "tuple", "Array", "ArrayList"), list),
    **dict.fromkeys(("dict", "HashMap"), dict),
}


@dataclass(frozen=True)
class Problem:
    """One test case. answer: per expected call {name: {parameter: allowed values}}; []: none defined."""

    id: str
    category: str
    messages: list[dict]
    functions: list[dict]
    answer: list[dict]


# ------------------------------------------------------------------------------ Java and JavaScript literals

WHOLE, DECIMAL, EXPONENT = r"-?\d+", r"-?\d+(?:\.\d+)?", r"(?:[eE][+-]?\d+)?"
# Language -> declared type -> (what its literals look like, how they are read); text that looks different,
# and other types, stay text. Oddity: one line break after a number is accepted, hence `$` and not `\Z`.
NUMBERS: dict[str, dict[str, tuple[re.Pattern, Callable]]] = {
    "java": {
        "integer": (re.compile(WHOLE + "$"), int),
        "long": (re.compile(WHOLE + "[lL]$"), lambda text: int(text.rstrip("lL\n"))),
        "float": (re.compile(DECIMAL + EXPONENT + "[fF]$"), lambda text: float(text.rstrip("fF\n"))),
        "double": (re.compile(DECIMAL + EXPONENT + "$"), float),
    },
    "javascript": {"integer": (re.compile(WHOLE + "$"), int), "float": (re.compile(DECIMAL + "$"), float)},
}
TRUTH = {"true": True, "false": False}
QUOTES = "\"'"

# Oddity: all of these stop at the first closing bracket, so collections inside collections and brackets
# inside strings come out broken, just as they do in the official checker. Its patterns take quadratic or
# cubic time where brackets stay open; these are linear. Pairs are those of _inside: (start, rest).
JAVA_ARRAY = re.compile(r"new\s+\w+\[\]\s*\{"), re.compile(r"(?m)(.*?)(?:(\})|$)")
JAVA_AS_LIST = re.compile(r"new\s+ArrayList<\w*>\(Arrays\.asList\("), re.compile(r"(?m)(.+?)(?:(\)\))|$)")
JAVA_LIST = re.compile(r"new\s+ArrayList<\w*>\(\)")
JAVA_LIST_BODY = re.compile(JAVA_LIST.pattern + r"\s*\{\{\s*")
JAVA_ADD = re.compile(r"(?m)add\((.+?)(?:(\))|$)")
JAVA_MAP = re.compile(r"new\s+HashMap<"), re.compile(r"(?m)(.*?)(?:(>\s*\(\))|$)")
JAVA_MAP_BODY = re.compile(r">\s*\(\)\s*\{")
# A key ends at the first `",`, or at the last of its line, if only the next line closes the bracket.
JAVA_PUT = re.compile(r'put\("(?:(?>(.*?)",)\s*+([^)\n]*+)\)|(?>(.*)",)\s*+([^)\n]*+)\)|.*+)')
JS_ROWS = re.compile(r"\[\s*\[.*?\]\s*\]|new\s+Array\(\s*\[.*?\]\s*\)")
JS_BETWEEN_ROWS = re.compile(r"\]\s*,\s*\[")
JS_ROW = re.compile(r"\[(.*?)\]")
JS_FLAT = re.compile(r"(?:\[(.*?)\]|new\s+Array\((.*?)\))")
JS_OBJECT = re.compile(r"\{(.*?)\}")
# A comma ends an entry if a key follows it, which may be a blank. Without a colon there is no entry.
JS_ENTRY = re.compile(r"([^:]++)(?::(.*?)(?:,\s*+(?=[^,]+:)|,\s*(?=\s:)|$)|$)")


def read_literal(text: str, declared: str | None, item: str | None, language: str) -> Any:
    """A Java or JavaScript literal as a Python value; text that is no literal of the declared type stays.

    declared, item: the type in the documentation, and that of a list's elements; None: guessed. Raises
    ValueError for an integer of more than 4,300 digits, which Python refuses to read.
    """
    if declared is None:
        return _guess(text, language)
    if declared in COLLECTIONS:
        return COLLECTIONS[declared](text, item)
    if declared in ("boolean", "Boolean"):
        return TRUTH.get(text, text)
    if declared == "String" and language == "javascript":
        return _unquote(text, QUOTES)  # a Java String is given without quotes
    pattern, read = NUMBERS[language].get(declared, (None, str))
    return read(text) if pattern and pattern.match(text) else text


def _unquote(text: str, quotes: str) -> str:
    return text[1:-1] if text and text[0] in quotes and text[-1] == text[0] else text


def _guess(text: str, language: str) -> Any:
    """A value whose type is not declared: truth value, quoted string, number, else the text."""
    text = text.strip()
    if text in TRUTH:
        return TRUTH[text]
    if (inside := _unquote(text, '"' if language == "java" else QUOTES)) != text:
        return inside
    for suffixed in ("long", "float") if language == "java" else ():
        if (value := read_literal(text, suffixed, None, language)) is not text:
            return value
    for read in (int, float):
        with suppress(ValueError):
            return read(text)
    return text


def _inside(start: re.Pattern, rest: re.Pattern, text: str) -> str | None:
    """What stands between the first `start` that is closed in its line and its end, or None.

    rest: (the text, the end of it); without an end it reaches to the end of the line.
    """
    at = 0
    for found in start.finditer(text):
        if found.end() >= at and (inside := rest.match(text, found.end())):
            if inside[2]:
                return inside[1]
            at = inside.end()  # in the same line, nothing that starts later is closed
    return None


def _java_array(text: str, item: str | None) -> Any:
    # Oddity: quotes stay part of the strings here, but not in an ArrayList.
    if (inside := _inside(*JAVA_ARRAY, text)) is None:
        return text
    parts = [part.strip() for part in inside.split(",")]
    return [read_literal(part, item, None, "java") for part in parts if part]


def _java_list(text: str, item: str | None) -> Any:
    if (listed := _inside(*JAVA_AS_LIST, text)) is not None:
        parts = listed.split(",")
    elif body := JAVA_LIST_BODY.search(text):
        # Oddity: the body has at least one character, so `{{ }}` ends at a later `}}`, if there is one.
        end = text.find("}}", body.end() + 1)
        parts = [part for part, closed in JAVA_ADD.findall(text, body.end(), max(end, 0)) if closed]
    else:
        return [] if JAVA_LIST.search(text) else text
    if item in ("String", "char"):
        return [part.strip()[1:-1] for part in parts]  # Oddity: the quotes are taken for granted
    return [read_literal(part.strip(), item, None, "java") for part in parts]


def _java_map(text: str, _: None) -> Any:
    start = JAVA_MAP[0].search(text)
    body = start and JAVA_MAP_BODY.search(text, start.end())
    end = text.find("}", body.end()) if body else -1
    if end < 0:  # Oddity: only a map without a body must have its type in one line
        return text if _inside(*JAVA_MAP, text) is None else {}
    entries = {}
    for put in JAVA_PUT.finditer(text, body.end(), end):
        if put.lastindex:  # no more than `put("` otherwise
            key, value = put.group(put.lastindex - 1, put.lastindex)
            entries[key] = _guess(value, "java")
    return entries


def _javascript_array(text: str, item: str | None) -> Any:
    """item: declared type of the elements; None inside an object, where it must be guessed."""
    text = text.strip()
    # Line breaks are accepted between rows, and beside the outer brackets, and nowhere else.
    if found := JS_ROWS.match(JS_BETWEEN_ROWS.sub("],[", text)):
        first, *others = JS_ROW.findall(found[0])
        rows = [first.strip().removeprefix("["), *others]  # the outer bracket opened the first row
        return [[_guess(part, "javascript") for part in row.split(",")] for row in rows]
    if found := JS_FLAT.match(text):
        inside = (found[1] or found[2] or "").strip()
        parts = inside.split(",") if inside else []
        with suppress(ValueError):  # an element with too many digits
            return [read_literal(part.strip(), item, None, "javascript") for part in parts]
    return text


def _javascript_object(text: str, _: None) -> Any:
    text = text.strip()
    if not (found := JS_OBJECT.match(text)):
        return text
    entries = {}
    for key, value in (entry.groups() for entry in JS_ENTRY.finditer(found[1])):
        if value is not None:
            value = value.strip()
            is_array = value.startswith("[") and value.endswith("]")
            # Oddity: "5" and 5 are the same in an object.
            read = _javascript_array(value, None) if is_array else _guess(value.strip(QUOTES), "javascript")
            entries[key.strip().strip(QUOTES)] = read
    return entries


COLLECTIONS: dict[str, Callable[[str, str | None], Any]] = {
    "Array": _java_array, "ArrayList": _java_list, "HashMap": _java_map,
    "array": _javascript_array, "dict": _javascript_object,
}


# ----------------------------------------------------------------------------------------- checking one value

IGNORED = str.maketrans("", "", " ,./-_*^")


def standard(value: Any) -> Any:
    """A string as it is compared: without IGNORED, in lower case, with one kind of quote; any other value as
    it is.
    """
    # In this order: whether a Greek sigma ends a word depends on the quotes beside it.
    return value.translate(IGNORED).lower().replace("'", '"') if isinstance(value, str) else value


def _first_type(allowed: list) -> type | None:
    """Type of the first allowed value that is not "" (which means: may be left out)."""
    return next((type(value) for value in allowed if value != ""), None)


def _type_error(value: Any, allowed: Any, expected: type, item: type | None) -> str | None:
    """Types are exact (True is no integer), but the type of the first allowed value is accepted as well."""
    if type(value) is not expected:
        return None if type(value) is _first_type(allowed) else "type_error:simple"
    if item is None:
        return None
    # Oddity: an allowed value that is no list vouches for the elements of every list.
    fits = (
        not isinstance(wanted, list)
        or all(_type_error(element, wanted, item, None) is None for element in value)
        for wanted in allowed
    )
    if any(fits):
        return None
    return "type_error:nested" if allowed else "type_error:simple"  # a few answers allow nothing at all


def _dict_error(value: dict, allowed: list) -> str | None:
    """The allowed dicts list allowed values per key. The error is that of the last one tried."""
    error = "dict_checker:unclear"
    for wanted in (wanted for wanted in allowed if wanted != ""):
        if not isinstance(value, dict):
            return "type_error:nested"  # an element that "" vouched for; the official checker would crash
        # Oddity: a bare string instead of a list of allowed values allows each of its characters.
        faults = (
            "value_error:dict_value" if key in wanted else "value_error:dict_key"
            for key, given in value.items()
            if key not in wanted or standard(given) not in [standard(choice) for choice in wanted[key]]
        )
        missing = any(key not in value and "" not in choices for key, choices in wanted.items())
        error = "value_error:dict_key" if missing else next(faults, None)
        if not error:
            return None
    return error


def _dicts_error(value: list[dict], allowed: list) -> str | None:
    error = "list_dict_checker:unclear"
    for wanted in allowed:
        faults = filter(None, (_dict_error(given, [choice]) for given, choice in zip(value, wanted)))
        error = next(faults, None) if len(value) == len(wanted) else "value_error:list_dict_count"
        if not error:
            return None
    return error


def _value_error(value: Any, allowed: list, details: dict, language: str) -> str | None:
    """Error type of one argument, or None. details: its documentation; allowed: the answer's list for it."""
    declared, item_name = details["type"], details.get("items", {}).get("type")
    if language != "python":
        if not isinstance(value, str):
            return "type_error:java" if language == "java" else "type_error:js"
        with suppress(ValueError):  # a number with too many digits stays text
            value = read_literal(value, declared, item_name, language)
    expected = TYPES[declared]
    item = TYPES[item_name] if expected is list else None
    if language == "python" and expected is float and type(value) is int:
        with suppress(OverflowError):  # it stays an integer and is refused; the official checker would crash
            value = float(value)
    if error := _type_error(value, allowed, expected, item):
        return error
    if _first_type(allowed) not in (None, expected):
        return None if value in allowed else "value_error:others"  # the name of a variable: no leniency
    if expected is dict:
        return _dict_error(value, allowed)
    if item is dict:
        return _dicts_error(value, allowed)
    if expected is list:
        given = [standard(element) for element in value]
        # Oddity: list("") is [], so an optional list may be given as [].
        same = any(given == [standard(element) for element in wanted] for wanted in allowed)
        return None if same else "value_error:list/tuple"
    if expected is str and value not in allowed:
        return None if standard(value) in [standard(choice) for choice in allowed] else "value_error:string"
    return None if value in allowed else "value_error:others"


# ---------------------------------------------------------------------------------- checking one model output

Fault = tuple[str, str]  # (official error type, the same in words)
# By a word in the name of the category. The first counts: parallel_multiple is parallel.
CHECKERS = {
    "parallel": "parallel_function_checker_no_order", "multiple": "multiple_function_checker",
    "": "simple_function_checker",
}


def _show(value: Any) -> str:
    try:
        return shorten(repr(value), 200)
    except RecursionError:
        return "a deeply nested value"


def _call_fault(function: dict, call: dict, wanted: dict, language: str) -> Fault | None:
    """What is wrong with one call {name: arguments}: name, required parameters, arguments, omitted ones."""
    properties, allowed = function["parameters"]["properties"], next(iter(wanted.values()))
    if function["name"] not in call:
        words = f"{_show(next(iter(call)))} is called, not {function['name']!r}"
        return "simple_function_checker:wrong_func_name", words
    arguments = call[function["name"]]
    for name in function["parameters"].get("required", ()):
        if name not in arguments:
            return "simple_function_checker:missing_required", f"the required parameter {name!r} is missing"
    for name, value in arguments.items():
        if name not in properties or name not in allowed:
            where = "answer" if name in properties else "function's documentation"
            words = f"the parameter {_show(name)} is not in the {where}"
            return "simple_function_checker:unexpected_param", words
        if error := _value_error(value, allowed[name], properties[name], language):
            expected = f"the allowed values are {_show(allowed[name])}"
            if error.startswith("type_error"):
                as_text = " as text" * (language != "python")
                expected = f"{properties[name]['type']} is expected{as_text}; {expected}"
            return error, f"{name} is {_show(value)}, but {expected}"
    for name, choices in allowed.items():
        if name not in arguments and "" not in choices:
            return "simple_function_checker:missing_optional", f"the answer does not let {name!r} be left out"
    return None


def _calls_fault(problem: Problem, calls: list[dict]) -> Fault | None:
    """What is wrong with a list of calls. The category's name says how they are matched with the answer."""
    kind, checker = next((kind, name) for kind, name in CHECKERS.items() if kind in problem.category)
    if len(calls) != len(problem.answer):
        return f"{checker}:wrong_count", f"the number of calls is {len(calls)}, not {len(problem.answer)}"
    language = LANGUAGES.get(problem.category, "python")
    by_name, unused = {function["name"]: function for function in problem.functions}, list(calls)
    if kind != "parallel":
        # Oddity: a simple case goes by its one function, whose name the answer may spell otherwise.
        function = by_name[next(iter(problem.answer[0]))] if kind else problem.functions[0]
        return _call_fault(function, calls[0], problem.answer[0], language)
    for wanted in problem.answer:
        tried = (_call_fault(by_name[next(iter(wanted))], call, wanted, language) for call in unused)
        faults = list(takewhile(bool, tried))
        if len(faults) == len(unused):
            words = f"no call that is left fits the expected {_show(wanted)}: "
            return f"{checker}:cannot_find_match", words + "; ".join(words for _, words in faults)
        # Oddity: the first fitting call is taken, even if only another choice lets all answers match.
        del unused[len(faults)]
    return None


def find_block(output: str) -> str | None:
    """What stands between the first <tool_call> and the next </tool_call>, in linear time; or None."""
    inside, closed, _ = output.partition(CALL)[2].partition(END_CALL)
    return inside.strip() if closed else None


def decode(output: str) -> list[dict] | None:
    """The calls of a model output as [{name: arguments}], or None. Laxer than prompts.parse_completion on
    purpose: this is the decoding under which the official verdicts, and the paper's figures, come about.
    """
    block = find_block(output)
    try:
        return None if block is None else [{item["name"]: item["arguments"]} for item in json.loads(block)]
    except (ValueError, RecursionError, TypeError, KeyError):
        return None  # no JSON, JSON too deep or with too long a number, or not a list of calls


def _well_formed(calls: list[dict] | None) -> bool:
    return calls is not None and all(isinstance(*call.values(), dict) for call in calls)


def reply_kind(output: str, calls: list[dict] | None) -> str:
    """Says "called", "empty_list" (an explicit []), "no_block" (no closed tool-call section) or "unparsable".

    calls: decode(output). Officially all but the first are correct where no function fits.
    """
    if calls:
        return "called" if _well_formed(calls) else "unparsable"
    block = find_block(output)
    if block is None:
        return "no_block"
    return "empty_list" if calls is not None and block.startswith("[") else "unparsable"


def find_fault(case: Problem, calls: list[dict] | None) -> Fault | None:
    """(official error type, the same in words) of decoded calls (see decode); None if they are right."""
    well_formed = _well_formed(calls)
    if "relevance" in case.category:
        called = bool(well_formed and calls)
        if called == (case.category == "live_relevance"):
            return None
        if called:
            return "irrelevance_error:decoder_success", "a call is made, though no function fits"
        return "relevance_error:decoder_failed", "no readable call is made, though a function fits"
    if calls is None:
        return "ast_decoder:decoder_failed", "there is no closed tool-call section with a JSON list of calls"
    if not well_formed:
        return "ast_decoder:decoder_wrong_output_format", "the arguments of a call are not an object"
    return _calls_fault(case, calls)


def bfcl_verdict(case: Problem, output: str) -> tuple[bool, str | None]:
    """(valid, error type or None) of one model output, as the official checker has it. Never raises."""
    fault = find_fault(case, decode(output))
    return fault is None, fault[0] if fault else None
