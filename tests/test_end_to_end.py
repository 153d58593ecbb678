"""Learning itself: GRPO must raise the reward by far more than noise, and must fail to do so when one line is
broken. The task is that of helpers.py.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers import run_here, weights
from safetensors.torch import load_file

import grpo
import reward
from corpus.layouts import load_examples
from corpus.sources import read_jsonl
from distributed import batches
from losses import ADVANTAGES
from reward import score

# The mean of one step's 64 samples has a standard error of 0.06. Learning rate and steps are such that Adam's
# random walk under shuffled rewards, whose steps are as long as those of learning, stays far behind.
RISE = 0.3


@pytest.fixture(scope="module")
def settings(warmed) -> dict[str, object]:
    return warmed


@pytest.fixture(scope="module")
def healthy(settings, tmp_path_factory) -> Path:
    return run_here(grpo.main, settings | {"run_dir": tmp_path_factory.mktemp("healthy")})


def true_rewards(run_dir: Path, settings: dict[str, object]) -> list[float]:
    """The mean reward of each step, from the completions in samples.jsonl alone."""
    answers = {example.id: example.answer for example in load_examples(settings["data"])[0]}
    by_step: dict[int, list[float]] = {}
    for row in read_jsonl(run_dir / "samples.jsonl"):
        by_step.setdefault(row["step"], []).append(score(row["completion"], answers[row["prompt_id"]]).total)
    assert all(len(rewards) == 64 for rewards in by_step.values())
    return [sum(rewards) / len(rewards) for _, rewards in sorted(by_step.items())]


def rise(run_dir: Path, settings: dict[str, object]) -> float:
    rewards = true_rewards(run_dir, settings)
    assert len(rewards) == settings["steps"]
    return sum(rewards[-10:]) / 10 - rewards[0]


def test_the_reward_rises(healthy, settings):
    rewards = true_rewards(healthy, settings)
    assert 0.15 < rewards[0] < 0.6, "the start leaves room to learn, and something to learn from"
    assert rise(healthy, settings) > RISE
    summary = json.loads((healthy / "summary.json").read_text())
    assert summary["accuracy_after"] >= summary["accuracy_before"] and summary["accuracy_after"] > 0.8


def shifted(pack):
    """Every token is trained at the position that already shows it, instead of the one before."""

    def broken(*args):
        packed = pack(*args)
        return dataclasses.replace(packed, predict=(packed.predict + 1).clamp(max=packed.ids.shape[1] - 1))

    return broken


BROKEN = {
    "the sign of the advantage": (ADVANTAGES, "group_std", lambda real: lambda rewards: -real(rewards)),
    "the position that predicts": (batches, "pack", shifted),
    "advantages of other completions": (
        ADVANTAGES,
        "group_std",
        lambda real: lambda rewards: real(rewards).roll(1, 1),
    ),
}


@pytest.mark.parametrize("line", BROKEN)
def test_nothing_is_learnt_with_one_line_broken(line, settings, tmp_path, monkeypatch):
    """If this fails, test_the_reward_rises says nothing: something else raises the reward."""
    place, name, break_it = BROKEN[line]
    names = place if isinstance(place, dict) else vars(place)
    monkeypatch.setitem(names, name, break_it(names[name]))
    assert rise(run_here(grpo.main, settings | {"run_dir": tmp_path}), settings) < RISE / 2


OWN_REWARDS = """
from reward import score

def constant(completion, answer, tools):
    return 1

def opposite(completion, answer, tools):
    assert tools[0]["name"] == answer[0]["name"] == "add"
    return 1.0 - score(completion, answer).total
