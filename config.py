"""Every setting of grpo.py and sft.py, with its meaning, default and check."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text (perhaps in quotes)"}


# ESC, BEL, backspace, carriage return and the like, C1 too, by which a text could act on a terminal.
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


def printable(text: str) -> str:
    """A text of a model or a data file for a terminal: control characters but tab and newline as escapes."""
    return text.translate(_ESCAPES)


class UserError(ValueError):
    """An error that the user can mend: run_script shows its message, one sentence, and no traceback."""

    def __str__(self) -> str:
        return printable(super().__str__())  # it may quote anything


class ConfigError(UserError):
    """A setting that cannot work; the message names the key and what to do."""


def first_line(error: BaseException) -> str:
    """The kind of an exception and the first line of its message; some libraries say pages."""
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0]


@contextmanager
def quiet_pipe() -> Iterator[None]:
    """Ends the process without a word where the reader of its output has seen enough, as `| head` does."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # Python's own flush, at the very end, could only complain
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def run_command(main: Callable[[list[str]], None]) -> None:
    """Runs the main of a script without torch: what its user can mend ends it with one sentence."""
    sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal shows every character
    try:
        with quiet_pipe():
            main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _key(default: Any, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """Every setting of grpo.py and sft.py. Defaults are the paper's (arXiv 2505.00024)."""

    # what is trained, on what, where to
    model: str = _key("Qwen/Qwen2.5-7B-Instruct", 'folder or hub id; "tiny" builds the demo\'s model')
    data: str = _key("", 'training files or hub ids, comma-separated, of any layout; or "synthetic"')
    test_data: str = _key("", "held-out file; empty: test_share of data")
    test_share: float = _key(0.1, "share of the data held out for evaluation (paper: 90/10)")
    data_from: float = _key(0.0, "first share of the training records to use, in an order by seed")
    data_to: float = _key(1.0, "last share: 0 to 0.5 and 0.5 to 1 are halves without a common record")
    prompt_template: str = _key("", "file with a system prompt that has a {tools} slot; empty: our own")
    chat_template_kwargs: str = _key("", "variables of the model's chat template: 'enable_thinking: true'")
    run_dir: str = _key("runs/grpo", "where config, logs, samples, checkpoints and the final model go")
    resume: bool = _key(False, "go on from the latest checkpoint in run_dir")
    resume_step: int = _key(0, "go on from this step's checkpoint instead; 0: the latest")
    accept_changes: bool = _key(False, "resume although settings or inputs changed; checkpoints record it")
    overwrite: bool = _key(False, "replace the run in run_dir, once the new one can start")
    seed: int = _key(0, "decides the data order and, with step and prompt, every sample")
    # the method
    prompts_per_step: int = _key(1024, "P: prompts per rollout batch")
    group_size: int = _key(5, "G: completions per prompt")
    minibatch_prompts: int = _key(256, "prompts per optimizer update; 1024 / 256 = 4 updates per batch")
    num_iterations: int = _key(1, "times that a batch's updates are gone through (PPO's epochs)")
    epochs: float = _key(7.0, "passes over the training prompts; ignored when steps > 0")
    steps: int = _key(0, "rollout batches (sft.py: optimizer steps); 0: from epochs")
    lr: float = _key(1e-6, "AdamW learning rate, before warm-up and schedule")
    lr_warmup_steps: int = _key(0, "grpo.py's learning rate rises linearly over so many steps")
    lr_schedule: str = _key("constant", "linear or cosine: lr falls to 0 over the whole run (grpo.py)")
    max_grad_norm: float = _key(1.0, "gradient clipping by global norm; 0: none")
    temperature: float = _key(0.7, "sampling temperature; also divides the logits of every log-prob")
    loss: str = _key("grpo", "row of losses.LOSSES: grpo, dr_grpo, dapo, gspo, cispo, rloo")
    advantage: str = _key("", "group_std, group_mean, leave_one_out, max_rl, egpo; empty: the loss's")
    aggregation: str = _key("", "mean over token, sequence, or a constant length; empty: the loss's")
    clip_eps: float = _key(0.0, "bounds the ratio on both sides: 1 - eps, 1 + eps; 0: the loss's (0.2)")
    clip_eps_high: float = _key(0.0, "another bound above; 0: clip_eps, or the loss's (dapo: 0.28)")
    kl_coef: float = _key(1e-3, "beta: weight of the KL to the frozen reference; 0: no reference")
    kl: str = _key("k3", "row of losses.KLS, the estimate in the loss: k1, k2, k3")
    reference: str = _key("", "folder or hub id of the model that the KL points at; empty: the start model")
    correction: str = _key("none", "row of losses.CORRECTIONS against a sampler that differs: tis, icepop")
    reward: str = _key("binary", "row of reward.REWARDS (binary, no_reason, ...) or file.py:function")
    lenient: bool = _key(False, "compare numbers as the tools declare them: 2 equals 2.0 for a number")
    overlong_tokens: int = _key(0, "over the last so many response tokens a reward falls by up to 1 (DAPO)")
    shuffle_rewards: bool = _key(False, "negative control: permute rewards in the batch; nothing is learnt")
    skip_zero_variance: str = _key(
        "", "leave out groups with equal rewards, KL included; rest: the mean is over the other groups, a "
        "larger gradient; all: over all groups, the gradient as without; empty: leave none out"
    )
    mask_truncated: bool = _key(False, "leave completions that were cut off out of loss and KL (DAPO)")
    resample_rounds: int = _key(0, "dynamic sampling (DAPO): times such groups give way to other prompts")
    max_prompt_tokens: int = _key(4096, "longer prompts are counted and skipped")
    max_response_tokens: int = _key(8192, "longer completions are cut off and count as truncated")
    # LoRA
    lora_rank: int = _key(0, "train low-rank adapters of this rank on frozen weights; 0: train all weights")
    lora_alpha: float = _key(32.0, "an adapter's output is multiplied by lora_alpha / lora_rank")
    lora_targets: str = _key("", "linear layers by name, 'q_proj,v_proj'; empty: all of the decoder's")
    # speed, memory, many processes
    rollout_engine: str = _key(
        "shared_prefix", "or shared_prefix_eager (without CUDA graphs), generate, continuous_batching"
    )
    rollout_batch_size: int = _key(256, "decoded at once per rank, in whole groups; fewer if K/V do not fit")
    max_tokens_per_micro_batch: int = _key(16384, "tokens per forward/backward per rank; changes no result")
    gradient_checkpointing: bool = _key(True, "recompute activations in the backward: less memory, more time")
    sharding: str = _key("full", "full: one shard per process; hsdp: shards in a node, copies across")
    offload: str = _key("", "kept in CPU memory: reference, or all (also weights, gradients, AdamW)")
    trust_remote_code: bool = _key(False, "run code that comes with the model; read that code first")
    timeout_minutes: float = _key(60.0, "a rank that waits longer for the others stops the run")
    # looking and saving
    eval_every: int = _key(10, "greedy evaluation every N steps; 0: only first and last")
    eval_cases: int = _key(200, "cases of each evaluation: of every held-out split, of every benchmark")
    bfcl: str = _key("", "folder with BFCL's data: a fixed subset is evaluated along with the held-out cases")
    apibank: str = _key("", "the same for API-Bank")
    bfcl_multi_turn: int = _key(0, "scenarios of BFCL's multi-turn part asked there too; needs bfcl-eval")
    save_every: int = _key(10, "checkpoint every N steps; 0: only at the end")
    keep_checkpoints: int = _key(2, "older ones are deleted, except the one with the best held-out accuracy")
    background_save: bool = _key(False, "write checkpoints while training goes on; takes CPU memory")
    log_samples: int = _key(64, "completions per step written to samples.jsonl and samples.html; 0: none")
    trackers: str = _key("", "besides log.jsonl: tensorboard, wandb or both, comma-separated")
    # supervised fine-tuning (sft.py)
    sft_batch: int = _key(32, "examples per optimizer step")
    sft_lr: float = _key(2e-5, "learning rate of sft.py and of the demo's warm-up; falls linearly to 0")
    sft_reason: bool = _key(True, "imitate whole replies; false: bare calls (the paper's No-Reason SFT)")
    sft_flops: float = _key(0.0, "sft.py stops after this much training compute; 0: after steps or epochs")
    # the demo: a tiny model from nothing, on generated data
    warmup_steps: int = _key(0, "SFT steps before RL, for a model that knows nothing yet")
    tiny_hidden: int = _key(96, "hidden size of the tiny model")
    synthetic_flaws: float = _key(1.0, "factor on the rates of the demonstrations' flaws; 0: all are right")
    synthetic_thoughts: float = _key(1.0, "share of the demonstrations that think before they call")
    synthetic_train: int = _key(1000, "generated training queries")


def load_config(arguments: list[str]) -> Config:
    """`--config FILE.yaml` and `--key value` pairs -> Config. Raises ConfigError with one sentence.

    A flag without a value is true. A YAML file may name a `base` file, relative to itself, that it refines.
    """
    values: dict[str, Any] = {}
    if {"-h", "--help"} & set(arguments):
        print("usage: grpo.py or sft.py [--config FILE.yaml] [--key value …]; a key alone is true\n")
        for f in dataclasses.fields(Config):
            print(f"--{f.name:<28}{f.default!r:<30} {f.metadata['help']}")
        raise SystemExit(0)
    pairs = _pairs(arguments)
    for path in [value for key, value in pairs if key == "config"]:
        values |= _read_yaml(Path(path))
    values |= {key: value for key, value in pairs if key != "config"}
    fields = {f.name: f for f in dataclasses.fields(Config)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else "--help lists them"
            raise ConfigError(f"unknown setting {key!r}; {hint}")
    if isinstance(kwargs := values.get("chat_template_kwargs"), dict):  # YAML may have it as a mapping
        text = yaml.safe_dump(kwargs, default_flow_style=True, width=10**6)
        values["chat_template_kwargs"] = text.strip()[1:-1]
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
            known = Config.__dataclass_fields__.get(key)
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif known and not isinstance(known.default, bool):
                raise ConfigError(f"--{key} needs a value: {known.metadata['help']}")
            else:
                value = "true"
        pairs.append((key, value))
    return pairs


def _read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"config: cannot read {path}; the ready ones are in configs/") from None
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError) as error:  # 2024-99-99 too
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else first_line(error)
        raise ConfigError(f"config: {path} is not YAML ({where}); mend it or take another") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"config: {path} must hold `key: value` lines")
    for key, count in Counter(key.value for key, _ in node.value).items():
        if count > 1:  # YAML would quietly take the last
            raise ConfigError(f"config: {key} stands {count} times in {path}")
    base = values.pop("base", None)
    above = (*above, path.resolve())
    named = base is None or (isinstance(base, str) and "\0" not in base)
    if not named or (base and (path.parent / base).resolve() in above):
        raise ConfigError(f"config: base in {path} must name another YAML file, not {base!r}")
    return (_read_yaml(path.parent / base, above) if base else {}) | values


