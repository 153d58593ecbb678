"""Group Relative Policy Optimization for tool calling: the whole method on a few screens.

    torchrun --nproc_per_node=8 grpo.py --config configs/qwen2.5-1.5b.yaml --data xlam.json,toolace.json
    python grpo.py --config configs/tiny.yaml                      the demo: a model from nothing, on a laptop's CPU
    python grpo.py --config runs/demo/config.yaml --resume true    go on after an interruption
    python grpo.py --export runs/demo/step_140 OUT                 a checkpoint as a bf16 Hugging Face folder

Source: Tool-N1 (arXiv 2505.00024); GRPO from DeepSeekMath (arXiv 2402.03300). Letters: P prompts, G completions per
prompt, N response tokens of a micro-batch.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import JudgedPrompt, evaluate_benchmark, load_benchmarks
from config import Config, ConfigError, load_config
from data import DataError, Tokenized, load_splits, tokenize_splits
from engines import ENGINES, Prompt
from model import (
    ModelError,
    count_parameters,
    export,
    load_model,
    load_tokenizer,
    token_logprobs,
    uses_shared_prefix,
)  # fmt: skip
from packing import Packed, attention_backend, micro_batches, pack
from plot import summarize
from prompts import PromptError, check_tokenizer, load_template
from reward import Reward, RewardError, RewardFunction, reward_function
from rollout import Group, evaluate, prompt_seed, rollout_metrics, sample_groups, sample_rows, speed_metrics
from runtime import (
    Clock,
    Interrupted,
    Ranks,
    StopFlag,
    append_jsonl,
    batch_for_step,
    cut_log,
    latest_checkpoint,
    open_run,
    read_jsonl,
    run_script,
    save_checkpoint,
    start_ranks,
    whole_folder,
)  # fmt: skip
from sft import warm_up

MAX_FAILED_STEPS = 5  # so many steps in a row without a finite gradient end the run

# ------------------------------------------------------------------------------------------------------ the maths


def group_advantages(rewards: Tensor) -> Tensor:
    """[P, G] -> [P, G]: (reward - mean) / (std + 1e-6) inside each group; exactly 0 where all rewards are equal.

    std is the sample standard deviation (n - 1), as in the library that the paper used. DeepSeekMath, section 4.1.2.
    """
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    flat = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return torch.where(flat, 0.0, (rewards - mean) / (std + 1e-6))


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[N], [N] -> [N]: per-token estimate exp(d) - d - 1 of KL(policy || reference), d = log ref - log policy.

    Never negative, low variance (http://joschu.net/blog/kl-approx.html). In the loss, its gradient is not exactly that
    of the KL: the paper uses it so.
    """
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_eps: float) -> Tensor:
    """[N] each -> [N]: the clipped surrogate -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), per token."""
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)


# ------------------------------------------------------------------------------------------------ phases of a step


@dataclass
class MicroBatch:
    """Packed groups with what the loss needs per response token: all [N]."""

    packed: Packed
    advantages: Tensor
    sampler_logprobs: Tensor
    old_logprobs: Tensor | None = None  # None: one update per rollout batch, so the policy has not changed yet
    ref_logprobs: Tensor | None = None  # None: kl_coef is 0


def score_groups(groups: Sequence[Group], examples: Sequence[Tokenized], reward: RewardFunction) -> list[list[Reward]]:
    """The reward of every completion, [P][G]."""
    return [
        [reward(text, item.example.answer, item.example.tools) for text in group.texts]
        for group, item in zip(groups, examples)
    ]


def shuffled(rewards: Tensor, config: Config, step: int, ranks: Ranks) -> Tensor:
    """Collective. [P, G] -> [P, G]: this rank's rewards after a permutation over all completions of the batch.

    The negative control: the same rewards, but telling nothing about the completion that they stand beside.
    """
    everything = torch.stack(ranks.gather(rewards), 1).flatten(0, 1)  # in the order of the batch: ranks take turns
    generator = torch.Generator().manual_seed(prompt_seed(config.seed, step, -1))
    mixed = everything.flatten()[torch.randperm(everything.numel(), generator=generator)].view_as(everything)
    return mixed[ranks.rank :: ranks.world]


