"""The records that cross files: a training example, what judges it, its JSON, and the split by record."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from corpus.strict_json import MAX_DEPTH, nested_deeper
from prompts import ToolCall

KINDS = ("single", "choice", "parallel", "none")
PUNCTUATION = re.compile(r"[^\w\s]|_")
# Unicode's form NFKC sorts the marks of a character, in quadratic time; 30 are its own limit (UAX 15).
MANY_MARKS = re.compile(r"([^\w\s]{30})[^\w\s]+")
UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")  # Japanese and Chinese: no spaces between words


@dataclass(frozen=True)
class Example:
    """One step to learn: the conversation so far, the tools, and the calls that are right now."""

    id: str  # of the record, or "record#turn" where a record may have several steps
    source: str  # "xlam", "toolace", "synthetic", ...
    # role (user, assistant, tool, system), content, and for past calls `calls`, a list[ToolCall]
    messages: list[dict]
    tools: list[dict]  # {"name", "description", "parameters"} as the record gives them
    answer: list[ToolCall]  # ground truth; [] = no call is right
    demonstrations: tuple[str, ...] = ()  # replies to imitate (sft.py), may be empty
    # The record in its file that the step belongs to; "" where it is the id. Splits go by it: later steps
    # contain the answers of earlier ones.
    record: str = ""


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
class Dropped:
    """A record or step left out. `line`: of a JSONL file its line, else the record's position from 1."""

    line: int
    id: str
    reason: str
    detail: str


class Unusable(Exception):
    """(reason, detail): the record or step in hand cannot become an example."""

    def dropped(self, name: str, line: int) -> Dropped:
        """The record or step `name` with what is wrong with it."""
        reason, detail = self.args
        # Half surrogate pairs become "?", so that both can be printed.
        name, detail = (text.encode("utf-8", "replace").decode() for text in (name, detail))
        return Dropped(line, name, reason, detail)


def example_kind(example: Example) -> str:
    """none (empty answer), parallel (several calls), single (one tool to choose from) or choice."""
    if len(example.answer) != 1:
        return "parallel" if example.answer else "none"
    return "single" if len(example.tools) == 1 else "choice"


def record_of(example: Example) -> str:
    """The record that a step belongs to."""
    return example.record or example.id


def normalise(text: str) -> list[str]:
    """Lower-case words without punctuation; a Chinese or Japanese character is a word."""
    if not text.isascii():
        text = UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFKC", MANY_MARKS.sub(r"\1", text)))
    return PUNCTUATION.sub("", text.lower()).split()


def user_messages(messages: Iterable[dict]) -> tuple[str, ...]:
    """The contents of the user's messages."""
    return tuple(message.get("content") or "" for message in messages if message["role"] == "user")


def queries_of(example: Example) -> tuple[str, ...]:
    """What the user says, normalised, one text a message."""
    return tuple(" ".join(normalise(text)) for text in user_messages(example.messages))


def hold_out(records: Iterable[str], share: float, seed: int) -> set[str]:
    """The given share of the records: those with the smallest hashes of (seed, record).

    So the split depends on seed and ids alone, and another file more or less moves few records.
    """
    ranked = sorted(set(records), key=lambda name: hashlib.sha256(f"{seed}/split/{name}".encode()).digest())
    return set(ranked[: round(len(ranked) * share)])


def split_records(examples: Sequence[Example], share: float, seed: int) -> tuple[list, list]:
    """(the examples to train on, those of the held-out records), each in their order."""
    apart = hold_out(map(record_of, examples), share, seed)
    held_out = [example for example in examples if record_of(example) in apart]
    return [example for example in examples if record_of(example) not in apart], held_out


def _as_dict(value: Any) -> dict:
    if not isinstance(value, ToolCall):
        raise TypeError(f"{value!r:.80}")
    return value.as_dict()


# What was read from JSON holds no cycles, and looking for them costs a seventh of the time.
_ENCODER = json.JSONEncoder(default=_as_dict, check_circular=False)
_CANONICAL = json.JSONEncoder(
    default=_as_dict, check_circular=False, sort_keys=True, ensure_ascii=False, allow_nan=False
)


def to_json(value: Any) -> str:
    """JSON of anything in an example, calls as {"name", "arguments"}."""
    return _ENCODER.encode(value)


def hashes_of(example: Example) -> tuple[bytes, bytes]:
    """Hashes of the prompt and of the answer, whose calls may stand in any order.

    Also the last check of an example: all of it must be JSON, and text that a tokenizer takes.
    """
    try:
        prompt = _CANONICAL.encode([example.messages, example.tools]).encode()
        answer = "\n".join(sorted(_CANONICAL.encode(call) for call in example.answer)).encode()
        "".join((example.id, example.source, *example.demonstrations)).encode()
        calls = chain(example.answer, *(message.get("calls") or () for message in example.messages))
        if nested_deeper([example.tools, *(call.arguments for call in calls)], MAX_DEPTH):
            raise RecursionError(f"tools or calls are nested more than {MAX_DEPTH} deep")
    except UnicodeEncodeError as error:
        detail = f"half a surrogate pair, which no tokenizer takes: {error.reason}"
        raise Unusable("bad_text", detail) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise Unusable("broken_json", f"not JSON: {error}") from None
    return hashlib.blake2b(prompt, digest_size=16).digest(), hashlib.blake2b(answer, digest_size=16).digest()


def unseen(train: Iterable[Example], held_out: Iterable[Example]) -> list[Example]:
    """The training examples that are no step of a held-out conversation: with tools of the same names, and
    white space aside, neither prompt is the other, nor its beginning.
    """
    whole: set[bytes] = set()
    begun: set[bytes] = set()
    for example in held_out:
        hashes = _beginnings(example)
        whole.add(hashes[-1])
        begun.update(hashes)
    if not whole:
        return list(train)
    kept = []
    for example in train:
        hashes = _beginnings(example)
        if hashes[-1] not in begun and whole.isdisjoint(hashes):
            kept.append(example)
    return kept


def _beginnings(example: Example) -> list[bytes]:
    """A hash of the tools' names and the first message, of them and the second message, and so on."""
    names = sorted(tool["name"] for tool in example.tools)
    state = hashlib.blake2b(_CANONICAL.encode(names).encode(), digest_size=16)
    hashes = []
    for message in example.messages:
        calls = _CANONICAL.encode(message["calls"]) if message.get("calls") else ""
        said = [message["role"], calls, *(message.get("content") or "").split(), "\n"]
        state.update("\0".join(said).encode())
        hashes.append(state.digest())
    return hashes
