"""What a person sees while a run goes on: a line per step, alarms, curves.png, and trackers where asked for.

The main process opens a Monitor, calls `report` with every record that goes into log.jsonl, and
`close_monitor` at the end. Nothing in here may end a run that has begun: what fails is said once, and
log.jsonl has all of it.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from config import Config, ConfigError
from distributed.ranks import Ranks, first_problem
from ops.plot import draw

# ------------------------------------------------------------------------------------------------------ lines


def step_line(record: dict, steps: int) -> str:
    """One line about one step, of the keys that the record has. steps: of the whole run; 0 where nobody
    knows.
    """
    parts, has = (
        [f"step {record['step']}/{steps}" if steps else f"step {record['step']}"],
        record.__contains__,
    )
    if has("reward"):
        shares = [f"{name} {record[key]:.0%}" for name, key in RATES.items() if has(key)]
        parts.append(f"reward {record['reward']:.2f}" + (f" ({', '.join(shares)})" if shares else ""))
    elif has("loss"):
        parts.append(f"loss {record['loss']:.4f}")
    parts += [
        f"{name} {short(record[key])}" for name, key in (("KL", "kl"), ("entropy", "entropy")) if has(key)
    ]
    if has("completions/mean_length"):
        cut = f", {record['completions/clipped_ratio']:.0%} cut" if has("completions/clipped_ratio") else ""
        parts.append(f"{record['completions/mean_length']:.0f} tokens{cut}")
    if has("frac_reward_zero_std"):
        parts.append(f"flat groups {record['frac_reward_zero_std']:.0%}")
    if skipped := record.get("updates_skipped_nonfinite"):
        parts.append(f"{skipped} update(s) skipped")
    seconds = {key[5:-2]: value for key, value in record.items() if key.startswith("time/")}
    if seconds:
        whole = sum(seconds.values())
        largest = sorted(seconds, key=seconds.get)[-2:]
        shown = [
            f"{phase} {spent:.1f}"
            for phase, spent in seconds.items()
            if phase in largest and spent > 0.1 * whole
        ]
        parts.append(f"{whole:.1f} s: {', '.join(shown)}")
    return " · ".join(parts)


RATES = {"right": "correct_rate", "format": "format_rate"}


def short(value: float) -> str:
    """Three decimals, or the order of magnitude where they would all be 0."""
    return f"{value:.3f}" if value == 0 or not abs(value) < 0.0005 else f"{value:.0e}"


def evaluation_line(record: dict) -> str:
    """The accuracies of this step's evaluation, each with its number of cases; "" where there was none."""
    found = []
    for split in [key.removesuffix("/accuracy") for key in record if key.endswith("/accuracy")]:
        accuracy, n = record[f"{split}/accuracy"], record[f"{split}/n"]
        calls = record.get(f"{split}/correct_rate", accuracy)  # without the thought that accuracy asks for
        found.append(
            f"{split} {accuracy:.1%} of {n}" + (f" (right calls {calls:.1%})" if calls != accuracy else "")
        )
    return f"step {record['step']}, greedy accuracy: {', '.join(found)}" if found else ""


# ----------------------------------------------------------------------------------------------------- alarms

PLOT_SECONDS = 60.0  # between two drawings of curves.png
MAX_FAILED_STEPS = 5  # as grpo.py
THRESHOLDS = dict(alarm_entropy=0.01, alarm_length=0.5, alarm_think=0.5, alarm_empty=0.9, alarm_kl=1.0)
ALARMS = {  # setting: key of the record, whether low is bad, what it is, what it means and what to do
    "alarm_entropy": (
        "entropy", True, "entropy in nats per token",
        "the policy hardly tries anything any more, so groups get equal rewards and teach nothing; if the accuracy is not "
        "good yet, go on from an earlier checkpoint with a higher temperature, clip_eps_high 0.28 or a lower lr",
    ),
    "alarm_length": (
        "completions/mean_length", False, "mean completion in tokens",
        "completions grow towards max_response_tokens, where they are cut off and earn nothing; look for repetition in "
        "samples.html; loss dr_grpo or a lower lr stops the growth, a larger max_response_tokens makes room for it",
    ),
    "alarm_think": (
        "think_rate", True, "share of completions with a thought",
        "the model answers without reasoning; check in samples.html that the prompt asks for it and that the reward pays "
        "nothing without it; where that is meant, as with reward no_reason, set alarm_think 0",
    ),
    "alarm_empty": (
        "empty_rate", False, "share of completions that call nothing",
        "the policy may have learnt to answer [] to everything, which earns something where the data has queries that no "
        "tool fits; compare with their share in the data, and go on from an earlier checkpoint with fewer or a lower lr",
    ),
    "alarm_kl": (
        "kl", False, "KL to the start model in nats per token",
        "the policy is far from the model that it began as, and may have lost what that one could do; if the held-out "
        "accuracy falls, go on from an earlier checkpoint with a lower lr or a larger kl_coef",
    ),
}
NONFINITE = "numbers that are not finite"


