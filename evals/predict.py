"""Replies of a model to benchmark cases, appended to a file that a killed run goes on with."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from config import check_model, printable, template_kwargs
from corpus.sources import REPAIR, append_jsonl, iter_jsonl, write_atomic
from evals.bfcl_multi_turn import TOO_LONG, Dialogue, Player, Scenario, play, seed_of
from evals.report import NOTE, Case, ReportError, is_reply, read_author
from prompts import PromptError, check_tokenizer, encode_prompt, load_template

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


@dataclass(frozen=True)
class Prepared:
    """What is known before a model is loaded. done: (id, sample as text) of the replies that are there.

    author: what the replies are made with, for the note beside them.
    """

    tokenizer: Any
    template: str
    done: set[tuple[str, str]]
    author: dict


def generate(args: argparse.Namespace, cases: Sequence[Case | Scenario], benchmark: str) -> None:
    """The command `generate` of every evaluation. benchmark: its name, with the version of its data where
    versions share ids. Raises UserError.
    """
    sampling = Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)})
    template = args.prompt_template and load_template(args.prompt_template)
    path = args.out / "predictions.jsonl"
    try:
        write_predictions(args.model, cases, path, template, sampling, benchmark)
    except KeyboardInterrupt:
        wanted = product((case.id for case in cases), map(str, range(sampling.samples)))
        there = _there(path, sampling.max_prompt_tokens).intersection(wanted)
        what = f"interrupted: {path} holds {len(there)} of {len(cases) * sampling.samples} replies"
        raise KeyboardInterrupt(f"{what}; the same command goes on") from None


def write_predictions(
    model: str, cases: Sequence[Case | Scenario], path: Path, template: str, sampling: Sampling,
    benchmark: str,
) -> None:
    """Appends replies of the model in folder or hub id `model` to `path`, one JSON line each.

    Rows: id, category, sample (from 0), input_tokens, output, output_tokens, latency (seconds of its batch /
    replies of its batch), and "skipped" where a prompt is too long or refused (its output is empty). The row
    of a scenario is a whole dialogue: its output is a list of replies for every turn. Samples depend on the
    seed and their own case only. template: "" for the one that the model was trained with, or ours. Replies
    that `path` holds are not made again, so a killed run goes on where it was; prompts that were too long
    are tried again under a larger limit. Raises UserError, also where those replies were made with another
    model or other settings.
    """
    prepared = prepare(model, path, template, sampling, benchmark)
    wanted, done = range(sampling.samples), prepared.done
    missing = {case.id: [k for k in wanted if (case.id, str(k)) not in done] for case in cases}
    if not any(missing.values()):
        print(f"{path}: all {len(cases) * sampling.samples} replies are there already")
        return
    import torch

    from distributed.weights import load_model, model_config
    from kernel.decode import Prompt
    from model import check_vocabulary
    from rollout import Decoding, sample_groups

    tokenizer = prepared.tokenizer
    check_vocabulary(tokenizer, model_config(model))
    policy = load_model(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    check_tokenizer(tokenizer, prepared.template)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path.with_name(NOTE), json.dumps(prepared.author, indent=1) + "\n")
    if path.exists():  # a line cut off by a kill is removed, so that appending is safe
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    began = time.perf_counter()
    todo = [case for case in cases if isinstance(case, Case) and missing[case.id]]
    asked = _encode(todo, missing, path, prepared, sampling)
    asked.sort(key=lambda one: len(one[1]))  # prompts of similar length share a batch
    size = max(1, sampling.batch_size // sampling.samples)
    decoding = Decoding(sampling.samples, sampling.temperature, sampling.max_new_tokens, sampling.batch_size)
    name = path.parent.name or "eval"
    for batch in in_batches(asked, size, name):
        started = time.perf_counter()
        # All samples of a case come from one stream of random numbers, so all are made.
        prompts = [Prompt(case.id, ids, case_seed(sampling.seed, case)) for case, ids in batch]
        groups = sample_groups(policy, tokenizer, prompts, decoding)
        latency = round((time.perf_counter() - started) / (len(batch) * sampling.samples), 4)
        for (case, ids), group in zip(batch, groups):
            rows = []
            for k in missing[case.id]:
                reply = {"output": group.texts[k], "output_tokens": len(group.responses[k])}
                rows.append(_row(case, k, ids) | reply | {"latency": latency})
            append_jsonl(path, rows)
    scenarios = [case for case in cases if isinstance(case, Scenario)]
    dialogues = [Dialogue(scenario, k) for scenario in scenarios for k in missing[scenario.id]]
    decoding = replace(decoding, group_size=1)
    limit, seed = sampling.max_prompt_tokens, sampling.seed
    player = Player(policy, tokenizer, prepared.template, decoding, limit, seed)
    played = play(dialogues, player.answer, sampling.batch_size)
    for dialogue in progress(played, len(dialogues), name, "dialogues"):
        row = _row(dialogue.scenario, dialogue.sample, []) | {"input_tokens": dialogue.input_tokens}
        row |= {"output": dialogue.outputs, "output_tokens": dialogue.output_tokens}
        append_jsonl(path, [row | {"skipped": dialogue.skipped} if dialogue.skipped else row])
    count = len(asked) + len(dialogues)
    print(f"{path}: {count} cases asked in {time.perf_counter() - began:.1f} s")


def prepare(model: str, path: Path, template: str, sampling: Sampling, benchmark: str) -> Prepared:
    """Compares with what `path` holds; arguments and errors as of write_predictions.

    What can be told without the tokenizer comes first: it needs torch, whose import takes seconds.
    """
    if sampling.temperature == 0 and sampling.samples > 1:
        what = f"samples: greedy decoding would give {sampling.samples} equal replies"
        raise ReportError(f"{what}; set a temperature above 0, or 1")
    check_model(model)
    template_kwargs(sampling.chat_template_kwargs)
    author = describe_author(model, template) | describe_settings(sampling, benchmark)
    _check_author(path, author if template else author | {"template": None})
    done = _there(path, sampling.max_prompt_tokens)
    from model import load_tokenizer

    tokenizer = load_tokenizer(model, chat_template_kwargs=sampling.chat_template_kwargs)
    template = template or load_template("", tokenizer)
    author |= describe_author(model, template)
    _check_author(path, author)
    return Prepared(tokenizer, template, done, author)


def _encode(
    cases: Sequence[Case], missing: dict[str, list[int]], path: Path, prepared: Prepared, sampling: Sampling
) -> list[tuple[Case, list[int]]]:
    """The cases that can be asked, with their prompts' ids; rows of the others are appended to `path`."""
    asked = []
    for case in cases:
        skipped = ""
        try:
            ids = encode_prompt(prepared.tokenizer, case.messages, case.tools, prepared.template)
            if len(ids) > sampling.max_prompt_tokens:
                skipped = TOO_LONG
        except PromptError as error:
            ids, skipped = [], str(error)
        if skipped:
            empty = {"output": "", "output_tokens": 0, "skipped": skipped, "latency": 0.0}
            append_jsonl(path, [_row(case, k, ids) | empty for k in missing[case.id]])
        else:
            asked.append((case, ids))
    return asked


