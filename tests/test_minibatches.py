"""minibatches.py: every rank works out the same plan, and what the ranks compute adds up to what one alone
would.

Ranks are played one after the other in this process: none of this needs to talk, but for `gather_groups`.
"""

import itertools
import random

import pytest
import torch

from config import Config
from corpus.tiny_model import build_tiny_model, build_tiny_tokenizer
from distributed.batches import (
    Group,
    Minibatch,
    gather_groups,
    make_minibatches,
    own_places,
    share_out,
    shuffled,
)
from distributed.ranks import Ranks
from grpo import fixed_logprobs, update_policy
from kernel.decode import Prompt

torch.set_num_threads(1)

CPU = torch.device("cpu")
ADVANTAGES = torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.2, -0.6, -0.6], [0.5, 0.6, -1.1]])


def settings_of(**changes) -> Config:
    base = dict(
        prompts_per_step=4, minibatch_prompts=4, group_size=3, temperature=0.8, max_grad_norm=1e9, kl_coef=0.0
    )
    return Config(**(base | changes))


def random_groups(seed: int = 0) -> list[Group]:
    """4 prompts with 3 completions each, all of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda size: torch.randint(250, (size,), generator=generator).tolist()  # noqa: E731
    groups = []
    for i in range(4):
        responses = [draw(2 + (5 * i + 3 * k) % 7) for k in range(3)]
        logprobs = [[0.0] * len(response) for response in responses]
        groups.append(Group(Prompt(f"p{i}", draw(3 + 2 * i)), responses, logprobs, ["", "", ""], [False] * 3))
    return groups


def plans(
    world: int, config: Config, advantages: torch.Tensor = ADVANTAGES, **others
) -> list[list[Minibatch]]:
    """The minibatches of every rank."""
    return [
        make_minibatches(random_groups(), advantages, config, Ranks(rank, world, CPU), **others)
        for rank in range(world)
    ]


def targets(minibatch: Minibatch) -> list[int]:
    """The response tokens that count."""
    return [token for micro in minibatch.micros if not micro.idle for token in micro.packed.target.tolist()]


# --------------------------------------------------------------------------------------------- who takes what


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_busiest_rank_has_at_most_4_3_of_the_best_possible(ranks):
    rng = random.Random(ranks)
    for _ in range(30):
        tokens = [rng.choice([rng.randint(1, 20), rng.randint(1, 200)]) for _ in range(rng.randint(ranks, 7))]
        shares = share_out(tokens, ranks)
        assert sorted(i for share in shares for i in share) == list(range(len(tokens))), "each once"
        busiest = max(sum(tokens[i] for i in share) for share in shares)
        ways = itertools.product(range(ranks), repeat=len(tokens))
        best = min(
            max(sum(t for t, r in zip(tokens, way) if r == rank) for rank in range(ranks)) for way in ways
        )
        assert busiest <= 4 / 3 * best


def test_equal_lengths_are_shared_out_the_same_way_everywhere():
    """Every rank works this out alone: where lengths are equal, the place in the batch decides."""
    assert share_out([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]
    assert share_out([1, 9, 1, 1], 2) == [[1], [0, 2, 3]], "the longest first, and indices ascend"
    assert share_out([7], 3) == [[0], [], []] and share_out([], 2) == [[], []]


# ----------------------------------------------------------------------------------------- what each computes


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("tokens", [1, 40, 10**6])
def test_the_ranks_share_the_batch_in_equally_many_micro_batches(world, tokens):
    """Sharded weights are gathered by all ranks together: one with fewer micro-batches would leave the others
    hanging.
    """
    everything = sorted(
        token for group in random_groups() for response in group.responses for token in response
    )
    (alone,) = plans(1, settings_of(max_tokens_per_micro_batch=tokens))[0]
    ranks = [minibatch for (minibatch,) in plans(world, settings_of(max_tokens_per_micro_batch=tokens))]
    assert len({len(minibatch.micros) for minibatch in ranks}) == 1 and ranks[0].micros
    assert (
        sorted(token for minibatch in ranks for token in targets(minibatch))
        == sorted(targets(alone))
        == everything
    )
    assert {minibatch.tokens for minibatch in [*ranks, alone]} == {len(everything)}, (
        "the mean is over all ranks' tokens"
    )
    idle = [all(micro.idle for micro in minibatch.micros) for minibatch in ranks]
    assert sum(idle) == max(0, world - len(random_groups())), "there is work for as many ranks as groups"


def test_each_token_of_a_completion_has_its_advantage():
    groups = random_groups()
    responses = [response for group in groups for response in group.responses]
    values = [a for row in ADVANTAGES.tolist() for a in row]
    for budget in (1, 10**6):  # a response alone, and all of them in one row
        ((minibatch,),) = plans(1, settings_of(max_tokens_per_micro_batch=budget))
        assert len(minibatch.micros) == (12 if budget == 1 else 1)
        advantages = [a for micro in minibatch.micros for a in micro.advantages.tolist()]
        assert advantages == pytest.approx([a for response, a in zip(responses, values) for _ in response])
        assert targets(minibatch) == [token for response in responses for token in response]


def test_groups_that_teach_nothing_are_no_ones_work():
    """They are left out before the groups are shared out, or a rank could get nothing but them."""
    one, other = (minibatch for (minibatch,) in plans(2, settings_of(skip_zero_variance=True)))
    kept = [group for i, group in enumerate(random_groups()) if i != 1]  # its advantages are 0
    assert one.tokens == other.tokens == sum(len(response) for group in kept for response in group.responses)
    assert len(targets(one)) + len(targets(other)) == one.tokens
    nothing = plans(2, settings_of(skip_zero_variance=True), advantages=0 * ADVANTAGES)
    assert all(minibatch.tokens == 0 and not minibatch.micros for (minibatch,) in nothing)


def test_rows_are_for_models_that_take_no_packed_groups_and_the_budget_can_be_another():
    (minibatch,) = plans(2, settings_of(), share_prompt=False)[1]
    assert all(micro.packed.layout is None for micro in minibatch.micros)
    assert len(plans(1, settings_of(max_tokens_per_micro_batch=1))[0][0].micros) == 12


# ----------------------------------------------------------------------------------------- what it adds up to


class Alone(Ranks):
    """A rank that hears of no other."""

    def sum(self, values):
        return list(values)


class Gradients:
    """Stands in for the optimizer: keeps each update's gradient."""

    def __init__(self, policy) -> None:
        self.policy, self.seen = policy, []

    def step(self) -> None:
        self.seen.append([p.grad.clone() for p in self.policy.parameters()])

    def zero_grad(self, set_to_none: bool) -> None:
        self.policy.zero_grad(set_to_none)


