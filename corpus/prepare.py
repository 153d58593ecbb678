"""From raw files to a training set, with counts of everything that was left out.

    python data.py prepare --xlam xlam_function_calling_60k.json --toolace data.json --out data/prepared

It filters, drops repeated examples, splits 90/10 by record and then augments the training part alone: the
test set stays as the sources have it. The same inputs and options give the same bytes in every file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from config import Config, printable
from corpus.augment import irrelevant_examples, masked_examples
from corpus.dialogues import is_single_turn
from corpus.examples import KINDS, Dropped, Example, Unusable, example_kind, queries_of, split_records, unseen
from corpus.layouts import load_examples, read_examples, trl_row, verl_row, write_examples, write_rows
from corpus.rules import KEEPABLE, Rules
from corpus.sources import DataError, file_sha256, find_files, folder_above
from corpus.synthetic import synthetic_splits
from prompts import SYSTEM_TEMPLATE, PromptError, build_messages, encode_prompt, load_template, render_calls

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
Measure = Callable[[Example], int]
Asked = tuple[bool, tuple[str, ...]]  # whether a call is right, and examples.queries_of


@dataclass
class Input:
    """One file to read, and how many records it had and examples it gave."""

    label: str  # "xlam", "xlam2", ...: no other input has it, and the ids of its examples begin with it
    layout: str | None
    given: str  # path, hub id or "synthetic"
    records: Counter = field(default_factory=Counter)  # of a row of TABLE
    examples: Counter = field(default_factory=Counter)  # of a row of TABLE
    dropped: Counter = field(default_factory=Counter)  # of a reason
    sha256: str = ""  # of its files; of "synthetic" as of the file that it would be


@dataclass
class Prepared:
    """What is written in the end."""

    splits: dict[str, list[Example]]
    lengths: dict[str, int]  # id of an example -> length of its prompt
    dropped: list[dict]  # rows of dropped.jsonl
    augmented: Counter = field(default_factory=Counter)
    statistics: dict = field(default_factory=dict)


def prompt_length(example: Example, template: str, tokenizer=None, limit: float = math.inf) -> int:
    """Tokens of the whole prompt, or characters of its messages without a tokenizer.

    Raises Unusable for a prompt of more tokens than `limit`, or one that cannot be encoded.
    """
    if tokenizer is None:
        chat = build_messages(example.messages, example.tools, template)
        return sum(len(message["content"]) for message in chat)
    try:
        ids = encode_prompt(tokenizer, example.messages, example.tools, template, example.answer)
    except PromptError as error:
        raise Unusable("refused", str(error)) from None
    if len(ids) > limit:
        raise Unusable("too_long", f"the prompt has {len(ids)} tokens, more than {limit}")
    return len(ids)


def weigh(examples: Iterable[Example], length_of: Measure, line: int) -> tuple[dict[str, int], list[Dropped]]:
    """(id of an example -> its length, those without one)."""
    lengths, dropped = {}, []
    for example in examples:
        try:
            lengths[example.id] = length_of(example)
        except Unusable as error:
            dropped.append(error.dropped(example.id, line))
    return lengths, dropped


def length_of_new(
    example: Example, length_of: Measure, file: str, before: dict[Asked, str], asked: dict[Asked, str]
) -> int:
    """Its length. Raises Unusable where the user says the same as in `before`. It is added to `asked`.

    Where a call is right in one of them alone, as in data for irrelevance, both teach something.
    """
    said = bool(example.answer), queries_of(example)
    if any(said[1]) and (first := before.get(said)):
        what = "capitals and punctuation aside, the user says the same as in"
        raise Unusable("near_duplicate", f"{what} {first}")
    length = length_of(example)
    asked.setdefault(said, f"{example.id} of {file}")
    return length


def describe(examples: list[Example], lengths: dict[str, int], unit: str) -> dict:
    """The statistics of one or more examples, as statistics.json has them. unit: "tokens" or "characters"."""
    kinds = Counter(example_kind(example) for example in examples)
    return {
        "examples": len(examples),
        "kinds": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
        "sources": dict(sorted(Counter(example.source for example in examples).items())),
        f"prompt {unit}": _spread(lengths[example.id] for example in examples),
        "tools per prompt": _spread(len(example.tools) for example in examples),
        "calls per answer": _spread(len(example.answer) for example in examples),
    }


def _spread(numbers: Iterable[int]) -> dict[str, float]:
    """p90: the smallest value that nine of ten do not exceed."""
    values = sorted(numbers)
    p90, p99 = (values[-(-len(values) * percent // 100) - 1] for percent in (90, 99))
    median, mean = statistics.median(values), round(statistics.fmean(values), 2)
    return {"min": values[0], "median": median, "mean": mean, "p90": p90, "p99": p99, "max": values[-1]}


def print_statistics(name: str, described: dict) -> None:
    """Prints what `describe` counted, under the name of the file or split: a line for each group."""
    print(printable(f"\n{name}: {described['examples']:,} examples"))
    for title, one in described.items():
        if isinstance(one, dict):
            print(printable(f"  {title}: {', '.join(f'{key} {value:,}' for key, value in one.items())}"))


def sift(inputs: list[Input], args: argparse.Namespace, length_of: Measure, folder: Path) -> Prepared:
    """Reads all inputs, counts in them, and puts every usable example into the training part.

    folder: where the generated data of an input "synthetic" is written, to be read as any other file.
    """
    made = Prepared({"train": []}, {}, [])
    rules = Rules(args.keep, args.no_call_turns)
    seen: dict[bytes, str] = {}
    asked: dict[Asked, str] = {}  # -> the first example, and its file
    for one in inputs:
        # Only those of other files: the steps of a conversation may share what the user says.
        before = {} if "near_duplicate" in args.keep else dict(asked)
        file = Path(one.given).name
        measure = partial(length_of_new, length_of=length_of, file=file, before=before, asked=asked)
        source = one.given
        if source == "synthetic":
            source = folder / source
            write_examples(source, synthetic_splits(Config(seed=args.seed)).train)
        reads = read_examples(source, one.layout, rules, f"{one.label}-", seen)
        for read in tqdm(reads, printable(one.given), unit=" records", disable=None):
            row = "xlam" if read.layout == "xlam" else "other"
            if read.layout == "toolace":
                row = "toolace_single" if is_single_turn(read.record) else "toolace_multi"
            lengths, unfit = weigh(read.examples, measure, read.line)
            one.records[row] += 1
            one.examples[row] += len(lengths)
            one.dropped.update(drop.reason for drop in read.dropped + unfit)
            made.splits["train"] += [example for example in read.examples if example.id in lengths]
            made.lengths |= lengths
            made.dropped += [{"file": one.given, **vars(drop)} for drop in read.dropped + unfit]
        one.sha256 = file_sha256(*find_files(source))
    return made


def split(made: Prepared, share: float, seed: int) -> None:
    """Moves the held-out records from the training part to a test part; no part where none is held out. Steps
    of their conversations that other records hold are dropped from the training part.
    """
    # By the records' own ids, without our labels: training on a raw file splits it in the same way.
    train, test = split_records(made.splits["train"], share, seed)
    if share and not test:
        what = f"--test_share {share:g} of the records of {len(train)} examples holds none out"
        print(f"warning: {what}, so there is no test.jsonl; give a larger share")
    made.splits = {"train": unseen(train, test), "test": test}
    kept = {example.id for example in made.splits["train"]}
    lost = [example.id for example in train if example.id not in kept]
    said = Unusable("held_out", "a step of a conversation in test.jsonl")
    made.dropped += [{"file": "(split)", **vars(said.dropped(name, 0))} for name in lost]
    if lost:
        print(f"{len(lost)} examples, steps of conversations in test.jsonl, are dropped")
    if not test:
        del made.splits["test"]


def augment(made: Prepared, args: argparse.Namespace, length_of: Measure) -> None:
    """Adds irrelevance examples to the training part, then masks names in it; drops what gets too long."""
    plain = made.splits["train"]
    added = irrelevant_examples(plain, args.irrelevance, args.seed)
    masked = masked_examples(plain + added, args.mask, args.seed)
    changed = sum(old is not new for old, new in zip(plain + added, masked))
    lengths, unfit = weigh(tqdm(masked, "measure", disable=None), length_of, 0)
    made.splits["train"] = [example for example in masked if example.id in lengths]
    made.lengths |= lengths
    made.dropped += [{"file": "(augmented)", **vars(drop)} for drop in unfit]
    made.augmented = Counter(irrelevant=len(added), masked=changed, too_long=len(unfit))


def share(text: str) -> float:
    """An argument from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return float(text)


