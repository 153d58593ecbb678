"""Replies to imitate, from any model: samples, keeps those with full reward, writes them for Reason-SFT.

    python data.py distill --model TEACHER --data train.jsonl --samples 4 --out runs/traces.jsonl
    python sft.py --data runs/traces.jsonl --test_data test.jsonl --run_dir runs/reason_sft

Prompts, sampling and reward are grpo.py's, and so are all other settings (`--config FILE`, `--key value`).
With the same data, seed and test_share, no held-out case is in the file. OUT.tried remembers every prompt:
the same command goes on after a kill. Several processes take a part each (data_from, data_to).
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from config import Config, ConfigError, check_positions, load_config, printable
from corpus.examples import Example, Tokenized, hashes_of
from corpus.layouts import write_examples
from corpus.sources import DataError, append_jsonl, read_jsonl, write_atomic
from distributed.batches import prompt_seed
from distributed.weights import load_model, model_config
from evals.predict import describe_author, in_batches
from kernel.decode import Prompt
from model import check_vocabulary, load_tokenizer
from prompts import check_tokenizer, load_template
from reward import REWARDS, RewardFunction, reward_function
from rollout import Decoding, sample_groups, score_groups

ROW = {"key", "traces", "right", "truncated", "reasons"}  # keys of the journal's rows that are read again
# Settings that decide a sample or its verdict: rows made with others are not mixed.
FIXED_KEYS = "temperature seed reward lenient max_prompt_tokens max_response_tokens rollout_engine".split()


def example_key(example: Example) -> str:
    """Tells examples apart by prompt and answer, whatever the file and id they stand under."""
    return b"".join(hashes_of(example)).hex()


def read_journal(path: Path, author: dict) -> dict[str, dict]:
    """The rows of OUT.tried by example_key; the first row is `author`, what the others are made with.

    A line that a kill cut off is removed, so that appending is safe. Raises ConfigError for another author.
    """
    rows = read_jsonl(path)
    untried = len(rows) == 1 and rows[0].keys() == author.keys()
    if untried or not (path.exists() and path.stat().st_size):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(author) + "\n")
        return {}
    first = rows[0] if rows else {}
    if changed := [key for key in author if first.get(key) != author[key]]:
        raise ConfigError(f"{path} was made with another {', another '.join(changed)}; give another --out")
    for row in rows[1:]:
        if lost := sorted(ROW - row.keys()):
            what = f"the row of id {row.get('id')!r} lacks {', '.join(lost)}"
            raise DataError(f"{path}: {what}; delete that line")
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return {row["key"]: row for row in rows[1:]}


def try_prompts(
    items: Sequence[Tokenized], tokenizer, reward: RewardFunction, config: Config, samples: int, journal: Path
) -> None:
    """Samples `samples` replies of each prompt, by seed and example alone; appends a row for each prompt.

    Rows: key, id, traces (replies with full reward, each once), right (their number), truncated, reasons.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(config.model, device, engine=config.rollout_engine)
    check_positions(config, model.config)
    full = REWARDS[config.reward].right if config.reward in REWARDS else 1.0  # a reward of one's own: 1
    decoding = replace(Decoding.training(config), group_size=samples)
    items = sorted(items, key=lambda item: len(item.ids))  # prompts of similar length share a batch
    size = max(1, config.rollout_batch_size // samples)
    for batch in in_batches(items, size, "distill"):
        keys = [example_key(item.example) for item in batch]
        seeds = [prompt_seed(config.seed, 0, int(key[:16], 16)) for key in keys]
        prompts = [Prompt(item.example.id, item.ids, seed) for item, seed in zip(batch, seeds)]
        groups = sample_groups(model, tokenizer, prompts, decoding, progress=True)
        rows = []
        for key, group in zip(keys, score_groups(groups, batch, range(len(batch)), reward)):
            right = [text for text, one in zip(group.texts, group.rewards) if one.total >= full]
            rows.append({
                "key": key, "id": group.prompt.id, "traces": list(dict.fromkeys(right)), "right": len(right),
                "truncated": sum(group.truncated),
                "reasons": Counter(one.reason for one in group.rewards if one.total < full),
            })
        append_jsonl(journal, rows)


def with_traces(examples: Sequence[Example], tried: dict[str, dict], keep: int) -> list[Example]:
    """The examples that have a right reply, with at most `keep` different ones as demonstrations."""
    traces = [tuple(tried[example_key(example)]["traces"][:keep]) for example in examples]
    return [replace(example, demonstrations=texts) for example, texts in zip(examples, traces) if texts]


def report(rows: Sequence[dict], written: Sequence[Example], samples: int) -> str:
    """How many of these rows' prompts are solved, the pass rate, and why samples failed, by count."""
    right = sum(row["right"] for row in rows)
    total = samples * len(rows)
    reasons = sum((Counter(row["reasons"]) for row in rows), Counter())
    traces = sum(len(example.demonstrations) for example in written)
    solved = f"{len(written)} of {len(rows)} prompts have a right reply ({len(written) / len(rows):.1%})"
    lines = [f"{solved}; {traces} traces kept", f"{right} of {total} samples are right ({right / total:.1%})"]
    lines += [f"  {count:>9} {count / total:7.1%}  {reason}" for reason, count in reasons.most_common()]
    if cut := sum(row["truncated"] for row in rows):
        lines.append(f"{cut} samples were cut off at max_response_tokens")
    return "\n".join(lines)


def read_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(the command's own options, the settings)."""
    parser = argparse.ArgumentParser(
        prog="python data.py distill", description=__doc__.splitlines()[0], allow_abbrev=False,
        epilog="All other options are settings of grpo.py; python grpo.py --help lists them.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("traces.jsonl"), help="the file to write (default: %(default)s)")
    add("--samples", type=int, default=4, help="replies tried per prompt (default: %(default)s)")
    add("--keep", type=int, default=1, help="different right ones kept of each (default: %(default)s)")
    return parser.parse_known_args(arguments)


def main(arguments: list[str], load_splits: Callable, tokenize_splits: Callable) -> None:
    """Tries what is not tried yet, then writes the file. The functions are data.py's. Raises UserError."""
    options, settings = read_options(arguments)
    config = load_config(settings)
    out, journal = options.out, Path(f"{options.out}.tried")
    if config.model == "tiny":
        raise ConfigError("model: tiny is not trained yet; give the folder or hub id of a trained model")
    if config.reward == "none":
        raise ConfigError("reward: none pays every reply the same, so nothing can be chosen; take binary")
    if out.exists() and not journal.exists():
        raise ConfigError(f"out: {out} exists, and was not written by distill; give another name")
    reward = reward_function(config.reward, config.lenient)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code, config.chat_template_kwargs)
    template = load_template(config.prompt_template, tokenizer)
    check_tokenizer(tokenizer, template)
    check_vocabulary(tokenizer, model_config(config.model))
    author = describe_author(config.model, template + config.chat_template_kwargs)
    author |= {"samples": options.samples}
    author |= {key: getattr(config, key) for key in FIXED_KEYS}
    tried = read_journal(journal, author)
    train = replace(load_splits(config), held_out={})
    items = tokenize_splits(train, tokenizer, template, config).train
    missing = [item for item in items if example_key(item.example) not in tried]
    try:
        if missing:
            try_prompts(missing, tokenizer, reward, config, options.samples, journal)
    finally:  # also after Ctrl-C: what is there can be used
        tried = read_journal(journal, author)
        examples = [item.example for item in items if example_key(item.example) in tried]
        written = with_traces(examples, tried, options.keep)
        if examples:
            rows = [tried[example_key(example)] for example in examples]
            print(printable(report(rows, written, options.samples)))
        if len(examples) < len(items):
            print(f"{len(items) - len(examples)} prompts are not tried yet: the same command goes on")
        if written:
            write_examples(out, written)
            print(f"written: {out}")
    if not written:
        raise DataError(f"no reply of {config.model} got full reward, so {out} is not written")
