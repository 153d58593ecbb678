"""What training data shares with the benchmarks: `python data.py overlap TRAIN [TRAIN …] --bfcl DIR --apibank
DIR`.

Queries are compared user message by user message, so that long dialogues are found by any of their turns, and
every step of a record by all turns before it. Tools are compared by name, and by name and parameter names. It
finds copies, not paraphrases.
"""

from __future__ import annotations

import argparse
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

import eval_apibank
import eval_bfcl
from corpus.examples import Example
from corpus.layouts import load_examples, write_examples
from corpus.schema import properties
from corpus.sources import DataError
from evals.bfcl_check import BfclError

# GPT-3's benchmarks were compared with its training data by 13 words, shorter ones by down to 8 (arXiv
# 2005.14165, appendix C). Still shorter messages ("Yes, please do.") are shared by chance: they count as the
# whole query only.
NGRAM, MIN_WORDS = 13, 8
# Kind of match -> heading, strongest first. A pair of messages, or of tools, is listed under one kind.
KINDS = {"identical": "identical", "ngram": "n-gram", "tool": "name + parameters", "tool_name": "name only"}
QUERY_KINDS = ("identical", "ngram")

PUNCTUATION = re.compile(r"[^\w\s]|_")
UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")  # Japanese and Chinese: no spaces between words


@dataclass(frozen=True)
class BenchmarkCase:
    """What is compared of one benchmark case. category: a BFCL category, or "level-1" to "level-3" of
    API-Bank.
    """

    id: str
    category: str
    queries: tuple[str, ...]  # its user messages; empty where the benchmark's reader gives no dialogue
    tools: tuple[dict, ...]


@dataclass(frozen=True)
class Match:
    """One message or tool of a training example that benchmark cases have too.

    text: the longest shared run of words, normalised, or the tool as the benchmark has it. words: length of
    that run; ngrams: how many n-grams of the training message are shared (1 for a short query found whole).
    Both 0 for tools.
    """

    example: int  # position among the examples given, because ids may repeat between files
    train_id: str
    source: str
    kind: str  # one of KINDS
    cases: tuple[str, ...]  # ids of all cases with this message or tool
    text: str
    words: int = 0
    ngrams: int = 0


# ------------------------------------------------------------------------------------------------- comparison


def normalise(text: str) -> list[str]:
    """Lower-case words without punctuation, split at white space; a Chinese or Japanese character is a
    word.
    """
    if not text.isascii():
        text = UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFKC", text))
    return PUNCTUATION.sub("", text.lower()).split()


def _squash(text: str) -> str:
    return "".join(normalise(text))


def _tool_key(tool: dict) -> tuple[str, frozenset[str]]:
    return _squash(tool["name"]), frozenset(_squash(name) for name in properties(tool))


Messages = dict[
    str, tuple[list[str], tuple[str, ...]]
]  # squashed message -> (its words, ids of the cases with it)
Grams = dict[tuple[str, ...], list[str]]  # n-gram -> squashed messages that contain it


def _index_messages(cases: Iterable[BenchmarkCase], ngram: int) -> tuple[Messages, Grams]:
    """A message shorter than `ngram` has one n-gram, its whole; below MIN_WORDS words it has none."""
    words_of, ids, grams, shortest = {}, {}, {}, min(MIN_WORDS, ngram)
    for case in cases:
        for words in filter(None, map(normalise, case.queries)):
            if len(words) >= shortest or len(case.queries) == 1:
                key = "".join(words)
                words_of.setdefault(key, words)
                ids.setdefault(key, {})[case.id] = None  # a dict, as a set in order
    for key, words in words_of.items():
        width = min(len(words), ngram)
        if width >= shortest:
            for gram in {tuple(words[at : at + width]) for at in range(len(words) - width + 1)}:
                grams.setdefault(gram, []).append(key)
    return {key: (words, tuple(ids[key])) for key, words in words_of.items()}, grams


