"""Replies of a model to benchmark cases, appended to a file that a killed run goes on with."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from kernel.decode import Prompt
from model import ModelError, load_model, load_tokenizer
from prompts import check_tokenizer, encode_prompt
from rollout import sample_groups


@dataclass(frozen=True)
class Case:
    """One benchmark case: category is the benchmark's own name for its part."""

    id: str
    category: str
    messages: list[dict]
    tools: list[dict]


def write_predictions(
    model: str, cases: Sequence[Case], path: Path, *, template: str, max_prompt_tokens: int, max_new_tokens: int,
    batch_size: int, temperature: float = 0.0, samples: int = 1, seed: int = 0,
) -> None:
    """`samples` replies per case of the model in folder or hub id `model`, appended to `path`, one JSON line
    each.

    temperature: 0 is greedy. Samples depend on `seed` and their own case only. batch_size: replies decoded at
    once; cases with prompts of similar length share a batch. Rows: id, category, sample (0 to samples - 1),
    output, input_tokens, output_tokens, latency (seconds of its batch / replies of its batch), and "skipped"
    where a prompt is longer than `max_prompt_tokens` (its output is empty). Replies that `path` holds already
    are not written again, so a killed run goes on where it was. Raises ModelError when those were made with
    another model or other settings.
    """
    if temperature == 0 and samples > 1:
        raise ModelError(
            f"samples: greedy decoding would give {samples} equal replies; set a temperature above 0, or 1"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    sampling = {"temperature": temperature, "samples": samples, "seed": seed if temperature else 0}
    _check_author(path, model, template, max_new_tokens, sampling)
    todo = _missing(path, cases, samples)
    if not todo:
        print(f"{path}: all {len(cases) * samples} replies are there already")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, policy = load_tokenizer(model), load_model(model, device)
    check_tokenizer(tokenizer, template)
    prompts = [
        Prompt(
            case.id, encode_prompt(tokenizer, case.messages, case.tools, template),
            _case_seed(seed, case, nth),
        )
        for case, nth, _ in todo
    ]
    order = sorted(range(len(todo)), key=lambda i: len(prompts[i].ids))
    size, count, tokens, start_time = max(1, batch_size // samples), 0, 0, time.perf_counter()
    with (
        path.open("a", encoding="utf-8") as file,
        tqdm(total=len(todo), desc=path.parent.name or "eval") as bar,
    ):
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            fits = [i for i in batch if len(prompts[i].ids) <= max_prompt_tokens]
            began = time.perf_counter()
            # All samples of a case come from one stream of random numbers, so all are made even if some are
            # there.
            groups = sample_groups(
                policy, tokenizer, [prompts[i] for i in fits], group_size=samples, temperature=temperature,
                max_new_tokens=max_new_tokens, batch_size=batch_size,
            )
            latency = round((time.perf_counter() - began) / (len(batch) * samples), 4)
            replies = dict(zip(fits, groups))
            for i in batch:
                case, _, wanted = todo[i]
                for k in wanted:
                    row = {
                        "id": case.id,
                        "category": case.category,
                        "sample": k,
                        "input_tokens": len(prompts[i].ids),
                    }
                    if i in replies:
                        row |= {"output": replies[i].texts[k], "output_tokens": len(replies[i].responses[k])}
                    else:
                        row |= {"output": "", "output_tokens": 0, "skipped": "prompt_too_long"}
                    file.write(json.dumps(row | {"latency": latency}, ensure_ascii=False) + "\n")
                    count, tokens = count + 1, tokens + row["output_tokens"]
            file.flush()
            bar.update(len(batch))
    spent = time.perf_counter() - start_time
    print(
        f"{path}: {count} replies in {spent:.1f} s: {count / spent:.2f} replies/s, {tokens / spent:.0f} new tokens/s"
    )


def describe_author(model: str, template: str) -> dict:
    """Tells apart what replies are made with: the model in a folder or on the hub, its weights' times, the
    prompt's hash.
    """
    weights = [p.stat().st_mtime_ns for p in sorted(Path(model).glob("*.safetensors"))]
    name = str(Path(model).resolve()) if weights else model
    return {"model": name, "weights": weights, "template": hashlib.sha256(template.encode()).hexdigest()}


def _check_author(path: Path, model: str, template: str, max_new_tokens: int, sampling: dict) -> None:
    """Remembers beside `path` what its predictions are made with, and refuses to mix in those of anything
    else.
    """
    author = describe_author(model, template) | {"max_new_tokens": max_new_tokens, **sampling}
    note = path.with_name("generated_with.json")
    if path.exists() and note.exists():
        greedy = {
            "temperature": 0.0,
            "samples": 1,
            "seed": 0,
        }  # what a note says that was written before there was more
        before = greedy | json.loads(note.read_text(encoding="utf-8"))
        changed = [key for key in author if before.get(key) != author[key]]
        if changed:
            what = f"{', '.join(changed)}; see {note}"
            raise ModelError(
                f"{path} was made with another model or other settings ({what}); give another --out"
            )
    note.write_text(json.dumps(author, indent=1) + "\n", encoding="utf-8")


def _case_seed(seed: int, case: Case, nth: int) -> int:
    """A seed of the case's own: a function of its name, whatever else is asked and in which order."""
    digest = hashlib.sha256(f"{seed}/evaluation/{case.category}/{case.id}/{nth}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def _missing(path: Path, cases: Sequence[Case], samples: int) -> list[tuple[Case, int, list[int]]]:
    """(case, how many cases of its id came before, samples that `path` does not hold) for all cases that lack
    any.
    """
    done, met, todo = _finished(path), Counter(), []
    for case in cases:  # counted, because an id may occur twice
        name = (case.category, case.id)
        wanted = [k for k in range(samples) if done[*name, k] <= met[name]]
        if wanted:
            todo.append((case, met[name], wanted))
        met[name] += 1
    return todo


def _finished(path: Path) -> Counter[tuple[str, str, int]]:
    """How often each (category, id, sample) is in `path`. A line cut off by a kill is removed, so appending
    is safe.
    """
    if not path.exists():
        return Counter()
    data = path.read_bytes()  # bytes, because the cut may be inside a character
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    rows = [json.loads(line) for line in whole.split(b"\n") if line]
    return Counter((row["category"], row["id"], row.get("sample", 0)) for row in rows)
