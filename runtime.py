"""What every script needs around the method: one config, ranks, the run directory and its log, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from model import export


class ConfigError(ValueError):
    """A setting that cannot work; the message names the key and what to do."""


class Interrupted(Exception):
    """A run that was asked to stop and has saved a checkpoint."""

    def __init__(self, run_dir: str, step: int) -> None:
        go_on = f"python {Path(sys.argv[0]).name} --config {Path(run_dir) / 'config.yaml'} --resume true"
        super().__init__(f"interrupted after step {step}, everything is saved; to go on: {go_on}")


def _key(default: Any, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """Every setting of grpo.py and sft.py. Defaults are the paper's (arXiv 2505.00024). YAML < --key value."""

    # what is trained, on what, where to
    model: str = _key("Qwen/Qwen2.5-7B-Instruct", 'Hugging Face folder or hub id; "tiny" builds the demo model')
    data: str = _key("", 'training file(s), comma-separated (xLAM, ToolACE or our JSONL), or "synthetic"')
    test_data: str = _key("", "held-out file; empty: test_share of data")
    test_share: float = _key(0.1, "share of the data held out for evaluation (paper: 90/10)")
    prompt_template: str = _key("", "file with a system prompt that has a {tools} slot; empty: the project's own")
    run_dir: str = _key("runs/grpo", "where config, logs, samples, checkpoints and the final model go")
    resume: bool = _key(False, "go on from the latest checkpoint in run_dir")
    overwrite: bool = _key(False, "delete an existing run_dir first")
    seed: int = _key(0, "decides the data order and, with step and prompt, every sample")
    # the method
    prompts_per_step: int = _key(1024, "P: prompts per rollout batch")
    group_size: int = _key(5, "G: completions per prompt")
    minibatch_prompts: int = _key(256, "prompts per optimizer update; 1024 / 256 = 4 updates per rollout batch")
    epochs: float = _key(7.0, "passes over the training prompts; ignored when steps > 0")
    steps: int = _key(0, "rollout batches (sft.py: optimizer steps); 0: from epochs")
    lr: float = _key(1e-6, "AdamW learning rate, constant")
    weight_decay: float = _key(0.0, "AdamW weight decay")
    max_grad_norm: float = _key(1.0, "gradient clipping by global norm")
    temperature: float = _key(0.7, "sampling temperature; also divides the logits of every log-prob")
    clip_eps: float = _key(0.2, "epsilon of the clipped ratio")
    kl_coef: float = _key(1e-3, "beta: weight of the k3 KL to the frozen start model; 0 skips the reference")
    reward: str = _key("binary", "row of reward.REWARDS: binary, no_reason, partial_format, partial_names")
    shuffle_rewards: bool = _key(False, "negative control: rewards are permuted within the batch; nothing may be learnt")
    max_prompt_tokens: int = _key(4096, "longer prompts are counted and skipped")
    max_response_tokens: int = _key(8192, "longer completions are cut off and count as truncated")
    # speed and memory
    rollout_batch_size: int = _key(256, "sequences decoded at once per rank")
    max_tokens_per_micro_batch: int = _key(16384, "tokens per forward/backward per rank; changes no result")
    gradient_checkpointing: bool = _key(True, "recompute activations in the backward: less memory, more time")
    timeout_minutes: float = _key(60.0, "a rank that waits longer for the others stops the run")
    threads: int = _key(0, "CPU threads per process; 0: torch's default")
    # looking and saving
    eval_every: int = _key(10, "greedy evaluation on the held-out cases every N steps; 0: only first and last")
    eval_cases: int = _key(200, "held-out cases used by it")
    save_every: int = _key(10, "checkpoint every N steps; 0: only at the end")
    keep_checkpoints: int = _key(2, "older ones are deleted")
    log_samples: int = _key(64, "completions per step written to samples.jsonl; 0: none")
    # supervised fine-tuning (sft.py)
    sft_batch: int = _key(32, "examples per optimizer step")
    sft_lr: float = _key(2e-5, "learning rate of sft.py and of the demo's warm-up")
    sft_decay: bool = _key(True, "let sft_lr fall linearly to 0 over the run")
    sft_flops: float = _key(0.0, "sft.py stops after this much training compute; 0: after steps or epochs")
    # the demo: a tiny model from nothing, on generated data
    warmup_steps: int = _key(0, "SFT steps on imperfect demonstrations before RL; for a model that knows nothing yet")
    tiny_hidden: int = _key(96, "hidden size of the tiny model")
    tiny_layers: int = _key(3, "layers of the tiny model")
    tiny_vocab: int = _key(800, "tokens of its tokenizer")
    synthetic_train: int = _key(1000, "generated training queries")
    synthetic_test: int = _key(150, "generated held-out cases, in each of the two splits")


