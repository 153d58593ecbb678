"""What every script needs around the method: ranks, the run directory and its log, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from config import Config, ConfigError
from model import export


class Interrupted(Exception):
    """A run that was asked to stop and has saved a checkpoint."""

    def __init__(self, run_dir: str, step: int) -> None:
        script, saved = Path(sys.argv[0]).name, Path(run_dir) / "config.yaml"
        start = "bash run.sh train" if script == "grpo.py" else f"python {script} --config"
        super().__init__(f"interrupted after step {step}, all is saved; to go on: {start} {saved} --resume true")


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
        dist.all_reduce(tensor)
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
        bucket, filled = [], 0
        parameters = list(model.parameters())
        for i, parameter in enumerate(parameters):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            filled += parameter.numel()
            # One call per bucket: few enough for speed, small enough that the copy costs little memory.
            if filled > 2**25 or i + 1 == len(parameters):
                flat = torch.cat([g.flatten() for g in bucket])
                dist.all_reduce(flat)
                for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket])):
                    gradient.copy_(part.view_as(gradient))
                bucket, filled = [], 0


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


def _prints() -> bool:
    """Whether this process speaks for its machine, so that eight ranks do not say the same eight times."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


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
        if _prints():
            os.write(2, b"\nstopping after this step; a second signal stops at once\n")  # print() may not be re-entered

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
        try:
            problem = _claim(path, config)
        except OSError as error:
            problem = f"run_dir: cannot use {path}: {error.strerror}"
    problem = ranks.gather(problem)[0]
    if problem:
        raise ConfigError(problem)
    return path


# What a resumed run must share with its first part; steps, rates, saving, speed and the like may change.
FIXED_KEYS = (
    "model data test_data test_share prompt_template seed prompts_per_step group_size minibatch_prompts temperature "
    "reward lenient shuffle_rewards skip_zero_variance resample_rounds max_prompt_tokens max_response_tokens warmup_steps "
    "sft_batch synthetic_train"
).split()


def _claim(path: Path, config: Config) -> str:
    """Makes the run directory for this run; returns why it cannot, or "". """
    # What failed at start leaves its config behind, and may be started again under the same name.
    used = path.exists() and any(entry.name not in ("config.yaml", "git.txt") for entry in path.iterdir())
    saved = dataclasses.asdict(config)
    if config.resume:
        if not any((path / name).exists() for name in ("latest", "warmup/latest", "warmup/model")):
            return f"run_dir: {path} has no checkpoint to resume; start without resume, or with --overwrite true"
        before = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        before = dataclasses.asdict(Config()) | before  # a setting that is newer than the run had its default then
        changed = [f"{key} ({before[key]!r} -> {saved[key]!r})" for key in FIXED_KEYS if before[key] != saved[key]]
        if changed:
            return f"resume: these settings must stay as they were: {', '.join(changed)}"
    elif used and not config.overwrite:
        hint = "--resume true to go on, " if (path / "latest").exists() else ""
        return f"run_dir: {path} exists; add {hint}--overwrite true to replace it, or another --run_dir"
    elif used and not ((path / "config.yaml").exists() and (path / "git.txt").exists()):
        return f"run_dir: {path} is not a run directory, so it is not overwritten; delete it yourself"
    elif used and path.resolve() in Path(config.model).resolve().parents:
        return f"model: {config.model} lies in {path}, which would be overwritten; choose another run_dir"
    if used and not config.resume:
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    # Without the two switches: whoever starts from this file must not delete or continue a run by accident.
    saved |= {"resume": False, "overwrite": False}
    text = yaml.safe_dump(saved, sort_keys=False, allow_unicode=True)
    (path / "config.yaml").write_text(text, encoding="utf-8")
    (path / "git.txt").write_text(git_state(), encoding="utf-8")
    return ""


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
    """All whole rows of a JSONL file that we wrote; [] if there is none. A last line cut off by a kill is left out."""
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [json.loads(line) for line in lines[:-1]]  # not splitlines(): a completion may hold U+2028


def cut_log(path: Path, step: int) -> None:
    """Drops rows of steps after `step`: a resumed run does them again."""
    if path.exists():
        rows = [row for row in read_jsonl(path) if row["step"] <= step]
        shorter = path.with_name(path.name + ".tmp")
        shorter.write_text("", encoding="utf-8")
        append_jsonl(shorter, rows)
        shorter.replace(path)


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
    message, code = "", 1
    try:
        main(sys.argv[1:])
    except errors as error:
        message = f"error: {error}"
    except Interrupted as stopped:
        message, code = str(stopped), 130
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except torch.OutOfMemoryError:
        message = "error: out of GPU memory; lower rollout_batch_size (rollout) or max_tokens_per_micro_batch (update)"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if message:
        if _prints():
            print(message, file=sys.stderr)
        sys.exit(code)
