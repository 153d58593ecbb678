"""Replies of a model to benchmark cases, appended to a file that a killed run goes on with."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

from config import printable
from corpus.sources import append_jsonl, iter_jsonl, write_atomic
from distributed.weights import load_model, model_config
from evals.report import Case
from kernel.decode import Prompt
from model import ModelError, check_vocabulary, load_tokenizer
from prompts import PromptError, check_tokenizer, encode_prompt, load_template
from rollout import Decoding, sample_groups

LINE_SECONDS = 30.0  # at least, between two lines about progress where no bar is seen


@dataclass(frozen=True)
class Sampling:
    """How replies are made. batch_size: replies decoded at once. temperature: 0 is greedy."""

    max_prompt_tokens: int
    max_new_tokens: int
    batch_size: int
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0
    chat_template_kwargs: str = ""


def generate(args: argparse.Namespace, cases: Sequence[Case]) -> None:
    """The command `generate` of both evaluation scripts. Raises ModelError, PromptError and DataError."""
    sampling = Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)})
    template = args.prompt_template and load_template(args.prompt_template)
    path = args.out / "predictions.jsonl"
    try:
        write_predictions(args.model, cases, path, template, sampling)
    except KeyboardInterrupt:
        there = sum(1 for _ in iter_jsonl(path))
        what = f"interrupted: {path} holds {there} of {len(cases) * sampling.samples} replies"
        raise KeyboardInterrupt(f"{what}; the same command goes on") from None


def write_predictions(
    model: str, cases: Sequence[Case], path: Path, template: str, sampling: Sampling
) -> None:
    """Appends replies of the model in folder or hub id `model` to `path`, one JSON line each.

    Rows: id, category, sample (from 0), input_tokens, output, output_tokens, latency (seconds of its batch /
    replies of its batch), and "skipped" where a prompt is too long or refused (its output is empty). Samples
    depend on the seed and their own case only. template: "" for the one that the model was trained with, or
    ours. Replies that `path` holds are not made again, so a killed run goes on where it was. Raises
    ModelError when those were made with another model or other settings.
    """
    if sampling.temperature == 0 and sampling.samples > 1:
        what = f"samples: greedy decoding would give {sampling.samples} equal replies"
        raise ModelError(f"{what}; set a temperature above 0, or 1")
    tokenizer = load_tokenizer(model, chat_template_kwargs=sampling.chat_template_kwargs)
    template = template or load_template("", tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_author(path, model, template, sampling)
    if path.exists():  # a line cut off by a kill is removed, so that appending is safe
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    rows = iter_jsonl(path, category=str, id=str, output=str)
    done = {(row["category"], row["id"], str(row.get("sample", 0))) for row in rows}
    wanted = range(sampling.samples)
    missing = {case.id: [k for k in wanted if (case.category, case.id, str(k)) not in done] for case in cases}
    if not any(missing.values()):
        print(f"{path}: all {len(cases) * sampling.samples} replies are there already")
        return
    check_vocabulary(tokenizer, model_config(model))
    policy = load_model(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    check_tokenizer(tokenizer, template)
    todo, began = [], time.perf_counter()
    for case in (case for case in cases if missing[case.id]):
        skipped = ""
        try:
            ids = encode_prompt(tokenizer, case.messages, case.tools, template)
            if len(ids) > sampling.max_prompt_tokens:
                skipped = "prompt_too_long"
        except PromptError as error:
            ids, skipped = [], str(error)
        # Whatever else is asked. The 0 once counted cases of the same id; without it all seeds would change.
        name = f"{sampling.seed}/evaluation/{case.category}/{case.id}/0"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1
        if skipped:
            empty = {"output": "", "output_tokens": 0, "skipped": skipped, "latency": 0.0}
            append_jsonl(path, [_row(case, k, ids) | empty for k in missing[case.id]])
        else:
            todo.append((case, Prompt(case.id, ids, seed)))
    todo.sort(key=lambda one: len(one[1].ids))  # prompts of similar length share a batch
    size = max(1, sampling.batch_size // sampling.samples)
    decoding = Decoding(sampling.samples, sampling.temperature, sampling.max_new_tokens, sampling.batch_size)
    for batch in in_batches(todo, size, path.parent.name or "eval"):
        started = time.perf_counter()
        # All samples of a case come from one stream of random numbers, so all are made.
        groups = sample_groups(policy, tokenizer, [prompt for _, prompt in batch], decoding)
        latency = round((time.perf_counter() - started) / (len(batch) * sampling.samples), 4)
        for (case, prompt), group in zip(batch, groups):
            rows = []
            for k in missing[case.id]:
                reply = {"output": group.texts[k], "output_tokens": len(group.responses[k])}
                rows.append(_row(case, k, prompt.ids) | reply | {"latency": latency})
            append_jsonl(path, rows)
    print(f"{path}: {len(todo)} cases asked in {time.perf_counter() - began:.1f} s")


def in_batches(items: Sequence, size: int, name: str) -> Iterator[Sequence]:
    """`size` items at a time, with a bar in a terminal, elsewhere a line now and then."""
    told = time.monotonic()
    for start in tqdm(range(0, len(items), size), printable(name), unit="batch", disable=None):
        if not sys.stderr.isatty() and time.monotonic() - told >= LINE_SECONDS:
            told = time.monotonic()
            print(printable(f"{name}: {start} of {len(items)} prompts"), flush=True)
        yield items[start : start + size]


def _row(case: Case, sample: int, ids: list[int]) -> dict:
    return {"id": case.id, "category": case.category, "sample": sample, "input_tokens": len(ids)}


def describe_author(model: str, template: str) -> dict:
    """What replies are made with: the model's folder or hub id, its weights' times, the prompt's hash."""
    weights = [p.stat().st_mtime_ns for p in sorted(Path(model).glob("*.safetensors"))]
    name = str(Path(model).resolve()) if weights else model
    return {"model": name, "weights": weights, "template": hashlib.sha256(template.encode()).hexdigest()}


def _check_author(path: Path, model: str, template: str, sampling: Sampling) -> None:
    """Notes beside `path` what its predictions are made with. Raises ModelError where others are there."""
    asked = template + sampling.chat_template_kwargs
    author = describe_author(model, asked) | {"max_new_tokens": sampling.max_new_tokens}
    author |= {"temperature": sampling.temperature, "samples": sampling.samples}
    author["seed"] = sampling.seed if sampling.temperature else 0
    note = path.with_name("generated_with.json")
    if path.exists() and note.exists():
        try:
            before = dict(json.loads(note.read_bytes()))
        except (ValueError, TypeError, RecursionError):
            what = f"{note} is broken, so nobody knows what {path} was made with"
            raise ModelError(f"{what}; give another --out, or delete {note.name} if you know") from None
        changed = [key for key in author if before.get(key) != author[key]]
        if changed:
            what = f"another model or other settings ({', '.join(changed)}; see {note})"
            raise ModelError(f"{path} was made with {what}; give another --out")
    write_atomic(note, json.dumps(author, indent=1) + "\n")
