"""Peak memory of token log-probs, forward + backward: our LM head against full logits and checkpointed
chunks.

    python bench/logprob_memory.py [--tokens 2048] [--vocab 151936] [--hidden 896] [--repetitions 5]
      [--threads 1]

Every measurement is a process of its own: the peak of its resident memory during forward and backward, minus
what was resident before (inputs and weight; the weight's gradient counts). fp32, temperature 0.7, no entropy.
The three ways take turns; the ratio of a repetition is ours / full logits. Needs Linux's /proc.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernel.head import CHUNK_LOGITS, head_logprobs

TEMPERATURE = 0.7


def ours(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return head_logprobs(hidden, weight, None, target, TEMPERATURE, entropy=False)[0]


def full_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """What most trainers do."""
    logits = hidden @ weight.T / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def checkpointed_chunks(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The same for 512 tokens at a time, computed again by autograd in the backward."""
    parts = zip(hidden.split(512), target.split(512))
    return torch.cat([checkpoint(full_logits, h, weight, t, use_reentrant=False) for h, t in parts])


WAYS = {"ours": ours, "full logits": full_logits, "checkpointed chunks": checkpointed_chunks}


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(way: str, tokens: int, vocab: int, hidden_size: int, threads: int) -> dict:
    """Runs one way in this process: bytes, seconds, and numbers that tell whether all ways computed the
    same.
    """
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).requires_grad_()
    weight = (torch.randn(vocab, hidden_size, generator=generator) * hidden_size**-0.5).requires_grad_()
    target = torch.randint(vocab, (tokens,), generator=generator)
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak starts again from here
    before, start = resident("VmRSS"), time.perf_counter()
    logprobs = WAYS[way](hidden, weight, target)
    middle = time.perf_counter()
    logprobs.sum().backward()
    end = time.perf_counter()
    sums = [logprobs.sum().item(), hidden.grad.norm().item(), weight.grad.norm().item()]
    return {
        "bytes": resident("VmHWM") - before,
        "forward_s": middle - start,
        "backward_s": end - middle,
        "sums": sums,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--way", choices=WAYS, help="one measurement in this process, as JSON (used by the program itself)"
    )
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.tokens, args.vocab, args.hidden, args.threads)))
        return
    sizes = {"tokens": args.tokens, "vocab": args.vocab, "hidden": args.hidden, "threads": args.threads}
    command = [sys.executable, __file__] + [text for k, v in sizes.items() for text in (f"--{k}", str(v))]
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in tqdm(range(args.repetitions), desc="repetitions", disable=None):
        for way in WAYS:
            done = subprocess.run([*command, "--way", way], check=True, stdout=subprocess.PIPE, text=True)
            runs[way].append(json.loads(done.stdout))
    for way in WAYS:
        for a, b in zip(runs[way][0]["sums"], runs["ours"][0]["sums"]):
            assert abs(a - b) <= 1e-4 * abs(b), f"{way} computed other numbers"
    print(f"T = {args.tokens}, V = {args.vocab:,}, H = {args.hidden}, fp32, {args.threads} thread(s), "
          f"median of {args.repetitions}")
    print(f"{'':22}{'peak GiB':>10}{'forward s':>11}{'backward s':>11}")
    medians = {
        way: {
            key: statistics.median(run[key] for run in runs[way])
            for key in ("bytes", "forward_s", "backward_s")
        }
        for way in WAYS
    }
    for way, m in medians.items():
        print(f"{way:22}{m['bytes'] / 2**30:10.2f}{m['forward_s']:11.1f}{m['backward_s']:11.1f}")
    ratios = {
        way: sorted(one["bytes"] / other["bytes"] for one, other in zip(runs["ours"], runs[way]))
        for way in WAYS
    }
    low, middle, high = (
        ratios["full logits"][0],
        statistics.median(ratios["full logits"]),
        ratios["full logits"][-1],
    )
    chunks = statistics.median(ratios["checkpointed chunks"])
    print(
        f"ours / full logits: {low:.3f} / {middle:.3f} / {high:.3f} (min / median / max); / checkpointed: {chunks:.3f}"
    )
    result = {"bench": "logprob_memory", "ratio_min": low, "ratio_median": middle, "ratio_max": high}
    result |= {
        "ratio_checkpointed_median": chunks,
        "peak_gib": {w: m["bytes"] / 2**30 for w, m in medians.items()},
    }
    result |= {"seconds": {way: m["forward_s"] + m["backward_s"] for way, m in medians.items()}}
    result |= sizes | {
        "repetitions": args.repetitions,
        "chunk_logits": CHUNK_LOGITS,
        "torch": torch.__version__,
    }
    print(json.dumps(json.loads(json.dumps(result), parse_float=lambda text: round(float(text), 4))))


if __name__ == "__main__":
    main()
