"""BFCL and API-Bank during training: the fixed subset, the official verdicts, and sums over ranks."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from config import Config, ConfigError
from corpus.tiny_model import build_tiny_tokenizer
from evals import in_training as benchmarks
from evals.in_training import JudgedPrompt, evaluate_benchmark, load_benchmarks
from kernel.decode import Prompt

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(
    not SHARED.exists(), reason="shared/data, which holds the benchmarks, is not here"
)
TOKENIZER = build_tiny_tokenizer(["weather in Paris for 3 days"] * 3, 300)


@needs_data
def test_the_subset_is_the_first_cases_of_each_category():
    config = Config(
        bfcl=str(SHARED / "bfcl"), apibank=str(SHARED / "apibank"), benchmark_cases=2, max_prompt_tokens=20000
    )
    loaded = load_benchmarks(config, TOKENIZER, "{tools}", quiet=True)
    parts = {name: [case.part for case in cases] for name, cases in loaded.items()}
    assert {part: parts["bfcl"].count(part) for part in set(parts["bfcl"])} == {
        "non_live": 12, "live": 8, "irrelevance": 4, "relevance": 2,
    }
    assert set(parts["apibank"]) == {"level1", "level2", "level3"} and len(parts["apibank"]) == 6
    assert loaded["bfcl"][0].prompt.id == "simple_python_0"


@needs_data
def test_the_verdict_is_the_official_checkers():
    config = Config(bfcl=str(SHARED / "bfcl"), benchmark_cases=1, max_prompt_tokens=20000)
    case = load_benchmarks(config, TOKENIZER, "{tools}", quiet=True)["bfcl"][0]
    call = {"name": "calculate_triangle_area", "arguments": {"base": 10, "height": 5, "unit": "units"}}
    right = f"<tool_call>[{json.dumps(call)}]</tool_call>"
    assert case.judge("<think>so</think>" + right) and case.judge(right.replace('"units"', '"Units"'))
    assert (
        not case.judge(right.replace("10", "11"))
        and not case.judge("")
        and not case.judge("<tool_call>[]</tool_call>")
    )


@needs_data
def test_too_long_prompts_are_left_out_and_said(capsys):
    config = Config(bfcl=str(SHARED / "bfcl"), benchmark_cases=3, max_prompt_tokens=900)
    (cases,) = load_benchmarks(config, TOKENIZER, "{tools}").values()
    assert 0 < len(cases) < 39 and all(len(case.prompt.ids) <= 900 for case in cases)
    assert f"bfcl: {len(cases)} cases, {39 - len(cases)} more are longer" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="bfcl: every prompt is longer than max_prompt_tokens"):
        load_benchmarks(Config(bfcl=str(SHARED / "bfcl"), max_prompt_tokens=5), TOKENIZER, "{tools}")


@pytest.mark.parametrize("name", ["bfcl", "apibank"])
def test_a_folder_without_data_stops_at_start(tmp_path, name):
    with pytest.raises(ConfigError, match="bfcl or apibank: "):
        load_benchmarks(Config(**{name: str(tmp_path)}), TOKENIZER, "{tools}")


def test_accuracy_is_over_all_ranks(monkeypatch):
    """Cases 0 to 4 in two parts; two ranks, whose sums are added, find what one alone finds."""
    cases = [JudgedPrompt(Prompt(str(i), [1]), "ab"[i % 2], lambda text: text in "014") for i in range(5)]
    answer = lambda model, tokenizer, prompts, **_: [SimpleNamespace(texts=[p.id]) for p in prompts]  # noqa: E731
    monkeypatch.setattr(benchmarks, "sample_groups", answer)
    partial_sums = []
    for rank in (0, 1):
        total = lambda values: partial_sums.append(list(values)) or values  # noqa: E731
        ranks = SimpleNamespace(rank=rank, world=2, sum=total, heartbeat=None)
        evaluate_benchmark(None, None, cases, Config(), ranks, "bfcl")
    assert [sum(pair) for pair in zip(*partial_sums)] == [2.0, 1.0]
    alone = SimpleNamespace(rank=0, world=1, sum=list, heartbeat=None)
    entries = evaluate_benchmark(None, None, cases, Config(), alone, "bfcl")
    assert entries == {
        "bfcl/accuracy": 0.6, "bfcl/n": 5, "bfcl/accuracy_a": 2 / 3, "bfcl/n_a": 3, "bfcl/accuracy_b": 0.5, "bfcl/n_b": 2,
    }
