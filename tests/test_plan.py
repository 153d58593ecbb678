"""The plan of a run: its arithmetic against measured bytes and FLOPs of a small model, and its advice."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from config import Config, ConfigError, load_config
from distributed.fsdp import full_tensor
from distributed.ranks import start_ranks
from kernel import decode, grid
from kernel.attention import use_attention
from kernel.lora import add_adapters
from kernel.packing import pack
from model import prepare_model, token_logprobs
from ops import plan
from ops.plan import GB, Assumptions, estimate, shape_of, start_config, step, verdict


def sizes(hidden, intermediate, layers, heads, kv_heads, vocabulary):
    return dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, vocab_size=vocabulary,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads,
        tie_word_embeddings=False,
    )


SIZES = sizes(256, 1376, 8, 8, 2, 2048)  # the MLP as wide for its hidden size as that of Qwen2.5-7B
LARGE = {size: start_config(Config(model=f"Qwen/Qwen2.5-{size}-Instruct")) for size in ("7B", "14B")}
SHAPES = {name: shape_of(config, Config()) for name, config in LARGE.items()}
SMALL = shape_of(Qwen2Config(**SIZES), Config())
PROMPT, RESPONSE, COPIES, GROUPS = 200, 40, 4, 3
REPLIES, TOKENS = GROUPS * COPIES * RESPONSE, GROUPS * (PROMPT + COPIES * RESPONSE)
MICRO_BATCH = pack([(list(range(PROMPT)), [[7] * RESPONSE] * COPIES)] * GROUPS, torch.device("cpu"))
PACKED = Config(  # of which an update on one GPU is that micro-batch
    prompts_per_step=GROUPS, minibatch_prompts=GROUPS, group_size=COPIES, max_prompt_tokens=PROMPT,
    max_response_tokens=RESPONSE, max_tokens_per_micro_batch=TOKENS,
)
ONE_GPU = Assumptions(gpus=1, prompt_tokens=PROMPT, response_tokens=RESPONSE)
PAPER, EIGHT = Config(), Assumptions()


def small_model(dtype=torch.float32, checkpointing=False, kind=Qwen2Config, rank=0, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SIZES | changes))
    model = prepare_model(model, torch.device("cpu"), checkpointing).train().to(dtype)
    if rank:
        add_adapters(model, rank, 8.0, "", 0, torch.device("cpu"))
    return model


@pytest.mark.parametrize("rank", [0, 4])
def test_state_is_what_fsdp_and_adamw_hold(rank):
    """fp32 weights, gradients and two moments, of which a single process holds everything. With LoRA those of
    the adapters, and the frozen weights in bf16.
    """
    start_ranks(5.0)
    try:
        model = small_model(torch.bfloat16 if rank else torch.float32)
        use_attention(model, "generate")
        for part in (*model.model.layers, model):
            fully_shard(part)
        if rank:
            add_adapters(model, rank, 8.0, "", 0, torch.device("cpu"))
        frozen = [p for p in model.parameters() if not p.requires_grad]
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        model(torch.arange(20)[None]).logits.sum().backward()
        optimizer.step()
        moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
        kinds = (frozen, trained, [p.grad for p in model.parameters() if p.grad is not None], moments)
        measured = [sum(full_tensor(x).nbytes for x in kind) for kind in kinds]
    finally:
        dist.destroy_process_group()
    config = replace(PACKED, kl_coef=0.0, lora_rank=rank)
    planned = estimate(config, SMALL, ONE_GPU)[0]["update"]
    names = ("frozen weights, bf16", "trained weights, fp32", "gradients, fp32", "AdamW")
    assert measured == pytest.approx([planned[name] for name in names], rel=1e-3)


@pytest.mark.parametrize("kind, kv_heads, checkpointing, rank", [
    (Qwen2Config, 2, True, 0), (Qwen2Config, 8, False, 0), (Qwen3Config, 2, False, 0),
    (Qwen2Config, 2, False, 4),
])
def test_activations_are_what_autograd_keeps(kind, kv_heads, checkpointing, rank):
    """Distinct storages saved in a packed forward pass, weights left out."""
    model = small_model(torch.bfloat16, checkpointing, kind, rank, num_key_value_heads=kv_heads)
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_logprobs(model, MICRO_BATCH, 1.0)
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    config = replace(PACKED, gradient_checkpointing=checkpointing, lora_rank=rank)
    expected = plan.update_bytes(config, shape_of(model.config, config), ONE_GPU)["activations"]
    assert sum(storage.nbytes() for storage in storages.values()) == pytest.approx(expected, rel=0.1)


def test_the_cache_holds_each_prompt_once_and_grows_by_half():
    batch = grid.make_batch(small_model(), GROUPS, COPIES, PROMPT, 1000)
    for response in (1, 64, 65, 300):
        while batch.shape[-1] < response:
            grid.make_room(batch, 1000)
        kept = (batch.prompt_k, batch.prompt_v, batch.k, batch.v)
        measured = sum(x.nbytes for part in kept for x in part)
        assert measured == 2 * plan.cache_bytes(SMALL, GROUPS, COPIES, PROMPT, response), "fp32 here"


def test_sequences_decoded_at_once_are_those_of_the_engine(monkeypatch):
    """The plan and the engine must not come apart: the same formula, there on a GPU's free memory."""
    config, device = LARGE["14B"], torch.device("cuda")
    embeddings = SimpleNamespace(weight=torch.empty(config.vocab_size, 0))
    model = SimpleNamespace(
        config=config, parameters=lambda: iter([SimpleNamespace(device=device)]),
        get_input_embeddings=lambda: embeddings,
    )
    moments, rows = estimate(PAPER, SHAPES["14B"], EIGHT)
    free = int(80 * GB - sum(list(moments["rollout"].values())[:-2]))  # all but K/V and prefill
    for name, value in dict(mem_get_info=(free, 0), memory_reserved=0, memory_allocated=0).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert 250 > decode.rows_that_fit(model, 1000, 5, decode.PASS_TOKENS) // 5 * 5 == rows > 50


