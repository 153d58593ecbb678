"""Hugging Face's own rollout engines: generate, the slow reference, and continuous batching."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import transformers
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from kernel.attention import use_attention
from kernel.decode import Prompt, Replies
from model import ModelError

# --------------------------------------------------------------------------------- Hugging Face's own engines


@contextlib.contextmanager
def _own_generation_config(model: nn.Module, **settings) -> Iterator[GenerationConfig]:
    """A config of ours, while the model's own is out of reach: what is None in ours would be inherited from
    it.

    Qwen2.5-Instruct brings top_k 20, top_p 0.8 and a repetition penalty of 1.05 along.
    """
    saved = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield GenerationConfig(**settings)
    finally:
        model.generation_config = saved


def _settings(copies: int, temperature: float, max_new_tokens: int, stops: list[int]) -> dict:
    sampling = dict(temperature=temperature, top_k=0, top_p=1.0) if temperature > 0 else {}
    lengths = dict(max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=0)
    return dict(do_sample=temperature > 0, num_return_sequences=copies) | sampling | lengths


@torch.no_grad()
def generate(
    model: nn.Module, prompts: Sequence[Prompt], copies: int, temperature: float, max_new_tokens: int,
    stops: list[int],
) -> Replies:
    """transformers' generate(), every prompt `copies` times: the reference to compare with.

    Its random numbers are shared by the batch (seeded with the first prompt's seed), so samples depend on
    their company.
    """
    device = next(model.parameters()).device
    longest = max(len(p.ids) for p in prompts)
    ids = torch.tensor([[0] * (longest - len(p.ids)) + p.ids for p in prompts], device=device)
    lengths = torch.tensor([len(p.ids) for p in prompts], device=device)
    mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
    seen: list[Tensor] = []  # the log-probs [B, V] of the step before
    logprobs: list[Tensor] = []

    def record(past: Tensor, scores: Tensor) -> Tensor:
        # Called before each choice: the last token of `past` was chosen from what was seen before. Scores are
        # raw here.
        if seen:
            logprobs.append(seen.pop().gather(-1, past[:, -1:]))
        seen.append(torch.log_softmax(scores.float() / (temperature or 1.0), -1))
        return scores

    use_attention(model, "generate")
    with (
        _own_generation_config(model, **_settings(copies, temperature, max_new_tokens, stops)) as config,
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(prompts[0].seed)
        out = model.generate(ids, attention_mask=mask, generation_config=config, logits_processor=[record])
    logprobs.append(seen.pop().gather(-1, out[:, -1:]))
    replies, chances = out[:, longest:].tolist(), torch.cat(logprobs, 1).tolist()
    rows = []
    for reply, chance in zip(replies, chances):
        end = next((i + 1 for i, token in enumerate(reply) if token in stops), len(reply))
        rows.append((reply[:end], chance[:end]))
    return rows


def cpu_pages(lengths: Sequence[int]) -> dict[str, int]:
    """Settings of continuous batching with room for rows of so many tokens, prompt and response, all at once:
    on a CPU it would take nearly all of the machine's memory.
    """
    default = ContinuousBatchingConfig()
    page = getattr(default, "page_size", 0) or default.block_size  # its name in transformers 5.17
    return {"num_blocks": sum(-(-length // page) for length in lengths) + 8, "max_batch_tokens": 2048}


@torch.no_grad()
def continuous_batching(
    model: nn.Module, prompts: Sequence[Prompt], copies: int, temperature: float, max_new_tokens: int,
    stops: list[int],
) -> Replies:
    """transformers' generate_batch(): paged K/V, rows enter and leave at any time. Meant for CUDA with
    flash-attn.

    A new manager for every call, because a kept one serves prompt K/V of the weights before the update and
    ignores a new generation config. Raises ModelError where the library returns less than was asked, which it
    does without raising.
    """
    use_attention(model, "generate")
    on_cpu = next(model.parameters()).device.type == "cpu"
    pages = cpu_pages([len(p.ids) + max_new_tokens for p in prompts for _ in range(copies)]) if on_cpu else {}
    settings = ContinuousBatchingConfig(return_logprobs=True, seed=prompts[0].seed % 2**31, **pages)
    # transformers 5.17 returns the first completion of a prompt only, however many it was asked for; 5.23
    # all.
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
            raise ModelError(
                f"continuous_batching: a request failed: {result.error}; try --rollout_engine shared_prefix"
            )
        found.setdefault(tuple(result.prompt_ids), []).append((result.generated_tokens, result.logprobs))
    rows = []
    for prompt in prompts:
        own = found.get(tuple(prompt.ids), [])
        if len(own) < copies:
            raise ModelError(
                f"continuous_batching returned {len(results)} of {len(prompts) * copies} completions; its log above says why"
            )
        rows += [own.pop() for _ in range(copies)]
    return rows
