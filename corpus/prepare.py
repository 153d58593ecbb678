"""From raw files to a training set with its books.

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
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tqdm import tqdm

from corpus.describe import Size, describe, measure, open_tokenizer, print_statistics
from corpus.examples import KEEPABLE, Dropped, Example, Rules, example_row, to_json
from corpus.layouts import read_examples, trl_row, verl_row, without_repeats, write_examples, write_rows
from corpus.sources import DataError, find_file
from corpus.toolace import is_single_turn
from prompts import load_template

FORMAT = 1
SPLITS = ("train", "test")
OUTPUTS = (  # the manifest is the last to appear
    "train.jsonl", "test.jsonl", "trl_train.jsonl", "trl_test.jsonl", "verl_train.jsonl", "verl_test.jsonl",
    "verl_train.parquet", "verl_test.parquet", "dropped.jsonl", "statistics.json", "manifest.json",
)
PARTIAL = ".partial"  # the folder, inside --out, in which everything is made

# Rows of the paper's Table 1: heading, raw records, examples after processing (arXiv 2505.00024).
TABLE = {
    "xlam": ("xLAM single", 60_000, 60_000),
    "toolace_single": ("ToolACE single-turn", 10_500, 8_183),
    "toolace_multi": ("ToolACE multi-turn", 800, 1_470),
    "other": ("other files",),
}


@dataclass(frozen=True)
class Input:
    """One file to read. label ("xlam", "xlam2", ...): no other input has it, and its examples' ids begin with
    it.
    """

    label: str
    layout: str | None
    given: str
    path: Path


@dataclass(frozen=True)
class Sifted:
    """What was read. keys, sizes: the record and the size of each kept example, in the order of their
    lines.
    """

    keys: list[str]
    sizes: list[Size]
    records: Counter  # of (input's label, row of TABLE)
    examples: Counter  # of (input's label, row of TABLE)
    dropped: Counter  # of (input's label, reason)


# ---------------------------------------------------------------------------------------------------- prepare


def sift(inputs: list[Input], args: argparse.Namespace, template: str, tokenizer, work: Path) -> Sifted:
    """Reads all inputs once. Writes kept.jsonl, whose ids begin with the input's label, and dropped.jsonl."""
    sifted, seen = Sifted([], [], Counter(), Counter(), Counter()), {}
    rules = Rules(args.keep, args.no_call_turns)
    with (work / "kept.jsonl").open("w") as kept, (work / "dropped.jsonl").open("w") as listed:
        for one in inputs:
            reads = read_examples(one.path, one.layout, rules, f"{one.label}-")
            for read in without_repeats(tqdm(reads, one.given, unit=" records", disable=None), seen, rules):
                row = (one.label, row_of(read.layout, read.record))
                sifted.records[row] += 1
                dropped = list(read.dropped)
                for example in read.examples:
                    size = measure(example, template, tokenizer)
                    if tokenizer is not None and size.prompt > args.max_prompt_tokens:
                        dropped.append(_too_long(example, size, args.max_prompt_tokens, read.line))
                        continue
                    kept.write(to_json(example_row(example)) + "\n")
                    sifted.keys.append(example.id.split("#")[0])
                    sifted.sizes.append(size)
                    sifted.examples[row] += 1
                for drop in dropped:
                    listed.write(_dropped_line(one.given, drop))
                    sifted.dropped[one.label, drop.reason] += 1
    return sifted


def row_of(layout: str, record: object) -> str:
    """The row of TABLE in which a record is counted."""
    if layout == "toolace":
        return "toolace_single" if is_single_turn(record) else "toolace_multi"
    return "xlam" if layout == "xlam" else "other"


def _too_long(example: Example, size: Size, limit: int, line: int) -> Dropped:
    return Dropped(
        example.source, example.id, line, "too_long",
        f"the prompt has {size.prompt} tokens, more than {limit}",
    )


def _dropped_line(file: str, drop: Dropped) -> str:
    fields = {"file": file, "line": drop.line, "id": drop.id, "reason": drop.reason, "detail": drop.detail}
    return json.dumps(fields) + "\n"


