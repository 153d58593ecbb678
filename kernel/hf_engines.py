"""Hugging Face's own rollout engines (decode.Engine): generate, the slow reference; continuous batching."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import transformers
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from kernel.attention import use_attention
from kernel.decode import (
    PASS_TOKENS,
    Engine,
    Prompt,
    Reply,
    choose,
    rows_that_fit,
    shared_prefix,
    tokens_of_pass,
    uniform_numbers,
)


class EngineError(RuntimeError):
    """The library lost requests; the message says what to do."""


def in_batches(engine: Callable[..., list[Reply]]) -> Engine:
    """An engine from a function that answers some prompts at once, without `rows`: replies of prompt 1 copy
    1, prompt 1 copy 2, … Prompts that lie side by side share a batch.
    """

    @functools.wraps(engine)
    def run(model, prompts, copies, temperature, max_new_tokens, stops, rows):
        """The engine, as decode.Engine says: at most `rows` rows at once, but at least a group."""
        longest = max(len(prompt.ids) for prompt in prompts)
        fit = rows_that_fit(model, longest, copies, tokens_of_pass(max_new_tokens, PASS_TOKENS))
        size = max(1, min(rows, fit) // copies)
        for first in range(0, len(prompts), size):
            some = prompts[first : first + size]
            replies = engine(model, some, copies, temperature, max_new_tokens, stops)
            for k in range(len(some)):
                yield first + k, replies[k * copies : (k + 1) * copies]

    return run


@contextlib.contextmanager
def _own_generation_config(
    model: nn.Module, copies: int, temperature: float, max_new_tokens: int, stops: list[int]
) -> Iterator[GenerationConfig]:
    """Our generation config, while the model's own is replaced by an empty one: generate() takes from that
    whatever is None in ours, and Qwen2.5-Instruct has top_k 20, top_p 0.8 and a repetition penalty.
    """
    sampling = dict(temperature=temperature, top_k=0, top_p=1.0) if temperature > 0 else {}
    saved = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield GenerationConfig(
            do_sample=temperature > 0, num_return_sequences=copies, max_new_tokens=max_new_tokens,
            eos_token_id=stops, pad_token_id=0, **sampling,
        )
    finally:
        model.generation_config = saved


@in_batches
@torch.no_grad()
def generate(
    model: nn.Module, prompts: Sequence[Prompt], copies: int, temperature: float, max_new_tokens: int,
    stops: list[int],
) -> list[Reply]:
    """transformers' generate(), every prompt `copies` times: the reference to compare with.

    It draws the same numbers as the default engine, so the samples are the same, but for rounding.
    """
    device = next(model.parameters()).device
    longest = max(len(p.ids) for p in prompts)
    padding = [longest - len(p.ids) for p in prompts]
    ids = torch.tensor([[0] * n + p.ids for n, p in zip(padding, prompts)], device=device)
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=device)
    noise = torch.cat([uniform_numbers(prompt, copies, max_new_tokens) for prompt in prompts]).to(device)
    logprobs: list[Tensor] = []

    def draw(past: Tensor, scores: Tensor) -> Tensor:
        """The default engine's choice of a token, as scores whose maximum it is: generate() is greedy."""
        uniform = noise[:, len(logprobs), None] if temperature > 0 else None
        token, logprob = choose(scores, temperature, uniform)
        logprobs.append(logprob)
        return torch.full_like(scores, -torch.inf).scatter(-1, token[:, None], 0.0)

    use_attention(model, "generate")
    with _own_generation_config(model, 1, 0.0, max_new_tokens, stops) as config:
        out = model.generate(
            ids.repeat_interleave(copies, 0), attention_mask=mask.repeat_interleave(copies, 0),
            generation_config=config, logits_processor=[draw],
        )
    rows = []
    for reply, chance in zip(out[:, longest:].tolist(), torch.stack(logprobs, 1).tolist()):
        end = next((i + 1 for i, token in enumerate(reply) if token in stops), len(reply))
        rows.append((reply[:end], chance[:end]))
    return rows


def cpu_pages(lengths: Sequence[int]) -> dict[str, int]:
    """Room for rows of so many tokens: on a CPU, continuous batching would take nearly all memory."""
    default = ContinuousBatchingConfig()
    page = getattr(default, "page_size", 0) or default.block_size  # its name in transformers 5.17
    return {"num_blocks": sum(-(-length // page) for length in lengths) + 8, "max_batch_tokens": 2048}


@in_batches
@torch.no_grad()
def continuous_batching(
    model: nn.Module, prompts: Sequence[Prompt], copies: int, temperature: float, max_new_tokens: int,
    stops: list[int],
) -> list[Reply]:
    """transformers' generate_batch(): paged K/V, rows enter and leave at any time. For CUDA with flash-attn.

    Every call makes a new manager: a kept one serves prompt K/V of the weights before the update, and ignores
    a new generation config. Raises EngineError where the library silently returns less than was asked for.
    """
    use_attention(model, "generate")
    on_cpu = next(model.parameters()).device.type == "cpu"
    pages = cpu_pages([len(p.ids) + max_new_tokens for p in prompts for _ in range(copies)]) if on_cpu else {}
    settings = ContinuousBatchingConfig(return_logprobs=True, seed=prompts[0].seed % 2**31, **pages)
    # transformers 5.17 returns only the first completion of a prompt, however many it was asked for.
    forks = copies if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23) else 1
    with _own_generation_config(model, forks, temperature, max_new_tokens, stops) as config:
        results = model.generate_batch(
            [p.ids for p in prompts for _ in range(copies // forks)], generation_config=config,
            continuous_batching_config=settings, persistent_manager=False,
        )
    # Samples of one prompt are exchangeable, so neither the order nor the names of the requests matter.
    found: dict[tuple[int, ...], list[Reply]] = {}
    for result in results.values():
        if result.error:
            raise EngineError(f"continuous_batching failed: {result.error}; try another --rollout_engine")
        found.setdefault(tuple(result.prompt_ids), []).append((result.generated_tokens, result.logprobs))
    rows = []
    for prompt in prompts:
        own = found.get(tuple(prompt.ids), [])
        if len(own) < copies:
            number = f"{len(results)} of {len(prompts) * copies} completions"
            raise EngineError(f"continuous_batching returned {number}; its log above says why")
        rows += [own.pop() for _ in range(copies)]
    return rows


ENGINES: dict[str, Engine] = {
    "shared_prefix": shared_prefix, "shared_prefix_eager": functools.partial(shared_prefix, graphs=False),
    "generate": generate,
    "continuous_batching": continuous_batching,
}
