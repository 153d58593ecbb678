"""What training data shares with its test file and with the benchmarks: copies, not paraphrases.

    python data.py overlap TRAIN [TRAIN …] --test FILE --bfcl DIR --apibank DIR [--out FILE] [--write FILE]

Queries are compared one user message at a time, so that a long dialogue is found by any of its turns.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from config import printable
from corpus.examples import Example, normalise, record_of, user_messages
from corpus.layouts import load_examples, write_examples
from corpus.sources import append_jsonl
from evals.apibank_data import load_cases
from evals.bfcl_data import load_problems

# As GPT-3's training data was compared with its benchmarks (arXiv 2005.14165, appendix C). Messages below 8
# words ("Yes, please do.") are shared by chance: they count as the whole query only.
NGRAM, MIN_WORDS = 13, 8
KINDS = ("identical", "ngram", "tool")  # of matches
SHOWN = 20  # matches printed of each kind


@dataclass(frozen=True)
class HeldOutCase:
    """What is compared of one case. category: "test", BFCL's own, or "level-1" to "level-3" of API-Bank."""

    id: str
    category: str
    queries: tuple[str, ...]  # its user messages; empty where the benchmark's reader gives no dialogue
    tools: tuple[str, ...]  # their names


@dataclass(frozen=True)
class Match:
    """Something of a training example that held-out cases have, too."""

    example: int  # position among the examples given, because ids may repeat between files
    train_id: str
    kind: str  # one of KINDS
    cases: list[str]  # ids
    text: str  # what is shared, normalised: the message, its first shared n-gram, or the tool's name


def _names(tools: Iterable[dict]) -> tuple[str, ...]:
    return tuple(tool["name"] for tool in tools)


def _features(queries: Sequence[str], tools: Iterable[str], held_out: bool) -> Iterator[tuple[str, str]]:
    """(kind, text) of all that is compared: two sides match where they have one of these in common.

    A held-out message of 8 to 12 words is one n-gram, which may stand anywhere in a training message.
    """
    for words in map(normalise, dict.fromkeys(queries)):
        if len(words) >= MIN_WORDS or (words and len(queries) == 1):
            yield "identical", " ".join(words)
        widths = [min(len(words), NGRAM)] if held_out else range(MIN_WORDS, NGRAM + 1)
        for width in widths if len(words) >= MIN_WORDS else ():
            for start in range(len(words) - width + 1):
                yield "ngram", " ".join(words[start : start + width])
    for name in filter(None, dict.fromkeys("".join(normalise(tool)) for tool in tools)):
        yield "tool", name


def overlap(examples: Iterable[Example], cases: Iterable[HeldOutCase]) -> list[Match]:
    """All matches, in the order of the examples. Time is linear in the words of both sides.

    identical: a user message equals one of the case, capitals and punctuation aside. ngram: they share 13
    words in a row, or a case's message of 8 to 12 words stands whole in the training message. Shorter ones
    count only where they are identical and neither side has another. tool: the same name.
    """
    index: dict[tuple[str, str], dict[str, None]] = {}  # feature -> ids of the cases with it, in order
    for case in cases:
        for feature in _features(case.queries, case.tools, held_out=True):
            index.setdefault(feature, {})[case.id] = None
    matches: list[Match] = []
    for position, example in enumerate(examples):
        queries, found = user_messages(example.messages), set()
        for kind, text in _features(queries, _names(example.tools), held_out=False):
            # One n-gram per case is enough, and none where a message is identical.
            ids = [name for name in index.get((kind, text), ()) if kind != "ngram" or name not in found]
            if ids:
                matches.append(Match(position, example.id, kind, ids, text))
            if kind != "tool":
                found.update(ids)
    return matches


def count_matches(matches: Iterable[Match], cases: Iterable[HeldOutCase]) -> dict[str, dict[str, str]]:
    """Category, or "all" -> kind -> "cases / training examples" that have such a match."""
    category = {case.id: case.category for case in cases}
    tested, trained = defaultdict(set), defaultdict(set)
    for match in matches:
        for case in match.cases:
            for name in (category[case], "all"):
                tested[name, match.kind].add(case)
                trained[name, match.kind].add(match.example)
    names = [*dict.fromkeys(category.values()), "all"]
    return {name: {k: f"{len(tested[name, k])} / {len(trained[name, k])}" for k in KINDS} for name in names}


