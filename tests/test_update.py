"""grpo.py: one update against its definition, groups that teach nothing, and dynamic sampling."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    ADVANTAGES,
    CPU,
    Recorder,
    assert_same_gradients,
    random_groups,
    settings_of,
    tiny_policy,
)

import grpo
from distributed.batches import Group, make_updates, sampler_difference
from grpo import store_logprobs, update_policy
from kernel.attention import use_attention, uses_shared_prefix
from kernel.decode import Prompt
from kernel.packing import pack
from losses import AGGREGATIONS, kl_k3
from reward import Reward


@pytest.fixture
def policy():
    return tiny_policy()


@pytest.fixture
def reference():
    return tiny_policy(seed=1)


def fixed(policy, reference, config, ranks, advantages=ADVANTAGES, groups=()) -> list:
    """The updates of the random groups, with the log-probs that stay fixed, as grpo_step makes them."""
    updates = make_updates(groups or random_groups(), advantages, config, ranks)
    if reference is not None:
        store_logprobs(reference, updates, "reference_logprobs")
    if len(updates) > 1:
        store_logprobs(policy, updates, "old_logprobs")
    return updates


def updated(policy, config, ranks, reference=None, change=None) -> tuple[list[dict], dict[str, float]]:
    """(gradient of each update, metrics) for the random groups."""
    updates = fixed(policy, reference, config, ranks)
    for micro in (micro for update in updates for micro in update.micros):
        if change:
            change(micro)
    recorder = Recorder(policy)
    metrics = update_policy(policy, recorder, updates, config, ranks)
    return recorder.seen, metrics


def slow_gradient(
    policy, groups: list[Group], advantages: torch.Tensor, beta: float = 0.0, reference=None
) -> dict:
    """The definition, one completion at a time, ratio 1: mean over tokens of -A grad log p + beta grad k3."""
    policy.zero_grad()
    losses = []
    for group, row in zip(groups, advantages):
        for response, advantage in zip(group.responses, row):
            packed = pack([(group.prompt.ids, [response])], CPU)
            logprobs, _ = policy.logprobs(packed)
            loss = -advantage * logprobs
            if reference is not None:
                loss = loss + beta * kl_k3(logprobs, reference.logprobs(packed)[0].detach())
            losses.append(loss)
    torch.cat(losses).mean().backward()
    gradient = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    return gradient


def test_the_first_update_is_the_policy_gradient(policy, ranks):
    """The ratio is exactly 1: nothing is clipped, and the gradient is that of -A log p, over all tokens."""
    config = settings_of(clip_eps=1e-7)
    (gradient,), metrics = updated(policy, config, ranks)
    assert_same_gradients(gradient, slow_gradient(policy, random_groups(), ADVANTAGES))
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0
    assert (metrics["updates"], metrics["updates_skipped_nonfinite"], metrics["kl"]) == (1, 0, 0)
    counts = torch.tensor([[len(r) for r in group.responses] for group in random_groups()])
    assert metrics["loss"] == pytest.approx(float(-(ADVANTAGES * counts).sum() / counts.sum()), rel=1e-5)


@pytest.mark.parametrize("update", [0, 1])
def test_stored_log_probs_are_the_policys_own_to_the_bit(policy, ranks, update):
    """With several updates per batch, the ratio of an unchanged policy is exactly 1 too."""
    config = settings_of(minibatch_prompts=2, clip_eps=1e-7)
    gradients, metrics = updated(policy, config, ranks)
    half = slice(2 * update, 2 * update + 2)
    assert_same_gradients(gradients[update], slow_gradient(policy, random_groups()[half], ADVANTAGES[half]))
    assert metrics["clip_ratio/region_mean"] == 0 and metrics["updates"] == 2


def test_the_kl_term_pulls_towards_the_reference(policy, reference, ranks):
    config = settings_of(kl_coef=0.3)
    (gradient,), metrics = updated(policy, config, ranks, reference)
    assert_same_gradients(gradient, slow_gradient(policy, random_groups(), ADVANTAGES, 0.3, reference))
    assert metrics["kl"] > 0.01
    (same,), metrics = updated(policy, config, ranks, policy)
    assert metrics["kl"] == 0, "the reference's log-probs go through the same code at the same temperature"


@pytest.mark.parametrize(("tokens", "parts"), [(10**6, 1), (70, 2), (1, 12)])
def test_micro_batches_change_no_gradient(policy, reference, ranks, tokens, parts):
    """Averaging per micro-batch would give short completions in small batches too much weight."""
    config = settings_of(kl_coef=0.3, max_tokens_per_micro_batch=tokens)
    assert len(make_updates(random_groups(), ADVANTAGES, config, ranks)[0].micros) == parts
    (gradient,), metrics = updated(policy, config, ranks, reference)
    assert_same_gradients(gradient, slow_gradient(policy, random_groups(), ADVANTAGES, 0.3, reference))
    whole = updated(policy, settings_of(kl_coef=0.3), ranks, reference)[1]
    assert metrics == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("longest, norm", [(0.0, None), (1e9, None), (1e-3, 1e-3)])
def test_the_gradient_is_clipped_unless_its_longest_norm_is_0(policy, ranks, longest, norm):
    """As with other settings, 0 is off: it once meant that nothing is learnt."""
    (gradient,), metrics = updated(policy, settings_of(max_grad_norm=longest), ranks)
    total = math.sqrt(sum(float(g.norm()) ** 2 for g in gradient.values()))
    assert total == pytest.approx(norm or metrics["grad_norm"], rel=1e-3) and metrics["grad_norm"] > 0.01


# of the four groups
FLAT = torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0], [0.5, -0.5, 0.0], [0.0, 0.0, 0.0]])


def test_skipping_flat_groups_is_training_without_them(policy, reference, ranks):
    """Neither their KL term nor their tokens count."""
    config = settings_of(kl_coef=0.3, skip_zero_variance="rest")
    updates = fixed(policy, reference, config, ranks, FLAT)
    recorder = Recorder(policy)
    update_policy(policy, recorder, updates, config, ranks)
    teaching = [random_groups()[i] for i in (0, 2)]
    assert_same_gradients(recorder.seen[0], slow_gradient(policy, teaching, FLAT[[0, 2]], 0.3, reference))
    computed = sum(micro.packed.ids.numel() for update in updates for micro in update.micros)
    assert computed == sum(group.tokens for group in teaching)


@pytest.mark.parametrize("mean_over", AGGREGATIONS)
def test_flat_groups_can_be_skipped_without_a_larger_gradient(policy, reference, ranks, mean_over):
    """The work is saved and, without a KL, the gradient stays; the log's means are over what is computed."""
    gradients, kl = {}, {}
    for skip in ("", "all", "rest"):
        config = settings_of(skip_zero_variance=skip, aggregation=mean_over)
        recorder, updates = Recorder(policy), fixed(policy, reference, config, ranks, FLAT)
        kl[skip] = update_policy(policy, recorder, updates, config, ranks)["kl"]
        (gradients[skip],) = recorder.seen
    assert_same_gradients(gradients["all"], gradients[""])
    norms = {skip: sum(float(g.norm()) ** 2 for g in seen.values()) for skip, seen in gradients.items()}
    assert norms["rest"] > 2 * norms["all"] and kl["rest"] == pytest.approx(kl["all"]) and kl["all"] > 0.01


