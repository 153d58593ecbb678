"""One run, one folder: claimed and locked, with what it takes to trace the run to its code and settings."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from array import array
from collections import ChainMap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from config import Config, ConfigError
from corpus.examples import Example
from corpus.sources import file_sha256, write_atomic, written_beside
from distributed.checkpoint import (
    CheckpointError,
    choose_step,
    complete_steps,
    latest_checkpoint,
    step_to_choose,
)
from distributed.ranks import Ranks, first_problem, torchrun_job
from distributed.weights import weight_files


def open_run(config: Config, ranks: Ranks) -> Path:
    """Collective. Claims run_dir and locks it; sets aside what `overwrite` replaces, until the run can start.

    Processes that torchrun started again (--max-restarts) go on with their run. Raises ConfigError when
    another process has the directory, when it holds a run and neither resume nor overwrite is set, or when
    something in it is a link.
    """
    path, problem = Path(config.run_dir), ""
    if ranks.main:
        try:
            problem = _claim(path, config)
        except OSError as error:
            problem = f"run_dir: cannot use {path}: {error.strerror}"
    if problem := first_problem(problem, ranks):
        raise ConfigError(problem)
    return path


# What a resumed run must share with its first part; steps, rates, saving, speed and the like may change.
# Files may lie elsewhere: their content counts (describe_inputs).
FIXED_KEYS = (
    "test_share data_from data_to seed prompts_per_step group_size minibatch_prompts temperature loss "
    "advantage aggregation kl correction reward lenient shuffle_rewards skip_zero_variance mask_truncated "
    "resample_rounds max_prompt_tokens max_response_tokens num_iterations overlong_tokens eval_cases "
    "warmup_steps sft_batch sft_reason synthetic_flaws synthetic_thoughts synthetic_train "
    "chat_template_kwargs lora_rank lora_alpha lora_targets"
).split()
# Whoever starts from a run's config.yaml must not delete or continue that run by accident.
SWITCHES = {"resume": False, "overwrite": False, "resume_step": 0, "accept_changes": False}
# What failed at start leaves these behind, some as NAME.tmp, and may be started again under the same name.
START_FILES = {"config.yaml", "git.txt", "lock", "tensorboard", "wandb", "wandb_id.txt"}
OLD = "overwritten"  # what a new run replaces, until it can start


def can_resume(path: Path) -> bool:
    """Whether a run can go on from what is saved in its folder."""
    warm = path / "warmup"
    return bool(complete_steps(path) or complete_steps(warm)) or (warm / "model").exists()


def _claim(path: Path, config: Config) -> str:
    """Makes the run directory for this run, and locks it; returns why it cannot, or ""."""
    if link := _first_link(path):
        return f"run_dir: {link} is a link, which a run would write through; remove it"
    lock = path / "lock"
    free, owner = take_lock(lock) if lock.exists() else (True, "")
    if not free:
        return _in_use(path, owner)
    # A start that was refused left no lock of its own: starting it again must not make it go on with
    # another's run. The count of restarts would not tell, and is not the same on all nodes.
    again = "TORCHELASTIC_RUN_ID" in os.environ and owner.endswith(f"\n{torchrun_job()}\n")
    if not again:
        put_back(path)  # of a start that was killed
    started = can_resume(path)
    names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    left = {name.removesuffix(".tmp") for name in names} - START_FILES
    overwrite = bool(left) and not config.resume and not again
    if again:
        print(f"restarted: going on from {'the last checkpoint' if started else 'the beginning'}")
    if config.resume and config.overwrite and not again:
        return "resume, overwrite: a run is gone on with or replaced; choose one of them"
    if config.resume and not again and not started:
        return f"run_dir: {path} has no checkpoint to resume; start without --resume"
    # A start that was killed before it wrote these two has signed its lock, and made a first model at most.
    a_run = {"config.yaml", "git.txt"} <= names or (left <= {"warmup"} and owner.startswith("process "))
    if overwrite and (problem := _overwriting(path, config, a_run)):
        return problem
    path.mkdir(parents=True, exist_ok=True)
    free, owner = take_lock(lock)
    if not free:  # another run started here at the same moment
        return _in_use(path, owner)
    for pattern in ("*.tmp", "warmup/*.tmp", ".[0-9]*.*"):  # of a kill; the last: of written_beside
        for leftover in list(path.glob(pattern)):
            remove(leftover)
    if overwrite:
        _set_aside(path)
    take_lock(lock, sign=True)  # only now: a start that dies before, torchrun does over
    return ""


def _first_link(path: Path) -> Path | None:
    """A symbolic link in the run directory. W&B makes some in its own folder, which we do not write."""
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            if (Path(folder) / name).is_symlink():
                return Path(folder) / name
        folders[:] = [name for name in folders if name != "wandb"]
    return None


def remove(path: Path) -> None:
    """Deletes a file, or a folder with all that is in it. Follows no link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# Overwriting in three renames, so that a kill leaves the old run or the new one, and never parts of both:
