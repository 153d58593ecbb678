"""The drill: every fault that a run of days can meet, on the CPU with a tiny model, and what became of it.

    python tests/drill/run.py                                 every fault, 10 kills and signals of each kind
    python tests/drill/run.py --only kill_all --rounds 100    one of them, more often

A fault is survived when the run stops as it should, says so in one sentence, and its resumed rest ends with
the weights, optimizer state, figures and samples of an undisturbed run, bit by bit. Prints a line for each
fault and one line of JSON; the exit code is 1 if one was not survived, and then runs and logs are kept.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jobs  # noqa: E402
from jobs import RANKS, STEPS, Job, ends, kill, latest, launch, lost, over, rank_pids, wait_until  # noqa: E402
from worker import Death  # noqa: E402

# A case gets the folder of the drill and the name of its run and returns (faults tried, steps done again). It
# raises AssertionError where a fault was not survived.
Case = Callable[[Path, str], tuple[int, int]]


def go_on(site: Path, name: str, **settings: object) -> None:
    """Starts a stopped run once more; it must end like one that nothing happened to."""
    with launch(site, name, **settings) as job:
        ends(job)
    jobs.same_as_undisturbed(site, job.run)


def await_moment(job: Job, moment: str, draw: random.Random) -> bool:
    """Waits for a random moment of this kind; whether the run still goes on."""
    before, run = latest(job.run), job.run
    reached, pause = {
        "start": (lambda: len(rank_pids(job)) == RANKS, 1.0),  # before there is any checkpoint
        # A save takes 20 ms. A busy machine may miss them all: then any moment of the second half.
        "save": (
            lambda: latest(run) > before and (any(run.glob("step_*.tmp")) or latest(run) > STEPS // 2), 0.05
        ),
        "step": (lambda: latest(run) > before, 0.3),
        "end": (lambda: any(run.glob(".model.*")) or latest(run) == STEPS, 0.05),
    }[moment]
    wait_until(job, reached)
    time.sleep(draw.uniform(0, pause))
    return job.agent.exitcode is None and len(rank_pids(job)) == RANKS


def signalled(site: Path, name: str, *, number: int, everyone: bool, times: int) -> tuple[int, int]:
    """Sends a signal to one rank or to all processes `times` times, and starts the run again after each."""
    draw, tried, again = random.Random(name), 0, 0
    moments = ("start", "save", "step", "save", "step", "end")
    for moment in moments[:times] if number == signal.SIGKILL else moments[1 : times + 1]:
        with launch(site, name) as job:
            if not await_moment(job, moment, draw):
                break
            victims = [job.agent.pid, *rank_pids(job)] if everyone else [draw.choice(rank_pids(job))]
            kill(victims, number)
            over(job)
        tried, again = tried + 1, again + lost(job.run)
        if number != signal.SIGKILL and not (job.run / "summary.json").exists():  # else it was the last
            sentence = f"interrupted after step {latest(job.run)}, all is saved; to go on: bash run.sh train"
            assert job.said().count(sentence) == 1 and not lost(job.run), f"{job.log}: not once {sentence!r}"
    go_on(site, name)
    return tried, again


@dataclass(frozen=True)
class World:
    """A kind of run that is killed at file events. after: whose finished run is in its directory before."""

    ranks: int
    settings: dict
    after: str = ""


WORLDS = {
    "one_rank": World(1, {}),
    "two_ranks": World(2, {}),
    "background": World(2, {"background_save": "true"}),
    "warm_up": World(1, {"model": "tiny", "tiny_hidden": 32, "warmup_steps": 3, "keep_checkpoints": 1}),
    "rare_saves": World(1, {"seed": 1, "save_every": 2, "keep_checkpoints": 1}),
    "replaced": World(1, {"resume": "false", "overwrite": "true"}, after="rare_saves"),
    "branch": World(1, {"resume": "true", "resume_step": 2, "lr": 1e-3}, after="one_rank"),
}


def start_world(site: Path, name: str, world: str, death: Death, **settings: object):
    """Starts a run of this world, the first time or again, with a death; to be entered like launch."""
    if WORLDS[world].after and not (site / name).exists():
        shutil.copytree(undisturbed(site, WORLDS[world].after)[0].run, site / name)
    settings = settings if "config" in settings else {"steps": 4, **WORLDS[world].settings, **settings}
    return launch(site, name, death, ranks=WORLDS[world].ranks, **settings)


@functools.cache
def undisturbed(site: Path, world: str) -> tuple[Job, int]:
    """A run of this world that nothing happened to, and how many file events each of its ranks had."""
    with start_world(site, f"whole_{world}", world, Death()) as job:
        ends(job)
    return job, [len(jobs.events(job, rank)) for rank in range(WORLDS[world].ranks)]


def ways(run: Path, world: str, odd: bool) -> list[dict]:
    """How a user starts a killed run again: each way only where the one before is refused, and names it."""
    resume, overwrite = {"resume": "true"}, {"resume": "false", "overwrite": "true"}
    if "resume_step" in WORLDS[world].settings:
        return [{}]
    if WORLDS[world].after:
        of_old = {"config": run / "config.yaml", "resume": "true"}
        return [of_old, overwrite] if odd and of_old["config"].exists() else [overwrite]
    names = ("step_*/manifest.json", "warmup/step_*/manifest.json", "warmup/model")
    saved = any(next(run.glob(name), None) for name in names)
    return [resume, overwrite] if saved else [overwrite, resume]


def start_again(site: Path, name: str, world: str, death: Death, odd: bool) -> Job:
    """Starts a killed run again as a user would, until it ends or dies; never is every way refused."""
    for way in ways(site / name, world, odd):
        with start_world(site, name, world, death, **way) as job:
            over(job)
        if not re.search(r"\berror: run_dir: .*(--overwrite true|without --resume)", job.said()):
            break
    return job


def file_event(
    site: Path, name: str, *, world: str, place: float, times: int, power: bool
) -> tuple[int, int]:
    """Kills a rank at a change of the run directory, first at this place of the run (0 to 1), then at any
    later one of the rest, and starts the run again after each. power: as a power cut.
    """
    draw, again, run = random.Random(name), 0, site / name
    whole, counts = undisturbed(site, world)
    rank = draw.randrange(len(counts))
    event, deaths = 1 + round(place * (counts[rank] - 1)), []

    def death(event: int) -> Death:
        return Death(event, rank, None if power else draw.choice((None, 0, 100)), power)

    try:
        with start_world(site, name, world, death(event)) as job:
            over(job)
        while event:
            lines = jobs.events(job, rank)
            assert job.agent.exitcode and len(lines) >= event, f"{job.log}: ended by itself"
            deaths.append(f"event {len(lines)} of rank {rank}: {lines[-1]}")
            again += 0 if WORLDS[world].after else lost(run)
            event = draw.randint(1, max(1, counts[rank] - event)) if len(deaths) < times else 0
            job = start_again(site, name, world, death(event), draw.random() < 0.5)
            if not job.agent.exitcode and len(deaths) < times:  # it was shorter than that
                event = 1 + event // 4
                job = start_again(site, name, world, death(event), odd=False)
        ends(job)
        old = "seed: 1\n" in (run / "config.yaml").read_text() and WORLDS[world].after
        jobs.same_as_undisturbed(site, run, f"whole_{WORLDS[world].after if old else world}")
    except AssertionError as failure:
        raise AssertionError(f"killed at {'; '.join(deaths)}: {failure}") from failure
    return times, again


def file_events(rounds: int, power: bool) -> dict[str, Case]:
    """So many kills, two to a run, over all worlds, and over the length of their runs."""
    cases, runs = {}, (rounds + 1) // 2
    worlds = [world for world in WORLDS if WORLDS[world].ranks == 1 or not power]  # a rank cuts its own power
    turns = -(-runs // len(worlds))
    for i in range(runs):
        world, times = worlds[i % len(worlds)], min(2, rounds - 2 * i)
        place = ((i // len(worlds)) / (turns - 1)) ** 2 if turns > 1 else 0.5  # more at the start
        cases[f"{world}_{i}"] = partial(file_event, world=world, place=place, times=times, power=power)
    return cases


def restarted(site: Path, name: str) -> tuple[int, int]:
    """Kills one rank under --max-restarts: torchrun starts all of them again by itself."""
    with launch(site, name, restarts=1) as job:
        assert await_moment(job, "save", random.Random(name)), f"{job.log}: ended too early"
        kill([rank_pids(job)[-1]])
        again = lost(job.run)
        ends(job)
    assert "going on from the last checkpoint" in job.said(), f"{job.log}: no restart"
    jobs.same_as_undisturbed(site, job.run)
    return 1, again


def hang(site: Path, name: str, *, moment: str) -> tuple[int, int]:
    """One rank stands still, its connections open: the others end in time, and say in which phase."""
    with launch(site, name, timeout_minutes=0.2) as job:
        wait_until(job, lambda: latest(job.run) > 0)
        assert await_moment(job, moment, random.Random(name)), f"{job.log}: ended too early"
        stopped = rank_pids(job)[-1]
        kill([stopped], signal.SIGSTOP)
        wait_until(job, lambda: "no progress for" in job.said())
        kill([stopped])  # torchrun would wait for it
        over(job)
    said, again = job.said(), lost(job.run)
    assert job.agent.exitcode and "no progress for" in said and "in phase " in said, f"{job.log}: no phase"
    go_on(site, name)
    return 1, again


def second_run(site: Path, name: str) -> tuple[int, int]:
    """A second run in a directory that is in use: refused, however it is started; the first takes no harm."""
    with launch(site, name) as first:
        wait_until(first, lambda: latest(first.run) > 0)
        ranks = rank_pids(first)
        kill(ranks, signal.SIGSTOP)  # so that it cannot end meanwhile
        for how in ({}, {"resume": "false"}, {"resume": "false", "overwrite": "true"}):
            with launch(site, f"{name}_second", run_dir=first.run, **how) as second:
                ends(second, f"is in use by process {ranks[0]} ", "choose another --run_dir")
        kill(ranks, signal.SIGCONT)
        ends(first)
    jobs.same_as_undisturbed(site, first.run)
    return 3, 0


def breaks(
    site: Path, name: str, *, fault: str, rank: int = -1, step: int = 3, says: tuple[str, ...] = (),
    skipped: tuple[int, ...] = (),
) -> tuple[int, int]:
    """Something breaks on a rank in a step: the run stops with a sentence (`says`), or ends well by itself.

    Where it stops in step 3 it goes on from step 2. skipped: the steps that are logged and had no update.
    """
    with launch(site, name, (fault, step, rank), keep_checkpoints=STEPS) as job:
        ends(job, *says)
    log = jobs.rows(job.run / "log.jsonl")[1:]
    assert tuple(row["step"] for row in log if row["updates_skipped_nonfinite"]) == skipped, f"{job.run}: log"
    again = lost(job.run)
    if not says:  # what was sampled up to this step is what the undisturbed run sampled
        mine, whole = (jobs.rows(run / "samples.jsonl") for run in (job.run, site / "whole"))
        pairs = [(a["completion"], b["completion"]) for a, b in zip(mine, whole) if b["step"] <= step]
        assert all(a == b for a, b in pairs), f"{job.run}: other samples"
    elif step:
        left = sorted(path.name for path in job.run.glob("step_*"))
        assert left == ["step_1", "step_2"] and latest(job.run) == 2, f"{job.run} holds {left}"
        go_on(site, name)
    return 1, again


def damaged(site: Path, name: str, *, pattern: str, damage: Callable[[Path], None]) -> tuple[int, int]:
    """A file of the newest checkpoint is damaged: refused by name; the one before is still good."""
    run = shutil.copytree(site / "whole", site / name)
    (run / "summary.json").unlink()  # or nothing would be left to do
    path = sorted((run / f"step_{STEPS}").glob(pattern))[-1]
    damage(path)
    with launch(site, name) as job:
        ends(job, f"step_{STEPS}/{path.name}", f"--resume_step {STEPS - 1}")
    assert not (path.parent / "executed").exists(), "a pickle in a checkpoint was executed"
    go_on(site, name, resume_step=STEPS - 1)
    return 1, 1


def foreign(site: Path, name: str, *, change: Callable[[Path], None], says: str) -> tuple[int, int]:
    """A start model with pickled weights only, or one that brings code: refused, and nothing is executed."""
    model = shutil.copytree(site / "start/model", site / f"{name}_model")
    change(model)
    with launch(site, name, model=model) as job:
        ends(job, says)
    assert not (model / "executed").exists(), "what came with a model was executed"
    return 1, 0


def flip(path: Path) -> None:
    """Inverts one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Leaves the first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pickle_into(path: Path) -> None:
    """A pickle that makes a file when it is opened, as it could do anything else."""
    path.write_bytes(f"cbuiltins\nopen\n(V{path.with_name('executed')}\nVw\ntR.".encode())