def make_minibatches(
    groups: Sequence[Group], advantages: Tensor, config: Config, ranks: Ranks, shared: bool = True
) -> list[list[MicroBatch]]:
    """This rank's groups as minibatches (one optimizer update each) of micro-batches (one forward/backward each).

    With skip_zero_variance, groups whose advantages are all 0 are left out: neither loss, KL nor token count sees them.
    shared: whether the model takes packed groups (model.uses_shared_prefix).
    """
    per_update = config.minibatch_prompts // ranks.world
    teaches = (advantages != 0).any(1).tolist()
    minibatches = []
    for start in range(0, len(groups), per_update):
        own = range(start, min(start + per_update, len(groups)))
        own = [i for i in own if teaches[i] or not config.skip_zero_variance]
        sizes = [(len(groups[i].prompt.ids), [len(ids) for ids in groups[i].responses]) for i in own]
        micro = []
        for parts in micro_batches(sizes, config.max_tokens_per_micro_batch, shared):
            chosen = [(groups[own[k]], advantages[own[k], part], part) for k, part in parts]
            packed = pack([(group.prompt.ids, group.responses[part]) for group, _, part in chosen], ranks.device, shared)
            per_response = torch.cat([values for _, values, _ in chosen]).to(ranks.device)
            sampled = [x for group, _, part in chosen for row in group.logprobs[part] for x in row]
            sampled = torch.tensor(sampled, device=ranks.device)
            micro.append(MicroBatch(packed, per_response.repeat_interleave(packed.counts), sampled))
        minibatches.append(micro)
    return minibatches


@torch.no_grad()
def fixed_logprobs(
    policy: nn.Module | None, reference: nn.Module | None, minibatches: list[list[MicroBatch]], config: Config
) -> None:
    """Fills in the log-probs that stay fixed during the updates: the reference's, and the policy's own before them.

    The latter only where there is more than one update: before the first one they are what the update computes itself.
    """
    for micro in (m for minibatch in minibatches for m in minibatch):
        if reference is not None:
            micro.ref_logprobs = token_logprobs(reference, micro.packed, config.temperature, entropy=False)[0]
        if policy is not None and len(minibatches) > 1:
            micro.old_logprobs = token_logprobs(policy, micro.packed, config.temperature, entropy=False)[0]


