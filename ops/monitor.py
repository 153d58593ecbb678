"""What a person sees while a run goes on: a line per step, alarms, curves.png, and trackers where asked for.

The main process opens a Monitor, calls `show` with every record of log.jsonl, and `close_monitor` at the end.
Nothing here may end a run that has begun: a failure is reported once, and log.jsonl has every record.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from config import Config, ConfigError, first_line
from distributed.ranks import Ranks, first_problem, write_out
from ops.plot import draw
from reward import REWARDS

PLOT_SECONDS = 60.0  # at least, between two drawings of curves.png,
PLOT_SHARE = 0.01  # which take no more than this of the time: other ranks wait
LINE_SECONDS = 10.0  # at least, between two lines of SFT where no bar is seen
STEP_LINE = (  # of GRPO; at most 100 columns
    "step {step}{of} · reward {reward:.2f}, right {correct_rate:.0%}, format {format_rate:.0%} · "
    "KL {kl:.3f}, {completions/mean_length:.0f} tokens, flat {frac_reward_zero_std:.0%} · {whole:.3g} s"
)
SFT_LINE = "step {step}{of} · loss {loss:.4f} · {whole:.3g} s"


def step_line(record: dict, steps: int) -> str:
    """One line about one step. steps: of the whole run; 0: nobody knows."""
    seconds = sum(record[key] for key in record if key.startswith("time/"))
    form = STEP_LINE if "reward" in record else SFT_LINE
    return form.format_map(record | {"of": f"/{steps}" if steps else "", "whole": seconds})


def evaluation_line(record: dict) -> str:
    """The accuracies of this step's evaluation, each with its number of cases; "" where there was none."""
    splits = [key.removesuffix("/accuracy") for key in record if key.endswith("/accuracy")]
    found = [f"{split} {record[f'{split}/accuracy']:.1%} of {record[f'{split}/n']}" for split in splits]
    return f"step {record['step']}, greedy accuracy: {', '.join(found)}" if found else ""


@dataclass(frozen=True)
class Alarm:
    """A limit on one value of the log."""

    key: str
    threshold: float
    low_is_bad: bool
    what: str
    advice: str  # what it means, and what to do


ALARMS = (
    Alarm("entropy", 0.01, True, "entropy in nats per token",
          "groups become equal and teach nothing; raise temperature, set clip_eps_high 0.28 or lower lr"),
    Alarm("length_share", 0.5, False, "mean completion as a share of max_response_tokens",
          "longer ones are cut off and earn nothing; look for repetition; try loss dr_grpo or a lower lr"),
    Alarm("think_rate", 0.5, True, "share of completions with a thought",
          "the model answers without reasoning; check in samples.html that the prompt asks for a thought"),
    Alarm("empty_rate", 0.9, False, "share of completions without a call",
          "does [] answer everything? compare with the data; go on from an earlier checkpoint, lower lr"),
    Alarm("kl", 1.0, False, "KL to the reference in nats per token",
          "if the held-out accuracy falls, go on from an earlier checkpoint, lower lr or raise kl_coef"),
    Alarm("nonfinite", 0.0, False, "values that are NaN or infinite, and updates skipped for that",
          "several steps in a row without an update end the run; lower lr"),
)


def alarms(record: dict, active: frozenset[str], config: Config) -> tuple[list[str], frozenset[str]]:
    """(sentences to print now, keys of the alarms that are on after this step). active: the keys before it.

    A sentence comes when an alarm begins and when it ends: 10 % beyond its threshold, so that a value that
    swings around it does not fill the terminal. A value that is missing or NaN changes nothing.
    """
    sentences = []
    on = set(active)
    values = dict(record)
    broken = sum(not math.isfinite(value) for value in record.values())
    values["nonfinite"] = broken + record.get("updates_skipped_nonfinite", 0)
    values["length_share"] = record.get("completions/mean_length", math.nan) / config.max_response_tokens
    variant = REWARDS.get(config.reward)
    if variant and variant.right_no_think == variant.right:  # the reward does not ask for a thought
        values["think_rate"] = math.nan
    if config.reference:  # it may be far away, and the run is to come near
        values["kl"] = math.nan
    for alarm in ALARMS:
        value = values.get(alarm.key, math.nan)
        limit = alarm.threshold
        bad = value < limit if alarm.low_is_bad else value > limit
        good = value >= 1.1 * limit if alarm.low_is_bad else value <= 0.9 * limit
        said = f"at step {record['step']}: {alarm.what}: {value:.3g}"
        if bad and alarm.key not in on:
            on.add(alarm.key)
            side = "below" if alarm.low_is_bad else "above"
            sentences.append(f"ALARM {said}, {side} {limit:g}: {alarm.advice}")
        elif good and alarm.key in on:
            on.remove(alarm.key)
            sentences.append(f"alarm over {said}")
    return sentences, frozenset(on)


