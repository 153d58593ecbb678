"""Records -> single-step examples: a reader for every layout, what it refuses and why, and what we write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from corpus import toolace
from corpus.examples import STRICT, Dropped, Example, Rules, Unusable, hashes_of, to_json
from corpus.schema import required, wrong_types
from corpus.sources import DataError, find_files, is_columns, read_files
from prompts import ToolCall, build_messages, strict_json


def _require(record: dict, **types: Any) -> None:
    if bad := [field for field, wanted in types.items() if not isinstance(record.get(field), wanted)]:
        detail = f"missing or of the wrong type: {', '.join(bad)}; found: {', '.join(record)}"
        raise Unusable("missing_field", detail)


def _decode(value: Any, field: str) -> Any:
    """The JSON in a string field; a value that was never encoded stays as it is."""
    try:
        return strict_json(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise Unusable("broken_json", f"{field} is not JSON: {error}") from None


def _check_tools(tools: Any) -> list[dict]:
    if not tools or not toolace.is_named(tools):
        raise Unusable("no_tools", f"not a list of tools with names: {str(tools)[:80]}")
    return tools


def _check_calls(calls: Any, tools: list[dict]) -> list[ToolCall]:
    """JSON [{"name", "arguments"}, ...] -> calls, all of them of listed tools."""
    if not toolace.is_named(calls) or not all(isinstance(call.get("arguments"), dict) for call in calls):
        raise Unusable("bad_answer", f"not a list of name and arguments: {str(calls)[:80]}")
    if unknown := {call["name"] for call in calls} - {tool["name"] for tool in tools}:
        raise Unusable("unknown_tool", f"not among the tools: {', '.join(sorted(unknown))}")
    return [ToolCall(call["name"], call["arguments"]) for call in calls]


def _check_arguments(calls: list[ToolCall], tools: list[dict], rules: Rules) -> None:
    """Raises where a call contradicts its tool's declaration; of tools with one name it need fit only one."""
    for call in calls:
        found = [_complaint(call, tool, rules) for tool in tools if tool["name"] == call.name]
        if all(found):
            raise Unusable(*found[0])


def _complaint(call: ToolCall, tool: dict, rules: Rules) -> tuple[str, str] | None:
    missing = [name for name in required(tool) if name not in call.arguments]
    if missing and "missing_argument" not in rules.keep:
        return "missing_argument", f"{call.name} needs {', '.join(missing)}"
    if "wrong_type" not in rules.keep and (wrong := wrong_types(call.arguments, tool)):
        return "wrong_type", f"{call.name}: {'; '.join(wrong)}"
    return None


def _dropped(name: str, line: int, error: Unusable) -> Dropped:
    reason, detail = error.args
    # Half surrogate pairs become "?", so that both can be printed.
    name, detail = (text.encode("utf-8", "replace").decode() for text in (name, detail))
    return Dropped(line, name, reason, detail)


def _from_xlam(record: dict, rid: str, line: int, rules: Rules) -> Iterator[Example | Dropped]:
    _require(record, id=(int, str), query=str, tools=(str, list), answers=(str, list))
    tools = _check_tools(_decode(record["tools"], "tools"))
    answer = _check_calls(_decode(record["answers"], "answers"), tools)
    _check_arguments(answer, tools, rules)
    yield Example(rid, "xlam", [{"role": "user", "content": record["query"]}], tools, answer)


def _calls_of_turn(text: str, tools: list[dict]) -> list[ToolCall]:
    """The calls of a call turn, in ToolACE's notation or, as re-packed files have it, in JSON."""
    # any_name, because a call of an unknown tool deserves its own reason.
    calls = toolace.parse_toolace_calls(text, [tool["name"] for tool in tools], any_name=True)
    try:
        value = strict_json(text) if calls is None else [call.as_dict() for call in calls]
        if value:  # an empty list is a failed conversion in the known files, not a refusal
            return _check_calls(value if isinstance(value, list) else [value], tools)
    except (ValueError, RecursionError):
        pass
    except Unusable as error:
        if error.args[0] == "unknown_tool":
            raise
    raise Unusable("unparsable_calls", f"cannot read the calls: {text[:80]!r}")


