"""Single records -> single-step examples: the readers of every layout, what they refuse and why, and the rows
they write.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from corpus.examples import STRICT, Dropped, Example, Rules, Unusable, _plain, example_row, hashes_of, to_json
from corpus.schema import missing_arguments, wrong_types
from corpus.sources import DataError, find_file, read_records
from corpus.toolace import (
    ROLES,
    find_tools,
    is_call_turn,
    is_named,
    is_text_step,
    parse_toolace_calls,
    role_of,
)
from prompts import ToolCall, build_messages, strict_json

# ---------------------------------------------------------------------------------------- records -> examples


def _require(record: dict, **types: Any) -> None:
    if bad := [field for field, wanted in types.items() if not isinstance(record.get(field), wanted)]:
        raise Unusable(
            "missing_field", f"missing or of the wrong type: {', '.join(bad)}; found: {', '.join(record)}"
        )


def _decode(value: Any, field: str) -> Any:
    """The JSON in a string field; a value that was never encoded stays as it is."""
    try:
        return strict_json(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise Unusable("broken_json", f"{field} is not JSON: {error}") from None


def _check_tools(tools: Any) -> list[dict]:
    if not tools or not is_named(tools):
        raise Unusable("no_tools", f"not a list of tools with names: {str(tools)[:80]}")
    return tools


def _check_calls(calls: Any, tools: list[dict]) -> list[ToolCall]:
    """JSON [{"name", "arguments"}, ...] -> calls, all of them of listed tools."""
    if not is_named(calls) or not all(isinstance(call.get("arguments"), dict) for call in calls):
        raise Unusable("bad_answer", f"not a list of name and arguments: {str(calls)[:80]}")
    if unknown := {call["name"] for call in calls} - {tool["name"] for tool in tools}:
        raise Unusable("unknown_tool", f"not among the tools: {', '.join(sorted(unknown))}")
    return [ToolCall(call["name"], call["arguments"]) for call in calls]


def _check_arguments(calls: list[ToolCall], tools: list[dict], rules: Rules) -> None:
    """Raises where a call contradicts the declaration of its tool; of tools with one name, it need fit one
    only.
    """
    for call in calls:
        found = [_complaint(call, tool, rules) for tool in tools if tool["name"] == call.name]
        if all(found):
            raise Unusable(*found[0])


def _complaint(call: ToolCall, tool: dict, rules: Rules) -> tuple[str, str] | None:
    if "missing_argument" not in rules.keep and (names := missing_arguments(call.arguments, tool)):
        return "missing_argument", f"{call.name} needs {', '.join(names)}"
    if "wrong_type" not in rules.keep and (wrong := wrong_types(call.arguments, tool)):
        return "wrong_type", f"{call.name}: {'; '.join(wrong)}"
    return None


def _from_xlam(record: dict, rid: str, line: int, rules: Rules) -> Iterator[Example | Dropped]:
    _require(record, id=(int, str), query=str, tools=(str, list), answers=(str, list))
    tools = _check_tools(_decode(record["tools"], "tools"))
    answer = _check_calls(_decode(record["answers"], "answers"), tools)
    _check_arguments(answer, tools, rules)
    yield Example(rid, "xlam", [{"role": "user", "content": record["query"]}], tools, answer)


def _calls_of_turn(text: str, tools: list[dict]) -> list[ToolCall]:
    """The calls of a call turn, in ToolACE's notation or, as re-packed files have it, in JSON."""
    # With any_name, because a call of an unknown tool deserves its own reason.
    calls = parse_toolace_calls(text, [tool["name"] for tool in tools], any_name=True)
    try:
        value = strict_json(text) if calls is None else [_plain(call) for call in calls]
        if value:  # an empty list is a failed conversion in the known files, not a refusal
            return _check_calls(value if isinstance(value, list) else [value], tools)
    except (ValueError, RecursionError):
        pass
    except Unusable as error:
        if error.args[0] == "unknown_tool":
            raise
    raise Unusable("unparsable_calls", f"cannot read the calls: {text[:80]!r}")