def case_seed(seed: int, case: Case) -> int:
    """What the samples of a case depend on, whatever else is asked."""
    # The 0 once counted cases of the same id; without it all seeds would change.
    return seed_of(f"{seed}/evaluation/{case.category}/{case.id}/0")


def in_batches(items: Sequence, size: int, name: str) -> Iterator[Sequence]:
    """`size` items at a time, with their progress."""
    starts = range(0, len(items), size)
    for start in progress(starts, len(starts), name, "batches"):
        yield items[start : start + size]


def progress(items: Iterable, total: int, name: str, unit: str) -> Iterator:
    """The items, with a bar in a terminal, elsewhere a line now and then."""
    told = time.monotonic()
    for done, item in enumerate(tqdm(items, printable(name), total, unit=unit, disable=None)):
        if not sys.stderr.isatty() and time.monotonic() - told >= LINE_SECONDS:
            told = time.monotonic()
            print(printable(f"{name}: {done} of {total} {unit}"), flush=True)
        yield item


def _row(case: Case | Scenario, sample: int, ids: list[int]) -> dict:
    return {"id": case.id, "category": case.category, "sample": sample, "input_tokens": len(ids)}


def _there(path: Path, max_prompt_tokens: int) -> set[tuple[str, str]]:
    """(id, sample) of the replies in `path`, but for prompts that were too long and no longer are."""
    there = set()
    for row in iter_jsonl(path, category=str, id=str):
        if not is_reply(row):
            raise ReportError(f"{path}: the row of {row['id']!r} holds no reply; {REPAIR}")
        tokens = row.get("input_tokens", 0)
        if row.get("skipped") != TOO_LONG or (isinstance(tokens, int) and tokens > max_prompt_tokens):
            there.add((row["id"], str(row.get("sample", 0))))
    return there


def describe_author(model: str, template: str) -> dict:
    """What replies are made with: the model's folder or hub id, its weights' times, the prompt's hash."""
    weights = [p.stat().st_mtime_ns for p in sorted(Path(model).glob("*.safetensors"))]
    name = str(Path(model).resolve()) if weights else model
    return {"model": name, "weights": weights, "template": hashlib.sha256(template.encode()).hexdigest()}


def describe_settings(sampling: Sampling, benchmark: str) -> dict:
    """What else decides a reply: all of `sampling` but batch_size, and a seed only where it is used."""
    settings = {"benchmark": benchmark, **asdict(sampling)}
    del settings["batch_size"]
    return settings | {"seed": sampling.seed if sampling.temperature else 0}


def _check_author(path: Path, author: dict) -> None:
    """Raises ReportError where the note beside `path` says that its replies were made with something else.

    A value of None in `author` is not known yet. A larger limit of the prompt changes no reply that is there.
    """
    before = read_author(path)
    if not before:
        return
    benchmark = author["benchmark"]
    if before.get("benchmark", benchmark) != benchmark:
        what = f"{path} holds replies to {before['benchmark']}, not to {benchmark}"
        raise ReportError(f"{what}; give another --out")
    changed = [key for key, value in author.items() if value is not None and before.get(key) != value]
    if "max_prompt_tokens" in changed and isinstance(limit := before.get("max_prompt_tokens"), int):
        changed.remove("max_prompt_tokens")
        if limit > author["max_prompt_tokens"]:
            what = f"{path} was made with --max_prompt_tokens {limit}"
            raise ReportError(f"{what}; give it again, or a larger one, or another --out")
    if changed:
        what = f"another model or other settings ({', '.join(changed)}; see {path.with_name(NOTE)})"
        raise ReportError(f"{path} was made with {what}; give another --out")