"""


@pytest.mark.parametrize("function", ["constant", "opposite"])
def test_a_reward_of_ones_own_is_what_is_learnt(function, settings, tmp_path):
    """Neither of these two teaches the task: `--reward file.py:function` replaces the verifier."""
    (tmp_path / "own.py").write_text(OWN_REWARDS)
    own = settings | {"reward": f"{tmp_path / 'own.py'}:{function}", "run_dir": tmp_path / "run"}
    assert rise(run_here(grpo.main, own), settings) < RISE / 2


def test_without_any_reward_the_policy_learns_from_its_reference(healthy, settings, tmp_path):
    """On-policy distillation: all groups are flat, and the KL to the trained model is all that there is."""
    (tmp_path / "own.py").write_text(OWN_REWARDS)
    changes = dict(reward=f"{tmp_path / 'own.py'}:constant", kl="k2", kl_coef=1.0)
    changes |= {"reference": healthy / "model", "run_dir": tmp_path / "run"}
    run_dir = run_here(grpo.main, settings | changes)
    log = read_jsonl(run_dir / "log.jsonl")[1:]
    assert all(row["frac_reward_zero_std"] == 1 and row["updates"] == 1 for row in log)
    assert sum(row["kl"] for row in log[-5:]) < 0.3 * sum(row["kl"] for row in log[:5])
    assert rise(run_dir, settings) > RISE


def test_a_broken_reward_of_ones_own_stops_before_anything_is_made(settings, tmp_path):
    (tmp_path / "own.py").write_text("def f(completion): return 1")
    with pytest.raises(reward.RewardError, match="own.py:f raised TypeError"):
        run_here(grpo.main, settings | {"reward": f"{tmp_path / 'own.py'}:f", "run_dir": tmp_path / "run"})
    assert not (tmp_path / "run").exists()


def test_nothing_is_learnt_from_shuffled_rewards(settings, tmp_path):
    """The negative control of the README: the same rewards, but beside other completions."""
    shuffled = settings | {"shuffle_rewards": "true", "run_dir": tmp_path}
    assert rise(run_here(grpo.main, shuffled), settings) < RISE / 2


def test_a_learning_rate_of_0_changes_no_bit(settings, tmp_path):
    still = settings | {"lr": 0, "steps": 2, "run_dir": tmp_path, "kl_coef": 0.1, "minibatch_prompts": 4}
    after = weights(run_here(grpo.main, still))
    before = load_file(Path(settings["model"]) / "model.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    log = read_jsonl(tmp_path / "log.jsonl")
    assert all(row["grad_norm"] > 0 for row in log[1:]), "there was something to learn"
    # The policy never left the reference, so both directions of the comparison are exactly zero.
    assert all(row["kl"] == 0 and row["clip_ratio/region_mean"] == 0 for row in log[1:])


def test_the_summary_is_what_the_log_says(healthy, settings):
    summary, log = json.loads((healthy / "summary.json").read_text()), read_jsonl(healthy / "log.jsonl")
    rewards = [row["reward"] for row in log[1:]]
    assert [row["step"] for row in log] == list(range(26))
    assert summary["steps"] == 25
    assert summary["reward_first5"] == pytest.approx(sum(rewards[:5]) / 5)
    assert summary["reward_last10"] == pytest.approx(sum(rewards[-10:]) / 10)
    assert summary["accuracy_before"] == log[0]["held_out/accuracy"]
    assert summary["accuracy_after"] == log[-1]["held_out/accuracy"]
    assert summary["flops"] == log[-1]["flops"] > 0
    assert log[-1]["seconds"] - 0.1 < summary["wall_s"] < log[-1]["seconds"] + 10
    # every test case has one tool and one call
    single = {"before": summary["accuracy_before"], "after": summary["accuracy_after"], "n": 30}
    assert summary["accuracy_by_kind"] == {"single": single}


def test_the_log_is_what_the_samples_say(healthy, settings):
    log, samples = read_jsonl(healthy / "log.jsonl")[1:], read_jsonl(healthy / "samples.jsonl")
    assert [row["reward"] for row in log] == pytest.approx(true_rewards(healthy, settings))
    for row in log:
        own = [sample for sample in samples if sample["step"] == row["step"]]
        groups = [own[i : i + 8] for i in range(0, 64, 8)]
        assert all(len({sample["prompt_id"] for sample in group}) == 1 for group in groups)
        totals = torch.tensor(
            [[sample["reward"] for sample in group] for group in groups], dtype=torch.float64
        )
        assert row["reward_std"] == pytest.approx(totals.std(1).mean().item())
        assert row["frac_reward_zero_std"] == (totals.amax(1) == totals.amin(1)).double().mean().item()
        assert row["correct_rate"] == pytest.approx(sum(s["reason"] == "correct" for s in own) / 64)
        distinct = [len({sample["completion"] for sample in group}) / 8 for group in groups]
        assert row["distinct_rate"] == pytest.approx(sum(distinct) / 8)
        for group in groups:
            assert abs(sum(sample["advantage"] for sample in group)) < 1e-3