def update_policy(
    policy: nn.Module, optimizer, minibatches: list[list[MicroBatch]], config: Config, ranks: Ranks
) -> dict[str, float]:
    """Collective. One optimizer update per minibatch; returns metrics over all tokens of all updates.

    The loss is the mean over all response tokens of the minibatch on all ranks, so neither the packing into
    micro-batches nor the number of ranks changes it.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    tokens, norms, skipped = 0.0, [], 0
    for minibatch in minibatches:
        total = ranks.sum([float(sum(len(m.advantages) for m in minibatch))])[0]
        if total == 0:  # on all ranks: every group of this update was left out
            continue
        for micro in minibatch:
            logprobs, entropy = token_logprobs(policy, micro.packed, config.temperature)
            old = logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs
            loss = policy_loss(logprobs, old, micro.advantages, config.clip_eps)
            kl = torch.zeros_like(loss) if micro.ref_logprobs is None else kl_k3(logprobs, micro.ref_logprobs)
            loss = loss + config.kl_coef * kl
            (loss.sum() / total).backward()
            with torch.no_grad():
                ratio = (logprobs - old).exp()
                low = (ratio < 1 - config.clip_eps) & (micro.advantages < 0)
                high = (ratio > 1 + config.clip_eps) & (micro.advantages > 0)
                part = torch.stack([x.double().sum() for x in (loss, kl, entropy, low, high)])
                sums += part.nan_to_num(0.0, 0.0, 0.0).cpu()  # a bad part is counted below and must not blot the log
        ranks.sum_gradients(policy)
        norm = float(nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm))
        if math.isfinite(norm):  # the norm is the same on all ranks, so all skip together
            optimizer.step()
            norms.append(norm)
        else:
            skipped += 1
        optimizer.zero_grad(set_to_none=True)
        tokens += total
    loss, kl, entropy, low, high = (x / max(tokens, 1) for x in ranks.sum(sums.tolist()))
    metrics = {"loss": loss, "kl": kl, "entropy": entropy, "clip_ratio/low_mean": low, "clip_ratio/high_mean": high}
    metrics |= {"clip_ratio/region_mean": low + high, "grad_norm": sum(norms) / max(1, len(norms))}
    return metrics | {"updates": len(norms), "updates_skipped_nonfinite": skipped}


# ----------------------------------------------------------------------------------------------------------- logging


def sampler_difference(minibatches: list[list[MicroBatch]], ranks: Ranks) -> dict[str, float]:
    """Collective. Mean |sampler - trainer| log-prob where the old log-probs were computed: a bug detector, not a loss."""
    micros = [m for minibatch in minibatches for m in minibatch if m.old_logprobs is not None]
    differences = [(m.old_logprobs - m.sampler_logprobs).abs().double().sum().item() for m in micros]
    total, count = ranks.sum([sum(differences), float(sum(len(m.advantages) for m in micros))])
    return {"sampling/sampling_logp_difference/mean": total / count} if count else {}


# -------------------------------------------------------------------------------------------------------------- loop


@dataclass
class Run:
    """What a run consists of, set up once by `set_up`."""

    config: Config
    ranks: Ranks
    folder: Path
    stop: StopFlag
    tokenizer: object
    reward: RewardFunction
    policy: nn.Module
    reference: nn.Module | None
    optimizer: torch.optim.Optimizer
    train: Sequence[Tokenized]
    held_out: dict[str, Sequence[Tokenized]]
    benchmarks: dict[str, Sequence[JudgedPrompt]]
    state: dict  # step, seconds, flops: saved with every checkpoint
    began: float  # time.perf_counter() at the start, moved back by the seconds of the parts before a resume


def train(run: Run) -> None:
    """Collective. The training loop, from the step after run.state["step"] to the last."""
    config, ranks, state = run.config, run.ranks, run.state
    bar = tqdm(total=total_steps(config, len(run.train)), initial=state["step"], desc="GRPO", disable=not ranks.main)
    for step in range(state["step"] + 1, bar.total + 1):
        clock = Clock()
        batch = batch_for_step(len(run.train), step - 1, config.prompts_per_step, config.seed)
        places = range(ranks.rank, len(batch), ranks.world)  # this rank's places in the batch
        groups, scores = sample_and_score(run, [run.train[batch[place]] for place in places], step, places, clock)
        metrics = rollout_metrics(groups, scores, ranks)  # of the policy as it is: before anything is sampled again
        groups, scores, again = resample_flat(run, groups, scores, step, places, clock)
        rewards = torch.tensor([[r.total for r in row] for row in scores])
        if config.shuffle_rewards:
            rewards = shuffled(rewards, config, step, ranks)
        advantages = group_advantages(rewards)
        minibatches = make_minibatches(groups, advantages, config, ranks, uses_shared_prefix(run.policy))
        with clock("reference"):
            fixed_logprobs(None, run.reference, minibatches, config)
        with clock("old_logprobs"):
            fixed_logprobs(run.policy, None, minibatches, config)
        with clock("update"):
            metrics |= update_policy(run.policy, run.optimizer, minibatches, config, ranks)
        failed = not metrics["updates"] and metrics["updates_skipped_nonfinite"]
        state["failed"] = state.get("failed", 0) + 1 if failed else 0
        if state["failed"] == MAX_FAILED_STEPS:
            raise ConfigError(f"steps {step - MAX_FAILED_STEPS + 1} to {step} had NaN or infinite gradients only; lower lr")
        metrics |= sampler_difference(minibatches, ranks)
        trained = sum(m.packed.ids.numel() for minibatch in minibatches for m in minibatch)
        metrics |= speed_metrics(groups, again, trained, count_parameters(run.policy), config, clock.seconds, ranks)
        state |= {"step": step, "flops": state["flops"] + metrics.pop("step_flops")}
        rows = sample_rows(step, groups, scores, advantages, config.log_samples, ranks)
        finish_step(run, metrics, rows, step == bar.total)
        bar.update()
        bar.set_postfix(reward=f"{metrics['reward']:.2f}", kl=f"{metrics['kl']:.3f}", refresh=False)
    bar.close()


def sample_and_score(
    run: Run, items: Sequence[Tokenized], step: int, places: Sequence[int], clock: Clock
) -> tuple[list[Group], list[list[Reward]]]:
    """Completions of the prompts at these places of the step's batch, and their rewards."""
    config = run.config
    prompts = [Prompt(t.example.id, t.ids, prompt_seed(config.seed, step, p)) for t, p in zip(items, places)]
    with clock("rollout"):
        groups = sample_groups(
            run.policy, run.tokenizer, prompts, group_size=config.group_size, temperature=config.temperature,
            max_new_tokens=config.max_response_tokens, batch_size=config.rollout_batch_size,
            engine=config.rollout_engine, progress=run.ranks.main,
        )  # fmt: skip
    with clock("reward"):
        return groups, score_groups(groups, items, run.reward)


