"""A look at data: `python data.py inspect PATH [COUNT]` shows prompts, `python data.py stats FILE` sizes."""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from dataclasses import dataclass

from tqdm import tqdm

from corpus.examples import KINDS, Example, example_kind
from corpus.sources import DataError
from data import load_unique
from prompts import build_messages, encode_prompt, load_template, render_calls

LENGTHS = (0, *(2**power for power in range(5, 17)))
COUNTS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 21, 51)


@dataclass(frozen=True, slots=True)
class Size:
    """What the statistics count of an example. prompt, answer: tokens, or characters where there is no
    tokenizer.
    """

    prompt: int
    answer: int
    tools: int
    calls: int
    kind: str
    source: str


# ------------------------------------------------------------------------------------------------- statistics


def measure(example: Example, template: str, tokenizer=None) -> Size:
    """Sizes in tokens of the whole prompt and of the calls as they are written; in characters without a
    tokenizer.
    """
    answer = render_calls(example.answer)
    if tokenizer is None:
        chat = build_messages(example.messages, example.tools, template)
        lengths = sum(len(message["content"]) for message in chat), len(answer)
    else:
        prompt = encode_prompt(tokenizer, example.messages, example.tools, template)
        lengths = len(prompt), len(tokenizer.encode(answer, add_special_tokens=False))
    return Size(*lengths, len(example.tools), len(example.answer), example_kind(example), example.source)


def histogram(values: list[int], edges: tuple[int, ...]) -> dict:
    """Minimum, median, mean, maximum and the counts of [edge, next edge), without empty bins at the ends."""
    bins = Counter(max(i for i, edge in enumerate(edges) if edge <= value) for value in values)
    names = [f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in zip(edges, edges[1:])] + [f"{edges[-1]}-"]
    counts = {names[i]: bins[i] for i in range(min(bins, default=0), max(bins, default=-1) + 1)}
    if not values:
        return {"bins": counts}
    middle, mean = statistics.median(values), round(statistics.fmean(values), 2)
    return {"min": min(values), "median": middle, "mean": mean, "max": max(values), "bins": counts}


def describe(sizes: list[Size], unit: str) -> dict:
    """All statistics of a set of examples, as statistics.json has them. unit: "tokens" or "characters"."""
    columns = {f"prompt {unit}": ("prompt", LENGTHS), f"answer {unit}": ("answer", LENGTHS)}
    columns |= {"tools per prompt": ("tools", COUNTS), "calls per answer": ("calls", COUNTS)}
    kinds = Counter(size.kind for size in sizes)
    return {
        "examples": len(sizes),
        "kinds": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
        "sources": dict(sorted(Counter(size.source for size in sizes).items())),
        **{
            name: histogram([getattr(size, field) for size in sizes], edges)
            for name, (field, edges) in columns.items()
        },
    }


def print_statistics(name: str, described: dict) -> None:
    """The statistics as text, with a bar for every bin."""
    print(f"\n{name}: {described['examples']:,} examples")
    for field in ("kinds", "sources"):
        print(f"  {field}: {', '.join(f'{count:,} {key}' for key, count in described[field].items())}")
    for title, one in described.items():
        if not isinstance(one, dict) or not one.get("bins"):
            continue
        print(
            f"  {title}: min {one['min']:,}, median {one['median']:,}, mean {one['mean']:,}, max {one['max']:,}"
        )
        most = max(one["bins"].values())
        for label, count in one["bins"].items():
            print(f"  {label:>13} {count:>8,} {'#' * -(-count * 40 // most)}")


# ----------------------------------------------------------------------------------------------- command line


def inspect(path: str, count: int = 3) -> None:
    """Prints how many examples a file gives, of which kinds, what was dropped and why, and a few prompts and
    targets.
    """
    examples, dropped = load_unique(path, {})
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


def open_tokenizer(name: str):
    """The tokenizer of a folder or hub id, None for "". Raises DataError."""
    if not name:
        return None
    from model import ModelError, load_tokenizer

    try:
        return load_tokenizer(name)
    except ModelError as error:
        raise DataError(str(error)) from None


def main(arguments: list[str]) -> None:
    """`inspect PATH [COUNT]` or `stats FILE [--tokenizer M] [--prompt_template F]`. Raises DataError."""
    if arguments[:1] == ["stats"]:
        parser = argparse.ArgumentParser(
            prog="python data.py stats", description="Sizes, kinds and sources as histograms."
        )

        def refuse(message: str) -> None:
            raise DataError(f"stats: {message}; see python data.py stats --help")

        parser.error = refuse
        parser.add_argument("file", help="any layout that data.py reads")
        parser.add_argument(
            "--tokenizer", default="", metavar="M", help="folder or hub id; default: count characters"
        )
        parser.add_argument(
            "--prompt_template", default="", metavar="F", help="file with a {tools} slot; default: our own"
        )
        args = parser.parse_args(arguments[1:])
        tokenizer, template = open_tokenizer(args.tokenizer), load_template(args.prompt_template)
        examples, _ = load_unique(args.file, {})
        sizes = [
            measure(example, template, tokenizer)
            for example in tqdm(examples, "measure", leave=False, disable=None)
        ]
        print_statistics(args.file, describe(sizes, "tokens" if args.tokenizer else "characters"))
        return
    if (
        len(arguments) not in (2, 3)
        or arguments[0] != "inspect"
        or not "".join(arguments[2:] or ["0"]).isdigit()
    ):
        raise DataError("usage: python data.py inspect PATH [COUNT]")
    inspect(arguments[1], int(arguments[2]) if arguments[2:] else 3)
