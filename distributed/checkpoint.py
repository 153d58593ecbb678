"""Checkpoints of a sharded run: saved by all ranks, verified, and loaded on any number of them.

    run_dir/latest                 the name of the newest complete checkpoint, for people and scripts
    run_dir/step_N/shard-*         safetensors: what is trained (all weights, or the adapters), AdamW's state
    run_dir/step_N/state.json      step, seconds, flops, best score
    run_dir/step_N/config.json     and the tokenizer, so that an export needs nothing else
    run_dir/step_N/manifest.json   size and sha256 of every other file, shape of every tensor; written last

Nothing here reads or writes a pickle. A folder named step_N is always complete: it is written as step_N.tmp,
synced to the disk and renamed. PyTorch's distributed safetensors writer and reader do the resharding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.optim import Optimizer

from config import UserError
from corpus.sources import write_atomic
from distributed.fsdp import weights
from distributed.ranks import Ranks, first_problem, torchrun_job
from distributed.weights import config_to_save
from kernel.lora import ADAPTER, adapters

FORMAT = 1
FILE_BYTES = 2**30  # the writer builds each file in memory first, so a rank's share is cut into such files
OPTIMIZER = "optimizer."  # names of AdamW's tensors: optimizer.exp_avg.NAME and so on
FAILURES = (dcp.CheckpointException, Exception)  # a BaseException; tokenizers raise a bare Exception


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, of another model or cannot be written; says what to do."""


def checkpoint_tensors(policy: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """What is trained by name, tied weights once, and AdamW's state as optimizer.KEY.NAME: views of the live
    storage. Of a LoRA run these are its adapters: the weights under them are in the start model's folder.
    """
    tensors = {name: tensor.detach() for name, tensor in adapters(policy).items()} or weights(policy)
    for name, parameter in policy.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            # The 0-dim `step` as [1]: safetensors 0.4 makes slices of 0-dim tensors empty (issue 495).
            tensors[f"{OPTIMIZER}{key}.{name}"] = value.view(1) if value.dim() == 0 else value
    return tensors


@contextlib.contextmanager
def _on_all(ranks: Ranks, failures=CheckpointError) -> Iterator[None]:
    """Collective at its end. What fails inside on one rank is raised on all, as CheckpointError."""
    problem = ""
    try:
        yield
    except failures as error:
        problem = _why(error)
    if problem := first_problem(problem, ranks):
        raise CheckpointError(problem)


def _why(error: BaseException) -> str:
    """One line for an error, of the rank that had it."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error = min(error.failures.items())[1][0]
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Saver:
    """Collective to make. Writes a run's checkpoints and deletes old ones.

    keep: so many of the newest stay, and the one that state["best"]["step"] names. background: save() copies
    the tensors to CPU memory and returns; finish() or the next save() commits what a thread has written.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, keep: int, background: bool = False) -> None:
        self.run_dir, self.ranks = run_dir, ranks
        self.keep, self.background = keep, background
        # Planning talks over a group of its own: the default one may be busy with training at that time.
        self.group = dist.new_group(timeout=ranks.timeout, backend="gloo")
        self.folder: Path | None = None  # that is being written
        self.files: dict[str, dict] = {}  # what this rank wrote into it, with size and hash
        self.problem = ""  # why this rank could not
        if ranks.main and (steps := complete_steps(run_dir)):  # the kill may have come just before
            write_atomic(run_dir / "latest", f"step_{steps[-1]}")

    def save(self, state: dict, policy: nn.Module, tokenizer, optimizer: Optimizer) -> None:
        """Collective. Writes run_dir/step_N, N = state["step"]. Raises CheckpointError on all ranks alike.

        Older checkpoints then stay. With background, it may be the save before that failed.
        """
        self.finish()
        self.folder = self.run_dir / f"step_{state['step']}.tmp"
        self.best_step = (state.get("best") or {}).get("step")
        with self._together():
            tensors = checkpoint_tensors(policy, optimizer)
            if self.ranks.main:
                self._prepare(state, policy, tokenizer, tensors)
            if self.background:
                tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        self.shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        self.thread = threading.Thread(target=self._write, args=(tensors,), daemon=True)
        self.thread.start()
        if not self.background:
            self.finish()

    def finish(self) -> None:
        """Collective. Waits for the files being written, if any, and commits them. Raises CheckpointError."""
        if self.folder is None:
            return
        self.thread.join()
        every = self.ranks.gather((self.files, self.problem))
        with self._together():
            if problems := [problem for _, problem in every if problem]:
                raise OSError(problems[0])
            if self.ranks.main:
                self._commit({name: entry for files, _ in every for name, entry in files.items()})
        self.folder = None

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Collective at its end. What fails inside on one rank ends this save on all of them."""
        try:
            with _on_all(self.ranks, FAILURES):
                yield
        except CheckpointError as error:
            folder, self.folder = self.folder, None
            if self.ranks.main:
                shutil.rmtree(folder, ignore_errors=True)
            what = f"checkpoint {folder.stem} was not saved in {self.run_dir}: {error}"
            raise CheckpointError(f"{what}; complete ones: {_names(complete_steps(self.run_dir))}") from None

    def _prepare(self, state: dict, policy: nn.Module, tokenizer, tensors: dict[str, Tensor]) -> None:
        """On rank 0: room for the files of all ranks, and those that are not tensors."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        needed = sum(t.numel() * t.element_size() for t in tensors.values()) / 1e9  # shapes are global
        free = shutil.disk_usage(self.run_dir).free / 1e9
        if free < needed:
            raise OSError(f"{needed:.3g} GB needed, {free:.3g} GB free; make room or lower keep_checkpoints")
        self.folder.mkdir()
        config_to_save(policy).save_pretrained(self.folder)
        tokenizer.save_pretrained(self.folder)
        (self.folder / "state.json").write_text(json.dumps({"state": state}), encoding="utf-8")

    def _write(self, tensors: dict[str, Tensor]) -> None:
        """Collective, on the saver's own group. Leaves this rank's files, or why it failed, in the saver."""
        self.files, self.problem = {}, ""
        places, filled = {}, 0
        for name, tensor in tensors.items():  # shapes are global, so every rank comes to the same split
            places[name] = 1 + filled // (FILE_BYTES * self.ranks.world)
            filled += tensor.numel() * tensor.element_size()
        try:
            if self.ranks.device.type == "cuda":
                torch.cuda.set_device(self.ranks.device)  # a new thread starts on GPU 0
            writer = dcp.HuggingFaceStorageWriter(str(self.folder), places, save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self.group)
            own = self.folder.glob(f"shard-{self.ranks.rank + 1:05d}-*")
            self.files = {path.name: _describe(path) for path in own}
        except FAILURES as error:
            self.problem = _why(error)

    def _commit(self, files: dict[str, dict]) -> None:
        """On rank 0: manifest, rename, `latest`, and then the deletion of old checkpoints."""
        shards = {path.name for path in self.folder.glob("*.safetensors")}
        if strange := shards ^ files.keys():
            raise OSError(f"not all ranks see {min(strange)}; run_dir must lie on a disk that all share")
        files = {path.name: files.get(path.name) or _describe(path) for path in self.folder.iterdir()}
        content = {"format": FORMAT, "files": files, "tensors": self.shapes}
        write_atomic(self.folder / "manifest.json", json.dumps({"sha256": _digest(content), **content}))
        self.folder.rename(self.folder.with_suffix(""))
        write_atomic(self.run_dir / "latest", self.folder.stem)
        for step in complete_steps(self.run_dir)[: -self.keep]:
            if step != self.best_step:
                aside = self.run_dir / f"step_{step}.tmp"  # so that a kill never leaves half a checkpoint
                aside.with_suffix("").rename(aside)
                shutil.rmtree(aside, ignore_errors=True)