def load_held_out(test: str = "", bfcl: str = "", apibank: str = "") -> list[HeldOutCase]:
    """Cases of a test file, of BFCL's folder and of API-Bank's, of those that are given. Raises UserError."""
    cases = []
    for one in load_examples(test)[0] if test else ():
        names = _names(one.tools)
        cases.append(HeldOutCase(f"test {one.id}", "test", user_messages(one.messages), names))
    for one in load_problems(bfcl).values() if bfcl else ():
        cases.append(HeldOutCase(one.id, one.category, user_messages(one.messages), _names(one.functions)))
    for one in load_cases(apibank).values() if apibank else ():
        queries = tuple(turn["text"] for turn in one.history if turn["role"] == "User")
        cases.append(HeldOutCase(one.id, f"level-{one.level}", queries, tuple(one.shown or [one.gold.name])))
    return cases


def print_matches(matches: Sequence[Match]) -> None:
    """Up to SHOWN matches of each kind; those of the same text are one line, with the first ids."""
    for kind in KINDS:
        same: dict[str, list[Match]] = defaultdict(list)
        for match in matches:
            if match.kind == kind:
                same[match.text].append(match)
        print(f"\n{kind}: {len(same)} different" + (f", {SHOWN} shown" if len(same) > SHOWN else ""))
        for text, group in list(same.items())[:SHOWN]:
            tested = len({case for match in group for case in match.cases})
            ids = f"{group[0].train_id} ~ {group[0].cases[0]}"
            print(printable(f"  {ids} ({len(group)} examples, {tested} cases): {text[:160]}"))


def main(arguments: list[str]) -> None:
    """Prints counts and matches, and writes the files that are asked for. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python data.py overlap", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("train", nargs="+", metavar="TRAIN", help="training files of any layout that data.py reads")
    add("--test", metavar="FILE", help="their test file")
    add("--bfcl", metavar="DIR", help="folder with BFCL_v4_*.json")
    add("--apibank", metavar="DIR", help="folder with cases.jsonl.gz, or what else eval_apibank.py reads")
    add("--out", type=Path, metavar="FILE.jsonl", help="write all matches there")
    add("--write", type=Path, metavar="CLEAN.jsonl", help="write the records that share no query there")
    args = parser.parse_args(arguments)
    cases = load_held_out(args.test, args.bfcl, args.apibank)
    if not cases:
        parser.error("nothing to compare with: give --test FILE, --bfcl DIR or --apibank DIR")
    examples, files = [], []
    for path in args.train:
        kept, dropped = load_examples(path)
        print(f"{path}: {len(kept)} examples; {len(dropped)} dropped records or steps are not compared")
        examples += kept
        files += [path] * len(kept)
    matches = overlap(tqdm(examples, desc="overlap", leave=False), cases)
    records = [(file, record_of(example)) for file, example in zip(files, examples)]
    shared = {records[match.example] for match in matches if match.kind != "tool"}
    clean = [example for example, record in zip(examples, records) if record not in shared]
    if args.out:
        args.out.unlink(missing_ok=True)
        append_jsonl(args.out, [{"file": files[match.example]} | asdict(match) for match in matches])
    if args.write:
        write_examples(args.write, clean)
    sizes = Counter(case.category for case in cases) | {"all": len(cases)}
    print("\nheld-out cases / training examples that share something")
    print(f"{'category':24}{'cases':>7}" + "".join(f"{kind:>16}" for kind in KINDS))
    for name, row in count_matches(matches, cases).items():
        print(f"{name:24}{sizes[name]:>7}" + "".join(f"{cell:>16}" for cell in row.values()))
    print_matches(matches)
    lost = len(examples) - len(clean)
    print(f"\n{lost} of {len(examples)} training examples, in {len(shared)} records, share a query")
