"""`python tests/cuda_fake.py LIBRARY`: runs CASES on CUDA with fake tensors; prints what went wrong in each.

A fake tensor has no numbers, and a kernel's shape function stands in for the kernel. LIBRARY (see
test_cuda_fake.py) tells PyTorch's CPU build that there is a CUDA device: indexing and autograd ask for it.

Not reached in this way: numbers (what the host reads back is 1 or 0.0), the flash-attn package, CUDA graphs,
streams and events, FSDP and NCCL, memory, and what kernels demand beyond what Kernels knows of.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import inspect
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

if __name__ == "__main__":  # before torch asks which devices there are
    sys.path.insert(0, str(Path(__file__).parents[1]))
    torch_itself = Path(importlib.util.find_spec("torch").origin).parent / "lib/libtorch_cpu.so"
    for library in (torch_itself, sys.argv[1]):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

import model as loading
from config import Config
from distributed.batches import Group, make_updates, sampler_difference
from distributed.weights import skeleton
from grpo import store_logprobs, update_policy
from kernel import decode as decoding
from kernel import grid, norms
from kernel.attention import use_attention
from kernel.decode import Prompt
from kernel.head import head_logprobs
from kernel.hf_engines import ENGINES

CUDA = torch.device("cuda", 0)
HALF = {torch.float16, torch.bfloat16}
SIZES = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
)
TOKENS = 3  # of the responses of each group
GROUPS = [
    Group(Prompt("a", [1, 2, 3], 0), [[4, 5], [6]], [[0.0, 0.0], [0.0]], [], [False, False], thoughts=[1, 1]),
    Group(Prompt("b", [7], 1), [[8], [9, 10]], [[0.0], [0.0, 0.0]], [], [False, False], thoughts=[1, 1]),
]
ALONE = SimpleNamespace(rank=0, world=1, device=CUDA, sum=list, gather=lambda item: [item])
ENDS = (False,) * 4 + (True,) * 4  # the trial's four rows: free, then running, then all ended
aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.baddbmm_)
VARLEN = (torch.ops.torch_attn._varlen_attn, torch.ops.torch_attn._varlen_attn_backward)


class Kernels(TorchDispatchMode):
    """What CUDA's kernels refuse and fake ones let pass. The host reads back 1 or 0.0, the next of `flags` or
    False.

    seen: the operators that were called.
    """

    def __init__(self, flags: Sequence[bool]) -> None:
        super().__init__()
        self.flags = iter(flags)
        self.seen: set = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = function.overloadpacket
        self.seen.add(packet)
        tensors = [x for x in args if isinstance(x, FakeTensor)]
        if tensors and packet is aten._local_scalar_dense:
            if tensors[0].dtype == torch.bool:
                return next(self.flags, False)
            return 0.0 if tensors[0].is_floating_point() else 1
        if tensors and packet in (aten.equal, aten.allclose):
            return True
        if packet is aten.bincount:  # of values below minlength
            return args[0].new_empty(args[2])
        if packet is aten.repeat_interleave:  # of counts
            return args[0].new_empty(TOKENS)
        if packet in VARLEN:
            check_varlen(tensors)
        if packet in PRODUCTS:
            *added, a, b = tensors
            wide = next((x for x in args if isinstance(x, torch.dtype)), a.dtype)  # out_dtype
            out = kwargs.get("out", torch.empty((), dtype=wide))
            told = f"{function}: {[x.dtype for x in tensors]} -> {wide}, {out.dtype}"
            assert a.dtype == b.dtype and {x.dtype for x in added} <= {wide} and out.dtype == wide, told
            assert wide == a.dtype or (wide == torch.float32 and a.dtype in HALF), told
            if wide != a.dtype:  # torch's fake kernels do not all know of it
                product = (aten.mm if a.dim() == 2 else aten.bmm)(a, b).to(wide)
                for x in added:
                    x.expand_as(product)
                return out.copy_(product) if "out" in kwargs else product
        return function(*args, **kwargs)


def check_varlen(tensors: list[Tensor]) -> None:
    """What the flash kernels ask for: one device, 16 bits, heads that divide, lengths in int32."""
    lengths = [x for x in tensors if x.dtype == torch.int32]
    rows = [x for x in tensors if x.dim() == 3]
    query, key, value = rows[1:4] if len(rows) > 3 else rows  # a backward has the gradient first
    assert len({x.device for x in tensors}) == 1, [x.device for x in tensors]
    assert len(lengths) == 2 and len(lengths[0]) == len(lengths[1]), "lengths"
    assert {x.dtype for x in rows} in ({x} for x in HALF), [x.dtype for x in rows]
    assert all(x.stride(-1) == 1 and x.shape[-1] % 8 == 0 for x in rows), [x.stride() for x in rows]
    assert key.shape == value.shape and query.shape[1] % key.shape[1] == 0, [x.shape for x in rows]


@contextlib.contextmanager
def fake_cuda(*flags: bool) -> Iterator[Kernels]:
    """Here tensors are fake, and autocast, which would turn itself off, takes it that there is a GPU."""
    available = patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    in_16_bits = patch.object(torch.cuda, "is_bf16_supported", lambda: True)
    memory = patch.object(torch.cuda, "mem_get_info", lambda: (2**34, 2**35))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with available, in_16_bits, memory, fake, Kernels(flags) as kernels:
        yield kernels


newer_varlen_attn = varlen.varlen_attn
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(newer_varlen_attn).parameters else {}


def older_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
):
    """With the parameters of torch 2.11 and 2.12, which take grouped heads unasked."""
    lengths = (cu_seq_q, cu_seq_k, max_q, max_k)
    return newer_varlen_attn(query, key, value, *lengths, scale=scale, window_size=window_size, **GROUPED)


TRIED: dict[tuple, loading.Capabilities] = {}  # what the trial at loading found; it takes seconds


def load(kind: str, dtype: torch.dtype, checkpointing: bool) -> Callable[[], nn.Module]:
    """A model with hooks -> what gives it weights on fake CUDA. The trial at loading must find no limit."""
    model = skeleton(AutoConfig.for_model(kind, **SIZES), dtype)
    loading.add_hooks(model, checkpointing)

    def move() -> nn.Module:
        for module in model.modules():
            for name, x in module._parameters.items():
                module._parameters[name] = x if x is None else nn.Parameter(torch.empty_like(x, device=CUDA))
            for name, x in module._buffers.items():
                module._buffers[name] = torch.empty_like(x, device=CUDA)
        model.tie_weights()
        model.capabilities = TRIED.get((kind, dtype, varlen.varlen_attn))
        if not model.capabilities:
            with warnings.catch_warnings(), patch.object(loading, "first_line", again):
                warnings.simplefilter("error")
                loading.find_capabilities(model, model, "shared_prefix_eager")
        TRIED[kind, dtype, varlen.varlen_attn] = model.capabilities
        use_attention(model, "train")
        return model

    return move


def again(error: Exception) -> str:
    """Stands for what would make a sentence of an error in the trial."""
    raise error


def update(kind: str, dtype: torch.dtype, checkpointing: bool, older: bool = False) -> None:
    """Loading with its trial, the reference's pass, and two updates of packed groups."""
    config = Config(
        gradient_checkpointing=checkpointing, prompts_per_step=2, minibatch_prompts=1, group_size=2,
        advantage="egpo",
    )
    move = load(kind, dtype, checkpointing)
    kernel = older_varlen_attn if older else newer_varlen_attn
    fused = patch.object(norms.F, "rms_norm", wraps=norms.F.rms_norm)
    with patch.object(varlen, "varlen_attn", kernel), fake_cuda(*ENDS) as kernels, fused as rms_norm:
        policy = move()
        policy.logprobs = partial(loading.token_logprobs, policy, temperature=config.temperature)
        updates = make_updates(GROUPS, torch.randn(2, 2), config, ALONE)
        store_logprobs(policy, updates, "reference_logprobs")
        store_logprobs(policy, updates, "old_logprobs", entropy=True)
        kernels.seen.clear()
        rms_norm.reset_mock()
        policy.train()
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
        metrics = update_policy(policy, optimizer, updates, config, ALONE)
        sampler_difference(updates, ALONE, "tis")
    assert metrics["updates"] == 2 and {*VARLEN, aten._fused_adamw_} <= kernels.seen
    assert rms_norm.call_count >= 2 * sum("norm" in name for name, _ in policy.named_modules())


