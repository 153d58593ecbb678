"""Group Relative Policy Optimization for tool calling: the whole method on a few screens.

    torchrun --nproc_per_node=8 grpo.py --config configs/qwen2.5-1.5b.yaml --data xlam.json,toolace.json
    python grpo.py --config configs/tiny.yaml                      the demo: a model from nothing, on a
      laptop's CPU
    python grpo.py --config runs/demo/config.yaml --resume true    go on after an interruption
    python grpo.py --export runs/demo/step_140 OUT                 a checkpoint as a bf16 Hugging Face folder
    python grpo.py --config configs/qwen2.5-7b.yaml --plan         does it fit, and how long will a step take
    python grpo.py --config configs/tiny.yaml --doctor             is everything as it should be, tried out in
      one step

Source: Tool-N1 (arXiv 2505.00024); GRPO from DeepSeekMath (arXiv 2402.03300). Letters: P prompts, G
completions per prompt, N response tokens of a micro-batch.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import Config, ConfigError, check_positions, load_config
from corpus.examples import Splits, Tokenized
from corpus.sources import append_jsonl, read_jsonl
from data import load_splits, tokenize_splits
from distributed.batches import (
    Group,
    MicroBatch,
    Minibatch,
    batch_for_step,
    gather_groups,
    make_minibatches,
    own_places,
    prompt_seed,
    reward_table,
    sampler_difference,
    shuffled,
)
from distributed.checkpoint import Saver, choose_step, latest_checkpoint, load_checkpoint
from distributed.fsdp import full_tensor, gathered_weights, release
from distributed.ranks import Clock, Ranks, StopFlag, run_script, start_ranks
from evals.in_training import JudgedPrompt, evaluate, evaluate_benchmark, load_benchmarks
from kernel.attention import attention_backend, uses_shared_prefix
from kernel.decode import Prompt
from losses import ADVANTAGES, AGGREGATIONS, KLS, Loss, loss_of, policy_loss
from model import count_parameters, load_tokenizer, token_logprobs
from ops import doctor, plan
from ops.checks import Start, check_names
from ops.export import export_checkpoint, write_model
from ops.monitor import Monitor, attempt, open_monitor, report
from ops.plot import headline, summarize, was_evaluated
from ops.run_dir import cut_log, open_run
from ops.samples_page import write_page
from prompts import check_tokenizer, load_template
from reward import Reward, RewardFunction, reward_function
from rollout import rollout_metrics, sample_groups, sample_rows, speed_metrics
from sft import load_policy, note_best, save_or_stop, start_model, warm_up

MAX_FAILED_STEPS = 5  # so many steps in a row without a finite gradient end the run

# ------------------------------------------------------------------------------------------- phases of a step


def score_groups(
    groups: Sequence[Group], examples: Sequence[Tokenized], reward: RewardFunction
) -> list[list[Reward]]:
    """The reward of every completion, [P][G]."""
    return [
        [reward(text, item.example.answer, item.example.tools) for text in group.texts]
        for group, item in zip(groups, examples)
    ]


@torch.no_grad()
def fixed_logprobs(
    policy: nn.Module | None, reference: nn.Module | None, minibatches: list[Minibatch], config: Config
) -> None:
    """Collective. Fills in the log-probs that stay fixed during the updates: the reference's, and the
    policy's own before them. The latter only where there is more than one update: before the first one they
    are what the update computes.
    """
    for micro in (micro for minibatch in minibatches for micro in minibatch.micros):
        if reference is not None:
            micro.ref_logprobs = token_logprobs(reference, micro.packed, config.temperature, entropy=False)[0]
        if policy is not None and len(minibatches) > 1:
            micro.old_logprobs = token_logprobs(policy, micro.packed, config.temperature, entropy=False)[0]
    if reference is not None:
        release(reference)


def micro_batch_loss(
    policy: nn.Module, micro: MicroBatch, update: Minibatch, objective: Loss, config: Config
) -> tuple[Tensor, Tensor]:
    """This micro-batch's part of its update's loss, and the sums of (loss, KL, entropy, clipped low, clipped
    high) [5].

    The loss is a weighted sum over the response tokens of the update on all ranks, with weights
    (losses.AGGREGATIONS) that neither the packing into micro-batches nor the number of ranks changes.
    """
    logprobs, entropy = token_logprobs(policy, micro.packed, config.temperature)
    if micro.idle:
        return logprobs.sum() * 0.0, torch.zeros(5, dtype=torch.float64)
    counts = micro.packed.counts
    old = logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs
    surrogate, ratio = policy_loss(logprobs, old, micro.advantages, counts, objective)
    kl = (
        torch.zeros_like(surrogate)
        if micro.ref_logprobs is None
        else KLS[config.kl](logprobs, micro.ref_logprobs)
    )
    weights = AGGREGATIONS[objective.aggregation](
        counts, update.tokens, update.completions, config.max_response_tokens
    )
    loss = (surrogate + config.kl_coef * kl) * weights.repeat_interleave(counts)
    with torch.no_grad():
        low = (ratio < 1 - objective.clip_low) & (micro.advantages < 0)
        high = (ratio > 1 + objective.clip_high) & (micro.advantages > 0)
        sums = torch.stack([x.double().sum() for x in (loss, kl, entropy, low, high)])
    return loss.sum(), sums.nan_to_num(
        0.0, 0.0, 0.0
    ).cpu()  # a bad part is counted as skipped and must not blot the log


def update_policy(
    policy: nn.Module, optimizer, minibatches: list[Minibatch], config: Config, ranks: Ranks
) -> dict[str, float]:
    """Collective. One optimizer update per minibatch -> metrics: the loss as a mean over updates, others over
    tokens.
    """
    objective, sums = loss_of(config), torch.zeros(5, dtype=torch.float64)
    tokens, norms, skipped = 0, [], 0
    for minibatch in minibatches:
        if minibatch.tokens == 0:  # on all ranks: every group of this update was left out
            continue
        for micro in minibatch.micros:
            loss, part = micro_batch_loss(policy, micro, minibatch, objective, config)
            loss.backward()  # adds to the sum over micro-batches and ranks
            sums += part
        norm = float(full_tensor(nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)))
        if math.isfinite(norm):  # the norm is the same on all ranks, so all skip together
            optimizer.step()
            norms.append(norm)
        else:
            skipped += 1
        optimizer.zero_grad(set_to_none=True)
        tokens += minibatch.tokens
    loss, *means = ranks.sum(sums.tolist())
    kl, entropy, low, high = (total / max(1, tokens) for total in means)
    metrics = {"loss": loss / max(1, len(norms) + skipped), "kl": kl, "entropy": entropy}
    metrics |= {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
    }
    metrics |= {"grad_norm": sum(norms) / max(1, len(norms)), "updates": len(norms)}
    return metrics | {"updates_skipped_nonfinite": skipped}


# ------------------------------------------------------------------------------------------------------- loop


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
    saver: Saver
    train: Sequence[Tokenized]
    held_out: dict[str, Sequence[Tokenized]]
    benchmarks: dict[str, Sequence[JudgedPrompt]]
    steps: int  # in all
    state: dict  # step, seconds, flops: saved with every checkpoint
    began: float  # time.perf_counter() at the start, moved back by the seconds of the parts before a resume
    monitor: Monitor | None  # of the main process


def train(run: Run) -> None:
    """Collective. The training loop, from the step after run.state["step"] to the last."""
    ranks, state = run.ranks, run.state
    log = run.folder / "log.jsonl"
    if state["step"] >= run.steps and not ranks.gather(ranks.main and was_evaluated(read_jsonl(log)[-1]))[0]:
        results = evaluate_all(
            run, Clock(ranks.watchdog)
        )  # a resume with fewer steps than before: nothing else is left
        if ranks.main:
            append_jsonl(log, [{"step": state["step"], **results}])
    with tqdm(total=run.steps, initial=state["step"], desc="GRPO", disable=not ranks.main) as bar:
        for step in range(state["step"] + 1, run.steps + 1):
            clock = Clock(ranks.watchdog, step)
            with clock(
                "exchange"
            ):  # what none of the phases inside it names: ranks telling each other numbers
                metrics, rows = train_step(run, step, clock)
            finish_step(run, metrics, rows, step == run.steps, clock)
            bar.update()
            bar.set_postfix(reward=f"{metrics['reward']:.2f}", kl=f"{metrics['kl']:.3f}", refresh=False)


def train_step(run: Run, step: int, clock: Clock) -> tuple[dict[str, float], list[dict]]:
    """Collective. Sample, reward, advantage, update -> the step's metrics, and its rows for samples.jsonl."""
    config, ranks, state = run.config, run.ranks, run.state
    batch = batch_for_step(len(run.train), step - 1, config.prompts_per_step, config.seed)
    places = own_places(len(batch), ranks)
    items = [run.train[batch[place]] for place in places]
    groups, scores = sample_and_score(run, items, step, places, clock)
    metrics = rollout_metrics(
        groups, scores, ranks
    )  # of the policy as it is: before anything is sampled again
    items, groups, scores, again = resample_flat(run, items, groups, scores, step, places, clock)
    everyone, rewards = gather_groups(groups, reward_table(scores, config), ranks)
    if config.shuffle_rewards:
        rewards = shuffled(rewards, config.seed, step)
    advantages = ADVANTAGES[loss_of(config).advantage](rewards)
    learnt, trained = learn(run, everyone, advantages, clock)
    metrics |= learnt
    own = advantages[ranks.rank :: ranks.world]
    rows = sample_rows(step, groups, items, scores, own, run.tokenizer, config.log_samples, ranks)
    stop_on_failures(run, step, learnt, rows)
    metrics |= speed_metrics(
        groups, again, trained, count_parameters(run.policy), config, clock.seconds, ranks
    )
    state |= {"step": step, "flops": state["flops"] + metrics.pop("step_flops")}
    return metrics, rows