def resample_flat(
    run: Run, groups: list[Group], scores: list[list[Reward]], step: int, places: Sequence[int], clock: Clock
) -> tuple[list[Group], list[list[Reward]], list[Group]]:
    """Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups whose rewards are all equal give their place to
    other prompts, at most resample_rounds times. -> (groups, rewards, the groups that were given up).

    Which prompt comes next depends on seed, step, place and round alone, so neither ranks nor a resume change it.
    """
    groups, scores, given_up = list(groups), list(scores), []
    for round_ in range(1, run.config.resample_rounds + 1):
        flat = [k for k, row in enumerate(scores) if len({one.total for one in row}) == 1]
        spots = [places[k] + round_ * run.config.prompts_per_step for k in flat]  # beyond the batch: seeds of their own
        items = [run.train[prompt_seed(run.config.seed + 1, step, spot) % len(run.train)] for spot in spots]
        fresh, fresh_scores = sample_and_score(run, items, step, spots, clock)
        for k, group, row in zip(flat, fresh, fresh_scores):
            given_up.append(groups[k])
            groups[k], scores[k] = group, row
    return groups, scores, given_up


def finish_step(run: Run, metrics: dict[str, float], rows: list[dict], last: bool) -> None:
    """Collective. Evaluates, logs and saves where it is time. Raises Interrupted after a signal, with all saved."""
    config, step = run.config, run.state["step"]
    if last or (config.eval_every and step % config.eval_every == 0):
        metrics = metrics | evaluate_all(run)
    run.state["seconds"] = time.perf_counter() - run.began
    if run.ranks.main:
        epoch = step * config.prompts_per_step / len(run.train)
        record = {"step": step, "epoch": round(epoch, 4), "learning_rate": config.lr, **metrics}
        append_jsonl(run.folder / "log.jsonl", [record | {k: run.state[k] for k in ("seconds", "flops")}])
        append_jsonl(run.folder / "samples.jsonl", rows)
    stopping = run.stop.agreed(run.ranks)
    if last or stopping or (config.save_every and step % config.save_every == 0):
        save_checkpoint(
            run.folder, run.state, run.policy, run.tokenizer, run.optimizer, run.ranks, config.keep_checkpoints
        )
    if stopping and not last:
        raise Interrupted(config.run_dir, step)


def evaluate_all(run: Run) -> dict[str, float]:
    """Collective. Greedy accuracy on every held-out split and benchmark subset."""
    results: dict[str, float] = {}
    for name, examples in run.held_out.items():
        results |= evaluate(run.policy, run.tokenizer, examples, run.config, run.ranks, name)
    for name, cases in run.benchmarks.items():
        results |= evaluate_benchmark(run.policy, run.tokenizer, cases, run.config, run.ranks, name)
    return results


def total_steps(config: Config, examples: int) -> int:
    """`steps`, or as many rollout batches as `epochs` passes over the training prompts fill."""
    return config.steps or max(1, math.ceil(config.epochs * examples / config.prompts_per_step))