def test_completions_that_were_cut_off_are_left_out_and_still_compared_with(policy, reference, ranks):
    """Neither loss, KL nor token count sees them; other advantages stay. Group 3 has none left."""
    config = settings_of(kl_coef=0.3, mask_truncated=True, minibatch_prompts=2)
    cut = [[True, False, False], [False] * 3, [False, True, True], [True] * 3]
    groups = [replace(group, truncated=flags) for group, flags in zip(random_groups(), cut)]
    left, rows = [], []
    for group, flags, row in zip(groups, cut, ADVANTAGES):
        ended = [k for k in range(3) if not flags[k]]
        left.append(replace(group, responses=[group.responses[k] for k in ended]))
        rows.append(row[ended])
    recorder, updates = Recorder(policy), fixed(policy, reference, config, ranks, groups=groups)
    assert update_policy(policy, recorder, updates, config, ranks)["updates"] == 2
    for k, part in enumerate((slice(0, 2), slice(2, 3))):
        assert_same_gradients(recorder.seen[k], slow_gradient(policy, left[part], rows[part], 0.3, reference))
    groups = [replace(group, truncated=[True] * 3) for group in groups]
    nothing = fixed(policy, None, config, ranks, groups=groups)
    metrics = update_policy(policy, recorder, nothing, config, ranks)
    assert metrics["updates"] == metrics["updates_skipped_nonfinite"] == 0 and len(recorder.seen) == 2