# overwritten.tmp while it is filled, overwritten until the new run has its weights, overwritten.old.tmp then.


def _set_aside(path: Path) -> None:
    moving = path / f"{OLD}.tmp"
    moving.mkdir()
    for entry in [entry for entry in path.iterdir() if entry.name not in ("lock", moving.name)]:
        entry.rename(moving / entry.name)
    moving.rename(path / OLD)


def put_back(path: Path) -> None:
    """Restores the run that a start was to overwrite and did not, if there is one."""
    aside, moving = path / OLD, path / f"{OLD}.tmp"
    if aside.exists():
        for entry in [entry for entry in path.iterdir() if entry.name not in ("lock", OLD)]:
            remove(entry)
        if (path / "lock").exists():  # torchrun's restart would take the old run for its own
            os.truncate(path / "lock", 0)
        aside.rename(moving)
    if moving.exists():
        for entry in list(moving.iterdir()):
            entry.rename(path / entry.name)
        moving.rmdir()


def let_go(path: Path, ranks: Ranks) -> None:
    """The new run can start: what it replaces is deleted."""
    if ranks.main and (path / OLD).exists():
        (path / OLD).rename(path / f"{OLD}.old.tmp")
        shutil.rmtree(path / f"{OLD}.old.tmp")


@contextmanager
def replacing(path: Path, ranks: Ranks) -> Iterator[None]:
    """Where a new run sets up. If that fails, what it was to overwrite is there again."""
    try:
        yield
    except BaseException:
        if ranks.main:
            put_back(path)
        raise


def hash_model(path: str, ranks: Ranks) -> dict:
    """Collective. A start model's folder (or hub id), and SHA-256 of its files; each rank reads some."""
    folder = weight_files(path)[0].parent
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json", ".jinja"))
    own = {file.name: file_sha256(file) for file in files[ranks.rank :: ranks.world]}
    return {"start": path, "model": dict(ChainMap(*ranks.gather(own)))}


def start_of(run: dict, folder: Path) -> str:
    """The model that a run started from, as its checkpoints have it in state["run"], now that the run is in
    this folder.
    """
    start, home = Path(run["start"]), run["settings"]["run_dir"]
    return str(folder / start.relative_to(home)) if start.is_relative_to(home) else run["start"]


