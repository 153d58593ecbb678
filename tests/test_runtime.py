"""runtime.py and watch.py: one config with clear precedence, run directories that cannot be lost by accident,
data order by step, and what happens when one of several processes dies or hangs.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml

from config import Config, ConfigError, load_config
from corpus.sources import append_jsonl, read_jsonl
from distributed import ranks as runtime
from distributed import ranks as watch
from distributed.batches import batch_for_step
from distributed.ranks import Clock, Ranks, Watchdog, lost_processes, phase_of, run_script
from ops.run_dir import atomic_folder, cut_log, open_run

ROOT = Path(__file__).parents[1]


class OneRank(Ranks):
    """A single process without a process group: what is gathered is the item itself."""

    def gather(self, item):
        return [item]


ONE = OneRank(0, 1, torch.device("cpu"))


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(arguments: list[str]) -> str:
    """The one sentence with which these arguments are refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------- config


def test_default_then_yaml_then_command_line(tmp_path):
    config = write(tmp_path / "c.yaml", "group_size: 6\nlr: 1e-5\n")
    assert load_config([]).group_size == Config().group_size == 5
    assert load_config(["--config", config]).group_size == 6
    for arguments in (["--config", config, "--group_size", "7"], ["--group_size=7", "--config", config]):
        loaded = load_config(arguments)
        assert (loaded.group_size, loaded.lr) == (7, 1e-5), "--key value wins wherever it stands"


def test_a_later_file_wins_over_an_earlier_one(tmp_path):
    files = [write(tmp_path / f"{i}.yaml", f"seed: {i}\n" + "lr: 0.5\n" * (i == 1)) for i in (1, 2)]
    loaded = load_config(["--config", files[0], "--config", files[1]])
    assert (loaded.seed, loaded.lr) == (2, 0.5)


def test_base_is_relative_to_the_file_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "configs" / "more").mkdir(parents=True)
    write(tmp_path / "configs" / "root.yaml", "seed: 1\nlr: 0.1\nsteps: 3\n")
    write(tmp_path / "configs" / "middle.yaml", "base: root.yaml\nseed: 2\nlr: 0.2\n")
    leaf = write(tmp_path / "configs" / "more" / "leaf.yaml", "base: ../middle.yaml\nseed: 3\n")
    monkeypatch.chdir(tmp_path / "configs")
    loaded = load_config(["--config", leaf])
    assert (loaded.seed, loaded.lr, loaded.steps) == (3, 0.2, 3)


def test_every_config_of_the_repository_loads():
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        assert isinstance(load_config(["--config", str(path)]), Config)


def test_what_was_saved_loads_again(tmp_path):
    config = load_config(
        ["--run_dir", str(tmp_path / "run"), "--lr", "1e-6", "--data", "a b.json", "--overwrite"]
    )
    open_run(config, ONE)
    saved = load_config(["--config", str(tmp_path / "run" / "config.yaml")])
    assert saved == dataclasses.replace(config, overwrite=False)
    assert not saved.overwrite, "starting from this file must not delete the run"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("true", True), ("True", True), ("1", True), ("false", False), ("False", False), ("0", False)],
)
def test_bools(value, expected, tmp_path):
    assert load_config(["--shuffle_rewards", value]).shuffle_rewards is expected
    config = write(tmp_path / "c.yaml", f"shuffle_rewards: {value}\n")
    assert load_config(["--config", config]).shuffle_rewards is expected


def test_a_flag_without_a_value_is_true():
    loaded = load_config(["--overwrite", "--seed", "3"])
    assert loaded.overwrite is True and loaded.seed == 3


@pytest.mark.parametrize("text", ["1e-6", "1.0e-6", "0.000001", "'1e-6'"])
def test_floats_of_any_spelling(text, tmp_path):
    """YAML reads 1e-6, without a dot, as a string."""
    config = write(tmp_path / "c.yaml", f"lr: {text}\n")
    loaded = load_config(["--config", config])
    assert loaded.lr == 1e-6 and isinstance(loaded.lr, float)


def test_every_value_has_the_type_of_its_default(tmp_path):
    config = write(tmp_path / "c.yaml", "steps: '12'\nkl_coef: 0\nrun_dir: 7\nprompts_per_step: 512.0\n")
    loaded = load_config(["--config", config])
    for field in dataclasses.fields(Config):
        assert type(getattr(loaded, field.name)) is type(field.default), field.name
    assert (loaded.steps, loaded.run_dir, loaded.prompts_per_step) == (12, "7", 512)


