"""checkpoint.py: what is saved comes back bit for bit, and nothing that goes wrong costs an older checkpoint.

Ranks are processes of a fork server that has imported torch once; they talk over gloo on the CPU.
"""

import multiprocessing
import pickle
import resource
import shutil
import uuid
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import CPU, write_checkpoint
from safetensors.torch import load_file, save_file
from test_run_dir import ONE
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from corpus.tiny_model import build_tiny_tokenizer
from distributed import checkpoint
from distributed.checkpoint import Saver, check_files, choose_step, full_state, latest_checkpoint
from distributed.ranks import Ranks
from ops.export import gather_weights

PRELOAD = "torch.distributed.checkpoint torch.distributed.fsdp transformers.models.qwen2.modeling_qwen2"
multiprocessing.set_forkserver_preload(PRELOAD.split())
TOKENIZER = build_tiny_tokenizer([], 300)


def in_ranks(world: int, scenario, folder: Path, *arguments, join: bool = True):
    """Runs scenario(ranks, folder, *arguments) in `world` processes; what fails in one fails the test."""
    arguments = (world, scenario, f"file://{folder}/{uuid.uuid4().hex}.store", folder, *arguments)
    return mp.start_processes(rank_main, arguments, world, join, start_method="forkserver")


def rank_main(rank: int, world: int, scenario, store: str, *arguments) -> None:
    torch.set_num_threads(1)
    # A rank that waits for one that went another way fails after this time instead of hanging.
    patience = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)
    scenario(Ranks(rank, world, CPU), *arguments)
    if dist.is_initialized():
        dist.destroy_process_group()


def build_policy(seed: int = 0, hidden: int = 16):
    """A sharded Qwen2 and its AdamW; `odd` has one row, so that other ranks hold none of it."""
    config = Qwen2Config(
        vocab_size=301, hidden_size=hidden, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, tie_word_embeddings=True, eos_token_id=TOKENIZER.eos_token_id,
    )
    torch.manual_seed(seed)
    policy = Qwen2ForCausalLM(config)
    policy.register_parameter("odd", nn.Parameter(torch.ones(1)))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in policy.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    return policy, torch.optim.AdamW(policy.parameters(), lr=1e-2, fused=True)


