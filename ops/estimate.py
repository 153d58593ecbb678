"""Memory, FLOPs and time of a training run as arithmetic on the model's config and the settings; plan.py
prints them.

Parameters are counted on a model on the meta device; what autograd keeps per token is counted from the
operations of a decoder layer as Qwen2, Qwen3 and Llama have it, and tests/test_plan.py compares it with
measured bytes. GB are 10^9 bytes. Times are a roofline: each phase takes as long as the slowest of its
arithmetic, memory traffic, network and host traffic, as if all GPUs had equal work and every response the
mean length; the rest of a step (launching kernels, rewards, evaluations, checkpoints) is left out. Kernels
are CUDA's. Counted in full: the last layer, most of which trim_last_layer leaves out for prompts (1 to 2 % of
a large model's work).

An earlier table by hand had 33, 35 and 60 GB for the update of 7B, 8B and 14B models on 8 GPUs, where this
has 35, 36 and 58: it did not know the CUDA context, the norms' fp32 copies and the backward's own memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from config import Config, ConfigError
from distributed.fsdp import KEEP_BYTES, skeleton
from kernel.decode import BLOCK, PLANNED_TOKENS, PREFILL_TOKENS
from kernel.head import CHUNK_LOGITS

GB = 1e9
BF16, FP32 = 2, 4
CONTEXT = 2.0 * GB  # CUDA context, NCCL's and cuBLAS's buffers: what PyTorch's allocator does not see
USABLE = 0.95  # of a GPU's memory; the rest is lost between the allocator's blocks
ENGINE_SHARE = 0.8  # of the free memory that engines.rows_that_fit gives to sequences
SAMPLING = 26  # bytes per logit while tokens are chosen (engines.choose): bf16, two in fp32, two in fp64


def _option(default: float, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Assumptions:
    """The GPUs and the lengths that are planned for: the options of --plan, beside the settings. Defaults:
    H100.
    """

    gpus: int = _option(8, "GPUs, one process each")
    gpu_memory: float = _option(80.0, "GB of each")
    gpu_tflops: float = _option(989.0, "dense bf16 peak of each, TFLOP/s")
    gpu_bandwidth: float = _option(3350.0, "GB/s of its memory")
    efficiency: float = _option(0.45, "share of the peak that matrix products reach")
    gpus_per_node: int = _option(8, "GPUs of a machine")
    network: float = _option(400.0, "GB/s per GPU between the GPUs of a machine")
    network_between: float = _option(50.0, "GB/s per GPU between machines")
    host: float = _option(25.0, "GB/s per GPU to the CPU's memory, and of AdamW there")
    prompt_tokens: int = _option(1000, "mean prompt")
    response_tokens: int = _option(300, "mean response")
    examples: int = _option(0, "training prompts; 0: counted, where data is generated or in local files")


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only transformer. parameters, of_layer (one decoder layer): numbers of weights, tied
    ones once; matrices: those of a layer that are multiplied with every token. qk_norm: queries and keys are
    normed (Qwen3).
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    parameters: int
    of_layer: int
    matrices: int
    qk_norm: bool

    @property
    def root(self) -> int:
        """Parameters outside the decoder layers: FSDP's root group."""
        return self.parameters - self.layers * self.of_layer


@dataclass(frozen=True)
class Phase:
    """One part of a step on one GPU: FLOPs, and bytes that pass its memory, network (inside the machine, and
    between machines) and the way to the host.
    """

    name: str
    flops: float = 0.0
    memory: float = 0.0
    network: float = 0.0
    between: float = 0.0
    host: float = 0.0

    def seconds(self, a: Assumptions) -> dict[str, float]:
        """What each of these takes alone; the phase takes as long as the slowest."""
        compute, network = self.flops / (a.gpu_tflops * 1e12 * a.efficiency), self.network / (a.network * GB)
        between, memory = self.between / (a.network_between * GB), self.memory / (a.gpu_bandwidth * GB)
        return {
            "compute": compute,
            "memory": memory,
            "network": network + between,
            "host": self.host / (a.host * GB),
        }