def tensorboard_tracker(config: Config, folder: Path, step: int) -> tuple[Callable, Callable]:
    """Writes run_dir/tensorboard, and hides there the steps after `step`: a resumed run does them again."""
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)

    def log(record: dict) -> None:
        for key, value in record.items():
            writer.add_scalar(key, value, record["step"])
        writer.flush()

    return log, writer.close


def wandb_tracker(config: Config, folder: Path, step: int) -> tuple[Callable, Callable]:
    """Sends to W&B's project WANDB_PROJECT, or tool-n1. By wandb_id.txt a resumed run continues its page."""
    import wandb
    note = folder / "wandb_id.txt"
    if not note.exists():
        note.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "tool-n1"), name=folder.resolve().name, resume="allow",
        id=note.read_text().strip(), dir=str(folder), config=asdict(config), allow_val_change=True,
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # W&B's own counter cannot go back to repeated steps
    return run.log, run.finish


# By the name of its package: what opens a tracker and returns two functions, to log a record and to close.
TRACKERS = {"tensorboard": tensorboard_tracker, "wandb": wandb_tracker}


def tracker_names(config: Config) -> list[str]:
    """The trackers that the settings name. Raises ConfigError for one that is unknown or not installed."""
    names = [name.strip() for name in config.trackers.split(",") if name.strip()]
    for name in names:
        if name not in TRACKERS or importlib.util.find_spec(name) is None:
            raise ConfigError(f"trackers: {name!r} is not one of {', '.join(TRACKERS)}, or is not installed")
    return names


@dataclass
class Monitor:
    """What `show` has to remember from one step to the next."""

    config: Config
    folder: Path
    trackers: dict[str, tuple[Callable, Callable]]
    next_picture: float  # time.monotonic()
    next_line: float = 0.0  # the same, of SFT
    active: frozenset[str] = field(default_factory=frozenset)  # keys of the alarms that are on


def open_monitor(config: Config, folder: Path, step: int, ranks: Ranks) -> Monitor | None:
    """Collective. The main process's monitor, None on the others. step: the last one done, after a resume.

    A tracker that does not start raises ConfigError, on all ranks; after a resume it only warns.
    """
    monitor = None
    problem = ""
    if ranks.main:
        monitor = Monitor(config, folder, {}, time.monotonic() + PLOT_SECONDS)
        try:
            for name in tracker_names(config):
                monitor.trackers[name] = TRACKERS[name](config, folder, step)
        except Exception as error:  # without a login or a network, for example
            problem = f"trackers: {config.trackers} did not start ({first_line(error)})"
    problem = first_problem(problem, ranks)
    if problem and not step:
        raise ConfigError(f"{problem}; leave it out, or for W&B set WANDB_MODE=offline")
    if problem and monitor:
        say(f"warning: {problem}; going on without it", sys.stderr)
    return monitor


def show(monitor: Monitor, record: dict, steps: int) -> None:
    """Shows a record of log.jsonl. steps: of the whole run. SFT's steps have a bar in a terminal, elsewhere a
    line now and then.
    """
    due = not sys.stderr.isatty() and time.monotonic() >= monitor.next_line
    if "reward" in record or ("loss" in record and due):
        monitor.next_line = time.monotonic() + LINE_SECONDS
        say(step_line(record, steps), sys.stdout)
    if line := evaluation_line(record):
        say(line, sys.stdout)
    sentences, monitor.active = alarms(record, monitor.active, monitor.config)
    for sentence in sentences:
        say(sentence, sys.stderr)
    for name, (log, _) in list(monitor.trackers.items()):
        if not attempt(f"{name}, going on without it", log, record):
            del monitor.trackers[name]
    if time.monotonic() >= monitor.next_picture:
        draw_curves(monitor)


def draw_curves(monitor: Monitor) -> None:
    """Draws run_dir/curves.png; the next one is due in some minutes, or at the end where this one failed."""
    start = time.monotonic()
    drawn = attempt("curves.png", draw, [monitor.folder], monitor.folder / "curves.png")
    end = time.monotonic()
    monitor.next_picture = end + max(PLOT_SECONDS, (end - start) / PLOT_SHARE) if drawn else math.inf


def close_monitor(monitor: Monitor) -> None:
    """Draws the last picture and flushes the trackers."""
    draw_curves(monitor)
    for name, (_, close) in monitor.trackers.items():
        attempt(f"{name}, its last records may be missing", close)


def attempt(what: str, action: Callable, *arguments: Any) -> bool:
    """Whether the action succeeded. What it raised is printed, and goes no further."""
    try:
        action(*arguments)
    except Exception as error:
        say(f"warning: {what}: {first_line(error)}", sys.stderr)
        return False
    return True


def say(sentence: str, stream: TextIO) -> None:
    """Prints without tearing a progress bar. A terminal or pipe that is gone stops nothing."""
    with contextlib.suppress(OSError):
        write_out(stream, sentence + "\n")
