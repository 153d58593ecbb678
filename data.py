"""Training data: files of records -> single-step examples, and a list of everything that was left out and
why.
"""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from corpus.examples import (
    STRICT,
    Dropped,
    Example,
    Splits,
    Tokenized,
)
from corpus.layouts import _gather, read_examples, without_repeats
from corpus.sources import DataError
from prompts import PromptError, encode_prompt


def load_unique(path: str | Path, seen: dict[bytes, str]) -> tuple[list[Example], list[Dropped]]:
    """load_examples without repeated examples, also those of earlier files with the same `seen`."""
    quiet = None if int(os.environ.get("RANK", 0)) == 0 else True
    reads = tqdm(read_examples(path), f"read {path}", unit=" records", leave=False, disable=quiet)
    return _gather(without_repeats(reads, seen, STRICT, f"{path}: "))


def load_splits(config) -> Splits:
    """Training and held-out examples as the config asks: generated for "synthetic", else read from files.

    Of the training examples the part from data_from to data_to stays; the held-out ones are the same for
    every part. Prints what was dropped, by reason. Raises DataError when nothing is left to train on.
    """
    if config.data == "synthetic":
        from corpus.synthetic import synthetic_splits

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
            raise DataError(
                f"test_data: {config.test_data} holds no usable example; run: python data.py inspect FILE"
            )
    elif config.test_share:
        records = _records(train)
        cut = round(len(records) * config.test_share)
        apart = set(random.Random(f"{config.seed}/split").sample(records, cut))
        held_out = [example for example in train if _record(example) in apart]
        train = [example for example in train if _record(example) not in apart]
    if not train:
        raise DataError(
            f"data: {config.data} leaves no example to train on; run: python data.py inspect FILE"
        )
    # A random part of them, or only the first file's would be evaluated.
    held_out = random.Random(f"{config.seed}/cases").sample(held_out, min(config.eval_cases, len(held_out)))
    return Splits(train, {"held_out": held_out} if held_out else {})


def part_of(examples: Sequence[Example], start: float, end: float, seed: int) -> list[Example]:
    """The examples of the records from share `start` to before share `end` of a seeded shuffle, in their own
    order.

    Parts that meet at a share have no example in common and lose none. Raises DataError for a part without
    examples.
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
    """What is split goes by record, not by step: later steps of a conversation contain the answers of earlier
    ones.
    """
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
        raise DataError(
            f"data: all {len(splits.train)} training prompts are longer than max_prompt_tokens ({limit})"
        )
    return Splits(train, held_out)


def main(arguments: list[str]) -> None:
    """`inspect PATH [COUNT]`, `stats FILE …`, `prepare …` or `overlap …`, each in a file that only its
    command imports.
    """
    command = arguments[0] if arguments else ""
    if command in ("inspect", "stats"):
        from corpus import describe

        describe.main(arguments)
    elif command == "prepare":
        from corpus import prepare

        prepare.main(arguments[1:])
    elif command == "overlap":
        from corpus import overlap

        overlap.main(arguments[1:])
    else:
        raise DataError(
            "usage: python data.py inspect, stats, prepare or overlap, each with its arguments or --help"
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (DataError, PromptError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
