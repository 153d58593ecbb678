"""One run from set-up to the last save: what grpo.py and sft.py share. No maths.

A Session is a run without weights: `open_session` reads all inputs, claims the run's folder and finds the
start model. What is wrong with settings, data or machine stops there, before an old run is replaced. A
RunSpec says how to build the rest. `begin` builds the Run: weights, optimizer and state, fresh or from the
latest checkpoint. `finish_step` evaluates, logs and saves where it is time. `close` writes the final model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from config import Config, ConfigError, check_positions, count_steps
from corpus.examples import Splits, Tokenized
from corpus.sources import append_jsonl, atomic_folder, read_jsonl, sync, write_atomic
from corpus.tiny_model import LAYERS, VOCABULARY, build_tiny_model, build_tiny_tokenizer
from data import load_splits, tokenize_splits
from distributed.checkpoint import Saver, latest_checkpoint, load_checkpoint
from distributed.fsdp import gathered_weights, load_policy
from distributed.ranks import Clock, Interrupted, Ranks, StopFlag
from distributed.weights import model_config
from evals.in_training import JudgedPrompt, evaluate, held_out_prompts, load_benchmarks
from kernel.attention import attention_backend
from model import check_vocabulary, load_tokenizer, prepare_model
from ops import run_dir
from ops.checks import Start, check_names, check_reference, check_start
from ops.export import ask_from_tools, export, write_model
from ops.monitor import Monitor, attempt, close_monitor, open_monitor, show
from ops.plot import headline, summarize, was_evaluated
from ops.samples_page import write_page
from prompts import check_tokenizer, load_template, render_prompt
from reward import RewardFunction, reward_function

LOGS = ("log.jsonl", "samples.jsonl")
MAX_FAILED_STEPS = 5  # so many steps in a row without a finite gradient end the run

# --------------------------------------------------------------------------------------- before any weights


@dataclass
class Inputs:
    """What the settings name, and what the tokenizer makes of it. sets: what is evaluated, by name."""

    reward: RewardFunction
    template: str
    splits: Splits
    tokenizer: object = None
    tokenized: Splits | None = None
    sets: dict[str, list[JudgedPrompt]] = field(default_factory=dict)


@dataclass
class Session:
    """A run before it has weights. path: the start model's folder or hub id; cold: it needs a warm-up first.

    began: time.perf_counter(), moved back by the seconds of a warm-up before a resume. identity: what the run
    is, see run_dir.begin_or_resume. finished: nothing is left to do, and the rest is not set up.
    """

    config: Config
    ranks: Ranks
    method: str  # "grpo" or "sft"
    folder: Path
    stop: StopFlag
    inputs: Inputs
    path: str
    cold: bool
    began: float
    identity: dict
    monitor: Monitor | None = None  # of the main process
    finished: bool = False

    @property
    def batch_size(self) -> int:
        """Prompts per step."""
        return self.config.sft_batch if self.method == "sft" else self.config.prompts_per_step

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return count_steps(self.config, len(self.inputs.tokenized.train), self.batch_size)

    def done(self, state: dict) -> bool:
        """Whether no step follows a checkpoint with this state."""
        budget = self.config.sft_flops if self.method == "sft" else 0.0
        return state["flops"] >= budget if budget else state["step"] >= self.steps


def read_inputs(config: Config) -> Inputs:
    """Reward, system prompt and examples. Raises UserError for settings or data that cannot work."""
    check_names(config)
    reward = reward_function(config.reward, config.lenient)
    template = load_template(config.prompt_template)
    splits = load_splits(config)
    reward("", splits.train[0].answer, splits.train[0].tools)  # a broken function of the user's stops here
    return Inputs(reward, template, splits)


def read_prompts(config: Config, path: str, inputs: Inputs, quiet: bool) -> Inputs:
    """The inputs with examples and benchmarks tokenized for the model in `path`."""
    tokenizer = load_tokenizer(path, config.trust_remote_code, config.chat_template_kwargs)
    ask_from_tools(tokenizer, inputs.template)
    check_tokenizer(tokenizer, inputs.template)
    check_vocabulary(tokenizer, model_config(path, config.trust_remote_code))
    check_reference(config, path, tokenizer)
    tokenized = tokenize_splits(inputs.splits, tokenizer, inputs.template, config, quiet=quiet)
    sets = {name: held_out_prompts(examples) for name, examples in tokenized.held_out.items()}
    sets.update(load_benchmarks(config, tokenizer, inputs.template, quiet=quiet))
    return replace(inputs, tokenizer=tokenizer, tokenized=tokenized, sets=sets)


def open_session(config: Config, ranks: Ranks, method: str, examined: bool = False) -> Session:
    """Collective. All that comes before weights. method: "grpo" or "sft". examined: the doctor has looked.

    Raises UserError, on all ranks, with one sentence about what cannot work.
    """
    began = time.perf_counter()
    quiet = not ranks.main
    inputs = read_inputs(config)
    # A model that is there shows before an old run is replaced whether its tokenizer and prompts will do.
    if config.model != "tiny":
        inputs = read_prompts(config, config.model, inputs, quiet)
    folder = run_dir.open_run(config, ranks)
    stop = StopFlag()
    if ranks.main:
        backend = attention_backend(ranks.device)
        print(f"run: {folder} · {ranks.world} process(es) on {ranks.device} · attention: {backend}")
    with run_dir.replacing(folder, ranks):
        path, cold = start_model(config, inputs, ranks)
        if config.model == "tiny":
            inputs = read_prompts(config, path, inputs, quiet)
        identity = run_dir.identity_of(config, method, inputs, path, ranks)
        run_dir.begin_or_resume(config, identity, ranks)
        session = Session(config, ranks, method, folder, stop, inputs, path, cold, began, identity)
        checkpoint = latest_checkpoint(folder)
        finished = checkpoint and session.done(checkpoint[1]) and (folder / "summary.json").exists()
        if ranks.gather(finished)[0]:
            if ranks.main:
                print(f"nothing is left to do: {checkpoint[0].name} was the last; see {folder / 'model'}")
            return replace(session, finished=True)
        if not checkpoint:  # of a resume once its checkpoint is loaded: till then it may be refused
            run_dir.write_start(folder, identity, ranks)
        if not checkpoint and (earlier := latest_checkpoint(folder / "warmup")):
            session.began -= earlier[1]["seconds"]
        session.monitor = open_monitor(config, folder, checkpoint[1]["step"] if checkpoint else 0, ranks)
        if not examined:
            start = Start(
                config, ranks, inputs.template, inputs.reward, inputs.splits, inputs.tokenized,
                inputs.tokenizer, path, session.steps,
            )
            check_start(start)
    return session


def start_model(config: Config, inputs: Inputs, ranks: Ranks) -> tuple[str, bool]:
    """Collective. The folder (or hub id) of the model to start from, and whether it still needs its warm-up.

    "tiny" is built from a config and the training texts, without any download.
    """
    warm = Path(config.run_dir) / "warmup"
    if (warm / "model").exists():
        return str(warm / "model"), False
    if config.model != "tiny":
        return config.model, config.warmup_steps > 0
    if ranks.main and not (warm / "start").exists():
        train = inputs.splits.train
        bare = build_tiny_tokenizer([], 0)  # knows bytes only, but has the chat template
        texts = [render_prompt(bare, example.messages, example.tools, inputs.template) for example in train]
        texts += [text for example in train for text in example.demonstrations]
        tokenizer = build_tiny_tokenizer(texts, VOCABULARY)
        model = build_tiny_model(tokenizer, config.tiny_hidden, LAYERS, config.seed)
        with atomic_folder(warm / "start") as folder:
            export(prepare_model(model, torch.device("cpu")), tokenizer, folder)
    ranks.gather(None)
    return str(warm / "start"), config.warmup_steps > 0


# ------------------------------------------------------------------------------------------------------ a run


@dataclass
class RunSpec:
    """How a Run is built on a session. folder: where checkpoints, log and samples go. path: the start model.

    steps: in all, or 0 where something else ends the run. temperature: divides the logits of every log-prob.
    reference: whether the KL's is loaded.
    """

    folder: Path
    path: str
    steps: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    temperature: float = 1.0
    reference: bool = False
    warm_up: bool = False  # neither evaluated nor watched


@dataclass
class Run:
    """What training needs. state: step, seconds, flops and best score, saved with every checkpoint.

    began: time.perf_counter() at the start, moved back by the seconds of the parts before a resume. clock: of
    the step that is running.
    """

    config: Config
    ranks: Ranks
    method: str
    folder: Path
    stop: StopFlag
    tokenizer: object
    reward: RewardFunction
    policy: nn.Module
    reference: nn.Module | None
    optimizer: torch.optim.Optimizer
    saver: Saver
    examples: Sequence[Tokenized]  # to train on
    sets: dict[str, list[JudgedPrompt]]
    held_out: list[str]  # the names of the sets that are not benchmarks
    batch_size: int  # prompts per step
    steps: int  # in all, or 0, as in RunSpec
    state: dict
    began: float
    monitor: Monitor | None
    clock: Clock
    results: dict[str, float] = field(default_factory=dict)  # of the latest evaluation

    def phase(self, name: str) -> Clock:
        """`with run.phase("update"): …` adds to the step's seconds, and tells the watchdog where we are."""
        return self.clock(name)


