"""Sharding by PyTorch's FSDP2: every rank holds its share of weights, gradients and AdamW state.

The same code runs on one rank. Each decoder layer and the rest (embeddings, last norm, LM head) are gathered
when they compute and freed afterwards; a small model is gathered as one. For the rollout the weights are
gathered once, into a twin of the model without hooks: ranks may then generate different numbers of tokens
without waiting for each other.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType

import torch
import torch.distributed as dist
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
from transformers.initialization import no_init_weights

from config import Config, ConfigError
from distributed.ranks import Ranks
from distributed.weights import allocate, meta_parameters, model_config, skeleton, stream_weights
from kernel.attention import trim_last_layer, use_attention, uses_shared_prefix
from kernel.lora import ADAPTER, LoraLinear, adapters, adapters_off, add_adapters
from kernel.norms import fuse_norms
from kernel.packing import Packed
from model import (
    Capabilities,
    add_hooks,
    compute_dtype,
    count_parameters,
    find_capabilities,
    response_logprobs,
    token_logprobs,
)

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
    grid = torch.arange(ranks.world).view(-1, inside)  # [nodes, processes of each]
    # init_device_mesh would give its groups torch's own timeout.
    across, _ = dist.new_subgroups_by_enumeration(grid.T.tolist(), ranks.timeout)
    within, _ = dist.new_subgroups_by_enumeration(grid.tolist(), ranks.timeout)
    names = ("replicate", "shard")
    return DeviceMesh.from_group([across, within], ranks.device.type, grid, mesh_dim_names=names)


def load_policy(
    config: Config, path: str, temperature: float, ranks: Ranks, policy: nn.Module | None = None
) -> nn.Module:
    """Collective. The model to train, or the frozen reference of this policy, sharded as the settings say.

    It has `policy.logprobs(packed)`: model.token_logprobs at its temperature. With lora_rank only adapters
    are trained: they lie outside FSDP, whole on every rank, and the reference is the policy without them.
    Raises ConfigError for lora_targets that the model does not have.
    """
    frozen = policy is not None
    if frozen and config.lora_rank and not config.reference:
        return Base(policy)
    offload = config.offload == "all" or (frozen and config.offload == "reference")
    model = load_sharded(
        path, make_mesh(ranks, config.sharding), ranks.device, frozen=frozen or config.lora_rank > 0,
        offload=offload, gradient_checkpointing=config.gradient_checkpointing and not frozen,
        trust_remote_code=config.trust_remote_code, engine=config.rollout_engine,
        capabilities=policy.capabilities if frozen and not config.reference else None,
    )
    model.capabilities = ranks.gather(model.capabilities)[0]  # rounding must not part the ranks
    both = [model, policy or model]
    shared = all(map(uses_shared_prefix, both))  # policy and reference see the same rows
    for one in both:
        one.capabilities = replace(one.capabilities, shared_prefix=shared)
        use_attention(one, "train")
    model.logprobs = partial(token_logprobs, model, temperature=temperature)
    if config.lora_rank and not frozen:
        how = (config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)
        try:
            add_adapters(model, *how, ranks.device)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if ranks.main:
            small, total = sum(p.numel() for p in adapters(model).values()), count_parameters(model)
            size = f"{12 * small / 1e6:,.2f} MB"  # with AdamW's two moments
            print(f"LoRA: {small:,} of {total:,} weights are trained; a checkpoint takes {size}")
    return model


@dataclass(frozen=True)
class Base:
    """The frozen model that a policy's adapters sit on: the reference of a LoRA run, at no memory."""

    policy: nn.Module

    def logprobs(self, packed: Packed, entropy: bool = True) -> tuple[Tensor, Tensor]:
        """As the policy's, with its adapters off."""
        with adapters_off(self.policy):
            return self.policy.logprobs(packed, entropy=entropy)


