"""Records -> single-step examples: a reader for every layout, what it refuses and why, and what we write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from corpus.dialogues import find_tools, read_turn, steps, system_messages, system_text
from corpus.examples import Dropped, Example, Unusable, hashes_of, to_json
from corpus.rules import STRICT, Rules, check_arguments, check_calls, check_prompt, check_tools, decode
from corpus.schema import are_filled, without_nulls
from corpus.sources import DataError, find_files, is_columns, read_files, written_beside
from corpus.toolrl import read_row
from prompts import build_messages


def _require(record: dict, **types: Any) -> None:
    if bad := [field for field, wanted in types.items() if not isinstance(record.get(field), wanted)]:
        detail = f"missing or of the wrong type: {', '.join(bad)}; found: {', '.join(record)}"
        raise Unusable("missing_field", detail)


def _from_xlam(record: dict, rid: str, line: int, rules: Rules) -> Iterator[Example | Dropped]:
    _require(record, query=str, tools=(str, list, dict), answers=(str, list, dict))
    tools = check_tools(record["tools"])
    answer = check_calls(record["answers"], tools)
    check_arguments(answer, tools, rules)
    messages = [*system_messages(record.get("system"), tools), {"role": "user", "content": record["query"]}]
    yield Example(rid, "xlam", messages, tools, answer)


def _from_dialogue(
    field: str, source: str, record: dict, rid: str, line: int, rules: Rules
) -> Iterator[Example | Dropped]:
    """The tools stand in a field of their own, or in a system text."""
    _require(record, **{field: (str, list)})
    system, said = record.get("system"), decode(record[field], field)
    listed = decode(record.get("tools"), "tools") or find_tools(system_text(system, said))
    if not listed:
        raise Unusable("no_tools", "no JSON list of tools in `tools` or a system text")
    yield from steps(said, check_tools(listed), (rid, source, line), rules, system)


def _from_ours(record: dict, rid: str, line: int, rules: Rules) -> Iterator[Example | Dropped]:
    _require(record, messages=list, tools=(str, list, dict), answer=(str, list, dict))
    tools = record["tools"] and check_tools(record["tools"])
    messages = []
    for index, message in enumerate(record["messages"]):
        turn = read_turn(message, index)
        if turn.problem:
            raise Unusable("bad_turn", f"turn {index}: {turn.problem}")
        messages.append(turn.message())
    demonstrations = record.get("demonstrations") or []
    if not isinstance(demonstrations, list) or not all(isinstance(text, str) for text in demonstrations):
        raise Unusable("missing_field", "demonstrations must be a list of texts")
    # Past calls may name tools that are no longer listed; only the answer must not.
    answer = check_calls(record["answer"], tools)
    source = str(record.get("source") or "examples")
    owner = "" if record.get("record") is None else str(record["record"])
    yield Example(rid, source, messages, tools, answer, tuple(demonstrations), owner)


def _from_trl(record: dict, rid: str, line: int, rules: Rules) -> Iterator[Example | Dropped]:
    """A row of trl_row, or of verl_row, which has the same columns inside two others."""
    columns = dict(record)
    for holder in ("extra_info", "reward_model"):
        if isinstance(record.get(holder), dict):
            columns.update(record[holder])
    for field in ("messages_json", "tools_json", "demonstrations_json", "ground_truth"):
        if not isinstance(columns.get(field), str):
            raise Unusable("foreign_row", f"no {field}: not written by `data.py prepare`")
        columns[field.removesuffix("_json")] = decode(columns[field], field)
    yield from _from_ours(columns | {"answer": columns["ground_truth"]}, rid, line, rules)


def _from_toolrl(
    record: dict, rid: str, line: int, rules: Rules, imitate: bool = True
) -> Iterator[Example | Dropped]:
    _require(record, instruction=str, input=str, output=str)
    yield read_row(record["instruction"], record["input"], record["output"], rid, rules, imitate)


def _from_verl(record: dict, rid: str, line: int, rules: Rules) -> Iterator[Example | Dropped]:
    """A row of verl_row, or of ToolRL's RL files, whose thought is the same sentence in every row."""
    extra, reward = record.get("extra_info"), record.get("reward_model")
    if isinstance(extra, dict) and isinstance(reward, dict) and {"instruction", "input"} <= extra.keys():
        row = extra | {"output": reward.get("ground_truth")}
        yield from _from_toolrl(row, rid, line, rules, imitate=False)
    else:
        yield from _from_trl(record, rid, line, rules)