def test_flops_are_those_of_the_matrix_products():
    """A forward pass counted by torch, but for the attention, whose counter knows no masks."""
    model = small_model()
    use_attention(model, "generate")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(TOKENS)[None] % 100, use_cache=False, logits_to_keep=REPLIES)
    counts = counter.get_flop_counts()["Global"].items()
    # Two products of [tokens, heads x size] for every pair that is not masked.
    pairs = GROUPS * sum([*range(1, PROMPT + 1), *[PROMPT + i for i in range(1, RESPONSE + 1)] * COPIES])
    forward = sum(n for name, n in counts if "attention" not in str(name)) + 4 * pairs * 256 * 8
    flops = {name: n for name, (n, _) in step(PACKED, SMALL, ONE_GPU).items()}
    assert flops["reference"] == pytest.approx(forward, rel=0.01)
    assert flops["prefill"] + flops["decode"] == pytest.approx(forward, rel=0.01)
    assert flops["update"] == pytest.approx(4 * forward, rel=0.01), "forward, backward, and forward again"
    twice = step(replace(PACKED, num_iterations=2), SMALL, ONE_GPU)
    assert twice["update"][0] == 2 * flops["update"] and twice["reference"][0] == flops["reference"]


@pytest.mark.parametrize("rank, forwards", [(0, 3), (1, 2)])
def test_a_backward_makes_no_gradients_of_frozen_weights(rank, forwards):
    """Forward and backward, counted by torch without the attention, and the plan's, which recomputes."""
    model, counts = small_model(rank=rank), []
    use_attention(model, "generate")
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            logits = model(torch.arange(1, 65)[None], use_cache=False).logits
            if backward:
                logits.sum().backward()
        own = counter.get_flop_counts()["Global"].items()
        counts.append(sum(n for name, n in own if "attention" not in str(name)))
    assert counts[1] / counts[0] == pytest.approx(forwards, rel=0.02)
    flops = step(replace(PACKED, lora_rank=rank), SMALL, ONE_GPU)
    assert flops["update"][0] / flops["reference"][0] == pytest.approx(forwards + 1, rel=0.01)


def test_a_larger_reference_counts_at_its_size():
    words = ["--config", str(ROOT / "configs/qwen2.5-0.5b.yaml"), "--reference", "Qwen/Qwen2.5-7B-Instruct"]
    config = load_config(words)
    shape = shape_of(start_config(config), config)
    assert shape.reference == SHAPES["7B"].parameters > 10 * shape.parameters
    frozen = estimate(config, shape, Assumptions(gpus=2))[0]["update"]["frozen weights, bf16"]
    assert frozen == 2 * shape.reference / 2
    forward, reference = (step(config, shape, ONE_GPU)[name][0] for name in ("old_logprobs", "reference"))
    assert reference / forward == pytest.approx(shape.reference / shape.parameters)


