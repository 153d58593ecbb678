"""The default rollout engine: prompts -> sampled token ids and their log-probs.

It stores the K/V of a prompt once per group, whatever the number of copies, so a decode step reads and
multiplies it once. Every sampling rule is explicit, so nothing of a model's generation_config (top_k, top_p,
repetition penalty) can leak into the samples. Engines with the same signature are in hf_engines.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kernel.attention import causal_attention, decoder_inputs, is_last_layer, kernel_dtype

KEEP_SHARE = 0.75  # finished rows are dropped when fewer than this share of the rows is still alive
BLOCK = 64  # response K/V grow by at least so many tokens, random numbers are drawn for so many
PREFILL_TOKENS = 16384  # prompts are prefilled in rows of about so many tokens
PLANNED_TOKENS = 1024  # how long responses are expected to become when the batch size is chosen
CUDA_STEPS_PER_CHECK = 16  # asking whether rows have finished waits for the GPU, so not at every step
PREFILL, DECODE = "group_prefill", "group_decode"  # entries of transformers' attention interface


@dataclass(frozen=True)
class Prompt:
    """One prompt. seed: of its own samples, so that they depend on neither batch nor number of ranks."""

    id: str
    ids: list[int]
    seed: int = 0


# (model, prompts, copies of each (1 if greedy), temperature (0: greedy), max_new_tokens, stop ids) ->
# (response ids, log-probs) of prompt 1 copy 1, prompt 1 copy 2, … Ids end with a stop id or are cut off.
Replies = list[tuple[list[int], list[float]]]
Engine = Callable[[nn.Module, Sequence[Prompt], int, float, int, list[int]], Replies]


@dataclass
class GroupCache:
    """K/V of n groups while they are decoded: each prompt once, each of the B responses (rows) on its own.

    prompt_k, prompt_v: per layer [n, Hkv, P, D], padded on the right, where prompt_mask [n, 1, 1, P] is -inf.
    k, v: per layer [B, Hkv, R, D] with room for R tokens; own_mask [R] is -inf for those to come. group [B],
    slot [B]: a row's group, and its place among that group's rows, at most `slots`. at [1]: where the current
    token is written.
    """

    prompt_k: list[Tensor]
    prompt_v: list[Tensor]
    prompt_mask: Tensor
    k: list[Tensor]
    v: list[Tensor]
    own_mask: Tensor
    group: Tensor
    slot: Tensor
    slots: int
    at: Tensor


@dataclass
class Prefill:
    """What a prefill pass fills in: the cache's prompts from number `first` on.

    places: their (start, length) in the row of tokens. used: the last token of each (trim_last_layer).
    """

    prompt_k: list[Tensor]
    prompt_v: list[Tensor]
    first: int
    places: list[tuple[int, int]]
    used: Tensor


def prefill_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, scaling: float,
    layout: Prefill, **_,
) -> tuple[Tensor, None]:
    """Causal attention over each of the prompts in a row; keeps their K/V. [1, H, T, D] -> [1, T, H, D]."""
    dtype = kernel_dtype(query)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    parts = []
    for i, (start, length) in enumerate(layout.places, layout.first):
        q, k, v = (x[:, :, start : start + length] for x in (query, key, value))
        layout.prompt_k[module.layer_idx][i, :, :length] = k[0]
        layout.prompt_v[module.layer_idx][i, :, :length] = v[0]
        parts.append(causal_attention(q, k, v, scaling, is_last_layer(module)))
    return torch.cat(parts, 2).transpose(1, 2), None


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """[..., M, D] x [..., K, D] -> [..., M, K] float32, whatever the inputs' dtype."""
    if query.dtype == torch.float32:
        return query @ key.transpose(-1, -2)
    shape = (*query.shape[:-1], key.shape[-2])
    with torch.autocast(query.device.type, enabled=False):
        if query.is_cuda:
            transposed = key.flatten(0, -3).transpose(1, 2)
            return torch.bmm(query.flatten(0, -3), transposed, out_dtype=torch.float32).view(shape)
        return query.float() @ key.float().transpose(-1, -2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Part of a softmax, to be merged: sum of exp(score - top) · value, sum of exp(score - top), and top."""
    scores = _scores(query, key) + mask
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return (weights.to(value.dtype) @ value).float(), weights.sum(-1, keepdim=True), top


def decode_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, scaling: float,
    layout: GroupCache, **_,
) -> tuple[Tensor, None]:
    """One new token per row: attention to the row's prompt and to its own response so far. -> [B, 1, H, D].

    The rows of a group are multiplied with their prompt's K/V together, as one matrix, and the two partial
    softmaxes are merged. No host synchronisation; shapes change only when rows leave or the cache grows.
    """
    rows, heads, _, size = query.shape
    kv_heads = key.shape[1]
    groups = len(layout.prompt_mask)
    layer = module.layer_idx
    own_k, own_v = layout.k[layer], layout.v[layer]
    own_k.index_copy_(2, layout.at, key.to(own_k.dtype))
    own_v.index_copy_(2, layout.at, value.to(own_v.dtype))
    query = (query * scaling).to(own_k.dtype).view(rows, kv_heads, heads // kv_heads, size)
    own, own_sum, own_top = _attend(query, own_k, own_v, layout.own_mask)
    full = rows == groups * layout.slots  # rows lie group by group, so that a full grid is a view
    if full:
        grid = query.view(groups, layout.slots, *query.shape[1:])
    else:
        grid = query.new_zeros(groups, layout.slots, *query.shape[1:])
        grid[layout.group, layout.slot] = query
    flat = grid.transpose(1, 2).flatten(2, 3)  # [n, Hkv, slots · H/Hkv, D]
    parts = _attend(flat, layout.prompt_k[layer], layout.prompt_v[layer], layout.prompt_mask)
    parts = [x.unflatten(2, (layout.slots, -1)).transpose(1, 2) for x in parts]
    parts = [x.flatten(0, 1) if full else x[layout.group, layout.slot] for x in parts]
    prompt, prompt_sum, prompt_top = parts
    top = torch.maximum(own_top, prompt_top)
    own_share, prompt_share = (own_top - top).exp(), (prompt_top - top).exp()
    out = (own * own_share + prompt * prompt_share) / (own_sum * own_share + prompt_sum * prompt_share)
    return out.view(rows, 1, heads, size).to(value.dtype), None


def _kv_sizes(model: nn.Module) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and the size of one."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)  # a state-space model has none
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, size


def _attend_by(model: nn.Module, name: str, function: Callable) -> None:
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    model.set_attn_implementation(name)


def _prefill(model: nn.Module, prompts: Sequence[Prompt], copies: int) -> tuple[GroupCache, Tensor]:
    """Every prompt once -> (the cache for `copies` rows of each, logits [n, V] that predict first tokens)."""
    _attend_by(model, PREFILL, prefill_attention)
    layers, kv_heads, size = _kv_sizes(model)
    weight = model.get_output_embeddings().weight
    device = weight.device
    groups = len(prompts)
    longest = max(len(p.ids) for p in prompts)

    def room(rows: int, length: int) -> list[Tensor]:
        shape = (rows, kv_heads, length, size)
        dtype = kernel_dtype(weight)
        return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]

    prompt_k, prompt_v = room(groups, longest), room(groups, longest)
    logits = []
    at = 0
    while at < groups:
        first = at
        ids, positions, places = [], [], []
        while at < groups and (not ids or len(ids) + len(prompts[at].ids) <= PREFILL_TOKENS):
            places.append((len(ids), len(prompts[at].ids)))
            ids += prompts[at].ids
            positions += range(len(prompts[at].ids))
            at += 1
        row = torch.tensor([ids, positions], device=device)[:, None]
        last = torch.tensor([start + length - 1 for start, length in places], device=device)
        layout = Prefill(prompt_k, prompt_v, first, places, last)
        hidden = model.get_decoder()(**decoder_inputs(row[0], row[1], layout)).last_hidden_state
        logits.append(model.get_output_embeddings()(hidden[0, last]))
    lengths = torch.tensor([len(p.ids) for p in prompts], device=device)
    padding = torch.arange(longest, device=device) >= lengths[:, None]
    cache = GroupCache(
        prompt_k, prompt_v,
        prompt_mask=torch.zeros(padding.shape, device=device).masked_fill(padding, -torch.inf)[:, None, None],
        k=room(groups * copies, BLOCK), v=room(groups * copies, BLOCK),
        own_mask=torch.full((BLOCK,), -torch.inf, device=device),
        group=torch.arange(groups, device=device).repeat_interleave(copies),
        slot=torch.arange(copies, device=device).repeat(groups), slots=copies,
        at=torch.zeros(1, dtype=torch.long, device=device),
    )
    return cache, torch.cat(logits)


def _make_room(cache: GroupCache) -> None:
    """Half as much room again for the responses' K/V, and at least one block."""
    more = max(BLOCK, len(cache.own_mask) // 2 // BLOCK * BLOCK)
    for layer in range(len(cache.k)):  # layer by layer, so that only one is held twice
        cache.k[layer], cache.v[layer] = (F.pad(x[layer], (0, 0, 0, more)) for x in (cache.k, cache.v))
    cache.own_mask = F.pad(cache.own_mask, (0, more), value=-torch.inf)


def _drop_rows(cache: GroupCache, keep: Tensor) -> None:
    """Leaves the rows `keep` (ascending). Groups without a row go too, but only where that saves enough."""
    group = cache.group[keep]
    present, index, counts = group.unique(return_inverse=True, return_counts=True)
    fewer = len(present) < KEEP_SHARE * len(cache.prompt_mask)
    kept = [(cache.k, keep), (cache.v, keep)]
    if fewer:
        kept += [(cache.prompt_k, present), (cache.prompt_v, present)]
        cache.prompt_mask = cache.prompt_mask[present]
    for tensors, rows in kept:
        for layer, x in enumerate(tensors):  # one by one, so that only one is held twice
            tensors[layer] = x[rows]
    starts = counts.cumsum(0) - counts
    cache.group = index if fewer else group
    cache.slot = torch.arange(len(keep), device=keep.device) - starts[index]
    cache.slots = int(counts.max())


@torch.no_grad()
def shared_prefix(
    model: nn.Module, prompts: Sequence[Prompt], copies: int, temperature: float, max_new_tokens: int,
    stops: list[int],
) -> Replies:
    """The default engine. A sample depends on its prompt's seed alone, not on batch, settings or ranks."""
    cache, logits = _prefill(model, prompts, copies)
    _attend_by(model, DECODE, decode_attention)
    rows = len(prompts) * copies
    device = logits.device
    logits = logits.repeat_interleave(copies, 0)
    position = torch.tensor([len(p.ids) for p in prompts], device=device).repeat_interleave(copies)
    noise = uniform_numbers(prompts, copies, device)
    stop = torch.tensor(stops, device=device)
    alive = torch.arange(rows, device=device)  # which row of the result each row of the batch writes
    tokens = torch.full((rows, max_new_tokens), -1, device=device)
    logprobs = torch.zeros(rows, max_new_tokens, device=device)
    running = torch.ones(rows, dtype=torch.bool, device=device)  # over the rows of the batch
    every = CUDA_STEPS_PER_CHECK if device.type == "cuda" else 1
    for step in range(max_new_tokens):
        token, logprob = choose(logits, temperature, next(noise)[alive] if temperature > 0 else None)
        tokens[alive, step] = torch.where(running, token, -1)
        logprobs[alive, step] = logprob
        running = running & ~torch.isin(token, stop)
        if step + 1 == max_new_tokens:
            break
        if (step + 1) % every == 0:
            left = int(running.sum())
            if left == 0:
                break
            if left < KEEP_SHARE * len(alive):
                keep = running.nonzero()[:, 0]
                _drop_rows(cache, keep)
                alive, token, position, running = (x[keep] for x in (alive, token, position, running))
        if step == len(cache.own_mask):
            _make_room(cache)
        cache.at.fill_(step)
        cache.own_mask.index_fill_(0, cache.at, 0.0)
        inputs = decoder_inputs(token[:, None], position[:, None], cache)
        hidden = model.get_decoder()(**inputs).last_hidden_state
        logits = model.get_output_embeddings()(hidden[:, -1])
        position = position + 1
    counts = (tokens >= 0).sum(1).tolist()
    return [(t[:n], lp[:n]) for t, lp, n in zip(tokens.tolist(), logprobs.tolist(), counts)]


def rows_that_fit(model: nn.Module, prompt_tokens: int, copies: int, max_new_tokens: int) -> int:
    """How many sequences can be decoded at once in the GPU's free memory; no limit on a CPU.

    Planned for responses of PLANNED_TOKENS: few grow longer, and where too many do, the caller tries half.
    """
    if next(model.parameters()).device.type != "cuda":
        return sys.maxsize
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    per_token = 4 * math.prod(_kv_sizes(model))  # 16 bits
    per_row = per_token * (prompt_tokens / copies + min(max_new_tokens, PLANNED_TOKENS))
    per_row += 12 * model.get_input_embeddings().weight.shape[0]  # logits, their exponentials and sums
    return max(1, int(0.8 * free / per_row))


def choose(logits: Tensor, temperature: float, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """logits [B, V], uniform numbers [B] or None -> chosen token [B], log-prob [B]. None takes the maximum.

    Inverse-CDF sampling: one number per token decides, so a sample depends on its own prompt's seed only.
    """
    scaled = logits.float() / (temperature or 1.0)
    top = scaled.amax(-1, keepdim=True)
    weights = (scaled - top).exp_()
    if uniform is None:
        token = scaled.argmax(-1, keepdim=True)
        total = weights.sum(-1)
    else:
        cdf = weights.cumsum(-1, dtype=torch.float64)
        total = cdf[:, -1]
        token = torch.searchsorted(cdf, (uniform * total)[:, None], right=True)
        token = token.clamp(max=logits.shape[-1] - 1)
    return token[:, 0], (scaled.gather(-1, token) - top)[:, 0] - total.float().log()


def uniform_numbers(prompts: Sequence[Prompt], copies: int, device: torch.device) -> Iterator[Tensor]:
    """Endless [rows] vectors of uniform float64 numbers; each prompt has a generator with its own seed."""
    generators = [torch.Generator().manual_seed(p.seed) for p in prompts]
    while True:
        drawn = torch.cat([torch.rand(copies, BLOCK, generator=g, dtype=torch.float64) for g in generators])
        yield from drawn.to(device).T
