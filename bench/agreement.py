"""How often our scorers and the official code disagree: on random literals, and on altered gold calls.

    python bench/agreement.py bfcl --official FOLDER --data ../shared/data/bfcl,../shared/data/bfcl/v3
    python bench/agreement.py acebench --official CHECKOUT --data CHECKOUT --language en

FOLDER holds bfcl_eval (pip install --no-deps --target FOLDER bfcl-eval==2026.3.23), CHECKOUT is ACEBench's
repository. Literals of Java and JavaScript are compared by value and type, altered gold calls by the whole
verdict, with BFCL's error type. Of --count tries, those that came before are left out.
"""

import contextlib
import json
import random
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from bfcl_speed import official_checker  # first: it makes the project's modules importable
from timing import machine, options
from tqdm import tqdm

from evals import acebench, bfcl_check, bfcl_data
from prompts import CALL, END_CALL

SHOWN = 3  # differences below a row of the table
TYPES = {
    "java": "HashMap ArrayList Array String char integer long float double boolean any".split(),
    "javascript": "dict array String integer float Boolean any".split(),
}
JAVA = {
    "Array": "new String[] {%s}", "ArrayList": "new ArrayList<>(Arrays.asList(%s))",
    "HashMap": "new HashMap<>() {{ %s }}", "long": "%sL", "float": "%sf",
}
# A grammar of literals, by declared type; "_" and words of four capitals or more are its symbols.
GRAMMAR = {
    "HashMap": ["new _HashMap<KIND,_KIND>()_{{_PUTS_}}", "new HashMap<>() {{ PUTS }}", "new HashMap<KIND>()"],
    "ArrayList": ["new _ArrayList<KIND>(Arrays.asList(ITEMS))", "new ArrayList<KIND>()_{{_ADDS_}}"],
    "Array": ["new _KIND[]_{ITEMS}", "new KIND[] {ITEMS}"],
    "array": ["_[ITEMS]_", "[_[ITEMS]_,_[ITEMS]]", "new _Array(ITEMS)", "new Array([ITEMS],_[ITEMS])"],
    "dict": ["{ENTRIES}", "_{_ENTRIES_}_"],
    "NESTED": ["new HashMap<>() {{ PUTS }}", "new ArrayList<>() {{ADDS}}", "[ITEMS]", "{ENTRIES}"],
    "KIND": ["", "String", "Integer", "Object", "List<String>"],
    "PUTS": ["", 'put("WORD",_ITEM);', 'put("WORD", ITEM);_PUTS', "put(ITEM,_ITEM);_PUTS"],
    "ADDS": ["", "add(ITEM);", "add(ITEM);_ADDS", "add(_ITEM_);_ADDS"],
    "ITEMS": ["", "ITEM", "ITEM,_ITEMS", "ITEM, ITEM", "_ITEM_,_ITEM_"],
    "ENTRIES": ["", "WORD:_ITEM", '"WORD": ITEM, ENTRIES', "'WORD'_:_ITEM_,_ENTRIES"],
    "ITEM": ['"WORD"', "'WORD'", "DIGITS", "DIGITS", "NESTED", "true", "false", "null", "f(1)"],
    "WORD": ["a", "key", "", "x y", "10:30", "a, b", "it's", "{", ")", "]", "日", "\\n", "/a.b", "1"],
    "DIGITS": ["0", "12", "-1", "007", "٣", "99999999", "3.14", "2.50f", "1e5", "1.5E-3", "5L", "7l\n", "1n"],
    "_": ["", "", "", " ", " ", "\n", "\n    ", "\t", "\u00a0"],
}


def grown(text: str, rng: random.Random) -> str:
    """The text with every symbol of the grammar expanded at random."""
    return re.sub("_|[A-Z]{4,}", lambda symbol: grown(rng.choice(GRAMMAR[symbol[0]]), rng), text)


