"""Prompts -> completions: groups of samples for training, greedy replies for evaluation. Tokens in, tokens out.

How a batch is decoded is in engines.py; here prompts become batches, and token ids become texts, metrics and rows.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import Config
from data import KINDS, Tokenized, example_kind
from engines import ENGINES, Prompt
from model import ModelError, autocast, load_model, load_tokenizer, use_attention
from prompts import check_tokenizer, decode_reply, encode_prompt, stop_ids
from reward import Reward, score
from runtime import Ranks


@dataclass(frozen=True)
class Group:
    """G completions of one prompt. responses end with their stop token unless truncated.

    logprobs: the sampler's own, per response token, at the sampling temperature (a diagnostic: the trainer computes
    its own).
    """

    prompt: Prompt
    responses: list[list[int]]
    logprobs: list[list[float]]
    texts: list[str]
    truncated: list[bool]


def prompt_seed(seed: int, step: int, index: int) -> int:
    """A seed for one prompt of one step: a function of position alone (splitmix64 over the three numbers)."""
    mixed = 0
    for number in (seed, step, index):
        mixed = (mixed + number + 0x9E3779B97F4A7C15) % 2**64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**63


def sample_groups(
    model: nn.Module, tokenizer, prompts: Sequence[Prompt], *, group_size: int, temperature: float,
    max_new_tokens: int, batch_size: int, engine: str = "shared_prefix", progress: bool = False,
) -> list[Group]:  # fmt: skip
    """`group_size` completions of every prompt, in the order of `prompts`.

    temperature: 0 is greedy. batch_size: sequences decoded at once; whole groups stay together, and prompts of similar
    length share a batch, so little is padded. engine: a key of engines.ENGINES. The model is left as it came (train or
    eval mode, attention).
    """
    stops, was_training = stop_ids(tokenizer), model.training
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    copies = group_size if temperature > 0 else 1  # greedy copies would be equal
    per_batch = max(1, batch_size // copies)
    groups: dict[int, Group] = {}
    model.eval()
    try:
        with tqdm(total=len(prompts), desc="rollout", leave=False, delay=10, disable=not progress) as bar:
            for start in range(0, len(order), per_batch):
                batch = [prompts[i] for i in order[start : start + per_batch]]
                with autocast(next(model.parameters()).device):  # around the loop: weights are cast once, not per token
                    rows = ENGINES[engine](model, batch, copies, temperature, max_new_tokens, stops)
                for k, (i, prompt) in enumerate(zip(order[start:], batch)):
                    own = rows[k * copies : (k + 1) * copies] * (group_size // copies)
                    texts = [decode_reply(tokenizer, ids, stops) for ids, _ in own]
                    truncated = [ids[-1] not in stops for ids, _ in own]
                    groups[i] = Group(prompt, [ids for ids, _ in own], [lp for _, lp in own], texts, truncated)
                bar.update(len(batch))
    finally:
        use_attention(model, "train")
        model.train(was_training)
    return [groups[i] for i in range(len(prompts))]


# ----------------------------------------------------------------------------------------------------------- logging


def rollout_metrics(groups: Sequence[Group], rewards: list[list[Reward]], ranks: Ranks) -> dict[str, float]:
    """Collective. What a step's samples look like, in TRL's names where it has them; global sums over global counts."""
    rows = [
        [len(ids), one.total, one.format_ok, one.correct, cut]
        for group, scores in zip(groups, rewards)
        for ids, one, cut in zip(group.responses, scores, group.truncated)
    ]
    own = torch.tensor(rows, dtype=torch.float64).view(len(groups), -1, 5)
    lengths, totals, format_ok, correct, truncated = torch.cat(ranks.gather(own)).unbind(2)  # [P, G] each
    distinct = ranks.sum([sum(len(set(group.texts)) / len(group.texts) for group in groups)])[0]
    return {
        "reward": totals.mean().item(),
        "reward_std": totals.std(1).mean().item(),
        "frac_reward_zero_std": (totals.amax(1) == totals.amin(1)).double().mean().item(),
        "format_rate": format_ok.mean().item(),
        "correct_rate": correct.mean().item(),
        "distinct_rate": distinct / len(totals),
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": truncated.mean().item(),
    }


def sample_rows(
    step: int, groups: Sequence[Group], rewards: list[list[Reward]], advantages: Tensor, limit: int, ranks: Ranks
) -> list[dict]:
    """Collective. Rows for samples.jsonl: about `limit` completions of this step, equally many from every rank."""
    rows = []
    for group, scores, values in zip(groups, rewards, advantages.tolist()):
        for text, one, advantage in zip(group.texts, scores, values):
            row = {"step": step, "prompt_id": group.prompt.id, "completion": text, "reward": one.total}
            rows.append(row | {"reason": one.reason, "advantage": round(advantage, 4)})
    own = rows[: -(-limit // ranks.world)]
    return [row for part in ranks.gather(own) for row in part]


def model_flops(groups: Sequence[Group], parameters: int, config: Config, ranks: Ranks) -> tuple[float, float]:
    """Collective. (training tokens, FLOPs) of one step on all ranks; attention is left out.

    2 per parameter and token forward, 4 backward: a rollout is one forward, the reference another, an update three.
    """
    tokens = float(sum(len(g.prompt.ids) + sum(map(len, g.responses)) for g in groups))
    passes = 2 + 2 * (config.kl_coef > 0) + 2 * (config.minibatch_prompts < config.prompts_per_step) + 6
    tokens = ranks.sum([tokens])[0]
    return tokens, passes * parameters * tokens


# ---------------------------------------------------------------------------------------------------- evaluation


def evaluate(
    model: nn.Module, tokenizer, examples: Sequence[Tokenized], config: Config, ranks: Ranks, name: str
) -> dict[str, float]:
    """Collective. Greedy accuracy (binary reward) on held-out examples, overall and by kind, as log entries.

    Keys: `{name}/accuracy`, `{name}/n`, and `{name}/accuracy_KIND`, `{name}/n_KIND` for every kind that occurs.
    """
    own = examples[ranks.rank :: ranks.world]
    groups = sample_groups(
        model, tokenizer, [Prompt(t.example.id, t.ids) for t in own], group_size=1, temperature=0,
        max_new_tokens=config.max_response_tokens, batch_size=config.rollout_batch_size,
    )  # fmt: skip
    hits = Counter({kind: 0.0 for kind in KINDS})
    for item, group in zip(own, groups):
        hits[example_kind(item.example)] += score(group.texts[0], item.example.answer).total
    totals = Counter(example_kind(t.example) for t in examples)
    right = dict(zip(KINDS, ranks.sum(hits[kind] for kind in KINDS)))
    entries = {f"{name}/accuracy": sum(right.values()) / len(examples), f"{name}/n": len(examples)}
    for kind, n in totals.items():
        entries |= {f"{name}/accuracy_{kind}": right[kind] / n, f"{name}/n_{kind}": n}
    return entries


@dataclass(frozen=True)
class Case:
    """One benchmark case: category is the benchmark's own name for its part."""

    id: str
    category: str
    messages: list[dict]
    tools: list[dict]


