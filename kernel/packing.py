"""Groups as one row of tokens, and micro-batches of groups.

A group is packed as [prompt, response 1 … response G]. Positions of each response restart after the prompt,
and it attends to the prompt and to itself (attention.py), so a prompt is computed once for all responses.
Models whose attention cannot do that get every prompt + response as a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """One group in a packed row: a prompt of P tokens, then its G responses, of R tokens at most, N in all.

    real [N]: where the responses' tokens are in their padded [G, R] form, flattened.
    """

    prompt: int
    responses: int
    longest: int
    real: Tensor


@dataclass(frozen=True)
class Layout:
    """Where the groups of one packed row lie. Tensors are on the model's device.

    spans: the groups in order, for SDPA. kv_index [total_k], cu_q and cu_k [segments + 1], max_q and max_k:
    for variable-length kernels, whose segments are each prompt, then each of its responses. by_source
    [total_k] sorts kv_index, and uses [T] counts how often each token stands in it: to add up gradients.
    used: the tokens that predict something, ascending.
    """

    spans: list[Span]
    kv_index: Tensor
    by_source: Tensor
    uses: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    used: Tensor


@dataclass(frozen=True)
class Packed:
    """One micro-batch with N response tokens: one row of T tokens, or (layout None) B right-padded rows.

    ids, positions [1, T] or [B, T]; predict [N]: the place in the flattened rows whose output predicts each
    response token; target [N]: that token; counts: response tokens per response, in order, so that
    per-response values expand with repeat_interleave.
    """

    ids: Tensor
    positions: Tensor
    layout: Layout | None
    predict: Tensor
    target: Tensor
    counts: Tensor


def pack(
    groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], device: torch.device,
    share_prompt: bool = True,
) -> Packed:
    """Groups, (prompt ids, list of response ids), as one row, or without `share_prompt` a row per response.

    Responses keep their end token: it is learned too. Raises ValueError for an empty prompt or response.
    """
    for prompt, responses in groups:
        if not prompt or not responses or not all(responses):
            raise ValueError("a group needs a prompt and responses of at least one token each")
    return _pack_shared(groups, device) if share_prompt else _pack_rows(groups, device)


def _pack_shared(groups: Sequence[tuple], device: torch.device) -> Packed:
    ids, positions = [], []
    predict, target, counts = [], [], []
    spans, kv_index = [], []
    query_lengths, key_lengths = [], []
    for prompt, responses in groups:
        start, length = len(ids), len(prompt)
        sizes = [len(response) for response in responses]
        longest = max(sizes)
        ids += prompt
        positions += range(length)
        counts += sizes
        query_lengths += [length, *sizes]
        key_lengths += [length, *(length + size for size in sizes)]
        prompt_rows = torch.arange(start, start + length)
        kv_index.append(prompt_rows)
        real = []
        for i, response in enumerate(responses):
            first, size = len(ids), sizes[i]
            ids += response
            positions += range(length, length + size)
            # The prompt's last token predicts the first response token of every response of the group.
            predict += [start + length - 1, *range(first, first + size - 1)]
            target += response
            real += range(i * longest, i * longest + size)
            kv_index += [prompt_rows, torch.arange(first, first + size)]
        spans.append(Span(length, len(responses), longest, torch.tensor(real, device=device)))
    rows = torch.cat(kv_index)
    cu_q, cu_k = (F.pad(torch.tensor(sizes).cumsum(0), (1, 0)) for sizes in (query_lengths, key_lengths))
    layout = Layout(
        spans, kv_index=rows.to(device), by_source=rows.argsort(stable=True).to(device),
        uses=rows.bincount(minlength=len(ids)).to(device), cu_q=cu_q.to(device, torch.int32),
        cu_k=cu_k.to(device, torch.int32), max_q=max(query_lengths), max_k=max(key_lengths),
        used=torch.tensor(sorted(set(predict)), device=device),
    )
    row = torch.tensor([ids, positions], device=device)[:, None]
    predict, target, counts = (torch.tensor(x, device=device) for x in (predict, target, counts))
    return Packed(row[0], row[1], layout, predict, target, counts)


def _pack_rows(groups: Sequence[tuple], device: torch.device) -> Packed:
    rows = [(len(prompt), [*prompt, *response]) for prompt, responses in groups for response in responses]
    width = max(len(row) for _, row in rows)
    # On the right nothing needs a mask: causal attention never looks there, and no output there is used.
    ids = torch.tensor([row + [0] * (width - len(row)) for _, row in rows], device=device)
    predict = [i * width + k - 1 for i, (start, row) in enumerate(rows) for k in range(start, len(row))]
    target = [token for start, row in rows for token in row[start:]]
    counts = [len(row) - start for start, row in rows]
    predict, target, counts = (torch.tensor(x, device=device) for x in (predict, target, counts))
    return Packed(ids, torch.arange(width, device=device).expand_as(ids), None, predict, target, counts)


def micro_batches(
    sizes: Sequence[tuple[int, Sequence[int]]], budget: int, share_prompt: bool = True
) -> list[list[tuple[int, slice]]]:
    """Cuts groups into micro-batches of at most `budget` tokens, in order. -> per micro-batch, its parts as
    (group index, slice of the group's responses).

    sizes: (prompt length, response lengths) per group. Groups stay whole, except one that is larger than the
    budget: its parts repeat the prompt and hold some of its responses. A response is never cut: a prompt +
    response above the budget stands alone. share_prompt: as in `pack`; without it, the padded rows count.
    """

    def tokens(parts: list[tuple[int, slice]]) -> int:
        """What a micro-batch of these parts computes, padding included."""
        lengths = [(sizes[i][0], sizes[i][1][responses]) for i, responses in parts]
        if share_prompt:
            return sum(prompt + sum(replies) for prompt, replies in lengths)
        rows = sum(len(replies) for _, replies in lengths)
        return rows * max(prompt + max(replies) for prompt, replies in lengths)

    batches: list[list[tuple[int, slice]]] = []
    for i, (_, replies) in enumerate(sizes):
        whole = (i, slice(0, len(replies)))
        if batches and tokens([*batches[-1], whole]) <= budget:
            batches[-1].append(whole)
            continue
        start = 0
        for end in range(2, len(replies) + 1):
            if tokens([(i, slice(start, end))]) > budget:
                batches.append([(i, slice(start, end - 1))])
                start = end - 1
        batches.append([(i, slice(start, len(replies)))])
    return batches
