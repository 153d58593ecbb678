"""Small random models of many decoder families, and how far training and sampling are from transformers.

    python tests/families.py > docs/models.md

The truth is transformers' own forward pass of one prompt and response, in fp32. Against it stand the sharded
model that grpo.py trains, the whole model of evaluation, and what the sampler says about its own samples.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")  # before torch and transformers are imported
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from helpers import CPU, one_rank
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from corpus.tiny_model import build_tiny_tokenizer
from distributed import fsdp
from distributed.fsdp import full_tensor, gathered_weights, load_sharded, make_mesh
from distributed.weights import load_model
from kernel.attention import uses_shared_prefix
from kernel.decode import Prompt
from kernel.packing import pack
from model import ModelError, first_line, token_logprobs
from rollout import Decoding, sample_groups

# Names as in config.json; a config is given those that it knows. Windows are shorter than most prompts.
SMALL = dict(
    vocab_size=301, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    sliding_window=8, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=24, shared_expert_intermediate_size=24, q_lora_rank=16, kv_lora_rank=16,
    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_group=1, topk_group=1, first_k_dense_replace=1,
)
FULL, WINDOW, LINEAR = "full_attention", "sliding_attention", "linear_attention"
WINDOWS = dict(layer_types=[WINDOW, FULL])
DELTA_NET = dict(
    layer_types=[LINEAR, FULL], linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
    linear_num_value_heads=4,
)
LATENT = dict(num_key_value_heads=4)  # multi-head latent attention expands all heads
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8)
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, depth=1, num_heads=2,
    out_hidden_size=32, image_size=28, patch_size=14,
)
LONGROPE = dict(  # whether a row is long depends on the longest prompt and response
    original_max_position_embeddings=16, rope_parameters=dict(
        rope_type="longrope", rope_theta=10000.0, factor=4.0, short_factor=[1.0, 1.5, 2.0, 3.0],
        long_factor=[2.0, 4.0, 6.0, 8.0], original_max_position_embeddings=16, partial_rotary_factor=1.0,
    ),
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8,
)
GEMMA4 = dict(vocab_size_per_layer_input=301, hidden_size_per_layer_input=8, head_dim=8, **WINDOWS)
MULTIPLIERS = dict(
    embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=2.0
)
AS_THEY_COME = (
    "afmoe apertus arcee aria_text bailing_hybrid beam biogpt bitnet bloom cpmant ctrl cwm diffllama doge "
    "ernie4_5 exaone_moe falcon falcon_mamba flex_olmo flint gemma glm glm4 glm4_moe gpt_neox_japanese "
    "granite_swa granitemoe_swa granitemoeshared hrm_text hy_v3 hy_v4 hyperclovax inkling2_text "
    "inkling_text jais2 kolibri1 laguna lfm3 llama mamba mellum mimo_v2_flash minimax_m2 ministral3 mistral "
    "modernbert-decoder moshi mpt nanochat nemotron olmo2 olmo_hybrid olmoe openai-gpt persimmon phi phi3 "
    "phimoe qwen2 qwen2_moe qwen3 qwen3_moe qwen4_exp_text solar_open"
).split()
SPECIAL: dict[str, dict] = {  # model_type, and what is special: the config's settings
    "qwen2, layers with windows": dict(use_sliding_window=True, **WINDOWS),
    "qwen3_next": DELTA_NET,
    "qwen3_5_text": DELTA_NET,
    "qwen3_5_text, full attention only": dict(layer_types=[FULL] * 2),
    "qwen3_5, nested": dict(text_config=SMALL | DELTA_NET, vision_config=VISION),
    "qwen3_5_moe_text": DELTA_NET,
    "llama, llama3 rotary": dict(rope_parameters=LLAMA3),
    "mistral, no window": dict(sliding_window=None),
    "ministral": dict(head_dim=8, **WINDOWS),
    "mixtral": dict(sliding_window=None),
    "gemma2": dict(head_dim=8, attn_logit_softcapping=2.0, final_logit_softcapping=2.0, **WINDOWS),
    "gemma3_text": dict(head_dim=8, **WINDOWS),
    "gemma3, nested": dict(text_config=SMALL | WINDOWS, vision_config=VISION, mm_tokens_per_image=4),
    "gemma4_text": GEMMA4,
    "vaultgemma": dict(head_dim=8, attn_logit_softcapping=2.0, final_logit_softcapping=2.0, **WINDOWS),
    "recurrent_gemma": dict(num_hidden_layers=3, attention_window_size=8, lru_width=32),
    "phi3, dropout": dict(resid_pdrop=0.3, embd_pdrop=0.3, sliding_window=None),
    "phi3, longrope": dict(LONGROPE, sliding_window=None),
    "olmo": dict(clip_qkv=1.0),
    "olmo3": WINDOWS,
    "smollm3": dict(no_rope_layers=[1, 0]),
    "seed_oss": dict(head_dim=8, attention_dropout=0.3, residual_dropout=0.3),
    "ernie4_5_moe": dict(moe_num_experts=4, moe_k=2, moe_layer_start_index=1),
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8),
    "exaone4": WINDOWS,
    "helium": dict(head_dim=8),
    "stablelm": dict(use_qkv_bias=True, hidden_dropout=0.3),
    "starcoder2": dict(residual_dropout=0.3, embedding_dropout=0.3, sliding_window=None),
    "granite": MULTIPLIERS,
    "granitemoe": MULTIPLIERS,
    "granitemoehybrid": MULTIPLIERS | MAMBA | dict(layer_types=["mamba", "attention"]),
    "cohere": dict(logit_scale=0.5),
    "cohere2": dict(logit_scale=0.5, **WINDOWS),
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "deepseek_v4": dict(layer_types=[WINDOW] * 2),
    "minicpm3": dict(dim_model_base=16, **LATENT),
    "youtu": LATENT,
    "longcat_flash": dict(head_dim=8, ffn_hidden_size=48, zero_expert_num=1, **LATENT),
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "axk1": LATENT,
    "axk2": LATENT,
    "gpt_oss": dict(head_dim=8, **WINDOWS),
    "dots1": dict(n_shared_experts=1),
    "jetmoe": dict(kv_channels=8),
    "llama4_text": dict(head_dim=8),
    "gpt2": dict(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3),
    "gpt_bigcode": dict(resid_pdrop=0.3),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=8),
    "gpt_neox": dict(attention_dropout=0.3, hidden_dropout=0.3),
    "gptj": dict(rotary_dim=4),
    "codegen": dict(rotary_dim=4),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.3),
    "opt, projected embeddings": dict(ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "falcon, alibi": dict(alibi=True),
    "falcon, grouped keys": dict(new_decoder_architecture=True, num_kv_heads=2),
    "xglm": dict(ffn_dim=48),
    "lfm2": dict(layer_types=["conv", FULL]),
    "lfm2_moe": dict(layer_types=["conv", FULL], num_dense_layers=1),
    "mamba2": dict(num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8),
    "falcon_h1": MAMBA | dict(mamba_d_ssm=64),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, mamba_d_state=8),
    "bamba": MAMBA | dict(attn_layer_indices=[1]),
    "zamba": dict(num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, mamba_d_state=8),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"], mamba_d_state=8, mamba_ngroups=1),
    "minimax": dict(layer_types=[LINEAR, FULL], head_dim=8),
    "rwkv": dict(attention_hidden_size=32),
    "nemotron_h": dict(mamba_num_heads=4, mamba_head_dim=16, n_groups=1, ssm_state_size=8, chunk_size=8),
    "gemma3n_text": dict(
        num_kv_shared_layers=0, vocab_size_per_layer_input=301, hidden_size_per_layer_input=8, head_dim=8,
        laurel_rank=8, activation_sparsity_pattern=[0.5, 0.0], **WINDOWS,
    ),
    "gemma4, nested": dict(text_config=SMALL | GEMMA4, vision_config=VISION | dict(head_dim=8)),
    "qwen3_5_moe, nested": dict(text_config=SMALL | DELTA_NET, vision_config=VISION),
    "llama4, nested": dict(text_config=SMALL, vision_config=VISION),
}
FAMILIES = dict(sorted((dict.fromkeys(AS_THEY_COME, {}) | SPECIAL).items()))

TEMPERATURE = 0.8
EXACT = 1e-4  # fp32 rounding stays below, a wrong mask, scale or dropout is far above
LENGTHS = {3: (4, 1), 9: (2, 7), 20: (12, 5)}  # of a prompt: of its responses
Groups = list[tuple[list[int], list[list[int]]]]  # prompts with their responses


@dataclass(frozen=True)
class Row:
    """A family in the table. result: "packed", "falls back", "refused", "TRACEBACK", or "skipped" where
    transformers itself fails. note: why. gaps: the largest difference of log-probs, in nats, of the sharded
    model, the whole model and the sampler; of the gradient, the error relative to its norm.
    """

    family: str
    result: str
    note: str
    gaps: dict[str, float] = field(default_factory=dict)

    @property
    def wrong(self) -> dict[str, float]:
        """The gaps that are too large, or no number."""
        return {part: gap for part, gap in self.gaps.items() if not gap < EXACT}

    def __str__(self) -> str:
        """A line of the table."""
        wrong = [f"WRONG: {', '.join(f'{part} {gap:.1e}' for part, gap in self.wrong.items())}"]
        note = "; ".join([self.note] * bool(self.note) + wrong * bool(self.wrong)).replace("|", "/")
        nats = [gap for part, gap in self.gaps.items() if part != "gradient"]
        largest = max(nats, key=lambda gap: (gap != gap, gap), default=None)
        return f"| {self.family} | {self.result} | {'' if largest is None else f'{largest:.1e}'} | {note} |"


def families() -> Iterator[str]:
    """The names of those families that the installed transformers has."""
    return (name for name in FAMILIES if name.split(",")[0] in CONFIG_MAPPING)


@torch.no_grad()
def build(name: str, folder: Path) -> None:
    """Saves a random model in which every weight matters: biases, norms and learnt masks are none at init."""
    config_class, settings = CONFIG_MAPPING[name.split(",")[0]], FAMILIES[name]
    nested = "text_config" in settings
    default = config_class()
    known = {} if nested else {key: size for key, size in SMALL.items() if hasattr(default, key)}
    torch.manual_seed(0)
    kind = AutoModelForImageTextToText if nested else AutoModelForCausalLM  # hub folders hold all of it
    model = kind.from_config(config_class(**(known | settings)), dtype=torch.float32)
    saved = model.state_dict(keep_vars=True)  # buffers too
    for tensor in {id(x): x for x in saved.values() if x.is_floating_point()}.values():  # tied ones once
        size = 1.5 / tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else 0.25
        tensor.add_(size * torch.randn_like(tensor))
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0  # training leaves it so, and some families set it so
    model.save_pretrained(folder)


def draw_groups() -> Groups:
    """Prompts of several lengths, each with its responses."""
    generator = torch.Generator().manual_seed(1)

    def draw(size: int) -> list[int]:
        return torch.randint(3, 301, (size,), generator=generator).tolist()

    return [(draw(prompt), [draw(size) for size in sizes]) for prompt, sizes in LENGTHS.items()]


def truth(plain: nn.Module, groups: Groups) -> Tensor:
    """Log-probs of all response tokens, by one pass for each response."""
    rows = []
    for prompt, response in ((prompt, response) for prompt, responses in groups for response in responses):
        ids = torch.tensor([prompt + response])
        logits = plain(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        logprobs = (logits / TEMPERATURE).log_softmax(-1)
        rows.append(logprobs.gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(rows)


def gradients(model: nn.Module, logprobs: Tensor) -> dict[str, Tensor]:
    """Of a weighted sum of the log-probs: a loss whose terms have both signs."""
    (logprobs * torch.linspace(-1, 2, len(logprobs))).sum().backward()
    return {name: full_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def relative_error(own: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Of the gradient as one vector; a parameter without a gradient has 0."""
    zero = torch.zeros(())
    names = own.keys() | right.keys()
    error = sum((own.get(name, zero) - right.get(name, zero)).square().sum() for name in names)
    return (error / sum(one.square().sum() for one in right.values())).sqrt().item()