def learn(run: Run, groups: list[Group], advantages: Tensor, clock: Clock) -> tuple[dict[str, float], int]:
    """Collective. The updates of one step, on the whole batch's groups -> metrics, tokens that this rank
    computed.
    """
    config, ranks = run.config, run.ranks
    minibatches = make_minibatches(groups, advantages, config, ranks, uses_shared_prefix(run.policy))
    with clock("reference"):
        fixed_logprobs(None, run.reference, minibatches, config)
    with clock("old_logprobs"):
        fixed_logprobs(run.policy, None, minibatches, config)
    with clock("update"):
        metrics = update_policy(run.policy, run.optimizer, minibatches, config, ranks)
    metrics |= sampler_difference(minibatches, ranks)
    return metrics, sum(micro.packed.ids.numel() for minibatch in minibatches for micro in minibatch.micros)


def stop_on_failures(run: Run, step: int, metrics: dict[str, float], rows: list[dict]) -> None:
    """Ends the run, with the batch saved, when too many steps in a row had no finite gradient."""
    failed = not metrics["updates"] and metrics["updates_skipped_nonfinite"]
    run.state["failed"] = run.state.get("failed", 0) + 1 if failed else 0
    if run.state["failed"] < MAX_FAILED_STEPS:
        return
    path, first = run.folder / f"nonfinite_step_{step}.jsonl", step - MAX_FAILED_STEPS + 1
    if run.ranks.main:
        append_jsonl(path, rows)
    raise ConfigError(
        f"steps {first} to {step} had NaN or infinite gradients only; lower lr; the last batch is in {path}"
    )


