"""Models: load or build one, choose its attention kernels, pack groups, and compute token log-probs.

Training computes every prompt once. A group is packed as [prompt, response 1 … response G]: positions of each response
restart after the prompt, and a response attends to the prompt and to itself (shared-prefix attention). It is an
ordinary entry of transformers' attention interface, so Qwen2, Qwen3 and Llama models work unchanged.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging as transformers_logging

from prompts import END_TOKENS, TAGS, stop_ids

SHARED_PREFIX = "shared_prefix"
KEPT_LOGITS = 2**23  # logits of one micro-batch that are not worth recomputing: 32 MiB


class ModelError(ValueError):
    """A model or tokenizer that cannot be used; the message says which and what to do."""


# ---------------------------------------------------------------------------------------------- attention kernels


def attention_backend(device: torch.device) -> str:
    """Which kernels run: "flash_attn" (the package) or "torch_varlen" on CUDA, "sdpa" on CPU."""
    if device.type != "cuda":
        return "sdpa"
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError:
        return "torch_varlen"
    return "flash_attn"


def autocast(device: torch.device):
    """bf16 compute over fp32 weights on CUDA; nothing on CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def use_attention(model: nn.Module, phase: str) -> None:
    """Switches a model between "train" (packed groups) and "generate" (transformers' own attention with a cache)."""
    flash = attention_backend(next(model.parameters()).device) == "flash_attn"
    model.set_attn_implementation(SHARED_PREFIX if phase == "train" else "flash_attention_2" if flash else "sdpa")


@dataclass(frozen=True)
class Layout:
    """Where the groups of one packed row lie. Index tensors are on the model's device.

    groups: per group (start, prompt length P, index [G, R] of its padded responses, bool mask [R, P + R], the rows of
    the flattened [G·R] that are real): what SDPA needs. kv_index [total_k], cu_q, cu_k [segments + 1] and the longest
    segments: what variable-length kernels need; segments are each prompt, then each of its responses.
    """

    groups: list[tuple[int, int, Tensor, Tensor, Tensor]]
    kv_index: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


def shared_prefix_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, scaling: float, shared: Layout, **_
) -> tuple[Tensor, None]:
    """Attention over packed groups. query [1, H, T, D], key and value [1, Hkv, T, D] -> [1, T, H, D].

    Equal to one causal pass per prompt + response (tests/test_model.py), with the prompt's part computed once.
    """
    if query.is_cuda:
        rows = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
        return _varlen_attention(*rows, scaling, shared)[None], None
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    parts = []
    for start, length, index, mask, real in shared.groups:
        prompt = slice(start, start + length)
        prompt_k, prompt_v = key[:, :, prompt], value[:, :, prompt]
        out = F.scaled_dot_product_attention(query[:, :, prompt], prompt_k, prompt_v, is_causal=True, scale=scaling)
        parts.append(out[0].transpose(0, 1))  # [P, H, D]
        q, k, v = (x[0][:, index].transpose(0, 1) for x in (query, key, value))  # [G, H, R, D]
        k = torch.cat([prompt_k.expand(len(index), -1, -1, -1), k], 2)
        v = torch.cat([prompt_v.expand(len(index), -1, -1, -1), v], 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)  # [G, H, R, D]
        parts.append(out.transpose(1, 2).flatten(0, 1)[real])
    return torch.cat(parts)[None], None


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, shared: Layout) -> Tensor:
    """[T, H, D], [T, Hkv, D] twice -> [T, H, D]: every segment is causal, aligned to the bottom right of its K/V."""
    # Rotary embeddings leave fp32 behind under autocast, and flash kernels take 16 bits only.
    dtype = torch.get_autocast_dtype("cuda") if query.dtype == torch.float32 and query.is_cuda else query.dtype
    # A prompt's K/V serve G + 1 segments: the gather runs in fp32 so that its backward adds the gradients in fp32.
    key, value = (x.float()[shared.kv_index].to(dtype) for x in (key, value))
    query = query.to(dtype)
    lengths = (shared.cu_q, shared.cu_k, shared.max_q, shared.max_k)
    if attention_backend(query.device) == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(query, key, value, *lengths, softmax_scale=scaling, causal=True)
    from torch.nn.attention.varlen import varlen_attn

    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return varlen_attn(query, key, value, *lengths, scale=scaling, window_size=(-1, 0))