def _from_toolace(record: dict, rid: str, line: int, rules: Rules) -> Iterator[Example | Dropped]:
    """One example per call turn, with id "record#turn": all before the turn is context.

    The system text is left out: it asks for ToolACE's own notation, and our prompt lists the tools already.
    """
    _require(record, conversations=list)
    turns = record["conversations"]
    messages = []
    stepless = True
    holders = [record.get(field, "") for field in ("tools", "system")]
    texts = [text if isinstance(text, str) else json.dumps(text, default=str) for text in holders]
    if (tools := toolace.find_tools("\n".join(texts))) is None:
        raise Unusable("no_tools", "no JSON list of tools in `tools` or `system`")
    names = [tool["name"] for tool in tools]
    for index, turn in enumerate(turns):
        if (role := toolace.role_of(turn)) is None:
            raise Unusable("bad_turn", f"turn {index} has an unknown role or no text: {str(turn)[:80]}")
        message = {"role": role, "content": turn["value"]}
        if toolace.is_call_turn(turn):
            stepless = False
            try:
                calls = _calls_of_turn(turn["value"], tools)
                message = {"role": "assistant", "content": "", "calls": calls}
                _check_arguments(calls, tools, rules)  # calls that fail this are context all the same
                yield Example(f"{rid}#{index}", "toolace", list(messages), tools, calls)
            except Unusable as error:  # only this step: later ones keep unreadable calls as plain text
                yield _dropped(f"{rid}#{index}", line, error)
        elif rules.no_call_turns and role == "assistant":
            stepless = False
            if toolace.is_text_step(turns, index, names):
                yield Example(f"{rid}#{index}", "toolace", list(messages), tools, [])
            else:
                detail = f"the text does not show that no call was right: {turn['value'][:80]!r}"
                yield _dropped(f"{rid}#{index}", line, Unusable("unclear_turn", detail))
        messages.append(message)
    if stepless:
        raise Unusable("no_calls", "no turn of the conversation is a call")


def _from_ours(record: dict, rid: str, line: int, rules: Rules) -> Iterator[Example | Dropped]:
    _require(record, id=str, source=str, messages=list, tools=list, answer=list)
    tools = record["tools"] and _check_tools(record["tools"])
    messages = []
    for message in record["messages"]:
        known = isinstance(message, dict) and message.get("role") in toolace.ROLES.values()
        if not known or not isinstance(message.get("content", ""), str):
            raise Unusable("bad_turn", f"unknown role, or content that is no text: {str(message)[:80]}")
        # Past calls may name tools that are no longer listed; only the answer must not.
        past = message.get("calls") and {"calls": _check_calls(message["calls"], message["calls"])}
        messages.append(message | (past or {}))
    demonstrations = record.get("demonstrations") or []
    if not isinstance(demonstrations, list) or not all(isinstance(text, str) for text in demonstrations):
        raise Unusable("missing_field", "demonstrations must be a list of texts")
    answer = _check_calls(record["answer"], tools)
    yield Example(rid, record["source"], messages, tools, answer, tuple(demonstrations))


def _from_trl(record: dict, rid: str, line: int, rules: Rules) -> Iterator[Example | Dropped]:
    """A row of trl_row, or of verl_row, which has the same columns inside two others."""
    columns = dict(record)
    for holder in ("extra_info", "reward_model"):
        if isinstance(record.get(holder), dict):
            columns.update(record[holder])
    encoded = ("messages_json", "tools_json", "demonstrations_json", "ground_truth")
    if not all(isinstance(columns.get(field), str) for field in ("id", "source", *encoded)):
        raise Unusable("foreign_row", "no messages_json and tools_json: not written by `data.py prepare`")
    fields = {field.removesuffix("_json"): _decode(columns[field], field) for field in encoded}
    yield from _from_ours(columns | fields | {"answer": fields["ground_truth"]}, rid, line, rules)


