"""Training data: files of records -> examples -> splits -> token ids; and the commands around it.

usage: python data.py COMMAND …; each COMMAND has its own --help

    prepare    raw files -> training and test set, with counts of what was dropped
    stats      sizes, kinds, sources and prompt lengths of a file
    inspect    what was dropped of a file and why, and some of its prompts
    overlap    what training data shares with its test file and with the benchmarks
    distill    replies of a model that are right, to imitate
"""

from __future__ import annotations
import distributed.start  # noqa: F401

import os
import random
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from config import printable, run_command
from corpus.examples import Example, Splits, Tokenized, record_of, split_records, unseen
from corpus.layouts import load_examples
from corpus.sources import DataError
from corpus.synthetic import synthetic_splits
from prompts import PromptError, encode_prompt

INSPECT = "run: python data.py inspect FILE"


def load_splits(config) -> Splits:
    """Training and held-out examples as the config asks: generated for "synthetic", else read from files.

    Of the training examples the part from data_from to data_to stays; the held-out ones are the same for
    every part. Prints what was dropped, by reason. Raises DataError when nothing is left to train on.
    """
    splits = synthetic_splits(config) if config.data == "synthetic" else _read_splits(config)
    return replace(splits, train=part_of(splits.train, config.data_from, config.data_to, config.seed))


def _read_splits(config) -> Splits:
    if not config.data:
        raise DataError("data: no training file given; use --data FILE[,FILE] or --data synthetic")
    train, held_out = load_files(config.data), []
    if config.test_data:
        held_out = load_files(config.test_data)
        if not held_out:
            raise DataError(f"test_data: {config.test_data} holds no usable example; {INSPECT}")
    elif config.test_share:
        train, held_out = split_records(train, config.test_share, config.seed)
    given, train = len(train), unseen(train, held_out)
    if len(train) < given and int(os.environ.get("RANK", 0)) == 0:
        print(f"data: {given - len(train)} examples, steps of held-out conversations, are dropped")
    if not train:
        raise DataError(f"data: {config.data} leaves no example to train on; {INSPECT}")
    # A random part of them, or only the first file's would be evaluated.
    held_out = random.Random(f"{config.seed}/cases").sample(held_out, min(config.eval_cases, len(held_out)))
    return Splits(train, {"held_out": held_out} if held_out else {})


def part_of(examples: Sequence[Example], start: float, end: float, seed: int) -> list[Example]:
    """The examples of the records from share `start` to before share `end` of a shuffle by seed.

    They keep their order. Parts that meet at a share have no record in common and lose none. Raises DataError
    for a part without examples.
    """
    records = sorted({record_of(example) for example in examples})
    random.Random(f"{seed}/part").shuffle(records)
    chosen = set(records[round(start * len(records)) : round(end * len(records))])
    if not chosen:
        what = f"the part from {start:g} to {end:g} of {len(records)} training records is empty"
        raise DataError(f"data_from, data_to: {what}; widen it")
    return [example for example in examples if record_of(example) in chosen]


def load_files(paths: str) -> list[Example]:
    """The examples of comma-separated files, with a printed line about each file and what it dropped."""
    examples = []
    seen: dict[bytes, str] = {}
    for path in filter(None, (part.strip() for part in paths.split(","))):
        kept, dropped = load_examples(path, seen)
        examples += kept
        if int(os.environ.get("RANK", 0)) == 0:
            reasons = Counter(one.reason for one in dropped)
            lost = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            print(printable(f"data: {path}: {len(kept)} examples" + (f", dropped: {lost}" if lost else "")))
            for one in dropped[:3]:
                print(printable(f"data: {path}:{one.line} id={one.id}: {one.reason}: {one.detail}"))
            if len(dropped) > 3:
                print(f"data: … all dropped records: python data.py inspect {path}")
    return examples


def tokenize_splits(splits: Splits, tokenizer, template: str, config, quiet: bool = False) -> Splits:
    """Prompts as token ids. Those longer than max_prompt_tokens, and those that the chat template or
    encode_prompt refuses, are counted, said and skipped.

    Raises DataError when no training prompt is left.
    """
    limit = config.max_prompt_tokens
    refused = []

    def encode(examples: Sequence[Example]) -> list[Tokenized]:
        """The prompts of any length; those that cannot be encoded are listed in `refused`."""
        items = []
        for example in tqdm(examples, desc="tokenize", leave=False, disable=quiet or None):
            try:
                ids = encode_prompt(tokenizer, example.messages, example.tools, template, example.answer)
                items.append(Tokenized(example, ids))
            except PromptError as error:
                refused.append(printable(f"id={example.id}: {error}"))
        return items

    encoded = {"": encode(splits.train)} | {name: encode(one) for name, one in splits.held_out.items()}
    short = {name: [item for item in items if len(item.ids) <= limit] for name, items in encoded.items()}
    train = short.pop("")
    if not train:
        what = f"all {len(splits.train)} training prompts are longer than max_prompt_tokens ({limit})"
        raise DataError(f"data: {what}{' or refused; ' if refused else ''}{''.join(refused[:1])}")
    long = sum(map(len, encoded.values())) - len(train) - sum(map(len, short.values()))
    if long and not quiet:
        print(f"data: {long} prompts are longer than max_prompt_tokens ({limit}) and are skipped")
    if refused and not quiet:
        print(f"data: {len(refused)} prompts are refused and skipped, such as", *refused[:10], sep="\n  ")
    return Splits(train, {name: kept for name, kept in short.items() if kept})


def _load_tokenizer(path: str):
    from model import load_tokenizer  # imports torch, which takes seconds

    return load_tokenizer(path)


def main(arguments: list[str]) -> None:
    """Hands the arguments to the command, each in a module of its own. Raises UserError."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing half written stays
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__.strip())
    elif command in ("prepare", "stats", "inspect"):
        from corpus import prepare

        run = {"prepare": prepare.main, "stats": prepare.stats, "inspect": prepare.inspect}[command]
        run(rest, _load_tokenizer)
    elif command == "overlap":
        from corpus import overlap

        overlap.main(rest)
    elif command == "distill":
        from corpus import distill

        distill.main(rest, load_splits, tokenize_splits)
    else:
        raise DataError(f"there is no command {command!r}; usage: python data.py --help")


if __name__ == "__main__":
    run_command(main)
