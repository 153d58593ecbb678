"""`python grpo.py --plan`: whether a run fits its GPUs, how long it would take, and what to change. No
weights are loaded.

    python grpo.py --config configs/qwen2.5-7b.yaml --plan --gpus 8 --gpu_memory 80

The arithmetic, and what it assumes, is in estimate.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import Config, ConfigError, check_positions, load_config
from corpus.tiny_model import LAYERS, VOCABULARY, tiny_config
from data import load_splits
from distributed.fsdp import model_config
from model import ModelError
from ops.estimate import GB, USABLE, Assumptions, Plan, Shape, estimate, shape_of

MOST_GPUS = 1024  # that are tried when more are needed
STEP = 1024  # advised micro-batches are multiples of it


def main(arguments: list[str]) -> None:
    """Prints the plan of the run that the settings describe. Options: the fields of Assumptions, before or
    after them.

    Raises ConfigError with one sentence for an option or setting that cannot be planned.
    """
    options, rest = split_options(arguments)
    if "--help" in rest:
        for f in dataclasses.fields(Assumptions):
            print(f"--{f.name:<28}{f.default!r:<30} {f.metadata['help']}")
    config = load_config(rest)
    model = read_model_config(config)
    check(config, model, options)
    options = dataclasses.replace(options, examples=options.examples or count_examples(config))
    print(report(config, shape_of(model, config.trust_remote_code), options))


def split_options(arguments: list[str]) -> tuple[Assumptions, list[str]]:
    """(the options of --plan, the other arguments). Raises ConfigError for values that are no positive
    numbers.
    """
    fields = {f.name: f for f in dataclasses.fields(Assumptions)}
    given: dict[str, Any] = {}
    rest, waiting = [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in fields:
            rest.append(argument)
            continue
        if not equals:
            text = waiting.pop(0) if waiting and not waiting[0].startswith("--") else ""
        kind, lowest = type(fields[name].default), 0 if name == "examples" else 1e-9
        try:
            given[name] = kind(text)
            valid = lowest <= given[name] < math.inf
        except ValueError:
            valid = False
        if not valid:
            raise ConfigError(
                f"{name} must be a {'whole ' if kind is int else ''}number above 0, not {text!r}"
            )
    return Assumptions(**given), rest


def read_model_config(config: Config):
    """The model's config.json, from its folder or the hub; the sizes of model.build_tiny_model for "tiny"."""
    if config.model == "tiny":
        return tiny_config(VOCABULARY, config.tiny_hidden, LAYERS)
    try:
        return model_config(config.model, config.trust_remote_code)
    except ModelError as error:
        reason = str(error).rstrip(".")
        raise ConfigError(
            f"{reason}; give a folder with a config.json or the id of a model that can be reached"
        ) from None


def check(config: Config, model, a: Assumptions) -> None:
    """Raises ConfigError for numbers that do not go together, as the run itself would."""
    if a.gpus > a.gpus_per_node and a.gpus % a.gpus_per_node:
        raise ConfigError(f"gpus ({a.gpus}) must be a multiple of gpus_per_node ({a.gpus_per_node})")
    check_positions(config, model.max_position_embeddings)
    for key in ("prompt_tokens", "response_tokens"):
        if getattr(a, key) > getattr(config, f"max_{key}"):
            raise ConfigError(
                f"{key} ({getattr(a, key)}), a mean, is above max_{key} ({getattr(config, f'max_{key}')})"
            )
    if a.efficiency > 1:
        raise ConfigError(f"efficiency must be a share of the peak, at most 1, not {a.efficiency}")


def count_examples(config: Config) -> int:
    """Training prompts, where they can be counted without a download; else 0."""
    if config.data == "synthetic":
        return round(config.synthetic_train * (config.data_to - config.data_from))
    paths = [part.strip() for part in f"{config.data},{config.test_data}".split(",") if part.strip()]
    return len(load_splits(config).train) if config.data and all(Path(path).exists() for path in paths) else 0


# ---------------------------------------------------------------------------------------------------- verdict


def fits(plan: Plan, a: Assumptions) -> bool:
    """Whether every moment leaves the allocator the room that it loses between its blocks."""
    return plan.peak[1] <= USABLE * a.gpu_memory * GB


