"""The plan of a run: its arithmetic against measured bytes and FLOPs of a small model, and advice that works."""

import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from config import Config, ConfigError
from distributed.ranks import start_ranks
from kernel import decode
from kernel.attention import use_attention
from kernel.packing import pack
from model import prepare_model, token_logprobs
from ops import plan
from ops.plan import GB, Assumptions, cache_bytes, estimate, peak, shape_of, step, update_bytes, verdict

# About 11 million parameters; an MLP as wide, for its hidden size, as that of Qwen2.5-7B.
SIZES = dict(
    vocab_size=2048, hidden_size=256, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=2, head_dim=32, tie_word_embeddings=False,
)
KEYS = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()
LARGE = {  # public facts of three models
    name: kind(**dict(zip(KEYS, sizes)), tie_word_embeddings=False)
    for name, kind, sizes in [
        ("7B", Qwen2Config, (3584, 18944, 28, 28, 4, 152064)),
        ("8B", LlamaConfig, (4096, 14336, 32, 32, 8, 128256)),
        ("14B", Qwen2Config, (5120, 13824, 48, 40, 8, 152064)),
    ]
}
SHAPES = {name: shape_of(config) for name, config in LARGE.items()}
SMALL = shape_of(Qwen2Config(**SIZES))
PROMPT, RESPONSE, COPIES, GROUPS = 200, 40, 4, 3
REPLIES = GROUPS * COPIES * RESPONSE
TOKENS = GROUPS * (PROMPT + COPIES * RESPONSE)
# A single micro-batch that packed_groups() fills, on one GPU.
PACKED = Config(
    prompts_per_step=GROUPS, minibatch_prompts=GROUPS, group_size=COPIES, max_prompt_tokens=PROMPT,
    max_response_tokens=RESPONSE, max_tokens_per_micro_batch=TOKENS,
)
ONE_GPU = Assumptions(gpus=1, prompt_tokens=PROMPT, response_tokens=RESPONSE)
PAPER, EIGHT = Config(), Assumptions()


def small_model(dtype=torch.float32, checkpointing=False, kind="qwen2", **sizes):
    torch.manual_seed(0)
    sizes = SIZES | sizes
    model = Qwen2ForCausalLM(Qwen2Config(**sizes)) if kind == "qwen2" else Qwen3ForCausalLM(Qwen3Config(**sizes))
    return prepare_model(model, torch.device("cpu"), checkpointing).train().to(dtype)


def packed_groups():
    return pack([(list(range(PROMPT)), [[7] * RESPONSE] * COPIES)] * GROUPS, torch.device("cpu"))


def close(measured, expected):
    return pytest.approx(measured, rel=0.1) == expected


# --------------------------------------------------------------------------------------- measured and planned


def test_state_is_what_fsdp_and_adamw_hold():
    """fp32 weights, gradients and two moments, of which a single process holds everything."""
    start_ranks(5.0)
    try:
        model = small_model()
        use_attention(model, "generate")
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.arange(20)[None]).logits.sum().backward()
        optimizer.step()

        def held(tensors):  # the gradients of a layer share one storage
            storages = [x.to_local().untyped_storage() for x in tensors]
            return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

        moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
        measured = [held(model.parameters()), held(p.grad for p in model.parameters()), held(moments)]
    finally:
        dist.destroy_process_group()
    one, eight = (estimate(PACKED, SMALL, replace(ONE_GPU, gpus=n))[0]["update"] for n in (1, 8))
    names = ("weights, fp32", "gradients, fp32", "AdamW")
    assert all(close(size, one[name]) for size, name in zip(measured, names)), measured
    assert all(eight[name] == one[name] / 8 for name in names)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind, kv_heads", [("qwen2", 2), ("qwen2", 8), ("qwen3", 2)])
def test_activations_are_what_autograd_keeps(checkpointing, kind, kv_heads):
    """Distinct storages saved in a packed forward pass, weights left out."""
    model, storages = small_model(torch.bfloat16, checkpointing, kind, num_key_value_heads=kv_heads), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_logprobs(model, packed_groups(), 1.0)
    measured = sum(storage.nbytes() for storage in storages.values())
    config = replace(PACKED, gradient_checkpointing=checkpointing)
    expected = update_bytes(config, shape_of(model.config), ONE_GPU)["activations"]
    assert close(measured, expected), measured / expected