def identity_of(config: Config, method: str, read: Any, path: str, ranks: Ranks) -> dict:
    """Collective. What a run is: its method ("grpo" or "sft") and settings, and SHA-256 of its inputs and of
    its start model in `path`. read: session.Inputs.

    The prompts are hashed as token ids, so that every part of the chat template and the tokenizer counts.
    """
    held_out = [example for examples in read.splits.held_out.values() for example in examples]
    file = config.reward.rpartition(":")[0]
    inputs = {
        "data": _digest(map(_example_bytes, read.splits.train)),
        "test_data": _digest(map(_example_bytes, held_out)),
        "prompt_template": _digest([read.template.encode()]),
        "prompts as token ids": _digest(array("q", item.ids).tobytes() for item in read.tokenized.train),
        "the reward's file": file_sha256(Path(file).expanduser()) if file else "",
    }
    if config.reference:
        files = hash_model(config.reference, ranks)["model"]
        inputs |= {f"the reference's {name}": sha for name, sha in files.items()}
    run = {"method": method, "settings": settings_of(config), "inputs": inputs}
    return run | hash_model(path, ranks)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _example_bytes(example: Example) -> bytes:
    """All that training reads of an example. repr: its dictionaries come from JSON, in the file's order."""
    content = (example.id, example.messages, example.tools, example.answer, example.demonstrations)
    return repr(content).encode("utf-8", "surrogatepass")


def settings_of(config: Config) -> dict:
    """The settings that a run keeps."""
    return dataclasses.asdict(config) | SWITCHES


def begin_or_resume(config: Config, identity: dict, ranks: Ranks) -> None:
    """Collective. Compares a run that goes on with its checkpoint, which resume_step may choose.

    identity: of this start, by identity_of; every checkpoint carries it. "changes" is added: what the resumes
    so far have changed. Raises ConfigError, before anything is written, where the run would be another one.
    """
    path, problem = Path(config.run_dir), ""
    if ranks.main:
        try:
            problem = _compare(path, config, identity)
        except CheckpointError as error:
            problem = str(error)
    if problem := first_problem(problem, ranks):
        raise ConfigError(problem)
    choose_step(path, config.resume_step, ranks)


def write_start(path: Path, identity: dict, ranks: Ranks) -> None:
    """Collective. config.yaml and git.txt of a run that begins or goes on."""
    if ranks.main:
        text = yaml.safe_dump(identity["settings"], sort_keys=False, allow_unicode=True)
        write_atomic(path / "config.yaml", text)
        _note_code(path / "git.txt")
    ranks.gather(None)


def _compare(path: Path, config: Config, now: dict) -> str:
    """Why the run in this folder cannot go on as this one, or ""; says what has changed and may."""
    now["changes"] = []
    if not can_resume(path):
        return ""
    found = latest_checkpoint(path, step_to_choose(path, config.resume_step))
    warm = latest_checkpoint(path / "warmup") if not found else None
    if not (found or warm):
        return f"run_dir: {path}/warmup/model is there without its checkpoints; start with --overwrite true"
    state = (found or warm)[1]
    if "run" not in state:
        return f"resume: the checkpoint of step {state['step']} in {path} does not say what it belongs to"
    before = state["run"]
    if before["method"] != now["method"]:
        return f"run_dir: {path} is a run of {before['method']}.py; go on with that script"
    start = start_of(before, path)
    if found and Path(start).is_relative_to(path) and not Path(start).exists():
        return f"run_dir: {start}, which this run started from, is gone; put it back"
    # a setting that is newer than the run had its default then
    settings = dataclasses.asdict(Config()) | before["settings"]
    free = {
        key: f"{key} {settings[key]!r} -> {value!r}"
        for key, value in now["settings"].items() if settings[key] != value and key != "run_dir"
    }
    fixed = [free.pop(key) for key in FIXED_KEYS if key in free]
    old, new = before["inputs"], now["inputs"]
    # What follows a warm-up starts from another model than the warm-up's own checkpoints.
    if found or not (path / "warmup" / "model").exists():
        old = old | {f"{now['start']}/{name}": sha for name, sha in before["model"].items()}
        new = new | {f"{now['start']}/{name}": sha for name, sha in now["model"].items()}
    inputs = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if (fixed or inputs) and not config.accept_changes:  # another seed, say, is other data too
        what = f"step {state['step']} was trained with other ones of these: {', '.join(fixed or inputs)}"
        return f"resume: {what}; put them back, or go on with --accept_changes true"
    now["changes"] += before["changes"]
    if changes := ", ".join([*fixed, *inputs, *free.values()]):
        now["changes"].append(f"after step {state['step']}: {changes}")
        print(f"resume: {changes}")
    return ""