def measure(name: str, folder: Path) -> Row:
    """Builds a family's model in the folder, and runs it as grpo.py and the evaluation do."""
    groups, tokenizer = draw_groups(), build_tiny_tokenizer([], 300)
    try:
        build(name, folder)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        right = truth(plain, groups)
        right_gradients = gradients(plain, right)
    except Exception as error:
        return Row(name, "skipped", f"transformers itself fails: {first_line(error)}")
    gaps: dict[str, float] = {}

    def trained(model: nn.Module) -> Tensor:
        packed = pack(groups, CPU, share_prompt=uses_shared_prefix(model))
        return token_logprobs(model, packed, TEMPERATURE)[0]

    def gap(own: Tensor, right: Tensor) -> float:
        return (own - right).abs().max().item()

    with one_rank() as ranks, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with patch.object(fsdp, "KEEP_BYTES", 0):  # layer by layer, as a model of real size
                mesh = make_mesh(ranks, "full")
                model = load_sharded(str(folder), mesh, CPU, gradient_checkpointing=True)
            packed = uses_shared_prefix(model) and model.capabilities.engine == "shared_prefix"
            logprobs = trained(model)
            gaps["sharded"] = gap(logprobs, right)
            gaps["gradient"] = relative_error(gradients(model, logprobs), right_gradients)
            prompts = [Prompt(str(i), prompt, i) for i, (prompt, _) in enumerate(groups)]
            decoding = Decoding(group_size=2, temperature=TEMPERATURE, max_new_tokens=8, batch_size=8)
            with gathered_weights(model) as policy:
                sampled = sample_groups(policy, tokenizer, prompts, decoding)
            with torch.no_grad():
                expected = truth(plain, [(group.prompt.ids, group.responses) for group in sampled])
                own = [x for group in sampled for logprobs in group.logprobs for x in logprobs]
                gaps["sampler"] = gap(torch.tensor(own), expected)
                gaps["whole"] = gap(trained(load_model(str(folder), CPU)), right)
        except ModelError as error:
            note = first_line(error).removeprefix("model: ").replace(str(folder), "…")
            return Row(name, "refused", note, gaps)
        except Exception as error:
            return Row(name, "TRACEBACK", f"{type(error).__name__}: {first_line(error)}", gaps)
    told = [str(one.message).removeprefix("model: ") for one in caught if "model: " in str(one.message)]
    reasons = [re.sub(", so .*", "", clause) for text in told for clause in text.split("; ")]
    return Row(name, "packed" if packed else "falls back", "; ".join(dict.fromkeys(reasons)), gaps)


