"""Every check of the doctor has a case that it warns of, and all are content with the demo."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import as_arguments, own_process_group
from tokenizers import normalizers

from config import Config, ConfigError
from corpus.examples import Splits
from corpus.tiny_model import build_tiny_model, build_tiny_tokenizer
from data import load_splits, tokenize_splits
from distributed.ranks import Ranks
from ops import checks, doctor
from ops.checks import Start, check_reference, check_start, examine
from ops.export import export
from ops.run_dir import OLD
from prompts import ToolCall, load_template, render_prompt
from reward import Reward, reward_function

ROOT = Path(__file__).parents[1]
TEMPLATE = load_template(str(ROOT / "configs" / "tiny_prompt.txt"))
SMALL = Config(
    model="tiny", data="synthetic", synthetic_train=60, eval_cases=8, prompts_per_step=8, minibatch_prompts=8,
    group_size=4, rollout_batch_size=64, steps=20, max_prompt_tokens=400, max_response_tokens=100,
    prompt_template=str(ROOT / "configs" / "tiny_prompt.txt"),
)


def fake_ranks(device="cpu", world=1, theirs=lambda item: item) -> Ranks:
    """One process, or two of which the other has what `theirs` makes of this one's."""

    class Fake(Ranks):
        def gather(self, item):
            return [item, theirs(item)][:world]

    return Fake(0, world, torch.device(device))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Start:
    """A start of the demo in small, about which nothing is wrong, with the run_dir that open_run leaves."""
    folder = tmp_path_factory.mktemp("start")
    config = replace(SMALL, run_dir=str(folder))
    (folder / "config.yaml").touch()
    splits = load_splits(config)
    texts = [render_prompt(build_tiny_tokenizer([], 0), e.messages, e.tools, TEMPLATE) for e in splits.train]
    tokenizer = build_tiny_tokenizer(texts, 600)
    export(build_tiny_model(tokenizer, 16, 1, 0), tokenizer, folder / "model")
    tokenized = tokenize_splits(splits, tokenizer, TEMPLATE, config, quiet=True)
    reward, path = reward_function("binary"), str(folder / "model")
    return Start(config, fake_ranks(), TEMPLATE, reward, splits, tokenized, tokenizer, path, 20)


def with_config(start: Start, **changes) -> Start:
    return replace(start, config=replace(start.config, **changes))


def with_tokenizer(start: Start, change) -> Start:
    """The start with a tokenizer of its own, of bytes, that `change` breaks."""
    tokenizer = build_tiny_tokenizer(["some words"], 0)
    change(tokenizer)
    return replace(with_config(start, max_response_tokens=1000), tokenizer=tokenizer)


def with_train(start: Start, examples: list) -> Start:
    splits = replace(start.splits, train=examples)
    tokenized = tokenize_splits(splits, start.tokenizer, TEMPLATE, start.config, quiet=True)
    return replace(start, splits=splits, tokenized=tokenized)


def test_warnings_are_printed_and_problems_stop_all_ranks(healthy, capsys, monkeypatch):
    """A check that fails itself must not stop a run: that is the doctor's fault."""

    def check_labels(start):
        return {}["oh"]

    monkeypatch.setattr(checks, "CHECKS", (*checks.CHECKS, check_labels))
    check_start(with_config(healthy, prompts_per_step=64))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("warning  schedule: ") and printed[-1] == "doctor: 6 checks ok, warnings: 2"
    assert "warning  labels: check failed: KeyError: 'oh'" in printed
    with pytest.raises(ConfigError, match="^examples: .*; raise max_response_tokens"):
        check_start(with_config(healthy, max_response_tokens=5))


