"""The grid of rows that kernel/decode.py decodes: K/V, what fills them, and the attention that reads them.

Each of n groups has one prompt, whose K/V lie there once, and S slots with a reply each. All sizes and places
stay as they are from step to step, so that a step can be replayed as a CUDA graph; what changes them (more
room, fewer rows) makes new tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kernel.attention import causal_attention, decoder_inputs, is_last_layer, kernel_dtype, varlen_attention
from kernel.head import head_logits

ROOM = 64  # K/V of replies grow by at least so many tokens
PREFILL_TOKENS = 16384  # prompts are prefilled in rows of about so many tokens
CPU_PREFILL_TOKENS = 2048  # more do not fit a CPU's caches
# What a batch has of each row.
ROW_STATE = ("token", "start", "at", "running", "noise", "tokens", "logprobs")
PREFILL, DECODE = "group_prefill", "group_decode"  # entries of transformers' attention interface


@dataclass(frozen=True)
class Request:
    """What rows of a pass go on from. number: the prompt's. ids: its tokens, and in a later pass also those
    of a reply so far. copies: which of the prompt's replies are decoded, one row each.
    """

    number: int
    copies: Sequence[int]
    ids: list[int]


@dataclass
class Batch:
    """A grid of n groups with S slots, in each of which a reply is decoded, and what the layers read of it.

    prompt_k, prompt_v: per layer [n, Hkv, P, D]. k, v: per layer [n, Hkv, S, R, D], with room for R tokens of
    a reply. mask [n, 1, S, 1, P + R]: 0 where a row sees the prompt's or its own token, else -inf.

    There are B rows: one per cell of the grid, or (on a CPU, at the end) only those that still run. cell [B]:
    a row's cell; base [B, Hkv]: where its own K/V begin, in vectors of D numbers. token [B]: the newest.
    start [B]: tokens before its reply. at [B]: tokens of the reply, the newest included.
    """

    prompt_k: list[Tensor]
    prompt_v: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    mask: Tensor
    cell: Tensor
    base: Tensor
    token: Tensor
    start: Tensor
    at: Tensor
    # What the sampler reads and writes: [B], and [B, longest reply + 1], whose last column is for nothing.
    running: Tensor
    noise: Tensor
    tokens: Tensor
    logprobs: Tensor
    # On the host, by row: whose reply it is (None: nobody's, or it was handed on), and its cell. By group:
    # the step at which it began, infinity where it has ended.
    owner: list[tuple[Request, int] | None]
    cells: list[int]
    born: list[float]
    write: Tensor | None = None  # [B · Hkv]: where this step's K/V go
    read: int | None = None  # of own K/V so many tokens are read, for no row has more; None: all R

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """n, S, P, R."""
        groups, _, slots, room, _ = self.k[0].shape
        return groups, slots, self.prompt_k[0].shape[2], room

    @property
    def full(self) -> bool:
        """Whether every cell has a row."""
        groups, slots, _, _ = self.shape
        return len(self.cell) == groups * slots

    def tensors(self) -> list[Tensor]:
        """All that `advance` reads and writes."""
        small = [self.mask, self.cell, self.base, self.token, self.start, self.at]
        return [*self.prompt_k, *self.prompt_v, *self.k, *self.v, *small]


@dataclass
class Prefill:
    """What a prefill pass fills in. Its row of T tokens holds several prompts.

    group, spot [T]: each token's place in the batch's prompt K/V. ends: where prompts begin and end, from 0
    to T. used: the last token of each (trim_last_layer).
    """

    batch: Batch
    group: Tensor
    spot: Tensor
    ends: Tensor
    lengths: list[int]
    used: Tensor


def prefill_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, scaling: float,
    layout: Prefill, **_,
) -> tuple[Tensor, None]:
    """Causal attention over each of the prompts in a row; keeps their K/V. [1, H, T, D] -> [1, T, H, D]."""
    dtype = kernel_dtype(query)
    query, key, value = (x[0].to(dtype) for x in (query, key, value))
    for kept, x in ((layout.batch.prompt_k, key), (layout.batch.prompt_v, value)):
        kept[module.layer_idx][layout.group, :, layout.spot] = x.transpose(0, 1).to(kept[0].dtype)
    if query.is_cuda and dtype != torch.float32:
        rows = (x.transpose(0, 1) for x in (query, key, value))
        longest = max(layout.lengths)
        return varlen_attention(*rows, layout.ends, layout.ends, longest, longest, scaling)[None], None
    parts = zip(*(x[None].split(layout.lengths, 2) for x in (query, key, value)))
    parts = [causal_attention(q, k, v, scaling, is_last_layer(module)) for q, k, v in parts]
    return torch.cat(parts, 2).transpose(1, 2), None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[N, M, D] x [N, D, K] -> [N, M, K] float32, whatever the inputs' dtype."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda:
            return torch.bmm(a, b, out_dtype=torch.float32)
        return torch.bmm(a.float(), b.float())


def decode_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, scaling: float,
    layout: Batch, **_,
) -> tuple[Tensor, None]:
    """One new token per row: attention to the row's prompt and to its own reply so far. -> [B, 1, H, D].

    The rows of a group are multiplied with their prompt's K/V together, as one matrix. No host
    synchronisation, and nothing that depends on the values of a tensor: a step can be replayed.
    """
    rows, heads, _, size = query.shape
    prompt_k, prompt_v, own_k, own_v = (
        x[module.layer_idx] for x in (layout.prompt_k, layout.prompt_v, layout.k, layout.v)
    )
    groups, kv_heads, slots, _, _ = own_k.shape
    read = layout.read
    for kept, x in ((own_k, key), (own_v, value)):
        kept.view(-1, size).index_copy_(0, layout.write, x.reshape(-1, size).to(kept.dtype))
    query = query.reshape(rows, heads, size).to(own_k.dtype)
    if not layout.full:
        query = query.new_zeros(groups * slots, heads, size).index_copy_(0, layout.cell, query)
    shape = (groups, kv_heads, slots, heads // kv_heads)
    grid = query.view(groups, slots, kv_heads, -1, size).transpose(1, 2).reshape(-1, shape[-1], size)
    # grid [n · Hkv · S, H/Hkv, D], by_group [n · Hkv, S · H/Hkv, D]
    by_group = grid.view(groups * kv_heads, -1, size)
    to_prompt = _product(by_group, prompt_k.flatten(0, 1).transpose(1, 2)).view(*shape, -1)
    to_own = _product(grid, own_k.flatten(0, 2)[:, :read].transpose(1, 2)).view(*shape, -1)
    scores = torch.cat([to_prompt, to_own], -1)  # [n, Hkv, S, H/Hkv, P + read]
    torch.add(layout.mask[..., : scores.shape[-1]], scores, alpha=scaling, out=scores)
    weights = scores.softmax(-1).to(own_v.dtype)
    of_prompt, of_own = weights.split([to_prompt.shape[-1], to_own.shape[-1]], -1)
    out = torch.bmm(of_own.flatten(0, 2), own_v.flatten(0, 2)[:, :read]).view_as(by_group)
    out.baddbmm_(of_prompt.flatten(2, 3).flatten(0, 1), prompt_v.flatten(0, 1))
    out = out.view(*shape, size).transpose(1, 2).reshape(groups * slots, 1, heads, size)
    return out if layout.full else out[layout.cell], None


# ----------------------------------------------------------------------------------------------- the passes


def kv_sizes(model: nn.Module) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and the size of one."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)  # a state-space model has none
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, size


def _attend_by(model: nn.Module, name: str, function: Callable) -> None:
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    model.set_attn_implementation(name)


def _logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """[N, H] -> [N, V] in fp32: 16 bits would round off what the trainer's head keeps."""
    head = model.get_output_embeddings()
    return head_logits(hidden.to(kernel_dtype(hidden)), head.weight, head.bias)