class Live(TorchDispatchMode):
    """Counts the bytes of living storages, and their most."""

    def __init__(self, known):
        super().__init__()
        self.sizes = {x.untyped_storage()._cdata: 0 for x in known}
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]:
            key = storage._cdata
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, key)
        self.most = max(self.most, self.now)
        return out

    def forget(self, key):
        self.now -= self.sizes.pop(key)


def test_the_peak_of_a_backward_is_what_is_kept_and_one_layer_at_work():
    """What no hook of autograd sees: gradients on their way. A small vocabulary keeps the head out of it."""
    model = small_model(torch.bfloat16, checkpointing=True, vocab_size=256)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    packed = packed_groups()
    live = Live([*model.parameters(), *(p.grad for p in model.parameters())])
    with live:
        token_logprobs(model, packed, 1.0)[0].sum().backward()
    shape = shape_of(model.config)
    parts = update_bytes(PACKED, shape, ONE_GPU)
    of_fsdp = 16 * shape.of_layer + 2 * shape.vocab * shape.hidden  # gathered weights and gradients: not here
    expected = parts["activations"] + parts["backward"] - of_fsdp
    assert close(live.most, expected), live.most / expected


def test_the_cache_holds_each_prompt_once_and_grows_by_half():
    model, copies = small_model(), 4
    prompts = [decode.Prompt(str(i), list(range(PROMPT))) for i in range(GROUPS)]
    with torch.no_grad():
        cache, _ = decode._prefill(model, prompts, copies)
    for response in (1, 64, 65, 300):
        while len(cache.own_mask) < response:
            decode._make_room(cache)
        measured = sum(x.nbytes for part in (cache.prompt_k, cache.prompt_v, cache.k, cache.v) for x in part)
        assert measured == 2 * cache_bytes(SMALL, GROUPS, copies, PROMPT, response), "fp32 here, planned in bf16"


def test_sequences_decoded_at_once_are_those_of_the_engine(monkeypatch):
    """The plan and the engine must not come apart: the same formula, there on a GPU's free memory."""
    weight = SimpleNamespace(device=torch.device("cuda"))
    model = SimpleNamespace(config=LARGE["14B"], get_output_embeddings=lambda: SimpleNamespace(weight=weight))
    config = replace(PAPER, rollout_batch_size=10**6)
    moments, rows = estimate(config, SHAPES["14B"], EIGHT)
    held = ("gradients, fp32", "embeddings and head, bf16", "activations", "backward")
    static = sum(size for name, size in moments["update"].items() if name not in held)
    free = int(80 * GB - static - moments["rollout"]["whole policy, bf16"])
    for name, value in dict(mem_get_info=(free, 0), memory_reserved=0, memory_allocated=0).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert rows == decode.rows_that_fit(model, 1000, 5, config.max_response_tokens) // 5 * 5 > 50


def test_flops_are_those_of_the_matrix_products():
    """A forward pass counted by torch, but for the attention, whose counter knows no masks."""
    model = small_model()
    use_attention(model, "generate")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(TOKENS)[None] % 100, use_cache=False, logits_to_keep=REPLIES)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for name, n in counts.items() if "attention" not in str(name))
    flops = {name: n for name, (n, _) in step(PACKED, SMALL, ONE_GPU).items()}
    # Two products of [tokens, heads x size] for every pair that is not masked.
    pairs = GROUPS * sum([*range(1, PROMPT + 1), *[PROMPT + i for i in range(1, RESPONSE + 1)] * COPIES])
    attention = 4 * pairs * SMALL.hidden * SMALL.layers
    assert flops["reference"] == pytest.approx(products + attention, rel=0.01)
    assert flops["prefill"] + flops["decode"] == pytest.approx(flops["reference"], rel=0.01)
    assert flops["update"] == pytest.approx(4 * flops["reference"]), "forward, backward, and forward again"


# -------------------------------------------------------------------------------------- real models, advice


