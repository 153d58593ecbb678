"""From a batch of completions to what each rank computes: groups shared out by tokens, packed into
micro-batches.

Every rank knows all groups of the batch, so all work out the same plan without talking: who takes which
group, how many micro-batches the busiest rank has, and how many tokens an update's mean is over.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from config import Config
from distributed.ranks import Ranks
from kernel.decode import Prompt
from kernel.packing import Packed, micro_batches, pack
from reward import Reward


@dataclass
class MicroBatch:
    """Packed groups with what the loss needs per response token: all [N].

    idle: it only keeps this rank in step with those that have more micro-batches; no loss sees it.
    """

    packed: Packed
    advantages: Tensor
    sampler_logprobs: Tensor
    old_logprobs: Tensor | None = (
        None  # None: one update per rollout batch, so the policy has not changed yet
    )
    ref_logprobs: Tensor | None = None  # None: kl_coef is 0
    idle: bool = False


@dataclass
class Minibatch:
    """This rank's part of one optimizer update. tokens, completions: of the update, on all ranks."""

    micros: list[MicroBatch]
    tokens: int
    completions: int


def reward_table(scores: list[list[Reward]], config: Config) -> Tensor:
    """[P, G]; P may be 0 where there are more processes than prompts."""
    return torch.tensor([[one.total for one in row] for row in scores]).view(len(scores), config.group_size)


def gather_groups(groups: Sequence[Group], rewards: Tensor, ranks: Ranks) -> tuple[list[Group], Tensor]:
    """Collective. All ranks' groups, without their texts, and rewards [P, G], in the order of the batch.

    Place p of a batch is sampled by rank p modulo the number of ranks (`own_places`).
    """
    bare = [replace(group, texts=[]) for group in groups]
    rows = [list(zip(bare, rewards.tolist())) for bare, rewards in ranks.gather((bare, rewards))]
    pairs = [pair for turn in itertools.zip_longest(*rows) for pair in turn if pair is not None]
    return [group for group, _ in pairs], torch.tensor([row for _, row in pairs], dtype=rewards.dtype)


def own_places(places: int, ranks: Ranks) -> range:
    """The places of a batch that this rank samples."""
    return range(ranks.rank, places, ranks.world)


def shuffled(rewards: Tensor, seed: int, step: int) -> Tensor:
    """[P, G] -> [P, G]: the rewards of the whole batch, permuted over all completions.

    The negative control: the same rewards, but telling nothing about the completion that they stand beside.
    """
    generator = torch.Generator().manual_seed(prompt_seed(seed, step, -1))
    return rewards.flatten()[torch.randperm(rewards.numel(), generator=generator)].view_as(rewards)


def share_out(tokens: Sequence[int], ranks: int) -> list[list[int]]:
    """Which of the groups with so many tokens each rank takes: the longest first, always to the rank with the
    least.

    Longest-processing-time scheduling (Graham 1969): never more than 4/3 of the best. Indices ascend within a
    rank.
    """
    loads, shares = [0] * ranks, [[] for _ in range(ranks)]
    for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += tokens[i]
        shares[rank].append(i)
    return [sorted(share) for share in shares]


