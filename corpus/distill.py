"""Replies with reasoning to imitate, from any model: samples, keeps what has full reward, writes the file for
Reason-SFT.

    python distill.py --model runs/teacher/model --data train.jsonl --samples 4 --out runs/traces.jsonl
    python sft.py --data runs/traces.jsonl --test_data test.jsonl --run_dir runs/reason_sft

Prompts, sampling and reward are grpo.py's: its settings are taken here, too (`--config FILE`, `--key value`).
Only its training examples are sampled, so with the same data, seed and test_share the held-out cases stay out
of the file. OUT.tried remembers every prompt, also those in vain: the same command goes on after a kill. One
process, with a GPU if there is one; for several, give each a part of the data (data_from, data_to) and a
file.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from config import ConfigError, check_positions, load_config
from corpus.examples import Example, Splits, Tokenized, hashes_of
from corpus.layouts import write_examples
from corpus.sources import DataError, append_jsonl, read_jsonl
from data import load_splits, tokenize_splits
from distributed.batches import prompt_seed
from distributed.ranks import run_script
from evals.predict import describe_author
from evals.report import positive
from kernel.decode import Prompt
from model import load_model, load_tokenizer
from prompts import check_tokenizer, load_template
from reward import REWARDS, RewardFunction, reward_function
from rollout import ENGINES, sample_groups

# Settings that decide a sample or its verdict: rows made with others are not mixed.
FIXED_KEYS = "temperature seed reward lenient max_prompt_tokens max_response_tokens rollout_engine".split()


def example_key(example: Example) -> str:
    """Tells examples apart by prompt and answer, whatever the file and id they stand under."""
    return b"".join(hashes_of(example)).hex()


def read_journal(path: Path, author: dict) -> dict[str, dict]:
    """The rows of OUT.tried by example_key. Its first row is `author`, what the others are made with; a new
    file gets it.

    A line that a kill cut off is removed, so that appending is safe. Raises ConfigError for another author.
    """
    rows = read_jsonl(path)
    if len(rows) < 2:  # nothing was tried, so nothing can be mixed
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        append_jsonl(path, [author])
        return {}
    if changed := [key for key in author if rows[0].get(key) != author[key]]:
        raise ConfigError(f"{path} was made with another {', another '.join(changed)}; give another --out")
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return {row["key"]: row for row in rows[1:]}


def try_prompts(
    items: Sequence[Tokenized], tokenizer, reward: RewardFunction, config, samples: int, journal: Path
) -> None:
    """Samples `samples` replies of each prompt, which depend on the seed and the example alone; appends a row
    for each.

    Rows: key, id, traces (different replies with full reward, as they came), right (how many samples had it),
    truncated, and reasons of the other samples with counts.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # In bf16 a teacher takes half the memory, and nothing is trained.
    model = load_model(config.model, device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    check_positions(config, model.config.max_position_embeddings)
    full = REWARDS[config.reward].right if config.reward in REWARDS else 1.0
    items = sorted(items, key=lambda item: len(item.ids))  # prompts of similar length share a batch
    size, done, found = max(1, config.rollout_batch_size // samples), 0, 0
    with tqdm(total=len(items), desc="distill") as bar:
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            keys = [example_key(item.example) for item in batch]
            seeds = [prompt_seed(config.seed, 0, int(key[:16], 16)) for key in keys]
            groups = sample_groups(
                model, tokenizer, [Prompt(t.example.id, t.ids, seed) for t, seed in zip(batch, seeds)],
                group_size=samples, temperature=config.temperature, max_new_tokens=config.max_response_tokens,
                batch_size=config.rollout_batch_size, engine=config.rollout_engine, progress=True,
            )
            rows = []
            for item, key, group in zip(batch, keys, groups):
                verdicts = [reward(text, item.example.answer, item.example.tools) for text in group.texts]
                right = [text for text, verdict in zip(group.texts, verdicts) if verdict.total >= full]
                row = {
                    "key": key,
                    "id": item.example.id,
                    "traces": list(dict.fromkeys(right)),
                    "right": len(right),
                }
                row |= {"truncated": sum(group.truncated)}
                rows.append(row | {"reasons": Counter(one.reason for one in verdicts if one.total < full)})
            append_jsonl(journal, rows)
            done, found = done + len(rows), found + sum(bool(row["traces"]) for row in rows)
            bar.update(len(rows))
            bar.set_postfix(found=f"{found / done:.0%}")


def with_traces(examples: Sequence[Example], tried: dict[str, dict], keep: int) -> list[Example]:
    """The examples that have a right reply, in order, with at most `keep` different ones as
    demonstrations.
    """
    traces = [tried.get(example_key(example), {"traces": []})["traces"][:keep] for example in examples]
    return [
        dataclasses.replace(e, demonstrations=tuple(texts)) for e, texts in zip(examples, traces) if texts
    ]


def report(rows: Sequence[dict], written: Sequence[Example], samples: int) -> str:
    """What came of the prompts of these rows: how many are solved, the pass rate, and why samples failed, by
    count.
    """
    right, total, reasons = sum(row["right"] for row in rows), samples * len(rows), Counter()
    for row in rows:
        reasons.update(row["reasons"])
    traces = sum(len(example.demonstrations) for example in written)
    lines = [
        f"{len(written)} of {len(rows)} prompts have a right reply ({len(written) / len(rows):.1%}); {traces} traces kept",
        f"{right} of {total} samples are right ({right / total:.1%})" + ("; the others:" if reasons else ""),
    ]
    lines += [f"  {count:>9} {count / total:7.1%}  {reason}" for reason, count in reasons.most_common()]
    if cut := sum(row["truncated"] for row in rows):
        lines.append(f"{cut} samples were cut off at max_response_tokens")
    return "\n".join(lines)


def read_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(this script's own options, the other arguments). Raises ConfigError."""
    parser = argparse.ArgumentParser(prog="python distill.py", add_help=False, allow_abbrev=False)

    def refuse(message: str) -> None:
        raise ConfigError(f"{message}; see python distill.py --help")

    parser.error = refuse
    parser.add_argument(
        "--out", type=Path, default=Path("traces.jsonl"), help="the file to write (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=positive, default=4, help="replies tried per prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--keep", type=positive, default=1, help="different right ones kept of each (default: %(default)s)"
    )
    options, rest = parser.parse_known_args(arguments)
    if "--help" in rest:
        parser.print_help()
        print("\nand the settings of grpo.py:")
    return options, rest


def main(arguments: list[str]) -> None:
    """Tries what is not tried yet, then writes the file. Raises DataError where no sample at all is right."""
    options, rest = read_options(arguments)
    config = load_config(rest)
    out, journal = options.out, Path(f"{options.out}.tried")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            "distill.py is one process: start it with python, not torchrun; see its first lines for several"
        )
    if config.model == "tiny":
        raise ConfigError(
            "model: tiny is not trained yet; give the folder or hub id of a model that can do the task"
        )
    if config.rollout_engine not in ENGINES:
        raise ConfigError(
            f"rollout_engine must be one of {', '.join(ENGINES)}, not {config.rollout_engine!r}"
        )
    if out.suffix == ".parquet":
        raise ConfigError(
            f"out: {out} would hold JSON lines, not Parquet; give a name that ends in .jsonl or .jsonl.gz"
        )
    if out.exists() and not journal.exists():
        raise ConfigError(f"out: {out} exists, and was not written by distill.py; give another name")
    reward, template = reward_function(config.reward, config.lenient), load_template(config.prompt_template)
    splits, tokenizer = load_splits(config), load_tokenizer(config.model, config.trust_remote_code)
    check_tokenizer(tokenizer, template)
    author = describe_author(config.model, template) | {"samples": options.samples}
    author |= {key: getattr(config, key) for key in FIXED_KEYS}
    tried = read_journal(journal, author)
    items = tokenize_splits(Splits(splits.train, {}), tokenizer, template, config).train
    missing = [item for item in items if example_key(item.example) not in tried]
    if tried:
        print(f"going on: {len(items) - len(missing)} of {len(items)} prompts are tried already")
    try:
        if missing:
            try_prompts(missing, tokenizer, reward, config, options.samples, journal)
    finally:  # also after Ctrl-C: what is there can be used
        tried = read_journal(journal, author)
        examples = [item.example for item in items if example_key(item.example) in tried]
        written = with_traces(examples, tried, options.keep)
        if examples:
            print(report([tried[example_key(example)] for example in examples], written, options.samples))
        if len(examples) < len(items):
            print(f"{len(items) - len(examples)} prompts are not tried yet: the same command goes on")
        if written:
            write_examples(out, written)
            print(f"written: {out}")
    if not written:
        raise DataError(
            f"no reply of {config.model} got full reward, so {out} is not written; the reasons stand above"
        )


if __name__ == "__main__":
    run_script(main)
