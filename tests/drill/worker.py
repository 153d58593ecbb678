"""What the drill starts: grpo.py or sft.py, with one function broken on one rank at one step, or with a rank
that kills itself at a change of the run directory. The product needs no hooks for either.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import grpo
import sft
from corpus import sources
from distributed.ranks import Clock, run_script
from losses import KLS
from ops import monitor
from rollout import ENGINES


def vowels(completion: str, answer: list[dict], tools: list[dict]) -> float:
    """A reward that an untrained model gets too, so that every step changes the weights."""
    return sum(letter in "aeiou" for letter in completion) / 10


def run_out_of_memory(function: Callable, *arguments):
    raise torch.OutOfMemoryError("CUDA out of memory (injected)")


def decode_one_prompt_only(engine: Callable, model, prompts, copies: int, *rest):
    """rest ends with how many rows are decoded at once."""
    return engine(model, prompts, copies, *rest) if rest[-1] < 2 * copies else run_out_of_memory(engine)


def write_little(save: Callable, *arguments, **options):
    """The kernel refuses to write more than this into one file, as a full disk would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        return save(*arguments, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def make_no_checkpoint_folder(mkdir: Callable, path: Path, *arguments, **options):
    if path.name.startswith("step_"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    return mkdir(path, *arguments, **options)


def append_half_a_line(append: Callable, path: Path, rows):
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "completi')
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


BROKEN = {  # fault -> the table, class or module that has the function, its name, and what stands in for it
    "nan": (KLS, "k3", lambda kl, *logprobs: kl(*logprobs) * float("nan")),
    "memory_update": (KLS, "k3", run_out_of_memory),
    "memory_rollout": (ENGINES, "shared_prefix", decode_one_prompt_only),
    "no_space": (shutil, "disk_usage", lambda usage, path: SimpleNamespace(free=10)),
    "no_space_late": (dcp, "save", write_little),
    "read_only": (Path, "mkdir", make_no_checkpoint_folder),
    "log_full": (sources, "append_jsonl", append_half_a_line),
}


def break_product(fault: str, step: int) -> None:
    """Breaks one function of the product in this process at this step (0: at any)."""
    place, name, broken = BROKEN[fault]
    original = place[name] if isinstance(place, dict) else getattr(place, name)
    start_clock, now = Clock.__init__, [0]

    def note_step(clock, watchdog=None, step=0):  # every step begins with a clock of its own
        now[0] = step
        start_clock(clock, watchdog, step)

    def function(*arguments, **options):
        if now[0] > 0 and step in (0, now[0]):
            return broken(original, *arguments, **options)
        return original(*arguments, **options)

    Clock.__init__ = note_step
    if isinstance(place, dict):
        place[name] = function
    else:  # also where a module has imported it by name
        for module in [place, *sys.modules.values()]:
            if getattr(module, "__dict__", {}).get(name) is original:
                setattr(module, name, function)


@dataclass(frozen=True)
class Death:
    """A rank kills itself at its change number `event` of the run directory (0: never), just before it.

    more: so many bytes still reach a file that is opened there. power: what was not synced is lost too.
    """

    event: int = 0
    rank: int = 0
    more: int | None = None
    power: bool = False


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")  # as Python audits them


def place(name: str | bytes | os.PathLike | int, folder: int = -1) -> Path:
    """The path of a file by its name, its descriptor, or its name in the folder of a descriptor."""
    if isinstance(name, int):
        folder, name = name, ""
    base = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
    return Path(base, os.fsdecode(name))


class FileEvents:
    """Numbers what this process changes in the run directory, writes it into a journal, and dies on time."""

    def __init__(self, run: Path, death: Death, journal: Path) -> None:
        self.run, self.death, self.fsync = run, death, os.fsync
        self.count, self.dying = 0, False
        self.journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        # What a power cut leaves: so many bytes of a file, by inode; and renames that it undoes: (from, to,
        # what was there).
        self.synced = {path.stat().st_ino: path.stat().st_size for path in run.rglob("*") if path.is_file()}
        self.renamed: list[tuple[Path, Path, Path]] = []
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.fsync = self.on_fsync
        sys.addaudithook(self.on_audit)

    def on_audit(self, event: str, arguments: tuple) -> None:
        flags = (arguments[2] or 0) if event == "open" else 0
        if event not in CHANGES or (event == "open" and not flags & WRITING):
            return
        folder = arguments[-1] if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") else -1
        names = arguments[: 2 if event == "os.rename" else 1]
        paths = [place(name, folder) for name in names]
        if self.run not in (paths[0], *paths[0].parents):
            return
        grows = flags & os.O_APPEND and paths[0].exists()
        self.happens(event, *paths, size=paths[0].stat().st_size if grows else 0)
        if not self.death.power:
            return
        if event == "os.rename":
            before = self.run.with_name(f"{self.run.name}.{self.count}.before")
            with contextlib.suppress(OSError):  # there is none, or a folder
                os.link(paths[1], before)
            self.renamed.append((*paths, before))
        elif paths[0].exists() and (event == "os.remove" or flags & os.O_TRUNC):
            self.synced.pop(paths[0].stat().st_ino, None)

    def on_fsync(self, descriptor: int) -> None:
        path = place(descriptor)
        inside = self.run in (path, *path.parents)
        if inside:
            self.happens("fsync", path)
        self.fsync(descriptor)
        if inside:
            self.synced[path.stat().st_ino] = path.stat().st_size
            self.renamed = [entry for entry in self.renamed if entry[1].parent != path]

    def happens(self, kind: str, *paths: Path, size: int = 0) -> None:
        """Counts a change that is about to happen, unless this process dies before it. size: of the file."""
        if self.dying:
            return
        self.count += 1
        names = [str(path.relative_to(self.run)) for path in paths]
        os.write(self.journal, f"{kind} {' '.join(names)}\n".encode())
        if not 0 < self.death.event <= self.count:
            return
        if self.count == self.death.event and kind == "open" and self.death.more is not None:
            # the kernel kills this process in the middle of a write that goes beyond
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + self.death.more, resource.RLIM_INFINITY))
            return
        if self.death.power:
            self.dying = True
            self.cut_power()
        os.kill(os.getpid(), signal.SIGKILL)

    def cut_power(self) -> None:
        """Undoes renames whose folder was not synced, and empties or cuts files that were not."""
        for source, target, before in reversed(self.renamed):
            with contextlib.suppress(OSError):  # moved or deleted since
                target.rename(source)
                before.rename(target)
        for path in self.run.rglob("*"):
            if path.is_file():
                os.truncate(path, min(path.stat().st_size, self.synced.get(path.stat().st_ino, 0)))


