"""Families of models: trained and sampled with transformers' own numbers, or refused with one sentence.

families.py says how they are measured, and measures more of them.
"""

import math

import pytest
from families import FAMILIES, Row, families, measure

PACKED = [  # these must not fall back unnoticed
    "qwen2", "qwen3", "llama, llama3 rotary", "mistral, no window", "phi", "gemma", "apertus", "seed_oss",
    "phi3, dropout",
]
EXACT = [  # packed or not
    "qwen2, layers with windows", "mistral", "gemma2", "gemma3_text", "gemma3, nested", "gpt_oss", "olmo3",
    "granite", "diffllama", "minicpm3", "deepseek_v3", "qwen3_moe", "mixtral", "qwen3_5_text",
    "qwen3_5, nested", "lfm2", "gpt2", "gpt_neo", "gptj", "opt", "bloom",
]
# Its rotary frequencies depend on the longest row; there may be no cache; padding is read as text; with
# transformers 5.17 padding changes its masks.
EXACT_OR_REFUSED = ["phi3, longrope", "mamba", "rwkv", "doge"]


@pytest.mark.parametrize("name", [*PACKED, *EXACT, *EXACT_OR_REFUSED])
def test_numbers_are_those_of_transformers(name, tmp_path):
    if name not in families():
        pytest.skip("the installed transformers does not have it")
    row = measure(name, tmp_path)
    allowed = {"packed"}
    if name not in PACKED:
        allowed.add("falls back")
    if name in EXACT_OR_REFUSED:
        allowed.add("refused")
    assert row.result in allowed and not row.wrong, str(row)


def test_a_model_that_cannot_be_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "llama", dict(num_attention_heads=3))
    row = measure("llama", tmp_path)
    assert row.result == "skipped" and "transformers itself fails" in row.note


def test_a_line_names_what_is_wrong():
    row = Row("a", "packed", "b", {"sharded": 1e-6, "sampler": math.nan, "gradient": 5.0})
    assert str(row) == "| a | packed | nan | b; WRONG: sampler nan, gradient 5.0e+00 |"
    assert str(Row("a", "refused", "b | c")) == "| a | refused |  | b / c |"
