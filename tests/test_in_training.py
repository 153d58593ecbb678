"""Evaluation during training: fixed subsets, the official verdicts, and sums over ranks for any set."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from bfcl_cases import gold_steps

import rollout
from config import Config, ConfigError
from corpus.examples import Example, Tokenized
from corpus.tiny_model import build_tiny_tokenizer
from evals import in_training
from evals.in_training import JudgedPrompt, Verdict, evaluate, held_out_prompts, load_benchmarks
from kernel.decode import Prompt
from prompts import ToolCall, render_calls, render_completion

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason="the benchmarks in ../shared are absent")
TOKENIZER = build_tiny_tokenizer(["weather in Paris for 3 days"] * 3, 300)


def load(**settings) -> dict[str, list[JudgedPrompt]]:
    settings = {"max_prompt_tokens": 20000} | settings
    return load_benchmarks(Config(**settings), TOKENIZER, "{tools}", quiet=True)


@needs_data
def test_the_subset_is_the_first_cases_of_each_category():
    """eval_cases is spread over BFCL's 13 categories, and over API-Bank's 3 levels."""
    loaded = load(bfcl=str(SHARED / "bfcl"), apibank=str(SHARED / "apibank"), eval_cases=26)
    parts = {name: [case.part for case in cases] for name, cases in loaded.items()}
    counts = {part: parts["bfcl"].count(part) for part in parts["bfcl"]}
    assert counts == {"non_live": 12, "live": 8, "irrelevance": 4, "relevance": 2}
    assert parts["apibank"] == ["level1"] * 8 + ["level2"] * 8 + ["level3"] * 8
    case, other = loaded["bfcl"][:2]
    assert (case.prompt.id, other.prompt.id) == ("simple_python_0", "simple_python_1")
    call = {"name": "calculate_triangle_area", "arguments": {"base": 10, "height": 5, "unit": "units"}}
    right = f"<tool_call>[{json.dumps(call)}]</tool_call>"
    assert case.judge("<think>so</think>" + right) == Verdict(True, True)
    for wrong in (right.replace("10", "11"), "", "<tool_call>[]</tool_call>"):
        assert case.judge(wrong) == Verdict(False, False)


@needs_data
def test_refused_and_too_long_prompts_are_left_out(monkeypatch, capsys):
    cases = load(bfcl=str(SHARED / "bfcl"), eval_cases=39, max_prompt_tokens=900)["bfcl"]
    assert 0 < len(cases) < 39 and all(len(case.prompt.ids) <= 900 for case in cases)
    with pytest.raises(ConfigError, match="bfcl: every prompt is longer than max_prompt_tokens"):
        load(bfcl=str(SHARED / "bfcl"), eval_cases=13, max_prompt_tokens=5)
    refuses = "{% if 'triangle' in messages[1].content %}{{ raise_exception('no triangles') }}{% endif %}"
    monkeypatch.setattr(TOKENIZER, "chat_template", refuses + TOKENIZER.chat_template)
    settings = Config(bfcl=str(SHARED / "bfcl"), eval_cases=26, max_prompt_tokens=20000)
    names = [case.prompt.id for case in load_benchmarks(settings, TOKENIZER, "{tools}")["bfcl"]]
    assert len(names) < 26 and "simple_python_0" not in names and "simple_python_1" in names
    assert f"; {26 - len(names)} are refused, such as simple_python_0: " in capsys.readouterr().out


def test_a_folder_without_data_stops_at_start(tmp_path):
    with pytest.raises(ConfigError, match="bfcl or apibank: "):
        load(apibank=str(tmp_path))
    with pytest.raises(ConfigError, match="bfcl: the folder .*none' does not exist"):
        in_training.check_benchmarks(Config(bfcl=str(tmp_path / "none")))


def test_a_held_out_example_is_judged_by_the_binary_reward():
    """Right calls without a thought are no full credit, but the calls are right."""
    answer, tool = [ToolCall("f", {"a": 1})], {"name": "f", "description": "", "parameters": {}}
    example = Example("e0", "test", [{"role": "user", "content": "q"}], [tool], answer)
    (one,) = held_out_prompts([Tokenized(example, [1, 2])])
    assert (one.prompt.id, one.prompt.ids, one.part) == ("e0", [1, 2], "single")
    assert one.judge(render_completion(answer, "so")) == Verdict(True, True)
    assert one.judge(render_calls(answer)) == Verdict(False, True)
    assert one.judge(render_completion([], "so")) == Verdict(False, False)


def test_accuracy_is_over_all_ranks(monkeypatch):
    """Cases 0 to 4 in two parts; two ranks, whose sums are added, find what one alone finds."""
    verdict = lambda text: Verdict(text in "014", text in "0134")  # noqa: E731
    cases = [JudgedPrompt(Prompt(str(i), [1]), "ab"[i % 2], verdict) for i in range(5)]
    answer = lambda model, tokenizer, prompts, *_, **__: [SimpleNamespace(texts=[p.id]) for p in prompts]  # noqa: E731
    monkeypatch.setattr(in_training, "sample_groups", answer)
    partial_sums = []
    for rank in (0, 1):
        total = lambda values: partial_sums.append(list(values)) or values  # noqa: E731
        ranks = SimpleNamespace(rank=rank, world=2, sum=total, heartbeat=None)
        evaluate(None, None, {"test": cases}, Config(), ranks)
    assert [sum(pair) for pair in zip(*partial_sums)] == [2.0, 1.0, 4.0]
    alone = SimpleNamespace(rank=0, world=1, sum=list, heartbeat=None)
    entries = evaluate(None, None, {"test": cases}, Config(), alone)
    whole = {"test/accuracy": 0.6, "test/n": 5, "test/correct_rate": 0.8}
    parts = {"test/accuracy_a": 2 / 3, "test/n_a": 3, "test/accuracy_b": 0.5, "test/n_b": 2}
    assert entries == whole | parts


def test_multi_turn_scenarios_are_played_on_every_rank(monkeypatch):
    """One of each part in turn; right where the model says the gold calls, here on both of two ranks."""
    pytest.importorskip("bfcl_eval", reason="pip install --no-deps bfcl-eval==2026.3.23")
    cases = load(bfcl_multi_turn=6)["bfcl_multi_turn"]
    parts = ["base", "miss_func", "miss_param", "long_context"]
    assert [case.part for case in cases] == parts + parts[:2]
    knows = {}
    for case in cases:
        knows[case.scenario.id] = [[*turn, render_calls([])] for turn in gold_steps(case.scenario)]
    del knows["multi_turn_base_1"]

    def answer(model, tokenizer, prompts, decoding, **_):
        said = []
        for prompt in prompts:
            turns = knows.get(prompt.id, [])
            text = next((turn.pop(0) for turn in turns if turn), render_calls([]))
            said.append(SimpleNamespace(texts=[text], responses=[[1]]))
        return said

    monkeypatch.setattr(rollout, "sample_groups", answer)
    monkeypatch.setattr(in_training, "MULTI_TURN_TOKENS", 10**6)  # of bytes here
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: None))
    sums = []
    for rank in (0, 1):
        total = lambda values: sums.append(list(values)) or values  # noqa: E731
        ranks = SimpleNamespace(rank=rank, world=2, sum=total, heartbeat=lambda: None, main=not rank)
        evaluate(model, TOKENIZER, {"bfcl_multi_turn": cases}, Config(), ranks)
    assert [sum(pair) for pair in zip(*sums)] == [1.0, 2.0, 1.0, 1.0, 5.0]
