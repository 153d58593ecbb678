"""A run's logged completions as one page for a browser: no server, no network, no other file.

    python -m ops.samples_page runs/demo          writes runs/demo/samples.html, also while the run goes on

The page is samples_page.html with the rows of samples.jsonl as JSON inside.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from config import ConfigError
from distributed.ranks import run_script

TEMPLATE = Path(__file__).with_name("samples_page.html")
MAX_ROWS = 20_000  # of samples.jsonl on one page
MAX_BYTES = 48_000_000  # the same; the page is about a third of that, and a browser opens it at once


@dataclass(frozen=True)
class Line:
    """Where a row of samples.jsonl begins, its bytes, and what the curve needs to know of it."""

    offset: int
    size: int
    step: int
    kind: str
    reward: float


def write_page(run_dir: Path) -> Path:
    """Writes samples.html into the folder of a run and returns its path. ConfigError: no samples.jsonl."""
    source, target = run_dir / "samples.jsonl", run_dir / "samples.html"
    if not source.is_file():
        raise ConfigError(f"{run_dir} has no samples.jsonl; give the folder of a run of grpo.py")
    with source.open("rb") as file:
        lines = read_lines(file)
        about = {"run": run_dir.resolve().name, "logged": len(lines)}
        text = embed(about | rewards_by_step(lines) | rows_of(file, thin(lines)))
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("__ROWS__")
    script = tail.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # no other script may run
    partial = target.with_name(target.name + ".tmp")  # whoever has the page open may reload it at any time
    partial.write_text(head.replace("__SCRIPT__", f"sha256-{digest}") + text + tail, encoding="utf-8")
    partial.replace(target)
    return target


def read_lines(file: BinaryIO) -> list[Line]:
    """The rows of a samples.jsonl. A last line that is still being written is left out."""
    lines = []
    offset = 0
    for text in file:
        if text.endswith(b"\n"):
            row = json.loads(text)
            lines.append(Line(offset, len(text), row["step"], row["kind"], row["reward"]))
        offset += len(text)
    return lines


def thin(lines: Sequence[Line]) -> list[Line]:
    """At most MAX_ROWS rows and about MAX_BYTES: the first k of every step, or 1 of every n-th step."""
    steps = defaultdict(list)
    for line in lines:
        steps[line.step].append(line)

    def too_much(k: int) -> bool:
        kept = [line.size for own in steps.values() for line in own[:k]]
        return len(kept) > MAX_ROWS or sum(kept) > MAX_BYTES

    most = max(map(len, steps.values()), default=0)
    k = bisect_left(range(1, most + 1), True, key=too_much)
    every = 1 if k else math.ceil(len(steps) / MAX_ROWS) or 1
    return [line for step in sorted(steps)[::every] for line in steps[step][: max(1, k)]]


def rewards_by_step(lines: Sequence[Line]) -> dict:
    """For the curve: the steps and, by kind, count and sum of the rewards at each of them."""
    rewards = defaultdict(list)
    for line in lines:
        rewards[line.kind, line.step].append(line.reward)
    steps = sorted({line.step for line in lines})
    curves = {}
    for kind in sorted({line.kind for line in lines}):
        curves[kind] = [[len(rewards[kind, step]), sum(rewards[kind, step])] for step in steps]
    return {"steps": steps, "curves": curves}


def rows_of(file: BinaryIO, kept: Iterable[Line]) -> dict:
    """The rows, and tables of the texts that are repeated in them. A row: [step, number of the prompt, of the
    reason, reward, advantage, whether truncated, numbers of the tokens, -1000 x their log-probs].
    """
    prompts: dict[tuple, int] = {}
    reasons, words = Counter(), Counter()
    rows = []
    for line in kept:
        file.seek(line.offset)
        row = json.loads(file.readline())
        answer = "\n".join(json.dumps(call, ensure_ascii=False) for call in row["answer"])
        prompt = prompts.setdefault((row["prompt_id"], row["kind"], row["query"], answer), len(prompts))
        reasons[row["reason"]] += 1
        words.update(row["tokens"])
        surprise = [round(-1000 * logprob) for logprob in row["logprobs"]]
        marks = [row["reason"], line.reward, row["advantage"], row["truncated"]]
        rows.append([line.step, prompt, *marks, row["tokens"], surprise])
    reasons, words = numbered(reasons), numbered(words)
    for row in rows:
        row[2] = reasons[row[2]]
        row[6] = [words[word] for word in row[6]]
    return {"prompts": list(prompts), "reasons": list(reasons), "words": list(words), "rows": rows}


def numbered(counts: Counter[str]) -> dict[str, int]:
    """A number for each text. The most frequent come first, because short numbers make a small page."""
    return {text: number for number, (text, _) in enumerate(counts.most_common())}


def embed(data: dict) -> str:
    """JSON in ASCII that may stand inside a script element: no text in it can end that or open another."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def main(arguments: list[str]) -> None:
    """`RUN`. Raises ConfigError without a samples.jsonl."""
    parser = argparse.ArgumentParser(description="A run's completions as one page for a browser.")
    parser.add_argument("run", type=Path, help="folder of a run, finished or not")
    page = write_page(parser.parse_args(arguments).run)
    print(f"page: {page} ({page.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_script(main)
