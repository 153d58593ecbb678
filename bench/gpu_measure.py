"""What bench/gpu.py measures with: shapes and loads, the session and its report, this card's rates and
floors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Shape, group_flops, matrices, random_model, trimmed
from torch import nn

# From the configs on the hub, most wanted first. The 7B has bf16 weights: with fp32 ones and a gradient it
# would not fit.
SHAPES = {
    "1.5B": Shape(1536, 8960, 28, 12, 2, 151936),
    "7B": Shape(3584, 18944, 28, 28, 4, 152064, False, torch.bfloat16),
    "0.5B": Shape(896, 4864, 24, 14, 2, 151936),
}
SMALL = dict(hidden=64, inner=96, layers=2, heads=4, kv_heads=2, vocab=512)
TINY_SHAPES = {name: dataclasses.replace(shape, **SMALL) for name, shape in SHAPES.items()}


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

    @property
    def case(self) -> tuple[int, int, int]:
        """Prompt tokens, response tokens, responses per prompt."""
        return self.prompt, self.response, self.copies


TINY_LOAD = Load(24, 6, 2, (4,), 2, 2, 80, 20, 5, ((9, (3, 1, 5)), (1, (4, 4)), (6, (2,))))


@dataclass(frozen=True)
class Session:
    """What every measurement needs. Rates in bytes/s and FLOP/s; deadline by perf_counter."""

    device: torch.device
    tiny: bool
    out: Path
    deadline: float
    results: list[dict]
    copy_rate: float = 0.0
    matrix_rate: float = 0.0
    datasheet: float = 0.0

    @property
    def load(self) -> Load:
        return TINY_LOAD if self.tiny else Load()

    @property
    def models(self) -> dict[str, Shape]:
        """Most wanted first. Tiny models of all three would only repeat each other."""
        return {name: TINY_SHAPES[name] for name in ("1.5B", "7B")} if self.tiny else SHAPES

    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.perf_counter()

    def share(self, share: float) -> Session:
        """The session with a deadline after this share of the time that is left."""
        return dataclasses.replace(self, deadline=time.perf_counter() + share * self.left())

    def build(self, name: str, checkpointing: bool = False) -> nn.Module:
        """A random model, made on the device."""
        model = random_model((TINY_SHAPES if self.tiny else SHAPES)[name], self.device, checkpointing)
        release(self.device)
        return model


# --------------------------------------------------------------------------------------- measuring, reporting


def measure(device: torch.device, function: Callable, *args) -> tuple[float, float]:
    """Wall seconds until the device has done it all; the most memory that it took, in GiB (CPU: 0)."""
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


def short(value: object) -> str:
    """A figure as people read it."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def emit(session: Session, part: str, name: str, values: dict) -> None:
    """Prints a result and appends it to the file at once."""
    values = {key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in values.items()}
    session.results.append({"part": part, "name": name} | values)
    with session.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(session.results[-1]) + "\n")
    print(f"{part:9} {name:30} {' · '.join(f'{key} {short(x)}' for key, x in values.items())}", flush=True)


class OutOfTime(BaseException):
    """A measurement did not end in time. No Exception, or libraries that catch those would go on."""


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
    if session.left() <= (0 if session.tiny else needs):
        why = f"needs about {needs:.0f} s, {session.left():.0f} s left"
        return emit(session, part, name, {"skipped": why})
    values = None
    try:
        with contextlib.nullcontext() if whole else time_limit(session.left()):
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


# ----------------------------------------------------------------------------------------------------- floors


def measure_rates(session: Session) -> Session:
    """The session with this device's copy rate (read and write) and bf16 matrix rate."""
    device, cuda = session.device, session.device.type == "cuda"
    dtype, size, n = (torch.bfloat16, 2**30, 8192) if cuda else (torch.float32, 2**18, 128)
    source = torch.randn(size, device=device, dtype=dtype)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    target = torch.empty_like(source)

    def best(function: Callable, *args) -> float:
        return min(seconds(session, lambda: [function(*args) for _ in range(10)]) for _ in range(3)) / 10

    copy_rate = 2 * source.nbytes / best(target.copy_, source)
    return dataclasses.replace(session, copy_rate=copy_rate, matrix_rate=2 * n**3 / best(torch.matmul, a, b))


def forward_flops(shape: Shape, load: Load, prompts: int, shared: bool = True) -> float:
    """FLOPs of the log-probs of so many groups; a backward has twice as many (model FLOPs)."""
    return prompts * group_flops(shape, load.case, shared=shared)


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
