"""Models: load one, find out how it can be run, compute token log-probs.

Training computes every prompt once (kernel/packing.py) and holds no full logits (kernel/head.py). Qwen2,
Qwen3 and Llama models work unchanged. A small trial at loading shows what a model can do; one whose attention
does not take packed groups is trained on plain rows.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging as transformers_logging

from config import UserError, check_model, template_kwargs
from kernel.attention import (
    SHARED_PREFIX,
    UnsupportedAttention,
    attention_backend,
    decoder_inputs,
    shared_prefix_attention,
    trim_last_layer,
    use_attention,
    uses_shared_prefix,
)
from kernel.decode import Prompt
from kernel.head import head_logprobs
from kernel.hf_engines import ENGINES
from kernel.norms import fuse_norms
from kernel.packing import Packed, pack
from prompts import set_template_kwargs

# Mean difference in nats per token that rounding explains, in fp32 and in 16 bits. Measured with random
# tokens on a pretrained model of 135M parameters: 7e-6 and 0.05.
PROBE_ERROR = (1e-4, 0.15)


class ModelError(UserError):
    """A model or tokenizer that cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class Capabilities:
    """How a model is run, found out once when it is loaded.

    attention: transformers' name of the model's own attention. shared_prefix: whether packed groups give its
    numbers. head_only: whether its logits are its LM head's output and nothing more (Gemma 2 caps them).
    engine: the rollout engine whose samples have its log-probs.
    """

    attention: str
    shared_prefix: bool = False
    head_only: bool = False
    engine: str = "generate"


def autocast(device: torch.device):
    """bf16 compute over fp32 weights on CUDA; nothing on CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def token_logprobs(
    model: nn.Module, packed: Packed, temperature: float, entropy: bool = True, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs of the response tokens, and the entropy at each (no gradient; 0 if not asked for): [N], [N],
    fp32.

    Policy and reference both go through here, at the temperature of the sampler (fsdp.load_policy binds
    it). chunk: tokens that the LM head does at a time (kernel/head.py).
    """
    if packed.layout is not None and not uses_shared_prefix(model):
        raise ValueError(
            "this model does not run on packed groups: use pack(..., share_prompt=uses_shared_prefix(model))"
        )
    # fsdp.load_sharded attaches response_logprobs as a method, so that FSDP gathers the weights around it.
    forward = getattr(model, "response_logprobs", None) or functools.partial(response_logprobs, model)
    with autocast(packed.ids.device):
        return forward(packed, temperature, entropy, chunk)


