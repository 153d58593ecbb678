"""This process among all: how ranks start, stop together, and end when one of them dies or hangs."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import io
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from tqdm import tqdm

from config import ConfigError, UserError


class Interrupted(Exception):
    """A run that was asked to stop and has saved a checkpoint."""

    def __init__(self, run_dir: str, step: int) -> None:
        script = Path(sys.argv[0]).name
        start = "bash run.sh train" if script == "grpo.py" else f"python {script} --config"
        again = f"{start} {Path(run_dir) / 'config.yaml'} --resume true"
        super().__init__(f"interrupted after step {step}, all is saved; to go on: {again}")


@dataclass(frozen=True)
class Ranks:
    """This process among all: rank of world, and its device. Always a process group, also of one process.

    timeout: for every process group that is made later, whose own would be torch's 10 or 30 minutes.
    """

    rank: int
    world: int
    device: torch.device
    watchdog: Watchdog | None = None
    timeout: timedelta | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes logs and files."""
        return self.rank == 0

    def sum(self, values: Iterable[float]) -> list[float]:
        """Collective. Element-wise sums over all ranks, in float64."""
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor)
        self.heartbeat()
        return tensor.tolist()

    def gather(self, item: Any) -> list[Any]:
        """Collective. The items of all ranks, in rank order, on every rank."""
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        self.heartbeat()
        return items

    def heartbeat(self) -> None:
        """Tells the watchdog of progress: for phases that may take longer than timeout_minutes."""
        if self.watchdog:
            self.watchdog.heartbeat()


def start_ranks(timeout_minutes: float = 60.0) -> Ranks:
    """Collective. Joins torchrun's process group, or makes one of a single process: one path for 1 and N.

    Raises ConfigError for restarts by torchrun that could not work.
    """
    single = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=0)
    if "RANK" not in os.environ:
        os.environ.update({key: str(value) for key, value in single.items()})
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if agent_store and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        # github.com/pytorch/pytorch/issues/135712; seen in half of the restarts with torch 2.13
        raise ConfigError(
            "torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment, and "
            "--standalone or --rdzv-backend=c10d; without them, restarted processes look for the dead ones"
        )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # Gradients travel by NCCL, small counts and objects by gloo.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    # A little longer than the watchdog waits: that one names the phase, while NCCL just kills the process.
    timeout = timedelta(minutes=1.05 * timeout_minutes, seconds=10)
    dist.init_process_group(backend, timeout=timeout)
    rank, world = dist.get_rank(), dist.get_world_size()
    # Nobody waits for a single process, and its steps may be slow.
    return Ranks(rank, world, device, Watchdog(timeout_minutes, rank) if world > 1 else None, timeout)


def first_problem(problem: str, ranks: Ranks) -> str:
    """Collective. The first rank's problem, or "" if none has one: so that no rank goes on alone."""
    return next(filter(None, ranks.gather(problem)), "")


def torchrun_job() -> str:
    """What stays the same when torchrun starts its processes again, and differs in every other start."""
    job, parent = os.environ.get("TORCHELASTIC_RUN_ID", "none"), os.getppid()
    ticks = boot = ""
    with contextlib.suppress(OSError):  # in containers, job, process and host may be the same again
        ticks = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]  # starttime
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"job {job} of process {parent} on {socket.gethostname()}, started at {ticks} in boot {boot}"


