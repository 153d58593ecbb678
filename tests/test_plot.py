"""plot.py: which curves are drawn, a picture of whatever a log holds, and the printed results."""

import math
import tracemalloc
from pathlib import Path

import pytest
import yaml

from config import UserError
from corpus.sources import append_jsonl
from ops import plot
from ops.samples_page import write_page

HELD_OUT = {
    "held_out/accuracy": 0.5, "held_out/n": 20, "held_out/accuracy_single": 0.25, "held_out/n_single": 8,
}
GRPO_ROW = {
    "reward": 0.4, "reward_std": 0.2, "correct_rate": 0.4, "format_rate": 0.9, "think_rate": 1.0,
    "empty_rate": 0.1, "kl": 0.01, "entropy": 0.3, "completions/mean_length": 30.0, "grad_norm": 0.5,
    "completions/max_length": 60.0, "completions/clipped_ratio": 0.1, "frac_reward_zero_std": 0.2,
    "loss": -0.01, "time/rollout_s": 2.0, "time/update_s": 1.0, "flops": 1e9,
}
SFT_ROW = {"loss": 1.0, "grad_norm": 2.0}


def make_run(path: Path, row: dict, steps: int, before: dict | None = None, **settings) -> Path:
    path.mkdir(parents=True)
    first = [{"step": 0, **before}] if before else []
    rows = [{"step": i, **row, "seconds": 3.0 * i} for i in range(1, steps + 1)]
    append_jsonl(path / "log.jsonl", first + rows)
    if settings:
        (path / "config.yaml").write_text(yaml.safe_dump(settings | {"run_dir": str(path)}))
    return path


def test_panels_are_those_that_there_are_finite_numbers_for():
    panels = plot.choose_panels([{"step": 0, **HELD_OUT}, {"step": 1, **GRPO_ROW}], several=False)
    assert [panel.title for panel in panels] == [panel.title for panel in plot.PANELS]
    sft = plot.choose_panels([plot.numbers({"step": 1, **SFT_ROW, "kl": math.nan})], several=False)
    assert [panel.title for panel in sft] == ["gradient norm before clipping", "loss"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text, points", [
    ('{"step": 1, "kl": 1}\n{"step": 2, "kl": NaN}\n{"step": 4, "kl": -Infinity}\n{"step": 5, "kl": 3}\n',
     [(1, 1), (5, 3)]),  # one NaN would spoil nine smoothed values, or the whole running sum
    ('{"kl": 1}\n{"kl": "2"}\n{"kl": null}\n{"kl": true}\n{"step": "x", "kl": 3}\n{"kl": 1e309}\n7\n{"kl": 4',
     [(1, 1), (5, 3)]),  # no steps, no numbers, no object, and a last line that is cut off
    ('[{"step": 10, "kl": 1},\n {"step": 20, "kl": [3]}]', [(10, 1)]),
    ('{\n  "log_history": [7, {"step": 5, "kl": 1}, {"step": 9, "kl": 2, "x": 3}]\n}', [(5, 1), (9, 2)]),
    ('{"iter": 1, "val$loss$": 2}\n{"iter": 2, "val$loss$": 3, "note": "x"}\n', []),
])
def test_logs_of_other_tools_are_drawn_as_far_as_they_are_numbers(tmp_path, text, points):
    """What is no finite number is left out of a curve; keys that we do not know have panels of their own."""
    name = "trainer_state.json" if "log_history" in text else "log.jsonl"
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert [(row["step"], row["kl"]) for row in plot.read_log(tmp_path) if "kl" in row] == points
    plot.main([str(tmp_path)])
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("name, text", [
    ("other.jsonl", '{"kl": 1}'), ("log.jsonl", ""), ("log.jsonl", '{"step": 1}\n'), ("log.jsonl", "[[1"),
])
def test_a_folder_without_anything_to_draw_is_told_so(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="has no log.jsonl or|holds no numbers|cannot be read"):
        plot.main([str(tmp_path)])
    (tmp_path / "log.jsonl").write_text('{"kl": 1}\n')
    for out in ("curves.nothing", "no/such/folder.png"):
        with pytest.raises(UserError, match=f"plot: .*{out.removeprefix('curves.')}"):
            plot.main([str(tmp_path), "--out", str(tmp_path / out)])
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.filterwarnings("error")  # matplotlib warns of an axis without any length
@pytest.mark.parametrize("steps", [0, 1, 30])
def test_a_picture_comes_out_of_a_log_of_any_length_and_leaves_no_other_file(tmp_path, steps):
    run = make_run(tmp_path / "run", GRPO_ROW, steps, before=HELD_OUT)
    plot.draw([run], run / "curves.png")
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in run.iterdir()) == ["curves.png", "log.jsonl"]


