"""The commands of real_model.py that the product does not have: what is learnt from and held out, and the
replies to examples with their rewards.
"""

from __future__ import annotations

import json
import random
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from config import UserError
from corpus.examples import example_kind, queries_of, unseen
from corpus.layouts import load_examples, write_examples
from corpus.sources import write_atomic
from evals import predict
from evals.report import Case, Script, read_predictions, run, write_rows
from prompts import END_THINK, THINK
from reward import score

SCRIPT = "bench/real_model.py"
PASS_PROMPTS, MOST_HELD_OUT = 64, 500
SENTENCE_END = re.compile(r"(?<!\d)\.(?=\s)|[!?](?=\s)|\n")  # not the point of "1. "


def cut_thought(reply: str, limit: int, count: Callable[[str], int]) -> str | None:
    """The reply, its thought cut behind the last sentence that ends within `limit` tokens (0: whole).

    count: text -> its tokens. None where no sentence fits; a reply without a thought stays.
    """
    before, opened, rest = reply.partition(THINK)
    thought, closed, after = rest.partition(END_THINK)
    if not limit or not closed or count(thought) <= limit:
        return reply
    starts = [thought[: end.end()].rstrip() for end in SENTENCE_END.finditer(thought)]
    fitting = [start for start in starts if start.strip() and count(start) <= limit]
    return before + opened + fitting[-1] + closed + after if fitting else None


def select(words: Sequence[str]) -> None:
    """`select FOLDER TOKENIZER THOUGHT_TOKENS SEED`: what is learnt from (demonstrated.jsonl), a few of these
    (pass8.jsonl), what is held out (held_out.jsonl), and sizes.json.
    """
    from model import load_tokenizer  # imports torch

    folder, tokenizer, limit, seed = Path(words[0]), load_tokenizer(words[1]), int(words[2]), words[3]

    def count(text: str) -> int:
        """Its tokens."""
        return len(tokenizer.encode(text, add_special_tokens=False))

    test = folder / "test.jsonl"
    clean, _ = load_examples(folder / "clean.jsonl")
    told = [example for example in clean if example.demonstrations]
    held_out = load_examples(test)[0] if test.exists() else []
    held_out += unseen([example for example in clean if not example.demonstrations], told)
    asked = set(map(queries_of, told))
    held_out = [example for example in held_out if queries_of(example) not in asked]
    held_out = random.Random(f"{seed}/held_out").sample(held_out, min(MOST_HELD_OUT, len(held_out)))
    train, counts = [], Counter()
    counts["shared with a benchmark"] = len(load_examples(folder / "train.jsonl")[0]) - len(clean)
    for example in told:
        cut = [cut_thought(text, limit, count) for text in example.demonstrations]
        kept = tuple(filter(None, cut))
        counts["demonstrations left out"] += len(cut) - len(kept)
        counts["demonstrations cut"] += sum(text not in example.demonstrations for text in kept)
        counts["demonstrations"] += len(kept)
        rewards = [score(text, example.answer).total for text in kept]
        counts["demonstrations with reward 1"] += rewards.count(1)
        train += [replace(example, demonstrations=kept)] if kept else []
    if not train or not held_out:
        what = "no example with a demonstration" if held_out else "no held-out example"
        raise UserError(f"{folder}: {what} is left; give more --data, or a larger --thought_tokens")
    few = random.Random(f"{seed}/pass8").sample(train, min(PASS_PROMPTS, len(train)))
    chosen = {"demonstrated": train, "pass8": few, "held_out": held_out}  # the last one says: all is done
    sizes = dict(counts)
    for name, examples in chosen.items():
        kinds, sources = Counter(map(example_kind, examples)), Counter(one.source for one in examples)
        sizes[name] = {"examples": len(examples), **kinds, **sources}
    print(json.dumps(sizes, indent=1))
    write_atomic(folder / "sizes.json", json.dumps(sizes, indent=1) + "\n")
    for name, examples in chosen.items():
        write_examples(folder / f"{name}.jsonl", examples)


def generate(args: Namespace) -> None:
    """`generate --data EXAMPLES --model M --out FOLDER …`: replies to examples, as eval_bfcl.py has them."""
    cases = [Case(one.id, example_kind(one), one.messages, one.tools) for one in load_examples(args.data)[0]]
    predict.generate(args, cases, f"{Path(args.data).stem} of {SCRIPT}")


def judge(args: Namespace) -> None:
    """`score --data EXAMPLES --predictions FILE --out FOLDER`: the binary reward of every reply."""
    answers = {example.id: example.answer for example in load_examples(args.data)[0]}
    verdicts = []
    for row in read_predictions(args.predictions, f"{Path(args.data).stem} of {SCRIPT}"):
        reward = score(row["output"], answers[row["id"]])
        verdicts.append(row | vars(reward) | {"right": reward.total == 1})
    write_rows(args.out / "verdicts.jsonl", verdicts)


def evaluate(arguments: Sequence[str]) -> int:
    """`generate …` or `score …`; returns the exit code."""
    own = Script("real_model", "examples", 4096, generate, {}, judge, {}, "right", str)
    return run(own, arguments)
