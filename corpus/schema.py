"""Tools as files have them, and what they declare, in the dialects of xLAM, ToolACE, BFCL and JSON Schema.

Two uses: records whose answer contradicts its own tool are dropped, and the lenient reward compares numbers
by it.
"""

from __future__ import annotations

import re
from typing import Any

from corpus.strict_json import strict_json
from prompts import ToolCall

# Declared names -> JSON types. By what is not here (Callable, any, Union, ...) nothing is judged.
TYPES = {
    "str": "string", "string": "string",
    "int": "integer", "integer": "integer",
    "float": "number", "number": "number", "double": "number",
    "bool": "boolean", "boolean": "boolean",
    "list": "array", "array": "array", "tuple": "array", "set": "array",
    "dict": "object", "object": "object",
}

BARE_CALL = {"name", "parameters", "id", "type", "index"}  # may stand in a call without arguments
LONGEST_TYPE = 1000  # characters; by longer ones nothing is judged either, and each is read for every value
# Keys of JSON Schema by which a tool takes more than its `properties` say.
OPEN = ("additionalProperties", "patternProperties", "anyOf", "oneOf", "allOf", "$ref")

# JSON type -> the Python types of its values; bool is a subclass of int, so types are compared exactly
FITS = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,),
    "object": (dict,),
}


class NotJSON(ValueError):
    """A text that should be JSON, or an object that repeats a key."""


def read_tools(value: Any) -> list[dict]:
    """The tools of a field: a list, one tool, or their JSON text; bare or in OpenAI's wrapper.

    Keys that Arrow has filled with null are removed. Raises ValueError for anything else.
    """
    tools = _bare_items(value, "tools")
    if bad := [one for one in tools if not isinstance(one, dict) or not isinstance(one.get("name"), str)]:
        raise ValueError(f"a tool needs a name: {str(bad[0])[:80]}")
    try:
        return without_nulls(tools) if are_filled(tools) else tools
    except RecursionError:
        raise NotJSON("the tools are nested too deeply") from None


def read_calls(value: Any) -> list[ToolCall]:
    """The calls of a field: a list, one call, or their JSON text; bare or in OpenAI's wrapper.

    Arguments may be JSON text, and a call without any has none. Raises ValueError for anything else.
    """
    calls = []
    for one in _bare_items(value, "calls"):
        call = one if isinstance(one, dict) else {}
        given = call.get("arguments") or call.get("parameters")  # Llama's word for them
        other = not given and "arguments" not in call and not call.keys() <= BARE_CALL
        arguments = decoded(given or {}, "arguments")
        if other or not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
            raise ValueError(f"a call needs a name and an object of arguments: {str(one)[:80]}")
        calls.append(ToolCall(one["name"], arguments))
    return calls


def _bare_items(value: Any, what: str) -> list:
    """The objects of a list, or the one object, without `{"type": "function", "function": {…}}` around."""
    value = decoded(value, what)
    items = []
    for one in value if isinstance(value, list) else [value]:
        one = decoded(one, what)
        inner = one.get("function") if isinstance(one, dict) else None
        items.append(inner if isinstance(inner, dict) else one)
    return items


