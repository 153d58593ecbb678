"""The demo with fresh seeds and negative controls, and the paper's comparisons in miniature on it.

    python bench/mini_paper.py seeds        8 seeds, then lr 0 and shuffled rewards; 20 minutes on 2 cores
    python bench/mini_paper.py ablations    rewards, SFT, RL, and SFT then RL, 5 seeds; 45 minutes on 2 cores
    python bench/mini_paper.py grid         rewards x advantages, 5 seeds; 55 minutes on 2 cores
    … --seeds 1 --steps 4 --warmup_steps 60 --eval_cases 8     does everything work?

ablations and grid: all conditions of a seed start from one warmed-up model, half of whose demonstrations
think, and are tested on the same cases. Equal data: "SFT then RL" imitates one half of the queries and is
rewarded for the other. Equal compute: SFT stops at the FLOPs of "RL binary" of the same seed; the parts of
"SFT then RL" have half of FLOPs and steps. Finished runs (OUT/RECIPE/NAME_SEED) are not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import yaml
from timing import ROOT, code, machine, table_row
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from config import UserError, load_config  # noqa: E402

SPLITS, KINDS = ("held_out", "strict"), ("single", "choice", "parallel", "none")
BASELINE = "rl_binary"  # the others are compared with it, and SFT gets its FLOPs
CONTROLS = {"lr_0": "--lr 0", "shuffled_rewards": "--shuffle_rewards true"}
REWARDS, ADVANTAGES = ("binary", "toolrl", "overlap"), ("group_std", "max_rl", "egpo")  # of the grid
# 97.5 % quantiles of Student's t with 1, 2, … 10 degrees of freedom.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Part:
    """One run of a script."""

    label: str  # of its row in the table; empty: it has none
    options: str
    script: str = "grpo.py"
    budget: float = 0.0  # its share of BASELINE's FLOPs; 0: no limit
    start: str = "start"  # the part whose model it starts from; empty: none


def ablation_parts(steps: int, warmup_steps: int) -> dict[str, Part]:
    """Every part by name, each after what it builds on: the conditions, and the SFT half of "SFT then RL"."""
    rl, sft, clean = "--warmup_steps 0 --steps", "--sft_batch 32", "--synthetic_flaws 0"
    some_think = "--synthetic_thoughts 0.5"  # where all think, a reward that asks for it changes nothing
    half = f"{rl} {steps // 2} --data_from 0.5"
    return {
        "start": Part("start model", f"--model tiny --steps {warmup_steps} {some_think}", "sft.py", start=""),
        BASELINE: Part("RL, binary reward", f"{rl} {steps}"),
        "rl_no_reason": Part("RL, binary, no reasoning required", f"{rl} {steps} --reward no_reason"),
        "rl_partial_format": Part("RL, 0.2 for the format", f"{rl} {steps} --reward partial_format"),
        "rl_partial_names": Part("RL, 0.2 format + 0.2 names", f"{rl} {steps} --reward partial_names"),
        "sft_clean": Part("SFT, demonstrations without flaws", f"{sft} {clean}", "sft.py", 1.0),
        "sft_imperfect": Part("SFT, flawed demonstrations", f"{sft} {some_think}", "sft.py", 1.0),
        "sft_half": Part("", f"{sft} {clean} --data_to 0.5", "sft.py", 0.5),
        "sft_then_rl": Part("half SFT without flaws, half RL", half, start="sft_half"),
    }


def grid_parts(steps: int, warmup_steps: int) -> dict[str, Part]:
    """Every reward with every advantage, from the ablations' start model; the first pair is BASELINE."""
    parts = {"start": ablation_parts(steps, warmup_steps)["start"]}
    for reward, advantage in product(REWARDS, ADVANTAGES):
        options = f"--warmup_steps 0 --steps {steps} --reward {reward} --advantage {advantage}"
        name = f"{reward}_{advantage}" if BASELINE in parts else BASELINE
        parts[name] = Part(f"{reward} × {advantage}", options)
    return parts


def seed_parts(steps: int, warmup_steps: int) -> dict[str, Part]:
    """The demo, and the demo with nothing to learn from."""
    own = f"--steps {steps} --warmup_steps {warmup_steps}"
    return {name: Part("", f"{own} {more}", start="") for name, more in {"grpo": "", **CONTROLS}.items()}


