"""The LM head as token log-probs, with a backward of its own: no [tokens, vocabulary] tensor is ever held.

The matrix product is done for a chunk of tokens at a time. The backward computes a chunk's logits again,
turns them in place into their gradient, and multiplies that out at once into the gradients of hidden states
and weight. Fused linear cross-entropy kernels save memory in the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_LOGITS = 2**26  # logits of one chunk: 256 MiB in fp32


def head_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: float, *,
    entropy: bool = True, chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of target[i] under softmax((weight @ hidden[i] + bias) / temperature), and its entropy.

    hidden [N, H], weight [V, H], bias [V] or None, target [N] -> [N], [N] in fp32 (fp64 for fp64 inputs). The
    entropy has no gradient, and is 0 without `entropy`. Under autocast the matrices are multiplied in its
    dtype; sums, logits and gradients before rounding are fp32. chunk: tokens at a time.
    """
    chunk = chunk or max(1, CHUNK_LOGITS // len(weight))
    return _HeadLogprobs.apply(hidden, weight, bias, target, 1 / temperature, entropy, chunk)


class _HeadLogprobs(torch.autograd.Function):
    """head_logprobs with scale = 1 / temperature. A single chunk is kept and not computed again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, scale, entropy, chunk):
        """hidden [N, H], weight [V, H], bias [V] or None, target [N] -> log-probs [N], entropies [N]."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        sums = torch.promote_types(dtype, torch.float32)
        logprobs, entropies = (hidden.new_zeros(len(hidden), dtype=sums) for _ in range(2))
        # A new buffer costs about as much as a softmax: chunks share one, and the entropy has another.
        buffer = hidden.new_empty(min(chunk, len(hidden)), len(weight), dtype=sums)
        other = torch.empty_like(buffer) if entropy else buffer
        with torch.autocast(device, enabled=False):
            matrix = weight.to(dtype)
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                inputs = hidden[rows].to(dtype)
                logits, probs = buffer[: len(inputs)], other[: len(inputs)]
                _logits(inputs, matrix, bias, scale, out=logits)
                top = logits.amax(-1)
                own = logits.gather(-1, target[rows, None])[:, 0] - top
                if entropy:
                    logits.sub_(top[:, None])  # softmax does the same, so this changes no log-prob
                torch.softmax(logits, -1, out=probs)
                log_top = probs.amax(-1).log()  # the largest probability is at least 1 / V: no underflow
                logprobs[rows] = own + log_top
                if entropy:
                    entropies[rows] = -log_top - torch.bmm(probs[:, None], logits[:, :, None])[:, 0, 0]
        ctx.save_for_backward(hidden, weight, bias, target, probs if len(probs) == len(hidden) else None)
        ctx.scale, ctx.chunk = scale, chunk
        ctx.dtype, ctx.sums = dtype, sums
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad, _):
        """grad [N], of the log-probs -> gradients of hidden, weight and bias; None for the rest."""
        hidden, weight, bias, target, kept = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.empty_like(weight, dtype=ctx.sums) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=ctx.sums) if need_bias else None
        buffer = hidden.new_empty(min(ctx.chunk, len(hidden)), len(weight), dtype=ctx.sums)
        product = hidden.new_empty(len(buffer), hidden.shape[1], dtype=ctx.sums)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(ctx.dtype)
            for start in range(0, len(hidden), ctx.chunk):
                rows = slice(start, start + ctx.chunk)
                inputs = hidden[rows].to(ctx.dtype)
                d = buffer[: len(inputs)]
                if kept is None:
                    _logits(inputs, matrix, bias, ctx.scale, out=d)
                    torch.softmax(d, -1, out=d)
                # d log-prob / d logits is onehot(target) - probabilities
                torch.mul(d if kept is None else kept, -grad[rows, None], out=d)
                d[torch.arange(len(d), device=d.device), target[rows]] += grad[rows]
                if need_bias:
                    d_bias.add_(d.sum(0), alpha=ctx.scale)
                d = d.to(ctx.dtype)
                if need_hidden:
                    d_hidden[rows] = _addmm(product[: len(inputs)], d, matrix, 0.0, ctx.scale)
                if need_weight:
                    _addmm(d_weight, d.T, inputs, float(start > 0), ctx.scale)
        d_weight = d_weight.to(weight.dtype) if need_weight else None
        d_bias = d_bias.to(bias.dtype) if need_bias else None
        return d_hidden, d_weight, d_bias, None, None, None, None


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits [N, V] of hidden states [N, H] in fp32: nothing is rounded to the 16 bits of the inputs."""
    sums = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.new_empty(len(hidden), len(weight), dtype=sums)
        _logits(hidden, weight.to(hidden.dtype), bias, 1.0, out=logits)
    return logits


def _logits(inputs: Tensor, matrix: Tensor, bias: Tensor | None, scale: float, out: Tensor) -> None:
    if bias is not None:
        out.copy_(bias)
    _addmm(out, inputs, matrix.T, 0.0 if bias is None else scale, scale)


def _addmm(out: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """out = beta out + alpha a @ b, in place. Products of 16-bit matrices are summed in fp32, not rounded."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    if a.is_cuda:
        return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    # CPUs have no such product, but that of the widened numbers is the same.
    return torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha, out=out)