def load_sharded(
    path: str, mesh: DeviceMesh, device: torch.device, *, frozen: bool = False,
    gradient_checkpointing: bool = False, offload: bool = False, trust_remote_code: bool = False,
    engine: str = "shared_prefix", capabilities: Capabilities | None = None,
) -> nn.Module:
    """Collective. The causal LM of a folder or hub id, sharded over the mesh; no rank ever holds all of it.

    Master weights are fp32 (AdamW at lr 1e-6 rounds away in bf16); on CUDA computation is bf16 and gradients
    are summed in fp32. frozen: without gradients, and on CUDA stored in bf16: the reference, and what LoRA's
    adapters sit on. offload: weights, gradients and optimizer state lie in CPU memory, and AdamW runs there.
    engine: that rollouts will ask for. capabilities: where they are known, those of this reference's policy.
    Raises ModelError when the model cannot be loaded.
    """
    compute = compute_dtype(device)
    config = model_config(path, trust_remote_code)
    model = skeleton(config, compute if frozen else torch.float32, trust_remote_code)
    add_hooks(model, gradient_checkpointing)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    place = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    model.free_layers = sum(p.numel() * p.element_size() for p in model.parameters()) > KEEP_BYTES
    for layer in decoder_layers(model) if model.free_layers else ():
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=place, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=place, reshard_after_forward=False)
    for part in fsdp_modules(model):  # a gradient is the sum over ranks of what each adds to one global mean
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    model.response_logprobs = MethodType(response_logprobs, model)
    register_fsdp_forward_method(model, "response_logprobs")
    allocate(model, torch.device("cpu") if offload else device, device)
    stream_weights(model, path, trust_remote_code)
    if capabilities:
        model.capabilities = capabilities
        use_attention(model, "train")
    else:
        with gathered_weights(model) as twin:
            find_capabilities(model, twin, engine)
    # Training mode is noise (dropout, random routers), except where it tells layers to checkpoint.
    for module in model.modules():
        module.training = gradient_checkpointing and getattr(module, "gradient_checkpointing", False)
    return model.requires_grad_(not frozen)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers, whatever the model calls them; none where layers share weights."""
    for part in (model.get_decoder(), model):  # some models call something else their decoder
        lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
        for layers in lists:
            if len(layers) == model.config.get_text_config().num_hidden_layers:
                own = sum(len(list(layer.parameters())) for layer in layers)
                return layers if own == len(list(layers.parameters())) else nn.ModuleList()
    return nn.ModuleList()


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The root and the layers: whatever gathers and frees its weights as one."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def release(model: nn.Module) -> None:
    """Frees what a forward without a backward leaves gathered: embeddings and head, 2 GB of a 7B model."""
    if isinstance(model, FSDPModule) and model.free_layers:
        model.reshard()


@contextlib.contextmanager
def gathered_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Collective at entry. A twin of the model without hooks, over gathered weights, in the compute dtype.

    Adapters are merged into the gathered weights, which are a copy. The weights are those of this moment and
    are freed at the end. Ranks may use the twin as often as they like, or not at all.
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
    with meta_parameters(), no_init_weights():  # drawing numbers that nobody gets would take most of the time
        twin = own_class(copy.deepcopy(model.config))
    twin.capabilities = getattr(model, "capabilities", None)
    trim_last_layer(twin)
    fuse_norms(twin)
    modules = dict(twin.named_modules())
    for name, module in model.named_modules():
        for key, tensor in module._parameters.items():  # ties stay ties: both names hold one tensor
            if key in ADAPTER:
                continue
            weight = None if tensor is None else nn.Parameter(tensor.data, requires_grad=False)
            modules[name]._parameters[key] = weight
        if isinstance(module, LoraLinear):
            module.weight.data.copy_(module.merged(module.weight.data))
        for key, tensor in module._buffers.items():
            modules[name]._buffers[key] = tensor
    return twin.eval()


def clip_and_step(
    policy: nn.Module, optimizer: torch.optim.Optimizer, bound: float, ranks: Ranks
) -> float:
    """Collective. Steps with the policy's gradients, clipped to a global norm of `bound` (0: not clipped),
    and clears them. Returns their norm before; where it is not finite, all ranks skip the step together.

    FSDP has added up the gradients of what it shards; those of adapters are added up here.
    """
    whole = list(adapters(policy).values())
    if whole and ranks.world > 1:
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in whole])
        dist.all_reduce(flat)
        for parameter, gradient in zip(whole, flat.split([p.numel() for p in whole])):
            parameter.grad = gradient.view_as(parameter)
    norm = float(full_tensor(nn.utils.clip_grad_norm_(policy.parameters(), bound or math.inf)))
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def full_tensor(tensor: Tensor) -> Tensor:
    """Collective. A sharded tensor as a whole one; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def class_name(model: nn.Module) -> str:
    """The model's class as transformers knows it: fully_shard puts FSDP before it."""
    return type(model).__name__.removeprefix("FSDP")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, tied ones once, without adapters: views of the live, sharded
    storage.
    """
    tensors = model.state_dict()  # first: it reshards what a rollout or a forward pass has left unsharded
    own = dict(model.named_parameters())
    tied = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in own]
    left_out = {*tied, *adapters(model)}
    return {name: tensor.detach() for name, tensor in tensors.items() if name not in left_out}
