"""Training data: files of records -> single-step examples, and a list of everything that was left out and why."""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prompts import ToolCall, build_messages, encode_prompt, render_calls, strict_json
from toolace import parse_toolace_calls

ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}


class DataError(ValueError):
    """A file that cannot be used; the message names the file, the line where there is one, and what to do."""


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


class _Unusable(Exception):
    """(reason, detail): the record or step at hand cannot become an example. Never leaves this file."""


# ------------------------------------------------------------------------------------------ records -> examples


def _require(record: dict, **types: Any) -> None:
    if bad := [field for field, wanted in types.items() if not isinstance(record.get(field), wanted)]:
        raise _Unusable("missing_field", f"missing or of the wrong type: {', '.join(bad)}; found: {', '.join(record)}")


def _decode(value: Any, field: str) -> Any:
    """The JSON in a string field. Lists that were never encoded go the same way, so NaN is refused in them too."""
    try:
        return strict_json(value if isinstance(value, str) else json.dumps(value))
    except (ValueError, RecursionError) as error:
        raise _Unusable("broken_json", f"{field} is not JSON: {error}") from None


def _check_text(record: dict) -> None:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _Unusable("bad_text", f"half a surrogate pair, which no tokenizer takes: {error.reason}") from None


def _named(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, dict) and isinstance(v.get("name"), str) for v in value)


def _check_tools(tools: Any) -> list[dict]:
    if not tools or not _named(tools):
        raise _Unusable("no_tools", f"not a list of tools with names: {str(tools)[:80]}")
    return tools


def _check_calls(calls: Any, tools: list[dict]) -> list[ToolCall]:
    """JSON [{"name", "arguments"}, ...] -> calls, all of them of listed tools."""
    if not _named(calls) or not all(isinstance(call.get("arguments"), dict) for call in calls):
        raise _Unusable("bad_answer", f"not a list of name and arguments: {str(calls)[:80]}")
    if unknown := {call["name"] for call in calls} - {tool["name"] for tool in tools}:
        raise _Unusable("unknown_tool", f"not among the tools: {', '.join(sorted(unknown))}")
    return [ToolCall(call["name"], call["arguments"]) for call in calls]


def _from_xlam(record: dict, rid: str, line: int) -> Iterator[Example | Dropped]:
    _require(record, id=(int, str), query=str, tools=(str, list), answers=(str, list))
    tools = _check_tools(_decode(record["tools"], "tools"))
    answer = _check_calls(_decode(record["answers"], "answers"), tools)
    yield Example(rid, "xlam", [{"role": "user", "content": record["query"]}], tools, answer)


def _find_tools(text: str) -> list[dict]:
    """The first JSON list of tools inside `text`. Other brackets, such as "[func1(...)]", are passed over."""
    at = text.find("[")
    while at >= 0:
        try:
            value, end = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError):
            value, end = None, at + 1
        # "parameters" tells tools from a list of named things inside a tool list that is itself broken.
        if value and _named(value) and all("parameters" in tool for tool in value):
            return value
        at = text.find("[", end)
    raise _Unusable("no_tools", "no JSON list of tools in `tools` or `system`")


def _calls_of_turn(text: str, tools: list[dict]) -> list[ToolCall]:
    """The calls of a call turn, in ToolACE's notation or, as re-packed files have it, in JSON."""
    # With any_name, because a call of an unknown tool deserves its own reason.
    calls = parse_toolace_calls(text, [tool["name"] for tool in tools], any_name=True)
    try:
        value = strict_json(text) if calls is None else [asdict(call) for call in calls]
        if value:  # an empty list is a failed conversion in the known files, not a refusal
            return _check_calls(value if isinstance(value, list) else [value], tools)
    except (ValueError, RecursionError):
        pass
    except _Unusable as error:
        if error.args[0] == "unknown_tool":
            raise
    raise _Unusable("unparsable_calls", f"cannot read the calls: {text[:80]!r}")


