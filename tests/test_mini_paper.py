"""bench/mini_paper.py: intervals, tables, what each of its runs is told, and that all run in the right
order.
"""

import json
import math
import statistics
import sys
import threading
from pathlib import Path

import pytest

from config import load_config
from reward import REWARDS

sys.path.append(str(Path(__file__).parents[1] / "bench"))  # last: it has a rollout.py too

import mini_paper
from mini_paper import (
    BASELINE,
    CONDITIONS,
    Part,
    PartFailed,
    command,
    figures,
    interval,
    needed,
    parts_of,
    recipe,
    tables,
)

ROOT = Path(__file__).parents[1]
PARTS = parts_of(steps=140, warmup_steps=1500)


@pytest.fixture
def told(monkeypatch):
    """{part: the Config that its command line gives}, for seed 5 and a baseline that took 1e12 FLOPs."""
    monkeypatch.chdir(ROOT)
    words = {
        name: command(
            part, 5, Path(f"out/{name}_5"), Path(f"out/{part.start}_5") if part.start else None, 1e12
        )
        for name, part in PARTS.items()
    }
    return {name: load_config(line) for name, line in words.items()}


def test_all_conditions_of_a_seed_have_the_same_start_data_and_cases(told):
    for name in CONDITIONS:
        run = told[name]
        assert (run.seed, run.data, run.synthetic_train, run.synthetic_test) == (5, "synthetic", 1000, 150)
        assert run.model == ("out/sft_half_5/model" if name == "sft_then_rl" else "out/start_5/model")
        assert run.run_dir == f"out/{name}_5"
        assert run.warmup_steps == 0 or PARTS[name].script == "sft.py"  # sft.py does no warm-up
    assert told["sft_half"].model == "out/start_5/model" and told["start"].model == "tiny"


def test_the_rl_conditions_differ_in_the_reward_alone(told):
    rewards = {name: told[name].reward for name in CONDITIONS if PARTS[name].script == "grpo.py"}
    assert set(rewards.values()) <= set(REWARDS)
    assert rewards == {
        "rl_binary": "binary", "rl_no_reason": "no_reason", "rl_partial_format": "partial_format",
        "rl_partial_names": "partial_names", "sft_then_rl": "binary",
    }
    assert {told[name].steps for name in rewards} == {140, 70}


def test_compute_and_data_are_equal(told):
    assert told["sft_clean"].sft_flops == told["sft_imperfect"].sft_flops == 1e12
    assert told["sft_half"].sft_flops == 0.5e12 and told["sft_then_rl"].steps == 70
    assert (told["sft_half"].data_from, told["sft_half"].data_to) == (0.0, 0.5)
    assert (told["sft_then_rl"].data_from, told["sft_then_rl"].data_to) == (0.5, 1.0)
    flaws = {name: told[name].synthetic_flaws for name in ("start", "sft_clean", "sft_half", "sft_imperfect")}
    assert flaws == {"start": 1.0, "sft_clean": 0.0, "sft_half": 0.0, "sft_imperfect": 1.0}
    assert {name for name in told if told[name].synthetic_thoughts == 0.5} == {"start", "sft_imperfect"}


def test_every_part_comes_after_what_it_builds_on():
    assert needed(["sft_then_rl"], PARTS) == ["start", "rl_binary", "sft_half", "sft_then_rl"]
    every = needed(list(CONDITIONS), PARTS)
    assert sorted(every) == sorted(PARTS)


def test_the_interval_is_students():
    """Against a worked example: mean 3, standard deviation sqrt(2.5), t(4) = 2.776."""
    assert interval([1, 2, 3, 4, 5]) == (3, pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-9))
    assert interval([2.0])[0] == 2.0 and math.isnan(interval([2.0])[1])
    many = [float(i % 2) for i in range(200)]  # beyond the table: its last, a little wider, quantile
    assert interval(many)[1] == pytest.approx(2.042 * statistics.stdev(many) / math.sqrt(200))


@pytest.fixture
def finished(tmp_path):
    """Runs of two seeds, as grpo.py and sft.py leave them."""

    def write(name: str, seed: int, accuracy: float, flops: float, **log: float) -> None:
        folder = tmp_path / f"{name}_{seed}"
        folder.mkdir()
        evaluated = {}
        for split in ("held_out", "strict"):
            evaluated |= {
                f"{split}/correct_rate": accuracy,
                f"{split}/accuracy": accuracy / 2,
                f"{split}/n": 150,
            }
            evaluated[f"{split}/accuracy_single"] = accuracy
        rows = [{"step": 0}, {"step": 9, "flops": flops, **log, **evaluated}]
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "summary.json").write_text("{}" if log else json.dumps(evaluated))

    for seed, base in ((1, 0.5), (2, 0.75)):
        write("start", seed, 0.25, 3e9)
        write("rl_binary", seed, base, 1e9, format_rate=1.0)
        write("sft_clean", seed, base - 0.25, 1e9)
        write("sft_half", seed, 0.3, 5e8)
        write("sft_then_rl", seed, base - 0.5, 5e8, format_rate=0.5)
    return tmp_path


def test_differences_are_paired_by_seed(finished):
    """0.25 below the baseline for either seed: no spread, although the seeds themselves are far apart."""
    results = figures(["start", "rl_binary", "sft_clean", "sft_then_rl"], [1, 2], PARTS, finished)
    clean = results["sft_clean"]
    assert clean["held_out"] == [0.25, 0.5] and clean["held_out_half"] > 1
    assert (clean["held_out_difference"], clean["held_out_difference_half"]) == (-0.25, 0.0)


