"""The faults of faults.py: how each is brought about, and what shows that it was survived."""

from __future__ import annotations

import json
import random
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fault_runs import (
    STEPS,
    Job,
    Site,
    ended,
    ends_well,
    expect,
    finish,
    is_refused,
    kill,
    latest,
    launch,
    logged,
    rank_pids,
    rows,
    said,
    same_as_undisturbed,
    wait_until,
)

# A case gets a site and the name of its run; it returns (faults tried, steps done again) or raises Failed.
Case = Callable[[Site, str], tuple[int, int]]
MOMENTS = ("start", "save", "step", "save", "step", "end")  # of the kills that one run goes through


# ------------------------------------------------------------------------------- kills and signals, at random


def await_moment(job: Job, moment: str, draw: random.Random) -> bool:
    """Waits for a random moment of this kind; whether the run still goes on."""
    before, run = latest(job.run), job.run
    pause = draw.uniform(0, 0.05)
    if moment == "start":  # before there is any checkpoint
        wait_until(job, lambda: rank_pids(job))
        pause = draw.uniform(0, 1.0 if job.process is None else 8.0)
    elif moment == "save":  # while its files are written, and as they are renamed
        wait_until(job, lambda: latest(run) > before and any(run.glob("step_*.tmp")))
    elif moment == "step":
        wait_until(job, lambda: latest(run) > before)
        pause = draw.uniform(0, 0.3)
    elif moment == "end":  # while the final model is written
        wait_until(job, lambda: (run / "model.tmp").exists() or latest(run) == STEPS)
    time.sleep(pause)
    return ended(job) is None


def again(run: Path) -> dict[str, object]:
    """The switch with which a user would start this run once more."""
    if (run / "latest").exists():
        return {"resume": "true"}
    return {"overwrite": "true"} if run.exists() else {}


def kill_chain(site: Site, name: str, *, everyone: bool, kills: int, seed: int) -> tuple[int, int]:
    """Kills a run at `kills` moments, resuming it after each; then it must end like an undisturbed one."""
    draw, run, tried, lost = random.Random(f"{seed}/{name}"), site.folder / name, 0, 0
    for moment in MOMENTS[:kills]:
        with launch(site, name, **again(run)) as job:
            if await_moment(job, moment, draw):
                pids = rank_pids(job)
                victims = [job.pid, *pids] if everyone else draw.sample(pids, min(1, len(pids)))
                kill(job, victims, signal.SIGKILL)
                tried += bool(victims)
                finish(job, 90)  # the other ranks notice, and torchrun ends
        lost += max(0, logged(run) - max(0, latest(run)))
    with launch(site, name, **again(run)) as job:
        ends_well(job)
    same_as_undisturbed(site, run)
    return tried, lost


def restart(site: Site, name: str, *, kills: int, seed: int) -> tuple[int, int]:
    """Kills one rank again and again under --max-restarts: torchrun starts all of them again, and the run
    goes on.
    """
    draw, run, lost, done = random.Random(f"{seed}/{name}"), site.folder / name, 0, 0
    with launch(site, name, restarts=kills) as job:
        for _ in range(kills):
            if not await_moment(job, draw.choice(["save", "step"]), draw) or latest(run) == STEPS:
                finish(job)
                break
            old = rank_pids(job)
            kill(job, draw.sample(old, 1))
            done += 1
            lost += max(0, logged(run) - latest(run))
            wait_until(
                job, lambda old=old: len(pids := rank_pids(job)) == site.ranks and not {*pids} & {*old}, 90
            )
        ends_well(job)
    expect(said(job).count("going on from the last checkpoint") == done, "not every restart went on", job)
    same_as_undisturbed(site, run)
    return done, lost


