"""Supervised fine-tuning on the same examples: the baseline to beat, and the warm-up of a model that knows
nothing.

    python sft.py --config configs/qwen2.5-1.5b.yaml --data train.json --run_dir runs/sft --epochs 1

An example's demonstrations are what is imitated (Reason-SFT; distill.py makes them). One without them, or
every one with --sft_reason false, is imitated as its bare calls (No-Reason SFT). The loss sees the tokens of
the replies alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from config import Config, load_config
from corpus.examples import Example, Splits, Tokenized
from corpus.sources import append_jsonl
from corpus.tiny_model import LAYERS, VOCABULARY, build_tiny_model, build_tiny_tokenizer
from data import load_splits, tokenize_splits
from distributed.batches import batch_for_step, share_out
from distributed.checkpoint import (
    Saver,
    choose_step,
    latest_checkpoint,
    load_checkpoint,
    raise_problem,
)
from distributed.fsdp import full_tensor, gathered_weights, load_sharded, make_mesh
from distributed.ranks import Clock, Interrupted, Ranks, StopFlag, run_script, start_ranks
from evals.in_training import evaluate
from kernel.attention import uses_shared_prefix
from kernel.packing import micro_batches, pack
from model import count_parameters, load_tokenizer, token_logprobs
from ops.export import export, write_model
from ops.monitor import Monitor, close_monitor, open_monitor, report, tracker_names
from ops.run_dir import atomic_folder, cut_log, open_run
from prompts import (
    check_tokenizer,
    encode_reply,
    load_template,
    render_completion,
    render_prompt,
)

RAMP_STEPS = 20  # the learning rate rises linearly over these steps

Imitation = tuple[list[int], list[list[int]]]  # a prompt's token ids, and those of each reply to imitate

# ------------------------------------------------------------------------------------------- what is imitated


def replies_to_imitate(example: Example, reason: bool = True) -> tuple[str, ...]:
    """The example's demonstrations; its answer as bare calls where it has none, or where no `reason` is
    wanted.
    """
    if reason and example.demonstrations:
        return example.demonstrations
    return (render_completion(example.answer, ""),)


def encode_replies(tokenizer, train: Sequence[Tokenized], config: Config, quiet: bool) -> list[Imitation]:
    """What every example gives to imitate; says how many lack the demonstrations that the settings ask
    for.
    """
    bare = sum(not item.example.demonstrations for item in train)
    if bare and config.sft_reason and not quiet:
        print(
            f"data: {bare} of {len(train)} examples have no demonstrations and are imitated as their bare calls"
        )
    groups = []
    for item in tqdm(train, desc="encode replies", leave=False, disable=quiet):
        replies = replies_to_imitate(item.example, config.sft_reason)
        groups.append((item.ids, [encode_reply(tokenizer, text) for text in replies]))
    return groups


# --------------------------------------------------------------------------------------------------- training


def sft_update(
    policy: nn.Module, optimizer, groups: Sequence[Imitation], config: Config, ranks: Ranks
) -> dict[str, float]:
    """Collective. One optimizer step on the whole batch's groups, of which every rank takes a share.

    The loss is the mean over all reply tokens.
    """
    sizes, share_prompt = (
        [(len(prompt), list(map(len, replies))) for prompt, replies in groups],
        uses_shared_prefix(policy),
    )
    tokens, total = (
        [prompt + sum(replies) for prompt, replies in sizes],
        sum(sum(replies) for _, replies in sizes),
    )
    shares = share_out(tokens, ranks.world)
    plans = [
        micro_batches([sizes[i] for i in share], config.max_tokens_per_micro_batch, share_prompt)
        for share in shares
    ]
    own, most, loss = shares[ranks.rank], max(map(len, plans)), 0.0
    micros = [
        [(groups[own[k]][0], groups[own[k]][1][part]) for k, part in batch] for batch in plans[ranks.rank]
    ]
    for micro in micros + [None] * (most - len(micros)):  # None: only keeps in step with ranks that have more
        packed = pack(micro or [([0], [[0]])], ranks.device, share_prompt)
        logprobs, _ = token_logprobs(policy, packed, temperature=1.0, entropy=False)
        part = -logprobs.sum() / total * (micro is not None)
        part.backward()
        loss += part.item()
    norm = float(full_tensor(nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)))
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": ranks.sum([loss])[0], "grad_norm": norm, "num_tokens": sum(tokens)}


def sft_steps(config: Config, examples: int) -> int:
    """How many optimizer steps: `steps`, or `epochs` passes; with sft_flops the budget ends it, wherever that
    is.
    """
    if config.sft_flops:
        return 10**9
    return config.steps or max(1, round(config.epochs * examples / config.sft_batch))


@dataclass
class Run:
    """What SFT consists of, set up once by `begin`."""

    config: Config
    ranks: Ranks
    folder: Path
    stop: StopFlag
    tokenizer: object
    policy: nn.Module
    optimizer: torch.optim.Optimizer
    saver: Saver
    groups: list[Imitation]
    held_out: dict[str, Sequence[Tokenized]]
    steps: int  # the budget of sft_flops may end it earlier
    state: dict  # step, seconds, flops: saved with every checkpoint
    began: float  # time.perf_counter() at the start, moved back by the seconds of the parts before a resume
    monitor: Monitor | None  # of the main process; a warm-up has none


def train_sft(
    policy: nn.Module, tokenizer, data: Splits, config: Config, steps: int, folder: Path, ranks: Ranks, stop: StopFlag,
    label: str, monitor: Monitor | None = None,
) -> tuple[dict, dict[str, float]]:
    """Collective. `steps` optimizer steps (fewer if sft_flops runs out), logged, evaluated and checkpointed
    in `folder`.

    data: Tokenized. Goes on from the latest checkpoint there. Returns the last step's state and held-out
    accuracies. Raises Interrupted after a signal, with a checkpoint written.
    """
    run = begin(policy, tokenizer, data, config, steps, folder, ranks, stop, monitor)
    results, before = {}, run.state["step"]
    if not before:
        results = evaluate_held_out(run, Clock(ranks.watchdog))
        if results:
            log_row(run, {"step": 0, **results})
    total = None if config.sft_flops else steps
    with tqdm(total=total, initial=before, desc=label, disable=not ranks.main) as bar:
        while not is_finished(run):
            clock = Clock(ranks.watchdog, run.state["step"] + 1)
            metrics = sft_step(run, clock)
            results = finish_step(run, metrics, clock)
            bar.update()
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
    return run.state, results or evaluate_held_out(
        run, Clock(ranks.watchdog)
    )  # the latter where nothing was left to do


def begin(
    policy: nn.Module, tokenizer, data: Splits, config: Config, steps: int, folder: Path, ranks: Ranks, stop: StopFlag,
    monitor: Monitor | None,
) -> Run:
    """Collective. Token ids to imitate, optimizer and state; or the latter two from the latest checkpoint in
    `folder`.
    """
    groups = encode_replies(tokenizer, data.train, config, quiet=not ranks.main)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.sft_lr, weight_decay=0.0, betas=(0.9, 0.95), fused=True
    )
    saver = Saver(folder, ranks, config.keep_checkpoints, config.background_save)
    state, checkpoint = {"method": "sft", "step": 0, "flops": 0.0, "seconds": 0.0}, latest_checkpoint(folder)
    if checkpoint:
        state = checkpoint[1]
        load_checkpoint(checkpoint[0], policy, optimizer, ranks)
    if ranks.main:
        cut_log(folder / "log.jsonl", state["step"] if checkpoint else -1)
    policy.train()
    return Run(
        config, ranks, folder, stop, tokenizer, policy, optimizer, saver, groups, data.held_out, steps, state,
        time.perf_counter() - state["seconds"], monitor,
    )


def is_finished(run: Run) -> bool:
    """Whether all steps are done, or the budget is spent."""
    return run.state["step"] >= run.steps or 0 < run.config.sft_flops <= run.state["flops"]


def learning_rate(run: Run) -> float:
    """Of the next step: rises over RAMP_STEPS and, with sft_decay, falls linearly to 0 over the steps or the
    budget.
    """
    config, state = run.config, run.state
    progress = state["flops"] / config.sft_flops if config.sft_flops else state["step"] / run.steps
    return (
        config.sft_lr * min(1.0, (state["step"] + 1) / RAMP_STEPS) * (1 - progress)
    )


def sft_step(run: Run, clock: Clock) -> dict[str, float]:
    """Collective. The update of the next step's batch -> metrics."""
    config, state, lr = run.config, run.state, learning_rate(run)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    batch = batch_for_step(len(run.groups), state["step"], config.sft_batch, config.seed)
    with clock("update"):
        metrics = sft_update(run.policy, run.optimizer, [run.groups[i] for i in batch], config, run.ranks)
    # forward and backward: 6 FLOPs per parameter and token; attention is left out, here and in grpo.py
    flops = 6 * count_parameters(run.policy) * metrics["num_tokens"]
    state |= {"step": state["step"] + 1, "flops": state["flops"] + flops}
    return {"learning_rate": lr, **metrics}


