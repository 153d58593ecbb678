"""ops/run_dir.py: a run's folder explains itself, is not lost by accident, and has one run at a time."""

import dataclasses
import multiprocessing
import os
import socket
import time
from pathlib import Path

import pytest
from helpers import CPU

from config import Config, ConfigError, load_config
from corpus.sources import append_jsonl, read_jsonl
from distributed.ranks import Ranks
from ops import run_dir
from ops.run_dir import atomic_folder, cut_log, open_run


class OneRank(Ranks):
    """A single process without a process group: what is gathered is the item itself."""

    def gather(self, item):
        return [item]


ONE = OneRank(0, 1, CPU)


def opened(path: Path, **settings) -> Path:
    return open_run(Config(run_dir=str(path), **settings), ONE)


def contents(path: Path) -> list[tuple[Path, bytes]]:
    return sorted((file, file.read_bytes()) for file in (path, *path.rglob("*")) if file.is_file())


def refused(path: Path, **settings) -> str:
    before = contents(path)
    with pytest.raises(ConfigError) as caught:
        opened(path, **settings)
    assert contents(path) == before, "a refusal touches nothing"
    return str(caught.value)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory with a checkpoint."""
    path = opened(tmp_path / "run")
    (path / "step_2").mkdir()
    (path / "step_2" / "state.json").write_text('{"step": 2}')
    (path / "latest").write_text("step_2")
    (path / "log.jsonl").write_text('{"step": 1}\n')
    return path


def test_a_new_run_explains_itself(tmp_path):
    """Without the switches: whoever starts from its config must neither delete the run nor go back in it."""
    config = load_config(["--run_dir", str(tmp_path / "run"), "--lr", "1e-6", "--data", "a b.json"])
    for switches in ({"overwrite": True}, {"resume": True, "resume_step": 3}):
        path = open_run(dataclasses.replace(config, **switches), ONE)
        assert load_config(["--config", str(path / "config.yaml")]) == config
        assert (path / "git.txt").read_text().startswith(("commit ", "no git repository"))
        (path / "latest").write_text("step_3")


def test_an_existing_run_is_refused_resumed_or_overwritten(run):
    message = refused(run)
    assert "--resume true" in message and "--overwrite true" in message and str(run) in message
    for overwrite in (False, True):
        before = contents(run / "step_2") + contents(run / "log.jsonl")
        opened(run, resume=True, overwrite=overwrite)
        assert contents(run / "step_2") + contents(run / "log.jsonl") == before, "resume wins over overwrite"
    opened(run, overwrite=True)
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "git.txt", "lock"]


def test_resume_needs_something_to_resume(run, tmp_path):
    assert "to resume" in refused(tmp_path / "new", resume=True)
    (run / "latest").unlink()
    assert "to resume" in refused(run, resume=True)
    (run / "warmup").mkdir()
    (run / "warmup" / "latest").write_text("step_1")
    assert opened(run, resume=True) == run, "a run that was stopped during its warm-up"


def test_a_folder_that_is_no_run_is_never_deleted(tmp_path):
    """--run_dir ~ --overwrite true must not be the end of a home directory."""
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "not a run directory" in refused(tmp_path, overwrite=True)


def test_a_resume_with_another_config_shows_what_changed(run, capsys):
    """A run that is half one method and half another is neither; what only steers may change, and is said."""
    message = refused(run, resume=True, group_size=6, temperature=1.0, lr=2e-6)
    assert message.endswith("must stay as they were: group_size 5 -> 6, temperature 0.7 -> 1.0")
    opened(run, resume=True, lr=2e-6, steps=7)
    opened(run, resume=True, lr=2e-6, steps=7)
    assert capsys.readouterr().out == "resume: steps 0 -> 7, lr 1e-06 -> 2e-06\n", "once"


def hold(path: Path, begun) -> None:
    opened(path, overwrite=True)
    begun.set()
    time.sleep(100)


def test_two_runs_in_one_directory(run):
    """Two runs that write the same log and delete each other's checkpoints leave nothing of use."""
    inner = opened(run / "sft")
    (inner / "latest").write_text("step_1")
    (inner / "lock").read_text()  # closing the file drops this process's own lock
    forks = multiprocessing.get_context("fork")
    begun = forks.Event()
    other = forks.Process(target=hold, args=(inner, begun))
    other.start()
    try:
        assert begun.wait(20)
        owner = f"in use by process {other.pid} on {socket.gethostname()} since 2"
        for settings in ({}, {"resume": True}, {"overwrite": True}):
            assert owner in refused(inner, **settings), "the other overwrote the folder, and has it still"
        assert owner in refused(run, overwrite=True), "it would delete the run inside"
    finally:
        other.kill()
        other.join()
    opened(inner, overwrite=True)


def test_processes_that_torchrun_starts_again_go_on(tmp_path, monkeypatch):
    path = tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a1")
    opened(path, overwrite=True)
    (path / "log.jsonl").write_text('{"step": 0}\n')
    opened(path)
    (path / "latest").write_text("step_2")
    opened(path, overwrite=True)
    assert (path / "log.jsonl").exists() and (path / "latest").exists(), "overwrite meant the first start"


def test_a_start_that_was_refused_or_died_while_it_overwrote_does_not_pass_as_a_restart(run, monkeypatch):
    """--max-restarts starts it again: it must not go on with the run that was there before."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "c3")
    for restarts in (0, 1):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        assert "--resume true" in refused(run)
    with monkeypatch.context() as broken:
        broken.setattr(run_dir.shutil, "rmtree", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opened(run, overwrite=True)
    opened(run, overwrite=True)
    assert not (run / "step_2").exists()


def test_cut_log_drops_the_steps_that_will_be_done_again(tmp_path):
    """Also a line that broke off, and whatever a completion holds: str.splitlines() would cut at U+2028."""
    path = tmp_path / "log.jsonl"
    rows = [{"step": step, "text": f"ü{step}\u2028\u0085\v\n\r."} for step in (0, 1, 2, 2, 3, 4)]
    append_jsonl(path, rows)
    with path.open("a") as file:
        file.write('{"step": 5, "te')
    cut_log(path, 2)
    append_jsonl(path, rows[4:])
    assert read_jsonl(path) == rows


def test_a_folder_is_whole_or_not_there(tmp_path):
    """Disk full while a model is written: the one before is still whole."""
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")
        assert not target.exists()
    with pytest.raises(OSError, match="disk full"), atomic_folder(target) as folder:
        (folder / "b").write_text("half")
        raise OSError("disk full")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"a": "old"}
    with atomic_folder(target) as folder:
        assert not any(folder.iterdir()), "the next try starts clean"
    assert os.listdir(tmp_path) == ["model"]
