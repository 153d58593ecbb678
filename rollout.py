"""Prompts -> completions: groups of samples for training, greedy replies for evaluation. Tokens in, tokens out.

How a batch is decoded is in engines.py; here prompts become batches, and token ids become texts, metrics and rows.
"""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import Config
from data import KINDS, Tokenized, example_kind
from engines import ENGINES, Prompt, rows_that_fit
from model import ModelError, autocast, load_model, load_tokenizer, use_attention, uses_shared_prefix
from prompts import check_tokenizer, decode_reply, encode_prompt, parse_completion, stop_ids
from reward import Reward, score
from runtime import Ranks

QUERY_CHARACTERS = 500  # of a query, in samples.jsonl
PEAK_TFLOPS = {"H100": 989, "H200": 989, "GH200": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362, "B200": 2250}


@dataclass(frozen=True)
class Group:
    """G completions of one prompt. responses end with their stop token unless truncated.

    logprobs: the sampler's own, per response token, at the sampling temperature (a diagnostic: the trainer computes
    its own).
    """

    prompt: Prompt
    responses: list[list[int]]
    logprobs: list[list[float]]
    texts: list[str]
    truncated: list[bool]


def prompt_seed(seed: int, step: int, index: int) -> int:
    """A seed for one prompt of one step: a function of position alone (splitmix64 over the three numbers)."""
    mixed = 0
    for number in (seed, step, index):
        mixed = (mixed + number + 0x9E3779B97F4A7C15) % 2**64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**63


