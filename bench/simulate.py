"""Predicts the seconds of one GRPO step on 8, 64 and 512 GPUs: rollout with its tail of long responses, update, network.

    python bench/simulate.py [--model 7b] [--gpus 8,64,512] [--response_tokens 150 --response_p99 600]
    python bench/simulate.py --measured runs/x/log.jsonl --measured_gpus 8    costs from a run of the same model and GPU

It is arithmetic, not a measurement. Who samples, who trains what, and how many micro-batches there are is worked out by
the functions that training uses (minibatches.share_out, packing.micro_batches) on response lengths drawn from a
log-normal; seconds per token are estimate.py's roofline, given by an option, or fitted to a log. All that it assumes is
printed below the table; the last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import Qwen2Config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import Config, ConfigError, load_config  # noqa: E402
from engines import BLOCK, KEEP_SHARE  # noqa: E402
from estimate import BF16, FP32, GB, Assumptions, Shape, cache_bytes, estimate, phases_of_step, shape_of  # noqa: E402
from minibatches import share_out  # noqa: E402
from model import ModelError  # noqa: E402
from packing import micro_batches  # noqa: E402
from runtime import read_jsonl  # noqa: E402
from sharding import model_config  # noqa: E402

SIZES = {  # of Qwen2.5, so that nothing is downloaded
    "7b": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
               intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False),
    "14b": dict(hidden_size=5120, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8,
                intermediate_size=13824, vocab_size=152064, tie_word_embeddings=False),
}  # fmt: skip
P99 = 2.3263  # standard deviations of the 99th percentile
TOKEN_BYTES, LOGPROB_BYTES = 4, 9  # of a pickled Group: 24 kB were measured with 1000 + 5 x 300 tokens


@dataclass(frozen=True)
class Cost:
    """Seconds on one GPU per token: of a prefill, a forward pass, a forward and backward pass. A decode step takes
    `overhead` and the longer of `row` for every row and `read` (the weights) + `kv` for every token of K/V."""

    prefill: float
    forward: float
    update: float
    row: float
    read: float
    kv: float
    overhead: float = 0.0


@dataclass(frozen=True)
class Network:
    """Bytes per second per GPU inside a node and between nodes; seconds per collective for every doubling of the ranks;
    the share of computing time under which communication hides. objects, hop: pickled objects through the CPUs, bytes per
    second of a node and seconds from rank to rank. unpickle: bytes per second of a process."""

    per_node: int
    inside: float
    between: float
    latency: float
    overlap: float
    objects: float
    hop: float
    unpickle: float


@dataclass(frozen=True)
class Part:
    """One phase of a step: seconds until the last GPU is done; what the mean GPU waits of that for the slowest; what is
    communication that no computing hides."""

    seconds: float
    waiting: float = 0.0
    exposed: float = 0.0


# ---------------------------------------------------------------------------------------------------------- lengths


def lognormal(mean: float, p99: float) -> tuple[float, float]:
    """(mu, sigma) of the log-normal with this mean and 99th percentile. Raises ConfigError where there is none."""
    if not 0 < mean <= p99 <= mean * math.exp(P99**2 / 2):
        raise ConfigError(f"response_p99 must be from 1 to {math.exp(P99**2 / 2):.1f} times response_tokens, not {p99:g}")
    sigma = P99 - math.sqrt(max(0.0, P99**2 - 2 * math.log(p99 / mean)))
    return math.log(mean) - sigma**2 / 2, sigma


def draw_lengths(prompts: int, copies: int, mean: float, p99: float, cap: int, seed: int) -> list[list[int]]:
    """[prompts][copies]: response tokens of every completion, from 1 to cap, each a function of seed and its place."""
    mu, sigma = lognormal(mean, p99)
    draw = lambda i, k: random.Random(f"{seed}/length/{i}/{k}").lognormvariate(mu, sigma)  # noqa: E731
    return [[min(cap, max(1, round(draw(i, k)))) for k in range(copies)] for i in range(prompts)]


# ---------------------------------------------------------------------------------------------------------- rollout


def decode_seconds(groups: Sequence[Sequence[int]], prompt: int, cost: Cost) -> float:
    """Seconds to decode these groups of response lengths together: until the longest response has ended.

    A step costs by the rows that are computed: those alive, and those that ended since fewer than KEEP_SHARE were left.
    """
    steps = np.arange(max(map(max, groups)))
    alive = (np.array([n for group in groups for n in group])[:, None] > steps).sum(0)
    unfinished = (np.array([max(group) for group in groups])[:, None] > steps).sum(0)
    width, widths = int(alive[0]), []
    for left in alive.tolist():
        width = left if left < KEEP_SHARE * width else width
        widths.append(width)
    rows = np.array(widths)
    memory = cost.read + cost.kv * (unfinished * prompt + rows * (steps + 1))
    return float((cost.overhead + np.maximum(cost.row * rows, memory)).sum())


def rollout_seconds(groups: Sequence[Sequence[int]], prompt: int, rows: int, cost: Cost) -> float:
    """One GPU's share: prefill, then batches of whole groups with at most `rows` rows, one after the other."""
    if not groups:
        return 0.0
    size = max(1, rows // len(groups[0]))
    batches = [groups[i : i + size] for i in range(0, len(groups), size)]
    return len(groups) * prompt * cost.prefill + sum(decode_seconds(batch, prompt, cost) for batch in batches)


def rollout(lengths: Sequence[Sequence[int]], prompt: int, gpus: int, rows: int, cost: Cost) -> Part:
    """Place i of the batch is sampled by GPU i modulo the number of GPUs, as in minibatches.own_places."""
    seconds = [rollout_seconds(lengths[gpu::gpus], prompt, rows, cost) for gpu in range(gpus)]
    return Part(max(seconds), max(seconds) - statistics.mean(seconds))


# ----------------------------------------------------------------------------------------------------------- update


def schedule(
    lengths: Sequence[Sequence[int]], prompt: int, minibatch: int, budget: int, gpus: int
) -> list[list[list[int]]]:
    """Tokens of every micro-batch: [updates][GPUs][its micro-batches], as minibatches.make_minibatches shares them out."""
    updates = []
    for start in range(0, len(lengths), minibatch):
        sizes = [(prompt, group) for group in lengths[start : start + minibatch]]
        update = []
        for share in share_out([prompt + sum(group) for _, group in sizes], gpus):
            own = [sizes[i] for i in share]
            parts = micro_batches(own, budget)
            update.append([sum(prompt + sum(own[k][1][responses]) for k, responses in micro) for micro in parts])
        updates.append(update)
    return updates


def passes(updates: Sequence[Sequence[Sequence[int]]], per_token: float, communication: float) -> Part:
    """One pass over all micro-batches; all GPUs gather every layer together, so each micro-batch lasts as its largest.

    communication: (seconds of a micro-batch, share of computing that hides it) -> what is not hidden adds.
    """
    seconds = waiting = exposed = 0.0
    for update in updates:
        for turn in range(max(map(len, update))):
            busy = [micros[turn] * per_token if turn < len(micros) else 0.0 for micros in update]
            longest, wire = max(busy), communication
            seconds, waiting = seconds + longest + wire, waiting + longest - statistics.mean(busy)
            exposed += wire
    return Part(seconds, waiting, exposed)