LAYOUTS = {  # keys that tell a layout, and its reader
    "xlam": ({"query", "tools", "answers"}, _from_xlam),
    "toolace": ({"conversations"}, _from_toolace),
    "examples": ({"messages", "answer"}, _from_ours),
    "trl": ({"prompt", "ground_truth"}, _from_trl),
    "verl": ({"prompt", "reward_model"}, _from_trl),
}


def _layout_of(record: Any) -> str | None:
    keys = set(record) if isinstance(record, dict) else set()
    return next((name for name, (known, _) in LAYOUTS.items() if known <= keys), None)


def _start(source: str | Path, layout: str | None) -> tuple[str, Iterator[tuple[int, Any]]]:
    """The layout of a file, and its records. Raises DataError without a record of a known layout."""
    records = read_files(find_files(source))
    head = []
    for numbered in records:
        head.append(numbered)
        if isinstance(numbered[1], dict):
            break
    else:
        line, error = head[0] if head else (1, "no records")
        raise DataError(f"{source}:{line}: {str(error)[:60]}; give a JSON array or one JSON object per line")
    line, first = head[-1]
    if is_columns(first):
        what = "an object of columns, as pandas' to_json writes it"
        raise DataError(f"{source}:{line}: {what}; use orient='records', or give one JSON object per record")
    told = _layout_of(first)
    if told is None:
        for key, value in first.items():
            if isinstance(value, list) and any(map(_layout_of, value)):
                what = f"an object around the array of records, {key!r}"
                raise DataError(f"{source}:{line}: {what}; give the array alone, or one JSON object per line")
        known = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, (keys, _) in LAYOUTS.items())
        raise DataError(f"{source}:{line}: unknown layout: found keys {', '.join(first)}; known are {known}")
    if layout not in (None, told):
        raise DataError(f"{source}:{line}: the layout is that of {told}, not of {layout}; give another file")
    return told, chain(head, records)


@dataclass(frozen=True)
class Read:
    """What became of one record."""

    layout: str
    line: int
    record: Any
    examples: list[Example]
    dropped: list[Dropped]


def read_examples(
    source: str | Path, layout: str | None = None, rules: Rules = STRICT, prefix: str = "",
    seen: dict[bytes, str] | None = None,
) -> Iterator[Read]:
    """What becomes of each record of a file, one after the other. Repeated examples are dropped.

    source: as for sources.find_files. layout: the one that it must have. prefix: set before every id; an id
    that an earlier record has gets "@line" behind it. seen: hash -> name of the examples before these.
    Raises DataError for a missing, empty or unreadable file and for an unknown layout.
    """
    layout, records = _start(source, layout)
    seen = {} if seen is None else seen
    ids = set()
    for line, record in records:
        rid = prefix + _own_id(record, line)
        rid = f"{rid}@{line}" if rid in ids else rid
        ids.add(rid)
        read = Read(layout, line, record, [], [])
        try:
            if not isinstance(record, dict):
                raise Unusable("broken_json", f"not a JSON object: {str(record)[:80]}")
            for made in LAYOUTS[layout][1](record, rid, line, rules):
                if isinstance(made, Dropped):
                    read.dropped.append(made)
                    continue
                try:
                    _refuse_repeats(made, rules, seen, f"{made.id} of {Path(source).name}")
                    read.examples.append(made)
                except Unusable as error:
                    read.dropped.append(_dropped(made.id, line, error))
        except Unusable as error:
            read.dropped.append(_dropped(rid, line, error))
        yield read


