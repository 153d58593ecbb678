"""Checkpoints of a sharded run: saved by all ranks, verified, and loaded on any number of them.

    run_dir/latest                 the name of the newest complete checkpoint; replaced last
    run_dir/step_N/shard-*         safetensors: every rank's shards of the weights and of AdamW's state
    run_dir/step_N/state.json      step, seconds, flops, best score, number of ranks
    run_dir/step_N/config.json     and the tokenizer, so that an export needs nothing else
    run_dir/step_N/manifest.json   size and sha256 of every other file, shape of every tensor; written last

Nothing here reads or writes a pickle. A folder named step_N is always complete: it is written as step_N.tmp,
synced to the disk and renamed. Storage is torch.distributed.checkpoint's safetensors writer and reader, which
reshard on loading.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from tqdm import tqdm

from config import UserError
from distributed.fsdp import class_name, weights
from distributed.ranks import Ranks, first_problem, torchrun_job

FORMAT = 1
FILE_BYTES = (
    2**30
)  # the writer builds each file in memory first, so a rank's share is cut into files of about this size
OPTIMIZER = "optimizer."  # names of AdamW's tensors: optimizer.exp_avg.NAME and so on
FAILURES = (
    CheckpointException,
    Exception,
)  # the first is a BaseException; the tokenizer's writer raises bare Exception


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another model; the message names it and says what to do."""


def checkpoint_tensors(
    policy: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Tensor]:
    """Weights by parameter name and optimizer state as optimizer.KEY.NAME: views of the live, sharded
    storage.

    Tied weights appear once. 0-dim `step` is given as [1]: safetensors 0.4 makes slices of 0-dim tensors
    empty (issue 495).
    """
    tensors = weights(policy)
    for name, parameter in policy.named_parameters() if optimizer else ():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{OPTIMIZER}{key}.{name}"] = value.view(1) if value.dim() == 0 else value
    return tensors


# ----------------------------------------------------------------------------------------------------- saving


