"""What the benchmarks share: a random model, the FLOPs of its work, this machine's rate, taking turns, one step.

Everything that they call of the product's inner functions is in this file.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

import grpo  # noqa: E402
from config import Config, load_config  # noqa: E402
from distributed.batches import Group, make_minibatches  # noqa: E402
from distributed.ranks import Clock, Ranks, start_ranks  # noqa: E402
from kernel.attention import use_attention, uses_shared_prefix  # noqa: E402
from kernel.decode import Prompt, Replies  # noqa: E402
from kernel.packing import Packed  # noqa: E402
from losses import group_std  # noqa: E402
from model import autocast, prepare_model, token_logprobs  # noqa: E402
from rollout import ENGINES  # noqa: E402

CPU, TEMPERATURE = torch.device("cpu"), 0.7

# ---------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and the type of its weights."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = True
    weights: torch.dtype = torch.float32


def qwen_config(shape: Shape, eos: int = 0, pad: int = 0) -> Qwen2Config:
    """The config of a Qwen2 of this shape."""
    return Qwen2Config(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, tie_word_embeddings=shape.tied,
        max_position_embeddings=32768, rope_theta=1e6, bos_token_id=None, eos_token_id=eos, pad_token_id=pad,
    )


def random_model(shape: Shape, device: torch.device = CPU, checkpointing: bool = False) -> nn.Module:
    """A random model in eval mode; its logits are nearly uniform, so any token may come."""
    torch.manual_seed(0)
    with device:
        model = Qwen2ForCausalLM(qwen_config(shape))
    model = prepare_model(model, device, checkpointing).eval()  # in fp32, so that its probe is exact
    for parameter in model.parameters():  # only these: rotary angles stay fp32
        parameter.data = parameter.data.to(shape.weights)
    return model


def random_groups(vocab: int, sizes: Sequence[tuple[int, Sequence[int]]]) -> list[tuple[list[int], list[list[int]]]]:
    """Groups of random tokens with these lengths, (prompt, responses)."""
    rng = random.Random(0)
    return [(rng.choices(range(vocab), k=p), [rng.choices(range(vocab), k=r) for r in rs]) for p, rs in sizes]


def logprobs(model: nn.Module, packed: Packed) -> Tensor:
    """[N]: the log-probs that the trainer computes for the response tokens."""
    use_attention(model, "generate" if packed.layout is None else "train")
    return token_logprobs(model, packed, TEMPERATURE, entropy=False)[0]


def sample(model: nn.Module, prompts: Sequence[list[int]], copies: int, new: int, **options) -> Replies:
    """`copies` responses of exactly `new` tokens to every prompt; a single copy is greedy.

    options: engine; half: by autocast; stops: the tokens that end a response, by default none.
    """
    requests = [Prompt(str(i), ids, i) for i, ids in enumerate(prompts)]
    engine, stops = ENGINES[options.get("engine", "shared_prefix")], options.get("stops", [model.config.vocab_size])
    with autocast(next(model.parameters()).device) if options.get("half", True) else contextlib.nullcontext():
        return engine(model, requests, copies, TEMPERATURE if copies > 1 else 0.0, new, stops)


# ------------------------------------------------------------------------------------------------ one GRPO step


@dataclass(frozen=True)
class Step:
    """What one GRPO step works with; the two models compute on the same device."""

    policy: nn.Module
    reference: nn.Module
    optimizer: torch.optim.Optimizer
    prompts: Sequence[list[int]]
    config: Config
    ranks: Ranks


def grpo_step(step: Step, reward: Callable[[list[int]], float], clock: Clock) -> None:
    """Collective. Rollout, reference log-probs and one update, as grpo.py does them; reward: of token ids."""
    config, copies = step.config, step.config.group_size
    with clock("rollout"):
        rows = sample(step.policy.eval(), step.prompts, copies, config.max_response_tokens)
    step.policy.train()
    with clock("pack"):
        groups = []
        for i, ids in enumerate(step.prompts):
            own = rows[i * copies : (i + 1) * copies]
            responses, sampled = [ids for ids, _ in own], [logprobs for _, logprobs in own]
            groups.append(Group(Prompt(str(i), ids, i), responses, sampled, [""] * copies, [True] * copies))
        advantages = group_std(torch.tensor([[reward(ids) for ids in group.responses] for group in groups]))
        updates = make_minibatches(groups, advantages, config, step.ranks, uses_shared_prefix(step.policy))
    use_attention(step.policy, "train")
    with clock("reference"):
        grpo.fixed_logprobs(step.policy, step.reference, updates, config)
    with clock("update"):
        grpo.update_policy(step.policy, step.optimizer, updates, config, step.ranks)


def start_run(arguments: list[str]) -> grpo.Run:
    """Collective. A run of grpo.py with these settings, set up and not begun."""
    config = load_config(arguments)
    return grpo.set_up(config, start_ranks(config.timeout_minutes), examined=True)


def run_step(run: grpo.Run, step: int) -> tuple[dict[str, float], float]:
    """Collective. One step of such a run -> this rank's seconds by phase, and the tokens of all ranks."""
    clock = Clock(None, step)
    metrics, _ = grpo.train_step(run, step, clock)
    return clock.seconds, metrics["num_tokens"]