def _index_tools(
    cases: Iterable[BenchmarkCase],
) -> dict[str, list[tuple[frozenset[str], str, tuple[str, ...]]]]:
    """Squashed tool name -> [(parameter names, the tool as text, ids of the cases that offer it)]."""
    texts, ids, tools = {}, {}, {}
    for case in cases:
        for tool in case.tools:
            key = _tool_key(tool)
            texts.setdefault(key, f"{tool['name']}({', '.join(properties(tool))})")
            ids.setdefault(key, {})[case.id] = None
    for (name, parameters), text in texts.items():
        if name:  # not of punctuation only
            tools.setdefault(name, []).append((parameters, text, tuple(ids[name, parameters])))
    return tools


def _shared_runs(words: list[str], grams: Grams, widths: Iterable[int]) -> dict[str, list[tuple[int, int]]]:
    """Squashed benchmark message -> runs (first word, end) of `words` whose n-grams all occur in that
    message.
    """
    runs: dict[str, list[tuple[int, int]]] = {}
    for width in widths:
        for start in range(len(words) - width + 1):
            for key in grams.get(tuple(words[start : start + width]), ()):
                own = runs.setdefault(key, [])
                if own and own[-1][1] == start + width - 1:  # the n-gram one word earlier was shared too
                    own[-1] = (own[-1][0], start + width)
                else:
                    own.append((start, start + width))
    return runs


def _compare(text: str, messages: Messages, grams: Grams, widths: Iterable[int], ngram: int) -> list[dict]:
    """The fields kind, cases, text, words and ngrams of one user message's matches."""
    words, found = normalise(text), []
    key = "".join(words)
    if key in messages:
        count = max(len(words) - ngram + 1, 1)
        found.append(
            dict(
                kind="identical", cases=messages[key][1], text=" ".join(words), words=len(words), ngrams=count
            )
        )
    for other, runs in _shared_runs(words, grams, widths).items():
        if other != key:
            theirs, ids = messages[other]
            first, end = max(runs, key=lambda run: run[1] - run[0])
            count = sum(stop - start - min(ngram, len(theirs)) + 1 for start, stop in runs)
            found.append(
                dict(
                    kind="ngram", cases=ids, text=" ".join(words[first:end]), words=end - first, ngrams=count
                )
            )
    return found


def overlap(examples: Iterable[Example], cases: Sequence[BenchmarkCase], ngram: int = NGRAM) -> list[Match]:
    """All matches, in the order of the examples. Time is linear in the words of both sides.

    identical: a user message equals one of the case, but for upper and lower case, punctuation and white
    space. ngram: they share a run of `ngram` words, or a case's message of MIN_WORDS to `ngram` - 1 words
    stands whole in the training message. Messages below MIN_WORDS words (or `ngram`, if that is less) count
    only where they are identical and neither side has another user message. tool: same name and same
    parameter names. tool_name: same name only; tools without parameters can share no more. Steps of one
    record repeat its messages and tools, and so its matches.
    """
    messages, grams = _index_messages(cases, ngram)
    widths, shortest, tools = (
        sorted({len(gram) for gram in grams}),
        min(MIN_WORDS, ngram),
        _index_tools(cases),
    )
    matches: list[Match] = []
    known: dict[str, list[dict]] = {}  # by user message, because the steps of a record repeat them
    for position, example in enumerate(examples):
        me = (position, example.id, example.source)
        texts = [message.get("content") or "" for message in example.messages if message["role"] == "user"]
        for text in dict.fromkeys(texts):
            if text not in known:
                known[text] = _compare(text, messages, grams, widths, ngram)
            matches += [
                Match(*me, **found) for found in known[text] if found["words"] >= shortest or len(texts) == 1
            ]
        for name, parameters in dict.fromkeys(map(_tool_key, example.tools)):
            for theirs, text, ids in tools.get(name, ()):
                kind = "tool" if parameters and theirs == parameters else "tool_name"
                matches.append(Match(*me, kind, ids, text))
    return matches


def records(examples: Sequence[Example], files: Sequence[str]) -> list[tuple[str, str, str]]:
    """Per example its record: (file, source, id before the "#" that numbers the steps). files: one per
    example.
    """
    return [(file, example.source, example.id.split("#")[0]) for example, file in zip(examples, files)]


