"""What only a GPU can tell: are the kernels right, and how near is the speed to what the card can do?

    python bench/gpu.py [--parts numerics,step,train,profile,rollout] [--minutes 9] [--out runs/gpu.jsonl]
    python bench/gpu.py --table runs/gpu.jsonl      the results of such a file as Markdown tables
    python bench/gpu.py --tiny      without CUDA: runs every line of it; its figures mean nothing

Random models in the shapes of Qwen2.5; bf16 by autocast over fp32 weights, as in the product; the 7B has bf16
weights. Every result is printed and appended to --out (JSON lines) at once; what fails or would not fit into
the time is a result too. Floors: the work's bytes or FLOPs over this card's own copy and matrix rates,
measured first. The exit code is 1 if a check or measurement failed. bench/README.md says what each figure
means.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import torch
import transformers
from common import ROOT
from gpu_measure import (
    Session,
    allocated_gib,
    attempt,
    decode_floor,
    emit,
    forward_flops,
    measure,
    measure_rates,
    prefill_flops,
    seconds,
    short,
)
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from config import Config
from distributed.ranks import Clock, start_ranks
from kernel.attention import attention_backend
from kernel.packing import micro_batches, pack
from model import count_parameters
from rollout import ENGINES, PEAK_TFLOPS

sys.path.append(str(ROOT / "tests/gpu"))
from numerics import checks  # noqa: E402


def numerics(session: Session) -> None:
    """The checks of tests/gpu: everything in the product's precision against fp32, on uneven groups."""
    for name, check in checks(session).items():
        attempt(session, "numerics", name, lambda session, check=check: check(), needs=10)


def rollout(session: Session) -> None:
    """Every engine at several batch sizes on every model."""
    for i, name in enumerate(session.models):
        share = session.share(1 / (len(session.models) - i))
        attempt(share, "rollout", name, rollout_of, name, needs=15, whole=True)


def rollout_of(session: Session, name: str) -> None:
    model = session.build(name)
    for engine in ENGINES:
        for rows in session.load.rollouts:
            title = f"{name} {engine} {rows}"
            attempt(session, "rollout", title, engine_speed, model, name, engine, rows, needs=8)