@pytest.mark.parametrize("name, adapters, gigabytes", [
    ("7B", 80_740_352, [35.7, 52.0]), ("14B", 137_625_600, [59.2, 70.5]),
])
def test_lora_on_one_gpu(name, adapters, gigabytes):
    """By hand: rank x (inputs + outputs) of seven linear layers, 28 or 48 times; frozen weights once in bf16,
    which are the reference too, and beside them the copy that the rollout gathers.
    """
    shape, config = SHAPES[name], load_config(["--config", str(ROOT / "configs/qwen2.5-7b-lora.yaml")])
    one = Assumptions(gpus=1)
    moments = estimate(config, shape, one)[0]
    frozen = 2 * shape.parameters
    assert 32 * shape.adapters == adapters and moments["rollout"]["frozen weights, bf16"] == frozen
    assert moments["rollout"]["whole policy, bf16"] == frozen
    sizes = [moments["update"][key] for key in ("trained weights, fp32", "gradients, fp32", "AdamW")]
    assert sizes == [4 * adapters, 4 * adapters, 8 * adapters]
    assert [sum(parts.values()) / GB for parts in moments.values()] == pytest.approx(gigabytes, abs=0.05)
    assert verdict(config, shape, one).startswith("fits")
    other = estimate(replace(config, reference="elsewhere"), shape, one)[0]["update"]
    assert other["frozen weights, bf16"] == 2 * frozen
    queries = shape_of(LARGE[name], replace(config, lora_targets="q_proj, o_proj"))
    assert queries.adapters == 4 * shape.layers * shape.hidden
    with pytest.raises(ConfigError, match="no linear layer is called q"):
        shape_of(LARGE[name], replace(config, lora_targets="q"))


@pytest.mark.parametrize("name, billions, kib, update, rollout", [
    ("7B", 7.616, 56, 34.6, 41.5), ("14B", 14.770, 192, 57.6, 67.3),
])
def test_known_models_on_8_gpus(name, billions, kib, update, rollout):
    shape = SHAPES[name]
    gigabytes = [sum(parts.values()) / GB for parts in estimate(PAPER, shape, EIGHT)[0].values()]
    assert (shape.parameters / 1e9, shape.kv_bytes / 1024) == pytest.approx((billions, kib), abs=0.001)
    assert gigabytes == pytest.approx([update, rollout], abs=0.05)


def test_every_config_of_ours_is_planned_without_a_network(monkeypatch):
    """Its sizes come from a table, with the parameters that are published; one asks for a run's own model."""
    published = {"0.5B": 0.494, "1.5B": 1.544, "3B": 3.086, "7B": 7.616, "14B": 14.77, "8B": 8.03}
    published |= {"135M": 0.1345, "tiny": 0}
    monkeypatch.setattr("ops.plan.model_config", lambda *given: pytest.fail(f"asked the hub for {given}"))
    for path in ROOT.glob("configs/**/*.yaml"):
        config = load_config(["--config", str(path)])
        size = re.search(r"[\d.]+[BM]|tiny|$", config.model)[0] or "7B"
        parameters = shape_of(start_config(config), config).parameters
        assert parameters / 1e9 == pytest.approx(published[size], abs=5e-4)


@pytest.mark.parametrize("name, changes, a, advice", [
    ("7B", {"gradient_checkpointing": False}, EIGHT, {"gradient_checkpointing": True}),
    ("7B", {}, Assumptions(gpus=1), {"offload": "all"}), ("7B", {}, Assumptions(gpus=1), {"lora_rank": 32}),
    ("14B", {"sharding": "hsdp"}, Assumptions(gpus=16, gpus_per_node=4), {"sharding": "full"}),
])
def test_following_the_advice_makes_it_fit(name, changes, a, advice):
    config, [(key, value)] = replace(PAPER, **changes), advice.items()
    line = verdict(config, SHAPES[name], a)
    assert line.startswith("does not fit") and f" set {key} {str(value).lower()}" in line
    assert verdict(replace(config, **advice), SHAPES[name], a).startswith("fits")
    assert "take larger GPUs" in verdict(config, SHAPES[name], replace(a, gpu_memory=15.0))


@pytest.mark.parametrize("option", [("--gpus", "0"), ("--gpu_memory", "-1"), ("--gpu_tflops", "nan")])
def test_gpus_that_cannot_be_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        plan.main(list(option))
    assert option[0] in capsys.readouterr().err
