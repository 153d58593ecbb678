"""Rollout engines against Hugging Face's generate(num_return_sequences=G), taking turns in one process.

    python bench/rollout_engines.py [--case 512/64/8] [--prompts 4] [--tails] [--engines A,B] [--rounds 5]

--case P/R/G: prompts of P tokens (give or take a quarter), R new tokens, G samples each. Random weights, 27
million parameters, one thread, fp32, process time. --tails: lengths are geometric with mean 13, by declaring
one token in thirteen a stop token. The floor is the time of the matrix products of one prefill per prompt and
of one decode step per token, at the rates that this machine reaches for them.
"""

import random
import statistics
import time

import common
import torch
from common import Shape
from timing import options

SHAPE = Shape(hidden=512, inner=1408, layers=8, heads=8, kv_heads=2, vocab=8192)


def linear_seconds(rows: int) -> float:
    """Measured seconds of the layers' matrix products for `rows` tokens, best of 3."""
    hidden, inner, kv = SHAPE.hidden, SHAPE.inner, 2 * SHAPE.hidden * SHAPE.kv_heads // SHAPE.heads
    sizes = [(hidden, hidden), (hidden, kv), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)]
    weights = [(torch.randn(rows, n), torch.randn(m, n)) for _ in range(SHAPE.layers) for n, m in sizes]
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        for x, weight in weights:
            torch.nn.functional.linear(x, weight)
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    args = options(
        __doc__, case="512/64/8", prompts=4, tails=False, engines="shared_prefix,generate", rounds=5
    )
    prompt, new, copies = map(int, args.case.split("/"))
    torch.set_num_threads(1)
    model, rng = common.random_model(SHAPE), random.Random(0)
    stops = rng.sample(range(SHAPE.vocab), SHAPE.vocab // 13) if args.tails else [SHAPE.vocab]
    lengths = [rng.randint(prompt * 3 // 4, prompt * 5 // 4) for _ in range(args.prompts)]
    prompts = [ids for ids, _ in common.random_groups(SHAPE.vocab, [(n, ()) for n in lengths])]

    def timed(engine: str) -> tuple[float, int]:
        """Seconds, and new tokens."""
        start = time.process_time()
        rows = common.sample(model, prompts, copies, new, engine=engine, stops=stops)
        return time.process_time() - start, sum(len(ids) for ids, _ in rows)

    names = args.engines.split(",")
    turns = common.take_turns({name: lambda name=name: timed(name) for name in names}, args.rounds)
    steps = statistics.median(tokens for _, tokens in turns[names[0]]) / (args.prompts * copies)
    head = 1 + SHAPE.hidden * SHAPE.vocab / common.matrices(SHAPE)  # a decode step over that of its layers
    floor = linear_seconds(args.prompts * prompt) + linear_seconds(args.prompts * copies) * head * steps
    for name, values in turns.items():
        print(f"  {name:20} {statistics.median(seconds for seconds, _ in values):7.2f} s median")
    ratios = [theirs / ours for (ours, _), (theirs, _) in zip(turns[names[0]], turns[names[-1]])]
    common.print_result("rollout_engines", **common.spread(ratios), floor_s=floor, **vars(args))


if __name__ == "__main__":
    main()