def stop_chain(site: Site, name: str, *, number: int, kills: int, seed: int) -> tuple[int, int]:
    """Sends a signal to the agent and to one rank in turn, resuming after each: all ranks stop together, all
    is saved.
    """
    draw, run, lost, tried = random.Random(f"{seed}/{name}"), site.folder / name, 0, 0
    for turn in range(kills):
        with launch(site, name, **again(run)) as job:
            if not await_moment(job, draw.choice(["save", "step"]), draw) or latest(run) == STEPS:
                finish(job)
                break
            # Not to rank 0: the one that speaks must hear of it from another.
            target = job.pid if turn % 2 == 0 else rank_pids(job)[-1]
            kill(job, [target], number)
            finish(job, 90)
            if (run / "summary.json").exists():  # the signal came with the last step
                break
            who = "the agent" if target == job.pid else "one rank"
            sentences = said(job).count("all is saved; to go on: bash run.sh train")
            what = f"{signal.Signals(number).name} to {who}"
            expect("lost the other processes" not in said(job), f"{what} stopped it alone", job)
            expect(sentences == 1, f"{what}: {sentences} lines say how to resume", job)
            expect(
                f"interrupted after step {latest(run)}," in said(job), "the sentence names another step", job
            )
            lost += logged(run) - latest(run)
            expect(logged(run) == latest(run), f"step {logged(run)} was done, and step {latest(run)} saved")
            tried += 1
    with launch(site, name, **again(run)) as job:
        ends_well(job)
    same_as_undisturbed(site, run)
    return tried, lost


# --------------------------------------------------------------------------------------------- numerics, disk


def nan_once(site: Site, name: str) -> tuple[int, int]:
    """NaN in the loss of one rank in one step: that update is left out on all ranks, and counted."""
    with launch(site, name, ("nan", 3, site.ranks - 1)) as job:
        ends_well(job)
    skipped = [row["updates_skipped_nonfinite"] for row in rows(job.run / "log.jsonl")[1:]]
    expect(
        skipped == [int(step == 3) for step in range(1, STEPS + 1)], f"skipped updates per step: {skipped}"
    )
    return 1, 0


def nan_in_a_row(site: Site, name: str) -> tuple[int, int]:
    """NaN in every step: the run stops with the batch saved, and can go on once the cause is gone."""
    with launch(site, name, ("nan", 0, site.ranks - 1), max_failed_steps=3) as job:
        is_refused(job, "steps 1 to 3 had NaN", "lower lr", "nonfinite_step_3.jsonl")
    batch = rows(job.run / "nonfinite_step_3.jsonl")
    expect(batch and all("completion" in row for row in batch), "the batch was not saved")
    lost = logged(job.run) - latest(job.run)
    with launch(site, name, resume="true") as job:
        ends_well(job)
    expect(
        [row["step"] for row in rows(job.run / "log.jsonl")] == list(range(STEPS + 1)), "a step is missing"
    )
    return 1, lost


def save_fails(site: Site, name: str, *, fault: str, rank: int, why: str, go_on: bool) -> tuple[int, int]:
    """A checkpoint that cannot be written: the one before stays; the run stops with a sentence, or goes on
    and warns.
    """
    step, setting = 3, "go_on" if go_on else "stop"
    with launch(
        site, name, (fault, step, rank % site.ranks), keep_checkpoints=STEPS
    ) as job:
        if not go_on:
            is_refused(job, "step_3 was not saved", why, "complete ones: step_1, step_2")
        else:
            ends_well(job)
            warned = [
                line
                for line in said(job).splitlines()
                if "warning: " in line and "step_3 was not saved" in line
            ]
            expect(len(warned) == 1 and why in warned[0], "no warning, or more than one", job)
    left = sorted(path.name for path in job.run.glob("step_*"))
    there = [f"step_{n}" for n in range(1, STEPS + 1) if n != step and (go_on or n < step)]
    expect(left == there, f"the run holds {left} instead of {there}")
    lost = 0 if go_on else logged(job.run) - latest(job.run)
    expect(latest(job.run) == (STEPS if go_on else step - 1), f"latest names step_{latest(job.run)}")
    if not go_on:
        with launch(site, name, resume="true") as job:
            ends_well(job)
    same_as_undisturbed(site, job.run)
    return 1, lost


def log_full(site: Site, name: str) -> tuple[int, int]:
    """A full disk met by the log: half a line is written. The run stops with a sentence, and the half line
    does no harm.
    """
    with launch(site, name, ("log_full", 3, 0)) as job:
        is_refused(job, "No space left", "log.jsonl")
    lost = max(0, logged(job.run) - latest(job.run))
    with launch(site, name, resume="true") as job:
        ends_well(job)
    same_as_undisturbed(site, job.run)
    return 1, lost


