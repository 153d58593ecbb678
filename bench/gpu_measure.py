"""What bench/gpu.py measures with: shapes, models with random weights, the report, rates and floors."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import common
import torch
from common import TEMPERATURE, Shape, matrices, trimmed
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

import distributed.fsdp
import distributed.weights
import session as run_session
from config import Config
from corpus.tiny_model import build_tiny_tokenizer
from distributed.ranks import Ranks, start_ranks

# From the configs on the hub.
SHAPES = {
    "0.5B": Shape(896, 4864, 24, 14, 2, 151936),
    "1.5B": Shape(1536, 8960, 28, 12, 2, 151936),
    "7B": Shape(3584, 18944, 28, 28, 4, 152064, False),
}
SMALL = dict(hidden=64, inner=96, layers=2, heads=4, kv_heads=2, vocab=512)
TINY_SHAPES = {name: replace(shape, **SMALL) for name, shape in SHAPES.items()}


@dataclass(frozen=True)
class Load:
    """How much is computed, in tokens and counts. uneven: (prompt, responses), what exactness is tried on."""

    prompt: int = 1000
    response: int = 150
    copies: int = 8  # responses per prompt
    rows: tuple[int, ...] = (128, 256, 32)  # sequences decoded at once, most wanted first
    decode: tuple[int, int] = (20, 60)  # tokens of two rollouts, the difference of which is 40 steps
    train_prompts: int = 4
    budget: int = 9600  # tokens per micro-batch: 4 packed groups, or 8 rows
    step: int = 512  # prompts of a step, at most
    head_tokens: int = 2048
    greedy_tokens: int = 64
    uneven: tuple[tuple[int, tuple[int, ...]], ...] = (
        (300, (70, 1, 33, 150)), (17, (64, 9)), (1000, (150, 40, 2)), (1, (5,)),
    )

    @property
    def case(self) -> tuple[int, int, int]:
        """As common.group_flops takes it."""
        return self.prompt, self.response, self.copies


TINY_LOAD = Load(24, 6, 2, (4,), (2, 4), 2, 80, 4, 20, 5, ((9, (3, 1, 5)), (1, (4, 4)), (6, (2,))))


@dataclass(frozen=True)
class Session:
    """What every measurement needs. folder: for files that nobody keeps. deadline: by perf_counter. Rates in
    bytes/s and FLOP/s.
    """

    device: torch.device
    tiny: bool
    out: Path
    folder: Path
    deadline: float
    copy_rate: float = 0.0
    matrix_rate: float = 0.0
    datasheet: float = 0.0

    @property
    def load(self) -> Load:
        return TINY_LOAD if self.tiny else Load()

    @property
    def models(self) -> dict[str, Shape]:
        return TINY_SHAPES if self.tiny else SHAPES

    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.perf_counter()

    def path(self, name: str) -> str:
        """A folder with the config of this shape, a tokenizer that knows bytes, a file without weights."""
        folder, shape = self.folder / name, self.models[name]
        if not folder.exists():
            tokenizer = build_tiny_tokenizer([], 0)
            tokenizer.save_pretrained(folder)
            save_file({}, folder / "model.safetensors")
            common.qwen_config(shape, tokenizer.eos_token_id, tokenizer.pad_token_id).save_pretrained(folder)
        return str(folder)

    def policy(self, name: str) -> nn.Module:
        """The model as grpo.py trains it: FSDP2 on this rank, fp32 weights, bf16 computation on CUDA."""
        ranks = Ranks(0, 1, self.device) if torch.distributed.is_initialized() else start_ranks()
        with random_weights():
            return distributed.fsdp.load_policy(Config(), self.path(name), TEMPERATURE, ranks)

    def exact(self, name: str) -> nn.Module:
        """transformers' own model with the same weights, all of it fp32."""
        with random_weights():
            return distributed.weights.read_model(self.path(name), self.device, torch.float32)

    def run(self, name: str, **settings: object) -> run_session.Run:
        """Collective. A run of grpo.py that is set up: random weights, and random tokens as prompts."""
        load, shape = self.load, self.models[name]
        prompts = settings["prompts_per_step"]
        settings = dict(
            model=self.path(name), data="synthetic", synthetic_train=prompts, minibatch_prompts=prompts,
            prompt_template=common.ROOT / "configs/tiny_prompt.txt", run_dir=self.folder / "run",
            overwrite=True, temperature=TEMPERATURE, max_response_tokens=load.response, log_samples=0,
            rollout_batch_size=2048, max_tokens_per_micro_batch=load.budget, reward=f"{__file__}:coin",
        ) | settings
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        no_evaluation = mock.patch.object(run_session, "evaluate_sets", lambda run: {})
        with random_weights(), no_evaluation:
            run = common.start_run(words)
        drawn = common.random_groups(shape.vocab, [(load.prompt, ())] * prompts)
        run.examples = [replace(item, ids=ids) for item, (ids, _) in zip(run.examples, drawn, strict=True)]
        return run


