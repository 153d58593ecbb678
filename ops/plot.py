"""Looks at finished or running runs: a picture of the curves and, of one run, the results as text.

    python -m ops.plot runs/demo          writes runs/demo/curves.png and prints the results
    python -m ops.plot runs/a runs/b      the same curves of several runs in one picture, runs/a/overlay.png

A folder may also be another trainer's, with a log.jsonl or the trainer_state.json of transformers and TRL.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from config import ConfigError, UserError, first_line, printable
from corpus.examples import KINDS
from corpus.sources import as_command, iter_jsonl, read_records, written_beside
from distributed.ranks import run_script

PERCENT = "%"
STYLES = ("-", "--", ":", "-.")
LOGS = ("log.jsonl", "trainer_state.json")
MOST = 1e100  # larger numbers are noise, and overflow when they are added up


@dataclass(frozen=True)
class Panel:
    """One panel of the picture. A picture of several runs shows the first two keys."""

    title: str
    unit: str
    keys: dict[str, str]  # key of log.jsonl: its name in the legend


ACCURACY = Panel("greedy accuracy", PERCENT, {})  # its keys depend on the splits
PANELS = (
    Panel("reward", "reward", {"reward": "mean", "reward_std": "std inside a group"}),
    ACCURACY,
    Panel("completions: share that is …", PERCENT, {"correct_rate": "right", "format_rate": "well-formed",
                                                    "think_rate": "with a thought", "empty_rate": "no call"}),
    Panel("KL to the reference", "nats per token", {"kl": "KL"}),
    Panel("entropy of the policy", "nats per token", {"entropy": "entropy"}),
    Panel("completion length", "tokens", {"completions/mean_length": "mean",
                                          "completions/max_length": "longest"}),
    Panel("equal rewards, truncation", PERCENT, {"frac_reward_zero_std": "flat groups",
                                                 "completions/clipped_ratio": "cut-off completions"}),
    Panel("gradient norm before clipping", "norm", {"grad_norm": "norm"}),
    Panel("loss", "loss per token", {"loss": "loss"}),
    Panel("time by phase", "seconds", {"time/rollout_s": "rollout", "time/update_s": "update",
                                       "time/reference_s": "reference", "time/reward_s": "reward"}),
)


def summarize(log: list[dict], splits: Sequence[str]) -> dict:
    """What a run did, from its log alone, so that a resumed run counts its first part too.

    accuracy_* is of the split held_out; the others carry their name, as in strict_accuracy_after.
    """
    steps = [row for row in log if "reward" in row]
    summary = {"steps": len(steps)}
    if steps:  # else its log was lost
        first, last = [row["reward"] for row in steps[:5]], [row["reward"] for row in steps[-10:]]
        summary |= {"wall_s": round(steps[-1]["seconds"], 1), "flops": steps[-1]["flops"]}
        summary["reward_first5"] = sum(first) / len(first)
        summary["reward_last10"] = sum(last) / len(last)
    for name in splits:
        evaluated = [row for row in log if f"{name}/accuracy" in row]
        if not evaluated:
            continue
        before, after = evaluated[0], evaluated[-1]
        prefix = "" if name == "held_out" else f"{name}_"
        summary[f"{prefix}accuracy_before"] = before[f"{name}/accuracy"]
        summary[f"{prefix}accuracy_after"] = after[f"{name}/accuracy"]
        by_kind = summary[f"{prefix}accuracy_by_kind"] = {}
        for kind in KINDS:
            if n := before.get(f"{name}/n_{kind}"):
                key = f"{name}/accuracy_{kind}"
                by_kind[kind] = {"before": before[key], "after": after[key], "n": n}
    return summary


def headline(summary: dict) -> str:
    """The lines that a run ends with: its reward, and every split's accuracy."""
    lines = []
    if "reward_first5" in summary:
        first, last = summary["reward_first5"], summary["reward_last10"]
        lines.append(f"reward: first 5 steps {first:.3f}, last 10 steps {last:.3f}")
    for key in [key for key in summary if key.endswith("accuracy_before")]:
        split = key.removesuffix("accuracy_before").rstrip("_") or "held_out"
        after = summary[key.replace("before", "after")]
        lines.append(f"{split}: greedy accuracy {summary[key]:.3f} before, {after:.3f} after")
    return "\n".join(lines)


def was_evaluated(row: dict) -> bool:
    """Whether a row of log.jsonl holds accuracies."""
    return any("/accuracy" in key for key in row)


