"""How fast the reward is, and that nothing breaks it: speed by variant, time against length, a million
mutations.

    python bench/reward_speed.py [--fuzz 1000000] [--seed 0]

Speed: completions of 600 characters with two calls, variants in turn. Length: seconds for inputs of 125 kB to
1 MB that provoke backtracking; linear means that a doubling doubles. Fuzz: seeded mutations (bytes, tags,
nesting, huge numbers, surrogates, control characters) of good completions, each scored by every variant.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections import Counter

from timing import ROOT, machine, options
from tqdm import tqdm

sys.path.insert(0, str(ROOT))

from prompts import ToolCall, render_completion  # noqa: E402
from reward import REWARDS, score  # noqa: E402

CALLS = [
    ToolCall("get_forecast", {"city": "San Francisco", "days": 3, "units": "metric", "details": ["wind"]}),
    ToolCall("search_hotels", {"city": "San Francisco", "max_price": 150.5, "parking": True, "stars": 4}),
]
TOOLS = [{"name": call.name, "parameters": {key: {} for key in call.arguments}} for call in CALLS]
THOUGHT = "The user wants the weather in San Francisco for three days and a hotel under 150.50 with parking. "
GOOD = render_completion(CALLS, (THOUGHT * 9)[: 600 - len(render_completion(CALLS, "x")) + 1])
BASES = (GOOD, render_completion(CALLS, "so"))  # in the second, nearly every mutation meets the calls

PIECES = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_end|>", "<|im_start|>assistant", "[", "]",
    "{", "}", '"', ",", ":", "\\", "2", "-", ".0", "e9", "1e999", "9" * 400, "9" * 5000, "NaN", "-Infinity",
    "null", "true", " ", "\n", "\t", "\x00", "\x1f", "\x7f", "\ud800", "\udfff", "\ufeff", "\u2028", "é",
    "e\u0301", "😀", "\\ud800", "\\u0000", "[" * 300, '{"a":' * 300, "]" * 300, "[" * 70 + "]" * 70, '"name"',
    '"arguments"', '"name": "x", ', "'", "```json\n", '"[{\\"name\\": \\"x\\"}]"',
    "<tool_call>[]</tool_call>",
]


def mutated(text: str, rng: random.Random) -> str:
    """`text` after a few seeded changes: a piece put in, a part cut out, doubled, reversed, or garbled."""
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice((0, 0, 1, 5, 40)))
        kind = rng.randrange(5)
        part = text[start:end]
        if kind == 0:
            part = rng.choice(PIECES)
        elif kind == 1:
            part = ""
        elif kind == 2:
            part *= rng.choice((2, 3, 50))
        elif kind == 3:
            garbled = bytes(rng.randrange(256) for _ in part)
            part = garbled.decode(rng.choice(("latin-1", "utf-16-le")), "replace")
        else:
            part = part[::-1]
        text = text[:start] + part + text[end:]
    return text


def measure_speed(items: int, rounds: int = 7) -> None:
    """Completions per second of each variant, the variants taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in REWARDS}
    for _ in range(rounds):
        for name in REWARDS:
            start = time.perf_counter()
            for _ in range(items):
                score(GOOD, CALLS, name, tools=TOOLS)
            seconds[name].append(time.perf_counter() - start)
    print(f"\ncompletions of {len(GOOD)} characters per second, one core")
    for name, times in seconds.items():
        median = items / statistics.median(times)
        print(f"  {name:16} best {items / min(times):9,.0f}   median {median:9,.0f}")


def measure_length() -> None:
    """Seconds by length for inputs at which a backtracking parser would be quadratic."""
    shapes = {
        "open thoughts": lambda n: "<think>" * (n // 7),
        "open blocks": lambda n: "<think>a</think>" + "<tool_call>" * (n // 11),
        "closed blocks": lambda n: "<think>a</think>" + "<tool_call>[]</tool_call>" * (n // 25),
        "backslashes": lambda n: '<think>a</think><tool_call>[{"name": "f", "arguments": {"x": "' + "\\" * n,
        "white space": lambda n: " " * n,
        "one long value": lambda n: render_completion([ToolCall("f", {"x": "a" * n})], "so"),
        "many calls": lambda n: render_completion([ToolCall("f", {"x": 1})] * (n // 40), "so"),
    }
    sizes = (125_000, 250_000, 500_000, 1_000_000)
    print("\nmilliseconds by length in characters, binary (tool_n1_v4)")
    print(" " * 18 + "".join(f"{size:>18,}" for size in sizes))
    for name, shape in shapes.items():
        cells = []
        for size in sizes:
            text, cell = shape(size), []
            for variant in ("binary", "tool_n1_v4"):
                start = time.perf_counter()
                score(text, CALLS, variant)
                cell.append(1000 * (time.perf_counter() - start))
            cells.append(f"{cell[0]:8.1f} ({cell[1]:.1f})")
        print(f"  {name:16}" + "".join(f"{cell:>18}" for cell in cells))


def fuzz(count: int, seed: int) -> None:
    """Scores `count` mutated completions by every variant; an exception ends the program."""
    rng, paid, slowest, variants = random.Random(seed), Counter(), (0.0, ""), list(REWARDS)
    for _ in tqdm(range(count), desc="fuzz", unit=" items", disable=None):
        text = mutated(rng.choice(BASES), rng)
        start = time.perf_counter()
        totals = {name: score(text, CALLS, name, tools=TOOLS).total for name in variants}
        slowest = max(slowest, (time.perf_counter() - start, text))
        paid.update(name for name in variants if totals[name] == REWARDS[name].right)
    print(f"\nfuzz: {count:,} mutated completions, seed {seed}, by {len(variants)} variants: no exception")
    print(f"  slowest item, all variants: {1000 * slowest[0]:.2f} ms ({len(slowest[1])} characters)")
    print("  paid in full: " + ", ".join(f"{name} {100 * paid[name] / count:.2f} %" for name in variants))


def main() -> None:
    args = options(__doc__, items=4000, fuzz=1_000_000, seed=0)
    print(machine())
    measure_speed(args.items)
    measure_length()
    if args.fuzz:
        fuzz(args.fuzz, args.seed)


if __name__ == "__main__":
    main()