def without_queries(
    examples: Sequence[Example], matches: Iterable[Match], record_of: Sequence[tuple]
) -> tuple[list[Example], int]:
    """(the examples of those records of which no step shares a query, number of the other records)."""
    bad = {record_of[match.example] for match in matches if match.kind in QUERY_KINDS}
    return [example for example, record in zip(examples, record_of) if record not in bad], len(bad)


def tabulate(matches: Iterable[Match], cases: Iterable[BenchmarkCase]) -> dict[str, dict]:
    """Per category, and for "all": number of cases, of those without a word of a query, per kind [cases,
    examples].

    A case or example counts once per kind, however many matches it has, and under several kinds if it has
    those.
    """
    category = {case.id: case.category for case in cases}
    table = {name: {"cases": 0, "without_query": 0} for name in [*dict.fromkeys(category.values()), "all"]}
    for case in cases:
        for name in (case.category, "all"):
            table[name]["cases"] += 1
            table[name]["without_query"] += not any(map(normalise, case.queries))
    sides = {(name, kind): (set(), set()) for name in table for kind in KINDS}
    for match in matches:
        for case_id in match.cases:
            for name in (category[case_id], "all"):
                sides[name, match.kind][0].add(case_id)
                sides[name, match.kind][1].add(match.example)
    for (name, kind), both in sides.items():
        table[name][kind] = [len(side) for side in both]
    return table


# ------------------------------------------------------------------------------------------------ the command


def load_bfcl(folder: str | Path) -> list[BenchmarkCase]:
    """BFCL's single-turn cases. Raises DataError."""
    try:
        problems = eval_bfcl.load_problems(folder).values()
    except BfclError as error:
        raise DataError(str(error).replace("--data", "--bfcl")) from None
    return [
        BenchmarkCase(
            p.id,
            p.category,
            tuple(m["content"] for m in p.messages if m["role"] == "user"),
            tuple(p.functions),
        )
        for p in problems
    ]


def load_apibank(folder: str | Path) -> list[BenchmarkCase]:
    """API-Bank's cases: the dialogue before the gold call, and the APIs shown or else the gold one. Raises
    DataError.
    """
    try:
        golds = eval_apibank.load_cases(folder).values()
    except eval_apibank.EvalError as error:
        raise DataError(str(error).replace("--data", "--apibank")) from None
    cases = []
    for gold in golds:
        queries = tuple(turn["text"] for turn in gold.history if turn["role"] == "User")
        names = [name for name in gold.shown or [gold.gold.name] if name in gold.apis]
        tools = tuple({"name": name, "parameters": gold.apis[name]["input_parameters"]} for name in names)
        cases.append(BenchmarkCase(gold.id, f"level-{gold.level}", queries, tools))
    return cases


def _print_table(table: dict[str, dict]) -> None:
    print("\nshared with the training data: benchmark cases / training examples")
    print(
        f"{'category':24}{'cases':>7}{'no query':>10}"
        + "".join(f"{heading:>20}" for heading in KINDS.values())
    )
    for name, row in table.items():
        cells = "".join(f"{f'{row[kind][0]} / {row[kind][1]}':>20}" for kind in KINDS)
        print(f"{name:24}{row['cases']:>7}{row['without_query'] or '-':>10}{cells}")


def _print_matches(matches: Sequence[Match], show: int) -> None:
    """Up to `show` matches per kind, longest first; those of the same text are one line."""
    for kind, heading in KINDS.items():
        same: dict[str, list[Match]] = {}
        for match in sorted((m for m in matches if m.kind == kind), key=lambda m: (-m.words, -m.ngrams)):
            same.setdefault(match.text, []).append(match)
        if same:
            print(f"\n{heading}: {len(same)} different" + (f", {show} shown" if len(same) > show else ""))
        for text, group in list(same.items())[:show]:
            trained = list(dict.fromkeys(f"{match.source} {match.train_id}" for match in group))
            tested = list(dict.fromkeys(case for match in group for case in match.cases))
            both = [
                f"{ids[0]}{f' (and {len(ids) - 1} more)' if ids[1:] else ''}" for ids in (trained, tested)
            ]
            size = f" [{group[0].words} words, {group[0].ngrams} n-grams]" if kind in QUERY_KINDS else ""
            print(f"  {both[0]} ~ {both[1]}{size}: {text[:160]}{'…' if len(text) > 160 else ''}")


