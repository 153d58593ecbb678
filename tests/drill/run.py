"""The drill: every fault that a run of days can meet, on the CPU with a tiny model, and what became of the
run.

    python bench/faults.py                                 every fault, 10 kills and 10 signals of each kind
    python bench/faults.py --only kill_all --rounds 100    one of them, more often
    python bench/faults.py --quick                         ranks forked from one process, without torchrun:
      faster

A fault is survived when the run stops as it should, says so in one sentence, and its resumed rest ends with
the weights, optimizer state, figures and samples of an undisturbed run, bit by bit (those faults that change
the training itself: when it ends). Prints a table and one line of JSON; the exit code is 1 if any fault was
not survived.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fault_cases import (
    Case,
    changed_config,
    cut,
    damaged,
    flip,
    foreign_model,
    hang,
    kill_chain,
    log_full,
    memory_rollout,
    memory_update,
    nan_in_a_row,
    nan_once,
    pickle_in_checkpoint,
    restart,
    save_fails,
    second_run,
    stop_chain,
)
from fault_runs import Failed, Site, open_site


def in_chains(case: Callable, rounds: int, longest: int, **options: object) -> dict[str, Case]:
    """`rounds` kills or signals, as runs that go through up to `longest` of them each."""
    sizes = [min(longest, rounds - start) for start in range(0, rounds, longest)]
    return {f"{i}": partial(case, kills=size, seed=i, **options) for i, size in enumerate(sizes)}


def all_cases(rounds: int, quick: bool) -> dict[str, dict[str, Case]]:
    """Every fault of the drill with its cases. quick: without those that need torchrun itself."""
    saving = {
        "stop": partial(save_fails, fault="no_space_late", rank=1, why="File too large", go_on=False),
        "go_on": partial(save_fails, fault="no_space_late", rank=1, why="File too large", go_on=True),
        "before": partial(save_fails, fault="no_space", rank=0, why="GB free; make room", go_on=False),
        "log": log_full,
    }
    shard = "*.safetensors"
    faults = {
        "kill_one": in_chains(kill_chain, rounds, 6, everyone=False),
        "kill_all": in_chains(kill_chain, rounds, 6, everyone=True),
        "restart": in_chains(restart, rounds, 3),
        "sigterm": in_chains(stop_chain, rounds, 2, number=signal.SIGTERM),
        "sigint": in_chains(stop_chain, rounds, 2, number=signal.SIGINT),
        "nonfinite": {"once": nan_once, "in_a_row": nan_in_a_row},
        "disk_full": saving,
        "read_only": {
            way: partial(
                save_fails, fault="read_only", rank=0, why="Read-only file system", go_on=way == "go_on"
            )
            for way in ("stop", "go_on")
        },
        "damaged": {
            "shard_cut": partial(damaged, pattern=shard, damage=cut),
            "shard_flipped": partial(damaged, pattern=shard, damage=flip),
            "shard_gone": partial(damaged, pattern=shard, damage=Path.unlink),
            "state": partial(damaged, pattern="state.json", damage=flip),
            "state_cut": partial(damaged, pattern="state.json", damage=cut),
            "manifest": partial(damaged, pattern="manifest.json", damage=cut),
            "manifest_flipped": partial(damaged, pattern="manifest.json", damage=flip),
        },
        "hang": {moment: partial(hang, moment=moment, seed=0) for moment in ("step", "save")},
        "out_of_memory": {
            "update": partial(memory_update, restarts=0),
            "update_restarts": partial(memory_update, restarts=1),
            "rollout": memory_rollout,
        },
        "two_runs": {"second_run": second_run, "changed_config": changed_config},
        "untrusted": {
            "checkpoint": pickle_in_checkpoint,
            "pickled_model": partial(foreign_model, remote_code=False),
            "remote_code": partial(foreign_model, remote_code=True),
        },
    }
    if quick:
        del faults["restart"], faults["out_of_memory"]["update_restarts"]
    return faults


def try_case(site: Site, name: str, case: Case) -> tuple[int, int, int, str]:
    """One case -> (faults tried, of these survived, steps done again, why not survived)."""
    try:
        tried, lost = case(site, name)
        return tried, tried, lost, ""
    except Failed as failure:
        return getattr(case, "keywords", {}).get("kills", 1), 0, 0, str(failure)


def drill(site: Site, faults: dict[str, dict[str, Case]]) -> dict[str, dict]:
    """Runs all cases, and prints a line for each as it ends; figures by fault."""
    figures = {}
    for fault, cases in faults.items():
        own, began = {"tried": 0, "survived": 0, "lost_steps": 0}, time.monotonic()
        for label, case in cases.items():
            tried, survived, lost, why = try_case(site, f"{fault}_{label}", case)
            for key, value in zip(own, (tried, survived, lost)):
                own[key] += value
            if why:
                print(f"{fault}, {label}: {why}", file=sys.stderr)
        figures[fault] = own
        print(
            f"{fault:<14}{own['tried']:>6}{own['survived']:>9}{own['lost_steps']:>11}{time.monotonic() - began:>9.0f}"
        )
        sys.stdout.flush()
    return figures


def main() -> None:
    """The whole drill, or a part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="so many kills and signals of each kind")
    parser.add_argument("--only", default="", help="names of faults, comma-separated")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--quick", action="store_true", help="fork the ranks from one process instead of torchrun"
    )
    parser.add_argument("--keep", action="store_true", help="leave the runs and their logs where they are")
    options = parser.parse_args()
    faults = all_cases(options.rounds, options.quick)
    if unknown := set(filter(None, options.only.split(","))) - set(faults):
        parser.error(f"no fault is called {', '.join(sorted(unknown))}; there are {', '.join(faults)}")
    chosen = {
        name: cases for name, cases in faults.items() if not options.only or name in options.only.split(",")
    }
    folder = Path(tempfile.mkdtemp(prefix="faults_"))
    began = time.monotonic()
    try:
        with open_site(folder, options.ranks, options.quick) as site:
            print(f"{'fault':<14}{'tried':>6}{'survived':>9}{'lost steps':>11}{'seconds':>9}", flush=True)
            figures = drill(site, chosen)
    finally:
        if options.keep:
            print(f"runs and logs: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    result = {"bench": "faults", "rounds": options.rounds, "faults": figures, "ranks": options.ranks}
    print(json.dumps(result | {"quick": options.quick, "seconds": round(time.monotonic() - began)}))
    sys.exit(any(row["survived"] < row["tried"] for row in figures.values()))


if __name__ == "__main__":
    main()
