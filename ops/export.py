"""A sharded model as a Hugging Face folder that anything can load, with its model card.

    python -m ops.export runs/demo/step_140 OUT          a checkpoint as a bf16 folder
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from config import Config, ConfigError, load_config
from corpus.sources import file_sha256, read_jsonl
from distributed.checkpoint import full_state
from distributed.fsdp import class_name, full_tensor, weights
from distributed.ranks import Ranks, run_script
from distributed.weights import config_to_save
from model import load_tokenizer
from ops.run_dir import atomic_folder, git_state
from prompts import stop_ids

LOCAL = ("run_dir", "data", "test_data")  # say nothing about the model, or stand elsewhere in the card
CARD = """# {model}, trained to call tools

After Nemotron-Research-Tool-N1 (arXiv 2505.00024). Code: {commit}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")  # the folder of this file
tokenizer = AutoTokenizer.from_pretrained(".")
```

Settings that differ from the defaults:
{recipe}

Data, with SHA-256:
{data}

After step {step} ({hours:.3g} hours, {flops:.3g} FLOPs):
{evaluation}
"""


@torch.no_grad()
def gather_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Collective. The full weights as dtype on the CPU of rank 0, {} on the others. Gathers one at a time."""
    state = {}
    for name, tensor in weights(model).items():
        full = full_tensor(tensor.to(dtype) if tensor.is_floating_point() else tensor)
        if dist.get_rank() == 0:
            state[name] = full.to("cpu", copy=True)  # with one rank it would be the live weight itself
    return state


def export_model(config, state: dict[str, Tensor], tokenizer, path: Path, dtype: torch.dtype) -> None:
    """Writes full weights as a Hugging Face folder. config: the model's, of transformers.

    The model's own sampling defaults (Qwen2.5-Instruct brings top_k 20, top_p 0.8, repetition penalty 1.05)
    are left out: they would change every evaluation. ValueError: weights that are not of such a model.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    state = {name: x.to(dtype) if x.is_floating_point() else x for name, x in state.items()}
    # assign: the empty shell takes over these tensors, so nothing is copied
    unexpected = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if unexpected or missing:
        names = ", ".join([*unexpected, *missing][:5])
        raise ValueError(f"export: not the weights of a {class_name(model)}: {names}")
    ends, pad = stop_ids(tokenizer), tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path, max_shard_size="5GB")  # the config's dtype becomes that of the weights
    tokenizer.save_pretrained(path)


def export(model: nn.Module, tokenizer, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """A model that is whole in this process as a Hugging Face folder."""
    state = {name: tensor.to("cpu") for name, tensor in weights(model).items()}
    export_model(config_to_save(model), state, tokenizer, path, dtype)


def write_model(
    policy: nn.Module, tokenizer, path: Path, config: Config, state: dict, evaluation: dict, ranks: Ranks
) -> None:
    """Collective. The model in training as an fp32 Hugging Face folder, complete or not there at all."""
    full = gather_weights(policy, torch.float32)
    if ranks.main:
        card = model_card(config, state, evaluation, git_state())
        with atomic_folder(path) as folder:
            export_model(config_to_save(policy), full, tokenizer, folder, torch.float32)
            (folder / "README.md").write_text(card, encoding="utf-8")
    ranks.gather(None)


def model_card(config: Config, state: dict, evaluation: dict, git: str) -> str:
    """README.md of a model. state: of its checkpoint; evaluation: value by name; git: run_dir.git_state()."""
    values, defaults = dataclasses.asdict(config), dataclasses.asdict(Config())
    recipe = {key: values[key] for key in values if values[key] != defaults[key] and key not in LOCAL}
    names = [name for name in f"{config.data},{config.test_data}".split(",") if name]
    data = {name: file_sha256(Path(name)) if Path(name).is_file() else "not a local file" for name in names}
    figures = {key: f"{value:.4g}" for key, value in evaluation.items() if isinstance(value, (int, float))}
    commit, *changes = git.splitlines()
    return CARD.format(
        model=config.model, commit=commit + (" with uncommitted changes" if changes else ""),
        step=state["step"], hours=state["seconds"] / 3600, flops=state["flops"], recipe=bullets(recipe),
        data=bullets(data), evaluation=bullets(figures),
    )


def bullets(values: dict) -> str:
    """A Markdown list of names and their values."""
    return "\n".join(f"- `{name}`: {value}" for name, value in values.items()) or "None."


def main(arguments: list[str]) -> None:
    """`RUN/step_N OUT`. Raises ConfigError or CheckpointError."""
    parser = argparse.ArgumentParser(description="A checkpoint as a bf16 Hugging Face folder.")
    parser.add_argument("checkpoint", type=Path, metavar="RUN/step_N")
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    args = parser.parse_args(arguments)
    source, run = args.checkpoint, args.checkpoint.parent
    if args.out.exists():
        raise ConfigError(f"export: {args.out} exists already")
    full = full_state(source, torch.bfloat16)
    config = load_config(["--config", str(run / "config.yaml")])
    state = json.loads((source / "state.json").read_text(encoding="utf-8"))["state"]
    logged = [row for row in read_jsonl(run / "log.jsonl") if row["step"] == state["step"]]
    evaluation = {key: value for key, value in logged[-1].items() if "/accuracy" in key or "/n" in key}
    card = model_card(config, state, evaluation, (run / "git.txt").read_text(encoding="utf-8"))
    model_config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    with atomic_folder(args.out) as folder:
        export_model(model_config, full, load_tokenizer(str(source)), folder, torch.bfloat16)
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"model: {args.out}")


if __name__ == "__main__":
    run_script(main)
