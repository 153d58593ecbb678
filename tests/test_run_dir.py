"""ops/run_dir.py: a run's folder explains itself, is not lost by accident, and has one run at a time."""

import multiprocessing
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
from helpers import CPU, write_checkpoint

from config import Config, ConfigError, load_config
from corpus.sources import append_jsonl, read_jsonl
from distributed.ranks import Ranks
from ops import run_dir
from ops.run_dir import (
    OLD,
    begin_or_resume,
    cut_log,
    let_go,
    open_run,
    replacing,
    settings_of,
    write_start,
)

HASHES = {"method": "grpo", "start": "m", "inputs": {"data": "1", "test_data": "2"}, "model": {"a.json": "3"}}


class OneRank(Ranks):
    """A single process without a process group: what is gathered is the item itself."""

    def gather(self, item):
        return [item]


ONE = OneRank(0, 1, CPU)


def opened(path: Path, hashes: dict = HASHES, **settings) -> Path:
    """As a run does it that can start."""
    config = Config(run_dir=str(path), **settings)
    open_run(config, ONE)
    with replacing(path, ONE):
        identity = identity_of(config, hashes)
        begin_or_resume(config, identity, ONE)
        write_start(path, identity, ONE)
    let_go(path, ONE)
    return path


def identity_of(config: Config, hashes: dict = HASHES) -> dict:
    return {"settings": settings_of(config), **hashes}


def contents(path: Path) -> list[tuple[Path, bytes]]:
    return sorted((file, file.read_bytes()) for file in (path, *path.rglob("*")) if file.is_file())


