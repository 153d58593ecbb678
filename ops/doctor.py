"""`python grpo.py --config C --doctor`: what would go wrong with this run, found before it costs a night.

    torchrun --nproc_per_node=8 grpo.py --config configs/qwen2.5-7b.yaml --data xlam.json --doctor

One line per check: ok, warning or problem, with the remedy below it; after a problem the exit code is 1. Last
comes one step on the longest prompts, in a folder beside run_dir that is gone afterwards. Every start makes
the quick checks alone (`brief`): what cannot work stops it, what is only suspicious is printed.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config import Config, ConfigError
from corpus.layouts import write_examples
from corpus.sources import DataError
from data import load_splits, tokenize_splits
from distributed.checkpoint import CheckpointError, complete_steps
from distributed.fsdp import class_name, weight_files
from distributed.ranks import Ranks, first_problem, lost_processes, phase_of
from kernel.attention import attention_backend, uses_shared_prefix
from model import ModelError, count_parameters, load_tokenizer
from ops.checks import (
    CHECKS,
    Check,
    Start,
    check_ranks,
    check_shared,
    check_versions,
    existing,
)
from prompts import PromptError, load_template, render_completion
from reward import RewardError, reward_function
from sft import start_model

SHOWN = 1500  # characters of a rendered prompt
SENTENCES = (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    PromptError,
    RewardError,
)  # say all in their message
SAMPLER_ERROR = {"cpu": 1e-3, "cuda": 0.05}  # nats per token; measured: 3e-6 in fp32, 0.01 in bf16
MOST_MEMORY = 0.92  # of a GPU, in one step: longer replies will come

DryRun = Callable[
    [Config, Ranks], tuple[nn.Module, dict[str, float]]
]  # collective; policy and metrics of one step
CountSteps = Callable[[Config, int], int]  # settings, training examples -> steps of the run


# -------------------------------------------------------------------------------------------- the two entries


def main(config: Config, ranks: Ranks, dry_run: DryRun, count_steps: CountSteps) -> None:
    """Collective. Prints all checks; ends with SystemExit(1) where one found a problem. run_dir stays as it
    is.

    dry_run: sets up a run with the settings that it is given, without `brief`, and makes its first step.
    """
    found = guarded("versions", check_versions) + guarded("processes", check_ranks, config, ranks)
    folder, check = make_folder(config, ranks)
    found.append(check)
    tell(found, ranks)
    try:
        found += examine(config, ranks, folder, dry_run, count_steps) if folder else []
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    for rank, part in enumerate(ranks.gather(found)):
        unseen = [check for check in part if check.status != "ok" and check not in found]
        found += tell([replace(check, name=f"{check.name}, rank {rank}") for check in unseen], ranks)
    if ranks.main:
        print(count_line(found))
    if any(check.status == "problem" for check in found):
        raise SystemExit(1)


def examine(
    config: Config, ranks: Ranks, folder: Path, dry_run: DryRun, count_steps: CountSteps
) -> list[Check]:
    """Collective. Prints and returns what comes of data, start model and one step; `folder` is there to write
    in.
    """
    start, problem = prepare(config, ranks, folder, count_steps)
    if start is None:
        return tell(
            [Check("data and model", "problem", problem, "after this, nothing else could be checked")], ranks
        )
    found = tell(own_checks(start) + guarded("rendered", check_rendered, start) if ranks.main else [], ranks)
    return found + tell(try_one_step(start, folder, dry_run), ranks)


def brief(start: Start) -> None:
    """Collective. The quick checks of every start: one line if all is well, else also the warnings and
    problems.

    Raises ConfigError, on all ranks, with the first problem. A check that fails itself is only a warning
    here.
    """
    ranks, run_dir = start.ranks, Path(start.config.run_dir)
    found = guarded("versions", check_versions) + guarded("processes", check_ranks, start.config, ranks)
    found += guarded("run_dir", check_shared, run_dir / "config.yaml", run_dir, ranks)
    found += own_checks(start) if ranks.main else []
    found = [replace(check, status="warning") if check.failed else check for check in found]
    tell([check for check in found if check.status != "ok"], ranks)
    if ranks.main:
        print(count_line(found))
    for check in ranks.gather(found)[0]:
        if check.status == "problem":
            raise ConfigError(f"{check.name}: {check.text}" + (f"; {check.remedy}" if check.remedy else ""))


def own_checks(start: Start) -> list[Check]:
    """All that one process finds out alone, before any step."""
    return [one for name, check in CHECKS.items() for one in guarded(name, check, start)]


def guarded(name: str, check: Callable[..., Check | list[Check]], *arguments: Any) -> list[Check]:
    """What the check finds; one that raises is a problem itself, so that the doctor never ends in a
    traceback.
    """
    try:
        found = check(*arguments)
        return [found] if isinstance(found, Check) else found
    except SENTENCES as error:
        return [Check(name, "problem", described(error))]
    except Exception as error:
        return [
            Check(
                name, "problem", f"check failed: {described(error)}", "the other checks do not depend on it",
                True,
            )
        ]


def described(error: BaseException) -> str:
    """An exception in one line: our own sentences as they are, others with their kind and where they were
    raised.
    """
    line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, SENTENCES):
        return line
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno}{phase_of(error)})" if frames else ""
    return f"{type(error).__name__}: {line}{place}"


def tell(checks: list[Check], ranks: Ranks) -> list[Check]:
    """Prints them on the main rank, and returns them."""
    for check in checks if ranks.main else []:
        print(as_text(check), flush=True)
    return checks


def as_text(check: Check) -> str:
    """One line, and below it the remedy if there is one."""
    return f"{check.status:<9}{check.name}: {check.text}" + (
        f"\n{'':<9}-> {check.remedy}" if check.remedy else ""
    )


def count_line(found: list[Check]) -> str:
    """`doctor: 15 checks ok`, or how many of each status."""
    counts = Counter(check.status for check in found)
    if counts["ok"] == len(found):
        return f"doctor: {len(found)} checks ok"
    return f"doctor: {counts['ok']} checks ok, warnings: {counts['warning']}, problems: {counts['problem']}"


# ----------------------------------------------------------------------------------- what the run starts from


def make_folder(config: Config, ranks: Ranks) -> tuple[Path | None, Check]:
    """Collective. A folder of our own beside run_dir, None where there can be none, and what that says about
    the disk.
    """
    run_dir, name, problem = Path(config.run_dir).absolute(), "", ""
    if ranks.main:
        try:
            name = tempfile.mkdtemp(prefix=".doctor-", dir=existing(run_dir.parent))
            (Path(name) / "written").write_text("", encoding="utf-8")
            (Path(name) / "written").rename(Path(name) / "renamed")
            if run_dir.exists() and not (
                run_dir.is_dir() and os.access(run_dir, os.R_OK | os.W_OK | os.X_OK)
            ):
                problem = f"{run_dir} is no folder that may be written"
        except OSError as error:
            problem = f"{run_dir} cannot be written: {error.strerror}"
    name, problem = ranks.gather((name, problem))[0]
    check = check_shared(Path(name) / "renamed", run_dir, ranks)
    if problem:
        check = Check(
            "run_dir", "problem", problem,
            "choose another --run_dir; after this, nothing else could be checked",
        )
    if check.status == "problem":
        if name:
            shutil.rmtree(name, ignore_errors=True)
        return None, check
    if config.resume and not (complete_steps(run_dir) or (run_dir / "warmup").exists()):
        check = Check(
            "run_dir", "problem", f"{run_dir} has no checkpoint to resume", "start without --resume"
        )
    elif run_dir.exists() and any(run_dir.iterdir()) and not config.resume and not config.overwrite:
        check = Check(
            "run_dir", "warning", f"{run_dir} is not empty", "add --resume true to go on, or --overwrite true"
        )
    return Path(name), check


def agreed(ranks: Ranks, function: Callable, *arguments: Any) -> tuple[Any, str]:
    """Collective. What the function returns, or None and one line about why it raised on some rank."""
    result, problem = None, ""
    try:
        result = function(*arguments)
    except Exception as error:
        problem = described(error)
    problem = first_problem(problem, ranks)
    return (None if problem else result), problem


def prepare(config: Config, ranks: Ranks, folder: Path, count_steps: CountSteps) -> tuple[Start | None, str]:
    """Collective. Data, tokenizer and start model as grpo.set_up finds them, or why there are none.

    The demo's model is built in `folder`; a warmed-up one that a run goes on from is used as it is.
    """

    def read() -> tuple:
        return (
            reward_function(config.reward, config.lenient),
            load_template(config.prompt_template),
            load_splits(config),
        )

    def build() -> Start:
        warm = config.resume and (Path(config.run_dir) / "warmup" / "model").exists()
        path = start_model(config if warm else replace(config, run_dir=str(folder)), splits, template, ranks)[
            0
        ]
        weight_files(path)  # downloads what is not here yet
        tokenizer = load_tokenizer(path, config.trust_remote_code)
        tokenized = tokenize_splits(splits, tokenizer, template, config, quiet=not ranks.main)
        count = len(tokenized.train)
        steps = count_steps(config, count)
        return Start(config, ranks, template, reward, splits, tokenized, tokenizer, path, steps, limit=count)

    inputs, problem = agreed(ranks, read)
    if problem:
        return None, problem
    reward, template, splits = inputs
    return agreed(ranks, build)


def check_rendered(s: Start) -> Check:
    """For people to read: the shortest prompt with the right reply, the median and the longest one, each
    cut.
    """
    items = sorted(s.tokenized.train, key=lambda item: len(item.ids))
    parts = []
    for name, item in zip(("shortest", "median", "longest"), (items[0], items[len(items) // 2], items[-1])):
        text, end = s.tokenizer.decode(item.ids), ""
        if name == "shortest":
            end = render_completion(item.example.answer, "…") + s.tokenizer.convert_ids_to_tokens(
                s.tokenizer.eos_token_id
            )
        if len(text) > SHOWN:
            text = f"{text[: SHOWN // 2]}\n  [… {len(text) - SHOWN:,} characters …]\n{text[-SHOWN // 2 :]}"
        title = f"{name} prompt, {len(item.ids):,} tokens, {item.example.id}"
        parts.append(f"--- {title}{', with the right reply' if end else ''}\n{text}{end}")
    return Check("rendered", "ok", "\n".join(["what the model reads", *parts, "---"]))


# ----------------------------------------------------------------------------------------------------- a step


def try_one_step(s: Start, folder: Path, dry_run: DryRun) -> list[Check]:
    """Collective. One step on the longest prompts: whether it runs, how much memory it takes, and what it
    says.

    Of several processes, one with an error ends them all, with one line: the others may wait for it in a
    collective.
    """
    settings, ranks = dry_settings(s, folder), s.ranks
    try:
        if ranks.main:
            longest = sorted(s.tokenized.train, key=lambda item: -len(item.ids))[: settings.prompts_per_step]
            write_examples(settings.data, [item.example for item in longest])
        ranks.gather(None)
        with contextlib.redirect_stdout(io.StringIO()):  # of a run that is not the one meant
            policy, metrics = dry_run(settings, ranks)
        found = guarded("model", check_model, policy, s.config, ranks.device)
        found += guarded("dry run", check_step, metrics, s, settings)
        ranks.gather(None)
        return found
    except Exception as error:
        text, remedy = described(error), "mend what it names; the start would end there too"
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text:
            text = f"out of memory{phase_of(error)}"
            remedy = "lower rollout_batch_size (rollout) or max_tokens_per_micro_batch (update); --plan says what fits"
        if ranks.world == 1:
            return [Check("dry run", "problem", text, remedy)]
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(3)  # it may be the same everywhere, then the first process says it
        if folder.exists() and not lost_processes(error):  # else another process has said what is wrong
            print(as_text(Check(f"dry run, rank {ranks.rank}", "problem", text, remedy)), flush=True)
        raise SystemExit(1) from None


def dry_settings(s: Start, folder: Path) -> Config:
    """The run's settings for a single step in `folder`: as many prompts as one rollout batch of every rank,
    two updates.
    """
    config = s.config
    at_once = max(1, config.rollout_batch_size // config.group_size) * s.ranks.world
    prompts = min(config.prompts_per_step, at_once, len(s.tokenized.train))
    part = max(1, prompts // 2)
    return replace(
        config, model=s.path, data=str(folder / "longest.jsonl"), test_data="", test_share=0.0, data_from=0.0, data_to=1.0,
        run_dir=str(folder / "run"), resume=False, resume_step=0, overwrite=False, prompts_per_step=min(2, prompts) * part,
        minibatch_prompts=part, warmup_steps=0, resample_rounds=0, skip_zero_variance=False, bfcl="", apibank="",
        trackers="",
    )


def check_model(policy: nn.Module, config: Config, device: torch.device) -> list[Check]:
    """Attention, packing, engine and dtypes of a policy that is set up."""
    backend, packed = attention_backend(device), uses_shared_prefix(policy)
    text = f"{backend}, a prompt computed {'once per group' if packed else 'once per completion'}"
    status, remedy = "ok", ""
    if backend == "torch_varlen":
        text += ", flash-attn is not installed"
    if not packed or (config.rollout_engine == "shared_prefix" and not policy.abilities.head_only):
        text += ", rollouts by generate" if config.rollout_engine == "shared_prefix" else ""
        status, remedy = "warning", "right but slower; Qwen2, Qwen3 and Llama models run at full speed"
    found = [Check("attention", status, text, remedy)]
    kinds = {str(p.dtype).removeprefix("torch.") for p in policy.parameters()}
    compute = "bfloat16" if device.type == "cuda" else "float32"
    text = f"{count_parameters(policy):,} parameters of {class_name(policy)}"
    text += f" in {' and '.join(sorted(kinds))}, computed in {compute}"
    if kinds != {"float32"}:
        remedy = "small updates round away: the trained weights must be float32"
        return [*found, Check("dtype", "problem", text, remedy)]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return [
            *found,
            Check(
                "dtype", "warning", text, "this GPU emulates bfloat16: take one of the A100's age or newer"
            ),
        ]
    return [*found, Check("dtype", "ok", text)]


def check_step(metrics: dict[str, float], s: Start, settings: Config) -> list[Check]:
    """What the metrics of the dry run say: time, memory, whether sampler and trainer agree, and the first
    replies.
    """
    seconds = ", ".join(
        f"{key[5:-2]} {value:.3g} s" for key, value in metrics.items() if key.startswith("time/")
    )
    text = f"{settings.prompts_per_step} of the longest prompts x {settings.group_size} replies: {seconds}"
    found = [Check("dry run", "ok", text)]
    if metrics.get("updates_skipped_nonfinite"):
        found = [
            Check("dry run", "problem", f"{text}; a gradient was not finite", "take another start model")
        ]
    peak, total = metrics["memory/peak_gib"], float("inf")
    text = f"{peak:.3g} GiB"
    if s.ranks.device.type == "cuda":
        total = torch.cuda.mem_get_info(s.ranks.device)[1] / 2**30
        text += f" of {total:.3g}"
    if peak > MOST_MEMORY * total:
        remedy = "longer replies may not fit: lower max_tokens_per_micro_batch or rollout_batch_size"
        found.append(Check("peak memory", "warning", text, remedy))
    else:
        found.append(Check("peak memory", "ok", text))
    difference, limit = (
        metrics.get("sampling/sampling_logp_difference/mean"),
        SAMPLER_ERROR[s.ranks.device.type],
    )
    if difference is not None:
        text = f"log-probs of sampler and trainer differ by {difference:.2g} nats per token, at most {limit:g} is usual"
        wrong, remedy = (
            difference > limit,
            "this model is not trained as it samples: try --rollout_engine generate",
        )
        found.append(Check("sampler", "problem" if wrong else "ok", text, remedy if wrong else ""))
    return [*found, check_first_replies(metrics, s)]


def check_first_replies(metrics: dict[str, float], s: Start) -> Check:
    """Whether the start model's replies leave something to learn."""
    keys = {"reward": "reward", "right form": "format_rate", "cut off": "completions/clipped_ratio"}
    text = ", ".join(f"{name} {metrics[key]:.2f}" for name, key in keys.items())
    if s.config.warmup_steps and not s.config.resume:
        return Check("first replies", "ok", f"{text}: of the model before its warm-up")
    if metrics["completions/clipped_ratio"] > 0.5:
        remedy = "most replies do not end: raise max_response_tokens, and look at the end tokens above"
        return Check("first replies", "warning", text, remedy)
    if metrics["frac_reward_zero_std"] == 1:
        remedy = "all replies to a prompt are paid the same, which teaches nothing: another start model, or sft.py first"
        return Check("first replies", "warning", text, remedy)
    return Check("first replies", "ok", text)
