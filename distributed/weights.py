"""From a folder or hub id to a model with its weights: whole on one device, or this rank's rows of each.

Training and evaluation load in the same way. A skeleton has parameters on the meta device and real buffers.
It is given memory, and the files' rows are streamed into it, one tensor at a time.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from config import check_model
from model import ModelError, compute_dtype, first_line, prepare_model


def load_model(
    path: str, device: torch.device, gradient_checkpointing: bool = False, dtype: torch.dtype | None = None,
    engine: str = "shared_prefix",
) -> nn.Module:
    """A whole causal LM on one device: for evaluation and distillation. Training uses fsdp.load_sharded.

    path: a folder or hub id. Code from the hub is never run. dtype: by default bf16 on CUDA, fp32 on a CPU.
    engine: the one that rollouts will ask for. Raises ModelError when the model cannot be loaded.
    """
    model = read_model(path, device, dtype or compute_dtype(device))
    return prepare_model(model.eval(), device, gradient_checkpointing, engine)


def read_model(
    path: str, device: torch.device, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """A whole causal LM on one device, as it is in a folder or on the hub. dtype: by default the files' own.

    Raises ModelError.
    """
    saved = model_config(path, trust_remote_code)
    own = saved.dtype if isinstance(saved.dtype, torch.dtype) else torch.float32
    model = skeleton(saved, dtype or own, trust_remote_code)
    allocate(model, device, device)
    model.tie_weights()
    stream_weights(model, path, trust_remote_code)
    return model


def model_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a folder or hub id. Raises ModelError, also for weights that cannot be trained."""
    check_model(path)
    manifest = Path(path) / "manifest.json"  # of a checkpoint of ours
    if manifest.is_file() and ".lora_A" in manifest.read_text("utf-8", "replace"):
        remedy = f"python -m ops.export {path} OUT merges them"
        raise ModelError(f"model: {path!r} holds LoRA's adapters; {remedy}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {path!r} could not be loaded: {first_line(error)}") from None
    if quantised := getattr(config, "quantization_config", None):
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise ModelError(f"model: {path!r} holds quantised weights ({kind}); take the unquantised model")
    return config


@contextlib.contextmanager
def meta_parameters() -> Iterator[None]:
    """Modules made here have their parameters on the meta device: shapes without memory. Their buffers are
    real: most are in no file, and only the module itself knows how to make them.
    """
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = without_memory
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def skeleton(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """A model without weights: parameters of this dtype on the meta device, buffers on the CPU.

    model.dropout: rates that its config has and that are off here. Dropout would give the policy, the old
    log-probs and the update three different models. model.start_config: the config as it came, for exports.
    """
    own = copy.deepcopy(config)
    dropout = {}
    for part in {id(one): one for one in (own, own.get_text_config())}.values():
        for name, rate in list(vars(part).items()):
            if "drop" in name and isinstance(rate, float) and rate > 0:
                dropout[name] = rate
                setattr(part, name, 0.0)
    try:
        with meta_parameters():
            model = AutoModelForCausalLM.from_config(
                own, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        raise ModelError(f"model: {config.model_type} is no causal LM: {first_line(error)}") from None
    if drawn := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise ModelError(f"model: {config.model_type} makes buffers from its weights: {', '.join(drawn[:3])}")
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p:  # not from the config
            dropout["nn.Dropout"], module.p = module.p, 0.0
    model.dropout, model.start_config = dropout, config
    return model._apply(lambda x: x.to(dtype) if x.is_meta and x.is_floating_point() else x)


def config_to_save(model: nn.Module) -> PreTrainedConfig:
    """The config as the start model had it, with its dropout."""
    return getattr(model, "start_config", model.config)


def allocate(model: nn.Module, parameters: torch.device, buffers: torch.device) -> None:
    """Gives meta parameters memory on one device, and moves buffers to another."""

    def place(x: Tensor) -> Tensor:
        if x.is_meta:
            return torch.empty_like(x, device=parameters)
        return x if isinstance(x, nn.Parameter) else x.to(buffers)  # a tied one comes twice

    model._apply(place)


def weight_files(path: str) -> list[Path]:
    """The safetensors files of a folder or hub id (then downloaded). Raises ModelError for none."""
    folder = Path(path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
        except (OSError, ValueError) as error:
            raise ModelError(f"model: {path!r} could not be downloaded: {first_line(error)}") from None
        check_model(str(folder))
    files = sorted(folder.glob("*.safetensors"))
    if not files:  # pickled weights can run code when they are read
        raise ModelError(f"model: {path!r} has no .safetensors files; convert it: save_pretrained makes them")
    return files


@torch.no_grad()
def stream_weights(model: nn.Module, path: str, trust_remote_code: bool = False) -> None:
    """Fills in parameters and saved buffers, of which a rank reads its own rows alone, one at a time.

    Where the files have other names or shapes than the model (mixtures of experts, text models inside larger
    ones), transformers loads it and converts them: then every rank holds the whole model for a moment, in CPU
    memory. Raises ModelError for what is missing or does not fit.
    """
    files = weight_files(path)
    wanted = dict(model.named_parameters())  # a tied head is not listed
    saved = {name: x for name, x in model.state_dict(keep_vars=True).items() if name not in wanted}
    wanted |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
    try:
        shapes = {}
        for file in files:
            with safe_open(file, "pt") as tensors:
                shapes.update({name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()})
        if any(shapes.get(name) != tuple(tensor.shape) for name, tensor in wanted.items()):
            return _converted_weights(wanted, files[0].parent, path, trust_remote_code)
        for file in files:
            with safe_open(file, "pt") as tensors:
                for name in wanted.keys() & tensors.keys():
                    _copy_rows(wanted[name], tensors.get_slice(name))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model: {file} could not be read: {first_line(error)}") from None
    unread = sorted(name for name in shapes.keys() - wanted.keys() - saved.keys() if "inv_freq" not in name)
    if unread and os.environ.get("RANK", "0") == "0":
        some = ", ".join(unread[:3])
        warnings.warn(f"model: {path!r} holds weights that its config does not ask for: {some}", stacklevel=2)


def _converted_weights(wanted: dict[str, Tensor], folder: Path, path: str, trust_remote_code: bool) -> None:
    try:
        whole, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model: {path!r} could not be loaded: {first_line(error)}") from None
    for name, of_file, of_config in sorted(found["mismatched_keys"]):
        shapes = f"{tuple(of_file)}, its config {tuple(of_config)}"
        raise ModelError(f"model: {path!r}: {name} has the shape {shapes}")
    if missing := sorted(found["missing_keys"]):
        some = ", ".join(missing[:3])
        raise ModelError(f"model: {path!r} lacks weights that its config asks for: {some}")
    state = whole.state_dict()
    for name, tensor in wanted.items():
        _copy_rows(tensor, state[name])


def _copy_rows(tensor: Tensor, rows) -> None:
    """Copies into a whole tensor, or into this rank's rows: FSDP2 cuts dimension 0 as torch.chunk does, so
    the last share may be short. rows: a tensor, or a slice of a file, which is read here.
    """
    if not isinstance(tensor, DTensor):
        tensor.copy_(rows[...])
        return
    mesh, local = tensor.device_mesh, tensor.to_local()
    size = -(-tensor.shape[0] // mesh.size(mesh.ndim - 1))
    first = min(tensor.shape[0], mesh.get_local_rank(mesh.ndim - 1) * size)
    local.copy_(rows[first : first + len(local)])
