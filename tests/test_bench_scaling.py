"""bench/scaling.py and bench/simulate.py: their figures are those of their runs and of a step worked out by
hand.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Qwen2Config

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))

import scaling  # noqa: E402
import simulate  # noqa: E402
from ops.estimate import shape_of
from simulate import Cost, Network, Part  # noqa: E402

from config import Config, ConfigError
from corpus.sources import append_jsonl

# ------------------------------------------------------------------------------------------- scaling: figures


def row(rank: int, seconds: float, alone: float, busy: float) -> dict[str, float]:
    times = {f"time/{phase}_s": alone for phase in scaling.PHASES}
    return {
        "step": 2,
        "rank": rank,
        "seconds": seconds,
        "alone_s": alone,
        "busy_s": busy,
        "num_tokens": 1000,
        **times,
    }


def test_the_ranks_of_a_step_are_joined():
    """Rank 0 samples 2 s, rank 1 4 s; both end after 10 s, in which their CPUs were at work 6 and 8 s."""
    joined = scaling.join((row(0, 10.0, 2.0, 6.0), row(1, 10.0, 4.0, 8.0)))
    assert joined["tokens_per_s"] == 100 and joined["time/rollout_s"] == 4.0
    assert joined["imbalance"] == pytest.approx((4 - 3) / 10) and joined["waiting"] == pytest.approx(
        1 - 7 / 10
    )


def test_ratios_pair_the_same_step_of_the_same_round():
    """A machine that is half as fast in the second round changes no ratio."""
    record = lambda rate: {"tokens_per_s": rate, "waiting": 0.1, "imbalance": 0.05}  # noqa: E731
    fast = {
        "alone": [record(100), record(50)],
        "strong": [record(160), record(80)],
        "weak": [record(180), record(100)],
    }
    slow = {case: [record(one["tokens_per_s"] / 2) for one in records] for case, records in fast.items()}
    result = scaling.compare([fast, slow])
    assert [result["strong"][f"ratio_{k}"] for k in ("min", "median", "max")] == [1.6, 1.6, 1.6]
    assert [result["weak"][f"ratio_{k}"] for k in ("min", "median", "max")] == pytest.approx([1.8, 1.9, 2.0])
    assert result["strong"]["efficiency_median"] == 0.8 and result["weak"]["waiting"] == 0.1


def test_scaling_runs_from_end_to_end():
    """The weak case has twice the prompts, and both processes of the strong case do their part of the same
    tokens.
    """
    words = "--rounds 1 --steps 1 --prompts 2 --copies 2 --response 8 --hidden 32 --layers 1".split()
    done = subprocess.run(
        [sys.executable, "bench/scaling.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["bench"] == "scaling" and line["repetitions"] == 1 and line["parameters"] > 0
    for case in ("strong", "weak"):
        assert 0 < line[case]["ratio_min"] == line[case]["ratio_median"] == line[case]["ratio_max"]
        assert line[case]["efficiency_median"] == pytest.approx(line[case]["ratio_median"] / 2, abs=1e-3)
    assert "2, same batch" in done.stdout and "update" in done.stdout


# ------------------------------------------------------------------------------------------- simulate: a step

COST = Cost(prefill=0.01, forward=0.1, update=0.3, row=1.0, read=2.0, kv=0.0)
FREE = Network(8, inside=1e30, between=1e30, latency=0.0, overlap=0.0, objects=1e30, hop=0.0, unpickle=1e30)


@pytest.fixture(scope="module")
def shape():
    """A small model's sizes: 2 layers, so every gather is 3 collectives."""
    return shape_of(Qwen2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=128,
    ))


def step(lengths, gpus, shape, net=FREE, rows=1000, cost=COST, **settings) -> dict[str, Part]:
    config = Config(**{"minibatch_prompts": len(lengths), "max_tokens_per_micro_batch": 10**6} | settings)
    return simulate.simulate_step(lengths, 10, gpus, rows, config, shape, cost, net, memory=1e30)


