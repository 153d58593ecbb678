"""One whole GRPO step against TRL's GRPOTrainer with its transformers rollout; the two take turns.

    pip install -r bench/requirements.txt
    python bench/step_vs_trl.py [--case 512/64/8] [--prompts 8] [--rounds 5] [--trl_batch N]
      [--continuous_batching] [--device cuda]

--case P/R/G: P prompt tokens, exactly R new tokens, G completions per prompt. Both sides: the same Qwen2 of
about 4 million random parameters, fp32, one thread, no gradient checkpointing, AdamW, KL to a frozen
reference, one update per batch, entropy measured, the same cheap reward. Process time of a rollout, rewards,
reference log-probs and the update. TRL shuffles its prompts, and masks the end token so that no completion
ends early. Each side may work on smaller batches inside a step: ours takes --micro_batch tokens, TRL
--trl_batch completions (0: all at once) with as much accumulation as makes it the same update.
--continuous_batching: TRL's other rollout. Floor: a step's FLOPs with every prompt computed once, attention
included, at this machine's rate for a large matrix product.
--device cuda: a random Qwen2.5-1.5B, and wall time. Ours is as grpo.py trains, fp32 weights and bf16
computation; TRL's weights are bf16, which is its fastest. No floor.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import common
import torch
from common import CPU, Shape
from gpu_measure import SHAPES
from timing import options
from transformers import Qwen2ForCausalLM, TrainerCallback
from transformers.utils import logging

from config import Config
from corpus.tiny_model import build_tiny_tokenizer
from distributed.fsdp import load_policy
from distributed.ranks import Clock, start_ranks
from distributed.weights import load_model
from kernel.hf_engines import cpu_pages

SHAPE = Shape(hidden=256, inner=1024, layers=4, heads=4, kv_heads=2, vocab=2048)
KL, LEARNING_RATE = 1e-3, 1e-6


def reward(ids: list[int]) -> float:
    """Cheap, and different inside a group, so that there is something to learn on both sides."""
    return sum(ids) % 7 / 7


def now() -> float:
    """Processor seconds; where CUDA is at work wall seconds, once it has done everything."""
    if not torch.cuda.is_initialized():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class StepTimer(TrainerCallback):
    """Seconds of the trainer's last step."""

    def on_step_begin(self, *args, **kwargs) -> None:
        self.start = now()

    def on_step_end(self, *args, **kwargs) -> None:
        self.seconds = now() - self.start


def make_peer(folder: Path, texts: list[str], new: int, copies: int, args: Namespace):
    """TRL's trainer; each call of train() is two steps, the first of which pays for what is made once."""
    import pyarrow
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = len(texts) * copies
    batch, cuda = args.trl_batch or rows, args.device == "cuda"
    pages = {} if cuda else cpu_pages([len(texts[0]) + new] * rows)
    # Continuous batching knows no least length, but any end token, and would take most of the memory for its
    # pages.
    never = {"eos_token_id": 2**20} if args.continuous_batching else {"min_new_tokens": new}
    config = GRPOConfig(
        output_dir=str(folder / "trl"), max_steps=2, per_device_train_batch_size=batch,
        gradient_accumulation_steps=rows // batch, steps_per_generation=rows // batch, num_generations=copies,
        max_completion_length=new, temperature=common.TEMPERATURE, top_k=0, top_p=1.0,
        generation_kwargs=never, beta=KL, learning_rate=LEARNING_RATE, loss_type="grpo", bf16=cuda,
        use_cpu=not cuda, lr_scheduler_type="constant", gradient_checkpointing=False, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True,
        model_init_kwargs={"dtype": "bfloat16" if cuda else "float32"},
        use_transformers_continuous_batching=args.continuous_batching,
        transformers_continuous_batching_config=pages, max_grad_norm=1.0,
        log_completions=False,
    )
    return GRPOTrainer(
        model=str(folder), args=config,
        reward_funcs=lambda completion_ids, **_: [reward(ids) for ids in completion_ids],
        # A name, or datasets would hash the table, which fails with some versions of pyarrow.
        train_dataset=Dataset(pyarrow.table({"prompt": texts}), fingerprint="prompts"),
    )


def main() -> None:
    args = options(
        __doc__, case="512/64/8", prompts=8, rounds=5, micro_batch=2048, trl_batch=0,
        continuous_batching=False, device="cpu",
    )
    shape = SHAPES["1.5B"] if args.device == "cuda" else SHAPE
    prompt, new, copies = map(int, args.case.split("/"))
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    rng = random.Random(0)
    texts = ["".join(rng.choices("0123456789", k=prompt)) for _ in range(args.prompts)]
    config = Config(
        prompts_per_step=args.prompts, minibatch_prompts=args.prompts, group_size=copies, kl_coef=KL,
        temperature=common.TEMPERATURE, max_response_tokens=new, gradient_checkpointing=False,
        max_tokens_per_micro_batch=args.micro_batch,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A tokenizer for which every digit is one token.
        tokenizer = build_tiny_tokenizer(["".join(rng.choices("abcdefghij ", k=4000))], SHAPE.vocab)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        with torch.device(args.device):
            sizes = common.qwen_config(shape, tokenizer.eos_token_id, tokenizer.pad_token_id)
            model = Qwen2ForCausalLM(sizes)
        (model.bfloat16() if args.device == "cuda" else model).save_pretrained(folder)
        del model
        trainer, timer = make_peer(folder, texts, new, copies, args), StepTimer()
        trainer.add_callback(timer)
        ranks = start_ranks()  # not earlier, or TRL would wrap its model for many processes
        if args.device == "cuda":
            policy = load_policy(config, str(folder), config.temperature, ranks)
            reference = load_policy(config, str(folder), config.temperature, ranks, policy)
        else:
            policy, reference = load_model(str(folder), CPU).train(), load_model(str(folder), CPU).eval()
        optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        assert all(len(ids) == prompt for ids in prompts)
        step = common.Step(policy, reference, optimizer, prompts, config, ranks)

        def ours() -> float:
            start = now()
            common.grpo_step(step, reward, Clock())
            return now() - start

        def theirs() -> float:
            trainer.train()
            return timer.seconds

        turns = common.take_turns({"ours": ours, "trl": theirs}, args.rounds)
    # Rollout and reference forward only, the update 3 times that.
    flops = args.prompts * common.group_flops(SHAPE, (prompt, new, copies), linear=5, attention=5.5)
    median = {f"{name}_s": statistics.median(seconds) for name, seconds in turns.items()}
    ratios = [trl / ours for ours, trl in zip(turns["ours"], turns["trl"])]
    floor = {"floor_s": flops / common.matrix_rate(2048, 1024, 1024)} if args.device == "cpu" else {}
    common.print_result("step_vs_trl", **common.spread(ratios), **median, **vars(args), **floor)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
