"""A run's logged completions as one page for a browser: no server, no network, no other file.

    python samples_page.py runs/demo                          writes runs/demo/samples.html
    python samples_page.py runs/demo --out a.html --limit 500

The page is samples_page.html with the rows of samples.jsonl as JSON inside. It can be made while the run goes
on.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import os
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from config import ConfigError
from distributed.ranks import run_script

TEMPLATE = Path(__file__).with_name("samples_page.html")
LIMIT = 20_000  # completions on one page
MAX_BYTES = 16_000_000  # of rows on one page: a browser opens it at once


@dataclass(frozen=True)
class Line:
    """Where a row of samples.jsonl begins, its bytes, and what the page says of rows that it does not
    hold.
    """

    offset: int
    size: int
    step: int
    kind: str
    reward: float


def write_page(run_dir: Path, target: Path | None = None, limit: int = LIMIT) -> Path:
    """Writes the page of a run to `target`, by default samples.html in its folder, and returns where it is.

    limit: completions at most; fewer where they are long (MAX_BYTES). Of every step the first ones stay.
    Raises ConfigError where there is no samples.jsonl, or where the page cannot be written.
    """
    source, target = run_dir / "samples.jsonl", target or run_dir / "samples.html"
    if limit < 1:
        raise ConfigError(f"limit must be at least 1, not {limit}")
    if not source.is_file():
        raise ConfigError(f"{run_dir} has no samples.jsonl; give the folder of a run of grpo.py")
    with source.open("rb") as file:
        lines, unreadable = scan(file)
        while True:
            kept = thin(lines, limit, 3 * MAX_BYTES)
            about = {"run": run_dir.resolve().name, "logged": len(lines), "unreadable": unreadable}
            text = embed(about | rewards_by_step(lines) | rows_of(file, kept))
            if len(text) <= MAX_BYTES or limit == 1:
                break
            limit = max(1, int(0.9 * len(kept) * MAX_BYTES / len(text)))
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("__ROWS__")
    script = tail.partition("<script>")[2].partition("</script>")[0]
    allowed = base64.b64encode(
        hashlib.sha256(script.encode()).digest()
    ).decode()  # and no other script may run
    partial = target.with_name(
        target.name + ".tmp"
    )  # whoever has the page open may load it again at any time
    try:
        partial.write_text(head.replace("__SCRIPT__", f"sha256-{allowed}") + text + tail, encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from None
    return target


def scan(file: BinaryIO) -> tuple[list[Line], int]:
    """The rows of a samples.jsonl, and how many lines are none. A last line that is being written is left
    out.
    """
    lines, unreadable, offset = [], 0, 0
    for text in tqdm(file, "read samples", unit=" rows", leave=False, delay=2):
        if text.endswith(b"\n"):
            try:
                row = json.loads(text)
                lines.append(
                    Line(
                        offset, len(text), int(row["step"]), str(row.get("kind") or ""), float(row["reward"])
                    )
                )
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                unreadable += 1
        offset += len(text)
    return lines, unreadable


def thin(lines: Sequence[Line], limit: int, max_bytes: int) -> list[Line]:
    """At most `limit` rows and about `max_bytes`: the first k of every step, or the first of every so-manieth
    step.
    """
    steps = defaultdict(list)
    for line in lines:
        steps[line.step].append(line)

    def too_much(k: int) -> bool:
        kept = [line.size for own in steps.values() for line in own[:k]]
        return len(kept) > limit or sum(kept) > max_bytes

    k = bisect_left(range(1, max(map(len, steps.values()), default=0) + 1), True, key=too_much)
    every = 1 if k else -(-len(steps) // limit) or 1
    return [line for step in sorted(steps)[::every] for line in steps[step][: max(1, k)]]


def rewards_by_step(lines: Sequence[Line]) -> dict:
    """For the curve: the steps and, by kind, count and sum of the rewards at each of them."""
    rewards = defaultdict(list)
    for line in lines:
        rewards[line.kind, line.step] += [line.reward] if math.isfinite(line.reward) else []
    steps, kinds = sorted({line.step for line in lines}), sorted({line.kind for line in lines})
    curves = {
        kind: [[len(rewards[kind, step]), sum(rewards[kind, step])] for step in steps] for kind in kinds
    }
    return {"steps": steps, "curves": curves}


def rows_of(file: BinaryIO, kept: Iterable[Line]) -> dict:
    """The rows, with tables of the texts that come again and again: [step, number of the prompt, of the
    reason, reward, advantage, whether truncated, numbers of its words, -1000 x their log-probs]; without
    tokens, the text and null.
    """
    prompts, reasons, counts, rows = {}, Counter(), Counter(), []
    for line in kept:
        file.seek(line.offset)
        row = json.loads(file.readline())
        answer, tokens, logprobs = row.get("answer"), row.get("tokens"), row.get("logprobs")
        calls = (
            "\n".join(json.dumps(call, ensure_ascii=False) for call in answer)
            if isinstance(answer, list)
            else None
        )
        prompt = str(row.get("prompt_id", "")), line.kind, str(row.get("query") or ""), calls
        text, surprise = str(row.get("completion", "")), None
        if isinstance(tokens, list) and isinstance(logprobs, list) and len(tokens) == len(logprobs) > 0:
            text = [str(token) for token in tokens]
            surprise = [None if finite(x) is None else round(-1000 * x) for x in logprobs]
            counts.update(text)
        reason, place = str(row.get("reason", "")), prompts.setdefault(prompt, len(prompts))
        reasons[reason] += 1
        marks = finite(line.reward), finite(row.get("advantage")), bool(row.get("truncated"))
        rows.append([line.step, place, reason, *marks, text, surprise])
    # The most frequent come first: of words, because they then have the shortest numbers.
    words, reasons = (
        {text: i for i, (text, _) in enumerate(table.most_common())} for table in (counts, reasons)
    )
    for row in rows:
        row[2] = reasons[row[2]]
        row[6] = [words[word] for word in row[6]] if isinstance(row[6], list) else row[6]
    return {"prompts": list(prompts), "reasons": list(reasons), "words": list(words), "rows": rows}


def finite(value: Any) -> float | None:
    """A number that JSON can carry, else None."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def embed(data: dict) -> str:
    """JSON in ASCII that may stand inside a script element: no text in it can end the element or open
    another.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def main(arguments: list[str]) -> None:
    """`RUN [--out FILE] [--limit N]`."""
    parser = argparse.ArgumentParser(
        prog="samples_page.py", description="A run's completions as one page for a browser."
    )
    parser.add_argument("run", type=Path, help="folder of a run, finished or not")
    parser.add_argument(
        "--out", type=Path, help="where the page goes (default: samples.html in the run's folder)"
    )
    parser.add_argument("--limit", type=int, default=LIMIT, help=f"completions at most (default: {LIMIT})")
    args = parser.parse_args(arguments)
    page = write_page(args.run, args.out, args.limit)
    print(f"page: {page} ({page.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_script(main, (ConfigError,))