# ------------------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True)
class Packed:
    """One micro-batch: groups packed into a single row of T tokens with N response tokens.

    ids, positions [1, T]; predict [N]: the position whose output predicts each response token; target [N]: that token;
    counts: response tokens per response, in order, so that per-response values expand with repeat_interleave.
    """

    ids: Tensor
    positions: Tensor
    layout: Layout
    predict: Tensor
    target: Tensor
    counts: Tensor


def pack(groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], device: torch.device) -> Packed:
    """Packs (prompt ids, list of response ids) groups into one row. Responses keep their end token: it is learned too."""
    ids: list[int] = []
    positions: list[int] = []
    predict: list[int] = []
    target: list[int] = []
    counts: list[int] = []
    layouts, kv_index, query_lengths, key_lengths = [], [], [], []
    for prompt, responses in groups:
        start, length = len(ids), len(prompt)
        if not length or not responses or not all(responses):
            raise ValueError("a group needs a prompt and responses of at least one token each")
        ids += prompt
        positions += range(length)
        kv_index.append(torch.arange(start, start + length))
        query_lengths.append(length)
        key_lengths.append(length)
        longest = max(map(len, responses))
        index, real = torch.zeros(len(responses), longest, dtype=torch.long), []
        for row, response in enumerate(responses):
            first, size = len(ids), len(response)
            ids += response
            positions += range(length, length + size)
            # The prompt's last token predicts the first response token of every response of the group.
            predict += [start + length - 1, *range(first, first + size - 1)]
            target += response
            counts.append(size)
            index[row, :size] = torch.arange(first, first + size)
            real.append(torch.arange(size) + row * longest)
            kv_index.append(torch.cat([torch.arange(start, start + length), torch.arange(first, first + size)]))
            query_lengths.append(size)
            key_lengths.append(length + size)
        mask = torch.ones(longest, length + longest, dtype=torch.bool).tril(length)
        layouts.append((start, length, index.to(device), mask.to(device), torch.cat(real).to(device)))
    flat = torch.tensor(ids)
    cu = [F.pad(torch.tensor(sizes).cumsum(0), (1, 0)).to(device, torch.int32) for sizes in (query_lengths, key_lengths)]
    layout = Layout(layouts, torch.cat(kv_index).to(device), *cu, max(query_lengths), max(key_lengths))
    return Packed(
        flat[None].to(device), torch.tensor(positions)[None].to(device), layout, torch.tensor(predict).to(device),
        torch.tensor(target).to(device), torch.tensor(counts).to(device),
    )  # fmt: skip


