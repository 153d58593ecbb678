"""How fast the product is on a GPU, for bench/gpu.py: decoding, forward + backward, whole steps, profiles.

Everything is measured on runs as grpo.py sets them up (FSDP2 on one rank, bf16 computation, rollouts inside
gathered_weights), with random weights.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from unittest import mock

import common
import torch
from common import group_flops
from gpu_measure import Session, attempt, decode_floor, memory, prefill_flops, release, seconds
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from distributed.fsdp import gathered_weights
from kernel import decode
from kernel.attention import use_attention
from kernel.packing import Packed, micro_batches, pack
from model import count_parameters
from rollout import ENGINES
from session import Run

GRAPHS = "shared_prefix"  # the default engine; "shared_prefix_eager" is the same without CUDA graphs


@dataclass(frozen=True)
class Case:
    """What is measured of a model, most wanted first, in so many seconds at most. step: prompts (Load.step at
    most) and completions of each.
    """

    model: str
    limit: int
    parts: tuple[str, ...]
    step: tuple[int, int] = (8, 8)
    settings: dict = field(default_factory=dict)


CASES = {
    "1.5B": Case("1.5B", 105, ("step", "train", "decode"), (512, 4), {"gradient_checkpointing": False}),
    "7B LoRA": Case("7B", 70, ("decode", "step"), (32, 8), {"lora_rank": 32}),
    # Weights and gradients are 61 GB: no reference, and no optimizer step.
    "7B": Case("7B", 40, ("train",), settings={"kl_coef": 0}),
    "0.5B": Case("0.5B", 30, ("decode", "train"), settings={"gradient_checkpointing": False}),
}


def judged(figures: dict, key: str, bound: float, at_most: bool = False) -> dict:
    """The figures with a target for one of them, and whether it is met."""
    met = figures[key] <= bound if at_most else figures[key] >= bound
    name = f"{key} {'<=' if at_most else '>='} {bound:g}"
    return figures | {"targets": figures.get("targets", {}) | {name: met}}


def speed(session: Session, name: str) -> None:
    """Every part of a case, each an attempt of its own, on one run."""
    case, made = CASES[name], []
    attempt(session, "speed", f"{name} load", load, case, made, needs=25)
    release(session.device)
    run = made[0] if made else None
    for part in case.parts if run else ():
        if part == "decode":
            with gathered_weights(run.policy) as twin:
                for rows in session.load.rows:
                    for engine in (name for name in ENGINES if name.startswith(GRAPHS)):
                        title = f"{name} decode {rows}{engine.removeprefix(GRAPHS).replace('_', ' ')}"
                        attempt(session, "speed", title, decode_speed, twin, case, engine, rows, needs=8)
        elif part == "train":
            attempt(session, "speed", f"{name} forward + backward", train_speed, run, case, needs=12)
        else:
            prompts, copies = run.config.prompts_per_step, run.config.group_size
            attempt(session, "speed", f"{name} step {prompts} x {copies}", step_speed, run, case, needs=20)


def load(session: Session, case: Case, made: list[Run]) -> dict:
    """Puts the run into `made`. Where its trial did not find that the model can go the fast ways, all other
    figures are those of slower ones.
    """
    prompts, copies = case.step
    settings = {"prompts_per_step": min(prompts, session.load.step), "group_size": copies, **case.settings}
    spent = seconds(session, lambda: made.append(session.run(case.model, **settings)))
    able = made[0].policy.capabilities
    return {
        "load_s": spent, "parameters": count_parameters(made[0].policy), **memory(session), **vars(able),
        "passed": able.shared_prefix and able.head_only and able.engine == GRAPHS,
    }


# ---------------------------------------------------------------------------------------------------- rollout


@contextlib.contextmanager
def noted_captures() -> Iterator[list[float]]:
    """The seconds of every CUDA graph that is captured inside."""
    spent, capture = [], decode.capture

    def timed(*args):
        start = time.perf_counter()
        captured = capture(*args)
        spent.append(time.perf_counter() - start)
        return captured

    with mock.patch.object(decode, "capture", timed):
        yield spent


def rollout(session: Session, twin: nn.Module, rows: int, engine: str = GRAPHS) -> Callable[[int], object]:
    """A function that decodes so many tokens of `rows` sequences with random prompts."""
    load = session.load
    groups = common.random_groups(twin.config.vocab_size, [(load.prompt, ())] * (rows // load.copies))
    return partial(common.sample, twin, [ids for ids, _ in groups], load.copies, engine=engine)


def decode_speed(session: Session, twin: nn.Module, case: Case, engine: str, rows: int) -> dict:
    """A decode step of `rows` sequences: a rollout less a shorter one, each with one step that is not
    replayed and (not counted) one capture. With graphs also a whole rollout, captures and all.
    """
    load, shape, run = session.load, session.models[case.model], rollout(session, twin, rows, engine)
    prompt_tokens, taken = rows // load.copies * load.prompt, []
    run(load.decode[0])  # warms up
    for new in load.decode:
        with noted_captures() as captures:
            taken.append(seconds(session, run, new) - sum(captures))
    step = (taken[1] - taken[0]) / (load.decode[1] - load.decode[0])
    by_bytes, by_flops = decode_floor(session, shape, rows, load.copies, sum(load.decode))
    figures = {
        "decode_tokens_per_s": rows / step, "step_ms": 1e3 * step, "floor_ms": 1e3 * by_bytes,
        "flops_floor_ms": 1e3 * by_flops, "over_floor": step / by_bytes,
    }
    if engine != GRAPHS:
        return figures
    prefill = seconds(session, run, 1)
    with noted_captures() as captures:
        whole = seconds(session, run, load.response)
    figures |= {
        "rollout_tokens_per_s": rows * load.response / whole, "captures": len(captures),
        "capture_s": sum(captures), "prefill_s": prefill, "prefill_tokens_per_s": prompt_tokens / prefill,
        "prefill_floor_s": prefill_flops(shape, prompt_tokens) / session.matrix_rate, **memory(session),
    }
    if session.device.type == "cuda":  # else it went on without graphs
        figures["passed"] = bool(captures)
    if (rows, case.model) == (256, "0.5B"):
        return judged(figures, "decode_tokens_per_s", 25000)
    if rows == load.rows[0] and case.model != "0.5B":
        return judged(figures, "over_floor", 2.0, at_most=True)
    return figures


# --------------------------------------------------------------------------------------------------- training


def logprobs(policy: nn.Module, packed: Packed) -> torch.Tensor:
    """As in an update, entropy included; packed or a row for each response."""
    use_attention(policy, "generate" if packed.layout is None else "train")
    return policy.logprobs(packed)[0]


def train_batches(session: Session, case: Case, shared: bool) -> list[Packed]:
    """The same groups, packed or as rows, in micro-batches of equally many tokens at most."""
    load = session.load
    sizes = [(load.prompt, [load.response] * load.copies)] * load.train_prompts
    groups = common.random_groups(session.models[case.model].vocab, sizes)
    batches = []
    for parts in micro_batches(sizes, load.budget, shared):
        chosen = [(groups[i][0], groups[i][1][part]) for i, part in parts]
        batches.append(pack(chosen, session.device, shared))
    return batches


def train_speed(session: Session, run: Run, case: Case) -> dict:
    """Forward + backward of packed groups and of a row per response, in turn. What is computed again for
    gradient checkpointing does not count as work; nor do gradients of weights that LoRA freezes.
    """
    load, shape, policy = session.load, session.models[case.model], run.policy
    sides = {side: train_batches(session, case, side == "packed") for side in ("packed", "rows")}
    passes = 2 if run.config.lora_rank else 3  # a backward has two forwards' FLOPs, one of them for weights

    def both(side: str) -> None:
        for batch in sides[side]:
            logprobs(policy, batch).mean().backward()
        policy.zero_grad(set_to_none=True)

    peaks, times = {}, {side: [] for side in sides}
    for side in sides:
        seconds(session, both, side)  # warms up
        peaks[side] = memory(session)["peak_gib"]
    while len(times["rows"]) < 5 and session.left() > 3 * sum(taken[-1] for taken in times.values() if taken):
        for side, taken in times.items():
            taken.append(seconds(session, both, side))
    median = {side: statistics.median(taken) for side, taken in times.items()}
    ratios = common.spread([rows / packed for packed, rows in zip(times["packed"], times["rows"])])
    rate = {}
    for side, taken in median.items():
        flops = load.train_prompts * group_flops(shape, load.case, shared=side == "packed")
        rate[side] = passes * flops / taken
    tokens = load.train_prompts * (load.prompt + load.copies * load.response)
    plain_tokens = load.train_prompts * load.copies * (load.prompt + load.response)
    figures = {
        "tokens_per_s": tokens / median["packed"],
        "of_peak": rate["packed"] / (session.datasheet or session.matrix_rate),
        "of_measured_peak": rate["packed"] / session.matrix_rate,
        "rows_of_measured_peak": rate["rows"] / session.matrix_rate,
        **ratios, "token_ratio": plain_tokens / tokens,
        "of_token_ratio": ratios["ratio_median"] * tokens / plain_tokens,
        "peak_gib": peaks["packed"], "rows_peak_gib": peaks["rows"], "repetitions": len(times["rows"]),
    }
    figures = judged(figures, "of_token_ratio", 0.8)
    return judged(figures, "of_peak", 0.45) if case.model == "7B" else figures


def step_speed(session: Session, run: Run, case: Case) -> dict:
    """One step of grpo.py by phases, after a small one that warms up and makes the optimizer's state."""
    load, shape, config = session.load, session.models[case.model], run.config
    prompts, copies = config.prompts_per_step, config.group_size
    few = max(2, prompts // 32)
    run.config = replace(config, prompts_per_step=few, minibatch_prompts=few)
    common.run_step(run)
    run.config = config
    release(session.device)
    with noted_captures() as captures:
        whole = seconds(session, common.run_step, run)
    phases, rows = run.clock.seconds, prompts * copies
    case_flops = prompts * group_flops(shape, (load.prompt, load.response, copies))
    passes = 2 if config.lora_rank else 3
    prefill = prefill_flops(shape, prompts * load.prompt) / session.matrix_rate
    decode = load.response * max(decode_floor(session, shape, rows, copies, load.response))
    trained = sum(p.numel() for p in run.policy.parameters() if p.requires_grad)
    figures = {
        "step_s": whole, **{f"{phase}_s": taken for phase, taken in phases.items()},
        "rollout_floor_s": prefill + decode, "reference_floor_s": case_flops / session.matrix_rate,
        # AdamW reads weight, gradient and moments, and writes all but the gradient
        "update_floor_s": passes * case_flops / session.matrix_rate + 28 * trained / session.copy_rate,
        "update_of_measured_peak": passes * case_flops / phases["update"] / session.matrix_rate,
        "new_tokens_per_s": rows * load.response / whole,
        "captures": len(captures), "capture_s": sum(captures), **memory(session),
    }
    full = not config.lora_rank and case.model == "1.5B"
    return judged(figures, "step_s", 45.0, at_most=True) if full else figures


# --------------------------------------------------------------------------------------------------- profile


def profiles(session: Session) -> None:
    """Where the device's time goes in a decode step and in forward + backward of a micro-batch."""
    case, made = replace(CASES["1.5B"], step=(8, 8)), []
    attempt(session, "profile", "1.5B load", load, case, made, needs=25)
    if not made:
        return
    policy, packed = made[0].policy, train_batches(session, case, True)[0]

    def train(passes: int) -> None:
        for _ in range(passes):
            logprobs(policy, packed).mean().backward()
            policy.zero_grad(set_to_none=True)

    with gathered_weights(policy) as twin:
        run = rollout(session, twin, session.load.rows[0])
        attempt(session, "profile", "1.5B decode step", profiled, run, *session.load.decode, needs=20)
    attempt(session, "profile", "1.5B forward + backward", profiled, train, 1, 2, needs=20)


def profiled(session: Session, run: Callable[[int], object], few: int, many: int) -> dict:
    """What one step of run(steps) takes: of many less of few. busy_share: the device's time over the wall
    time without the profiler; most: the kernels (on a CPU operators) that take most of it.
    """
    run(few)  # warms up
    spent = spent_on(session, run, many)
    spent.subtract(spent_on(session, run, few))
    spent = Counter({name: taken / (many - few) for name, taken in spent.items()})
    wall, kernels = spent.pop("wall"), spent.pop("kernels", 0.0)
    total = sum(spent.values())
    most = ", ".join(f"{name} {100 * taken / total:.0f} %" for name, taken in spent.most_common(8) if taken)
    return {"wall_ms": 1e3 * wall, "busy_share": total / wall, "kernels": kernels, "most": most}


def spent_on(session: Session, function: Callable, *args) -> Counter:
    """Of one call: the device's seconds by kernel (on a CPU by operator), "kernels", and "wall": the seconds
    without the profiler.
    """
    cuda = session.device.type == "cuda"
    spent = Counter(wall=seconds(session, function, *args))
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recorded:
        seconds(session, function, *args)
    for row in recorded.key_averages():
        if cuda and row.device_type == DeviceType.CUDA and not row.is_user_annotation:
            spent[row.key[:50]] += row.self_device_time_total / 1e6
            spent["kernels"] += row.count
        elif not cuda:
            spent[row.key] += row.self_cpu_time_total / 1e6
    return spent
