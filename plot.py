"""Looks at finished or running runs: a picture of the curves and, for one run, the results as text.

    python plot.py runs/demo                 writes runs/demo/curves.png and prints the results
    python plot.py runs/a runs/b             the same curves of several runs in one picture, runs/a/curves.png
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from config import ConfigError
from data import KINDS
from runtime import read_jsonl, run_script

PANELS = (  # title, key in log.jsonl
    ("reward of the samples (mean)", "reward"),
    ("groups without any variance (share)", "frac_reward_zero_std"),
    ("KL to the start model (k3, nats per token)", "kl"),
    ("entropy (nats per token)", "entropy"),
    ("completion length (tokens, mean)", "completions/mean_length"),
)


def summarize(log: list[dict], splits: Sequence[str]) -> dict:
    """What a run did, from its log alone, so that a resumed run counts its first part too.

    accuracy_* is the first held-out split; those of another split carry its name, as in strict_accuracy_after.
    """
    before, steps = log[0], [row for row in log if row["step"] > 0]
    after, rewards = steps[-1], [row["reward"] for row in steps]
    summary = {"steps": len(steps), "wall_s": round(after["seconds"], 1), "flops": after["flops"]}
    summary["reward_first5"] = sum(rewards[:5]) / len(rewards[:5])
    summary["reward_last10"] = sum(rewards[-10:]) / len(rewards[-10:])
    for name in splits:
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


def smooth(values: list[float], window: int = 9) -> list[float]:
    """The centred running mean over up to `window` values, of the same length."""
    half = window // 2
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - half) : i + half + 1])]


def draw(runs: list[Path], target: Path) -> None:
    """One panel per entry of PANELS and one with the greedy accuracy before and after, written to `target` (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    for (title, key), axis in zip(PANELS, axes.flat):
        for run in runs:
            rows = [row for row in read_jsonl(run / "log.jsonl") if key in row]
            steps, values = [row["step"] for row in rows], [row[key] for row in rows]
            (line,) = axis.plot(steps, values, alpha=0.3)
            axis.plot(steps, smooth(values), color=line.get_color(), label=str(run))
        axis.set(title=title, xlabel="step")
        axis.set_ylim(bottom=0)
    if len(runs) > 1:
        axes.flat[0].legend()
    draw_accuracy(runs, axes.flat[5])
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def draw_accuracy(runs: list[Path], axis) -> None:
    """Bars: greedy held-out accuracy of one run by kind, before, after, and after more SFT; of several, overall."""
    kinds, bars = [], {}
    if len(runs) == 1:
        for label, results in accuracies(runs[0]).items():
            kinds = [key for key in results if key.startswith("held_out/accuracy")]
            bars[label] = [results[kind] for kind in kinds]
        names = [kind.removeprefix("held_out/accuracy").lstrip("_") or "all" for kind in kinds]
    else:
        names = [run.name for run in runs]
        for label in ("before", "after RL"):
            bars[label] = [accuracies(run).get(label, {}).get("held_out/accuracy", 0.0) for run in runs]
    width = 0.8 / max(1, len(bars))
    for i, (label, values) in enumerate(bars.items()):
        axis.bar([x + i * width for x in range(len(values))], values, width, label=label)
    axis.set(title="greedy accuracy, held-out queries", ylim=(0, 1))
    axis.set_xticks([x + 0.4 - width / 2 for x in range(len(names))], names)
    if bars:
        axis.legend()


def accuracies(run: Path) -> dict[str, dict[str, float]]:
    """{"before": …, "after RL": …, "after SFT": …} -> the evaluation entries of each that exists for this run."""
    evaluated = [row for row in read_jsonl(run / "log.jsonl") if any("/accuracy" in key for key in row)]
    found = {"before": evaluated[0], "after RL": evaluated[-1]} if len(evaluated) > 1 else {}
    baseline = run / "sft" / "summary.json"
    if found and baseline.exists():
        found["after SFT"] = json.loads(baseline.read_text(encoding="utf-8"))
    return {
        label: {key: value for key, value in row.items() if "/accuracy" in key or "/n" in key}
        for label, row in found.items()
    }


def report(run: Path) -> None:
    """Prints accuracy per kind of case and split, three sampled completions with rewards, and the files written."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    columns = accuracies(run)
    for split in sorted({key.split("/")[0] for key in next(iter(columns.values()), {})}):
        note = " (argument values never paired with that tool in training)" if split == "strict" else ""
        print(f"\nGreedy accuracy on {split}{note}\n  {'kind':<10}{'n':>5}" + "".join(f"{c:>11}" for c in columns))
        keys = sorted(key for key in columns["before"] if key.startswith(f"{split}/accuracy_"))
        for key in [*keys, f"{split}/accuracy"]:
            kind = key.removeprefix(f"{split}/accuracy").lstrip("_") or "all"
            n = columns["before"][key.replace("/accuracy", "/n")]
            print(f"  {kind:<10}{n:>5}" + "".join(f"{row[key]:>11.3f}" for row in columns.values()))
    print(f"\nReward: {summary['reward_first5']:.3f} in the first 5 steps, {summary['reward_last10']:.3f} in the last 10")
    print("\nCompletions of the last step:")
    last = [row for row in read_jsonl(run / "samples.jsonl") if row["step"] == summary["steps"]]
    for row in last[:: max(1, len(last) // 3)][:3]:
        print(f"  reward {row['reward']:g} ({row['reason']})\n    {row['completion']}")
    print("\nWritten:")
    for path in sorted(run.iterdir()):
        print(f"  {path}{'/' if path.is_dir() else ''}")


def main(arguments: list[str]) -> None:
    """`RUN [RUN …]`. Raises ConfigError for a folder without a log."""
    runs = [Path(argument) for argument in arguments]
    for run in runs:
        if not read_jsonl(run / "log.jsonl"):
            raise ConfigError(f"plot: {run} has no log.jsonl yet; give the folder of a run")
    if not runs:
        raise ConfigError("usage: python plot.py RUN [RUN …]")
    draw(runs, runs[0] / "curves.png")
    if len(runs) == 1 and (runs[0] / "summary.json").exists():
        report(runs[0])
    else:
        print(f"picture: {runs[0] / 'curves.png'}")


if __name__ == "__main__":
    run_script(main, (ConfigError,))
