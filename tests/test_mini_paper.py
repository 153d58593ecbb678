"""bench/mini_paper.py: what each of its runs is told, its interval, and that a toy comparison runs."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))

from mini_paper import ablation_parts, interval  # noqa: E402


def test_the_conditions_have_equal_data_and_compute():
    parts = ablation_parts(steps=140, warmup_steps=1500)
    rewards = {name: part.options[-1] for name, part in parts.items() if "--reward" in part.options}
    assert rewards == {f"rl_{name}": name for name in ("no_reason", "partial_format", "partial_names")}
    assert {name for name, part in parts.items() if part.start != "start"} == {"start", "sft_then_rl"}
    assert (parts["sft_clean"].budget, parts["sft_imperfect"].budget, parts["sft_half"].budget) == (1, 1, 0.5)
    assert parts["sft_half"].options[-2:] == ("--data_to", "0.5")
    assert parts["sft_then_rl"].options == ("--steps", "70", "--warmup_steps", "0", "--data_from", "0.5")


def test_the_interval_is_students():
    """Against a worked example: mean 3, standard deviation sqrt(2.5), t(4) = 2.776."""
    assert interval([1, 2, 3, 4, 5]) == (3, pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-9))
    assert interval([2.0])[0] == 2.0 and math.isnan(interval([2.0])[1])


@pytest.mark.parametrize("what, row", [("seeds", "shuffled_rewards, 1 seed"), ("ablations", "| SFT, flawed")])
def test_a_toy_comparison_runs(tmp_path, what, row):
    toy = "--seeds 1 --steps 2 --warmup_steps 4 --jobs 2".split()
    few = "--eval_cases 4 --synthetic_train 40 --prompts_per_step 4 --minibatch_prompts 4".split()
    command = [sys.executable, "bench/mini_paper.py", what, *toy, "--out", str(tmp_path), *few]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert row in done.stdout