def make_minibatches(
    groups: Sequence[Group], advantages: Tensor, config: Config, ranks: Ranks, share_prompt: bool = True
) -> list[Minibatch]:
    """The whole batch's groups -> this rank's minibatches (one optimizer update each) of micro-batches (one
    forward/backward each). All ranks get equally many micro-batches, because sharded weights are gathered by
    all.

    With skip_zero_variance, groups whose advantages are all 0 are left out: neither loss, KL nor token count
    sees them. share_prompt: whether the model takes packed groups (model.uses_shared_prefix).
    """
    budget, minibatches = config.max_tokens_per_micro_batch, []
    sizes = [(len(group.prompt.ids), [len(ids) for ids in group.responses]) for group in groups]
    teaches = (advantages != 0).any(1).tolist()
    for start in range(0, len(groups), config.minibatch_prompts):
        kept = range(start, min(start + config.minibatch_prompts, len(groups)))
        kept = [i for i in kept if teaches[i] or not config.skip_zero_variance]
        shares = share_out([sizes[i][0] + sum(sizes[i][1]) for i in kept], ranks.world)
        plans = [micro_batches([sizes[kept[k]] for k in share], budget, share_prompt) for share in shares]
        own = [kept[k] for k in shares[ranks.rank]]
        micros = [
            _micro_batch([(groups[own[k]], advantages[own[k]], part) for k, part in parts], ranks, share_prompt)
            for parts in plans[ranks.rank]
        ]
        missing = max(map(len, plans)) - len(micros)
        micros += [_idle(ranks, share_prompt) for _ in range(missing)]
        lengths = [count for i in kept for count in sizes[i][1]]
        minibatches.append(Minibatch(micros, sum(lengths), len(lengths)))
    return minibatches


def _micro_batch(parts: Sequence[Part], ranks: Ranks, share_prompt: bool) -> MicroBatch:
    packed = pack(
        [(group.prompt.ids, group.responses[part]) for group, _, part in parts], ranks.device, share_prompt
    )
    per_response = torch.cat([advantages[part] for _, advantages, part in parts]).to(ranks.device)
    sampled = [x for group, _, part in parts for row in group.logprobs[part] for x in row]
    sampled = torch.tensor(sampled, device=ranks.device)
    return MicroBatch(packed, per_response.repeat_interleave(packed.counts), sampled)


def _idle(ranks: Ranks, share_prompt: bool) -> MicroBatch:
    """Two tokens that no loss sees: their forward and backward take part in gathering weights and adding
    gradients.
    """
    nothing = torch.zeros(1, device=ranks.device)
    return MicroBatch(pack([([0], [[0]])], ranks.device, share_prompt), nothing, nothing, idle=True)


def sampler_difference(minibatches: list[Minibatch], ranks: Ranks) -> dict[str, float]:
    """Collective. Mean |sampler - trainer| log-prob where the old log-probs were computed: a bug detector,
    not a loss.
    """
    micros = [m for batch in minibatches for m in batch.micros if m.old_logprobs is not None and not m.idle]
    differences = [(m.old_logprobs - m.sampler_logprobs).abs().double().sum().item() for m in micros]
    total, count = ranks.sum([sum(differences), float(sum(len(m.advantages) for m in micros))])
    return {"sampling/sampling_logp_difference/mean": total / count} if count else {}


# ----------------------------------------------------------------------------------------------- data by step


def batch_for_step(count: int, step: int, size: int, seed: int) -> list[int]:
    """The indices of step `step` (from 0): a fresh shuffle per pass, and a function of position alone.

    Resume computes this instead of replaying a generator. A batch may span two passes.
    """
    indices = []
    for position in range(step * size, (step + 1) * size):
        epoch, offset = divmod(position, count)
        if not indices or offset == 0:
            order = random.Random(f"{seed}/{epoch}").sample(range(count), count)
        indices.append(order[offset])
    return indices


@dataclass(frozen=True)
class Group:
    """G completions of one prompt. responses end with their stop token unless truncated.

    logprobs: the sampler's own, per response token, at the sampling temperature (a diagnostic: the trainer
    computes its own).
    """

    prompt: Prompt
    responses: list[list[int]]
    logprobs: list[list[float]]
    texts: list[str]
    truncated: list[bool]


Part = tuple[Group, Tensor, slice]  # a group, its advantages [G], and which of its responses are meant


def prompt_seed(seed: int, step: int, index: int) -> int:
    """A seed for one prompt of one step: a function of position alone (splitmix64 over the three numbers)."""
    mixed = 0
    for number in (seed, step, index):
        mixed = (mixed + number + 0x9E3779B97F4A7C15) % 2**64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**63
