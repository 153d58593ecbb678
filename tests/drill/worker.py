"""What the drill starts: grpo.py or sft.py, with one function broken on one rank at one step; no hooks
needed.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
from collections.abc import Callable
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
from rollout import ENGINES


def vowels(completion: str, answer: list[dict], tools: list[dict]) -> float:
    """A reward that an untrained model gets too, so that every step changes the weights."""
    return sum(letter in "aeiou" for letter in completion) / 10


def run_out_of_memory(function: Callable, *arguments):
    raise torch.OutOfMemoryError("CUDA out of memory (injected)")


def decode_one_prompt_only(engine: Callable, model, batch, *rest):
    return engine(model, batch, *rest) if len(batch) == 1 else run_out_of_memory(engine)


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


def run_product(script: str, broken: tuple, arguments: list[str]) -> None:
    """grpo.py or sft.py as its own command line runs it. broken: fault, step, rank; or nothing."""
    if broken and int(os.environ["RANK"]) == broken[2] % int(os.environ["WORLD_SIZE"]):
        break_product(*broken[:2])
    sys.argv = [f"{script}.py", *arguments]
    run_script({"grpo": grpo, "sft": sft}[script].main)


def run_agent(script: str, broken: tuple, arguments: list[str], ranks: int, restarts: int, log: Path) -> None:
    """torchrun's agent, with ranks that are forked from this process, which has imported torch already."""
    os.setsid()
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=log.name, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=restarts, monitor_interval=0.05, start_method="fork",
    )
    elastic_launch(config, run_product)(script, broken, arguments)