def _remedies(config: Config) -> dict[str, Any]:
    """Settings that save memory, with the most saving value of each, cheapest first; without those that are
    set.
    """
    longest = config.max_prompt_tokens + config.max_response_tokens
    remedies: dict[str, Any] = {}
    if config.max_tokens_per_micro_batch > longest:
        remedies["max_tokens_per_micro_batch"] = longest
    if not config.gradient_checkpointing:
        remedies["gradient_checkpointing"] = True
    if config.sharding == "hsdp":
        remedies["sharding"] = "full"
    if config.offload != "all":
        remedies["offload"] = "reference" if config.kl_coef and not config.offload else "all"
    return remedies


def _larger_micro_batch(config: Config, changes: dict[str, Any], shape: Shape, a: Assumptions) -> int:
    """The largest multiple of STEP above changes' micro-batch that still fits; else changes' own."""
    smallest, largest = (
        changes["max_tokens_per_micro_batch"] // STEP + 1,
        config.max_tokens_per_micro_batch // STEP,
    )
    for tokens in range(largest * STEP, (smallest - 1) * STEP, -STEP):
        if fits(
            estimate(
                dataclasses.replace(config, **changes | {"max_tokens_per_micro_batch": tokens}), shape, a
            ),
            a,
        ):
            return tokens
    return changes["max_tokens_per_micro_batch"]


def advise(config: Config, shape: Shape, a: Assumptions) -> tuple[dict[str, Any], int]:
    """(the fewest and cheapest settings with which the run fits these GPUs, or none; the fewest GPUs that
    would do with the settings as they are, doubling; 0 where no number does).
    """
    remedies = _remedies(config)
    found: dict[str, Any] = {}
    for keys in _subsets(list(remedies)):
        changes = {key: remedies[key] for key in keys}
        if fits(estimate(dataclasses.replace(config, **changes), shape, a), a):
            found = changes
            break
    if "max_tokens_per_micro_batch" in found:
        found["max_tokens_per_micro_batch"] = _larger_micro_batch(config, found, shape, a)
    return found, next((n for n in _more_gpus(config, a) if _fits_on(config, shape, a, n)), 0)


def _subsets(keys: list[str]) -> Iterator[tuple[str, ...]]:
    for size in range(1, len(keys) + 1):
        yield from itertools.combinations(keys, size)


def _more_gpus(config: Config, a: Assumptions) -> Iterator[int]:
    gpus = a.gpus * 2
    while gpus <= min(MOST_GPUS, config.minibatch_prompts):
        yield gpus
        gpus *= 2


def _fits_on(config: Config, shape: Shape, a: Assumptions, gpus: int) -> bool:
    more = dataclasses.replace(a, gpus=gpus)
    return (gpus <= a.gpus_per_node or gpus % a.gpus_per_node == 0) and fits(
        estimate(config, shape, more), more
    )


def verdict(config: Config, shape: Shape, a: Assumptions) -> str:
    """One line: whether it fits, and if not, what to change."""
    plan = estimate(config, shape, a)
    moment, peak = plan.peak
    need = f"{peak / GB:.1f} of {a.gpu_memory:g} GB at the worst moment ({moment})"
    if fits(plan, a):
        less = f"; rollout_batch_size {plan.rows} would do: more sequences are not decoded at once"
        return f"fits: {need}{less if plan.rows_admitted < config.rollout_batch_size else ''}"
    found, gpus = advise(config, shape, a)
    ways = []
    if found:
        ways.append("set " + ", ".join(f"{key} {str(value).lower()}" for key, value in found.items()))
    if gpus and (gpus <= 8 * a.gpus or not found):
        ways.append(f"take {gpus} GPUs")
    if not ways:
        least = estimate(dataclasses.replace(config, **_remedies(config)), shape, a).peak[1] / USABLE / GB
        ways.append(
            f"take GPUs of {math.ceil(least)} GB or a smaller model: with every saving it needs that much"
        )
    return f"does not fit: {need}; {' or '.join(ways)}"


# ------------------------------------------------------------------------------------------------------ table


