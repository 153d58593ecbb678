"""What can happen to one of many processes: it hangs, it loses the others, it runs out of memory, it has a double."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class Watchdog(threading.Thread):
    """Ends this process when a phase goes on for `minutes` without a beat: torchrun then ends the others.

    A rank that hangs raises no error, and the ranks that wait for it cannot be asked. Says on stderr which rank hung in
    which phase, with the Python stack. Watches nothing between leave() and the next enter().
    """

    def __init__(self, minutes: float, rank: int) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.minutes, self.rank = minutes, rank
        self._phases: list[str] = []  # the inner one last
        self._beat = time.monotonic()
        self.start()

    def enter(self, phase: str, step: int) -> None:
        """A phase begins; phases may be nested."""
        self.beat()
        self._phases.append(f"phase {phase} of step {step}")

    def beat(self) -> None:
        """Something got done: the minutes count from now. For phases that may take longer than that."""
        self._beat = time.monotonic()

    def leave(self) -> None:
        """The innermost phase is over."""
        self._phases.pop()
        self.beat()

    def run(self) -> None:
        """The thread itself: looks every second."""
        limit = 60 * self.minutes
        while True:
            time.sleep(min(1.0, limit / 20))
            phases = list(self._phases)  # before the time: enter() beats before it adds a phase
            if phases and time.monotonic() - self._beat > limit:
                break
        text = (
            f"rank {self.rank}: no progress for {self.minutes:g} minutes in {phases[-1]}; this process hangs, or one that "
            "it waits for; go on with --resume true, and a larger timeout_minutes if all were at work; the stack follows\n"
        )
        os.write(2, text.encode())  # not print(): the main thread may hold its lock
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
        if torch.cuda.is_available() and error is None:  # after an error, it might wait for a rank that is gone
            torch.cuda.synchronize()
        phase, start = self._stack.pop()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        if error is not None:
            error.add_note(f"in phase {phase} of step {self._step}")
        if self._watchdog:
            self._watchdog.leave()


# How gloo, NCCL and the store say that another process is gone or silent; every other error of theirs is a bug of ours.
LOST = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|timed out|timeout|socket closed"
    r"|ncclRemoteError|communicator was aborted",
    re.IGNORECASE,
)


def lost_processes(error: BaseException) -> str:
    """One sentence if this error of a collective means that other processes died or hang; "" for any other error."""
    collective = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))
    if not collective or not LOST.search(str(error)):
        return ""
    said = re.sub(r"^\[\S*/gloo/transport/", "[", str(error).splitlines()[0])[:100]
    return (
        f"rank {os.environ.get('RANK', 0)} lost the other processes{phase_of(error)}: one died, or was silent for longer "
        f"than timeout_minutes: see the first error above and torchrun's table below; go on with --resume true ({said})"
    )


def phase_of(error: BaseException) -> str:
    """What Clock noted on an error, like " in phase update of step 12"; "" if it came from no phase."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("in phase ")]
    return f" {notes[0]}" if notes else ""  # the first is the innermost


def take_lock(path: Path, sign: bool = False) -> tuple[bool, str]:
    """Locks the file for this process until it ends -> (whether it is ours now, what the file said before).

    sign: it then names this process in its first line, and torchrun's job in the second. The kernel drops the lock with
    the process, however that died. lockf() and not flock(): forked children do not keep it, and this process may ask
    again. The descriptor stays open on purpose, and nothing else here may open the file: closing either drops the lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    said = os.pread(descriptor, 1000, 0).decode("utf-8", "replace")
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False, said
    except OSError as error:
        print(f"{path}: this file system has no locks ({error.strerror}); start no second run there", file=sys.stderr)
    if sign:
        owner = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{owner}\n{torchrun_job()}\n".encode(), 0)
    return True, said


def torchrun_job() -> str:
    """What stays the same when torchrun starts its processes again, and differs in every other start."""
    return f"job {os.environ.get('TORCHELASTIC_RUN_ID', 'none')} of process {os.getppid()} on {socket.gethostname()}"


def note_out_of_memory(run_dir: Path, phase: str, step: int) -> None:
    """Leaves run_dir/out_of_memory.json for the next start of this run. Any rank may call it."""
    note = {"phase": phase, "step": step, "rank": int(os.environ.get("RANK", 0))}
    beside = run_dir / f"out_of_memory.{os.getpid()}.tmp"  # several ranks may run out at the same moment
    with contextlib.suppress(OSError):  # the note is a help; what must be seen is the error that led here
        beside.write_text(json.dumps(note), encoding="utf-8")
        beside.replace(run_dir / "out_of_memory.json")


def take_out_of_memory(run_dir: Path) -> dict | None:
    """Reads and removes that note; None if there is none. For rank 0 alone: `ranks.gather(…)[0]` tells the others."""
    path = run_dir / "out_of_memory.json"
    if not path.exists():
        return None
    note = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return note