def test_a_key_without_its_value_is_refused_where_it_is_no_switch():
    assert refusal(["--lr"]).startswith("--lr needs a value") and refusal(
        ["--run_dir", "--resume"]
    ).startswith("--run_dir")
    assert load_config(["--resume"]).resume


@pytest.mark.parametrize("value", ["-5", "1.5", "abc", "", "nan", "inf", "true"])
def test_wrong_numbers_are_refused(value):
    message = refusal(["--steps", value])
    assert "steps" in message and (value in message)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("steps: true", "int"), ("steps: 1.5", "int"), ("steps: abc", "int"), ("steps: [1]", "int"), ("steps:", "int"),
        ("lr: true", "float"), ("lr: fast", "float"), ("lr: {a: 1}", "float"),
        ("overwrite: 2", "bool"), ("overwrite: ja", "bool"), ("overwrite: [true]", "bool"),
        ("model: [a, b]", "str"), ("data:", "str"),
    ],
)
def test_wrong_types_in_yaml_are_refused(line, kind, tmp_path):
    message = refusal(["--config", write(tmp_path / "c.yaml", line + "\n")])
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    assert message.startswith(f"{line.partition(':')[0]} must be {names[kind]}, not ")


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path):
    assert refusal(["--learning_rte", "1"]) == "unknown setting 'learning_rte'; --help lists them"
    assert refusal(["--groupsize", "4"]) == "unknown setting 'groupsize'; did you mean 'group_size'?"
    config = write(tmp_path / "c.yaml", "temprature: 1\n")
    assert refusal(["--config", config]) == "unknown setting 'temprature'; did you mean 'temperature'?"