# With the first seed of each: none of them was used in development.
COMPARISONS = {"seeds": (seed_parts, 201), "ablations": (ablation_parts, 301), "grid": (grid_parts, 401)}


# ------------------------------------------------------------------------------------------------- running it


def recipe(parts: dict[str, Part]) -> str:
    """A short hash of parts, code and the demo's settings: runs of another recipe are not reused."""
    return hashlib.sha256(repr(parts).encode() + code("configs/tiny*")).hexdigest()[:8]


def run_part(name: str, seed: int, parts: dict[str, Part], out: Path, before: dict) -> None:
    """Runs one part in a process of its own, after the parts that it needs; ends the program if it fails."""
    part, folder = parts[name], out / f"{name}_{seed}"
    for needed in filter(None, (part.start, part.budget and BASELINE)):
        before[needed, seed].result()  # submitted earlier, so it is done or running in another thread
    if (folder / "summary.json").exists():
        return
    words = "--config configs/tiny.yaml --overwrite true --save_every 0 --log_samples 0".split()
    words += ["--seed", str(seed), "--run_dir", str(folder), *shlex.split(part.options)]
    if part.start:
        words += ["--model", str(out / f"{part.start}_{seed}" / "model")]
    if part.budget:
        words += ["--sft_flops", repr(part.budget * outcome(out, BASELINE, seed)["flops"])]
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, part.script, *words]
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name}, seed {seed}, ended with code {done.returncode}; see {log}")