def pickle_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    pickle_into(model / "pytorch_model.bin")


def add_code(model: Path) -> None:
    (model / "evil.py").write_text(f"open({str(model / 'executed')!r}, 'w')\nclass Evil: pass\n")
    names = dict.fromkeys(["AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"], "evil.Evil")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "evil", "architectures": ["Evil"], "auto_map": names}
    (model / "config.json").write_text(json.dumps(config))


def in_runs(case: Callable, rounds: int, most: int, **options: object) -> dict[str, Case]:
    """`rounds` kills or signals, as runs that go through up to `most` of them each."""
    sizes = [min(most, rounds - start) for start in range(0, rounds, most)]
    return {f"{i}": partial(case, times=size, **options) for i, size in enumerate(sizes)}


def all_cases(rounds: int) -> dict[str, dict[str, Case]]:
    """Every fault of the drill with its cases."""
    unsaved, shard = "step_3 was not saved", "*.safetensors"
    nan_says = ("steps 1 to 5 had NaN", "lower lr", "nonfinite_step_5.jsonl")
    return {
        "kill_one": in_runs(signalled, rounds, 6, number=signal.SIGKILL, everyone=False),
        "kill_all": in_runs(signalled, rounds, 6, number=signal.SIGKILL, everyone=True),
        "file_event": file_events(rounds, power=False),
        "power_cut": file_events(rounds, power=True),
        "restart": {"one": restarted},
        "sigterm": in_runs(signalled, rounds, 2, number=signal.SIGTERM, everyone=True),
        "sigint": in_runs(signalled, rounds, 2, number=signal.SIGINT, everyone=False),
        "nonfinite": {
            "once": partial(breaks, fault="nan", skipped=(3,)),
            "in_a_row": partial(breaks, fault="nan", step=0, says=nan_says, skipped=(1, 2, 3, 4)),
        },
        "disk": {
            "full": partial(breaks, fault="no_space", rank=0, says=(unsaved, "make room", "step_2")),
            "full_late": partial(breaks, fault="no_space_late", says=(unsaved, "File too large", "step_2")),
            "log_full": partial(breaks, fault="log_full", rank=0, says=("No space left", ".jsonl")),
            "read_only": partial(breaks, fault="read_only", rank=0, says=(unsaved, "Read-only file system")),
        },
        "damaged": {
            "shard_cut": partial(damaged, pattern=shard, damage=cut),
            "shard_flipped": partial(damaged, pattern=shard, damage=flip),
            "shard_gone": partial(damaged, pattern=shard, damage=Path.unlink),
            "shard_pickled": partial(damaged, pattern=shard, damage=pickle_into),
            "state_cut": partial(damaged, pattern="state.json", damage=cut),
            "state_flipped": partial(damaged, pattern="state.json", damage=flip),
            "manifest_cut": partial(damaged, pattern="manifest.json", damage=cut),
            "manifest_flipped": partial(damaged, pattern="manifest.json", damage=flip),
        },
        "hang": {moment: partial(hang, moment=moment) for moment in ("step", "save")},
        "out_of_memory": {
            "update": partial(breaks, fault="memory_update", says=("phase update of step 3", "lower ")),
            "rollout": partial(breaks, fault="memory_rollout"),
        },
        "two_runs": {"second_run": second_run},
        "untrusted": {
            "pickled_model": partial(foreign, change=pickle_weights, says="no .safetensors files"),
            "remote_code": partial(foreign, change=add_code, says="code of its own"),
        },
    }


