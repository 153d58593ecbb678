"""grpo.py: one update against its definition, and whole runs as a user starts them:
on two processes, interrupted and resumed, and with bad input."""

import json
import math
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    ADVANTAGES,
    CPU,
    ENVIRONMENT,
    ROOT,
    Recorder,
    as_arguments,
    assert_same_gradients,
    one_rank,
    random_groups,
    run_here,
    settings_of,
    tiny_policy,
    warmed_up_task,
    weights,
    write_task,
)
from safetensors.torch import load_file
from torch.testing import assert_close

import grpo
from config import UserError
from corpus.sources import read_jsonl
from distributed.batches import Group, make_updates
from grpo import store_logprobs, update_policy
from kernel.decode import Prompt
from kernel.packing import pack
from losses import kl_k3
from reward import Reward

torch.set_num_threads(1)

# ------------------------------------------------------------------------------------------------- one update


@pytest.fixture
def ranks():
    with one_rank() as ranks:
        yield ranks


@pytest.fixture
def policy():
    return tiny_policy()


@pytest.fixture
def reference():
    return tiny_policy(seed=1)


def fixed(policy, reference, config, ranks, advantages=ADVANTAGES) -> list:
    """The updates of the random groups, with the log-probs that stay fixed, as grpo_step makes them."""
    updates = make_updates(random_groups(), advantages, config, ranks)
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
    """The definition, one completion at a time: -mean over all tokens of A * grad log p - beta * grad k3,
    ratio 1.
    """
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
    """The ratio is exactly 1: nothing is clipped, and the gradient is that of -A log p, averaged over all
    tokens.
    """
    config = settings_of(clip_eps=1e-7)
    (gradient,), metrics = updated(policy, config, ranks)
    assert_same_gradients(gradient, slow_gradient(policy, random_groups(), ADVANTAGES))
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0
    assert (metrics["updates"], metrics["updates_skipped_nonfinite"], metrics["kl"]) == (1, 0, 0)
    counts = torch.tensor([[len(r) for r in group.responses] for group in random_groups()])
    assert metrics["loss"] == pytest.approx(float(-(ADVANTAGES * counts).sum() / counts.sum()), rel=1e-5)


@pytest.mark.parametrize("update", [0, 1])
def test_stored_log_probs_are_the_policys_own_to_the_bit(policy, ranks, update):
    """With several updates per batch the ratio of an unchanged policy is exactly 1 too, even with next to no
    clip range.
    """
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
    """Gradient accumulation that averages per micro-batch gives short completions in small batches too much
    weight.
    """
    config = settings_of(kl_coef=0.3, max_tokens_per_micro_batch=tokens)
    assert len(make_updates(random_groups(), ADVANTAGES, config, ranks)[0].micros) == parts
    (gradient,), metrics = updated(policy, config, ranks, reference)
    assert_same_gradients(gradient, slow_gradient(policy, random_groups(), ADVANTAGES, 0.3, reference))
    whole = updated(policy, settings_of(kl_coef=0.3), ranks, reference)[1]
    assert metrics == pytest.approx(whole, rel=1e-4)


# ---------------------------------------------------------------------------------- groups that teach nothing

# of the four groups
FLAT = torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0], [0.5, -0.5, 0.0], [0.0, 0.0, 0.0]])


def test_skipping_flat_groups_is_training_without_them(policy, reference, ranks):
    """Neither their KL term nor their tokens count; without the KL, only the denominator tells the
    difference.
    """
    config = settings_of(kl_coef=0.3, skip_zero_variance=True)
    updates = fixed(policy, reference, config, ranks, FLAT)
    recorder = Recorder(policy)
    update_policy(policy, recorder, updates, config, ranks)
    teaching = [random_groups()[i] for i in (0, 2)]
    assert_same_gradients(recorder.seen[0], slow_gradient(policy, teaching, FLAT[[0, 2]], 0.3, reference))
    computed = sum(micro.packed.ids.numel() for update in updates for micro in update.micros)
    assert computed == sum(group.tokens for group in teaching)


def test_an_update_without_any_group_left_changes_nothing(policy, ranks):
    """All ranks see the same total of 0, so all leave the update out together; it is no failure."""
    config = settings_of(skip_zero_variance=True, minibatch_prompts=2)
    for keep, updates in ((1.0, 1), (0.0, 0)):
        advantages = FLAT * torch.tensor([0.0, 0.0, keep, 0.0])[:, None]
        recorder = Recorder(policy)
        made = fixed(policy, None, config, ranks, advantages)
        metrics = update_policy(policy, recorder, made, config, ranks)
        assert len(recorder.seen) == metrics["updates"] == updates
        assert metrics["updates_skipped_nonfinite"] == 0