def drop_tags(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("<think>", "")


def other_end(tokenizer):
    """A model that closes with a token that we do not know never stops."""
    tokenizer.add_tokens(["<|end|>"])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|end|>")


def with_answer(start: Start, argument: object) -> Start:
    """One right reply with this argument among the good ones."""
    bad = replace(start.splits.train[0], id="bad", answer=[ToolCall("f", {"x": argument})])
    return with_train(start, [*start.splits.train, bad])


def pays_silence(start: Start) -> Start:
    reward = lambda completion, *_: Reward(1.0 + bool(completion), True, True, "")  # noqa: E731
    return replace(with_config(start, reward="own.py:pays"), reward=reward)


DEEP = json.loads("[" * 70 + "]" * 70)  # nested deeper than the parser reads: it cannot be paid


@pytest.mark.parametrize("name, status, said, change", [
    ("sampling", "problem", "do not survive", lambda s: with_tokenizer(s, drop_tags)),
    ("sampling", "warning", "also ends with <|end|>", lambda s: with_tokenizer(s, other_end)),
    ("model", "problem", "positions", lambda s: with_config(s, max_response_tokens=40000)),
    ("schedule", "warning", "max_prompt_tokens",
     lambda s: with_train(with_config(s, max_prompt_tokens=150), s.splits.train)),
    ("schedule", "warning", "[] is right too often",
     lambda s: with_train(s, [replace(one, answer=[]) for one in s.splits.train])),
    ("schedule", "warning", "test_share", lambda s: replace(s, tokenized=Splits(s.tokenized.train, {}))),
    ("schedule", "warning", "prompts_per_step to 60", lambda s: with_config(s, prompts_per_step=64)),
    ("examples", "warning", "of 61 right replies 1 are too long", lambda s: with_answer(s, "w " * 200)),
    ("examples", "problem", "look at bad", lambda s: with_answer(s, DEEP)),
    ("examples", "warning", "silence can be learnt", pays_silence),
])
def test_what_is_wrong_is_found(healthy, name, status, said, change):
    found = {check.name: check for check in examine(change(healthy))}
    assert found[name].status == status and said in str(found[name])
    assert status == "problem" or {check.status for key, check in found.items() if key != name} == {"ok"}


def test_right_replies_are_paid_where_the_prompt_opens_the_thought(healthy):
    def think(tokenizer):
        tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n<think>\n")

    start = with_tokenizer(healthy, think)
    assert {check.name: check.status for check in examine(start)}["examples"] == "ok"
    tokenized = tokenize_splits(start.splits, start.tokenizer, TEMPLATE, SMALL, quiet=True)
    assert "assistant\n<think>\n…</think><tool_call>" in doctor.shown(replace(start, tokenized=tokenized))


@pytest.mark.parametrize("seen, theirs, said", [
    (True, ("torch 1", "hash"), "rank 1 has other code or libraries"),
    (False, None, "a --run_dir on a shared disk"),
])
def test_another_rank_differs(healthy, seen, theirs, said):
    two = fake_ranks(world=2, theirs=lambda item: seen if isinstance(item, bool) else theirs or item)
    found = checks.check_processes(replace(healthy, ranks=two))
    assert found.status == "problem" and said in found.remedy
    assert checks.check_processes(replace(healthy, ranks=fake_ranks(world=2))).status == "ok"


@pytest.fixture(scope="module")
def references(healthy, tmp_path_factory) -> dict[str, str]:
    """Models that may be a reference of the healthy start's, or not."""
    folder = tmp_path_factory.mktemp("references")
    larger = build_tiny_model(healthy.tokenizer, 16, 1, 1)
    larger.resize_token_embeddings(len(healthy.tokenizer) + 8)
    export(larger, healthy.tokenizer, folder / "larger")
    short = build_tiny_model(healthy.tokenizer, 16, 1, 1)
    short.config.max_position_embeddings = 64
    export(short, healthy.tokenizer, folder / "short")
    other = build_tiny_tokenizer(["others use other words"] * 3, 300)
    export(build_tiny_model(other, 16, 1, 1), other, folder / "other")
    return {path.name: str(path) for path in folder.iterdir()} | {"same": healthy.path, "gone": "./gone"}


@pytest.mark.parametrize("model, reference, said", [
    ("same", "same", ""), ("same", "larger", ""), ("larger", "same", "embeddings, the model"),
    ("same", "other", "of the model and"), ("same", "short", "64 positions"),
    ("same", "gone", "'./gone' does not exist"),
])
def test_a_reference_reads_all_that_the_model_may_write(healthy, references, model, reference, said):
    """Ids are handed over as they are: of another vocabulary they would be other words, or none."""
    config = replace(healthy.config, reference=references[reference])
    given = config, references[model], healthy.tokenizer
    if not said:
        return check_reference(*given)
    with pytest.raises(ConfigError, match=f"^reference: .*{said}"):
        check_reference(*given)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_disk_without_room(healthy, monkeypatch, tmp_path, rank):
    """Not one checkpoint fits: a problem. Not all that are kept: a warning. LoRA saves adapters alone."""
    healthy = replace(healthy, config=replace(healthy.config, run_dir=str(tmp_path), lora_rank=rank))
    model = build_tiny_model(healthy.tokenizer, 16, 1, 0)
    linear = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    adapters = rank * sum(module.in_features + module.out_features for module in linear)
    size = 12 * (adapters or model.num_parameters())
    for share, status in ((0.9, "problem"), (1.1, "warning"), (4.1, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, share=share: SimpleNamespace(free=share * size))
        assert checks.check_disk(healthy).status == status, share
    old = Path(healthy.config.run_dir) / OLD / "step_1" / "shard"  # --overwrite true will make this room
    old.parent.mkdir(parents=True)
    old.write_bytes(bytes(2 * size))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * size))
    assert checks.check_disk(healthy).status == "ok"