def main() -> None:
    """The whole drill, or a part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=int, default=10, help="kills and signals of each kind (default: %(default)s)")
    add("--only", help="names of faults, comma-separated; default: all")
    options = parser.parse_args()
    cases, figures, began = all_cases(options.rounds), {}, time.monotonic()
    site = jobs.open_site(Path(tempfile.mkdtemp(prefix="drill_")))
    for fault in options.only.split(",") if options.only else cases:
        row, start = dict.fromkeys(("tried", "survived", "lost_steps"), 0), time.monotonic()
        for label, case in cases[fault].items():
            try:
                tried, again = case(site, f"{fault}_{label}")
            except AssertionError as failure:
                row["tried"] += 1
                print(f"{fault}, {label}: {failure}", file=sys.stderr)
            else:
                row["tried"] += tried
                row["survived"] += tried
                row["lost_steps"] += again
        figures[fault] = row
        print(f"{fault:<14}{row} in {time.monotonic() - start:.0f} s", flush=True)
    failed = any(row["survived"] < row["tried"] for row in figures.values())
    if failed:
        print(f"runs and logs: {site}", file=sys.stderr)
    else:
        shutil.rmtree(site, ignore_errors=True)
    result = {"bench": "drill", "rounds": options.rounds, "faults": figures, "ranks": RANKS}
    print(json.dumps(result | {"seconds": round(time.monotonic() - began)}))
    sys.exit(failed)


if __name__ == "__main__":
    main()
