"""What bench/gpu.py measures with: model shapes, the session and its report, random inputs, and the floors of
the work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernel.decode import Prompt, Replies
from model import autocast, prepare_model
from rollout import ENGINES

TEMPERATURE = 0.7


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and the type of its weights."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    weights: torch.dtype = torch.float32


# From the configs on the hub. The 7B has bf16 weights: with fp32 ones and a gradient it would not fit.
SHAPES = {
    "1.5B": Shape(1536, 8960, 28, 12, 2, 151936, True),
    "7B": Shape(3584, 18944, 28, 28, 4, 152064, False, torch.bfloat16),
    "0.5B": Shape(896, 4864, 24, 14, 2, 151936, True),
}
TINY_SHAPES = {
    name: dataclasses.replace(shape, hidden=64, inner=96, layers=2, heads=4, kv_heads=2, vocab=512)
    for name, shape in SHAPES.items()
}


@dataclass(frozen=True)
class Load:
    """How much is computed, in tokens and counts. uneven: (prompt, responses), what exactness is tried on."""

    prompt: int = 1000
    response: int = 150
    copies: int = 8  # responses per prompt
    rollouts: tuple[int, ...] = (128, 32, 512)  # sequences; most wanted first
    train_prompts: int = 4
    step_prompts: int = 32
    budget: int = 9200  # tokens per micro-batch: 4 packed groups, or 8 rows
    head_tokens: int = 2048
    greedy_tokens: int = 64
    uneven: tuple[tuple[int, tuple[int, ...]], ...] = (
        (300, (70, 1, 33, 150)), (17, (64, 9)), (1000, (150, 40, 2)), (1, (5,)),
    )


TINY_LOAD = Load(24, 6, 2, (4,), 2, 2, 80, 20, 5, ((9, (3, 1, 5)), (1, (4, 4)), (6, (2,))))


@dataclass(frozen=True)
class Session:
    """What every measurement needs. Rates in bytes/s and FLOP/s (datasheet: 0 if unknown); deadline by
    perf_counter.
    """

    device: torch.device
    tiny: bool
    load: Load
    out: Path
    deadline: float
    results: list[dict]
    copy_rate: float = 0.0
    matrix_rate: float = 0.0
    datasheet: float = 0.0


# --------------------------------------------------------------------------------------- measuring, reporting


def measure(device: torch.device, function: Callable, *args) -> tuple[float, float]:
    """Wall seconds until the device has done it all, and the most memory that it took meanwhile, in GiB (CPU:
    0).
    """
    cuda, before = device.type == "cuda", 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    function(*args)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else 0.0


def seconds(session: Session, function: Callable, *args) -> float:
    """Wall seconds until the device has done it all."""
    return measure(session.device, function, *args)[0]


def allocated_gib(session: Session) -> float:
    """Device memory in use now; 0 on the CPU."""
    return torch.cuda.memory_allocated() / 2**30 if session.device.type == "cuda" else 0.0


def left(session: Session) -> float:
    """Seconds to the deadline."""
    return session.deadline - time.perf_counter()


def share_of_time(session: Session, share: float) -> Session:
    """The session with a deadline after this share of the time that is left."""
    return dataclasses.replace(session, deadline=time.perf_counter() + share * left(session))


def short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def emit(session: Session, part: str, name: str, values: dict) -> None:
    """Prints a result and appends it to the file at once."""
    values = {
        key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()
    }
    session.results.append({"part": part, "name": name} | values)
    with session.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(session.results[-1]) + "\n")
    cells = (f"{key} {short(value) if isinstance(value, float) else value}" for key, value in values.items())
    print(f"{part:9} {name:30} {' · '.join(cells)}", flush=True)


class OutOfTime(BaseException):
    """A measurement did not end before its deadline. No Exception, or libraries that catch all of those would
    go on.
    """


def release(device: torch.device) -> None:
    """Gives back the device's memory that is not in use."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def attempt(
    session: Session, part: str, name: str, function: Callable, *args, needs: float = 0.0, whole: bool = False
) -> None:
    """Reports the dictionary that function(session, *args) returns, or why there is none.

    needs: seconds; with less left it is skipped. At the deadline it is interrupted. whole: it makes attempts
    of its own and returns nothing; then those are interrupted, not this.
    """
    if left(session) <= (0 if session.tiny else needs):
        return emit(
            session, part, name, {"skipped": f"needs about {needs:.0f} s, {max(0, left(session)):.0f} s left"}
        )
    values = None
    try:
        with contextlib.nullcontext() if whole else time_limit(left(session)):
            values = function(session, *args)
    except OutOfTime:
        values = {"skipped": "did not end before its deadline"}
    except torch.OutOfMemoryError as error:
        values = {"out_of_memory": str(error)[:150]}
    except Exception as error:  # a broken measurement must not cost the others: GPU time is scarce
        traceback.print_exc()
        values = {"error": f"{type(error).__name__}: {error}"[:300]}
    release(session.device)
    if values is not None:
        emit(session, part, name, values)


@contextlib.contextmanager
def time_limit(limit: float) -> Iterator[None]:
    """Raises OutOfTime after so many seconds, as soon as Python gets to it."""

    def stop(*_) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------ models and inputs