def set_up(config: Config, ranks: Ranks) -> Run:
    """Collective. Data, start model, policy, frozen reference and optimizer; or all of it from a checkpoint."""
    began = time.perf_counter()
    if config.rollout_engine not in ENGINES:
        raise ConfigError(f"rollout_engine must be one of {', '.join(ENGINES)}, not {config.rollout_engine!r}")
    reward = reward_function(config.reward, config.lenient)
    template, splits = load_template(config.prompt_template), load_splits(config)
    reward("", splits.train[0].answer, splits.train[0].tools)  # a broken function of the user's own stops here
    if config.model != "tiny":  # before an old run is replaced
        check_tokenizer(load_tokenizer(config.model), template)
    folder, stop = open_run(config, ranks), StopFlag()
    if ranks.main:
        print(f"run: {folder} · {ranks.world} process(es) on {ranks.device} · attention: {attention_backend(ranks.device)}")
    earlier = latest_checkpoint(folder / "warmup")  # of a warm-up before a resume
    start = warm_up(config, splits, template, ranks, stop)
    checkpoint = latest_checkpoint(folder)
    tokenizer = load_tokenizer(start)
    check_tokenizer(tokenizer, template)
    tokenized = tokenize_splits(splits, tokenizer, template, config, quiet=not ranks.main)
    benchmarks = load_benchmarks(config, tokenizer, template, quiet=not ranks.main)
    policy = load_model(str(checkpoint[0]) if checkpoint else start, ranks.device, config.gradient_checkpointing)
    tokens, positions = config.max_prompt_tokens + config.max_response_tokens, policy.config.max_position_embeddings
    if tokens > positions:
        raise ConfigError(f"max_prompt_tokens + max_response_tokens ({tokens}) exceed the model's {positions} positions")
    # The reference is always the model that training started from, also after a resume.
    reference = load_model(start, ranks.device).requires_grad_(False).eval() if config.kl_coef else None
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    state = {"step": 0, "seconds": earlier[1]["seconds"] if earlier else 0.0, "flops": 0.0}
    if checkpoint:
        state = checkpoint[1]
        optimizer.load_state_dict(torch.load(checkpoint[0] / "optimizer.pt", weights_only=True, map_location="cpu"))
        for group in optimizer.param_groups:  # the checkpoint's rates came along, but the config of now counts
            group["lr"], group["weight_decay"] = config.lr, config.weight_decay
    if ranks.main:  # steps after the checkpoint are done again; without one, all of them
        for name in ("log.jsonl", "samples.jsonl"):
            cut_log(folder / name, state["step"] if checkpoint else -1)
    run = Run(
        config, ranks, folder, stop, tokenizer, reward, policy, reference, optimizer, tokenized.train, tokenized.held_out,
        benchmarks, state, began - state["seconds"],
    )  # fmt: skip
    if not checkpoint:
        before = evaluate_all(run)
        if ranks.main:
            append_jsonl(folder / "log.jsonl", [{"step": 0, **before}])
    return run


def main(arguments: list[str]) -> None:
    """Collective. Trains as the settings say, or exports a checkpoint (`--export CHECKPOINT OUT`)."""
    if arguments[:1] == ["--export"]:
        return export_checkpoint(arguments[1:])
    config = load_config(arguments)
    ranks = start_ranks(config.timeout_minutes, config.threads)
    if config.minibatch_prompts % ranks.world:
        raise ConfigError(
            f"minibatch_prompts ({config.minibatch_prompts}) must be a multiple of the number of processes ({ranks.world})"
        )
    run = set_up(config, ranks)
    train(run)
    if ranks.main:
        with whole_folder(run.folder / "model") as folder:
            export(run.policy, run.tokenizer, folder)
        summary = summarize(read_jsonl(run.folder / "log.jsonl"), list(run.held_out))
        (run.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        print(f"reward: first 5 steps {summary['reward_first5']:.3f}, last 10 steps {summary['reward_last10']:.3f}")
        for key in [key for key in summary if key.endswith("accuracy_before")]:
            split = key.removesuffix("accuracy_before").rstrip("_") or "held_out"
            after = summary[key.replace("before", "after")]
            print(f"{split}: greedy accuracy {summary[key]:.3f} before, {after:.3f} after")
        print(f"model: {run.folder / 'model'} · curves and samples: python plot.py {run.folder}")


def export_checkpoint(arguments: list[str]) -> None:
    """A checkpoint (or any model folder) as a bf16 Hugging Face folder. Raises ConfigError for wrong arguments."""
    if len(arguments) != 2:
        raise ConfigError("usage: python grpo.py --export RUN/step_N OUT")
    source, target = arguments[0], Path(arguments[1])
    if target.exists():
        raise ConfigError(f"export: {target} exists already")
    model, tokenizer = load_model(source, torch.device("cpu")), load_tokenizer(source)
    with whole_folder(target) as folder:
        export(model, tokenizer, folder, torch.bfloat16)
    print(f"model: {target}")


if __name__ == "__main__":
    run_script(main, (ConfigError, DataError, ModelError, PromptError, RewardError))
