"""LoRA (Hu et al., arXiv 2106.09685): small trained adapters on frozen linear layers.

    y = W x + b + (alpha / rank) B A x        A [rank, in], B [out, rank]

W and b stay as they were loaded. A starts as nn.Linear's weights do and B at zero, so training starts from
the model itself. With the adapters off, the model is its frozen start: a reference that costs no memory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAPTER = ("lora_A", "lora_B")  # the names of an adapter's parameters, beside its layer's weight


class LoraLinear(nn.Linear):
    """A linear layer with an adapter. It keeps its name, its weights and its hooks: see add_adapters."""

    lora_A: nn.Parameter  # [rank, in], fp32
    lora_B: nn.Parameter  # [out, rank], fp32
    scale: float  # alpha / rank
    on: bool

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of x."""
        frozen = F.linear(x, self.weight, self.bias)
        if not self.on:
            return frozen
        narrow = F.linear(x, self.lora_A.to(x.dtype)) * self.scale  # [..., rank]
        return frozen + F.linear(narrow, self.lora_B.to(x.dtype))

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The weight [out, in] of a layer without adapter that does the same; summed in fp32 or more, and
        rounded once, to the dtype of the weight that is given.
        """
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (part.to(weight.device, wide) for part in (self.lora_A, self.lora_B))
        return torch.addmm(weight.to(wide), b, a, alpha=self.scale).to(weight.dtype)


def add_adapters(
    model: nn.Module, rank: int, alpha: float, targets: str, seed: int, device: torch.device
) -> None:
    """Freezes the model and puts an adapter on each of its linear layers but the LM head.

    targets: the last parts of their names, "q_proj,v_proj"; empty: all. The same seed gives the same
    adapters, on every rank. Raises ValueError, which names what there is, for a target that no layer has.
    """
    wanted = set(targets.replace(",", " ").split())
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    layers = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not head:  # a subclass may do anything with its weight
            layers[name] = module
    there = {name.rpartition(".")[2] for name in layers}
    if not there:  # GPT-2 has Conv1D
        raise ValueError("lora_rank: the model has no layers of the type nn.Linear; train all its weights")
    if wrong := wanted - there:
        names = ", ".join(sorted(there))
        raise ValueError(f"lora_targets: no linear layer is called {min(wrong)}; there are {names}")
    draw = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        if wanted and name.rpartition(".")[2] not in wanted:
            continue
        bound = 1 / math.sqrt(layer.in_features)
        a = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=draw)
        layer.lora_A = nn.Parameter(a.to(device))
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        layer.scale, layer.on = alpha / rank, True
        layer.__class__ = LoraLinear


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers with an adapter by name; none where all weights are trained."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name."""
    return {name: p for name, p in model.named_parameters() if name.endswith(ADAPTER)}


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the frozen one that it started from, bit for bit."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True