def sample_and_score(
    run: Run, items: Sequence[Tokenized], step: int, places: Sequence[int], clock: Clock
) -> tuple[list[Group], list[list[Reward]]]:
    """Collective. Completions of the prompts at these places of the step's batch, and their rewards."""
    config = run.config
    prompts = [Prompt(t.example.id, t.ids, prompt_seed(config.seed, step, p)) for t, p in zip(items, places)]
    with clock("rollout"), gathered_weights(run.policy) as policy:
        groups = sample_groups(
            policy, run.tokenizer, prompts, group_size=config.group_size, temperature=config.temperature,
            max_new_tokens=config.max_response_tokens, batch_size=config.rollout_batch_size,
            engine=config.rollout_engine, progress=run.ranks.main, heartbeat=run.ranks.heartbeat,
        )
    with clock("reward"):
        return groups, score_groups(groups, items, run.reward)


def resample_flat(
    run: Run, items: Sequence[Tokenized], groups: list[Group], scores: list[list[Reward]], step: int,
    places: Sequence[int], clock: Clock,
) -> tuple[list[Tokenized], list[Group], list[list[Reward]], list[Group]]:
    """Collective. Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups whose rewards are all equal
    give their place to other prompts, at most resample_rounds times. -> (items, groups, rewards, the groups
    that were given up).

    Which prompt comes next depends on seed, step, place and round alone, so neither ranks nor a resume change
    it.
    """
    items, groups, scores, given_up = list(items), list(groups), list(scores), []
    for round_ in range(1, run.config.resample_rounds + 1):
        flat = [k for k, row in enumerate(scores) if len({one.total for one in row}) == 1]
        spots = [
            places[k] + round_ * run.config.prompts_per_step for k in flat
        ]  # beyond the batch: seeds of their own
        others = [run.train[prompt_seed(run.config.seed + 1, step, spot) % len(run.train)] for spot in spots]
        fresh, fresh_scores = sample_and_score(run, others, step, spots, clock)
        for k, item, group, row in zip(flat, others, fresh, fresh_scores):
            given_up.append(groups[k])
            items[k], groups[k], scores[k] = item, group, row
    return items, groups, scores, given_up