def main(arguments: list[str], load_tokenizer: Callable) -> None:
    """`python data.py prepare …`: reads, filters, splits, augments and writes; prints the counts.

    load_tokenizer: folder or hub id -> tokenizer. Raises UserError, and leaves the output folder as it was
    when it does not come to its end.
    """
    args = parse(arguments)
    template = load_template(args.prompt_template)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    inputs = []
    counts: Counter = Counter()
    for kind, files in args.inputs:
        for given in filter(None, files.split(",")):  # as --data of grpo.py
            counts[kind] += 1
            label = kind if counts[kind] == 1 else f"{kind}{counts[kind]}"
            inputs.append(Input(label, None if kind == "data" else kind, given))
    out = Path(args.out)
    if any((out / name).exists() for name in OUTPUTS) and not args.overwrite:
        raise DataError(f"{out} holds a prepared set already; choose another --out or add --overwrite")
    folder_above(out)
    length_of = partial(prompt_length, template=template, tokenizer=tokenizer, limit=args.max_prompt_tokens)
    with TemporaryDirectory() as folder:
        made = sift(inputs, args, length_of, Path(folder))
    split(made, args.test_share, args.seed)
    if args.irrelevance or args.mask:
        augment(made, args, length_of)
    if not made.splits["train"]:
        lost = dict(Counter(row["reason"] for row in made.dropped))
        raise DataError(f"prepare: no example is left to train on; dropped: {lost}")
    unit = "tokens" if args.tokenizer else "characters"
    made.statistics = {name: describe(part, made.lengths, unit) for name, part in made.splits.items()}
    write(made, inputs, args, template)
    print_table(inputs)
    for name, described in made.statistics.items():
        print_statistics(f"{out}/{name}.jsonl", described)
    if made.augmented:
        print(f"\naugmentation of the training part: {dict(made.augmented)}")
    print(f"\n{out}: {len(made.dropped):,} dropped records and steps are listed in dropped.jsonl")