def read_rows(path: Path, warn: bool = False) -> Iterator[dict]:
    """The objects of a JSONL file, a JSON array or a Trainer's state; none if there is no file. What is no
    object is left out. warn: says so, unless it is the last alone: that may be a line that is being written.
    """
    records = read_records(path) if path.exists() and path.stat().st_size else iter(())
    odd: list[int] = []
    last = 0
    for last, row in records:
        if not isinstance(row, dict):
            odd.append(last)
        elif isinstance(history := row.get("log_history"), list):
            yield from (inner for inner in history if isinstance(inner, dict))
        else:
            yield row
    if warn and odd and odd != [last]:
        what = f"left out {len(odd)} line(s) that are no JSON object, such as line {odd[0]}"
        print(printable(f"warning: {path}: {what}"), file=sys.stderr)


def read_log(run: Path, warn: bool = False) -> list[dict]:
    """The finite numbers in the rows of a run's log; [] if there is none. A row's step is its position where
    it names none.
    """
    path = next((run / name for name in LOGS if (run / name).exists()), run / LOGS[0])
    return [{"step": place, **numbers(row)} for place, row in enumerate(read_rows(path, warn), 1)]


def numbers(row: dict) -> dict[str, float]:
    """The values that are finite numbers."""
    return {key: value for key, value in row.items() if type(value) in (int, float) and abs(value) < MOST}


def read_summary(run: Path) -> dict[str, float]:
    """The numbers in a run's summary.json, {} if it has none."""
    return numbers(next(read_rows(run / "summary.json"), {}))


def accuracies(run: Path) -> dict[str, dict[str, float]]:
    """{"before": row of log.jsonl, "after RL": …, "after SFT": …}; the demo's SFT baseline is in RUN/sft."""
    rows = read_log(run)
    evaluated = [row for row in rows if was_evaluated(row)]
    found = {"before": evaluated[0]} if evaluated else {}
    if len(evaluated) > 1:
        found["after RL" if any("reward" in row for row in rows) else "after SFT"] = evaluated[-1]
    if baseline := read_summary(run / "sft"):
        found["after SFT"] = baseline
    return found


