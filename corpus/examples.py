"""The records that cross files: a training example, its rows as JSON, and the splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prompts import ToolCall

KINDS = ("single", "choice", "parallel", "none")


def example_kind(example: Example) -> str:
    """none (empty answer), parallel (several calls), single (one tool to choose from) or choice."""
    if len(example.answer) != 1:
        return "parallel" if example.answer else "none"
    return "single" if len(example.tools) == 1 else "choice"


# --------------------------------------------------------------------------------------- from data to prompts


@dataclass(frozen=True)
class Tokenized:
    """An example and its prompt as token ids."""

    example: Example
    ids: list[int]


@dataclass(frozen=True)
class Splits:
    """Training examples and the held-out sets by name; as Example or as Tokenized."""

    train: Sequence
    held_out: dict[str, Sequence]


@dataclass(frozen=True)
class Example:
    """One step to learn: the conversation so far, the tools, and the calls that are right now."""

    id: str
    source: str  # "xlam", "toolace", "synthetic", ...
    messages: list[
        dict
    ]  # role (user, assistant, tool, system), content, and `calls` (list[ToolCall]) for past calls
    tools: list[dict]  # {"name", "description", "parameters"} as the record gives them
    answer: list[ToolCall]  # ground truth; [] = no call is right
    demonstrations: tuple[str, ...] = ()  # replies to imitate (sft.py), may be empty


@dataclass(frozen=True)
class Dropped:
    """A record or step left out. `line`: the line of a JSONL file, in a JSON array the record's position from
    1.
    """

    source: str
    id: str
    line: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Rules:
    """How records are judged. keep: reasons, of KEEPABLE, for which nothing is dropped. no_call_turns: a turn
    of ToolACE that is plain text becomes an example, too, whose answer is [] (toolace.is_text_step says
    which).
    """

    keep: tuple[str, ...] = ()
    no_call_turns: bool = False


STRICT = Rules()
KEEPABLE = ("missing_argument", "wrong_type", "contradiction")


class Unusable(Exception):
    """(reason, detail): the record or step at hand cannot become an example."""


# ------------------------------------------------------------------------------------------ examples -> rows


def _plain(call: Any) -> dict:
    """A call as JSON has it; the encoders below ask for it when they meet one."""
    if not isinstance(call, ToolCall):
        raise TypeError(f"{type(call).__name__} is not JSON")
    return {"name": call.name, "arguments": call.arguments}


# What was read from JSON holds no cycles, and looking for them costs a seventh of the time.
_ENCODER = json.JSONEncoder(default=_plain, check_circular=False)
_CANONICAL = json.JSONEncoder(
    default=_plain, check_circular=False, sort_keys=True, ensure_ascii=False, allow_nan=False
)


def to_json(value: Any) -> str:
    """JSON of anything in an example, calls as {"name", "arguments"}."""
    return _ENCODER.encode(value)


def example_row(example: Example) -> dict:
    """An example in our own layout, which keeps everything as it is."""
    return {
        "id": example.id, "source": example.source, "messages": example.messages, "tools": example.tools,
        "answer": example.answer, "demonstrations": example.demonstrations,
    }


def hashes_of(example: Example) -> tuple[bytes, bytes]:
    """Hashes of the prompt and of the answer, whose calls may stand in any order. Also the last check of an
    example: all of it must be JSON, and text that a tokenizer takes.
    """
    try:
        prompt = _CANONICAL.encode([example.messages, example.tools]).encode()
        answer = "\n".join(sorted(_CANONICAL.encode(call) for call in example.answer)).encode()
        "".join((example.id, example.source, *example.demonstrations)).encode()
    except UnicodeEncodeError as error:
        raise Unusable(
            "bad_text", f"half a surrogate pair, which no tokenizer takes: {error.reason}"
        ) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise Unusable("broken_json", f"not JSON: {error}") from None
    return hashlib.blake2b(prompt, digest_size=16).digest(), hashlib.blake2b(answer, digest_size=16).digest()
