"""distributed/ranks.py: how processes stop together, and what happens when one of them dies or hangs."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import ENVIRONMENT, ROOT, Forked, as_arguments, write_task
from test_nodes import free_port

from config import ConfigError
from distributed import ranks as ranks_module
from distributed.ranks import Clock, Interrupted, Watchdog, run_script


def watched(monkeypatch, events: dict[int, list[tuple]]) -> tuple[float, list]:
    """Runs a watchdog of one minute for 200 s of a false time, with calls at given seconds.

    Returns when it ended, its words and the exit code of the process.
    """
    now, said = [0.0], []

    def sleep(duration: float) -> None:
        now[0] += duration
        for name, *arguments in events.get(now[0], ()):
            getattr(dog, name)(*arguments)
        if now[0] == 200:
            raise InterruptedError

    def leave(code: int) -> None:
        said.append(code)
        raise InterruptedError

    false_os = SimpleNamespace(write=lambda _, text: said.append(text.decode()), _exit=leave)
    monkeypatch.setattr(ranks_module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(ranks_module, "os", false_os)
    monkeypatch.setattr(ranks_module.threading.Thread, "start", lambda self: None)
    dog = Watchdog(1.0, 3)
    with pytest.raises(InterruptedError):
        dog.run()
    return now[0], said


OUTER, INNER, LEAVE, BEAT = ("enter", "evaluate", 1), ("enter", "rollout", 1), ("leave",), ("heartbeat",)
WATCHED = [  # (calls by second, when the watchdog ends, in which phase)
    ({10: [INNER, LEAVE, OUTER]}, 71, "evaluate"),
    ({10: [OUTER, INNER]}, 71, "rollout"),
    ({10: [OUTER, INNER], 60: [LEAVE]}, 121, "evaluate"),  # what ends inside is progress
    ({10: [OUTER], 60: [BEAT], 110: [BEAT], 160: [BEAT]}, 200, ""),
    ({10: [OUTER], 60: [LEAVE]}, 200, ""),
    ({150: [OUTER]}, 200, ""),  # the minutes count from the start of the phase
]


@pytest.mark.parametrize(("events", "end", "phase"), WATCHED)
def test_the_watchdog_bites_when_a_phase_stands_still(events, end, phase, monkeypatch):
    when, said = watched(monkeypatch, events)
    assert when == end and said[1:] == [1] * bool(phase)
    assert not phase or said[0].startswith(f"rank 3: no progress for 1 minutes in phase {phase} of step 1; ")


PAIR = "[/build/third_party/gloo/gloo/transport/tcp/pair.cc:537]"
LOST = [
    RuntimeError(f"{PAIR} Read error [127.0.0.1]:59049: Connection reset by peer. This is typically …"),
    RuntimeError(f"{PAIR} Timed out waiting 4000ms for recv operation to complete"),
    dist.DistBackendError("NCCL error in: x.cpp:1, remote process exited\nncclRemoteError: A call failed …"),
    dist.DistBackendError("NCCL communicator was aborted on rank 1."),
    dist.DistStoreError("wait timeout after 60000ms, keys: /x"),
]
ORDINARY = [
    RuntimeError("Connection closed by peer"),  # of the user's own reward function, for example
    RuntimeError(f"[enforce fail at {PAIR[1:-1]}] op.preamble.length <= op.nbytes. 100 vs 4. Received …"),
    dist.DistBackendError("NCCL error in: x.cpp:1\nncclInvalidUsage: This usually reflects invalid usage"),
]


@pytest.mark.parametrize("error", [*LOST, *ORDINARY])
def test_lost_processes_are_told_from_ordinary_errors(error):
    error.add_note("in phase update of step 12")
    said = ranks_module.lost_processes(error)
    assert bool(said) == (error in LOST)
    assert not said or said.startswith("rank 0 lost the other processes in phase update of step 12: ")


DISK = OSError(28, "No space left on device", "log.jsonl")
ENDS = [  # (error, rank of two, exit code, what it says, pause)
    (RuntimeError(f"{PAIR} Connection closed by peer"), 1, 1, "rank 1 lost the other processes in phase ", 1),
    (RuntimeError("a bug"), 1, 1, "Traceback", 0),
    (torch.OutOfMemoryError("1 GiB"), 1, 1, "error: out of GPU memory on rank 1 in phase update of", 0),
    (DISK, 0, 1, "error: log.jsonl: No space left on device in phase", 0),
    (OSError(28, "No space left on device"), 1, 1, "error: writing failed: No space left on device in", 0),
    (ValueError("I/O: No space left on device (os error 28)"), 0, 1, "error: writing failed: No space", 0),
    (PermissionError(13, "Permission denied", "out"), 0, 1, "error: out: Permission denied\n", 0),
    (ConfigError("x"), 0, 1, "error: x\n", 0),
    (ConfigError("x"), 1, 1, "error: x\n", 5),  # rank 0 said it, or did not fail
    (Interrupted("run", 3), 0, 130, "interrupted after step 3, all is saved; to go on: ", 0),
    (Interrupted("run", 3), 1, 130, "", 0),
]


@pytest.mark.parametrize(("error", "rank", "code", "words", "pause"), ENDS)
def test_how_a_script_ends(error, rank, code, words, pause, monkeypatch, capsys):
    """One sentence, except for bugs; the pauses let torchrun end a process that has nothing to add."""
    pauses: list[float] = []
    for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(ranks_module.os, "_exit", sys.exit)
    monkeypatch.setattr(ranks_module.time, "sleep", pauses.append)
    monkeypatch.setattr(ranks_module.signal, "signal", lambda *_: None)

    def main(arguments: list[str]) -> None:
        with Clock(step=4)("update"):
            raise error

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    said = capsys.readouterr().err
    assert caught.value.code == code and said.startswith(words) and sum(pauses) == pause
    assert said.count("\n") <= 1 or "a bug\nin phase update of step 4" in said


WAITS = """
import signal, sys
from datetime import timedelta
from types import SimpleNamespace
import torch.distributed as dist
from distributed import ranks

