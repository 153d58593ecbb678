"""sft.py: the loss is the mean cross-entropy of the reply tokens; runs stop and resume as they say."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ENVIRONMENT,
    ROOT,
    TOOL,
    as_arguments,
    run_here,
    sum_example,
    tiny_policy,
    weights,
    write_task,
)

import grpo
import session
import sft
from config import Config, ConfigError, count_steps
from corpus.examples import Example, Tokenized
from corpus.sources import DataError, read_jsonl
from corpus.tiny_model import build_tiny_tokenizer
from distributed.ranks import Interrupted
from distributed.weights import load_model
from kernel.attention import use_attention
from kernel.packing import pack
from model import count_parameters
from prompts import ToolCall, parse_completion, render_calls
from sft import encode_replies, replies_to_imitate, sft_update


@pytest.fixture
def policy():
    return tiny_policy(temperature=1.0)


GROUPS = [([5, 6, 7], [[8, 9, 10, 11], [12]]), ([20], [[21, 22]]), ([30, 31, 32, 33, 34], [[35] * 9])]

def slow_loss(policy, groups) -> torch.Tensor:
    """Cross-entropy of every reply token, one plain forward pass per reply; prompts do not count."""
    use_attention(policy, "generate")
    losses = []
    for prompt, replies in groups:
        for reply in replies:
            logits = policy(torch.tensor([prompt + reply]), use_cache=False).logits[0]
            labels = torch.tensor([-100] * len(prompt) + reply)
            losses.append(F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum"))
    use_attention(policy, "train")
    return sum(losses) / sum(len(reply) for _, replies in groups for reply in replies)


def test_only_the_reply_tokens_are_targets(policy, ranks, monkeypatch):
    """A model that also learns to write prompts is another baseline than the paper's."""
    seen = []
    monkeypatch.setattr(sft, "pack", lambda *args: seen.append(pack(*args)) or seen[-1])
    sft_update(policy, torch.optim.SGD(policy.parameters(), lr=0.0), GROUPS, Config(), ranks)
    wanted = [token for _, replies in GROUPS for reply in replies for token in reply]
    assert sorted(token for packed in seen for token in packed.target.tolist()) == sorted(wanted)


