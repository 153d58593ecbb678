"""What only a GPU can tell, in one command: are the kernels right, and how near is the speed to what the card
can do?

    python bench/gpu.py [--parts numerics,step,train,profile,rollout] [--minutes 9] [--out runs/gpu.jsonl]
    python bench/gpu.py --table runs/gpu.jsonl      the results of such a file as Markdown tables
    python bench/gpu.py --tiny      without CUDA: runs every line of it; its figures mean nothing

Random models in the shapes of Qwen2.5; bf16 by autocast over fp32 weights, as in the product; the 7B has bf16
weights. Nothing is downloaded. Every result is printed and appended to --out (JSON lines) at once; what fails
or would not fit into the time is a result too. Floors: the work's bytes or FLOPs, each prompt once per group,
over this card's own copy and matrix rates, measured first. The last line sums up; exit code 1 if a check or
measurement failed. bench/README.md says what each figure means.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from gpu_measure import (  # noqa: E402
    TEMPERATURE,
    TINY_LOAD,
    Load,
    Session,
    allocated_gib,
    attempt,
    build,
    decode_floor,
    emit,
    forward_flops,
    left,
    measure,
    measure_rates,
    models,
    prefill_flops,
    random_groups,
    respond,
    seconds,
    shape_of,
    share_of_time,
    short,
)
from gpu_numerics import check_attention, check_greedy, check_head, check_logprobs, check_sampler  # noqa: E402

import grpo  # noqa: E402
from config import Config
from corpus.tiny_model import build_tiny_tokenizer
from distributed.batches import make_minibatches
from distributed.ranks import Clock, start_ranks
from kernel.attention import attention_backend, use_attention, uses_shared_prefix
from kernel.decode import Prompt
from kernel.packing import micro_batches, pack
from losses import group_std
from model import count_parameters, token_logprobs
from reward import score
from rollout import ENGINES, PEAK_TFLOPS, sample_groups


def numerics(session: Session) -> None:
    """Everything in the product's precision against fp32, on uneven groups."""
    for strict in (False, True):
        for heads, kv_heads, size in ((14, 2, 64), (28, 4, 128)):
            name = f"attention D {size}" + (" deterministic" if strict else "")
            attempt(session, "numerics", name, check_attention, heads, kv_heads, size, strict, needs=3)
    shape = shape_of(session, "0.5B")
    attempt(session, "numerics", "LM head", check_head, shape.hidden, shape.vocab, needs=3)
    model = build(session, "0.5B")
    attempt(session, "numerics", "log-probs, gradients", check_logprobs, model, needs=5)
    attempt(session, "numerics", "sampler against trainer", check_sampler, model, needs=10)
    for engine in ENGINES:
        if engine != "generate":  # the reference
            for half in (False, True) if session.device.type == "cuda" else (False,):
                name = f"greedy {engine} {'bf16' if half else 'fp32'}"
                attempt(session, "numerics", name, check_greedy, model, engine, half, needs=15)


def rollout(session: Session) -> None:
    """Every engine at several batch sizes on every model."""
    for i, name in enumerate(models(session)):
        share = share_of_time(session, 1 / (len(models(session)) - i))
        attempt(share, "rollout", name, rollout_of, name, needs=15, whole=True)


def rollout_of(session: Session, name: str) -> None:
    model = build(session, name)
    for engine in ENGINES:
        for rows in session.load.rollouts:
            attempt(
                session, "rollout", f"{name} {engine} {rows}", engine_speed, model, name, engine, rows,
                needs=8,
            )


