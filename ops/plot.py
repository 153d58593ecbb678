"""Looks at finished or running runs: a picture of the curves and, for one run, the results as text.

python plot.py runs/demo                 writes runs/demo/curves.png and prints the results python plot.py
runs/a runs/b             the same curves of several runs in one picture, runs/a/overlay.png python plot.py
runs/seeds --out s.pdf    of all runs in a folder; what differs in the seed alone shares a colour
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml

from config import Config, ConfigError
from corpus.examples import KINDS
from corpus.sources import read_jsonl
from distributed.ranks import run_script

PERCENT = "%"
PANELS = (  # title, unit, {key in log.jsonl: what it is}; a picture of several runs shows the first two keys
    ("reward", "reward", {"reward": "mean", "reward_std": "std inside a group"}),
    (
        "completions: share that is …",
        PERCENT,
        {
            "correct_rate": "right",
            "format_rate": "well-formed",
            "think_rate": "with a thought",
            "empty_rate": "no call",
        },
    ),
    ("KL to the start model", "nats per token", {"kl": "KL"}),
    ("entropy of the policy", "nats per token", {"entropy": "entropy"}),
    ("completion length", "tokens", {"completions/mean_length": "mean", "completions/max_length": "longest"}),
    (
        "equal rewards, truncation",
        PERCENT,
        {"frac_reward_zero_std": "flat groups", "completions/clipped_ratio": "cut-off completions"},
    ),
    ("gradient norm before clipping", "norm", {"grad_norm": "norm"}),
    ("loss", "loss per token", {"loss": "loss"}),
    ("time", "seconds per step", {"seconds_per_step": "whole step"}),
)
STYLES = ("-", "--", ":", "-.")
SUFFIXES = (".png", ".pdf", ".svg")


# -------------------------------------------------------------------------------------------- logs and curves


def summarize(log: list[dict], splits: Sequence[str]) -> dict:
    """What a run did, from its log alone, so that a resumed run counts its first part too.

    accuracy_* is the first held-out split; those of another split carry its name, as in
    strict_accuracy_after.
    """
    steps = [row for row in log if "reward" in row]
    rewards = [row["reward"] for row in steps]
    summary = {"steps": len(steps), "wall_s": round(steps[-1]["seconds"], 1), "flops": steps[-1]["flops"]}
    summary["reward_first5"] = sum(rewards[:5]) / len(rewards[:5])
    summary["reward_last10"] = sum(rewards[-10:]) / len(rewards[-10:])
    for name in splits:
        evaluated = [row for row in log if f"{name}/accuracy" in row]
        before, after = evaluated[0], evaluated[-1]
        prefix = "" if name == "held_out" else f"{name}_"
        summary[f"{prefix}accuracy_before"] = before[f"{name}/accuracy"]
        summary[f"{prefix}accuracy_after"] = after[f"{name}/accuracy"]
        summary[f"{prefix}accuracy_by_kind"] = {
            kind: {
                "before": before[f"{name}/accuracy_{kind}"],
                "after": after[f"{name}/accuracy_{kind}"],
                "n": before[f"{name}/n_{kind}"],
            }
            for kind in KINDS
            if f"{name}/n_{kind}" in before
        }
    return summary


def read_log(run: Path) -> list[dict]:
    """The rows of a run's log.jsonl, with seconds_per_step where two rows that follow each other tell it."""
    rows = read_jsonl(run / "log.jsonl")
    for before, row in zip(rows, rows[1:]):
        if "seconds" in before and "seconds" in row and row["step"] > before["step"]:
            row["seconds_per_step"] = (row["seconds"] - before["seconds"]) / (row["step"] - before["step"])
    return rows


def was_evaluated(row: dict) -> bool:
    """Whether a row of log.jsonl holds accuracies."""
    return any("/accuracy" in key for key in row)