def sample_groups(
    model: nn.Module, tokenizer, prompts: Sequence[Prompt], *, group_size: int, temperature: float,
    max_new_tokens: int, batch_size: int, engine: str = "shared_prefix", progress: bool = False,
    beat: Callable[[], None] = lambda: None,
) -> list[Group]:  # fmt: skip
    """`group_size` completions of every prompt, in the order of `prompts`.

    temperature: 0 is greedy. batch_size: sequences decoded at once; whole groups stay together, and prompts of similar
    length share a batch, so little is padded; on CUDA fewer at once where their K/V would not fit. engine: a key of
    engines.ENGINES. beat: called after every batch. The model is left as it came (train or eval mode, attention).
    """
    stops, was_training = stop_ids(tokenizer), model.training
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    copies = group_size if temperature > 0 else 1  # greedy copies would be equal
    device = next(model.parameters()).device
    # That engine does attention and head itself, and may not leave out what a family does there (windows, caps, scales).
    if engine == "shared_prefix" and not (uses_shared_prefix(model) and model.abilities.head_only):
        engine = "generate"
    groups: dict[int, Group] = {}
    model.eval()
    try:
        with tqdm(total=len(prompts), desc="rollout", leave=False, delay=10, disable=not progress) as bar:
            while len(groups) < len(prompts):
                ahead = order[len(groups) :]
                fitting = rows_that_fit(model, len(prompts[ahead[-1]].ids), copies, max_new_tokens)
                ahead = ahead[: max(1, min(batch_size, fitting) // copies)]
                batch = [prompts[i] for i in ahead]
                try:
                    with autocast(device):  # around the whole batch: weights are cast once, not per token
                        rows = ENGINES[engine](model, batch, copies, temperature, max_new_tokens, stops)
                except torch.OutOfMemoryError:
                    if len(batch) == 1:
                        raise
                    batch_size = max(1, len(batch) // 2) * copies  # samples depend on their seeds alone: the same again
                    torch.cuda.empty_cache()
                    continue
                for k, (i, prompt) in enumerate(zip(ahead, batch)):
                    own = rows[k * copies : (k + 1) * copies] * (group_size // copies)
                    texts = [decode_reply(tokenizer, ids, stops) for ids, _ in own]
                    truncated = [ids[-1] not in stops for ids, _ in own]
                    groups[i] = Group(prompt, [ids for ids, _ in own], [lp for _, lp in own], texts, truncated)
                bar.update(len(batch))
                beat()
    finally:
        use_attention(model, "train")
        model.train(was_training)
    return [groups[i] for i in range(len(prompts))]


# ----------------------------------------------------------------------------------------------------------- logging


def rollout_metrics(groups: Sequence[Group], rewards: list[list[Reward]], ranks: Ranks) -> dict[str, float]:
    """Collective. What a step's samples look like, in TRL's names where it has them; global sums over global counts.

    think_rate: closed thoughts with something in them, also where the calls cannot be read. empty_rate: `[]` was the call.
    """
    rows = []
    for group, scores in zip(groups, rewards):
        parsed = [parse_completion(text) for text in group.texts]
        thought = [bool(one.think and one.think.strip()) for one in parsed]
        empty = [one.calls == [] for one in parsed]
        lengths, totals = map(len, group.responses), [one.total for one in scores]
        formats, hits = [one.format_ok for one in scores], [one.correct for one in scores]
        rows.append(list(zip(lengths, totals, formats, hits, group.truncated, thought, empty)))
    everyone = [row for part in ranks.gather(rows) for row in part]  # lists, because a rank may have no group
    columns = torch.tensor(everyone, dtype=torch.float64).unbind(2)  # [P, G] each
    lengths, totals, format_ok, correct, truncated, thought, empty = columns
    distinct = ranks.sum([sum(len(set(group.texts)) / len(group.texts) for group in groups)])[0]
    return {
        "reward": totals.mean().item(),
        "reward_std": totals.std(1).mean().item(),
        "frac_reward_zero_std": (totals.amax(1) == totals.amin(1)).double().mean().item(),
        "format_rate": format_ok.mean().item(),
        "correct_rate": correct.mean().item(),
        "think_rate": thought.mean().item(),
        "empty_rate": empty.mean().item(),
        "distinct_rate": distinct / len(totals),
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": truncated.mean().item(),
    }


def sample_rows(
    step: int, groups: Sequence[Group], examples: Sequence[Tokenized], rewards: list[list[Reward]], advantages: Tensor,
    tokenizer, limit: int, ranks: Ranks,
) -> list[dict]:  # fmt: skip
    """Collective. Rows for samples.jsonl: about `limit` completions of this step, equally many from every rank.

    examples, rewards [P][G], advantages [P, G]: those of `groups`, in their order. query: the start of the last user
    message. answer: the right calls. tokens, logprobs: of the response, see token_texts and Group.
    """
    places = [(p, g) for p, scores in enumerate(rewards) for g in range(len(scores))][: -(-limit // ranks.world)]
    rows = []
    for (p, g), tokens in zip(places, token_texts(tokenizer, [groups[p].responses[g] for p, g in places])):
        group, example, one = groups[p], examples[p].example, rewards[p][g]
        asked = "".join([message.get("content") or "" for message in example.messages if message["role"] == "user"][-1:])
        row = {"step": step, "prompt_id": group.prompt.id, "completion": group.texts[g], "reward": one.total}
        row |= {"reason": one.reason, "advantage": round(advantages[p, g].item(), 4), "truncated": group.truncated[g]}
        query = asked[:QUERY_CHARACTERS] + "…" * (len(asked) > QUERY_CHARACTERS)
        row |= {"kind": example_kind(example), "query": query}
        row["answer"] = [{"name": call.name, "arguments": call.arguments} for call in example.answer]
        rows.append(row | {"tokens": tokens, "logprobs": [round(x, 3) for x in group.logprobs[g]]})
    return [row for part in ranks.gather(rows) for row in part]


def token_texts(tokenizer, responses: Sequence[list[int]]) -> list[list[str]]:
    """The tokens of each response as texts that, joined, are the whole response as it decodes, its end token included.

    A character whose bytes lie in several tokens stands at the last of them, and the others are "".
    """
    first = stop_ids(tokenizer)[:1]

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def later(ids: Sequence[int]) -> str:  # some tokenizers take the space from the first token of a text
        return decode([*first, *ids])[len(decode(first)) :]

    alone, rows = {i: later([i]) for i in set().union(*responses)}, []
    for ids in responses:
        texts, start = [], 0
        for end, token in enumerate(ids, 1):
            broken = "\ufffd" in alone[token] and end < len(ids)  # bytes of a character that is not complete
            if broken and end - start > 8:  # no character has so many: noise, which would take quadratic time
                continue
            part = decode(ids[:end]) if start == 0 else alone[token] if end - start == 1 else later(ids[start:end])
            if not (broken and part.endswith("\ufffd")):
                texts += [""] * (end - start - 1) + [part]
                start = end
        whole = decode(ids)
        rows.append(texts if "".join(texts) == whole else [whole] + [""] * (len(ids) - 1))
    return rows


def speed_metrics(
    groups: Sequence[Group], given_up: Sequence[Group], trained: int, parameters: int, config: Config,
    seconds: dict[str, float], ranks: Ranks,
) -> dict[str, float]:  # fmt: skip
    """Collective. Tokens, FLOPs, seconds and memory of one step; rates are over all ranks and this rank's seconds.

    trained: tokens that this rank packed for the update. FLOPs: 2 per parameter and token forward, 4 backward, attention
    left out: a rollout is one forward, the reference another, an update three.
    """
    sizes = [len(g.prompt.ids) + sum(map(len, g.responses)) for g in groups]
    dropped = [len(g.prompt.ids) + sum(map(len, g.responses)) for g in given_up]
    new = sum(len(ids) for g in (*groups, *given_up) for ids in g.responses)
    own = [float(x) for x in (sum(sizes), sum(dropped), new, trained, len(given_up), len(groups))]
    kept, dropped, new, all_trained, again, total = ranks.sum(own)
    passes = 6 + 2 * (config.kl_coef > 0) + 2 * (config.minibatch_prompts < config.prompts_per_step)
    metrics = {f"time/{phase}_s": value for phase, value in seconds.items()}
    metrics |= {"num_tokens": kept, "step_flops": parameters * (2 * (kept + dropped) + passes * all_trained)}
    metrics |= {"rollout/tokens_per_s": new / seconds["rollout"], "update/tokens_per_s": all_trained / seconds["update"]}
    if config.kl_coef:
        metrics["reference/tokens_per_s"] = all_trained / seconds["reference"]
    if config.skip_zero_variance:
        metrics["update/skipped_token_ratio"] = max(0.0, 1 - all_trained / kept)
    if config.resample_rounds:
        metrics["rollout/resampled_ratio"] = again / total
    if ranks.device.type == "cuda":
        metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        name = torch.cuda.get_device_name()
        peak = next((tera for part, tera in PEAK_TFLOPS.items() if part in name), None)
        if peak:  # model FLOPs utilisation of the update: what is recomputed for checkpointing does not count
            metrics["update/mfu"] = 6 * parameters * trained / seconds["update"] / (peak * 1e12)
    else:
        metrics["memory/peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return metrics


# ---------------------------------------------------------------------------------------------------- evaluation


def evaluate(
    model: nn.Module, tokenizer, examples: Sequence[Tokenized], config: Config, ranks: Ranks, name: str
) -> dict[str, float]:
    """Collective. Greedy accuracy (binary reward) on held-out examples, overall and by kind, as log entries.

    Keys: `{name}/accuracy`, `{name}/n`, `{name}/accuracy_KIND` and `{name}/n_KIND` for every kind that occurs, and
    `{name}/correct_rate`: the calls alone, as benchmarks judge.
    """
    own = examples[ranks.rank :: ranks.world]
    groups = sample_groups(
        model, tokenizer, [Prompt(t.example.id, t.ids) for t in own], group_size=1, temperature=0,
        max_new_tokens=config.max_response_tokens, batch_size=config.rollout_batch_size, engine=config.rollout_engine,
        beat=ranks.beat,
    )  # fmt: skip
    hits, correct = Counter({kind: 0.0 for kind in KINDS}), 0
    for item, group in zip(own, groups):
        one = score(group.texts[0], item.example.answer)
        hits[example_kind(item.example)] += one.total
        correct += one.correct
    totals = Counter(example_kind(t.example) for t in examples)
    *sums, correct = ranks.sum([*(hits[kind] for kind in KINDS), correct])
    right = dict(zip(KINDS, sums))
    entries = {f"{name}/accuracy": sum(right.values()) / len(examples), f"{name}/n": len(examples)}
    entries[f"{name}/correct_rate"] = correct / len(examples)
    for kind, n in totals.items():
        entries |= {f"{name}/accuracy_{kind}": right[kind] / n, f"{name}/n_{kind}": n}
    return entries


@dataclass(frozen=True)
class Case:
    """One benchmark case: category is the benchmark's own name for its part."""

    id: str
    category: str
    messages: list[dict]
    tools: list[dict]


def write_predictions(
    model: str, cases: Sequence[Case], path: Path, *, template: str, max_prompt_tokens: int, max_new_tokens: int,
    batch_size: int, temperature: float = 0.0, samples: int = 1, seed: int = 0,
) -> None:  # fmt: skip
    """`samples` replies per case of the model in folder or hub id `model`, appended to `path`, one JSON line each.

    temperature: 0 is greedy. Samples depend on `seed` and their own case only. batch_size: replies decoded at once;
    cases with prompts of similar length share a batch. Rows: id, category, sample (0 to samples - 1), output,
    input_tokens, output_tokens, latency (seconds of its batch / replies of its batch), and "skipped" where a prompt is
    longer than `max_prompt_tokens` (its output is empty). Replies that `path` holds already are not written again, so a
    killed run goes on where it was. Raises ModelError when those were made with another model or other settings.
    """
    if temperature == 0 and samples > 1:
        raise ModelError(f"samples: greedy decoding would give {samples} equal replies; set a temperature above 0, or 1")
    path.parent.mkdir(parents=True, exist_ok=True)
    sampling = {"temperature": temperature, "samples": samples, "seed": seed if temperature else 0}
    _check_author(path, model, template, max_new_tokens, sampling)
    todo = _missing(path, cases, samples)
    if not todo:
        print(f"{path}: all {len(cases) * samples} replies are there already")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, policy = load_tokenizer(model), load_model(model, device)
    check_tokenizer(tokenizer, template)
    prompts = [
        Prompt(case.id, encode_prompt(tokenizer, case.messages, case.tools, template), _case_seed(seed, case, nth))
        for case, nth, _ in todo
    ]
    order = sorted(range(len(todo)), key=lambda i: len(prompts[i].ids))
    size, count, tokens, start_time = max(1, batch_size // samples), 0, 0, time.perf_counter()
    with path.open("a", encoding="utf-8") as file, tqdm(total=len(todo), desc=path.parent.name or "eval") as bar:
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            fits = [i for i in batch if len(prompts[i].ids) <= max_prompt_tokens]
            began = time.perf_counter()
            # All samples of a case come from one stream of random numbers, so all are made even if some are there.
            groups = sample_groups(
                policy, tokenizer, [prompts[i] for i in fits], group_size=samples, temperature=temperature,
                max_new_tokens=max_new_tokens, batch_size=batch_size,
            )  # fmt: skip
            latency = round((time.perf_counter() - began) / (len(batch) * samples), 4)
            replies = dict(zip(fits, groups))
            for i in batch:
                case, _, wanted = todo[i]
                for k in wanted:
                    row = {"id": case.id, "category": case.category, "sample": k, "input_tokens": len(prompts[i].ids)}
                    if i in replies:
                        row |= {"output": replies[i].texts[k], "output_tokens": len(replies[i].responses[k])}
                    else:
                        row |= {"output": "", "output_tokens": 0, "skipped": "prompt_too_long"}
                    file.write(json.dumps(row | {"latency": latency}, ensure_ascii=False) + "\n")
                    count, tokens = count + 1, tokens + row["output_tokens"]
            file.flush()
            bar.update(len(batch))
    spent = time.perf_counter() - start_time
    print(f"{path}: {count} replies in {spent:.1f} s: {count / spent:.2f} replies/s, {tokens / spent:.0f} new tokens/s")


def describe_author(model: str, template: str) -> dict:
    """Tells apart what replies are made with: the model in a folder or on the hub, its weights' times, the prompt's hash."""
    weights = [p.stat().st_mtime_ns for p in sorted(Path(model).glob("*.safetensors"))]
    name = str(Path(model).resolve()) if weights else model
    return {"model": name, "weights": weights, "template": hashlib.sha256(template.encode()).hexdigest()}


def _check_author(path: Path, model: str, template: str, max_new_tokens: int, sampling: dict) -> None:
    """Remembers beside `path` what its predictions are made with, and refuses to mix in those of anything else."""
    author = describe_author(model, template) | {"max_new_tokens": max_new_tokens, **sampling}
    note = path.with_name("generated_with.json")
    if path.exists() and note.exists():
        greedy = {"temperature": 0.0, "samples": 1, "seed": 0}  # what a note says that was written before there was more
        before = greedy | json.loads(note.read_text(encoding="utf-8"))
        changed = [key for key in author if before.get(key) != author[key]]
        if changed:
            what = f"{', '.join(changed)}; see {note}"
            raise ModelError(f"{path} was made with another model or other settings ({what}); give another --out")
    note.write_text(json.dumps(author, indent=1) + "\n", encoding="utf-8")


def _case_seed(seed: int, case: Case, nth: int) -> int:
    """A seed of the case's own: a function of its name, whatever else is asked and in which order."""
    digest = hashlib.sha256(f"{seed}/evaluation/{case.category}/{case.id}/{nth}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def _missing(path: Path, cases: Sequence[Case], samples: int) -> list[tuple[Case, int, list[int]]]:
    """(case, how many cases of its id came before, samples that `path` does not hold) for all cases that lack any."""
    done, met, todo = _finished(path), Counter(), []
    for case in cases:  # counted, because an id may occur twice
        name = (case.category, case.id)
        wanted = [k for k in range(samples) if done[*name, k] <= met[name]]
        if wanted:
            todo.append((case, met[name], wanted))
        met[name] += 1
    return todo


def _finished(path: Path) -> Counter[tuple[str, str, int]]:
    """How often each (category, id, sample) is in `path`. A line cut off by a kill is removed, so appending is safe."""
    if not path.exists():
        return Counter()
    data = path.read_bytes()  # bytes, because the cut may be inside a character
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    rows = [json.loads(line) for line in whole.split(b"\n") if line]
    return Counter((row["category"], row["id"], row.get("sample", 0)) for row in rows)