def engine_speed(session: Session, model: nn.Module, name: str, engine: str, rows: int) -> dict:
    """Prefill and decode of `rows` sequences. Prefill tokens are those of distinct prompts; a decode step's
    seconds are those of a whole rollout, less one that ends after its first token, over the steps in
    between.
    """
    load, shape = session.load, shape_of(session, name)
    groups = random_groups(shape.vocab, [(load.prompt, ())] * (rows // load.copies))
    prompts = [prompt for prompt, _ in groups]
    run = lambda new: respond(session, model, engine, prompts, load.copies, new)  # noqa: E731
    run(2)
    prefill = seconds(session, run, 1)
    few = max(2, load.response // 10)
    first = (seconds(session, run, few) - prefill) / (few - 1)
    new = load.response if prefill + 1.5 * first * load.response < left(session) or session.tiny else few
    before = allocated_gib(session)
    total, gib = measure(session.device, run, new)
    step = (total - prefill) / (new - 1)
    by_bytes, by_flops = decode_floor(session, shape, rows, new)
    prefill_floor = prefill_flops(shape, len(prompts) * load.prompt) / session.matrix_rate
    return {
        "prefill_tokens_per_s": len(prompts) * load.prompt / prefill, "decode_tokens_per_s": rows / step,
        "step_ms": 1e3 * step, "bandwidth_floor_ms": 1e3 * by_bytes, "flops_floor_ms": 1e3 * by_flops,
        "over_bandwidth_floor": step / by_bytes, "prefill_s": prefill, "prefill_floor_s": prefill_floor,
        "new_tokens": new, "peak_gib": before + gib,
    }


def train(session: Session) -> None:
    """Forward + backward of every model, with and without gradient checkpointing."""
    todo = [(name, checkpointing) for name in models(session) for checkpointing in (False, True)]
    for i, (name, checkpointing) in enumerate(todo):
        title, share = (
            name + " checkpointing" * checkpointing,
            share_of_time(session, 1.5 / (len(todo) - i + 0.5)),
        )
        attempt(share, "train", title, train_speed, name, checkpointing, needs=12)


def train_speed(session: Session, name: str, checkpointing: bool) -> dict:
    """Packed groups against a row per response, in turn, in micro-batches of equally many tokens at most."""
    load, shape = session.load, shape_of(session, name)
    model = build(session, name, checkpointing).train()
    sizes = [(load.prompt, [load.response] * load.copies)] * load.train_prompts
    groups = random_groups(shape.vocab, sizes)
    batches = {
        shared: [
            pack([(groups[i][0], groups[i][1][part]) for i, part in parts], session.device, shared)
            for parts in micro_batches(sizes, load.budget, shared)
        ]
        for shared in (True, False)
    }

    def run(shared: bool, backward: bool) -> None:
        use_attention(model, "train" if shared else "generate")
        for packed in batches[shared]:
            with torch.set_grad_enabled(backward):
                loss = -token_logprobs(model, packed, TEMPERATURE, entropy=False)[0].mean()
            if backward:
                loss.backward()
        model.zero_grad(set_to_none=True)

    times = {(shared, backward): [] for shared in (True, False) for backward in (True, False)}
    before = allocated_gib(session)
    peaks = {
        shared: before + measure(session.device, run, shared, True)[1] for shared in (True, False)
    }  # and warms up
    start = time.perf_counter()
    while len(times[True, True]) < 5 and (
        not times[True, True] or left(session) > 2 * (time.perf_counter() - start)
    ):
        start = time.perf_counter()
        for key, taken in times.items():
            taken.append(seconds(session, run, *key))
    ratios = sorted(b / a for a, b in zip(times[True, True], times[False, True]))
    tokens = [load.train_prompts * (n * load.prompt + load.copies * load.response) for n in (1, load.copies)]
    forward, both = statistics.median(times[True, False]), statistics.median(times[True, True])
    rate = forward_flops(shape, load, load.train_prompts) / both * 3
    plain = (
        forward_flops(shape, load, load.train_prompts, shared=False)
        * 3
        / statistics.median(times[False, True])
    )
    values = {"tokens_per_s": tokens[0] / both, "forward_tokens_per_s": tokens[0] / forward}
    values |= {
        "of_measured_peak": rate / session.matrix_rate,
        "plain_of_measured_peak": plain / session.matrix_rate,
    }
    if session.datasheet:
        values["of_datasheet_peak"] = rate / session.datasheet
    values |= {"ratio_min": ratios[0], "ratio_median": statistics.median(ratios), "ratio_max": ratios[-1]}
    values |= {
        "token_ratio": tokens[1] / tokens[0],
        "of_token_ratio": statistics.median(ratios) * tokens[0] / tokens[1],
    }
    return values | {"peak_gib": peaks[True], "plain_peak_gib": peaks[False], "repetitions": len(ratios)}


def step(session: Session) -> None:
    attempt(session, "step", "1.5B", step_speed, needs=30)


def step_speed(session: Session) -> dict:
    """The second of two GRPO steps by the product's own functions, gradient checkpointing on, KL on, one
    update.
    """
    load, shape = session.load, shape_of(session, "1.5B")
    config = Config(
        prompts_per_step=load.step_prompts, minibatch_prompts=load.step_prompts, group_size=load.copies,
        temperature=TEMPERATURE, max_response_tokens=load.response, max_tokens_per_micro_batch=2 * load.budget,
    )
    policy, reference = build(session, "1.5B", True).train(), build(session, "1.5B").requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    tokenizer = build_tiny_tokenizer(
        ["What is the weather in Rome?"], 300
    )  # its end tokens practically never come
    prompts = random_groups(shape.vocab, [(load.prompt, ())] * load.step_prompts)
    prompts = [Prompt(str(i), ids, i) for i, (ids, _) in enumerate(prompts)]

    ranks = start_ranks(10.0)

    def one(clock: Clock) -> None:
        with clock("rollout"):
            groups = sample_groups(
                policy, tokenizer, prompts, group_size=config.group_size, temperature=config.temperature,
                max_new_tokens=config.max_response_tokens, batch_size=config.rollout_batch_size,
            )
        with clock("reward"):
            for group in groups:
                for text in group.texts:
                    score(text, [])
        with clock("pack"):
            coin = random.Random(0)  # noise earns nothing: without other rewards there would be no gradient
            rewards = torch.tensor([[float(coin.random() < 0.5) for _ in g.texts] for g in groups])
            advantages = group_std(rewards)
            batches = make_minibatches(groups, advantages, config, ranks, uses_shared_prefix(policy))
        with clock("reference"):
            grpo.fixed_logprobs(None, reference, batches, config)
        with clock("update"):
            grpo.update_policy(policy, optimizer, batches, config, ranks)

    try:
        one(Clock())  # warms up and makes the optimizer's state
        clock, before = Clock(), allocated_gib(session)
        total, gib = measure(session.device, one, clock)
    finally:
        torch.distributed.destroy_process_group()
    rows, forward = load.step_prompts * load.copies, forward_flops(shape, load, load.step_prompts)
    prefill = prefill_flops(shape, load.step_prompts * load.prompt) / session.matrix_rate
    adam = (
        28 * count_parameters(policy) / session.copy_rate
    )  # reads weight, gradient, two moments; writes all but one
    floors = {"rollout": prefill + load.response * max(decode_floor(session, shape, rows, load.response))}
    floors |= {"reference": forward / session.matrix_rate, "update": 3 * forward / session.matrix_rate + adam}
    values = {"step_s": total} | {f"{phase}_s": spent for phase, spent in clock.seconds.items()}
    values |= {f"{phase}_floor_s": floor for phase, floor in floors.items()}
    values |= {"update_of_measured_peak": 3 * forward / clock.seconds["update"] / session.matrix_rate}
    if session.datasheet:
        values |= {"update_of_datasheet_peak": 3 * forward / clock.seconds["update"] / session.datasheet}
    return values | {"new_tokens_per_s": rows * load.response / total, "peak_gib": before + gib}


# ---------------------------------------------------------------------------------------------------- profile


def profiles(session: Session) -> None:
    """Where the device's time goes in a decode step and in forward + backward."""
    model = build(session, "1.5B")
    attempt(session, "profile", "1.5B decode step", profile_decode, model, needs=20)
    attempt(session, "profile", "1.5B forward + backward", profile_training, model, needs=20)


def device_work(session: Session, function: Callable, *args) -> tuple[Counter, int]:
    """Seconds of the device by operator (of the CPU where there is no other), and how many kernels ran."""
    cuda = session.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as recorded:
        seconds(session, function, *args)
    rows = recorded.key_averages()
    spent = lambda row: (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1e6  # noqa: E731
    operators = Counter({row.key: spent(row) for row in rows if row.device_type == DeviceType.CPU})
    return operators, sum(row.count for row in rows if row.device_type == DeviceType.CUDA)


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


def summary_of(operators: Counter, kernels: float, wall: float) -> dict:
    """busy_share: the device's time over the wall time without the profiler."""
    total = sum(operators.values())
    top = ", ".join(f"{name} {100 * spent / total:.0f} %" for name, spent in operators.most_common(8))
    return {"wall_ms": 1e3 * wall, "busy_share": total / wall, "kernels": kernels, "operators": top}


def profile_decode(session: Session, model: nn.Module) -> dict:
    """The default engine at the first batch size: a rollout of some steps less one without, per step."""
    load, steps = session.load, min(16, session.load.response - 1)
    groups = random_groups(model.config.vocab_size, [(load.prompt, ())] * (load.rollouts[0] // load.copies))
    run = lambda new: respond(session, model, "shared_prefix", [ids for ids, _ in groups], load.copies, new)  # noqa: E731
    run(2)
    wall = (seconds(session, run, 1 + steps) - seconds(session, run, 1)) / steps
    syncs = (synchronisations(session, run, 1 + steps) - synchronisations(session, run, 1)) / steps
    (long, launched), (prefill, before) = device_work(session, run, 1 + steps), device_work(session, run, 1)
    per_step = Counter({name: (spent - prefill[name]) / steps for name, spent in long.items()})
    return summary_of(per_step, (launched - before) / steps, wall) | {"host_synchronisations": syncs}


def profile_training(session: Session, model: nn.Module) -> dict:
    """Forward and backward of one packed micro-batch, without gradient checkpointing."""
    load = session.load
    groups = random_groups(
        model.config.vocab_size, [(load.prompt, [load.response] * load.copies)] * load.train_prompts
    )
    packed = pack(groups, session.device)
    use_attention(model.train(), "train")

    def run() -> None:
        token_logprobs(model, packed, TEMPERATURE)[0].mean().backward()
        model.zero_grad(set_to_none=True)

    run()
    wall = seconds(session, run)
    return summary_of(*device_work(session, run), wall) | {
        "host_synchronisations": synchronisations(session, run)
    }


# ------------------------------------------------------------------------------------------------------- main

# In this order; a part may use that share of the time that is left when it starts.
PARTS = {
    "numerics": (numerics, 0.4),
    "step": (step, 0.4),
    "train": (train, 0.6),
    "profile": (profiles, 0.3),
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
        cells = [[short(x) if isinstance(x := row[key], float) else str(x) for key in keys] for row in rows]
        lines = [" | ".join(line) for line in ([part, *keys[1:]], ["---"] * len(keys), *cells)]
        parts.append("".join(f"| {line} |\n" for line in lines))
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    """Runs the parts and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="all", help=f"all, or some of {','.join(PARTS)}")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="for everything; what would not fit is skipped"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "gpu.jsonl", help="results are appended here"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny models: to try the program, also without a GPU"
    )
    parser.add_argument(
        "--table", type=Path, help="print the results of this file as Markdown, and nothing else"
    )
    args = parser.parse_args(arguments)
    if args.table:
        print(tables(args.table), end="")
        return 0
    deadline = time.perf_counter() + 60 * args.minutes
    parts = list(PARTS) if args.parts == "all" else args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    cuda = torch.cuda.is_available()
    if not cuda and not args.tiny:
        parser.error("no CUDA device here; --tiny tries the program on the CPU (its figures mean nothing)")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_float32_matmul_precision("highest")  # fp32 is what everything is compared with
    transformers.utils.logging.set_verbosity_error()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    name = torch.cuda.get_device_name() if cuda else "CPU"
    peak = next((tera * 1e12 for part, tera in PEAK_TFLOPS.items() if part in name), 0.0)
    session = Session(
        device, args.tiny, TINY_LOAD if args.tiny else Load(), args.out, deadline, [], datasheet=peak
    )
    session = measure_rates(session)
    emit(session, "machine", name, {
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "cuda": torch.version.cuda,
        "transformers": transformers.__version__, "attention": attention_backend(device),
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else 0.0,
        "copy_gb_per_s": session.copy_rate / 1e9, "matrix_tflops": session.matrix_rate / 1e12,
        "datasheet_tflops": peak / 1e12, "tiny": args.tiny, "meaningless": args.tiny or not cuda,
    })
    for part in parts:
        run, share = PARTS[part]
        attempt(share_of_time(session, share), part, "all of it", run, whole=True)
    bad = [f"{r['part']}: {r['name']}" for r in session.results if "error" in r or r.get("passed") is False]
    missing = [f"{r['part']}: {r['name']}" for r in session.results if "skipped" in r or "out_of_memory" in r]
    if args.tiny:
        print("tiny models: none of these figures means anything, but that the program runs")
    count = len(session.results)
    print(
        json.dumps(
            {"bench": "gpu", "results": count, "failed": bad, "missing": missing, "out": str(args.out)}
        )
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
