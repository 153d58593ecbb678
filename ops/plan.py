"""`python -m ops.plan --config C`: whether a run fits its GPUs, what to change, and how long a step takes.

    python -m ops.plan --config configs/qwen2.5-7b.yaml --gpus 8 --gpu_memory 80

Arithmetic on the model's sizes and the settings; no weights are loaded. Memory is counted from a
decoder layer of Qwen2, Qwen3 or Llama; tests/test_plan.py compares it with measured bytes. Times are a
roofline; network, offloading, launches, rewards and evaluations come on top. GB are 10^9 bytes.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from config import Config, ConfigError, load_config
from corpus.tiny_model import LAYERS, VOCABULARY, tiny_config
from distributed.ranks import run_script
from distributed.weights import model_config, skeleton
from kernel.decode import PASS_TOKENS, tokens_of_pass
from kernel.grid import PREFILL_TOKENS, ROOM
from kernel.head import CHUNK_LOGITS
from kernel.lora import adapters, add_adapters

GB = 1e9
BF16, FP32 = 2, 4
CONTEXT = 2.0 * GB  # CUDA context, NCCL's and cuBLAS's buffers: what PyTorch's allocator does not see
USABLE = 0.95  # of a GPU's memory; the rest is lost between the allocator's blocks
EFFICIENCY = 0.45  # share of the peak that matrix products reach
ENGINE_SHARE = 0.8  # of the free memory that kernel.decode.rows_that_fit gives to sequences
SAMPLING = 16  # bytes per logit in kernel.decode.choose: four in fp32
CONFIGS = Path(__file__).parents[1] / "configs"
# The models of configs/, for a plan offline: hidden and MLP size, layers, heads, K/V heads, vocabulary.
KNOWN = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (576, 1536, 30, 9, 3, 49152),
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 4864, 24, 14, 2, 151936),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 8960, 28, 12, 2, 151936),
    "Qwen/Qwen2.5-3B-Instruct": (2048, 11008, 36, 16, 2, 151936),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 18944, 28, 28, 4, 152064),
    "Qwen/Qwen2.5-14B-Instruct": (5120, 13824, 48, 40, 8, 152064),
    "meta-llama/Meta-Llama-3-8B-Instruct": (4096, 14336, 32, 32, 8, 128256),
    "meta-llama/Llama-3.1-8B-Instruct": (4096, 14336, 32, 32, 8, 128256),
}


@dataclass(frozen=True)
class Assumptions:
    """The GPUs (memory in GB, dense bf16 peak, bandwidth in GB/s; defaults: H100) and the mean lengths."""

    gpus: int = 8
    gpu_memory: float = 80.0
    gpu_tflops: float = 989.0
    gpu_bandwidth: float = 3350.0
    gpus_per_node: int = 8
    prompt_tokens: int = 1000
    response_tokens: int = 300


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only transformer. parameters, of_layer (one decoder layer), adapters (LoRA's at rank
    1), reference (the KL's): numbers of weights, tied ones once. qk_norm: of queries and keys (Qwen3).
    kv_bytes: of a token.
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
    adapters: int
    reference: int
    qk_norm: bool
    kv_bytes: int


def start_config(config: Config) -> PreTrainedConfig:
    """The config of the model to start from; of one that a run of configs/ has yet to write, that run's."""
    model = config.model
    if model == "tiny":
        return tiny_config(VOCABULARY, config.tiny_hidden, LAYERS)
    if Path(model).name == "model" and not Path(model).exists():
        runs = [load_config(["--config", str(path)]) for path in sorted(CONFIGS.rglob("*.yaml"))]
        model = next((run.model for run in runs if Path(run.run_dir, "model") == Path(model)), model)
    if model in KNOWN and not Path(model).exists():
        hidden, mlp, layers, heads, kv_heads, vocab = KNOWN[model]
        return (Qwen2Config if model.startswith("Qwen/") else LlamaConfig)(
            hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, vocab_size=vocab, tie_word_embeddings=hidden < 3000,  # below 7B
        )
    return model_config(model, config.trust_remote_code)


def adapter_weights(model: torch.nn.Module, targets: str) -> int:
    """Weights of LoRA's adapters of rank 1, which this puts on a skeleton. Raises ConfigError."""
    try:
        add_adapters(model, 1, 1.0, targets, 0, torch.device("meta"))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return sum(parameter.numel() for parameter in adapters(model).values())


