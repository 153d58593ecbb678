"""distributed/batches.py: every rank works out the same plan, and what the ranks compute adds up to what one
alone would.

Ranks are played one after the other in this process: none of this needs to talk, but for `gather_groups`.
"""

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import ADVANTAGES, CPU, Recorder, random_groups, settings_of, tiny_policy

from config import Config
from distributed.batches import (
    Group,
    Update,
    batch_for_step,
    gather_groups,
    make_updates,
    own_places,
    prompt_seed,
    reward_table,
    share_out,
    shuffled,
)
from distributed.ranks import Ranks
from grpo import store_logprobs, update_policy
from kernel.decode import Prompt
from reward import Reward


def plans(
    world: int, config: Config, advantages: torch.Tensor = ADVANTAGES, **others
) -> list[list[Update]]:
    """The updates of every rank."""
    return [
        make_updates(random_groups(), advantages, config, Ranks(rank, world, CPU), **others)
        for rank in range(world)
    ]


def targets(update: Update) -> list[int]:
    """The response tokens that count."""
    return [token for micro in update.micros if not micro.idle for token in micro.packed.target.tolist()]


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


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("tokens", [1, 40, 10**6])
def test_the_ranks_share_the_batch_in_equally_many_micro_batches(world, tokens):
    """All ranks gather sharded weights together: one with fewer micro-batches leaves the others hanging."""
    everything = sorted(
        token for group in random_groups() for response in group.responses for token in response
    )
    (alone,) = plans(1, settings_of(max_tokens_per_micro_batch=tokens))[0]
    ranks = [update for (update,) in plans(world, settings_of(max_tokens_per_micro_batch=tokens))]
    assert len({len(update.micros) for update in ranks}) == 1 and ranks[0].micros
    assert (
        sorted(token for update in ranks for token in targets(update))
        == sorted(targets(alone))
        == everything
    )
    assert {update.total_tokens for update in [*ranks, alone]} == {len(everything)}, (
        "the mean is over all ranks' tokens"
    )
    idle = [all(micro.idle for micro in update.micros) for update in ranks]
    assert sum(idle) == max(0, world - len(random_groups())), "there is work for as many ranks as groups"


def test_each_token_of_a_completion_has_its_advantage():
    groups = random_groups()
    responses = [response for group in groups for response in group.responses]
    values = [a for row in ADVANTAGES.tolist() for a in row]
    for budget in (1, 10**6):  # a response alone, and all of them in one row
        ((update,),) = plans(1, settings_of(max_tokens_per_micro_batch=budget))
        assert len(update.micros) == (12 if budget == 1 else 1)
        advantages = [a for micro in update.micros for a in micro.advantages.tolist()]
        assert advantages == pytest.approx([a for response, a in zip(responses, values) for _ in response])
        assert targets(update) == [token for response in responses for token in response]


def test_groups_that_teach_nothing_are_no_ones_work():
    """They are left out before the groups are shared out, or a rank could get nothing but them."""
    one, other = (update for (update,) in plans(2, settings_of(skip_zero_variance="rest")))
    kept = [group for i, group in enumerate(random_groups()) if i != 1]  # its advantages are 0
    tokens = sum(len(response) for group in kept for response in group.responses)
    assert one.total_tokens == other.total_tokens == tokens
    assert len(targets(one)) + len(targets(other)) == one.total_tokens
    nothing = plans(2, settings_of(skip_zero_variance="rest"), advantages=0 * ADVANTAGES)
    assert all(update.total_tokens == 0 and not update.micros for (update,) in nothing)


def test_what_was_cut_off_is_no_ones_work():
    """A group without any other completion, too: it would stand before the ranks as a prompt alone."""
    config, groups = settings_of(mask_truncated=True), random_groups()
    groups[0] = replace(groups[0], truncated=[False, True, False])
    groups[2] = replace(groups[2], truncated=[True] * 3)
    ended = [ids for group in groups for ids, cut in zip(group.responses, group.truncated) if not cut]
    for world in (1, 2, 5):
        ranks = [Ranks(rank, world, CPU) for rank in range(world)]
        updates = [make_updates(groups, ADVANTAGES, config, one)[0] for one in ranks]
        assert sorted(sum(map(targets, updates), [])) == sorted(sum(ended, []))
        assert {(one.total_tokens, one.total_completions) for one in updates} == {(len(sum(ended, [])), 8)}
        assert len({len(one.micros) for one in updates}) == 1


class Alone(Ranks):
    """A rank that hears of no other."""

    def sum(self, values):
        return list(values)


@pytest.fixture(scope="module")
def models():
    return tiny_policy(seed=0), tiny_policy(seed=1)


def computed(models, updates: list[Update], config: Config) -> tuple[list[dict], dict[str, float]]:
    """The gradients of every update, and the metrics, of one rank."""
    policy, reference = models
    store_logprobs(reference, updates, "reference_logprobs")
    if len(updates) > 1:
        store_logprobs(policy, updates, "old_logprobs", entropy=config.advantage == "egpo")
    recorder = Recorder(policy)
    metrics = update_policy(policy, recorder, updates, config, Alone(0, 1, CPU))
    return recorder.seen, metrics