def finish_step(run: Run, metrics: dict[str, float], clock: Clock) -> dict[str, float]:
    """Collective. Evaluates, logs and saves where it is time; returns the accuracies, {} where it was not
    time for them.

    Raises Interrupted after a signal, with all saved.
    """
    config, step, last, results = run.config, run.state["step"], is_finished(run), {}
    if last or (config.eval_every and step % config.eval_every == 0):
        results = evaluate_held_out(run, clock)
        note_best(run, results)
    run.state["seconds"] = time.perf_counter() - run.began
    epoch = round(step * config.sft_batch / len(run.groups), 4)
    times = {f"time/{phase}_s": seconds for phase, seconds in clock.seconds.items()}
    clocks = {key: run.state[key] for key in ("seconds", "flops")}
    log_row(run, {"step": step, "epoch": epoch, **metrics, **results, **times, **clocks})
    save_or_stop(run, last, clock)
    return results


def note_best(run, results: dict[str, float]) -> None:
    """Remembers the step with the best accuracy on the first held-out split, for this Run or grpo.py's: it is
    kept.
    """
    key = (
        "accuracy" if run.config.sft_reason else "correct_rate"
    )  # bare calls have no thought, which accuracy asks for
    score = results.get(f"{next(iter(run.held_out), '')}/{key}", 0.0)
    if score > run.state.get("best", {}).get("score", -1.0):
        run.state["best"] = {"step": run.state["step"], "score": score}


