"""From raw files to a training set, with counts of everything that was left out.

    python data.py prepare --xlam xlam_function_calling_60k.json --toolace data.json --out data/prepared

It filters, drops repeated examples, splits 90/10 by record and then augments the training part alone: the
test set stays as the sources have it. The same inputs and options give the same bytes in every file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from corpus.augment import irrelevant_examples, masked_examples
from corpus.examples import KEEPABLE, KINDS, Dropped, Example, Rules, example_kind, held_out_records, record_of
from corpus.layouts import load_examples, read_examples, trl_row, verl_row, write_examples, write_rows
from corpus.sources import DataError, file_sha256, find_file
from corpus.toolace import is_single_turn
from prompts import build_messages, encode_prompt, load_template, render_calls

FORMAT = 1
OUTPUTS = (  # the manifest is the last to appear
    "train.jsonl", "test.jsonl", "trl_train.jsonl", "trl_test.jsonl", "verl_train.jsonl", "verl_test.jsonl",
    "verl_train.parquet", "verl_test.parquet", "dropped.jsonl", "statistics.json", "manifest.json",
)

# Rows of the paper's Table 1: heading, raw records, examples after processing (arXiv 2505.00024).
TABLE = {
    "xlam": ("xLAM single", 60_000, 60_000),
    "toolace_single": ("ToolACE single-turn", 10_500, 8_183),
    "toolace_multi": ("ToolACE multi-turn", 800, 1_470),
    "other": ("other files",),
}


@dataclass
class Input:
    """One file to read, and how many records it had and examples it gave."""

    label: str  # "xlam", "xlam2", ...: no other input has it, and the ids of its examples begin with it
    layout: str | None
    given: str
    path: Path
    records: Counter = field(default_factory=Counter)  # of a row of TABLE
    examples: Counter = field(default_factory=Counter)  # of a row of TABLE
    dropped: Counter = field(default_factory=Counter)  # of a reason


@dataclass(frozen=True, slots=True)
class Size:
    """What the statistics count of an example. prompt, answer: tokens; characters without a tokenizer."""

    prompt: int
    answer: int
    tools: int
    calls: int
    kind: str
    source: str


Sized = tuple[Example, Size]


@dataclass
class Prepared:
    """What is going to be written."""

    splits: dict[str, list[Sized]]
    dropped: list[dict]  # rows of dropped.jsonl
    augmented: Counter = field(default_factory=Counter)


# ------------------------------------------------------------------------------------------------- statistics


def measure(example: Example, template: str, tokenizer=None) -> Size:
    """The size of the whole prompt, and of the calls as the model has to write them."""
    answer = render_calls(example.answer)
    if tokenizer is None:
        chat = build_messages(example.messages, example.tools, template)
        lengths = sum(len(message["content"]) for message in chat), len(answer)
    else:
        prompt = encode_prompt(tokenizer, example.messages, example.tools, template)
        lengths = len(prompt), len(tokenizer.encode(answer, add_special_tokens=False))
    return Size(*lengths, len(example.tools), len(example.answer), example_kind(example), example.source)


def describe(sizes: Sequence[Size], unit: str) -> dict:
    """The statistics of one or more examples, as statistics.json has them. unit: "tokens" or "characters"."""
    kinds = Counter(size.kind for size in sizes)
    return {
        "examples": len(sizes),
        "kinds": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
        "sources": dict(sorted(Counter(size.source for size in sizes).items())),
        f"prompt {unit}": _spread(size.prompt for size in sizes),
        f"answer {unit}": _spread(size.answer for size in sizes),
        "tools per prompt": _spread(size.tools for size in sizes),
        "calls per answer": _spread(size.calls for size in sizes),
    }


def _spread(numbers: Iterable[int]) -> dict[str, float]:
    """p90: nine of ten values are at most that large."""
    values = sorted(numbers)
    last = len(values) - 1
    return {
        "min": values[0], "median": statistics.median(values), "mean": round(statistics.fmean(values), 2),
        "p90": values[-(-90 * last // 100)], "p99": values[-(-99 * last // 100)], "max": values[last],
    }


def print_statistics(name: str, described: dict) -> None:
    """The statistics as text."""
    print(f"\n{name}: {described['examples']:,} examples")
    for title, one in described.items():
        if isinstance(one, dict):
            print(f"  {title}: {', '.join(f'{key} {value:,}' for key, value in one.items())}")


# ---------------------------------------------------------------------------------------------------- prepare


def find_inputs(args: argparse.Namespace) -> list[Input]:
    """The files of --xlam, --toolace and --data, in this order. Raises DataError where there is none."""
    inputs = []
    for kind, layout in (("xlam", "xlam"), ("toolace", "toolace"), ("data", None)):
        for number, given in enumerate(getattr(args, kind), 1):
            path = find_file(given)
            if not path.is_file():
                raise DataError(f"{given} does not exist; check the path")
            inputs.append(Input(kind if number == 1 else f"{kind}{number}", layout, given, path))
    if not inputs:
        raise DataError("prepare: no input; give --xlam FILE, --toolace FILE, --data FILE or several of them")
    return inputs


def row_of(layout: str, record: object) -> str:
    """The row of TABLE in which a record is counted."""
    if layout == "toolace":
        return "toolace_single" if is_single_turn(record) else "toolace_multi"
    return "xlam" if layout == "xlam" else "other"


def sift(inputs: list[Input], args: argparse.Namespace, size_of: Callable[[Example], Size]) -> Prepared:
    """Reads all inputs, counts in them, and puts every usable example into the training part."""
    train, dropped = [], []
    rules = Rules(args.keep, args.no_call_turns)
    seen: dict[bytes, str] = {}
    for one in inputs:
        reads = read_examples(one.path, one.layout, rules, f"{one.label}-", seen)
        for read in tqdm(reads, one.given, unit=" records", disable=None):
            row = row_of(read.layout, read.record)
            kept, too_long = weigh(read.examples, args, size_of, read.line)
            one.records[row] += 1
            one.examples[row] += len(kept)
            train += kept
            for drop in read.dropped + too_long:
                one.dropped[drop.reason] += 1
                dropped.append({"file": one.given, **vars(drop)})
    return Prepared({"train": train}, dropped)


def weigh(
    examples: Iterable[Example], args: argparse.Namespace, size_of: Callable[[Example], Size], line: int
) -> tuple[list[Sized], list[Dropped]]:
    """The examples with their sizes; and, where there is a tokenizer, those with too long a prompt."""
    kept, dropped = [], []
    for example in examples:
        size = size_of(example)
        if args.tokenizer and size.prompt > args.max_prompt_tokens:
            detail = f"the prompt has {size.prompt} tokens, more than {args.max_prompt_tokens}"
            dropped.append(Dropped(line, example.id, "too_long", detail))
        else:
            kept.append((example, size))
    return kept, dropped


def split(made: Prepared, share: float, seed: int) -> None:
    """Moves the held-out records from the training part to a test part; no part where none is held out."""

    def record(example: Example) -> str:  # its own id, without the label: the split that training would make
        return record_of(example.id).partition("-")[2]

    apart = held_out_records((record(example) for example, _ in made.splits["train"]), share, seed)
    test = [one for one in made.splits["train"] if record(one[0]) in apart]
    if test:
        train = [one for one in made.splits["train"] if record(one[0]) not in apart]
        made.splits = {"train": train, "test": test}


def augment(made: Prepared, args: argparse.Namespace, size_of: Callable[[Example], Size]) -> None:
    """Adds irrelevance examples to the training part and then masks names in it.

    Prompts that masks make longer than the limit are dropped.
    """
    sizes = {example.id: size for example, size in made.splits["train"]}
    examples = [example for example, _ in made.splits["train"]]
    added = irrelevant_examples(examples, args.irrelevance, args.seed)
    masked = masked_examples(examples + added, args.mask, args.seed)
    shown = tqdm(masked, "measure", disable=None)
    kept, too_long = weigh(shown, args, lambda example: sizes.get(example.id) or size_of(example), 0)
    made.splits["train"] = kept
    made.dropped += [{"file": "(augmented)", **vars(drop)} for drop in too_long]
    changed = sum(old is not new for old, new in zip(examples + added, masked))
    made.augmented = Counter(irrelevant=len(added), masked=changed, too_long=len(too_long))


def prepare(args: argparse.Namespace, load_tokenizer: Callable) -> None:
    """Reads, filters, splits, augments and writes; prints the counts.

    Raises DataError, and leaves the output folder as it was when it does not come to its end.
    """
    template = load_template(args.prompt_template)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    inputs, out = find_inputs(args), Path(args.out)
    there = [name for name in OUTPUTS if (out / name).exists()]
    if there and not args.overwrite:
        todo = "choose another --out or add --overwrite"
        raise DataError(f"{out} holds a prepared set already ({', '.join(there)}); {todo}")
    size_of = partial(measure, template=template, tokenizer=tokenizer)
    made = sift(inputs, args, size_of)
    split(made, args.test_share, args.seed)
    if args.irrelevance or args.mask:
        augment(made, args, size_of)
    if not made.splits["train"]:
        lost = dict(Counter(row["reason"] for row in made.dropped))
        raise DataError(f"prepare: no example is left to train on; dropped: {lost}")
    unit = "characters" if tokenizer is None else "tokens"
    described = {name: describe([size for _, size in part], unit) for name, part in made.splits.items()}
    try:
        write(made, inputs, described, args, template)
    except OSError as error:
        what = f"{error.filename or out} cannot be written: {error.strerror or error}"
        raise DataError(f"prepare: {what}; free space or choose another --out") from None
    print_table(inputs)
    for name, one in described.items():
        print_statistics(f"{out}/{name}.jsonl", one)
    if made.augmented:
        changes = ", ".join(f"{count:,} {what}" for what, count in made.augmented.items())
        print(f"\naugmentation of the training part: {changes}")
    print(f"\n{out}: {len(made.dropped):,} dropped records and steps are listed in dropped.jsonl")


# ----------------------------------------------------------------------------------------------------- output


def write(
    made: Prepared, inputs: list[Input], described: dict, args: argparse.Namespace, template: str
) -> None:
    """Writes all files into a folder inside --out, then moves them to their places. Raises OSError."""
    out = Path(args.out)
    work = out / ".partial"
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for name, part in made.splits.items():
            examples = [example for example, _ in part]
            write_examples(work / f"{name}.jsonl", examples)
            for layout in args.layouts:
                write_layout(layout, name, examples, template, work)
        write_rows(work / "dropped.jsonl", made.dropped)
        (work / "statistics.json").write_text(json.dumps(described, indent=2) + "\n")
        facts = manifest(made, inputs, args, template, work)
        (work / "manifest.json").write_text(json.dumps(facts, indent=2) + "\n")
        publish(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):  # removes an empty folder only: nothing was published
            out.rmdir()


def write_layout(layout: str, name: str, examples: list[Example], template: str, work: Path) -> None:
    """One split in the layout of another tool: TRL's as JSONL, verl's as Parquet where pyarrow is there."""
    if layout == "trl":
        write_rows(work / f"trl_{name}.jsonl", (trl_row(example, template) for example in examples))
        return
    suffix = "parquet" if importlib.util.find_spec("pyarrow") else "jsonl"
    if suffix == "jsonl" and name == "train":
        print("prepare: verl's files are JSONL; Parquet needs pyarrow (python -m pip install pyarrow)")
    rows = (verl_row(example, template, name, index) for index, example in enumerate(examples))
    write_rows(work / f"verl_{name}.{suffix}", rows)


def manifest(
    made: Prepared, inputs: list[Input], args: argparse.Namespace, template: str, work: Path
) -> dict:
    """What was made, from what, and how: the same for the same data and options, wherever it is made."""
    options = {key: value for key, value in sorted(vars(args).items()) if key not in ("out", "overwrite")}
    sources = []
    for one in inputs:
        known = {"label": one.label, "given": one.given, "file": one.path.name, "sha256": file_sha256(one.path)}
        counts = {"records": one.records, "examples": one.examples, "dropped": one.dropped}
        sources.append(known | counts)
    return {
        "format": FORMAT,
        "options": options,
        "prompt_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "inputs": sources,
        "augmented": made.augmented,
        "outputs": {file.name: {"sha256": file_sha256(file)} for file in sorted(work.iterdir())},
    }


def publish(work: Path, out: Path) -> None:
    """Moves the files to `out`, in place of an earlier set. Meanwhile no manifest says that a set is complete."""
    (out / "manifest.json").unlink(missing_ok=True)
    for name in OUTPUTS:
        if (work / name).exists():
            os.replace(work / name, out / name)
        else:
            (out / name).unlink(missing_ok=True)


def print_table(inputs: list[Input]) -> None:
    """The paper's Table 1 for these files, then what was dropped."""
    records = sum((one.records for one in inputs), Counter())
    examples = sum((one.examples for one in inputs), Counter())
    dropped = sum((one.dropped for one in inputs), Counter())
    print(f"\n{'':22}{'raw records':>13}{'examples':>10}   the paper's Table 1: raw, processed")
    for row, (heading, *paper) in TABLE.items():
        if paper or records[row]:
            theirs = "".join(f"{count:>12,}" for count in paper)
            print(f"{heading:22}{records[row]:>13,}{examples[row]:>10,}{theirs}")
    print("single-turn: at most one call turn, after at most one message of the user; an example is one step")
    print(f"\n{'dropped':22}" + "".join(f"{one.label:>10}" for one in inputs))
    for reason, _ in dropped.most_common():
        print(f"  {reason:20}" + "".join(f"{one.dropped[reason]:>10,}" for one in inputs))


