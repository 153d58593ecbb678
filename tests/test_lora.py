"""LoRA: adapters on frozen weights, on 1 and 2 ranks, from the first gradient to the exported folder."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CPU, run_here, weights
from safetensors.torch import load_file, save_file
from test_checkpoint import TOKENIZER, in_ranks
from test_fsdp import GROUPS, IDLE, build_models
from torch.func import functional_call
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import grpo
import sft
from config import Config, ConfigError, UserError
from corpus.sources import read_jsonl
from distributed import fsdp
from distributed.checkpoint import (
    CheckpointError,
    Saver,
    check_files,
    checkpoint_tensors,
    load_checkpoint,
)
from distributed.fsdp import clip_and_step, gathered_weights, load_policy
from distributed.ranks import Ranks
from distributed.weights import load_model, model_config
from kernel.attention import use_attention
from kernel.lora import adapters, lora_layers
from kernel.packing import pack
from model import ModelError, token_logprobs
from ops.export import gather_weights
from ops.export import main as export_main

GO_ON = {"resume": "true", "steps": 25}
LORA = Config(lora_rank=3, lora_alpha=7.0, gradient_checkpointing=False)


def build(ranks: Ranks, folder: Path, config: Config = LORA):
    """The policy of a model of test_fsdp.py, with adapters that say something."""
    policy = load_policy(config, str(folder / "qwen2"), 0.7, ranks)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in adapters(policy).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.3, generator=draw)
    return policy


def weighted_sum(logprobs: torch.Tensor, own: list[int]) -> torch.Tensor:
    counts = [sum(map(len, responses)) for _, responses in GROUPS]
    weights = torch.linspace(-1, 2, sum(counts)).split(counts)
    return (logprobs * (torch.cat([weights[i] for i in own]) if own else 0.0)).sum()


def slow_gradients(policy, folder: Path) -> dict[str, torch.Tensor]:
    """Plain autograd through W + scale B A, written out, on the whole model."""
    plain = load_model(str(folder / "qwen2"), CPU)
    use_attention(plain, "generate")  # its own
    leaves = {name: p.detach().clone().requires_grad_() for name, p in adapters(policy).items()}
    changed = {}
    for name in {name.rpartition(".")[0] for name in leaves}:
        product = leaves[f"{name}.lora_B"] @ leaves[f"{name}.lora_A"]
        changed[f"{name}.weight"] = plain.get_parameter(f"{name}.weight") + 7 / 3 * product
    rows = []
    for prompt, responses in GROUPS:
        for response in responses:
            ids = torch.tensor([prompt + response])
            logits = functional_call(plain, changed, kwargs={"input_ids": ids}).logits
            logprobs = (logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
            rows.append(logprobs[torch.arange(len(response)), torch.tensor(response)])
    weighted_sum(torch.cat(rows), [0, 1, 2]).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def an_update_is_that_of_the_whole_batch(ranks: Ranks, folder: Path) -> None:
    """Whatever the number of ranks, with recomputed activations and freed layers, and without."""
    own = [i for i in range(len(GROUPS)) if i % ranks.world == ranks.rank]
    for checkpointing, keep in ((False, 2**30), (True, 0)):
        fsdp.KEEP_BYTES = keep
        policy = build(ranks, folder, replace(LORA, gradient_checkpointing=checkpointing))
        right = slow_gradients(policy, folder)
        before = {name: tensor.clone() for name, tensor in gather_base(policy).items()}
        optimizer = torch.optim.SGD(adapters(policy).values(), lr=1.0)
        started = {name: p.detach().clone() for name, p in adapters(policy).items()}
        for part in (own, []) if ranks.rank else (own,):  # an idle micro-batch keeps in step
            logprobs, _ = policy.logprobs(pack([GROUPS[i] for i in part] or IDLE, CPU))
            weighted_sum(logprobs, part).backward()
            if ranks.world > 1 and not ranks.rank:
                policy.logprobs(pack(IDLE, CPU))[0].sum().mul(0).backward()
        norm = clip_and_step(policy, optimizer, 0.0, ranks)
        assert_close(norm, float(torch.cat([g.flatten() for g in right.values()]).norm()), rtol=1e-4, atol=0)
        for name, parameter in adapters(policy).items():
            assert_close(started[name] - parameter, right[name], rtol=1e-4, atol=1e-5, msg=name)
        after = gather_base(policy)
        assert all(torch.equal(after[name], before[name]) for name in before), "the base is frozen"


def gather_base(policy) -> dict[str, torch.Tensor]:
    return {name: fsdp.full_tensor(tensor) for name, tensor in fsdp.weights(policy).items()}


def adapters_off_is_the_start_model(ranks: Ranks, folder: Path) -> None:
    policy, packed = build(ranks, folder), pack(GROUPS, CPU)
    bare = load_policy(replace(LORA, lora_rank=0), str(folder / "qwen2"), 0.7, ranks)
    reference = load_policy(LORA, str(folder / "qwen2"), 0.7, ranks, policy)
    with torch.no_grad():
        on, off = policy.logprobs(packed)[0], reference.logprobs(packed)[0]
        assert torch.equal(off, bare.logprobs(packed)[0])
        assert (on - off).abs().max() > 0.1
        assert torch.equal(policy.logprobs(packed)[0], on), "and they are on again"


def merged_weights_do_what_adapters_do(ranks: Ranks, folder: Path) -> None:
    policy, packed = build(ranks, folder), pack(GROUPS, CPU)
    with torch.no_grad():
        expected = policy.logprobs(packed)[0]
        for _ in range(2):  # what was merged is gone after the rollout
            with gathered_weights(policy) as twin:
                assert_close(token_logprobs(twin, packed, 0.7)[0], expected, atol=1e-5, rtol=0)
        assert torch.equal(policy.logprobs(packed)[0], expected)
    merged = gather_weights(policy, torch.float32)
    if ranks.main:
        plain = load_model(str(folder / "qwen2"), CPU)
        plain.load_state_dict(merged, strict=False)
        assert_close(token_logprobs(plain, packed, 0.7)[0], expected, atol=1e-5, rtol=0)


CHECKS = (
    an_update_is_that_of_the_whole_batch, adapters_off_is_the_start_model, merged_weights_do_what_adapters_do,
)


def run_checks(ranks: Ranks, folder: Path) -> None:
    for check in CHECKS:
        check(ranks, folder)


@pytest.mark.parametrize("world", [1, 2])
def test_on_ranks(world, tmp_path):
    build_models(tmp_path)
    in_ranks(world, run_checks, tmp_path)


def save_adapters(ranks: Ranks, folder: Path) -> None:
    policy = build(ranks, folder)
    optimizer = torch.optim.AdamW(adapters(policy).values(), fused=True)
    policy.logprobs(pack(GROUPS, CPU))[0].sum().backward()
    clip_and_step(policy, optimizer, 0.0, ranks)
    Saver(folder / "run", ranks, 1).save({"step": 1}, policy, TOKENIZER, optimizer)
    save_file(checkpoint_tensors(policy, optimizer), folder / f"saved_{ranks.rank}")


def read_adapters(ranks: Ranks, folder: Path) -> None:
    policy = load_policy(LORA, str(folder / "qwen2"), 0.7, ranks)
    optimizer = torch.optim.AdamW(adapters(policy).values(), fused=True)
    load_checkpoint(folder / "run" / "step_1", policy, optimizer, ranks)
    saved = load_file(folder / "saved_0")
    tensors = checkpoint_tensors(policy, optimizer)
    assert tensors.keys() == saved.keys() and all(torch.equal(tensors[name], saved[name]) for name in saved)


@pytest.mark.parametrize("worlds", [(1, 2), (2, 1)])
def test_another_number_of_ranks_reads_a_checkpoint(worlds, tmp_path):
    build_models(tmp_path)
    for world, scenario in zip(worlds, (save_adapters, read_adapters)):
        in_ranks(world, scenario, tmp_path)


def test_16_bit_weights_are_merged_in_fp32(ranks, tmp_path):
    """One rounding, of the sum: a product that is rounded before it is added is another number."""
    build_models(tmp_path)
    layer = lora_layers(build(ranks, tmp_path))["model.layers.0.mlp.up_proj"]
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = weight.double() + 7 / 3 * layer.lora_B.double() @ layer.lora_A.double()
    assert torch.equal(layer.merged(weight), exact.bfloat16())


def test_the_targets_alone_get_adapters(ranks, tmp_path):
    build_models(tmp_path)
    policy = build(ranks, tmp_path, replace(LORA, lora_targets="q_proj, down_proj"))
    assert {name.rpartition(".")[2] for name in lora_layers(policy)} == {"q_proj", "down_proj"}
    layers, others = (lora_layers(build(ranks, tmp_path, replace(LORA, seed=seed))) for seed in (0, 1))
    assert len(layers) == 2 * 7, "all but the LM head"
    assert not any(torch.equal(layers[name].lora_A, others[name].lora_A) for name in layers)
    with pytest.raises(ConfigError, match="lora_targets: no linear layer is called gate; "):
        build(ranks, tmp_path, replace(LORA, lora_targets="gate"))


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def settings(warmed) -> dict[str, object]:
    return warmed | dict(lora_rank=4, lora_alpha=8, lr=2e-3, save_every=20, minibatch_prompts=4, kl_coef=0.01)


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory) -> Path:
    return run_here(grpo.main, settings | {"run_dir": tmp_path_factory.mktemp("straight") / "run"})


def test_it_learns_and_samples_what_it_trains(straight, settings):
    log = read_jsonl(straight / "log.jsonl")[1:]
    assert sum(row["reward"] for row in log[-5:]) / 5 > log[0]["reward"] + 0.3
    assert log[0]["kl"] < 1e-3 < log[-1]["kl"], "the reference is the start model, and stays so"
    assert max(row["sampling/sampling_logp_difference/max"] for row in log) < 1e-4


def test_a_checkpoint_holds_adapters_alone_and_a_resume_is_exact(straight, settings, tmp_path):
    tensors = check_files(straight / "step_20")["tensors"]
    assert all(name.rpartition(".")[2] in ("lora_A", "lora_B") for name in tensors)
    size = sum(file.stat().st_size for file in (straight / "step_20").glob("*.safetensors"))
    trained = load_file(straight / "model" / "adapter" / "adapter_model.safetensors")
    assert size < 12 * sum(tensor.numel() for tensor in trained.values()) + 50_000
    resumed = settings | {"run_dir": tmp_path / "run"}
    run_here(grpo.main, resumed | {"steps": 20})
    with pytest.raises(UserError, match="lora_alpha 8.0 -> 4.0"):
        run_here(grpo.main, resumed | {"resume": "true", "lora_alpha": 4})
    with pytest.raises(CheckpointError, match="choose the run's own model, lora_rank and lora_targets"):
        run_here(grpo.main, resumed | {"resume": "true", "accept_changes": "true", "lora_rank": 2})
    run_here(grpo.main, {"config": tmp_path / "run" / "config.yaml", "run_dir": tmp_path / "run"} | GO_ON)
    own, whole = weights(tmp_path / "run"), weights(straight)
    assert all(torch.equal(own[name], whole[name]) for name in whole)


def test_what_is_exported_is_the_model_that_was_trained(straight, settings, tmp_path):
    """The merged folder, the adapter in peft's names, and both of a checkpoint."""
    state = load_file(straight / "model" / "adapter" / "adapter_model.safetensors")
    told = json.loads((straight / "model" / "adapter" / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["base_model_name_or_path"]) == (4, 8, str(settings["model"]))
    base, merged = load_file(settings["model"] / "model.safetensors"), weights(straight)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {f"{key[17:-14]}.weight" for key in state}, "nothing else moved"
    for name in changed:
        a, b = (state[f"base_model.model.{name[:-7]}.lora_{part}.weight"] for part in "AB")
        assert_close(merged[name], base[name] + 2 * b @ a, atol=1e-6, rtol=0)
    later = tmp_path / "later"  # a resume with another alpha and model has rewritten the run's settings
    shutil.copytree(straight, later, ignore=shutil.ignore_patterns("model"))
    text = (later / "config.yaml").read_text()
    (later / "config.yaml").write_text(re.sub("(lora_alpha|model): .*", r"\1: 99.0", text))
    assert (later / "config.yaml").read_text().count("99.0") == 2
    run_here(lambda _: export_main([str(later / "step_25"), str(tmp_path / "out")]), {"run_dir": later})
    again = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, merged[name].bfloat16())


