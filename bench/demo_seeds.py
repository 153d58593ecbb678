"""The demo with fresh seeds and with two negative controls; prints minimum, median and maximum of each
figure.

    python bench/demo_seeds.py                       8 seeds, then lr 0 and shuffled rewards with one seed
      each
    python bench/demo_seeds.py --seeds 2 --controls 0

Runs that are finished (runs/seeds/RECIPE/…/summary.json) are not done again, so it can be interrupted.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIRST_SEED = 201  # none of these was used while the demo was being built
VARIANTS = {"GRPO": [], "learning rate 0": ["--lr", "0"], "shuffled rewards": ["--shuffle_rewards", "true"]}
KINDS = ("single", "choice", "parallel", "none")


def run(variant: str, seed: int) -> dict:
    """One demo run in its own process; its summary."""
    folder = ROOT / "runs" / "seeds" / recipe() / f"{variant.replace(' ', '_')}_{seed}"
    if not (folder / "summary.json").exists():
        command = [sys.executable, "grpo.py", "--config", "configs/tiny.yaml", "--seed", str(seed)]
        command += ["--run_dir", str(folder), "--overwrite", "true", *VARIANTS[variant]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{variant}, seed {seed}: {done.stderr.strip()[-300:]}")
        print(f"{variant}, seed {seed}: done", file=sys.stderr)
    return json.loads((folder / "summary.json").read_text())


def recipe() -> str:
    """A short hash of what the demo is made of, so that runs of another recipe are never reused."""
    parts = ("configs/tiny.yaml", "configs/tiny_prompt.txt", "synthetic.py")
    return hashlib.sha256(b"".join((ROOT / part).read_bytes() for part in parts)).hexdigest()[:8]


def figures(summary: dict) -> dict[str, float]:
    """The figures that the README quotes."""
    row = {
        "reward, first 5 steps": summary["reward_first5"],
        "reward, last 10 steps": summary["reward_last10"],
    }
    row["reward, rise"] = summary["reward_last10"] - summary["reward_first5"]
    for prefix, name in (("", "held-out"), ("strict_", "strict")):
        before, after = summary[f"{prefix}accuracy_before"], summary[f"{prefix}accuracy_after"]
        row |= {
            f"{name} accuracy before": before,
            f"{name} accuracy after": after,
            f"{name} rise": after - before,
        }
    for kind in KINDS:
        one = summary["accuracy_by_kind"][kind]
        row[f"held-out rise, {kind}"] = one["after"] - one["before"]
    return row | {"wall, s": summary["wall_s"]}


def main() -> None:
    """Runs what is missing, at most one process per core, and prints a Markdown table per variant."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--controls", type=int, default=1)
    args = parser.parse_args()
    jobs = [("GRPO", FIRST_SEED + i) for i in range(args.seeds)]
    jobs += [(variant, FIRST_SEED + i) for variant in list(VARIANTS)[1:] for i in range(args.controls)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        summaries = list(pool.map(lambda job: run(*job), jobs))
    for variant in VARIANTS:
        rows = [figures(s) for (name, _), s in zip(jobs, summaries) if name == variant]
        if rows:
            print(f"\n{variant}, {len(rows)} seeds\n\n| | minimum | median | maximum |\n|---|---|---|---|")
        for key in rows[0] if rows else ():
            values = [row[key] for row in rows]
            low, middle, high = min(values), statistics.median(values), max(values)
            digits = 0 if key == "wall, s" else 3
            print(f"| {key} | {low:.{digits}f} | {middle:.{digits}f} | {high:.{digits}f} |")


if __name__ == "__main__":
    main()