def print_results(run: Path) -> None:
    """Prints every split's accuracy by kind of case, the reward, and three completions of the last step."""
    columns = accuracies(run)
    sizes = next(iter(columns.values()), {})
    for split in sorted(key.removesuffix("/accuracy") for key in sizes if key.endswith("/accuracy")):
        note = " (argument values never paired with that tool in training)" if split == "strict" else ""
        print(printable(f"\nGreedy accuracy on {split}{note}"))
        print(f"  {'kind':<10}{'n':>5}" + "".join(f"{label:>11}" for label in columns))
        keys = sorted(key for key in sizes if key.startswith(f"{split}/accuracy_"))
        for key in [*keys, f"{split}/accuracy"]:
            kind = key.removeprefix(f"{split}/accuracy").lstrip("_") or "all"
            values = "".join(f"{row.get(key, math.nan):>11.3f}" for row in columns.values())
            size = sizes.get(key.replace("/accuracy", "/n"), "")
            print(printable(f"  {kind:<10}{size:>5}{values}"))
    summary = read_summary(run)
    if "reward_last10" in summary:
        print(printable(f"\n{headline(summary)}"))
    rows = iter_jsonl(run / "samples.jsonl") if "steps" in summary else ()  # may fill gigabytes
    if samples := [row for row in rows if row.get("step") == summary["steps"] and "completion" in row]:
        print("\nCompletions of the last step:")
        for row in samples[:: max(1, len(samples) // 3)][:3]:
            text = f"  reward {row.get('reward')} ({row.get('reason')})\n    {row['completion']}"
            print(printable(text))


def draw(runs: Sequence[Path], target: Path) -> bool:
    """Draws the panels that any run has data for, and says whether there are any. The suffix of `target`
    decides the format of the file.

    Training may call this: it touches no global state of matplotlib, and whoever has the last picture open
    never sees half of a new one.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = group_seeds(runs)
    groups = [[read_log(run) for run in seeds] for seeds in names.values()]
    rows = [row for logs in groups for log in logs for row in log]
    panels = choose_panels(rows, several=len(groups) > 1)
    if not panels:
        return False
    columns = min(4, max(2, len(panels)))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.1 * columns, 3.1 * lines + 0.5), layout="constrained")
    for place, panel in enumerate(panels, 1):
        draw_panel(figure.add_subplot(lines, columns, place), panel, groups)
    if len(groups) > 1:
        handles = [Line2D([], [], color=f"C{i}", label=name) for i, name in enumerate(names)]
        figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    else:
        last = max(row["step"] for row in rows)
        minutes = max(row.get("seconds", 0.0) for row in rows) / 60
        title = f"{next(iter(names))} · step {last} · {minutes:.1f} min"
        figure.suptitle(title, fontsize=11, parse_math=False)
    with written_beside(target) as beside:
        figure.savefig(beside, dpi=100)
    return True


def group_seeds(runs: Sequence[Path]) -> dict[str, list[Path]]:
    """{label: runs}. Runs whose config.yaml differs in seed and run_dir alone are together, in one colour."""
    together: dict[str, list[Path]] = {}
    for run in runs:
        path, recipe = run / "config.yaml", str(run)
        with contextlib.suppress(Exception):  # broken, or another trainer's
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            recipe = repr(sorted(item for item in settings.items() if item[0] not in ("seed", "run_dir")))
        together.setdefault(recipe, []).append(run)
    more = {recipe: f" and {len(seeds) - 1} more" for recipe, seeds in together.items() if len(seeds) > 1}
    return {f"{seeds[0]}{more.get(recipe, '')}": seeds for recipe, seeds in together.items()}


def choose_panels(rows: list[dict], several: bool) -> list[Panel]:
    """PANELS with the keys that the rows have; where they have none of ours, one for each of theirs. several:
    whether it is an overlay.
    """
    found = dict.fromkeys(key for row in rows for key in row if key not in ("step", "seconds"))
    panels = []
    for panel in PANELS:
        names = panel.keys
        if panel is ACCURACY:
            splits = [key.removesuffix("/accuracy") for key in found if key.endswith("/accuracy")]
            names = {f"{split}/accuracy": printable(split) for split in splits}
        keys = [key for key in names if key in found][: 2 if several else None]
        if keys:
            panels.append(Panel(panel.title, panel.unit, {key: names[key] for key in keys}))
    return panels or [Panel(key.replace("$", ""), "", {key: ""}) for key in list(found)[: len(PANELS)]]


def draw_panel(axis, panel: Panel, groups: Sequence[list[list[dict]]]) -> None:
    """Smoothed curves, one for each log and key. A colour per group, or per key where there is one group."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    several = len(groups) > 1
    for k, (key, name) in enumerate(panel.keys.items()):
        style = STYLES[k % len(STYLES)]
        axis.plot([], [], style, color="black" if several else f"C{k}", label=name)
        for i, logs in enumerate(groups):
            color = f"C{i if several else k}"
            for log in logs:
                points = [(row["step"], row[key]) for row in log if key in row]
                steps, values = [step for step, _ in points], [value for _, value in points]
                if key.endswith("/accuracy") or len(points) == 1:
                    axis.plot(steps, values, style, color=color, marker="o", markersize=3)
                    continue
                axis.plot(steps, smooth(values), style, color=color)
                if len(groups) == len(logs) == 1:
                    axis.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
    bottom, top = axis.dataLim.intervaly
    bottom, top = (0.0, 1.0) if panel.unit == PERCENT else (min(0.0, bottom), max(0.0, top))
    axis.set_ylim(bottom, top + 0.2 * ((top - bottom) or 1.0))  # room for the legend
    if panel.unit == PERCENT:
        axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set(title=panel.title, xlabel="step", ylabel="" if panel.unit == PERCENT else panel.unit)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    if len(panel.keys) > 1 or panel.unit == PERCENT:
        axis.legend(loc="upper center", ncols=2, fontsize=8, frameon=False)


def smooth(values: Sequence[float]) -> np.ndarray:
    """[n] -> [n]: the centred running mean over 9 values, or over a twentieth of all where that is more."""
    half = max(9, len(values) // 20) // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


@as_command("plot")
def main(arguments: list[str]) -> None:
    """`RUN [RUN …] [--out FILE]`. Raises ConfigError where there is nothing to draw."""
    parser = argparse.ArgumentParser("ops.plot", None, "Draws the curves of runs; prints the results of one.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="default: RUN/curves.png, of several runs overlay.png")
    args = parser.parse_args(arguments)
    for run in args.runs:
        if not any((run / name).exists() for name in LOGS):
            what = f"{run} has no {' or '.join(LOGS)}"
            raise ConfigError(f"plot: {what}; give the folder of a run, or a checkpoint's of TRL")
        read_log(run, warn=True)
    target = args.out or args.runs[0] / ("curves.png" if len(args.runs) == 1 else "overlay.png")
    try:
        drawn = draw(args.runs, target)
    except UserError:
        raise
    except ValueError as error:  # a suffix that is no picture's
        raise ConfigError(f"plot: {first_line(error)}") from None
    if not drawn:
        raise ConfigError(f"plot: the log of {args.runs[0]} holds no numbers to draw")
    if len(args.runs) == 1:
        print_results(args.runs[0])
    print(f"\npicture: {target}")


if __name__ == "__main__":
    run_script(main)