def load_config(arguments: list[str]) -> Config:
    """`--config FILE.yaml` and `--key value` pairs -> Config. Raises ConfigError with one sentence.

    A flag without a value is true. A YAML file may name a `base` file, relative to itself, that it refines.
    """
    values: dict[str, Any] = {}
    pairs = _pairs(arguments)
    for path in [value for key, value in pairs if key == "config"]:
        values |= _read_yaml(Path(path))
    values |= {key: value for key, value in pairs if key != "config"}
    fields = {f.name: f for f in dataclasses.fields(Config)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            raise ConfigError(f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    config = Config(**{key: _convert(key, value, type(fields[key].default)) for key, value in values.items()})
    _check(config)
    return config


def _pairs(arguments: list[str]) -> list[tuple[str, str]]:
    pairs, rest = [], list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--"):
            raise ConfigError(f"settings are given as --key value, not {key!r}")
        key, equals, value = key[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        pairs.append((key, value))
    return pairs


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"config: cannot read {path}; the ready ones are in configs/") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"config: {path} is not YAML" + (f" (line {mark.line + 1})" if mark else "")) from None
    if not isinstance(values, dict):
        raise ConfigError(f"config: {path} must hold `key: value` lines")
    base = values.pop("base", None)
    return (_read_yaml(path.parent / base) if base else {}) | values


def _convert(key: str, value: Any, kind: type) -> Any:
    """The YAML or command-line value as `kind`. "1e-6" is a string to YAML, and a bool must not pass for an int."""
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
        if isinstance(value, (bool, list, dict)) or value is None:
            raise ValueError
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        return kind(float(value)) if kind is int else kind(value)
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"{key} must be a {kind.__name__}, not {value!r}") from None


def _check(c: Config) -> None:
    """Refuses settings that cannot work together, before anything is loaded."""
    positive = "prompts_per_step group_size minibatch_prompts max_prompt_tokens max_response_tokens rollout_batch_size"
    for key in f"{positive} max_tokens_per_micro_batch sft_batch temperature keep_checkpoints".split():
        if getattr(c, key) <= 0:
            raise ConfigError(f"{key} must be greater than 0, not {getattr(c, key)}")
    for key in ("lr", "sft_lr", "kl_coef", "steps", "warmup_steps", "epochs", "clip_eps", "max_grad_norm"):
        if not getattr(c, key) >= 0:
            raise ConfigError(f"{key} must not be negative, not {getattr(c, key)}")
    if c.group_size < 2:
        raise ConfigError("group_size must be at least 2: an advantage compares the completions of one prompt")
    if c.prompts_per_step % c.minibatch_prompts:
        raise ConfigError(
            f"prompts_per_step ({c.prompts_per_step}) must be a multiple of minibatch_prompts ({c.minibatch_prompts})"
        )
    if not 0 <= c.test_share < 1:
        raise ConfigError(f"test_share must be from 0 to below 1, not {c.test_share}")


# --------------------------------------------------------------------------------------------------------- ranks


@dataclass(frozen=True)
class Ranks:
    """This process among all: rank of world, and its device. Always a process group, also with one process."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes logs and files."""
        return self.rank == 0

    def sum(self, values: Iterable[float]) -> list[float]:
        """Collective. Element-wise sums over all ranks, in float64."""
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor, group=None)
        return tensor.tolist()

    def gather(self, item: Any) -> list[Any]:
        """Collective. The items of all ranks, in rank order, on every rank."""
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def sum_gradients(self, model: torch.nn.Module) -> None:
        """Collective. Adds up the gradients of all ranks in place; each rank holds its share of one global sum."""
        if self.world == 1:
            return
        bucket: list[torch.Tensor] = []
        parameters = list(model.parameters())
        for i, parameter in enumerate(parameters):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            # One call per bucket: few enough for speed, small enough that the copy costs little memory.
            if sum(g.numel() for g in bucket) > 2**25 or i + 1 == len(parameters):
                flat = torch.cat([g.flatten() for g in bucket])
                dist.all_reduce(flat)
                for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket])):
                    gradient.copy_(part.view_as(gradient))
                bucket = []


def start_ranks(timeout_minutes: float = 60.0, threads: int = 0) -> Ranks:
    """Collective. Joins torchrun's process group, or makes one of a single process: one path for 1 and N."""
    single = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=0)
    if "RANK" not in os.environ:
        os.environ.update({key: str(value) for key, value in single.items()})
    if threads:
        torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # Gradients travel by NCCL, small counts and objects by gloo.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


class StopFlag:
    """Set by SIGINT or SIGTERM; a second one ends the process at once. `agreed` makes all ranks stop at one step."""

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number
        print("\nstopping after this step; press again to stop at once", file=sys.stderr)

    def agreed(self, ranks: Ranks) -> bool:
        """Collective. Whether any rank was asked to stop."""
        return ranks.sum([float(self.signal)])[0] > 0


# ------------------------------------------------------------------------------------------- run directory and log


