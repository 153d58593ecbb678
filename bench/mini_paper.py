"""The paper's comparisons in miniature, on the CPU demo: rewards, SFT, RL, and SFT then RL.

    python bench/mini_paper.py                                       5 seeds of 7 conditions, about 45 minutes
      on 2 cores
    python bench/mini_paper.py --seeds 1 --steps 4 --warmup_steps 60    does everything work?
    python bench/mini_paper.py --conditions rl_binary,sft_clean

All conditions of a seed start from one warmed-up model, half of whose demonstrations have a thought, and are
tested on the same cases: do the calls equal the answer, with or without a thought (as BFCL judges in the
paper)? Equal data: the same training queries; "SFT then RL" imitates one half of them and is rewarded for the
other. Equal compute: SFT stops at the FLOPs that "RL binary" of the same seed took; the two parts of "SFT
then RL" have half of the FLOPs and of the steps. Finished parts (OUT/RECIPE/PART_SEED/summary.json) are not
done again, so it can be interrupted at any time.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import yaml
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
FIRST_SEED = 301  # none of these was used while the demo and this script were being built
SPLITS, KINDS = ("held_out", "strict"), ("single", "choice", "parallel", "none")
BASELINE = "rl_binary"  # the others are compared with it, and SFT gets its FLOPs
CONDITIONS = {
    "rl_binary": "RL, binary reward",
    "rl_no_reason": "RL, binary, no reasoning required",
    "rl_partial_format": "RL, 0.2 for the format",
    "rl_partial_names": "RL, 0.2 format + 0.2 names",
    "sft_clean": "SFT, demonstrations without flaws",
    "sft_imperfect": "SFT, flawed demonstrations",
    "sft_then_rl": "half SFT without flaws, half RL",
}
# What decides the results. Not its comments and docstrings: see `recipe`.
DECIDES = (
    "configs/tiny.yaml configs/tiny_prompt.txt synthetic.py data.py prompts.py reward.py losses.py minibatches.py grpo.py "
    "sft.py rollout.py engines.py model.py packing.py head.py sharding.py runtime.py config.py"
).split()
# 97.5 % quantiles of Student's t with 1, 2, … 30 degrees of freedom.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)


class PartFailed(Exception):
    """A run that ended with an error; the message names it, its log and its last line."""


# ------------------------------------------------------------------------------------------------ what is run


@dataclass(frozen=True)
class Part:
    """One run of a script. start: the part whose model it starts from. budget: its FLOPs, as a share of
    BASELINE's.
    """

    script: str
    options: tuple[str, ...]
    start: str = ""
    budget: float = 0.0


def needs(part: Part) -> list[str]:
    """The parts that must be finished before it."""
    return ([part.start] if part.start else []) + ([BASELINE] if part.budget else [])


def parts_of(steps: int, warmup_steps: int) -> dict[str, Part]:
    """Every part by name: the conditions, the start model, and the SFT half of "SFT then RL"."""

    def rl(start: str, part_steps: int, *options: str) -> Part:
        return Part("grpo.py", ("--steps", str(part_steps), "--warmup_steps", "0", *options), start)

    def sft(budget: float, *options: str) -> Part:
        return Part("sft.py", ("--sft_batch", "32", *options), "start", budget)

    clean, first, second = ("--synthetic_flaws", "0"), ("--data_to", "0.5"), ("--data_from", "0.5")
    some = (
        "--synthetic_thoughts",
        "0.5",
    )  # where all think already, a reward that asks for it changes nothing
    return {
        "start": Part("sft.py", ("--model", "tiny", "--steps", str(warmup_steps), *some)),
        "rl_binary": rl("start", steps),
        "rl_no_reason": rl("start", steps, "--reward", "no_reason"),
        "rl_partial_format": rl("start", steps, "--reward", "partial_format"),
        "rl_partial_names": rl("start", steps, "--reward", "partial_names"),
        "sft_clean": sft(1.0, *clean),
        "sft_imperfect": sft(1.0, *some),
        "sft_half": sft(0.5, *clean, *first),
        "sft_then_rl": rl("sft_half", steps // 2, *second),
    }


def needed(conditions: Sequence[str], parts: dict[str, Part]) -> list[str]:
    """The conditions and all parts that they build on, each after what it needs."""
    names: list[str] = []
    for name in conditions:
        names += [one for one in [*needed(needs(parts[name]), parts), name] if one not in names]
    return names


def command(part: Part, seed: int, folder: Path, start: Path | None, flops: float) -> list[str]:
    """The settings of a run, to be put behind python and the script."""
    words = [
        "--config",
        "configs/tiny.yaml",
        "--seed",
        str(seed),
        "--run_dir",
        str(folder),
        "--overwrite",
        "true",
    ]
    words += ["--save_every", "0", "--log_samples", "0", *part.options]
    words += ["--model", str(start / "model")] if start else []
    return words + (["--sft_flops", repr(part.budget * flops)] if part.budget else [])


def recipe(parts: dict[str, Part]) -> str:
    """A short hash of the parts and of the code and settings in DECIDES: results of another recipe are never
    reused.
    """
    return hashlib.sha256(
        "\0".join([repr(parts), *(_essence(ROOT / name) for name in DECIDES)]).encode()
    ).hexdigest()[:8]


def _essence(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return json.dumps(yaml.safe_load(text), sort_keys=True)
    if path.suffix != ".py":
        return text
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            del body[0]  # a docstring
    return ast.dump(tree)


# ------------------------------------------------------------------------------------------------- running it


def run_part(
    name: str, seed: int, parts: dict[str, Part], out: Path, futures: dict, stop: threading.Event
) -> None:
    """Runs one part in a process of its own, after the parts that it needs. Raises PartFailed."""
    part = parts[name]
    for one in needs(part):
        futures[one, seed].result()  # submitted earlier, so it is done or running in another thread
    folder, log = out / f"{name}_{seed}", out / f"{name}_{seed}.log"
    if (folder / "summary.json").exists() or stop.is_set():
        return
    start = out / f"{part.start}_{seed}" if part.start else None
    flops = outcome(out / f"{BASELINE}_{seed}")["flops"] if part.budget else 0.0
    words = [sys.executable, part.script, *command(part, seed, folder, start, flops)]
    with log.open("w") as file:
        # a session of its own: Ctrl-C in the terminal is ours to pass on
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=file, stderr=file, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        while process.poll() is None:
            if stop.wait(0.5):
                process.kill()  # it will be done again from its beginning
    if process.returncode and not stop.is_set():
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise PartFailed(
            f"{name}, seed {seed}, ended with code {process.returncode}; see {log}: {lines[-1][-200:]}"
        )


def run_all(names: Sequence[str], seeds: Sequence[int], parts: dict[str, Part], out: Path, jobs: int) -> None:
    """Runs every part for every seed, `jobs` processes at a time; raises the first failure, with the others
    stopped.
    """
    stop, futures = threading.Event(), {}
    pool = ThreadPoolExecutor(jobs)
    try:
        for name in names:  # all seeds of a part first: what it builds on is then done, and nobody waits
            for seed in seeds:
                futures[name, seed] = pool.submit(run_part, name, seed, parts, out, futures, stop)
        labels: dict[Future, str] = {future: f"{name} {seed}" for (name, seed), future in futures.items()}
        with tqdm(total=len(futures), desc="runs") as bar:
            for future in as_completed(labels):
                future.result()
                bar.update()
                bar.set_postfix_str(f"last: {labels[future]}")
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def outcome(folder: Path) -> dict[str, float]:
    """The last line of a finished run's log with its summary: accuracies, FLOPs, and for RL the rates of the
    samples.
    """
    last = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return json.loads(last) | json.loads((folder / "summary.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------- figures


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval by Student's t; nan for a single value."""
    n = len(values)
    half = T_975[min(n - 1, len(T_975)) - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return statistics.fmean(values), half


def figures(names: Sequence[str], seeds: Sequence[int], parts: dict[str, Part], out: Path) -> dict[str, dict]:
    """Per condition (and "start"): lists over seeds of accuracies, FLOPs and format rate, and their
    intervals.
    """
    results: dict[str, dict] = {}
    for name in names:
        runs = [outcome(out / f"{name}_{seed}") for seed in seeds]
        row: dict = {split: [run[f"{split}/correct_rate"] for run in runs] for split in SPLITS}
        row["with_thought"] = statistics.fmean(run["held_out/accuracy"] for run in runs)
        row |= {f"{split}_n": runs[0][f"{split}/n"] for split in SPLITS}
        row["by_kind"] = {
            f"{split}/{kind}": statistics.fmean(run[f"{split}/accuracy_{kind}"] for run in runs)
            for split in SPLITS
            for kind in KINDS
            if all(f"{split}/accuracy_{kind}" in run for run in runs)
        }
        row["flops"] = [run["flops"] for run in runs]
        if parts[name].start not in ("", "start"):  # the part before belongs to the condition
            row["flops"] = [
                a + outcome(out / f"{parts[name].start}_{s}")["flops"] for a, s in zip(row["flops"], seeds)
            ]
        if "format_rate" in runs[0]:
            row["format_rate"] = statistics.fmean(run["format_rate"] for run in runs)
        results[name] = row
    for row in results.values():
        for split in SPLITS:
            row[f"{split}_mean"], row[f"{split}_half"] = interval(row[split])
            paired = [a - b for a, b in zip(row[split], results[BASELINE][split])]
            row[f"{split}_difference"], row[f"{split}_difference_half"] = interval(paired)
        row["compute"] = statistics.fmean(a / b for a, b in zip(row["flops"], results[BASELINE]["flops"]))
    return results


def tables(results: dict[str, dict]) -> str:
    """Markdown: accuracy with 95 % interval, paired difference to BASELINE, compute; then accuracy by
    kind.
    """
    n = {split: results[BASELINE][f"{split}_n"] for split in SPLITS}
    count = len(results[BASELINE]["held_out"])
    lines = [
        f"Right calls of greedy replies, mean over {count} seed(s) ± half of its 95 % interval (Student's t); "
        f"n = {n['held_out']} held-out and {n['strict']} strict cases per seed. With thought: the binary reward of the "
        f"held-out replies. Differences to {CONDITIONS[BASELINE]} are paired by seed. "
        "Compute: training FLOPs over those of that row, the warm-up left out. Format: share of the last step's samples.\n",
        "| condition | held-out | strict | difference, held-out | difference, strict | with thought | compute | format |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        cells = [f"{row[f'{split}_mean']:.3f}{_half(row[f'{split}_half'])}" for split in SPLITS]
        if name == BASELINE:
            cells += ["", ""]
        else:
            cells += [f"{row[f'{s}_difference']:+.3f}{_half(row[f'{s}_difference_half'])}" for s in SPLITS]
        cells += [f"{row['with_thought']:.3f}", "" if name == "start" else f"{row['compute']:.2f}"]
        cells += [f"{row['format_rate']:.3f}" if "format_rate" in row else ""]
        lines.append(f"| {CONDITIONS.get(name, 'start model')} | {' | '.join(cells)} |")
    same = [
        CONDITIONS[name]
        for name, row in results.items()
        if name != BASELINE and _equal(row, results[BASELINE])
    ]
    if same:  # as where a reward differs only in what no sample did
        lines += [
            "",
            f"Equal to {CONDITIONS[BASELINE]} in every accuracy and the FLOPs of every seed: {'; '.join(same)}.",
        ]
    kinds = list(results[BASELINE]["by_kind"])
    lines += [
        "",
        "| with thought, by kind | "
        + " | ".join(key.replace("held_out", "held-out") for key in kinds)
        + " |",
    ]
    lines.append("|---" * (len(kinds) + 1) + "|")
    for name, row in results.items():
        cells = " | ".join(f"{row['by_kind'][kind]:.3f}" for kind in kinds)
        lines.append(f"| {CONDITIONS.get(name, 'start model')} | {cells} |")
    return "\n".join(lines)


def _equal(row: dict, other: dict) -> bool:
    return all(row[key] == other[key] for key in (*SPLITS, "by_kind", "flops"))


def _half(half: float) -> str:
    return "" if math.isnan(half) else f" ± {half:.3f}"


def draw(results: dict[str, dict], target: Path) -> None:
    """A panel per split: every seed as a dot, the mean with its 95 % interval beside it; written to `target`
    (PNG).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (12, 0.55 * len(results) + 1.6)
    figure, axes = pyplot.subplots(1, len(SPLITS), figsize=size, sharey=True, layout="constrained")
    for axis, split in zip(axes, SPLITS):
        for place, row in enumerate(results.values()):
            values, mean, half = row[split], row[f"{split}_mean"], row[f"{split}_half"]
            axis.plot(values, [place + 0.18] * len(values), "o", color="C0", alpha=0.55, markersize=5)
            axis.errorbar(
                mean, place - 0.12, xerr=0 if math.isnan(half) else half, fmt="s", color="black", capsize=4
            )
        axis.axvline(results[BASELINE][f"{split}_mean"], color="0.8", zorder=0)
        axis.set(
            title=f"{split.replace('_', '-')} cases", xlabel="right calls: seeds, mean, 95 % interval",
            xlim=(0, 1),
        )
    axes[0].set_yticks(range(len(results)), [CONDITIONS.get(name, "start model") for name in results])
    axes[0].invert_yaxis()
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Runs what is missing, then prints tables, draws the picture, and ends with one line of JSON."""
    demo = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=FIRST_SEED)
    parser.add_argument(
        "--conditions", default=",".join(CONDITIONS), help="comma-separated, of: " + ", ".join(CONDITIONS)
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes at a time, one thread each"
    )
    parser.add_argument(
        "--steps", type=int, default=demo["steps"], help="of RL; other numbers are for trying it out"
    )
    parser.add_argument("--warmup_steps", type=int, default=demo["warmup_steps"])
    parser.add_argument("--out", type=Path, default=Path("runs/mini_paper"), help="folder of the runs")
    parser.add_argument(
        "--picture", type=Path, help="default: mini_paper.png in the folder of this recipe's runs"
    )
    args = parser.parse_args()
    asked = [name.strip() for name in args.conditions.split(",")]
    for name in asked:
        if name not in CONDITIONS:
            parser.error(f"--conditions: {name!r} is none of {', '.join(CONDITIONS)}")
    if min(args.seeds, args.jobs) < 1 or args.steps < 2:
        parser.error("--seeds and --jobs must be at least 1, --steps at least 2")
    parts = parts_of(args.steps, args.warmup_steps)
    conditions = [name for name in CONDITIONS if name in {BASELINE, *asked}]
    names, seeds = needed(conditions, parts), range(args.first_seed, args.first_seed + args.seeds)
    out = (args.out / recipe(parts)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_all(names, seeds, parts, out, args.jobs)
    except PartFailed as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on, finished runs are kept", file=sys.stderr)
        sys.exit(130)
    results = figures(["start", *conditions], seeds, parts, out)
    picture = args.picture or out / "mini_paper.png"
    draw(results, picture)
    print(f"{tables(results)}\n\nruns: {out}\npicture: {picture}")
    settings = {
        "recipe": out.name,
        "seeds": list(seeds),
        "steps": args.steps,
        "warmup_steps": args.warmup_steps,
    }
    line = json.dumps({"bench": "mini_paper", **settings, "conditions": results})
    print(line.replace("NaN", "null"))  # the intervals of a single seed


if __name__ == "__main__":
    main()
