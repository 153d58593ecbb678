"""bench/gpu.py runs without a GPU, and its checks fail where something is wrong."""

import json
import os
import signal
import sys
import time

import pytest
import torch
from helpers import ROOT, run_forked
from torch.utils.flop_counter import FlopCounterMode

sys.path += [str(ROOT / "bench"), str(ROOT / "tests/gpu")]

import common  # noqa: E402
import gpu  # noqa: E402
import numerics  # noqa: E402
from gpu_measure import TINY_LOAD, TINY_SHAPES, Session  # noqa: E402

from kernel.packing import pack  # noqa: E402


@pytest.fixture
def session(tmp_path, ranks):
    end = time.perf_counter() + 60
    return Session(torch.device("cpu"), True, tmp_path / "gpu.jsonl", tmp_path, end, 1e9, 1e9)


def test_every_stage_runs_on_tiny_models_and_the_checks_pass(tmp_path):
    """The demo is killed and goes on. Stages that lack something say so, and cost the others nothing."""
    out = tmp_path / "new" / "gpu.jsonl"
    said = run_forked("bench/gpu.py", "--tiny", "--stages", ",".join(gpu.STAGES), "--out", out)
    told = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [line.get("stage") for line in told[:-1]] == [stage for stage in gpu.STAGES if stage != "machine"]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["part"] for row in rows} == set(gpu.STAGES)
    assert all(row["passed"] for row in rows if row["part"] in ("numerics", "run"))
    assert set(told[-1]["missing"]) <= {"trl: step"}
    assert told[-1]["failed"] == []


def hang(session):
    """As a call of a library that never comes back to Python."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(60)


def test_the_limits_fit_into_two_calls():
    """Four minutes, in which two parts run side by side, and six."""
    seconds = {stage: sum(part.seconds for part in parts.values()) for stage, parts in gpu.STAGES.items()}
    assert max(seconds["numerics"], seconds["run"]) + seconds["machine"] <= 240
    assert seconds["machine"] + seconds["speed"] + seconds["trl"] <= 360


def test_a_part_that_dies_hangs_or_is_slow_costs_the_others_nothing(session, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    rates = dict.fromkeys(("copy_gb_per_s", "matrix_tflops", "datasheet_tflops"), 1.0)
    monkeypatch.setitem(gpu.STAGES, "machine", {"rates": gpu.Part(lambda session: rates, 5.0)})
    monkeypatch.setitem(gpu.STAGES, "trl", {
        "slow": gpu.Part(lambda session: time.sleep(60), 0.5), "hangs": gpu.Part(hang, 0.5),
        "dies": gpu.Part(lambda session: os._exit(3), 9.0), "raises": gpu.Part(lambda session: 1 / 0, 9.0),
        "good": gpu.Part(lambda session: {"figure": 1}, 9.0),
    })
    gpu.run_stages(session, ["trl"])
    rows = [json.loads(line) for line in session.out.read_text().splitlines()]
    outcome = {row["name"]: list(row)[-1] for row in rows}
    outcome.pop("rates")
    assert outcome == dict(dies="error", raises="error", slow="skipped", hangs="skipped", good="figure")


BROKEN = {
    "head_logprobs": "LM head", "shared_prefix_attention": "attention 0.5B", "logprobs": "log-probs 0.5B",
    "sample": "greedy shared_prefix",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_the_checks_notice_what_is_wrong(session, monkeypatch, broken):
    """Of each a part that must fail: values that are 2 % too large, and another greedy token."""
    place = common if broken in ("logprobs", "sample") else numerics
    original = getattr(place, broken)

    def wrong(*args, **options):
        found = original(*args, **options)
        if broken == "logprobs":
            return found * 1.02
        if broken != "sample":
            return found[0] * 1.02, None
        other = args[4:5] == ("shared_prefix",)
        return [([*ids[:2], (ids[2] + other) % 512, *ids[3:]], logprobs) for ids, logprobs in found]

    monkeypatch.setattr(place, broken, wrong)
    assert not numerics.checks(session)[BROKEN[broken]]()["passed"]


@pytest.mark.parametrize("shared", [True, False])
def test_flops_are_those_of_the_model(shared):
    """The matrix products that torch counts; attention by hand: its kernels compute what causality hides."""
    shape, (prompt, response, copies) = TINY_SHAPES["0.5B"], TINY_LOAD.case
    model = common.random_model(shape)
    groups = common.random_groups(shape.vocab, [(prompt, [response] * copies)])
    packed = pack(groups, torch.device("cpu"), shared)
    with FlopCounterMode(display=False) as counter:
        common.logprobs(model, packed)
    counted = counter.get_flop_counts()["Global"].items()
    counted = sum(n for op, n in counted if str(op) in ("aten.mm", "aten.addmm"))
    own, replies = sum(range(1, prompt + 1)), sum(range(prompt + 1, prompt + response + 1)) * copies
    pairs = own * (shape.layers - 1) + prompt if shared else copies * own * shape.layers
    attention = 2 * 2 * (pairs + replies * shape.layers) * shape.hidden  # scores, and weighted values
    assert common.group_flops(shape, TINY_LOAD.case, shared=shared) == counted + attention