def test_the_sft_half_counts_into_its_conditions_compute(finished):
    results = figures(["rl_binary", "sft_then_rl"], [1, 2], PARTS, finished)
    assert results["sft_then_rl"]["compute"] == results["rl_binary"]["compute"] == 1.0


def test_the_tables_say_what_was_found(finished):
    text = tables(figures(["start", "rl_binary", "sft_clean", "sft_then_rl"], [1, 2], PARTS, finished))
    assert "| RL, binary reward | 0.625 ± 1.588 | 0.625 ± 1.588 |  |  | 0.312 | 1.00 | 1.000 |" in text
    assert "| -0.250 ± 0.000 |" in text and "n = 150 held-out" in text
    assert "| start model | 0.250 | 0.250 |" in text  # by kind
    assert "Equal to" not in text


def test_a_condition_that_changed_nothing_is_named(finished):
    """Where the start model always writes a thought, no_reason pays for the same completions as binary."""
    results = figures(["rl_binary"], [1, 2], PARTS, finished)
    text = tables(results | {"rl_no_reason": results["rl_binary"]})
    assert (
        "Equal to RL, binary reward in every accuracy and the FLOPs of every seed: RL, binary, no reasoning"
        in text
    )


def test_the_picture_is_drawn(finished):
    mini_paper.draw(figures(["start", "rl_binary"], [1], PARTS, finished), finished / "p.png")
    assert (finished / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_only_what_decides_changes_the_recipe(tmp_path, monkeypatch):
    """Or a comment would void an hour of runs, and a changed reward would be mixed with the old one's
    results.
    """
    monkeypatch.setattr(mini_paper, "ROOT", tmp_path)
    monkeypatch.setattr(mini_paper, "DECIDES", ("a.py", "b.yaml"))
    (tmp_path / "b.yaml").write_text("x: 1\n")

    def of(code: str, parts: dict[str, Part] = PARTS) -> str:
        (tmp_path / "a.py").write_text(code)
        return recipe(parts)

    code = of('"""One."""\ndef f():\n    """Two."""\n    return 1\n')
    assert of('"""Other."""\n\ndef f():  # why\n    return 1\n') == code
    assert of("def f():\n    return 2\n") != code
    assert of("def f():\n    return 1\n", parts_of(4, 60)) != code
    (tmp_path / "b.yaml").write_text("x: 1  # why\n")
    assert of("def f():\n    return 1\n") == code
    (tmp_path / "b.yaml").write_text("x: 2\n")
    assert of("def f():\n    return 1\n") != code


# ----------------------------------------------------------- running: with a script in place of the real ones

SCRIPT = """
import json, pathlib, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert "--model" not in words or pathlib.Path(words["--model"]).parent.joinpath("summary.json").exists(), "no start model"
folder = pathlib.Path(words["--run_dir"])
folder.mkdir()
(folder / "log.jsonl").write_text(json.dumps({"step": 1, "flops": 1e9}) + "\\n")
pathlib.Path("calls.txt").open("a").write(folder.name + " " + words.get("--sft_flops", "-") + "\\n")
sys.exit("broken on purpose") if "fail" in words else (folder / "summary.json").write_text("{}")
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder where grpo.py and sft.py only note that they were called, with two jobs at a time."""
    monkeypatch.setattr(mini_paper, "ROOT", tmp_path)
    (tmp_path / "s.py").write_text(SCRIPT)
    return tmp_path


FAKE = {
    "start": Part("s.py", ()),
    BASELINE: Part("s.py", (), "start"),
    "sft_half": Part("s.py", (), "start", 0.5),
    "sft_then_rl": Part("s.py", (), "sft_half"),
}


def calls(folder: Path) -> list[str]:
    return sorted((folder / "calls.txt").read_text().splitlines())


def test_parts_run_in_order_and_finished_ones_are_not_run_again(scripts):
    mini_paper.run_all(
        list(FAKE), [1, 2], FAKE, scripts, jobs=8
    )  # all at once: each must wait for what it needs
    first = calls(scripts)
    assert len(first) == 8 and "sft_half_2 500000000.0" in first
    (scripts / "sft_then_rl_1" / "summary.json").unlink()  # as an interrupted run is
    (scripts / "sft_then_rl_1").rename(scripts / "gone")  # the real scripts have --overwrite
    mini_paper.run_all(list(FAKE), [1, 2], FAKE, scripts, jobs=2)
    assert calls(scripts) == sorted([*first, "sft_then_rl_1 -"])


def test_a_failure_names_the_part_and_its_log(scripts):
    broken = FAKE | {"sft_half": Part("s.py", ("fail", "yes"), "start", 0.5)}
    with pytest.raises(
        PartFailed, match=r"sft_half, seed 1, ended with code 1; see .*sft_half_1.log: broken on purpose"
    ):
        mini_paper.run_all(list(broken), [1], broken, scripts, jobs=1)
    assert not (scripts / "sft_then_rl_1").exists()


def test_a_stop_ends_the_process_and_leaves_the_part_undone(scripts):
    (scripts / "s.py").write_text("import time\ntime.sleep(5)\n" + SCRIPT)
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    mini_paper.run_part("start", 1, FAKE, scripts, {}, stop)
    assert stop.is_set() and not (scripts / "start_1" / "summary.json").exists()
