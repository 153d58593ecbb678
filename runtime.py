"""What every script needs around the method: ranks, the run directory and its log, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from config import Config, ConfigError
from watch import Watchdog, lost_processes, phase_of, take_lock, take_out_of_memory, torchrun_job


class Interrupted(Exception):
    """A run that was asked to stop and has saved a checkpoint."""

    def __init__(self, run_dir: str, step: int) -> None:
        script, saved = Path(sys.argv[0]).name, Path(run_dir) / "config.yaml"
        start = "bash run.sh train" if script == "grpo.py" else f"python {script} --config"
        super().__init__(f"interrupted after step {step}, all is saved; to go on: {start} {saved} --resume true")


# --------------------------------------------------------------------------------------------------------- ranks


@dataclass(frozen=True)
class Ranks:
    """This process among all: rank of world, and its device. Always a process group, also with one process."""

    rank: int
    world: int
    device: torch.device
    watchdog: Watchdog | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes logs and files."""
        return self.rank == 0

    def sum(self, values: Iterable[float]) -> list[float]:
        """Collective. Element-wise sums over all ranks, in float64."""
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor)
        self.beat()
        return tensor.tolist()

    def gather(self, item: Any) -> list[Any]:
        """Collective. The items of all ranks, in rank order, on every rank."""
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        self.beat()
        return items

    def beat(self) -> None:
        """Tells the watchdog that something got done: for phases that may take longer than timeout_minutes."""
        if self.watchdog:
            self.watchdog.beat()


def start_ranks(timeout_minutes: float = 60.0, threads: int = 0) -> Ranks:
    """Collective. Joins torchrun's process group, or makes one of a single process: one path for 1 and N."""
    single = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=0)
    if "RANK" not in os.environ:
        os.environ.update({key: str(value) for key, value in single.items()})
    if threads:
        torch.set_num_threads(threads)
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # github.com/pytorch/pytorch/issues/135712; seen in half of the restarts with torch 2.13
        raise ConfigError(
            "torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment, and --standalone or "
            "--rdzv-backend=c10d; without them, restarted processes look for the dead ones"
        )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # Gradients travel by NCCL, small counts and objects by gloo.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    # A little longer than the watchdog's patience: that one names the phase, while NCCL just kills the process.
    dist.init_process_group(backend, timeout=timedelta(minutes=1.05 * timeout_minutes))
    rank, world = dist.get_rank(), dist.get_world_size()
    # Nobody waits for a single process, and its steps may be slow.
    return Ranks(rank, world, device, Watchdog(timeout_minutes, rank) if world > 1 else None)


def first_problem(problem: str, ranks: Ranks) -> str:
    """Collective. The first rank's problem, or "" if none has one: so no rank goes on alone and waits for ever."""
    return next(filter(None, ranks.gather(problem)), "")


def _prints() -> bool:
    """Whether this process speaks for its machine, so that eight ranks do not say the same eight times."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


class StopFlag:
    """Set by SIGINT or SIGTERM; a second one ends the process at once. `agreed` makes all ranks stop at one step.

    A terminal or a scheduler may signal processes that torchrun signals too: what comes within a second is the same.
    """

    def __init__(self) -> None:
        self.signal, self.since = 0, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.signal and time.monotonic() - self.since < 1:
            return
        if self.signal:
            raise SystemExit(128 + number)
        self.signal, self.since = number, time.monotonic()
        if _prints():
            os.write(2, b"\nstopping after this step; a second signal stops at once\n")  # print() may not be re-entered

    def agreed(self, ranks: Ranks) -> bool:
        """Collective. Whether any rank was asked to stop."""
        return ranks.sum([float(self.signal)])[0] > 0


# ------------------------------------------------------------------------------------------- run directory and log


def open_run(config: Config, ranks: Ranks) -> Path:
    """Collective. Makes run_dir with config.yaml and git.txt, or checks that it may be resumed, and locks it.

    Processes that torchrun started again (--max-restarts) go on with their run. Raises ConfigError when another process
    has the directory, or when it holds a run and neither resume nor overwrite is set.
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
    "minibatch_prompts temperature loss advantage aggregation kl reward lenient shuffle_rewards skip_zero_variance "
    "resample_rounds max_prompt_tokens max_response_tokens warmup_steps sft_batch sft_reason synthetic_flaws "
    "synthetic_thoughts synthetic_train"
).split()
# What failed at start leaves these behind, and may be started again under the same name.
START_FILES = ("config.yaml", "config.yaml.tmp", "git.txt", "lock", "tensorboard", "wandb", "wandb_id.txt")

SAVED = ("latest", "warmup/latest", "warmup/model")  # what a run can go on from