def test_stray_words_are_refused():
    assert "'tiny.yaml'" in refusal(["tiny.yaml"])
    assert "'4'" in refusal(["--group_size", "3", "4"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("group_size=1", "group_size must be at least 2"),
        ("group_size=0", "group_size must be greater than 0"),
        (
            "prompts_per_step=10 minibatch_prompts=4",
            "prompts_per_step (10) must be a multiple of minibatch_prompts (4)",
        ),
        ("minibatch_prompts=0", "minibatch_prompts must be greater than 0"),
        ("temperature=0", "temperature must be greater than 0"),
        ("temperature=nan", "temperature"),
        ("max_response_tokens=0", "max_response_tokens must be greater than 0"),
        ("max_tokens_per_micro_batch=-1", "max_tokens_per_micro_batch must be greater than 0"),
        ("lr=-1e-6", "lr must not be negative"),
        ("lr=nan", "lr must"),
        ("kl_coef=-1", "kl_coef must not be negative"),
        ("steps=-1", "steps must not be negative"),
        ("test_share=1", "test_share must be from 0 to below 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    pairs = [pair.split("=") for pair in settings.split()]
    assert words in refusal([word for key, value in pairs for word in (f"--{key}", value)])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nlr: [1\nsteps: 2\n", "(line 3)"),
        ("seed: 1\n\tlr: 2\n", "(line 2)"),
        ("- seed\n", "must hold `key: value` lines"),
        ("", "must hold `key: value` lines"),
        ("base: nowhere.yaml\n", "cannot read"),
        ("seed: 1\nlr: 1e-6\nseed: 2\n", "seed stands 2 times"),
        ("base: broken.yaml\n", "must name another YAML file"),
        ("base: ../other/broken.yaml\n", "must name another YAML file"),  # which names this one
    ],
)
def test_broken_yaml_is_one_sentence(text, words, tmp_path):
    tmp_path, other = tmp_path / "here", tmp_path / "other"
    for folder in (tmp_path, other):
        folder.mkdir()
    write(other / "broken.yaml", "base: ../here/broken.yaml\n")
    message = refusal(["--config", write(tmp_path / "broken.yaml", text)])
    assert words in message and str(tmp_path) in message


def test_an_unreadable_config_file_is_one_sentence(tmp_path):
    assert "missing.yaml" in refusal(["--config", str(tmp_path / "missing.yaml")])
    assert str(tmp_path) in refusal(["--config", str(tmp_path)])
    (tmp_path / "latin.yaml").write_bytes("run_dir: läufe\n".encode("latin-1"))
    assert "latin.yaml" in refusal(["--config", str(tmp_path / "latin.yaml")])


# ---------------------------------------------------------------------------------------------- run directory


def opened(path: Path, **settings) -> Path:
    return open_run(Config(run_dir=str(path), **settings), ONE)


def refused(path: Path, **settings) -> str:
    before = sorted((p, p.read_bytes()) for p in path.rglob("*") if p.is_file()) if path.is_dir() else None
    with pytest.raises(ConfigError) as caught:
        opened(path, **settings)
    if before is not None:
        after = sorted((p, p.read_bytes()) for p in path.rglob("*") if p.is_file())
        assert after == before, "a refusal touches nothing"
    return str(caught.value)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory with a checkpoint."""
    path = opened(tmp_path / "run")
    (path / "step_2").mkdir()
    write(path / "step_2" / "state.json", '{"step": 2}')
    write(path / "latest", "step_2")
    write(path / "log.jsonl", '{"step": 1}\n')
    return path


def test_a_new_run_explains_itself(tmp_path):
    path = opened(tmp_path / "a" / "run", seed=3)
    assert yaml.safe_load((path / "config.yaml").read_text())["seed"] == 3
    assert (path / "git.txt").read_text().startswith(("commit ", "no git repository"))
    (tmp_path / "empty").mkdir()
    opened(tmp_path / "empty")


def test_an_existing_run_is_refused(run):
    message = refused(run)
    assert "--resume true" in message and "--overwrite true" in message and str(run) in message


def test_resume_needs_something_to_resume(run, tmp_path):
    assert "to resume" in refused(tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()
    (run / "latest").unlink()
    assert "to resume" in refused(run, resume=True)
    (run / "warmup").mkdir()
    write(run / "warmup" / "latest", "step_1")
    assert opened(run, resume=True) == run, "a run that was stopped during its warm-up"


def test_resume_keeps_everything(run):
    opened(run, resume=True)
    assert (run / "log.jsonl").read_text() == '{"step": 1}\n'
    assert (run / "latest").read_text() == "step_2" and (run / "step_2" / "state.json").exists()


def test_overwrite_deletes_the_old_run(run):
    opened(run, overwrite=True)
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "git.txt", "lock"]


def test_resume_wins_over_overwrite(run):
    opened(run, resume=True, overwrite=True)
    assert (run / "step_2").exists()


def test_a_folder_that_is_no_run_is_never_deleted(tmp_path):
    """--run_dir ~ --overwrite true must not be the end of a home directory."""
    write(tmp_path / "thesis.tex", "years of work")
    assert "not a run directory" in refused(tmp_path, overwrite=True)


def test_a_file_in_the_place_of_the_run_directory(tmp_path):
    write(tmp_path / "run", "a file")
    for settings in ({}, {"overwrite": True}, {"resume": True}):
        assert str(tmp_path / "run") in refused(tmp_path / "run", **settings)
    assert (tmp_path / "run").read_text() == "a file"


def test_a_resume_with_another_config_shows_what_changed(run, capsys):
    """A run that is half one method and half another is neither; what only steers may change, and is said."""
    message = refused(run, resume=True, group_size=6, temperature=1.0, lr=2e-6)
    assert message.endswith("must stay as they were: group_size 5 -> 6, temperature 0.7 -> 1.0")
    assert capsys.readouterr().out == ""
    opened(run, resume=True, lr=2e-6, steps=7)
    assert capsys.readouterr().out == "resume: steps 0 -> 7, lr 1e-06 -> 2e-06\n"
    opened(run, resume=True, lr=2e-6, steps=7)
    assert capsys.readouterr().out == ""


HOLDER = """
import sys, time, torch
from config import Config
from runtime import Ranks, open_run

class OneRank(Ranks):
    def gather(self, item):
        return [item]

open_run(Config(run_dir=sys.argv[1], overwrite=True), OneRank(0, 1, torch.device("cpu")))
print("open", flush=True)
time.sleep(100)
"""


def start(*command: object, **environment: object) -> subprocess.Popen:
    """Another process of this project, its stdout and stderr in one pipe."""
    variables = {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, "PYTHONUNBUFFERED": 1} | environment
    return subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={k: v for k, v in os.environ.items() if k != "RANK"} | {k: str(v) for k, v in variables.items()},
    )


def test_two_runs_in_one_directory(run):
    """Two runs that write the same log and delete each other's checkpoints leave nothing of use."""
    inner = opened(run / "sft")
    write(inner / "latest", "step_1")
    (inner / "lock").read_text()  # closing the file drops this process's own lock
    other = start("-c", HOLDER, inner)
    try:
        assert other.stdout.readline() == "open\n"
        owner = f"in use by process {other.pid} on {socket.gethostname()} since 2"
        for settings in ({}, {"resume": True}, {"overwrite": True}):
            assert owner in refused(inner, **settings), "the other overwrote the folder, and has it still"
        assert owner in refused(run, overwrite=True), "it would delete the run inside"
    finally:
        other.kill()
        other.communicate()
    opened(inner, overwrite=True)
    opened(inner)


def test_the_same_moment_is_not_early_enough(tmp_path, monkeypatch):
    """The second of two that both found an empty folder must not delete what the first has begun."""
    monkeypatch.setattr(
        runtime, "take_lock", lambda path, sign=False: (False, "process 7 on h since then\njob none\n")
    )
    assert "in use by process 7 on h since then;" in refused(tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_processes_that_torchrun_starts_again_go_on(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a1")
    opened(path, overwrite=True)
    write(path / "log.jsonl", '{"step": 0}\n')
    for overwrite in (False, True):
        opened(path, overwrite=overwrite)
        assert "from the beginning" in capsys.readouterr().out
    write(path / "latest", "step_2")
    opened(path, overwrite=True)
    assert "from the last checkpoint" in capsys.readouterr().out
    assert (path / "log.jsonl").exists() and (path / "latest").exists(), (
        "--overwrite was meant for the first start"
    )
    assert "group_size 5 -> 6" in refused(path, group_size=6)


def test_a_refused_start_does_not_pass_as_a_restart(run, monkeypatch):
    """--max-restarts starts a refused run again: that must not make it go on with the run that was there
    before.
    """
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b2")
    for restarts in (0, 1):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        assert "--resume true" in refused(run)


def test_a_second_run_by_hand_is_no_restart(run):
    """One shell starts both, so its process id alone would not tell."""
    assert "--resume true" in refused(run)


def test_restarts_need_a_store_that_forgets(monkeypatch):
    """With torchrun's default, half of the restarts failed: the new processes looked for the addresses of the
    dead ones.
    """
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: 1 / 0)
    with pytest.raises(ConfigError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        runtime.start_ranks()


def test_a_start_that_died_while_it_overwrote_is_done_over(run, monkeypatch):
    """Else the rest of the old run would pass for the new one's."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "c3")
    monkeypatch.setattr(runtime.shutil, "rmtree", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opened(run, overwrite=True)
    monkeypatch.undo()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "c3")
    opened(run, overwrite=True)
    assert not (run / "step_2").exists()


# ----------------------------------------------------------------------------------------------- data by step


def slow_batches(count: int, size: int, seed: int, steps: int) -> list[list[int]]:
    """All batches from the start: the passes one after the other, cut into pieces."""
    line = []
    while len(line) < steps * size:
        line += [batch_for_step(count, place, 1, seed)[0] for place in range(len(line), len(line) + count)]
    return [line[i * size : (i + 1) * size] for i in range(steps)]


@pytest.mark.parametrize(("count", "size"), [(10, 4), (10, 10), (3, 8), (1, 3), (7, 1)])
def test_every_example_comes_once_per_pass(count, size):
    batches = [batch_for_step(count, step, size, 0) for step in range(count)]  # `size` whole passes
    assert batches == slow_batches(count, size, 0, count)
    line = [index for batch in batches for index in batch]
    for start in range(0, len(line), count):
        assert sorted(line[start : start + count]) == list(range(count))


def test_a_batch_spans_two_passes():
    first, second, third = (batch_for_step(10, step, 4, 0) for step in range(3))
    assert len(third) == 4 and set(third[:2]) == set(range(10)) - set(first) - set(second)


def test_the_order_depends_on_seed_and_pass_alone():
    """Resume computes the order of step 5 without the steps before it."""
    torch.manual_seed(0)
    one = batch_for_step(100, 5, 16, seed=1)
    torch.manual_seed(1)
    assert batch_for_step(100, 5, 16, seed=1) == one
    assert batch_for_step(100, 5, 16, seed=2) != one
    passes = [tuple(batch_for_step(16, step, 16, seed=1)) for step in range(20)]
    assert len(set(passes)) == 20, "a fresh shuffle per pass"
    firsts = Counter(batch_for_step(4, step, 4, seed=0)[0] for step in range(400))
    assert all(60 < firsts[index] < 140 for index in range(4)), "no example is always first"


# -------------------------------------------------------------------------------------- log and whole folders


def test_cut_log_drops_the_steps_that_will_be_done_again(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"step": step, "text": f"ü{step}"} for step in (0, 1, 2, 2, 3, 4)]
    append_jsonl(path, rows[:3])
    append_jsonl(path, rows[3:])
    assert read_jsonl(path) == rows
    cut_log(path, 2)
    assert read_jsonl(path) == [row for row in rows if row["step"] <= 2]
    cut_log(tmp_path / "missing.jsonl", 2)
    assert read_jsonl(tmp_path / "missing.jsonl") == []


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\u000b", "\n", "\r"])
def test_unusual_line_ends_in_a_completion_survive(character, tmp_path):
    """str.splitlines() also cuts at U+2028 and U+0085: a run whose samples contain one could not be
    resumed.
    """
    rows = [{"step": 1, "completion": f"a{character}b"}, {"step": 2, "completion": ""}]
    append_jsonl(tmp_path / "samples.jsonl", rows)
    assert read_jsonl(tmp_path / "samples.jsonl") == rows
    cut_log(tmp_path / "samples.jsonl", 1)
    assert read_jsonl(tmp_path / "samples.jsonl") == rows[:1]


def test_a_log_that_broke_off_in_the_middle_of_a_line_can_be_resumed(tmp_path):
    """Power cut, full disk or SIGKILL: the broken line belongs to a step that will be done again."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "rew')
    cut_log(path, 1)
    append_jsonl(path, [{"step": 2}])
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_whole_folder_appears_at_once(tmp_path):
    target = tmp_path / "step_3"
    with atomic_folder(target) as folder:
        write(folder / "a", "new")
        assert not target.exists()
    assert (target / "a").read_text() == "new" and os.listdir(tmp_path) == ["step_3"]


def test_a_folder_that_fails_half_way_leaves_the_old_one(tmp_path):
    """Disk full while a checkpoint is written: the one before must still be whole, and the next attempt
    starts clean.
    """
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        write(folder / "a", "old")
    with pytest.raises(OSError, match="disk full"), atomic_folder(target) as folder:
        write(folder / "a", "half")
        write(folder / "b", "half")
        raise OSError("disk full")
    assert {p.name: p.read_text() for p in target.iterdir()} == {"a": "old"}
    with atomic_folder(target) as folder:
        assert not any(folder.iterdir())
        write(folder / "a", "new")
    assert {p.name: p.read_text() for p in target.iterdir()} == {"a": "new"} and os.listdir(tmp_path) == [
        "model"
    ]


# --------------------------------------------------------------------------------- processes that die or hang


def watched(monkeypatch, seconds: int, **events) -> tuple[float, str, int]:
    """Runs a watchdog of one minute on a false time, with calls at given seconds -> (when it bit, its words,
    exit code).
    """
    now, said = [0.0], []

    def sleep(duration: float) -> None:
        now[0] += duration
        if now[0] > seconds:
            raise TimeoutError
        for name, *arguments in events.get(f"at_{now[0]:.0f}", ()):
            getattr(dog, name)(*arguments)

    def leave(code: int) -> None:
        said.append(code)
        raise InterruptedError

    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(
        watch, "os", SimpleNamespace(write=lambda _, text: said.append(text.decode()), _exit=leave)
    )
    monkeypatch.setattr(watch.threading.Thread, "start", lambda self: None)
    dog = Watchdog(1.0, 3)
    try:
        dog.run()
    except TimeoutError:
        return 0.0, "", 0
    except InterruptedError:
        return now[0], *said


def test_the_watchdog_bites_when_a_phase_stands_still(monkeypatch, capfd):
    when, said, code = watched(
        monkeypatch, 200, at_10=[("enter", "rollout", 12), ("leave",), ("enter", "update", 12)]
    )
    assert (when, code) == (71, 1)
    assert (
        said.startswith("rank 3: no progress for 1 minutes in phase update of step 12; ")
        and "--resume true" in said
    )
    assert "most recent call first" in capfd.readouterr().err, "the stack says where"


def test_the_watchdog_leaves_in_peace_what_moves_or_is_not_watched(monkeypatch):
    slow = [("enter", "rollout", 1)]
    assert watched(monkeypatch, 160, at_10=slow, at_60=[("heartbeat",)], at_110=[("heartbeat",)]) == (0.0, "", 0)
    assert watched(monkeypatch, 200, at_10=slow, at_60=[("leave",)]) == (0.0, "", 0)
    assert watched(monkeypatch, 100, at_50=slow) == (0.0, "", 0), (
        "the minutes count from the start of the phase"
    )


def test_the_watchdog_knows_phases_inside_phases(monkeypatch):
    outer, inner = ("enter", "evaluate", 1), ("enter", "rollout", 1)
    assert "phase rollout of step 1;" in watched(monkeypatch, 200, at_10=[outer, inner])[1]
    when, said, _ = watched(monkeypatch, 200, at_10=[outer, inner], at_60=[("leave",)])
    assert when == 121 and "phase evaluate of step 1;" in said, "what ends inside is progress"


def test_ranks_that_meet_make_progress(monkeypatch):
    """An evaluation of many cases is one long phase: that all ranks took part in a sum shows that none
    hangs.
    """
    beats: list[int] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(dist, "all_gather_object", lambda items, item: None)
    ranks = Ranks(0, 2, torch.device("cpu"), SimpleNamespace(heartbeat=lambda: beats.append(1)))
    ranks.sum([1.0])
    assert len(beats) == 1
    ranks.gather(None)
    assert len(beats) == 2


def test_an_error_knows_its_phase():
    clock = Clock(step=12)
    with pytest.raises(ValueError) as caught, clock("evaluate"), clock("rollout"):
        raise ValueError("bug")
    assert phase_of(caught.value) == " in phase rollout of step 12"
    assert phase_of(ValueError()) == "" and set(clock.seconds) == {"evaluate", "rollout"}


PAIR = "[/build/third_party/gloo/gloo/transport/tcp/pair.cc:537]"
BUFFER = "[/build/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78]"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            f"{PAIR} Read error [127.0.0.1]:59049: Connection reset by peer. This is typically caused by …"
        ),
        RuntimeError(f"{PAIR} Connection closed by peer [127.0.0.1]:64644. This is typically caused by …"),
        RuntimeError(f"{BUFFER} Timed out waiting 4000ms for recv operation to complete"),
        dist.DistBackendError(
            "NCCL error in: x.cpp:1, remote process exited\nncclRemoteError: A call failed possibly …"
        ),
        dist.DistBackendError("NCCL communicator was aborted on rank 1."),
        dist.DistNetworkError(
            "The client socket has timed out after 60000ms while trying to connect to (a, 29500)."
        ),
        dist.DistStoreError("wait timeout after 60000ms, keys: /x"),
    ],
)
def test_lost_processes_are_named(error):
    error.add_note("in phase update of step 12")
    said = lost_processes(error)
    assert (
        said.startswith("rank 0 lost the other processes in phase update of step 12: ")
        and "--resume true" in said
    )
    assert "/build" not in said and "\n" not in said


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Connection closed by peer"),  # of the user's own reward function, for example
        TimeoutError("timed out"),
        RuntimeError(
            f"[enforce fail at {PAIR[1:-1]}] op.preamble.length <= op.nbytes. 100 vs 4. Received data size …"
        ),
        dist.DistBackendError(
            "NCCL error in: x.cpp:1\nncclInvalidUsage: This usually reflects invalid usage of NCCL"
        ),
        dist.DistNetworkError("The server socket has failed to listen: EADDRINUSE"),
    ],
)
def test_an_ordinary_error_is_not_taken_for_a_lost_process(error):
    assert lost_processes(error) == ""


