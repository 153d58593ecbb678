"""What faults.py needs of runs: to start, watch and end them, and to compare them with an undisturbed one.

A part of faults.py; it imports nothing of the product.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fault_worker import BUDGET

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("fault_worker.py")
STEPS = 6
SETTINGS = dict(
    config="configs/tiny.yaml", warmup_steps=0, synthetic_train=40, eval_cases=4, steps=STEPS, prompts_per_step=4,
    minibatch_prompts=4, group_size=4, max_response_tokens=16, max_tokens_per_micro_batch=BUDGET, save_every=1,
    keep_checkpoints=3, log_samples=1000, reward="bench/fault_worker.py:vowels",
)
LIMIT_S = 240.0  # for one run; more than that is a hang


class Failed(Exception):
    """A fault that was not survived, and how that showed."""


@dataclass(frozen=True)
class Site:
    """What all drills share. server: the fork server; None: runs start by torchrun, as a user starts them."""

    folder: Path
    ranks: int
    server: subprocess.Popen | None


@dataclass(frozen=True)
class Job:
    """A started run. pid: of torchrun, or of what stands for it. log: stdout and stderr of all its
    processes.
    """

    pid: int
    log: Path
    run: Path
    process: subprocess.Popen | None


# ---------------------------------------------------------------------------------------- starting and ending


@contextlib.contextmanager
def open_site(folder: Path, ranks: int = 2, quick: bool = False) -> Iterator[Site]:
    """The start model and the undisturbed run `folder/whole`; quick: ranks are forked, not started by
    torchrun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    server = None
    if quick:
        command = [sys.executable, str(WORKER), "--serve"]
        server = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    try:
        site = Site(folder, ranks, server)
        with launch(
            site, "start", script="sft", ranks=1, model="tiny", tiny_hidden=32, steps=2
        ) as job:
            ends_well(job)
        with launch(site, "whole") as job:
            ends_well(job)
        if digest(folder / "start/model/model.safetensors") == digest(
            folder / "whole/model/model.safetensors"
        ):
            raise Failed("training changed nothing, so nothing could be lost")
        yield site
    finally:
        if server:
            server.kill()
            server.communicate()


def environment() -> dict[str, str]:
    """The variables of a run, those of run.sh included; none of a torchrun that the drill itself may run
    under.
    """
    own = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        own.pop(name, None)
    return own | {
        "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10",
    }


@contextlib.contextmanager
def launch(
    site: Site, name: str, break_: tuple[str, int, int] | None = None, *, script: str = "grpo", ranks: int = 0,
    restarts: int = 0, **settings: object,
) -> Iterator[Job]:
    """Starts a run in site.folder/name; at the end nothing of it is left running.

    break_: what fails, at which step, on which rank (`break_product`). restarts: torchrun's --max-restarts.
    """
    run, ranks = site.folder / name, ranks or site.ranks
    log = site.folder / f"{name.replace('/', '_')}.log"
    settings = {"model": site.folder / "start/model", **SETTINGS, "run_dir": run, **settings}
    arguments = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    broken = [str(word) for word in break_ or ()]
    if site.server:
        request = {
            "script": script,
            "broken": broken,
            "arguments": arguments,
            "ranks": ranks,
            "log": str(log),
        }
        site.server.stdin.write(json.dumps(request).encode() + b"\n")
        site.server.stdin.flush()
        job = Job(int(site.server.stdout.readline()), log, run, None)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += [
            f"--max-restarts={restarts}",
            *([str(WORKER), *broken] if broken else [f"{script}.py"]),
            *arguments,
        ]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )
        job = Job(process.pid, log, run, process)
    try:
        yield job
    finally:
        kill(job, [job.pid, *rank_pids(job)])


def kill(job: Job, pids: list[int], number: int = signal.SIGKILL) -> None:
    """Sends a signal to some of a job's processes; after SIGKILL, returns when they are gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    while number == signal.SIGKILL and any(alive(pid) for pid in pids):
        ended(job)
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie: nobody may be there to collect an orphan."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def rank_pids(job: Job) -> list[int]:
    """The job's ranks, in the order of their start, which is that of their numbers."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == job.pid and fields[0] != "Z":
                pids.append(int(path.parent.name))
    return sorted(pids)