def write(made: Prepared, inputs: list[Input], args: argparse.Namespace, template: str) -> None:
    """Writes all files into a folder inside --out, then moves them to their places."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out, prefix=".partial") as folder:
        work = Path(folder)
        for name, examples in made.splits.items():
            write_examples(work / f"{name}.jsonl", examples)
            if "trl" in args.layouts:
                write_rows(work / f"trl_{name}.jsonl", (trl_row(example, template) for example in examples))
            if "verl" in args.layouts:
                suffix = "parquet" if importlib.util.find_spec("pyarrow") else "jsonl"
                rows = (verl_row(example, template, name, index) for index, example in enumerate(examples))
                write_rows(work / f"verl_{name}.{suffix}", rows)
        write_rows(work / "dropped.jsonl", made.dropped)
        (work / "statistics.json").write_text(json.dumps(made.statistics, indent=2) + "\n")
        (work / "manifest.json").write_text(json.dumps(manifest(made, inputs, args, work), indent=2) + "\n")
        (out / "manifest.json").unlink(missing_ok=True)  # it would say that the set is complete
        for name in OUTPUTS:
            if (work / name).exists():
                os.replace(work / name, out / name)
            else:
                (out / name).unlink(missing_ok=True)


def manifest(made: Prepared, inputs: list[Input], args: argparse.Namespace, work: Path) -> dict:
    """What was made, from what, and how: the same for the same data and options, wherever it is made."""
    options = {key: value for key, value in sorted(vars(args).items()) if key not in ("out", "overwrite")}
    digests = {file.name: file_sha256(file) for file in sorted(work.iterdir())}
    sources = [vars(one) for one in inputs]
    return {"options": options, "inputs": sources, "augmented": made.augmented, "outputs": digests}


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


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of `prepare`."""
    parser = argparse.ArgumentParser(prog="python data.py prepare", description=__doc__.splitlines()[0])
    add = parser.add_argument
    for kind, what in (
        ("xlam", "xLAM's JSON, or Salesforce/xlam-function-calling-60k on the hub (gated)"),
        ("toolace", "ToolACE's data.json, or Team-ACE/ToolACE on the hub"),
        ("data", 'further files, of any layout; or "synthetic": the demo\'s'),
    ):  # one list, because the order of the files counts: repeated examples are dropped from the later ones
        files = {"nargs": "+", "action": "extend", "default": [], "metavar": "FILE", "dest": "inputs"}
        add(f"--{kind}", **files, type=lambda given, kind=kind: (kind, given), help=what)
    add("--out", required=True, help="folder for train.jsonl, test.jsonl, dropped.jsonl and two summaries")
    add("--overwrite", action="store_true", help="replace the prepared set in it")
    add("--test_share", type=share, default=0.1, help="share of the records held out (default: %(default)s)")
    add("--seed", type=int, default=0, help="of split and augmentation (default: %(default)s)")
    add("--no_call_turns", action="store_true", help="ToolACE's text turns become examples with answer []")
    add("--irrelevance", type=share, default=0.0, help="share to repeat without its tools (default: 0)")
    add("--mask", type=share, default=0.0, help="share that gets random names (default: 0)")
    add("--keep", default="", help=f"reasons not to drop for, of {', '.join(KEEPABLE)}; default: none")
    add("--tokenizer", default="", metavar="M", help="folder or hub id: counts tokens, drops long prompts")
    add("--max_prompt_tokens", type=int, default=4096, help="of a prompt, with --tokenizer (default: 4096)")
    add("--prompt_template", default="", metavar="F", help="file with a {tools} slot; default: our own")
    add("--layouts", default="", help="more layouts to write: trl, verl or trl,verl; default: none")
    args = parser.parse_args(arguments)
    if not args.inputs:
        parser.error("no input; give --xlam FILE, --toolace FILE, --data FILE or several of them")
    for key, known in (("keep", KEEPABLE), ("layouts", ("trl", "verl"))):
        chosen = tuple(filter(None, getattr(args, key).split(",")))
        if not set(chosen) <= set(known):
            parser.error(f"--{key}: choose from {','.join(known)}, not {','.join(chosen)}")
        setattr(args, key, chosen)
    return args


