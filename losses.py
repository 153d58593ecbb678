"""Every formula of the objective, as tables: advantages, losses, estimates of the KL, corrections for the
sampler, and what the mean is over. And the learning rate.

A row of LOSSES is a published loss without its KL, whose weight is `--kl_coef` (DAPO and Dr. GRPO have none).
`--loss NAME` takes a row, `--advantage`, `--aggregation`, `--clip_eps` and `--clip_eps_high` change one part
of it. All are pure functions of tensors. Letters: P prompts, G completions per prompt, R completions of a
micro-batch, N their tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from config import Config, ConfigError

# ------------------------------------------------------------------------------- advantages: [P, G] -> [P, G]


def group_mean(rewards: Tensor) -> Tensor:
    """reward - mean of the group; exactly 0 if all are equal. Dr. GRPO (arXiv 2503.20783), section 3.2."""
    # seven times 0.1 has another mean than 0.1
    flat = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return torch.where(flat, 0.0, rewards - rewards.mean(1, keepdim=True))


def group_std(rewards: Tensor) -> Tensor:
    """(reward - mean) / (std + 1e-6) inside each group; exactly 0 where all rewards are equal.

    std is the sample standard deviation (n - 1), as in the library that the paper used. DeepSeekMath (arXiv
    2402.03300), section 4.1.2.
    """
    return group_mean(rewards) / (rewards.std(1, keepdim=True) + 1e-6)


def leave_one_out(rewards: Tensor) -> Tensor:
    """reward - mean of the group's other rewards. RLOO (arXiv 2402.14740)."""
    group_size = rewards.shape[1]
    return group_mean(rewards) * (group_size / (group_size - 1))


def max_rl(rewards: Tensor) -> Tensor:
    """(reward - mean) / mean inside each group: rare success weighs most. MaxRL (arXiv 2602.02710).

    For rewards of at least 0. It is 0 where the mean is not above 0: to divide would turn the signs.
    """
    mean = rewards.mean(1, keepdim=True)
    return torch.where(mean > 0, group_mean(rewards) / mean, 0.0)


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "group_std": group_std,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "max_rl": max_rl,
    "egpo": group_std,  # and its row of TERMS
}


def thought_entropy(advantages: Tensor, entropy: Tensor, counts: Tensor, thoughts: Tensor) -> Tensor:
    """0.4 clip(H, -|A| / 2, |A| / 2), with H the mean entropy over the tokens of the completion's thought.

    EGPO (FunRL, arXiv 2508.05118); read in public summaries of the paper, not in the paper itself.
    """
    ends = counts.cumsum(0) - counts + thoughts  # of the thoughts, as places in [N]
    inside = torch.arange(len(entropy), device=entropy.device) < ends.repeat_interleave(counts)
    mean = per_completion(entropy * inside, counts) / thoughts.clamp(min=1)
    bound = advantages.abs() / 2
    return 0.4 * mean.repeat_interleave(counts).clamp(-bound, bound)


# what is added to an advantage [N], given it, the sampling policy's entropy [N], and the number of tokens of
# each completion [R] and of its thought [R]
TERMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {"egpo": thought_entropy}

# ------------------------------------------------------------- KL to the reference per token: [N], [N] -> [N]
# With tokens drawn from the policy, as at a batch's first update: which mean the value has, and which mean
# its gradient has when it stands in a loss, are two questions (http://joschu.net/blog/kl-approx.html, by
# Schulman, answers the first). tests/test_losses.py checks both against the exact KL of a small vocabulary.


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log policy - log ref: the mean is KL(policy || ref); may be negative, high variance.

    In a loss it does nothing: its gradient is that of log policy, whose mean is 0.
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log policy - log ref)^2 / 2: never negative; its mean is only near KL(policy || ref).

    In a loss, the mean of its gradient is the gradient of KL(policy || ref).
    """
    return (logprobs - ref_logprobs).square() / 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(d) - d - 1, d = log ref - log policy: the mean is KL(policy || ref); never negative, low variance.

    In a loss, the mean of its gradient is that of the other direction, KL(ref || policy), as in the paper.
    """
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1


KLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}

# -------------------------------------------- corrections for a sampler that differs, per token: [N] -> [N]
# trainer / sampler, the probabilities of one policy in both -> the weight of the token in the loss, KL left
# out. Kernels and precision part them, which biases the gradient.

CORRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    # truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you
    # off-policy RL training"), per token and with the cap of TRL and verl
    "tis": lambda ratio: ratio.clamp(max=2.0),
    # outside of the band a token teaches nothing: IcePop (Ling team, arXiv 2510.18855)
    "icepop": lambda ratio: ratio.where((ratio >= 0.5) & (ratio <= 5.0), 0.0),
}

# ----------------------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class Objective:
    """A loss in its parts. advantage: a row of ADVANTAGES; ratio: of RATIOS; surrogate: of SURROGATES;
    aggregation: of AGGREGATIONS. A ratio policy/old counts as clipped below 1 - clip_low and above 1 +
    clip_high.
    """

    advantage: str
    ratio: str
    surrogate: str
    aggregation: str
    clip_low: float
    clip_high: float