def _first_of_node() -> bool:
    """Whether this process speaks for its machine, so that eight ranks do not say the same eight times."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def say_at_once(text: str) -> None:
    """Writes to stderr from any thread and at any moment: print() waits for a lock that others may hold."""
    with contextlib.suppress(OSError):  # nobody may read it any more
        os.write(2, text.encode())


class StopFlag:
    """Set by SIGINT, SIGTERM or SIGHUP, a second one ends the process; `requested` makes all ranks stop at
    one step.

    A terminal or a scheduler may signal processes that torchrun signals too: within a second, two are one.
    A thread listens, because Python calls no handler while the main thread waits in C++ for other ranks.
    """

    def __init__(self) -> None:
        self.signal, self.since = 0, 0.0
        numbers = [signal.SIGINT, signal.SIGTERM]
        # nohup means: go on. torchrun sends a hang-up only where it ends itself.
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN or "TORCHELASTIC_RUN_ID" in os.environ:
            numbers.append(signal.SIGHUP)
        heard, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda *_: None)  # without a handler, nothing is written to the pipe
        threading.Thread(target=self._listen, args=(heard, numbers), name="signals", daemon=True).start()

    def _listen(self, heard: int, numbers: list[int]) -> None:
        while True:
            for number in os.read(heard, 100):
                if number in numbers:
                    self._on_signal(number)

    def _on_signal(self, number: int) -> None:
        if self.signal and time.monotonic() - self.since < 1:
            return
        if self.signal:
            os._exit(128 + number)
        self.signal, self.since = number, time.monotonic()
        if _first_of_node():
            say_at_once("\nstopping after this step; a second signal stops at once\n")

    def requested(self, ranks: Ranks) -> bool:
        """Collective. Whether any rank was asked to stop."""
        return ranks.sum([float(self.signal)])[0] > 0


class LossyFile(io.FileIO):
    """stdout or stderr. What cannot be written (a reader or terminal that is gone, a full disk) never ends a
    run, whose log.jsonl has everything; a short command may end, as under `| head`.
    """

    def write(self, data: bytes) -> int:
        """All of it or as much as there is room for; what fails, or would block, is dropped."""
        try:
            return super().write(data) or len(data)
        except OSError:
            if dist.is_initialized():
                return len(data)
            raise


def lossy(stream: TextIO) -> TextIO:
    """A standard stream over a LossyFile; a stand-in, such as a test's, as it is."""
    if stream not in (sys.__stdout__, sys.__stderr__):
        return stream
    stream.flush()
    raw = io.BufferedWriter(LossyFile(stream.fileno(), "w", closefd=False))
    by_line = stream.line_buffering or stream.write_through  # the latter: python -u, as torchrun starts us
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=by_line)


def run_script(main: Callable[[list[str]], None]) -> None:
    """Runs a script's main. A UserError, lost processes and full memory or disk end it with one sentence, and
    a reader of its output that has seen enough, like `| head`, without any, if it is no run.
    """
    message, lost, code = "", "", 1
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    sys.stdout, sys.stderr = lossy(sys.stdout), lossy(sys.stderr)
    sys.stdout.reconfigure(errors="backslashreplace")  # a reply may hold half a surrogate pair
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
        code = 0
    except UserError as error:
        message = f"error: {error}"
        if many and not _first_of_node():  # the machine's first process may say the same
            _let_torchrun_end_us(5)
    except (Interrupted, KeyboardInterrupt) as stopped:
        message = (str(stopped) or "interrupted") if _first_of_node() else ""
        # Any other code is a crash to torchrun, which would start the run again.
        code = 0 if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) else 130
    except torch.OutOfMemoryError as error:
        message = f"error: out of GPU memory on rank {os.environ.get('RANK', 0)}{phase_of(error)}; "
        message += "lower rollout_batch_size (rollout) or max_tokens_per_micro_batch (update)"
    except SystemExit as stopped:  # --help
        code = stopped.code or 0
    except BaseException as error:
        if full := full_disk(error):
            message = f"error: {full}{phase_of(error)}; make room"
            message += ", and go on with --resume true" if dist.is_initialized() else ""
        elif isinstance(error, PermissionError):
            message = f"error: {error.filename}: {error.strerror}"
        elif isinstance(error, BrokenPipeError) and not dist.is_initialized():
            code = 128 + signal.SIGPIPE
        elif many:
            lost = lost_processes(error)
            message = lost or traceback.format_exc().rstrip()
        else:
            raise
    write_out(sys.stdout)
    if message:
        write_out(sys.stderr, message + "\n")
    if lost:  # so that torchrun's table shows the process that died, and not this one
        _let_torchrun_end_us(1)
    if many and code not in (0, 130):
        # An orderly end would wait for the others, who may sit in a collective; torchrun ends them then.
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    if code:
        sys.exit(code)


