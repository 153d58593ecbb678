"""The plan of a run: its arithmetic against measured bytes and FLOPs of a small model, and advice that
works.
"""

import dataclasses
import json
import weakref
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
from kernel import decode as engines
from kernel.attention import use_attention
from kernel.packing import pack
from model import prepare_model, token_logprobs
from ops import plan
from ops.estimate import (
    GB,
    USABLE,
    Assumptions,
    backward_work,
    cache_bytes,
    count_micro_batches,
    estimate,
    head_bytes,
    kept_activations,
    layer_activations,
    phases_of_step,
    rows_that_fit,
    shape_of,
    state_bytes,
)

# About 6 million parameters, one in six of them in embeddings and head; an MLP as wide as that of Qwen2.5-7B
# (5.3).
SIZES = dict(
    vocab_size=2048, hidden_size=256, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, head_dim=32, tie_word_embeddings=False,
)
KEYS_OF = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()
LARGE = {  # public facts of three models
    name: kind(**dict(zip(KEYS_OF, sizes)), tie_word_embeddings=False)
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
TOKENS, KEYS = GROUPS * (PROMPT + COPIES * RESPONSE), GROUPS * (PROMPT + COPIES * (PROMPT + RESPONSE))


def small_model(dtype=torch.float32, checkpointing=False, kind="qwen2"):
    torch.manual_seed(0)
    model = (
        Qwen2ForCausalLM(Qwen2Config(**SIZES)) if kind == "qwen2" else Qwen3ForCausalLM(Qwen3Config(**SIZES))
    )
    return prepare_model(model, torch.device("cpu"), checkpointing).train().to(dtype)


def packed_groups():
    group = (list(range(PROMPT)), [[7] * RESPONSE] * COPIES)
    return pack([group] * GROUPS, torch.device("cpu"))


def close(measured, expected):
    return pytest.approx(measured, rel=0.1) == expected


# --------------------------------------------------------------------------------------- measured and planned


def test_state_is_what_fsdp_and_adamw_hold():
    """fp32 weights, gradients and two moments, of which a single process holds everything."""
    start_ranks(5.0, 1)
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
    expected = state_bytes(SMALL, 1).values()
    assert all(map(close, measured, expected)), (measured, list(expected))
    assert sum(state_bytes(SMALL, 8).values()) == sum(expected) / 8


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, kv_heads", [("qwen2", 2), ("qwen2", 8), ("qwen3", 2)])
def test_activations_are_what_autograd_keeps(monkeypatch, checkpointing, dtype, kind, kv_heads):
    """Distinct storages saved in a packed forward, weights left out. The CPU's attention keeps a little more
    than planned: copies of the responses' queries and of the output, and masks.
    """
    monkeypatch.setitem(SIZES, "num_key_value_heads", kv_heads)
    model, storages = small_model(dtype, checkpointing, kind), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_logprobs(model, packed_groups(), 1.0)
    measured, compute = sum(storage.nbytes() for storage in storages.values()), dtype.itemsize
    shape = shape_of(model.config)
    expected = kept_activations(shape, TOKENS, KEYS, REPLIES, checkpointing, compute)
    expected += head_bytes(shape, REPLIES, compute)["kept"]
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


def test_the_peak_of_a_backward_is_kept_plus_one_layer_plus_its_gradients(monkeypatch):
    """What no hook of autograd sees: gradients on their way. A small vocabulary keeps the head out of it."""
    monkeypatch.setitem(SIZES, "vocab_size", 256)
    model = small_model(torch.bfloat16, checkpointing=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    packed = packed_groups()
    live = Live([*model.parameters(), *(p.grad for p in model.parameters())])
    with live:
        token_logprobs(model, packed, 1.0)[0].sum().backward()
    shape = shape_of(model.config)
    kept = kept_activations(shape, TOKENS, KEYS, REPLIES, checkpointing=True)
    expected = kept + layer_activations(shape, TOKENS, KEYS) + backward_work(shape, TOKENS)
    assert close(live.most, expected), live.most / expected


def test_cache_holds_each_prompt_once_and_grows_by_half():
    model, copies = small_model(), 4
    prompts = [engines.Prompt(str(i), list(range(PROMPT))) for i in range(GROUPS)]
    with torch.no_grad():
        cache, _ = engines._prefill(model, prompts, copies)
    for response in (1, 64, 65, 300):
        while len(cache.own_mask) < response:
            engines._make_room(cache)
        measured = sum(x.nbytes for part in (cache.prompt_k, cache.prompt_v, cache.k, cache.v) for x in part)
        assert measured == cache_bytes(SMALL, GROUPS, copies, PROMPT, response, compute=4)


def test_rows_that_fit_are_those_of_the_engine(monkeypatch):
    """The plan and the engine must not come apart: the same formula, there on a GPU's free memory."""
    weight = SimpleNamespace(device=torch.device("cuda"))
    config = LARGE["8B"]
    model = SimpleNamespace(config=config, get_output_embeddings=lambda: SimpleNamespace(weight=weight))
    for name, value in dict(
        mem_get_info=(30 * 10**9, 0), memory_reserved=5 * 10**9, memory_allocated=2 * 10**9
    ).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for prompt, copies, new in ((1000, 5, 8192), (300, 1, 100)):
        expected = rows_that_fit(SHAPES["8B"], 33e9, prompt, copies, new)
        assert engines.rows_that_fit(model, prompt, copies, new) == expected > 100


def test_flops_are_those_of_the_matrix_products():
    """One forward pass, counted by torch: of the products outside the attention, whose counter knows no
    masks.
    """
    model, config = (
        small_model(),
        settings(prompts_per_step=GROUPS, minibatch_prompts=GROUPS, group_size=COPIES),
    )
    use_attention(model, "generate")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(TOKENS)[None] % 100, use_cache=False, logits_to_keep=REPLIES)
    products = sum(
        n for name, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(name)
    )
    phases = phases_of_step(config, SMALL, lengths(1, prompt_tokens=PROMPT, response_tokens=RESPONSE), 12)
    flops = {phase.name: phase.flops for phase in phases}
    assert close(products, flops["reference"]), products / flops["reference"]
    assert flops["prefill"] + flops["decode"] == pytest.approx(flops["reference"], rel=0.01)
    head = 2 * REPLIES * SMALL.vocab * SMALL.hidden
    assert flops["update"] == pytest.approx(
        4 * flops["reference"] - head
    )  # a head of one chunk is not computed again
    # the attention's part: two products of [tokens, heads x size], for every pair that is not masked
    pairs = GROUPS * sum([*range(1, PROMPT + 1), *[PROMPT + i for i in range(1, RESPONSE + 1)] * COPIES])
    attention = 4 * pairs * SMALL.hidden * SMALL.layers
    assert flops["reference"] - products == pytest.approx(
        attention, rel=1e-4
    )  # some versions multiply rotary angles too


# ------------------------------------------------------------------------------------------------ real models


def settings(**changes):
    """The paper's settings, with micro-batches of 16384 tokens."""
    return Config(**changes)


def lengths(gpus=8, **changes):
    return Assumptions(gpus=gpus, **changes)


@pytest.mark.parametrize("name, billions, kib", [("7B", 7.616, 56), ("8B", 8.030, 128), ("14B", 14.770, 192)])
def test_sizes_of_known_models(name, billions, kib):
    shape = SHAPES[name]
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.001)
    assert shape.root == 2 * shape.vocab * shape.hidden + shape.hidden
    assert estimate(settings(), shape, lengths()).kv_per_token == kib * 1024