@pytest.mark.parametrize("prompts", [4, 2])
def test_how_far_sampler_and_trainer_are_apart_is_known_also_with_one_update(policy, ranks, prompts):
    updates = fixed(policy, None, settings_of(minibatch_prompts=prompts), ranks)
    micros = [micro for update in updates for micro in update.micros]
    for micro in micros:
        micro.sampler_logprobs = policy.logprobs(micro.packed)[0].detach() + 0.25
    micros[-1].sampler_logprobs[-1] -= 1.25
    update_policy(policy, Recorder(policy), updates, settings_of(minibatch_prompts=prompts), ranks)
    tokens = sum(update.total_tokens for update in updates)
    assert sampler_difference(updates, ranks) == pytest.approx({
        "sampling/sampling_logp_difference/mean": 0.25 + 0.75 / tokens,
        "sampling/sampling_logp_difference/max": 1.0,
    }, abs=1e-5)
    assert sampler_difference([], ranks) == {}


class Descent(Recorder):
    """Keeps each gradient and follows it."""

    rate = 0.1

    def step(self) -> None:
        super().step()
        with torch.no_grad():
            for p in self.policy.parameters():
                p -= self.rate * p.grad


@pytest.mark.parametrize("prompts", [4, 2])
def test_a_batch_is_gone_through_again_with_the_log_probs_of_its_sampler(policy, ranks, prompts):
    """The second pass against the definition: the ratio is over the policy before the first one."""
    config = settings_of(minibatch_prompts=prompts, num_iterations=2)
    descent, before = Descent(policy), tiny_policy()
    metrics = update_policy(policy, descent, fixed(policy, None, config, ranks), config, ranks)
    first = 4 // prompts  # update of the second pass
    assert len(descent.seen) == metrics["updates"] == 2 * first
    now, losses = tiny_policy(), []
    with torch.no_grad():
        for gradient in descent.seen[:first]:
            for name, p in now.named_parameters():
                p -= 0.1 * gradient[name]
    for group, row in zip(random_groups()[:prompts], ADVANTAGES):
        for response, advantage in zip(group.responses, row):
            packed = pack([(group.prompt.ids, [response])], CPU)
            ratio = (now.logprobs(packed)[0] - before.logprobs(packed)[0].detach()).exp()
            losses.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
    torch.cat(losses).mean().backward()
    assert_same_gradients(descent.seen[first], {name: p.grad for name, p in now.named_parameters()}, 1e-4)
    assert any(not torch.equal(descent.seen[first][name], descent.seen[0][name]) for name in descent.seen[0])
    once = updated(tiny_policy(), settings_of(minibatch_prompts=prompts), ranks)[1]
    assert metrics["entropy"] == pytest.approx(once["entropy"], rel=0.05), "a mean over both passes"


