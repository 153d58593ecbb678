"""fsdp.py: a model in pieces computes what the whole one does, on 1, 2 and 3 ranks.

One start of a number of ranks runs all its CHECKS, each a plain function.
"""

import functools
import json
import multiprocessing
import os
import shutil
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import CPU, as_arguments, run_here, weights, write_task
from safetensors.torch import load_file, save_file
from test_checkpoint import in_ranks
from test_nodes import free_port
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import grpo
from config import Config, load_config
from corpus.sources import read_jsonl
from corpus.tiny_model import build_tiny_tokenizer
from data import load_splits, tokenize_splits
from distributed import fsdp
from distributed import weights as weight_loading
from distributed.batches import Group, batch_for_step, prompt_seed
from distributed.checkpoint import Saver
from distributed.fsdp import full_tensor, gathered_weights, load_sharded, make_mesh
from distributed.ranks import Ranks
from distributed.weights import allocate, load_model, model_config, skeleton
from kernel.attention import use_attention
from kernel.decode import Prompt
from kernel.packing import pack
from losses import group_std, kl_k3, learning_rate, objective_of, policy_loss
from model import ModelError, load_tokenizer, prepare_model, token_logprobs
from ops.export import export
from prompts import load_template
from rollout import ENGINES, Decoding, sample_groups
from sft import sft_update

MODELS = ["transformers.models.qwen2.modeling_qwen2", "transformers.models.llama.modeling_llama"]
multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", *MODELS])

HEADS = dict(num_attention_heads=4, num_key_value_heads=1)
SHAPE = dict(vocab_size=301, intermediate_size=20, num_hidden_layers=2, **HEADS)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8)


def build_models(folder: Path) -> None:
    """Models whose rows divide by no number of ranks; qwen2's key heads have 2 rows, fewer than 3 ranks."""
    torch.manual_seed(0)
    llama3 = LlamaConfig(**SHAPE, hidden_size=16, tie_word_embeddings=False)
    llama3.rope_parameters = {"rope_type": "llama3", "rope_theta": 100.0, **LLAMA3}
    qwen2 = Qwen2ForCausalLM(Qwen2Config(**SHAPE, hidden_size=8, tie_word_embeddings=True))
    models = {"qwen2": qwen2, "llama3": LlamaForCausalLM(llama3)}
    for name, model in models.items():
        for parameter in model.parameters():  # far from the start's small numbers, biases included
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(folder / name, max_shard_size="8KB")  # many files
    models["llama3"].to(torch.bfloat16).save_pretrained(folder / "bf16")


GROUPS = [([5, 6, 7], [[8, 9, 10, 11], [12]]), ([20], [[21, 22]])]
GROUPS += [([30, 31, 250, 33, 34], [[35] * 9, [300, 1], [7]])]
PROMPTS = [Prompt(str(i), prompt, i) for i, (prompt, _) in enumerate(GROUPS)]
IDLE = [([0], [[0]])]


def load(ranks: Ranks, path: Path, sharding: str = "full", **options) -> nn.Module:
    return load_sharded(str(path), make_mesh(ranks, sharding), CPU, **options)