# ------------------------------------------------------------------------------------- damaged, foreign files


def flip(path: Path) -> None:
    """Inverts one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Leaves the first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damaged(site: Site, name: str, *, pattern: str, damage: Callable[[Path], None]) -> tuple[int, int]:
    """One file of the newest checkpoint is damaged: refused by name; from the one before the run goes on."""
    run = site.folder / name
    shutil.copytree(site.folder / "whole", run)
    path = sorted((run / f"step_{STEPS}").glob(pattern))[-1]
    damage(path)
    with launch(site, name, resume="true") as job:
        is_refused(job, f"step_{STEPS}/{path.name}", f"--resume_step {STEPS - 1}")
    with launch(site, name, resume="true", resume_step=STEPS - 1) as job:
        ends_well(job)
    same_as_undisturbed(site, run)
    return 1, 1


class Bomb:
    """Unpickling it makes a file, as it could do anything else."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def bomb(path: Path, mark: Path) -> None:
    """A pickle, under a name that stands for something else."""
    import pickle

    path.write_bytes(pickle.dumps(Bomb(mark)))


def pickle_in_checkpoint(site: Site, name: str) -> tuple[int, int]:
    """Pickles in the place of a checkpoint's files, the manifest made to fit them: refused, and not
    executed.
    """
    import hashlib

    run, mark = site.folder / name, site.folder / f"{name.replace('/', '_')}.executed"
    shutil.copytree(site.folder / "whole", run)
    folder = run / f"step_{STEPS}"
    shard = sorted(folder.glob("*.safetensors"))[0]
    for path in (
        shard,
        folder / ".metadata",
        folder / "__0_0.distcp",
        folder / "optimizer.pt",
        run / "training_args.bin",
    ):
        bomb(path, mark)
    manifest = json.loads((folder / "manifest.json").read_text())
    data = shard.read_bytes()
    manifest["files"][shard.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del manifest["sha256"]
    manifest = {
        "sha256": hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest(),
        **manifest,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with launch(site, name, resume="true") as job:
        is_refused(job, f"step_{STEPS}", f"--resume_step {STEPS - 1}")
    bomb(folder / "state.json", mark)
    with launch(site, name, resume="true") as job:
        is_refused(job, "state.json", f"--resume_step {STEPS - 1}")
    expect(not mark.exists(), "a pickle in a checkpoint was executed")
    return 2, 0


def foreign_model(site: Site, name: str, *, remote_code: bool) -> tuple[int, int]:
    """A start model with pickled weights only, or one that brings code: refused, and nothing of it is
    executed.
    """
    mark, model = (
        site.folder / f"{name.replace('/', '_')}.executed",
        site.folder / f"{name.replace('/', '_')}.model",
    )
    shutil.copytree(site.folder / "start/model", model)
    if remote_code:
        code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        (model / "evil.py").write_text(code + "class Evil: pass\n")
        config = json.loads((model / "config.json").read_text()) | {
            "model_type": "evil",
            "architectures": ["Evil"],
        }
        config["auto_map"] = dict.fromkeys(
            ["AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"], "evil.Evil"
        )
        (model / "config.json").write_text(json.dumps(config))
        reason = "custom code"
    else:
        (model / "model.safetensors").unlink()
        bomb(model / "pytorch_model.bin", mark)
        reason = "no .safetensors files"
    with launch(site, name, model=model) as job:
        is_refused(job, reason)
    expect(not mark.exists(), "what came with a model was executed")
    return 1, 0


# ------------------------------------------------------------------------------------- hang, memory, two runs


def hang(site: Site, name: str, *, moment: str, seed: int) -> tuple[int, int]:
    """One rank stands still, without an error and without a closed connection: the others end in time, and
    say where.
    """
    draw, minutes = random.Random(f"{seed}/{name}"), 0.1 if site.server else 0.25
    with launch(site, name, timeout_minutes=minutes) as job:
        wait_until(job, lambda: latest(job.run) > 0)
        expect(await_moment(job, moment, draw), "the run ended before a rank could be stopped", job)
        kill(job, [rank_pids(job)[-1]], signal.SIGSTOP)
        began = time.monotonic()
        code = finish(job, 60 * 1.1 * minutes + 60)  # and torchrun's patience with the one that stands still
        print(f"  hang in {moment}: over after {time.monotonic() - began:.0f} s", file=sys.stderr)
        expect(code != 0, "a run with a hanging rank ended well", job)
        expect("no progress for" in said(job) and "in phase " in said(job), "the phase is not named", job)
    lost = max(0, logged(job.run) - latest(job.run))
    with launch(site, name, resume="true") as job:
        ends_well(job)
    same_as_undisturbed(site, job.run)
    return 1, lost


def nearly_as_undisturbed(site: Site, run: Path) -> None:
    """Raises Failed unless the weights are those of the undisturbed run up to rounding: sums were taken in
    another order.
    """
    ours, theirs = (floats(folder / "model/model.safetensors") for folder in (run, site.folder / "whole"))
    furthest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    expect(furthest < 1e-3, f"weights differ by {furthest:.2g} from the undisturbed run's")


def floats(path: Path) -> tuple[float, ...]:
    """All numbers of a file of fp32 tensors."""
    data = path.read_bytes()
    body = data[8 + struct.unpack("<Q", data[:8])[0] :]
    return struct.unpack(f"<{len(body) // 4}f", body)


def memory_update(site: Site, name: str, *, restarts: int) -> tuple[int, int]:
    """Out of memory in an update: the setting is named, and the next start, by hand or by torchrun, takes
    half of it.
    """
    with launch(site, name, ("memory_update", 3, site.ranks - 1), restarts=restarts) as job:
        if restarts:
            ends_well(job)
        else:
            code = finish(job, 120)
            expect(
                code == 1 and (job.run / "out_of_memory.json").exists(),
                f"ended with {code}, or without a note", job,
            )
        sentence = f"out of GPU memory on rank {site.ranks - 1} in phase update of step 3"
        expect(sentence in said(job) and "lower" in said(job), "the setting to lower is not named", job)
    if not restarts:
        with launch(site, name, resume="true") as job:
            ends_well(job)
    expect("going on with max_tokens_per_micro_batch 512" in said(job), "the micro-batch was not halved", job)
    nearly_as_undisturbed(site, job.run)
    return 1, 0


def memory_rollout(site: Site, name: str) -> tuple[int, int]:
    """Out of memory in a rollout: fewer sequences at once, and the run goes on."""
    with launch(site, name, ("memory_rollout", 3, site.ranks - 1)) as job:
        ends_well(job)
    nearly_as_undisturbed(site, job.run)
    return 1, 0


def second_run(site: Site, name: str) -> tuple[int, int]:
    """A second run in a directory that is in use: refused, however it is started, and the first takes no
    harm.
    """
    with launch(site, name) as first:
        wait_until(first, lambda: latest(first.run) > 0)
        ranks = rank_pids(first)
        kill(first, ranks, signal.SIGSTOP)  # so that it cannot end meanwhile
        for i, switch in enumerate(({}, {"resume": "true"}, {"overwrite": "true"})):
            with launch(site, f"{name}_second{i}", run_dir=first.run, **switch) as second:
                is_refused(second, f"is in use by process {ranks[0]} ", "choose another --run_dir")
        kill(first, ranks, signal.SIGCONT)
        ends_well(first)
    same_as_undisturbed(site, first.run)
    return 3, 0


def changed_config(site: Site, name: str) -> tuple[int, int]:
    """Settings that a resumed run must share with its first part: refused with the differences; others are
    told.
    """
    run = site.folder / name
    shutil.copytree(site.folder / "whole", run)
    with launch(site, name, resume="true", group_size=8, seed=7, lr=1e-3) as job:
        is_refused(job, "group_size 4 -> 8", "seed 0 -> 7")
        expect("lr" not in said(job), "lr may change", job)
    with launch(site, name, resume="true", lr=1e-3) as job:
        ends_well(job)
    expect("resume: lr 0.0005 -> 0.001" in said(job), "the difference is not shown", job)
    return 1, 0