def save_or_stop(run, last: bool, clock: Clock) -> None:
    """Collective. Ends a step of this Run or grpo.py's: a checkpoint where it is time, or on a signal, then
    Interrupted.
    """
    config, step, problem = run.config, run.state["step"], ""
    with clock("save"):
        stopping = run.stop.requested(run.ranks)
        if last or stopping or (config.save_every and step % config.save_every == 0):
            problem = run.saver.save(run.state, run.policy, run.tokenizer, run.optimizer)
        if last or stopping:
            problem = problem or run.saver.finish()
    if last or stopping:
        if run.monitor:
            close_monitor(run.monitor)
        run.ranks.gather(None)  # torchrun signals who is still drawing when another rank has ended
    raise_problem(problem)
    if stopping and not last:
        raise Interrupted(config.run_dir, step)


def evaluate_held_out(run: Run, clock: Clock) -> dict[str, float]:
    """Collective. Greedy accuracy on every held-out split; {} where there is none."""
    results: dict[str, float] = {}
    if not run.held_out:
        return results
    with clock("evaluate"), gathered_weights(run.policy) as policy:
        for name, examples in run.held_out.items():
            results |= evaluate(policy, run.tokenizer, examples, run.config, run.ranks, name)
    return results


def log_row(run: Run, row: dict) -> None:
    """Appends a row to the run's log.jsonl."""
    if run.ranks.main:
        append_jsonl(run.folder / "log.jsonl", [row])
    if run.monitor:
        report(run.monitor, row, run.steps, lines=False)