def test_a_tied_head_counts_once_and_is_still_multiplied():
    tied = shape_of(Qwen2Config(**SIZES | {"tie_word_embeddings": True}))
    assert SMALL.root - tied.root == SMALL.vocab * SMALL.hidden
    config = settings(prompts_per_step=8, minibatch_prompts=8)
    both = [phases_of_step(config, shape, lengths(), 10) for shape in (tied, SMALL)]
    assert [phase.flops for phase in both[0]] == [phase.flops for phase in both[1]]


@pytest.mark.parametrize("name, train, rollout", [("7B", 33, 29), ("8B", 35, 30), ("14B", 60, 55)])
def test_memory_on_8_gpus_is_near_the_table_by_hand(name, train, rollout):
    """A rougher table had these GB: without the CUDA context, fp32 copies of norms."""
    moments = estimate(settings(), SHAPES[name], lengths()).moments
    left_out = ("CUDA and NCCL",)
    update, others = moments["layers"], sum(moments["layers"][part] for part in left_out)
    assert sum(update.values()) - others == pytest.approx(train * GB, rel=0.12)
    left_out = (*left_out, "keys and values", "prefill or sampling")
    before_kv = {part: size for part, size in moments["rollout"].items() if part not in left_out}
    assert sum(before_kv.values()) == pytest.approx(rollout * GB, rel=0.05)