def _claim(path: Path, config: Config) -> str:
    """Makes the run directory for this run, and locks it; returns why it cannot, or ""."""
    lock, used = path / "lock", path.exists() and any(entry.name not in START_FILES for entry in path.iterdir())
    free, owner = take_lock(lock) if lock.exists() else (True, "")
    if not free:
        return _in_use(path, owner)
    started = any((path / name).exists() for name in SAVED)
    # A start that was refused left no lock of its own: starting it again must not make it go on with another's run. The
    # count of restarts would not tell, and is not the same on all nodes.
    again = "TORCHELASTIC_RUN_ID" in os.environ and owner.endswith(f"\n{torchrun_job()}\n")
    if again:
        print("restarted: " + ("going on from the last checkpoint" if started else "no checkpoint yet, from the beginning"))
    if config.resume or (again and started):
        if not started:
            return f"run_dir: {path} has no checkpoint to resume; start without resume, or with --overwrite true"
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
    """Why a run that began with run_dir/config.yaml cannot go on with this config, or ""; prints what else changed."""
    before, now = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")), dataclasses.asdict(config)
    before = dataclasses.asdict(Config()) | before  # a setting that is newer than the run had its default then
    changed = {key: f"{key} {before[key]!r} -> {now[key]!r}" for key in now if before[key] != now[key]}
    if fixed := [changed[key] for key in FIXED_KEYS if key in changed]:
        return f"resume: these settings must stay as they were: {', '.join(fixed)}"
    if free := [text for key, text in changed.items() if key not in ("resume", "overwrite", "resume_step", "run_dir")]:
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
    here = Path(__file__).parent
    run = lambda *words: subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, errors="replace")  # noqa: E731
    commit = run("rev-parse", "HEAD")
    if commit.returncode:
        return "no git repository\n"
    return f"commit {commit.stdout}{run('status', '--short').stdout}{run('diff', 'HEAD').stdout}"


def append_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Appends one JSON line per row."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict]:
    """All whole rows of a JSONL file that we wrote; [] if there is none. A last line cut off by a kill is left out."""
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [json.loads(line) for line in lines[:-1]]  # not splitlines(): a completion may hold U+2028


def cut_log(path: Path, step: int) -> None:
    """Drops rows of steps after `step`: a resumed run does them again."""
    if not path.exists():
        return
    shorter = path.with_name(path.name + ".tmp")
    with path.open("rb") as old, shorter.open("wb") as new:  # line by line: samples may fill gigabytes
        new.writelines(line for line in old if line.endswith(b"\n") and json.loads(line)["step"] <= step)
    shorter.replace(path)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a folder beside `path` to write into and renames it at the end: a folder named `path` is always complete."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


def fit_memory(config: Config, run_dir: Path, ranks: Ranks) -> Config:
    """Collective. After a start that ran out of memory in an update: the settings with half the micro-batch."""
    note = ranks.gather(take_out_of_memory(run_dir) if ranks.main else None)[0]
    if not note:
        return config
    half = max(1, config.max_tokens_per_micro_batch // 2)
    if ranks.main:
        print(f"out of memory in {note['phase']} of step {note['step']}: going on with max_tokens_per_micro_batch {half}")
    return dataclasses.replace(config, max_tokens_per_micro_batch=half)


# --------------------------------------------------------------------------------------------------- data by step


def batch_for_step(count: int, step: int, size: int, seed: int) -> list[int]:
    """The indices of step `step` (from 0): a fresh shuffle per pass, and a function of position alone.

    Resume computes this instead of replaying a generator. A batch may span two passes.
    """
    indices = []
    for position in range(step * size, (step + 1) * size):
        epoch, offset = divmod(position, count)
        if not indices or offset == 0:
            order = random.Random(f"{seed}/{epoch}").sample(range(count), count)
        indices.append(order[offset])
    return indices


def run_script(main: Callable[[list[str]], None], errors: tuple[type[Exception], ...]) -> None:
    """Runs a script's main; the named errors, lost processes and full memory end it with one sentence, not a traceback."""
    message, lost, code = "", "", 1
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        main(sys.argv[1:])
        code = 0
    except errors as error:
        message = f"error: {error}"
        if many and not _prints():  # the machine's first process may say the same
            _let_torchrun_end_us(5)
    except Interrupted as stopped:
        message, code = str(stopped) if _prints() else "", 130
    except KeyboardInterrupt:
        message, code = "interrupted" if _prints() else "", 130
    except torch.OutOfMemoryError as error:
        message = f"error: out of GPU memory on rank {os.environ.get('RANK', 0)}{phase_of(error)}; "
        message += "lower rollout_batch_size (rollout) or max_tokens_per_micro_batch (update)"
    except SystemExit as stopped:  # --help, or a second signal
        code = stopped.code or 0
    except BaseException as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        if not many and not full:
            raise
        message, lost = traceback.format_exc().rstrip(), lost_processes(error)
        if full:  # met by a log: checkpoints have their own sentence
            message = f"error: {error.filename}: {error.strerror}; make room, and go on with --resume true"
    if message:
        print(lost or message, file=sys.stderr, flush=True)
    if lost:  # so that torchrun's table shows the process that died, and not this one
        _let_torchrun_end_us(1)
    if many and code not in (0, 130):
        # The others may sit in a collective that an orderly end would wait for; torchrun ends them once this one is gone.
        sys.stdout.flush()
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    if code:
        sys.exit(code)


def _let_torchrun_end_us(seconds: float) -> None:
    """Waits in case torchrun is about to end this process, because of another one that spoke or died before it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)
