"""monitor.py: what a person is told, when an alarm speaks and when it is silent, and that nothing in it ends
a run.
"""

import dataclasses
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from config import Config, ConfigError
from corpus.sources import append_jsonl
from distributed.ranks import Ranks
from ops import monitor
from ops.monitor import alarms, evaluation_line, step_line

RECORD = {
    "step": 12, "reward": 0.534, "correct_rate": 0.55, "format_rate": 0.98, "kl": 0.0123, "entropy": 0.42,
    "completions/mean_length": 28.4, "completions/clipped_ratio": 0.0, "frac_reward_zero_std": 0.125,
    "time/rollout_s": 0.4, "time/reward_s": 0.01, "time/update_s": 0.3,
}
NONE = frozenset()

# ------------------------------------------------------------------------------------------------------ lines


def test_the_line_of_a_step():
    assert step_line(RECORD, 140) == (
        "step 12/140 · reward 0.53 (right 55%, format 98%) · KL 0.012 · entropy 0.420 · 28 tokens, 0% cut · "
        "flat groups 12% · 0.7 s: rollout 0.4, update 0.3"
    )
    assert len(step_line(RECORD, 140)) < 150
    assert step_line(RECORD | {"time/evaluate_s": 9.0}, 140).endswith(" · 9.7 s: evaluate 9.0"), (
        "what takes long is named"
    )


@pytest.mark.parametrize("missing", [key for key in RECORD if key != "step"])
def test_the_line_does_without_any_key(missing):
    line = step_line({key: value for key, value in RECORD.items() if key != missing}, 140)
    assert line.startswith("step 12/140 · ") and len(line) <= len(step_line(RECORD, 140))


def test_the_line_of_sft_of_nothing_and_of_a_run_without_an_end():
    assert step_line({"step": 3, "loss": 0.08369, "grad_norm": 0.1}, 0) == "step 3 · loss 0.0837"
    assert step_line({"step": 0}, 140) == "step 0/140"


def test_the_line_shows_what_is_tiny_not_finite_or_skipped():
    line = step_line(RECORD | {"kl": 2e-5, "entropy": math.nan, "updates_skipped_nonfinite": 2}, 140)
    assert "KL 2e-05 · entropy nan" in line and "2 update(s) skipped" in line


def test_an_evaluation_has_a_line_of_its_own_with_the_numbers_of_cases():
    results = {"held_out/accuracy": 0.86, "held_out/n": 150, "held_out/accuracy_single": 1.0}
    results |= {"bfcl/accuracy": 0.4, "bfcl/n": 70}
    assert (
        evaluation_line(RECORD | results)
        == "step 12, greedy accuracy: held_out 86.0% of 150, bfcl 40.0% of 70"
    )
    assert evaluation_line(RECORD) == ""


# ----------------------------------------------------------------------------------------------------- alarms

CASES = [  # setting, key, good, bad, a bit better than the threshold: not good enough to end the alarm
    ("alarm_entropy", "entropy", 0.3, 0.009, 0.0105),
    ("alarm_length", "completions/mean_length", 30.0, 51.0, 49.0),
    ("alarm_think", "think_rate", 0.9, 0.49, 0.51),
    ("alarm_empty", "empty_rate", 0.1, 0.91, 0.89),
    ("alarm_kl", "kl", 0.1, 1.1, 0.95),
]


class Alone(Ranks):
    """A rank that has nobody to talk to."""

    def gather(self, item):
        return [item]


ALONE = Alone(0, 1, torch.device("cpu"))
CONFIG = Config(max_response_tokens=100)


def said_in(values: list, key: str, config: Config = CONFIG) -> list[list[str]]:
    """The sentences of each step of a run in which `key` takes these values; None: it is not logged."""
    active, said = NONE, []
    for step, value in enumerate(values, 1):
        sentences, active = alarms({"step": step} | ({} if value is None else {key: value}), active, config)
        said.append(sentences)
    return said


def test_every_threshold_of_the_config_has_its_alarm():
    assert set(monitor.ALARMS) == {f.name for f in dataclasses.fields(Config) if f.name.startswith("alarm_")}


@pytest.mark.parametrize("setting, key, good, bad, better", CASES)
def test_an_alarm_speaks_when_it_begins_and_when_it_ends_and_not_in_between(setting, key, good, bad, better):
    said = said_in([good, bad, bad, better, bad, None, bad, good, good, bad], key)
    assert [len(sentences) for sentences in said] == [0, 1, 0, 0, 0, 0, 0, 1, 0, 1]
    assert said[1][0].startswith("ALARM at step 2: ") and f"{bad:.3g}" in said[1][0] and setting in said[1][0]
    assert said[7][0].startswith("alarm over at step 8: ") and f"{good:.3g}" in said[7][0]


@pytest.mark.parametrize("setting, key, good, bad, better", CASES)
def test_a_threshold_of_0_turns_an_alarm_off(setting, key, good, bad, better):
    assert said_in([good, bad], key, dataclasses.replace(CONFIG, **{setting: 0.0})) == [[], []]


