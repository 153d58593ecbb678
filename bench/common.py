"""What the benchmarks share: a random model, the FLOPs of its work, this machine's rate, taking turns, one
step.

Everything that they call of the product's inner functions is in this file.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from timing import ROOT, machine

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(ROOT))

import distributed.start  # noqa: E402, F401, I001 - before torch, as in the product's scripts
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

import grpo  # noqa: E402
from config import Config, load_config  # noqa: E402
from distributed.batches import Group, make_updates  # noqa: E402
from distributed.fsdp import fsdp_modules, gathered_weights  # noqa: E402
from distributed.ranks import Clock, Ranks, start_ranks  # noqa: E402
from kernel.attention import use_attention, uses_shared_prefix  # noqa: E402
from kernel.decode import Prompt, Reply  # noqa: E402
from kernel.packing import Packed  # noqa: E402
from losses import group_std  # noqa: E402
from model import autocast, prepare_model, token_logprobs  # noqa: E402
from rollout import ENGINES  # noqa: E402
from session import Run, begin, open_session, start_step  # noqa: E402

CPU, TEMPERATURE = torch.device("cpu"), 0.7


@dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = True


def qwen_config(shape: Shape, eos: int = 0, pad: int = 0) -> Qwen2Config:
    """The config of a Qwen2 of this shape."""
    return Qwen2Config(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.inner, rope_theta=1e6,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied, max_position_embeddings=32768, bos_token_id=None, eos_token_id=eos,
        pad_token_id=pad,
    )


def random_model(shape: Shape) -> nn.Module:
    """A random model in eval mode; its logits are nearly uniform, so any token may come."""
    torch.manual_seed(0)
    return prepare_model(Qwen2ForCausalLM(qwen_config(shape)), CPU).eval()


def random_groups(vocab: int, sizes: Sequence[tuple[int, Sequence[int]]]) -> list[tuple]:
    """Groups of random tokens with these lengths, (prompt, responses)."""
    rng = random.Random(0)
    return [(rng.choices(range(vocab), k=p), [rng.choices(range(vocab), k=r) for r in rs]) for p, rs in sizes]


def logprobs(model: nn.Module, packed: Packed) -> Tensor:
    """[N]: the log-probs that the trainer computes for the response tokens."""
    use_attention(model, "generate" if packed.layout is None else "train")
    return token_logprobs(model, packed, TEMPERATURE, entropy=False)[0]


def sample(
    model: nn.Module, prompts: Sequence[list[int]], copies: int, new: int, engine: str = "shared_prefix",
    stops: Sequence[int] = (), half: bool = True,
) -> list[Reply]:
    """`copies` responses (1: greedy) of `new` tokens to every prompt; stops: tokens that end one earlier."""
    requests = [Prompt(str(i), ids, i) for i, ids in enumerate(prompts)]
    stops, temperature = list(stops) or [model.config.vocab_size], TEMPERATURE if copies > 1 else 0.0
    with autocast(next(model.parameters()).device) if half else contextlib.nullcontext():
        rows = len(prompts) * copies
        replies = dict(ENGINES[engine](model, requests, copies, temperature, new, stops, rows))
    return [reply for i in range(len(prompts)) for reply in replies[i]]


@dataclass(frozen=True)
class Step:
    """What a GRPO step works with."""

    policy: nn.Module
    reference: nn.Module
    optimizer: torch.optim.Optimizer
    prompts: Sequence[list[int]]
    config: Config
    ranks: Ranks


def grpo_step(step: Step, reward: Callable[[list[int]], float], clock: Clock) -> None:
    """Collective. Rollout, reference log-probs and updates, as in grpo.py; reward: of token ids."""
    config, copies = step.config, step.config.group_size
    sharded = bool(fsdp_modules(step.policy))
    weights = gathered_weights(step.policy) if sharded else contextlib.nullcontext(step.policy.eval())
    with clock("rollout"), weights as model:
        rows = sample(model, step.prompts, copies, config.max_response_tokens)
    use_attention(step.policy if sharded else step.policy.train(), "train")
    with clock("pack"):
        groups = []
        for i, ids in enumerate(step.prompts):
            responses, sampled = zip(*rows[i * copies : (i + 1) * copies])
            prompt, texts, truncated = Prompt(str(i), ids, i), [""] * copies, [True] * copies
            groups.append(Group(prompt, list(responses), list(sampled), texts, truncated))
        advantages = group_std(torch.tensor([[reward(ids) for ids in group.responses] for group in groups]))
        updates = make_updates(groups, advantages, config, step.ranks, uses_shared_prefix(step.policy))
    for model in (step.policy, step.reference):
        model.logprobs = partial(token_logprobs, model, temperature=config.temperature)
    with clock("reference"):
        grpo.store_logprobs(step.reference, updates, "reference_logprobs")
    with clock("update"):
        grpo.update_policy(step.policy, step.optimizer, updates, config, step.ranks)


def start_run(arguments: list[str]) -> Run:
    """Collective. A run of grpo.py with these settings, set up and not begun."""
    config = load_config(arguments)
    session = open_session(config, start_ranks(config.timeout_minutes), "grpo", examined=True)
    return begin(session, grpo.grpo_spec(session))


def run_step(run: Run) -> tuple[dict[str, float], float]:
    """Collective. One step of such a run -> this rank's seconds by phase, and the tokens of all ranks."""
    run.state["step"] = start_step(run)
    metrics, _ = grpo.grpo_step(run, run.state["step"])
    return run.clock.seconds, metrics["num_tokens"]