def begin(session: Session, spec: RunSpec) -> Run:
    """Collective. Policy, reference and optimizer, fresh or from the latest checkpoint in spec.folder."""
    config, ranks, inputs = session.config, session.ranks, session.inputs
    method = "sft" if spec.warm_up else session.method
    state = {"method": method, "step": 0, "flops": 0.0, "seconds": 0.0}
    with run_dir.replacing(session.folder, ranks):
        policy = load_policy(config, spec.path, spec.temperature, ranks)
        # By default the reference is the model that training started from, also after a resume.
        reference = None
        if spec.reference:
            reference = load_policy(config, config.reference or spec.path, spec.temperature, ranks, policy)
        check_positions(config, policy.config)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=spec.lr, weight_decay=0.0, betas=spec.betas, fused=True)
        saver = Saver(spec.folder, ranks, config.keep_checkpoints, config.background_save)
        checkpoint = latest_checkpoint(spec.folder)
        if checkpoint:
            state = checkpoint[1]
            load_checkpoint(checkpoint[0], policy, optimizer, ranks)
    run_dir.let_go(session.folder, ranks)
    if checkpoint:
        run_dir.write_start(session.folder, session.identity, ranks)
    if config.resume and ranks.main and not spec.warm_up:
        print(f"going on from {checkpoint[0].name if checkpoint else 'the start: no step is saved'}")
    state["run"] = session.identity
    if ranks.main:
        (spec.folder / "summary.json").unlink(missing_ok=True)  # it says that all is done
        rows = state.setdefault("rows", {})  # written to each log so far
        last = state["step"] if checkpoint else -1
        for name in LOGS:  # steps after the checkpoint are done again; without one, all of them
            rows[name] = run_dir.cut_log(spec.folder / name, last, rows.get(name, 0))
    run = Run(
        config, ranks, session.method, spec.folder, session.stop, inputs.tokenizer, inputs.reward,
        policy, reference, optimizer, saver, inputs.tokenized.train, inputs.sets,
        list(inputs.tokenized.held_out), session.batch_size, spec.steps, state,
        session.began - state["seconds"], session.monitor, Clock(ranks.watchdog),
    )
    if spec.warm_up:
        since = time.perf_counter() - state["seconds"]
        run = replace(run, sets={}, monitor=None, batch_size=config.sft_batch, began=since)
    elif not checkpoint:
        evaluate_sets(run)
        log(run, {"step": 0, **run.results})
    return run