def held_out_records(keys: Iterable[str], share: float, seed: int) -> set[str]:
    """The records whose examples are held out: those with the smallest hashes of (seed, record), so that
    another file more or less moves few of them.
    """
    ranked = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}/split/{key}".encode()).digest())
    return set(ranked[: round(len(ranked) * share)])


def split(sifted: Sifted, args: argparse.Namespace, work: Path) -> dict[str, list[Size]]:
    """Divides kept.jsonl into train.jsonl and test.jsonl; the sizes of what is in each."""
    apart = held_out_records(sifted.keys, args.test_share, args.seed)
    sizes = {name: [] for name in SPLITS}
    with ExitStack() as stack:
        kept = stack.enter_context((work / "kept.jsonl").open())
        files = {name: stack.enter_context((work / f"{name}.jsonl").open("w")) for name in SPLITS}
        for line, key, size in zip(kept, sifted.keys, sifted.sizes):
            name = "test" if key in apart else "train"
            files[name].write(line)
            sizes[name].append(size)
    (work / "kept.jsonl").unlink()
    if not sizes["test"]:
        (work / "test.jsonl").unlink()
        del sizes["test"]
    return sizes


def augment(work: Path, args: argparse.Namespace, template: str, tokenizer) -> tuple[list[Size], Counter]:
    """Adds irrelevance examples to train.jsonl and then masks names in it; the new sizes, and what happened
    how often.

    Prompts that masks make longer than the limit are dropped.
    """
    from corpus.augment import irrelevant_examples, masked_examples

    examples = list(_written(work / "train.jsonl"))
    added = irrelevant_examples(examples, args.irrelevance, args.seed)
    examples += added
    masked = masked_examples(examples, args.mask, args.seed)
    done = Counter(
        irrelevant=len(added), masked=sum(a is not b for a, b in zip(examples, masked)), too_long=0
    )
    sizes, kept = [], []
    with (work / "dropped.jsonl").open("a") as listed:
        for example in tqdm(masked, "measure", disable=None):
            size = measure(example, template, tokenizer)
            if tokenizer is not None and size.prompt > args.max_prompt_tokens:
                listed.write(
                    _dropped_line("(augmented)", _too_long(example, size, args.max_prompt_tokens, 0))
                )
                done["too_long"] += 1
                continue
            sizes.append(size)
            kept.append(example)
    write_examples(work / "train.jsonl", kept)
    return sizes, done


def _written(path: Path) -> Iterator[Example]:
    for read in read_examples(path) if path.stat().st_size else ():
        assert not read.dropped, f"what prepare wrote cannot be read: {read.dropped[0]}"
        yield from read.examples


def write_layout(layout: str, name: str, template: str, work: Path) -> None:
    """One split in the layout of another tool, made from our own file of it."""
    examples = _written(work / f"{name}.jsonl")
    if layout == "trl":
        rows, suffix = (trl_row(example, template) for example in examples), "jsonl"
    else:
        rows = (verl_row(example, template, name, index) for index, example in enumerate(examples))
        suffix = "parquet" if importlib.util.find_spec("pyarrow") else "jsonl"
        if suffix == "jsonl" and name == "train":
            print(
                "prepare: verl's files are written as JSONL; Parquet needs pyarrow (python -m pip install pyarrow)"
            )
    write_rows(work / f"{layout}_{name}.{suffix}", rows)


# ------------------------------------------------------------------------------------------------------ books


def total(counts: Counter) -> Counter:
    """Counts by the second part of their keys."""
    return sum((Counter({key: count}) for (_, key), count in counts.items()), Counter())