def _own_id(record: Any, line: int) -> str:
    """The id that a record gives, verl's rows inside `extra_info`; else its position from 0."""
    holders = (record, record.get("extra_info")) if isinstance(record, dict) else ()
    ids = [one["id"] for one in holders if isinstance(one, dict) and one.get("id") is not None]
    return str(ids[0]) if ids else str(line - 1)


def _refuse_repeats(example: Example, rules: Rules, seen: dict[bytes, str], name: str) -> None:
    """Raises for an example that came before: `duplicate`, or `contradiction` if with another answer.

    Of a contradiction the first stays, so that no prompt is lost or paid for two different answers.
    """
    prompt, answer = hashes_of(example)
    if first := seen.get(prompt + answer):
        raise Unusable("duplicate", f"the same messages, tools and answer as {first}")
    if "contradiction" not in rules.keep and (first := seen.get(prompt)):
        raise Unusable("contradiction", f"the same messages and tools as {first}, but another answer")
    seen[prompt + answer] = name
    seen.setdefault(prompt, name)


def load_examples(source: str | Path, seen: dict | None = None) -> tuple[list[Example], list[Dropped]]:
    """The examples of a file, by strict rules, and what was dropped. Arguments and errors: read_examples."""
    examples, dropped = [], []
    quiet = None if int(os.environ.get("RANK", 0)) == 0 else True  # None: shown on a terminal only
    reads = read_examples(source, seen=seen)
    for read in tqdm(reads, f"read {source}", unit=" records", leave=False, disable=quiet):
        examples += read.examples
        dropped += read.dropped
    return examples, dropped


def trl_row(example: Example, template: str) -> dict:
    """A row for TRL's GRPOTrainer: a `prompt` of messages with our system prompt, columns for the reward.

    What the row was made from stands in JSON strings. Not in columns `tools` or `messages`: TRL hands the
    first to the chat template, which would print the tools twice, and takes the second for the prompt.
    """
    return {
        "prompt": build_messages(example.messages, example.tools, template),
        "ground_truth": to_json(example.answer), "id": example.id, "source": example.source,
        "messages_json": to_json(example.messages), "tools_json": to_json(example.tools),
        "demonstrations_json": to_json(example.demonstrations),
    }


def verl_row(example: Example, template: str, split: str, index: int) -> dict:
    """A row for verl. JSON strings, because a column of Parquet has one type and would make 1 of a 1.0."""
    row = trl_row(example, template)
    return {
        "data_source": example.source, "prompt": row.pop("prompt"), "ability": "tool_call",
        "reward_model": {"style": "rule", "ground_truth": row.pop("ground_truth")},
        "extra_info": {"split": split, "index": index} | row,
    }


def write_examples(path: str | Path, examples: Iterable[Example]) -> None:
    """One JSON line per example, its fields as they are; load_examples reads it back. Raises OSError."""
    write_rows(Path(path), map(vars, examples))


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """One JSON line per row; Parquet, of rows of verl_row, for .parquet.

    The file appears when it is complete. Raises OSError, and ImportError for .parquet without pyarrow.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        if path.suffix == ".parquet":
            _write_parquet(partial, iter(rows))
        else:
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(f"{to_json(row)}\n" for row in rows)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_parquet(path: Path, rows: Iterator[dict]) -> None:
    import pyarrow  # optional
    from pyarrow import parquet

    text = pyarrow.string()
    names = ("split", "id", "source", "messages_json", "tools_json", "demonstrations_json")
    columns = {
        "data_source": text,
        "prompt": pyarrow.list_(pyarrow.struct([("role", text), ("content", text)])),
        "ability": text,
        "reward_model": pyarrow.struct([("style", text), ("ground_truth", text)]),
        "extra_info": pyarrow.struct([("index", pyarrow.int64()), *((name, text) for name in names)]),
    }
    with parquet.ParquetWriter(path, schema := pyarrow.schema(columns)) as writer:
        while batch := list(islice(rows, 2000)):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
