"""What several test files need: a tiny task with its model, groups of completions, and runs of scripts.

The task is the demo's in miniature: copy two digits from the request into one call. Two of three
demonstrations write the numbers as text, so the warmed-up model copies well and gets the type right in a
third of its samples. Only the habit is left for GRPO to learn, which takes it a few seconds.
"""

import json
import multiprocessing.forkserver
import os
import random
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TextIO
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.run as torchrun
from safetensors.torch import load_file
from torch.distributed.launcher.api import elastic_launch

import sft
from config import Config
from corpus.examples import Example
from corpus.layouts import write_examples
from corpus.tiny_model import build_tiny_model, build_tiny_tokenizer
from distributed import checkpoint
from distributed.batches import Group
from distributed.ranks import Ranks, start_ranks
from kernel.decode import Prompt
from model import prepare_model, token_logprobs
from ops import monitor
from prompts import ToolCall, render_completion

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

# Most of the seconds in which a script starts; a fork of a process that has them starts at once.
PRELOAD = "sft torch.distributed.run transformers.models.qwen2.modeling_qwen2"
PRELOAD += " transformers.models.llama.modeling_llama"


class Forked:
    """Stands in for subprocess.Popen: `python SCRIPT …` or torchrun, as forks of a process that has imported
    torch.
    """

    def __init__(
        self, command: list, stdout: TextIO, stderr: TextIO, cwd: Path = ROOT, env: dict = ENVIRONMENT
    ) -> None:
        multiprocessing.set_forkserver_preload(PRELOAD.split())
        with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"):
            multiprocessing.forkserver.ensure_running()
        started = (list(map(str, command[1:])), [stdout.name, stderr.name], cwd, dict(env))
        self.process = multiprocessing.get_context("forkserver").Process(target=as_program, args=started)
        self.process.start()
        self.terminate = self.process.terminate

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit code; None if it goes on for longer than this."""
        self.process.join(timeout)
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.process.pid, number)


def as_program(words: list[str], streams: list[str], cwd: Path, environment: dict[str, str]) -> None:
    """Does what `python WORD …` does, with its output and errors into these files."""
    os.chdir(cwd)
    os.environ.update(environment)
    for number, name in enumerate(streams, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if words[:2] == ["-m", "torch.distributed.run"]:

        def launch(config: torchrun.LaunchConfig, entrypoint: str) -> Callable[..., object]:
            agent = elastic_launch(replace(config, start_method="fork"), as_program)
            return lambda unbuffered, *worker: agent(list(worker), [], cwd, {})

        torchrun.elastic_launch = launch
        torchrun.run(torchrun.parse_args(words[2:]))
        return
    sys.argv, sys.path[:0] = words, [str(Path(words[0]).resolve().parent)]
    runpy.run_path(words[0], run_name="__main__")


def run_forked(*words: object) -> str:
    """What a script prints; it must end well."""
    with tempfile.NamedTemporaryFile("r") as output, tempfile.NamedTemporaryFile("r") as errors:
        program = Forked([sys.executable, *words], output, errors)
        code = program.wait(900)
        program.send_signal(signal.SIGKILL)  # nothing where it has ended
        assert code == 0, f"ended with {code}: {output.read()[-3000:]}\n{errors.read()[-3000:]}"
        return output.read()


TOOL = {"name": "add", "description": "adds", "parameters": {"a": {"type": "int"}, "b": {"type": "int"}}}


def sum_example(index: int, a: int, b: int) -> Example:
    right = [ToolCall("add", {"a": a, "b": b})]
    text = [ToolCall("add", {"a": str(a), "b": str(b)})]
    demonstrations = tuple(render_completion(calls, "add") for calls in (right, text, text))
    question = [{"role": "user", "content": f"add {a} and {b}"}]
    return Example(f"add-{index}", "sums", question, [TOOL], right, demonstrations)


def write_checkpoint(run: Path, state: dict) -> Path:
    """A complete checkpoint without tensors."""
    folder = run / f"step_{state['step']}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"state": state}))
    files = {"state.json": checkpoint._describe(folder / "state.json")}
    content = {"format": checkpoint.FORMAT, "files": files, "tensors": {}}
    (folder / "manifest.json").write_text(json.dumps(content | {"sha256": checkpoint._digest(content)}))
    return folder


def write_task(folder: Path) -> dict[str, object]:
    """Writes training and test file, and returns the settings of a run on them."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    random.Random(0).shuffle(pairs)
    examples = [sum_example(i, *pair) for i, pair in enumerate(pairs)]
    write_examples(folder / "train.jsonl", examples[:70])
    write_examples(folder / "test.jsonl", examples[70:])
    (folder / "template.txt").write_text("{tools}")
    return dict(
        data=folder / "train.jsonl", test_data=folder / "test.jsonl", prompt_template=folder / "template.txt",
        max_prompt_tokens=200, max_response_tokens=40, gradient_checkpointing="false", seed=0,
        prompts_per_step=8, minibatch_prompts=8, group_size=8, temperature=1.0, lr=2e-4, steps=25,
        eval_every=0, save_every=0, log_samples=1000,
    )


