"""Peak memory of token log-probs, forward + backward: our LM head, full logits, and checkpointed chunks.

    python bench/logprob_memory.py [--tokens 2048] [--vocab 151936] [--hidden 896] [--repetitions 5]
      [--threads 1]

Every measurement is a process of its own: the peak of its resident memory during forward and backward, minus
what was resident before (inputs and weight; the weight's gradient counts). fp32, temperature 0.7, no entropy.
The three ways take turns; the ratio of a repetition is ours / full logits. Needs Linux's /proc.
"""

import multiprocessing
import statistics
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import common
import torch
from timing import options
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernel.head import head_logprobs


def ours(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return head_logprobs(hidden, weight, None, target, common.TEMPERATURE, entropy=False)[0]


def full_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """What most trainers do."""
    logits = hidden @ weight.T / common.TEMPERATURE
    return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def checkpointed_chunks(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The same for 512 tokens at a time, computed again by autograd in the backward."""
    parts = zip(hidden.split(512), target.split(512))
    return torch.cat([checkpoint(full_logits, h, weight, t, use_reentrant=False) for h, t in parts])


WAYS = {"ours": ours, "full_logits": full_logits, "checkpointed_chunks": checkpointed_chunks}


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, in GiB."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith(field))


def measure(way: str, args: Namespace) -> dict[str, float]:
    """One way in this process: GiB, seconds, and a number that tells whether all ways computed the same."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden).requires_grad_()
    weight = (torch.randn(args.vocab, args.hidden) * args.hidden**-0.5).requires_grad_()
    target = torch.randint(args.vocab, (args.tokens,))
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak starts again from here
    before, start = resident("VmRSS"), time.perf_counter()
    WAYS[way](hidden, weight, target).sum().backward()
    seconds = time.perf_counter() - start
    return {"gib": resident("VmHWM") - before, "seconds": seconds, "norm": weight.grad.norm().item()}


def main() -> None:
    args = options(__doc__, tokens=2048, vocab=151936, hidden=896, repetitions=5, threads=1)
    fork = multiprocessing.get_context("fork")  # nothing has been computed here, so no thread is lost

    def run(way: str) -> dict[str, float]:
        with ProcessPoolExecutor(1, fork) as process:
            return process.submit(measure, way, args).result()

    turns = common.take_turns({way: lambda way=way: run(way) for way in WAYS}, args.repetitions, warm=0)
    norms = [one["norm"] for values in turns.values() for one in values]
    assert max(norms) - min(norms) <= 1e-4 * norms[0], "the ways computed different numbers"
    median = {}
    for way, values in turns.items():
        median[way] = {key: statistics.median(one[key] for one in values) for key in ("gib", "seconds")}
        print(f"{way:22}{median[way]['gib']:8.2f} GiB{median[way]['seconds']:8.1f} s")
    ratios = [ours["gib"] / full["gib"] for ours, full in zip(turns["ours"], turns["full_logits"])]
    chunks = median["ours"]["gib"] / median["checkpointed_chunks"]["gib"]
    common.print_result(
        "logprob_memory", **common.spread(ratios), ratio_checkpointed_median=chunks, ways=median, **vars(args)
    )


if __name__ == "__main__":
    main()
