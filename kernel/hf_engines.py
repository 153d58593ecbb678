"""Hugging Face's own rollout engines: generate, the slow reference, and continuous batching.

Their signature is decode.Engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import transformers
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from kernel.attention import use_attention
from kernel.decode import Prompt, Replies


class EngineError(RuntimeError):
    """The library lost requests; the message says which engine to use instead, or where to look."""


@contextlib.contextmanager
def _own_generation_config(model: nn.Module, **settings) -> Iterator[GenerationConfig]:
    """A generation config with these settings, while the model's own is replaced by an empty one.

    generate() inherits whatever is None in ours from the model's own, and Qwen2.5-Instruct has top_k 20,
    top_p 0.8 and a repetition penalty of 1.05.
    """
    saved = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield GenerationConfig(**settings)
    finally:
        model.generation_config = saved


def _settings(copies: int, temperature: float, max_new_tokens: int, stops: list[int]) -> dict:
    settings = dict(do_sample=temperature > 0, num_return_sequences=copies, max_new_tokens=max_new_tokens)
    sampling = dict(temperature=temperature, top_k=0, top_p=1.0) if temperature > 0 else {}
    return dict(**settings, **sampling, eos_token_id=stops, pad_token_id=0)


@torch.no_grad()
def generate(
    model: nn.Module, prompts: Sequence[Prompt], copies: int, temperature: float, max_new_tokens: int,
    stops: list[int],
) -> Replies:
    """transformers' generate(), every prompt `copies` times: the reference to compare with.

    The batch shares its random numbers (seeded with the first prompt's seed), so a sample depends on the
    other prompts of its batch.
    """
    device = next(model.parameters()).device
    longest = max(len(p.ids) for p in prompts)
    ids = torch.tensor([[0] * (longest - len(p.ids)) + p.ids for p in prompts], device=device)
    lengths = torch.tensor([len(p.ids) for p in prompts], device=device)
    mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
    seen: list[Tensor] = []  # the log-probs [B, V] of the step before
    logprobs: list[Tensor] = []

    def record(past: Tensor, scores: Tensor) -> Tensor:
        # Called before each choice, with raw scores: the last token of `past` was chosen by those before.
        if seen:
            logprobs.append(seen.pop().gather(-1, past[:, -1:]))
        seen.append(torch.log_softmax(scores.float() / (temperature or 1.0), -1))
        return scores

    use_attention(model, "generate")
    settings = _settings(copies, temperature, max_new_tokens, stops)
    with (
        _own_generation_config(model, **settings) as config,
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(prompts[0].seed)
        out = model.generate(ids, attention_mask=mask, generation_config=config, logits_processor=[record])
    logprobs.append(seen.pop().gather(-1, out[:, -1:]))
    rows = []
    for reply, chance in zip(out[:, longest:].tolist(), torch.cat(logprobs, 1).tolist()):
        end = next((i + 1 for i, token in enumerate(reply) if token in stops), len(reply))
        rows.append((reply[:end], chance[:end]))
    return rows


def cpu_pages(lengths: Sequence[int]) -> dict[str, int]:
    """Settings of continuous batching with room for rows of so many tokens (prompt and response) at once; by
    default it would take nearly all of a CPU machine's memory.
    """
    default = ContinuousBatchingConfig()
    page = getattr(default, "page_size", 0) or default.block_size  # its name in transformers 5.17
    return {"num_blocks": sum(-(-length // page) for length in lengths) + 8, "max_batch_tokens": 2048}


@torch.no_grad()
def continuous_batching(
    model: nn.Module, prompts: Sequence[Prompt], copies: int, temperature: float, max_new_tokens: int,
    stops: list[int],
) -> Replies:
    """transformers' generate_batch(): paged K/V, rows enter and leave at any time. For CUDA with flash-attn.

    Every call makes a new manager: a kept one serves prompt K/V of the weights before the update, and ignores
    a new generation config. Raises EngineError where the library returns less than was asked for: it raises
    nothing itself.
    """
    use_attention(model, "generate")
    on_cpu = next(model.parameters()).device.type == "cpu"
    pages = cpu_pages([len(p.ids) + max_new_tokens for p in prompts for _ in range(copies)]) if on_cpu else {}
    settings = ContinuousBatchingConfig(return_logprobs=True, seed=prompts[0].seed % 2**31, **pages)
    # transformers 5.17 returns only the first completion of a prompt, however many it was asked for.
    forks = copies if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23) else 1
    with _own_generation_config(model, **_settings(forks, temperature, max_new_tokens, stops)) as config:
        results = model.generate_batch(
            [p.ids for p in prompts for _ in range(copies // forks)], generation_config=config,
            continuous_batching_config=settings, persistent_manager=False,
        )
    # Samples of one prompt are exchangeable, so neither the order nor the names of the requests matter.
    found: dict[tuple[int, ...], Replies] = {}
    for result in results.values():
        if result.error:
            remedy = "try --rollout_engine shared_prefix"
            raise EngineError(f"continuous_batching: a request failed: {result.error}; {remedy}")
        found.setdefault(tuple(result.prompt_ids), []).append((result.generated_tokens, result.logprobs))
    rows = []
    for prompt in prompts:
        own = found.get(tuple(prompt.ids), [])
        if len(own) < copies:
            number = f"{len(results)} of {len(prompts) * copies} completions"
            raise EngineError(f"continuous_batching returned {number}; its log above says why")
        rows += [own.pop() for _ in range(copies)]
    return rows
