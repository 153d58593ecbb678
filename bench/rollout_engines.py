"""Rollout engines against Hugging Face's generate(num_return_sequences=G), interleaved in one process.

    python bench/rollout.py [--case 512/64/8] [--prompts 4] [--tails] [--engines shared_prefix,generate]
      [--rounds 5]

--case P/R/G: prompts of P tokens (give or take a quarter), R new tokens at most, G samples each. Random
weights, about 27 million parameters, one thread, fp32. Without --tails every response has exactly R tokens;
with it lengths are geometric with mean 13, by declaring one token in thirteen a stop token. Process time, so
that other work on the machine counts less. The floor is the time of the matrix products of one prefill per
prompt and of one decode step per token, at the rates that this machine reaches for them. Ends with one line
of JSON.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernel.decode import Prompt
from model import prepare_model
from rollout import ENGINES

VOCABULARY, HIDDEN, MLP, LAYERS, HEADS, KV_HEADS = 8192, 512, 1408, 8, 8, 2


def build() -> torch.nn.Module:
    """A random Qwen2 of 27 million parameters; its logits are nearly uniform, so any token may come."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=32768, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )
    return prepare_model(Qwen2ForCausalLM(config), torch.device("cpu")).eval()


def linear_seconds(model: torch.nn.Module, rows: int) -> float:
    """Measured seconds of the model's matrix products for `rows` tokens, without attention and everything
    else.
    """
    sizes = [
        (HIDDEN, HIDDEN),
        (HIDDEN, 2 * HIDDEN * KV_HEADS // HEADS),
        (HIDDEN, HIDDEN),
        (HIDDEN, 2 * MLP),
        (MLP, HIDDEN),
    ]
    weights = [[torch.randn(n, m) for m, n in sizes] for _ in range(LAYERS)]
    x = {m: torch.randn(rows, m) for m, _ in sizes}
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        for layer in weights:
            for (m, _), weight in zip(sizes, layer):
                torch.nn.functional.linear(x[m], weight)
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="512/64/8", help="prompt tokens / new tokens / samples per prompt")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tails", action="store_true", help="lengths with mean 13 instead of exactly R")
    parser.add_argument(
        "--engines", default="shared_prefix,generate", help="the first is compared with the last"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    prompt_tokens, new_tokens, copies = map(int, args.case.split("/"))
    torch.set_num_threads(1)
    model, rng = build(), random.Random(0)
    stops = (
        rng.sample(range(VOCABULARY), VOCABULARY // 13) if args.tails else [VOCABULARY]
    )  # the latter never comes
    names, seconds, tokens = args.engines.split(","), {}, {}
    for round_ in range(-1, args.rounds):  # the first one only warms up
        lengths = [rng.randint(prompt_tokens * 3 // 4, prompt_tokens * 5 // 4) for _ in range(args.prompts)]
        prompts = [
            Prompt(str(i), rng.choices(range(VOCABULARY), k=n), rng.getrandbits(60))
            for i, n in enumerate(lengths)
        ]
        for name in names:
            start = time.process_time()
            rows = ENGINES[name](model, prompts, copies, 0.7, new_tokens, stops)
            if round_ >= 0:
                seconds.setdefault(name, []).append(time.process_time() - start)
                tokens.setdefault(name, []).append(sum(len(ids) for ids, _ in rows))
    rows = args.prompts * copies
    floor = linear_seconds(model, args.prompts * prompt_tokens)
    head = (
        2 * rows * HIDDEN * VOCABULARY / (2 * rows * HIDDEN * HIDDEN)
    )  # the LM head in units of one square matrix
    step = linear_seconds(model, rows) * (
        1 + head * HIDDEN**2 / sum(p.numel() for p in model.model.layers.parameters())
    )
    floor += step * statistics.median(tokens[names[0]]) / rows
    print(f"{platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, one thread, fp32")
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {args.prompts} prompts, case {args.case}"
    )
    for name in names:
        print(f"  {name:20} {min(seconds[name]):7.2f} s best {statistics.median(seconds[name]):7.2f} s median, "
              f"{statistics.median(tokens[name]):,.0f} tokens")
    print(f"  {'floor':20} {floor:7.2f} s: matrix products alone, the prompt once, no attention")
    ratios = sorted(b / a for a, b in zip(seconds[names[0]], seconds[names[-1]]))
    print(json.dumps({
        "bench": "rollout", "case": args.case, "tails": args.tails, "prompts": args.prompts, "engines": names,
        "rounds": args.rounds, "ratio_min": round(ratios[0], 2), "ratio_median": round(statistics.median(ratios), 2),
        "ratio_max": round(ratios[-1], 2), "floor_s": round(floor, 2),
    }))


if __name__ == "__main__":
    main()