TORCH = torch.__version__.partition("+")[0]
HEAD = f"""# Which models train right

Made by `python tests/families.py > docs/models.md`, transformers {transformers.__version__}, torch {TORCH},
in fp32 on a CPU. Every row is a small random model of a family, built from its config. The truth is
transformers' own forward pass over one prompt and response. Three things stand against it: the sharded model
that `grpo.py` trains, the whole model of an evaluation, and what the sampler says of its own samples.

- **packed**: prompts are computed once per group, and the default rollout engine samples.
- **falls back**: the same numbers, but slower: each response with its own prompt, or `generate` for rollouts.
- **refused**: a start stops with this sentence.

A start makes such a trial with the loaded model, and prints what it falls back from
(`model.find_capabilities`). It compares the mean over tokens with 1e-4 nats in fp32 and with 0.15 in 16 bits,
which hides small gaps. The column has the largest difference of a token's log-prob. Sizes are small on
purpose: a window has 8 tokens, longrope begins at 16. A real longrope model runs only where prompt and
response end before its frequencies change; elsewhere the check at the start stops it.

| family | result | largest gap in nats | note |
| --- | --- | --- | --- |"""


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(HEAD)
    for name in FAMILIES:
        row = Row(name, "skipped", f"not in transformers {transformers.__version__}")
        if name in families():
            with tempfile.TemporaryDirectory() as folder:
                row = measure(name, Path(folder))
        print(row, flush=True)


if __name__ == "__main__":
    main()
