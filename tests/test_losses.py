"""losses.py: every formula against a slow loop or an exact value; every loss as a whole update."""

import math

import pytest
import torch
from helpers import ADVANTAGES as GIVEN
from helpers import Recorder, assert_same_gradients, random_groups, settings_of, tiny_policy
from torch.testing import assert_close

from config import ConfigError
from distributed.batches import make_updates
from distributed.ranks import Ranks
from grpo import store_logprobs, update_policy
from kernel.packing import pack
from losses import (
    ADVANTAGES,
    AGGREGATIONS,
    CORRECTIONS,
    KLS,
    LOSSES,
    SCHEDULES,
    TERMS,
    Objective,
    group_mean,
    group_std,
    kl_k1,
    kl_k2,
    kl_k3,
    learning_rate,
    leave_one_out,
    max_rl,
    objective_of,
    policy_loss,
)

CPU = torch.device("cpu")

def test_advantages_against_a_slow_loop():
    rewards = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    functions = (torch.clone, group_std, group_mean, leave_one_out, max_rl)
    for row, scaled, centred, left_out, relative in zip(*(f(rewards).tolist() for f in functions)):
        mean = sum(row) / 4
        std = math.sqrt(sum((x - mean) ** 2 for x in row) / 3)  # n - 1
        assert scaled == pytest.approx([(x - mean) / (std + 1e-6) for x in row], rel=1e-4)
        assert centred == pytest.approx([x - mean for x in row], abs=1e-6)
        assert left_out == pytest.approx([x - (sum(row) - x) / 3 for x in row], abs=1e-6)
        assert relative == pytest.approx([(x - mean) / mean for x in row], abs=1e-5)


def test_max_rl_turns_no_sign():
    """Rewards may be negative: to divide by their mean would teach what is worst."""
    below, zero = max_rl(torch.tensor([[-3.0, -1.0, 0.0], [-1.0, 0.0, 1.0]]))
    assert torch.equal(below, torch.zeros(3)) and torch.equal(zero, torch.zeros(3))


def test_the_entropy_of_thoughts_against_a_slow_loop():
    """Thoughts of 2 of 3 tokens, of none, of all 2 and of 1 of 4; |A| / 2 bounds some of them."""
    counts, thoughts = [3, 1, 2, 4], [2, 0, 2, 1]
    entropy = torch.rand(10, generator=torch.Generator().manual_seed(0)).tolist()
    for scale in (0.0, 0.1, -0.9, 20.0):
        expected, start = [], 0
        for count, thought in zip(counts, thoughts):
            own = entropy[start : start + thought]
            mean = sum(own) / len(own) if own else 0.0
            expected += [0.4 * min(mean, abs(scale) / 2)] * count
            start += count
        given = torch.full((10,), scale), torch.tensor(entropy), torch.tensor(counts), torch.tensor(thoughts)
        assert TERMS["egpo"](*given).tolist() == pytest.approx(expected, abs=1e-6)


