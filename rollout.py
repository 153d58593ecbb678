"""Prompts -> groups of completions with their rewards. Tokens in, tokens out.

kernel/decode.py decodes a batch. Here prompts become batches, token ids become texts, completions get their
rewards, and a step's samples become metrics and rows of samples.jsonl.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from tqdm import tqdm

from config import Config
from corpus.examples import Tokenized, example_kind
from corpus.replies import shortened, thought_tokens, token_texts
from distributed.batches import Group
from distributed.ranks import Ranks
from kernel.attention import use_attention
from kernel.decode import PASS_TOKENS, Prompt, Reply, rows_that_fit, tokens_of_pass
from kernel.hf_engines import ENGINES, EngineError
from losses import TERMS, objective_of
from model import ModelError, autocast
from prompts import build_messages, decode_reply, parse_completion, prefilled_reply, stop_ids
from reward import RewardFunction

QUERY_CHARACTERS, TURN_CHARACTERS = 500, 2000  # of a query and of a message, in samples.jsonl
PEAK_TFLOPS = {"H100": 989, "H200": 989, "GH200": 989, "H800": 989, "A100": 312, "A800": 312, "B200": 2250}


@dataclass(frozen=True)
class Decoding:
    """How prompts are answered. temperature: 0 is greedy. batch_size: sequences decoded at once; on CUDA
    fewer where their K/V do not fit. engine: a key of ENGINES. thoughts: whether Group.thoughts are counted.
    """

    group_size: int
    temperature: float
    max_new_tokens: int
    batch_size: int
    engine: str = "shared_prefix"
    thoughts: bool = False

    @classmethod
    def training(cls, config: Config) -> Decoding:
        """As the settings say."""
        return cls(
            config.group_size, config.temperature, config.max_response_tokens, config.rollout_batch_size,
            config.rollout_engine, objective_of(config).advantage in TERMS,
        )

    @classmethod
    def greedy(cls, config: Config) -> Decoding:
        """One greedy reply: for evaluation during training."""
        return replace(cls.training(config), group_size=1, temperature=0.0, thoughts=False)


def sample_groups(
    model: nn.Module, tokenizer, prompts: Sequence[Prompt], decoding: Decoding, progress: bool = False,
    heartbeat: Callable[[], None] = lambda: None,
) -> list[Group]:
    """`group_size` completions of every prompt, in the order of `prompts`.

    The longest prompts come first, and neighbours are of similar length, so little is padded. heartbeat:
    called after every group. The model is left as it came (train or eval mode, attention).
    """
    stops = stop_ids(tokenizer)
    was_training = model.training
    quiet = not progress or None  # None: only where a terminal shows it
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
    copies = decoding.group_size if decoding.temperature > 0 else 1  # greedy copies would be equal
    rows = decoding.batch_size
    # An engine that the probe at loading has not seen agree is not used.
    engine = ENGINES[decoding.engine if decoding.engine == model.capabilities.engine else "generate"]
    how = (copies, decoding.temperature, decoding.max_new_tokens, stops)
    groups: dict[int, Group] = {}
    model.eval()
    try:
        with tqdm(total=len(prompts), desc="rollout", leave=False, delay=10, disable=quiet) as bar:
            while waiting:
                batch = [prompts[i] for i in waiting]
                try:
                    with autocast(next(model.parameters()).device):  # weights are cast once, not per token
                        for k, replies in engine(model, batch, *how, rows):
                            groups[waiting[k]] = group_of(tokenizer, batch[k], replies, decoding, stops)
                            bar.update()
                            heartbeat()
                except torch.OutOfMemoryError:
                    longest = max(len(prompt.ids) for prompt in batch)
                    new = tokens_of_pass(decoding.max_new_tokens, PASS_TOKENS)
                    fit = rows_that_fit(model, longest, copies, new)
                    rows = min(rows, fit, len(batch) * copies) // 2
                    if rows < copies:
                        raise
                    # The rest in smaller batches: no sample depends on its batch, but for rounding.
                except EngineError as error:
                    raise ModelError(f"rollout_engine: {error}") from None
                waiting = [i for i in waiting if i not in groups]
    finally:
        use_attention(model, "train")
        model.train(was_training)
    return [groups[i] for i in range(len(prompts))]


def group_of(
    tokenizer, prompt: Prompt, replies: Sequence[Reply], decoding: Decoding, stops: Sequence[int]
) -> Group:
    """A prompt's replies as a group, with their texts. A single greedy reply stands for all copies."""
    replies = [*replies] * (decoding.group_size // len(replies))
    responses = [ids for ids, _ in replies]
    texts = [decode_reply(tokenizer, ids, stops) for ids in responses]
    counted = zip(responses, texts) if decoding.thoughts else ()
    return Group(
        prompt, responses, [logprobs for _, logprobs in replies], texts,
        truncated=[ids[-1] not in stops for ids in responses],
        thoughts=[thought_tokens(tokenizer, ids, text) for ids, text in counted],
    )


def score_groups(
    groups: Sequence[Group], items: Sequence[Tokenized], places: Sequence[int], reward: RewardFunction,
    longest: int = 0, overlong: int = 0,
) -> list[Group]:
    """The groups with their rewards, examples and places in the step's batch.

    Over the last `overlong` of the `longest` tokens that a reply may have, a reward falls linearly by up to
    1: soft overlong punishment (DAPO, arXiv 2503.14476, equation 13). 0: not at all.
    """
    scored = []
    for group, item, place in zip(groups, items, places):
        example, rewards = item.example, []
        for text, ids in zip(group.texts, group.responses):
            one = reward(text, example.answer, example.tools)
            penalty = max(0, len(ids) - (longest - overlong)) / overlong if overlong else 0.0
            rewards.append(replace(one, total=one.total - penalty))
        scored.append(replace(group, place=place, example=example, rewards=tuple(rewards)))
    return scored


# ---------------------------------------------------------------------------------------------------- logging


def rollout_metrics(groups: Sequence[Group], ranks: Ranks) -> dict[str, float]:
    """Collective. What a step's samples look like, in TRL's names where it has them; global sums over global
    counts.

    think_rate: closed thoughts that say something, also where the calls cannot be read. empty_rate: `[]` was
    the call.
    """
    rows = []
    for group in groups:
        parsed = [parse_completion(text) for text in group.texts]
        row = []
        for ids, one, cut, reply in zip(group.responses, group.rewards, group.truncated, parsed):
            thought = bool(reply.think and reply.think.strip())
            row.append((len(ids), one.total, one.format_ok, one.correct, cut, thought, reply.calls == []))
        rows.append(row)
    everyone = [row for part in ranks.gather(rows) for row in part]  # lists, because a rank may have no group
    columns = torch.tensor(everyone, dtype=torch.float64).unbind(2)  # [P, G] each
    lengths, totals, format_ok, correct, truncated, thought, empty = columns
    distinct = ranks.sum([sum(len(set(group.texts)) / len(group.texts) for group in groups)])[0]
    return {
        "reward": totals.mean().item(),
        "reward_std": totals.std(1).mean().item(),
        "frac_reward_zero_std": (totals.amax(1) == totals.amin(1)).double().mean().item(),
        "format_rate": format_ok.mean().item(),
        "correct_rate": correct.mean().item(),
        "think_rate": thought.mean().item(),
        "empty_rate": empty.mean().item(),
        "distinct_rate": distinct / len(totals),
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": truncated.mean().item(),
    }


def sample_rows(
    step: int, groups: Sequence[Group], advantages: Sequence[Sequence[float]], tokenizer, limit: int,
    ranks: Ranks,
) -> list[dict]:
    """Collective. Rows for samples.jsonl: about `limit` completions of this step, equally many from every
    rank.

    advantages [P][G]: those of `groups`. query: the start of the last user message. answer: the right calls.
    tokens, logprobs: of the response, see token_texts and Group. A prompt's first row also has its tools, its
    turns (role, text) where there are several, and what it has begun of the reply.
    """
    chosen = [(p, g) for p, group in enumerate(groups) for g in range(len(group.texts))]
    chosen = chosen[: -(-limit // ranks.world)]
    rows = []
    for (p, g), tokens in zip(chosen, token_texts(tokenizer, [groups[p].responses[g] for p, g in chosen])):
        group = groups[p]
        said = build_messages(group.example.messages, [], "")  # the first: the system prompt of the data
        said = [(turn["role"], turn["content"].strip()) for turn in said]
        query = next((text for role, text in reversed(said) if role == "user"), "")
        row = {
            "step": step, "prompt_id": group.prompt.id, "completion": group.texts[g],
            "reward": group.rewards[g].total, "reason": group.rewards[g].reason,
            "advantage": round(advantages[p][g], 4), "truncated": group.truncated[g],
            "kind": example_kind(group.example), "query": shortened(query, QUERY_CHARACTERS),
            "answer": [call.as_dict() for call in group.example.answer],
            "tokens": tokens, "logprobs": [round(x, 3) for x in group.logprobs[g]],
        }
        if g == 0:
            turns = [(role, shortened(text, TURN_CHARACTERS)) for role, text in said if text]
            row |= {"tools": group.example.tools, "begun": prefilled_reply(tokenizer)}
            row["turns"] = turns if len(turns) > 1 else []
        rows.append(row)
    return [row for part in ranks.gather(rows) for row in part]


@dataclass(frozen=True)
class Work:
    """What this rank did in a step. trained_tokens: packed for the update. seconds: by phase."""

    groups: Sequence[Group]
    given_up: Sequence[Group]  # sampled, and replaced by others
    trained_tokens: int
    parameters: int
    seconds: dict[str, float]


def speed_metrics(work: Work, config: Config, ranks: Ranks) -> dict[str, float]:
    """Collective. Tokens, FLOPs and memory of one step; rates are over all ranks and this rank's seconds.

    FLOPs: 2 per parameter and token forward, 4 backward (2 where LoRA freezes the weights: no gradient of
    theirs), attention and adapters left out. A rollout is one forward, the reference another.
    """
    own = [
        sum(group.tokens for group in work.groups), sum(group.tokens for group in work.given_up),
        sum(len(ids) for group in (*work.groups, *work.given_up) for ids in group.responses),
        work.trained_tokens, len(work.given_up), len(work.groups),
    ]
    kept, dropped, new, trained, given_up, total = ranks.sum(map(float, own))
    seconds = work.seconds
    iterations = config.num_iterations
    of_update = iterations * (4 if config.lora_rank else 6)
    passes = of_update + 2 * (config.kl_coef > 0)
    passes += 2 * (config.minibatch_prompts < config.prompts_per_step)
    metrics = {
        "num_tokens": kept,
        "step_flops": work.parameters * (2 * (kept + dropped) + passes * trained),
        "rollout/tokens_per_s": new / seconds["rollout"],
        "update/tokens_per_s": iterations * trained / seconds["update"],
    }
    if config.kl_coef:
        metrics["reference/tokens_per_s"] = trained / seconds["reference"]
    if config.skip_zero_variance or config.mask_truncated:
        metrics["update/skipped_token_ratio"] = max(0.0, 1 - trained / kept)
    if config.resample_rounds:
        metrics["rollout/resampled_ratio"] = given_up / total
    if ranks.device.type != "cuda":
        return metrics | {"memory/peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    metrics["memory/reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    name = torch.cuda.get_device_name()
    peak = next((tera for part, tera in PEAK_TFLOPS.items() if part in name), None)
    if peak:  # model FLOPs utilisation of the update: what is recomputed for checkpointing does not count
        flops = of_update * work.parameters * work.trained_tokens
        metrics["update/mfu"] = flops / seconds["update"] / (peak * 1e12)
    return metrics