def alarms(record: dict, active: frozenset[str], config: Config) -> tuple[list[str], frozenset[str]]:
    """(sentences to print now, alarms that are on after this step). active: those that were on before it.

    A sentence comes when an alarm begins and when it ends. It ends 10 % beyond the threshold, so that a value
    that swings around it does not fill the terminal. A threshold of 0, or a record without the value, changes
    nothing.
    """
    sentences, on, step = [], set(active), record["step"]
    for setting, (key, low_is_bad, what, advice) in ALARMS.items():
        value, limit = (
            record.get(key, math.nan),
            THRESHOLDS[setting],
        )  # NaN is neither too low nor too high
        said = f"{setting} {limit:g}"
        if setting == "alarm_length":
            limit *= config.max_response_tokens
            said += f" of max_response_tokens {config.max_response_tokens}"
        if not limit:
            continue
        over = min(1.1 * limit, (1 + limit) / 2) if limit < 1 else 1.1 * limit  # a share cannot exceed 1
        if setting not in on and (value < limit if low_is_bad else value > limit):
            on.add(setting)
            side = "below" if low_is_bad else "above"
            sentences.append(f"ALARM at step {step}: {what} is {value:.3g}, {side} {said}: {advice}")
        elif setting in on and (value > over if low_is_bad else value < 0.9 * limit):
            on.remove(setting)
            sentences.append(f"alarm over at step {step}: {what} is {value:.3g} again ({said})")
    broken = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    broken += ["updates_skipped_nonfinite"] if record.get("updates_skipped_nonfinite") else []
    if broken and NONFINITE not in on:
        on.add(NONFINITE)
        sentences.append(
            f"ALARM at step {step}: NaN or infinite: {', '.join(broken)}; updates with such gradients are skipped; if it "
            f"goes on, lower lr, or start again from an earlier checkpoint; {MAX_FAILED_STEPS} steps without any "
            "update in a row end a run of grpo.py"
        )
    elif not broken and NONFINITE in on:
        on.remove(NONFINITE)
        sentences.append(f"alarm over at step {step}: all numbers are finite again")
    return sentences, frozenset(on)


# --------------------------------------------------------------------------------------------------- trackers


@dataclass(frozen=True)
class Tracker:
    """Somewhere else that records go to. log takes a record of numbers; close flushes what is left."""

    name: str
    log: Callable[[dict], None]
    close: Callable[[], None]