def ending(monkeypatch, capsys, error: BaseException, rank: int, world: int) -> tuple[int, str, list[float]]:
    """How a script of this rank ends after this error: (exit code, stderr, the pauses before it)."""
    pauses: list[float] = []
    for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(runtime.os, "_exit", sys.exit)
    monkeypatch.setattr(runtime.time, "sleep", pauses.append)
    monkeypatch.setattr(runtime.signal, "signal", lambda *_: None)

    def main(arguments: list[str]) -> None:
        with Clock(step=4)("update"):
            raise error

    with pytest.raises(SystemExit) as caught:
        run_script(main, (ConfigError,))
    return caught.value.code, capsys.readouterr().err, pauses


def test_how_a_script_ends(monkeypatch, capsys):
    lost = RuntimeError(f"{PAIR} Connection closed by peer [127.0.0.1]:1")
    code, said, pauses = ending(monkeypatch, capsys, lost, 1, 2)
    assert code == 1 and said.startswith("rank 1 lost the other processes in phase update of step 4: ")
    assert said.count("\n") == 1
    assert pauses == [1], "torchrun's table then shows the process that died"
    code, said, _ = ending(monkeypatch, capsys, RuntimeError("a bug"), 1, 2)
    assert code == 1 and said.startswith("Traceback") and "a bug\nin phase update of step 4" in said
    code, said, _ = ending(monkeypatch, capsys, torch.OutOfMemoryError("1 GiB"), 1, 2)
    assert code == 1 and said.startswith(
        "error: out of GPU memory on rank 1 in phase update of step 4; lower "
    )
    assert ending(monkeypatch, capsys, ConfigError("x"), 0, 2) == (1, "error: x\n", [])
    assert ending(monkeypatch, capsys, ConfigError("x"), 1, 2) == (1, "error: x\n", [5]), (
        "rank 0 said it, or did not fail"
    )


