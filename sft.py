"""Supervised fine-tuning on the same examples: the baseline to beat, and the warm-up of a model that knows nothing.

    python sft.py --config configs/qwen2.5-1.5b.yaml --data train.json --run_dir runs/sft --epochs 1

An example's demonstrations are what is imitated; one without them is imitated as its bare calls (No-Reason SFT).
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from checkpoint import CheckpointError, Saver, choose_step, latest_checkpoint, load_checkpoint, stop_or_warn
from config import Config, ConfigError, load_config
from data import DataError, Example, Splits, Tokenized, load_splits, tokenize_splits
from export import export, write_model
from minibatches import share_out
from model import (
    ModelError,
    build_tiny_model,
    build_tiny_tokenizer,
    count_parameters,
    load_tokenizer,
    token_logprobs,
    uses_shared_prefix,
)  # fmt: skip
from packing import micro_batches, pack
from prompts import PromptError, check_tokenizer, encode_reply, load_template, render_completion, render_prompt
from rollout import evaluate
from runtime import (
    Interrupted,
    Ranks,
    StopFlag,
    append_jsonl,
    batch_for_step,
    cut_log,
    open_run,
    run_script,
    start_ranks,
    whole_folder,
)  # fmt: skip
from sharding import full_tensor, load_sharded, make_mesh, whole
from watch import Clock

RAMP_STEPS = 20  # the learning rate rises linearly over these steps


def replies_to_imitate(example: Example) -> tuple[str, ...]:
    """The example's demonstrations, or its answer as bare calls where it has none."""
    return example.demonstrations or (render_completion(example.answer, ""),)


def sft_update(policy: nn.Module, optimizer, groups: list, config: Config, ranks: Ranks) -> dict[str, float]:
    """Collective. One optimizer step on the whole batch's (prompt ids, replies) groups, of which every rank takes a share.

    The loss is the mean over all reply tokens.
    """
    sizes, shared = [(len(prompt), list(map(len, replies))) for prompt, replies in groups], uses_shared_prefix(policy)
    tokens, total = [prompt + sum(replies) for prompt, replies in sizes], sum(sum(replies) for _, replies in sizes)
    shares = share_out(tokens, ranks.world)
    plans = [micro_batches([sizes[i] for i in share], config.max_tokens_per_micro_batch, shared) for share in shares]
    own, most, loss = shares[ranks.rank], max(map(len, plans)), 0.0
    micros = [[(groups[own[k]][0], groups[own[k]][1][part]) for k, part in batch] for batch in plans[ranks.rank]]
    for micro in micros + [None] * (most - len(micros)):  # None: only keeps in step with ranks that have more
        packed = pack(micro or [([0], [[0]])], ranks.device, shared)
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
    """How many optimizer steps: `steps`, or `epochs` passes; with sft_flops the budget ends it, wherever that is."""
    if config.sft_flops:
        return 10**9
    return config.steps or max(1, round(config.epochs * examples / config.sft_batch))