def shape_of(model: PreTrainedConfig, config: Config) -> Shape:
    """The sizes in a model's config; weights have no memory. Raises ConfigError."""
    try:
        empty = skeleton(model, torch.float32, config.trust_remote_code)
        model = model.get_text_config()
        layer, heads = empty.get_decoder().layers[0], model.num_attention_heads
        size = getattr(model, "head_dim", None) or model.hidden_size // heads
        shape = Shape(
            model.num_hidden_layers, model.hidden_size, layer.mlp.down_proj.in_features,  # not in an MoE
            heads, model.num_key_value_heads, size, model.vocab_size,
            sum(p.numel() for p in empty.parameters()), sum(p.numel() for p in layer.parameters()),
            0, 0, hasattr(layer.self_attn, "q_norm"),
            2 * BF16 * model.num_hidden_layers * model.num_key_value_heads * size,
        )
    except (ValueError, AttributeError, KeyError):
        raise ConfigError(f"plan: {model.model_type} is not a dense model like Qwen2, Qwen3, Llama") from None
    reference = shape.parameters
    if config.reference:
        other = start_config(replace(config, model=config.reference))
        reference = skeleton(other, torch.float32, config.trust_remote_code).num_parameters()
    return replace(shape, reference=reference, adapters=adapter_weights(empty, config.lora_targets))


def layer_activations(shape: Shape, tokens: float, keys: float) -> float:
    """Bytes that autograd keeps of one decoder layer in bf16. keys: rows of K/V that its attention reads.

    Norms keep their input in fp32, and their output before and after the weight; the attention its queries,
    keys, values, output and sums; the MLP both halves, the activation and the product.
    """
    queries, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    norms = 2 * (8 * shape.hidden + 4) + shape.qk_norm * 6 * (queries + kv)
    attention, mlp = 2 * BF16 * queries + 4 * shape.heads, 4 * BF16 * shape.intermediate
    return tokens * (norms + attention + mlp) + keys * 2 * BF16 * kv


