"""The product's CUDA paths in its own precision (FSDP2, bf16 computation) against plain computations in fp32;
bench/gpu.py reports them.

A check returns its figures, and "passed".
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from unittest import mock

import common
import torch
import torch.nn.functional as F
from common import TEMPERATURE
from gpu_measure import Session, memory, seconds
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distributed.fsdp import full_tensor, gathered_weights
from kernel import hf_engines
from kernel.attention import shared_prefix_attention, use_attention
from kernel.head import head_logprobs
from kernel.packing import pack
from model import autocast, compute_dtype
from rollout import ENGINES

HEADS = {"0.5B": (14, 2, 64), "7B": (28, 4, 128)}  # number of queries' and of keys', size


def checks(session: Session) -> dict[str, Callable[[], dict]]:
    """Every check by name."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without, cuBLAS is not deterministic

    @functools.cache
    def models(name: str) -> tuple[nn.Module, nn.Module]:
        return session.policy(name), session.exact(name)

    every = {f"attention {heads}": partial(check_attention, session, heads) for heads in HEADS}
    every["LM head"] = partial(check_head, session)
    for name in ("0.5B", "1.5B"):  # heads of 64 and 128 dimensions
        every[f"log-probs {name}"] = lambda name=name: check_logprobs(session, *models(name))
        every[f"sampler {name}"] = lambda name=name: check_sampler(session, *models(name))
    for engine in ENGINES:
        if engine != "generate":
            every[f"greedy {engine}"] = lambda engine=engine: check_greedy(session, *models("0.5B"), engine)
    return every