class StopFlag(ranks.StopFlag):
    def _on_signal(self, number):
        super()._on_signal(number)
        print(number, flush=True)

ignored, *times = sys.argv[1:]
signal.signal(signal.Signals[ignored], signal.SIG_IGN)
ranks.time = SimpleNamespace(monotonic=map(float, times).__next__)
store = dist.TCPStore("127.0.0.1", 0, 1, True)
StopFlag()
print("ready", flush=True)
store.wait(["never"], timedelta(minutes=2))  # in C++
"""
SIGNALS = [  # (what the process is to ignore, torchrun's, signals with their times: the last ends it)
    ("SIGUSR1", False, [(0, "SIGTERM"), (1.1, "SIGINT")]),
    ("SIGUSR1", False, [(0, "SIGHUP"), (1.1, "SIGHUP")]),
    # Slurm signals torchrun's processes, and torchrun does too: that must not cost the checkpoint.
    ("SIGUSR1", False, [(0, "SIGTERM"), (0.9, "SIGTERM"), (1.1, "SIGTERM")]),
    ("SIGHUP", False, [(0, "SIGHUP"), (2, "SIGHUP"), (4, "SIGTERM"), (6, "SIGTERM")]),  # nohup
    ("SIGHUP", True, [(0, "SIGHUP"), (1.1, "SIGHUP")]),
]


@pytest.mark.parametrize("ignored, torchrun, signals", SIGNALS)
def test_a_second_signal_ends_a_process_that_waits_in_cpp(ignored, torchrun, signals):
    """The clock is the test's own, and the next signal is sent when the one before has been heard."""
    is_heard = [torchrun or name != ignored for _, name in signals]
    times = [str(when) for (when, _), heard in zip(signals, is_heard) if heard]
    waiting = subprocess.Popen(
        [sys.executable, "-c", WAITS, ignored, *times], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | ({"TORCHELASTIC_RUN_ID": "1"} if torchrun else {}),
    )
    try:
        assert waiting.stdout.readline() == "ready\n"
        for (_, name), heard in zip(signals[:-1], is_heard):
            waiting.send_signal(signal.Signals[name])
            assert not heard or waiting.stdout.readline() == f"{signal.Signals[name]:d}\n"
        last = signal.Signals[signals[-1][1]]
        waiting.send_signal(last)
        _, said = waiting.communicate(timeout=60)
    finally:
        waiting.kill()
    assert waiting.returncode == 128 + last and said.count("stopping after this step") == 1


