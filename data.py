"""Training data: files of records -> single-step examples, and a list of everything that was left out and why."""

from __future__ import annotations

import gzip
import os
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prompts import PromptError, encode_prompt
from records import LAYOUTS, STRICT, Dropped, Example, Rules, Unusable, example_row, hashes_of, to_json
from sources import DataError, find_file, read_records


@dataclass(frozen=True)
class Read:
    """What became of one record. hashes: of each example's prompt (messages and tools) and answer."""

    layout: str
    line: int
    record: Any
    examples: list[Example]
    hashes: list[tuple[bytes, bytes]]
    dropped: list[Dropped]


# --------------------------------------------------------------------------------------------- files -> examples


def _start(source: str | Path, layout: str | None) -> tuple[str, Iterator[tuple[int, Any]]]:
    """The layout and the records of a file. Raises DataError where there is no record, or none of a known layout."""
    records, head = read_records(find_file(source)), []
    for numbered in records:
        head.append(numbered)
        if isinstance(numbered[1], dict):
            break
    else:
        line, error = head[0] if head else (1, "no records")
        raise DataError(f"{source}:{line}: {str(error)[:80]}; expected a JSON array or one JSON object per line")
    line, first = head[-1]
    told = next((name for name, (keys, _) in LAYOUTS.items() if keys <= set(first)), None)
    if told is None and layout is None:
        known = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, (keys, _) in LAYOUTS.items())
        raise DataError(f"{source}:{line}: unknown layout: found keys {', '.join(first)}; known are {known}")
    if None not in (told, layout) and told != layout:
        raise DataError(f"{source}:{line}: the layout is that of {told}, not of {layout}; give another file or option")
    return layout or told, chain(head, records)


def read_examples(
    source: str | Path, layout: str | None = None, rules: Rules = STRICT, prefix: str = ""
) -> Iterator[Read]:
    """What becomes of each record of a file, one after the other.

    source: as for sources.find_file. layout: a key of LAYOUTS; None: as the first record says. prefix: set before every
    id. An id that an earlier record has gets "@line" behind it. Raises DataError.
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
        name, detail = (text.encode("utf-8", "replace").decode() for text in (name, error.args[1]))  # can be printed
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


def without_repeats(reads: Iterable[Read], seen: dict[bytes, str], rules: Rules, where: str = "") -> Iterator[Read]:
    """The same without examples that came before: `duplicate`, or `contradiction` where the answer is another one.

    seen: hash -> where and id of the first example that has it; goes on from file to file, and is added to. Of a
    contradiction the first example stays, so no prompt is lost, and a verifier pays no prompt for two different answers.
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
    """xLAM-function-calling-60k: {"id", "query", "tools", "answers"}, the last two JSON strings or lists. DataError for
    a file that is no JSON; drops broken_json, missing_field, no_tools, bad_answer, unknown_tool, missing_argument,
    wrong_type, bad_text."""
    return _gather(read_examples(path, "xlam"))


def load_toolace(path: str | Path) -> tuple[list[Example], list[Dropped]]:
    """ToolACE: {"system", "conversations": [{"from", "value"}]} -> an example per call turn, id "record#turn". DataError
    for a file that is no JSON; drops broken_json, missing_field, no_tools, no_calls, bad_turn, unparsable_calls,
    unknown_tool, missing_argument, wrong_type, bad_text."""
    return _gather(read_examples(path, "toolace"))


def load_examples(path: str | Path) -> tuple[list[Example], list[Dropped]]:
    """Any known layout, told by the keys of the first record: xLAM, ToolACE, what write_examples wrote, TRL's or verl's
    as prepare.py writes them. `path` may be a hub id. DataError for a missing, empty or unreadable file and for an
    unknown layout. Repeated examples stay: `without_repeats` drops them."""
    return _gather(read_examples(path))


def load_unique(path: str | Path, seen: dict[bytes, str]) -> tuple[list[Example], list[Dropped]]:
    """load_examples without repeated examples, also those of earlier files with the same `seen`."""
    quiet = None if int(os.environ.get("RANK", 0)) == 0 else True
    reads = tqdm(read_examples(path), f"read {path}", unit=" records", leave=False, disable=quiet)
    return _gather(without_repeats(reads, seen, STRICT, f"{path}: "))