def _read_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python data.py overlap", description=__doc__.splitlines()[0])

    def refuse(message: str) -> None:
        raise DataError(f"overlap: {message}; see python data.py overlap --help")

    parser.error = refuse
    parser.add_argument(
        "train", nargs="+", metavar="TRAIN", help="training files of any layout that data.py reads"
    )
    parser.add_argument("--bfcl", metavar="DIR", help="folder with BFCL_v4_*.json")
    parser.add_argument("--apibank", metavar="DIR", help="folder with cases.jsonl.gz")
    parser.add_argument(
        "--ngram", type=int, default=NGRAM, help="shared words that count (default: %(default)s)"
    )
    parser.add_argument(
        "--show", type=int, default=20, help="matches to print of each kind (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="write all matches there")
    parser.add_argument(
        "--write", type=Path, metavar="CLEAN.jsonl", help="write the records that share no query there"
    )
    args = parser.parse_args(arguments)
    if not args.bfcl and not args.apibank:
        refuse("give --bfcl DIR, --apibank DIR or both")
    if args.ngram < 5:
        refuse(f"--ngram {args.ngram} is too short: almost all queries share that many words; take 8 to 13")
    if args.show < 0:
        refuse(f"--show {args.show} is negative")
    taken = {Path(path).resolve() for path in args.train}
    for path in filter(None, (args.out, args.write)):
        if path.resolve() in taken:
            refuse(f"{path} is both read and written, or written twice; name another file")
        if path.is_dir() or not path.parent.is_dir():
            refuse(f"{path} cannot be written: it is a folder, or its folder does not exist")
        taken.add(path.resolve())
    return args


def main(arguments: list[str]) -> None:
    """`TRAIN [TRAIN …] --bfcl DIR --apibank DIR [--ngram 13] [--show 20] [--out FILE.jsonl] [--write
    CLEAN.jsonl]`.

    Prints the table and the strongest matches. Raises DataError.
    """
    args = _read_arguments(arguments)
    cases = (load_bfcl(args.bfcl) if args.bfcl else []) + (load_apibank(args.apibank) if args.apibank else [])
    examples: list[Example] = []
    files: list[str] = []
    for path in args.train:
        kept, dropped = load_examples(path)
        reasons = Counter(one.reason for one in dropped).most_common()
        lost = "; ".join(f"{count} {reason}" for reason, count in reasons)
        print(f"{path}: {len(kept)} examples" + (f", dropped and not compared: {lost}" if lost else ""))
        examples += kept
        files += [path] * len(kept)
    if not examples:
        raise DataError(
            f"{', '.join(args.train)}: no usable example to compare; run: python data.py inspect FILE"
        )
    matches = overlap(tqdm(examples, desc="overlap", leave=False), cases, args.ngram)
    record_of = records(examples, files)
    clean, bad = without_queries(examples, matches, record_of)
    try:
        if args.out:  # before anything is printed, because a pipe may break
            rows = [{"file": files[match.example], **asdict(match)} for match in matches]
            args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if args.write and clean:
            write_examples(args.write, clean)
    except OSError as error:
        raise DataError(
            f"{error.filename or args.out or args.write} cannot be written: {error.strerror}"
        ) from None
    _print_table(tabulate(matches, cases))
    _print_matches(matches, args.show)
    print(
        f"\n{len(examples) - len(clean)} of {len(examples)} training examples, in {bad} of {len(set(record_of))} records, "
        "share a query with a benchmark"
    )
    if args.out:
        print(f"{len(matches)} matches: {args.out}")
    if args.write and not clean:
        raise DataError(
            f"every training record shares a query with a benchmark, so {args.write} was not written"
        )
    if args.write:
        print(f"the other {len(clean)} examples: {args.write}")
