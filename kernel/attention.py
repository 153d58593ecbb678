"""Attention over packed groups, and which attention a model runs with."""

from __future__ import annotations

import functools
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernel.packing import Layout, Span

# Keywords that models hand to every attention function and that change nothing here: the layout says who
# attends to whom, and dropout would make the ratio of two passes noise.
HARMLESS = {
    "dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits",
}
SHARED_PREFIX = "shared_prefix"  # the name of shared_prefix_attention in transformers' attention interface
CAUSAL_BLOCK = 128  # queries at a time on a CPU


class UnsupportedAttention(ValueError):
    """A model asks its attention for something that shared_prefix_attention does not do."""


def attention_backend(device: torch.device) -> str:
    """Which kernels run: "flash_attn" (the package) or "torch_varlen" on CUDA, "sdpa" on CPU."""
    if device.type != "cuda":
        return "sdpa"
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError:
        return "torch_varlen"
    return "flash_attn"


def kernel_dtype(tensor: Tensor) -> torch.dtype:
    """What attention computes in: under autocast 16 bits, though rotary embeddings leave fp32 behind."""
    if tensor.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return tensor.dtype


def shared_prefix_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, scaling: float,
    layout: Layout | None = None, **others,
) -> tuple[Tensor, None]:
    """Attention over packed groups. query [1, H, T, D], key and value [1, Hkv, T, D] -> [1, T, H, D].

    Equal to one causal pass per prompt + response. Raises UnsupportedAttention where the model asks for more:
    a window, capped scores, sinks, a bias.
    """
    unknown = [name for name, x in others.items() if x is not None and name not in HARMLESS]
    if unknown:
        raise UnsupportedAttention(f"its attention uses {', '.join(unknown)}")
    if layout is None:
        raise UnsupportedAttention("its layers do not hand on what packed groups need")
    half = torch.is_autocast_enabled("cuda") or query.dtype in (torch.float16, torch.bfloat16)
    if query.is_cuda and half:  # the variable-length kernels know nothing else
        rows = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
        return _varlen_attention(*rows, scaling, layout)[None], None
    sizes = [size for span in layout.spans for size in (span.prompt, len(span.real))]
    query, key, value = (x[0].split(sizes, 1) for x in (query, key, value))
    parts = []
    for i, span in enumerate(layout.spans):
        q, k, v = (x[2 * i][None] for x in (query, key, value))
        prompt = causal_attention(q, k, v, scaling, is_last_layer(module))
        rows = (x[2 * i + 1] for x in (query, key, value))
        parts += [prompt[0], _response_attention(*rows, k[0], v[0], scaling, span)]
    return torch.cat(parts, 1).transpose(0, 1)[None], None


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, only_last: bool = False
) -> Tensor:
    """Causal attention of one prompt: query [1, H, P, D], key and value [1, Hkv, P, D] -> [1, H, P, D].

    only_last: nobody will read the output but at the last token, and it is 0 elsewhere.
    """
    sdpa = F.scaled_dot_product_attention
    length = query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if only_last:
        last = sdpa(query[:, :, -1:], key, value, scale=scaling, enable_gqa=grouped)
        return F.pad(last, (0, 0, length - 1, 0))
    if query.is_cuda or length <= CAUSAL_BLOCK:
        return sdpa(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    # The CPU kernel's backward works on the whole square; with a block of queries at a time most of the upper
    # half is never touched: a quarter less time at 512 tokens.
    parts = []
    for start in range(0, length, CAUSAL_BLOCK):
        end = min(start + CAUSAL_BLOCK, length)
        q = query[:, :, start:end]
        k, v = key[:, :, :end], value[:, :, :end]
        mask = causal_mask(end - start, end, query)
        parts.append(sdpa(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=grouped))
    return torch.cat(parts, 2)


def causal_mask(queries: int, keys: int, like: Tensor) -> Tensor:
    """[queries, keys] of 0 and -inf, in the dtype and on the device of `like`: the last query sees all keys,
    the one before it all but one, and so on. A view of a larger mask, kept because every layer asks again.
    """
    rows, past = (1 << max(n - 1, CAUSAL_BLOCK - 1).bit_length() for n in (queries, keys - queries))
    first = past - (keys - queries)
    return _kept_mask(rows, past, like.dtype, like.device)[:queries, first : first + keys]


@functools.lru_cache(maxsize=16)
def _kept_mask(rows: int, past: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, past + rows]: row i sees columns up to past + i."""
    return torch.full((rows, past + rows), -torch.inf, dtype=dtype, device=device).triu(past + 1)


def _response_attention(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, scaling: float, span: Span
) -> Tensor:
    """A group's responses [H or Hkv, N, D] attend to the prompt's K/V [Hkv, P, D] and to their own."""
    q, k, v = (_padded(x, span) for x in (q, k, v))  # [H or Hkv, G, R, D]
    k = torch.cat([prompt_k[:, None].expand(-1, span.responses, -1, -1), k], 2)
    v = torch.cat([prompt_v[:, None].expand(-1, span.responses, -1, -1), v], 2)
    # Heads that share keys become more queries: no copies of the keys, and larger blocks for the kernel.
    repeats = len(q) // len(k)
    q = q.unflatten(0, (-1, repeats)).transpose(1, 2).flatten(2, 3)  # [Hkv, G, heads per key · R, D]
    mask = causal_mask(span.longest, span.prompt + span.longest, q).repeat(repeats, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return _real(out.unflatten(2, (repeats, -1)).transpose(1, 2).flatten(0, 1), span)


def _padded(x: Tensor, span: Span) -> Tensor:
    """[H, N, X] -> [H, G, R, X], with zeros behind the shorter responses."""
    if len(span.real) < span.responses * span.longest:
        full = x.new_zeros(len(x), span.responses * span.longest, x.shape[-1])
        full[:, span.real] = x
        x = full
    return x.reshape(len(x), span.responses, span.longest, -1)


def _real(x: Tensor, span: Span) -> Tensor:
    """[H, G, R, X] -> [H, N, X]: undoes _padded."""
    x = x.flatten(1, 2)
    return x[:, span.real] if len(span.real) < x.shape[1] else x


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: Layout) -> Tensor:
    """query [T, H, D], key and value [T, Hkv, D] -> [T, H, D]."""
    dtype = kernel_dtype(query)
    gather = (layout.kv_index, layout.by_source, layout.uses)
    key, value = (_GatherSegments.apply(x, dtype, *gather) for x in (key, value))
    lengths = (layout.cu_q, layout.cu_k, layout.max_q, layout.max_k)
    return varlen_attention(query.to(dtype), key, value, *lengths, scaling)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    scaling: float,
) -> Tensor:
    """Causal attention of many segments in one kernel: query [Tq, H, D], key and value [Tk, Hkv, D], in 16
    bits, on CUDA -> [Tq, H, D].

    Segment i is rows cu_q[i] to cu_q[i + 1] of the queries and cu_k[i] to cu_k[i + 1] of the keys (int32).
    Its last query sees all its keys, the one before it all but one. max_q, max_k: the longest of each.
    """
    lengths = (cu_q, cu_k, max_q, max_k)
    if attention_backend(query.device) == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        exact = torch.are_deterministic_algorithms_enabled()
        return flash_attn_varlen_func(
            query, key, value, *lengths, softmax_scale=scaling, causal=True, deterministic=exact
        )
    from torch.nn.attention.varlen import varlen_attn

    # Heads that share keys need no copies. torch 2.11 and 2.12 take them as they are and have no such option.
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    options = {"enable_gqa": True} if grouped else {}
    return varlen_attn(query, key, value, *lengths, scale=scaling, window_size=(-1, 0), **options)


class _GatherSegments(torch.autograd.Function):
    """x [T, Hkv, D] -> its rows in `dtype`, by segment. The backward adds in fp32 and in a fixed order."""

    @staticmethod
    def forward(ctx, x, dtype, rows, by_source, uses):
        ctx.save_for_backward(by_source, uses)
        ctx.dtype = x.dtype
        return x.to(dtype).index_select(0, rows)

    @staticmethod
    def backward(ctx, grad):
        """grad [total_k, Hkv, D] -> the gradient of x [T, Hkv, D]; None for the rest."""
        by_source, uses = ctx.saved_tensors
        grad = grad.index_select(0, by_source).to(torch.promote_types(grad.dtype, torch.float32))
        grad = torch.segment_reduce(grad, "sum", lengths=uses, axis=0, unsafe=True)
        return grad.to(ctx.dtype), None, None, None, None


def uses_shared_prefix(model: nn.Module) -> bool:
    """Whether a model from model.prepare_model runs on packed groups; else pack with share_prompt=False."""
    return model.capabilities.shared_prefix


def use_attention(model: nn.Module, phase: str) -> None:
    """Switches a model's attention. "train": packed groups; "generate": transformers' own, with a cache."""
    packed = phase == "train" and uses_shared_prefix(model)
    model.set_attn_implementation(SHARED_PREFIX if packed else model.capabilities.attention)


def decoder_inputs(ids: Tensor, positions: Tensor, layout: object) -> dict:
    """Arguments of a forward pass; `layout` tells an attention of ours where the groups lie (or None)."""
    if layout is None:  # plain rows: every model counts positions itself, and some take none
        return {"input_ids": ids, "use_cache": False}
    # A ready 4-d mask makes transformers build none of its own.
    mask = torch.zeros(1, 1, 1, 1, device=ids.device)
    return {
        "input_ids": ids, "position_ids": positions, "use_cache": False, "attention_mask": mask,
        "layout": layout,
    }


def trim_last_layer(model: nn.Module) -> None:
    """Registers hooks that leave out what nobody reads in the last layer: nearly 1/L of a prompt's work.

    Only the tokens that predict a response token are read there (`used`, of a pass's `layout`). o_proj and
    MLP are computed for these alone and add 0 to the others, which still serve as keys and values. Exact. A
    pass without a layout is unchanged; a model without o_proj or a dense gated MLP gets no hooks.
    """
    layer = next(reversed(getattr(model.get_decoder(), "layers", [None])), None)
    parts = [getattr(getattr(layer, "self_attn", None), "o_proj", None), getattr(layer, "mlp", None)]
    if parts[0] is None or not hasattr(parts[1], "down_proj"):
        return
    now: dict = {}  # `used` and number of tokens of the current pass

    def note(_, inputs, keywords):  # at every call of the layer, also when checkpointing calls it again
        now["used"] = getattr(keywords.get("layout"), "used", None)

    def take(_, inputs):
        now["tokens"] = inputs[0].shape[1]
        return inputs if now["used"] is None else (inputs[0].index_select(1, now["used"]),)

    def put(_, inputs, output):
        if now["used"] is None:
            return output
        return output.new_zeros(1, now["tokens"], output.shape[-1]).index_copy(1, now["used"], output)

    layer.register_forward_pre_hook(note, with_kwargs=True)
    for part in parts:
        part.register_forward_pre_hook(take)
        part.register_forward_hook(put)


def is_last_layer(attention: nn.Module) -> bool:
    """Whether an attention module is its model's last, where only a prompt's last output is read."""
    config = getattr(attention, "config", None)
    return config is not None and attention.layer_idx == config.num_hidden_layers - 1
