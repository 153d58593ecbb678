"""One run, one folder: claimed and locked, with what it takes to trace the run to its code and settings."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from config import Config, ConfigError
from distributed.ranks import Ranks, first_problem, torchrun_job


def open_run(config: Config, ranks: Ranks) -> Path:
    """Collective. Makes run_dir with config.yaml and git.txt, or checks that it may be resumed, and locks it.

    Processes that torchrun started again (--max-restarts) go on with their run. Raises ConfigError when
    another process has the directory, or when it holds a run and neither resume nor overwrite is set.
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
FIXED_KEYS = (
    "model data test_data test_share data_from data_to prompt_template seed prompts_per_step group_size "
    "minibatch_prompts temperature loss advantage aggregation kl reward lenient shuffle_rewards "
    "skip_zero_variance mask_truncated resample_rounds max_prompt_tokens max_response_tokens num_iterations "
    "overlong_tokens warmup_steps sft_batch sft_reason synthetic_flaws synthetic_thoughts synthetic_train "
    "chat_template_kwargs"
).split()
# What failed at start leaves these behind, and may be started again under the same name.
START_FILES = ("config.yaml", "config.yaml.tmp", "git.txt", "lock", "tensorboard", "wandb", "wandb_id.txt")

SAVED = ("latest", "warmup/latest", "warmup/model")  # what a run can go on from


def _claim(path: Path, config: Config) -> str:
    """Makes the run directory for this run, and locks it; returns why it cannot, or ""."""
    lock = path / "lock"
    used = path.exists() and any(entry.name not in START_FILES for entry in path.iterdir())
    free, owner = take_lock(lock) if lock.exists() else (True, "")
    if not free:
        return _in_use(path, owner)
    started = any((path / name).exists() for name in SAVED)
    # A start that was refused left no lock of its own: starting it again must not make it go on with
    # another's run. The count of restarts would not tell, and is not the same on all nodes.
    again = "TORCHELASTIC_RUN_ID" in os.environ and owner.endswith(f"\n{torchrun_job()}\n")
    if again:
        print(f"restarted: going on from {'the last checkpoint' if started else 'the beginning'}")
    if config.resume or (again and started):
        if not started:
            return f"run_dir: {path} has no checkpoint to resume; start without --resume"
        if problem := _differences(path, config):
            return problem
    elif used and not again:
        if problem := _overwriting(path, config):
            return problem
    path.mkdir(parents=True, exist_ok=True)
    free, owner = take_lock(lock)
    if not free:  # another run started here at the same moment
        return _in_use(path, owner)
    if used and not config.resume and not again:
        (path / "latest").unlink(missing_ok=True)  # first: it must never name a checkpoint that is gone
        for entry in path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()
    take_lock(lock, sign=True)  # only now: a start that dies before, torchrun does over
    # Without these switches: whoever starts from this file must not delete or continue a run by accident.
    saved = dataclasses.asdict(config) | {"resume": False, "overwrite": False, "resume_step": 0}
    text = yaml.safe_dump(saved, sort_keys=False, allow_unicode=True)
    (path / "config.yaml.tmp").write_text(text, encoding="utf-8")
    (path / "config.yaml.tmp").replace(path / "config.yaml")
    (path / "git.txt").write_text(git_state(), encoding="utf-8")
    return ""


def _in_use(path: Path, owner: str) -> str:
    who = owner.partition("\n")[0] or "another process"
    return f"run_dir: {path} is in use by {who}; stop that run first, or choose another --run_dir"


def _differences(path: Path, config: Config) -> str:
    """Why the run in this folder cannot go on with these settings, or ""; prints changes that may be."""
    before = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    # a setting that is newer than the run had its default then
    before = dataclasses.asdict(Config()) | before
    now = dataclasses.asdict(config)
    changed = {key: f"{key} {before[key]!r} -> {now[key]!r}" for key in now if before[key] != now[key]}
    if fixed := [changed[key] for key in FIXED_KEYS if key in changed]:
        return f"resume: these settings must stay as they were: {', '.join(fixed)}"
    silent = ("resume", "overwrite", "resume_step", "run_dir")
    if free := [changed[key] for key in changed if key not in silent]:
        print(f"resume: {', '.join(free)}")
    return ""


def _overwriting(path: Path, config: Config) -> str:
    """Why what is in the run directory may not be replaced, or ""."""
    if not config.overwrite:
        hint = "--resume true to go on, " if any((path / name).exists() for name in SAVED) else ""
        return f"run_dir: {path} exists; add {hint}--overwrite true to replace it, or another --run_dir"
    if not ((path / "config.yaml").exists() and (path / "git.txt").exists()):
        return f"run_dir: {path} is not a run directory, so it is not overwritten; delete it yourself"
    if path.resolve() in Path(config.model).resolve().parents:
        return f"model: {config.model} lies in {path}, which would be overwritten; choose another run_dir"
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


def cut_log(path: Path, step: int) -> None:
    """Drops rows of steps after `step`: a resumed run does them again."""
    if not path.exists():
        return
    shorter = path.with_name(path.name + ".tmp")
    with path.open("rb") as old, shorter.open("wb") as new:  # line by line: samples may fill gigabytes
        new.writelines(line for line in old if line.endswith(b"\n") and json.loads(line)["step"] <= step)
    shorter.replace(path)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, renamed to `path` at the end: a folder of that name is always complete."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


def take_lock(path: Path, sign: bool = False) -> tuple[bool, str]:
    """Locks the file for this process until it ends -> (whether it is ours now, what the file said before).

    sign: it then names this process in its first line, and torchrun's job in the second. The kernel drops the
    lock with the process, however that died. lockf() and not flock(): forked children do not keep it, and
    this process may ask again. The descriptor stays open on purpose, and nothing else here may open the file:
    closing either drops the lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
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
    return True, said