def total(parts: dict[str, Part]) -> float:
    return sum(part.seconds for part in parts.values())


def drawn(prompts: int = 64, tail: float = 4.0) -> list[list[int]]:
    return simulate.draw_lengths(prompts, 5, 20, tail * 20, 500, seed=0)


def test_a_step_worked_out_by_hand(shape):
    """2 GPUs, 2 prompts of 10 tokens with 3 responses each. GPU 0 decodes lengths 4, 2, 2 and GPU 1 lengths
    1, 1, 1.

    Decoding costs a second per row, at least 2 for the weights. GPU 0: two steps with 3 rows, then one row is
    left of 3, fewer than three quarters, so two steps at 2 s; 0.1 s of prefill. GPU 1: one step. Trained are
    18 and 13 tokens.
    """
    parts = step([[4, 2, 2], [1, 1, 1]], 2, shape)
    assert parts["rollout"].seconds == pytest.approx(0.1 + 3 + 3 + 2 + 2)
    assert parts["rollout"].waiting == pytest.approx((10.1 - 3.1) / 2)
    assert parts["reference"].seconds == pytest.approx(18 * 0.1) and "old_logprobs" not in parts
    assert parts["update"].seconds == pytest.approx(18 * 0.3)
    assert parts["update"].waiting == pytest.approx((18 - 13) / 2 * 0.3)


def test_rows_that_have_ended_are_computed_until_a_quarter_has(shape):
    """4 rows: with one ended, three quarters are left, and all 4 are still computed; with two ended, 2
    are.
    """
    assert simulate.decode_seconds([[1, 2, 3, 3]], 0, dataclasses.replace(COST, read=0.0)) == 4 + 4 + 2


def test_keys_and_values_are_read_while_their_group_lives(shape):
    """Two groups of one row: 10 + 1 tokens each, then 10 + 2 of the second; 2 s for the weights each time."""
    cost = dataclasses.replace(COST, row=0.0, kv=1.0)
    assert simulate.decode_seconds([[1], [2]], 10, cost) == (2 + 2 * 11) + (2 + 12)


def test_batches_that_do_not_fit_are_decoded_one_after_the_other(shape):
    """A step is 2 s however few rows it has: 5 steps together, 5 and then 3 apart, and 0.2 s of prefill."""
    cost = dataclasses.replace(COST, row=0.0)
    together, apart = (
        step([[5, 5], [3, 3]], 1, shape, rows=rows, cost=cost)["rollout"].seconds for rows in (4, 2)
    )
    assert together == pytest.approx(0.2 + 2 * 5) and apart == pytest.approx(0.2 + 2 * (5 + 3))


def test_without_a_tail_nobody_waits(shape):
    even = drawn(tail=1.0)
    assert {n for group in even for n in group} == {20}
    assert all(part.waiting == pytest.approx(0, abs=1e-9) for part in step(even, 8, shape).values())
    assert step(drawn(), 8, shape)["rollout"].waiting > 1


def test_more_gpus_than_prompts_wait(shape):
    """A group is trained by one GPU: 4 of 8 have nothing to do."""
    parts = step(drawn(4, tail=1.0), 8, shape)
    assert parts["update"].waiting == pytest.approx(parts["update"].seconds / 2)


def test_more_gpus_are_never_slower_where_communication_is_free(shape):
    times = [total(step(drawn(), gpus, shape)) for gpus in (1, 2, 4, 8, 16, 32, 64)]
    assert times == sorted(times, reverse=True) and times[0] > 10 * times[-1]


def test_slow_wires_make_more_gpus_slower(shape):
    slow = dataclasses.replace(FREE, between=1e2)
    assert total(step(drawn(), 16, shape, slow)) > total(step(drawn(), 8, shape, slow)), (
        "the first that need two nodes"
    )
    late = dataclasses.replace(FREE, latency=100.0)
    assert total(step(drawn(), 64, shape, late)) > total(step(drawn(), 8, shape, late))