def decoded(value: Any, what: str) -> Any:
    """A value, or the JSON in its text, which is called `what`. Raises NotJSON."""
    try:
        if isinstance(value, ValueError):  # sources' mark of an object that repeats a key
            raise value
        return strict_json(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise NotJSON(f"{what} is not JSON: {error}") from None


def are_filled(tools: Any) -> bool:
    """Whether Arrow has given tools other rows' keys: then a parameter is null, or what is said of it, its
    default aside.
    """
    for tool in tools if isinstance(tools, list) else ():
        inner = tool.get("function") if isinstance(tool, dict) else None
        tool = inner if isinstance(inner, dict) else tool
        parameters = tool.get("parameters") if isinstance(tool, dict) else None
        if not isinstance(parameters, dict):
            continue
        declared = [*parameters.values(), *properties(tool).values()]
        some = [one for one in declared if isinstance(one, dict) and None in one.values()]
        if None in declared or any([k for k, v in one.items() if v is None] != ["default"] for one in some):
            return True
    return False


def without_nulls(value: Any) -> Any:
    """A JSON value without the keys whose value is null, however deep."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def properties(tool: dict) -> dict[str, Any]:
    """Parameter name -> declaration: JSON Schema's `properties`, or xLAM's flat parameters; {} if neither."""
    parameters = tool.get("parameters")
    if not isinstance(parameters, dict):
        return {}
    inner = parameters.get("properties")
    # xLAM's flat parameters may include one that is called "properties" or "type".
    flat = not isinstance(inner, dict) or isinstance(parameters.get("type"), dict)
    if not flat and all(isinstance(declaration, dict) for declaration in inner.values()):
        return inner
    is_schema = isinstance(parameters.get("type"), str) or not parameters.keys().isdisjoint(OPEN)
    return {} if is_schema else parameters


def is_optional(declared: Any) -> bool:
    """Whether a declaration says that the argument may be left out: a default, or "str, optional"."""
    if not isinstance(declared, dict) or declared.get("required") is False:
        return True
    return "default" in declared or _takes_null(declared)


def _takes_null(declared: dict) -> bool:
    """Whether the argument may be null: "str, optional", ["string", "null"], or null as its default."""
    kind = declared.get("type")
    nullable = (isinstance(kind, list) and "null" in kind) or declared.get("nullable") is True
    return nullable or "optional" in str(kind).lower() or declared.get("default", "") is None


def undeclared(arguments: dict[str, Any], tool: dict) -> list[str]:
    """Arguments that the tool does not declare, where it says what it takes, and that it takes no others."""
    parameters, declared = tool.get("parameters"), properties(tool)
    told = declared or (isinstance(parameters, dict) and parameters.get("properties", parameters) == {})
    if not told or any(parameters.get(key, False) not in (None, False) for key in OPEN):
        return []
    return [name for name in arguments if name not in declared]


def not_in_enum(arguments: dict[str, Any], tool: dict) -> list[str]:
    """Arguments, or items of a list, that are none of the values which the tool allows, as texts."""
    found = []
    for name, declared in properties(tool).items():
        allowed = declared.get("enum") if isinstance(declared, dict) and name in arguments else None
        if not isinstance(allowed, list) or not allowed or arguments[name] is None:
            continue
        value = arguments[name]
        values = value if isinstance(value, list) and value not in allowed else [value]
        texts = [str(one) for one in (*allowed, declared.get("default"))]  # many declare "1" and mean 1
        wrong = [one for one in values if one not in allowed and str(one) not in texts]
        found += [f"{name}: {one!r} is none of {allowed}" for one in wrong]
    return found


def required(tool: dict) -> list[str]:
    """Names of the parameters that every call must give.

    With JSON Schema they are listed, inside `parameters` or, as in ToolACE, beside it; with xLAM's flat
    parameters, where no list says it, they are those without a default and without "optional".
    """
    parameters, declared = tool.get("parameters"), properties(tool)
    inside = parameters.get("required") if isinstance(parameters, dict) else None
    if declared is parameters and not isinstance(inside, list):
        return [name for name, declaration in declared.items() if not is_optional(declaration)]
    listed = [one for one in (tool.get("required"), inside) if isinstance(one, list)]
    names = [name for one in listed for name in one if isinstance(name, str)]
    return [name for name in dict.fromkeys(names) if name in declared]


def json_type(declared: Any) -> str | None:
    """The JSON type that a declaration clearly asks for: "str, optional" -> string, List[int] -> array."""
    kind = declared.get("type") if isinstance(declared, dict) else None
    if isinstance(kind, list):  # JSON Schema's ["string", "null"]
        kinds = [one for one in kind if one != "null"]
        kind = kinds[0] if len(kinds) == 1 else None
    if not isinstance(kind, str) or len(kind) > LONGEST_TYPE:
        return None
    kind = kind.strip()
    if kind.lower().endswith("optional"):
        kind = kind[: -len("optional")].rstrip().removesuffix(",")
    wrapped = re.fullmatch(r"Optional\[(.*)\]", kind)
    head, bracket, rest = (wrapped[1] if wrapped else kind).partition("[")
    if bracket and not rest.endswith("]"):
        return None
    return TYPES.get(head.strip().lower())


def wrong_types(arguments: dict[str, Any], tool: dict) -> list[str]:
    """Arguments whose JSON type is clearly another than declared, as "name: integer declared, str given".

    An integer fits where a number is declared, null where the type says optional or null is the default: else
    it is more likely a column's filling. Only the top level is judged: declarations of what lists and objects
    hold are too often wrong in the known data.
    """
    found = []
    for name, declared in properties(tool).items():
        kind = json_type(declared) if name in arguments else None
        fits = kind is None or type(arguments[name]) in FITS[kind]
        if not fits and not (arguments[name] is None and _takes_null(declared)):
            found.append(f"{name}: {kind} declared, {type(arguments[name]).__name__} given")
    return found


def _as_declared(value: Any, declared: Any) -> Any:
    kind = json_type(declared)
    if kind == "number" and isinstance(value, float) and value.is_integer():
        return int(value)  # not the other way: beyond 2**53 floats would make unequal integers equal
    if kind == "array" and isinstance(value, list):
        listed = re.match(r"\w+\[(.*)\]", str(declared["type"]).strip())  # the float of List[float]
        kinds = {part.strip() for part in listed[1].split(",")} if listed else set()
        item = {"type": kinds.pop()} if len(kinds) == 1 else declared.get("items")
        return [_as_declared(one, item) for one in value]
    if kind == "object" and isinstance(value, dict) and isinstance(declared.get("properties"), dict):
        return {name: _as_declared(one, declared["properties"].get(name)) for name, one in value.items()}
    return value


def lenient_arguments(arguments: dict[str, Any], tool: dict) -> dict[str, Any]:
    """The arguments with 2 for 2.0 where `number` is declared, also inside lists and objects.

    Then 2 equals 2.0 where a number is declared, and nowhere else; numeric strings stay strings.
    """
    declared = properties(tool)
    return {name: _as_declared(value, declared.get(name)) for name, value in arguments.items()}
