"""Predicts the seconds of one GRPO step on 8, 64 and 512 GPUs: rollout with its tail of long responses,
update, network.

    python bench/simulate.py [--model 7b] [--gpus 8,64,512] [--response_tokens 150 --response_p99 600]
    python bench/simulate.py --measured runs/x/log.jsonl --measured_gpus 8    costs from a run of the same
      model and GPU

It is arithmetic, not a measurement. Who samples, who trains what, and how many micro-batches there are is
worked out by the functions that training uses (minibatches.share_out, packing.micro_batches) on response
lengths drawn from a log-normal; seconds per token are estimate.py's roofline, given by an option, or fitted
to a log. All that it assumes is printed below the table; the last line is one line of JSON.
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

from config import Config, ConfigError, load_config
from corpus.sources import read_jsonl
from distributed.batches import share_out
from distributed.fsdp import model_config
from kernel.decode import BLOCK, KEEP_SHARE
from kernel.packing import micro_batches
from model import ModelError
from ops.estimate import BF16, FP32, GB, Assumptions, Shape, cache_bytes, estimate, phases_of_step, shape_of

SIZES = {  # of Qwen2.5, so that nothing is downloaded
    "7b": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
               intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False),
    "14b": dict(hidden_size=5120, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8,
                intermediate_size=13824, vocab_size=152064, tie_word_embeddings=False),
}
P99 = 2.3263  # standard deviations of the 99th percentile
TOKEN_BYTES, LOGPROB_BYTES = 4, 9  # of a pickled Group: 24 kB were measured with 1000 + 5 x 300 tokens


@dataclass(frozen=True)
class Cost:
    """Seconds on one GPU per token: of a prefill, a forward pass, a forward and backward pass. A decode step
    takes `overhead` and the longer of `row` for every row and `read` (the weights) + `kv` for every token of
    K/V.
    """

    prefill: float
    forward: float
    update: float
    row: float
    read: float
    kv: float
    overhead: float = 0.0


@dataclass(frozen=True)
class Network:
    """Bytes per second per GPU inside a node and between nodes; seconds per collective for every doubling of
    the ranks; the share of computing time under which communication hides. objects, hop: pickled objects
    through the CPUs, bytes per second of a node and seconds from rank to rank. unpickle: bytes per second of
    a process.
    """

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
    """One phase of a step: seconds until the last GPU is done; what the mean GPU waits of that for the
    slowest; what is communication that no computing hides.
    """

    seconds: float
    waiting: float = 0.0
    exposed: float = 0.0


def lognormal(mean: float, p99: float) -> tuple[float, float]:
    """(mu, sigma) of the log-normal with this mean and 99th percentile. Raises ConfigError where there is
    none.
    """
    if not 0 < mean <= p99 <= mean * math.exp(P99**2 / 2):
        raise ConfigError(
            f"response_p99 must be from 1 to {math.exp(P99**2 / 2):.1f} times response_tokens, not {p99:g}"
        )
    sigma = P99 - math.sqrt(max(0.0, P99**2 - 2 * math.log(p99 / mean)))
    return math.log(mean) - sigma**2 / 2, sigma


def draw_lengths(prompts: int, copies: int, mean: float, p99: float, cap: int, seed: int) -> list[list[int]]:
    """[prompts][copies]: response tokens of every completion, from 1 to cap, each a function of seed and its
    place.
    """
    mu, sigma = lognormal(mean, p99)
    draw = lambda i, k: random.Random(f"{seed}/length/{i}/{k}").lognormvariate(mu, sigma)  # noqa: E731
    return [[min(cap, max(1, round(draw(i, k)))) for k in range(copies)] for i in range(prompts)]


# ---------------------------------------------------------------------------------------------------- rollout


def decode_seconds(groups: Sequence[Sequence[int]], prompt: int, cost: Cost) -> float:
    """Seconds to decode these groups of response lengths together: until the longest response has ended.

    A step costs by the rows that are computed: those alive, and those that ended since fewer than KEEP_SHARE
    were left.
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
    """One GPU's share: prefill, then batches of whole groups with at most `rows` rows, one after the
    other.
    """
    if not groups:
        return 0.0
    size = max(1, rows // len(groups[0]))
    batches = [groups[i : i + size] for i in range(0, len(groups), size)]
    return len(groups) * prompt * cost.prefill + sum(decode_seconds(batch, prompt, cost) for batch in batches)


def rollout(lengths: Sequence[Sequence[int]], prompt: int, gpus: int, rows: int, cost: Cost) -> Part:
    """Place i of the batch is sampled by GPU i modulo the number of GPUs, as in minibatches.own_places."""
    seconds = [rollout_seconds(lengths[gpu::gpus], prompt, rows, cost) for gpu in range(gpus)]
    return Part(max(seconds), max(seconds) - statistics.mean(seconds))


def schedule(
    lengths: Sequence[Sequence[int]], prompt: int, minibatch: int, budget: int, gpus: int
) -> list[list[list[int]]]:
    """Tokens of every micro-batch: [updates][GPUs][its micro-batches], as minibatches.make_minibatches shares
    them out.
    """
    updates = []
    for start in range(0, len(lengths), minibatch):
        sizes = [(prompt, group) for group in lengths[start : start + minibatch]]
        update = []
        for share in share_out([prompt + sum(group) for _, group in sizes], gpus):
            own = [sizes[i] for i in share]
            parts = micro_batches(own, budget)
            update.append(
                [sum(prompt + sum(own[k][1][responses]) for k, responses in micro) for micro in parts]
            )
        updates.append(update)
    return updates


def passes(
    updates: list[list[list[int]]], per_token: float, communication: float = 0.0, overlap: float = 0.0
) -> Part:
    """One pass over all micro-batches: each lasts as its largest, because all GPUs gather every layer
    together.

    communication: seconds of one micro-batch, of which up to overlap x the computing time is hidden.
    """
    seconds = waiting = exposed = 0.0
    for update in updates:
        for turn in range(max(map(len, update))):
            busy = [micros[turn] * per_token if turn < len(micros) else 0.0 for micros in update]
            wire = max(0.0, communication - overlap * max(busy))
            seconds, exposed = seconds + max(busy) + wire, exposed + wire
            waiting += max(busy) - statistics.mean(busy)
    return Part(seconds, waiting, exposed)


def gather_seconds(size: float, ranks: int, groups: int, net: Network) -> float:
    """An all-gather (or reduce-scatter) of `size` bytes in `groups` collectives over so many ranks."""
    wire = net.inside if ranks <= net.per_node else net.between
    return (ranks - 1) / ranks * size / wire + groups * net.latency * math.ceil(math.log2(ranks))


def sharded_seconds(shape: Shape, gpus: int, sharding: str, net: Network) -> tuple[float, float]:
    """(to gather all weights once in bf16; a whole micro-batch of an update: two gathers and the gradients in
    fp32).
    """
    shards = min(gpus, net.per_node) if sharding == "hsdp" else gpus
    nodes, parts = gpus // shards, shape.layers + 1
    gather = gather_seconds(BF16 * shape.parameters, shards, parts, net)
    update = 2 * gather + gather_seconds(FP32 * shape.parameters, shards, parts, net)
    if nodes > 1:  # the sum across nodes: a reduce-scatter and an all-gather of this GPU's shard
        moved = 2 * (nodes - 1) / nodes * FP32 * shape.parameters / shards
        update += moved / net.between + 2 * parts * net.latency * math.ceil(math.log2(nodes))
    return gather, update


def exchange_seconds(lengths: Sequence[Sequence[int]], prompt: int, gpus: int, net: Network) -> float:
    """minibatches.gather_groups: a ring through the CPUs; every share is as long as the longest, and all are
    unpickled.
    """
    if gpus == 1:
        return 0.0
    sizes = [TOKEN_BYTES * prompt + (TOKEN_BYTES + LOGPROB_BYTES) * sum(group) for group in lengths]
    longest = max(sum(sizes[gpu::gpus]) for gpu in range(gpus))
    return gpus * longest / net.objects + (gpus - 1) * net.hop + sum(sizes) / net.unpickle


# ----------------------------------------------------------------------------------------------------- a step


def simulate_step(
    lengths: Sequence[Sequence[int]], prompt: int, gpus: int, rows: int, config: Config, shape: Shape, cost: Cost,
    net: Network, memory: float,
) -> dict[str, Part]:
    """The phases of one step on so many GPUs. memory: bytes per second of a GPU's, for the optimizer."""
    gather, whole = sharded_seconds(shape, gpus, config.sharding, net)
    updates = schedule(lengths, prompt, config.minibatch_prompts, config.max_tokens_per_micro_batch, gpus)
    exchange = exchange_seconds(lengths, prompt, gpus, net)
    parts = {
        "gather weights": Part(gather, exposed=gather),
        "rollout": rollout(lengths, prompt, gpus, rows, cost),
        "exchange of groups": Part(exchange, exposed=exchange),
    }
    if config.kl_coef:
        parts["reference"] = passes(updates, cost.forward, gather, net.overlap)
    if len(updates) > 1:
        parts["old_logprobs"] = passes(updates, cost.forward, gather, net.overlap)
    parts["update"] = passes(updates, cost.update, whole, net.overlap)
    shards = min(gpus, net.per_node) if config.sharding == "hsdp" else gpus
    return parts | {"optimizer": Part(len(updates) * 7 * FP32 * shape.parameters / shards / memory)}


def predict(
    config: Config, shape: Shape, a: Assumptions, cost: Cost, net: Network, args: argparse.Namespace
) -> dict:
    """The mean over --draws steps for a.gpus GPUs."""
    rows, seconds, steps = estimate(config, shape, a).rows, {}, []
    for draw in range(args.draws):
        lengths = draw_lengths(
            config.prompts_per_step, config.group_size, a.response_tokens, args.response_p99, config.max_response_tokens,
            args.seed + draw,
        )
        parts = simulate_step(
            lengths, a.prompt_tokens, a.gpus, rows, config, shape, cost, net, a.gpu_bandwidth * GB
        )
        for name, part in parts.items():
            seconds[name] = seconds.get(name, 0.0) + part.seconds / args.draws
        new = sum(map(sum, lengths))
        total = [
            sum(getattr(part, key) for part in parts.values()) for key in ("seconds", "waiting", "exposed")
        ]
        steps.append(
            [
                *total,
                new,
                new + len(lengths) * a.prompt_tokens,
                max(map(max, lengths)),
                parts["rollout"].waiting,
            ]
        )
    step, waiting, exposed, new, tokens, longest, slept = (statistics.mean(column) for column in zip(*steps))
    return {
        "gpus": a.gpus, "prompts": config.prompts_per_step, "rows_at_once": rows, "phases": seconds, "step_s": step,
        "waiting_share": waiting / step, "rollout_waiting_share": slept / step, "exposed_share": exposed / step,
        "tokens_per_s_per_gpu": tokens / step / a.gpus, "tokens": tokens, "longest": longest,
        "mean_length": new / config.prompts_per_step / config.group_size,
    }


def roofline(config: Config, shape: Shape, a: Assumptions, overhead: float) -> Cost:
    """Seconds per token as estimate.py counts FLOPs and bytes, at the mean lengths."""
    alone = dataclasses.replace(a, gpus=1)
    every = dataclasses.replace(
        config, kl_coef=config.kl_coef or 1.0
    )  # so that a forward pass is among the phases
    rate = a.gpu_tflops * 1e12 * a.efficiency
    phases = {phase.name: phase.flops / rate for phase in phases_of_step(every, shape, alone, 1)}
    prompts, replies = config.prompts_per_step * a.prompt_tokens, config.group_size * a.response_tokens
    new = config.prompts_per_step * replies
    weights = BF16 * (shape.matrices * shape.layers + shape.vocab * shape.hidden)
    kv = cache_bytes(shape, 1, 1, 0, BLOCK) / BLOCK
    return Cost(
        phases["prefill"] / prompts, phases["reference"] / (prompts + new), phases["update"] / (prompts + new),
        phases["decode"] / new, weights / (a.gpu_bandwidth * GB), kv / (a.gpu_bandwidth * GB), overhead,
    )


def fitted(cost: Cost, log: Path, gpus: int, config: Config, rows: int, tail: float) -> Cost:
    """Costs that give the times of a run's log.jsonl. tail: p99 over mean of its response lengths, which no
    log has.

    The rollout's costs are multiplied by one factor. Raises ConfigError for a file without steps.
    """
    steps = [row for row in read_jsonl(log) if "rollout/tokens_per_s" in row]
    if not steps:
        raise ConfigError(f"measured: {log} has no steps of grpo.py; give the log.jsonl of a run")
    mean = lambda key: statistics.mean(row[key] for row in steps)  # noqa: E731
    changes = {"update": gpus / mean("update/tokens_per_s")}
    if "reference/tokens_per_s" in steps[0]:
        changes["forward"] = gpus / mean("reference/tokens_per_s")
    length, longest = (
        mean("completions/mean_length"),
        round(max(row["completions/max_length"] for row in steps)),
    )
    prompt = round(mean("num_tokens") / config.prompts_per_step - config.group_size * length)
    lengths = draw_lengths(config.prompts_per_step, config.group_size, length, tail * length, longest, 0)
    factor = mean("time/rollout_s") / statistics.mean(
        rollout_seconds(lengths[gpu::gpus], prompt, rows, cost) for gpu in range(gpus)
    )
    changes |= {name: factor * getattr(cost, name) for name in ("prefill", "row", "read", "kv", "overhead")}
    return dataclasses.replace(cost, **changes)


# ----------------------------------------------------------------------------------------------------- output


def table(results: Sequence[dict]) -> list[str]:
    """A column per number of GPUs; efficiency: tokens per second and GPU over those of the first column."""
    first = results[0]["gpus"]
    line = lambda name, form, values: f"{name:<34}" + "".join(f"{format(x, form):>12}" for x in values)  # noqa: E731
    lines = [
        line(name, ",d", [r[name.split()[0].lower()] for r in results])
        for name in ("GPUs", "prompts of a step")
    ]
    for name in results[0]["phases"]:
        lines.append(line(f"{name}, s", ",.2f", [r["phases"][name] for r in results]))
    rows = [
        ("step, s", "step_s", ",.2f"), ("waiting for the slowest, share", "waiting_share", ".2f"),
        ("  of it in the rollout", "rollout_waiting_share", ".2f"),
        ("communication not hidden, share", "exposed_share", ".2f"), ("longest response, tokens", "longest", ",.0f"),
        ("sequences decoded at once", "rows_at_once", ",d"), ("tokens per second and GPU", "tokens_per_s_per_gpu", ",.0f"),
        (f"efficiency against {first} GPUs", "efficiency", ".2f"),
    ]
    return lines + [line(name, form, [r[key] for r in results]) for name, key, form in rows]


def assumptions(
    config: Config, a: Assumptions, cost: Cost, net: Network, args: argparse.Namespace
) -> list[str]:
    """Everything that the prediction takes for granted, a sentence a line."""
    source = f"a roofline: {a.efficiency:g} of {a.gpu_tflops:g} TFLOP/s, {a.gpu_bandwidth:g} GB/s of memory, not measured"
    note = f"Launching a decode step's kernels costs {args.overhead_ms:g} ms, a guess; bench/gpu.py measures step_ms."
    if args.measured:
        source = f"fitted to {args.measured}, on {args.measured_gpus} GPU(s)"
        note = "Communication of that run is in them, and counted a second time."
    wires = f"{net.inside / GB:g} GB/s per GPU inside, {net.between / GB:g} between"
    return [
        "Assumed:",
        f"- Lengths: prompts all {a.prompt_tokens} tokens; responses log-normal, mean {a.response_tokens}, 99th percentile "
        f"{args.response_p99:g}, cut at {config.max_response_tokens}; independent of each other and of the prompt.",
        f"- Seconds per token are {source}:",
        f"  prefill {cost.prefill:.2e}, forward {cost.forward:.2e}, forward + backward {cost.update:.2e};",
        f"  a decode step {cost.overhead:.2e}, and the longer of {cost.row:.2e} per row and {cost.read:.2e} + {cost.kv:.2e} "
        "per token of K/V.",
        f"  They depend neither on the size of a micro-batch nor on the number of GPUs. {note}",
        f"- A GPU decodes up to rollout_batch_size {config.rollout_batch_size} sequences, fewer where their K/V do not fit, "
        "until the longest has ended, then the next ones; the rollout ends with the slowest GPU.",
        "- A group is trained by one GPU: with more GPUs than prompts of an update, the others wait.",
        f"- Sharding {config.sharding}, {net.per_node} GPUs a node, {wires}; a collective takes {1e6 * net.latency:g} us "
        "for every doubling of its ranks; no GPU and no wire is slower than another.",
        f"- Communication hides under {net.overlap:g} of its micro-batch's computing; gathering for the rollout does not.",
        f"- Groups travel pickled: {net.objects / GB:g} GB/s a node, {1e6 * net.hop:g} us from rank to rank, unpickled at "
        f"{net.unpickle / 1e6:g} MB/s.",
        "- Left out: rewards, evaluation, checkpoints, logs, small collectives, failures, and whatever waits for a disk.",
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="7b", help=f"{', '.join(SIZES)} (Qwen2.5), or a folder with a config.json"
    )
    parser.add_argument(
        "--config", default="", help="settings; default: the measured run's, or configs/qwen2.5-SIZE.yaml"
    )
    parser.add_argument("--sharding", choices=("full", "hsdp"), help="default: that of the settings")
    parser.add_argument("--gpus", default="8,64,512", help="numbers of GPUs, comma-separated")
    parser.add_argument(
        "--scale_batch", action="store_true", help="prompts grow with the GPUs, from the first number on"
    )
    parser.add_argument(
        "--response_p99", type=float, default=600.0, help="99th percentile of the response tokens"
    )
    parser.add_argument("--measured", type=Path, help="log.jsonl of a run of this model on this GPU")
    parser.add_argument("--measured_gpus", type=int, default=8, help="GPUs of that run")
    for name, default, help in (
        ("overhead_ms", 10.0, "of a decode step, for launching kernels"),
        ("latency_us", 10.0, "of a collective, per doubling of its ranks"),
        ("overlap", 0.8, "share of computing that can hide communication"), ("objects", 1.25, "GB/s of a node for objects"),
        ("hop_us", 50.0, "from rank to rank, for objects"), ("unpickle", 0.1, "GB/s of a process"),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, help=help)
    for name in ("prefill", "forward", "update"):
        parser.add_argument(f"--{name}_s", type=float, help="seconds per token, in place of the roofline's")
    for f in dataclasses.fields(Assumptions):
        if f.name not in ("gpus", "examples", "host"):
            default = 150 if f.name == "response_tokens" else f.default  # the paper's replies
            parser.add_argument(f"--{f.name}", type=type(f.default), default=default, help=f.metadata["help"])
    parser.add_argument("--draws", type=int, default=3, help="simulated steps, whose mean is shown")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Prints the table, the assumptions and one line of JSON. Raises ConfigError or ModelError with one
    sentence.
    """
    args = parse(arguments)
    ready = ROOT / "configs" / f"qwen2.5-{args.model if args.model in SIZES else '7b'}.yaml"
    settings = args.config or str(args.measured.parent / "config.yaml" if args.measured else ready)
    config = load_config(["--config", settings, *(["--sharding", args.sharding] if args.sharding else [])])
    counts = [int(word) if word.isdigit() else 0 for word in args.gpus.split(",")]
    if min(counts) < 1 or any(n > args.gpus_per_node and n % args.gpus_per_node for n in counts):
        raise ConfigError(
            f"gpus must be numbers like 8,64,512, whole nodes of {args.gpus_per_node}, not {args.gpus!r}"
        )
    shape = shape_of(Qwen2Config(**SIZES[args.model]) if args.model in SIZES else model_config(args.model))
    known = {f.name: getattr(args, f.name) for f in dataclasses.fields(Assumptions) if hasattr(args, f.name)}
    a = Assumptions(**known | {"gpus": counts[0]})
    net = Network(a.gpus_per_node, a.network * GB, a.network_between * GB, 1e-6 * args.latency_us, args.overlap,
                  args.objects * GB, 1e-6 * args.hop_us, args.unpickle * GB)
    cost = roofline(config, shape, a, 1e-3 * args.overhead_ms)
    if args.measured:
        at = dataclasses.replace(a, gpus=args.measured_gpus)
        tail = args.response_p99 / a.response_tokens
        cost = fitted(cost, args.measured, at.gpus, config, estimate(config, shape, at).rows, tail)
    given = {name: getattr(args, f"{name}_s") for name in ("prefill", "forward", "update")}
    cost = dataclasses.replace(cost, **{name: value for name, value in given.items() if value is not None})
    results = []
    for gpus in counts:
        times = gpus / counts[0] if args.scale_batch else 1
        sizes = {
            key: round(getattr(config, key) * times) for key in ("prompts_per_step", "minibatch_prompts")
        }
        own = dataclasses.replace(config, **sizes)
        results.append(predict(own, shape, dataclasses.replace(a, gpus=gpus), cost, net, args))
        results[-1]["efficiency"] = results[-1]["tokens_per_s_per_gpu"] / results[0]["tokens_per_s_per_gpu"]
    updates = config.prompts_per_step // config.minibatch_prompts
    print(
        f"predicted, not measured: {args.model}, {shape.parameters / 1e9:.2f}B parameters, {updates} updates a step"
    )
    print("\n".join([*table(results), "", *assumptions(config, a, cost, net, args)]))
    line = {
        "bench": "simulate",
        "results": results,
        "cost": dataclasses.asdict(cost),
        "network": dataclasses.asdict(net),
    }
    line |= {
        "settings": settings,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ConfigError, ModelError) as error:
        sys.exit(f"error: {error}")