def response_logprobs(
    model: nn.Module, packed: Packed, temperature: float, entropy: bool, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """The forward pass of token_logprobs, where the model's weights are at hand."""
    if model.capabilities.head_only:
        hidden = _hidden(model, packed)
        head = model.get_output_embeddings()
        return head_logprobs(
            hidden, head.weight, head.bias, packed.target, temperature, entropy=entropy, chunk=chunk
        )
    logits = model(**_inputs(packed)).logits.flatten(0, 1)[packed.predict].float() / temperature
    lse = logits.logsumexp(-1)
    logprobs = logits.gather(-1, packed.target[:, None])[:, 0] - lse
    with torch.no_grad():
        return logprobs, lse - (logits.softmax(-1) * logits).sum(-1) if entropy else torch.zeros_like(lse)


def _inputs(packed: Packed) -> dict:
    return decoder_inputs(packed.ids, packed.positions, packed.layout)


def _hidden(model: nn.Module, packed: Packed) -> Tensor:
    """[N, H]: the last hidden states that predict the response tokens."""
    hidden = model.get_decoder()(**_inputs(packed)).last_hidden_state
    # The same as indexing, but rows used several times get their gradient in a fixed order, on CPU threads
    # too.
    return F.embedding(packed.predict, hidden.flatten(0, 1))


def load_tokenizer(path: str, trust_remote_code: bool = False, chat_template_kwargs: str = ""):
    """The tokenizer of a folder or hub id, with variables of its chat template set as the setting says.

    Raises ModelError with one sentence when it cannot be read.
    """
    check_model(path)
    saved = Path(path) / "tokenizer_config.json"
    # AutoTokenizer goes by the model type and would give our byte-level BPE the word splitting of Qwen2.
    try:
        told = json.loads(saved.read_text("utf-8")).get("tokenizer_class") if saved.is_file() else None
        if told == "TokenizersBackend":
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        where = repr(path) if Path(path).is_dir() else f"{path!r} (no folder here, so a hub id)"
        raise ModelError(f"model: no tokenizer could be loaded from {where}: {first_line(error)}") from None
    set_template_kwargs(tokenizer, template_kwargs(chat_template_kwargs))
    return tokenizer


# ------------------------------------------------------------------------------------- what a model can do


def prepare_model(
    model: nn.Module, device: torch.device, gradient_checkpointing: bool = False,
    engine: str = "shared_prefix",
) -> nn.Module:
    """Moves a whole model to its device, makes it ready for token_logprobs, and warns if it is slow there."""
    add_hooks(model.to(device), gradient_checkpointing)
    find_capabilities(model, model, engine)
    return model


def compute_dtype(device: torch.device) -> torch.dtype:
    """What forward and backward passes compute in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def add_hooks(model: nn.Module, gradient_checkpointing: bool) -> None:
    """Our attention and norms, the trimmed last layer, recomputed activations. Before FSDP wraps layers."""
    transformers_logging.disable_progress_bar()  # ours are enough
    AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
    AttentionMaskInterface.register(SHARED_PREFIX, lambda *args, **kwargs: None)
    trim_last_layer(model)
    fuse_norms(model)
    if not gradient_checkpointing:
        return
    options = {"use_reentrant": False}
    try:
        if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.2x on
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    except ValueError:
        warnings.warn("model: it cannot recompute activations, so all are kept", stacklevel=3)


def find_capabilities(model: nn.Module, twin: nn.Module, engine: str) -> None:
    """Sets model.capabilities, and warns of everything that the model can not do.

    twin: the model itself, or its weights in one piece (fsdp.gathered_weights). It answers a few short
    prompts in its own dtype. Its plain forward pass over one row at a time is the measure: of padded rows, of
    packed groups, and of the rollout engine. Raises ModelError where padded rows or generate do not agree.
    """
    training = twin.training
    with torch.no_grad(), autocast(next(twin.parameters()).device):
        model.capabilities, limits = _probe(twin.eval(), engine)
    twin.train(training)
    if dropout := getattr(model, "dropout", None):
        limits.append(f"dropout is off ({', '.join(f'{name} {rate:g}' for name, rate in dropout.items())})")
    if limits and os.environ.get("RANK", "0") == "0":
        warnings.warn(f"model: {'; '.join(limits)}", stacklevel=3)
    use_attention(model, "train")


def _probe(model: nn.Module, engine: str) -> tuple[Capabilities, list[str]]:
    """Every try sets model.capabilities to what it tries, and the result is what agreed."""
    weight = next(model.parameters())
    error = PROBE_ERROR[weight.is_cuda or weight.dtype != torch.float32]
    if getattr(model, "capabilities", None):  # it was asked before
        use_attention(model, "generate")
    own, limits = model.config._attn_implementation, []
    if attention_backend(weight.device) == "flash_attn":
        with contextlib.suppress(ImportError, ValueError):  # a model without it keeps its own
            model.set_attn_implementation("flash_attention_2")
            own = "flash_attention_2"
    groups = probe_groups(model.get_input_embeddings().weight.shape[0])
    model.capabilities = plain = Capabilities(own)
    model.capabilities = plain = replace(plain, head_only=_head_only(model, groups))
    if not plain.head_only:
        limits.append("its logits are not its LM head's output alone, so full logits are held")
    if reason := _why_not(plain, model, groups, error):
        raise ModelError(f"model: a {type(model).__name__} cannot be used: {reason}")
    best = plain
    reason = _other_layers(model.config) or _why_not(replace(plain, shared_prefix=True), model, groups, error)
    if reason:
        limits.append(f"{reason}, so prompts are computed once per response and not once per group")
    else:
        best = replace(best, shared_prefix=True)
    # shared_prefix puts its own attention and the bare LM head in the place of the model's.
    if not engine.startswith("shared_prefix") or (best.shared_prefix and best.head_only):
        if reason := _why_not(replace(plain, engine=engine), model, groups, error):
            limits.append(f"{reason}, so it samples with rollout_engine generate")
        else:
            best = replace(best, engine=engine)
    if best.engine == "generate" and (reason := _why_not(plain, model, groups, error, sample=True)):
        raise ModelError(f"model: a {type(model).__name__} cannot be used: {reason}")
    return best, limits


def probe_groups(vocabulary: int) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts and responses of uneven lengths, with token ids from everywhere."""
    draw = random.Random(0)
    sizes = ((17, (6, 2)), (4, (5, 1)))
    ids = lambda n: [draw.randrange(vocabulary) for _ in range(n)]  # noqa: E731
    return [(ids(prompt), [ids(size) for size in responses]) for prompt, responses in sizes]


def _head_only(model: nn.Module, groups: list) -> bool:
    """Whether the logits are the LM head's output and nothing more. The head's output is made so large for
    this that even a wide soft cap shows.
    """
    head, seen = model.get_output_embeddings(), {}

    def enlarge(_, inputs, output):
        seen.update(input=inputs[0], output=1e3 * output)
        return seen["output"]

    if not isinstance(head, nn.Linear):
        return False
    rows = pack(groups, head.weight.device, share_prompt=False)
    hook = head.register_forward_hook(enlarge)
    try:
        logits = model(**_inputs(rows)).logits
    finally:
        hook.remove()
    try:
        hidden = model.get_decoder()(**_inputs(rows)).last_hidden_state
    except (AttributeError, TypeError):  # some models call something else their decoder
        return False
    if not seen or not torch.equal(logits.float(), seen["output"].float()):
        return False
    return torch.allclose(hidden.float(), seen["input"].float(), rtol=1e-3, atol=1e-3)


def _why_not(tried: Capabilities, model: nn.Module, groups: list, error: float, sample: bool = False) -> str:
    """What goes wrong in a way to run the model, "" if it agrees with plain rows of one response each.

    sample: whether the engine is tried; without, only log-probs are.
    """
    sample = sample or tried.engine != "generate"
    what = "on packed groups it" if tried.shared_prefix else "on padded rows it"
    what = f"with rollout_engine {tried.engine} it" if sample else what
    device = next(model.parameters()).device
    plain = model.capabilities = replace(tried, shared_prefix=False)
    try:
        if sample:
            prompts = [Prompt("probe", prompt, seed) for seed, (prompt, _) in enumerate(groups)]
            copies, nothing = 2, model.get_input_embeddings().weight.shape[0]
            replies = dict(ENGINES[tried.engine](model, prompts, copies, 1.0, 5, [nothing], 4))
            groups = [(p.ids, [ids for ids, _ in replies[k]]) for k, p in enumerate(prompts)]
            found = [x for k in range(len(prompts)) for _, logprobs in replies[k] for x in logprobs]
            found = torch.tensor(found, device=device)
        else:
            model.capabilities = tried
            use_attention(model, "train")
            found = response_logprobs(model, pack(groups, device, tried.shared_prefix), 1.0, False, None)[0]
        model.capabilities = plain
        use_attention(model, "train")
        rows = [pack([(prompt, [one])], device, False) for prompt, many in groups for one in many]
        truth = torch.cat([response_logprobs(model, row, 1.0, False, None)[0] for row in rows])
        gap = (found - truth).abs().mean().item()
    except torch.OutOfMemoryError:
        raise
    except UnsupportedAttention as reason:
        return str(reason)
    except Exception as reason:  # it would go wrong in training too; the warning says what
        return f"{what} does not run ({first_line(reason)})"
    finally:
        model.capabilities = plain
    return "" if gap <= error else f"{what} is {gap:.2g} nats off its plain forward pass"


def _other_layers(config: PreTrainedConfig) -> str:
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or []) - {"full_attention"}
    return f"it has layers of {', '.join(sorted(kinds))}" if kinds else ""


def check_vocabulary(tokenizer, config: PreTrainedConfig) -> None:
    """Raises ModelError where the tokenizer has tokens beyond the model's embeddings."""
    rows = config.get_text_config().vocab_size
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= rows:
        what = f"the tokenizer's {token!r} has the id {largest}, but the model has {rows} embeddings"
        raise ModelError(f"model: {what}; take the tokenizer that belongs to it, or resize the embeddings")


def first_line(error: Exception) -> str:
    """The first line of what transformers says; in our words where the line to act on is a later one."""
    if "trust_remote_code" in str(error):
        return "it brings code of its own; read that code, and add --trust_remote_code true to run it"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())
