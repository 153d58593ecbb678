"""Group Relative Policy Optimization for tool calling: the whole method, read from top to bottom.

    torchrun --nproc_per_node=8 grpo.py --config configs/qwen2.5-7b.yaml --data xlam.json,toolace.json
    python grpo.py --config configs/tiny.yaml                      the demo: a model from nothing, on a CPU
    python grpo.py --config runs/demo/config.yaml --resume true    go on after an interruption

A prompt gets G completions with rewards r_1 … r_G. With A_i = (r_i - mean r) / std r and the ratio
w = policy / old of a token's probabilities, an update minimises the mean over all response tokens of

    -min(w A, clip(w, 1 - eps, 1 + eps) A) + beta (exp(d) - d - 1),    d = log reference - log policy

Source: Tool-N1 (arXiv 2505.00024); GRPO from DeepSeekMath (arXiv 2402.03300), equation 3. losses.py has the
rows of every part. Letters: P prompts, G completions per prompt, N response tokens of a micro-batch.
"""

from __future__ import annotations
import distributed.start  # noqa: F401

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import Config, load_config
from distributed.batches import (
    Group,
    MicroBatch,
    Update,
    batch_for_step,
    gather_groups,
    make_updates,
    own_places,
    prompt_seed,
    reward_table,
    sampler_difference,
    shuffled,
)
from distributed.fsdp import clip_and_step, gathered_weights, release
from distributed.ranks import Clock, Ranks, run_script, start_ranks
from kernel.attention import uses_shared_prefix
from kernel.decode import Prompt
from losses import ADVANTAGES, AGGREGATIONS, CORRECTIONS, KLS, TERMS, learning_rate, objective_of, policy_loss
from model import count_parameters
from rollout import Decoding, Work, rollout_metrics, sample_groups, sample_rows, score_groups, speed_metrics
from session import Run, RunSpec, begin, close, evaluate_if_missing, finish_step, open_session, start_step
from sft import warm_up

# ---------------------------------------------------------------------------------------------- the objective


def micro_batch_loss(
    policy: nn.Module, micro: MicroBatch, update: Update, config: Config
) -> tuple[Tensor, Tensor]:
    """This micro-batch's part of its update's loss, and the sums of (loss, KL, entropy, clipped low, clipped
    high) [5].

    The loss is a weighted sum over the response tokens of the update on all ranks. Neither the packing into
    micro-batches nor the number of ranks changes the weights (losses.AGGREGATIONS).
    """
    logprobs, entropy = policy.logprobs(micro.packed)  # [N], [N]: bound to the temperature by load_policy
    if micro.idle:
        return logprobs.sum() * 0.0, torch.zeros(5, dtype=torch.float64)
    objective = objective_of(config)
    counts = micro.packed.counts  # tokens per completion
    if micro.old_logprobs is None:  # the first pass of the only update: the policy still is the sampler
        micro.old_logprobs = logprobs.detach()
        micro.old_entropy = entropy
    advantages = micro.advantages
    if term := TERMS.get(objective.advantage):
        advantages = advantages + term(advantages, micro.old_entropy, counts, micro.thoughts)
    surrogate, ratio = policy_loss(logprobs, micro.old_logprobs, advantages, counts, objective)
    trainer_to_sampler = (micro.old_logprobs - micro.sampler_logprobs).exp()
    surrogate = surrogate * CORRECTIONS[config.correction](trainer_to_sampler)
    kl = torch.zeros_like(surrogate)
    if micro.reference_logprobs is not None:
        kl = KLS[config.kl](logprobs, micro.reference_logprobs)
    weigh = AGGREGATIONS[objective.aggregation]
    weights = weigh(counts, update.total_tokens, update.total_completions, config.max_response_tokens)
    loss = (surrogate + config.kl_coef * kl) * weights.repeat_interleave(counts)
    with torch.no_grad():
        low = (ratio < 1 - objective.clip_low) & (advantages < 0)
        high = (ratio > 1 + objective.clip_high) & (advantages > 0)
        sums = torch.stack([x.double().sum() for x in (loss, kl, entropy, low, high)])
    # a bad part counts as skipped and must not blot the log
    return loss.sum(), sums.nan_to_num(0.0, 0.0, 0.0).cpu()