def headline(summary: dict) -> str:
    """The lines that a run ends with: its reward, and every split's accuracy."""
    lines = [
        f"reward: first 5 steps {summary['reward_first5']:.3f}, last 10 steps {summary['reward_last10']:.3f}"
    ]
    for key in [key for key in summary if key.endswith("accuracy_before")]:
        split = key.removesuffix("accuracy_before").rstrip("_") or "held_out"
        after = summary[key.replace("before", "after")]
        lines.append(f"{split}: greedy accuracy {summary[key]:.3f} before, {after:.3f} after")
    return "\n".join(lines)


def smooth(values: Sequence[float]) -> np.ndarray:
    """[n] -> [n]: the centred running mean over 9 values, or over a twentieth of all where that is more."""
    half = max(9, len(values) // 20) // 2
    sums, places = np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    first, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


@dataclass(frozen=True)
class Curve:
    """One key of the runs that share a colour, smoothed run by run: [n] each. low and high: the lowest and
    highest run.
    """

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    raw: np.ndarray | None  # what was logged, where it is one run


def curve(logs: Sequence[list[dict]], key: str, smoothed: bool = True) -> Curve | None:
    """The curve of `key` in the logs of one or several seeds; None where no log has it.

    At each step the runs count that have got there and logged a finite number.
    """
    seeds: list[dict[int, tuple[float, float]]] = []
    for rows in logs:
        points = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
        values = [value for _, value in points]
        seeds.append(
            {
                step: pair
                for (step, _), pair in zip(points, zip(values, smooth(values) if smoothed else values))
            }
        )
    steps = sorted(set().union(*seeds))
    if not steps:
        return None
    columns = [[seed[step][1] for seed in seeds if step in seed] for step in steps]
    mean, low, high = (np.array([f(column) for column in columns]) for f in (np.mean, min, max))
    raw = np.array([seeds[0][step][0] for step in steps]) if len(logs) == 1 else None
    return Curve(np.array(steps), mean, low, high, raw)


def group_seeds(runs: Sequence[Path]) -> dict[str, list[Path]]:
    """{label: its runs}: those whose config.yaml differs in seed and run_dir alone are together, in the order
    given.
    """
    together: dict[str, list[Path]] = {}
    for run in dict.fromkeys(runs):
        path, recipe = run / "config.yaml", str(run)
        if path.exists():  # a setting that is newer than the run had its default then
            settings = asdict(Config()) | yaml.safe_load(path.read_text(encoding="utf-8"))
            recipe = json.dumps(
                {k: v for k, v in settings.items() if k not in ("seed", "run_dir")}, sort_keys=True
            )
        together.setdefault(recipe, []).append(run)
    common = Path(os.path.commonpath([run.resolve().parent for run in runs]))
    labelled: dict[str, list[Path]] = {}
    for seeds in together.values():
        names = [str(run.resolve().relative_to(common)) for run in seeds]
        label = str(seeds[0]) if len(together) == 1 else names[0]
        if len(seeds) > 1:
            name = re.sub(r"([-_./ ]?seed)?[-_./ ]?\d*$", "", os.path.commonprefix(names)) or common.name
            label = f"{name} ({len(seeds)} seeds)"
        if label in labelled:
            label = f"{names[0]} … {names[-1]} ({len(seeds)} seeds)"
        labelled[label] = seeds
    return labelled


# ------------------------------------------------------------------------------------------------ the picture


def draw(runs: Sequence[Path], target: Path) -> None:
    """One panel per row of PANELS that any run has data for, and the greedy accuracies, written to `target`
    at once.

    Of one run, also the seconds by phase and the accuracy by kind. The kind of file is target's suffix. No
    global state of matplotlib is touched, so a training process may call this.
    """
    from matplotlib.figure import Figure

    logs = {label: [read_log(run) for run in seeds] for label, seeds in group_seeds(runs).items()}
    last, panels = max(map(last_step, logs.values()), default=0), choose_panels(runs, logs)
    columns = min(4, max(2, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4.1 * columns, 3.1 * lines + 0.5))
    for place, (painter, arguments) in enumerate(panels, 1):
        axis = figure.add_subplot(lines, columns, place)
        painter(axis, *arguments)
        if axis.get_xlabel() == "step":  # the same in all panels of one run; SFT has more steps than GRPO
            right = max(1.0, last if len(logs) == 1 else axis.dataLim.x1)
            axis.set_xlim(-0.02 * right, 1.02 * right)
    put_title(figure, logs, last)
    temporary = target.with_name(
        f".{target.name}.{os.getpid()}.tmp"
    )  # renamed, so that a viewer never sees half of it
    try:
        figure.savefig(temporary, dpi=100, format=target.suffix[1:] or "png")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def choose_panels(runs: Sequence[Path], logs: dict[str, list[list[dict]]]) -> list[tuple[Callable, tuple]]:
    """(function that draws it, its arguments after the axis) of every panel that there is data for."""
    rows, panels = [row for group in logs.values() for log in group for row in log], []
    splits = list(dict.fromkeys(key for row in rows for key in row if key.endswith("/accuracy")))
    accuracy = ("greedy accuracy", PERCENT, {key: split_label(key, rows) for key in splits})
    phases = len(runs) == 1 and any(key.startswith("time/") for row in rows for key in row)
    for title, unit, names in (PANELS[0], accuracy, *PANELS[1:]):
        keys = [key for key in names if any(key in row for row in rows)]
        if len(logs) > 1 and names is not accuracy[2]:
            keys = keys[:2]
        if keys and not (phases and title == "time"):
            panels.append((draw_curves, (logs, title, unit, {key: names[key] for key in keys})))
        if "held_out/accuracy" in keys and len(runs) == 1 and (by_kind := accuracies(runs[0])):
            panels.append((draw_accuracy, (by_kind,)))
    if phases:
        panels.append((draw_phases, (rows,)))
    return panels


def split_label(key: str, rows: list[dict]) -> str:
    """ "held_out/accuracy" -> "held_out (n = 150)", where all runs agree on n."""
    split = key.removesuffix("/accuracy")
    sizes = {row[f"{split}/n"] for row in rows if f"{split}/n" in row}
    return f"{split} (n = {sizes.pop()})" if len(sizes) == 1 else split


def put_title(figure, logs: dict[str, list[list[dict]]], last: int) -> None:
    """Which run it is and how far it has got; of several, the colours. Then the margins: fixed, in inches.

    matplotlib's own layouts would draw everything once more to measure it.
    """
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches()
    columns, legend = 1, []
    if not figure.axes:
        figure.text(0.5, 0.5, "nothing to draw yet", ha="center")
    if len(logs) == 1:
        (label, group), *_ = logs.items()
        minutes = max((log[-1].get("seconds", 0.0) for log in group if log), default=0.0) / 60
        figure.suptitle(
            f"{label} · step {last} · {minutes:.1f} min", fontsize=11, y=1 - 0.12 / height, va="top"
        )
    else:
        names = [lengths(label, group) for label, group in logs.items()]
        legend = [Line2D([], [], color=f"C{i}", label=name) for i, name in enumerate(names)]
        columns = max(1, min(len(names), int(9 * width) // max(len(name) + 8 for name in names)))
        figure.legend(handles=legend, loc="upper center", ncols=columns, frameon=False, fontsize=10)
    top = 0.7 + 0.22 * max(0, -(-len(legend) // columns) - 1)
    figure.set_size_inches(width, height + top - 0.7)
    height += top - 0.7
    figure.subplots_adjust(
        0.75 / width, 0.5 / height, 1 - 0.15 / width, 1 - top / height, wspace=0.28, hspace=0.36
    )


def last_step(logs: Sequence[list[dict]]) -> int:
    """How far the furthest of these runs has got; 0 where nothing is logged."""
    return max((log[-1]["step"] for log in logs if log), default=0)


def lengths(label: str, logs: list[list[dict]]) -> str:
    """The label, with the steps of the shortest and the longest run where they differ: the mean changes
    there.
    """
    ends = [last_step([log]) for log in logs]
    return label if min(ends) == max(ends) else f"{label}, {min(ends)} to {max(ends)} steps"


def draw_curves(axis, logs: dict[str, list[list[dict]]], title: str, unit: str, keys: dict[str, str]) -> None:
    """One panel. A colour per run and a line style per key; of one run, also a colour per key."""
    from matplotlib.lines import Line2D

    handles = []
    for k, (key, name) in enumerate(keys.items()):
        style, sparse = STYLES[k % len(STYLES)], key.endswith("/accuracy")
        for i, group in enumerate(logs.values()):
            color = f"C{i if len(logs) > 1 else k}"
            found = curve(group, key, smoothed=not sparse)
            if found is None:
                continue
            marker = "o" if sparse or len(found.steps) == 1 else ""
            axis.plot(found.steps, found.mean, style, color=color, marker=marker, markersize=3)
            if len(group) > 1:
                axis.fill_between(found.steps, found.low, found.high, color=color, alpha=0.15, linewidth=0)
            elif not sparse:
                axis.plot(found.steps, found.raw, color=color, alpha=0.2, linewidth=0.8)
        handles.append(
            Line2D([], [], linestyle=style, color="black" if len(logs) > 1 else f"C{k}", label=name)
        )
    finish_panel(axis, title, unit, handles if len(keys) > 1 or unit == PERCENT else [])


def finish_panel(axis, title: str, unit: str, handles: list, xlabel: str = "step") -> None:
    """Title, axes and room above the curves for the legend."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    bottom, top = axis.dataLim.intervaly
    bottom, top = (0.0, 1.0) if unit == PERCENT else (min(0.0, bottom), max(top, 0.0))
    room = 0.04 * (top - bottom or 1.0)
    axis.set_ylim(bottom - room * (bottom < 0), top + room * (1 + 3 * -(-len(handles) // 2)))
    if unit == PERCENT:
        axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    else:
        axis.yaxis.set_major_locator(MaxNLocator(5))
    if xlabel:
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(xlabel, fontsize=9)
    axis.set_ylabel("" if unit == PERCENT else unit, fontsize=9, labelpad=2)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    if handles:
        axis.legend(
            handles=handles, loc="upper center", ncols=2, fontsize=8, frameon=False, borderaxespad=0.1,
            columnspacing=1,
        )


def draw_phases(axis, rows: list[dict]) -> None:
    """Seconds per step by phase, one on the other; phases under 1 % of the whole are summed as "other"."""
    names = list(dict.fromkeys(key for row in rows for key in row if key.startswith("time/")))
    rows = [row for row in rows if any(name in row for name in names)]
    seconds = {name: np.array([row.get(name, 0.0) for row in rows]) for name in names}
    whole = sum(values.sum() for values in seconds.values())
    large = {
        n.removeprefix("time/").removesuffix("_s"): v for n, v in seconds.items() if v.sum() > 0.01 * whole
    }
    stacked = {name: smooth(values) for name, values in large.items()}
    if len(large) < len(seconds):
        stacked["other"] = smooth(sum(seconds.values()) - sum(large.values()))
    areas = axis.stackplot(
        [row["step"] for row in rows], list(stacked.values()), labels=list(stacked), alpha=0.8
    )
    finish_panel(axis, "time by phase", "seconds per step", areas)


def draw_accuracy(axis, columns: dict[str, dict[str, float]]) -> None:
    """Bars: greedy held-out accuracy of one run by kind: before, after, and after more SFT."""
    keys = [key for key in next(iter(columns.values())) if key.startswith("held_out/accuracy")]
    names, width = (
        [key.removeprefix("held_out/accuracy").lstrip("_") or "all" for key in keys],
        0.8 / len(columns),
    )
    bars = [
        axis.bar(
            [x + i * width for x in range(len(keys))], [row.get(key, 0.0) for key in keys], width, label=label
        )
        for i, (label, row) in enumerate(columns.items())
    ]
    finish_panel(axis, "greedy accuracy on held_out by kind", PERCENT, bars, xlabel="")
    axis.set_xticks([x + 0.4 - width / 2 for x in range(len(names))], names)


# --------------------------------------------------------------------------------------------------- the text


def accuracies(run: Path) -> dict[str, dict[str, float]]:
    """{"before": …, "after RL": …, "after SFT": …} -> the evaluation entries of each that exists for this
    run.
    """
    rows = read_jsonl(run / "log.jsonl")
    evaluated = [row for row in rows if was_evaluated(row)]
    after = "after RL" if any("reward" in row for row in rows) else "after SFT"
    found = {"before": evaluated[0], after: evaluated[-1]} if len(evaluated) > 1 else {}
    baseline = run / "sft" / "summary.json"
    if found and baseline.exists():
        found["after SFT"] = json.loads(baseline.read_text(encoding="utf-8"))
    return {label: evaluation(row) for label, row in found.items()}


def evaluation(row: dict) -> dict[str, float]:
    """The entries that evaluations made: accuracies, and the numbers of cases behind them."""
    return {key: value for key, value in row.items() if "/accuracy" in key or "/n" in key}


def report(run: Path) -> None:
    """Prints accuracy per kind of case and split, three sampled completions with rewards, and the files
    written.
    """
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    columns = accuracies(run) or {"after": evaluation(summary)}
    sizes = next(iter(columns.values()))
    for split in sorted({key.split("/")[0] for key in sizes}):
        note = " (argument values never paired with that tool in training)" if split == "strict" else ""
        print(
            f"\nGreedy accuracy on {split}{note}\n  {'kind':<10}{'n':>5}"
            + "".join(f"{c:>11}" for c in columns)
        )
        keys = sorted(key for key in sizes if key.startswith(f"{split}/accuracy_"))
        for key in [*keys, f"{split}/accuracy"]:
            kind = key.removeprefix(f"{split}/accuracy").lstrip("_") or "all"
            n = sizes[key.replace("/accuracy", "/n")]
            print(
                f"  {kind:<10}{n:>5}"
                + "".join(f"{row.get(key, math.nan):>11.3f}" for row in columns.values())
            )
    if "reward_first5" in summary:
        first, last = summary["reward_first5"], summary["reward_last10"]
        print(f"\nReward: {first:.3f} in the first 5 steps, {last:.3f} in the last 10")
    if samples := [row for row in read_jsonl(run / "samples.jsonl") if row["step"] == summary.get("steps")]:
        print("\nCompletions of the last step:")
        for row in samples[:: max(1, len(samples) // 3)][:3]:
            print(f"  reward {row['reward']:g} ({row['reason']})\n    {row['completion']}")
    print("\nWritten:")
    for path in sorted(run.iterdir()):
        print(f"  {path}{'/' if path.is_dir() else ''}")


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """These runs, and those directly inside folders that are none. Raises ConfigError for a folder without
    any.
    """
    runs = []
    for folder in folders:
        found = (
            [folder]
            if (folder / "log.jsonl").exists()
            else sorted(log.parent for log in folder.glob("*/log.jsonl"))
        )
        found = [run for run in found if read_jsonl(run / "log.jsonl")]
        if not found:
            raise ConfigError(
                f"plot: {folder} has no log.jsonl yet; give the folder of a run, or one that holds runs"
            )
        runs += found
    return list(dict.fromkeys(runs))


def main(arguments: list[str]) -> None:
    """`RUN [RUN …] [--out FILE]`. Raises ConfigError for a folder without a log."""
    parser = argparse.ArgumentParser(
        prog="plot.py", description="Draws the curves of runs; of one run, prints the results."
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or a folder that holds runs"
    )
    parser.add_argument("--out", type=Path, help=f"the picture ({', '.join(SUFFIXES)}); default: curves.png in the run, "
                        "overlay.png in the first folder where there are several")
    args = parser.parse_args(arguments)
    runs = find_runs(args.runs)
    target = args.out or args.runs[0] / ("curves.png" if len(runs) == 1 else "overlay.png")
    if target.suffix not in SUFFIXES:
        raise ConfigError(f"--out must end in {', '.join(SUFFIXES)}, not {target.name!r}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draw(runs, target)
    except OSError as error:
        raise ConfigError(f"plot: cannot write {target}: {error.strerror}") from None
    if len(runs) == 1 and (runs[0] / "summary.json").exists():
        report(runs[0])
    else:
        print(f"picture of {len(runs)} run(s): {target}")


if __name__ == "__main__":
    run_script(main, (ConfigError,))
