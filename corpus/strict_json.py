"""JSON with one reading only, and JSON text by which values are compared."""

from __future__ import annotations

import json
from typing import Any

# Deeper JSON is refused: Python's own limit depends on the caller's stack, and a verdict must not.
MAX_DEPTH = 64

# Kept, because json.dumps makes one for every call.
_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=True, separators=(",", ":"))


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, so that equal values give equal text. Keeps 1, 1.0, true and "1" apart."""
    return _CANONICAL.encode(value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError("a number overflows")
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is repeated")
    return result


_STRICT = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_finite_float, object_pairs_hook=_unique_keys
)


def strict_json(text: str) -> Any:
    """json.loads without NaN, Infinity, overflow or repeated keys, each of which could hide a second reading.

    Raises ValueError (json.JSONDecodeError is one) or RecursionError for absurd nesting.
    """
    return _STRICT.decode(text)


def _unique_or_error(pairs: list[tuple[str, Any]]) -> dict | ValueError:
    try:
        return _unique_keys(pairs)
    except ValueError as error:
        return error


_UNIQUE = json.JSONDecoder(object_pairs_hook=_unique_or_error)


def unique_json(text: str) -> Any:
    """json.loads with a ValueError in place of an object that repeats a key: it may be one that nobody reads.

    Raises ValueError or RecursionError.
    """
    return _UNIQUE.decode(text)


def nested_deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested more than `limit` deep. Without recursion: nothing overflows."""
    level = [value]
    for _ in range(limit + 1):
        inner = []
        for outer in level:
            if isinstance(outer, dict):
                inner += outer.values()
            elif isinstance(outer, list):
                inner += outer
        if not inner:
            return False
        level = inner
    return True
