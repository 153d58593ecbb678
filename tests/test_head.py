"""kernel/head.py: the chunked LM head gives the numbers and gradients of full logits (`full`), unheld."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernel.head import head_logprobs

N, H, V, TEMPERATURE = 20, 8, 50, 0.7


def inputs(bias: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Leaves that need gradients, and targets among which one token stands twice."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (N, H), "weight": (V, H)} | ({"bias": (V,)} if bias else {})
    drawn = {k: torch.randn(*x, generator=generator, dtype=torch.float64) for k, x in shapes.items()}
    leaves = {"bias": None} | {name: x.to(dtype).requires_grad_() for name, x in drawn.items()}
    return leaves | {"target": torch.tensor([3, 3, 0, V - 1, *range(N - 4)])}


def full(hidden, weight, bias, target):
    logprobs = (torch.nn.functional.linear(hidden, weight, bias) / TEMPERATURE).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1).detach()
    return logprobs.gather(-1, target[:, None])[:, 0], entropy


def gradients(logprobs: torch.Tensor, leaves: dict) -> list[torch.Tensor]:
    """Of a sum with a different weight per token, as advantages are."""
    weights = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)
    wanted = [leaves[name] for name in ("hidden", "weight", "bias") if leaves[name] is not None]
    return torch.autograd.grad((logprobs * weights).sum(), wanted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, N, None])
def test_the_chunked_head_equals_full_logits(chunk, bias):
    leaves = inputs(bias)
    logprobs, entropy = head_logprobs(**leaves, temperature=TEMPERATURE, chunk=chunk)
    slow, slow_entropy = full(**leaves)
    assert_close(logprobs, slow, atol=1e-6, rtol=1e-5)
    assert_close(entropy, slow_entropy, atol=1e-6, rtol=1e-5)
    assert logprobs.requires_grad and not entropy.requires_grad
    for ours, theirs in zip(gradients(logprobs, leaves), gradients(slow, leaves)):
        assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [4, 1000])
def test_the_backward_can_run_twice(chunk):
    """Its buffers are overwritten: a second run must not read what the first one left there."""
    leaves = inputs()
    loss = head_logprobs(**leaves, temperature=TEMPERATURE, chunk=chunk)[0].sum()
    first, second = (torch.autograd.grad(loss, leaves["weight"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_frozen_weight_gets_no_gradient():
    leaves = inputs()
    leaves["weight"].requires_grad_(False)
    head_logprobs(**leaves, temperature=TEMPERATURE)[0].sum().backward()
    assert leaves["weight"].grad is None and leaves["hidden"].grad.abs().sum() > 0


def test_the_entropy_changes_no_log_prob():
    """The old log-probs are computed without it, the new ones with it: the first ratio must be 1 exactly."""
    leaves = inputs()
    with torch.no_grad():
        old, zeros = head_logprobs(**leaves, temperature=TEMPERATURE, chunk=4, entropy=False)
    new, _ = head_logprobs(**leaves, temperature=TEMPERATURE, chunk=4)
    assert torch.equal(old, new) and not zeros.any()


def test_far_apart_logits_do_not_underflow():
    leaves = inputs()
    with torch.no_grad():
        leaves["hidden"] *= 1e3
    assert_close(head_logprobs(**leaves, temperature=TEMPERATURE)[0], full(**leaves)[0], atol=1e-6, rtol=1e-5)
    assert full(**leaves)[0].min() < -1000, "far below what exp() can represent"


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation gives back."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_no_tensor_of_tokens_times_vocabulary():
    leaves, ours, theirs = inputs(), Largest(), Largest()
    with ours:
        head_logprobs(**leaves, temperature=TEMPERATURE, chunk=2)[0].sum().backward()
    with theirs:
        full(**leaves)[0].sum().backward()
    assert ours.elements == V * H, "nothing is larger than the weight's gradient"
    assert theirs.elements == N * V > V * H, "full logits are seen where there are some"


@pytest.mark.parametrize("chunk", [4, 1000])
def test_autocast_rounds_the_matrices_but_not_the_logits(chunk):
    """bf16 logits would have three digits, an error of 0.05 nats at 20. Sums and log-probs are fp32."""
    leaves = inputs()
    rounded = {k: leaves[k].detach().bfloat16().float().requires_grad_() for k in ("hidden", "weight")}
    rounded |= {"bias": None, "target": leaves["target"]}
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropy = head_logprobs(**leaves, temperature=TEMPERATURE, chunk=chunk)
    slow, slow_entropy = full(**rounded)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert_close(logprobs, slow, atol=1e-5, rtol=1e-5)
    assert_close(entropy, slow_entropy, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients(logprobs, leaves), gradients(slow, rounded)):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 5e-3 * theirs.norm(), "only the gradient of the logits was rounded"


def test_the_weight_gradient_is_summed_in_fp32():
    """One token per chunk: in bf16, the sum of 600 equal parts would stop growing at 256 of them."""
    hidden, weight = torch.ones(600, 1), torch.zeros(2, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs = head_logprobs(hidden, weight, None, torch.zeros(600, dtype=torch.long), 1.0, chunk=1)[0]
    logprobs.sum().backward()
    assert_close(weight.grad, torch.tensor([[300.0], [-300.0]]))


def test_16_bit_hidden_states_get_16_bit_gradients():
    leaves = inputs(dtype=torch.bfloat16)
    logprobs = head_logprobs(**leaves, temperature=TEMPERATURE)[0]
    assert logprobs.dtype == torch.float32
    assert [x.dtype for x in gradients(logprobs, leaves)] == [torch.bfloat16, torch.bfloat16]
