"""bench/gpu.py runs without a GPU, and its checks fail where something is wrong."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "bench"), str(ROOT / "tests/gpu")]

import common  # noqa: E402
import gpu_measure  # noqa: E402
import numerics  # noqa: E402
from gpu_measure import TINY_LOAD, TINY_SHAPES, Session  # noqa: E402

from kernel.packing import pack  # noqa: E402


@pytest.fixture
def session(tmp_path):
    device = torch.device("cpu")
    return Session(device, True, tmp_path / "gpu.jsonl", time.perf_counter() + 60, [], 1e9, 1e9)


def test_every_part_runs_on_tiny_models_and_the_checks_pass(tmp_path):
    out = tmp_path / "new" / "gpu.jsonl"
    command = [sys.executable, "bench/gpu.py", "--tiny", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert summary["failed"] == summary["missing"] == []
    assert {row["part"] for row in rows} == {"machine", "numerics", "step", "train", "profile", "rollout"}
    assert all(row["passed"] for row in rows if row["part"] == "numerics")


@pytest.mark.parametrize("broken", ["head_logprobs", "logprobs", "sample"])
def test_the_checks_notice_what_is_wrong(session, monkeypatch, broken):
    """Of each a part that must fail: a log-prob that is 2 % too small, and another greedy token."""
    place = numerics if broken == "head_logprobs" else common
    original = getattr(place, broken)
    wrong = {
        "head_logprobs": lambda *args, **options: (original(*args, **options)[0] * 1.02, None),
        "logprobs": lambda model, packed: original(model, packed) * 1.02,
        "sample": lambda *args, **options: [
            ([*ids[:2], (ids[2] + (args[4:5] == ("shared_prefix",))) % 512, *ids[3:]], logprobs)
            for ids, logprobs in original(*args, **options)
        ],
    }[broken]
    monkeypatch.setattr(place, broken, wrong)
    greedy = "greedy shared_prefix fp32"
    failing = {"head_logprobs": "LM head", "logprobs": "log-probs 1.5B", "sample": greedy}
    assert not numerics.checks(session)[failing[broken]]()["passed"]


@pytest.mark.parametrize("shared", [True, False])
def test_flops_are_those_of_the_model(shared):
    """The matrix products that torch counts; attention by hand: its kernels compute what causality hides."""
    shape, (prompt, response, copies) = TINY_SHAPES["0.5B"], TINY_LOAD.case
    model = common.random_model(shape)
    groups = common.random_groups(shape.vocab, [(prompt, [response] * copies)] * 3)
    packed = pack(groups, torch.device("cpu"), shared)
    with FlopCounterMode(display=False) as counter:
        common.logprobs(model, packed)
    counted = counter.get_flop_counts()["Global"].items()
    counted = sum(n for op, n in counted if str(op) in ("aten.mm", "aten.addmm"))
    own, replies = sum(range(1, prompt + 1)), sum(range(prompt + 1, prompt + response + 1)) * copies
    pairs = own * (shape.layers - 1) + prompt if shared else copies * own * shape.layers
    attention = 3 * 2 * 2 * (pairs + replies * shape.layers) * shape.hidden  # scores, and weighted values
    assert gpu_measure.forward_flops(shape, TINY_LOAD, 3, shared) == counted + attention