# ----------------------------------------------------------------------------------------------- command line


def share(text: str) -> float:
    """A command-line share from 0 to 1."""
    if not 0 <= (value := float(text)) <= 1:
        raise ValueError
    return value


def words_of(*known: str) -> Callable[[str], tuple[str, ...]]:
    """The type of a comma-separated list of known words."""

    def words(text: str) -> tuple[str, ...]:
        chosen = tuple(filter(None, text.replace(" ", "").split(",")))
        if unknown := set(chosen) - set(known):
            names = ", ".join(sorted(unknown))
            raise argparse.ArgumentTypeError(f"unknown {names}; known are {', '.join(known)}")
        return chosen

    return words


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of `prepare`."""
    parser = argparse.ArgumentParser(prog="python data.py prepare", description=__doc__.splitlines()[0])
    add = parser.add_argument
    files = {"nargs": "+", "action": "extend", "default": [], "metavar": "FILE"}
    add("--xlam", **files, help="xLAM's JSON, or Salesforce/xlam-function-calling-60k (gated: needs HF_TOKEN)")
    add("--toolace", **files, help="ToolACE's data.json, or Team-ACE/ToolACE on the hub")
    add("--data", **files, help="further files, of any layout that data.py reads")
    add("--out", required=True, help="folder for train.jsonl, test.jsonl, dropped.jsonl, statistics, manifest")
    add("--overwrite", action="store_true", help="replace the prepared set in it")
    add("--test_share", type=share, default=0.1, help="share of the records held out (paper: 0.1)")
    add("--seed", type=int, default=0)
    add("--no_call_turns", action="store_true", help="ToolACE's text turns become examples with answer []")
    add("--irrelevance", type=share, default=0.0, help="share of examples to repeat without their tools")
    add("--mask", type=share, default=0.0, help="share of training examples with random names")
    add("--keep", type=words_of(*KEEPABLE), default=(), help=f"reasons not to drop for: {', '.join(KEEPABLE)}")
    add("--tokenizer", default="", metavar="M", help="folder or hub id: counts tokens and drops long prompts")
    add("--max_prompt_tokens", type=int, default=4096, help="with --tokenizer: the longest (paper: 4096)")
    add("--prompt_template", default="", metavar="F", help="file with a {tools} slot; default: our own")
    add("--layouts", type=words_of("trl", "verl"), default=(), help="more layouts to write: trl, verl or trl,verl")
    return parser.parse_args(arguments)


def main(arguments: list[str], load_tokenizer: Callable) -> None:
    """`python data.py prepare …`. load_tokenizer: folder or hub id -> tokenizer. Raises UserError."""
    prepare(parse(arguments), load_tokenizer)


def stats(arguments: list[str], load_tokenizer: Callable) -> None:
    """`python data.py stats FILE [--tokenizer M] [--prompt_template F]`. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python data.py stats", description="Sizes, kinds and sources.")
    parser.add_argument("file", help="any layout that data.py reads")
    parser.add_argument("--tokenizer", default="", metavar="M", help="folder or hub id; default: count characters")
    parser.add_argument("--prompt_template", default="", metavar="F", help="file with a {tools} slot")
    args = parser.parse_args(arguments)
    template = load_template(args.prompt_template)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    examples, _ = load_examples(args.file)
    if not examples:
        raise DataError(f"{args.file} holds no usable example; run: python data.py inspect {args.file}")
    sizes = [measure(one, template, tokenizer) for one in tqdm(examples, "measure", leave=False, disable=None)]
    print_statistics(args.file, describe(sizes, "tokens" if args.tokenizer else "characters"))