STEPS = {"admit": 2, "make_room": 1, "shrink": 1}  # of the rollout below: how often each is called


def decode(kind: str, dtype: torch.dtype, temperature: float) -> None:
    """A rollout of more groups than there is room for: filled, with more room, filled again, shrunk."""
    move = load(kind, dtype, checkpointing=False)
    prompts = [Prompt(str(k), [1] * (3 + k), k) for k in range(4)]
    blocks = patch.object(grid, "ROOM", 8), patch.object(decoding, "CUDA_STEPS_PER_CHECK", 2)
    counts = {name: patch.object(decoding, name, wraps=getattr(decoding, name)) for name in STEPS}
    with blocks[0], blocks[1], fake_cuda(*ENDS) as kernels, contextlib.ExitStack() as stack:
        model = move()
        calls = {name: stack.enter_context(count) for name, count in counts.items()}
        free, running = [False] * 8, [True] * 8  # eight rows, and four after it has shrunk
        kernels.flags = iter([*free, *5 * running, *free, *running, *running[:4], *free])
        kernels.seen.clear()
        engine = ENGINES["shared_prefix_eager"]
        with torch.autocast("cuda", torch.bfloat16):
            replies = dict(engine(model, prompts, 4, temperature, 10, [0], 8))
    assert sorted(replies) == [0, 1, 2, 3] and all(len(own) == 4 for own in replies.values())
    found = {name: call.call_count for name, call in calls.items()}
    assert found == STEPS, found
    assert {VARLEN[0], aten.baddbmm_} <= kernels.seen, kernels.seen


