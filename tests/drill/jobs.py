"""The drill's runs: how they are started, watched and ended, and compared with an undisturbed one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing.forkserver
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

import worker

ROOT = Path(__file__).resolve().parents[2]
RANKS, STEPS = 2, 6
SETTINGS = dict(
    config=ROOT / "configs/tiny.yaml", prompt_template=ROOT / "configs/tiny_prompt.txt", warmup_steps=0,
    synthetic_train=40, eval_cases=4, steps=STEPS, prompts_per_step=4, minibatch_prompts=4, group_size=4,
    max_response_tokens=16, max_tokens_per_micro_batch=1024, save_every=1, keep_checkpoints=3, log_samples=99,
    reward=f"{worker.__file__}:vowels",
)
ENVIRONMENT = {  # as in run.sh
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/drill'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600",
}
LIMIT_S = 240.0  # for one run; more than that is a hang


@dataclass(frozen=True)
class Job:
    """A started run. agent: torchrun's, in a process of its own. log: the output of all its processes."""

    agent: ForkServerProcess
    log: Path
    run: Path

    def said(self) -> str:
        """What its processes have printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def open_site(folder: Path) -> Path:
    """Makes the start model and the undisturbed run `folder/whole`; the folder."""
    multiprocessing.set_forkserver_preload(["worker"])
    with mock.patch.dict(os.environ, ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()
    with launch(folder, "start", script="sft", model="tiny", tiny_hidden=32, steps=2) as job:
        ends(job)
    with launch(folder, "whole") as job:
        ends(job)
    weights = [digest(folder / name / "model/model.safetensors") for name in ("start", "whole")]
    assert weights[0] != weights[1], "training changed nothing, so nothing could be lost"
    return folder


@contextlib.contextmanager
def launch(
    site: Path, name: str, broken: tuple | worker.Death = (), *, script: str = "grpo", ranks: int = RANKS,
    restarts: int = 0, **settings: object,
) -> Iterator[Job]:
    """Starts the run site/name, or goes on with it; at the end nothing of it is left running.

    broken: (fault, step, rank), see worker.BROKEN, or a death. restarts: torchrun's --max-restarts. config: a
    file that has all settings.
    """
    run = settings.get("run_dir", site / name)
    if "config" not in settings:
        switch = {"resume": "true"} if (run / "latest").exists() else {"overwrite": "true"}
        switch = switch if "resume" not in settings else {}
        settings = {"model": site / "start/model", **SETTINGS, **switch, **settings}
    settings = {**settings, "run_dir": run}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    log = site / f"{name}.{time.monotonic_ns()}.log"
    agent = multiprocessing.get_context("forkserver").Process(
        target=worker.run_agent, args=(script, broken, words, ranks, restarts, log)
    )
    agent.start()
    job = Job(agent, log, run)
    try:
        yield job
    finally:
        kill([agent.pid, *rank_pids(job)])


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    """Sends a signal to processes; after SIGKILL, returns when they are gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    while number == signal.SIGKILL and any(map(alive, pids)):
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie, which nobody may collect."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def rank_pids(job: Job) -> list[int]:
    """The job's ranks, in the order of their start, which is that of their numbers."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{job.agent.pid}/task/{job.agent.pid}/children").read_text()
        return sorted(filter(alive, map(int, children.split())))
    return []


def wait_until(job: Job, condition: Callable[[], object], limit: float = LIMIT_S) -> bool:
    """Whether the condition came true before the job ended. Looks often: a save takes 20 ms."""
    deadline = time.monotonic() + limit
    while not condition():
        if job.agent.exitcode is not None or time.monotonic() > deadline:
            return bool(condition())
        time.sleep(0.002)
    return True


def over(job: Job, limit: float = LIMIT_S) -> None:
    """Waits for the end, whatever it is."""
    ended = wait_until(job, lambda: job.agent.exitcode is not None, limit)
    assert ended, f"{job.log}: still running after {limit:g} s"


def ends(job: Job, *parts: str) -> None:
    """Waits for the end: that of a finished run, or one sentence with these parts and no traceback."""
    over(job)
    errors = re.findall(r"\berror: .*", job.said())  # another rank's progress bar may stand before it
    code = job.agent.exitcode
    told = f"{job.log}: ended with {code}, and with: {errors or job.said()[-400:]!r}"
    if parts:
        assert code == 1 and len(errors) == 1 and "run_script" not in job.said(), told
        assert all(part in errors[0] for part in parts), f"not all of {parts} are in {errors[0]!r}"
    else:
        assert code == 0 and (job.run / "model").is_dir(), told


def events(job: Job, rank: int) -> list[str]:
    """What a rank of a job with a worker.Death has changed in its run directory; it died before the last."""
    journal = job.log.with_suffix(f".events_{rank}")
    return journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []


def latest(run: Path) -> int:
    """The step that `latest` names; 0 without one."""
    pointer = run / "latest"
    return int(pointer.read_text().removeprefix("step_")) if pointer.exists() else 0


def rows(path: Path) -> list[dict]:
    """The whole lines of a log, without what depends on the clock and the machine."""
    clock, lines = ("time/", "memory/", "seconds"), path.read_bytes().split(b"\n") if path.exists() else [b""]
    log = [json.loads(line) for line in lines[:-1]]
    return [{k: v for k, v in row.items() if not k.startswith(clock) and "_per_s" not in k} for row in log]


def lost(run: Path) -> int:
    """Steps that were done and are not saved."""
    return max(0, 0, *[row["step"] - latest(run) for row in rows(run / "log.jsonl")])


def digest(path: Path) -> str:
    """sha256 of a file, without what differs between two runs that are the same otherwise."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":  # the header has its entries in random order
        end = 8 + int.from_bytes(content[:8], "little")
        content = json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]
    elif path.suffix in (".yaml", ".html", ".json"):
        content = re.sub(rf'"{path.parent.name}"|run_dir: .*|"wall_s".*'.encode(), b"", content)
    elif path.name == "git.txt":  # somebody may be at work
        content = content.partition(b" ")[0]
    return hashlib.sha256(content).hexdigest()


def same_as_undisturbed(site: Path, run: Path, whole: str = "whole") -> None:
    """All that a run leaves must be that of the undisturbed run, bit by bit, but for clocks and drawings."""
    whole, last = site / whole, latest(site / whole)
    names = {path.relative_to(whole) for path in [*whole.glob("*"), *whole.glob("model/*")]}
    left = {path.relative_to(run) for path in [*run.glob("*"), *run.glob("model/*")]}
    strange = [str(n) for n in names ^ left if not re.fullmatch(r"step_\d+(.given_up)?|resumed_by", str(n))]
    assert not strange, f"{run} and the undisturbed run do not both have {strange}"
    exact = {name for name in names if name.suffix in (".safetensors", ".json", ".txt", ".yaml", ".html", "")}
    exact |= {path.relative_to(whole) for path in whole.glob(f"step_{last}/*.safetensors")}
    for name in sorted({*exact, Path("samples.jsonl")} - {Path("lock"), Path("resumed_by")}):
        same = (whole / name).is_dir() or digest(run / name) == digest(whole / name)
        assert same, f"{run / name} differs from the undisturbed run's"
    steps = [row["step"] for row in rows(run / "log.jsonl")]
    assert steps == list(range(last + 1)), f"log.jsonl has the steps {steps}"
    same = rows(run / "log.jsonl") == rows(whole / "log.jsonl")
    assert same, f"figures in {run / 'log.jsonl'} differ from the undisturbed run's"