def relative(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of the exact values, of all tensors together."""
    errors = sum(((a.double() - b) ** 2).sum() for a, b in zip(ours, exact))
    return (errors / sum((b.double() ** 2).sum() for b in exact)).sqrt().item()


def twice(run: Callable[[], Sequence[Tensor]]) -> bool:
    """Whether two runs with torch's deterministic algorithms are equal, bit by bit; says what has no such."""
    torch.use_deterministic_algorithms(True)
    try:
        return all(map(torch.equal, run(), run()))
    except RuntimeError as error:
        print(error)
        return False
    finally:
        torch.use_deterministic_algorithms(False)


def check_attention(session: Session, name: str) -> dict:
    """Attention over packed random groups and its gradients against fp32, one response at a time."""
    longest, device = max(prompt for prompt, _ in session.load.uneven), session.device
    heads, kv_heads, size = HEADS[name]
    errors, equal = [], []
    for seed in range(3):
        rng = random.Random(seed)
        sizes = []
        for _ in range(rng.randint(2, 4)):
            responses = [rng.randint(1, max(2, longest // 4)) for _ in range(rng.randint(1, 8))]
            sizes.append((rng.randint(1, longest), responses))
        packed = pack(common.random_groups(100, sizes), device)
        torch.manual_seed(seed)
        shapes = [(1, count, packed.ids.shape[1], size) for count in (heads, kv_heads, kv_heads)]
        inputs = [torch.randn(shape, device=device).to(compute_dtype(device)) for shape in shapes]
        grad = torch.randn_like(inputs[0].transpose(1, 2))

        def run(attend: Callable, dtype: torch.dtype, inputs=inputs, grad=grad) -> list[Tensor]:
            leaves = [x.to(dtype).requires_grad_() for x in inputs]
            out = attend(*leaves)
            return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

        def ours(*leaves: Tensor, packed=packed) -> Tensor:
            layout = packed.layout
            return shared_prefix_attention(nn.Module(), *leaves, None, scaling=size**-0.5, layout=layout)[0]

        found = partial(run, ours, inputs[0].dtype)
        exact = run(partial(plain_attention, sizes), torch.float32)
        errors.append([relative([a], [b]) for a, b in zip(found(), exact)])
        equal.append(twice(found))
    worst = torch.tensor(errors).amax(0)  # NaN stays NaN, and passes nowhere
    figures = dict(zip(("output", "query", "key", "value"), worst.tolist()))
    return figures | {"equal_twice": all(equal), "passed": bool((worst < 0.01).all()) and all(equal)}


def plain_attention(sizes: Sequence[tuple], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[1, H, T, D], [1, Hkv, T, D] -> [1, T, H, D]: every prompt + response on its own."""
    parts, start = [], 0
    for prompt, responses in sizes:
        whole = range(start, start + prompt)
        start += prompt
        for i, size in enumerate([0, *responses]):
            rows = [*whole, *range(start, start + size)]
            q, k, v = (x[:, :, rows] for x in (query, key, value))
            with sdpa_kernel(SDPBackend.MATH):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            parts.append(out[:, :, prompt:] if i else out)  # the prompt's own output comes first, once
            start += size
    return torch.cat(parts, 2).transpose(1, 2)


def check_head(session: Session) -> dict:
    """The chunked LM head, forward + backward, against full logits in fp32; the memory of both."""
    device, tokens, shape = session.device, session.load.head_tokens, session.models["1.5B"]
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

    error, peaks = relative(run(chunked), run(full, half=False)), {}
    for way in (chunked, full):
        seconds(session, run, way)
        peaks[f"{way.__name__}_gib"] = memory(session)["peak_gib"]
    return {"relative_error": error, **peaks, "passed": error < 0.01}


def check_logprobs(session: Session, policy: nn.Module, exact: nn.Module) -> dict:
    """Log-probs and gradients, packed and (to tell what bf16 costs) on plain rows, against fp32 one by one.

    Two packed runs with deterministic algorithms must be equal.
    """
    groups = common.random_groups(exact.config.vocab_size, session.load.uneven)
    total = sum(len(ids) for _, responses in groups for ids in responses)

    def one_by_one() -> Iterator[Tensor]:
        for prompt, responses in groups:
            for ids in responses:
                row = torch.tensor([prompt + ids], device=session.device)
                logits = exact(row, use_cache=False).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
                yield logits.log_softmax(-1).gather(-1, row[0, len(prompt) :, None])[:, 0]

    def run(model: nn.Module, parts: Iterator[Tensor]) -> list[Tensor]:
        """All log-probs, and the gradients of their mean."""
        logprobs = []
        for part in parts:
            (part.sum() / total).backward()
            logprobs.append(part.detach())
        gradients = [full_tensor(p.grad) for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        return [torch.cat(logprobs), *gradients]

    def at_once(shared: bool) -> list[Tensor]:
        return run(policy, iter([common.logprobs(policy, pack(groups, session.device, shared))]))

    truth, *exact_gradient = run(exact, one_by_one())
    values = {}
    for way, shared in (("rows", False), ("packed", True)):
        logprobs, *gradient = at_once(shared)
        values[f"{way}_mean"] = (logprobs - truth).abs().mean().item()
        values[f"{way}_gradient"] = relative(gradient, exact_gradient)
    del exact_gradient, gradient
    values["equal_twice"] = twice(partial(at_once, True))
    near = values["packed_mean"] < 0.02 and values["packed_gradient"] < 1.5 * values["rows_gradient"] + 1e-4
    return values | {"passed": near and values["equal_twice"]}


@torch.no_grad()
def check_sampler(session: Session, policy: nn.Module, exact: nn.Module) -> dict:
    """Log-probs that the default engine gave its samples against those that the trainer computes for them."""
    load = session.load
    sizes = [(length, ()) for length, _ in load.uneven]
    prompts = [prompt for prompt, _ in common.random_groups(exact.config.vocab_size, sizes)]
    with gathered_weights(policy) as twin:
        responses, sampled = zip(*common.sample(twin, prompts, load.copies, load.greedy_tokens))
    groups = [(ids, responses[i * load.copies : (i + 1) * load.copies]) for i, ids in enumerate(prompts)]
    sampled = torch.tensor([x for row in sampled for x in row], device=session.device)
    gap = common.logprobs(policy, pack(groups, session.device)) - sampled
    mean = gap.abs().mean().item()
    return {"mean_difference": mean, "largest": gap.abs().max().item(), "passed": mean < 0.02}


@torch.no_grad()
def check_greedy(session: Session, policy: nn.Module, exact: nn.Module, engine: str) -> dict:
    """An engine's greedy tokens against generate's, up to the first difference of each row.

    There the two must be near ties: their fp32 logits closer than the noise of the computed ones allows.
    """
    gaps, noise, equal = [0.0], [0.0], []
    sizes = [(length, ()) for length, _ in session.load.uneven] * 4
    prompts = [prompt for prompt, _ in common.random_groups(exact.config.vocab_size, sizes)]
    # Continuous batching would take most of the memory, where other processes are at work.
    pages = hf_engines.cpu_pages([len(ids) + session.load.greedy_tokens for ids in prompts])
    limited = partial(hf_engines.ContinuousBatchingConfig, **pages)
    with (
        gathered_weights(policy) as twin, mock.patch.object(hf_engines, "ContinuousBatchingConfig", limited)
    ):
        rows, wanted = (
            [ids for ids, _ in common.sample(twin, prompts, 1, session.load.greedy_tokens, name)]
            for name in (engine, "generate")
        )
        use_attention(twin, "generate")
        for prompt, ours, theirs in zip(prompts, rows, wanted, strict=True):
            first = next((i for i, token in enumerate(theirs) if ours[i : i + 1] != [token]), len(theirs))
            equal.append(first / len(theirs))
            if first < len(theirs):
                ids = torch.tensor([prompt + theirs[:first]], device=session.device)
                logits = exact(ids).logits[0, -1]
                with autocast(session.device):
                    noise.append((twin(ids).logits[0, -1].float() - logits).std().item())
                gaps.append((logits[theirs[first]] - logits[ours[first]]).abs().item())
    gap, spread = (torch.tensor(values).max().item() for values in (gaps, noise))
    values = {"equal_share": sum(equal) / len(equal), "largest_gap": gap, "noise": spread}
    return values | {"passed": gap <= max(1e-3, 8 * spread)}