def head(bias: bool, chunk: int | None) -> None:
    """The LM head's log-probs and their gradients, in one piece and in several."""
    with fake_cuda():
        hidden, weight = (torch.empty(n, 64, device=CUDA, dtype=torch.bfloat16) for n in (7, 97))
        inputs = [hidden, weight, torch.empty(97, device=CUDA, dtype=torch.bfloat16) if bias else None]
        for x in inputs[: 2 + bias]:
            x.requires_grad_()
        target = torch.empty(7, device=CUDA, dtype=torch.int64)
        logprobs, entropy = head_logprobs(*inputs, target, 0.7, chunk=chunk)
        assert logprobs.dtype == entropy.dtype == torch.float32
        logprobs.sum().backward()
        assert all(x.grad.dtype == x.dtype for x in inputs[: 2 + bias])


BF16 = torch.bfloat16
CASES: dict[str, Callable[[], None]] = {
    "update in bf16": partial(update, "qwen2", BF16, checkpointing=False),
    "update in bf16, torch 2.11": partial(update, "qwen2", BF16, checkpointing=False, older=True),
    "update, fp32 weights, checkpointing": partial(update, "qwen3", torch.float32, checkpointing=True),
    "sampling in bf16": partial(decode, "qwen2", BF16, temperature=1.0),
    "greedy decoding with fp32 weights": partial(decode, "qwen3", torch.float32, temperature=0.0),
    "head": partial(head, bias=False, chunk=None),
    "head in chunks, with a bias": partial(head, bias=True, chunk=3),
}


def outcome(case: Callable[[], None]) -> str:
    """What went wrong, if anything."""
    try:
        case()
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    print(json.dumps({name: outcome(case) for name, case in CASES.items()}), flush=True)
    os._exit(0)  # autograd has a thread for the device, which nothing ends