def test_what_a_correction_weighs():
    """By the ratio of a token's probabilities in trainer and sampler."""
    ratio = torch.tensor([0.0, 0.49, 0.5, 1.0, 2.0, 2.1, 5.0, 5.1, math.inf])
    found = {name: weigh(ratio).tolist() for name, weigh in CORRECTIONS.items()}
    assert found == {
        "none": [1.0] * 9,
        "tis": ratio[:5].tolist() + [2.0] * 4,
        "icepop": [0.0, 0.0, 0.5, 1.0, 2.0, ratio[5].item(), 5.0, 0.0, 0.0],
    }


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.1 + 0.2, 1 / 3, 1e-9])
@pytest.mark.parametrize("size", [2, 5, 7])
def test_a_flat_group_has_no_advantage_at_all(name, reward, size):
    """The mean of seven times 0.1 is not 0.1: divided by a tiny std, the rounding became a signal."""
    advantage, rewards = ADVANTAGES[name], torch.full((2, size), reward)
    assert torch.equal(advantage(rewards), torch.zeros(2, size))
    rewards[1, 0] += 0.5  # another group in the batch does not matter
    assert torch.equal(advantage(rewards)[0], torch.zeros(size)) and advantage(rewards)[1].abs().min() > 0


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_compare_inside_a_group_only(name):
    """A std over the batch would make the first group's advantages depend on the second's."""
    first, easy, hard = [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 100.0]
    with_easy, with_hard = (ADVANTAGES[name](torch.tensor([first, other])) for other in (easy, hard))
    assert torch.equal(with_easy[0], with_hard[0])
    assert torch.equal(with_easy[0], ADVANTAGES[name](torch.tensor([first]))[0])


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the policy (to differentiate) and log-probs of the reference, over a vocabulary of 9."""
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits[0].requires_grad_(), (2 * logits[1]).log_softmax(-1)


def gradient(value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def test_the_mean_of_k1_and_k3_is_the_kl_and_that_of_k2_is_near_it():
    """Over all tokens x of the vocabulary: sum p(x) k(x) against sum p(x) log p(x)/q(x)."""
    logits, q = distributions()
    p = logits.log_softmax(-1)
    exact, other_direction = (p.exp() * (p - q)).sum(), (q.exp() * (q - p)).sum()
    for estimate in (kl_k1, kl_k3):
        assert_close((p.exp() * estimate(p, q)).sum(), exact)
    assert (exact - other_direction).abs() > 0.05
    near = p + 0.01 * (q - p)  # two distributions that are close, where k2 is good
    near = near.log_softmax(-1)
    mean_k2 = (p.exp() * kl_k2(p, near)).sum()
    assert mean_k2.item() == pytest.approx((p.exp() * (p - near)).sum().item(), rel=0.03)
    assert (p.exp() * kl_k2(p, q)).sum().item() != pytest.approx(exact.item(), rel=0.1)


def test_what_the_gradient_of_each_estimate_is_in_a_loss():
    """Samples are fixed when a loss is differentiated: the mean is sum p(x) dk(x), not d sum p(x) k(x)."""
    logits, q = distributions()
    p = logits.log_softmax(-1)
    weight = p.detach().exp()
    mean = {name: gradient((weight * estimate(p, q)).sum(), logits) for name, estimate in KLS.items()}
    reverse, forward = (
        gradient((p.exp() * (p - q)).sum(), logits),
        gradient((q.exp() * (q - p)).sum(), logits),
    )
    assert_close(mean["k1"], torch.zeros(9, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(mean["k2"], reverse)
    assert_close(mean["k3"], forward)
    assert (reverse - forward).norm() > 0.1 * forward.norm()


def slow_loss(logprobs: list, old: list, advantage: float, loss: Objective) -> list[torch.Tensor]:
    """The definitions, token by token, of one completion with such log-probs."""
    ratios = [torch.exp(new - before) for new, before in zip(logprobs, old)]
    if loss.ratio == "sequence_mean":  # GSPO: the geometric mean
        whole = 1.0
        for ratio in ratios:
            whole = whole * ratio ** (1 / len(ratios))
        ratios = [whole] * len(ratios)
    elif loss.ratio == "sequence_sum":  # the ratio of two probabilities of the whole completion
        whole = 1.0
        for ratio in ratios:
            whole = whole * ratio
        ratios = [whole] * len(ratios)
    values = []
    for ratio, logprob in zip(ratios, logprobs):
        bounded = min(max(ratio.item(), 1 - loss.clip_low), 1 + loss.clip_high)
        if loss.surrogate == "weighted":
            values.append(-bounded * advantage * logprob)
        else:
            gains = [ratio * advantage, bounded * advantage]
            values.append(
                -gains[0] if gains[0].item() <= gains[1] else -torch.tensor(gains[1], dtype=torch.float64)
            )
    return values


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_against_a_slow_loop(name):
    """Three completions of different lengths, with ratios inside and outside of the bounds on both sides."""
    loss, generator = LOSSES[name], torch.Generator().manual_seed(1)
    counts = torch.tensor([4, 1, 6])
    old = -torch.rand(11, generator=generator, dtype=torch.float64) - 1
    for spread in (0.0, 1e-4, 0.3, 3.0):
        new = (old + spread * torch.randn(11, generator=generator, dtype=torch.float64)).requires_grad_()
        advantages = torch.tensor([1.5, -0.7, -0.8], dtype=torch.float64)
        values, ratio = policy_loss(new, old, advantages.repeat_interleave(counts), counts, loss)
        expected = []
        for one, before, advantage in zip(
            new.split(counts.tolist()), old.split(counts.tolist()), advantages.tolist()
        ):
            expected += slow_loss(list(one), list(before), advantage, loss)
        expected = torch.stack(expected)
        assert_close(values, expected)
        assert_close(*(torch.autograd.grad(x.sum(), new, retain_graph=True)[0] for x in (values, expected)))
        assert spread or torch.equal(ratio, torch.ones(11, dtype=torch.float64))


def test_where_the_clip_stops_the_gradient():
    """Where the update has gone far enough already, and never where it must come back."""
    ratios = torch.tensor([0.1, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 5.0], dtype=torch.float64)
    for name, high in (("grpo", 1.2), ("dapo", 1.28)):
        for sign in (1.0, -1.0):
            new = ratios.log().requires_grad_()
            advantages = torch.full_like(new, sign)
            policy_loss(new, torch.zeros_like(new), advantages, torch.tensor([9]), LOSSES[name])[
                0
            ].sum().backward()
            stopped = ratios > high if sign > 0 else ratios < 0.8
            assert_close(new.grad, torch.where(stopped, 0.0, -ratios * sign))


def test_cispo_keeps_a_gradient_where_the_clip_would_stop_it():
    """Every token counts with its bounded ratio as a weight: 5 where policy / old is 50."""
    new = torch.tensor([math.log(50.0), 0.0, math.log(0.02)], dtype=torch.float64, requires_grad=True)
    policy_loss(new, torch.zeros(3), torch.ones(3), torch.tensor([3]), LOSSES["cispo"])[0].sum().backward()
    assert_close(new.grad, torch.tensor([-5.0, -1.0, -0.02], dtype=torch.float64))


@pytest.mark.parametrize("name", LOSSES)
def test_at_the_first_update_every_loss_is_a_policy_gradient(name):
    """With ratio 1 the gradient of every token's log-prob is -A, but for a weight of its completion."""
    counts, new = torch.tensor([3, 5]), torch.full((8,), -2.0, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([2.0, -1.0], dtype=torch.float64)
    policy_loss(new, new.detach(), advantages.repeat_interleave(counts), counts, LOSSES[name])[
        0
    ].sum().backward()
    weight = {"sequence_sum": counts}.get(
        LOSSES[name].ratio, torch.ones(2)
    )  # once per token, so its mean is one sum
    assert_close(new.grad, (-advantages * weight).repeat_interleave(counts))


def test_what_each_mean_is_over():
    """Completions of 1, 2 and 5 tokens, with losses per token of 3, 4 and 6; at most 10 are allowed."""
    counts, values = torch.tensor([1, 2, 5]), torch.tensor([3.0, 4.0, 6.0])
    total = {
        name: (weight(counts, 8, 3, 10) * counts * values).sum().item()
        for name, weight in AGGREGATIONS.items()
    }
    assert total["token"] == pytest.approx((3 + 2 * 4 + 5 * 6) / 8)
    assert total["sequence"] == pytest.approx((3 + 4 + 6) / 3)
    assert total["constant"] == pytest.approx((3 + 2 * 4 + 5 * 6) / (3 * 10))


@pytest.fixture(scope="module")
def models():
    return tiny_policy(seed=0), tiny_policy(seed=1)


class Alone(Ranks):
    """A rank that has nobody to talk to."""

    def sum(self, values):
        return list(values)


def slow_gradient(policy, reference, groups, advantages, config, moved: float) -> dict[str, torch.Tensor]:
    """The definition, one completion at a time; old log-probs are the policy's own, moved by `moved`."""
    loss, total = objective_of(config), 0.0
    lengths = [len(ids) for group in groups for ids in group.responses]
    for group, row in zip(groups, advantages.tolist()):
        for ids, advantage in zip(group.responses, row):
            packed = pack([(group.prompt.ids, [ids])], CPU)
            new = policy.logprobs(packed)[0]
            ref = reference.logprobs(packed)[0].detach()
            values = slow_loss(list(new.double()), list(new.detach().double() + moved), advantage, loss)
            values = [value + config.kl_coef * KLS[config.kl](n, r) for value, n, r in zip(values, new, ref)]
            weight = {"token": 1 / sum(lengths), "sequence": 1 / len(lengths) / len(ids)}
            total += sum(values) * weight.get(loss.aggregation, 1 / len(lengths) / config.max_response_tokens)
    total.backward()
    gradient = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    return gradient


CHANGES = [{"loss": name, "kl": kl} for name, kl in zip(LOSSES, ("k3", "k2", "k1", "k3", "k2", "k1"))]
CHANGES += [{"aggregation": name} for name in AGGREGATIONS] + [{"clip_eps": 0.05, "clip_eps_high": 0.5}]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(map(str, changes.values())))
@pytest.mark.parametrize("tokens", [1, 10**6])
@pytest.mark.parametrize("moved", [0.0, 0.1, -0.3])
def test_an_update_is_its_definition(models, changes, tokens, moved):
    """All groups, several updates' worth of drift, packed or one completion at a time: the same gradient."""
    config = settings_of(kl_coef=0.3, max_response_tokens=12, max_tokens_per_micro_batch=tokens, **changes)
    policy, reference = models
    groups = random_groups()
    updates = make_updates(groups, GIVEN, config, Alone(0, 1, CPU))
    store_logprobs(reference, updates, "reference_logprobs")
    store_logprobs(policy, updates, "old_logprobs")
    for micro in updates[0].micros:
        micro.old_logprobs += moved
    recorder = Recorder(policy)
    update_policy(policy, recorder, updates, config, Alone(0, 1, CPU))
    expected = slow_gradient(policy, reference, groups, GIVEN, config, moved)
    assert_same_gradients(recorder.seen[0], expected)