# each rank's part over all ranks' tokens
SUMS = ("loss", "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean")


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("tokens", [1, 10**6])
@pytest.mark.parametrize("rows", [{}, {"advantage": "egpo", "correction": "tis"}])
def test_the_gradients_of_all_ranks_add_up_to_that_of_one(models, world, tokens, rows):
    """Two updates of two prompts each; 7 ranks have 2 prompts to share, so most only keep in step. A mean
    over each rank's own tokens, or over ranks, would be another gradient.
    """
    config = settings_of(kl_coef=0.3, minibatch_prompts=2, max_tokens_per_micro_batch=tokens, **rows)
    whole = settings_of(kl_coef=0.3, minibatch_prompts=2, **rows)
    (expected, log), parts = computed(models, *plans(1, whole), whole), plans(world, config)
    ranks = [computed(models, updates, config) for updates in parts]
    for update in range(2):
        for name, gradient in expected[update].items():
            total = sum(gradients[update][name] for gradients, _ in ranks)
            assert (total - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9
    for key in SUMS:
        assert sum(metrics[key] for _, metrics in ranks) == pytest.approx(log[key], rel=1e-5, abs=1e-7), key


def test_idle_micro_batches_change_neither_gradient_nor_metrics(models):
    config = settings_of(kl_coef=0.3)
    (updates,) = plans(1, config)
    (idle,) = plans(7, config)[6]
    assert [micro.idle for micro in idle.micros] == [True], "the seventh rank has nothing to do"
    (expected,), log = computed(models, updates, config)
    updates[0].micros += 3 * idle.micros
    (gradients,), again = computed(models, updates, config)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected) and again == log


class Told(Ranks):
    """A rank that is told what the others have."""

    def gather(self, item):
        return self.watchdog


def scored(place: int, batch: int = 0) -> Group:
    """A group of two completions with rewards place and -place."""
    rewards = (Reward(place, True, True, ""), Reward(-place, True, True, ""))
    prompt = Prompt(str(place), [place])
    return Group(prompt, [[1]], [[0.0]], ["text"], [False], place + batch, rewards=rewards)


def gathered(places: int, world: int) -> list[Group]:
    """gather_groups of `places` groups, sampled by `world` ranks; every third place was resampled."""
    rows = []
    for rank in range(world):
        own = own_places(places, Ranks(rank, world, CPU))
        rows.append([scored(place, places if place % 3 == 2 else 0) for place in own])
    return gather_groups(rows[-1], places, Told(world - 1, world, CPU, rows))


@pytest.mark.parametrize("places, world", [(6, 1), (6, 2), (7, 3), (1, 2), (2, 5)])
def test_the_batch_comes_together_in_its_order(places, world):
    """Also where ranks have different numbers of groups, or none: the order decides updates and shuffling."""
    groups = gathered(places, world)
    assert [group.prompt.ids for group in groups] == [[place] for place in range(places)]
    assert reward_table(groups).tolist() == [[place, -place] for place in range(places)]


def test_texts_stay_at_home():
    """They are most of what would be sent, and nothing of the update needs them."""

    class Recording(Ranks):
        def gather(self, item):
            assert all(not group.texts and group.example is None for group in item)
            return [item]

    group = random_groups()[0]
    (sent,) = gather_groups([group], 4, Recording(0, 1, CPU))
    assert sent.responses == group.responses and group.texts == ["", "", ""]


def test_shuffled_rewards_are_a_permutation_that_no_number_of_ranks_changes():
    rewards = reward_table(gathered(6, 1))
    mixed = shuffled(rewards, seed=3, step=5)
    assert (
        sorted(mixed.flatten().tolist()) == sorted(rewards.flatten().tolist())
        and mixed.shape == rewards.shape
    )
    assert any(abs(a) != abs(b) for a, b in mixed.tolist()), "not groups are permuted, but all completions"
    assert all(torch.equal(shuffled(reward_table(gathered(6, world)), 3, 5), mixed) for world in (2, 3, 5))
    others = [shuffled(rewards, 3, 6), shuffled(rewards, 4, 5)]
    assert all(not torch.equal(mixed, other) for other in others), "another step, another seed"


def test_prompt_seeds_never_change():
    """Golden values: a run is repeatable years later only if these stay."""
    golden = {
        (0, 0, 0): 2558736989570252433,
        (0, 1, 0): 1482366174331975417,
        (1, 0, 0): 3569668903477806787,
        (0, 0, 1): 4764156602392020899,
        (7, 80, 1023): 56531638041132248,
        (0, 3, -1): 3489783273225737375,
    }
    assert {key: prompt_seed(*key) for key in golden} == golden


def slow_batches(count: int, size: int, seed: int, steps: int) -> list[list[int]]:
    """All batches from the start: the passes one after the other, cut into pieces."""
    line = []
    while len(line) < steps * size:
        line += [batch_for_step(count, place, 1, seed)[0] for place in range(len(line), len(line) + count)]
    return [line[i * size : (i + 1) * size] for i in range(steps)]


@pytest.mark.parametrize(("count", "size"), [(10, 4), (10, 10), (3, 8), (1, 3), (7, 1)])
def test_every_example_comes_once_per_pass(count, size):
    batches = [batch_for_step(count, step, size, 0) for step in range(count)]  # `size` whole passes
    assert batches == slow_batches(count, size, 0, count)
    line = [index for batch in batches for index in batch]
    for start in range(0, len(line), count):
        assert sorted(line[start : start + count]) == list(range(count))


def test_the_order_depends_on_seed_and_pass_alone():
    """Resume computes the order of step 5 without the steps before it."""
    torch.manual_seed(0)
    one = batch_for_step(100, 5, 16, seed=1)
    torch.manual_seed(1)
    assert batch_for_step(100, 5, 16, seed=1) == one
    assert batch_for_step(100, 5, 16, seed=2) != one
    passes = [tuple(batch_for_step(16, step, 16, seed=1)) for step in range(20)]
    assert len(set(passes)) == 20, "a fresh shuffle per pass"
    firsts = Counter(batch_for_step(4, step, 4, seed=0)[0] for step in range(400))
    assert all(60 < firsts[index] < 140 for index in range(4)), "no example is always first"