def write_examples(path: str | Path, examples: Iterable[Example]) -> None:
    """One JSON line per example; load_examples reads it back. Raises OSError."""
    write_rows(path, (example_row(example) for example in examples))


def write_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """One JSON line per row, gzipped for .gz; for .parquet, rows of records.verl_row. The file appears when it is complete.

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
                with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else nullcontext(raw) as file:
                    file.writelines(f"{to_json(row)}\n".encode() for row in rows)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_parquet(path: Path, rows: Iterator[dict]) -> None:
    import pyarrow  # here, because nothing else needs it
    from pyarrow import parquet

    text = pyarrow.string()
    strings = [(field, text) for field in ("id", "source", "messages_json", "tools_json", "demonstrations_json")]
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

    Of the training examples the part from data_from to data_to stays; the held-out ones are the same for every part.
    Prints what was dropped, by reason. Raises DataError when nothing is left to train on.
    """
    if config.data == "synthetic":
        from synthetic import synthetic_splits  # here, because synthetic.py builds on this file's Example

        splits = synthetic_splits(config)
    else:
        splits = _read_splits(config)
    return replace(splits, train=part_of(splits.train, config.data_from, config.data_to, config.seed))


def _read_splits(config) -> Splits:
    if not config.data:
        raise DataError("data: no training file given; use --data FILE[,FILE] or --data synthetic")
    train, held_out = load_files(config.data), []
    if config.test_data:
        held_out = load_files(config.test_data)
        if not held_out:
            raise DataError(f"test_data: {config.test_data} holds no usable example; run: python data.py inspect FILE")
    elif config.test_share:
        records = _records(train)
        cut = round(len(records) * config.test_share)
        apart = set(random.Random(f"{config.seed}/split").sample(records, cut))
        held_out = [example for example in train if _record(example) in apart]
        train = [example for example in train if _record(example) not in apart]
    if not train:
        raise DataError(f"data: {config.data} leaves no example to train on; run: python data.py inspect FILE")
    # A random part of them, or only the first file's would be evaluated.
    held_out = random.Random(f"{config.seed}/cases").sample(held_out, min(config.eval_cases, len(held_out)))
    return Splits(train, {"held_out": held_out} if held_out else {})


def part_of(examples: Sequence[Example], start: float, end: float, seed: int) -> list[Example]:
    """The examples of the records from share `start` to before share `end` of a seeded shuffle, in their own order.

    Parts that meet at a share have no example in common and lose none. Raises DataError for a part without examples.
    """
    records = _records(examples)
    random.Random(f"{seed}/part").shuffle(records)
    chosen = set(records[round(start * len(records)) : round(end * len(records))])
    if not chosen:
        raise DataError(
            f"data_from, data_to: the part from {start:g} to {end:g} of {len(records)} training records is empty; widen it"
        )
    return [example for example in examples if _record(example) in chosen]


def _record(example: Example) -> str:
    """What is split goes by record, not by step: later steps of a conversation contain the answers of earlier ones."""
    return example.id.split("#")[0]


def _records(examples: Iterable[Example]) -> list[str]:
    return sorted({_record(example) for example in examples})


def load_files(paths: str) -> list[Example]:
    """The examples of comma-separated files, with a printed line about each file and what it dropped."""
    examples, seen = [], {}
    for path in filter(None, (part.strip() for part in paths.split(","))):
        kept, dropped = load_unique(path, seen)
        examples += kept
        if int(os.environ.get("RANK", 0)) == 0:
            reasons = Counter(one.reason for one in dropped)
            lost = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            print(f"data: {path}: {len(kept)} examples" + (f", dropped: {lost}" if lost else ""))
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


def main(arguments: list[str]) -> None:
    """`inspect PATH [COUNT]`, `stats FILE …`, `prepare …` or `overlap …`, each in a file that only its command imports."""
    command = arguments[0] if arguments else ""
    if command in ("inspect", "stats"):
        import describe

        describe.main(arguments)
    elif command == "prepare":
        import prepare

        prepare.main(arguments[1:])
    elif command == "overlap":
        import overlap

        overlap.main(arguments[1:])
    else:
        raise DataError("usage: python data.py inspect, stats, prepare or overlap, each with its arguments or --help")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (DataError, PromptError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