def damaged(text: str, rng: random.Random) -> str:
    """The text with a few characters missing, added or repeated."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        start = rng.randint(0, len(text))
        piece = text[start : start + rng.randint(1, 5)]
        other = rng.choice(("", piece[1:], rng.choice("\"'()[]{}<>,;: \n\tLf1a") + piece, piece + piece))
        text = text[:start] + other + text[start + len(piece) :]
    return text


def literals(language: str, rng: random.Random) -> Iterator[tuple]:
    """Endless (text, declared type, type of elements); most are literals of that type, some are damaged."""
    collections = [name for name in TYPES[language] if name in GRAMMAR]
    while True:
        declared = rng.choice(TYPES[language] + 3 * collections)
        text = grown(rng.choice(GRAMMAR.get(declared, ["ITEM"])), rng)
        item = rng.choice(TYPES[language]) if bfcl_check.TYPES[declared] is list else None
        yield damaged(text, rng) if rng.random() < 0.3 else text, declared, item


def altered(value: Any, rng: random.Random) -> Any:
    """A copy in which one JSON value, this one or one inside it, differs a little, if only in type."""
    if isinstance(value, (list, dict)) and value and rng.random() < 0.9:
        copy = value.copy()
        place = rng.choice(range(len(copy)) if isinstance(copy, list) else list(copy))
        copy[place] = altered(copy[place], rng)
        return copy
    others = [None, True, 0, 2.5, "", "x", [], {}, [value], {"a": value}, [{"a": 1}], json.dumps(value)]
    if value is None or rng.random() < 0.15:
        return rng.choice(others)
    if isinstance(value, str):
        at = rng.randint(0, len(value))
        marked = value[:at] + rng.choice(" ,./-_*^") + value[at:]  # the scorers leave these out
        near = 8 * [marked] + [value.upper(), value.replace("'", '"'), f"a {value}", damaged(value, rng)]
    elif isinstance(value, list):
        near = [value[:-1], value + value[:1], *2 * [rng.sample(value, len(value))]]
    elif isinstance(value, dict):
        mixed = rng.sample(list(value.items()), len(value))
        renamed = {f"{key}s": part for key, part in mixed[:1]} | dict(mixed[1:])
        near = [dict(mixed[1:]), renamed, value | {"new": 1}, *3 * [dict(mixed)]]
    else:
        near = [value + 1, float(value), int(value), not value]
    return rng.choice(near)


def altered_golds(problems: list, gold: Callable, rng: random.Random) -> Iterator[tuple]:
    """Endless (problem, reply with its gold calls, slightly altered). gold returns [{name: arguments}]."""
    while True:
        problem = rng.choice(problems)
        calls = gold(problem, rng)
        for _ in range(rng.choice((0, 1, 1, 2))):
            calls = altered(calls, rng)
        with contextlib.suppress(AttributeError, TypeError):  # they are no calls any more
            pairs = (pair for call in calls for pair in call.items())
            listed = [{"name": name, "arguments": {**arguments}} for name, arguments in pairs]
            yield problem, f"{CALL}{json.dumps(listed)}{END_CALL}"


def bfcl_gold(problem: bfcl_check.Problem, rng: random.Random) -> list[dict]:
    """Calls that the answer allows; in Java and JavaScript with literals, some of them of altered values."""

    def pick(wanted: Any) -> Any:  # of every key one allowed value; without the key where that is ""
        if not isinstance(wanted, dict):
            return wanted
        values = [rng.choice(some) if some and isinstance(some, list) else some for some in wanted.values()]
        return {key: value for key, value in zip(wanted, values) if value != ""}

    language, function, calls = bfcl_check.LANGUAGES.get(problem.category), problem.functions[0], []
    for name, wanted in (item for call in problem.answer for item in call.items()):
        arguments = pick(wanted)
        for key, value in arguments.items():
            value = [pick(part) for part in value] if isinstance(value, list) else pick(value)
            if language:
                value = altered(value, rng) if rng.random() < 0.1 else value
                value = spelled(value, language, function["parameters"]["properties"][key]["type"])
            arguments[key] = value
        calls.append({function["name"] if "simple" in problem.category else name: arguments})
    return calls


def spelled(value: Any, language: str, declared: str) -> str:
    """A literal for a value of the declared type."""
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str):
        return text if (language, declared) == ("javascript", "String") else value
    if language == "javascript":
        return text
    if isinstance(value, dict):
        text = " ".join(f'put("{key}", {json.dumps(part)});' for key, part in value.items())
    elif isinstance(value, list):  # an Array would keep the quotes
        text = text[1:-1].replace('"', "") if declared == "Array" else text[1:-1]
    return JAVA.get(declared, "%s") % text


def compare(what: str, inputs: Iterator[tuple], count: int, official: Callable, ours: Callable) -> str:
    """A row of the table, and below it the first differences. official, ours: input -> (right?, detail)."""
    seen, right, crashed, told = set(), 0, 0, []
    for given in tqdm(islice(inputs, count), desc=what, total=count):
        text = repr([getattr(part, "id", part) for part in given])
        if text in seen:
            continue
        seen.add(text)
        mine = ours(*given)
        try:
            with contextlib.redirect_stdout(None):  # it prints now and then
                theirs = official(*given)
        except Exception as error:  # whatever the official code stumbles over; ours should say "wrong"
            theirs = (False, error if mine[0] else mine[1])
            crashed += 1
        right += theirs[0]
        if repr(mine) != repr(theirs):  # 1, 1.0 and True differ
            told.append(f"{text}\n  official: {theirs}\n  ours: {mine}")
    row = f"| {what} | {len(seen):,} | {right / len(seen):.0%} | {len(told)} | {crashed} |"
    return "\n".join([row, *told[:SHOWN]])


def bfcl_rows(args: Namespace, rng: random.Random) -> Iterator[str]:
    """Literals of two languages, altered gold calls of three."""
    checker = official_checker(args.official)
    from bfcl_eval.eval_checker.ast_eval.type_convertor.java_type_converter import java_type_converter
    from bfcl_eval.eval_checker.ast_eval.type_convertor.js_type_converter import js_type_converter

    def read(reader: Callable, *given: str) -> tuple:
        return not isinstance(value := reader(*given), str), value

    def official(problem: bfcl_check.Problem, output: str) -> tuple:
        result = checker(problem, bfcl_check.decode(output))
        return result["valid"], None if result["valid"] else result["error_type"]

    for language, converter in (("java", java_type_converter), ("javascript", js_type_converter)):
        sides = partial(read, converter), partial(read, partial(bfcl_check.read_literal, language=language))
        yield compare(f"literals, {language}", literals(language, rng), args.count, *sides)
    asked: list[bfcl_check.Problem] = []
    for place in args.data.split(","):
        asked += [p for p in bfcl_data.load_problems(place).values() if "relevance" not in p.category]
    for language in ("java", "javascript", "python"):
        chosen = [p for p in asked if bfcl_check.LANGUAGES.get(p.category, "python") == language]
        golds = altered_golds(chosen, bfcl_gold, rng)
        yield compare(f"altered golds, {language}", golds, args.count, official, bfcl_check.bfcl_verdict)


def acebench_rows(args: Namespace, rng: random.Random) -> Iterator[str]:
    """Altered gold calls of one language."""
    sys.path.insert(0, args.official)
    from model_eval.checker import normal_checker

    def gold(problem: acebench.Problem, rng: random.Random) -> list[dict]:
        return [{acebench.NUMBERED.sub("", k): v} for k, v in rng.choice(problem.answers).items()]

    def official(problem: acebench.Problem, output: str) -> tuple:
        given, rest = (problem.tools, bfcl_check.decode(output)), (problem.question, problem.part)
        return any(normal_checker(*given, answer, *rest)["valid"] for answer in problem.answers), None

    def ours(problem: acebench.Problem, output: str) -> tuple:
        return not acebench.find_fault(problem, output), None

    golds = altered_golds(list(acebench.load_problems(args.data, args.language).values()), gold, rng)
    yield compare(f"altered golds, {args.language}", golds, args.count, official, ours)


def main() -> None:
    """The command line; prints the table."""
    rows = {"bfcl": bfcl_rows, "acebench": acebench_rows}
    data = "../shared/data/bfcl"
    args = options(__doc__, benchmark=[*rows], official="", data=data, language="en", count=100_000, seed=0)
    table = list(rows[args.benchmark](args, random.Random(args.seed)))
    print("| | compared | right | different | official crashed |\n|---|---|---|---|---|", *table, sep="\n")
    print(machine())


if __name__ == "__main__":
    main()
