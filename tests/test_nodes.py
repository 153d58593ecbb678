"""Several nodes: two torchrun agents on this machine, over loopback, do what one process does.

Each agent has one process: with `hsdp` all is replicated, with `full` all is sharded. The start is random and
the reward counts digits: two runs that part by one sampled token never meet again.
"""

import contextlib
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import Forked, as_arguments, run_here, weights, write_task

import grpo
from corpus.sources import read_jsonl
from corpus.tiny_model import build_tiny_model, build_tiny_tokenizer
from ops.export import export

STEPS = 3
DIGITS = """
def digits(completion, answer, tools):
    return sum(letter.isdigit() for letter in completion) / 10
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, object]:
    """A run of a few steps whose start model is made once."""
    folder = tmp_path_factory.mktemp("task")
    task = write_task(folder)
    tokenizer = build_tiny_tokenizer([task["data"].read_text()], 400)
    export(build_tiny_model(tokenizer, hidden=64, layers=2, seed=0), tokenizer, folder / "model")
    (folder / "own.py").write_text(DIGITS)
    own = dict(model=folder / "model", reward=f"{folder / 'own.py'}:digits", lr=1e-4, timeout_minutes=2)
    return task | own | {"steps": STEPS}


def free_port() -> int:
    """Below those that Linux gives to whoever asks for any: it may be seconds until this one is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def start_agent(rendezvous: list[str], settings: dict[str, object], log: Path) -> Forked:
    """torchrun as on one of two nodes; what it says goes to the file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", *rendezvous]
    with log.open("w") as out:
        return Forked([*command, "grpo.py", *as_arguments(settings)], out, out)


@contextlib.contextmanager
def two_nodes(settings: dict[str, object], folder: Path) -> Iterator[tuple[list, list[Path]]]:
    """Two agents and the files with what they say; leaves no process behind, whatever the test finds."""
    logs = [folder / f"agent{node}.txt" for node in (0, 1)]
    port = free_port()
    meet = [f"--rdzv_endpoint=127.0.0.1:{port}", f"--rdzv_id=test{port}", "--rdzv_backend=c10d"]
    agents = [start_agent(meet, settings, log) for log in logs]
    try:
        yield agents, logs
    finally:
        for agent in agents:
            for _ in range(2):  # a second signal stops at once, without a checkpoint
                if agent.poll() is None:
                    agent.send_signal(signal.SIGTERM)
                    time.sleep(1.2)
            if agent.wait(10) is None:
                agent.send_signal(signal.SIGKILL)


def samples(run_dir: Path) -> list[tuple]:
    """Every completion that was logged, in an order that does not depend on who sampled it."""
    rows = read_jsonl(run_dir / "samples.jsonl")
    return sorted((row["step"], row["prompt_id"], row["completion"], row["advantage"]) for row in rows)


def largest_difference(a: Path, b: Path) -> float:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


def test_two_nodes_match_one_process(settings, tmp_path):
    own = settings | {"sharding": "hsdp", "run_dir": tmp_path / "run"}
    with two_nodes(own, tmp_path) as (agents, logs):
        codes = [agent.wait(300) for agent in agents]
    assert codes == [0, 0], logs[0].read_text() + logs[1].read_text()
    assert any("2 process(es)" in log.read_text() for log in logs), "not two runs of one process each"
    alone = run_here(grpo.main, settings | {"run_dir": tmp_path / "alone"})
    assert len(samples(alone)) == STEPS * 64 and samples(tmp_path / "run") == samples(alone)
    assert largest_difference(alone, tmp_path / "run") < 1e-5
    assert largest_difference(alone, settings["model"].parent) > 1e-4, "there was something to learn"


def test_a_signal_to_one_agent_stops_both_and_one_process_goes_on(settings, tmp_path):
    """Slurm ends a job node by node. Whoever hears of it first must not leave the other waiting."""
    endless = settings | {"steps": 1000, "run_dir": tmp_path / "run"}
    with two_nodes(endless, tmp_path) as (agents, logs):
        deadline = time.monotonic() + 300
        while not read_jsonl(tmp_path / "run" / "log.jsonl")[1:] and time.monotonic() < deadline:
            time.sleep(0.05)
        agents[1].send_signal(signal.SIGTERM)
        codes = [agent.wait(300) for agent in agents]
    said = logs[0].read_text() + logs[1].read_text()
    steps = [row["step"] for row in read_jsonl(tmp_path / "run" / "log.jsonl")]
    assert 0 not in codes and f"interrupted after step {steps[-1]}, all is saved" in said, said
    assert (tmp_path / "run" / "latest").read_text() == f"step_{steps[-1]}"
    short = settings | {"steps": steps[-1] + 1}
    gone_on = run_here(grpo.main, short | {"run_dir": tmp_path / "run", "resume": "true"})
    undisturbed = run_here(grpo.main, short | {"run_dir": tmp_path / "undisturbed"})
    assert [row["step"] for row in read_jsonl(gone_on / "log.jsonl")] == list(range(steps[-1] + 2))
    assert samples(gone_on) == samples(undisturbed)
    assert largest_difference(gone_on, undisturbed) < 1e-5