def resampled(monkeypatch, rounds: int, world: int, teaches) -> list[tuple[list[Group], list[Group]]]:
    """resample_flat on every rank of `world`, of 4 places; a prompt's rewards differ where
    `teaches(place)`.
    """

    def sample_and_score(run, step, places, others=None):
        groups = []
        for k, place in enumerate(places):
            asked = Prompt("first" if others is None else str(others[k]), [1])
            rewards = tuple(Reward(float(i and teaches(place)), True, True, "") for i in range(2))
            groups.append(Group(asked, [], [], [], [], place, rewards=rewards))
        return groups

    monkeypatch.setattr(grpo, "sample_and_score", sample_and_score)
    results = []
    for rank in range(world):
        run = SimpleNamespace(config=settings_of(resample_rounds=rounds), examples=range(1000))
        first = sample_and_score(run, 5, range(rank, 4, world))
        results.append(grpo.resample_flat(run, 5, first))
    return results


def test_dynamic_sampling_replaces_flat_groups_only(monkeypatch):
    # Places 1 and 2 need two more rounds.
    ((groups, given_up),) = resampled(monkeypatch, 3, 1, lambda place: place in (0, 3) or place >= 8)
    assert [group.place for group in groups] == [0, 9, 10, 3]
    assert groups[0].prompt.id == groups[3].prompt.id == "first" and not any(group.flat for group in groups)
    assert [group.place for group in given_up] == [1, 2, 5, 6], "a third round was not needed"


def test_dynamic_sampling_stops_after_its_rounds_and_does_not_depend_on_ranks(monkeypatch):
    ((alone, given_up),) = resampled(monkeypatch, 2, 1, lambda place: False)
    (first, _), (second, _) = resampled(monkeypatch, 2, 2, lambda place: False)
    assert [alone[0], alone[2]] == first and [alone[1], alone[3]] == second
    assert len(given_up) == 8 and len({group.prompt.id for group in alone}) == 4, "other prompts each time"
    ((unchanged, none),) = resampled(monkeypatch, 0, 1, lambda place: False)
    assert [group.prompt.id for group in unchanged] == ["first"] * 4 and none == []


def test_the_clip_ratios_count_tokens(policy, ranks):
    """Old log-probs are moved so that every ratio is e^0.5: clipped where the advantage is positive, and only
    there.
    """

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


# -------------------------------------------------------------------------- whole runs, as a user starts them

SINGLE = [sys.executable, "grpo.py"]
DOUBLE = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "grpo.py"]


def start(command: list[str], settings: dict) -> subprocess.CompletedProcess:
    """Runs the script in its own process, or two."""
    return subprocess.run(
        command + as_arguments(settings), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
        timeout=180,
    )