def train(policy, optimizer, steps: range, ranks: Ranks) -> None:
    """Optimizer steps on batches that are a function of the step alone."""
    for step in steps:
        ids = torch.randint(0, 300, (6, 8), generator=torch.Generator().manual_seed(step))
        own = ids.chunk(ranks.world)[ranks.rank]
        (policy(input_ids=own, labels=own).loss + policy.odd.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(policy, optimizer) -> dict[str, torch.Tensor]:
    """Collective. Weights and optimizer state, unsharded."""
    tensors = checkpoint.checkpoint_tensors(policy, optimizer)
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(call, *arguments) -> str:
    with pytest.raises(checkpoint.CheckpointError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def train_save_train(ranks: Ranks, folder: Path, background: bool) -> None:
    """Four steps, with a checkpoint after the second; writes what is then in memory."""
    run = folder / "run"
    policy, optimizer = build_policy()
    saver = Saver(run, ranks, 2, background)
    train(policy, optimizer, range(0, 2), ranks)
    at_save = everything(policy, optimizer)
    saver.save({"step": 2, "seconds": 1.5}, policy, TOKENIZER, optimizer)
    if background:
        assert not checkpoint.complete_steps(run), "only what finish() has committed is a checkpoint"
    train(policy, optimizer, range(2, 4), ranks)  # while a background save writes
    saver.finish()
    saver.finish()
    assert (run / "latest").read_text() == "step_2"
    at_end = everything(policy, optimizer)
    if ranks.main:
        save_file(at_save, folder / "save.pt")
        save_file(at_end, folder / "end.pt")


def resume_and_train(ranks: Ranks, folder: Path, exact: bool) -> None:
    policy, optimizer = build_policy(seed=1)
    path, state = latest_checkpoint(folder / "run")
    assert state == {"step": 2, "seconds": 1.5}
    checkpoint.load_checkpoint(path, policy, optimizer, ranks)
    saved, expected = load_file(folder / "save.pt"), load_file(folder / "end.pt")
    for name, tensor in everything(policy, optimizer).items():
        assert torch.equal(tensor, saved[name]), f"{name} did not come back as saved"
    assert policy.lm_head.weight is policy.model.embed_tokens.weight, "still tied"
    train(policy, optimizer, range(2, 4), ranks)
    end = everything(policy, optimizer)
    assert end.keys() == expected.keys()
    for name in end:
        error = (end[name] - expected[name]).abs().max().item()
        assert error == 0 if exact else error < 1e-5, f"{name}: {error}"


RESUMES = [(1, False, [1, 2]), (2, False, [2, 1, 3]), (2, True, [2])]


@pytest.mark.parametrize(("saved", "background", "resumed"), RESUMES)
def test_resume_is_bit_identical(saved, background, resumed, tmp_path):
    """4 steps against 2 + save + load + 2. Sums differ in the last bits on another number of ranks."""
    in_ranks(saved, train_save_train, tmp_path, background)
    assert names(tmp_path / "run") == ["latest", "step_2"]
    for world in resumed:
        in_ranks(world, resume_and_train, tmp_path, world == saved)


def write_checkpoints(ranks: Ranks, folder: Path) -> None:
    """run/step_2 and run/step_4, and rank 0's gathered weights beside."""
    policy, optimizer = build_policy()
    train(policy, optimizer, range(0, 1), ranks)
    saver = Saver(folder / "run", ranks, 5)
    for step in (2, 4):
        saver.save({"step": step}, policy, TOKENIZER, optimizer)
    state = gather_weights(policy, torch.float32)
    assert bool(state) == ranks.main, "only one rank holds all weights"
    if ranks.main:
        save_file(state, folder / "weights.pt")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    in_ranks(2, write_checkpoints, folder)
    return folder


@pytest.fixture
def run(written, tmp_path) -> Path:
    """A run directory with checkpoints of steps 2 and 4, to be damaged."""
    shutil.copytree(written / "run", tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_of_two_ranks_holds_the_gathered_weights(written):
    for dtype in (torch.float32, torch.bfloat16):
        state, gathered = full_state(written / "run" / "step_4", dtype), load_file(written / "weights.pt")
        assert state.keys() == gathered.keys() and "lm_head.weight" not in state
        assert all(torch.equal(state[name], gathered[name].to(dtype)) for name in state)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FILES = (
    "shard-00001-model-00001-of-00001.safetensors shard-00002-model-00001-of-00001.safetensors state.json "
    "manifest.json config.json tokenizer.json tokenizer_config.json chat_template.jinja"
).split()


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_file_is_named_and_so_is_the_checkpoint_before(damage, run):
    assert names(run / "step_4") == sorted(FILES)
    for file in FILES:
        shutil.copytree(run / "step_2", run / "step_6")
        damage(run / "step_6" / file)
        message = refusal(check_files, run / "step_6")
        assert str(run / "step_6" / file) in message and "--resume_step 4" in message
        assert file in refusal(full_state, run / "step_6", torch.float32)
        shutil.rmtree(run / "step_6")


def load_damaged(ranks: Ranks, folder: Path) -> None:
    policy, optimizer = build_policy(seed=3)
    before = everything(policy, optimizer)
    message = refusal(checkpoint.load_checkpoint, folder / "run" / "step_4", policy, optimizer, ranks)
    assert "shard-00002" in message and len(set(ranks.gather(message))) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in everything(policy, optimizer).items())
    checkpoint.load_checkpoint(folder / "run" / "step_2", policy, optimizer, ranks)
    message = refusal(checkpoint.load_checkpoint, folder / "run" / "step_2", *build_policy(hidden=32), ranks)
    assert "another model" in message


def test_all_ranks_refuse_what_one_of_them_finds_damaged(run):
    flip(run / "step_4" / "shard-00002-model-00001-of-00001.safetensors")
    in_ranks(2, load_damaged, run.parent)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_a_pickle_is_never_opened(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step, bomb = run / "step_4", pickle.dumps(Bomb())
    for name in ("optimizer.pt", "pytorch_model.bin", ".metadata", "model.pkl"):
        (step / name).write_bytes(bomb)
    full_state(step, torch.float32)
    AutoTokenizer.from_pretrained(step)
    (step / FILES[0]).write_bytes(bomb)
    assert FILES[0] in refusal(full_state, step, torch.float32)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists(), "it would have worked"


def save_under_faults(ranks: Ranks, folder: Path, background: bool) -> None:
    run = folder / "run"
    policy, optimizer = build_policy()
    saver = Saver(run, ranks, 2, background)

    def save(step: int) -> None:
        saver.save({"step": step}, policy, TOKENIZER, optimizer)
        saver.finish()

    save(1)
    for full in range(ranks.world):  # the disk is full for one rank alone; 20 kB are written before
        if ranks.rank == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        message = refusal(save, 2)
        assert "File too large" in message and "complete ones: step_1" in message
        assert len(set(ranks.gather(message))) == 1 and not list(folder.glob("*/*.tmp"))
        ranks.gather(None)  # before another rank begins the next one
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert latest_checkpoint(run) == (run / "step_1", {"step": 1})
        check_files(run / "step_1")
    save(2)
    assert latest_checkpoint(run)[0] == run / "step_2", "saving works again once there is room"


@pytest.mark.parametrize("background", [False, True])
def test_a_failed_save_leaves_the_checkpoint_before(background, tmp_path):
    in_ranks(2, save_under_faults, tmp_path, background)


def save_many(ranks: Ranks, folder: Path) -> None:
    run = folder / "run"
    policy, optimizer = build_policy()
    remove = shutil.rmtree

    def watched_remove(path: Path, **options) -> None:
        assert path.suffix, "a kill in the middle would leave half of it under a name that means complete"
        remove(path, **options)

    checkpoint.shutil.rmtree = watched_remove
    saver, state = Saver(run, ranks, 2), {"best": {"step": 9, "score": 0.5}}
    for step in (8, 9, 10, 11, 12):
        state["step"] = step
        saver.save(state, policy, TOKENIZER, optimizer)
        assert latest_checkpoint(run) == (run / f"step_{step}", state)
    assert names(run) == ["latest", "step_11", "step_12", "step_9"], "two, and the best; 10 is after 9"
    train(policy, optimizer, range(0, 1), ranks)
    checkpoint.load_checkpoint(run / "step_12", policy, optimizer, ranks)
    assert not optimizer.state, "saved before the first update, so nothing of later ones may stay"


def test_old_checkpoints_are_deleted_but_not_the_best(tmp_path):
    in_ranks(1, save_many, tmp_path)


def test_which_checkpoint_is_the_latest(run, tmp_path):
    assert latest_checkpoint(run) == (run / "step_4", {"step": 4})
    assert latest_checkpoint(run, 2) == (run / "step_2", {"step": 2})
    assert "step_3; there are: step_2, step_4" in refusal(latest_checkpoint, run, 3)
    shutil.copytree(run / "step_4", run / "step_9.tmp")  # cut off by a kill
    (run / "latest").write_text("step_2")  # killed between the rename of step_4 and this
    assert latest_checkpoint(run)[0] == run / "step_4"
    for text in ("{", '{"state": {"step": 3}}'):
        (run / "step_4" / "state.json").write_text(text)
        assert "state.json is damaged; earlier ones: step_2" in refusal(latest_checkpoint, run)
    (run / "step_4" / "state.json").unlink()
    (run / "step_4" / "state.json").mkdir()
    assert "state.json: Is a directory; earlier ones: step_2" in refusal(latest_checkpoint, run)
    shutil.rmtree(run / "step_2")
    (run / "step_4" / "manifest.json").unlink()
    assert "no complete" in refusal(latest_checkpoint, run), "and not a start from the beginning"


def test_a_chosen_step_is_the_latest_from_then_on(tmp_path, monkeypatch):
    """--resume_step: a second resume, or a restart with the old command line, must not choose it again."""
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, {"step": step})
    choose_step(tmp_path, 2, ONE)
    assert latest_checkpoint(tmp_path) == (tmp_path / "step_2", {"step": 2})
    assert "no complete step_7; there are: step_1, step_2" in refusal(choose_step, tmp_path, 7, ONE)
    assert checkpoint.complete_steps(tmp_path) == [1, 2]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for job, step, then in (("a", 2, 2), ("a", 1, 2), ("a", 0, 2), ("b", 1, 1)):  # restarts, then a start
        monkeypatch.setattr(checkpoint, "torchrun_job", lambda job=job: job)
        choose_step(tmp_path, step, ONE)
        assert latest_checkpoint(tmp_path)[0].name == f"step_{then}"