def refused(path: Path, hashes: dict = HASHES, **settings) -> str:
    before = [pair for pair in contents(path) if pair[0].name != "lock"]
    with pytest.raises(ConfigError) as caught:
        opened(path, hashes, **settings)
    after = [pair for pair in contents(path) if pair[0].name != "lock"]
    assert after == before, "a refusal touches nothing"
    return str(caught.value)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory with a checkpoint."""
    path = opened(tmp_path / "run")
    identity = identity_of(Config(run_dir=str(path))) | {"changes": []}
    write_checkpoint(path, {"step": 2, "run": identity})
    (path / "log.jsonl").write_text('{"step": 1}\n')
    return path


def test_a_new_run_explains_itself(tmp_path):
    """Without the switches: whoever starts from its config must neither delete the run nor go back in it."""
    path = tmp_path / "run"
    config = load_config(["--run_dir", str(path), "--lr", "1e-6", "--data", "a b.json"])
    for switches in ({"overwrite": True}, {"resume": True, "resume_step": 3, "accept_changes": True}):
        opened(path, data="a b.json", **switches)
        assert load_config(["--config", str(path / "config.yaml")]) == config
        assert (path / "git.txt").read_text().startswith(("commit ", "no git repository"))
        assert (path / "git.txt").stat().st_mode & 0o777 == 0o600, "the changes may be somebody's secret"
        shutil.rmtree(path / "step_3", ignore_errors=True)
        write_checkpoint(path, {"step": 3, "run": identity_of(config) | {"changes": []}})


def test_the_code_of_every_part_of_a_run_is_noted(run, monkeypatch):
    monkeypatch.setattr(run_dir, "git_state", (run / "git.txt").read_text)
    first = run_dir.git_state()
    opened(run, resume=True)
    assert (run / "git.txt").read_text() == first
    monkeypatch.setattr(run_dir, "git_state", lambda: "commit 3f2\n")
    for _ in range(2):
        opened(run, resume=True)
        said = (run / "git.txt").read_text()
        assert said.startswith(first) and said.endswith(" with\ncommit 3f2\n")
        assert said.count(" with\ncommit 3f2\n") == 1


def test_an_existing_run_is_refused_resumed_or_overwritten(run):
    message = refused(run)
    assert "--resume true" in message and "--overwrite true" in message and str(run) in message
    before = contents(run / "step_2") + contents(run / "log.jsonl")
    opened(run, resume=True)
    assert contents(run / "step_2") + contents(run / "log.jsonl") == before
    assert "choose one" in refused(run, resume=True, overwrite=True)
    opened(run, overwrite=True)
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "git.txt", "lock"]


def test_what_a_kill_left_half_written_is_removed(run):
    before = contents(run / "step_2") + contents(run / "log.jsonl")
    for name in ("step_7.tmp/a", "warmup/step_1.tmp/a", ".model.1f.tmp/a", "latest.tmp", ".12.curves.png"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("half")
    opened(run, resume=True)
    assert contents(run / "step_2") + contents(run / "log.jsonl") == before
    assert not [*run.rglob("*.tmp"), *run.glob(".*")]


def test_resume_needs_something_to_resume(run, tmp_path):
    """A whole checkpoint, with or without `latest`; also one of the warm-up."""
    assert "to resume" in refused(tmp_path / "new", resume=True)
    (run / "step_2").rename(run / "step_2.given_up")
    assert "to resume" in refused(run, resume=True)
    (run / "warmup").mkdir()
    shutil.copytree(run / "step_2.given_up", run / "warmup" / "step_2")
    assert opened(run, resume=True) == run, "a run that was stopped during its warm-up"


def test_a_folder_that_is_no_run_is_never_deleted(tmp_path):
    """--run_dir ~ --overwrite true must not be the end of a home directory."""
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "not a run directory" in refused(tmp_path, overwrite=True)
    (tmp_path / "yoga" / "warmup").mkdir(parents=True)
    (tmp_path / "yoga" / "warmup" / "plan.txt").write_text("of somebody who never started a run here")
    assert "not a run directory" in refused(tmp_path / "yoga", overwrite=True)


@pytest.mark.parametrize(
    "left", ["config.yaml.tmp", "git.txt.tmp", "warmup/.start.1f.tmp/a", "warmup/start/a"]
)
def test_a_start_that_was_killed_before_it_wrote_its_files_is_started_again(tmp_path, left):
    path = open_run(Config(run_dir=str(tmp_path / "run")), ONE)
    (path / left).parent.mkdir(parents=True, exist_ok=True)
    (path / left).write_text("half")
    (path / "thesis.tex").write_text("years of work")
    assert "not a run directory" in refused(path, overwrite=True)
    (path / "thesis.tex").unlink()
    if "warmup" in left:  # a model for other settings, perhaps
        assert "--overwrite true" in refused(path)
    opened(path, overwrite="warmup" in left)
    assert sorted(path.name for path in path.iterdir()) == ["config.yaml", "git.txt", "lock"]


@pytest.mark.parametrize("key", "model reference data test_data prompt_template reward bfcl apibank".split())
def test_what_a_run_needs_is_not_overwritten_by_it(run, key):
    inside = run / "model" / "file.py"
    inside.parent.mkdir()
    inside.write_text("x")
    value = {"data": f"elsewhere.jsonl, {inside}", "reward": f"{inside}:score"}.get(key, str(inside))
    message = refused(run, overwrite=True, **{key: value})
    assert message.startswith(f"{key}: ") and "would be overwritten" in message


def test_an_overwrite_that_cannot_start_leaves_the_old_run(run):
    before = [pair for pair in contents(run) if pair[0].name != "lock"]
    open_run(Config(run_dir=str(run), overwrite=True), ONE)
    assert not (run / "step_2").exists()
    with pytest.raises(ConfigError), replacing(run, ONE):
        (run / "warmup").mkdir()
        (run / "log.jsonl").write_text("new")
        raise ConfigError("this model cannot be trained")
    assert contents(run) == sorted([*before, (run / "lock", b"")])


class Killed(BaseException):
    """As if by kill -9: nothing is tidied up."""


def test_a_kill_while_overwriting_leaves_the_old_run_or_the_new_one(run, monkeypatch):
    """At every change of the folder; after that --resume goes on with the old, or --overwrite is taken."""
    (run / "step_1").mkdir()
    old = [pair for pair in contents(run) if pair[0].name != "lock"]
    resumed = overwritten = 0
    for k in range(100):
        backup = shutil.copytree(run, run.with_name("backup"))
        calls = [0]

        def counted(original, k=k, calls=calls):
            def function(*arguments, **options):
                calls[0] += 1
                if calls[0] > k:
                    raise Killed
                return original(*arguments, **options)
            return function

        with monkeypatch.context() as patched:
            for place, name in ((Path, "rename"), (Path, "unlink"), (Path, "rmdir"), (os, "truncate"),
                                (Path, "write_text"), (shutil, "rmtree"), (run_dir, "write_atomic")):
                patched.setattr(place, name, counted(getattr(place, name)))
            try:
                opened(run, overwrite=True)
                break
            except Killed:
                pass
        try:
            opened(run, resume=True)
            assert [pair for pair in contents(run) if pair in old] == old
            resumed += 1
        except ConfigError:
            opened(run, overwrite=True)
            overwritten += 1
        assert not list(run.glob(f"{OLD}*"))
        shutil.rmtree(run)
        backup.rename(run)
    assert resumed > 5 and overwritten >= 1


def test_nothing_in_a_run_directory_is_followed_through_a_link(run, tmp_path):
    """Somebody else may have prepared the folder on a shared disk."""
    target = tmp_path / "victim"
    target.write_text("mine")
    for name in ("lock", "git.txt", "config.yaml.tmp", "step_2/state.json", "model"):
        aside = (run / name).with_suffix(".aside")
        if (run / name).exists():
            (run / name).rename(aside)
        (run / name).symlink_to(target)
        for switch in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ConfigError, match=f"{name} is a link"):
                opened(run, **switch)
        (run / name).unlink()
        if aside.exists():
            aside.rename(run / name)
    assert target.read_text() == "mine"
    (run / "sft" / "wandb").mkdir(parents=True)
    (run / "sft" / "wandb" / "latest-run").symlink_to(target)  # W&B's own
    opened(run, resume=True)


def test_a_resume_with_other_settings_shows_what_changed(run, capsys):
    """A run that is half one method and half another is neither; what only steers may change, and is said."""
    message = refused(run, resume=True, group_size=6, temperature=1.0, lr=2e-6)
    assert "group_size 5 -> 6, temperature 0.7 -> 1.0" in message and "--accept_changes true" in message
    opened(run, resume=True, lr=2e-6, steps=7, data="moved.json")
    assert capsys.readouterr().out == "resume: data '' -> 'moved.json', steps 0 -> 7, lr 1e-06 -> 2e-06\n"


def test_an_edited_config_is_compared_with_the_checkpoint(run):
    """Not with itself."""
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    config = load_config(["--config", str(run / "config.yaml"), "--resume", "true"])
    assert "seed 0 -> 1" in refused(run, resume=True, seed=config.seed)


@pytest.mark.parametrize(
    "part, name", [("inputs", "data"), ("inputs", "test_data"), ("model", "a.json")]
)
def test_a_resume_with_other_inputs_is_refused_or_recorded(run, part, name):
    other = HASHES | {part: HASHES[part] | {name: "9"}}
    said = name if part == "inputs" else f"m/{name}"
    assert said in refused(run, other, resume=True)
    assert "seed 0 -> 1;" in refused(run, other, resume=True, seed=1), "not what may follow from it"
    config = Config(run_dir=str(run), resume=True, accept_changes=True)
    open_run(config, ONE)
    identity = identity_of(config, other)
    begin_or_resume(config, identity, ONE)
    assert identity["changes"] == [f"after step 2: {said}"]
    write_checkpoint(run, {"step": 3, "run": identity})
    open_run(config, ONE)
    later = identity_of(config, other)
    begin_or_resume(config, later, ONE)
    assert later["changes"] == identity["changes"], "kept for good"
    assert name in refused(run, resume=True), "what it was at first is now the change"


def test_a_checkpoint_of_another_run_is_refused(run, tmp_path):
    other = opened(tmp_path / "other", seed=5)
    identity = identity_of(Config(run_dir=str(other), seed=5)) | {"changes": []}
    shutil.move(write_checkpoint(other, {"step": 4, "run": identity}), run)
    assert "seed 5 -> 0" in refused(run, resume=True)
    assert "is a run of grpo.py" in refused(run, HASHES | {"method": "sft"}, resume=True)
    shutil.rmtree(run / "step_4")
    write_checkpoint(run, {"step": 4})
    assert "does not say what it belongs to" in refused(run, resume=True)


def hold(path: Path, begun) -> None:
    opened(path, overwrite=True)
    begun.set()
    signal.pause()


def test_two_runs_in_one_directory(run):
    """Two runs that write the same log and delete each other's checkpoints leave nothing of use."""
    inner = opened(run / "sft")
    shutil.copytree(run / "step_2", inner / "step_2")
    (inner / "lock").read_text()  # closing the file drops this process's own lock
    forks = multiprocessing.get_context("fork")
    begun = forks.Event()
    other = forks.Process(target=hold, args=(inner, begun))
    other.start()
    try:
        assert begun.wait(120)
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
    identity = identity_of(Config(run_dir=str(path))) | {"changes": []}
    write_checkpoint(path, {"step": 2, "run": identity})
    opened(path, overwrite=True)
    assert (path / "log.jsonl").exists() and (path / "step_2").exists(), "overwrite meant the first start"