def test_a_fresh_start_is_no_restart(monkeypatch):
    """Containers have the same host name, process ids and job at every start."""
    jobs = []
    for _ in range(2):
        parent = subprocess.Popen(["sleep", "60"])
        monkeypatch.setattr(os, "getppid", lambda pid=parent.pid: pid)
        again = [ranks_module.torchrun_job() for _ in range(2)]
        parent.kill()
        parent.wait()
        assert again[0] == again[1]
        jobs.append(again[0].replace(f" {parent.pid} ", " 1 "))
        time.sleep(0.05)
    assert jobs[0] != jobs[1]


def test_restarts_need_a_store_that_forgets(monkeypatch):
    """With torchrun's default, half of the restarts failed: new processes looked for the dead ones."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: 1 / 0)
    with pytest.raises(ConfigError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        ranks_module.start_ranks()


WORKER = """
import dataclasses, os, signal, sys, time
from pathlib import Path
from config import Config
from distributed.ranks import Clock, Interrupted, StopFlag, Watchdog, run_script, start_ranks
from ops.run_dir import open_run

def main(arguments):
    fault, run_dir = arguments
    ranks = start_ranks(2.0)
    open_run(Config(run_dir=run_dir), ranks)
    stop = StopFlag()
    assert ranks.watchdog.minutes == 2.0
    first = ranks.gather(os.getpid())[0]
    if fault == "SIGSTOP":
        ranks = dataclasses.replace(ranks, watchdog=Watchdog(0.05, ranks.rank))
    for step in (1, 2):
        with Clock(ranks.watchdog, step)("update"):
            ranks.sum([1.0])
            if step == 2 and ranks.rank == 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                if fault == "SIGSTOP":  # torchrun would wait half a minute for it
                    until = f"while kill -0 {first} 2>&-; do sleep 0.1; done"
                    os.popen(f"trap '' TERM; {until}; kill -9 {os.getpid()}")
                os.kill(os.getpid(), signal.Signals[fault])
                while not stop.signal:  # another thread hears it, when it gets its turn
                    time.sleep(0.01)
            ranks.sum([1.0])
        if stop.requested(ranks):
            raise Interrupted(run_dir, step)
        if ranks.main:
            (Path(run_dir) / f"step_{step}").mkdir(exist_ok=True)
            (Path(run_dir) / f"step_{step}" / "manifest.json").touch()
    if ranks.main:
        print("done")

run_script(main)
"""


FAULTS = {  # what rank 0 says of them
    "SIGKILL": "rank 0 lost the other processes in phase update of step 2",
    "SIGSTOP": "rank 0: no progress for 0.05 minutes in phase update of step 2;",
    "SIGTERM": "interrupted after step 2, all is saved",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_dies_or_hangs_ends_the_others_and_torchrun_goes_on(fault, tmp_path):
    """SIGSTOP stands for any hang: no error, no closed connection. run.sh's long grace must delay nothing."""
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=1".split()
    own = dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3600")
    command = [sys.executable, *torchrun, tmp_path / "worker.py", fault, tmp_path / "run"]
    with (tmp_path / "log").open("w+") as log:
        agent = Forked(command, log, log, env=ENVIRONMENT | own)
        try:
            code = agent.wait(300)
        finally:
            agent.send_signal(signal.SIGTERM)  # it ends its workers, which kill() would leave behind
        said = log.read()
    assert FAULTS[fault] in said and (fault != "SIGSTOP" or "in all_reduce" in said), "the stack says where"
    stopped = fault == "SIGTERM"  # on purpose, so nothing starts again
    assert ("going on from the last checkpoint" in said) is not stopped
    assert ("done" in said.splitlines()) is not stopped and code == 0


