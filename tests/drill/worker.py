"""grpo.py with one function broken on one rank at one step, so that the product needs no hooks for
bench/faults.py.

    torchrun --nproc_per_node 2 bench/fault_worker.py nan 3 1 --config configs/tiny.yaml …     NaN in step 3
      on rank 1
    python bench/fault_worker.py --serve                                                       the fork server

The fork server imports torch once; what it starts runs after a second, without torchrun.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

BUDGET = 1024  # max_tokens_per_micro_batch of all runs


def vowels(completion: str, answer: list[dict], tools: list[dict]) -> float:
    """A reward that an untrained model gets too, so that every step changes the weights."""
    return sum(letter in "aeiou" for letter in completion) / 10


# --------------------------------------------------------------------------- the product, broken in one place


def break_product(fault: str, step: int, rank: int) -> None:
    """Replaces one function of grpo.py or checkpoint.py, which then fails on this rank at this step (0: at
    any).
    """
    import resource
    import shutil

    import torch

    import grpo
    from distributed import checkpoint
    from kernel import decode as engines

    now, sample, write, update, mkdir = (
        [0],
        grpo.sample_and_score,
        checkpoint.Saver._write,
        grpo.update_policy,
        Path.mkdir,
    )
    engine, append, loss, usage = (
        engines.ENGINES["shared_prefix"],
        grpo.append_jsonl,
        grpo.policy_loss,
        shutil.disk_usage,
    )

    def sample_and_score(run, items, at, *rest):
        now[0] = at
        return sample(run, items, at, *rest)

    def due() -> bool:
        return now[0] > 0 and step in (0, now[0])

    def policy_loss(*arguments):
        values, ratio = loss(*arguments)
        return values * (float("nan") if due() else 1.0), ratio

    def update_policy(policy, optimizer, minibatches, config, ranks):
        if due() and config.max_tokens_per_micro_batch == BUDGET:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return update(policy, optimizer, minibatches, config, ranks)

    def decode(model, batch, *rest):
        if due() and len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return engine(model, batch, *rest)

    def write_little(saver, *arguments):
        if due():  # the kernel refuses to write more than this into one file, as a full disk would
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        try:
            return write(saver, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def disk_usage(path):
        return SimpleNamespace(free=10) if due() else usage(path)

    def mkdir_read_only(path, *arguments, **options):
        if due() and path.name.startswith("step_"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return mkdir(path, *arguments, **options)

    def append_half(path, lines):
        if due():
            with path.open("a", encoding="utf-8") as file:
                file.write('{"step": 3, "completi')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return append(path, lines)

    places = {
        "nan": (grpo, "policy_loss", policy_loss),
        "memory_update": (grpo, "update_policy", update_policy),
        "memory_rollout": (engines.ENGINES, "shared_prefix", decode),
        "no_space": (shutil, "disk_usage", disk_usage),
        "no_space_late": (checkpoint.Saver, "_write", write_little),
        "read_only": (Path, "mkdir", mkdir_read_only),
        "log_full": (grpo, "append_jsonl", append_half),
    }
    place, name, broken = places[fault]
    if int(os.environ.get("RANK", 0)) == rank:
        grpo.sample_and_score = sample_and_score
        if isinstance(place, dict):
            place[name] = broken
        else:
            setattr(place, name, broken)


def run_product(script: str, broken: list[str], arguments: list[str]) -> None:
    """grpo.py or sft.py as its own command line runs it, with something broken first."""
    import grpo
    import sft
    from distributed.ranks import run_script

    if broken:
        break_product(broken[0], int(broken[1]), int(broken[2]))
    sys.argv = [f"{script}.py", *arguments]
    errors = (
        grpo.CheckpointError,
        grpo.ConfigError,
        grpo.DataError,
        grpo.ModelError,
        grpo.PromptError,
        grpo.RewardError,
    )
    run_script({"grpo": grpo, "sft": sft}[script].main, errors)


# ------------------------------------------------------------------------------------------------ fork server


def serve() -> None:
    """Reads a run per line from stdin, forks what stands for torchrun, and answers with its process id."""
    import grpo  # noqa: F401  once for all runs
    import sft  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    for line in sys.stdin.buffer:
        request = json.loads(line)
        Path(request["log"]).with_suffix(".code").unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            os._exit(run_ranks(request))
        sys.stdout.buffer.write(b"%d\n" % pid)
        sys.stdout.buffer.flush()


def run_ranks(request: dict) -> int:
    """Does what torchrun does: starts the ranks, ends the others when one fails, passes signals on."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log, null = (
        os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
        os.open(os.devnull, os.O_RDONLY),
    )
    for number, file in ((0, null), (1, log), (2, log)):
        os.dup2(file, number)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world, pids, code = request["ranks"], [], 0
    for rank in range(world):
        pids.append(os.fork())
        if pids[-1] == 0:
            if world > 1:
                shared = dict(
                    WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port
                )
                os.environ |= {k: str(v) for k, v in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            _rank_main(request)

    def to_all(number: int, frame: object = None) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    signal.signal(signal.SIGTERM, to_all)
    signal.signal(signal.SIGINT, to_all)
    signal.signal(signal.SIGALRM, lambda number, frame: to_all(signal.SIGKILL))
    for _ in range(world):
        pid, status = os.waitpid(-1, 0)
        pids.remove(pid)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            to_all(signal.SIGTERM)
            signal.alarm(2)
    beside = Path(request["log"]).with_suffix(".code.tmp")
    beside.write_text(str(1 if code else 0))
    beside.replace(beside.with_suffix(""))
    return 0


def _rank_main(request: dict) -> None:
    """Never returns."""
    code = 1
    try:
        run_product(request["script"], request["broken"], request["arguments"])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # bench/ has a rollout.py too
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        run_product("grpo", sys.argv[1:4], sys.argv[4:])