@pytest.fixture(scope="module")
def models():
    return [
        build_tiny_model(build_tiny_tokenizer([], 300), hidden=16, layers=1, seed=seed).train()
        for seed in (0, 1)
    ]


def computed(
    models, minibatches: list[Minibatch], config: Config
) -> tuple[list[list[torch.Tensor]], dict[str, float]]:
    """The gradients of every update, and the metrics, of one rank."""
    policy, reference = models
    fixed_logprobs(policy, reference, minibatches, config)
    recorder = Gradients(policy)
    metrics = update_policy(policy, recorder, minibatches, config, Alone(0, 1, CPU))
    return recorder.seen, metrics


SUMS = (
    "loss",
    "kl",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
)  # each rank's part over all ranks' tokens


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("tokens", [1, 10**6])
def test_the_gradients_of_all_ranks_add_up_to_that_of_one(models, world, tokens):
    """Two updates of two prompts each; 7 ranks have 2 prompts to share, so most only keep in step. A mean
    over each rank's own tokens, or over ranks, would be another gradient.
    """
    config = settings_of(kl_coef=0.3, minibatch_prompts=2, max_tokens_per_micro_batch=tokens)
    whole = settings_of(kl_coef=0.3, minibatch_prompts=2)
    (expected, log), parts = computed(models, *plans(1, whole), whole), plans(world, config)
    ranks = [computed(models, minibatches, config) for minibatches in parts]
    for update in range(2):
        for k, gradient in enumerate(expected[update]):
            total = sum(gradients[update][k] for gradients, _ in ranks)
            assert (total - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9
    for key in SUMS:
        assert sum(metrics[key] for _, metrics in ranks) == pytest.approx(log[key], rel=1e-5, abs=1e-7), key


def test_idle_micro_batches_change_neither_gradient_nor_metrics(models):
    config = settings_of(kl_coef=0.3)
    (minibatches,) = plans(1, config)
    (idle,) = plans(7, config)[6]
    assert [micro.idle for micro in idle.micros] == [True], "the seventh rank has nothing to do"
    (expected,), log = computed(models, minibatches, config)
    minibatches[0].micros += 3 * idle.micros
    (gradients,), again = computed(models, minibatches, config)
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected)) and again == log


# -------------------------------------------------------------------------------------------- the whole batch


class Told(Ranks):
    """A rank that is told what the others have."""

    def gather(self, item):
        return self.watchdog


def gathered(places: int, world: int) -> tuple[list[Group], torch.Tensor]:
    """gather_groups of `places` groups, sampled by `world` ranks."""
    rows = []
    for rank in range(world):
        own = own_places(places, Ranks(rank, world, CPU))
        groups = [Group(Prompt(str(place), [place]), [[1]], [[0.0]], [], [False]) for place in own]
        rows.append(
            (groups, torch.tensor([[place, -place] for place in own], dtype=torch.float32).view(-1, 2))
        )
    last = rows[-1]
    return gather_groups(*last, Told(world - 1, world, CPU, rows))


@pytest.mark.parametrize("places, world", [(6, 1), (6, 2), (7, 3), (1, 2), (2, 5)])
def test_the_batch_comes_together_in_its_order(places, world):
    """Also where ranks have different numbers of groups, or none: the order decides minibatches and
    shuffling.
    """
    groups, rewards = gathered(places, world)
    assert [group.prompt.ids for group in groups] == [[place] for place in range(places)]
    assert rewards.tolist() == [[place, -place] for place in range(places)]


def test_texts_stay_at_home():
    """They are most of what would be sent, and nothing of the update needs them."""
    group = random_groups()[0]
    rows = [([group], torch.zeros(1, 3))]

    class Recording(Ranks):
        def gather(self, item):
            assert all(not one.texts for one in item[0])
            return [item]

    ((sent,), _) = gather_groups(*rows[0], Recording(0, 1, CPU))
    assert sent.responses == group.responses and group.texts == ["", "", ""]


def test_shuffled_rewards_are_a_permutation_that_no_number_of_ranks_changes():
    rewards = gathered(6, 1)[1]
    mixed = shuffled(rewards, seed=3, step=5)
    assert (
        sorted(mixed.flatten().tolist()) == sorted(rewards.flatten().tolist())
        and mixed.shape == rewards.shape
    )
    assert any(abs(a) != abs(b) for a, b in mixed.tolist()), "not groups are permuted, but all completions"
    assert all(torch.equal(shuffled(gathered(6, world)[1], 3, 5), mixed) for world in (2, 3, 5))
    others = [shuffled(rewards, 3, 6), shuffled(rewards, 4, 5)]
    assert all(not torch.equal(mixed, other) for other in others), "another step, another seed"