def _from_toolace(record: dict, rid: str, line: int, rules: Rules) -> Iterator[Example | Dropped]:
    """One example per call turn: all before it is context. The system text is left out, because it asks for
    ToolACE's own notation, and our prompt lists the tools already.
    """
    _require(record, conversations=list)
    messages, stepless, turns = [], True, record["conversations"]
    sources = [record.get(field, "") for field in ("tools", "system")]
    tools = find_tools(
        "\n".join(source if isinstance(source, str) else json.dumps(source) for source in sources)
    )
    if tools is None:
        raise Unusable("no_tools", "no JSON list of tools in `tools` or `system`")
    names = [tool["name"] for tool in tools]
    for index, turn in enumerate(turns):
        if (role := role_of(turn)) is None:
            raise Unusable("bad_turn", f"turn {index} has an unknown role or no text: {str(turn)[:80]}")
        message = {"role": role, "content": turn["value"]}
        if is_call_turn(turn):
            stepless = False
            try:
                calls = _calls_of_turn(turn["value"], tools)
                message = {"role": "assistant", "content": "", "calls": calls}
                _check_arguments(calls, tools, rules)  # calls that fail this are context all the same
                yield Example(f"{rid}#{index}", "toolace", list(messages), tools, calls)
            except (
                Unusable
            ) as error:  # only this step: later ones keep calls that cannot be read as plain text
                yield Dropped("toolace", f"{rid}#{index}", line, *error.args)
        elif rules.no_call_turns and role == "assistant":
            stepless = False
            if is_text_step(turns, index, names):
                yield Example(f"{rid}#{index}", "toolace", list(messages), tools, [])
            else:
                detail = f"the text does not show that no call was right: {turn['value'][:80]!r}"
                yield Dropped("toolace", f"{rid}#{index}", line, "unclear_turn", detail)
        messages.append(message)
    if stepless:
        raise Unusable("no_calls", "no turn of the conversation is a call")


def _from_ours(record: dict, rid: str, line: int, rules: Rules) -> Iterator[Example | Dropped]:
    _require(record, id=str, source=str, messages=list, tools=list, answer=list)
    tools = record["tools"] and _check_tools(record["tools"])
    messages = []
    for message in record["messages"]:
        if not isinstance(message, dict) or message.get("role") not in ROLES.values():
            raise Unusable("bad_turn", f"unknown role: {str(message)[:80]}")
        if not isinstance(message.get("content", ""), str):
            raise Unusable("bad_turn", f"content is not a text: {str(message)[:80]}")
        # Past calls may name tools that are no longer listed; only the answer must not.
        past = message.get("calls") and {"calls": _check_calls(message["calls"], message["calls"])}
        messages.append(message | (past or {}))
    demonstrations = record.get("demonstrations") or []
    if not isinstance(demonstrations, list) or not all(isinstance(text, str) for text in demonstrations):
        raise Unusable("missing_field", "demonstrations must be a list of texts")
    yield Example(
        rid, record["source"], messages, tools, _check_calls(record["answer"], tools), tuple(demonstrations)
    )


def _from_trl(record: dict, rid: str, line: int, rules: Rules) -> Iterator[Example | Dropped]:
    """A row of prepare.trl_row or, its columns gathered by _from_verl, of verl_row."""
    encoded = ("messages_json", "tools_json", "demonstrations_json", "ground_truth")
    if not all(isinstance(record.get(field), str) for field in ("id", "source", *encoded)):
        wanted = "no messages_json and tools_json beside the prompt, so its conversation and tools cannot be told apart"
        raise Unusable("foreign_row", f"the row was not written by `data.py prepare --layouts`: {wanted}")
    fields = {field.removesuffix("_json"): _decode(record[field], field) for field in encoded}
    yield from _from_ours(record | fields | {"answer": fields["ground_truth"]}, rid, line, rules)


def _from_verl(record: dict, rid: str, line: int, rules: Rules) -> Iterator[Example | Dropped]:
    extra, reward = record.get("extra_info"), record["reward_model"]
    gathered = dict(extra) if isinstance(extra, dict) else {}
    gathered |= {"ground_truth": reward.get("ground_truth") if isinstance(reward, dict) else None}
    yield from _from_trl(gathered, rid, line, rules)


LAYOUTS = {  # keys that tell a layout, and its reader
    "xlam": ({"query", "tools", "answers"}, _from_xlam),
    "toolace": ({"conversations"}, _from_toolace),
    "examples": ({"messages", "answer"}, _from_ours),
    "trl": ({"prompt", "ground_truth"}, _from_trl),
    "verl": ({"prompt", "reward_model"}, _from_verl),
}