def start_step(run: Run) -> int:
    """The number of the step that begins, with a clock and a peak of CUDA memory of its own."""
    step = run.state["step"] + 1
    if run.ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run.clock = Clock(run.ranks.watchdog, step)
    return step


def finish_step(run: Run, metrics: dict[str, float], rows: Sequence[dict] = (), last: bool = False) -> None:
    """Collective. Evaluates, logs and saves where it is time. Raises Interrupted after a signal, with all
    saved.

    rows: for samples.jsonl. last: no step follows.
    """
    config, state = run.config, run.state
    stop_on_failures(run, metrics, rows)
    if last or (config.eval_every and state["step"] % config.eval_every == 0):
        metrics = metrics | evaluate_sets(run)
        note_best(run)
    state["seconds"] = time.perf_counter() - run.began
    epoch = round(state["step"] * run.batch_size / len(run.examples), 4)
    record = {"step": state["step"], "epoch": epoch, **metrics}
    record.update({f"time/{phase}_s": seconds for phase, seconds in run.clock.seconds.items()})
    record.update(seconds=state["seconds"], flops=state["flops"])
    if rows and run.ranks.main:
        append_jsonl(run.folder / "samples.jsonl", rows)
        run.state["rows"]["samples.jsonl"] += len(rows)
    log(run, record)
    save_or_stop(run, last)