def coin(completion: str, answer: list, tools: list) -> float:
    """A reward: noise earns nothing, and without rewards there would be no gradient."""
    return float(random.random() < 0.5)


@torch.no_grad()
def draw_weights(model: nn.Module, *_) -> None:
    """In the place of weights.stream_weights: the same normal numbers for every model of a shape."""
    for i, (name, parameter) in enumerate(model.named_parameters()):
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.ndim == 1:
            local.fill_(float("norm" in name))
            continue
        torch.manual_seed(i)
        local.copy_(0.02 * torch.randn(local.shape, device=local.device))


@contextlib.contextmanager
def random_weights() -> Iterator[None]:
    """Models are loaded from a config alone: writing and reading 15 GB would take minutes."""
    with contextlib.ExitStack() as stack:
        for module in (distributed.weights, distributed.fsdp):
            stack.enter_context(mock.patch.object(module, "stream_weights", draw_weights))
        yield


# --------------------------------------------------------------------------------------- measuring, reporting


def seconds(session: Session, function: Callable, *args) -> float:
    """Wall seconds of function(*args), until the device has done it all; memory() is of this call then."""
    cuda = session.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    function(*args)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory(session: Session) -> dict[str, float]:
    """The most that was allocated and reserved on the device since the last seconds() began."""
    if session.device.type != "cuda":
        return {"peak_gib": 0.0, "reserved_gib": 0.0}
    most = {"peak_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
    return {name: size / 2**30 for name, size in most.items()}


def short(value: object) -> str:
    """A figure as people read it."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def emit(out: Path, part: str, name: str, values: dict) -> None:
    """Prints a result and appends it to the file at once."""
    values = {key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in values.items()}
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"part": part, "name": name} | values) + "\n")
    print(f"{part:9} {name:30} {' · '.join(f'{key} {short(x)}' for key, x in values.items())}", flush=True)


def release(device: torch.device) -> None:
    """Gives back the device's memory that is not in use."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def attempt(session: Session, part: str, name: str, function: Callable, *args, needs: float = 0.0) -> None:
    """Reports the dictionary that function(session, *args) returns, or why there is none.

    With fewer seconds left than it needs it is skipped. An alarm, set for the deadline, ends the process:
    after an exception in the middle of a CUDA graph's capture nothing else would work.
    """
    if session.left() <= (0 if session.tiny else needs):
        why = f"needs about {needs:.0f} s, {session.left():.0f} s left"
        return emit(session.out, part, name, {"skipped": why})

    def stop(*_) -> None:
        emit(session.out, part, name, {"skipped": "did not end before its deadline"})
        os._exit(0)

    before = signal.signal(signal.SIGALRM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    try:
        values = function(session, *args)
    except torch.OutOfMemoryError as error:
        values = {"out_of_memory": str(error)[:150]}
    except Exception as error:  # a broken measurement must not cost the others: GPU time is scarce
        traceback.print_exc()
        values = {"error": f"{type(error).__name__}: {error}"[:300]}
    release(session.device)
    signal.signal(signal.SIGALRM, before)
    if values is not None:  # else it has made attempts of its own
        emit(session.out, part, name, values)


# ----------------------------------------------------------------------------------------------------- floors


def measure_rates(session: Session) -> Session:
    """The session with this device's copy rate (read and write) and bf16 matrix rate."""
    size, n = (2**18, 128) if session.tiny else (2**30, 8192)
    source = torch.randn(size, device=session.device, dtype=torch.bfloat16)
    a, b = torch.randn(2, n, n, device=session.device).bfloat16()
    target = torch.empty_like(source)

    def best(function: Callable, *args) -> float:
        return min(seconds(session, lambda: [function(*args) for _ in range(10)]) for _ in range(3)) / 10

    copy_rate = 2 * source.nbytes / best(target.copy_, source)
    return replace(session, copy_rate=copy_rate, matrix_rate=2 * n**3 / best(torch.matmul, a, b))


def prefill_flops(shape: Shape, tokens: int) -> float:
    """Matrix products of prompts' tokens, without attention and what the last layer leaves out."""
    return 2 * tokens * (matrices(shape) - trimmed(shape))


def decode_floor(session: Session, shape: Shape, rows: int, copies: int, new: int) -> tuple[float, float]:
    """Seconds of an average decode step of `rows` sequences that get `new` tokens: by bytes, and by FLOPs.

    Bytes: weights and keys/values in 16 bits, read once; a prompt's keys/values are there once per group.
    """
    prompt, weights = session.load.prompt, matrices(shape) + shape.hidden * shape.vocab
    per_token = 2 * shape.layers * shape.kv_heads * shape.hidden // shape.heads
    stored = rows // copies * prompt + rows * new / 2
    flops = 2 * rows * weights + 4 * rows * (prompt + new / 2) * shape.hidden * shape.layers
    return 2 * (weights + stored * per_token) / session.copy_rate, flops / session.matrix_rate