def matrices(shape: Shape) -> int:
    """Weights in the layers' matrices."""
    attention = 2 * shape.hidden**2 * (shape.heads + shape.kv_heads) // shape.heads
    return shape.layers * (attention + 3 * shape.hidden * shape.inner)


def trimmed(shape: Shape) -> int:
    """Weights that tokens which predict nothing are not multiplied with: attention.trim_last_layer."""
    return shape.hidden**2 + 3 * shape.hidden * shape.inner


def group_flops(
    shape: Shape, case: tuple[int, int, int], linear: float = 1.0, attention: float = 1.0, shared: bool = True
) -> float:
    """FLOPs of the log-probs of one group, 2 per multiply-add, so many times. case: prompt, response, copies.

    A forward has 2 products of attention, a backward 5, because the scores are computed again. shared:
    packed; then the last layer computes only what predicts something (attention.trim_last_layer).
    """
    prompt, response, copies = case
    times = 1 if shared else copies  # that a prompt is computed
    weights = (times * prompt + copies * response) * matrices(shape)
    weights += copies * response * shape.hidden * shape.vocab
    own, replies = times * prompt * (prompt + 1) / 2, copies * response * (prompt + (response + 1) / 2)
    pairs = (own + replies) * shape.layers
    if shared:
        weights -= (prompt - 1 + copies) * trimmed(shape)
        pairs -= own - prompt
    return 2 * linear * weights + 4 * attention * pairs * shape.hidden


def matrix_rate(rows: int, inner: int, columns: int) -> float:
    """FLOP/s of [rows, inner] @ [inner, columns] on one CPU thread, best of 20."""
    a, b, best = torch.randn(rows, inner), torch.randn(inner, columns), float("inf")
    for _ in range(20):
        start = time.process_time()
        a @ b
        best = min(best, time.process_time() - start)
    return 2 * rows * inner * columns / best



def take_turns(sides: dict[str, Callable[[], Any]], rounds: int, warm: int = 1) -> dict[str, list]:
    """What each side returns in every round, after `warm` rounds that do not count; the order alternates."""
    results: dict[str, list] = {name: [] for name in sides}
    for turn in range(warm + rounds):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            results[name].append(sides[name]())
    return {name: values[warm:] for name, values in results.items()}


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum, by name."""
    return {"ratio_min": min(ratios), "ratio_median": statistics.median(ratios), "ratio_max": max(ratios)}


def print_result(bench: str, **values: object) -> None:
    """The machine, and the line of JSON with which a benchmark ends."""
    text = json.dumps({"bench": bench, **values})
    print(f"{machine()}, torch {torch.__version__}")
    print(json.dumps(json.loads(text, parse_float=lambda number: round(float(number), 4))))
