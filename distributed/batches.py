"""From a batch of completions to what each rank computes: groups shared out by tokens, packed into
micro-batches.

Every rank knows all groups of the batch. So all ranks work out the same plan without talking: who takes which
group, how many micro-batches the busiest rank has, and how many tokens an update's mean is over. Order and
seeds are functions of position, so a resume computes them instead of replaying them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from config import Config
from corpus.examples import Example
from distributed.ranks import Ranks
from kernel.decode import Prompt
from kernel.packing import Packed, micro_batches, pack
from losses import CORRECTIONS
from reward import Reward


@dataclass(frozen=True)
class Group:
    """G completions of one prompt. responses end with their stop token unless truncated.

    logprobs: the sampler's own, per response token, at the sampling temperature: a diagnostic, because the
    trainer computes its own. place: position in the step's batch, P more after each resampling. rewards:
    [G], once they are scored. thoughts: [G] tokens up to the end of each thought, where a loss asks for them.
    """

    prompt: Prompt
    responses: list[list[int]]
    logprobs: list[list[float]]
    texts: list[str]
    truncated: list[bool]
    place: int = 0
    example: Example | None = None
    rewards: tuple[Reward, ...] = ()
    thoughts: Sequence[int] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, once, and of all responses."""
        return len(self.prompt.ids) + sum(map(len, self.responses))

    @property
    def flat(self) -> bool:
        """Whether all rewards are equal, so that nothing can be learnt from the group."""
        return len({reward.total for reward in self.rewards}) == 1


def batch_for_step(count: int, step: int, size: int, seed: int) -> list[int]:
    """The indices of step `step` (from 0): a fresh shuffle per pass. A batch may span two passes."""
    indices = []
    for position in range(step * size, (step + 1) * size):
        epoch, offset = divmod(position, count)
        if not indices or offset == 0:
            order = random.Random(f"{seed}/{epoch}").sample(range(count), count)
        indices.append(order[offset])
    return indices


def prompt_seed(seed: int, step: int, place: int) -> int:
    """A seed for one prompt of one step: splitmix64 over the three numbers."""
    mixed = 0
    for number in (seed, step, place):
        mixed = (mixed + number + 0x9E3779B97F4A7C15) % 2**64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**63


def shuffled(rewards: Tensor, seed: int, step: int) -> Tensor:
    """[P, G] -> [P, G]: the rewards of the whole batch, permuted over all completions.

    The negative control: the same rewards, but they say nothing about the completion that they stand beside.
    """
    generator = torch.Generator().manual_seed(prompt_seed(seed, step, -1))
    return rewards.flatten()[torch.randperm(rewards.numel(), generator=generator)].view_as(rewards)


def own_places(places: int, ranks: Ranks) -> range:
    """The places of a batch that this rank samples: place p falls to rank p modulo the number of ranks."""
    return range(ranks.rank, places, ranks.world)


def gather_groups(groups: Sequence[Group], prompts_per_step: int, ranks: Ranks) -> list[Group]:
    """Collective. All ranks' groups, without texts and examples, in the order of the batch."""
    bare = [replace(group, texts=[], example=None) for group in groups]
    everyone = [group for part in ranks.gather(bare) for group in part]
    # What was resampled lies beyond the batch, and stands where the group stood that it replaces.
    return sorted(everyone, key=lambda group: group.place % prompts_per_step)


def reward_table(groups: Sequence[Group]) -> Tensor:
    """The rewards of scored groups, [P, G]."""
    return torch.tensor([[reward.total for reward in group.rewards] for group in groups])


@dataclass
class MicroBatch:
    """Packed groups with what the loss needs per response token: all [N], but thoughts [R].

    old_logprobs, old_entropy: of the policy that sampled; where there is one update per rollout batch, its
    first pass stores them. thoughts: as in Group.
    reference_logprobs is None where kl_coef is 0. idle: it only keeps this rank in step with ranks that have
    more micro-batches; no loss sees it.
    """

    packed: Packed
    advantages: Tensor
    sampler_logprobs: Tensor
    thoughts: Tensor | None = None
    old_logprobs: Tensor | None = None
    old_entropy: Tensor | None = None
    reference_logprobs: Tensor | None = None
    idle: bool = False


@dataclass
class Update:
    """One optimizer update: this rank's micro-batches. Without any, no rank has one.

    total_tokens, total_completions: what the loss's mean is over, all ranks together. computed_tokens: the
    response tokens of all ranks' micro-batches, fewer where skip_zero_variance is "all".
    """

    micros: list[MicroBatch]
    total_tokens: int
    total_completions: int
    computed_tokens: int


def share_out(tokens: Sequence[int], ranks: int) -> list[list[int]]:
    """Which of the groups with so many tokens each rank takes: the longest first, always to the rank with the
    least. Longest-processing-time scheduling (Graham 1969): never more than 4/3 of the best. Indices ascend
    within a rank.
    """
    loads = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += tokens[i]
        shares[rank].append(i)
    return [sorted(share) for share in shares]