@pytest.mark.parametrize("gpus", [1, 3, 8])
def test_no_token_is_lost_or_trained_twice(gpus):
    """Groups within the budget stay whole, so all prompts and responses are there once."""
    lengths = drawn()
    updates = simulate.schedule(lengths, 10, 16, 1500, gpus)
    assert len(updates) == 4
    assert sum(n for update in updates for micros in update for n in micros) == 64 * 10 + sum(
        map(sum, lengths)
    )
    assert max(n for update in updates for micros in update for n in micros) <= 1500


# ------------------------------------------------------------------------------------ simulate: communication


def test_messages_worked_out_by_hand(shape):
    """n parameters on 2 nodes of 2. full: 3/4 of the weights come from other GPUs, over the slower wire, and
    3 collectives double their ranks twice. hsdp: half, inside; besides, the shards' gradients are added up
    between the nodes.
    """
    n, net = shape.parameters, dataclasses.replace(FREE, per_node=2, inside=100.0, between=10.0, latency=0.5)
    gather, update = simulate.sharded_seconds(shape, 4, "full", net)
    assert gather == pytest.approx(0.75 * 2 * n / 10 + 3 * 0.5 * 2)
    assert update == pytest.approx(2 * gather + 0.75 * 4 * n / 10 + 3 * 0.5 * 2)
    gather, update = simulate.sharded_seconds(shape, 4, "hsdp", net)
    assert gather == pytest.approx(0.5 * 2 * n / 100 + 3 * 0.5)
    across = 2 * 0.5 * 4 * (n / 2) / 10 + 2 * 3 * 0.5
    assert update == pytest.approx(2 * gather + 0.5 * 4 * n / 100 + 3 * 0.5 + across)
    assert simulate.sharded_seconds(shape, 1, "full", net) == (0.0, 0.0)


def test_every_gpu_waits_for_the_largest_share_of_the_groups():
    """Shares of 1 and 3 tokens without a prompt, 13 bytes each, padded to 3; all 4 are unpickled by
    everyone.
    """
    net = dataclasses.replace(FREE, objects=13.0, hop=0.25, unpickle=26.0)
    assert simulate.exchange_seconds([[1], [3]], 0, 2, net) == pytest.approx(2 * 3 + 0.25 + 4 / 2)


def test_communication_hides_under_computing():
    """Micro-batches of 10 s and 1 s, 4 s of communication each, of which half the computing time hides
    some.
    """
    part = simulate.passes([[[10, 1]]], per_token=1.0, communication=4.0, overlap=0.5)
    assert part == Part(seconds=10 + 1 + 3.5, waiting=0.0, exposed=3.5)


# -------------------------------------------------------------------------------- simulate: lengths and costs


def test_lengths_have_the_asked_mean_and_percentile():
    lengths = sorted(n for group in simulate.draw_lengths(4000, 5, 150, 600, 8192, seed=0) for n in group)
    assert sum(lengths) / len(lengths) == pytest.approx(150, rel=0.02)
    assert lengths[int(0.99 * len(lengths))] == pytest.approx(600, rel=0.05)
    assert max(n for group in simulate.draw_lengths(4000, 5, 150, 600, 300, seed=0) for n in group) == 300
    with pytest.raises(ConfigError, match="response_p99"):
        simulate.lognormal(150, 100)