def train_sft(
    policy: nn.Module, tokenizer, train: Sequence[Tokenized], config: Config, steps: int, run_dir: Path, ranks: Ranks,
    stop: StopFlag, label: str,
) -> None:  # fmt: skip
    """Collective. `steps` optimizer steps (fewer if sft_flops runs out), logged and checkpointed in `run_dir`.

    Goes on from the latest checkpoint there. Raises Interrupted after a signal, with a checkpoint written.
    """
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.sft_lr, weight_decay=config.weight_decay, betas=(0.9, 0.95), fused=True
    )
    state, saver = {"step": 0, "flops": 0.0, "seconds": 0.0}, Saver(run_dir, ranks, config.keep_checkpoints)
    if checkpoint := latest_checkpoint(run_dir):
        state = checkpoint[1]
        load_checkpoint(checkpoint[0], policy, optimizer, ranks)
        if ranks.main:
            cut_log(run_dir / "log.jsonl", state["step"])

    @functools.cache  # the same examples come again, and all ranks need all of them to share them out
    def group_of(i: int) -> tuple[list[int], list[list[int]]]:
        return train[i].ids, [encode_reply(tokenizer, text) for text in replies_to_imitate(train[i].example)]

    began, parameters = time.perf_counter() - state["seconds"], count_parameters(policy)
    policy.train()
    bar = tqdm(total=None if config.sft_flops else steps, initial=state["step"], desc=label, disable=not ranks.main)
    for step in range(state["step"] + 1, steps + 1):
        if 0 < config.sft_flops <= state["flops"]:  # a finished run that was asked to go on
            break
        groups = [group_of(i) for i in batch_for_step(len(train), step - 1, config.sft_batch, config.seed)]
        progress = state["flops"] / config.sft_flops if config.sft_flops else (step - 1) / steps
        lr = config.sft_lr * min(1.0, step / RAMP_STEPS) * (1 - progress if config.sft_decay else 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        clock = Clock(ranks.watchdog, step)
        with clock("update"):
            metrics = sft_update(policy, optimizer, groups, config, ranks)
        # forward and backward: 6 FLOPs per parameter and token; attention is left out, here and in grpo.py
        state = {"step": step, "flops": state["flops"] + 6 * parameters * metrics["num_tokens"]}
        state["seconds"] = time.perf_counter() - began
        if ranks.main:
            append_jsonl(run_dir / "log.jsonl", [{**state, **metrics, "learning_rate": lr}])
        bar.update()
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
        finished = step == steps or 0 < config.sft_flops <= state["flops"]
        stopping = stop.agreed(ranks)
        if stopping or finished or (config.save_every and step % config.save_every == 0):
            with clock("save"):
                problem = saver.save(state, policy, tokenizer, optimizer)
            stop_or_warn(problem, stopping or config.save_errors == "stop", ranks)
        if stopping and not finished:
            raise Interrupted(config.run_dir, step)
        if finished:
            break
    bar.close()


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
        with whole_folder(warm / "start") as folder:
            bare = build_tiny_tokenizer([], 0)  # knows bytes only, but has the chat template
            texts = [render_prompt(bare, e.messages, e.tools, template) for e in splits.train]
            texts += [text for example in splits.train for text in example.demonstrations]
            tokenizer = build_tiny_tokenizer(texts, config.tiny_vocab)
            export(build_tiny_model(tokenizer, config.tiny_hidden, config.tiny_layers, config.seed), tokenizer, folder)
    ranks.gather(None)
    return str(warm / "start"), True


def warm_up(config: Config, splits: Splits, template: str, ranks: Ranks, stop: StopFlag) -> str:
    """Collective. The start model's path, after `warmup_steps` of SFT if the config asks for them.

    The result, run_dir/warmup/model, is both the first policy and the frozen reference.
    """
    path, needed = start_model(config, splits, template, ranks)
    if not needed:
        return path
    warm = Path(config.run_dir) / "warmup"
    tokenizer, policy = load_tokenizer(path, config.trust_remote_code), load_policy(path, config, ranks)
    train = tokenize_splits(splits, tokenizer, template, config, quiet=True).train
    by_steps = replace(config, sft_flops=0.0)
    train_sft(policy, tokenizer, train, by_steps, config.warmup_steps, warm, ranks, stop, "warm-up (SFT)")
    write_model(policy, tokenizer, warm / "model", config, {"step": config.warmup_steps}, {}, ranks)
    return str(warm / "model")


def load_policy(path: str, config: Config, ranks: Ranks, frozen: bool = False) -> nn.Module:
    """Collective. The model to train, or the frozen reference, sharded as the settings say."""
    offload = config.low_memory or (config.offload_reference if frozen else config.offload_optimizer)
    return load_sharded(
        path, make_mesh(ranks, config.sharding), ranks.device, frozen=frozen, offload=offload,
        gradient_checkpointing=config.gradient_checkpointing and not frozen, trust_remote_code=config.trust_remote_code,
    )  # fmt: skip


def main(arguments: list[str]) -> None:
    """Collective. Fine-tunes `model` on `data`; writes run_dir/model, log.jsonl and summary.json."""
    config = load_config(arguments)
    template, splits = load_template(config.prompt_template), load_splits(config)
    ranks = start_ranks(config.timeout_minutes, config.threads)
    run_dir, stop = open_run(config, ranks), StopFlag()
    choose_step(run_dir, config.resume_step, ranks)
    path = start_model(config, splits, template, ranks)[0]
    tokenizer, policy = load_tokenizer(path, config.trust_remote_code), load_policy(path, config, ranks)
    check_tokenizer(tokenizer, template)
    tokenized = tokenize_splits(splits, tokenizer, template, config, quiet=not ranks.main)
    steps = sft_steps(config, len(tokenized.train))
    train_sft(policy, tokenizer, tokenized.train, config, steps, run_dir, ranks, stop, "SFT")
    results = {}
    with Clock(ranks.watchdog, steps)("evaluate"), whole(policy) as gathered:
        for name, examples in tokenized.held_out.items():
            results |= evaluate(gathered, tokenizer, examples, config, ranks, name)
    write_model(policy, tokenizer, run_dir / "model", config, latest_checkpoint(run_dir)[1], results, ranks)
    if ranks.main:
        (run_dir / "summary.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        for name in tokenized.held_out:
            print(f"{name}: greedy accuracy {results[f'{name}/accuracy']:.3f} (n = {results[f'{name}/n']})")
        print(f"model: {run_dir / 'model'}")


if __name__ == "__main__":
    run_script(main, (CheckpointError, ConfigError, DataError, ModelError, PromptError))