@pytest.mark.parametrize(
    "name, billions, kib, update, rollout",
    [("7B", 7.616, 56, 34.6, 43.7), ("8B", 8.030, 128, 35.8, 51.0), ("14B", 14.770, 192, 57.6, 65.9)],
)
def test_sizes_of_known_models_on_8_gpus(name, billions, kib, update, rollout):
    shape, sums = SHAPES[name], []
    for parts in estimate(PAPER, shape, EIGHT)[0].values():
        sums.append(sum(parts.values()) / GB)
    assert (shape.parameters / 1e9, shape.kv_bytes / 1024) == pytest.approx((billions, kib), abs=0.001)
    assert sums == pytest.approx([update, rollout], abs=0.05)


def test_settings_move_the_parts_they_are_for():
    def parts(gpus=8, moment="update", **changes):
        return estimate(replace(PAPER, **changes), SHAPES["7B"], replace(EIGHT, gpus=gpus))[0][moment]

    state = {"weights, fp32", "gradients, fp32", "AdamW"}
    assert parts().keys() - parts(offload="reference").keys() == {"reference, bf16"}
    assert parts().keys() - parts(offload="all").keys() == state | {"reference, bf16"}
    assert parts().keys() - parts(kl_coef=0.0).keys() == {"reference, bf16"}
    assert parts(16, sharding="hsdp")["AdamW"] == 2 * parts(16)["AdamW"] == parts()["AdamW"]
    assert parts().keys() - parts(moment="rollout").keys() >= {"gradients, fp32"}, "they are None by then"


def test_decoding_reads_the_weights_for_every_token():
    """640 sequences of a GPU in 3 batches: per token the weights, each prompt once, all responses so far."""
    shape, a = SHAPES["7B"], replace(EIGHT, gpu_tflops=1e9)  # no arithmetic
    used = 2 * (shape.of_layer * 28 + shape.vocab * shape.hidden)
    read = sum(3 * used + shape.kv_bytes * (128 * 1000 + 640 * (token + 0.5)) for token in range(300))
    assert step(PAPER, shape, a)["decode"][1] == pytest.approx(read / 3350e9)


@pytest.mark.parametrize(
    "name, changes, a, advised",
    [
        ("7B", {"gradient_checkpointing": False}, EIGHT, "gradient_checkpointing true"),
        ("7B", {"max_tokens_per_micro_batch": 262144}, EIGHT, "max_tokens_per_micro_batch 12288"),
        ("7B", {}, Assumptions(gpus=1), "offload all"),
        ("14B", {"sharding": "hsdp"}, Assumptions(gpus=16, gpus_per_node=4), "sharding full"),
    ],
)
def test_following_the_advice_makes_it_fit(name, changes, a, advised):
    config = replace(PAPER, **changes)
    line = verdict(config, SHAPES[name], a)
    assert line.startswith("does not fit") and f"; set {advised}" in line
    key, value = advised.split()
    value = {"true": True}.get(value, int(value) if value.isdigit() else value)
    assert verdict(replace(config, **{key: value}), SHAPES[name], a).startswith("fits")
    if "take" in line:
        more = replace(a, gpus=int(line.split("take ")[1].split()[0]))
        assert verdict(config, SHAPES[name], more).startswith("fits")


def test_a_gpu_that_would_be_filled_to_the_last_byte_is_too_small():
    enough = peak(PAPER, SHAPES["7B"], EIGHT) / GB / plan.USABLE
    small = Assumptions(gpu_memory=24.0)
    assert verdict(PAPER, SHAPES["14B"], small).endswith("take larger GPUs or a smaller model")
    assert enough < 80


def test_main_needs_a_config_json_only(tmp_path, capsys):
    (tmp_path / "config.json").write_text(LARGE["7B"].to_json_string())
    plan.main(["--model", str(tmp_path), "--gpus=8"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("7.62B parameters on 8 x 80 GB")
    assert sum(line.startswith("fits: ") for line in lines) == 1
    plan.main("--model tiny --gpus 3 --max_prompt_tokens 400".split())
    with pytest.raises(ConfigError, match="unknown setting 'gpu'"):
        plan.main(["--model", "tiny", "--gpu", "4"])
    for kind in ({"model_type": "mixtral", "num_local_experts": 8}, {"model_type": "t5"}):
        (tmp_path / "config.json").write_text(json.dumps(kind))
        with pytest.raises(ConfigError, match="^plan: "):
            plan.main(["--model", str(tmp_path)])