def peaked(seed: int = 0):
    """A random model that is surer of some tokens than of others."""
    policy, generator = tiny_policy(seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return policy


def slow_passes(groups: list[Group], advantages: torch.Tensor, config, reference) -> list[dict]:
    """The gradients of two passes over a batch that Descent follows: the definition, token by token. Policy,
    advantages and corrections are those of the policy that sampled.
    """
    before, now, gradients, share = peaked(), peaked(), [], uses_shared_prefix(reference)
    parts = [slice(k, k + config.minibatch_prompts) for k in range(0, 4, config.minibatch_prompts)]
    for part in 2 * parts:
        losses = []
        for group, row in zip(groups[part], advantages[part].tolist()):
            if config.skip_zero_variance and not any(row):
                continue
            for k, (ids, A) in enumerate(zip(group.responses, row)):
                if config.mask_truncated and group.truncated[k]:
                    continue
                packed, thought = pack([(group.prompt.ids, [ids])], CPU), group.thoughts[k]
                old, entropy = (one.tolist() for one in before.logprobs(packed))
                if config.advantage == "egpo" and thought:
                    A += 0.4 * max(-abs(A) / 2, min(abs(A) / 2, sum(entropy[:thought]) / thought))
                ref = reference.logprobs(pack([(group.prompt.ids, [ids])], CPU, share))[0].tolist()
                for t, new in enumerate(now.logprobs(packed)[0]):
                    ratio, mismatch = (new - old[t]).exp(), math.exp(old[t] - group.logprobs[k][t])
                    weight = {
                        "none": 1.0, "tis": min(mismatch, 2.0),
                        "icepop": mismatch if 0.5 <= mismatch <= 5 else 0.0,
                    }[config.correction]
                    surrogate = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
                    losses.append(weight * surrogate + config.kl_coef * kl_k3(new, torch.tensor(ref[t])))
        torch.stack(losses).mean().backward()
        gradients.append({name: p.grad.clone() for name, p in now.named_parameters()})
        with torch.no_grad():
            for p in now.parameters():
                p -= 1e-3 * p.grad
        now.zero_grad()
    return gradients


@pytest.mark.parametrize("rows", [
    {"advantage": "egpo"}, {"correction": "tis"}, {"advantage": "egpo", "correction": "icepop"},
], ids=lambda rows: "-".join(rows.values()))
@pytest.mark.parametrize("share_prompt, changes", [
    (True, {}), (False, {"minibatch_prompts": 2}), (True, {"max_tokens_per_micro_batch": 1}),
    (False, {"mask_truncated": True}), (True, {"skip_zero_variance": "rest", "minibatch_prompts": 2}),
])
def test_what_stays_fixed_is_of_the_policy_that_sampled(reference, ranks, rows, share_prompt, changes):
    """Entropy of the thoughts and difference to the sampler, in both passes over a batch, with one update and
    with several, and however the completions are packed.
    """
    config = settings_of(kl_coef=0.1, num_iterations=2, **rows, **changes)
    advantages = ADVANTAGES * torch.tensor([20.0, 1.0, 1.0, 5.0])[:, None]  # some above 2 H, others below
    policy, generator = peaked(), torch.Generator().manual_seed(0)
    for model in (policy, reference):
        model.capabilities = replace(model.capabilities, shared_prefix=share_prompt)
        use_attention(model, "train")
    groups = []
    for group in random_groups():
        logprobs = []
        for ids in group.responses:
            own = policy.logprobs(pack([(group.prompt.ids, [ids])], CPU, share_prompt))[0].detach()
            logprobs.append((own + torch.randn(len(ids), generator=generator)).tolist())
        groups.append(replace(group, logprobs=logprobs, truncated=[False, True, False]))
    updates = make_updates(groups, advantages, config, ranks, share_prompt)
    store_logprobs(reference, updates, "reference_logprobs")
    if len(updates) > 1:
        store_logprobs(policy, updates, "old_logprobs", entropy=config.advantage == "egpo")
    descent = Descent(policy)
    descent.rate = 1e-3
    update_policy(policy, descent, updates, config, ranks)
    expected = slow_passes(groups, advantages, config, reference)
    assert len(descent.seen) == len(expected) == 2 * len(updates)
    for found, gradient in zip(descent.seen, expected):
        assert_same_gradients(found, gradient, 1e-4)
    metrics = sampler_difference(updates, ranks, config.correction)
    name = "sampling/importance_sampling_ratio"
    if config.correction == "none":
        assert not any(key.startswith(name) for key in metrics)
        return
    ratios = torch.cat([(m.old_logprobs - m.sampler_logprobs).exp() for u in updates for m in u.micros])
    bound = ratios > 2 if config.correction == "tis" else (ratios < 0.5) | (ratios > 5)
    weights = ratios.clamp(max=2) if config.correction == "tis" else ratios * ~bound
    assert 0 < metrics[f"{name}/bounded"] < 1
    assert metrics[f"{name}/bounded"] == pytest.approx(bound.float().mean().item())
    assert metrics[f"{name}/mean"] == pytest.approx(weights.mean().item())


def test_an_update_without_any_group_left_changes_nothing(policy, ranks):
    """All ranks see the same total of 0, so all leave the update out together; it is no failure."""
    for keep, updates, mean in ((1.0, 1, "rest"), (0.0, 0, "rest"), (1.0, 1, "all"), (0.0, 0, "all")):
        config = settings_of(skip_zero_variance=mean, minibatch_prompts=2)
        advantages = FLAT * torch.tensor([0.0, 0.0, keep, 0.0])[:, None]
        recorder = Recorder(policy)
        made = fixed(policy, None, config, ranks, advantages)
        metrics = update_policy(policy, recorder, made, config, ranks)
        assert len(recorder.seen) == metrics["updates"] == updates
        assert metrics["updates_skipped_nonfinite"] == 0


ROUNDS = []  # the places of every call of the sampler


def resampled(
    monkeypatch, rounds: int, world: int, teaches, elsewhere: int = 0
) -> list[tuple[list[Group], list[Group]]]:
    """resample_flat on every rank, of 4 places; a prompt's rewards differ where `teaches(place)`. elsewhere:
    flat groups that a rank hears of besides its own.
    """
    ROUNDS.clear()

    def sample_and_score(run, step, places, others=None):
        groups = []
        ROUNDS.append(places)
        for k, place in enumerate(places):
            asked = Prompt("first" if others is None else str(others[k]), [1])
            rewards = tuple(Reward(float(i and teaches(place)), True, True, "") for i in range(2))
            groups.append(Group(asked, [], [], [], [], place, rewards=rewards))
        return groups

    monkeypatch.setattr(grpo, "sample_and_score", sample_and_score)
    ranks = SimpleNamespace(sum=lambda counts: [count + elsewhere for count in counts])
    results = []
    for rank in range(world):
        run = SimpleNamespace(config=settings_of(resample_rounds=rounds), examples=range(1000), ranks=ranks)
        first = sample_and_score(run, 5, range(rank, 4, world))
        results.append(grpo.resample_flat(run, 5, first))
    return results


def test_dynamic_sampling_replaces_flat_groups_only(monkeypatch):
    # Places 1 and 2 need two more rounds.
    ((groups, given_up),) = resampled(monkeypatch, 3, 1, lambda place: place in (0, 3) or place >= 8)
    assert [group.place for group in groups] == [0, 9, 10, 3]
    assert groups[0].prompt.id == groups[3].prompt.id == "first" and not any(group.flat for group in groups)
    assert [group.place for group in given_up] == [1, 2, 5, 6], "a third round was not needed"


def test_dynamic_sampling_ends_where_no_rank_has_a_flat_group(monkeypatch):
    """Every round gathers the whole model. A rank without a flat group still joins the others in theirs."""
    resampled(monkeypatch, 9, 1, lambda place: place != 2)
    assert ROUNDS == [range(4), [6]]
    resampled(monkeypatch, 3, 1, lambda place: True, elsewhere=1)
    assert ROUNDS == [range(4), [], [], []]


def test_dynamic_sampling_stops_after_its_rounds_and_does_not_depend_on_ranks(monkeypatch):
    ((alone, given_up),) = resampled(monkeypatch, 2, 1, lambda place: False)
    (first, _), (second, _) = resampled(monkeypatch, 2, 2, lambda place: False)
    assert [alone[0], alone[2]] == first and [alone[1], alone[3]] == second
    assert len(given_up) == 8 and len({group.prompt.id for group in alone}) == 4, "other prompts each time"
    ((unchanged, none),) = resampled(monkeypatch, 0, 1, lambda place: False)
    assert [group.prompt.id for group in unchanged] == ["first"] * 4 and none == []


def test_the_clip_ratios_count_tokens(policy, ranks):
    """Old log-probs are moved so that every ratio is e^0.5: clipped where the advantage is positive."""

    def lower(micro) -> None:
        micro.old_logprobs -= 0.5

    _, metrics = updated(policy, settings_of(minibatch_prompts=2), ranks, change=lower)
    counts = torch.tensor([[len(r) for r in group.responses] for group in random_groups()])
    assert metrics["clip_ratio/high_mean"] == pytest.approx(
        float(counts[ADVANTAGES > 0].sum() / counts.sum())
    )
    assert metrics["clip_ratio/low_mean"] == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_an_update_with_a_bad_gradient_is_skipped_and_counted(policy, ranks, poison):
    """One NaN would go into every weight and both Adam moments, and the run would be lost."""
    weights = [p.detach().clone() for p in policy.parameters()]
    config = settings_of(minibatch_prompts=2)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)
    updates = fixed(policy, None, config, ranks)
    updates[0].micros[0].advantages[0] = poison
    metrics = update_policy(policy, optimizer, updates, config, ranks)
    assert (metrics["updates"], metrics["updates_skipped_nonfinite"]) == (1, 1)
    assert all(torch.equal(p, w) for p, w in zip(policy.parameters(), weights))
    assert all(p.grad is None for p in policy.parameters()), "nothing of it is left for the next update"
    assert all(torch.isfinite(x).all() for s in optimizer.state.values() for x in s.values())
    assert math.isfinite(metrics["grad_norm"])
