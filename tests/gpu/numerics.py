"""The product's CUDA paths in its own precision against plain computations in fp32; bench/gpu.py reports
them.

A check returns its figures, and "passed".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import common
import torch
from common import TEMPERATURE
from gpu_measure import Session, measure
from torch import Tensor

from kernel.attention import use_attention
from kernel.head import head_logprobs
from kernel.packing import pack
from model import autocast
from rollout import ENGINES


def checks(session: Session) -> dict[str, Callable[[], dict]]:
    """Every check by name. The models' attention heads have 64 and 128 dimensions."""
    small, large = ("7B", "1.5B") if session.tiny else ("0.5B", "1.5B")
    every = {"LM head": partial(check_head, session)}
    every |= {f"log-probs {name}": partial(check_logprobs, session, name) for name in (small, large)}
    every["sampler"] = partial(check_sampler, session, small)
    for engine in (name for name in ENGINES if name != "generate"):
        for half in (False, True):
            name = f"greedy {engine} {'bf16' if half else 'fp32'}"
            every[name] = partial(check_greedy, session, small, engine, half)
    return every


def relative(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of the exact values, of all tensors together."""
    errors = sum(((a.double() - b) ** 2).sum() for a, b in zip(ours, exact))
    return (errors / sum((b.double() ** 2).sum() for b in exact)).sqrt().item()


def check_head(session: Session) -> dict:
    """The chunked LM head against full logits, forward + backward: errors against fp32, seconds, memory."""
    device, tokens, shape = session.device, session.load.head_tokens, list(session.models.values())[-1]
    hidden = torch.randn(tokens, shape.hidden, device=device).requires_grad_()
    weight = (torch.randn(shape.vocab, shape.hidden, device=device) * shape.hidden**-0.5).requires_grad_()
    grad, target = torch.randn(tokens, device=device), torch.randint(shape.vocab, (tokens,), device=device)

    def chunked() -> Tensor:
        return head_logprobs(hidden, weight, None, target, TEMPERATURE, entropy=False)[0]

    def full() -> Tensor:
        return (hidden @ weight.T / TEMPERATURE).float().log_softmax(-1).gather(-1, target[:, None])[:, 0]

    def run(way: Callable, half: bool = True) -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=half and device.type == "cuda"):
            logprobs = way()
        return [logprobs.detach(), *torch.autograd.grad(logprobs, [hidden, weight], grad)]

    values = {"relative_error": relative(run(chunked), run(full, half=False))}
    for way in (chunked, full):
        values[f"{way.__name__}_s"], values[f"{way.__name__}_gib"] = measure(device, run, way)
    return values | {"passed": values["relative_error"] < 0.01}


def check_logprobs(session: Session, name: str) -> dict:
    """Log-probs and gradients, packed and (to tell what bf16 costs) on plain rows, against fp32 one by one.

    Two packed runs with torch.use_deterministic_algorithms must be equal, bit by bit.
    """
    model = session.build(name).float()
    groups = common.random_groups(model.config.vocab_size, session.load.uneven)
    total = sum(len(ids) for _, responses in groups for ids in responses)

    def one_by_one() -> Iterator[Tensor]:
        use_attention(model, "generate")
        for prompt, responses in groups:
            for ids in responses:
                row = torch.tensor([prompt + ids], device=session.device)
                logits = model(row, use_cache=False).logits[0, len(prompt) - 1 : -1].float() / TEMPERATURE
                yield logits.log_softmax(-1).gather(-1, row[0, len(prompt) :, None])[:, 0]

    def run(parts: Iterator[Tensor]) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad(set_to_none=True)
        logprobs = []
        for part in parts:
            (part.sum() / total).backward()
            logprobs.append(part.detach())
        return torch.cat(logprobs), [p.grad for p in model.parameters()]

    def at_once(shared: bool) -> tuple[Tensor, list[Tensor]]:
        return run(iter([common.logprobs(model, pack(groups, session.device, shared))]))

    exact, exact_gradient = run(one_by_one())
    values = {}
    for way, shared in (("rows", False), ("packed", True)):
        logprobs, gradient = at_once(shared)
        values[f"{way}_mean"] = (logprobs - exact).abs().mean().item()
        values[f"{way}_gradient"] = relative(gradient, exact_gradient)
    del exact_gradient
    torch.use_deterministic_algorithms(True)
    (first, gradient), (second, again) = at_once(True), at_once(True)
    torch.use_deterministic_algorithms(False)
    values["equal_twice"] = torch.equal(first, second) and all(map(torch.equal, gradient, again))
    near = values["packed_mean"] < 0.02 and values["packed_gradient"] < 1.5 * values["rows_gradient"] + 1e-4
    return values | {"passed": near and values["equal_twice"]}


@torch.no_grad()
def check_sampler(session: Session, name: str) -> dict:
    """Log-probs that the default engine gave its samples against those that the trainer computes for them."""
    load, model = session.load, session.build(name)
    sizes = [(length, ()) for length, _ in load.uneven]
    prompts = [prompt for prompt, _ in common.random_groups(model.config.vocab_size, sizes)]
    responses, sampled = zip(*common.sample(model, prompts, load.copies, load.greedy_tokens))
    groups = [(ids, responses[i * load.copies : (i + 1) * load.copies]) for i, ids in enumerate(prompts)]
    sampled = torch.tensor([x for row in sampled for x in row], device=session.device)
    mean = (common.logprobs(model, pack(groups, session.device)) - sampled).abs().mean().item()
    return {"mean_difference": mean, "passed": mean < 0.02}


@torch.no_grad()
def check_greedy(session: Session, name: str, engine: str, half: bool) -> dict:
    """An engine's greedy tokens against generate's, up to the first difference of each row.

    There the two must be near ties: their fp32 logits closer than the noise of the computed ones allows.
    """
    model, gaps, noise = session.build(name), [0.0], [0.0]
    sizes = [(length, ()) for length, _ in session.load.uneven] * 4
    prompts = [prompt for prompt, _ in common.random_groups(model.config.vocab_size, sizes)]
    rows, wanted = (
        [ids for ids, _ in common.sample(model, prompts, 1, session.load.greedy_tokens, name, half=half)]
        for name in (engine, "generate")
    )
    use_attention(model, "generate")
    for prompt, ours, theirs in zip(prompts, rows, wanted, strict=True):
        first = next((i for i, token in enumerate(theirs) if ours[i : i + 1] != [token]), len(theirs))
        if first < len(theirs):
            ids = torch.tensor([prompt + theirs[:first]], device=session.device)
            exact = model(ids).logits[0, -1].float()
            with autocast(session.device):
                noise.append((model(ids).logits[0, -1].float() - exact).std().item())
            gaps.append((exact[theirs[first]] - exact[ours[first]]).abs().item())
    values = {"rows_that_differ": len(gaps) - 1, "largest_gap": max(gaps), "noise": max(noise)}
    return values | {"passed": max(gaps) <= max(1e-3, 8 * max(noise) if half else 0.0)}