def update_bytes(config: Config, shape: Shape, a: Assumptions) -> dict[str, float]:
    """What an update holds besides its state, when the LM head or a layer is in its backward.

    FSDP2 keeps embeddings and head gathered, has one layer at work, the next one gathered and another
    arriving, and reduces a layer's gradients in fp32 while the next layer's are computed.
    """
    copies, group = config.group_size, a.prompt_tokens + config.group_size * a.response_tokens
    # A prompt + response above the budget stands alone, and long ones will come.
    tokens = max(config.max_tokens_per_micro_batch, config.max_prompt_tokens + config.max_response_tokens)
    keys = tokens + tokens * copies * a.prompt_tokens / group
    replies = tokens * copies * a.response_tokens / group
    stream, of_layer = BF16 * tokens * shape.hidden, layer_activations(shape, tokens, keys)
    # The last norm's input (fp32) and output, rotary tables, what the head reads, and every layer.
    kept = 3 * stream + 2 * BF16 * tokens * shape.head_size + BF16 * replies * shape.hidden
    kept += shape.layers * (stream if config.gradient_checkpointing else of_layer)
    chunk = min(CHUNK_LOGITS // shape.vocab, replies)  # tokens whose logits kernel/head.py holds at a time
    kept += FP32 * chunk * shape.vocab * (chunk == replies)  # a single chunk is kept
    head = stream + BF16 * replies * shape.hidden + FP32 * chunk * shape.hidden
    head += (BF16 + FP32) * shape.vocab * chunk  # gradients of logits, rounded
    layer = 3 * stream + BF16 * tokens * shape.intermediate + of_layer * config.gradient_checkpointing
    if config.lora_rank:
        layer += BF16 * tokens * shape.intermediate  # an adapter's output, beside its layer's
    else:  # gradients of weights, unsharded
        head += (BF16 + FP32) * shape.vocab * shape.hidden
        layer += BF16 * (shape.vocab * shape.hidden + shape.of_layer) + 2 * FP32 * shape.of_layer
    gathered = BF16 * shape.of_layer
    return {
        "embeddings and head, bf16": BF16 * (shape.parameters - shape.layers * shape.of_layer),
        "activations": kept,
        "backward": max(gathered + head, 3 * gathered + layer),
    }


def cache_bytes(shape: Shape, groups: float, copies: int, prompt: int, response: int) -> float:
    """kernel.grid.Batch: each prompt once, and for `copies` responses room that grows by half."""
    room = ROOM
    while room < response:
        room += max(ROOM, room // 2 // ROOM * ROOM)
    return shape.kv_bytes * groups * (prompt + copies * room)


def estimate(config: Config, shape: Shape, a: Assumptions) -> tuple[dict[str, dict[str, float]], int]:
    """Bytes per GPU by moment (update, rollout) and part; how many sequences are decoded at once."""
    shards = min(a.gpus, a.gpus_per_node) if config.sharding == "hsdp" else a.gpus
    lora, own = config.lora_rank > 0, (config.offload != "all") * shape.parameters / shards
    trained = config.lora_rank * shape.adapters if lora else own  # adapters are whole on every GPU
    # Without a --reference, the weights under the adapters are the reference.
    reference = config.kl_coef > 0 and not config.offload and (config.reference != "" or not lora)
    frozen = lora * own + reference * shape.reference / shards
    always = {"CUDA and NCCL": CONTEXT, "frozen weights, bf16": BF16 * frozen}
    always |= {"trained weights, fp32": FP32 * trained, "AdamW": 2 * FP32 * trained}
    # The rollout: as many sequences as kernel.decode.rows_that_fit has room for.
    copies, prompt, policy = config.group_size, a.prompt_tokens, BF16 * shape.parameters
    length = prompt / copies + tokens_of_pass(config.max_response_tokens, PASS_TOKENS)
    free = ENGINE_SHARE * (a.gpu_memory * GB - sum(always.values()) - policy)
    rows = int(free / (shape.kv_bytes * length + SAMPLING * shape.vocab))
    wanted = math.ceil(config.prompts_per_step / a.gpus) * copies
    groups = max(1, min(rows, config.rollout_batch_size, wanted) // copies)
    prefilled = min(groups * prompt, max(PREFILL_TOKENS, config.max_prompt_tokens))
    prefill = prefilled * (6 * shape.intermediate + 10 * shape.hidden)
    longest = cache_bytes(shape, 1, 1, config.max_prompt_tokens, config.max_response_tokens)
    rollout = {
        "whole policy, bf16": policy,
        "keys and values": max(longest, cache_bytes(shape, groups, copies, prompt, a.response_tokens)),
        "prefill or sampling": max(prefill, SAMPLING * groups * copies * shape.vocab),
    }
    update = always | {"gradients, fp32": FP32 * trained} | update_bytes(config, shape, a)
    return {"update": update, "rollout": always | rollout}, groups * copies


def peak(config: Config, shape: Shape, a: Assumptions) -> float:
    """Bytes per GPU at the moment that needs most."""
    return max(sum(parts.values()) for parts in estimate(config, shape, a)[0].values())


def verdict(config: Config, shape: Shape, a: Assumptions) -> str:
    """One line: whether it fits, and if not, the fewest and cheapest settings to change, or how many GPUs."""
    most, room = peak(config, shape, a), USABLE * a.gpu_memory * GB
    need = f"{most / GB:.1f} of {a.gpu_memory:g} GB"
    if most <= room:
        return f"fits: {need}"
    longest = config.max_prompt_tokens + config.max_response_tokens
    savings = [
        ("max_tokens_per_micro_batch", min(longest, config.max_tokens_per_micro_batch)),
        ("gradient_checkpointing", True), ("sharding", "full"), ("offload", "reference"), ("offload", "all"),
    ]
    ways = []
    for changes in itertools.chain.from_iterable(itertools.combinations(savings, n) for n in range(1, 5)):
        if peak(replace(config, **dict(changes)), shape, a) <= room:
            ways.append("set " + ", ".join(f"{key} {str(value).lower()}" for key, value in changes))
            break
    if not config.lora_rank and peak(replace(config, lora_rank=32, offload=""), shape, a) <= room:
        ways.append("set lora_rank 32" + (" without offload" if config.offload else ""))
    enough = [n for n in (2, 4, 8) if peak(config, shape, replace(a, gpus=n * a.gpus)) <= room]
    ways += [f"take {n * a.gpus} GPUs" for n in enough[:1]]
    return f"does not fit: {need}; {' or '.join(ways) or 'take larger GPUs or a smaller model'}"


def step(config: Config, shape: Shape, a: Assumptions) -> dict[str, tuple[float, float]]:
    """FLOPs (2 per multiply-add) and seconds of each phase, on the GPU with most prompts.

    Decoding takes as long as its arithmetic, or as reading weights and K/V where that is slower.
    """
    copies, prompt, response = config.group_size, a.prompt_tokens, a.response_tokens
    linear, head = 2 * shape.of_layer * shape.layers, 2 * shape.vocab * shape.hidden
    pair = 4 * shape.heads * shape.head_size * shape.layers  # scores, then values
    of_prompt = prompt * linear + pair * prompt * (prompt + 1) / 2
    of_replies = copies * response * (linear + pair * (prompt + (response + 1) / 2))
    logits = copies * response * head
    sampled = math.ceil(config.prompts_per_step / a.gpus)
    updates = config.prompts_per_step // config.minibatch_prompts
    trained = updates * math.ceil(config.minibatch_prompts / a.gpus)
    forward = trained * (of_prompt + of_replies + logits)
    again = trained * (logits + (of_prompt + of_replies) * config.gradient_checkpointing)
    flops = {
        "prefill": sampled * (of_prompt + head),
        "decode": sampled * (of_replies + logits),
        "reference": forward * (config.kl_coef > 0) * shape.reference / shape.parameters,
        "old_logprobs": forward * (updates > 1),
        # A backward is two forwards, or one if frozen (adapters are left out); the head's chunks come again.
        "update": config.num_iterations * ((2 if config.lora_rank else 3) * forward + again),
    }
    seconds = {name: count / (a.gpu_tflops * 1e12 * EFFICIENCY) for name, count in flops.items()}
    batches = math.ceil(sampled * copies / estimate(config, shape, a)[1])
    weights = BF16 * (shape.of_layer * shape.layers + shape.vocab * shape.hidden)
    read = response * (batches * weights + sampled * shape.kv_bytes * (prompt + copies * response / 2))
    seconds["decode"] = max(seconds["decode"], read / (a.gpu_bandwidth * GB))
    return {name: (flops[name], seconds[name]) for name in flops}


def report(config: Config, shape: Shape, a: Assumptions) -> str:
    """Memory by part, its verdict, and the phases of a step, as text."""
    moments, rows = estimate(config, shape, a)
    update, rollout = moments["update"], moments["rollout"]
    lines = [f"{config.model}: {shape.parameters / 1e9:.2f}B parameters on {a.gpus} x {a.gpu_memory:g} GB"]
    lines.append(f"\n{'GB per GPU':<28}{'update':>10}{'rollout':>10}")
    for name in update | rollout:
        lines.append(f"{name:<28}{update.get(name, 0.0) / GB:10.1f}{rollout.get(name, 0.0) / GB:10.1f}")
    lines.append(f"{'sum':<28}{sum(update.values()) / GB:10.1f}{sum(rollout.values()) / GB:10.1f}")
    lines.append(verdict(config, shape, a))
    lines.append(f"\n{rows} sequences are decoded at once; K/V: {shape.kv_bytes / 1024:g} KiB per token")
    trained = config.lora_rank * shape.adapters or shape.parameters
    lines.append(f"disk: {3 * FP32 * trained / GB:.3g} GB a checkpoint")  # with AdamW's moments
    cpu = (BF16 if config.lora_rank else 18) * shape.parameters / GB
    lines += [f"CPU memory: {cpu:.0f} GB over all machines"] * (config.offload == "all")
    lines.append(f"\n{'phase of a step':<28}{'PFLOP':>10}{'seconds':>10}  per GPU")
    for name, (flops, seconds) in step(config, shape, a).items():
        lines.append(f"{name:<28}{flops / 1e15:10.1f}{seconds:10.1f}")
    for b in (replace(a, gpus=gpus) for gpus in sorted({a.gpus, 64, 512})):
        seconds, most = sum(seconds for _, seconds in step(config, shape, b).values()), peak(config, shape, b)
        lines.append(f"a step on {f'{b.gpus} GPUs':<28}{seconds:10.1f}  with {most / GB:.0f} GB each")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Prints the plan of the run that the settings describe. Raises ConfigError or ModelError."""
    more = "All other options are settings; python grpo.py --help lists them."
    parser = argparse.ArgumentParser("ops.plan", None, Assumptions.__doc__, more, allow_abbrev=False)
    for name, value in vars(Assumptions()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default: {value}")
    options, rest = parser.parse_known_args(arguments)
    if wrong := [name for name, value in vars(options).items() if not 0 < value < math.inf]:
        parser.error(f"--{wrong[0]} must be greater than 0, and finite")
    config = load_config(rest)
    options.prompt_tokens = min(options.prompt_tokens, config.max_prompt_tokens)
    options.response_tokens = min(options.response_tokens, config.max_response_tokens)
    shape = shape_of(start_config(config), config)
    print(report(config, shape, Assumptions(**vars(options))))


if __name__ == "__main__":
    run_script(main)
