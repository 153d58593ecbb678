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
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from config import ConfigError
from corpus.sources import as_command, written_beside
from distributed.ranks import run_script
from prompts import ToolCall, parse_completion

TEMPLATE = Path(__file__).with_name("samples_page.html")
MAX_ROWS = 20_000  # of samples.jsonl on one page
MAX_BYTES = 48_000_000  # the same; the page is about a third of that, and a browser opens it at once


def write_page(run_dir: Path) -> Path:
    """Writes samples.html into the folder of a run and returns its path. ConfigError: no samples.jsonl."""
    source, target = run_dir / "samples.jsonl", run_dir / "samples.html"
    if not source.is_file():
        raise ConfigError(f"{run_dir} has no samples.jsonl; give the folder of a run of grpo.py")
    counts, sums, unread = Counter(), Counter(), 0  # of rows and rewards, by kind and step
    for row in read_rows(source):
        if row:
            counts[row["kind"], row["step"]] += 1
            sums[row["kind"], row["step"]] += row["reward"]
        unread += row is None
    if unread:
        print(f"warning: {source}: left out {unread} unreadable line(s)", file=sys.stderr)
    steps, logged = sorted({step for _, step in counts}), counts.total()
    every = math.ceil(max(logged / MAX_ROWS, source.stat().st_size / MAX_BYTES, 1))
    chosen = set(steps[::every])
    curves = {}  # by kind: count and sum of the rewards at each step
    for kind in sorted({kind for kind, _ in counts}):
        curves[kind] = [[counts[kind, step], sums[kind, step]] for step in steps]
    about = {"run": run_dir.resolve().name, "logged": logged, "steps": steps, "curves": curves}
    text = embed(about | tables(row for row in read_rows(source) if row and row["step"] in chosen))
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("__ROWS__")
    script = tail.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # no other script may run
    with written_beside(target) as beside:  # whoever has the page open may reload it at any time
        beside.write_text(head.replace("__SCRIPT__", f"sha256-{digest}") + text + tail, encoding="utf-8")
    return target


def read_rows(source: Path) -> Iterator[dict | None]:
    """The rows of a samples.jsonl, None for a line that is none. A last line that is still being written is
    left out.
    """
    with source.open("rb") as file:
        for text in file:
            if not text.strip(b"\0 \r\n"):  # what a power cut leaves
                continue
            try:
                row = read_row(text)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                row = None
            if row or text.endswith(b"\n"):
                yield row


def read_row(text: bytes) -> dict:
    """A row with all that the page shows, also where an older run wrote less. Raises where it is none."""
    row = json.loads(text)
    row.update(step=int(row["step"]), reward=float(row["reward"]), advantage=float(row.get("advantage", 0)))
    if not math.isfinite(row["reward"] + row["advantage"]):
        raise ValueError("a value that JSON does not have")
    for key in ("prompt_id", "kind", "reason", "query", "begun", "completion"):
        row[key] = str(row["completion"] if key == "completion" else row.get(key, ""))
    tokens, logprobs = row.get("tokens") or [], row.get("logprobs") or []
    if len(tokens) != len(logprobs) or not tokens:  # then the completion is shown as one
        tokens, logprobs = [row["completion"]], [0.0]
        row["begun"] = ""
    row["tokens"] = list(map(str, tokens))
    row["surprise"] = [None if x is None or not math.isfinite(x) else round(-1000 * x) for x in logprobs]
    row["answer"] = [ToolCall(call["name"], dict(call["arguments"])) for call in row.get("answer") or []]
    row["tools"] = [dict(tool) for tool in row.get("tools") or []]
    row["turns"] = [(str(role), str(text)) for role, text in row.get("turns") or []]
    return row


def tables(kept: Iterable[dict]) -> dict:
    """The rows, and tables of the texts that are repeated in them. A row: [step, number of the prompt, of the
    reason, reward, advantage, whether truncated, numbers of the tokens, -1000 x their log-probs, what differs
    from the ground truth]. A prompt: [id, kind, query, ground truth, tools, turns, what it begins].
    """
    prompts: dict[tuple, int] = {}
    more: dict[int, list] = {}  # of a prompt, from the first of its rows that has it
    reasons: dict[str, int] = {}
    words: dict[str, int] = {}
    rows = []
    for row in kept:
        answer = "\n".join(shown(call) for call in row["answer"])
        prompt = prompts.setdefault((row["prompt_id"], row["kind"], row["query"], answer), len(prompts))
        if row["tools"] or prompt not in more:
            tools = [(str(tool.get("name")), json.dumps(tool, ensure_ascii=False)) for tool in row["tools"]]
            more[prompt] = [tools, row["turns"], row["begun"]]
        reason = reasons.setdefault(row["reason"], len(reasons))
        body = [words.setdefault(word, len(words)) for word in row["tokens"]]
        marks = [reason, row["reward"], row["advantage"], bool(row.get("truncated"))]
        other = [] if row["reason"] == "correct" else differences(row["completion"], row["answer"])
        rows.append([row["step"], prompt, *marks, body, row["surprise"], other])
    prompts = [[*known, *more[number]] for known, number in prompts.items()]
    return {"prompts": prompts, "reasons": list(reasons), "words": list(words), "rows": rows}


def shown(call: ToolCall) -> str:
    """A call on one line."""
    return json.dumps(call.as_dict(), ensure_ascii=False)


def as_texts(call: ToolCall) -> dict[str, str]:
    """The arguments as JSON for people to read. 1, 1.0, true and "1" all differ."""
    arguments = call.arguments.items()
    return {key: json.dumps(value, sort_keys=True, ensure_ascii=False) for key, value in arguments}


def differences(completion: str, answer: Sequence[ToolCall]) -> list[str]:
    """What the calls of a reply lack, have too much or say otherwise; [] where they cannot be read.

    A call is held against the right one of its name that has most arguments in common.
    """
    calls = parse_completion(completion).calls
    if calls is None:
        return []
    missing, found, right = list(answer), [], {call.key() for call in answer}
    for call in sorted(calls, key=lambda call: call.key() not in right):  # the right ones first
        given = as_texts(call)
        same_name = [one for one in missing if one.name == call.name]
        if not same_name:
            found.append(f"extra call: {shown(call)}")
            continue
        nearest = max(same_name, key=lambda one: len(as_texts(one).items() & given.items()))
        missing = [one for one in missing if one is not nearest]
        wanted = as_texts(nearest)
        for key in wanted | given:
            if key not in given:
                found.append(f"{call.name}: {key} is missing: {wanted[key]}")
            elif key not in wanted:
                found.append(f"{call.name}: {key} is extra: {given[key]}")
            elif given[key] != wanted[key]:
                found.append(f"{call.name}: {key} is {given[key]} instead of {wanted[key]}")
    return found + [f"missing call: {shown(call)}" for call in missing]


def embed(data: dict) -> str:
    """JSON in ASCII that may stand inside a script element: no text in it can end that or open another."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@as_command("samples_page")
def main(arguments: list[str]) -> None:
    """`RUN`. Raises ConfigError without a samples.jsonl."""
    parser = argparse.ArgumentParser("ops.samples_page", None, "A run's completions as a page for a browser.")
    parser.add_argument("run", type=Path, help="folder of a run, finished or not")
    page = write_page(parser.parse_args(arguments).run)
    print(f"page: {page} ({page.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_script(main)
