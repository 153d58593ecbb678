"""plot.py: what the curves are, which runs share one, and that a picture comes out of whatever a log holds so
far.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from config import ConfigError
from corpus.sources import append_jsonl
from ops import plot

HELD_OUT = {
    "held_out/accuracy": 0.5,
    "held_out/n": 20,
    "held_out/accuracy_single": 0.5,
    "held_out/n_single": 20,
}
GRPO_ROW = {
    "reward": 0.4, "reward_std": 0.2, "correct_rate": 0.4, "format_rate": 0.9, "kl": 0.01, "entropy": 0.3,
    "completions/mean_length": 30.0, "completions/max_length": 60.0, "completions/clipped_ratio": 0.1,
    "frac_reward_zero_std": 0.2, "grad_norm": 0.5, "loss": -0.01, "time/rollout_s": 2.0, "time/update_s": 1.0,
}
SFT_ROW = {"loss": 1.0, "grad_norm": 2.0}


def make_run(path: Path, row: dict, steps: int, before: dict | None = None, **settings) -> Path:
    """A run folder as the training scripts leave it: a log with these steps, and config.yaml where settings
    are given.
    """
    path.mkdir(parents=True)
    first = [{"step": 0, **before}] if before else []
    append_jsonl(
        path / "log.jsonl", first + [{"step": i, **row, "seconds": 3.0 * i} for i in range(1, steps + 1)]
    )
    if settings:
        (path / "config.yaml").write_text(yaml.safe_dump(settings | {"run_dir": str(path)}))
    return path


def titles(*runs: Path) -> list[str]:
    logs = {label: [plot.read_log(run) for run in seeds] for label, seeds in plot.group_seeds(runs).items()}
    panels = plot.choose_panels(runs, logs)
    return [
        arguments[1] if painter is plot.draw_curves else painter.__name__ for painter, arguments in panels
    ]


def is_png(path: Path) -> bool:
    data = path.read_bytes()
    return data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")


# -------------------------------------------------------------------------------------------- logs and curves


@pytest.mark.parametrize("count", [1, 2, 8, 100, 400])
def test_smoothing_is_the_mean_of_the_neighbours(count):
    values = [math.sin(i) for i in range(count)]
    half = max(9, count // 20) // 2
    slow = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(count)]
    assert plot.smooth(values) == pytest.approx(slow)


def test_the_band_spans_the_seeds_and_the_line_is_their_mean():
    logs = [[{"step": s, "reward": value} for s in range(1, 4)] for value in (0.1, 0.2, 0.6)]
    found = plot.curve(logs, "reward")
    assert list(found.steps) == [1, 2, 3]
    assert found.mean == pytest.approx([0.3] * 3)
    assert found.low == pytest.approx([0.1] * 3) and found.high == pytest.approx([0.6] * 3)


def test_where_one_seed_has_ended_the_others_go_on():
    logs = [[{"step": 1, "reward": 0.0}], [{"step": 1, "reward": 1.0}, {"step": 2, "reward": 1.0}]]
    assert list(plot.curve(logs, "reward").mean) == [0.5, 1.0]
    assert plot.lengths("GRPO (2 seeds)", logs) == "GRPO (2 seeds), 1 to 2 steps", (
        "the mean changes where one ends"
    )


def test_rows_without_a_finite_number_are_left_out():
    """One NaN would blot nine smoothed values, or the whole running sum."""
    values = {1: 1.0, 2: math.nan, 4: math.inf, 5: 3.0}
    rows = [{"step": step, "kl": value} for step, value in values.items()] + [{"step": 3}]
    found = plot.curve([rows], "kl")
    assert list(found.steps) == [1, 5] and list(found.mean) == [2.0, 2.0] and list(found.raw) == [1.0, 3.0]
    assert plot.curve([rows], "entropy") is None


def test_seconds_per_step_come_from_rows_that_follow_each_other(tmp_path):
    rows = [
        {"step": 0},
        {"step": 1, "seconds": 5.0},
        {"step": 2, "seconds": 7.0},
        {"step": 4, "seconds": 13.0},
    ]
    rows.append({"step": 4, "seconds": 14.0})  # whatever else a script may log after a step
    append_jsonl(tmp_path / "log.jsonl", rows)
    assert [row.get("seconds_per_step") for row in plot.read_log(tmp_path)] == [None, None, 2.0, 3.0, None]


def test_runs_that_differ_in_their_seed_alone_share_a_label(tmp_path):
    a, b, c = (make_run(tmp_path / f"grpo_{seed}", GRPO_ROW, 2, seed=seed, lr=1e-6) for seed in (1, 2, 3))
    other = make_run(tmp_path / "grpo_fast", GRPO_ROW, 2, seed=1, lr=1e-5)
    assert plot.group_seeds([a, other, b, c]) == {"grpo (3 seeds)": [a, b, c], "grpo_fast": [other]}
    assert plot.group_seeds([a, a]) == {str(a): [a]}, "a run that is named twice counts once"


def test_a_setting_that_is_newer_than_a_run_had_its_default(tmp_path):
    old = make_run(tmp_path / "seed1", GRPO_ROW, 2, seed=1)
    new = make_run(tmp_path / "seed2", GRPO_ROW, 2, seed=2, loss="grpo")
    assert list(plot.group_seeds([old, new])) == [f"{tmp_path.name} (2 seeds)"]


def test_two_recipes_with_the_same_name_keep_two_labels(tmp_path):
    runs = [
        make_run(tmp_path / f"a_{i}", GRPO_ROW, 2, seed=i, lr=1e-6 if i < 3 else 1e-5) for i in (1, 2, 3, 4)
    ]
    assert plot.group_seeds(runs) == {"a (2 seeds)": runs[:2], "a_3 … a_4 (2 seeds)": runs[2:]}


def test_runs_without_a_config_stand_alone(tmp_path):
    runs = [make_run(tmp_path / name, SFT_ROW, 2) for name in ("x", "y")]
    assert plot.group_seeds(runs) == {"x": [runs[0]], "y": [runs[1]]}


# ------------------------------------------------------------------------------------------------ the picture


def test_a_grpo_run_has_all_panels_and_an_sft_run_those_it_has_data_for(tmp_path):
    grpo = make_run(tmp_path / "grpo", GRPO_ROW | HELD_OUT, 3, before=HELD_OUT)
    assert titles(grpo) == [
        "reward", "greedy accuracy", "draw_accuracy", "completions: share that is …", "KL to the start model",
        "entropy of the policy", "completion length", "equal rewards, truncation", "gradient norm before clipping",
        "loss", "draw_phases",
    ]
    evaluated = make_run(tmp_path / "sft_evaluated", SFT_ROW | HELD_OUT, 3, before=HELD_OUT)
    assert titles(evaluated)[:2] == ["greedy accuracy", "draw_accuracy"]
    sft = make_run(tmp_path / "sft", SFT_ROW, 3)
    assert titles(sft) == ["gradient norm before clipping", "loss", "time"]
    both = titles(grpo, sft)
    assert both[-2:] == ["loss", "time"] and not {"draw_accuracy", "draw_phases"} & {*both}, (
        "these are of one run alone"
    )


def test_several_colours_leave_room_for_two_quantities_in_a_panel(tmp_path):
    row = GRPO_ROW | {"think_rate": 1.0, "empty_rate": 0.1}
    a, b = (make_run(tmp_path / name, row, 2) for name in "ab")

    def shown(*runs):
        logs = {run.name: [plot.read_log(run)] for run in runs}
        return next(
            list(arguments[3])
            for _, arguments in plot.choose_panels(runs, logs)
            if "correct_rate" in arguments[3]
        )

    assert shown(a) == ["correct_rate", "format_rate", "think_rate", "empty_rate"]
    assert shown(a, b) == ["correct_rate", "format_rate"]


def test_an_accuracy_is_shown_with_its_number_of_cases():
    rows = [{"held_out/accuracy": 0.5, "held_out/n": 150}, {"step": 1}]
    assert plot.split_label("held_out/accuracy", rows) == "held_out (n = 150)"
    assert plot.split_label("held_out/accuracy", [*rows, {"held_out/n": 20}]) == "held_out", (
        "two runs that differ in it"
    )


@pytest.mark.filterwarnings("error")  # matplotlib warns of an axis without any length
@pytest.mark.parametrize("steps", [0, 1, 2, 30])
def test_a_picture_comes_out_of_a_log_of_any_length(tmp_path, steps):
    run = make_run(tmp_path / "run", GRPO_ROW, steps, before=HELD_OUT)
    plot.draw([run], run / "curves.png")
    assert is_png(run / "curves.png")
    assert sorted(path.name for path in run.iterdir()) == ["curves.png", "log.jsonl"], (
        "no temporary file stays"
    )


def test_runs_of_different_length_and_kind_fit_into_one_picture(tmp_path):
    runs = [make_run(tmp_path / f"s_{i}", GRPO_ROW | HELD_OUT, 3 * i, HELD_OUT, seed=i) for i in (1, 2)]
    runs += [
        make_run(tmp_path / "sft", SFT_ROW, 5),
        make_run(tmp_path / "broken", {"loss": math.nan, "kl": math.inf}, 2),
    ]
    plot.draw(runs, tmp_path / "all.svg")
    text = (tmp_path / "all.svg").read_text()
    assert text.rstrip().endswith("</svg>")
    for label in ("s (2 seeds), 3 to 6 steps", "sft", "broken"):
        assert f"<!-- {label} -->" in text


def test_a_log_without_any_number_says_so(tmp_path):
    append_jsonl(tmp_path / "log.jsonl", [{"step": 0}])
    plot.draw([tmp_path], tmp_path / "x.svg")
    assert "nothing to draw yet" in (tmp_path / "x.svg").read_text()


def test_phases_are_stacked_over_the_steps_that_have_them():
    """The evaluation before step 1 has no phases, and must not pull the first seconds towards 0."""
    from matplotlib.figure import Figure

    axis = Figure().add_subplot()
    rows = [{"step": 0}] + [
        {"step": i, "time/rollout_s": 2.0, "time/update_s": 1.0, "time/tiny_s": 0.01} for i in (1, 2, 3)
    ]
    plot.draw_phases(axis, rows)
    corners = [area.get_paths()[0].get_extents() for area in axis.collections]
    assert [(box.x0, box.x1) for box in corners] == [(1, 3)] * 3
    assert [box.y1 for box in corners] == pytest.approx([2.0, 3.0, 3.01])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["rollout", "update", "other"]


def test_a_picture_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    """A viewer, or a disk that is full, must never be left with half a PNG."""
    from matplotlib.figure import Figure

    def stops_half_way(figure, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    run = make_run(tmp_path / "run", GRPO_ROW, 2)
    plot.draw([run], run / "curves.png")
    monkeypatch.setattr(Figure, "savefig", stops_half_way)
    with pytest.raises(OSError):
        plot.draw([run], run / "curves.png")
    assert is_png(run / "curves.png") and len(list(run.iterdir())) == 2


def test_drawing_leaves_the_process_as_it_was(tmp_path):
    """pyplot would keep figures and choose a backend, in the middle of somebody's training."""
    run = make_run(tmp_path / "run", GRPO_ROW, 2)
    code = (
        "import sys, pathlib, plot; before = 'matplotlib' in sys.modules; run = pathlib.Path(sys.argv[1]); "
        "plot.draw([run], run / 'x.png'); print(before, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, run], cwd=Path(plot.__file__).parents[1], capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", "False"], done.stderr