def _describe(path: Path) -> dict[str, int | str]:
    """Size and hash of a file, which is on the disk when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def complete_steps(run_dir: Path) -> list[int]:
    """The steps whose checkpoints are complete, oldest first; `latest` is not asked."""
    folders = [path.parent.name[5:] for path in run_dir.glob("step_*/manifest.json")]
    return sorted(int(name) for name in folders if name.isdecimal())


def _names(steps: list[int]) -> str:
    return ", ".join(f"step_{step}" for step in steps) or "none"


def latest_checkpoint(run_dir: Path, step: int = 0) -> tuple[Path, dict] | None:
    """(folder, state) of the newest complete checkpoint, or of step N if N > 0; None where there is none.

    Raises CheckpointError if step N, or all that `latest` spoke of, is gone or state.json cannot be read.
    """
    steps = complete_steps(run_dir)
    if not steps and not step and not (run_dir / "latest").exists():
        return None
    if not steps or (step and step not in steps):
        raise CheckpointError(f"{run_dir} has no complete step_{step or 'N'}; there are: {_names(steps)}")
    folder = run_dir / f"step_{step or steps[-1]}"
    _check_file(folder, "state.json", _manifest(folder)["files"])
    return folder, json.loads((folder / "state.json").read_text(encoding="utf-8"))["state"]


def _earlier(folder: Path) -> str:
    """The end of a sentence: what to go on from instead of this checkpoint."""
    number = folder.name.removeprefix("step_")
    steps = [n for n in complete_steps(folder.parent) if number.isdecimal() and n < int(number)]
    hint = f"; --resume_step {steps[-1]} goes on from the one before" if steps else ""
    return f"; earlier ones: {_names(steps)}{hint}"


def step_to_choose(run_dir: Path, step: int) -> int:
    """The step of --resume_step that still has to be chosen; 0 for none.

    Not after a restart by torchrun, whose command line is the old one: what was saved since then counts.
    """
    note = run_dir / "resumed_by"
    again = "TORCHELASTIC_RUN_ID" in os.environ and note.exists()
    return 0 if again and note.read_text(encoding="utf-8") == torchrun_job() else step


def choose_step(run_dir: Path, step: int, ranks: Ranks) -> None:
    """Collective. --resume_step: step N's checkpoint is the newest from now on. Raises CheckpointError.

    Later ones become step_M.given_up, because they would pass for those of the new branch.
    """
    with _on_all(ranks):
        if ranks.main and step_to_choose(run_dir, step):
            write_atomic(run_dir / "latest", latest_checkpoint(run_dir, step)[0].name)
            for later in (n for n in complete_steps(run_dir) if n > step):
                aside = run_dir / f"step_{later}.given_up"
                shutil.rmtree(aside, ignore_errors=True)
                aside.with_suffix("").rename(aside)
                print(f"resume_step: step_{later} is {aside.name} now; delete it if you do not need it")
            write_atomic(run_dir / "resumed_by", torchrun_job())


def _manifest(folder: Path) -> dict:
    """The manifest of a checkpoint. Raises CheckpointError."""
    try:
        content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if content.pop("sha256") != _digest(content) or content["format"] != FORMAT:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder}/manifest.json is damaged or missing{_earlier(folder)}") from None
    return content


def _check_file(folder: Path, name: str, files: dict[str, dict]) -> None:
    """Compares a file with its entry in the manifest. Raises CheckpointError."""
    try:
        same = _describe(folder / name) == files.get(name)
    except OSError as error:
        raise CheckpointError(f"{folder / name}: {error.strerror}{_earlier(folder)}") from None
    if not same:
        raise CheckpointError(f"{folder / name} is damaged{_earlier(folder)}")


def check_files(folder: Path, rank: int = 0, world: int = 1) -> dict:
    """The manifest, after comparing this rank's part of the files with it. Raises CheckpointError."""
    content = _manifest(folder)
    files = content["files"]
    # The reader opens every safetensors file of the folder, so none but our own may be there.
    if strange := {path.name for path in folder.glob("*.safetensors")} - files.keys():
        raise CheckpointError(f"{folder / min(strange)} is not in the manifest; find out where it is from")
    for name in sorted(files, key=lambda name: -files[name]["bytes"])[rank::world]:
        _check_file(folder, name, files)
    return content