def test_runs_of_different_length_and_kind_fit_into_one_picture(tmp_path):
    runs = [make_run(tmp_path / f"s_{i}", GRPO_ROW | HELD_OUT, 3 * i, HELD_OUT, seed=i) for i in (1, 2)]
    runs.append(make_run(tmp_path / "sft", SFT_ROW, 5))
    runs.append(make_run(tmp_path / "broken", {"loss": math.nan, "kl": math.inf}, 2))
    plot.main([*map(str, runs), "--out", str(tmp_path / "all.svg")])
    picture = (tmp_path / "all.svg").read_text()
    assert all(f"{label} -->" in picture for label in (f"{runs[0]} and 1 more", "sft", "broken"))


def test_a_picture_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):

    def stops_half_way(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    run = make_run(tmp_path / "run", GRPO_ROW, 2)
    (run / "curves.png").write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", stops_half_way)
    with pytest.raises(OSError):
        plot.draw([run], run / "curves.png")
    assert (run / "curves.png").read_bytes() == b"old" and len(list(run.iterdir())) == 2


def test_the_summary_of_a_run_comes_from_its_log():
    log = [{"step": 0, **HELD_OUT, "strict/accuracy": 0.1}]
    log += [{"step": i, "reward": i / 10, "seconds": 2.04 * i, "flops": 1e9 * i} for i in range(1, 13)]
    log[-1] |= HELD_OUT | {"held_out/accuracy": 0.7, "held_out/accuracy_single": 0.5, "strict/accuracy": 0.6}
    assert plot.summarize(log, ["held_out", "strict"]) == {
        "steps": 12, "wall_s": 24.5, "flops": 12e9, "reward_first5": pytest.approx(0.3),
        "reward_last10": pytest.approx(0.75), "accuracy_before": 0.5, "accuracy_after": 0.7,
        "accuracy_by_kind": {"single": {"before": 0.25, "after": 0.5, "n": 8}},
        "strict_accuracy_before": 0.1, "strict_accuracy_after": 0.6, "strict_accuracy_by_kind": {},
    }


def test_lines_that_are_no_row_are_counted_once(tmp_path, capsys):
    run = make_run(tmp_path / "run", GRPO_ROW, 3)
    log = (run / "log.jsonl").read_bytes()
    for rest, warned in ((b'{"step": 4, "rew', 0), (b"\0\0\0\n", 0), (b"{\n" + log, 1)):
        (run / "log.jsonl").write_bytes(log + rest)
        plot.main([str(run)])
        assert capsys.readouterr().err.count("log.jsonl: left out 1 line(s)") == warned


def make_samples(folder: Path, count: int, text: str) -> None:
    (folder / "summary.json").write_text(f'{{"steps": {count}}}')
    row = {"prompt_id": text, "completion": text, "reward": 1.0}
    append_jsonl(folder / "samples.jsonl", ({"step": step, **row} for step in range(1, count + 1)))


def test_completions_are_escaped_and_a_broken_line_is_named(tmp_path, capsys):
    run = make_run(tmp_path / "run", GRPO_ROW | {"a\x1b/accuracy": 0.5}, 3)
    make_samples(run, 3, "a\x1b[2K\r\x07b")
    plot.main([str(run)])
    printed = capsys.readouterr().out
    assert "    a\\x1b[2K\\x0d\\x07b\n" in printed and "\x1b" not in printed
    with (run / "samples.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(UserError, match="samples.jsonl:4: "):
        plot.main([str(run)])


def test_large_logs_are_not_held_in_memory(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", GRPO_ROW, 3)
    make_samples(run, 2000, "x" * 10_000)
    monkeypatch.setattr("ops.samples_page.MAX_BYTES", 1_000_000)
    for action in (plot.print_results, write_page):
        action(run)  # what is made once
        tracemalloc.start()
        action(run)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 0.4 * (run / "samples.jsonl").stat().st_size, action