def write_out(stream: TextIO, text: str = "") -> None:
    """Writes a text and what is buffered. Where that cannot be, all goes nowhere from here on."""
    try:
        tqdm.write(text, stream, end="")  # tears no progress bar
        stream.flush()  # somebody may follow the file
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def full_disk(error: BaseException) -> str:
    """What could not be written, and why, for an error of Python's or of safetensors'; "" for any other."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return f"{error.filename or 'writing failed'}: {error.strerror}"
    reasons = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    return next((f"writing failed: {reason}" for reason in reasons if reason in str(error)), "")


def _let_torchrun_end_us(seconds: float) -> None:
    """Waits in case torchrun is about to end this process, because another spoke or died before it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)


# How gloo, NCCL and the store say that another process is gone or silent; other errors are bugs of ours.
LOST = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|timed out|timeout|socket closed"
    r"|ncclRemoteError|communicator was aborted",
    re.IGNORECASE,
)


def lost_processes(error: BaseException) -> str:
    """One sentence if a collective's error means that other processes died or hang; "" for any other."""
    gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    if not (gloo or isinstance(error, dist.DistError)) or not LOST.search(str(error)):
        return ""
    said = re.sub(r"^\[\S*/gloo/transport/", "[", str(error).splitlines()[0])[:100]
    return (
        f"rank {os.environ.get('RANK', 0)} lost the other processes{phase_of(error)}: one died, or was "
        "silent for longer than timeout_minutes: see the first error above and torchrun's table below; "
        f"go on with --resume true ({said})"
    )


def phase_of(error: BaseException) -> str:
    """What Clock noted on an error, like " in phase update of step 12"; "" if it came from no phase."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("in phase ")]
    return f" {notes[0]}" if notes else ""  # the first is the innermost


class Watchdog(threading.Thread):
    """Ends this process when a phase goes `minutes` without a heartbeat; torchrun then ends the others.

    A rank that hangs raises no error, and the ranks that wait for it cannot be asked. Says on stderr which
    rank hung in which phase, with the Python stack. Watches nothing between leave() and the next enter().
    """

    def __init__(self, minutes: float, rank: int) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.minutes, self.rank = minutes, rank
        self._phases: list[str] = []  # the inner one last
        self._beat = time.monotonic()
        self.start()

    def enter(self, phase: str, step: int) -> None:
        """A phase begins; phases may be nested."""
        self.heartbeat()
        self._phases.append(f"phase {phase} of step {step}")

    def heartbeat(self) -> None:
        """Something got done: the minutes count from now."""
        self._beat = time.monotonic()

    def leave(self) -> None:
        """The innermost phase is over."""
        self._phases.pop()
        self.heartbeat()

    def run(self) -> None:
        """The thread itself: looks every second."""
        limit = 60 * self.minutes
        while True:
            time.sleep(min(1.0, limit / 20))
            phases = list(self._phases)  # before the time: enter() beats before it adds a phase
            if phases and time.monotonic() - self._beat > limit:
                break
        text = (
            f"rank {self.rank}: no progress for {self.minutes:g} minutes in {phases[-1]}; this process "
            "hangs, or one that it waits for; go on with --resume true, and a larger timeout_minutes if all "
            "were at work; the stack follows\n"
        )
        say_at_once(text)
        faulthandler.dump_traceback(2)
        os._exit(1)  # sys.exit() would end this thread alone


class Clock:
    """Seconds by phase: `with clock("rollout"): …` adds to clock.seconds["rollout"].

    Tells the watchdog which phase of which step it is, and notes it on every error that passes.
    """

    def __init__(self, watchdog: Watchdog | None = None, step: int = 0) -> None:
        self.seconds: dict[str, float] = {}
        self._watchdog, self._step = watchdog, step
        self._stack: list[tuple[str, float]] = []

    def __call__(self, phase: str) -> Clock:
        self._stack.append((phase, time.perf_counter()))
        return self

    def __enter__(self) -> None:
        if self._watchdog:
            self._watchdog.enter(self._stack[-1][0], self._step)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None and torch.cuda.is_available():  # after an error, it might wait for a lost rank
            torch.cuda.synchronize()
        phase, start = self._stack.pop()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        if error is not None:
            error.add_note(f"in phase {phase} of step {self._step}")
        if self._watchdog:
            self._watchdog.leave()
