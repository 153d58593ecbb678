"""Sharding by PyTorch's FSDP2: every rank holds its share of weights, gradients and AdamW state.

The same code runs on one rank. Each decoder layer and the rest (embeddings, last norm, LM head) are gathered
when they compute and freed afterwards; a small model is gathered as one. For the rollout the weights are
gathered once, into a twin of the model without hooks: ranks may then generate different numbers of tokens
without waiting for each other.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from types import MethodType

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from config import ConfigError
from distributed.ranks import Ranks
from kernel.attention import trim_last_layer
from model import ModelError, check_path, first_line, miniature, prepare_like, response_logprobs

# A smaller model is gathered as a whole, and stays so until the backward is done: fewer messages.
KEEP_BYTES = 2**30


def make_mesh(ranks: Ranks, sharding: str) -> DeviceMesh:
    """Collective. "full": one shard per rank. "hsdp": shards inside a node, copies across nodes.

    Raises ConfigError where the nodes have different numbers of ranks.
    """
    if sharding == "full":
        return init_device_mesh(ranks.device.type, (ranks.world,), mesh_dim_names=("shard",))
    inside = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    sizes = ranks.gather(inside)  # by all, whatever each of them finds
    if ranks.world % inside or len(set(sizes)) > 1:
        raise ConfigError("sharding: hsdp needs equally many processes on every node; use sharding full")
    shape = (ranks.world // inside, inside)
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))


def load_sharded(
    path: str, mesh: DeviceMesh, device: torch.device, *, frozen: bool = False,
    gradient_checkpointing: bool = False, offload: bool = False, trust_remote_code: bool = False,
) -> nn.Module:
    """Collective. The causal LM of a folder or hub id, sharded over the mesh; no rank ever holds all of it.

    Master weights are fp32 (AdamW at lr 1e-6 rounds away in bf16); on CUDA computation is bf16 and gradients
    are summed in fp32. frozen: without gradients, and on CUDA stored in bf16: the reference. offload:
    weights, gradients and optimizer state lie in CPU memory, and AdamW runs there. Raises ModelError when the
    model cannot be loaded.
    """
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = model_config(path, trust_remote_code)
    model = skeleton(config, compute if frozen else torch.float32, trust_remote_code)
    prepare_like(model, miniature(config, device, trust_remote_code), gradient_checkpointing)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    place = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    model.free_layers = sum(p.numel() * p.element_size() for p in model.parameters()) > KEEP_BYTES
    for layer in model.get_decoder().layers if model.free_layers else ():
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=place, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=place, reshard_after_forward=False)
    for part in fsdp_modules(model):  # a gradient is the sum over ranks of what each adds to one global mean
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    model.response_logprobs = MethodType(response_logprobs, model)
    register_fsdp_forward_method(model, "response_logprobs")
    model.to_empty(device="cpu" if offload else device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    rebuild_rotary(model)
    stream_weights(model, weight_files(path), path)
    return model.requires_grad_(not frozen)


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The root and the layers: whatever gathers and frees its weights as one."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


# ---------------------------------------------------------------------------------------------------- loading


def model_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a folder or hub id. Raises ModelError."""
    check_path(path)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {path!r} could not be loaded: {first_line(error)}") from None


def skeleton(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """A model on the meta device: shapes without memory."""
    with torch.device("meta"):
        own = copy.deepcopy(config)  # from_config writes the dtype into it
        return AutoModelForCausalLM.from_config(own, dtype=dtype, trust_remote_code=trust_remote_code)


def rebuild_rotary(model: nn.Module) -> None:
    """Computes rotary frequencies again: they are in no file, and to_empty leaves garbage in their place."""
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(config=model.config)
            for name, buffer in fresh.named_buffers():
                getattr(module, name).data.copy_(buffer)


def weight_files(path: str) -> list[Path]:
    """The safetensors files of a folder or hub id (then downloaded). Raises ModelError for none."""
    folder = Path(path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
        except (OSError, ValueError) as error:
            raise ModelError(f"model: {path!r} could not be downloaded: {first_line(error)}") from None
    files = sorted(folder.glob("*.safetensors"))
    if not files:  # pickled weights can run code when they are read
        raise ModelError(f"model: {path!r} has no .safetensors files; convert it: save_pretrained makes them")
    return files


@torch.no_grad()
def stream_weights(model: nn.Module, files: list[Path], path: str) -> None:
    """Reads this rank's rows of every parameter, one at a time.

    Raises ModelError for what is missing or does not fit.
    """
    wanted = dict(model.named_parameters())  # a tied head is not listed
    try:
        for file in files:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    parameter = wanted.pop(name, None)
                    if parameter is None:
                        continue
                    rows = tensors.get_slice(name)
                    if tuple(rows.get_shape()) != tuple(parameter.shape):
                        shapes = f"{tuple(rows.get_shape())}, its config {tuple(parameter.shape)}"
                        raise ModelError(f"model: {path!r}: {name} has the shape {shapes}")
                    local = parameter.to_local()
                    first = first_row(parameter)
                    local.copy_(rows[first : first + len(local)])
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model: {file} could not be read: {first_line(error)}") from None
    if wanted:
        some = ", ".join(list(wanted)[:3])
        raise ModelError(f"model: {path!r} lacks weights that its config asks for: {some}")


def first_row(parameter: DTensor) -> int:
    """Where this rank's rows begin: FSDP2 cuts dimension 0 as torch.chunk does; the last may be short."""
    mesh = parameter.device_mesh
    size = -(-parameter.shape[0] // mesh.size(mesh.ndim - 1))
    return min(parameter.shape[0], mesh.get_local_rank(mesh.ndim - 1) * size)


def release(model: nn.Module) -> None:
    """Frees what a forward without a backward leaves gathered: embeddings and head, 2 GB of a 7B model."""
    if isinstance(model, FSDPModule) and model.free_layers:
        model.reshard()


# ---------------------------------------------------------------------------------------------------- rollout


@contextlib.contextmanager
def gathered_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Collective at entry. A twin of the model without hooks, over gathered weights, in the compute dtype.

    The weights are those of this moment and are freed at the end. Ranks may use the twin as often as they
    like, or not at all.
    """
    parts = fsdp_modules(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield _twin(model)
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def _twin(model: nn.Module) -> nn.Module:
    own_class = type(model).__mro__[2]  # fully_shard puts a class of its own before it
    with torch.device("meta"):
        twin = own_class(copy.deepcopy(model.config))
    twin.capabilities = model.capabilities
    trim_last_layer(twin)
    modules = dict(twin.named_modules())
    for name, module in model.named_modules():
        for key, tensor in module._parameters.items():  # ties stay ties: both names hold one tensor
            weight = None if tensor is None else nn.Parameter(tensor.data, requires_grad=False)
            modules[name]._parameters[key] = weight
        for key, tensor in module._buffers.items():
            modules[name]._buffers[key] = tensor
    return twin.eval()


def full_tensor(tensor: Tensor) -> Tensor:
    """Collective. A sharded tensor as a whole one; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def class_name(model: nn.Module) -> str:
    """The model's class as transformers knows it: fully_shard puts FSDP before it."""
    return type(model).__name__.removeprefix("FSDP")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, tied ones once: views of the live, sharded storage."""
    tensors = model.state_dict()  # first: it reshards what a rollout or a forward pass has left unsharded
    own = dict(model.named_parameters())
    tied = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in own]
    return {name: tensor.detach() for name, tensor in tensors.items() if name not in tied}