def tensorboard_tracker(config: Config, folder: Path, step: int) -> Tracker:
    """Writes run_dir/tensorboard; the steps after `step`, which a resumed run does again, are hidden
    there.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)

    def log(record: dict) -> None:
        for key, value in record.items():
            writer.add_scalar(key, value, record["step"])
        writer.flush()

    return Tracker("tensorboard", log, writer.close)


def wandb_tracker(config: Config, folder: Path, step: int) -> Tracker:
    """Sends to the W&B project WANDB_PROJECT, or tool-n1. run_dir/wandb_id.txt makes a resumed run go on in
    its own.

    The x-axis is the record's own step: W&B's counter may not go back, and a resumed run does some steps
    again.
    """
    import wandb

    note = folder / "wandb_id.txt"
    if not note.exists():
        note.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "tool-n1"), name=folder.resolve().name, id=note.read_text().strip(),
        resume="allow", dir=str(folder), config=asdict(config), allow_val_change=True,
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return Tracker("wandb", run.log, run.finish)


TRACKERS = {  # name in the settings, which is pip's too: what must be importable, how it is opened
    "tensorboard": ("torch.utils.tensorboard", tensorboard_tracker),
    "wandb": ("wandb", wandb_tracker),
}


def tracker_names(config: Config) -> list[str]:
    """The trackers that the settings name. Raises ConfigError for an unknown one, or one that is not
    installed.
    """
    names = list(dict.fromkeys(name.strip() for name in config.trackers.split(",") if name.strip()))
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"trackers must be of {', '.join(TRACKERS)}, not {name!r}")
        try:
            importlib.import_module(TRACKERS[name][0])
        except Exception as error:  # an old protobuf, for one, makes more than an ImportError
            raise ConfigError(
                f"trackers: {name} cannot be imported ({first_line(error)}); pip install {name}, or leave it out"
            ) from None
    return names


def open_trackers(config: Config, folder: Path, step: int = 0) -> list[Tracker]:
    """The trackers that the settings name. One that does not start raises ConfigError, but only warns after a
    resume.
    """
    opened = []
    for name in tracker_names(config):
        try:
            opened.append(TRACKERS[name][1](config, folder, step))
        except Exception as error:  # without a login or network, for example
            message = f"trackers: {name} did not start ({first_line(error)})"
            if not step:
                offline = ", WANDB_MODE=offline keeps its files here" if name == "wandb" else ""
                raise ConfigError(f"{message}; leave it out{offline}") from None
            warn(f"{message}; going on without it")
    return opened


# ---------------------------------------------------------------------------------------------------- monitor


@dataclass
class Monitor:
    """What `report` has to remember from one step to the next."""

    config: Config
    folder: Path
    trackers: list[Tracker]
    next_picture: float  # time.monotonic()
    active: frozenset[str] = field(default_factory=frozenset)  # alarms that are on


def open_monitor(config: Config, folder: Path, step: int, ranks: Ranks) -> Monitor | None:
    """Collective. The main process's monitor, None on the others. step: the last that is done, after a
    resume.

    Raises ConfigError as open_trackers, on all ranks, so that none waits for one that has ended.
    """
    trackers, problem = [], ""
    if ranks.main:
        try:
            trackers = open_trackers(config, folder, step)
        except ConfigError as error:
            problem = str(error)
    if problem := first_problem(problem, ranks):
        raise ConfigError(problem)
    wait = PLOT_SECONDS
    return Monitor(config, folder, trackers, time.monotonic() + wait) if ranks.main else None


def report(monitor: Monitor, record: dict, steps: int, lines: bool = True) -> None:
    """Shows one record of log.jsonl, after it is written there. steps: as in step_line. lines=False: a bar is
    enough.
    """
    said = [step_line(record, steps)] * lines + [evaluation_line(record)]
    with contextlib.suppress(OSError):  # a terminal or pipe that is gone
        for line in filter(None, said):
            tqdm.write(line)
        sys.stdout.flush()  # it may be a file that somebody follows
    sentences, monitor.active = alarms(record, monitor.active, monitor.config)
    for sentence in sentences:
        warn(sentence)
    numbers = {key: value for key, value in record.items() if isinstance(value, (int, float))}
    for tracker in list(monitor.trackers):
        if not attempt(f"{tracker.name}, going on without it", partial(tracker.log, numbers)):
            monitor.trackers.remove(tracker)
    if time.monotonic() >= monitor.next_picture:
        refresh_picture(monitor)


def refresh_picture(monitor: Monitor) -> None:
    """Draws run_dir/curves.png, and decides when it is due again: at most 2 % of the time goes into it."""
    began, target = time.monotonic(), monitor.folder / "curves.png"
    drawn = attempt(str(target), partial(draw, [monitor.folder], target))
    now = time.monotonic()
    monitor.next_picture = (
        now + max(PLOT_SECONDS, 50 * (now - began)) if drawn else math.inf
    )


def close_monitor(monitor: Monitor) -> None:
    """The last picture, also where plot_minutes is 0 or an earlier one failed, and all that the trackers
    still hold.
    """
    refresh_picture(monitor)
    for tracker in monitor.trackers:
        attempt(f"{tracker.name}, its last records may be missing", tracker.close)
    monitor.trackers = []


def attempt(what: str, action: Callable[[], None]) -> bool:
    """Whether the action succeeded. What it raised is said, and goes no further."""
    try:
        action()
    except Exception as error:
        warn(f"warning: {what}: {first_line(error)}")
        return False
    return True


def first_line(error: Exception) -> str:
    """What it is and the first line of what it says; some libraries say pages."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def warn(sentence: str) -> None:
    """To stderr, without tearing a progress bar."""
    with contextlib.suppress(OSError):
        tqdm.write(sentence, file=sys.stderr)