def split_by_tokens(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices into `sizes`, in order, cut into micro-batches of at most `budget` tokens (a larger one stands alone)."""
    batches: list[list[int]] = []
    filled = budget + 1
    for i, size in enumerate(sizes):
        if filled + size > budget:
            batches.append([])
            filled = 0
        batches[-1].append(i)
        filled += size
    return batches


# ----------------------------------------------------------------------------------------------------- log-probs


def token_logprobs(
    model: nn.Module, packed: Packed, temperature: float, chunk: int = 1024, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probs of the response tokens, and the entropy at each (no gradient; 0 if not asked for): [N], [N] float32.

    The policy, old and reference models all go through here, with the temperature that the sampler used. The LM head
    runs in chunks that are recomputed in the backward, so no [T, V] tensor outlives its chunk; small ones are kept.
    """
    with autocast(packed.ids.device):
        hidden = model.get_decoder()(
            input_ids=packed.ids,
            position_ids=packed.positions,
            # A ready 4-d mask makes transformers build none of its own: the layout says who attends to whom.
            attention_mask=torch.zeros(1, 1, 1, 1, device=packed.ids.device),
            use_cache=False,
            shared=packed.layout,
        ).last_hidden_state[0][packed.predict]
        head = model.get_output_embeddings()
        parts = []
        for h, t in zip(hidden.split(chunk), packed.target.split(chunk)):
            if len(packed.target) * head.out_features <= KEPT_LOGITS:
                parts.append(_head_chunk(head, h, t, temperature, entropy))
            else:
                parts.append(checkpoint(_head_chunk, head, h, t, temperature, entropy, use_reentrant=False))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _head_chunk(
    head: nn.Module, hidden: Tensor, target: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float() / temperature
    lse = logits.logsumexp(-1)
    logprobs = logits.gather(-1, target[:, None])[:, 0] - lse
    if not entropy:
        return logprobs, torch.zeros_like(logprobs)
    with torch.no_grad():
        return logprobs, lse - (logits * (logits - lse[:, None]).exp()).sum(-1)


# -------------------------------------------------------------------------------------------- load, build, export


def load_tokenizer(path: str):
    """The tokenizer of a folder or hub id. Raises ModelError with one sentence when it cannot be read."""
    _check_path(path)
    saved = Path(path) / "tokenizer_config.json"
    # AutoTokenizer goes by the model type and would give our byte-level BPE the word splitting of Qwen2.
    try:
        own = saved.is_file() and json.loads(saved.read_text("utf-8")).get("tokenizer_class") == "TokenizersBackend"
        return (PreTrainedTokenizerFast if own else AutoTokenizer).from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: no tokenizer could be loaded from {path!r}: {_first_line(error)}") from None


def load_model(path: str, device: torch.device, gradient_checkpointing: bool = False) -> nn.Module:
    """A causal LM in fp32 (AdamW at lr 1e-6 rounds away in bf16; CUDA computes in bf16 by autocast).

    path: a folder or hub id. Code from the hub is never run. Raises ModelError when it cannot be loaded.
    """
    _check_path(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"model: {path!r} could not be loaded: {_first_line(error)}") from None
    return prepare_model(model, device, gradient_checkpointing)


def prepare_model(model: nn.Module, device: torch.device, gradient_checkpointing: bool = False) -> nn.Module:
    """Moves a model to its device, gives it shared-prefix attention and clean generation defaults."""
    if getattr(model.config, "use_sliding_window", False):
        raise ModelError("model: sliding-window attention is not supported by the packed training step")
    transformers_logging.disable_progress_bar()  # ours are enough
    AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
    AttentionMaskInterface.register(SHARED_PREFIX, lambda *args, **kwargs: None)
    model.to(device)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    use_attention(model, "train")
    return model


def _check_path(path: str) -> None:
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not Path(path).is_dir():
        raise ModelError(f"model: the folder {path!r} does not exist; give a Hugging Face folder, a hub id or tiny")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `texts`: any text survives a round trip, digits stay single.

    Words, digits and everything between them are split first, so that a word has the same tokens after a space as
    after a quote: what a small model reads in a query it can then copy into a JSON string.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\p{L}\p{N}]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", *END_TOKENS[:2]]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens(list(TAGS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def build_tiny_model(tokenizer, hidden: int, layers: int, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2-architecture model of `layers` layers and `hidden` units, initialised from `seed`, fp32.

    Attention starts at the identity (queries equal keys, outputs undo values, in random orthogonal bases), which lets a
    small model find copying in hundreds of steps instead of thousands: after mimetic initialisation, Trockman and
    Kolter 2023 (arXiv 2305.09828). All else is the usual noise; nothing of the task is in it.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32768, rope_theta=1e6,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, initializer_range=0.03,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            for layer in model.model.layers:
                attention = layer.self_attn
                compare, carry = (torch.linalg.qr(torch.randn(hidden, hidden))[0] for _ in range(2))
                attention.q_proj.weight.copy_(compare.T)
                attention.k_proj.weight.copy_(compare.T)
                attention.v_proj.weight.copy_(carry.T)
                attention.o_proj.weight.copy_(carry)
    return prepare_model(model, torch.device("cpu"))


def export(model: nn.Module, tokenizer, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes a Hugging Face folder: safetensors, config, tokenizer with chat template, clean generation_config.

    The model's own sampling defaults (Qwen2.5-Instruct brings top_k 20, top_p 0.8, repetition penalty 1.05) are left
    out, because they would colour every later evaluation.
    """
    previous = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=stop_ids(tokenizer), pad_token_id=tokenizer.pad_token_id)
    use_attention(model, "generate")
    state = {k: v.to("cpu", dtype) if v.is_floating_point() else v.cpu() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)  # casting has made it a copy of the embedding
    try:
        model.save_pretrained(path, state_dict=state)
        tokenizer.save_pretrained(path)
        config = json.loads((path / "config.json").read_text("utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")  # transformers writes that of the live model
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    finally:
        model.generation_config = previous
        use_attention(model, "train")


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())