def test_a_value_that_swings_around_the_threshold_does_not_begin_an_alarm_each_time():
    assert sum(map(len, said_in([0.0099, 0.0101] * 10, "entropy"))) == 1


def test_a_number_that_is_not_finite_is_an_alarm_too():
    said = said_in([0.1, math.nan, math.inf, 0.1], "loss")
    assert [len(sentences) for sentences in said] == [0, 1, 0, 1]
    assert "NaN or infinite: loss;" in said[1][0] and "all numbers are finite again" in said[3][0]
    skipped = said_in([0, 2], "updates_skipped_nonfinite")
    assert "updates_skipped_nonfinite" in skipped[1][0], "the loss itself is logged without the bad parts"


def test_a_nan_neither_begins_nor_ends_another_alarm():
    said = said_in([0.001, math.nan, 0.001], "entropy")
    assert "alarm_entropy" in said[0][0]
    assert not any("entropy in nats" in sentence for sentence in said[1] + said[2])


# --------------------------------------------------------------------------------------------------- trackers


class FakeWandb(SimpleNamespace):
    """Remembers what it was asked for, as the module and as the run."""

    def __init__(self) -> None:
        super().__init__(calls=[], logged=[], finished=0)

    def init(self, **options):
        self.calls.append(options)
        return self

    def define_metric(self, name, step_metric=None):
        self.calls.append((name, step_metric))

    def log(self, record):
        self.logged.append(record)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def with_trackers(names: str) -> Config:
    return dataclasses.replace(CONFIG, trackers=names, plot_minutes=0.0)


def test_trackers_that_are_unknown_or_not_installed_are_named_before_anything_is_done(monkeypatch):
    with pytest.raises(ConfigError, match="trackers must be of tensorboard, wandb, not 'wandbee'"):
        monitor.tracker_names(with_trackers("wandbee"))
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ConfigError, match="pip install wandb"):
        monitor.tracker_names(with_trackers("wandb"))
    assert monitor.tracker_names(with_trackers("")) == [], "what nobody asked for is not looked at"


def test_wandb_gets_the_config_and_every_number(wandb, tmp_path):
    watching = monitor.open_monitor(with_trackers("wandb"), tmp_path, 0, ALONE)
    options = wandb.calls[0]
    assert options["project"] == "tool-n1" and options["name"] == tmp_path.name
    assert options["config"]["trackers"] == "wandb" and options["config"]["lr"] == CONFIG.lr
    assert ("*", "step") in wandb.calls, "W&B's own counter cannot go back to the step of a resumed run"
    monitor.report(watching, RECORD | {"note": "text"}, 140)
    monitor.close_monitor(watching)
    assert wandb.logged == [RECORD] and wandb.finished == 1


def test_a_resumed_run_goes_on_in_the_same_wandb_run(wandb, tmp_path, monkeypatch):
    monitor.open_monitor(with_trackers("wandb"), tmp_path, 0, ALONE)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monitor.open_monitor(with_trackers("wandb"), tmp_path, 10, ALONE)
    first, second = (call for call in wandb.calls if isinstance(call, dict))
    assert first["id"] == second["id"] and first["resume"] == second["resume"] == "allow"
    assert second["project"] == "mine"
    (tmp_path / "other").mkdir()
    monitor.open_monitor(with_trackers("wandb"), tmp_path / "other", 0, ALONE)
    assert wandb.calls[-3]["id"] != first["id"]


def test_a_tracker_that_fails_in_the_middle_is_dropped_with_one_warning(wandb, tmp_path, capsys):
    def no_network(record):
        raise ConnectionError("api.wandb.ai is gone\nwith details")

    wandb.log = no_network
    watching = monitor.open_monitor(with_trackers("wandb"), tmp_path, 0, ALONE)
    for step in (1, 2, 3):
        monitor.report(watching, RECORD | {"step": step}, 140)
    monitor.close_monitor(watching)
    said = capsys.readouterr()
    assert said.out.count("step") == 3
    assert said.err == "warning: wandb, going on without it: ConnectionError: api.wandb.ai is gone\n"


def test_a_tracker_that_does_not_start_stops_a_new_run_but_not_one_that_goes_on(wandb, tmp_path, capsys):
    def no_login(**options):
        raise RuntimeError("no login")

    wandb.init = no_login
    with pytest.raises(ConfigError, match="wandb did not start .RuntimeError: no login."):
        monitor.open_monitor(with_trackers("wandb"), tmp_path, 0, ALONE)
    assert monitor.open_monitor(with_trackers("wandb"), tmp_path, 10, ALONE).trackers == []
    assert "going on without it" in capsys.readouterr().err


