"""Models: load one, find out how it can be run, compute token log-probs.

Training computes every prompt once (kernel/packing.py) and holds no full logits (kernel/head.py). Qwen2,
Qwen3 and Llama models work unchanged. A small trial at loading shows what a model can do; one whose attention
does not take packed groups is trained on plain rows.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging as transformers_logging

from config import UserError, template_kwargs
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
from kernel.head import head_logprobs
from kernel.packing import Packed, pack
from prompts import set_template_kwargs

TRIAL = [([1, 2, 3], [[4, 5, 6], [7, 8]]), ([2, 1], [[3, 9, 5, 4], [6]])]  # groups: prompt, responses
TRIAL_ERROR = 1e-3  # relative; fp32 rounding stays far below, a wrong mask or position far above


class ModelError(UserError):
    """A model or tokenizer that cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class Capabilities:
    """How a model is run, found out once when it is loaded.

    attention: transformers' name of the model's own attention. shared_prefix: whether packed groups give its
    numbers. head_only: whether its logits are its LM head's output and nothing more (Gemma 2 caps them).
    """

    attention: str
    shared_prefix: bool
    head_only: bool


def autocast(device: torch.device):
    """bf16 compute over fp32 weights on CUDA; nothing on CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def token_logprobs(
    model: nn.Module, packed: Packed, temperature: float, entropy: bool = True, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs of the response tokens, and the entropy at each (no gradient; 0 if not asked for): [N], [N],
    fp32.

    Policy and reference both go through here, at the temperature of the sampler (session.load_policy binds
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
    check_path(path)
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


def load_model(
    path: str, device: torch.device, gradient_checkpointing: bool = False, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A whole causal LM on one device: for evaluation and distillation. Training uses fsdp.load_sharded.

    path: a folder or hub id. Code from the hub is never run. Raises ModelError when it cannot be loaded.
    """
    check_path(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"model: {path!r} could not be loaded: {first_line(error)}") from None
    return prepare_model(model, device, gradient_checkpointing)


def prepare_model(model: nn.Module, device: torch.device, gradient_checkpointing: bool = False) -> nn.Module:
    """Moves a model to its device, makes it ready for token_logprobs, and warns if it is slow there."""
    model.to(device)
    return prepare_like(model, model, gradient_checkpointing)


def prepare_like(model: nn.Module, twin: nn.Module, gradient_checkpointing: bool) -> nn.Module:
    """Makes a model ready for token_logprobs, by a trial of `twin`: of itself, or of its `miniature`."""
    transformers_logging.disable_progress_bar()  # ours are enough
    AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
    AttentionMaskInterface.register(SHARED_PREFIX, lambda *args, **kwargs: None)
    for one in {model, twin}:
        trim_last_layer(one)
    model.capabilities, limits = find_capabilities(twin)
    if limits and os.environ.get("RANK", "0") == "0":
        warnings.warn(f"model: {'; '.join(limits)}", stacklevel=3)
    if gradient_checkpointing:
        options = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.2x on
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    use_attention(model, "train")
    return model


def miniature(config: PreTrainedConfig, device: torch.device, trust_remote_code: bool = False) -> nn.Module:
    """Two layers with few random weights: for the trial of a model that no rank holds as a whole."""
    small = copy.deepcopy(config)
    small.num_hidden_layers = min(2, config.num_hidden_layers)
    small.vocab_size = 64
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    if kinds := getattr(config, "layer_types", None):  # first those that packing does not know
        kinds = sorted(kinds, key=lambda kind: kind == "full_attention")
        small.layer_types = kinds[: small.num_hidden_layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = dict(dtype=torch.float32, trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_config(small, **options).to(device)


@torch.no_grad()
def find_capabilities(model: nn.Module) -> tuple[Capabilities, list[str]]:
    """What a model can do, and a sentence for everything that it can not, by a trial in the model's own
    dtype.

    The model's own forward pass is the measure: of its LM head alone, and of packed groups.
    """
    own = model.config._attn_implementation
    training = model.training
    limits = []
    model.eval()
    rows = pack(TRIAL, next(model.parameters()).device, share_prompt=False)
    hidden = _hidden(model, rows)
    logits = model(**_inputs(rows)).logits.flatten(0, 1)[rows.predict]
    head = model.get_output_embeddings()
    head_only = isinstance(head, nn.Linear) and _near(F.linear(hidden, head.weight, head.bias), logits)
    if not head_only:
        limits.append("its logits are not its LM head's output alone, so full logits are held")
    reason = _why_not_packed(model, hidden)
    if reason:
        limits.append(f"{reason}, so prompts are computed once per response and not once per group")
    if attention_backend(hidden.device) == "flash_attn":
        with contextlib.suppress(ImportError, ValueError):  # a model without it keeps its own
            model.set_attn_implementation("flash_attention_2")
            own = "flash_attention_2"
    model.train(training)
    return Capabilities(own, not reason, head_only), limits


def _why_not_packed(model: nn.Module, hidden: Tensor) -> str:
    """Why packed groups cannot be used; "" where they give `hidden`, the trial's output on plain rows."""
    kinds = set(getattr(model.config, "layer_types", None) or []) - {"full_attention"}
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}"
    tries = [(contextlib.nullcontext(), TRIAL_ERROR)]
    if hidden.is_cuda:  # the kernels of training may be missing on an older GPU
        tries.append((autocast(hidden.device), 0.1))
    for context, error in tries:
        try:
            model.set_attn_implementation(SHARED_PREFIX)
            with context:
                packed = _hidden(model, pack(TRIAL, hidden.device))
        except UnsupportedAttention as reason:
            return str(reason)
        except Exception as reason:  # it would go wrong in training too; the warning says what
            return f"it does not run on packed groups ({first_line(reason)})"
        if not _near(packed, hidden, error):
            return "packed groups change its output"
    return ""


def _near(a: Tensor, b: Tensor, error: float = TRIAL_ERROR) -> bool:
    return bool((a - b).float().norm() <= error * b.float().norm())


def check_path(path: str) -> None:
    """Raises ModelError for what looks like a folder and is none."""
    if (Path(path) / "model" / "config.json").is_file() and not (Path(path) / "config.json").is_file():
        raise ModelError(f"model: {path!r} is the folder of a run; its model is {Path(path) / 'model'}")
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not Path(path).is_dir():
        raise ModelError(f"model: the folder {path!r} does not exist; give a folder, a hub id or tiny")


def first_line(error: Exception) -> str:
    """The first line of what transformers says; in our words where the line to act on is a later one."""
    if "trust_remote_code" in str(error):
        return "it brings code of its own; read that code, and add --trust_remote_code true to run it"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())
