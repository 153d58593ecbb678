"""A sharded model as a Hugging Face folder that anything can load, with its model card.

Plain transformers then asks as training did: AutoTokenizer gives the run's token ids, and the chat template
makes the run's own prompt of `tools=` (tool_prompt.jinja).

    python -m ops.export runs/demo/step_140 OUT          a checkpoint as a bf16 folder

Of a LoRA run the folder holds the merged model, and in adapter/ the adapter alone as peft and vLLM load it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

import prompts
from config import Config, ConfigError, check_model, load_config
from corpus.sources import as_command, atomic_folder, file_sha256, folder_above, iter_jsonl
from distributed.checkpoint import complete_steps, full_state
from distributed.fsdp import class_name, full_tensor, weights
from distributed.ranks import Ranks, run_script
from distributed.weights import config_to_save, read_model, weight_files
from kernel.lora import ADAPTER, adapters, add_adapters, lora_layers
from model import load_tokenizer
from ops.run_dir import start_of
from prompts import ToolCall, load_template, render_completion, stop_ids, tool_prompt

BLOCK = Path(__file__).with_name("tool_prompt.jinja")
END = "{# end of tool prompt #}{% endif %}\n"  # its last line
# AutoTokenizer gives some model types (Qwen2) their own word splitting, whatever tokenizer.json says. Where
# the folder brings a class of its own, it takes the file as it is: without that class, if it may not run it.
AS_SAVED = {"AutoTokenizer": [None, "tokenizer_as_saved.TokenizerAsSaved"]}
AS_SAVED_CODE = '''"""Makes AutoTokenizer take tokenizer.json as it is, whatever the type of the model."""

from transformers import PreTrainedTokenizerFast


class TokenizerAsSaved(PreTrainedTokenizerFast):
    """The tokenizer that the model was trained with."""
'''
PROBES = (
    render_completion([ToolCall("book_taxi", {"city": "São Tomé", "seats": 12})], "12 taxis, 出租车"),
    "  Don't   split\n\n\tthis-way: 'Zu\u0308rich', 1234567 (e.g.)\r\n",
)

LOCAL = ("run_dir", "data", "test_data")  # say nothing about the model, or stand elsewhere in the card
CARD = """# {model}, trained to call tools

After Nemotron-Research-Tool-N1 (arXiv 2505.00024). Code: {commit}.

```python
from transformers import AutoModelForCausalLM, {loader}

model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")  # ".": the folder of this file; run it there
tokenizer = {loader}.from_pretrained(".")
parameters = {{"city": {{"type": "str"}}, "nights": {{"type": "int"}}}}
hotel = {{"name": "find_hotel", "description": "hotels in a city", "parameters": parameters}}
chat = [{{"role": "user", "content": "a hotel in Oslo for 3 nights"}}]
prompt = tokenizer.apply_chat_template(
    chat, tools=[hotel], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
reply = model.generate(**prompt, max_new_tokens=200)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(reply))
```

With `tools`, the chat template asks as in training: this system prompt, with a tool per line in the place of
`{{tools}}`. Past calls of the assistant stand in `tool_calls`, as OpenAI has them, with objects as arguments.

````
{prompt}
````

Settings that differ from the defaults:
{recipe}

What was changed on a resume:
{changes}

Data, with SHA-256:
{data}

After step {step} ({hours:.3g} hours, {flops:.3g} FLOPs):
{evaluation}
"""


@torch.no_grad()
def gather_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Collective. The full weights as dtype on the CPU of rank 0, {} on the others. Gathers one at a time;
    adapters are merged.
    """
    state = {}
    layers = {f"{name}.weight": layer for name, layer in lora_layers(model).items()}
    for name, tensor in weights(model).items():
        full = full_tensor(tensor.to(dtype) if tensor.is_floating_point() else tensor)
        if not dist.is_initialized() or dist.get_rank() == 0:
            full = layers[name].merged(full) if name in layers else full
            state[name] = full.to("cpu", copy=True)  # with one rank it would be the live weight itself
    return state


