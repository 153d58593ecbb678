"""One whole GRPO step against TRL's GRPOTrainer with its transformers rollout; the two take turns.

    pip install -r bench/requirements.txt
    python bench/step_vs_trl.py [--case 512/64/8] [--prompts 8] [--rounds 5] [--trl_batch N]
      [--continuous_batching]

--case P/R/G: P prompt tokens, exactly R new tokens, G completions per prompt. Both sides: the same Qwen2 of
about 4 million random parameters, fp32, one thread, no gradient checkpointing, AdamW, KL to a frozen
reference, one update per batch, entropy measured, the same cheap reward. Process time, so that other work on
the machine counts less; a step is a rollout, rewards, reference log-probs, and the update, with each side's
own logging. What differs: TRL shuffles its prompts; it masks the end token so that no completion ends early,
where ours has no end token to meet. Each side may work on smaller batches inside a step, which a CPU's caches
like: ours takes --micro_batch tokens, TRL --trl_batch completions (0: all at once) with as much gradient
accumulation as makes it the same update. --continuous_batching: TRL's other rollout, with pages for all of
its rows. Floor: the FLOPs that a step needs with every prompt computed once, attention included, at this
machine's rate for a large matrix product. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback  # noqa: E402
from transformers.utils import logging  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_step import matrix_rate  # noqa: E402

import grpo  # noqa: E402
from config import Config
from corpus.tiny_model import build_tiny_tokenizer
from distributed.batches import Group, make_minibatches
from distributed.ranks import start_ranks
from kernel.decode import Prompt
from kernel.hf_engines import cpu_pages
from losses import group_std
from model import load_model
from rollout import ENGINES

KL, TEMPERATURE, LEARNING_RATE = 1e-3, 1.0, 1e-6


def build(folder: Path) -> None:
    """A random Qwen2 of about 4 million parameters and a tokenizer for which every digit is one token."""
    torch.manual_seed(0)
    tokenizer = build_tiny_tokenizer(["".join(random.Random(0).choices("abcdefghij ", k=4000))], 2048)
    config = Qwen2Config(
        vocab_size=2048, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def reward(ids: list[int]) -> float:
    """Cheap, and different inside a group, so that there is something to learn on both sides."""
    return sum(ids) % 7 / 7


class Peer:
    """TRL's trainer, made once; each call of `steps` times that many of its steps."""

    def __init__(
        self, folder: Path, texts: list[str], new_tokens: int, copies: int, batch: int, continuous: bool
    ) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        self.seconds: list[float] = []
        rows = len(texts) * copies
        batch, never = batch or rows, {"min_new_tokens": new_tokens}
        if (
            continuous
        ):  # knows no least length, but any end token; and would take most of a CPU's memory for its pages
            never = {"eos_token_id": 2**20}
        self.trainer = GRPOTrainer(
            model=str(folder),
            reward_funcs=lambda completion_ids, **_: [reward(ids) for ids in completion_ids],
            train_dataset=Dataset.from_dict({"prompt": texts}),
            args=GRPOConfig(
                output_dir=str(folder / "trl"), max_steps=2, per_device_train_batch_size=batch,
                gradient_accumulation_steps=rows // batch, steps_per_generation=rows // batch,
                num_generations=copies, max_completion_length=new_tokens, temperature=TEMPERATURE, top_k=0, top_p=1.0,
                generation_kwargs=never, beta=KL, learning_rate=LEARNING_RATE, loss_type="grpo",
                lr_scheduler_type="constant", bf16=False, gradient_checkpointing=False, use_cpu=True, report_to=[],
                save_strategy="no", logging_steps=1, disable_tqdm=True, model_init_kwargs={"dtype": "float32"},
                use_transformers_continuous_batching=continuous,
                transformers_continuous_batching_config=cpu_pages([len(texts[0]) + new_tokens] * rows),
                max_grad_norm=1.0, log_completions=False,
            ),
        )
        peer = self

        class Timer(TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                self.start = time.process_time()

            def on_step_end(self, *args, **kwargs):
                peer.seconds.append(time.process_time() - self.start)

        self.trainer.add_callback(Timer())

    def steps(self) -> float:
        """Seconds of the second of two steps: the first pays for what is made once."""
        self.seconds.clear()
        self.trainer.train()
        return self.seconds[-1]


def our_step(policy, reference, optimizer, tokenizer, prompts: list[Prompt], config: Config, ranks) -> float:
    """Seconds of one step by the functions that grpo.train calls."""
    start = time.process_time()
    policy.eval()
    rows = ENGINES["shared_prefix"](
        policy, prompts, config.group_size, TEMPERATURE, config.max_response_tokens, [len(tokenizer)]
    )
    policy.set_attn_implementation("shared_prefix")
    policy.train()
    groups = []
    for i, prompt in enumerate(prompts):
        own = rows[i * config.group_size : (i + 1) * config.group_size]
        texts = [tokenizer.decode(ids) for ids, _ in own]
        groups.append(Group(prompt, [ids for ids, _ in own], [lp for _, lp in own], texts, [True] * len(own)))
    advantages = group_std(torch.tensor([[reward(ids) for ids in g.responses] for g in groups]))
    minibatches = make_minibatches(groups, advantages, config, ranks)
    grpo.fixed_logprobs(policy, reference, minibatches, config)
    grpo.update_policy(policy, optimizer, minibatches, config, ranks)
    return time.process_time() - start


def step_flops(model, prompt: int, new: int, copies: int, prompts: int) -> float:
    """FLOPs of a step's matrix products: rollout and reference forward only, the update 3 times that; 2 per
    multiply-add.

    The LM head is counted for response tokens, what the last layer does after its keys and values not for
    prompts, attention for the pairs that are not masked; its backward has 5 products where the forward has 2,
    because the scores are computed again.
    """
    config, weights = model.config, sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    own, replies = prompt * (prompt + 1) / 2, copies * (new * prompt + new * (new + 1) / 2)
    pairs = own * (config.num_hidden_layers - 1) + prompt + replies * config.num_hidden_layers
    linear = 2 * ((prompt + copies * new) * weights + copies * new * config.hidden_size * config.vocab_size)
    linear -= (
        2
        * (prompt - 1 + copies)
        * (config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size)
    )
    attention = 2 * 2 * pairs * config.hidden_size
    return prompts * (linear * (1 + 1 + 3) + attention * (1 + 1 + 3.5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case", default="512/64/8", help="prompt tokens / new tokens / completions per prompt"
    )
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro_batch", type=int, default=2048, help="tokens of our micro-batches")
    parser.add_argument(
        "--trl_batch", type=int, default=0, help="completions of TRL's micro-batches; 0: all of a step"
    )
    parser.add_argument("--continuous_batching", action="store_true", help="TRL's other transformers rollout")
    args = parser.parse_args()
    prompt_tokens, new_tokens, copies = map(int, args.case.split("/"))
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    rng = random.Random(0)
    texts = ["".join(rng.choices("0123456789", k=prompt_tokens)) for _ in range(args.prompts)]
    config = Config(
        prompts_per_step=args.prompts, minibatch_prompts=args.prompts, group_size=copies, temperature=TEMPERATURE,
        kl_coef=KL, max_response_tokens=new_tokens, gradient_checkpointing=False,
        max_tokens_per_micro_batch=args.micro_batch,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder)
        peer = Peer(folder, texts, new_tokens, copies, args.trl_batch, args.continuous_batching)
        ranks, device = start_ranks(60.0, 1), torch.device("cpu")
        policy, reference = load_model(str(folder), device).train(), load_model(str(folder), device).eval()
        tokenizer = peer.trainer.processing_class
        prompts = [
            Prompt(str(i), tokenizer.encode(text, add_special_tokens=False), i)
            for i, text in enumerate(texts)
        ]
        assert all(len(p.ids) == prompt_tokens for p in prompts)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        our_step(policy, reference, optimizer, tokenizer, prompts, config, ranks)
        ours, theirs, rates = [], [], []
        for _ in range(args.rounds):
            theirs.append(peer.steps())
            ours.append(our_step(policy, reference, optimizer, tokenizer, prompts, config, ranks))
            rates.append(matrix_rate(2048, 1024, 1024))
    parameters = sum(p.numel() for p in policy.parameters())
    floor = step_flops(policy, prompt_tokens, new_tokens, copies, args.prompts) / max(rates)
    ratios = sorted(b / a for a, b in zip(ours, theirs))
    import trl

    print(
        f"{platform.machine()}, torch {torch.__version__}, TRL {trl.__version__}, {time.strftime('%Y-%m-%d')}, one thread"
    )
    print(f"{parameters / 1e6:.1f}M parameters, {args.prompts} prompts, case {args.case}, fp32")
    print(f"  ours  {min(ours):7.2f} s best {statistics.median(ours):7.2f} s median")
    print(f"  TRL   {min(theirs):7.2f} s best {statistics.median(theirs):7.2f} s median")
    print(f"  floor {floor:7.2f} s: FLOPs of a step, every prompt once, at {max(rates) / 1e9:.0f} GFLOP/s")
    print(json.dumps({
        "bench": "step_vs_trl", "case": args.case, "prompts": args.prompts, "rounds": args.rounds,
        "micro_batch": args.micro_batch, "trl_batch": args.trl_batch, "continuous_batching": args.continuous_batching,
        "ours_s": round(statistics.median(ours), 2), "trl_s": round(statistics.median(theirs), 2),
        "ratio_min": round(ratios[0], 2),
        "ratio_median": round(statistics.median(ratios), 2), "ratio_max": round(ratios[-1], 2), "floor_s": round(floor, 2),
    }))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