def _note_code(path: Path) -> None:
    """Writes git.txt, for its owner only. A resume by other code is added to what is there."""
    now = git_state()
    said = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if said.endswith(now):
        return
    heading = f"\nresumed on {time.strftime('%Y-%m-%d %H:%M:%S')} with\n" if said else ""
    write_atomic(path, said + heading + now, 0o600)


def _in_use(path: Path, owner: str) -> str:
    who = owner.partition("\n")[0] or "another process"
    return f"run_dir: {path} is in use by {who}; stop that run first, or choose another --run_dir"


def _overwriting(path: Path, config: Config, a_run: bool) -> str:
    """Why what is in the run directory may not be replaced, or "". a_run: whether a run has made it."""
    if not config.overwrite:
        hint = "--resume true to go on, " if can_resume(path) else ""
        return f"run_dir: {path} exists; add {hint}--overwrite true to replace it, or another --run_dir"
    if not a_run:
        return f"run_dir: {path} is not a run directory, so it is not overwritten; delete it yourself"
    for key in ("model", "reference", "data", "test_data", "prompt_template", "reward", "bfcl", "apibank"):
        for name in getattr(config, key).split(","):
            file = Path(name.rpartition(":")[0] if key == "reward" else name.strip()).expanduser().resolve()
            if path.resolve() in file.parents:
                return f"{key}: {name} lies in {path}, which would be overwritten; choose another run_dir"
    for lock in path.rglob("*/lock"):  # runs inside, like the demo's sft/
        free, owner = take_lock(lock)
        if not free:
            return _in_use(lock.parent, owner)
    return ""


def git_state() -> str:
    """The commit and what differs from it, so that a run can be traced to its code."""
    here = Path(__file__).parents[1]

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, errors="replace")

    commit = run("rev-parse", "HEAD")
    if commit.returncode:
        return "no git repository\n"
    return f"commit {commit.stdout}{run('status', '--short').stdout}{run('diff', 'HEAD').stdout}"


def cut_log(path: Path, step: int, rows: int = 0) -> int:
    """Drops rows of steps after `step`, which a resumed run does again; returns how many rows are left.

    Says so where they are fewer than `rows`, the number at the checkpoint: after a power cut, or by hand.
    """
    kept = 0
    if path.exists():
        with written_beside(path, f"{path.name}.tmp") as shorter:
            with path.open("rb") as old, shorter.open("wb") as new:  # samples may fill gigabytes
                for line in old:
                    if _step_of(line) <= step:
                        new.write(line)
                        kept += 1
    if kept < rows:
        print(f"{path}: {rows - kept} of {rows} rows are lost or damaged; training goes on without them")
    return kept


def _step_of(line: bytes) -> float:
    """The step of a row; infinity for a line that was cut off or damaged."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def take_lock(path: Path, sign: bool = False) -> tuple[bool, str]:
    """Locks the file for this process until it ends -> (whether it is ours now, what the file said before).

    sign: it then names this process in its first line, and torchrun's job in the second, also after a power
    cut. The kernel drops the lock with the process, however that died. lockf() and not flock(): forked
    children do not keep it, and this process may ask again. The descriptor stays open on purpose, and nothing
    else here may open the file: closing either drops the lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    said = os.pread(descriptor, 1000, 0).decode("utf-8", "replace")
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False, said
    except OSError as error:
        said_why = f"{path}: this file system has no locks ({error.strerror}); start no second run there"
        print(said_why, file=sys.stderr)
    if sign:
        owner = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{owner}\n{torchrun_job()}\n".encode(), 0)
        os.fsync(descriptor)
    return True, said