def write_adapter(model: nn.Module, config: Config, base: str, path: Path) -> None:
    """The adapters alone, in the layout of peft. base: folder or hub id of the model that they sit on."""
    path.mkdir()
    state = {}
    for name, parameter in adapters(model).items():
        state[f"base_model.model.{name}.weight"] = parameter.detach().to("cpu").contiguous()
    save_file(state, path / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name in lora_layers(model)})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": config.lora_rank,
        "lora_alpha": config.lora_alpha, "target_modules": targets, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True,
    }
    (path / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def ask_from_tools(tokenizer, template: str) -> None:
    """Puts before its chat template what makes our prompt of `tools=`; replaces that of an earlier call.

    Without tools nothing changes, so training and evaluation, which render the tools themselves, pass it by.
    """
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    own = named.get("default") if named else tokenizer.chat_template
    if not own:
        return
    kwargs = own[: own.index("\n") + 1] if own.startswith(prompts.SET_BY_US) else ""
    own = own.removeprefix(kwargs)
    own = own.partition(END)[2] if own.startswith(prompts.TOOL_PROMPT) else own
    words = {"PROMPT": template, "CALL": prompts.CALL, "END_CALL": prompts.END_CALL}
    words["TODAY"] = f"{prompts.TODAY:%d %b %Y}"
    words = {word: json.dumps(text, ensure_ascii=False) for word, text in words.items()}
    words["DATES"] = prompts.FIXED_DATE if "strftime_now" in own else ""
    block = BLOCK.read_text(encoding="utf-8")
    block = re.sub(rf"\b({'|'.join(words)})\b", lambda found: words[found[0]], block)
    asking = kwargs + block + own
    # Where a tokenizer has several templates, transformers takes "tool_use" for a prompt with tools.
    names = {"default", "tool_use"} & named.keys()
    tokenizer.chat_template = named | dict.fromkeys(names, asking) if named else asking


def asking_from_tools(tokenizer, config: Config):
    """The tokenizer, or a copy whose chat template makes the prompt that the settings name of `tools=`."""
    if tool_prompt(tokenizer) is None:
        tokenizer = copy.copy(tokenizer)
        ask_from_tools(tokenizer, load_template(config.prompt_template))
    return tokenizer


def save_tokenizer(tokenizer, folder: Path) -> str:
    """Writes it beside its model. Returns the class that gives its token ids: AutoTokenizer, if it can be."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    same = "auto_map" not in saved and _same_ids(tokenizer, folder)
    ours = saved.get("auto_map", AS_SAVED) == AS_SAVED and tokenizer.is_fast
    if ours and not same:
        file.write_text(json.dumps(saved | {"auto_map": AS_SAVED}, indent=2) + "\n", encoding="utf-8")
        (folder / "tokenizer_as_saved.py").write_text(AS_SAVED_CODE, encoding="utf-8")
    return "AutoTokenizer" if same or _same_ids(tokenizer, folder) else type(tokenizer).__name__


def _same_ids(tokenizer, folder: Path) -> bool:
    """Whether AutoTokenizer encodes as the tokenizer does."""
    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):
        return False
    return all(loaded.encode(text) == tokenizer.encode(text) for text in PROBES)


def export_model(config, state: dict[str, Tensor], tokenizer, path: Path, dtype: torch.dtype) -> str:
    """Writes full weights as a Hugging Face folder. Returns the class that reads its tokenizer.

    config: the model's, of transformers.

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
    return save_tokenizer(tokenizer, path)


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
        tokenizer = asking_from_tools(tokenizer, config)
        with atomic_folder(path) as folder:
            loader = export_model(config_to_save(policy), full, tokenizer, folder, torch.float32)
            git = read_git(Path(config.run_dir))
            card = model_card(config, state, evaluation, git, tool_prompt(tokenizer), loader)
            (folder / "README.md").write_text(card, encoding="utf-8")
            if adapters(policy):
                write_adapter(policy, config, state["run"]["start"], folder / "adapter")
    ranks.gather(None)


def with_adapters(state: dict[str, Tensor], config: Config, base: str) -> nn.Module:
    """The model of a LoRA run, of its checkpoint's adapters, on the CPU. Raises ModelError."""
    model = read_model(base, torch.device("cpu"), trust_remote_code=config.trust_remote_code)
    how = (config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)
    add_adapters(model, *how, torch.device("cpu"))
    model.load_state_dict(state, strict=False)
    return model


def model_card(
    config: Config, state: dict, evaluation: dict, git: str, prompt: str | None, loader: str
) -> str:
    """README.md of a model. state: of its checkpoint; evaluation: value by name; git: the run's git.txt.

    prompt: tool_prompt's; loader: the class that reads the tokenizer.
    """
    values, defaults = dataclasses.asdict(config), dataclasses.asdict(Config())
    recipe = {key: values[key] for key in values if values[key] != defaults[key] and key not in LOCAL}
    names = [name for name in f"{config.data},{config.test_data}".split(",") if name]
    data = {name: file_sha256(Path(name)) if Path(name).is_file() else "not a local file" for name in names}
    figures = {key: f"{value:.4g}" for key, value in evaluation.items() if isinstance(value, (int, float))}
    lines = [line for line in git.splitlines() if line and not line.startswith("resumed on ")]
    commits = [line for line in lines if line.startswith("commit ")]
    changed = " with uncommitted changes" if commits and len(lines) > len(commits) else ""
    changes = state.get("run", {}).get("changes", [])
    return CARD.format(
        model=config.model, commit=(", ".join(commits) or "unknown") + changed,
        changes="\n".join(f"- {change}" for change in changes) or "Nothing.",
        step=state["step"], hours=state["seconds"] / 3600, flops=state["flops"], recipe=bullets(recipe),
        data=bullets(data), evaluation=bullets(figures), prompt=prompt or "", loader=loader,
    )


def read_git(run: Path) -> str:
    """A run's git.txt; "" without one: a checkpoint may have been copied without the run's other files."""
    path = run / "git.txt"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def bullets(values: dict) -> str:
    """A Markdown list of names and their values."""
    return "\n".join(f"- `{name}`: {value}" for name, value in values.items()) or "None."


@as_command("export")
def main(arguments: list[str]) -> None:
    """`RUN/step_N OUT`. Raises ConfigError or CheckpointError."""
    parser = argparse.ArgumentParser("ops.export", description="A checkpoint as a bf16 Hugging Face folder.")
    parser.add_argument("checkpoint", type=Path, metavar="RUN/step_N")
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    args = parser.parse_args(arguments)
    source, run = args.checkpoint, args.checkpoint.parent
    transformers_logging.disable_progress_bar()
    if args.out.exists():
        raise ConfigError(f"export: {args.out} exists already")
    folder_above(args.out)
    if not source.is_dir():
        there = ", ".join(f"step_{step}" for step in complete_steps(run)) or "none"
        raise ConfigError(f"export: {source} does not exist; the checkpoints of {run}: {there}")
    full = full_state(source, torch.bfloat16)
    config = load_config(["--config", str(run / "config.yaml")])
    state = json.loads((source / "state.json").read_text(encoding="utf-8"))["state"]
    model = None
    if all(name.endswith(ADAPTER) for name in full):
        before = state["run"]  # config.yaml may be of a later resume
        base = start_of(before, run)
        check_model(base)
        own = {key: before["settings"][key] for key in ("lora_rank", "lora_alpha", "lora_targets")}
        config = dataclasses.replace(config, **own)
        for file in weight_files(base):
            if file_sha256(file) != before["model"].get(file.name):
                raise ConfigError(f"export: {file} is not what {source} was trained on; put it back")
        model = with_adapters(full, config, base)
        full = gather_weights(model, next(iter(weights(model).values())).dtype)
    last = {}  # a checkpoint may have been copied without the run's other files
    for row in iter_jsonl(run / "log.jsonl", step=int):
        last = row if row["step"] == state["step"] else last
    evaluation = {key: value for key, value in last.items() if "/accuracy" in key or "/n" in key}
    git = read_git(run)
    tokenizer = asking_from_tools(load_tokenizer(str(source)), config)
    saved = AutoConfig.from_pretrained(source, trust_remote_code=False)
    with atomic_folder(args.out) as folder:
        loader = export_model(saved, full, tokenizer, folder, torch.bfloat16)
        card = model_card(config, state, evaluation, git, tool_prompt(tokenizer), loader)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if model:
            write_adapter(model, config, base, folder / "adapter")
    print(f"model: {args.out}")


if __name__ == "__main__":
    run_script(main)
