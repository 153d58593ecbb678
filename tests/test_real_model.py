"""bench/real_model.py from end to end with a random model on ten real records, and its rules alone."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers import ENVIRONMENT, ROOT

from corpus.layouts import load_examples, write_examples
from prompts import render_completion

sys.path.append(str(ROOT / "bench"))
import real_model  # noqa: E402

SHARED = ROOT / "../shared/data"


def test_a_thought_is_cut_behind_the_last_sentence_that_fits():
    def cut(limit):
        thought = "<think>One two. Is it 3.5? 1. Yes it is now</think><tool_call>[]</tool_call>"
        return real_model.cut_thought(thought, limit, lambda text: len(text.split()))

    assert cut(0) == cut(10) and "now</think>" in cut(0)
    assert cut(9) == cut(5) == "<think>One two. Is it 3.5?</think><tool_call>[]</tool_call>"
    assert cut(4) == "<think>One two.</think><tool_call>[]</tool_call>"
    assert cut(1) is None
    assert real_model.cut_thought("<tool_call>[]</tool_call>", 1, len) == "<tool_call>[]</tool_call>"


def test_a_paired_difference_has_an_interval_of_its_own():
    """6 of 10 cases fixed, 1 broken: 0.5 ± 1.96 · sqrt(7 - 25 / 10) / 10."""
    fates = [(False, True)] * 6 + [(True, False)] + [(True, True)] * 2 + [(False, False)]
    found = real_model.paired(fates)
    assert (found["n"], found["fixed"], found["broken"], found["p"]) == (10, 6, 1, 0.125)
    assert found["difference"] == pytest.approx(50)
    assert (found["low"], found["high"]) == pytest.approx((8.423, 91.577), abs=1e-3)


@pytest.mark.parametrize("mixed, first", [(0.0, True), (0.09, True), (0.1, False), (1.0, False)])
def test_rl_pays_for_the_format_first_where_few_prompts_have_right_and_wrong_samples(mixed, first):
    assert real_model.format_first(mixed) == first


@pytest.fixture
def records(tmp_path):
    """Ten real records, of which eight have a demonstration, and a random model of Llama's shape."""
    if not SHARED.exists():
        pytest.skip("the data in ../shared is absent")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from corpus.tiny_model import build_tiny_tokenizer

    examples = sorted(load_examples(SHARED / "train/xlam_rawformat_repacked.json")[0], key=lambda one: len(str(one)))
    told = [
        replace(one, demonstrations=(render_completion(one.answer, "A call fits."),) if i < 8 else ())
        for i, one in enumerate(examples[:10])
    ]
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


def run(folder, *more):
    settings = "--steps 2 --limit 1 --jobs 1 --sft_batch 4 --prompts_per_step 2 --minibatch_prompts 2 --group_size 2"
    settings += " --max_prompt_tokens 2000 --max_response_tokens 80 --eval_prompt_tokens 1000 --save_every 0"
    words = ["--model", folder / "model", "--data", folder / "records.jsonl", "--out", folder / "out"]
    words += ["--config", ROOT / "configs/qwen2.5-0.5b.yaml", "--prompt_template", folder / "prompt.txt"]
    words += ["--bfcl", SHARED / "bfcl", "--apibank", SHARED / "apibank", *settings.split(), *more]
    command = [sys.executable, "bench/real_model.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


def test_all_stages_run_once(records):
    done = run(records)
    logs = "".join(path.read_text()[-2000:] for path in (records / "out").glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    print(done.stdout)