def run_all(jobs: Sequence[tuple[str, int]], parts: dict[str, Part], out: Path, processes: int) -> None:
    """Runs the (part, seed) pairs, so many processes at a time."""
    futures: dict = {}
    with ThreadPoolExecutor(processes) as pool:
        for name, seed in jobs:
            futures[name, seed] = pool.submit(run_part, name, seed, parts, out, futures)
        try:
            for future in tqdm(list(futures.values()), desc="runs", disable=None):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def outcome(out: Path, name: str, seed: int) -> dict:
    """The last line of a finished run's log with its summary."""
    folder = out / f"{name}_{seed}"
    last = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return json.loads(last) | json.loads((folder / "summary.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------- figures


def seed_figures(run: dict) -> dict[str, float]:
    """The figures of one run of the demo that the README quotes."""
    first, last = run["reward_first5"], run["reward_last10"]
    row = {"reward, first 5 steps": first, "reward, last 10 steps": last, "reward, rise": last - first}
    for prefix, name in (("", "held-out"), ("strict_", "strict")):
        before, after = run[f"{prefix}accuracy_before"], run[f"{prefix}accuracy_after"]
        row |= {f"{name} accuracy before": before, f"{name} accuracy after": after}
        row[f"{name} rise"] = after - before
    for kind, one in run["accuracy_by_kind"].items():
        row[f"held-out rise, {kind}"] = one["after"] - one["before"]
    return row


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval by Student's t; nan for a single value."""
    n = len(values)
    half = T_975[min(n - 1, len(T_975)) - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return statistics.fmean(values), half


def shown(values: Sequence[float], sign: str = "") -> str:
    """The mean, and half of its interval where there is one."""
    mean, half = interval(values)
    return f"{mean:{sign}.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def flops(name: str, seed: int, parts: dict[str, Part], out: Path) -> float:
    """Training FLOPs of a condition; the part before it belongs to it, the warm-up does not."""
    own, start = outcome(out, name, seed)["flops"], parts[name].start
    return own + (outcome(out, start, seed)["flops"] if start not in ("", "start") else 0.0)


def tables(labels: dict[str, str], seeds: Sequence[int], parts: dict[str, Part], out: Path) -> str:
    """Markdown: accuracy, paired difference to BASELINE, compute; then accuracy by kind."""
    runs = {name: [outcome(out, name, seed) for seed in seeds] for name in labels}
    n = [runs[BASELINE][0][f"{split}/n"] for split in SPLITS]
    heads = "held-out|strict|difference, held-out|difference, strict|with thought|compute|format".split("|")
    lines = [f"n = {n[0]} held-out, {n[1]} strict cases per seed\n", f"| condition | {' | '.join(heads)} |"]
    lines.append("|---" * (len(heads) + 1) + "|")
    kinds = [f"{split}/accuracy_{kind}" for split in SPLITS for kind in KINDS]
    by_kind = [f"| with thought, by kind | {' | '.join(kinds)} |".replace("accuracy_", "")]
    by_kind.append("|---" * (len(kinds) + 1) + "|")
    for name, label in labels.items():
        right = {split: [run[f"{split}/correct_rate"] for run in runs[name]] for split in SPLITS}
        base = {split: [run[f"{split}/correct_rate"] for run in runs[BASELINE]] for split in SPLITS}
        cells = [shown(right[split]) for split in SPLITS]
        cells += [shown([a - b for a, b in zip(right[split], base[split])], "+") for split in SPLITS]
        compute = [flops(name, seed, parts, out) / flops(BASELINE, seed, parts, out) for seed in seeds]
        cells += [f"{statistics.fmean(run['held_out/accuracy'] for run in runs[name]):.3f}"]
        cells += [f"{statistics.fmean(compute):.2f}" if name != "start" else ""]
        formats = [run["format_rate"] for run in runs[name] if "format_rate" in run]  # not of SFT
        cells += [f"{statistics.fmean(formats):.3f}" if formats else ""]
        lines.append(f"| {label} | {' | '.join(cells)} |")
        cells = [f"{statistics.fmean(run.get(key, math.nan) for run in runs[name]):.3f}" for key in kinds]
        by_kind.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *by_kind])


def draw(labels: dict[str, str], seeds: Sequence[int], out: Path) -> Path:
    """A panel per split: every seed as a dot, the mean with its 95 % interval beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (12, 0.55 * len(labels) + 1.6)
    figure, axes = pyplot.subplots(1, len(SPLITS), figsize=size, sharey=True, layout="constrained")
    for axis, split in zip(axes, SPLITS):
        for place, name in enumerate(labels):
            values = [outcome(out, name, seed)[f"{split}/correct_rate"] for seed in seeds]
            mean, half = interval(values)
            axis.plot(values, [place + 0.18] * len(values), "o", color="C0", alpha=0.55, markersize=5)
            axis.errorbar(mean, place - 0.12, xerr=half, fmt="s", color="black", capsize=4)
        label = "right calls: seeds, mean, 95 % interval"
        axis.set(title=f"{split.replace('_', '-')} cases", xlabel=label, xlim=(0, 1))
    axes[0].set_yticks(range(len(labels)), labels.values())
    axes[0].invert_yaxis()
    figure.savefig(out / "mini_paper.png", dpi=110)
    return out / "mini_paper.png"


def main() -> None:
    """Runs what is missing and prints the tables."""
    demo = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", choices=COMPARISONS)
    add("--seeds", type=int, help="how many; default: 8 for seeds, else 5")
    add("--controls", type=int, default=1, help="seeds of each negative control (default: %(default)s)")
    add("--jobs", type=int, default=os.cpu_count(), help="processes at a time (default: all cores)")
    add("--steps", type=int, default=demo["steps"], help="of RL (default: %(default)s)")
    add("--warmup_steps", type=int, default=demo["warmup_steps"], help="of SFT (default: %(default)s)")
    add("--out", type=Path, default=Path("runs/mini_paper"), help="of the runs (default: %(default)s)")
    args, settings = parser.parse_known_args()  # other --key value pairs are settings of every run
    load_config(settings)  # a mistake shows before the first run
    make_parts, first = COMPARISONS[args.what]
    many = args.seeds or (8 if args.what == "seeds" else 5)
    parts = make_parts(args.steps, args.warmup_steps)
    for name, part in parts.items():
        parts[name] = replace(part, options=shlex.join([*part.options.split(), *settings]))
    seeds = {name: range(first, first + (args.controls if name in CONTROLS else many)) for name in parts}
    out = (args.out / recipe(parts)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    run_all([(name, seed) for name in parts for seed in seeds[name]], parts, out, args.jobs)
    if labels := {name: part.label for name, part in parts.items() if part.label}:
        print(tables(labels, seeds["start"], parts, out))
        print(f"\npicture: {draw(labels, seeds['start'], out)}")
    for name in (name for name in parts if seeds[name] and not labels):
        rows = [seed_figures(outcome(out, name, seed)) for seed in seeds[name]]
        print(f"\n{name}, {len(rows)} seeds\n\n| | minimum | median | maximum |\n|---|---|---|---|")
        for key in rows[0]:
            print(table_row(key, [row[key] for row in rows], ".3f"))
    print(f"\nruns: {out}\n{machine()}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