class Saver:
    """Writes a run's checkpoints and deletes old ones. Collective to make; every method is collective.

    keep: so many of the newest stay, and the one that state["best"]["step"] names. background: save() copies
    the tensors to CPU memory and returns; the files are written while training goes on, and finish() or the
    next save() commits them.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, keep: int, background: bool = False) -> None:
        self.run_dir, self.ranks, self.keep, self.background = run_dir, ranks, keep, background
        # Planning talks over a group of its own: the default one may be busy with training at that time.
        self.group = dist.new_group(backend="gloo")
        self.pending: tuple[dict, dict, threading.Thread, list] | None = None
        if ranks.main:  # what a kill left, also where nothing more will be saved
            self._clear()

    def save(self, state: dict, policy: nn.Module, tokenizer, optimizer: torch.optim.Optimizer) -> str:
        """Collective. Writes run_dir/step_N, N = state["step"]; returns "" or why it failed, the same on
        every rank.

        After a failure the checkpoints before it are as they were. In the background mode the sentence may be
        about the save before, whose end this one waits for.
        """
        before = self.finish()
        problem, tensors, state = "", {}, copy.deepcopy(state)  # the caller's dict goes on changing
        try:
            tensors = checkpoint_tensors(policy, optimizer)
            if self.ranks.main:
                needed = sum(
                    t.numel() * t.element_size() for t in tensors.values()
                )  # global shapes: that of all ranks
                problem = self._prepare(state, policy, tokenizer, needed)
            if self.background and not problem:
                tensors = BlockingAsyncStager().stage(tensors)
                if self.ranks.device.type == "cuda":
                    torch.cuda.synchronize()  # the copies are asynchronous
        except FAILURES as error:
            problem = _why(error)
        if problem := first_problem(problem, self.ranks):
            return "; ".join(filter(None, [before, self._give_up(state, problem)]))
        result: list = []
        thread = threading.Thread(target=lambda: result.append(self._write(state, tensors)), daemon=True)
        # In this thread where it may be: another one has its own current GPU and stream.
        thread.start() if self.background else thread.run()
        self.pending = state, {name: list(t.shape) for name, t in tensors.items()}, thread, result
        return before if self.background else "; ".join(filter(None, [before, self.finish()]))

    def finish(self) -> str:
        """Collective. Waits for the files being written, if any, and commits them; "" or why it failed."""
        if self.pending is None:
            return ""
        state, shapes, thread, result = self.pending
        if self.background:
            thread.join()
        self.pending = None
        files, problem = result[0]
        every = self.ranks.gather((files, problem))
        problem = next((f"{why} (rank {rank})" for rank, (_, why) in enumerate(every) if why), "")
        if not problem and self.ranks.main:
            try:
                self._commit(
                    state, shapes, {name: entry for files, _ in every for name, entry in files.items()}
                )
            except FAILURES as error:
                problem = _why(error)
        problem = first_problem(problem, self.ranks)
        return self._give_up(state, problem) if problem else ""

    def _give_up(self, state: dict, problem: str) -> str:
        """Removes what was written; the sentence for people."""
        if self.ranks.main:
            shutil.rmtree(self._folder(state), ignore_errors=True)
        there = ", ".join(f"step_{step}" for step in complete_steps(self.run_dir)) or "none yet"
        return f"checkpoint step_{state['step']} was not saved in {self.run_dir}: {problem}; complete ones: {there}"

    def _folder(self, state: dict) -> Path:
        return self.run_dir / f"step_{state['step']}.tmp"

    def _clear(self) -> None:
        for leftover in self.run_dir.glob("step_*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _prepare(self, state: dict, policy: nn.Module, tokenizer, needed: int) -> str:
        """On rank 0: room for the files, and those that are not tensors. Returns what is in the way, or
        "".
        """
        folder = self._folder(state)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._clear()
        free = shutil.disk_usage(self.run_dir).free
        if free < needed:
            return f"{needed / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB free; make room or lower keep_checkpoints"
        folder.mkdir()
        config = copy.deepcopy(policy.config)
        config.architectures = [class_name(policy)]
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        text = json.dumps({"format": FORMAT, "ranks": self.ranks.world, "state": state})
        (folder / "state.json").write_text(text, encoding="utf-8")
        return ""

    def _write(self, state: dict, tensors: dict[str, Tensor]) -> tuple[dict, str]:
        """Collective, on the saver's own group. This rank's files with their sizes and hashes, and why it
        failed.
        """
        folder, filled, places = self._folder(state), 0, {}
        for name, tensor in tensors.items():  # shapes are global, so every rank comes to the same split
            places[name] = 1 + filled // (FILE_BYTES * self.ranks.world)
            filled += tensor.numel() * tensor.element_size()
        try:
            if self.ranks.device.type == "cuda":
                torch.cuda.set_device(self.ranks.device)  # a new thread starts on GPU 0
            writer = HuggingFaceStorageWriter(str(folder), places, save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self.group)
            return {
                path.name: _describe(path) for path in folder.glob(f"shard-{self.ranks.rank + 1:05d}-*")
            }, ""
        except FAILURES as error:
            return {}, _why(error)

    def _commit(self, state: dict, shapes: dict[str, list[int]], files: dict[str, dict]) -> None:
        """On rank 0: manifest, rename, `latest`, and then the deletion of old checkpoints."""
        folder, final = self._folder(state), self.run_dir / f"step_{state['step']}"
        shards = {path.name for path in folder.glob("*.safetensors")}
        if shards != set(files):
            raise OSError(
                f"{min(shards ^ set(files))} is not seen by all ranks; run_dir must lie on a disk that all share"
            )
        files |= {path.name: _describe(path) for path in folder.iterdir() if path.name not in shards}
        content = {"format": FORMAT, "files": files, "tensors": shapes}
        _write_synced(folder / "manifest.json", json.dumps({"sha256": _digest(content), **content}, indent=0))
        _sync(folder)
        if final.exists():  # after a resume from an earlier step
            _remove(final, ".old.tmp", moved_by=folder)
        else:
            folder.rename(final)
        _sync(self.run_dir)
        _point_to(final)
        # Later ones can only be there where a choice of an earlier step was interrupted (choose_step).
        steps = [step for step in complete_steps(self.run_dir) if step <= state["step"]]
        best = (state.get("best") or {}).get("step")
        for step in steps[: -self.keep]:
            if step != best:
                _remove(self.run_dir / f"step_{step}", ".tmp")


def raise_problem(problem: str) -> None:
    """Raises CheckpointError for a problem that all ranks agree on; the checkpoints before it are as they were."""
    if problem:
        raise CheckpointError(problem)


def _point_to(folder: Path) -> None:
    """Makes `latest` name this checkpoint."""
    _write_synced(folder.with_name("latest.tmp"), folder.name)
    folder.with_name("latest.tmp").replace(folder.with_name("latest"))
    _sync(folder.parent)


def _remove(folder: Path, suffix: str, moved_by: Path | None = None) -> None:
    """Deletes a checkpoint under another name, so that a kill never leaves half of it; `moved_by` takes its
    place.
    """
    aside = folder.with_name(folder.name + suffix)
    folder.rename(aside)
    if moved_by:
        moved_by.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def _describe(path: Path) -> dict[str, Any]:
    """Size and hash of a file, which is on the disk when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Makes new names in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why(error: BaseException) -> str:
    """One line for an error, of the rank that had it."""
    if isinstance(error, CheckpointException) and error.failures:
        error = min(error.failures.items())[1][0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------------- loading


def complete_steps(run_dir: Path) -> list[int]:
    """The steps whose checkpoints are complete, oldest first."""
    folders = [path.parent.name[5:] for path in run_dir.glob("step_*/manifest.json")]
    return sorted(int(name) for name in folders if name.isdecimal())


def latest_checkpoint(run_dir: Path, step: int = 0) -> tuple[Path, dict] | None:
    """(folder, state) of the newest complete checkpoint, or of step N if N > 0; None where there is none at
    all.

    Raises CheckpointError if step N is not there, or state.json cannot be read.
    """
    steps, pointer = complete_steps(run_dir), run_dir / "latest"
    named = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    if step and step not in steps:
        there = ", ".join(f"step_{n}" for n in steps) or "none"
        raise CheckpointError(f"{run_dir} has no complete checkpoint step_{step}; there are: {there}")
    if named and not steps:
        raise CheckpointError(
            f"{run_dir / named} has no manifest.json: incomplete, or of an older version; start again"
        )
    if not steps:
        return None
    names = {f"step_{n}": n for n in steps}
    folder = (
        run_dir / f"step_{step or names.get(named, steps[-1])}"
    )  # a kill while step_N is replaced: the one before
    try:
        return folder, json.loads((folder / "state.json").read_text(encoding="utf-8"))["state"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder / 'state.json'} is damaged or missing{_earlier(folder)}") from None


def choose_step(run_dir: Path, step: int, ranks: Ranks) -> None:
    """Collective. --resume_step: from now on `latest` names step N's checkpoint. Raises CheckpointError if it
    is not there.

    Later checkpoints become step_M.given_up, because they would pass for the new branch's; who does not need
    them deletes them. Not after a restart by torchrun, whose command line is the old one: what was saved
    since then counts. Its count of restarts would not tell, and is not the same on all nodes.
    """
    problem, job, note = "", torchrun_job(), run_dir / "resumed_by"
    again = "TORCHELASTIC_RUN_ID" in os.environ and note.exists() and note.read_text(encoding="utf-8") == job
    if step and ranks.main and not again:
        try:
            _point_to(latest_checkpoint(run_dir, step)[0])
            for later in (n for n in complete_steps(run_dir) if n > step):
                shutil.rmtree(run_dir / f"step_{later}.given_up", ignore_errors=True)
                (run_dir / f"step_{later}").rename(run_dir / f"step_{later}.given_up")
                print(
                    f"resume_step: step_{later} is step_{later}.given_up now; delete it if you do not need it"
                )
            note.write_text(job, encoding="utf-8")
        except CheckpointError as error:
            problem = str(error)
    if problem := first_problem(problem, ranks):
        raise CheckpointError(problem)


def _earlier(folder: Path) -> str:
    """The end of a sentence: what to go on from instead of this checkpoint."""
    number = folder.name.removeprefix("step_")
    steps = [n for n in complete_steps(folder.parent) if number.isdecimal() and n < int(number)]
    if not steps:
        return "; there is no earlier checkpoint"
    return f"; earlier ones: {', '.join(f'step_{n}' for n in steps)}; --resume_step {steps[-1]} goes on from the one before"


def _manifest(folder: Path) -> dict:
    """The manifest, whose own hash is right. Raises CheckpointError."""
    try:
        content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if content.pop("sha256") == _digest(content) and content["format"] == FORMAT:
            return content
        why = "is damaged or of another version"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        why = "is damaged or missing"
    raise CheckpointError(f"{folder / 'manifest.json'} {why}{_earlier(folder)}")


def check_files(folder: Path, ranks: Ranks) -> None:
    """Collective. Compares every file with the manifest, each rank a part of them.

    Raises CheckpointError on every rank, naming a damaged or missing file and the earlier checkpoints.
    """
    if problem := first_problem(_damage(folder, ranks.rank, ranks.world), ranks):
        raise CheckpointError(problem)


def _damage(folder: Path, rank: int, world: int) -> str:
    """What is wrong with this rank's part of the files, or ""."""
    try:
        files = _manifest(folder)["files"]
    except CheckpointError as error:
        return str(error)
    # The reader opens every safetensors file of the folder, so none may be there that this project did not
    # write.
    strange = [path.name for path in folder.glob("*.safetensors") if path.name not in files]
    if strange:
        return f"{folder / strange[0]} is not in the manifest; delete it if you know where it is from{_earlier(folder)}"
    own = sorted(files, key=lambda name: files[name]["bytes"], reverse=True)[rank::world]
    large = sum(files[name]["bytes"] for name in own) > 4 * FILE_BYTES
    for name in tqdm(own, desc=f"checking {folder.name}", disable=rank > 0 or not large):
        path = folder / name
        if not path.is_file():
            return f"{path} is missing{_earlier(folder)}"
        if _describe(path) != files[name]:
            return f"{path} is damaged: size or sha256 differ from manifest.json{_earlier(folder)}"
    return ""


def load_checkpoint(
    folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer | None, ranks: Ranks
) -> None:
    """Collective. Reads weights and optimizer state into sharded tensors, whatever the number of ranks that
    saved them.

    Verifies all files first. Learning rate and the like stay as the optimizer has them. Raises
    CheckpointError.
    """
    check_files(folder, ranks)
    shapes = _manifest(folder)["tensors"]
    if optimizer:
        _make_room(policy, optimizer, shapes)
    tensors = checkpoint_tensors(policy, optimizer)
    expected = {name: shape for name, shape in shapes.items() if optimizer or not name.startswith(OPTIMIZER)}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            sides = (
                f"{name} is {expected.get(name, 'absent')} there and {found.get(name, 'absent')} in the model"
            )
            raise CheckpointError(
                f"{folder} is of another model: {sides}; choose the model that the run began with"
            )
    if problem := first_problem(_read(folder, tensors), ranks):
        raise CheckpointError(problem)


def _make_room(policy: nn.Module, optimizer: torch.optim.Optimizer, shapes: dict[str, list[int]]) -> None:
    """Gives the optimizer the (zero) state tensors that the checkpoint has: AdamW makes them in its first
    step only.
    """
    on_device = {}  # whether AdamW wants the step counter beside the parameter
    for group in optimizer.param_groups:
        on_device |= {p: bool(group.get("fused") or group.get("capturable")) for p in group["params"]}
    names = dict(policy.named_parameters())
    optimizer.state.clear()  # parameters that had no gradient yet have no state there
    for full_name in (name for name in shapes if name.startswith(OPTIMIZER)):
        key, _, name = full_name.removeprefix(OPTIMIZER).partition(".")
        parameter = names.get(name)
        if parameter in on_device:
            step = torch.zeros((), device=parameter.device if on_device[parameter] else "cpu")
            optimizer.state[parameter][key] = step if key == "step" else torch.zeros_like(parameter)


def _read(folder: Path, tensors: dict[str, Tensor], alone: bool = False) -> str:
    """Fills the tensors in place from a checkpoint whose files were verified; why it failed, or ""."""
    try:
        with warnings.catch_warnings(action="ignore"):  # that no process group is used, where that is meant
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
        return ""
    except FAILURES as error:
        return f"{folder} cannot be read: {_why(error)}{_earlier(folder)}"


def full_state(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights of a checkpoint, unsharded on the CPU, as dtype. Needs no process group. Raises
    CheckpointError.
    """
    if problem := _damage(folder, 0, 1):
        raise CheckpointError(problem)
    shapes = {
        name: shape for name, shape in _manifest(folder)["tensors"].items() if not name.startswith(OPTIMIZER)
    }
    state = {
        name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()
    }  # the reader casts as it copies
    if problem := _read(folder, state, alone=True):
        raise CheckpointError(problem)
    return state