def logits_are_those_of_the_whole_model(ranks: Ranks, folder: Path) -> None:
    ids = torch.arange(40).view(2, 20) % 37
    for name in ("qwen2", "llama3", "bf16"):
        sharded, plain = load(ranks, folder / name).eval(), load_model(str(folder / name), CPU).eval()
        packed = pack(GROUPS, CPU)
        for one, other in zip(token_logprobs(sharded, packed, 0.7), token_logprobs(plain, packed, 0.7)):
            assert_close(one, other, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        use_attention(sharded, "generate")
        use_attention(plain, "generate")
        assert_close(sharded(ids).logits, plain(ids).logits, atol=1e-5, rtol=0)


def every_rank_reads_its_own_rows_alone(ranks: Ranks, folder: Path) -> None:
    real, read = weight_loading.safe_open, []

    class Slices:
        def __init__(self, rows):
            self.get_shape, self.rows = rows.get_shape, rows

        def __getitem__(self, key):
            read.append(self.rows[key].numel())
            return self.rows[key]

    @contextmanager
    def counted(*arguments):
        with real(*arguments) as file:
            yield SimpleNamespace(keys=file.keys, get_slice=lambda name: Slices(file.get_slice(name)))

    weight_loading.safe_open = counted
    try:
        model = load(ranks, folder / "llama3")
    finally:
        weight_loading.safe_open = real
    share = -(-301 // ranks.world) * 16
    assert 0.9 * share < max(read) <= share, "of the largest weight"
    local = sum(p.to_local().numel() for p in model.parameters())
    assert local == sum(read), "each of the rank's numbers once"
    assert sum(ranks.sum([local])) == sum(p.numel() for p in model.parameters()), "and together the model"


def parameters_and_buffers_get_their_devices(ranks: Ranks, folder: Path) -> None:
    """With offload, parameters lie in CPU memory and buffers on the GPU. A tied head is met twice."""
    model = skeleton(model_config(str(folder / "qwen2")), torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    fully_shard(model, mesh=make_mesh(ranks, "full"))
    allocate(model, CPU, torch.device("meta"))
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert {b.device.type for b in model.buffers()} == {"meta"}


def backward(model: nn.Module, ranks: Ranks) -> None:
    """This rank's part of a weighted sum of log-probs: every rank has its own groups, the third none."""
    counts = [sum(map(len, responses)) for _, responses in GROUPS]
    weights = torch.linspace(-1, 2, sum(counts)).split(counts)
    own = [i for i in range(len(GROUPS)) if i % min(ranks.world, 2) == ranks.rank]
    logprobs, _ = token_logprobs(model, pack([GROUPS[i] for i in own] or IDLE, CPU), 0.7)
    (logprobs * (torch.cat([weights[i] for i in own]) if own else 0.0)).sum().backward()


def gradients_are_the_sum_over_ranks(ranks: Ranks, folder: Path) -> None:
    """Not the mean, and a tied head's once; with layers freed after the forward pass, and without."""
    for name in ("qwen2", "llama3"):
        plain = load_model(str(folder / name), CPU).train()
        logprobs, _ = token_logprobs(plain, pack(GROUPS, CPU), 0.7)
        (logprobs * torch.linspace(-1, 2, len(logprobs))).sum().backward()
        expected = {key: p.grad for key, p in plain.named_parameters()}
        for checkpointing, keep in ((False, 0), (False, 2**30), (True, 0), (True, 2**30)):
            fsdp.KEEP_BYTES = keep
            model = load(ranks, folder / name, gradient_checkpointing=checkpointing).train()
            assert model.free_layers == (keep == 0)
            backward(model, ranks)
            gradients = {key: full_tensor(p.grad) for key, p in model.named_parameters()}
            assert gradients.keys() == expected.keys()
            for key, gradient in gradients.items():
                error = (gradient - expected[key]).norm()
                assert error <= 1e-5 * expected[key].norm() + 1e-6, (name, key)


def steps(model: nn.Module, ranks: Ranks, between=lambda: None, count: int = 3) -> dict[str, torch.Tensor]:
    """Collective. The weights after a few optimizer steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(count):
        between()
        backward(model, ranks)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: full_tensor(p.detach()).clone() for name, p in model.named_parameters()}


def reply(model: nn.Module, prompts: list[Prompt], engine: str = "shared_prefix") -> list:
    """Two responses per prompt, with the sampler's log-probs."""
    replies = dict(ENGINES[engine](model, prompts, 2, 0.8, 6, [301], 2 * len(prompts)))
    use_attention(model, "train")
    return [reply for k in range(len(prompts)) for reply in replies[k]]


def rollouts_between_change_no_bit(ranks: Ranks, folder: Path) -> None:
    """Ranks that sample different numbers of tokens wait for nobody: a hook would gather weights."""
    for keep in (0, 2**30):
        fsdp.KEEP_BYTES = keep
        without = steps(load(ranks, folder / "qwen2").train(), ranks)
        model = load(ranks, folder / "qwen2").train()

        def sample(model=model):
            with gathered_weights(model) as twin:
                for _ in range(3 * ranks.rank):
                    reply(twin, PROMPTS[: 1 + ranks.rank])

        after = steps(model, ranks, sample)
        assert all(torch.equal(after[name], without[name]) for name in without)


def samples_come_from_the_new_weights(ranks: Ranks, folder: Path) -> None:
    """A forward pass before the update leaves weights gathered: the twin must not be given those."""
    for name in ("qwen2", "llama3"):
        model = load(ranks, folder / name).train()
        with gathered_weights(model) as twin:
            before = reply(twin, PROMPTS)
        state = steps(model, ranks, functools.partial(token_logprobs, model, pack(GROUPS, CPU), 0.7), count=2)
        plain = load_model(str(folder / name), CPU)
        plain.load_state_dict(state, strict=False)
        for engine in ENGINES:
            with gathered_weights(model) as twin:
                rows = reply(twin, PROMPTS, engine)
            for prompt, one, two in zip(PROMPTS, rows[::2], rows[1::2]):
                packed = pack([(prompt.ids, [one[0], two[0]])], CPU)
                expected = token_logprobs(plain, packed, 0.8)[0].detach()
                assert_close(torch.tensor([*one[1], *two[1]]), expected, atol=1e-5, rtol=0)
        with gathered_weights(model) as twin:
            again, gathered = reply(twin, PROMPTS), list(twin.parameters())
        assert max(abs(a - b) for (_, one), (_, two) in zip(before, again) for a, b in zip(one, two)) > 1e-3
        assert all(weight.untyped_storage().size() == 0 for weight in gathered), "nothing is left of the twin"


def fine_tuning_is_the_same_on_all_numbers_of_ranks(ranks: Ranks, folder: Path) -> None:
    """Three ranks share three groups; with a budget of 1 token, one has two micro-batches more."""
    plain = load_model(str(folder / "llama3"), CPU).train()
    loss = -token_logprobs(plain, pack(GROUPS, CPU), 1.0)[0].mean()
    loss.backward()
    for budget in (1, 10**6):
        model = load(ranks, folder / "llama3").train()
        model.logprobs = functools.partial(token_logprobs, model, temperature=1.0)
        config = Config(max_tokens_per_micro_batch=budget, max_grad_norm=1e9)
        metrics = sft_update(model, torch.optim.SGD(model.parameters(), lr=1.0), GROUPS, config, ranks)
        assert abs(metrics["loss"] - loss.item()) < 1e-5
        for now, before in zip(model.parameters(), plain.parameters()):
            assert_close(full_tensor(now.detach()), (before - before.grad).detach(), atol=1e-5, rtol=0)


REWARD = """
def rewards_of(completion, answer, tools):
    return sum(map(ord, completion)) % 5 / 4
"""  # a random model gets nothing right, but must have something to learn
RUNS = {  # name: (numbers of ranks, the slow run that it must equal, settings)
    "usual": ((1, 2), "usual", {}),
    "llama": ((1, 2), "llama", {"model": "llama"}),
    "hsdp": ((2,), "usual", {"sharding": "hsdp"}),
    "offload": ((2,), "usual", {"offload": "all", "gradient_checkpointing": "true"}),
    "one prompt": ((1, 2), "one prompt", {
        "prompts_per_step": 1, "minibatch_prompts": 1, "steps": 2, "num_iterations": 2,
        "lr_schedule": "linear",
    }),
}


def build_task(folder: Path) -> None:
    """The settings of 5 steps with 2 updates of 3 prompts each, and two random models to start from."""
    (folder / "own.py").write_text(REWARD)
    tokenizer = build_tiny_tokenizer(["add 1 and 2"], 301)
    torch.manual_seed(1)
    shape = SHAPE | dict(hidden_size=16, num_key_value_heads=2, initializer_range=0.2)
    shape |= {"vocab_size": len(tokenizer)}
    qwen2 = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True))
    llama = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    for name, model in (("qwen2", qwen2), ("llama", llama)):
        export(prepare_model(model, CPU), tokenizer, folder / f"start-{name}")
    settings = write_task(folder) | dict(
        reward=f"{folder / 'own.py'}:rewards_of", model="qwen2", steps=5, prompts_per_step=6,
        minibatch_prompts=3, group_size=4, max_response_tokens=10, lr=1e-3, kl_coef=0.1, eval_cases=3,
        timeout_minutes=2,
    )
    (folder / "task.json").write_text(json.dumps(settings, default=str))


def run_settings(folder: Path, name: str) -> dict[str, str]:
    settings = json.loads((folder / "task.json").read_text()) | RUNS[name][2]
    return settings | {"model": folder / f"start-{settings['model']}"}


def grpo_runs(ranks: Ranks, folder: Path) -> None:
    """Collective. What the tests of whole runs compare: grpo.py as torchrun starts it, every rank a node."""
    ports = ranks.gather([free_port() for _ in RUNS])[0]
    dist.destroy_process_group()
    place = dict(RANK=ranks.rank, WORLD_SIZE=ranks.world, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1)
    for port, (name, (worlds, _, _)) in zip(ports, RUNS.items()):
        if ranks.world in worlds:
            place |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            os.environ.update({key: str(value) for key, value in place.items()})
            run_here(grpo.main, run_settings(folder, name) | {"run_dir": folder / f"{name}-{ranks.world}"})


def slow_grpo(settings: dict) -> tuple[list[list[str]], dict[str, torch.Tensor]]:
    """The texts of every step, and the weights, one completion at a time: nothing is sharded or packed."""
    config = load_config(as_arguments(settings | {"run_dir": "unused"}))
    tokenizer, template = load_tokenizer(config.model), load_template(config.prompt_template)
    policy, reference = (load_model(config.model, CPU) for _ in range(2))
    train = tokenize_splits(load_splits(config), tokenizer, template, config, quiet=True).train
    optimizer, texts = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0), []

    def logprobs(model, group: Group, response: list[int]) -> torch.Tensor:
        use_attention(model, "generate")
        logits = model(torch.tensor([group.prompt.ids + response])).logits[0, len(group.prompt.ids) - 1 : -1]
        return (logits / config.temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]

    for step in range(1, config.steps + 1):
        batch = batch_for_step(len(train), step - 1, config.prompts_per_step, config.seed)
        seeds = [prompt_seed(config.seed, step, place) for place in range(len(batch))]
        prompts = [Prompt(str(i), train[i].ids, seed) for i, seed in zip(batch, seeds)]
        decoding = replace(Decoding.training(config), batch_size=config.group_size)
        groups = sample_groups(policy, tokenizer, prompts, decoding)
        texts.append([text for group in groups for text in group.texts])
        rewards = torch.tensor([[sum(map(ord, text)) % 5 / 4 for text in group.texts] for group in groups])
        assert (rewards.std(1) > 0).any(), "there is something to learn"
        advantages, fixed = group_std(rewards), {}
        with torch.no_grad():
            for i, group in enumerate(groups):
                for k, ids in enumerate(group.responses):
                    fixed[i, k] = logprobs(policy, group, ids), logprobs(reference, group, ids)
        rate = learning_rate(config.lr, config.lr_schedule, step, 0, (step - 1) / config.steps)
        optimizer.param_groups[0]["lr"] = rate
        for start in [*range(0, len(groups), config.minibatch_prompts)] * config.num_iterations:
            losses = []
            for i, k in ((i, k) for i, k in fixed if start <= i < start + config.minibatch_prompts):
                now, (old, ref) = logprobs(policy, groups[i], groups[i].responses[k]), fixed[i, k]
                advantage, counts = advantages[i, k].expand_as(now), torch.tensor([len(now)])
                loss, _ = policy_loss(now, old, advantage, counts, objective_of(config))
                losses.append(loss + config.kl_coef * kl_k3(now, ref))
            torch.cat(losses).mean().backward()
            nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return texts, {name: p.detach() for name, p in policy.named_parameters()}