def stop_on_failures(run: Run, metrics: dict[str, float], rows: Sequence[dict]) -> None:
    """Ends the run, with the rows saved, when too many steps in a row had no finite gradient."""
    failed = metrics["updates_skipped_nonfinite"] and not metrics.get("updates")
    run.state["failed"] = run.state.get("failed", 0) + 1 if failed else 0
    if run.state["failed"] < MAX_FAILED_STEPS:
        return
    last = run.state["step"]
    path = run.folder / f"nonfinite_step_{last}.jsonl"
    if rows and run.ranks.main:
        append_jsonl(path, rows)
    steps = f"steps {last - MAX_FAILED_STEPS + 1} to {last}"
    remedy = ("lower lr" if "reward" in metrics else "lower sft_lr") + (f"; see {path}" if rows else "")
    raise ConfigError(f"{steps} had NaN or infinite gradients only; {remedy}")


def log(run: Run, record: dict) -> None:
    """Appends a record to the run's log.jsonl, and shows it."""
    if run.ranks.main:
        append_jsonl(run.folder / "log.jsonl", [record])
        run.state["rows"]["log.jsonl"] += 1
    if run.monitor:
        show(run.monitor, record, run.steps)


def evaluate_sets(run: Run) -> dict[str, float]:
    """Collective. Greedy accuracy on every held-out split and benchmark -> log entries, also run.results."""
    if run.sets:
        with run.phase("evaluate"), gathered_weights(run.policy) as policy:
            run.results = evaluate(policy, run.tokenizer, run.sets, run.config, run.ranks)
    return run.results


def evaluate_if_missing(run: Run) -> None:
    """Collective. The evaluation of a resumed run that had no step left to do."""
    if run.results:
        return
    evaluate_sets(run)
    logged = read_jsonl(run.folder / "log.jsonl")[-1:] if run.ranks.main else []
    if run.ranks.main and run.results and not any(map(was_evaluated, logged)):
        log(run, {"step": run.state["step"], **run.results})


def note_best(run: Run) -> None:
    """Remembers the step with the best accuracy on the first held-out split: its checkpoint is kept."""
    # Bare calls have no thought, which accuracy asks for.
    key = "accuracy" if run.config.sft_reason else "correct_rate"
    score = run.results.get(f"{next(iter(run.held_out), '')}/{key}", 0.0)
    if score > run.state.get("best", {}).get("score", -1.0):
        run.state["best"] = {"step": run.state["step"], "score": score}


def save_or_stop(run: Run, last: bool) -> None:
    """Collective. Saves where it is time, at the end, or on a signal, after which it raises Interrupted."""
    step = run.state["step"]
    with run.phase("save"):
        ending = run.stop.requested(run.ranks) or last
        if ending or (run.config.save_every and step % run.config.save_every == 0):
            for name in LOGS if run.ranks.main else ():  # a checkpoint relies on their rows
                if (run.folder / name).exists():
                    sync(run.folder / name)
            run.saver.save(run.state, run.policy, run.tokenizer, run.optimizer)
        if ending:
            run.saver.finish()
    if ending and not last:
        if run.monitor:
            close_monitor(run.monitor)
        run.ranks.gather(None)  # torchrun signals who is still drawing when another rank has ended
        raise Interrupted(run.config.run_dir, step)


def close(run: Run) -> None:
    """Collective. Writes run_dir/model, curves, summary.json and samples.html, and says where they are."""
    ranks, folder = run.ranks, run.folder
    summary = run.results
    if run.method == "grpo":
        summary = summarize(read_jsonl(folder / "log.jsonl"), run.held_out)
    if run.monitor:  # here, so that a resume with no step left draws the curves too
        close_monitor(run.monitor)
    write_model(run.policy, run.tokenizer, folder / "model", run.config, run.state, run.results, ranks)
    if not ranks.main:
        return
    page = (folder / "samples.jsonl").exists() and attempt("samples.html", partial(write_page, folder))
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1) + "\n")  # last: now all is done
    if run.method == "grpo":
        print(headline(summary))
    for name in run.held_out if run.method == "sft" else ():
        print(f"{name}: greedy accuracy {summary[f'{name}/accuracy']:.3f} (n = {summary[f'{name}/n']})")
    print(f"model: {folder / 'model'} · curves: {folder / 'curves.png'}")
    if page:
        print(f"completions: {folder / 'samples.html'}")