# --------------------------------------------------------------------------------------------------- the text


def test_one_finished_run_is_reported_with_its_accuracies_and_samples(tmp_path, capsys):
    run = make_run(tmp_path / "run", GRPO_ROW | HELD_OUT | {"held_out/accuracy": 0.75}, 3, before=HELD_OUT)
    (run / "summary.json").write_text(json.dumps({"steps": 3, "reward_first5": 0.4, "reward_last10": 0.9}))
    sample = {"reward": 1.0, "reason": "correct", "completion": "[]"}
    append_jsonl(
        run / "samples.jsonl", [{"step": 2, **sample}, {"step": 3, **sample, "completion": "the last one"}]
    )
    plot.main([str(run)])
    text = capsys.readouterr().out
    assert ["all", "20", "0.500", "0.750"] in [line.split() for line in text.splitlines()]
    assert "0.400 in the first 5 steps, 0.900 in the last 10" in text
    assert "the last one" in text and "[]" not in text and str(run / "curves.png") in text


def test_a_finished_sft_run_is_reported_too(tmp_path, capsys):
    """Its summary holds the final accuracies alone: this ended in a KeyError."""
    run = make_run(tmp_path / "sft", SFT_ROW, 3)
    (run / "summary.json").write_text(json.dumps(HELD_OUT))
    plot.main([str(run)])
    assert ["all", "20", "0.500"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_the_accuracies_of_a_run_are_called_by_what_was_done(tmp_path):
    grpo, sft = (
        make_run(tmp_path / name, row | HELD_OUT, 2, HELD_OUT)
        for name, row in (("g", GRPO_ROW), ("s", SFT_ROW))
    )
    (grpo / "sft").mkdir()
    (grpo / "sft" / "summary.json").write_text(json.dumps(HELD_OUT | {"steps": 9}))
    assert plot.accuracies(grpo) == {"before": HELD_OUT, "after RL": HELD_OUT, "after SFT": HELD_OUT}
    assert plot.accuracies(sft) == {"before": HELD_OUT, "after SFT": HELD_OUT}


def test_several_runs_or_a_folder_of_them_go_into_one_overlay(tmp_path, capsys):
    a, b = (make_run(tmp_path / "runs" / name, GRPO_ROW, 2) for name in "ab")
    plot.main([str(a), str(b)])
    plot.main([str(tmp_path / "runs")])
    plot.main([str(tmp_path / "runs"), "--out", str(tmp_path / "new" / "x.pdf")])
    assert is_png(a / "overlay.png") and is_png(tmp_path / "runs" / "overlay.png")
    assert (tmp_path / "new" / "x.pdf").read_bytes().startswith(b"%PDF")
    assert capsys.readouterr().out.count("picture of 2 run(s)") == 3


@pytest.mark.parametrize(
    "arguments, words", [(["empty"], "empty has no log.jsonl"), (["run", "--out", "x.jpg"], ".svg")]
)
def test_what_cannot_be_drawn_is_said_in_one_sentence(tmp_path, monkeypatch, arguments, words):
    make_run(tmp_path / "run", GRPO_ROW, 2)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        plot.main(arguments)
