"""monitor.py: what a person is told, when an alarm speaks, and that nothing in it ends a run."""

import dataclasses
import math
import sys
from unittest.mock import MagicMock

import pytest

from config import Config, ConfigError
from ops import monitor
from ops.monitor import alarms, close_monitor, open_monitor, show

RECORD = {
    "step": 12, "reward": 0.534, "correct_rate": 0.55, "format_rate": 0.98, "kl": 0.0123, "entropy": 0.42,
    "completions/mean_length": 28.4, "completions/clipped_ratio": 0.0, "frac_reward_zero_std": 0.125,
    "time/rollout_s": 0.4, "time/reward_s": 0.01, "time/update_s": 0.3,
}
CONFIG = Config(max_response_tokens=100)


def open_with(trackers: str, folder, step: int = 0):
    """The monitor of a single process."""
    alone = MagicMock(main=True, gather=lambda problem: [problem])
    return open_monitor(dataclasses.replace(CONFIG, trackers=trackers), folder, step, alone)


@pytest.mark.parametrize("seconds, due", [(0.5, [160.0, 220.5, 281.0, 341.5]), (1.5, [160.0, 311.5])])
def test_the_picture_is_drawn_each_minute_and_at_the_end(seconds, due, tmp_path, monkeypatch, capsys):
    """More rarely where it takes longer. Where it fails, that is said once, and the end tries again."""
    now, times = [100.0], []

    def draw(runs, target):
        times.append(now[0])
        now[0] += seconds
        if now[0] > 300:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(monitor, "draw", draw)
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    watching = open_with("", tmp_path)
    for _ in range(40):
        now[0] += 10.0
        show(watching, {"step": 1}, 140)
    assert times == due
    assert capsys.readouterr().err == "warning: curves.png: OSError: [Errno 28] No space left on device\n"
    close_monitor(watching)
    assert len(times) == len(due) + 1


def said_in(values: list, key: str, config: Config = CONFIG) -> list[list[str]]:
    active, said = frozenset(), []
    for step, value in enumerate(values, 1):
        record = {"step": step} if value is None else {"step": step, key: value}
        sentences, active = alarms(record, active, config)
        said.append(sentences)
    return said


# Good, bad, and a bit better than the threshold: not good enough to end the alarm, as a missing value is not.
@pytest.mark.parametrize("key, good, bad, better", [
    ("entropy", 0.3, 0.009, 0.0105), ("completions/mean_length", 30.0, 51.0, 49.0),
    ("think_rate", 0.9, 0.49, 0.51), ("empty_rate", 0.1, 0.91, 0.89),
    ("kl", 0.1, 1.1, 0.95), ("loss", 0.1, math.nan, math.inf),
    ("updates_skipped_nonfinite", 0, 1, 2),  # the loss itself is logged without the bad parts
])
def test_an_alarm_speaks_when_it_begins_and_when_it_ends_and_not_in_between(key, good, bad, better):
    said = said_in([good, bad, None if key == "kl" else bad, better, bad, good, good, bad], key)
    assert [len(sentences) for sentences in said] == [0, 1, 0, 0, 0, 1, 0, 1]
    assert said[1][0].startswith("ALARM at step 2: ") and said[5][0].startswith("alarm over at step 6: ")


def test_an_alarm_is_off_where_the_settings_ask_for_what_it_warns_of():
    """A reward that pays without a thought, and a reference that may be far away at first."""
    cases = ("think_rate", 0.1, {"reward": "no_reason"}), ("kl", 1.1, {"reference": "teacher"})
    for key, value, changes in cases:
        said = [said_in([value], key, dataclasses.replace(CONFIG, **some))[0] for some in ({}, changes)]
        assert said[0] and not said[1]


def test_the_line_of_a_step_fits_a_hundred_columns():
    large = dict.fromkeys(("correct_rate", "format_rate", "frac_reward_zero_std"), 1.0)
    large |= {"step": 12345, "reward": -0.53, "kl": 1.234, "completions/mean_length": 8192.4}
    long = monitor.step_line(RECORD | large | {"time/rollout_s": 987.6}, 20000)
    assert len(long) <= 100 and "step 12345/20000" in long and "reward -0.53" in long
    assert "loss 0.5" in monitor.step_line({"step": 1, "loss": 0.5, "time/update_s": 1.0}, 20)


@pytest.fixture
def wandb(monkeypatch):
    """Stands for the module and for the run that it opens."""
    fake = MagicMock()
    fake.__spec__ = "installed"
    fake.init.return_value = fake
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def test_wandb_gets_every_number_until_it_fails_and_a_resumed_run_continues_its_page(wandb, tmp_path, capsys):
    watching = open_with("wandb", tmp_path)
    first = wandb.init.call_args.kwargs
    assert (first["name"], first["config"]["lr"]) == (tmp_path.name, CONFIG.lr)
    show(watching, RECORD, 140)
    close_monitor(watching)
    wandb.log.assert_called_once_with(RECORD)
    wandb.finish.assert_called_once_with()
    watching = open_with("wandb", tmp_path, step=10)
    assert wandb.init.call_args.kwargs["id"] == first["id"]
    wandb.log.side_effect = ConnectionError("api.wandb.ai is gone\nwith details")
    for step in (1, 2, 3):
        show(watching, RECORD | {"step": step}, 140)
    said = capsys.readouterr().err
    assert said == "warning: wandb, going on without it: ConnectionError: api.wandb.ai is gone\n"


def test_a_tracker_that_does_not_start_stops_a_new_run_on_all_ranks_but_not_one_that_goes_on(wandb, tmp_path):
    """The others used to wait for the main process in the next collective."""
    wandb.init.side_effect = RuntimeError("no login")
    with pytest.raises(ConfigError, match="wandb did not start .RuntimeError: no login."):
        open_with("wandb", tmp_path)
    assert open_with("wandb", tmp_path, step=10).trackers == {}
    other = MagicMock(main=False, gather=lambda _: ["trackers: wandb did not start", ""])
    with pytest.raises(ConfigError, match="wandb did not start"):
        open_monitor(CONFIG, tmp_path, 0, other)