def load_checkpoint(folder: Path, policy: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
    """Collective. Reads weights and optimizer state, saved by any number of ranks, into sharded tensors.

    Verifies all files first. The learning rate stays as the optimizer has it. Raises CheckpointError.
    """
    with _on_all(ranks):
        saved = check_files(folder, ranks.rank, ranks.world)["tensors"]
    _make_room(policy, optimizer, saved)
    tensors = checkpoint_tensors(policy, optimizer)
    here = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if wrong := [name for name in saved.keys() | here.keys() if saved.get(name) != here.get(name)]:
        remedy = "choose the run's own model, lora_rank and lora_targets"
        raise CheckpointError(f"{folder} is of another model: see {min(wrong)}; {remedy}")
    _read(folder, tensors)


def _make_room(policy: nn.Module, optimizer: Optimizer, saved: dict[str, list[int]]) -> None:
    """Gives a fused AdamW the state that the checkpoint has, as zeros: it makes its own in its first step."""
    parameters = dict(policy.named_parameters())
    optimizer.state.clear()  # parameters that had no gradient yet have no state there
    for full_name in saved:
        key, _, name = full_name.removeprefix(OPTIMIZER).partition(".")
        if full_name.startswith(OPTIMIZER) and name in parameters:
            like = parameters[name]
            step = torch.zeros((), device=like.device)
            optimizer.state[like][key] = step if key == "step" else torch.zeros_like(like)


def _read(folder: Path, tensors: dict[str, Tensor], alone: bool = False) -> None:
    """Fills the tensors in place from verified files; collective unless alone. Raises CheckpointError."""
    try:
        with warnings.catch_warnings(action="ignore"):  # that no process group is used, where that is meant
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except FAILURES as error:
        raise CheckpointError(f"{folder} cannot be read: {_why(error)}{_earlier(folder)}") from None


def full_state(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a checkpoint holds besides AdamW's state, on the CPU, without a process group: all weights as
    dtype, or the adapters in fp32. Raises CheckpointError.
    """
    shapes = check_files(folder)["tensors"]
    names = [name for name in shapes if not name.startswith(OPTIMIZER)]
    state = {}
    for name in names:  # the reader casts as it copies
        own = torch.float32 if name.endswith(ADAPTER) else dtype
        state[name] = torch.empty(shapes[name], dtype=own)
    _read(folder, state, alone=True)
    return state