@torch.no_grad()
def store_logprobs(model: nn.Module, updates: Sequence[Update], name: str, entropy: bool = False) -> None:
    """Collective. Fills in what stays fixed in the updates. name: old_logprobs, with `entropy` old_entropy
    too, or reference_logprobs.
    """
    for update in updates:
        for micro in update.micros:
            logprobs, entropies = model.logprobs(micro.packed, entropy=entropy)
            setattr(micro, name, logprobs)
            if entropy:
                micro.old_entropy = entropies


def update_policy(
    policy: nn.Module, optimizer: torch.optim.Optimizer, updates: Sequence[Update], config: Config,
    ranks: Ranks,
) -> dict[str, float]:
    """Collective. The updates of a step, num_iterations times -> metrics; KL, entropy and clip ratios are
    means over tokens.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    tokens = 0
    norms: list[float] = []
    skipped = 0
    for update in [*updates] * config.num_iterations:
        if not update.micros:  # on all ranks: every group of this update was left out
            continue
        for micro in update.micros:
            loss, part = micro_batch_loss(policy, micro, update, config)
            # load_sharded makes FSDP add gradients up instead of averaging them. The loss's weights divide by
            # the tokens (or completions) of all ranks, so the sum over micro-batches and ranks is the mean.
            loss.backward()
            sums += part
        norm = clip_and_step(policy, optimizer, config.max_grad_norm, ranks)
        if math.isfinite(norm):
            norms.append(norm)
        else:
            skipped += 1
        tokens += update.computed_tokens
    loss_sum, *token_sums = ranks.sum(sums.tolist())
    kl, entropy, low, high = (total / max(1, tokens) for total in token_sums)
    return {
        "loss": loss_sum / max(1, len(norms) + skipped), "kl": kl, "entropy": entropy,
        "clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high,
        "grad_norm": sum(norms) / max(1, len(norms)),
        "updates": len(norms), "updates_skipped_nonfinite": skipped,
    }


# --------------------------------------------------------------------------------------------------- one step


def grpo_step(run: Run, step: int) -> tuple[dict[str, float], list[dict]]:
    """Collective. Sample, score, advantage, update -> the step's metrics, and its rows for samples.jsonl."""
    config, ranks = run.config, run.ranks
    batch = batch_for_step(len(run.examples), step - 1, config.prompts_per_step, config.seed)  # [P] indices
    places = own_places(len(batch), ranks)  # those that this rank samples
    groups = sample_and_score(run, step, places, [batch[place] for place in places])
    with run.phase("rollout_metrics"):
        metrics = rollout_metrics(groups, ranks)  # of the policy as it is: before anything is sampled again
    groups, given_up = resample_flat(run, step, groups)
    with run.phase("gather"):
        everyone = gather_groups(groups, config.prompts_per_step, ranks)
    rewards = reward_table(everyone)  # [P, G]
    if config.shuffle_rewards:
        rewards = shuffled(rewards, config.seed, step)
    name = objective_of(config).advantage
    advantages = ADVANTAGES[name](rewards)  # [P, G]
    updates = make_updates(everyone, advantages, config, ranks, uses_shared_prefix(run.policy))
    if run.reference is not None:
        with run.phase("reference"):
            store_logprobs(run.reference, updates, "reference_logprobs")
            release(run.reference)
    if len(updates) > 1:  # with one update, micro_batch_loss stores them in the first pass
        with run.phase("old_logprobs"):
            store_logprobs(run.policy, updates, "old_logprobs", entropy=name in TERMS)
    with run.phase("update"):
        metrics.update(update_policy(run.policy, run.optimizer, updates, config, ranks))
    with run.phase("metrics"):
        metrics.update(sampler_difference(updates, ranks, config.correction))
        own = advantages[list(places)].tolist()
        rows = sample_rows(step, groups, own, run.tokenizer, config.log_samples, ranks)
        trained = sum(micro.packed.ids.numel() for update in updates for micro in update.micros)
        work = Work(groups, given_up, trained, count_parameters(run.policy), run.clock.seconds)
        metrics.update(speed_metrics(work, config, ranks))
    return metrics, rows


