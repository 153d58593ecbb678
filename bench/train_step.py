"""Forward + backward of a training step: groups packed with a shared prompt against a row per prompt +
response.

    python bench/train_step.py [--case 1000/150/5] [--groups 1] [--repetitions 7]

--case P/R/G: prompt and response tokens, responses per prompt. A random Qwen2 of about 4M parameters, fp32,
one thread. Both sides pack the same tokens, run the same token_logprobs (temperature 0.7, no entropy) and the
backward; they take turns in one process, and every repetition gives one ratio of CPU times. The floor is the
packed step's FLOPs at the rate that this machine reached in matrix products of the model's own shapes,
measured in between.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernel.attention import use_attention
from kernel.packing import pack
from model import count_parameters, prepare_model, token_logprobs

CPU = torch.device("cpu")
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCAB = 256, 896, 4, 4, 2, 2048


def build_model(seed: int) -> nn.Module:
    """The measured model: random weights, 4 heads over 2 key/value heads, tied embeddings."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=True,
        max_position_embeddings=32768,
    )
    return prepare_model(Qwen2ForCausalLM(config), CPU).train()


def step(model: nn.Module, groups: list, shared: bool) -> tuple[float, float, float]:
    """CPU seconds of the forward (packing included) and of the backward, and the loss."""
    use_attention(model, "train" if shared else "generate")
    model.zero_grad(set_to_none=True)
    start = time.process_time()
    logprobs, _ = token_logprobs(model, pack(groups, CPU, shared), 0.7, entropy=False)
    loss = -logprobs.mean()
    middle = time.process_time()
    loss.backward()
    return middle - start, time.process_time() - middle, loss.item()


def step_flops(prompt: int, response: int, copies: int, groups: int) -> float:
    """FLOPs of the packed forward + backward: matrix products only, 2 per multiply and add."""
    tokens = prompt + copies * response
    head_dim = HIDDEN // HEADS
    layer = HIDDEN * head_dim * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * INNER
    own, replies = prompt * (prompt + 1) / 2, copies * (response * prompt + response * (response + 1) / 2)
    pairs = own * (LAYERS - 1) + prompt + replies * LAYERS  # in the last layer a prompt's last token only
    # attention: 2 products forward; 5 backward, where the scores are computed again
    attention = 7 * 2 * pairs * HEADS * head_dim
    unused = (prompt - 1 + copies) * (
        HIDDEN * HEADS * head_dim + 3 * HIDDEN * INNER
    )  # packing.trim_last_layer
    return groups * (
        6 * (tokens * layer * LAYERS - unused) + attention + 6 * copies * response * HIDDEN * VOCAB
    )


def matrix_rate(rows: int, inner: int, columns: int) -> float:
    """FLOP/s of [rows, inner] @ [inner, columns] on one thread, best of 20."""
    a, b, best = torch.randn(rows, inner), torch.randn(inner, columns), float("inf")
    for _ in range(20):
        start = time.process_time()
        a @ b
        best = min(best, time.process_time() - start)
    return 2 * rows * inner * columns / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case", default="1000/150/5", help="prompt tokens / response tokens / responses per prompt"
    )
    parser.add_argument("--groups", type=int, default=1, help="prompts per step")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prompt, response, copies = map(int, args.case.split("/"))
    torch.set_num_threads(1)
    model, generator = build_model(args.seed), torch.Generator().manual_seed(args.seed)
    draw = lambda size: torch.randint(VOCAB, (size,), generator=generator).tolist()  # noqa: E731
    groups = [(draw(prompt), [draw(response) for _ in range(copies)]) for _ in range(args.groups)]
    for shared in (True, False):  # warm up
        step(model, groups, shared)
    rows, rates = [], []
    for i in range(args.repetitions):
        sides = (True, False) if i % 2 else (False, True)
        one = {shared: step(model, groups, shared) for shared in sides}
        assert abs(one[True][2] - one[False][2]) < 1e-4, "both sides must have the same loss"
        rates.append(matrix_rate(prompt + copies * response, HIDDEN, INNER))
        rows.append((one[True], one[False]))
    floor = step_flops(prompt, response, copies, args.groups) / max(rates)
    median = statistics.median
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {count_parameters(model):,} parameters"
    )
    print(f"case {args.case}, {args.groups} prompt(s), {args.repetitions} repetitions, CPU seconds (median)")
    print(f"{'':22}{'forward':>10}{'backward':>10}{'both':>10}")
    for name, side in (("shared prompt, packed", 0), ("a row per response", 1)):
        forward, backward = (median(row[side][k] for row in rows) for k in (0, 1))
        print(f"{name:22}{forward:10.3f}{backward:10.3f}{median(sum(row[side][:2]) for row in rows):10.3f}")
    print(f"floor of the packed step {floor:.3f} s at {max(rates) / 1e9:.1f} GFLOP/s in matrix products")
    ratios = sorted(sum(row[1][:2]) / sum(row[0][:2]) for row in rows)
    forward = sorted(row[1][0] / row[0][0] for row in rows)
    tokens = copies * (prompt + response) / (prompt + copies * response)
    print(f"ratio: {ratios[0]:.2f} / {median(ratios):.2f} / {ratios[-1]:.2f} (min / median / max), forward alone "
          f"{median(forward):.2f}, tokens {tokens:.2f}")
    result = {
        "bench": "train_step",
        "ratio_min": ratios[0],
        "ratio_median": median(ratios),
        "ratio_max": ratios[-1],
    }
    result |= {"forward_ratio_median": median(forward), "token_ratio": tokens}
    result |= {
        "packed_s": median(sum(row[0][:2]) for row in rows),
        "floor_s": floor,
        "gflops": max(rates) / 1e9,
    }
    result |= {"case": args.case, "groups": args.groups, "repetitions": args.repetitions, "seed": args.seed}
    result |= {
        "parameters": count_parameters(model),
        "dtype": "float32",
        "threads": 1,
        "torch": torch.__version__,
    }
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    main()