CHECKS = {  # what runs on which numbers of ranks
    logits_are_those_of_the_whole_model: (1, 2, 3),
    every_rank_reads_its_own_rows_alone: (2, 3),
    parameters_and_buffers_get_their_devices: (1,),
    gradients_are_the_sum_over_ranks: (1, 2, 3),
    rollouts_between_change_no_bit: (1, 2),
    samples_come_from_the_new_weights: (1, 2),
    fine_tuning_is_the_same_on_all_numbers_of_ranks: (1, 2, 3),
}


def run_checks(ranks: Ranks, folder: Path) -> None:
    for check, worlds in CHECKS.items():
        if ranks.world in worlds:
            check(ranks, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    build_models(folder)
    build_task(folder)
    return folder


@pytest.mark.parametrize("world", [1, 2, 3])
def test_on_ranks(world, folder):
    in_ranks(world, run_checks, folder)


@pytest.fixture(scope="module")
def slow(folder):
    """The slow runs by name, made once each; the others are in the folder then."""
    for world in (1, 2):
        in_ranks(world, grpo_runs, folder)
    return functools.cache(lambda name: slow_grpo(run_settings(folder, name)))


@pytest.mark.parametrize(("name", "world"), [(name, world) for name in RUNS for world in RUNS[name][0]])
def test_a_run_does_what_the_definition_says(name, world, folder, slow):
    """The same samples; and the same weights but for the order of sums: 2e-7 where they moved by 9e-3."""
    texts, expected = slow(RUNS[name][1])
    run = folder / f"{name}-{world}"
    rows = read_jsonl(run / "samples.jsonl")
    for step, own in enumerate(texts, 1):
        assert sorted(own) == sorted(row["completion"] for row in rows if row["step"] == step)
    trained = weights(run)
    begin = load_file(run_settings(folder, name)["model"] / "model.safetensors")
    assert trained.keys() == expected.keys()
    for key in expected:
        assert_close(trained[key], expected[key], atol=2e-6, rtol=0)
    moved = max((expected[key] - begin[key]).abs().max() for key in expected)
    assert moved > 1e-3, "there was something to compare"


def copied(folder: Path, target: Path, **changes) -> Path:
    """The Llama in another folder and one file, with these weights changed, or left out where None."""
    files = (folder / "llama3").glob("*.safetensors")
    tensors = {key: tensor for file in files for key, tensor in load_file(file).items()} | changes
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    shutil.copy(folder / "llama3" / "config.json", target)
    return target


NORM = "model.layers.1.input_layernorm.weight"
REFUSED = {  # (weights to change, or what to do with the folder; words of the sentence)
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "has no .safetensors files"),
    "a weight is missing": ({NORM: None}, f"lacks weights that its config asks for: {NORM}"),
    "a weight of another shape": ({NORM: torch.ones(5)}, rf"{NORM} has the shape \(5,\), its config \(16,\)"),
    "a file cut off": (lambda path: os.truncate(path / "model.safetensors", 5000), "could not be read"),
    "a config of nothing": (lambda path: (path / "config.json").write_text("{}"), "could not be loaded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_one_sentence(case, ranks, folder, tmp_path):
    change, words = REFUSED[case]
    path = copied(folder, tmp_path / "model", **(change if isinstance(change, dict) else {}))
    if callable(change):
        change(path)
    with pytest.raises(ModelError, match=words) as caught:
        load(ranks, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "evil"])
def test_code_that_comes_with_a_model_does_not_run(kind, ranks, folder, tmp_path, monkeypatch):
    """Only trust_remote_code runs it; transformers' own code loads a model that transformers knows."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    path = copied(folder, tmp_path / "model")
    (path / "evil.py").write_text(f"open({str(path / 'it_ran')!r}, 'w')")
    config = json.loads((path / "config.json").read_text()) | {"model_type": kind}
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) if kind == "evil" else nullcontext():
        assert type(load(ranks, path)).__name__ == "FSDPLlamaForCausalLM"
    assert not (path / "it_ran").exists()


def test_rotary_frequencies_keep_their_precision(folder):
    """A reference is made in bf16 on GPUs; in bf16, frequencies would be wrong in the third digit."""
    config = fsdp.model_config(str(folder / "llama3"))
    model = skeleton(config, torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16 and model.lm_head.weight.is_meta
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    assert config.dtype == torch.float32, "from_config changes the config that it is given: not this one"


def later_groups(ranks: Ranks, folder: Path) -> None:
    """Collective. Their timeouts, and a checkpoint that one rank never writes."""
    ranks = replace(ranks, timeout=timedelta(seconds=10))
    saver = Saver(folder, ranks, keep=1, background=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "1")
        mesh = make_mesh(ranks, "hsdp")
    assert mesh.shape == (2, 1) and mesh.mesh_dim_names == ("replicate", "shard")
    for group in (saver.group, *mesh.get_all_groups()):
        assert group._get_backend(CPU).options._timeout == ranks.timeout
    if ranks.main:  # the other one hangs
        began, saver.folder = time.monotonic(), folder
        saver._write({"weight": torch.zeros(2)})
        assert "Timed out" in saver.problem and time.monotonic() - began < 60
    ranks.gather(None)


def test_groups_that_are_made_later_have_the_timeout_of_the_settings(tmp_path):
    in_ranks(2, later_groups, tmp_path)
