"""A sharded model as a Hugging Face folder that anything can load, with its model card."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from config import Config, ConfigError, load_config
from corpus.sources import read_jsonl, read_records
from distributed.checkpoint import full_state
from distributed.fsdp import class_name, full_tensor, weights
from distributed.ranks import Ranks
from model import load_tokenizer
from ops.run_dir import atomic_folder, git_state
from prompts import stop_ids

# What a reader of the model card looks for, whether or not it differs from the defaults.
RECIPE = (
    "model seed prompts_per_step group_size minibatch_prompts epochs steps lr loss kl_coef kl temperature reward "
    "max_response_tokens"
).split()
LOCAL = (
    "run_dir resume overwrite data test_data".split()
)  # say nothing about the model, or stand elsewhere in the card


@torch.no_grad()
def gather_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Collective. The full weights as dtype on the CPU of rank 0; {} on the others. One tensor at a time is
    gathered.
    """
    state = {}
    for name, tensor in weights(model).items():
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        full = full_tensor(tensor)
        if dist.get_rank() == 0:
            state[name] = full.to("cpu", copy=True)  # with one rank it would be the live weight itself
    return state


def export_model(
    config, state: dict[str, Tensor], tokenizer, path: Path, dtype: torch.dtype, card: str = ""
) -> None:
    """Writes full weights as a Hugging Face folder in files of at most 5 GB, with tokenizer and chat
    template.

    config: the model's transformers config. card: README.md. The model's own sampling defaults
    (Qwen2.5-Instruct brings top_k 20, top_p 0.8, repetition penalty 1.05) are left out: they would colour
    every later evaluation. Raises ValueError when the weights are not those of such a model.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()
    }
    # assign: the empty shell takes over these tensors, so nothing is copied
    unexpected = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if unexpected or missing:
        raise ValueError(
            f"export: not the weights of a {class_name(model)}: {', '.join([*unexpected, *missing][:5])}"
        )
    model.generation_config = GenerationConfig(
        eos_token_id=stop_ids(tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path, max_shard_size="5GB")  # the config's dtype becomes that of the weights
    tokenizer.save_pretrained(path)
    if card:
        (path / "README.md").write_text(card, encoding="utf-8")


def export(model: nn.Module, tokenizer, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """A model that is whole in this process as a Hugging Face folder."""
    export_model(
        model.config, {name: x.to("cpu") for name, x in weights(model).items()}, tokenizer, path, dtype
    )


def write_model(
    policy: nn.Module, tokenizer, path: Path, config: Config, state: dict, evaluation: dict, ranks: Ranks,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Collective. The model in training as a Hugging Face folder at `path`, complete or not there at all."""
    full = gather_weights(policy, dtype)
    if ranks.main:
        card = model_card(config, state, evaluation, git_state(), data_manifest(config))
        with atomic_folder(path) as folder:
            export_model(policy.config, full, tokenizer, folder, dtype, card)
    ranks.gather(None)


def export_checkpoint(arguments: list[str]) -> None:
    """`RUN/step_N OUT`: a checkpoint as a bf16 Hugging Face folder. Raises ConfigError or CheckpointError."""
    if len(arguments) != 2:
        raise ConfigError("usage: python grpo.py --export RUN/step_N OUT")
    source, target = Path(arguments[0]), Path(arguments[1])
    if target.exists():
        raise ConfigError(f"export: {target} exists already")
    if not (source / "manifest.json").is_file():
        raise ConfigError(
            f"export: {source} is no checkpoint; they are called RUN/step_N, and hold a manifest.json"
        )
    full = full_state(source, torch.bfloat16)
    run, state = source.parent, json.loads((source / "state.json").read_text(encoding="utf-8"))["state"]
    saved = run / "config.yaml"
    config = load_config(["--config", str(saved)]) if saved.is_file() else Config()
    git = (run / "git.txt").read_text(encoding="utf-8") if (run / "git.txt").is_file() else "unknown"
    logged = [row for row in read_jsonl(run / "log.jsonl") if row["step"] == state["step"]]
    evaluation = {
        key: value
        for row in logged[-1:]
        for key, value in row.items()
        if "/accuracy" in key or key == "reward"
    }
    card = model_card(config, state, evaluation, git, data_manifest(config))
    model_config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    with atomic_folder(target) as folder:
        export_model(model_config, full, load_tokenizer(str(source)), folder, torch.bfloat16, card)
    print(f"model: {target}")


def data_manifest(config: Config) -> list[dict]:
    """file, and where it is a local one its number of records and sha256, for all data of a run."""
    rows = []
    for name in filter(None, f"{config.data},{config.test_data}".split(",")):
        row, path = {"file": name, "records": "unknown"}, Path(name)
        if path.is_file():
            with path.open("rb") as file:
                row["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            row["records"] = sum(1 for _ in read_records(path))
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------- model card


def _table(columns: list[str], rows: list[list]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *cells]]


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def model_card(config: Config, state: dict, evaluation: dict, git: str, data: list[dict]) -> str:
    """README.md of an exported model: how to load it, recipe, data manifest, evaluation, commit.

    state: of the checkpoint (step, seconds, flops). evaluation: figure by name. git: runtime.git_state().
    data: a dict with `file`, `records` and, where it is a local file, `sha256` for each.
    """
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in LOCAL}
    defaults = dataclasses.asdict(Config())
    recipe = [[key, values[key]] for key in values if key in RECIPE or values[key] != defaults[key]]
    commit, *changes = git.strip().splitlines() or ["unknown"]
    changed = " with uncommitted changes (see git.txt of the run)" if changes else ""
    on_hub = config.model != "tiny" and not Path(config.model).exists()
    lines = ["---", "library_name: transformers", "tags: [tool-calling, grpo]"]
    lines += [f"base_model: {config.model}"] if on_hub else []
    lines += ["---", "", f"# {Path(config.model).name}, trained to call tools", ""]
    how = "on demonstrations" if state.get("method") == "sft" else "with rewards that rules compute"
    lines += [f"Trained {how}, after Nemotron-Research-Tool-N1 (arXiv 2505.00024).", ""]
    lines += [
        "## Loading",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
    ]
    lines += [
        'folder = "."  # where this file lies',
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")',
    ]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)", "```", ""]
    lines += ["## Recipe", "", "Settings that differ from the defaults, and the central ones.", ""]
    lines += [*_table(["setting", "value"], recipe), ""]
    progress = [state.get("step", "unknown"), state.get("seconds", 0.0) / 3600, state.get("flops", 0.0)]
    lines += [
        "## Training",
        "",
        *_table(["step", "hours", "FLOPs"], [[_number(value) for value in progress]]),
        "",
    ]
    files = [[row["file"], row["records"], row.get("sha256", "")] for row in data]
    lines += [
        "## Data",
        "",
        *(_table(["file", "records", "sha256"], files) if files else ["Not recorded."]),
        "",
    ]
    figures = [[key, _number(value)] for key, value in evaluation.items()]
    lines += [
        "## Evaluation",
        "",
        *(_table(["figure", "value"], figures) if figures else ["None was run."]),
        "",
    ]
    return "\n".join([*lines, "## Code", "", commit + changed, ""])
