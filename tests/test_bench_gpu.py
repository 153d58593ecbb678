"""bench/gpu.py: it runs without a GPU, its checks fail where something is wrong, and nothing it measured is
lost.

A GPU is to be had for minutes only: they must not be spent on the program's own mistakes.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))

import gpu  # noqa: E402
import gpu_measure  # noqa: E402
import gpu_numerics  # noqa: E402
from gpu_measure import TINY_LOAD, TINY_SHAPES, Load, Session, attempt, build, decode_floor, forward_flops  # noqa: E402

from kernel.attention import use_attention
from kernel.packing import pack
from model import token_logprobs
from rollout import ENGINES

torch.set_num_threads(1)

CPU = torch.device("cpu")
KEYS = {  # what RESULTS.md is made from
    "machine": "date torch transformers cuda attention copy_gb_per_s matrix_tflops datasheet_tflops memory_gib meaningless",
    "step": "step_s rollout_s reward_s pack_s reference_s update_s rollout_floor_s reference_floor_s update_floor_s "
    "update_of_measured_peak new_tokens_per_s peak_gib",
    "train": "tokens_per_s forward_tokens_per_s of_measured_peak plain_of_measured_peak ratio_min ratio_median ratio_max "
    "token_ratio of_token_ratio peak_gib plain_peak_gib repetitions",
    "profile": "wall_ms busy_share kernels operators host_synchronisations",
    "rollout": "prefill_tokens_per_s decode_tokens_per_s step_ms bandwidth_floor_ms flops_floor_ms over_bandwidth_floor "
    "prefill_s prefill_floor_s new_tokens peak_gib",
}


@pytest.fixture
def session(tmp_path):
    return Session(CPU, True, TINY_LOAD, tmp_path / "gpu.jsonl", time.perf_counter() + 60, [], 1e9, 1e9)


@pytest.fixture(scope="module")
def model():
    return build(SimpleNamespace(device=CPU, tiny=True), "0.5B")


def written(session) -> list[dict]:
    return [json.loads(line) for line in session.out.read_text().splitlines()]


# ------------------------------------------------------------------------------------------ the whole program


def test_every_part_runs_on_tiny_models_and_the_checks_pass(tmp_path):
    command = [
        sys.executable,
        "bench/gpu.py",
        "--tiny",
        "--parts",
        "all",
        "--out",
        str(tmp_path / "new" / "gpu.jsonl"),
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in (tmp_path / "new" / "gpu.jsonl").read_text().splitlines()]
    assert summary["failed"] == summary["missing"] == [] and summary["results"] == len(rows)
    for row in rows:
        assert set(KEYS.get(row["part"], "passed").split()) <= set(row)
        assert row.get("passed", True) is True and not {"error", "skipped", "out_of_memory"} & set(row)
    assert {row["part"] for row in rows} == {"machine", *gpu.PARTS}
    checked = " ".join(row["name"] for row in rows if row["part"] == "numerics")
    for what in ("attention", "deterministic", "LM head", "log-probs", "sampler", "greedy shared_prefix"):
        assert what in checked
    assert rows[0]["meaningless"] and "none of these figures means anything" in done.stdout


def test_what_does_not_fit_into_the_time_is_said(tmp_path, capsys):
    assert gpu.main(["--tiny", "--minutes", "0", "--out", str(tmp_path / "gpu.jsonl")]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["missing"] == [f"{part}: all of it" for part in gpu.PARTS]


@pytest.mark.parametrize("values, code", [({"passed": True}, 0), ({"passed": False}, 1), ({"error": "x"}, 1)])
def test_the_exit_code_tells_whether_all_is_right(values, code, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        gpu, "PARTS", {"numerics": (lambda session: gpu.emit(session, "numerics", "one", values), 1.0)}
    )
    assert gpu.main(["--tiny", "--out", str(tmp_path / "gpu.jsonl")]) == code
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == ["numerics: one"] * code


@pytest.mark.parametrize(
    "arguments, message", [([], "--tiny"), (["--tiny", "--parts", "numerics,speed"], "unknown: speed")]
)
def test_wrong_calls_are_refused_with_a_sentence(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------ what goes wrong is told


def out_of_memory(session) -> dict:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")


def broken(session) -> dict:
    return {"x": 1 / 0}


def endless(session) -> dict:
    while True:
        try:
            time.sleep(0.001)
        except Exception:  # as a library may: the deadline must get through
            pass


def test_a_failed_measurement_is_a_result_and_the_next_one_runs(session, capsys):
    attempt(session, "train", "large", out_of_memory)
    attempt(session, "train", "wrong", broken)
    attempt(gpu_measure.share_of_time(session, 0.002), "train", "endless", endless)
    attempt(
        Session(CPU, False, Load(), session.out, session.deadline, session.results), "train", "long", broken,
        needs=900,
    )
    attempt(session, "train", "right", lambda session: {"x": 1.0})
    large, wrong, slow, long, right = written(session)
    assert "9 GiB" in large["out_of_memory"]
    assert wrong["error"] == "ZeroDivisionError: division by zero" and "1 / 0" in capsys.readouterr().err
    assert "deadline" in slow["skipped"] and "needs about 900 s" in long["skipped"]
    assert right == {"part": "train", "name": "right", "x": 1.0}


def test_a_part_that_fails_before_its_first_measurement_is_reported(session, monkeypatch):
    monkeypatch.setattr(gpu, "build", lambda *_: out_of_memory(None))
    gpu.rollout(session)
    assert [("out_of_memory" in row, row["name"]) for row in written(session)] == [
        (True, "1.5B"),
        (True, "7B"),
    ]


def scaled(function, factor: float):
    """`function` with a wrong temperature or scaling: its last positional float, or the keyword `scaling`."""

    def wrong(*args, **kwargs):
        if "scaling" in kwargs:
            return function(*args, **kwargs | {"scaling": kwargs["scaling"] * factor})
        return function(*(x * factor if isinstance(x, float) else x for x in args), **kwargs)

    return wrong


@pytest.mark.parametrize("broken", [False, True])
def test_the_checks_notice_a_wrong_scale(broken, session, model, monkeypatch):
    for name in ("shared_prefix_attention", "head_logprobs", "token_logprobs") if broken else ():
        monkeypatch.setattr(gpu_numerics, name, scaled(getattr(gpu_numerics, name), 1.2))
    values = [gpu_numerics.check_attention(session, 4, 2, 8, False), gpu_numerics.check_head(session, 16, 50)]
    values += [gpu_numerics.check_logprobs(session, model), gpu_numerics.check_sampler(session, model)]
    assert [one["passed"] for one in values] == [not broken] * 4


def test_the_check_of_gradients_stands_on_its_own(session, model, monkeypatch):
    """Right log-probs with a wrong backward must fail; plain rows tell how much error bf16 excuses."""

    def wrong(model, packed, temperature):
        logprobs, entropy = token_logprobs(model, packed, temperature)
        return (
            logprobs.detach() + 1.1 * (logprobs - logprobs.detach()) if packed.layout else logprobs
        ), entropy

    monkeypatch.setattr(gpu_numerics, "token_logprobs", wrong)
    values = gpu_numerics.check_logprobs(session, model)
    assert values["packed_mean"] < 1e-6 and values["packed_gradient"] == pytest.approx(0.1, rel=1e-3)
    assert not values["passed"]


def test_only_the_strict_check_asks_for_equal_runs(session, monkeypatch):
    exact = gpu_numerics.shared_prefix_attention
    noisy = lambda *args, **kwargs: (exact(*args, **kwargs)[0] * (1 + 1e-4 * torch.rand(1)), None)  # noqa: E731
    monkeypatch.setattr(gpu_numerics, "shared_prefix_attention", noisy)
    loose, strict = (gpu_numerics.check_attention(session, 4, 2, 8, strict) for strict in (False, True))
    assert not loose["equal_twice"] and loose["passed"] and not strict["passed"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_engine_with_another_token_fails_the_greedy_check(session, model, monkeypatch):
    def wrong(*args):
        rows = ENGINES["shared_prefix"](*args)
        return [([*ids[:2], (ids[2] + 1) % 512, *ids[3:]], logprobs) for ids, logprobs in rows]

    def short(*args):
        return [(ids[:-1], logprobs) for ids, logprobs in ENGINES["shared_prefix"](*args)]

    monkeypatch.setitem(ENGINES, "wrong", wrong)
    values = gpu_numerics.check_greedy(session, model, "wrong", False)
    assert not values["passed"]
    assert values["equal_share"] == pytest.approx(2 / 5) and values["rows_that_differ"] == "12 of 12"
    monkeypatch.setitem(ENGINES, "short", short)
    attempt(session, "numerics", "short", gpu_numerics.check_greedy, model, "short", False)
    assert "error" in written(session)[0]


# ------------------------------------------------------------------------------------------ floors and clocks


@pytest.mark.parametrize("shared", [True, False])
def test_flops_are_those_of_the_model(shared, model):
    """The matrix products that torch counts; attention by hand, because its kernels compute what causality
    hides too.
    """
    load, shape = TINY_LOAD, TINY_SHAPES["0.5B"]
    groups = gpu_measure.random_groups(shape.vocab, [(load.prompt, [load.response] * load.copies)] * 3)
    use_attention(model, "train" if shared else "generate")
    with FlopCounterMode(display=False) as counter:
        token_logprobs(model, pack(groups, CPU, shared), 0.7)
    counted = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm")
    )
    prompt, response = range(1, load.prompt + 1), range(load.prompt + 1, load.prompt + load.response + 1)
    seen = sum(prompt) * (1 if shared else load.copies) + sum(response) * load.copies
    attention = 3 * shape.layers * 2 * 2 * seen * shape.hidden  # scores, and values weighted by them
    assert forward_flops(shape, load, 3, shared) == counted + attention


def test_a_decode_step_reads_weights_and_keys_once(session):
    shape = TINY_SHAPES["7B"]
    model = build(session, "7B")
    weights = (
        sum(p.numel() for p in model.parameters() if p.dim() == 2) - shape.vocab * shape.hidden
    )  # its table of inputs
    assert (
        model.lm_head.weight.dtype == torch.bfloat16
        and model.model.rotary_emb.inv_freq.dtype == torch.float32
    )
    tokens = 3 * TINY_LOAD.prompt + 6 * TINY_LOAD.response / 2  # three groups of two rows
    keys = 2 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads) * tokens
    assert decode_floor(session, shape, 6, TINY_LOAD.response)[0] == 2 * (weights + keys) / session.copy_rate


def test_the_clock_waits_for_the_device_and_memory_is_what_was_added(monkeypatch):
    """No GPU here: only that each call is made, and where."""
    calls = []
    for name, value in (("synchronize", 0), ("reset_peak_memory_stats", 0), ("memory_allocated", 2**30),
                        ("max_memory_allocated", 3 * 2**30)):
        monkeypatch.setattr(torch.cuda, name, lambda name=name, value=value: calls.append(name) or value)
    monkeypatch.setattr(time, "perf_counter", lambda: calls.append("clock") or len(calls))
    seconds, gib = gpu_measure.measure(SimpleNamespace(type="cuda"), lambda: calls.append("work"))
    before = ["synchronize", "reset_peak_memory_stats", "memory_allocated", "clock"]
    assert calls == [*before, "work", "synchronize", "clock", "max_memory_allocated"]
    assert gib == 2.0


def test_tables_keep_every_figure(session, tmp_path):
    for name, x in (("a", 0.12344), ("b", 123456.7)):
        gpu_measure.emit(session, "train", name, {"x": x, "passed": True})
    gpu_measure.emit(session, "train", "c", {"skipped": "no time"})
    assert gpu.tables(session.out) == (
        "| train | x | passed |\n| --- | --- | --- |\n| a | 0.123 | True |\n| b | 123,500 | True |\n\n"
        "| train | skipped |\n| --- | --- |\n| c | no time |\n"
    )


def test_the_readme_names_every_script():
    text = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in (ROOT / "bench").glob("*.py") if f"`{path.name}`" not in text] == []