def test_a_measured_log_gives_its_own_times_back(shape, tmp_path):
    """A log as a run with three times the roofline's seconds would leave: the costs found are those of that
    run.
    """
    slow = dataclasses.replace(COST, row=3.0, read=6.0, prefill=0.03)
    config = Config(prompts_per_step=64, minibatch_prompts=64)
    lengths = simulate.draw_lengths(64, 5, 20, 20, 20, 0)
    seconds = [simulate.rollout_seconds(lengths[gpu::4], 10, 1000, slow) for gpu in range(4)]
    log = {"time/rollout_s": sum(seconds) / 4, "rollout/tokens_per_s": 1.0, "update/tokens_per_s": 8.0}
    log |= {"reference/tokens_per_s": 16.0, "completions/mean_length": 20.0, "completions/max_length": 20.0}
    append_jsonl(tmp_path / "log.jsonl", [{"step": 0}, {"step": 1, "num_tokens": 64 * (10 + 5 * 20)} | log])
    found = simulate.fitted(COST, tmp_path / "log.jsonl", 4, config, 1000, tail=1.0)
    assert (found.update, found.forward) == (0.5, 0.25), "4 GPUs, 8 and 16 tokens a second in all"
    assert (found.row, found.read, found.prefill) == pytest.approx((slow.row, slow.read, slow.prefill))
    append_jsonl(tmp_path / "empty.jsonl", [{"step": 0}])
    with pytest.raises(ConfigError, match="has no steps"):
        simulate.fitted(COST, tmp_path / "empty.jsonl", 4, config, 1000, tail=1.0)


def test_the_roofline_is_that_of_the_plan():
    """6 FLOPs per parameter and token, 8 with gradient checkpointing; a decode step reads the weights
    once.
    """
    shape, config = shape_of(Qwen2Config(**simulate.SIZES["7b"])), Config()
    a = simulate.Assumptions(gpu_tflops=1.0, efficiency=1.0, gpu_bandwidth=1.0)
    cost = simulate.roofline(config, shape, a, 0.0)
    body = 2 * shape.matrices * shape.layers / 1e12
    assert body < cost.forward < 1.25 * body and 3.9 * cost.forward < cost.update < 4.1 * cost.forward
    assert 2 * 7.0e9 < 1e9 * cost.read < 2 * 7.1e9, "all but the embeddings"
    assert 1e9 * cost.kv == 2 * 2 * 28 * 4 * 128


# -------------------------------------------------------------------------------------- simulate: the program


def test_simulate_prints_its_assumptions_and_ends_with_json(capsys):
    simulate.main("--gpus 8,16 --draws 1 --response_p99 300 --sharding hsdp --update_s 1e-3".split())
    said = capsys.readouterr().out.splitlines()
    line = json.loads(said[-1])
    eight, sixteen = line["results"]
    assert (eight["gpus"], sixteen["gpus"], eight["efficiency"]) == (8, 16, 1.0)
    assert eight["step_s"] == pytest.approx(sum(eight["phases"].values()))
    assert eight["tokens"] == sixteen["tokens"], "the batch is the same on any number of GPUs"
    assert sixteen["efficiency"] == pytest.approx(eight["step_s"] / sixteen["step_s"] / 2)
    assert line["cost"]["update"] == 1e-3, "a cost that is given is used"
    text = "\n".join(said)
    for what in (
        "predicted, not measured",
        "99th percentile 300",
        "Sharding hsdp",
        "1.00e-03",
        "a guess",
        "Left out",
    ):
        assert what in text


def test_a_batch_that_grows_with_the_gpus_keeps_them_busy(capsys):
    small = "--gpus 8,64 --draws 1 --response_p99 150".split()  # no tail
    efficiency = {}
    for words in ([], ["--scale_batch"]):
        simulate.main([*small, *words])
        efficiency[bool(words)] = json.loads(capsys.readouterr().out.splitlines()[-1])["results"][1][
            "efficiency"
        ]
    assert efficiency[True] > 0.9 > efficiency[False]


@pytest.mark.parametrize("gpus", ["8,x", "0", "12", ""])
def test_numbers_of_gpus_that_cannot_be(gpus):
    with pytest.raises(ConfigError, match="whole nodes of 8"):
        simulate.main(["--gpus", gpus])
