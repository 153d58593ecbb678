"""bench/real_model.py from end to end with a random model on ten real records, and its rules alone."""

import json
import shutil
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, Forked, own_process_group

from config import Config, UserError, load_config
from corpus.layouts import load_examples, write_examples
from prompts import render_completion

sys.path.append(str(ROOT / "bench"))
import real_model  # noqa: E402
from real_model_own import cut_thought  # noqa: E402
from real_model_report import FIGURES, paired, paired_means  # noqa: E402

SHARED = ROOT / "../shared/data"


def test_a_thought_is_cut_behind_the_last_sentence_that_fits():
    def cut(limit):
        thought = "<think>One two. Is it 3.5? 1. Yes it is now</think><tool_call>[]</tool_call>"
        return cut_thought(thought, limit, lambda text: len(text.split()))

    assert cut(0) == cut(10) and "now</think>" in cut(0)
    assert cut(9) == cut(5) == "<think>One two. Is it 3.5?</think><tool_call>[]</tool_call>"
    assert cut(4) == "<think>One two.</think><tool_call>[]</tool_call>"
    assert cut(1) is None
    assert cut_thought("<tool_call>[]</tool_call>", 1, len) == "<tool_call>[]</tool_call>"


def test_a_paired_difference_has_an_interval_of_its_own():
    """6 of 10 cases fixed, 1 broken: 5 / 12 ± 1.96 · sqrt(8 - 25 / 12) / 12. Nothing changed: not ± 0."""
    fates = [(False, True)] * 6 + [(True, False)] + [(True, True)] * 2 + [(False, False)]
    found = paired(fates)
    assert (found["n"], found["fixed"], found["broken"], found["p"]) == (10, 6, 1, 0.125)
    assert found["difference"] == pytest.approx(50)
    assert (found["low"], found["high"]) == pytest.approx((1.938, 81.395), abs=1e-3)
    assert paired([(True, True)] * 10)["high"] == pytest.approx(100 * 1.959964 / 12, abs=1e-3)


def test_samples_of_the_same_prompts_are_compared_by_prompt():
    """Means of 0.5, 0, 1 become 1, 0.5, 1: the mean difference is 1/3, its deviation sqrt(1/12)."""
    before = {"a": [True, False], "b": [False, False], "c": [True, True]}
    found = paired_means(before, {"a": [True, True], "b": [False, True], "c": [True, True]})
    half = 100 * 1.959964 * (1 / 12 / 3) ** 0.5
    assert (found["difference"], found["fixed"], found["broken"]) == (pytest.approx(100 / 3), 2, 0)
    assert (found["low"], found["high"]) == pytest.approx((100 / 3 - half, 100 / 3 + half))


@pytest.mark.parametrize("mixed, first", [(0.09, 4), (0.1, 0)])
def test_rl_pays_for_the_format_first_where_few_prompts_are_mixed(mixed, first, monkeypatch):
    monkeypatch.setattr(real_model, "pass_figures", lambda out: {"mixed": mixed})
    args = Namespace(out=Path("out"), words=[], settings=Config(steps=9))

    def chosen(name):
        configs = [load_config(words) for _, *words in real_model.commands_of(name, args)]
        return [(one.reward, one.steps, one.model, one.reference) for one in configs]

    sft, formatted = "out/sft_reason/model", "out/rl_format/model"
    assert chosen("rl_format") == ([("partial_format", 4, sft, "")] if first else [])
    assert chosen("rl") == [("binary", 5, formatted, sft) if first else ("binary", 9, sft, "")]


@pytest.fixture
def records(tmp_path):
    """Ten real records, of which eight have a demonstration, and a random model of Llama's shape."""
    if not SHARED.exists():
        pytest.skip("the data in ../shared is absent")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from corpus.tiny_model import build_tiny_tokenizer

    examples, _ = load_examples(SHARED / "train/xlam_rawformat_repacked.json")
    told = sorted(examples, key=lambda one: len(str(one)))[:10]
    told[:8] = [replace(one, demonstrations=(render_completion(one.answer, "It fits."),)) for one in told[:8]]
    write_examples(tmp_path / "records.jsonl", told)
    tokenizer = build_tiny_tokenizer(map(str, told), 800)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, **ids,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompt.txt").write_text("{tools}")
    return tmp_path


def words_of(folder):
    settings = "--steps 2 --epochs 1 --sft_batch 3 --prompts_per_step 2 --minibatch_prompts 2 --group_size 2"
    settings += " --max_prompt_tokens 2000 --max_response_tokens 60 --eval_prompt_tokens 800 --save_every 0"
    settings += " --limit 1"
    words = ["--model", folder / "model", "--data", folder / "records.jsonl", "--out", folder / "out"]
    words += ["--config", ROOT / "configs/qwen2.5-0.5b.yaml", "--prompt_template", folder / "prompt.txt"]
    words += ["--bfcl", SHARED / "bfcl", "--apibank", SHARED / "apibank", *settings.split()]
    return list(map(str, words))


def test_every_stage_runs_once_and_what_is_deleted_again(records, monkeypatch):
    out, words = records / "out", words_of(records)
    monkeypatch.setattr(real_model, "subprocess", SimpleNamespace(Popen=Forked))
    with own_process_group():
        real_model.main(words)
    found = json.loads((out / "results.json").read_text())
    assert list(found["conditions"]) == ["start", "sft_no_reason", "sft_reason", "rl"]
    for one in found["conditions"].values():
        assert [one[test]["n"] for test in FIGURES] == [4, 4, 13, 4]
    assert len(found["comparisons"]) == 10 and found["pass8"]["prompts"] == 6
    assert all((out / name).stat().st_size for name in ("RESULTS.md", "real_model.png", "rl/samples.html"))

    before = {name: real_model.read_record(out, name) for name in real_model.STAGES}
    replies = (out / "eval_start/held_out/predictions.jsonl").read_text()
    shutil.rmtree(out / "eval_start/apibank")  # half of a stage
    with own_process_group():
        real_model.main([*words, "--log_samples", "3"])
    again = {name: real_model.read_record(out, name) for name in real_model.STAGES}
    assert [name for name in again if again[name] != before[name]] == ["eval_start"]
    assert (out / "eval_start/held_out/predictions.jsonl").read_text() == replies
    assert json.loads((out / "results.json").read_text())["conditions"] == found["conditions"]

    with pytest.raises(UserError, match=r"rl_format was made with other inputs \(settings\)"):
        real_model.main([*words, "--steps", "4"])  # the SFT stages read no such setting
    assert json.loads((out / "results.json").read_text())["settings"]["steps"] == 2
    with pytest.raises(UserError, match="reward is set by the stages"):
        real_model.main([*words, "--reward", "no_reason"])
    shutil.rmtree(out / "pass8")
    with pytest.raises(UserError, match="rl_format.*rl.*eval_rl.*delete these folders"):
        real_model.main(words)