def train_here(settings: dict) -> Path:
    """The same in this process, which saves the seconds that the imports take. Returns run_dir."""
    return run_here(grpo.main, settings)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, object]:
    """A short run of the task of test_end_to_end.py, from a model whose samples are right now and then."""
    task = warmed_up_task(tmp_path_factory.mktemp("task"))
    return task | dict(steps=4, prompts_per_step=4, minibatch_prompts=2, group_size=4, lr=2e-4, kl_coef=0.1)


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory) -> Path:
    """4 steps of 2 updates each, on one process, without a break."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    done = start(SINGLE, settings | {"run_dir": run_dir})
    assert done.returncode == 0, done.stderr
    log = read_jsonl(run_dir / "log.jsonl")
    # Otherwise the tests below would compare two runs in which nothing happens.
    assert sum(row["frac_reward_zero_std"] < 1 for row in log[1:]) >= 3
    assert all(row["updates"] == 2 for row in log[1:]) and log[-1]["kl"] > 0
    return run_dir


def samples_by_step(run_dir: Path) -> dict[int, list[tuple]]:
    steps: dict[int, list[tuple]] = {}
    for row in read_jsonl(run_dir / "samples.jsonl"):
        steps.setdefault(row["step"], []).append((row["prompt_id"], row["completion"], row["reward"]))
    return {step: sorted(rows) for step, rows in steps.items()}


@pytest.mark.parametrize("prompts", [4, 3])
def test_two_processes_do_what_one_does(settings, straight, tmp_path, prompts):
    """The same samples, and the same weights but for the order of float additions. Three prompts do not
    divide by two, and are one update; 1 prompt, and other ways of sharding: tests/test_sharding.py.

    A key bias adds nearly the same to all scores of a query, so its gradient is almost rounding alone, and
    Adam makes full steps of it: only there may more than 1e-6 differ.
    """
    one, two = straight, tmp_path / "two"
    if prompts == 3:
        settings = settings | {"prompts_per_step": 3, "minibatch_prompts": 3}
        one = train_here(settings | {"run_dir": tmp_path / "one"})
    done = start(DOUBLE, settings | {"run_dir": two})
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    assert samples_by_step(two) == samples_by_step(one)
    assert {step: len(rows) for step, rows in samples_by_step(two).items()} == {
        step: 4 * prompts for step in (1, 2, 3, 4)
    }
    first, second = weights(one), weights(two)
    begin = load_file(settings["model"] / "model.safetensors")
    for name in first:
        assert_close(second[name], first[name], atol=1e-4 if name.endswith("k_proj.bias") else 1e-6, rtol=0)
    assert max((first[name] - begin[name]).abs().max() for name in first) > 3e-4, (
        "there was something to compare"
    )
    for row, other in zip(read_jsonl(one / "log.jsonl"), read_jsonl(two / "log.jsonl"), strict=True):
        same = {
            key
            for key in row
            if not key.startswith(("time/", "memory/")) and not key.endswith(("seconds", "per_s"))
        }
        assert {k: other[k] for k in same} == pytest.approx({k: row[k] for k in same}, rel=1e-3, abs=1e-5)


def test_a_run_that_skips_and_resamples_says_so_in_its_log(settings, tmp_path):
    run_dir = train_here(
        settings | {"skip_zero_variance": "true", "resample_rounds": 1, "run_dir": tmp_path / "run"}
    )
    log = read_jsonl(run_dir / "log.jsonl")[1:]
    assert all(0 <= row["update/skipped_token_ratio"] < 1 for row in log)
    assert all(row["rollout/resampled_ratio"] == row["frac_reward_zero_std"] for row in log), (
        "each flat group, once"
    )
    assert 0 < sum(row["rollout/resampled_ratio"] for row in log) < 4
    assert all(row["rollout/tokens_per_s"] > 0 and row["memory/peak_gib"] > 0.1 for row in log)


def test_a_resumed_run_is_the_straight_run_to_the_bit(settings, straight, tmp_path):
    """Weights alone would not do: Adam's moments, the data order, the samples' seeds and the reference count
    too.
    """
    run_dir = tmp_path / "run"
    train_here(settings | {"run_dir": run_dir, "steps": 2, "save_every": 2})
    # As if it had been killed in step 3, after its log line and before its checkpoint:
    with (run_dir / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "reward": 77}\n')
    train_here(settings | {"run_dir": run_dir, "steps": 4, "resume": "true"})
    resumed, whole = weights(run_dir), weights(straight)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    log = read_jsonl(run_dir / "log.jsonl")
    assert [row["step"] for row in log] == [0, 1, 2, 3, 4]
    assert log[3]["reward"] == read_jsonl(straight / "log.jsonl")[3]["reward"] != 77
    assert samples_by_step(run_dir) == samples_by_step(straight)
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 4
    seconds, flops = ([row[key] for row in log[1:]] for key in ("seconds", "flops"))
    assert seconds == sorted(seconds) and flops == sorted(flops), "the first part of the run counts"


def test_a_resumed_run_uses_the_learning_rate_that_it_logs(settings, tmp_path):
    """The optimizer's saved state carries the old rate: --lr was logged, and silently not used."""
    run_dir = tmp_path / "run"
    before = weights(train_here(settings | {"run_dir": run_dir, "steps": 1}))
    train_here(settings | {"run_dir": run_dir, "steps": 2, "resume": "true", "lr": 0})
    assert read_jsonl(run_dir / "log.jsonl")[-1]["learning_rate"] == 0
    assert all(torch.equal(weight, before[name]) for name, weight in weights(run_dir).items())