def _from_toolace(record: dict, rid: str, line: int) -> Iterator[Example | Dropped]:
    """One example per call turn: all before it is context. The system text is left out, because it asks for ToolACE's
    own notation, and our prompt lists the tools already."""
    _require(record, conversations=list)
    messages, stepless = [], True
    sources = [record.get(field, "") for field in ("tools", "system")]
    tools = _find_tools("\n".join(source if isinstance(source, str) else json.dumps(source) for source in sources))
    for index, turn in enumerate(record["conversations"]):
        if not isinstance(turn, dict) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
            raise _Unusable("bad_turn", f"turn {index} has an unknown role or no text: {str(turn)[:80]}")
        message = {"role": ROLES[turn["from"]], "content": turn["value"]}
        if turn["from"] == "function_call" or (message["role"] == "assistant" and turn["value"].lstrip()[:1] == "["):
            stepless = False
            try:
                calls = _calls_of_turn(turn["value"], tools)
                yield Example(f"{rid}#{index}", "toolace", list(messages), tools, calls)
                message = {"role": "assistant", "content": "", "calls": calls}
            except _Unusable as error:  # only this step: later ones keep the turn as plain text
                yield Dropped("toolace", f"{rid}#{index}", line, *error.args)
        messages.append(message)
    if stepless:
        raise _Unusable("no_calls", "no turn of the conversation is a call")


def _from_ours(record: dict, rid: str, line: int) -> Iterator[Example | Dropped]:
    _require(record, id=str, source=str, messages=list, tools=list, answer=list)
    tools = record["tools"] and _check_tools(record["tools"])
    messages = []
    for message in record["messages"]:
        if not isinstance(message, dict) or message.get("role") not in ROLES.values():
            raise _Unusable("bad_turn", f"unknown role: {str(message)[:80]}")
        if not isinstance(message.get("content", ""), str):
            raise _Unusable("bad_turn", f"content is not a text: {str(message)[:80]}")
        # Past calls may name tools that are no longer listed; only the answer must not.
        past = message.get("calls") and {"calls": _check_calls(message["calls"], message["calls"])}
        messages.append(message | (past or {}))
    demonstrations = record.get("demonstrations") or []
    if not isinstance(demonstrations, list) or not all(isinstance(text, str) for text in demonstrations):
        raise _Unusable("missing_field", "demonstrations must be a list of texts")
    yield Example(rid, record["source"], messages, tools, _check_calls(record["answer"], tools), tuple(demonstrations))


LAYOUTS = {  # keys that tell a layout, and its reader
    "xlam": ({"query", "tools", "answers"}, _from_xlam),
    "toolace": ({"conversations"}, _from_toolace),
    "examples": ({"messages", "answer"}, _from_ours),
}


# ---------------------------------------------------------------------------------------------- files -> records


def _read_records(path: Path) -> list[tuple[int, Any]]:
    """A JSON array or JSONL, perhaps gzipped -> numbered records; in place of a broken line stands its error."""
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; give a UTF-8 text file or its .gz") from None
    if not text.strip():
        raise DataError(f"{path} is empty; give a file with at least one record")
    if text.lstrip().startswith("["):
        try:
            return list(enumerate(json.loads(text), 1))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not a JSON array: {error}; repair the file or fetch it again") from None
    records = []
    for line, item in enumerate(text.split("\n"), 1):  # not splitlines(): U+2028 may stand inside a JSON string
        if item.strip():
            try:
                records.append((line, json.loads(item)))
            except (ValueError, RecursionError) as error:
                records.append((line, error))
    return records