@pytest.mark.parametrize("schedule, warmup, rates", [
    ("constant", 0, [8.0, 8.0, 8.0, 8.0]), ("constant", 2, [4.0, 8.0, 8.0, 8.0]),
    ("linear", 0, [8.0, 6.0, 4.0, 2.0]), ("linear", 4, [2.0, 3.0, 3.0, 2.0]),
    ("cosine", 1, [8.0, 4 + 8**0.5, 4.0, 4 - 8**0.5]),
])
def test_the_learning_rate_of_four_steps(schedule, warmup, rates):
    assert list(SCHEDULES) == ["constant", "linear", "cosine"]
    seen = [learning_rate(8.0, schedule, step, warmup, (step - 1) / 4) for step in (1, 2, 3, 4)]
    assert seen == pytest.approx(rates)
    assert learning_rate(1e-6, "constant", 3, 0, 0.5) == 1e-6, "to the bit"


def test_settings_change_one_part_of_a_row():
    assert objective_of(settings_of()) == LOSSES["grpo"]
    assert objective_of(settings_of(loss="dapo")).clip_high == 0.28
    both = objective_of(settings_of(loss="dapo", clip_eps=0.1))
    assert (both.clip_low, both.clip_high) == (0.1, 0.1)
    other = objective_of(
        settings_of(loss="gspo", advantage="group_mean", aggregation="constant", clip_eps_high=0.5)
    )
    assert other == Objective("group_mean", "sequence_mean", "clipped", "constant", 3e-4, 0.5)


@pytest.mark.parametrize("key", ["loss", "advantage", "aggregation", "kl", "correction", "lr_schedule"])
def test_an_unknown_name_is_refused_with_the_known_ones(key):
    with pytest.raises(ConfigError, match=f"{key} must be one of .*, not 'grop'"):
        objective_of(settings_of(**{key: "grop"}))