@pytest.mark.parametrize("free, status, said", [(79e9, "ok", "fits"), (0.5e9, "warning", "does not fit")])
def test_gpu_memory_is_compared_with_the_plan(healthy, monkeypatch, free, status, said):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free - checks.CONTEXT, 80e9))
    found = checks.check_memory(replace(healthy, ranks=fake_ranks("cuda")))
    assert found.status == status and said in found.text


METRICS = {
    "time/rollout_s": 1.0, "memory/peak_gib": 1.0, "sampling/sampling_logp_difference/mean": 1e-6,
    "completions/clipped_ratio": 0.1, "frac_reward_zero_std": 0.5, "updates_skipped_nonfinite": 0, "reward": 0
}


@pytest.mark.parametrize("key, value, status", [
    ("reward", 0.5, "ok"), ("updates_skipped_nonfinite", 1, "problem"),
    ("sampling/sampling_logp_difference/mean", 0.33, "problem"),  # another temperature
    ("completions/clipped_ratio", 0.8, "warning"), ("frac_reward_zero_std", 1.0, "warning"),
])
def test_what_a_step_may_show(healthy, key, value, status):
    assert doctor.check_step(METRICS | {key: value}, healthy).status == status
    cold = with_config(healthy, warmup_steps=5)  # a model that knows nothing yet
    assert doctor.check_step(METRICS | {key: value}, cold).status == status.replace("warning", "ok")


def test_the_step_gets_the_longest_prompts_and_settings_of_its_own(healthy):
    """Nothing of it may reach a tracker or a benchmark; with one update nothing is known of the sampler."""
    start = with_config(healthy, warmup_steps=9, resume=True, trackers="wandb", prompts_per_step=6)
    settings = doctor.step_settings(start)
    assert Path(settings.run_dir).parent == Path(start.config.run_dir)
    assert (settings.warmup_steps, settings.resume, settings.trackers) == (0, False, "")
    assert (settings.prompts_per_step, settings.minibatch_prompts) == (6, 3)
    again = with_train(start, load_splits(settings).train).tokenized.train
    lengths = sorted((len(item.ids) for item in start.tokenized.train), reverse=True)
    assert [len(item.ids) for item in again] == lengths[:6]


def test_a_doctor_run_as_users_start_it(tmp_path):
    """Two processes, one real step of the demo in small: exit code 0, and nothing is left behind."""
    words = "-m torch.distributed.run --standalone --nproc_per_node 2 -m ops.doctor"
    words += " --config configs/tiny.yaml --synthetic_train 60 --eval_cases 8 --prompts_per_step 8"
    words += " --minibatch_prompts 8 --group_size 4 --steps 3 --tiny_hidden 32 --max_response_tokens 60"
    command = [sys.executable, *words.split(), "--run_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "doctor: 8 checks ok" and lines[-2].startswith("ok       step: ")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("where", ["file/run", "file/in/run"])
def test_a_run_dir_that_cannot_be_is_one_sentence(tmp_path, where):
    (tmp_path / "file").touch()
    with own_process_group(), pytest.raises(ConfigError, match="^run_dir: cannot write .*file"):
        doctor.main(as_arguments({"model": "tiny", "data": "synthetic", "run_dir": tmp_path / where}))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_doctor_leaves_nothing(tmp_path, monkeypatch, number):
    def stopped(*_):
        assert len(os.listdir(tmp_path)) == 1
        os.kill(os.getpid(), number)

    monkeypatch.setattr(doctor, "read_start", stopped)
    with own_process_group(), pytest.raises(KeyboardInterrupt):
        doctor.main(as_arguments({"model": "tiny", "data": "synthetic", "run_dir": tmp_path / "run"}))
    assert os.listdir(tmp_path) == []