def test_a_bug_in_a_single_process_is_raised(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RuntimeError, match="a bug"):
        run_script(lambda _: (_ for _ in ()).throw(RuntimeError("a bug")), (ConfigError,))


WORKER = """
import dataclasses, os, signal, sys
from pathlib import Path
from config import Config, ConfigError
from runtime import StopFlag, open_run, run_script, start_ranks
from watch import Clock, Watchdog

def main(arguments):
    fault, run_dir = arguments
    ranks = start_ranks(2.0, 1)
    open_run(Config(run_dir=run_dir), ranks), StopFlag()
    assert ranks.watchdog.minutes == 2.0
    ranks = dataclasses.replace(ranks, watchdog=Watchdog(0.05, ranks.rank))
    for step in (1, 2):
        with Clock(ranks.watchdog, step)("update"):
            ranks.sum([1.0])
            if step == 2 and ranks.rank == 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                os.kill(os.getpid(), signal.Signals[fault])
            ranks.sum([1.0])
        if ranks.main:
            (Path(run_dir) / "latest").write_text(f"step_{step}")
    if ranks.main:
        print("done")

run_script(main, (ConfigError,))
"""


def test_a_rank_that_hangs_ends_the_others(tmp_path):
    """SIGSTOP stands for any hang: no error, no closed connection. The watchdog of the rank that waits must
    bite.
    """
    script = write(tmp_path / "worker.py", WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    ranks = [start(script, "SIGSTOP", tmp_path / "run", RANK=r, LOCAL_RANK=r, **shared) for r in (0, 1)]
    try:
        said, _ = ranks[0].communicate(timeout=50)
        assert (
            "rank 0: no progress for 0.05 minutes in phase update of step 2;" in said
            and "in all_reduce" in said
        )
        assert ranks[0].returncode == 1 and ranks[1].poll() is None
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_a_rank_that_is_killed_ends_the_others_and_torchrun_goes_on(tmp_path):
    """With the long grace of run.sh, which must not delay the end. The second start has the lock, and the
    checkpoint.
    """
    script = write(tmp_path / "worker.py", WORKER)
    agent = start(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1", script, "SIGKILL",
        tmp_path / "run", TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1,
    )
    try:
        said, _ = agent.communicate(timeout=100)
    finally:
        agent.send_signal(signal.SIGTERM)  # it ends its workers, which kill() would leave behind
    assert "rank 0 lost the other processes in phase update of step 2" in said
    assert (
        "going on from the last checkpoint" in said
        and said.rstrip().endswith("done")
        and agent.returncode == 0
    )


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch):
    """Slurm signals torchrun's processes, and torchrun signals them too: the second one must not cost the
    checkpoint.
    """
    now = [100.0]
    monkeypatch.setattr(runtime.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now[0])
    stop = runtime.StopFlag()
    stop._on_signal(15, None)
    now[0] = 100.9
    stop._on_signal(15, None)
    now[0] = 101.1
    with pytest.raises(SystemExit):
        stop._on_signal(2, None)


def test_a_chosen_step_is_not_kept_in_the_settings(tmp_path):
    """Whoever goes on from config.yaml later would be taken back to it, and lose what came after."""
    assert refusal(["--resume_step", "3"]) == "resume_step needs --resume true"
    (tmp_path / "latest").write_text("step_3")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"run_dir": str(tmp_path)}))
    assert runtime._claim(tmp_path, Config(run_dir=str(tmp_path), resume=True, resume_step=3)) == ""
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["resume_step"] == 0