def finish_step(run: Run, metrics: dict[str, float], rows: list[dict], last: bool, clock: Clock) -> None:
    """Collective. Evaluates, logs and saves where it is time. Raises Interrupted after a signal, with all
    saved.
    """
    config, step = run.config, run.state["step"]
    if last or (config.eval_every and step % config.eval_every == 0):
        metrics = metrics | evaluate_all(run, clock)
        metrics["time/evaluate_s"] = clock.seconds["evaluate"]
        note_best(run, metrics)
    run.state["seconds"] = time.perf_counter() - run.began
    if run.monitor:
        epoch = step * config.prompts_per_step / len(run.train)
        record = {"step": step, "epoch": round(epoch, 4), "learning_rate": config.lr, **metrics}
        record |= {key: run.state[key] for key in ("seconds", "flops")}
        append_jsonl(run.folder / "log.jsonl", [record])
        append_jsonl(run.folder / "samples.jsonl", rows)
        report(run.monitor, record, run.steps)
    save_or_stop(run, last, clock)


def evaluate_all(run: Run, clock: Clock) -> dict[str, float]:
    """Collective. Greedy accuracy on every held-out split and benchmark subset."""
    results: dict[str, float] = {}
    with clock("evaluate"), gathered_weights(run.policy) as policy:
        for name, examples in run.held_out.items():
            results |= evaluate(policy, run.tokenizer, examples, run.config, run.ranks, name)
        for name, cases in run.benchmarks.items():
            results |= evaluate_benchmark(policy, run.tokenizer, cases, run.config, run.ranks, name)
    return results


def total_steps(config: Config, examples: int) -> int:
    """`steps`, or as many rollout batches as `epochs` passes over the training prompts fill."""
    return config.steps or max(1, math.ceil(config.epochs * examples / config.prompts_per_step))


def read_inputs(config: Config) -> tuple[RewardFunction, str, Splits]:
    """Reward, system prompt and examples. What is wrong with settings or data raises here, before an old run
    is replaced.
    """
    check_names(config)
    reward = reward_function(config.reward, config.lenient)
    template, splits = load_template(config.prompt_template), load_splits(config)
    reward(
        "", splits.train[0].answer, splits.train[0].tools
    )  # a broken function of the user's own stops here
    return reward, template, splits


def read_prompts(
    config: Config, path: str, template: str, splits: Splits, quiet: bool
) -> tuple[object, Splits, dict[str, Sequence[JudgedPrompt]]]:
    """The model's tokenizer, and what it makes of examples and benchmarks."""
    tokenizer = load_tokenizer(path, config.trust_remote_code)
    check_tokenizer(tokenizer, template)
    tokenized = tokenize_splits(splits, tokenizer, template, config, quiet=quiet)
    return tokenizer, tokenized, load_benchmarks(config, tokenizer, template, quiet=quiet)