def models(session: Session) -> tuple[str, ...]:
    """What speed is measured on, most wanted first. Tiny models of all three would only repeat each other."""
    return ("1.5B", "7B") if session.tiny else ("1.5B", "7B", "0.5B")


def shape_of(session: Session, name: str) -> Shape:
    return (TINY_SHAPES if session.tiny else SHAPES)[name]


def build(session: Session, name: str, checkpointing: bool = False) -> nn.Module:
    """A random model in eval mode, made on the device. Only parameters become bf16: rotary angles stay
    fp32.
    """
    shape = shape_of(session, name)
    config = Qwen2Config(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, tie_word_embeddings=shape.tied,
        max_position_embeddings=32768, rope_theta=1e6, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )
    torch.manual_seed(0)
    with session.device:
        model = Qwen2ForCausalLM(config)
    model = prepare_model(model, session.device, checkpointing).eval()  # in fp32, so that its probe is exact
    for parameter in model.parameters():
        parameter.data = parameter.data.to(shape.weights)
    release(session.device)
    return model


def random_groups(
    vocab: int, sizes: Sequence[tuple[int, Sequence[int]]]
) -> list[tuple[list[int], list[list[int]]]]:
    """Groups of random tokens with these lengths, (prompt, responses)."""
    rng = random.Random(0)
    return [(rng.choices(range(vocab), k=p), [rng.choices(range(vocab), k=r) for r in rs]) for p, rs in sizes]


def respond(
    session: Session, model: nn.Module, engine: str, prompts: Sequence[list[int]], copies: int, new: int,
    half: bool = True,
) -> Replies:
    """`copies` responses of `new` tokens to every prompt: no token ends one. A single copy is greedy. half:
    autocast.
    """
    requests, vocab = [Prompt(str(i), ids, i) for i, ids in enumerate(prompts)], model.config.vocab_size
    with autocast(session.device) if half else contextlib.nullcontext():
        return ENGINES[engine](model, requests, copies, TEMPERATURE if copies > 1 else 0.0, new, [vocab])


# ----------------------------------------------------------------------------------------------------- floors


def measure_rates(session: Session) -> Session:
    """The session with this device's copy rate, bytes read and written, and bf16 matrix rate, both on random
    data.
    """
    device, cuda = session.device, session.device.type == "cuda"
    dtype, size, n = (torch.bfloat16, 2**30, 8192) if cuda else (torch.float32, 2**18, 128)
    source, a, b = (
        torch.randn(size, device=device, dtype=dtype),
        *torch.randn(2, n, n, device=device).to(dtype),
    )
    target = torch.empty_like(source)

    def best(function: Callable, *args) -> float:
        return min(seconds(session, lambda: [function(*args) for _ in range(10)]) for _ in range(3)) / 10

    copy_rate = 2 * source.nbytes / best(target.copy_, source)
    return dataclasses.replace(session, copy_rate=copy_rate, matrix_rate=2 * n**3 / best(torch.matmul, a, b))


def matrices(shape: Shape) -> int:
    """Weights in the layers' matrices."""
    attention = 2 * shape.hidden**2 * (shape.heads + shape.kv_heads) // shape.heads
    return shape.layers * (attention + 3 * shape.hidden * shape.inner)


def trimmed(shape: Shape) -> int:
    """Weights that tokens which predict nothing are not multiplied with: packing.trim_last_layer."""
    return shape.hidden**2 + 3 * shape.hidden * shape.inner


def forward_flops(shape: Shape, load: Load, prompts: int, shared: bool = True) -> float:
    """Matrix products of the log-probs of so many groups, causal attention included; a backward takes twice
    as many.
    """
    times = 1 if shared else load.copies  # that a prompt is computed
    tokens = times * load.prompt + load.copies * load.response
    pairs = times * load.prompt * (load.prompt + 1) / 2
    pairs += load.copies * load.response * (load.prompt + (load.response + 1) / 2)
    head = load.copies * load.response * shape.hidden * shape.vocab
    idle = (
        tokens - 1 - load.copies * (load.response - 1) if shared else 0
    )  # in the last layer: packing.trim_last_layer
    layers = tokens * matrices(shape) - idle * trimmed(shape)
    return prompts * 2 * (layers + 2 * pairs * shape.hidden * shape.layers + head)


def prefill_flops(shape: Shape, tokens: int) -> float:
    """Matrix products of prompts' tokens, without attention and what the last layer leaves out."""
    return 2 * tokens * (matrices(shape) - trimmed(shape))


def decode_floor(session: Session, shape: Shape, rows: int, new: int) -> tuple[float, float]:
    """Seconds of an average decode step of `rows` sequences that get `new` tokens: by bytes, and by FLOPs.

    Bytes: weights and keys/values in 16 bits, read once; a prompt's keys/values are there once per group.
    """
    load, weights = session.load, matrices(shape) + shape.hidden * shape.vocab
    per_token = 2 * shape.layers * shape.kv_heads * shape.hidden // shape.heads
    stored = rows // load.copies * load.prompt + rows * new / 2
    pairs = rows * (load.prompt + new / 2)
    flops = 2 * rows * weights + 4 * pairs * shape.hidden * shape.layers
    return 2 * (weights + stored * per_token) / session.copy_rate, flops / session.matrix_rate