def test_a_checkpoint_of_adapters_is_no_model(straight):
    with pytest.raises(ModelError, match="step_25' holds LoRA's adapters; python -m ops.export"):
        model_config(str(straight / "step_25"))


def test_peft_loads_the_adapter(straight, settings):
    peft = pytest.importorskip("peft", reason="peft is not installed: its loader of adapters is not compared")
    base = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(straight / "model", dtype=torch.float32)
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        plain = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, straight / "model" / "adapter")(ids).logits
        assert_close(adapted, merged(ids).logits, atol=1e-5, rtol=0)
    assert (adapted - plain).abs().max() > 0.01


def test_supervised_fine_tuning_trains_adapters_too(settings, tmp_path):
    bare = dict(sft_reason="false", steps=25, sft_lr=1e-2, sft_batch=8)  # which the start model never wrote
    run = run_here(sft.main, settings | bare | {"run_dir": tmp_path / "run"})
    log = read_jsonl(run / "log.jsonl")
    assert log[-1]["loss"] < 0.5 * log[1]["loss"]
    assert load_file(run / "model" / "adapter" / "adapter_model.safetensors")


def test_the_demo_warms_all_weights_up_first(settings, tmp_path):
    """A model that knows nothing learns little by adapters; after the warm-up they are all that moves."""
    own = {key: value for key, value in settings.items() if key != "model"}
    tiny = dict(model="tiny", tiny_hidden=64, warmup_steps=3, steps=1, run_dir=tmp_path / "run")
    run = run_here(grpo.main, own | tiny)
    warm, began = (load_file(run / "warmup" / name / "model.safetensors") for name in ("model", "start"))
    assert not any(torch.equal(warm[name], began[name]) for name in warm if "norm" in name or "embed" in name)
    told = json.loads((run / "model" / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(run / "warmup" / "model")