def print_table(sifted: Sifted) -> None:
    """The paper's Table 1 for these files, then what was dropped."""
    records, examples = total(sifted.records), total(sifted.examples)
    print(f"\n{'':22}{'raw records':>13}{'examples':>10}   the paper's Table 1: raw, processed")
    for row, (heading, *paper) in TABLE.items():
        if paper or records[row]:
            print(
                f"{heading:22}{records[row]:>13,}{examples[row]:>10,}"
                + "".join(f"{count:>12,}" for count in paper)
            )
    print(
        "single-turn: at most one call turn, after at most one message of the user; an example is one step of a record"
    )
    labels = list(dict.fromkeys(label for label, _ in sifted.records))
    print(f"\n{'dropped':22}" + "".join(f"{label:>10}" for label in labels))
    for reason, _ in total(sifted.dropped).most_common():
        print(f"  {reason:20}" + "".join(f"{sifted.dropped[label, reason]:>10,}" for label in labels))


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_commit() -> str | None:
    """The commit of this code, with "-dirty" behind it where it was changed since, or None outside a
    repository.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def manifest(
    inputs: list[Input], sifted: Sifted, augmented: Counter, args: argparse.Namespace, work: Path
) -> dict:
    """What was made, from what, and how. No times and no output folder, so that it is the same for the same
    data.
    """
    return {
        "format": FORMAT,
        "options": {key: value for key, value in sorted(vars(args).items()) if key not in ("out", "overwrite")},
        "seed": args.seed,
        "prompt_sha256": hashlib.sha256(load_template(args.prompt_template).encode()).hexdigest(),
        "inputs": [
            {
                "label": one.label, "given": one.given, "file": one.path.name, "sha256": digest(one.path),
                "bytes": one.path.stat().st_size,
                "records": {row: n for (label, row), n in sifted.records.items() if label == one.label},
                "examples": {row: n for (label, row), n in sifted.examples.items() if label == one.label},
                "dropped": {reason: n for (label, reason), n in sifted.dropped.items() if label == one.label},
            }
            for one in inputs
        ],
        "augmented": dict(augmented),
        "outputs": {
            file.name: {"sha256": digest(file), "bytes": file.stat().st_size, "lines": _count_lines(file)}
            for file in sorted(work.iterdir())
        },
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in ("transformers", "pyarrow")},
        "git_commit": git_commit(),
    }


def _count_lines(path: Path) -> int:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_metadata(path).num_rows
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------- in and out


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


def open_folder(out: Path, overwrite: bool, inputs: list[Input], copies: int) -> Path:
    """Makes the folder in which everything is written before it is moved to `out`. Raises DataError, also
    where the disk has no room for so many copies of the inputs.
    """
    if there := [name for name in OUTPUTS if (out / name).exists()]:
        if not overwrite:
            todo = "choose another --out or add --overwrite"
            raise DataError(f"{out} holds a prepared set already ({', '.join(there)}); {todo}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
        packed = {".gz": 8, ".parquet": 8}
        needed = copies * sum(one.path.stat().st_size * packed.get(one.path.suffix, 1) for one in inputs)
        if (free := shutil.disk_usage(out).free) < needed:
            raise DataError(
                f"{out}: about {needed >> 20:,} MiB are needed and {free >> 20:,} free; choose another disk"
            )
        (out / PARTIAL).mkdir()
    except OSError as error:
        raise DataError(f"--out {out} cannot be used: {error.strerror}; choose another folder") from None
    return out / PARTIAL


def publish(work: Path, out: Path) -> None:
    """Moves what was made to `out`, in place of an earlier set. While it works, no manifest says that a set
    is complete.
    """
    (out / "manifest.json").unlink(missing_ok=True)
    for name in OUTPUTS:
        if (work / name).exists():
            os.replace(work / name, out / name)
        else:
            (out / name).unlink(missing_ok=True)


def prepare(args: argparse.Namespace) -> None:
    """Reads, filters, splits, augments, writes and keeps the books; prints them. Raises DataError, and leaves
    the output folder as it was when it does not come to its end.
    """
    template, tokenizer = load_template(args.prompt_template), open_tokenizer(args.tokenizer)
    inputs, out = find_inputs(args), Path(args.out)
    work = open_folder(out, args.overwrite, inputs, 3 + 2 * len(args.layouts))
    try:
        sifted = sift(inputs, args, template, tokenizer, work)
        sizes, augmented = split(sifted, args, work), Counter()
        if args.irrelevance or args.mask:
            sizes["train"], augmented = augment(work, args, template, tokenizer)
        if not sizes["train"]:
            lost = dict(total(sifted.dropped) + Counter(too_long=augmented["too_long"]))
            raise DataError(f"prepare: no example is left to train on; dropped: {lost}")
        for layout in args.layouts:
            for name in sizes:
                write_layout(layout, name, template, work)
        unit = "tokens" if tokenizer is not None else "characters"
        described = {name: describe(ones, unit) for name, ones in sizes.items()}
        (work / "statistics.json").write_text(json.dumps(described, indent=2) + "\n")
        books = manifest(inputs, sifted, augmented, args, work)
        (work / "manifest.json").write_text(json.dumps(books, indent=2) + "\n")
        publish(work, out)
    except OSError as error:
        what = f"{error.filename or out} cannot be written: {error.strerror or error}"
        raise DataError(f"prepare: {what}; free space or choose another --out") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with suppress(
            OSError
        ):  # only an empty folder can be removed, and it is empty when nothing was published
            out.rmdir()
    print_table(sifted)
    for name, one in described.items():
        print_statistics(f"{out}/{name}.jsonl", one)
    if augmented:
        print(
            f"\naugmentation of the training part: {', '.join(f'{n:,} {what}' for what, n in augmented.items())}"
        )
    lost = sum(sifted.dropped.values()) + augmented["too_long"]
    print(
        f"\n{out}: {lost:,} dropped records and steps are listed in dropped.jsonl, all figures are in manifest.json"
    )


# ----------------------------------------------------------------------------------------------- command line


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of `prepare`. Raises DataError for what they cannot be."""
    parser = argparse.ArgumentParser(prog="python data.py prepare", description=__doc__.splitlines()[0])

    def refuse(message: str) -> None:
        raise DataError(f"prepare: {message}; see python data.py prepare --help")

    parser.error = refuse
    add, many = parser.add_argument, {"nargs": "+", "action": "extend", "default": [], "metavar": "FILE"}
    add(
        "--xlam", **many,
        help="xLAM's JSON, or Salesforce/xlam-function-calling-60k on the hub (gated: needs HF_TOKEN)",
    )
    add("--toolace", **many, help="ToolACE's data.json, or Team-ACE/ToolACE on the hub")
    add("--data", **many, help="further files, of any layout that data.py reads")
    add(
        "--out", required=True,
        help="folder for train.jsonl, test.jsonl, dropped.jsonl, statistics.json, manifest.json",
    )
    add("--overwrite", action="store_true", help="replace the prepared set in it")
    add("--test_share", type=float, default=0.1, help="share of the records held out (paper: 0.1)")
    add("--seed", type=int, default=0)
    add(
        "--no_call_turns", action="store_true", help="ToolACE's text turns become examples whose answer is []"
    )
    add(
        "--irrelevance", type=float, default=0.0, metavar="RATE",
        help="training examples without the tools of their answer",
    )
    add("--mask", type=float, default=0.0, metavar="RATIO", help="training examples with random names")
    add(
        "--keep", default="", metavar="REASONS",
        help=f"drop nothing for these reasons, of {', '.join(KEEPABLE)}",
    )
    add("--tokenizer", default="", metavar="M", help="folder or hub id: counts tokens and drops long prompts")
    add(
        "--max_prompt_tokens", type=int, default=4096,
        help="with --tokenizer: longer prompts are dropped (paper: 4096)",
    )
    add(
        "--prompt_template", default="", metavar="F",
        help="file with a {tools} slot; default: the project's own",
    )
    add("--layouts", default="", help="further layouts to write: trl, verl or trl,verl")
    args = parser.parse_args(arguments)
    for key, share in (
        ("test_share", args.test_share),
        ("irrelevance", args.irrelevance),
        ("mask", args.mask),
    ):
        if not 0 <= share <= 1 or (key == "test_share" and share == 1):
            refuse(f"--{key} must be a share from 0 to 1, not {share}")
    for key, known in (("keep", KEEPABLE), ("layouts", ("trl", "verl"))):
        chosen = tuple(filter(None, getattr(args, key).replace(" ", "").split(",")))
        if unknown := set(chosen) - set(known):
            refuse(f"--{key}: unknown {', '.join(sorted(unknown))}; known are {', '.join(known)}")
        setattr(args, key, chosen)
    if args.max_prompt_tokens < 1:
        refuse("--max_prompt_tokens must be at least 1")
    return args


def main(arguments: list[str]) -> None:
    """`python data.py prepare …`. Raises DataError."""
    prepare(parse(arguments))