def stats(arguments: list[str], load_tokenizer: Callable) -> None:
    """`python data.py stats FILE [--tokenizer M]`. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python data.py stats", description="Sizes, kinds and sources.")
    parser.add_argument("file", help="any layout that data.py reads")
    parser.add_argument("--tokenizer", default="", metavar="M", help="folder or hub id; default: characters")
    args = parser.parse_args(arguments)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    examples, _ = load_examples(args.file)
    if not examples:
        raise DataError(f"{args.file} holds no usable example; run: python data.py inspect {args.file}")
    length_of = partial(prompt_length, template=SYSTEM_TEMPLATE, tokenizer=tokenizer)
    lengths, refused = weigh(tqdm(examples, "measure", leave=False, disable=None), length_of, 0)
    if refused:
        what = f"{len(refused)} prompts are refused, such as that of {refused[0].id}: {refused[0].detail}"
        if not lengths:
            raise DataError(f"{args.file}: {what}")
        print(printable(what))
    kept = [example for example in examples if example.id in lengths]
    print_statistics(args.file, describe(kept, lengths, "tokens" if args.tokenizer else "characters"))


def inspect(arguments: list[str], _: Callable) -> None:
    """`python data.py inspect FILE [COUNT]`: examples by kind, what was dropped and why, COUNT prompts."""
    parser = argparse.ArgumentParser(prog="python data.py inspect", description="Looks into a file.")
    parser.add_argument("file", help="any layout that data.py reads")
    parser.add_argument("count", type=int, nargs="?", default=3, help="prompts to print (default: 3)")
    args = parser.parse_args(arguments)
    examples, dropped = load_examples(args.file)
    kinds = Counter(example_kind(example) for example in examples)
    counts = ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS if kinds[kind])
    print(printable(f"{args.file}: {len(examples)} examples ({counts})"))
    for one in dropped[:20]:
        print(printable(f"  dropped: line {one.line}, id {one.id}: {one.reason}: {one.detail}"))
    if len(dropped) > 20:
        reasons = Counter(one.reason for one in dropped)
        print(f"  … and {len(dropped) - 20} more; by reason: {dict(reasons)}")
    for example in examples[: args.count]:
        texts = [f"\n{'=' * 20} {example.source} {example.id}"]
        for message in build_messages(example.messages, example.tools):
            texts.append(f"--- {message['role']}\n{message['content']}")
        texts.append(f"--- target\n{render_calls(example.answer)}")
        print(printable("\n".join(texts)))