def test_settings_move_the_parts_they_are_for():
    base, shape = estimate(settings(), SHAPES["7B"], lengths()), SHAPES["7B"]
    offloaded = estimate(settings(offload_optimizer=True), shape, lengths())
    assert base.moments["layers"].keys() - offloaded.moments["layers"].keys() == state_bytes(shape, 8).keys()
    assert offloaded.host_memory == 16 * shape.parameters
    low = estimate(settings(low_memory=True), shape, lengths())
    assert low.host_memory == 18 * shape.parameters and low.kv_budget > base.kv_budget
    without = estimate(settings(kl_coef=0.0), shape, lengths())
    gone = base.moments["rollout"].keys() - without.moments["rollout"].keys()
    assert gone == {"reference, bf16"}
    assert "reference" not in [phase.name for phase in without.phases]
    nodes = lengths(16)
    inside = estimate(settings(sharding="hsdp"), shape, nodes).moments["layers"]["AdamW"]
    assert (
        inside
        == 2 * estimate(settings(), shape, nodes).moments["layers"]["AdamW"]
        == base.moments["layers"]["AdamW"]
    )


def test_traffic_is_what_each_phase_must_move():
    """24 micro-batches a step: the weights come twice for each, 2 bytes a parameter, and gradients go, 4
    bytes.
    """
    shape, weights = SHAPES["7B"], SHAPES["7B"].parameters

    def phases(a, **changes):
        return {phase.name: phase for phase in phases_of_step(settings(**changes), shape, a, 320)}

    plain = phases(lengths())
    assert plain["update"].network == pytest.approx(24 * 7 / 8 * 8 * weights) and plain["update"].between == 0
    assert plain["update"].flops == pytest.approx(
        4 * plain["reference"].flops
    )  # layers for checkpointing, head by chunks
    assert plain["update"].host == plain["reference"].host == 0
    crossing = phases(lengths(16))["update"]
    assert crossing.network == 0 and crossing.between == pytest.approx(12 * 15 / 16 * 8 * weights)
    inside = phases(lengths(16), sharding="hsdp")["update"]
    assert inside.network == pytest.approx(12 * 7 / 8 * 8 * weights)
    assert inside.between == pytest.approx(
        12 * 4 * weights / 8
    )  # an all-reduce of a shard between two machines
    low = phases(lengths(), low_memory=True)
    assert low["update"].host == pytest.approx(24 * 3 * 4 * weights / 8)
    assert low["reference"].host == pytest.approx(24 * 2 * weights / 8) and low["optimizer"].memory == 0

    # 640 sequences of a GPU in 2 batches: at every token the weights, each prompt once, and all responses so
    # far
    used, kv = 2 * (shape.matrices * 28 + shape.vocab * shape.hidden), 56 * 1024
    read = sum(2 * (used + kv * (64 * 1000 + 320 * (token + 0.5))) for token in range(300))
    assert plain["decode"].memory == pytest.approx(read)
    assert plain["decode"].seconds(lengths())["memory"] == pytest.approx(read / 3350e9)


def test_groups_larger_than_the_micro_batch_repeat_their_prompt():
    config = settings(max_tokens_per_micro_batch=1700, minibatch_prompts=8, prompts_per_step=8)
    assert count_micro_batches(config, lengths()) == (3, 3)  # 1000 + 2 x 300 tokens: 2 + 2 + 1 responses
    assert count_micro_batches(settings(), lengths()) == (6, 1)  # 32 groups of 2500 tokens, 6 at a time
    split, whole = (
        {phase.name: phase.flops for phase in phases_of_step(each, SHAPES["7B"], lengths(), 40)}
        for each in (config, settings(minibatch_prompts=8, prompts_per_step=8))
    )
    assert split["reference"] > whole["reference"] and split["decode"] == whole["decode"]


# ----------------------------------------------------------------------------------------------------- advice