LAYOUTS = {  # keys that tell a layout, and its reader
    "xlam": ({"query", "tools", "answers"}, _from_xlam),
    "toolace": ({"conversations"}, partial(_from_dialogue, "conversations", "toolace")),
    "examples": ({"messages", "answer"}, _from_ours),
    "openai": ({"messages"}, partial(_from_dialogue, "messages", "openai")),
    "trl": ({"prompt", "ground_truth"}, _from_trl),
    "verl": ({"prompt", "reward_model"}, _from_verl),
    "toolrl": ({"instruction", "input", "output"}, _from_toolrl),
}


def _layout_of(record: Any) -> str | None:
    keys = set(record) if isinstance(record, dict) else set()
    return next((name for name, (known, _) in LAYOUTS.items() if known <= keys), None)


def _start(source: str | Path, layout: str | None) -> tuple[str, Iterator[tuple[int, Any]]]:
    """The layout of a file, and its records. Raises DataError without a record of a known layout."""
    records = read_files(find_files(source))
    head = []
    for line, first in records:
        head.append((line, first))
        if isinstance(first, dict):
            break
    else:
        line, error = head[0] if head else (1, "no records")
        what = f"{str(error)[:60]}: {getattr(error, 'doc', '')[:60]!r}"
        raise DataError(f"{source}:{line}: {what}; give a JSON array or one JSON object per line")
    told = _layout_of(first)
    if is_columns(first):
        problem = "an object of columns, as pandas' to_json writes it; use orient='records'"
    elif told and layout in (None, told):
        return told, chain(head, records)
    elif told:
        problem = f"the layout is that of {told}, not of {layout}; give another file"
    elif around := [key for key, one in first.items() if isinstance(one, list) and any(map(_layout_of, one))]:
        problem = f"an object around the array of records, {around[0]!r}; give the array alone"
    else:
        known = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, (keys, _) in LAYOUTS.items())
        problem = f"unknown layout: found keys {', '.join(first)}; known are {known}"
    raise DataError(f"{source}:{line}: {problem}")


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
        own = _own_id(record, line)
        while own in ids:
            own += f"@{line}"
        ids.add(own)
        read = Read(layout, line, record, [], [])
        try:
            if not isinstance(record, dict):
                raise Unusable("broken_json", f"not a JSON object: {str(record)[:80]}")
            record = without_nulls(record) if are_filled(record.get("tools")) else record
            for made in LAYOUTS[layout][1](record, prefix + own, line, rules):
                if isinstance(made, Example):
                    made = _checked(made, own, line, rules, seen, Path(source).name)
                (read.examples if isinstance(made, Example) else read.dropped).append(made)
        except Unusable as error:
            read.dropped.append(error.dropped(prefix + own, line))
        except RecursionError:
            read.dropped.append(Dropped(line, prefix + own, "broken_json", "nested too deeply"))
        yield read


def _checked(
    example: Example, own: str, line: int, rules: Rules, seen: dict[bytes, str], file: str
) -> Example | Dropped:
    """The example, of the record `own`, unless its prompt is unusable or came before.

    Of a contradiction the first stays, so that no prompt is lost or paid for two different answers.
    """
    example = replace(example, record=example.record or (own if own != example.id else ""))
    try:
        prompt, answer = hashes_of(example)
        check_prompt(example)
        if first := seen.get(prompt + answer):
            raise Unusable("duplicate", f"the same messages, tools and answer as {first}")
        if "contradiction" not in rules.keep and (first := seen.get(prompt)):
            raise Unusable("contradiction", f"the same messages and tools as {first}, but another answer")
    except Unusable as error:
        return error.dropped(example.id, line)
    seen[prompt + answer] = f"{example.id} of {file}"
    seen.setdefault(prompt, seen[prompt + answer])
    return example


def _own_id(record: Any, line: int) -> str:
    """The id that a record gives, verl's rows inside `extra_info`; else its position from 0."""
    holders = (record, record.get("extra_info")) if isinstance(record, dict) else ()
    ids = [one["id"] for one in holders if isinstance(one, dict) and one.get("id") not in (None, "")]
    return str(ids[0]) if ids else str(line - 1)


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
        "record": example.record,
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
    with written_beside(path) as partial:
        if path.suffix == ".parquet":
            _write_parquet(partial, iter(rows))
        else:
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(f"{to_json(row)}\n" for row in rows)


def _write_parquet(path: Path, rows: Iterator[dict]) -> None:
    import pyarrow  # optional
    from pyarrow import parquet

    text = pyarrow.string()
    names = ("split", "id", "source", "record", "messages_json", "tools_json", "demonstrations_json")
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