def report(config: Config, shape: Shape, a: Assumptions) -> str:
    """The tables as text; the last line is the verdict."""
    plan = estimate(config, shape, a)
    title = f"{config.model}: {shape.parameters / 1e9:.2f}B parameters on {a.gpus} x {a.gpu_memory:g} GB"
    parts = [
        title,
        "",
        *memory_table(plan),
        "",
        *rollout_lines(config, plan, a),
        "",
        *time_table(config, plan, a),
        "",
    ]
    copies = config.keep_checkpoints + 1
    size = plan.checkpoint / GB
    parts.append(
        f"disk: {size:.0f} GB a checkpoint, {copies * size:.0f} GB for {copies}: keep_checkpoints and the next one"
    )
    if plan.host_memory:
        parts.append(f"CPU memory for what is offloaded: {plan.host_memory / GB:.0f} GB a machine")
    return "\n".join([*parts, verdict(config, shape, a)])


def memory_table(plan: Plan) -> list[str]:
    """GB per GPU: a row for each part, a column for each moment."""
    names = list(dict.fromkeys(part for parts in plan.moments.values() for part in parts))
    heads = {"head": "LM head", "layers": "layers", "root": "last reduce", "rollout": "rollout"}
    lines = [f"{'GB per GPU':<28}" + "".join(f"{heads[moment]:>12}" for moment in plan.moments)]
    for name in names:
        sizes = [
            f"{parts[name] / GB:12.1f}" if name in parts else " " * 12 for parts in plan.moments.values()
        ]
        lines.append(f"{name:<28}" + "".join(sizes).rstrip())
    return [
        *lines,
        f"{'sum':<28}" + "".join(f"{sum(parts.values()) / GB:12.1f}" for parts in plan.moments.values()),
    ]


def rollout_lines(config: Config, plan: Plan, a: Assumptions) -> list[str]:
    """The K/V budget and what it means in sequences."""
    wanted, size = config.rollout_batch_size, plan.kv_per_token
    room = "fits" if plan.rows_admitted >= wanted else "is more than fits"
    return [
        f"K/V: {size / 1024:g} KiB per token of a sequence; room for {plan.kv_budget / GB:.1f} GB, "
        f"{plan.kv_budget / size:,.0f} tokens",
        f"sequences at once: {plan.rows_at_means:,} at the mean lengths ({a.prompt_tokens} + {a.response_tokens} tokens), "
        f"{plan.rows_admitted:,} as the engine plans",
        f"rollout_batch_size {wanted} {room}: {plan.rows} are decoded at once",
    ]


def time_table(config: Config, plan: Plan, a: Assumptions) -> list[str]:
    """FLOPs over all GPUs and seconds of each phase of a step, then of a step, an epoch and the run."""

    def line(name: str, flops: float, seconds: float, note: str) -> str:
        return f"{name:<28}{flops / 1e15:12,.1f}{seconds:12,.2f}  {note}"

    lines = [f"{'phase of a step':<28}{'PFLOP':>12}{'seconds':>12}  bound by"]
    for phase in plan.phases:
        seconds = phase.seconds(a)
        bound = max(seconds, key=seconds.__getitem__)
        lines.append(line(phase.name, phase.flops * a.gpus, seconds[bound], bound))
    step, flops = (
        sum(max(p.seconds(a).values()) for p in plan.phases),
        sum(p.flops for p in plan.phases) * a.gpus,
    )
    updates, steps = config.prompts_per_step // config.minibatch_prompts, config.steps
    lines.append(line("step", flops, step, f"{updates} updates of {plan.micro_batches} micro-batches"))
    if a.examples:
        each = a.examples / config.prompts_per_step
        lines.append(line("epoch", flops * each, step * each, f"{each:.1f} steps, {a.examples:,} prompts"))
        steps = steps or max(1, math.ceil(config.epochs * each))
    if steps:
        lines.append(
            line("run", flops * steps, step * steps, f"{steps} steps, {step * steps / 3600:.1f} hours")
        )
    if not a.examples:
        lines.append("epoch: unknown; give --examples N, the number of training prompts")
    sent, wire = (
        sum(p.network + p.between for p in plan.phases),
        sum(p.seconds(a)["network"] for p in plan.phases),
    )
    lines.append(
        f"communication of FSDP: {sent / GB:.0f} GB per GPU and step, {wire:.2f} s, mostly while computing"
    )
    if host := sum(p.host for p in plan.phases):
        lines.append(
            f"to and from the CPU: {host / GB:.0f} GB per GPU and step, AdamW included, {host / a.host / GB:.1f} s"
        )
    return lines