def _load(path: str | Path, layout: str | None) -> tuple[list[Example], list[Dropped]]:
    records, examples, dropped = _read_records(Path(path)), [], []
    first = next(((line, record) for line, record in records if isinstance(record, dict)), None)
    if first is None:
        line, error = records[0] if records else (1, "no records")
        raise DataError(f"{path}:{line}: {str(error)[:80]}; expected a JSON array or one JSON object per line")
    layout = layout or next((name for name, (keys, _) in LAYOUTS.items() if keys <= set(first[1])), None)
    if layout is None:
        known = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, (keys, _) in LAYOUTS.items())
        raise DataError(f"{path}:{first[0]}: unknown layout: found keys {', '.join(first[1])}; known are {known}")
    for line, record in records:
        if not isinstance(record, dict):
            dropped.append(Dropped(layout, "", line, "broken_json", f"not a JSON object: {str(record)[:80]}"))
            continue
        rid = str(line - 1 if record.get("id") is None else record["id"])
        try:
            _check_text(record)
            for made in LAYOUTS[layout][1](record, rid, line):
                (examples if isinstance(made, Example) else dropped).append(made)
        except _Unusable as error:
            dropped.append(Dropped(layout, rid, line, *error.args))
    return examples, dropped


def load_xlam(path: str | Path) -> tuple[list[Example], list[Dropped]]:
    """xLAM-function-calling-60k: {"id", "query", "tools", "answers"}, the last two JSON strings or lists. DataError for
    a file that is no JSON; drops broken_json, missing_field, no_tools, bad_answer, unknown_tool, bad_text."""
    return _load(path, "xlam")


def load_toolace(path: str | Path) -> tuple[list[Example], list[Dropped]]:
    """ToolACE: {"system", "conversations": [{"from", "value"}]} -> an example per call turn, id "record#turn". DataError
    for a file that is no JSON; drops broken_json, missing_field, no_tools, no_calls, bad_turn, unparsable_calls,
    unknown_tool, bad_text."""
    return _load(path, "toolace")


def load_examples(path: str | Path) -> tuple[list[Example], list[Dropped]]:
    """Any known layout, told by the keys of the first record: xLAM, ToolACE, or what write_examples wrote. DataError for
    a missing, empty or unreadable file and for an unknown layout."""
    return _load(path, None)


def write_examples(path: str | Path, examples: Sequence[Example]) -> None:
    """One JSON line per example, calls as {"name", "arguments"}; load_examples reads it back. Raises OSError."""
    lines = [json.dumps(asdict(example)) + "\n" for example in examples]
    data = "".join(lines).encode()
    Path(path).write_bytes(gzip.compress(data) if Path(path).suffix == ".gz" else data)


KINDS = ("single", "choice", "parallel", "none")


def example_kind(example: Example) -> str:
    """none (empty answer), parallel (several calls), single (one tool to choose from) or choice."""
    if len(example.answer) != 1:
        return "parallel" if example.answer else "none"
    return "single" if len(example.tools) == 1 else "choice"


# ------------------------------------------------------------------------------------------------- from data to prompts


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


def load_splits(config) -> Splits:
    """Training and held-out examples as the config asks: generated for "synthetic", else read from files.

    Prints what was dropped, by reason. Raises DataError when nothing is left to train on.
    """
    if config.data == "synthetic":
        from synthetic import synthetic_splits  # here, because synthetic.py builds on this file's Example

        return synthetic_splits(config)
    if not config.data:
        raise DataError("data: no training file given; use --data FILE[,FILE] or --data synthetic")
    train, held_out = load_files(config.data), []
    if config.test_data:
        held_out = load_files(config.test_data)
        if not held_out:
            raise DataError(f"test_data: {config.test_data} holds no usable example; run: python data.py inspect FILE")
    elif config.test_share:
        # By record, not by step: the later steps of a conversation contain the answers of the earlier ones.
        records = sorted({example.id.split("#")[0] for example in train})
        cut = round(len(records) * config.test_share)
        apart = set(random.Random(f"{config.seed}/split").sample(records, cut))
        held_out = [example for example in train if example.id.split("#")[0] in apart]
        train = [example for example in train if example.id.split("#")[0] not in apart]
    if not train:
        raise DataError(f"data: {config.data} leaves no example to train on; run: python data.py inspect FILE")
    # A random part of them, or only the first file's would be evaluated.
    held_out = random.Random(f"{config.seed}/cases").sample(held_out, min(config.eval_cases, len(held_out)))
    return Splits(train, {"held_out": held_out} if held_out else {})


