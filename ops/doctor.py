"""`python -m ops.doctor --config C`: what would go wrong with this run, found before it costs a night.

    torchrun --nproc_per_node=8 -m ops.doctor --config configs/qwen2.5-7b.yaml --data xlam.json

The checks of every start (ops/checks.py) on all examples, then one step on the longest prompts, in a folder
beside run_dir that is deleted afterwards. The exit code is 1 after a problem.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from config import Config, ConfigError, UserError, count_steps, load_config, printable
from corpus.layouts import write_examples
from corpus.sources import as_command, folder_above
from distributed.ranks import Ranks, first_problem, run_script, start_ranks
from grpo import grpo_spec, grpo_step
from ops.checks import Check, Start, check_names, examine, judge, tell
from prompts import encode_reply, render_completion
from session import begin, open_session, read_inputs, read_prompts, start_model, start_step

SAMPLER_ERROR = {"cpu": 1e-3, "cuda": 0.05}  # nats per token; measured: 3e-6 in fp32, 0.01 in bf16
MOST_MEMORY = 0.92  # of a GPU, in one step: longer replies will come


@as_command("doctor")
def main(arguments: list[str]) -> None:
    """Collective. Prints all checks; ends with SystemExit(1) where one found a problem."""
    config = load_config(arguments)
    check_names(config)
    ranks = start_ranks(config.timeout_minutes)
    name, problem = "", ""
    try:
        if ranks.main:
            try:
                above = folder_above(Path(config.run_dir).absolute().parent)
                name = tempfile.mkdtemp(prefix=".doctor-", dir=above)
            except (OSError, UserError) as error:
                problem = f"run_dir: {error}"
        if problem := first_problem(problem, ranks):
            raise ConfigError(problem)
        folder = Path(ranks.gather(name)[0])
        start = read_start(replace(config, run_dir=str(folder)), ranks)
        found = examine(start)
        if ranks.main:
            print(*found, shown(start), sep="\n", flush=True)
        step = check_step(first_step(step_settings(start), ranks), start)
        tell([*found, step], ranks, [step])
    finally:
        if name:
            shutil.rmtree(name, ignore_errors=True)
    if any(check.status == "problem" for check in (*found, step)):
        raise SystemExit(1)


def read_start(config: Config, ranks: Ranks) -> Start:
    """Collective. Data, tokenizer and start model as a run finds them; run_dir is the doctor's own folder."""
    inputs = read_inputs(config)
    path, _ = start_model(config, inputs, ranks)
    inputs = read_prompts(config, path, inputs, quiet=not ranks.main)
    steps = count_steps(config, len(inputs.tokenized.train), config.prompts_per_step)
    if ranks.main:
        (Path(config.run_dir) / "config.yaml").touch()  # whether all ranks see it is a check
    ranks.gather(None)
    return Start(
        config, ranks, inputs.template, inputs.reward, inputs.splits, inputs.tokenized, inputs.tokenizer,
        path, steps, limit=10**9,
    )


def shown(s: Start) -> str:
    """For people to read: the shortest prompt as the model reads it, with the right reply."""
    item = min(s.tokenized.train, key=lambda item: len(item.ids))
    reply = encode_reply(s.tokenizer, render_completion(item.example.answer, "…"))
    return printable(f"--- {item.example.id}\n{s.tokenizer.decode([*item.ids, *reply])}\n---")


def step_settings(s: Start) -> Config:
    """Collective. The settings for a step of two updates on the longest prompts, which it writes down."""
    config, longest = s.config, sorted(s.tokenized.train, key=lambda item: -len(item.ids))
    at_once = max(1, config.rollout_batch_size // config.group_size) * s.ranks.world  # one rollout batch
    part = max(1, min(config.prompts_per_step, at_once, len(longest)) // 2)
    folder = Path(config.run_dir)
    if s.ranks.main:
        write_examples(folder / "longest.jsonl", [item.example for item in longest[: 2 * part]])
    s.ranks.gather(None)
    return replace(
        config, model=s.path, data=str(folder / "longest.jsonl"), test_data="", test_share=0.0, data_from=0.0,
        data_to=1.0, run_dir=str(folder / "run"), resume=False, resume_step=0, prompts_per_step=2 * part,
        minibatch_prompts=part, warmup_steps=0, resample_rounds=0, skip_zero_variance="",
        mask_truncated=False, bfcl="", apibank="", trackers="",
    )


def first_step(config: Config, ranks: Ranks) -> dict[str, float]:
    """Collective. The metrics of a run's first step."""
    with contextlib.redirect_stdout(io.StringIO()):  # of a run that is not the one meant
        session = open_session(config, ranks, "grpo", examined=True)
        run = begin(session, grpo_spec(session))
        metrics, _ = grpo_step(run, start_step(run))
        return metrics | {f"time/{phase}_s": seconds for phase, seconds in run.clock.seconds.items()}


def check_step(metrics: dict[str, float], s: Start) -> Check:
    """Collective. What the step shows: memory, whether sampler and trainer agree, and the first replies."""
    device, peak = s.ranks.device.type, max(s.ranks.gather(metrics["memory/peak_gib"]))
    total = torch.cuda.mem_get_info()[1] / 2**30 if device == "cuda" else float("inf")
    seconds = sum(value for key, value in metrics.items() if key.startswith("time/"))
    error = metrics.get("sampling/sampling_logp_difference/mean", 0.0)
    cut = metrics["completions/clipped_ratio"]
    flat = metrics["frac_reward_zero_std"] == 1 and s.config.reward != "none"
    text = f"{seconds:.3g} s, {peak:.3g} GiB, reward {metrics['reward']:.2f}, {cut:.0%} of replies cut off"
    warm = not s.config.warmup_steps  # else the model knows nothing yet
    return judge("step", f"{text}, log-probs of sampler and trainer {error:.2g} apart", {
        "lower rollout_batch_size or max_tokens_per_micro_batch": peak > MOST_MEMORY * total,
        "most replies do not end: raise max_response_tokens": warm and cut > 0.5,
        "no prompt has unequal rewards: sft.py first": warm and flat,
    }, {
        "a gradient was not finite: take another start model": metrics["updates_skipped_nonfinite"] > 0,
        "it is not trained as it samples: try --rollout_engine generate": error > SAMPLER_ERROR[device],
    })


if __name__ == "__main__":
    run_script(main)