# ------------------------------------------------------------------------------------------------ start, main


def start_model(config: Config, splits: Splits, template: str, ranks: Ranks) -> tuple[str, bool]:
    """Collective. The folder (or hub id) of the model to start from, and whether it still needs its warm-up.

    "tiny" is built from a config and the training texts, without any download.
    """
    warm = Path(config.run_dir) / "warmup"
    if (warm / "model").exists():
        return str(warm / "model"), False
    if config.model != "tiny":
        return config.model, config.warmup_steps > 0
    if ranks.main and not (warm / "start").exists():
        with atomic_folder(warm / "start") as folder:
            bare = build_tiny_tokenizer([], 0)  # knows bytes only, but has the chat template
            texts = [render_prompt(bare, e.messages, e.tools, template) for e in splits.train]
            texts += [text for example in splits.train for text in example.demonstrations]
            tokenizer = build_tiny_tokenizer(texts, VOCABULARY)
            export(
                build_tiny_model(tokenizer, config.tiny_hidden, LAYERS, config.seed), tokenizer,
                folder,
            )
    ranks.gather(None)
    return str(warm / "start"), True


def warm_up(config: Config, path: str, tokenizer, data: Splits, ranks: Ranks, stop: StopFlag) -> str:
    """Collective. `warmup_steps` of SFT on `data` (Tokenized), from the model in `path` -> the new model's
    folder.

    That, run_dir/warmup/model, is both the first policy and the frozen reference.
    """
    warm = Path(config.run_dir) / "warmup"
    warm.mkdir(exist_ok=True)
    policy, by_steps = load_policy(path, config, ranks), replace(config, sft_flops=0.0)
    train = replace(data, held_out={})  # grpo.py evaluates it
    state, _ = train_sft(
        policy, tokenizer, train, by_steps, config.warmup_steps, warm, ranks, stop, "warm-up (SFT)"
    )
    write_model(policy, tokenizer, warm / "model", config, state, {}, ranks)
    return str(warm / "model")


def load_policy(path: str, config: Config, ranks: Ranks, frozen: bool = False) -> nn.Module:
    """Collective. The model to train, or the frozen reference, sharded as the settings say."""
    offload = config.offload == "all" or (frozen and config.offload == "reference")
    return load_sharded(
        path, make_mesh(ranks, config.sharding), ranks.device, frozen=frozen, offload=offload,
        gradient_checkpointing=config.gradient_checkpointing and not frozen, trust_remote_code=config.trust_remote_code,
    )


def main(arguments: list[str]) -> None:
    """Collective. Fine-tunes `model` on `data`; writes run_dir/model, log.jsonl and summary.json."""
    config = load_config(arguments)
    tracker_names(config)
    template, splits = load_template(config.prompt_template), load_splits(config)
    ranks = start_ranks(config.timeout_minutes)
    run_dir, stop = open_run(config, ranks), StopFlag()
    choose_step(run_dir, config.resume_step, ranks)
    done = latest_checkpoint(run_dir)
    monitor = open_monitor(config, run_dir, done[1]["step"] if done else 0, ranks)
    path = start_model(config, splits, template, ranks)[0]
    tokenizer, policy = load_tokenizer(path, config.trust_remote_code), load_policy(path, config, ranks)
    check_tokenizer(tokenizer, template)
    tokenized = tokenize_splits(splits, tokenizer, template, config, quiet=not ranks.main)
    steps = sft_steps(config, len(tokenized.train))
    state, results = train_sft(
        policy, tokenizer, tokenized, config, steps, run_dir, ranks, stop, "SFT", monitor
    )
    write_model(policy, tokenizer, run_dir / "model", config, state, results, ranks)
    if ranks.main:
        (run_dir / "summary.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        for name in tokenized.held_out:
            print(f"{name}: greedy accuracy {results[f'{name}/accuracy']:.3f} (n = {results[f'{name}/n']})")
        print(f"model: {run_dir / 'model'}")


if __name__ == "__main__":
    run_script(main)