def plan_micro_batches(
    sizes: Sequence[tuple[int, list[int]]], budget: int, ranks: Ranks, share_prompt: bool
) -> list[list[tuple[int, slice]]]:
    """This rank's micro-batches: for each the groups, by index, and which of their responses are meant.

    sizes: (prompt length, response lengths) per group. Sharded weights are gathered by all ranks together, so
    all get as many micro-batches as the busiest one: those that are empty only keep in step.
    """
    shares = share_out([prompt + sum(replies) for prompt, replies in sizes], ranks.world)
    packed = [micro_batches([sizes[i] for i in share], budget, share_prompt) for share in shares]
    own = shares[ranks.rank]
    batches = [[(own[k], part) for k, part in batch] for batch in packed[ranks.rank]]
    return batches + [[] for _ in range(max(map(len, packed)) - len(batches))]


def make_updates(
    groups: Sequence[Group], advantages: Tensor, config: Config, ranks: Ranks, share_prompt: bool = True
) -> list[Update]:
    """The whole batch's groups and advantages [P, G] -> the optimizer updates, with this rank's micro-batches
    (one forward and backward each).

    With skip_zero_variance, groups whose advantages are all 0 are not computed: neither loss nor KL sees
    them. Where it is "all", the mean still is over them too. share_prompt: whether the model takes packed
    groups (kernel.attention.uses_shared_prefix).
    """
    pairs = list(zip(groups, advantages))
    if config.mask_truncated:
        pairs = [_without_truncated(group, row) for group, row in pairs]
    updates = []
    for start in range(0, len(groups), config.minibatch_prompts):
        prompts = [pair for pair in pairs[start : start + config.minibatch_prompts] if pair[0].responses]
        kept = [(group, row) for group, row in prompts if row.any() or not config.skip_zero_variance]
        sizes = [(len(group.prompt.ids), [len(ids) for ids in group.responses]) for group, _ in kept]
        micros = []
        for batch in plan_micro_batches(sizes, config.max_tokens_per_micro_batch, ranks, share_prompt):
            parts = [(*kept[k], part) for k, part in batch]
            micros.append(_micro_batch(parts, ranks, share_prompt) if parts else _idle(ranks, share_prompt))
        counted = prompts if config.skip_zero_variance == "all" else kept
        lengths = [len(ids) for group, _ in counted for ids in group.responses]
        computed = sum(sum(replies) for _, replies in sizes)
        updates.append(Update(micros, sum(lengths), len(lengths), computed))
    return updates


def _without_truncated(group: Group, advantages: Tensor) -> tuple[Group, Tensor]:
    """Only the completions that ended by themselves, with their advantages, which all were compared for:
    overlong filtering (DAPO, arXiv 2503.14476, section 3.4).
    """
    ended = [k for k, truncated in enumerate(group.truncated) if not truncated]
    responses, logprobs = ([rows[k] for k in ended] for rows in (group.responses, group.logprobs))
    thoughts = [group.thoughts[k] for k in ended if group.thoughts]
    return replace(group, responses=responses, logprobs=logprobs, thoughts=thoughts), advantages[ended]


def _micro_batch(
    parts: Sequence[tuple[Group, Tensor, slice]], ranks: Ranks, share_prompt: bool
) -> MicroBatch:
    """parts: a group, its advantages [G], and which of its responses are meant."""
    responses = [(group.prompt.ids, group.responses[part]) for group, _, part in parts]
    packed = pack(responses, ranks.device, share_prompt)
    per_response = torch.cat([advantages[part] for _, advantages, part in parts]).to(ranks.device)
    sampled, thoughts = [], []
    for group, _, part in parts:
        thoughts += group.thoughts[part]
        for row in group.logprobs[part]:
            sampled += row
    advantages = per_response.repeat_interleave(packed.counts)
    sampler_logprobs, thoughts = (torch.tensor(values, device=ranks.device) for values in (sampled, thoughts))
    return MicroBatch(packed, advantages, sampler_logprobs, thoughts)


def _idle(ranks: Ranks, share_prompt: bool) -> MicroBatch:
    """Two tokens that no loss sees: their passes take part in gathering weights and adding gradients."""
    nothing = torch.zeros(1, device=ranks.device)
    return MicroBatch(pack([([0], [[0]])], ranks.device, share_prompt), nothing, nothing, idle=True)


def sampler_difference(updates: Sequence[Update], ranks: Ranks, correction: str = "none") -> dict[str, float]:
    """Collective. |sampler - trainer| log-prob, of the policy that sampled: it finds bugs. Empty without any
    update. And what a correction makes of it: the mean of its weights, and the share that it has bounded.
    """
    sums, most = torch.zeros(4, dtype=torch.float64), 0.0
    for micro in (micro for update in updates for micro in update.micros):
        if not micro.idle:
            difference = micro.old_logprobs - micro.sampler_logprobs
            ratio = difference.exp()
            weights = CORRECTIONS[correction](ratio)
            parts = (difference.abs(), weights, weights != ratio, torch.ones_like(ratio))
            sums += torch.stack([part.double().sum() for part in parts]).cpu()
            most = max(most, difference.abs().max().item())
    total, weight, bounded, count = ranks.sum(sums.tolist())
    most = max(ranks.gather(most))
    if not count:
        return {}
    name = "sampling/sampling_logp_difference"
    metrics = {f"{name}/mean": total / count, f"{name}/max": most}
    if correction != "none":
        name = "sampling/importance_sampling_ratio"
        metrics |= {f"{name}/mean": weight / count, f"{name}/bounded": bounded / count}
    return metrics