@pytest.mark.parametrize("words, unbuffered", [
    ("grpo.py -h", "1"), ("-m ops.plot --help", ""), ("eval_bfcl.py score --help", ""), ("data.py", ""),
    ("-m ops.plan --config configs/tiny.yaml", ""),
])
def test_output_that_nobody_reads_ends_a_command_without_a_traceback(words, unbuffered):
    """As `| head` does, which goes away in the middle. What is buffered is written at the process's end."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, *words.split()], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True,
        env=ENVIRONMENT | {"PYTHONUNBUFFERED": unbuffered},
    )
    os.close(write)
    assert done.stderr == "" and done.returncode in (0, 128 + signal.SIGPIPE)  # 0: argparse's help


def test_a_run_goes_on_without_its_output(tmp_path, lost_output):
    """Nor does a file that it opens take the place of a closed stream."""
    run = """
import distributed.start
import os, sys
from tqdm import tqdm
from distributed.ranks import StopFlag, run_script, start_ranks

def main(arguments):
    with open(arguments[0], "w") as file:
        start_ranks(1.0)
        for i in tqdm(range(3), miniters=1, mininterval=0):
            print("x" * 10000, flush=True)
            print("y", file=sys.stderr)
            os.system("echo z; echo z >&2")
        file.write("went on")

run_script(main)
"""
    wrapped, streams = lost_output
    done = subprocess.run(
        [*wrapped, sys.executable, "-c", run, tmp_path / "log"], env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        **streams,
    )
    assert done.returncode == 0 and (tmp_path / "log").read_text() == "went on"


@pytest.fixture(params=["pipe", "full", "terminal", "closed"])
def lost_output(request):
    """How to start a process whose output goes nowhere: words before its command, and its streams."""
    if request.param == "closed":
        yield ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"], {}
        return
    if request.param == "full":
        write = os.open("/dev/full", os.O_WRONLY)
    else:
        read, write = os.pipe() if request.param == "pipe" else os.openpty()
        os.close(read)
    yield [], {"stdout": write, "stderr": write}
    os.close(write)


IN_SETUP = """
import os, signal, sys
import grpo, session
from distributed.ranks import run_script

load = session.load_policy
def stop(config, path, temperature, ranks, *rest):
    ranks.gather(None)  # the time of both counts from here
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return load(config, path, temperature, ranks, *rest)
session.load_policy = stop
run_script(grpo.main)
"""


def test_a_rank_that_stops_while_the_model_loads_is_noticed(tmp_path):
    own = dict(model="tiny", timeout_minutes=0.15, run_dir=tmp_path / "run", warmup_steps=0)
    arguments = as_arguments(write_task(tmp_path) | own)
    common = ENVIRONMENT | dict(PYTHONPATH=str(ROOT), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", IN_SETUP, *arguments], stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=common | dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"),
        )
        for rank in (0, 1)
    ]
    try:
        _, said = ranks[0].communicate(timeout=300)
    finally:
        for process in ranks:
            process.kill()
    assert ranks[0].returncode == 1
    assert "rank 0: no progress for 0.15 minutes in phase set-up of step 0;" in said


INTERRUPTED = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
IN_CPP = f"try:\n    {INTERRUPTED}\nexcept BaseException:\n    import nothing"
COMMANDS = "grpo.py sft.py data.py eval_bfcl.py eval_apibank.py -m_ops.plot -m_ops.doctor -m_ops.chat".split()


@pytest.mark.parametrize("module", [INTERRUPTED, IN_CPP])
@pytest.mark.parametrize("words", COMMANDS)
def test_ctrl_c_during_the_imports_is_no_traceback(words, module, tmp_path):
    """Where a module of C++ is interrupted, Python reports a failed import."""
    for name in ("torch", "yaml", "numpy"):
        (tmp_path / f"{name}.py").write_text(module)
    done = subprocess.run(
        [sys.executable, *words.split("_", words.startswith("-")), "--help"], cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )
    assert done.stderr == "interrupted\n" and done.returncode in (-signal.SIGINT, 1)