def draw_nothing(_: list[Path], target: Path) -> None:
    """Stands in for ops.plot.draw, which takes longer than these runs; what it does to the folder stays."""
    with sources.written_beside(target) as beside:
        beside.touch()


def run_product(script: str, broken: tuple | Death, arguments: list[str], log: Path) -> None:
    """grpo.py or sft.py as its own command line runs it. broken: fault, step, rank; a death; or nothing."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # a fork has those of torchrun's agent
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rank, events, monitor.draw = int(os.environ["RANK"]), None, draw_nothing
    if isinstance(broken, Death):
        run = Path(arguments[arguments.index("--run_dir") + 1])
        death = broken if rank == broken.rank else Death()
        events = FileEvents(run, death, log.with_suffix(f".events_{rank}"))
    elif broken and rank == broken[2] % int(os.environ["WORLD_SIZE"]):
        break_product(*broken[:2])
    sys.argv = [f"{script}.py", *arguments]
    run_script({"grpo": grpo, "sft": sft}[script].main)
    if events:
        events.happens("end")


def run_agent(
    script: str, broken: tuple | Death, arguments: list[str], ranks: int, restarts: int, log: Path
) -> None:
    """torchrun's agent, with ranks that are forked from this process, which has imported torch already."""
    os.setsid()
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=log.name, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=restarts, monitor_interval=0.05, start_method="fork",
    )
    elastic_launch(config, run_product)(script, broken, arguments, log)