def test_a_start_that_failed_or_died_while_it_overwrote_does_not_pass_as_a_restart(run, monkeypatch):
    """--max-restarts starts it again: it must not go on with the run that was there before."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "c3")
    for restarts in (0, 1):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        assert "--resume true" in refused(run)
    for _ in range(2):
        open_run(Config(run_dir=str(run), overwrite=True), ONE)
        with pytest.raises(ConfigError), replacing(run, ONE):
            raise ConfigError("no")
        assert (run / "step_2").exists()
    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", lambda path, target: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opened(run, overwrite=True)
    open_run(Config(run_dir=str(run), overwrite=True), ONE)  # killed after this
    open_run(Config(run_dir=str(run), overwrite=True), ONE)  # by torchrun
    let_go(run, ONE)
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


def test_a_resume_says_which_rows_a_power_cut_took(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    for content, left in ((None, 0), (b'{"step": 0}\n{"st\0\0\0\n{"step": 2}\n', 2), (b"\0\0\0\0", 0)):
        if content is not None:
            path.write_bytes(content)
        assert cut_log(path, 2, rows=3) == left
        assert f"{3 - left} of 3 rows are lost" in capsys.readouterr().out
    append_jsonl(path, [{"step": 0}, {"step": 1}, {"step": 2}, {"step": 3}])
    assert cut_log(path, 2, rows=3) == 3 and not capsys.readouterr().out