def aligned(length: int) -> int:
    """The next multiple of 8: 16-bit matrices whose rows do not begin at 16 bytes have slow kernels."""
    return -(-length // 8) * 8


def make_batch(model: nn.Module, groups: int, slots: int, longest: int, new: int) -> Batch:
    """An empty grid for prompts of at most `longest` tokens and replies of at most `new`."""
    layers, kv_heads, size = kv_sizes(model)
    weight = model.get_output_embeddings().weight
    rows, room, longest = groups * slots, min(ROOM, aligned(new)), aligned(longest)

    def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.zeros(shape, device=weight.device, dtype=dtype)

    def storage(*shape: int) -> list[Tensor]:
        return [zeros(groups, kv_heads, *shape, size, dtype=kernel_dtype(weight)) for _ in range(layers)]

    batch = Batch(
        storage(longest), storage(longest), storage(slots, room), storage(slots, room),
        mask=zeros(groups, 1, slots, 1, longest + room, dtype=torch.float32),
        cell=torch.arange(rows, device=weight.device), base=zeros(0), token=zeros(rows), start=zeros(rows),
        at=zeros(rows), running=zeros(rows, dtype=torch.bool), tokens=zeros(rows, new + 1),
        noise=zeros(rows, new + 1, dtype=torch.float64),
        logprobs=zeros(rows, new + 1, dtype=torch.float32),
        owner=[None] * rows, cells=list(range(rows)), born=[math.inf] * groups,
    )
    _index(batch)
    return batch


def _kv_rows(batch: Batch, cell: Tensor) -> Tensor:
    """[N] cells -> [N, Hkv]: which of the n · Hkv · S sequences of own K/V are theirs."""
    _, kv_heads, slots, _, _ = batch.k[0].shape
    group, slot = cell[:, None] // slots, cell[:, None] % slots
    return (group * kv_heads + torch.arange(kv_heads, device=cell.device)) * slots + slot


def _index(batch: Batch) -> None:
    """Sets `base`, which depends on the grid's shape."""
    batch.base = _kv_rows(batch, batch.cell) * batch.shape[-1]


def admit(
    model: nn.Module, batch: Batch, groups: Sequence[int], requests: Sequence[Request],
    noise: Sequence[Tensor], step: int,
) -> tuple[Tensor, Tensor]:
    """Gives these groups of a full grid new prompts, and their rows new replies. noise: [S, longest reply]
    uniform numbers for each, or none where tokens are not drawn.

    -> the rows [M], and the logits [M, V] of their first tokens.
    """
    _attend_by(model, PREFILL, prefill_attention)
    device = batch.cell.device
    slots = batch.shape[1]
    chosen = torch.tensor(groups, device=device)
    if step:  # before, all is 0
        for x in (*batch.prompt_k, *batch.prompt_v, *batch.k, *batch.v):
            x.index_fill_(0, chosen, 0.0)  # a NaN of the group before would reach this one: 0 · NaN is NaN
    last = []
    at = 0
    most = PREFILL_TOKENS if device.type == "cuda" else CPU_PREFILL_TOKENS
    while at < len(requests):
        first, total = at, 0
        while at < len(requests) and (not total or total + len(requests[at].ids) <= most):
            total += len(requests[at].ids)
            at += 1
        last.append(_prefill(model, batch, groups[first:at], requests[first:at]))
    _attend_by(model, DECODE, decode_attention)
    lengths = torch.tensor([len(request.ids) for request in requests], device=device)
    unseen = torch.arange(batch.mask.shape[-1], device=device) >= lengths[:, None]
    mask = torch.zeros(unseen.shape, device=device).masked_fill(unseen, -torch.inf)
    batch.mask[chosen] = mask[:, None, None, None]
    rows = (chosen[:, None] * slots + torch.arange(slots, device=device)).flatten()
    batch.start[rows] = lengths.repeat_interleave(slots)
    batch.at[rows] = 0
    batch.running[rows] = True
    if noise:
        numbers = torch.cat(list(noise))
        batch.noise[rows, : numbers.shape[1]] = numbers.to(device)
    for group, request in zip(groups, requests):
        batch.owner[group * slots : (group + 1) * slots] = [(request, copy) for copy in request.copies]
        batch.born[group] = step
    return rows, _logits(model, torch.cat(last)).repeat_interleave(slots, 0)


def _prefill(model: nn.Module, batch: Batch, groups: Sequence[int], requests: Sequence[Request]) -> Tensor:
    """Prompts in one row -> the last hidden state of each."""
    device = batch.cell.device
    lengths = [len(request.ids) for request in requests]
    ids = [token for request in requests for token in request.ids]
    spots = [spot for length in lengths for spot in range(length)]
    owners = [group for group, length in zip(groups, lengths) for _ in range(length)]
    ids, spots, owners = torch.tensor([ids, spots, owners], device=device)
    ends = torch.tensor([0, *itertools.accumulate(lengths)], device=device, dtype=torch.int32)
    used = ends[1:].long() - 1
    layout = Prefill(batch, owners, spots, ends, lengths, used)
    hidden = model.get_decoder()(**decoder_inputs(ids[None], spots[None], layout)).last_hidden_state
    return hidden[0, used]


def advance(model: nn.Module, batch: Batch) -> Tensor:
    """Feeds the newest token of every row -> logits [B, V] that predict the next ones."""
    _, _, width, room = batch.shape
    place = (batch.at - 1).clamp(max=room - 1)  # a row that has ended may have one more than there is room
    batch.write = (batch.base + place[:, None]).flatten()
    batch.mask.view(-1).index_fill_(0, batch.cell * (width + room) + width + place, 0.0)
    inputs = decoder_inputs(batch.token[:, None], (batch.start + place)[:, None], batch)
    return _logits(model, model.get_decoder()(**inputs).last_hidden_state[:, -1])


# ----------------------------------------------------------------------------------------- other sizes


def make_room(batch: Batch, new: int) -> None:
    """Half as much room again for the replies' K/V, and at least a block; no more than `new`."""
    room = batch.shape[-1]
    more = min(max(ROOM, room // 2 // ROOM * ROOM), aligned(new) - room)
    for tensors in (batch.k, batch.v):
        for layer, x in enumerate(tensors):  # one by one, so that only one is held twice
            tensors[layer] = F.pad(x, (0, 0, 0, more))
    batch.mask = F.pad(batch.mask, (0, more), value=-torch.inf)
    _index(batch)


def narrow(batch: Batch) -> None:
    """Reads no more of the prompts' K/V than the longest prompt has, where that is much less."""
    width = batch.shape[2]
    longest = max(len(owner[0].ids) for owner in batch.owner if owner)
    longest = -(-longest // ROOM) * ROOM
    if longest > 0.875 * width:
        return
    batch.prompt_k = [x[:, :, :longest] for x in batch.prompt_k]
    batch.prompt_v = [x[:, :, :longest] for x in batch.prompt_v]
    batch.mask = torch.cat([batch.mask[..., :longest], batch.mask[..., width:]], -1)


def shrink(batch: Batch, alive: Sequence[bool], exact: bool) -> None:
    """Leaves out groups and slots without a running row.

    exact: a grid as small as can be, and no rows but those that run, as suits a CPU. Else sizes are halved
    and every cell keeps a row: few shapes, so few graphs.
    """
    groups, slots, _, _ = batch.shape
    kv_heads, device = batch.k[0].shape[1], batch.cell.device
    rows_of: list[list[int]] = [[] for _ in range(groups)]
    for row in sorted(range(len(alive)), key=lambda row: not alive[row]):  # those that run come first
        if alive[row] or not exact:
            rows_of[batch.cells[row] // slots].append(row)
    counts = [sum(alive[row] for row in rows) for rows in rows_of]
    left, most = sum(count > 0 for count in counts), max(counts)
    if not exact:
        left, most = _halved(groups, left), _halved(slots, most)
        if (left, most) == (groups, slots):  # new tensors would cost a new graph
            return
    kept = sorted(sorted(range(groups), key=lambda group: -counts[group])[:left])
    rows = [row for group in kept for row in rows_of[group][:most]]
    source = [group * slots for group in kept for _ in range(most)]  # the old cell of each new one
    cells = [place * most + k for place, group in enumerate(kept) for k in range(len(rows_of[group][:most]))]
    for row, cell in zip(rows, cells):
        source[cell] = batch.cells[row]
    source, stay, chosen = (torch.tensor(x, device=device) for x in (source, rows, kept))
    sequences = _kv_rows(batch, source).view(left, most, kv_heads).transpose(1, 2).flatten()
    for tensors in (batch.k, batch.v):
        for layer, x in enumerate(tensors):  # one by one, so that only one is held twice
            taken = x.flatten(0, 2).index_select(0, sequences)
            tensors[layer] = taken.view(left, kv_heads, most, *x.shape[3:])
    for tensors in (batch.prompt_k, batch.prompt_v) if left < groups else ():
        for layer, x in enumerate(tensors):
            tensors[layer] = x.index_select(0, chosen)
    batch.mask = batch.mask.flatten(0, 2).index_select(0, source).view(left, 1, most, 1, -1)
    for name in ROW_STATE:
        setattr(batch, name, getattr(batch, name).index_select(0, stay))
    batch.cell, batch.cells = torch.tensor(cells, device=device), cells
    batch.owner = [batch.owner[row] for row in rows]
    batch.born = [batch.born[group] for group in kept]
    _index(batch)


def _halved(size: int, needed: int) -> int:
    """The size, halved (and rounded up) as often as it then still is enough."""
    while size > 1 and -(-size // 2) >= needed:
        size = -(-size // 2)
    return size