def warmed_up_task(folder: Path) -> dict[str, object]:
    """The settings of a GRPO run whose start model can copy, but writes two of three numbers as text."""
    settings = write_task(folder)
    warm_up = dict(model="tiny", tiny_hidden=64, sft_lr=4e-3, sft_batch=4, steps=220)
    run_dir = run_here(sft.main, settings | warm_up | {"run_dir": folder / "sft"})
    return settings | {"model": run_dir / "model"}


def as_arguments(settings: dict[str, object]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


@contextmanager
def own_process_group() -> Iterator[None]:
    """Cleans up what a script leaves in this process: process group, environment, signal handlers."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    environment = dict(os.environ)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)


def run_here(main: Callable[[list[str]], None], settings: dict[str, object]) -> Path:
    """Runs a script's main in this process, so that its lines can be broken. Returns run_dir."""
    with own_process_group(), mock.patch.object(monitor, "draw", draw_nothing):
        main(as_arguments(settings))
    return Path(settings["run_dir"])


def draw_nothing(_: list[Path], target: Path) -> None:
    """Stands in for ops.plot.draw, which takes longer than many a short run."""
    target.touch()


@contextmanager
def one_rank() -> Iterator[Ranks]:
    """A process group of this process alone."""
    with own_process_group():
        yield start_ranks(1.0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the model that a run leaves."""
    return load_file(folder / "model" / "model.safetensors")


ADVANTAGES = torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.2, -0.6, -0.6], [0.5, 0.6, -1.1]])


def settings_of(**changes) -> Config:
    """Settings of one update of the random groups."""
    base = dict(prompts_per_step=4, minibatch_prompts=4, group_size=3, temperature=0.8)
    return Config(**(base | dict(max_grad_norm=1e9, kl_coef=0.0) | changes))


def tiny_policy(seed: int = 0, temperature: float = 0.8):
    """A random model of one layer, with `logprobs` as fsdp.load_policy gives it."""
    model = build_tiny_model(build_tiny_tokenizer([], 300), hidden=16, layers=1, seed=seed)
    policy = prepare_model(model, CPU).train()
    policy.logprobs = partial(token_logprobs, policy, temperature=temperature)
    return policy


def chatty_model(tokenizer):
    """A random model whose distributions are peaked and depend on every token before."""
    model = build_tiny_model(tokenizer, hidden=32, layers=2, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return prepare_model(model, CPU)


def random_groups(seed: int = 0) -> list[Group]:
    """4 prompts with 3 completions each, all of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> list[int]:
        return torch.randint(250, (size,), generator=generator).tolist()

    groups = []
    for i in range(4):
        responses = [draw(2 + (5 * i + 3 * k) % 7) for k in range(3)]
        logprobs = [[0.0] * len(response) for response in responses]
        prompt = Prompt(f"p{i}", draw(3 + 2 * i))
        thoughts = [0, 1, len(responses[2])]
        groups.append(Group(prompt, responses, logprobs, ["", "", ""], [False] * 3, i, thoughts=thoughts))
    return groups


class Recorder:
    """Stands in for the optimizer: keeps each gradient instead of making a step."""

    def __init__(self, policy) -> None:
        self.policy = policy
        self.seen: list[dict[str, torch.Tensor]] = []

    def step(self) -> None:
        self.seen.append({name: p.grad.clone() for name, p in self.policy.named_parameters()})

    def zero_grad(self, set_to_none: bool) -> None:
        self.policy.zero_grad(set_to_none)


def assert_same_gradients(one: dict, other: dict, relative: float = 1e-5) -> None:
    for name in other:
        assert (one[name] - other[name]).norm() <= relative * other[name].norm() + 1e-9, name