@dataclass(frozen=True)
class Plan:
    """Bytes per GPU by moment and part, sequences and their K/V, and the phases of a step. See `estimate`."""

    moments: dict[str, dict[str, float]]
    kv_per_token: int  # bytes of one sequence's keys and values per token
    kv_budget: float  # bytes
    rows_admitted: int  # engines.rows_that_fit at the mean prompt
    rows_at_means: int  # that would fit if every response had the mean length
    rows: int  # decoded at once
    micro_batches: int  # per update
    phases: list[Phase]
    host_memory: float  # bytes per machine
    checkpoint: float  # bytes of one

    @property
    def peak(self) -> tuple[str, float]:
        """The moment that needs most, and its bytes."""
        return max(
            ((name, sum(parts.values())) for name, parts in self.moments.items()), key=lambda pair: pair[1]
        )


# -------------------------------------------------------------------------------------------------- the model


def shape_of(model, trust_remote_code: bool = False) -> Shape:
    """The sizes that a model's config means; its parameters are counted on the meta device. Raises
    ConfigError.
    """
    kind = model.model_type
    if any(getattr(model, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ConfigError(
            f"plan: {kind} is a mixture of experts, which the arithmetic does not know; plan a dense model"
        )
    try:
        empty = skeleton(model, torch.float32, trust_remote_code)
        layers = empty.get_decoder().layers
        sizes = (
            model.num_hidden_layers,
            model.hidden_size,
            model.intermediate_size,
            model.num_attention_heads,
        )
    except (ValueError, AttributeError, KeyError):
        raise ConfigError(
            f"plan: {kind} is no decoder-only model of a known kind; plan a Qwen2, Qwen3 or Llama"
        ) from None
    heads, named = sizes[3], dict(layers[0].named_parameters())
    return Shape(
        *sizes, getattr(model, "num_key_value_heads", None) or heads, getattr(model, "head_dim", None) or sizes[1] // heads,
        model.vocab_size, sum(p.numel() for p in empty.parameters()), sum(p.numel() for p in named.values()),
        sum(p.numel() for p in named.values() if p.dim() == 2), any("q_norm" in name for name in named),
    )


# ----------------------------------------------------------------------------------------------------- memory


def state_bytes(shape: Shape, shards: int) -> dict[str, float]:
    """fp32 weights, their gradients and AdamW's two moments on each of `shards` GPUs."""
    own = FP32 * shape.parameters / shards
    return {"weights, fp32": own, "gradients, fp32": own, "AdamW": 2 * own}


def layer_activations(shape: Shape, tokens: float, keys: float, compute: int = BF16) -> float:
    """Bytes that autograd keeps of one decoder layer. keys: rows of K/V that the attention reads, with each
    prompt as often as it is used (packing._GatherSegments); compute: bytes per number of the compute dtype.

    Norms keep their input in fp32, and their output before and after the weight; the attention its queries,
    keys, values, output and sums; the MLP both halves, the activation and the product. torch below 2.13
    without flash-attn repeats keys and values for every head, which is not counted.
    """
    queries, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    norms = 2 * ((4 + 2 * compute) * shape.hidden + 4) + shape.qk_norm * (4 + compute) * (queries + kv)
    attention, mlp = 2 * compute * queries + 4 * shape.heads, 4 * compute * shape.intermediate
    return tokens * (norms + attention + mlp) + keys * 2 * compute * kv


def kept_activations(
    shape: Shape, tokens: float, keys: float, replies: float, checkpointing: bool, compute: int = BF16
) -> float:
    """Bytes kept between forward and backward: of every layer, its input alone (checkpointing) or everything;
    then the last norm's input and normed output and the rotary tables. replies: the tokens that predict
    something: for no others the last layer's MLP is computed, and those of its attention are copied out for
    it (packing.trim_last_layer).
    """
    ends = tokens * ((4 + compute) * shape.hidden + 2 * compute * shape.head_size)
    if checkpointing:
        return ends + shape.layers * tokens * compute * shape.hidden
    trimmed = (tokens - replies) * compute * (4 * shape.intermediate + shape.hidden)
    trimmed -= replies * compute * shape.heads * shape.head_size
    return ends + shape.layers * layer_activations(shape, tokens, keys, compute) - trimmed


def backward_work(shape: Shape, tokens: float, compute: int = BF16) -> float:
    """What a layer's backward holds at its worst besides the activations, some of which are free by then: one
    gradient of the MLP's inner size, and the residual stream's, also in fp32.
    """
    return tokens * (compute * shape.intermediate + (compute + FP32) * shape.hidden)


def head_bytes(shape: Shape, responses: float, compute: int = BF16) -> dict[str, float]:
    """head.py: what it keeps until the backward, and what its forward and backward hold besides, for so many
    tokens.
    """
    chunk = max(1, CHUNK_LOGITS // shape.vocab)
    rows, matrix = min(chunk, responses), shape.vocab * shape.hidden
    kept = compute * responses * shape.hidden + (FP32 * rows * shape.vocab if responses <= chunk else 0)
    rounded = (
        compute if compute < FP32 else 0
    )  # gradients of logits and weight are copied only where they are rounded
    backward = rows * (shape.vocab * (FP32 + rounded) + FP32 * shape.hidden) + matrix * (FP32 + rounded)
    backward += compute * responses * shape.hidden
    return {"kept": kept, "forward": 2 * FP32 * rows * shape.vocab, "backward": backward}


def room(tokens: int) -> int:
    """Tokens that GroupCache has room for when a response of so many is finished (engines._make_room)."""
    size = BLOCK
    while size < tokens:
        size += max(BLOCK, size // 2 // BLOCK * BLOCK)
    return size


def cache_bytes(
    shape: Shape, groups: float, copies: int, prompt: int, response: int, compute: int = BF16
) -> float:
    """K/V of engines.GroupCache: the prompts of so many groups once, and `copies` responses of each."""
    per_token = 2 * compute * shape.layers * shape.kv_heads * shape.head_size
    return per_token * groups * (prompt + copies * room(response))


def rows_that_fit(shape: Shape, free: float, prompt: int, copies: int, max_new_tokens: int) -> int:
    """engines.rows_that_fit with `free` bytes on the GPU."""
    per_row = (
        cache_bytes(shape, 1, 1, 0, BLOCK) / BLOCK * (prompt / copies + min(max_new_tokens, PLANNED_TOKENS))
    )
    return max(1, int(ENGINE_SHARE * free / (per_row + 12 * shape.vocab)))


def _update_moments(config: Config, shape: Shape, a: Assumptions, shards: int) -> dict[str, dict[str, float]]:
    """What an update holds besides its state, at the moments that can be the worst.

    FSDP2 keeps the root group gathered from the forward to its own reduction, has one layer at work, the next
    one gathered and another arriving, and reduces a layer's gradients in fp32 while the next layer's are
    computed. AdamW is no such moment: it takes sharded tensors one by one. Small models keep all layers
    gathered (sharding.KEEP_BYTES).
    """
    copies, group = config.group_size, a.prompt_tokens + config.group_size * a.response_tokens
    # A prompt + response above the budget stands alone, and long ones will come.
    tokens = max(config.max_tokens_per_micro_batch, config.max_prompt_tokens + config.max_response_tokens)
    keys = tokens * (a.prompt_tokens + copies * (a.prompt_tokens + a.response_tokens)) / group
    replies = tokens * copies * a.response_tokens / group
    kept = kept_activations(shape, tokens, keys, replies, config.gradient_checkpointing)
    whole = layer_activations(shape, tokens, keys) if config.gradient_checkpointing else 0.0
    head = head_bytes(shape, replies)
    root, layer = BF16 * shape.root, BF16 * shape.of_layer
    several = (layer, 3 * layer) if FP32 * shape.parameters > KEEP_BYTES else (shape.layers * layer,) * 2
    head_gradient = BF16 * shape.vocab * shape.hidden
    gradients = head_gradient + layer + 2 * FP32 * shape.of_layer
    reduced = root + FP32 * shape.root * (1 + 1 / shards)
    stream = BF16 * tokens * shape.hidden
    loss = head["kept"] + max(head["forward"], head["backward"] + stream)
    return {
        "head": {"gathered weights, bf16": root + several[0], "activations": kept, "LM head": loss},
        "layers": {
            "gathered weights, bf16": root + several[1], "unsharded gradients": gradients, "activations": kept + whole,
            "backward's working memory": backward_work(shape, tokens),
        },
        "root": {"gathered weights, bf16": root, "unsharded gradients": reduced, "backward's working memory": stream},
    }


def _rollout_moment(
    config: Config, shape: Shape, a: Assumptions, static: float
) -> tuple[dict[str, float], float, int, int, int]:
    """Parts of the rollout besides `static` bytes; then the K/V budget, rows admitted, rows at the means,
    rows used.
    """
    copies, prompt = config.group_size, a.prompt_tokens
    policy = BF16 * shape.parameters
    free = max(0.0, a.gpu_memory * GB - static - policy)
    admitted = rows_that_fit(shape, free, prompt, copies, config.max_response_tokens)
    row = cache_bytes(shape, 1 / copies, copies, prompt, a.response_tokens)
    at_means = int(ENGINE_SHARE * free / (row + 12 * shape.vocab))
    wanted = min(config.rollout_batch_size, math.ceil(config.prompts_per_step / a.gpus) * copies)
    groups = max(1, min(wanted, admitted) // copies)
    # Batches that grow too long are tried again with half as many groups, and rows that have finished are
    # dropped.
    longest = cache_bytes(shape, 1, 1, config.max_prompt_tokens, config.max_response_tokens)
    prefilled = min(groups * prompt, max(PREFILL_TOKENS, config.max_prompt_tokens))
    prefill = prefilled * (3 * BF16 * shape.intermediate + (3 * BF16 + FP32) * shape.hidden)
    parts = {
        "whole policy, bf16": policy,
        "keys and values": max(longest, cache_bytes(shape, groups, copies, prompt, a.response_tokens)),
        "prefill or sampling": max(prefill, SAMPLING * groups * copies * shape.vocab),
    }
    return parts, max(0.0, ENGINE_SHARE * free), admitted, at_means, groups * copies


# ------------------------------------------------------------------------------------------ FLOPs and traffic


def count_micro_batches(config: Config, a: Assumptions) -> tuple[int, int]:
    """(micro-batches of an update on one GPU, how often each prompt is computed), groups having the mean
    lengths.
    """
    groups, copies = math.ceil(config.minibatch_prompts / a.gpus), config.group_size
    budget, group = config.max_tokens_per_micro_batch, a.prompt_tokens + copies * a.response_tokens
    if group <= budget:
        return math.ceil(groups / (budget // group)), 1
    together = max(1, (budget - a.prompt_tokens) // a.response_tokens)
    parts = math.ceil(copies / together)
    return groups * parts, parts


def phases_of_step(config: Config, shape: Shape, a: Assumptions, rows: int) -> list[Phase]:
    """Work of one GPU in one step; 2 FLOPs per multiply-add. rows: sequences decoded at once."""
    copies, prompt, response = config.group_size, a.prompt_tokens, a.response_tokens
    groups, updates = config.prompts_per_step / a.gpus, config.prompts_per_step // config.minibatch_prompts
    micro, parts = count_micro_batches(config, a)
    linear, head = 2 * shape.matrices * shape.layers, 2 * shape.vocab * shape.hidden
    pair = 4 * shape.heads * shape.head_size * shape.layers  # scores, then values
    own_pairs, reply_pairs = prompt * (prompt + 1) / 2, response * prompt + response * (response + 1) / 2
    body = groups * (
        (parts * prompt + copies * response) * linear + pair * (parts * own_pairs + copies * reply_pairs)
    )
    logits = groups * copies * response * head
    replies = config.max_tokens_per_micro_batch * copies * response / (prompt + copies * response)
    chunked = replies > CHUNK_LOGITS // shape.vocab  # what is more than a chunk is computed again
    shards, nodes = _sharding(config, a)
    weights, own = BF16 * shape.parameters, FP32 * shape.parameters / shards
    offload, offload_reference = _offloads(config)
    sent = (shards - 1) / shards * BF16 * shape.parameters  # bytes that a GPU receives to gather the weights
    wire = "network" if shards <= a.gpus_per_node else "between"

    def gather(times: float, from_host: float) -> dict[str, float]:
        return {wire: times * sent, "host": times * from_host}

    total, master = micro * updates, own if offload else 0.0
    batches = max(1, math.ceil(groups * copies / rows))
    at_once = groups * copies / batches
    kv = at_once * cache_bytes(shape, 1, 1, 0, BLOCK) / BLOCK * (prompt / copies + response / 2)
    decoded = groups * copies * (response * (linear + head) + pair * reply_pairs)
    read = batches * response * (BF16 * (shape.matrices * shape.layers + shape.vocab * shape.hidden) + kv)
    result = [
        Phase("gather weights", memory=2 * weights, **gather(1, master)),
        Phase("prefill", groups * (prompt * linear + head + pair * own_pairs), batches * weights),
        Phase("decode", decoded, read),
    ]
    if config.kl_coef:
        stored = weights / shards if offload_reference else 0.0
        result.append(Phase("reference", body + logits, total * weights, **gather(total, stored)))
    if updates > 1:
        result.append(Phase("old_logprobs", body + logits, total * weights, **gather(total, master)))
    # Forward 1, backward 2, and once more what was not kept; gathered twice, gradients (fp32) scattered once.
    flops = body * (3 + config.gradient_checkpointing) + logits * (3 + chunked)
    traffic = {wire: total * 4 * sent, "host": total * 3 * master}
    if nodes > 1:  # hsdp adds the gradients up across machines
        traffic["between"] = total * 2 * (nodes - 1) / nodes * own
    result.append(Phase("update", flops, total * 3 * weights, **traffic))
    moved = updates * 7 * own  # weight, gradient and moments are read, all but the gradient written
    return [*result, Phase("optimizer", **{"host" if offload else "memory": moved})]


# --------------------------------------------------------------------------------------------------- the plan


def _sharding(config: Config, a: Assumptions) -> tuple[int, int]:
    """(GPUs that share one copy of the state, copies)."""
    shards = min(a.gpus, a.gpus_per_node) if config.sharding == "hsdp" else a.gpus
    return shards, a.gpus // shards


def _offloads(config: Config) -> tuple[bool, bool]:
    """Whether the optimizer (with weights and gradients) and the reference are on the CPU."""
    return config.offload == "all", bool(config.offload)


def estimate(config: Config, shape: Shape, a: Assumptions) -> Plan:
    """The plan of a run on the default engine. Pure arithmetic."""
    shards, _ = _sharding(config, a)
    offload, offload_reference = _offloads(config)
    reference = BF16 * shape.parameters / shards if config.kl_coef else 0.0
    state = state_bytes(shape, shards)
    always = {} if offload else dict(state)
    if reference and not offload_reference:
        always["reference, bf16"] = reference
    if reference and BF16 * shape.parameters <= KEEP_BYTES:  # sharding.py leaves a small model gathered
        always["reference, gathered"] = BF16 * shape.parameters
    always["CUDA and NCCL"] = CONTEXT
    between = {
        name: size for name, size in always.items() if not name.startswith("gradients")
    }  # set to None by then
    rollout, budget, admitted, at_means, rows = _rollout_moment(config, shape, a, sum(between.values()))
    moments = {name: always | parts for name, parts in _update_moments(config, shape, a, shards).items()}
    on_node = min(a.gpus, a.gpus_per_node)
    host = on_node * (sum(state.values()) * offload + reference * offload_reference)
    return Plan(
        moments | {"rollout": between | rollout},
        round(cache_bytes(shape, 1, 1, 0, BLOCK) / BLOCK), budget, admitted, at_means, rows,
        count_micro_batches(config, a)[0], phases_of_step(config, shape, a, rows), host, 3 * FP32 * shape.parameters,
    )