LOSSES: dict[str, Objective] = {
    # DeepSeekMath (arXiv 2402.03300), equation 3; token mean and 0.2 as in the library that the paper used
    "grpo": Objective("group_std", "token", "clipped", "token", 0.2, 0.2),
    # Dr. GRPO (arXiv 2503.20783), section 3.2: neither the group's std nor a completion's own length divides
    "dr_grpo": Objective("group_mean", "token", "clipped", "constant", 0.2, 0.2),
    # DAPO (arXiv 2503.14476), section 3: clip-higher, token mean; its dynamic sampling is resample_rounds
    "dapo": Objective("group_std", "token", "clipped", "token", 0.2, 0.28),
    # GSPO (arXiv 2507.18071), equations 5 and 7; clip range of its section 5.1
    "gspo": Objective("group_std", "sequence_mean", "clipped", "sequence", 3e-4, 4e-4),
    # CISPO (MiniMax-M1, arXiv 2506.13585), equations 4 and 5; upper bound from ScaleRL (arXiv 2510.13786)
    "cispo": Objective("group_std", "token", "weighted", "token", 1.0, 4.0),
    # RLOO (arXiv 2402.14740): a completion is one action. Its KL is summed over tokens in the reward; ours is
    # a mean in the loss. The clip is for the second and later updates of a batch, which RLOO does not have.
    "rloo": Objective("leave_one_out", "sequence_sum", "clipped", "sequence", 0.2, 0.2),
}


def objective_of(config: Config) -> Objective:
    """The row of LOSSES that the settings choose and change. Raises ConfigError for unknown names."""
    tables = {"loss": LOSSES, "advantage": ADVANTAGES, "aggregation": AGGREGATIONS, "kl": KLS}
    for key, table in (tables | {"correction": CORRECTIONS, "lr_schedule": SCHEDULES}).items():
        name = getattr(config, key)
        if name not in table and (name or key not in ("advantage", "aggregation")):
            raise ConfigError(f"{key} must be one of {', '.join(table)}, not {name!r}")
    row = LOSSES[config.loss]
    return replace(
        row, advantage=config.advantage or row.advantage, aggregation=config.aggregation or row.aggregation,
        clip_low=config.clip_eps or row.clip_low,
        clip_high=config.clip_eps_high or config.clip_eps or row.clip_high,
    )


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, counts: Tensor, loss: Objective
) -> tuple[Tensor, Tensor]:
    """[N] each, counts [R]: tokens per completion -> the loss of each token [N], and the ratio [N]."""
    ratio = RATIOS[loss.ratio](logprobs - old_logprobs, counts).exp()
    bounded = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
    return SURROGATES[loss.surrogate](ratio, bounded, logprobs, advantages), ratio


def per_completion(values: Tensor, counts: Tensor) -> Tensor:
    """[N], [R] -> [R]: the sum over each completion's tokens."""
    owner = torch.repeat_interleave(counts)
    return values.new_zeros(len(counts)).index_add(0, owner, values)


def sequence_mean(log_ratio: Tensor, counts: Tensor) -> Tensor:
    """The mean over a completion, at each of its tokens. GSPO, equation 7."""
    return (per_completion(log_ratio, counts) / counts).repeat_interleave(counts)


def sequence_sum(log_ratio: Tensor, counts: Tensor) -> Tensor:
    """The sum over a completion, at each of its tokens. e^20 is beyond every bound, and a finite number."""
    return per_completion(log_ratio, counts).clamp(-20, 20).repeat_interleave(counts)


# log(policy / old) per token [N], counts [R] -> the log of the ratio in the loss [N]
RATIOS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": lambda log_ratio, counts: log_ratio,
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
}

# the ratio, the ratio inside its bounds, log-probs and advantages, [N] each -> [N]
SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    # pessimistic: no gain from going further out of the bounds, but the way back keeps its gradient (PPO)
    "clipped": lambda ratio, bounded, logprobs, A: -torch.minimum(ratio * A, bounded * A),
    # every token keeps a gradient; the bounded ratio only weighs it (CISPO)
    "weighted": lambda ratio, bounded, logprobs, A: -bounded.detach() * A * logprobs,
}


def equal(counts: Tensor, weight: float) -> Tensor:
    """[R] -> [R]: the same weight for every completion's tokens."""
    return torch.full_like(counts, weight, dtype=torch.float32)


# counts [R], and of the whole update, all ranks together: tokens, completions, and the longest completion
# allowed -> weight [R] of each completion's tokens; the loss is the weighted sum
AGGREGATIONS: dict[str, Callable[[Tensor, int, int, int], Tensor]] = {
    # every token counts the same
    "token": lambda counts, tokens, completions, longest: equal(counts, 1 / tokens),
    # every completion counts the same, so the tokens of a long one count less
    "sequence": lambda counts, tokens, completions, longest: 1 / (counts * completions),
    # divides by a length that the completions cannot change
    "constant": lambda counts, tokens, completions, longest: equal(counts, 1 / (completions * longest)),
}

# ------------------------------------------------------------------------------------------ the learning rate

# the share of the run that is done -> what the peak is multiplied with
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


def learning_rate(peak: float, schedule: str, step: int, warmup_steps: int, done: float) -> float:
    """Of this step (from 1), before which `done` of the run was done: it rises linearly over the first steps
    and follows a row of SCHEDULES over the whole run. A pure function, so a resume computes it.
    """
    return peak * min(1.0, step / max(1, warmup_steps)) * SCHEDULES[schedule](done)