def load_files(paths: str) -> list[Example]:
    """The examples of comma-separated files, with a printed line about each file and what it dropped."""
    examples, seen = [], set()
    for path in filter(None, (part.strip() for part in paths.split(","))):
        kept, dropped = load_examples(path)
        reasons = Counter(one.reason for one in dropped)
        for example in kept:
            fingerprint = json.dumps(asdict(replace(example, id="", demonstrations=())), sort_keys=True)
            reasons["duplicate"] += fingerprint in seen
            if fingerprint not in seen:
                examples.append(example)
            seen.add(fingerprint)
        if int(os.environ.get("RANK", 0)) == 0:
            lost = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common() if count)
            used = len(kept) - reasons["duplicate"]
            print(f"data: {path}: {used} examples" + (f", dropped: {lost}" if lost else ""))
            for one in dropped[:3]:
                print(f"data: {path}:{one.line} id={one.id or '?'}: {one.reason}: {one.detail}")
            if len(dropped) > 3:
                print(f"data: … all dropped records: python data.py inspect {path}")
    return examples


def tokenize_splits(splits: Splits, tokenizer, template: str, config, quiet: bool = False) -> Splits:
    """Prompts as token ids; those longer than max_prompt_tokens are counted, said and skipped.

    Raises DataError when no training prompt is short enough.
    """
    limit, skipped = config.max_prompt_tokens, 0

    def encode(examples: Sequence[Example]) -> list[Tokenized]:  # counts what it leaves out
        nonlocal skipped
        kept = []
        for example in tqdm(examples, desc="tokenize", leave=False, disable=quiet):
            ids = encode_prompt(tokenizer, example.messages, example.tools, template)
            if len(ids) <= limit:
                kept.append(Tokenized(example, ids))
        skipped += len(examples) - len(kept)
        return kept

    train = encode(splits.train)
    held_out = {name: kept for name, examples in splits.held_out.items() if (kept := encode(examples))}
    if skipped and not quiet:
        print(f"data: {skipped} prompts are longer than max_prompt_tokens ({limit}) and are skipped")
    if not train:
        raise DataError(f"data: all {len(splits.train)} training prompts are longer than max_prompt_tokens ({limit})")
    return Splits(train, held_out)


def inspect(path: str, count: int = 3) -> None:
    """Prints how many examples a file gives, of which kinds, what was dropped and why, and a few prompts and targets."""
    examples, dropped = load_examples(path)
    kinds = Counter(example_kind(example) for example in examples)
    print(f"{path}: {len(examples)} examples ({', '.join(f'{kinds[k]} {k}' for k in KINDS if kinds[k])})")
    for one in dropped[:20]:
        print(f"  dropped: line {one.line}, id {one.id or '?'}: {one.reason}: {one.detail}")
    if len(dropped) > 20:
        print(f"  … and {len(dropped) - 20} more; by reason: {dict(Counter(one.reason for one in dropped))}")
    for example in examples[:count]:
        print(f"\n{'=' * 20} {example.source} {example.id}")
        for message in build_messages(example.messages, example.tools):
            print(f"--- {message['role']}\n{message['content']}")
        print(f"--- target\n{render_calls(example.answer)}")


def main(arguments: list[str]) -> None:
    """`inspect PATH [COUNT]`."""
    if len(arguments) not in (2, 3) or arguments[0] != "inspect" or not "".join(arguments[2:] or ["0"]).isdigit():
        raise DataError("usage: python data.py inspect PATH [COUNT]")
    inspect(arguments[1], int(arguments[2]) if arguments[2:] else 3)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DataError as error:
        sys.exit(f"error: {error}")