def ended(job: Job) -> int | None:
    """The exit status, or None while it runs."""
    if job.process:
        return job.process.poll()
    code = job.log.with_suffix(".code")
    if alive(job.pid):
        return None
    return int(code.read_text()) if code.exists() else -signal.SIGKILL


def said(job: Job) -> str:
    """What all processes of the job have printed so far."""
    return job.log.read_text(encoding="utf-8", errors="replace") if job.log.exists() else ""


def expect(condition: object, why: str, job: Job | None = None) -> None:
    """Raises Failed, with the end of what the job printed."""
    if not condition:
        raise Failed(why + (f"; {job.log} ends: {said(job)[-400:]!r}" if job else ""))


def finish(job: Job, limit: float = LIMIT_S) -> int:
    """Waits for the end; the exit status. Raises Failed after `limit` seconds."""
    wait_until(job, lambda: ended(job) is not None, limit)
    expect(ended(job) is not None, f"still running after {limit:g} s", job)
    return ended(job)


def ends_well(job: Job) -> None:
    """Waits for the end, which must be that of a finished run."""
    code = finish(job)
    expect(code == 0 and (job.run / "model").is_dir(), f"ended with {code}", job)


def is_refused(job: Job, *parts: str) -> None:
    """Waits for the end, which must be one sentence with these parts and no traceback of the product."""
    code = finish(job)
    errors = [line for line in said(job).splitlines() if line.startswith("error: ")]
    expect(code == 1, f"ended with {code} instead of 1", job)
    expect(len(errors) == 1 and "run_script" not in said(job), "not one clear sentence", job)
    for part in parts:
        expect(part in errors[0], f"{part!r} is not in {errors[0]!r}")


def wait_until(job: Job, condition: Callable[[], object], limit: float = LIMIT_S) -> bool:
    """Whether the condition came true before the job ended. Looks every 2 ms: a save takes some ten of
    them.
    """
    deadline = time.monotonic() + limit
    while not condition():
        if ended(job) is not None or time.monotonic() > deadline:
            return bool(condition())
        time.sleep(0.002)
    return True


# -------------------------------------------------------------------------------------------- looking at runs


def latest(run: Path) -> int:
    """The step that `latest` names; -1 without one."""
    pointer = run / "latest"
    return int(pointer.read_text().removeprefix("step_")) if pointer.exists() else -1


def rows(path: Path) -> list[dict]:
    """The whole lines of a log."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def logged(run: Path) -> int:
    """The last step in log.jsonl; -1 without one."""
    return max([row["step"] for row in rows(run / "log.jsonl")], default=-1)


def digest(path: Path) -> str:
    """sha256 of a file; of safetensors, whose header has its entries in random order, that of the entries in
    order.
    """
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        content = json.dumps(header, sort_keys=True).encode() + content[end:]
    return hashlib.sha256(content).hexdigest()


def results(run: Path) -> list[dict]:
    """The log without what depends on the clock and the machine."""
    clock = ("time/", "memory/", "seconds")
    log = rows(run / "log.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(clock) and "_per_s" not in k} for row in log]


def same_as_undisturbed(site: Site, run: Path) -> None:
    """Raises Failed unless weights, optimizer, logged figures and samples are those of the undisturbed run,
    bit by bit.
    """
    whole = site.folder / "whole"
    shards = [f"step_{STEPS}/{path.name}" for path in sorted((whole / f"step_{STEPS}").glob("*.safetensors"))]
    for name in ("model/model.safetensors", *shards, "samples.jsonl"):
        expect((run / name).exists(), f"{run / name} is missing")
        expect(
            digest(run / name) == digest(whole / name),
            f"{run / name} differs from that of the undisturbed run",
        )
    steps = [row["step"] for row in rows(run / "log.jsonl")]
    expect(steps == list(range(STEPS + 1)), f"log.jsonl has the steps {steps}")
    expect(
        results(run) == results(whole),
        f"figures in {run / 'log.jsonl'} differ from those of the undisturbed run",
    )
    left = [path.name for path in run.iterdir() if path.name.endswith(".tmp")]
    expect(not left, f"{run} still holds {left}")