def write_predictions(
    model: str, cases: Sequence[Case], path: Path, *, template: str, max_prompt_tokens: int, max_new_tokens: int,
    batch_size: int,
) -> None:  # fmt: skip
    """Greedy replies of the model in folder or hub id `model`, appended to `path`, one JSON line per case.

    Rows: id, category, output, input_tokens, output_tokens, latency (seconds of its batch / cases of its batch), and
    "skipped" where a prompt is longer than `max_prompt_tokens` (its output is empty). Cases that `path` holds already
    are not done again, so a killed run goes on where it was. Raises ModelError when those are another model's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_author(path, model, template, max_new_tokens)
    done = _finished(path)
    todo = []
    for case in cases:  # counted, because BFCL v3 has one id twice
        done[case.category, case.id] -= 1
        if done[case.category, case.id] < 0:
            todo.append(case)
    if not todo:
        print(f"{path}: all {len(cases)} cases are there already")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, policy = load_tokenizer(model), load_model(model, device)
    check_tokenizer(tokenizer, template)
    prompts = [
        Prompt(case.id, encode_prompt(tokenizer, case.messages, case.tools, template)) for case in todo
    ]
    order = sorted(range(len(todo)), key=lambda i: len(prompts[i].ids))
    with path.open("a", encoding="utf-8") as file, tqdm(total=len(todo), desc=path.parent.name or "eval") as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            fits = [i for i in batch if len(prompts[i].ids) <= max_prompt_tokens]
            began = time.perf_counter()
            groups = sample_groups(
                policy, tokenizer, [prompts[i] for i in fits], group_size=1, temperature=0,
                max_new_tokens=max_new_tokens, batch_size=batch_size,
            )  # fmt: skip
            latency = (time.perf_counter() - began) / len(batch)
            replies = dict(zip(fits, groups))
            for i in batch:
                row = {"id": todo[i].id, "category": todo[i].category, "input_tokens": len(prompts[i].ids)}
                if i in replies:
                    row |= {"output": replies[i].texts[0], "output_tokens": len(replies[i].responses[0])}
                else:
                    row |= {"output": "", "output_tokens": 0, "skipped": "prompt_too_long"}
                file.write(json.dumps(row | {"latency": round(latency, 4)}, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch))


def _check_author(path: Path, model: str, template: str, max_new_tokens: int) -> None:
    """Remembers beside `path` what its predictions are made with, and refuses to mix in those of anything else."""
    weights = [p.stat().st_mtime_ns for p in sorted(Path(model).glob("*.safetensors"))]
    author = {
        "model": str(Path(model).resolve()) if weights else model,
        "weights": weights,
        "template": hashlib.sha256(template.encode()).hexdigest(),
        "max_new_tokens": max_new_tokens,
    }
    note = path.with_name("generated_with.json")
    if path.exists() and note.exists() and json.loads(note.read_text(encoding="utf-8")) != author:
        raise ModelError(f"{path} was made with another model or settings ({note}); give another --out, or delete it")
    note.write_text(json.dumps(author, indent=1) + "\n", encoding="utf-8")


def _finished(path: Path) -> Counter[tuple[str, str]]:
    """How often each (category, id) is in `path`. A line cut off by a kill is removed, so appending is safe."""
    if not path.exists():
        return Counter()
    data = path.read_bytes()  # bytes, because the cut may be inside a character
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    rows = [json.loads(line) for line in whole.split(b"\n") if line]
    return Counter((row["category"], row["id"]) for row in rows)
