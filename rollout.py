"""Prompts -> completions: groups of samples for training, greedy replies for evaluation. Tokens in, tokens
out.

How a batch is decoded is in engines.py; here prompts become batches, and token ids become texts, metrics and
rows.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import Config
from corpus.examples import Tokenized, example_kind
from distributed.batches import Group
from distributed.ranks import Ranks
from kernel.attention import use_attention, uses_shared_prefix
from kernel.decode import Engine, Prompt, rows_that_fit, shared_prefix
from kernel.hf_engines import continuous_batching, generate
from model import autocast
from prompts import decode_reply, parse_completion, stop_ids
from reward import Reward

QUERY_CHARACTERS = 500  # of a query, in samples.jsonl
PEAK_TFLOPS = {
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "B200": 2250,
}


def sample_groups(
    model: nn.Module, tokenizer, prompts: Sequence[Prompt], *, group_size: int, temperature: float,
    max_new_tokens: int, batch_size: int, engine: str = "shared_prefix", progress: bool = False,
    heartbeat: Callable[[], None] = lambda: None,
) -> list[Group]:
    """`group_size` completions of every prompt, in the order of `prompts`.

    temperature: 0 is greedy. batch_size: sequences decoded at once; whole groups stay together, and prompts
    of similar length share a batch, so little is padded; on CUDA fewer at once where their K/V would not fit.
    engine: a key of engines.ENGINES. heartbeat: called after every batch. The model is left as it came (train or
    eval mode, attention).
    """
    stops, was_training = stop_ids(tokenizer), model.training
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    copies = group_size if temperature > 0 else 1  # greedy copies would be equal
    device = next(model.parameters()).device
    # That engine does attention and head itself, and may not leave out what a family does there (windows,
    # caps, scales).
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
                    batch_size = (
                        max(1, len(batch) // 2) * copies
                    )  # samples depend on their seeds alone: the same again
                    torch.cuda.empty_cache()
                    continue
                for k, (i, prompt) in enumerate(zip(ahead, batch)):
                    own = rows[k * copies : (k + 1) * copies] * (group_size // copies)
                    texts = [decode_reply(tokenizer, ids, stops) for ids, _ in own]
                    truncated = [ids[-1] not in stops for ids, _ in own]
                    groups[i] = Group(
                        prompt, [ids for ids, _ in own], [lp for _, lp in own], texts, truncated
                    )
                bar.update(len(batch))
                heartbeat()
    finally:
        use_attention(model, "train")
        model.train(was_training)
    return [groups[i] for i in range(len(prompts))]


# ---------------------------------------------------------------------------------------------------- logging


def rollout_metrics(groups: Sequence[Group], rewards: list[list[Reward]], ranks: Ranks) -> dict[str, float]:
    """Collective. What a step's samples look like, in TRL's names where it has them; global sums over global
    counts.

    think_rate: closed thoughts with something in them, also where the calls cannot be read. empty_rate: `[]`
    was the call.
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
) -> list[dict]:
    """Collective. Rows for samples.jsonl: about `limit` completions of this step, equally many from every
    rank.

    examples, rewards [P][G], advantages [P, G]: those of `groups`, in their order. query: the start of the
    last user message. answer: the right calls. tokens, logprobs: of the response, see token_texts and Group.
    """
    places = [(p, g) for p, scores in enumerate(rewards) for g in range(len(scores))][
        : -(-limit // ranks.world)
    ]
    rows = []
    for (p, g), tokens in zip(places, token_texts(tokenizer, [groups[p].responses[g] for p, g in places])):
        group, example, one = groups[p], examples[p].example, rewards[p][g]
        asked = "".join(
            [message.get("content") or "" for message in example.messages if message["role"] == "user"][-1:]
        )
        row = {"step": step, "prompt_id": group.prompt.id, "completion": group.texts[g], "reward": one.total}
        row |= {
            "reason": one.reason,
            "advantage": round(advantages[p, g].item(), 4),
            "truncated": group.truncated[g],
        }
        query = asked[:QUERY_CHARACTERS] + "…" * (len(asked) > QUERY_CHARACTERS)
        row |= {"kind": example_kind(example), "query": query}
        row["answer"] = [{"name": call.name, "arguments": call.arguments} for call in example.answer]
        rows.append(row | {"tokens": tokens, "logprobs": [round(x, 3) for x in group.logprobs[g]]})
    return [row for part in ranks.gather(rows) for row in part]


def token_texts(tokenizer, responses: Sequence[list[int]]) -> list[list[str]]:
    """The tokens of each response as texts that, joined, are the whole response as it decodes, its end token
    included.

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
            part = (
                decode(ids[:end])
                if start == 0
                else alone[token]
                if end - start == 1
                else later(ids[start:end])
            )
            if not (broken and part.endswith("\ufffd")):
                texts += [""] * (end - start - 1) + [part]
                start = end
        whole = decode(ids)
        rows.append(texts if "".join(texts) == whole else [whole] + [""] * (len(ids) - 1))
    return rows


def speed_metrics(
    groups: Sequence[Group], given_up: Sequence[Group], trained: int, parameters: int, config: Config,
    seconds: dict[str, float], ranks: Ranks,
) -> dict[str, float]:
    """Collective. Tokens, FLOPs, seconds and memory of one step; rates are over all ranks and this rank's
    seconds.

    trained: tokens that this rank packed for the update. FLOPs: 2 per parameter and token forward, 4
    backward, attention left out: a rollout is one forward, the reference another, an update three.
    """
    sizes = [len(g.prompt.ids) + sum(map(len, g.responses)) for g in groups]
    dropped = [len(g.prompt.ids) + sum(map(len, g.responses)) for g in given_up]
    new = sum(len(ids) for g in (*groups, *given_up) for ids in g.responses)
    own = [float(x) for x in (sum(sizes), sum(dropped), new, trained, len(given_up), len(groups))]
    kept, dropped, new, all_trained, again, total = ranks.sum(own)
    passes = 6 + 2 * (config.kl_coef > 0) + 2 * (config.minibatch_prompts < config.prompts_per_step)
    metrics = {f"time/{phase}_s": value for phase, value in seconds.items()}
    metrics |= {"num_tokens": kept, "step_flops": parameters * (2 * (kept + dropped) + passes * all_trained)}
    metrics |= {
        "rollout/tokens_per_s": new / seconds["rollout"],
        "update/tokens_per_s": all_trained / seconds["update"],
    }
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


ENGINES: dict[str, Engine] = {
    "shared_prefix": shared_prefix,
    "generate": generate,
    "continuous_batching": continuous_batching,
}
