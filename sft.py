"""Supervised fine-tuning on the same examples: the baseline to beat, and the warm-up of a model that knows
nothing.

    python sft.py --config configs/qwen2.5-1.5b.yaml --data train.json --run_dir runs/sft --epochs 1

What is imitated are an example's demonstrations (Reason-SFT; `python data.py distill` makes them). An example
without them is imitated as its bare calls, and so is every example with --sft_reason false (No-Reason SFT).
The loss sees the tokens of the replies alone.
"""

from __future__ import annotations
import distributed.start  # noqa: F401

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn
from tqdm import tqdm

from config import Config, load_config, printable
from corpus.examples import Example, Tokenized
from corpus.sources import DataError
from distributed.batches import batch_for_step, plan_micro_batches
from distributed.fsdp import clip_and_step
from distributed.ranks import Clock, Ranks, run_script, start_ranks
from kernel.attention import uses_shared_prefix
from kernel.packing import pack
from losses import learning_rate
from model import count_parameters
from ops.export import write_model
from ops.run_dir import hash_model
from prompts import PromptError, encode_reply, render_completion
from session import (
    Run,
    RunSpec,
    Session,
    begin,
    close,
    evaluate_if_missing,
    finish_step,
    open_session,
    start_step,
)

RAMP_STEPS = 20  # the learning rate rises linearly over these steps
BETAS = (0.9, 0.95)  # of AdamW

Imitation = tuple[list[int], list[list[int]]]  # a prompt's token ids, and those of each reply to imitate

def replies_to_imitate(example: Example, reason: bool = True) -> tuple[str, ...]:
    """The example's demonstrations; its answer as bare calls where it has none, or without `reason`."""
    if reason and example.demonstrations:
        return example.demonstrations
    return (render_completion(example.answer, ""),)


def encode_replies(tokenizer, train: Sequence[Tokenized], config: Config, quiet: bool) -> list[Imitation]:
    """What every example gives to imitate. Says how many lack demonstrations that the settings ask for, and
    skips replies that encode_reply refuses.
    """
    bare = sum(not item.example.demonstrations for item in train)
    if bare and config.sft_reason and not quiet:
        print(f"data: {bare} of {len(train)} examples have no demonstrations: their bare calls are imitated")
    imitations = []
    refused = []
    for item in tqdm(train, desc="encode replies", leave=False, disable=quiet or None):
        replies = []
        for text in replies_to_imitate(item.example, config.sft_reason):
            try:
                replies.append(encode_reply(tokenizer, text))
            except PromptError as error:
                refused.append(f"id={item.example.id}: {error}")
        imitations += [(item.ids, replies)] if replies else []
    if refused and not quiet:
        print(f"data: {len(refused)} demonstrations are refused and skipped, such as", printable(refused[0]))
    if not imitations:
        raise DataError(f"data: no demonstration is left to imitate; {refused[0]}")
    return imitations


def sft_update(
    policy: nn.Module, optimizer, batch: Sequence[Imitation], config: Config, ranks: Ranks
) -> dict[str, float]:
    """Collective. One optimizer step on the batch, of which every rank takes a share -> metrics.

    The loss is the mean of -log p over all reply tokens.
    """
    share_prompt = uses_shared_prefix(policy)
    sizes = [(len(prompt), [len(reply) for reply in replies]) for prompt, replies in batch]
    total = sum(sum(replies) for _, replies in sizes)
    loss = 0.0
    for parts in plan_micro_batches(sizes, config.max_tokens_per_micro_batch, ranks, share_prompt):
        # An empty micro-batch keeps in step with two tokens that no loss sees.
        micro = [(batch[i][0], batch[i][1][part]) for i, part in parts] or [([0], [[0]])]
        logprobs, _ = policy.logprobs(pack(micro, ranks.device, share_prompt), entropy=False)
        part_loss = -logprobs.sum() / total * bool(parts)
        part_loss.backward()
        loss += part_loss.item()
    norm = clip_and_step(policy, optimizer, config.max_grad_norm, ranks)
    tokens = total + sum(prompt for prompt, _ in sizes)
    skipped = int(not math.isfinite(norm))
    metrics = {"grad_norm": norm, "updates_skipped_nonfinite": skipped, "num_tokens": tokens}
    return {"loss": ranks.sum([loss])[0], **metrics}


def progress(run: Run, budget: float) -> float:
    """The share of the run that is done: of its compute budget in FLOPs, if it has one, else of its steps."""
    return run.state["flops"] / budget if budget else run.state["step"] / run.steps


def train(run: Run, budget: float = 0.0) -> None:
    """Collective. Trains to the last step, or until `budget` FLOPs are spent. Logs, evaluates and saves as
    grpo.py does.

    The learning rate rises over RAMP_STEPS and falls linearly to 0 over the run.
    """
    config, state = run.config, run.state
    imitations = encode_replies(run.tokenizer, run.examples, config, quiet=not run.ranks.main)
    label = "SFT" if run.monitor else "warm-up (SFT)"
    total = run.steps or None
    with tqdm(total=total, initial=state["step"], desc=label, disable=not run.ranks.main or None) as bar:
        while progress(run, budget) < 1:
            step = start_step(run)
            lr = learning_rate(config.sft_lr, "linear", step, RAMP_STEPS, progress(run, budget))
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            indices = batch_for_step(len(imitations), step - 1, config.sft_batch, config.seed)
            batch = [imitations[i] for i in indices]
            with run.phase("update"):
                metrics = sft_update(run.policy, run.optimizer, batch, config, run.ranks)
            # Forward and backward, as rollout.speed_metrics counts them.
            flops = (4 if run.config.lora_rank else 6) * count_parameters(run.policy) * metrics["num_tokens"]
            state.update(step=step, flops=state["flops"] + flops)
            finish_step(run, {"learning_rate": lr, **metrics}, last=progress(run, budget) >= 1)
            bar.update()
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
    evaluate_if_missing(run)


def warm_up(session: Session) -> Session:
    """Collective. `warmup_steps` of SFT on the session's examples -> the session with the new model.

    That model, run_dir/warmup/model, is the first policy and, by default, the frozen reference.
    """
    config = session.config
    folder = Path(config.run_dir) / "warmup"
    folder.mkdir(exist_ok=True)
    if session.ranks.main:
        print(f"warm-up: {config.warmup_steps} steps of SFT, logged in {folder}", flush=True)
    spec = RunSpec(folder, session.path, config.warmup_steps, config.sft_lr, BETAS, warm_up=True)
    whole = replace(config, lora_rank=0)  # adapters alone cannot teach a model that knows nothing
    run = begin(replace(session, config=whole), spec)
    train(run)
    write_model(run.policy, run.tokenizer, folder / "model", config, run.state, {}, session.ranks)
    path = str(folder / "model")
    identity = session.identity | hash_model(path, session.ranks)
    return replace(session, path=path, cold=False, identity=identity)


def main(arguments: list[str]) -> None:
    """Collective. Fine-tunes `model` on `data`; writes run_dir/model, log.jsonl and summary.json."""
    config = replace(load_config(arguments), reference="")  # only GRPO has one
    ranks = start_ranks(config.timeout_minutes)
    with Clock(ranks.watchdog)("set-up"):
        session = open_session(config, ranks, "sft")
        if session.finished:
            return
        steps = 0 if config.sft_flops else session.steps
        run = begin(session, RunSpec(session.folder, session.path, steps, config.sft_lr, BETAS))
    train(run, config.sft_flops)
    close(run)


if __name__ == "__main__":
    run_script(main)