def set_up(config: Config, ranks: Ranks, examined: bool = False) -> Run:
    """Collective. Data, start model, policy, frozen reference and optimizer; or all of it from a checkpoint.

    examined: the doctor has looked at these settings already.
    """
    began, (reward, template, splits), quiet = time.perf_counter(), read_inputs(config), not ranks.main
    # A model that is there shows before an old run is replaced whether its tokenizer and prompts will do.
    prompts = None if config.model == "tiny" else read_prompts(config, config.model, template, splits, quiet)
    folder, stop = open_run(config, ranks), StopFlag()
    if ranks.main:
        print(
            f"run: {folder} · {ranks.world} process(es) on {ranks.device} · attention: {attention_backend(ranks.device)}"
        )
    choose_step(folder, config.resume_step, ranks)
    checkpoint = latest_checkpoint(folder)
    monitor = open_monitor(config, folder, checkpoint[1]["step"] if checkpoint else 0, ranks)
    earlier = latest_checkpoint(folder / "warmup")  # of a warm-up before a resume
    start, cold = start_model(config, splits, template, ranks)
    tokenizer, tokenized, benchmarks = prompts or read_prompts(config, start, template, splits, quiet)
    steps = total_steps(config, len(tokenized.train))
    if not examined:
        doctor.brief(Start(config, ranks, template, reward, splits, tokenized, tokenizer, start, steps))
    if cold:
        start = warm_up(config, start, tokenizer, tokenized, ranks, stop)
    policy = load_policy(start, config, ranks).train()
    # The reference is always the model that training started from, also after a resume.
    reference = load_policy(start, config, ranks, frozen=True).eval() if config.kl_coef else None
    check_positions(config, policy.config.max_position_embeddings)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.lr, weight_decay=0.0, fused=True
    )
    state = {"step": 0, "seconds": earlier[1]["seconds"] if earlier else 0.0, "flops": 0.0}
    if checkpoint:
        state = checkpoint[1]
        load_checkpoint(checkpoint[0], policy, optimizer, ranks)
    if config.resume and ranks.main:
        print(
            f"going on from {checkpoint[0].name if checkpoint else 'the warm-up: no step of GRPO is saved'}"
        )
    if ranks.main:  # steps after the checkpoint are done again; without one, all of them
        for name in ("log.jsonl", "samples.jsonl"):
            cut_log(folder / name, state["step"] if checkpoint else -1)
    run = Run(
        config, ranks, folder, stop, tokenizer, reward, policy, reference, optimizer,
        Saver(folder, ranks, config.keep_checkpoints, config.background_save), tokenized.train, tokenized.held_out,
        benchmarks, steps, state, began - state["seconds"], monitor,
    )
    if not checkpoint:
        before = evaluate_all(run, Clock(ranks.watchdog))
        if monitor:
            append_jsonl(folder / "log.jsonl", [{"step": 0, **before}])
            report(monitor, {"step": 0, **before}, steps, lines=False)
    return run


def dry_run(config: Config, ranks: Ranks) -> tuple[nn.Module, dict[str, float]]:
    """Collective. The policy and the metrics of a run's first step: for the doctor, which makes settings for
    it.
    """
    run = set_up(config, ranks, examined=True)
    return run.policy, train_step(run, 1, Clock(ranks.watchdog, 1))[0]


def main(arguments: list[str]) -> None:
    """Collective. Trains as the settings say, or exports a checkpoint (`--export CHECKPOINT OUT`)."""
    if arguments[:1] == ["--export"]:
        return export_checkpoint(arguments[1:])
    if "--plan" in arguments:
        return plan.main([word for word in arguments if word != "--plan"])
    config = load_config([word for word in arguments if word != "--doctor"])
    ranks = start_ranks(config.timeout_minutes)
    if "--doctor" in arguments:
        check_names(config)
        return doctor.main(config, ranks, dry_run, total_steps)
    run = set_up(config, ranks)
    train(run)
    summary = summarize(read_jsonl(run.folder / "log.jsonl"), list(run.held_out))
    write_model(run.policy, run.tokenizer, run.folder / "model", config, run.state, summary, ranks)
    if ranks.main:
        (run.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        print(headline(summary))
        print(f"model: {run.folder / 'model'} · curves: {run.folder / 'curves.png'}")
        if attempt("samples.html", partial(write_page, run.folder)):
            print(f"completions: {run.folder / 'samples.html'}")


if __name__ == "__main__":
    run_script(main)