def trl_row(example: Example, template: str) -> dict:
    """A row for TRL's GRPOTrainer: a conversational `prompt` with our system prompt, and columns for reward
    functions.

    What the row was made from stands in JSON strings. Not in columns `tools` or `messages`: TRL hands the
    first to the chat template, which would print the tools a second time, and takes the second for the
    conversation itself.
    """
    return {
        "prompt": build_messages(example.messages, example.tools, template),
        "ground_truth": to_json(example.answer),
        "id": example.id,
        "source": example.source,
        "messages_json": to_json(example.messages),
        "tools_json": to_json(example.tools),
        "demonstrations_json": to_json(example.demonstrations),
    }


def verl_row(example: Example, template: str, split: str, index: int) -> dict:
    """A row for verl. Strings rather than nested columns: Parquet has one type per column and would make 1 of
    a 1.0.
    """
    row = trl_row(example, template)
    return {
        "data_source": example.source,
        "prompt": row.pop("prompt"),
        "ability": "tool_call",
        "reward_model": {"style": "rule", "ground_truth": row.pop("ground_truth")},
        "extra_info": {"split": split, "index": index} | row,
    }


@dataclass(frozen=True)
class Read:
    """What became of one record. hashes: of each example's prompt (messages and tools) and answer."""

    layout: str
    line: int
    record: Any
    examples: list[Example]
    hashes: list[tuple[bytes, bytes]]
    dropped: list[Dropped]


# ------------------------------------------------------------------------------------------ files -> examples


def _start(source: str | Path, layout: str | None) -> tuple[str, Iterator[tuple[int, Any]]]:
    """The layout and the records of a file. Raises DataError where there is no record, or none of a known
    layout.
    """
    records, head = read_records(find_file(source)), []
    for numbered in records:
        head.append(numbered)
        if isinstance(numbered[1], dict):
            break
    else:
        line, error = head[0] if head else (1, "no records")
        raise DataError(
            f"{source}:{line}: {str(error)[:80]}; expected a JSON array or one JSON object per line"
        )
    line, first = head[-1]
    told = next((name for name, (keys, _) in LAYOUTS.items() if keys <= set(first)), None)
    if told is None and layout is None:
        known = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, (keys, _) in LAYOUTS.items())
        raise DataError(f"{source}:{line}: unknown layout: found keys {', '.join(first)}; known are {known}")
    if None not in (told, layout) and told != layout:
        raise DataError(
            f"{source}:{line}: the layout is that of {told}, not of {layout}; give another file or option"
        )
    return layout or told, chain(head, records)


def read_examples(
    source: str | Path, layout: str | None = None, rules: Rules = STRICT, prefix: str = ""
) -> Iterator[Read]:
    """What becomes of each record of a file, one after the other.

    source: as for sources.find_file. layout: a key of LAYOUTS; None: as the first record says. prefix: set
    before every id. An id that an earlier record has gets "@line" behind it. Raises DataError.
    """
    layout, records = _start(source, layout)
    known: set[str] = set()
    for line, record in records:
        rid = prefix + _own_id(record, line)
        rid = f"{rid}@{line}" if rid in known else rid
        known.add(rid)
        yield _read(line, record, rid, layout, rules)


def _own_id(record: Any, line: int) -> str:
    """The id that a record gives, verl's rows inside `extra_info`; else its position from 0."""
    for holder in (record, record.get("extra_info") if isinstance(record, dict) else None):
        if isinstance(holder, dict) and holder.get("id") is not None:
            return str(holder["id"])
    return str(line - 1)


def _read(line: int, record: Any, rid: str, layout: str, rules: Rules) -> Read:
    examples, hashes, dropped = [], [], []

    def drop(name: str, error: Unusable) -> None:
        name, detail = (
            text.encode("utf-8", "replace").decode() for text in (name, error.args[1])
        )  # can be printed
        dropped.append(Dropped(layout, name, line, error.args[0], detail))

    try:
        if not isinstance(record, dict):
            raise Unusable("broken_json", f"not a JSON object: {str(record)[:80]}")
        for made in LAYOUTS[layout][1](record, rid, line, rules):
            if isinstance(made, Dropped):
                drop(made.id, Unusable(made.reason, made.detail))
                continue
            try:
                hashes.append(hashes_of(made))
                examples.append(made)
            except Unusable as error:
                drop(made.id, error)
    except Unusable as error:
        drop(rid, error)
    return Read(layout, line, record, examples, hashes, dropped)