def test_tensorboard_reads_back_what_was_reported_and_forgets_steps_that_are_done_again(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard runs this test")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder):
        return EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("reward")

    first = monitor.open_monitor(with_trackers("tensorboard"), tmp_path, 0, ALONE)
    for step in (1, 2, 3):
        monitor.report(first, {"step": step, "reward": 0.25 * step}, 140)
    assert [event.step for event in read(tmp_path)] == [1, 2, 3], (
        "readable at once: a process may die without a close"
    )
    second = monitor.open_monitor(with_trackers("tensorboard"), tmp_path, 2, ALONE)
    for step in (3, 4):
        monitor.report(second, {"step": step, "reward": 0.5}, 140)
    monitor.close_monitor(second)
    assert [(event.step, event.value) for event in read(tmp_path)] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.5),
        (4, 0.5),
    ]


# ---------------------------------------------------------------------------------------------------- monitor


def test_what_is_printed_and_where(tmp_path, capsys):
    watching = monitor.open_monitor(with_trackers(""), tmp_path, 0, ALONE)
    results = {"held_out/accuracy": 0.5, "held_out/n": 20}
    monitor.report(watching, RECORD | {"entropy": 0.001} | results, 140)
    monitor.report(watching, RECORD | {"entropy": 0.001, "step": 13}, 140)
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        step_line(RECORD | {"entropy": 0.001}, 140), evaluation_line(RECORD | results),
        step_line(RECORD | {"entropy": 0.001, "step": 13}, 140),
    ]
    assert said.err.count("ALARM") == said.err.count("\n") == 1
    monitor.report(watching, {"step": 14, "loss": math.nan}, 140, lines=False)
    said = capsys.readouterr()
    assert said.out == "" and "NaN" in said.err, (
        "a warm-up has a bar instead of lines, but its alarms are heard"
    )


def test_the_picture_is_drawn_when_it_is_due_and_at_the_end(tmp_path, monkeypatch):
    now, drawn = [100.0], []

    def draw(runs, target):
        drawn.append((now[0], runs, target))
        now[0] += 4.0  # seconds that it takes

    monkeypatch.setattr(monitor, "draw", draw)
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    watching = monitor.open_monitor(dataclasses.replace(CONFIG, plot_minutes=1.0), tmp_path, 0, ALONE)
    for _ in range(60):
        now[0] += 10.0
        monitor.report(watching, RECORD, 140, lines=False)
    # First after a minute; then not each minute: 4 s of drawing are 2 % of the 200 s until the next.
    assert [when for when, *_ in drawn] == [160.0, 364.0, 568.0]
    monitor.close_monitor(watching)
    assert drawn[-1][1:] == ([tmp_path], tmp_path / "curves.png") and len(drawn) == 4
    rare = monitor.open_monitor(dataclasses.replace(CONFIG, plot_minutes=0.0), tmp_path, 0, ALONE)
    now[0] += 10**6
    monitor.report(rare, RECORD, 140, lines=False)
    assert len(drawn) == 4, "plot_minutes 0 draws at the end only"
    monitor.close_monitor(rare)
    assert len(drawn) == 5


def test_a_picture_that_cannot_be_drawn_warns_once_and_is_tried_again_at_the_end(
    tmp_path, monkeypatch, capsys
):
    def full(runs, target):
        raise OSError(28, "No space left on device")

    now = [100.0]
    monkeypatch.setattr(monitor, "draw", full)
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    watching = monitor.open_monitor(dataclasses.replace(CONFIG, plot_minutes=1.0), tmp_path, 0, ALONE)
    for step in range(1, 6):
        now[0] += 100.0
        monitor.report(watching, RECORD | {"step": step}, 140, lines=False)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "curves.png" in said and "No space left" in said
    monitor.close_monitor(watching)
    assert capsys.readouterr().err.count("No space left") == 1


def test_a_run_leaves_its_picture_behind(tmp_path):
    append_jsonl(tmp_path / "log.jsonl", [RECORD])
    watching = monitor.open_monitor(with_trackers(""), tmp_path, 0, ALONE)
    monitor.report(watching, RECORD, 140, lines=False)
    monitor.close_monitor(watching)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_alarm_near_the_top_of_a_share_can_end():
    """10 % above 0.95 is more than all completions, so it rang once and was never heard again."""
    config = Config(alarm_think=0.95)
    sentences, on = alarms({"step": 1, "think_rate": 0.9}, NONE, config)
    assert "alarm_think" in on and len(sentences) == 1
    sentences, on = alarms({"step": 2, "think_rate": 1.0}, on, config)
    assert not on and "over" in sentences[0]


def test_a_problem_of_the_main_process_ends_all_of_them(tmp_path):
    """The others used to wait for it in the next collective."""

    class Other(Ranks):
        def gather(self, item):
            assert not item
            return ["trackers: wandb did not start", item]

    with pytest.raises(ConfigError, match="wandb did not start"):
        monitor.open_monitor(Config(), tmp_path, 0, Other(1, 2, torch.device("cpu")))
    assert monitor.open_monitor(Config(), tmp_path, 0, Alone(1, 2, torch.device("cpu"))) is None