def open_run(config: Config, ranks: Ranks) -> Path:
    """Collective. Makes run_dir with config.yaml and git.txt, or checks that it may be resumed.

    Raises ConfigError when the directory is in use and neither resume nor overwrite is set.
    """
    path, problem = Path(config.run_dir), ""
    if ranks.main:
        # What failed at start leaves its config behind, and may be started again under the same name.
        used = path.exists() and any(entry.name not in ("config.yaml", "git.txt") for entry in path.iterdir())
        if config.resume and not (path / "latest").exists() and not (path / "warmup").exists():
            problem = f"run_dir: nothing to resume in {path}; start without resume"
        elif used and not config.resume and not config.overwrite:
            problem = f"run_dir: {path} exists; add --resume true to go on, --overwrite true to replace it"
        elif used and not config.resume and not (path / "config.yaml").exists():
            problem = f"run_dir: {path} is not a run directory, so it is not overwritten; delete it yourself"
    problem = ranks.gather(problem)[0]
    if problem:
        raise ConfigError(problem)
    if ranks.main:
        if config.overwrite and not config.resume:
            shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True, exist_ok=True)
        # Without the two switches: whoever starts from this file must not delete or continue a run by accident.
        saved = dataclasses.asdict(dataclasses.replace(config, resume=False, overwrite=False))
        lines = yaml.safe_dump(saved, sort_keys=False, allow_unicode=True)
        (path / "config.yaml").write_text(lines, encoding="utf-8")
        (path / "git.txt").write_text(git_state(), encoding="utf-8")
    ranks.gather(None)
    return path


def git_state() -> str:
    """The commit and what differs from it, so that a run can be traced to its code."""
    here = Path(__file__).parent
    run = lambda *words: subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, errors="replace")  # noqa: E731
    commit = run("rev-parse", "HEAD")
    if commit.returncode:
        return "no git repository\n"
    return f"commit {commit.stdout}{run('status', '--short').stdout}{run('diff', 'HEAD').stdout}"


def append_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Appends one JSON line per row."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict]:
    """All rows of a JSONL file that we wrote; [] if there is none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def cut_log(path: Path, step: int) -> None:
    """Drops rows of steps after `step`: a resumed run does them again."""
    if path.exists():
        kept = [row for row in read_jsonl(path) if row["step"] <= step]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")


class Clock:
    """Seconds by phase: `with clock("rollout"): …` adds to clock.seconds["rollout"]."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stack: list[tuple[str, float]] = []

    def __call__(self, phase: str) -> Clock:
        self._stack.append((phase, time.perf_counter()))
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        phase, start = self._stack.pop()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


# --------------------------------------------------------------------------------------------------- checkpoints


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a folder beside `path` to write into and renames it at the end: a folder named `path` is always complete."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


def save_checkpoint(run_dir: Path, state: dict, policy, tokenizer, optimizer, ranks: Ranks, keep: int) -> None:
    """Collective. Writes run_dir/step_N, a Hugging Face folder with optimizer.pt and state.json beside the weights.

    state: at least `step`. `latest` names the newest complete checkpoint and changes last; then old ones are deleted.
    """
    if ranks.main:
        name = f"step_{state['step']}"
        with whole_folder(run_dir / name) as folder:
            export(policy, tokenizer, folder)
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
        pointer = run_dir / "latest.tmp"
        pointer.write_text(name, encoding="utf-8")
        pointer.replace(run_dir / "latest")
        steps = sorted(run_dir.glob("step_*[0-9]"), key=lambda p: int(p.name[5:]))
        for old in steps[:-keep]:
            shutil.rmtree(old)
    ranks.gather(None)


def latest_checkpoint(run_dir: Path) -> tuple[Path, dict] | None:
    """(folder, state) of the newest complete checkpoint, or None."""
    pointer = run_dir / "latest"
    if not pointer.exists():
        return None
    folder = run_dir / pointer.read_text(encoding="utf-8").strip()
    return folder, json.loads((folder / "state.json").read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------- data by step


def batch_for_step(count: int, step: int, size: int, seed: int) -> list[int]:
    """The indices of step `step` (from 0): a fresh shuffle per pass, and a function of position alone.

    Resume computes this instead of replaying a generator. A batch may span two passes.
    """
    indices = []
    for position in range(step * size, (step + 1) * size):
        epoch, offset = divmod(position, count)
        if not indices or offset == 0:
            order = random.Random(f"{seed}/{epoch}").sample(range(count), count)
        indices.append(order[offset])
    return indices


def run_script(main: Callable[[list[str]], None], errors: tuple[type[Exception], ...]) -> None:
    """Runs a script's main; the named errors end it with their one sentence instead of a traceback."""
    try:
        main(sys.argv[1:])
    except errors as error:
        sys.exit(f"error: {error}")
    except Interrupted as stopped:
        if int(os.environ.get("RANK", 0)) == 0:
            print(stopped, file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit("interrupted before the first step")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