def without_repeats(
    reads: Iterable[Read], seen: dict[bytes, str], rules: Rules, where: str = ""
) -> Iterator[Read]:
    """The same without examples that came before: `duplicate`, or `contradiction` where the answer is another
    one.

    seen: hash -> where and id of the first example that has it; goes on from file to file, and is added to.
    Of a contradiction the first example stays, so no prompt is lost, and a verifier pays no prompt for two
    different answers.
    """
    for read in reads:
        examples, hashes, dropped = [], [], list(read.dropped)
        for example, (prompt, answer) in zip(read.examples, read.hashes):
            if first := seen.get(prompt + answer):
                detail = f"the same messages, tools and answer as {first}"
                dropped.append(Dropped(example.source, example.id, read.line, "duplicate", detail))
                continue
            if "contradiction" not in rules.keep and (first := seen.get(prompt)):
                detail = f"the same messages and tools as {first}, but another answer"
                dropped.append(Dropped(example.source, example.id, read.line, "contradiction", detail))
                continue
            seen[prompt + answer] = name = where + example.id
            seen.setdefault(prompt, name)
            examples.append(example)
            hashes.append((prompt, answer))
        yield Read(read.layout, read.line, read.record, examples, hashes, dropped)


def _gather(reads: Iterable[Read]) -> tuple[list[Example], list[Dropped]]:
    examples, dropped = [], []
    for read in reads:
        examples += read.examples
        dropped += read.dropped
    return examples, dropped


def load_xlam(path: str | Path) -> tuple[list[Example], list[Dropped]]:
    """xLAM-function-calling-60k: {"id", "query", "tools", "answers"}, the last two JSON strings or lists.
    DataError for a file that is no JSON; drops broken_json, missing_field, no_tools, bad_answer,
    unknown_tool, missing_argument, wrong_type, bad_text.
    """
    return _gather(read_examples(path, "xlam"))


def load_toolace(path: str | Path) -> tuple[list[Example], list[Dropped]]:
    """ToolACE: {"system", "conversations": [{"from", "value"}]} -> an example per call turn, id
    "record#turn". DataError for a file that is no JSON; drops broken_json, missing_field, no_tools, no_calls,
    bad_turn, unparsable_calls, unknown_tool, missing_argument, wrong_type, bad_text.
    """
    return _gather(read_examples(path, "toolace"))


def load_examples(path: str | Path) -> tuple[list[Example], list[Dropped]]:
    """Any known layout, told by the keys of the first record: xLAM, ToolACE, what write_examples wrote, TRL's
    or verl's as prepare.py writes them. `path` may be a hub id. DataError for a missing, empty or unreadable
    file and for an unknown layout. Repeated examples stay: `without_repeats` drops them.
    """
    return _gather(read_examples(path))


def write_examples(path: str | Path, examples: Iterable[Example]) -> None:
    """One JSON line per example; load_examples reads it back. Raises OSError."""
    write_rows(path, (example_row(example) for example in examples))


def write_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """One JSON line per row, gzipped for .gz; for .parquet, rows of records.verl_row. The file appears when
    it is complete.

    Raises OSError, and ImportError for .parquet without pyarrow.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        if path.suffix == ".parquet":
            _write_parquet(partial, iter(rows))
        else:
            with partial.open("wb") as raw:
                # Without time and name in its header, the same rows give the same bytes.
                with (
                    gzip.GzipFile("", "wb", fileobj=raw, mtime=0)
                    if path.suffix == ".gz"
                    else nullcontext(raw) as file
                ):
                    file.writelines(f"{to_json(row)}\n".encode() for row in rows)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_parquet(path: Path, rows: Iterator[dict]) -> None:
    import pyarrow  # here, because nothing else needs it
    from pyarrow import parquet

    text = pyarrow.string()
    strings = [
        (field, text) for field in ("id", "source", "messages_json", "tools_json", "demonstrations_json")
    ]
    columns = {
        "data_source": text,
        "prompt": pyarrow.list_(pyarrow.struct([("role", text), ("content", text)])),
        "ability": text,
        "reward_model": pyarrow.struct([("style", text), ("ground_truth", text)]),
        "extra_info": pyarrow.struct([("split", text), ("index", pyarrow.int64()), *strings]),
    }
    with parquet.ParquetWriter(path, schema := pyarrow.schema(columns)) as writer:
        while batch := list(islice(rows, 2000)):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