# -------------------------------------------------------------------------------------------------------- FLOPs


def matrices(shape: Shape) -> int:
    """Weights in the layers' matrices."""
    attention = 2 * shape.hidden**2 * (shape.heads + shape.kv_heads) // shape.heads
    return shape.layers * (attention + 3 * shape.hidden * shape.inner)


def trimmed(shape: Shape) -> int:
    """Weights that tokens which predict nothing are not multiplied with: attention.trim_last_layer."""
    return shape.hidden**2 + 3 * shape.hidden * shape.inner


def linear_flops(shape: Shape, prompt: int, response: int, copies: int, shared: bool = True) -> float:
    """Matrix products of a group's log-probs without attention, forward; 2 per multiply-add. shared: packed."""
    times = 1 if shared else copies  # that a prompt is computed
    tokens = times * prompt + copies * response
    idle = prompt - 1 + copies if shared else 0  # in the last layer
    head = copies * response * shape.hidden * shape.vocab
    return 2 * (tokens * matrices(shape) - idle * trimmed(shape) + head)


def attention_flops(shape: Shape, prompt: int, response: int, copies: int, shared: bool = True) -> float:
    """The two products of causal attention, forward. A backward has five: the scores are computed again.

    shared: in the last layer, of a prompt its last token only.
    """
    replies = copies * (response * prompt + response * (response + 1) / 2)
    own = prompt * (prompt + 1) / 2
    pairs = replies * shape.layers
    pairs += own * (shape.layers - 1) + prompt if shared else copies * own * shape.layers
    return 2 * 2 * pairs * shape.hidden


def matrix_rate(rows: int, inner: int, columns: int) -> float:
    """FLOP/s of [rows, inner] @ [inner, columns] on one CPU thread, best of 20."""
    a, b, best = torch.randn(rows, inner), torch.randn(inner, columns), float("inf")
    for _ in range(20):
        start = time.process_time()
        a @ b
        best = min(best, time.process_time() - start)
    return 2 * rows * inner * columns / best


# ---------------------------------------------------------------------------------------------------- reporting


def take_turns(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each side returns in every round, after one round that only warms up; the order alternates."""
    results: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-1, rounds):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            value = sides[name]()
            if turn >= 0:
                results[name].append(value)
    return results


def spread(ratios: Sequence[float], prefix: str = "ratio_") -> dict[str, float]:
    """Minimum, median and maximum, by name."""
    return {f"{prefix}min": min(ratios), f"{prefix}median": statistics.median(ratios), f"{prefix}max": max(ratios)}


def machine() -> str:
    """Processor, cores, load and versions."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.split(": ")[1] for line in text.splitlines() if line.startswith("model name")), platform.machine())
    return (f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, "
            f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")


def print_result(bench: str, **values: object) -> None:
    """The line of JSON with which a benchmark ends."""
    text = json.dumps({"bench": bench, **values, "torch": torch.__version__})
    print(json.dumps(json.loads(text, parse_float=lambda number: round(float(number), 4))))