def _convert(key: str, value: Any, kind: type) -> Any:
    """A YAML or command-line value as `kind`. "1e-6" is text to YAML, and a bool must not pass for an int."""
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
        if type(value) not in (str, int, float) or "\0" in str(value):  # YAML also has dates, sets, bytes
            raise ValueError
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        number = kind(float(value)) if kind is int else kind(value)
        if kind is float and not math.isfinite(number):
            raise ValueError
        return number
    except (ValueError, KeyError, OverflowError):
        shown = repr(value) if isinstance(value, str) else str(value)  # a date as the file has it
        raise ConfigError(f"{key} must be {KINDS[kind]}, not {shown[:80]}") from None


def template_kwargs(text: str) -> dict[str, Any]:
    """chat_template_kwargs as a mapping, of "name: value, name: value" in YAML. Raises ConfigError."""
    try:
        values = yaml.safe_load(f"{{{text}}}")
        json.dumps(values, allow_nan=False)
        if all(key.isidentifier() and value is not None for key, value in values.items()):
            return values
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        pass
    example = "names and values such as 'enable_thinking: true' (with a space)"
    raise ConfigError(f"chat_template_kwargs must be {example}, not {text!r}")


def check_model(path: str) -> None:
    """Raises ConfigError for what looks like the folder of a model and is none, before anything is loaded."""
    if (Path(path) / "model" / "config.json").is_file() and not (Path(path) / "config.json").is_file():
        raise ConfigError(f"model: {path!r} is the folder of a run; its model is {Path(path) / 'model'}")
    if any((Path(path) / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")):
        raise ConfigError(f"model: {path!r} holds a LoRA adapter; merge it into its base first")
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not Path(path).is_dir():
        raise ConfigError(f"model: the folder {path!r} does not exist; give a folder or a hub id")


def check_positions(config: Config, model: Any) -> None:
    """Raises ConfigError where prompt and response may be longer than the positions in the model's config."""
    positions = getattr(model.get_text_config(), "max_position_embeddings", math.inf)  # or it has no limit
    tokens = config.max_prompt_tokens + config.max_response_tokens
    if tokens > positions:
        raise ConfigError(
            f"max_prompt_tokens + max_response_tokens ({tokens}) exceed the model's {positions} positions"
        )


def count_steps(config: Config, examples: int, batch: int) -> int:
    """`steps`, or as many batches as `epochs` passes over the examples fill."""
    return config.steps or max(1, math.ceil(config.epochs * examples / batch))


def _check(c: Config) -> None:
    """Refuses settings that cannot work together, before anything is loaded."""
    positive = (
        "prompts_per_step group_size minibatch_prompts num_iterations max_prompt_tokens max_response_tokens "
        "temperature rollout_batch_size max_tokens_per_micro_batch timeout_minutes eval_cases "
        "keep_checkpoints sft_batch tiny_hidden"
    )
    for key in positive.split():
        if getattr(c, key) <= 0:
            raise ConfigError(f"{key} must be greater than 0, not {getattr(c, key)}")
    for f in dataclasses.fields(c):
        value = getattr(c, f.name)
        if isinstance(value, (int, float)) and value < 0:
            raise ConfigError(f"{f.name} must not be negative, not {value}")
    choices = {
        "offload": ("", "reference", "all"), "sharding": ("full", "hsdp"),
        "skip_zero_variance": ("", "rest", "all"),
    }
    for key, values in choices.items():
        if getattr(c, key) not in values:
            raise ConfigError(f"{key} must be {' or '.join(filter(None, values))}, not {getattr(c, key)!r}")
    if c.lora_rank and not c.lora_alpha:
        raise ConfigError("lora_alpha must be greater than 0 with lora_rank: it weighs the adapters")
    if c.lora_targets and not c.lora_rank:
        raise ConfigError("lora_targets needs lora_rank, the rank of the adapters")
    if c.lora_rank and c.offload == "reference" and not c.reference:
        raise ConfigError("offload reference has no use with lora_rank: the policy's base is the reference")
    others = ("skip_zero_variance", "resample_rounds", "overlong_tokens")  # they ask for unequal rewards
    if c.reward == "none" and (not c.kl_coef or c.kl == "k1" or any(getattr(c, key) for key in others)):
        also = f"kl_coef above 0, kl k2 or k3, and none of {', '.join(others)}"
        raise ConfigError(f"reward: none leaves the KL alone to train; it needs {also}")
    if c.resume_step and not c.resume:
        raise ConfigError("resume_step needs --resume true")
    if c.clip_eps > 1:
        raise ConfigError(
            f"clip_eps must be at most 1, not {c.clip_eps}: ratios are clipped to 1 - eps and 1 + eps"
        )
    if not c.data_from < c.data_to <= 1:
        raise ConfigError(
            f"data_from ({c.data_from}) must be below data_to ({c.data_to}), and both from 0 to 1"
        )
    if c.tiny_hidden % 8:
        raise ConfigError(f"tiny_hidden must be a multiple of 8 (4 heads of even size), not {c.tiny_hidden}")
    if c.group_size < 2:
        raise ConfigError(
            "group_size must be at least 2: an advantage compares the completions of one prompt"
        )
    if c.prompts_per_step % c.minibatch_prompts:
        raise ConfigError(
            f"prompts_per_step ({c.prompts_per_step}) must be a multiple of "
            f"minibatch_prompts ({c.minibatch_prompts})"
        )
    if c.reference and not c.kl_coef:
        raise ConfigError("reference is the model that the KL points at: it needs kl_coef above 0")
    if c.overlong_tokens > c.max_response_tokens:
        raise ConfigError(
            f"overlong_tokens ({c.overlong_tokens}) must be at most "
            f"max_response_tokens ({c.max_response_tokens})"
        )
    if not 0 <= c.test_share < 1:
        raise ConfigError(f"test_share must be from 0 to below 1, not {c.test_share}")
    template_kwargs(c.chat_template_kwargs)