def test_ctrl_c_saves_and_says_how_to_go_on(settings, tmp_path):
    run_dir = tmp_path / "run"
    long = settings | {"run_dir": run_dir, "steps": 2000}
    process = subprocess.Popen(
        SINGLE + as_arguments(long), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while (
            process.poll() is None
            and time.monotonic() < deadline
            and len(read_jsonl(run_dir / "log.jsonl")) < 3
        ):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in stderr
    assert "--resume true" in stderr and str(run_dir) in stderr
    last = read_jsonl(run_dir / "log.jsonl")[-1]["step"]
    assert last >= 2 and (run_dir / f"step_{last}" / "manifest.json").exists()
    assert not (run_dir / "model").exists()
    train_here({"config": run_dir / "config.yaml", "resume": "true", "steps": last + 1, "run_dir": run_dir})
    assert [row["step"] for row in read_jsonl(run_dir / "log.jsonl")] == list(range(last + 2))
    assert (run_dir / "model").exists()


@pytest.mark.parametrize("old", ["--plan", "--doctor", "--export"])
def test_old_commands_name_the_new_ones(old):
    with pytest.raises(UserError, match=f"python -m ops.{old[2:]}"):
        grpo.main([old, "--config", "configs/tiny.yaml"])


# -------------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> dict[str, object]:
    """A run that needs no model file; none of the tests below gets as far as a step."""
    folder = tmp_path_factory.mktemp("bad")
    return write_task(folder) | dict(model="tiny", tiny_hidden=16, run_dir=folder / "run")


BAD = {
    "a missing model folder": ({"model": "{tmp}/no-model"}, "no-model' does not exist"),
    "a wrong key": ({"group_sise": 8}, "unknown setting 'group_sise'; did you mean 'group_size'?"),
    "an empty data file": ({"data": "{tmp}/empty.jsonl"}, "empty.jsonl is empty"),
    "a data file that is no data": ({"data": "{tmp}/prose.jsonl"}, "prose.jsonl"),
    "a run directory in use": ({"run_dir": "{tmp}/used"}, "used exists; add --"),
    "nothing to resume": ({"resume": "true"}, "to resume"),
    "prompts that are all too long": ({"max_prompt_tokens": 5}, "longer than max_prompt_tokens (5)"),
}


def bad_settings(case: str, task: dict, tmp_path: Path) -> tuple[dict, str]:
    """(settings, what the message must contain), with the files that the case needs."""
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "prose.jsonl").write_text("This is a letter.\nTo nobody.\n")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "log.jsonl").touch()
    changes, words = BAD[case]
    changes = {key: str(value).replace("{tmp}", str(tmp_path)) for key, value in changes.items()}
    return task | {"run_dir": tmp_path / "run"} | changes, words


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_sentence(case, task, tmp_path, monkeypatch, capsys):
    settings, words = bad_settings(case, task, tmp_path)
    monkeypatch.setattr(sys, "argv", ["grpo.py", *as_arguments(settings)])
    with pytest.raises(SystemExit) as caught:  # any other exception would be a traceback
        run_here(lambda _: runpy.run_path(str(ROOT / "grpo.py"), run_name="__main__"), settings)
    code = caught.value.code  # a status, or a text that Python prints to stderr
    message = code if isinstance(code, str) else capsys.readouterr().err.strip().splitlines()[-1]
    assert code and message.startswith("error: ") and words in message and "\n" not in message


def test_the_sentence_arrives_on_stderr(task, tmp_path):
    settings, words = bad_settings("a missing model folder", task, tmp_path)
    done = start(SINGLE, settings)
    assert done.returncode not in (0, 130) and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and words in done.stderr
    again = start(SINGLE, settings | {"model": "tiny", "max_prompt_tokens": 5})
    assert "longer than max_prompt_tokens" in again.stderr, "a mistake does not block the run directory"


def test_a_resume_with_nothing_left_to_do_evaluates_once(tmp_path):
    """The last row has no accuracies when fewer steps end a run early: the summary used to fail, and no model
    came.
    """
    settings = write_task(tmp_path) | dict(
        model="tiny", tiny_hidden=16, warmup_steps=2, steps=3, prompts_per_step=4, minibatch_prompts=4,
        group_size=2, max_response_tokens=60, eval_every=0, save_every=2, run_dir=tmp_path / "run",
    )
    run_here(grpo.main, settings)
    for name in ("model", "summary.json", "step_3", "samples.html"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "run" / "latest").write_text("step_2")
    for _ in range(2):
        run_here(grpo.main, settings | {"resume": "true", "steps": 2})
        rows = read_jsonl(tmp_path / "run" / "log.jsonl")
        assert [row["step"] for row in rows] == [0, 1, 2, 2] and "held_out/accuracy" in rows[-1]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists() and (
        tmp_path / "run" / "samples.html"
    ).exists()


def test_an_old_run_stays_where_the_new_one_cannot_start(tmp_path):
    """With --overwrite, what is wrong with prompts or benchmarks must show before the old run is gone."""
    settings = write_task(tmp_path) | dict(model="tiny", tiny_hidden=16, warmup_steps=1)
    settings |= dict(steps=1, prompts_per_step=4, minibatch_prompts=4, group_size=2, max_response_tokens=60)
    settings["run_dir"] = tmp_path / "a"
    run_here(grpo.main, settings)
    again = settings | {"model": tmp_path / "a" / "model", "run_dir": tmp_path / "b"}
    run_here(grpo.main, again)
    for wrong in ({"max_prompt_tokens": 5}, {"bfcl": tmp_path / "nowhere"}, {"loss": "grop"}):
        with pytest.raises(UserError):
            run_here(grpo.main, again | wrong | {"overwrite": "true"})
        assert (tmp_path / "b" / "summary.json").exists()