def sample_and_score(run: Run, step: int, places: Sequence[int], indices: Sequence[int]) -> list[Group]:
    """Collective. G scored completions of the examples with these indices, at these places of the batch."""
    config = run.config
    items = [run.examples[i] for i in indices]
    seeds = [prompt_seed(config.seed, step, place) for place in places]
    prompts = [Prompt(item.example.id, item.ids, seed) for item, seed in zip(items, seeds)]
    with run.phase("rollout"), gathered_weights(run.policy) as policy:
        groups = sample_groups(
            policy, run.tokenizer, prompts, Decoding.training(config), run.ranks.main, run.ranks.heartbeat
        )
    with run.phase("reward"):
        return score_groups(
            groups, items, places, run.reward, config.max_response_tokens, config.overlong_tokens
        )


def resample_flat(run: Run, step: int, groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """Collective. Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups whose rewards are all equal
    give their place to other prompts, at most resample_rounds times -> the groups, and those given up.

    Which prompt comes next depends on seed, step, place and round alone, not on ranks or a resume.
    """
    config = run.config
    groups, given_up = list(groups), []
    for _ in range(config.resample_rounds):
        flat = [k for k, group in enumerate(groups) if group.flat]
        if run.ranks.sum([len(flat)]) == [0]:  # on all ranks: a round would only gather the weights
            break
        # beyond the batch: seeds of their own
        places = [groups[k].place + config.prompts_per_step for k in flat]
        others = [prompt_seed(config.seed + 1, step, place) % len(run.examples) for place in places]
        for k, fresh in zip(flat, sample_and_score(run, step, places, others)):
            given_up.append(groups[k])
            groups[k] = fresh
    return groups, given_up


# --------------------------------------------------------------------------------------------------- the loop


def train(run: Run) -> None:
    """Collective. The training loop, from the step after run.state["step"] to the last."""
    config, state = run.config, run.state
    with tqdm(total=run.steps, initial=state["step"], desc="GRPO", disable=not run.ranks.main or None) as bar:
        while state["step"] < run.steps:
            step = start_step(run)
            done = (step - 1) / run.steps
            rate = learning_rate(config.lr, config.lr_schedule, step, config.lr_warmup_steps, done)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            metrics, rows = grpo_step(run, step)
            state.update(step=step, flops=state["flops"] + metrics.pop("step_flops"))
            finish_step(run, {"learning_rate": rate, **metrics}, rows, last=step == run.steps)
            bar.update()
            bar.set_postfix(reward=f"{metrics['reward']:.2f}", kl=f"{metrics['kl']:.3f}", refresh=False)
    evaluate_if_missing(run)


def main(arguments: list[str]) -> None:
    """Collective. Trains as the settings say (config.py): `--config FILE.yaml --key value …`."""
    config = load_config(arguments)
    ranks = start_ranks(config.timeout_minutes)
    with Clock(ranks.watchdog)("set-up"):
        session = open_session(config, ranks, "grpo")
        if session.finished:
            return
        if session.cold:
            session = warm_up(session)
        run = begin(session, grpo_spec(session))
    train(run)
    close(run)


def grpo_spec(session) -> RunSpec:
    """How a GRPO run is built on a session."""
    config = session.config
    return RunSpec(
        session.folder, session.path, session.steps, config.lr, temperature=config.temperature,
        reference=config.kl_coef > 0,
    )


if __name__ == "__main__":
    run_script(main)