def engine_speed(session: Session, model: nn.Module, name: str, engine: str, rows: int) -> dict:
    """Prefill and decode of `rows` sequences; prefill tokens are those of distinct prompts.

    A decode step's seconds are those of a whole rollout, less one that ends after its first token, over the
    steps in between.
    """
    load, shape = session.load, session.models[name]
    sizes = [(load.prompt, ())] * (rows // load.copies)
    prompts = [ids for ids, _ in common.random_groups(shape.vocab, sizes)]

    def run(new: int) -> None:
        common.sample(model, prompts, load.copies, new, engine)

    run(2)
    prefill = seconds(session, run, 1)
    few = max(2, load.response // 10)
    first = (seconds(session, run, few) - prefill) / (few - 1)
    new = load.response if prefill + 1.5 * first * load.response < session.left() or session.tiny else few
    before = allocated_gib(session)
    total, gib = measure(session.device, run, new)
    step = (total - prefill) / (new - 1)
    by_bytes, by_flops = decode_floor(session, shape, rows, new)
    return {
        "prefill_tokens_per_s": len(prompts) * load.prompt / prefill, "decode_tokens_per_s": rows / step,
        "step_ms": 1e3 * step, "bandwidth_floor_ms": 1e3 * by_bytes, "flops_floor_ms": 1e3 * by_flops,
        "over_bandwidth_floor": step / by_bytes, "prefill_s": prefill,
        "prefill_floor_s": prefill_flops(shape, len(prompts) * load.prompt) / session.matrix_rate,
        "new_tokens": new, "peak_gib": before + gib,
    }


def train(session: Session) -> None:
    """Forward + backward of every model, with and without gradient checkpointing."""
    todo = [(name, checkpointing) for name in session.models for checkpointing in (False, True)]
    for i, (name, checkpointing) in enumerate(todo):
        title, share = name + " checkpointing" * checkpointing, session.share(1.5 / (len(todo) - i + 0.5))
        attempt(share, "train", title, train_speed, name, checkpointing, needs=12)


def train_speed(session: Session, name: str, checkpointing: bool) -> dict:
    """Packed groups against a row per response, in turn, in micro-batches of equally many tokens at most."""
    load, shape, prompts = session.load, session.models[name], session.load.train_prompts
    model = session.build(name, checkpointing).train()
    sizes = [(load.prompt, [load.response] * load.copies)] * prompts
    groups = common.random_groups(shape.vocab, sizes)

    def batches(shared: bool) -> list:
        plan = micro_batches(sizes, load.budget, shared)
        taken = [[(groups[i][0], groups[i][1][part]) for i, part in parts] for parts in plan]
        return [pack(some, session.device, shared) for some in taken]

    def run(packed_batches: list, backward: bool) -> None:
        for packed in packed_batches:
            with torch.set_grad_enabled(backward):
                loss = -common.logprobs(model, packed).mean()
            if backward:
                loss.backward()
        model.zero_grad(set_to_none=True)

    packed, rows, before = batches(True), batches(False), allocated_gib(session)
    # warms up
    peak, plain_peak = (before + measure(session.device, run, side, True)[1] for side in (packed, rows))
    jobs = {"forward": (packed, False), "both": (packed, True), "plain": (rows, True)}
    times = {job: [seconds(session, run, *arguments)] for job, arguments in jobs.items()}
    while len(times["both"]) < 5 and session.left() > 2 * sum(taken[-1] for taken in times.values()):
        for job, arguments in jobs.items():
            times[job].append(seconds(session, run, *arguments))
    median = {job: statistics.median(taken) for job, taken in times.items()}
    ratios = common.spread([plain / both for both, plain in zip(times["both"], times["plain"])])
    tokens = prompts * (load.prompt + load.copies * load.response)
    plain_tokens = prompts * load.copies * (load.prompt + load.response)
    rate = 3 * forward_flops(shape, load, prompts) / median["both"]
    plain_rate = 3 * forward_flops(shape, load, prompts, shared=False) / median["plain"]
    return {
        "tokens_per_s": tokens / median["both"], "forward_tokens_per_s": tokens / median["forward"],
        "of_measured_peak": rate / session.matrix_rate,
        "plain_of_measured_peak": plain_rate / session.matrix_rate,
        "of_datasheet_peak": rate / session.datasheet if session.datasheet else 0.0,
        **ratios,
        "token_ratio": plain_tokens / tokens,
        "of_token_ratio": ratios["ratio_median"] * tokens / plain_tokens,
        "peak_gib": peak, "plain_peak_gib": plain_peak, "repetitions": len(times["both"]),
    }


def step(session: Session) -> None:
    attempt(session, "step", "1.5B", step_speed, needs=30)


def step_speed(session: Session) -> dict:
    """The second of two GRPO steps, with gradient checkpointing, KL, and one update."""
    load, shape, rows = session.load, session.models["1.5B"], session.load.step_prompts * session.load.copies
    config = Config(
        prompts_per_step=load.step_prompts, minibatch_prompts=load.step_prompts, group_size=load.copies,
        temperature=common.TEMPERATURE, max_response_tokens=load.response,
        max_tokens_per_micro_batch=2 * load.budget,
    )
    policy, reference = session.build("1.5B", True), session.build("1.5B").requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    prompts = [ids for ids, _ in common.random_groups(shape.vocab, [(load.prompt, ())] * load.step_prompts)]
    coin = random.Random(0)  # noise earns nothing: without other rewards there would be no gradient
    one = partial(common.grpo_step, common.Step(policy, reference, optimizer, prompts, config, start_ranks()))
    try:
        one(lambda ids: float(coin.random() < 0.5), Clock())  # warms up and makes the optimizer's state
        clock, before = Clock(), allocated_gib(session)
        total, gib = measure(session.device, one, lambda ids: float(coin.random() < 0.5), clock)
    finally:
        torch.distributed.destroy_process_group()
    forward = forward_flops(shape, load, load.step_prompts) / session.matrix_rate
    prefill = prefill_flops(shape, load.step_prompts * load.prompt) / session.matrix_rate
    # reads weight, gradient, moments; writes all but one
    adam = 28 * count_parameters(policy) / session.copy_rate
    update = 3 * forward / clock.seconds["update"]
    return {
        "step_s": total, **{f"{phase}_s": spent for phase, spent in clock.seconds.items()},
        "rollout_floor_s": prefill + load.response * max(decode_floor(session, shape, rows, load.response)),
        "reference_floor_s": forward, "update_floor_s": 3 * forward + adam, "update_of_measured_peak": update,
        "new_tokens_per_s": rows * load.response / total, "peak_gib": before + gib,
    }


# ---------------------------------------------------------------------------------------------------- profile


def profiles(session: Session) -> None:
    """Where the device's time goes in a decode step and in forward + backward."""
    model = session.build("1.5B")
    attempt(session, "profile", "1.5B decode step", profile_decode, model, needs=20)
    attempt(session, "profile", "1.5B forward + backward", profile_training, model, needs=20)


def device_work(session: Session, function: Callable, *args) -> tuple[Counter, int]:
    """Seconds of the device by operator (of the CPU where there is no other), and how many kernels ran."""
    cuda = session.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as recorded:
        seconds(session, function, *args)
    operators, kernels = Counter(), 0
    for row in recorded.key_averages():
        if row.device_type == DeviceType.CPU:
            operators[row.key] += (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1e6
        elif row.device_type == DeviceType.CUDA:
            kernels += row.count
    return operators, kernels


def synchronisations(session: Session, function: Callable, *args) -> int:
    """How often `function` made the host wait for the GPU; 0 on the CPU."""
    if session.device.type != "cuda":
        function(*args)
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def summary_of(operators: Counter, kernels: float, wall: float, syncs: float) -> dict:
    """busy_share: the device's time over the wall time without the profiler."""
    total = sum(operators.values())
    top = ", ".join(f"{name} {100 * spent / total:.0f} %" for name, spent in operators.most_common(8))
    figures = {"wall_ms": 1e3 * wall, "busy_share": total / wall, "kernels": kernels, "operators": top}
    return figures | {"host_synchronisations": syncs}


def profile_decode(session: Session, model: nn.Module) -> dict:
    """The default engine at the first batch size: a rollout of some steps less one without, per step."""
    load, steps = session.load, min(16, session.load.response - 1)
    sizes = [(load.prompt, ())] * (load.rollouts[0] // load.copies)
    prompts = [ids for ids, _ in common.random_groups(model.config.vocab_size, sizes)]
    run = partial(common.sample, model, prompts, load.copies)
    run(2)
    wall = (seconds(session, run, 1 + steps) - seconds(session, run, 1)) / steps
    syncs = (synchronisations(session, run, 1 + steps) - synchronisations(session, run, 1)) / steps
    (long, launched), (prefill, before) = device_work(session, run, 1 + steps), device_work(session, run, 1)
    per_step = Counter({name: (spent - prefill[name]) / steps for name, spent in long.items()})
    return summary_of(per_step, (launched - before) / steps, wall, syncs)


def profile_training(session: Session, model: nn.Module) -> dict:
    """Forward and backward of one packed micro-batch, without gradient checkpointing."""
    load = session.load
    sizes = [(load.prompt, [load.response] * load.copies)] * load.train_prompts
    packed = pack(common.random_groups(model.config.vocab_size, sizes), session.device)
    model.train()

    def run() -> None:
        common.logprobs(model, packed).mean().backward()
        model.zero_grad(set_to_none=True)

    run()
    wall, syncs = seconds(session, run), synchronisations(session, run)
    return summary_of(*device_work(session, run), wall, syncs)


# ------------------------------------------------------------------------------------------------------- main

# In this order; a part may use that share of the time that is left when it starts.
PARTS = {
    "numerics": (numerics, 0.4), "step": (step, 0.4), "train": (train, 0.6), "profile": (profiles, 0.3),
    "rollout": (rollout, 1.0),
}


def tables(path: Path) -> str:
    """The results of a file as a Markdown table for every part and kind of result."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        groups.setdefault((row.pop("part"), *row), []).append(row)
    parts = []
    for (part, *keys), rows in groups.items():
        lines = [[part, *keys[1:]], ["---"] * len(keys), *([short(row[key]) for key in keys] for row in rows)]
        parts.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    """Runs the parts and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--parts", default=",".join(PARTS), help="some of %(default)s")
    add("--minutes", type=float, default=9.0, help="for all; the rest is skipped (default: %(default)s)")
    add("--out", type=Path, default=ROOT / "runs/gpu.jsonl", help="appended to (default: runs/gpu.jsonl)")
    add("--tiny", action="store_true", help="tiny models, also without a GPU")
    add("--table", type=Path, help="print the results of this file as Markdown")
    args = parser.parse_args(arguments)
    if args.table:
        print(tables(args.table), end="")
        return 0
    cuda = torch.cuda.is_available()
    if not cuda and not args.tiny:
        parser.error("no CUDA device here; --tiny tries the program on the CPU (its figures mean nothing)")
    torch.set_float32_matmul_precision("highest")  # fp32 is what everything is compared with
    transformers.utils.logging.set_verbosity_error()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    name = torch.cuda.get_device_name() if cuda else "CPU"
    peak = next((tera * 1e12 for part, tera in PEAK_TFLOPS.items() if part in name), 0.0)
    deadline = time.perf_counter() + 60 * args.minutes
    session = measure_rates(Session(device, args.tiny, args.out, deadline, [], datasheet=peak))
    emit(session, "machine", name, {
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "cuda": torch.version.cuda,
        "transformers": transformers.__version__, "attention": attention_backend(device),
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else 0.0,
        "copy_gb_per_s": session.copy_rate / 1e9, "matrix_tflops": session.matrix_rate / 1e12,
        "datasheet_tflops": peak / 1e12, "tiny": args.tiny, "meaningless": args.tiny or not cuda,
    })
    for part in args.parts.split(","):
        run, share = PARTS[part]
        attempt(session.share(share), part, "all of it", run, whole=True)
    bad = [f"{r['part']}: {r['name']}" for r in session.results if "error" in r or r.get("passed") is False]
    missing = [f"{r['part']}: {r['name']}" for r in session.results if "skipped" in r or "out_of_memory" in r]
    print(json.dumps({"bench": "gpu", "failed": bad, "missing": missing, "out": str(args.out)}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
