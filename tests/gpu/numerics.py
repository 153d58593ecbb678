"""What bench/gpu.py checks: the product's CUDA paths in its own precision against plain computations in
fp32.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from gpu_measure import TEMPERATURE, Session, measure, random_groups, respond  # noqa: E402

from kernel.attention import shared_prefix_attention, use_attention, uses_shared_prefix
from kernel.head import head_logprobs
from kernel.packing import pack
from model import autocast, token_logprobs

LIMIT = 1e-2  # relative error of bf16 against fp32
LOGPROB_LIMIT = 0.02  # mean difference of log-probs


def relative(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of the exact values, of all tensors together."""
    errors = sum(((a.double() - b) ** 2).sum() for a, b in zip(ours, exact))
    return (errors / sum((b.double() ** 2).sum() for b in exact)).sqrt().item()


def check_attention(session: Session, heads: int, kv_heads: int, size: int, strict: bool) -> dict:
    """Packed groups, forward and backward, against fp32 attention of every prompt + response by itself.

    strict: with torch.use_deterministic_algorithms; then two runs must be equal.
    """
    uneven, device = session.load.uneven, session.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layout = pack(random_groups(9, uneven), device).layout
    generator = torch.Generator(device).manual_seed(size)
    shapes = [(1, n, len(layout.uses), size) for n in (heads, kv_heads, kv_heads, heads)]
    *inputs, grad = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)

    def run(attention: Callable, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        out = attention(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.transpose(1, 2).to(dtype))]

    def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return shared_prefix_attention(
            nn.Identity(), query, key, value, None, scaling=size**-0.5, layout=layout
        )[0]

    def one_by_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts, end = [], 0
        for length, responses in uneven:
            prompt, end = list(range(end, end + length)), end + length
            for n in (0, *responses):  # 0: the prompt itself
                q, k, v = (x[:, :, [*prompt, *range(end, end + n)]] for x in (query, key, value))
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=size**-0.5, enable_gqa=True
                )
                parts.append(out[:, :, length if n else 0 :])
                end += n
        return torch.cat(parts, 2).transpose(1, 2)

    torch.use_deterministic_algorithms(strict)
    try:
        first, second = run(packed, dtype), run(packed, dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    with sdpa_kernel(SDPBackend.MATH):
        exact = run(one_by_one, torch.float32)
    errors = {name: relative([a], [b]) for name, a, b in zip(("out", "dq", "dk", "dv"), first, exact)}
    equal = all(map(torch.equal, first, second))
    return errors | {
        "equal_twice": equal,
        "passed": all(e < LIMIT for e in errors.values()) and (equal or not strict),
    }


def check_head(session: Session, hidden: int, vocab: int) -> dict:
    """The chunked LM head against full logits, forward + backward: its errors against fp32, entropy included;
    memory and seconds against what most trainers do, without entropy. Memory is without inputs, with their
    gradients.
    """
    device, tokens = session.device, session.load.head_tokens
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    leaves = [draw(tokens, hidden).requires_grad_(), (draw(vocab, hidden) * hidden**-0.5).requires_grad_()]
    grad, target = draw(tokens), torch.randint(vocab, (tokens,), generator=generator, device=device)

    def chunked(entropy: bool) -> tuple[Tensor, Tensor]:
        return head_logprobs(*leaves, None, target, TEMPERATURE, entropy=entropy)

    def full(entropy: bool) -> tuple[Tensor, Tensor]:
        logprobs = (leaves[0] @ leaves[1].T / TEMPERATURE).float().log_softmax(-1)
        own = logprobs.gather(-1, target[:, None])[:, 0]
        return own, -(logprobs.exp() * logprobs).sum(-1).detach() if entropy else torch.zeros_like(own)

    def run(way: Callable, half: bool, entropy: bool) -> list[Tensor]:
        with autocast(device) if half else contextlib.nullcontext():
            logprobs, entropies = way(entropy)
        return [logprobs.detach(), entropies, *torch.autograd.grad(logprobs, leaves, grad)]

    names = ("logprobs", "entropy", "d_hidden", "d_weight")
    pairs = zip(names, run(chunked, True, True), run(full, False, True))
    values = {name: relative([a], [b]) for name, a, b in pairs}
    values["passed"] = all(error < LIMIT for error in values.values())
    for name, way in (("chunked", chunked), ("full", full)):
        run(way, True, False)  # warms up
        values[f"{name}_s"], values[f"{name}_gib"] = measure(device, run, way, True, False)
    return values | (
        {"memory_ratio": values["chunked_gib"] / values["full_gib"]} if values["full_gib"] else {}
    )


def check_logprobs(session: Session, model: nn.Module) -> dict:
    """token_logprobs and its gradients, packed and (as a measure of bf16) on plain rows, against fp32 one by
    one.
    """
    groups = random_groups(model.config.vocab_size, session.load.uneven)
    total = sum(len(ids) for _, responses in groups for ids in responses)

    def one_by_one() -> Iterator[Tensor]:
        use_attention(model, "generate")
        for prompt, responses in groups:
            for ids in responses:
                row = torch.tensor([prompt + ids], device=session.device)
                logits = model(row, use_cache=False).logits[0, len(prompt) - 1 : -1].float() / TEMPERATURE
                yield logits.log_softmax(-1).gather(-1, row[0, len(prompt) :, None])[:, 0]

    def at_once(shared: bool) -> Iterator[Tensor]:
        use_attention(model, "train" if shared else "generate")
        yield token_logprobs(model, pack(groups, session.device, shared), TEMPERATURE)[0]

    def run(parts: Iterator[Tensor]) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad(set_to_none=True)
        logprobs = []
        for part in parts:
            (part.sum() / total).backward()
            logprobs.append(part.detach())
        return torch.cat(logprobs), [p.grad for p in model.parameters()]

    exact, exact_gradient = run(one_by_one())
    values = {}
    for name, shared in (("packed", True), ("rows", False)):
        logprobs, gradient = run(at_once(shared))
        difference = (logprobs - exact).abs()
        values |= {f"{name}_mean": difference.mean().item(), f"{name}_max": difference.max().item()}
        values[f"{name}_gradient"] = relative(gradient, exact_gradient)
    model.zero_grad(set_to_none=True)
    exact_enough = values["packed_gradient"] < 1.5 * values["rows_gradient"] + 1e-4
    return values | {
        "passed": uses_shared_prefix(model) and values["packed_mean"] < LOGPROB_LIMIT and exact_enough
    }


@torch.no_grad()
def check_sampler(session: Session, model: nn.Module) -> dict:
    """Log-probs that the default engine gave its samples against those that the trainer computes for them."""
    load = session.load
    prompts = [
        prompt
        for prompt, _ in random_groups(model.config.vocab_size, [(length, ()) for length, _ in load.uneven])
    ]
    rows = respond(session, model, "shared_prefix", prompts, load.copies, load.greedy_tokens)
    sampled = torch.tensor([x for _, logprobs in rows for x in logprobs], device=session.device)
    groups = [
        (p, [ids for ids, _ in rows[i * load.copies : (i + 1) * load.copies]]) for i, p in enumerate(prompts)
    ]
    use_attention(model, "train")
    difference = (token_logprobs(model, pack(groups, session.device), TEMPERATURE)[0] - sampled).abs()
    mean = difference.mean().item()
    return {
        "mean_difference": mean,
        "max_difference": difference.max().item(),
        "passed": mean < LOGPROB_LIMIT,
    }


@torch.no_grad()
def check_greedy(session: Session, model: nn.Module, engine: str, half: bool) -> dict:
    """An engine's greedy tokens against generate's, up to the first difference of each row.

    There the two tokens must be near ties: their fp32 logits closer than the noise of the computed ones
    allows.
    """
    lengths = [(length, ()) for length, _ in session.load.uneven] * 4
    prompts = [prompt for prompt, _ in random_groups(model.config.vocab_size, lengths)]
    rows, wanted = (
        [ids for ids, _ in respond(session, model, name, prompts, 1, session.load.greedy_tokens, half)]
        for name in (engine, "generate")
    )
    use_attention(model, "generate")
    equal, gaps, noise = 0, [0.0], [0.0]
    for prompt, ours, theirs in zip(prompts, rows, wanted, strict=True):
        first = next((i for i, token in enumerate(theirs) if ours[i : i + 1] != [token]), len(theirs))
        equal += first
        if first < len(theirs):
            ids = torch.tensor([prompt + theirs[:first]], device=session.device)
            exact = model(ids).logits[0, -1].float()
            with autocast(session.device):
                noise.append((model(ids).logits[0, -1].float() - exact).std().item())
            gaps.append((exact[theirs[first]] - exact[ours[first]]).abs().item())
    allowed = max(1e-3, 8 * max(noise) if half else 0.0)
    values = {
        "equal_share": equal / sum(map(len, wanted)),
        "rows_that_differ": f"{len(gaps) - 1} of {len(rows)}",
    }
    return values | {
        "largest_logit_gap": max(gaps),
        "logit_noise": max(noise),
        "passed": max(gaps) <= allowed,
    }