@pytest.mark.parametrize(
    "name, changes, gpus, advised",
    [
        ("7B", {"gradient_checkpointing": False}, 8, {"gradient_checkpointing"}),
        ("7B", {"max_tokens_per_micro_batch": 262144}, 8, {"max_tokens_per_micro_batch"}),
        ("7B", {}, 1, {"low_memory"}),
        ("14B", {"sharding": "hsdp"}, 16, {"sharding"}),
        ("7B", {"max_tokens_per_micro_batch": 262144, "gradient_checkpointing": False}, 2, None),
    ],
)
def test_following_the_advice_makes_it_fit(name, changes, gpus, advised):
    config, a, shape = (
        settings(**changes),
        lengths(gpus, gpus_per_node=min(gpus, 8) if gpus < 16 else 4),
        SHAPES[name],
    )
    line = plan.verdict(config, shape, a)
    found, more = plan.advise(config, shape, a)
    assert line.startswith("does not fit") and "\n" not in line
    assert found and all(f"{key} {str(value).lower()}" in line for key, value in found.items())
    assert advised is None or found.keys() == advised
    assert plan.verdict(settings(**changes | found), shape, a).startswith("fits")
    if "max_tokens_per_micro_batch" in found:  # and it is the largest
        larger = found | {"max_tokens_per_micro_batch": found["max_tokens_per_micro_batch"] + plan.STEP}
        assert not plan.fits(estimate(settings(**changes | larger), shape, a), a)
    if more:
        assert f"take {more} GPUs" in line and more <= 8 * gpus
        assert plan.verdict(config, shape, dataclasses.replace(a, gpus=more)).startswith("fits")


def test_gpus_that_are_too_small_for_everything_are_said_to_be():
    """14B in bf16 is 29.5 GB on every GPU during the rollout, whatever the settings."""
    size = int(
        plan.verdict(settings(), SHAPES["14B"], lengths(gpu_memory=24.0))
        .split("take GPUs of ")[1]
        .split(" GB")[0]
    )
    assert 31 < size < 50
    low = settings(low_memory=True, max_tokens_per_micro_batch=12288)
    fitting = [
        plan.verdict(low, SHAPES["14B"], lengths(8, gpu_memory=gb)).startswith("fits")
        for gb in (size, size - 2.0)
    ]
    assert fitting == [True, False]


def test_a_rollout_batch_that_is_too_large_is_named():
    """No reason not to fit: the engine takes fewer at once."""
    line = plan.verdict(settings(rollout_batch_size=5000, prompts_per_step=8192), SHAPES["7B"], lengths())
    rows = int(line.split("rollout_batch_size ")[1].split()[0])
    assert line.startswith("fits") and 200 < rows < 1000
    assert "rollout_batch_size" not in plan.verdict(
        settings(rollout_batch_size=rows), SHAPES["7B"], lengths()
    )


def test_peak_leaves_room_for_the_allocator():
    """A GPU whose memory the plan would fill to the last byte is too small."""
    update = sum(estimate(settings(), SHAPES["7B"], lengths()).moments["layers"].values()) / GB
    assert plan.verdict(settings(), SHAPES["7B"], lengths(gpu_memory=update / USABLE - 0.5)).startswith(
        "does not fit"
    )


# ----------------------------------------------------------------------------------------------- command line


def test_main_needs_a_config_json_only(tmp_path, capsys):
    (tmp_path / "config.json").write_text(LARGE["7B"].to_json_string())
    plan.main(["--model", str(tmp_path), "--gpus=8", "--examples", "64000"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("7.62B parameters on 8 x 80 GB") and lines[-1].startswith("fits: ")
    assert any(line.startswith("epoch") and "62.5 steps" in line for line in lines)
    assert sum(line.startswith(("fits", "does not fit")) for line in lines) == 1


def test_tiny_and_generated_data_are_planned_too(capsys):
    plan.main("--model tiny --data synthetic --gpus 3".split())
    assert "1,000 prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--gpus", "none"], "gpus must be a whole number above 0, not 'none'"),
        (["--gpus", "2.5"], "gpus"),
        (["--gpu_memory", "-1"], "gpu_memory"),
        (["--gpu_memory"], "gpu_memory"),
        (["--efficiency", "nan"], "efficiency"),
        (["--efficiency", "45"], "efficiency must be a share"),
        (["--gpus", "12"], "gpus (12) must be a multiple of gpus_per_node (8)"),
        (["--response_tokens", "9000"], "max_response_tokens"),
        (["--gpu", "4"], "unknown setting 'gpu'"),
    ],
)
def test_bad_values_are_refused(arguments, part):
    with pytest.raises(ConfigError) as error:
        plan.main(["--model", "tiny", *arguments])
    assert part in str(error.value) and "\n" not in str(error.value)


def test_models_that_cannot_be_planned_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="give a folder with a config.json"):
        plan.main(["--model", str(tmp_path)])
    for kind in ({"model_type": "mixtral", "num_local_experts": 8}, {"model_type": "t5"}):
        (tmp_path / "config.json").write_text(json.dumps(kind | {"max_position_embeddings": 32768}))
        with pytest.raises(ConfigError, match="^plan: "):
            plan.main(["--model", str(tmp_path)])