@pytest.mark.parametrize("tokens, longest", [(10**6, 1e9), (15, 0.0), (1, 1e9)])
def test_the_loss_and_its_gradient_are_those_of_the_reply_tokens(policy, ranks, tokens, longest):
    expected = slow_loss(policy, GROUPS)
    expected.backward()
    gradients = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    config = Config(max_tokens_per_micro_batch=tokens, max_grad_norm=longest)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)  # the step is the gradient
    before = [p.detach().clone() for p in policy.parameters()]
    metrics = sft_update(policy, optimizer, GROUPS, config, ranks)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["num_tokens"] == 3 + 5 + 1 + 2 + 5 + 9
    norm = math.sqrt(sum(float(g.norm()) ** 2 for g in gradients))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for p, old, gradient in zip(policy.parameters(), before, gradients):
        assert (old - p - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6


def test_a_bad_gradient_changes_nothing(policy, ranks):
    """One NaN would go into every weight."""
    with torch.no_grad():
        policy.model.norm.weight[0] = math.nan
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    metrics = sft_update(policy, torch.optim.SGD(policy.parameters(), lr=1.0), GROUPS, Config(), ranks)
    assert not math.isfinite(metrics["grad_norm"]) and metrics["updates_skipped_nonfinite"] == 1
    assert all(
        torch.equal(p.nan_to_num(7), before[name].nan_to_num(7)) for name, p in policy.named_parameters()
    )
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize("calls", [[ToolCall("add", {"a": 1, "b": 2})], []])
def test_an_example_without_demonstrations_is_imitated_as_its_bare_calls(calls):
    example = Example("x", "sums", [{"role": "user", "content": "add 1 and 2"}], [TOOL], calls)
    (reply,) = replies_to_imitate(example)
    assert parse_completion(reply).calls == calls
    assert render_calls(calls) in reply


def test_examples_without_demonstrations_are_counted(capsys):
    """Half of a Reason-SFT without reasons must not go unnoticed."""
    tokenizer, example = build_tiny_tokenizer([], 300), sum_example(0, 1, 2)
    train = [Tokenized(example, [1]), Tokenized(replace(example, demonstrations=()), [2])]
    said = "data: 1 of 2 examples have no demonstrations: their bare calls are imitated"
    groups = encode_replies(tokenizer, train, Config(), quiet=False)
    assert said in capsys.readouterr().out
    assert [(prompt, len(replies)) for prompt, replies in groups] == [([1], 3), ([2], 1)]
    encode_replies(tokenizer, train, Config(sft_reason=False), quiet=False)
    assert said not in capsys.readouterr().out, "there they are asked for"


def test_a_demonstration_ends_once_and_holds_no_other_control_token(capsys):
    tokenizer = build_tiny_tokenizer([], 300)
    texts = ("a<|im_end|>", "a", "a<|im_end|>b<|im_end|>")
    item = Tokenized(replace(sum_example(0, 1, 2), demonstrations=texts), [1])
    [(_, [first, second])] = encode_replies(tokenizer, [item], Config(), quiet=False)
    assert first == second and first.count(tokenizer.eos_token_id) == 1
    assert "1 demonstrations are refused and skipped" in capsys.readouterr().out
    with pytest.raises(DataError, match="no demonstration is left to imitate; id=.*<|im_end|>"):
        bad = Tokenized(replace(item.example, demonstrations=texts[2:]), [1])
        encode_replies(tokenizer, [bad], Config(), quiet=True)


def test_steps_or_epochs():
    assert count_steps(Config(steps=7), 100, 10) == 7
    assert count_steps(Config(epochs=2.0), 100, 10) == 20
    assert count_steps(Config(epochs=0.25), 101, 10) == 3, "what is left over fills a step too"


@pytest.fixture
def settings(tmp_path) -> dict[str, object]:
    tiny = dict(model="tiny", tiny_hidden=16, sft_lr=1e-2, sft_batch=4)
    return write_task(tmp_path) | tiny | {"run_dir": tmp_path / "run", "steps": 6, "max_response_tokens": 40}


def accuracies(row: dict) -> dict:
    return {key: value for key, value in row.items() if key.startswith("held_out/")}


def test_a_run_as_a_user_starts_it(settings):
    command = [sys.executable, "sft.py", *as_arguments(settings)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "greedy accuracy" in done.stdout
    log = read_jsonl(settings["run_dir"] / "log.jsonl")
    assert [row["step"] for row in log] == [0, 1, 2, 3, 4, 5, 6]
    assert log[-1]["loss"] < log[1]["loss"] and weights(settings["run_dir"])
    summary = json.loads((settings["run_dir"] / "summary.json").read_text())
    assert summary == accuracies(log[-1]) and summary["held_out/n"] == 30


def test_a_resumed_run_is_the_straight_run_to_the_bit(settings, monkeypatch):
    """Stopped after step 4 of 6 by a signal. The learning rate goes on where it was."""
    straight = run_here(sft.main, settings)
    broken = settings | {"run_dir": settings["run_dir"].with_name("broken")}
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(session.StopFlag, "requested", lambda self, ranks: calls.append(1) or len(calls) == 4)
        with pytest.raises(Interrupted, match="--resume true"):
            run_here(sft.main, broken)
    assert [row["step"] for row in read_jsonl(broken["run_dir"] / "log.jsonl")] == [0, 1, 2, 3, 4]
    run_here(sft.main, broken | {"resume": "true"})
    one, other = weights(straight), weights(broken["run_dir"])
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [read_jsonl(path / "log.jsonl") for path in (straight, broken["run_dir"])]
    for row, again in zip(*logs, strict=True):
        timeless = [{k: v for k, v in r.items() if k != "seconds" and "time/" not in k} for r in (row, again)]
        assert timeless[0] == timeless[1]


def test_too_many_bad_gradients_in_a_row_end_the_run(settings, monkeypatch):
    bad = {"loss": math.nan, "grad_norm": math.nan, "num_tokens": 1, "updates_skipped_nonfinite": 1}
    monkeypatch.setattr(sft, "sft_update", lambda *_: dict(bad))
    with pytest.raises(ConfigError, match="steps 1 to 5 .* lower sft_lr$"):
        run_here(sft.main, settings)
    log = read_jsonl(settings["run_dir"] / "log.jsonl")
    assert [row["updates_skipped_nonfinite"] for row in log[1:]] == [1, 1, 1, 1]


def test_the_held_out_cases_are_evaluated_before_now_and_then_and_at_the_end(settings):
    """Neither looking nor saving changes the outcome."""
    looking = {"eval_every": 4, "save_every": 2, "background_save": "true"}
    often = run_here(sft.main, settings | looking | {"run_dir": settings["run_dir"].with_name("often")})
    log = read_jsonl(often / "log.jsonl")
    assert [row["step"] for row in log if accuracies(row)] == [0, 4, 6]
    assert (often / "latest").read_text() == "step_6"
    one, other = weights(often), weights(run_here(sft.main, settings))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_checkpoint_with_the_best_accuracy_is_kept(settings, monkeypatch):
    scores = iter([0.9, 0.1, 0.7, 0.3, 0.2, 0.2, 0.2])  # that of the start model has no checkpoint
    monkeypatch.setattr(session, "evaluate", lambda *_: {"held_out/accuracy": next(scores), "held_out/n": 30})
    run_dir = run_here(sft.main, settings | {"eval_every": 1, "save_every": 1, "keep_checkpoints": 1})
    assert sorted(path.parent.name for path in run_dir.glob("step_*/manifest.json")) == ["step_2", "step_6"]


def test_a_finished_run_that_is_resumed_tells_its_accuracy_again(settings):
    run_dir = run_here(sft.main, settings)
    summary, log = (run_dir / "summary.json").read_text(), (run_dir / "log.jsonl").read_text()
    (run_dir / "summary.json").unlink()
    run_here(sft.main, settings | {"resume": "true"})
    assert ((run_dir / "summary.json").read_text(), (run_dir / "log.jsonl").read_text()) == (summary, log)


def test_the_warm_up_of_grpo_is_not_evaluated(settings):
    """It would cost the demo's user time, and its log is not looked at."""
    run_dir = run_here(grpo.main, settings | {"warmup_steps": 2, "steps": 1})
    assert [accuracies(row) for row in read_jsonl(run_dir / "warmup" / "log.jsonl")] == [{}, {}]


def test_the_learning_rate_rises_and_falls(settings):
    log = read_jsonl(run_here(sft.main, settings | {"steps": 40}) / "log.jsonl")[1:]
    for row in log:
        ramp, decay = min(1, row["step"] / 20), 1 - (row["step"] - 1) / 40
        assert row["learning_rate"] == pytest.approx(1e-2 * ramp * decay)


def test_a_compute_budget_ends_the_run(settings, capsys):
    """6 FLOPs per parameter and token: the run stops with the step that reaches the budget."""
    free = read_jsonl(run_here(sft.main, settings) / "log.jsonl")[1:]
    model = load_model(str(settings["run_dir"] / "model"), torch.device("cpu"))
    assert free[0]["flops"] == 6 * free[0]["num_tokens"] * count_parameters(model)
    per_token = free[0]["flops"] / free[0]["num_tokens"]
    assert free[3]["flops"] == pytest.approx(per_token * sum(row["num_tokens"] for row in free[:4]))
    budget = free[2]["flops"] * 0.99
    bounded = settings | {"run_dir": settings["run_dir"].with_name("bounded"), "sft_flops": budget}
    assert "step 1/6 · loss" in capsys.readouterr().out
    log = read_jsonl(run_here(sft.main, bounded) / "log.jsonl")
    assert "step 1 · loss" in capsys.readouterr().out, "nobody knows of how many"
    assert [row["step"] for row in log] == [0, 1, 2, 3] and log[-1]["flops"] >= budget > log[-2]["flops"]
    assert accuracies(log[-1]), "the end is looked at, wherever it is"
    # Starting it once more spends nothing more.
    run_here(sft.main, bounded | {"resume": "true"})
    assert len(read_jsonl(bounded["run_dir"] / "log.jsonl")) == 4
