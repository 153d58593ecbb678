"""rollout.py: the decoding loop gives what plain generate() gives, samples follow softmax(logits / T), and no
sample depends on anything but its own prompt and seed.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import chatty_model
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

import rollout
from config import Config
from corpus.examples import Example
from corpus.replies import token_texts
from corpus.tiny_model import build_tiny_tokenizer
from distributed.batches import Group, prompt_seed
from kernel import decode as engines
from kernel.attention import use_attention
from kernel.decode import Prompt
from kernel.packing import pack
from model import token_logprobs
from prompts import ToolCall, encode_reply, stop_ids
from reward import Reward, score
from rollout import (
    Decoding,
    Work,
    rollout_metrics,
    sample_groups,
    sample_rows,
    score_groups,
    speed_metrics,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tiny_tokenizer(["weather in Paris for 3 days", "a taxi in Rome with 4 seats"] * 3, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return chatty_model(tokenizer)


def prompts_of(lengths: list[int], seed: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(10, 250, (n,), generator=generator).tolist() for n in lengths]
    return [Prompt(f"p{i}", row, prompt_seed(seed, 1, i)) for i, row in enumerate(ids)]


def sample(model, tokenizer, prompts, **settings):
    settings = dict(group_size=1, temperature=0, max_new_tokens=24, batch_size=64) | settings
    return sample_groups(model, tokenizer, prompts, Decoding(**settings))


LENGTHS = [5, 1, 17, 9, 2, 30, 9, 12, 3, 4, 21, 8]

@pytest.fixture
def many_stops(monkeypatch, tokenizer):
    """Every fifth token ends a reply, so rows finish at different times and leave the batch."""
    stops = sorted({*stop_ids(tokenizer), *range(0, len(tokenizer), 5)})
    monkeypatch.setattr(rollout, "stop_ids", lambda _: stops)
    return stops


def plain_greedy(model, prompt: list[int], stops: list[int], max_new_tokens: int) -> list[int]:
    """transformers' own generate(), one prompt at a time, without padding."""
    use_attention(model, "generate")
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=0,
    )
    use_attention(model, "train")
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_greedy_equals_plain_generate(model, tokenizer, many_stops, batch_size):
    prompts = prompts_of(LENGTHS)
    groups = sample(model, tokenizer, prompts, batch_size=batch_size)
    slow = [plain_greedy(model, prompt.ids, many_stops, 24) for prompt in prompts]
    assert [group.responses for group in groups] == [[ids] for ids in slow]
    assert [group.prompt for group in groups] == prompts, "in the order in which they came"
    assert len({len(ids) for ids in slow}) >= 4 and max(map(len, slow)) == 24, (
        "rows do finish at different times"
    )


@pytest.mark.parametrize("keep_share", [0.0, 1.0])
def test_dropping_finished_rows_changes_nothing(model, tokenizer, many_stops, monkeypatch, keep_share):
    prompts, settings = prompts_of(LENGTHS), dict(group_size=4, temperature=1.0)
    expected = sample(model, tokenizer, prompts, **settings)
    monkeypatch.setattr(engines, "KEEP_SHARE", keep_share)  # 0: never drop a row; 1: drop each at once
    for one, other in zip(expected, sample(model, tokenizer, prompts, **settings)):
        assert one.responses == other.responses


def test_with_too_little_memory_the_rest_is_decoded_in_parts(model, tokenizer, many_stops, monkeypatch):
    """What was done stays done, and the samples are the same; where one group is too much, it is an error."""
    prompts, settings = prompts_of(LENGTHS), dict(group_size=4, temperature=1.0)
    expected = sample(model, tokenizer, prompts, **settings)
    real, asked, room = rollout.ENGINES["shared_prefix"], [], 12

    def scarce(*args):
        asked.append((len(args[1]), args[-1]))
        for done, found in enumerate(real(*args)):
            if args[-1] > room and done == min(room, 3):
                raise torch.OutOfMemoryError
            yield found

    monkeypatch.setitem(rollout.ENGINES, "shared_prefix", scarce)
    found = sample(model, tokenizer, prompts, **settings)
    assert [group.responses for group in found] == [group.responses for group in expected]
    assert asked == [(12, 64), (9, 24), (6, 12)]
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        sample(model, tokenizer, prompts, **settings)


def test_the_model_is_left_as_it_came(model, tokenizer):
    for mode in (True, False):
        model.train(mode)
        sample(model, tokenizer, prompts_of([4, 2]))
        assert model.training is mode and model.config._attn_implementation == "shared_prefix"


def deviation(counts: torch.Tensor, distribution: torch.Tensor) -> float:
    """Pearson's chi-square in units of its standard deviation, over tokens expected 5 times or more."""
    expected = distribution * counts.sum()
    often = expected >= 5
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
    freedom = int(often.sum()) - 1
    return float((chi2 - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_first_tokens_follow_the_softmax_of_the_logits(model, tokenizer, temperature):
    """Forgetting the temperature in the sampler, or applying it twice, is many standard deviations away."""
    prompt = prompts_of([6])[0]
    use_attention(model, "generate")
    logits = model(torch.tensor([prompt.ids])).logits[0, -1].double().detach()
    use_attention(model, "train")
    (group,) = sample(model, tokenizer, [prompt], group_size=4000, temperature=temperature, max_new_tokens=1)
    counts = torch.bincount(torch.tensor([ids[0] for ids in group.responses]), minlength=len(logits)).double()
    assert deviation(counts, F.softmax(logits / temperature, -1)) < 4
    wrong = 1.0 if temperature != 1.0 else 0.8
    assert deviation(counts, F.softmax(logits / wrong, -1)) > 12


@pytest.mark.parametrize("engine", ["shared_prefix", "generate"])
def test_samples_depend_on_their_own_seed_only(model, tokenizer, many_stops, engine):
    prompts, settings = prompts_of(LENGTHS), dict(group_size=4, temperature=1.0)
    expected = {g.prompt.id: g.responses for g in sample(model, tokenizer, prompts, **settings)}
    settings["engine"] = engine  # both draw the same numbers
    variants = {
        "another batch size": sample(model, tokenizer, prompts, **settings | {"batch_size": 9}),
        "another order": sample(model, tokenizer, prompts[::-1], **settings),
        "other company": sample(model, tokenizer, prompts[3:5] + prompts_of([40, 3], seed=9)[:1], **settings)[
            :2
        ],
        "alone": sample(model, tokenizer, prompts[5:6], **settings),
    }
    for name, groups in variants.items():
        for group in groups:
            assert group.responses == expected[group.prompt.id], name


def test_generation_config_does_not_leak_into_samples(model, tokenizer):
    """generate() obeys top_k = 1 even where the caller asks to sample: all completions would be equal."""
    settings = dict(group_size=6, temperature=1.0)
    clean = sample(model, tokenizer, prompts_of(LENGTHS), **settings)
    leaky = dict(
        top_k=1, top_p=0.1, repetition_penalty=5.0, temperature=0.1, max_new_tokens=2, eos_token_id=[7]
    )
    saved = {name: getattr(model.generation_config, name) for name in leaky}
    try:
        for name, value in leaky.items():
            setattr(model.generation_config, name, value)
        coloured = sample(model, tokenizer, prompts_of(LENGTHS), **settings)
    finally:
        for name, value in saved.items():
            setattr(model.generation_config, name, value)
    assert coloured == clean


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_sampler_and_trainer_agree_on_log_probs(model, tokenizer, many_stops, temperature):
    """If the temperature is forgotten on one side, ratios start far from 1 and nothing crashes."""
    groups = sample(
        model, tokenizer, prompts_of(LENGTHS), group_size=3, temperature=temperature, batch_size=12
    )
    packed = pack([(group.prompt.ids, group.responses) for group in groups], CPU)
    sampler = torch.tensor([x for group in groups for row in group.logprobs for x in row])
    with torch.no_grad():
        assert_close(sampler, token_logprobs(model, packed, temperature)[0], atol=1e-4, rtol=1e-4)
        wrong = token_logprobs(model, packed, temperature + 0.3)[0]
    assert (sampler - wrong).abs().mean() > 0.05


def test_a_stop_token_ends_a_response_and_stays_in_it(model, tokenizer, many_stops):
    """The end token is a decision of the policy: without it in the loss, the policy never learns to stop."""
    groups = sample(model, tokenizer, prompts_of(LENGTHS), group_size=6, temperature=1.0, max_new_tokens=7)
    rows = [
        row for group in groups for row in zip(group.responses, group.truncated, group.texts, group.logprobs)
    ]
    for ids, truncated, text, logprobs in rows:
        assert 1 <= len(ids) <= 7 and len(logprobs) == len(ids)
        assert not set(ids[:-1]) & set(many_stops), "nothing follows a stop token"
        assert truncated == (ids[-1] not in many_stops)
        assert len(ids) == 7 or not truncated
        body = ids if truncated else ids[:-1]
        assert text == tokenizer.decode(body, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert {truncated for _, truncated, _, _ in rows} == {True, False}


ALONE = SimpleNamespace(world=1, gather=lambda item: [item], sum=list)  # one process, without a process group


@pytest.mark.parametrize("text", ["weather in Paris", "東京 é 👩‍👩‍👧 x", "", "ends in 東"])
def test_token_texts_join_to_the_response(tokenizer, text):
    """A character beyond ASCII is two to four tokens here, and a cut may fall inside."""
    ids = encode_reply(tokenizer, text)
    rows = token_texts(tokenizer, [ids[:end] for end in range(1, len(ids) + 1)])
    for end, texts in enumerate(rows, 1):
        assert len(texts) == end and "".join(texts) == tokenizer.decode(ids[:end], skip_special_tokens=False)


def test_token_texts_of_noise(tokenizer, monkeypatch):
    """A policy that broke down writes bytes that are no characters: nothing may fail or take long."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, len(tokenizer), (200,), generator=generator).tolist() for _ in range(20)]
    rows.append([tokenizer.convert_tokens_to_ids("Ģ")] * 5000)  # the byte 0x80
    decode, decoded = tokenizer.decode, []
    monkeypatch.setattr(
        tokenizer, "decode", lambda ids, **options: decoded.append(len(ids)) or decode(ids, **options)
    )
    for ids, texts in zip(rows, token_texts(tokenizer, rows)):
        assert len(texts) == len(ids) and "".join(texts) == decode(ids)
    assert sum(decoded) < 5 * sum(map(len, rows))


@pytest.mark.parametrize("begun", ["", "<think>\n"])
@pytest.mark.parametrize("spelt", [False, True])
def test_thoughts_are_counted_in_tokens(model, monkeypatch, begun, spelt):
    """Up to the end of the closing tag, one token or several, also where the prompt begins the thought."""
    tokenizer = build_tiny_tokenizer(["weather in Paris"], 300)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", f"assistant\n{begun}")
    texts = ["<think>é 東</think>[] </think>", "<think></think>", "<think>not closed", "so: <think>x</think>"]
    rows, expected = [], []
    for text in texts:
        said = text.removeprefix("<think>") if begun else text
        ids = []
        for part in said if spelt else [said]:
            ids += tokenizer.encode(part, add_special_tokens=False)
        rows.append(([*ids, stop_ids(tokenizer)[0]], [0.0] * (len(ids) + 1)))
        ends = [k for k in range(len(ids) + 1) if tokenizer.decode(ids[:k]).endswith("</think>")]
        expected.append(ends[0] if ends and (begun or said.startswith("<think>")) else 0)
    monkeypatch.setitem(rollout.ENGINES, "shared_prefix", lambda *_: [(0, rows)])
    asked = model, tokenizer, [Prompt("p", [1], 0)]
    for thoughts in (True, False):
        (group,) = sample_groups(*asked, Decoding(4, 1.0, 50, 8, thoughts=thoughts))
        assert group.thoughts == (expected if thoughts else [])
    assert expected[0] > 1 + 7 * spelt and expected[1] > 0 == expected[2] and bool(expected[3]) == bool(begun)


def groups_of(tokenizer, replies: list[list[str]]) -> list[Group]:
    """As they come from sampling; the last reply of all has been cut off."""
    groups = []
    for p, texts in enumerate(replies):
        responses = [encode_reply(tokenizer, text) for text in texts]
        cut = [texts is replies[-1] and g == len(texts) - 1 for g in range(len(texts))]
        responses = [ids[:-1] if gone else ids for ids, gone in zip(responses, cut)]
        logprobs = [[-0.12345 * (k + 1) for k in range(len(ids))] for ids in responses]
        groups.append(Group(Prompt(f"p{p}", [1], 0), responses, logprobs, texts, cut))
    return groups


def test_rows_for_samples_jsonl(tokenizer):
    """Each completion beside the query and the answer of its own prompt, and no more rows than asked for."""
    turns = [("user", "before"), ("assistant", "?"), ("user", "q" * 501)]
    messages = [{"role": role, "content": text} for role, text in turns]
    call = ToolCall("f", {"x": 1})
    examples = [
        Example("p0", "xlam", messages, [{"name": "f"}, {"name": "g"}], [call]),
        Example("p1", "xlam", [], [], []),
    ]
    rewards = (Reward(1.0, True, True, "correct"), Reward(0.0, True, False, "no_call"))
    groups = [
        replace(group, example=example, rewards=rewards)
        for group, example in zip(groups_of(tokenizer, [["Paris é", "3 days"], ["Rome", "taxi"]]), examples)
    ]
    arguments = 7, groups, [[0.70712, -0.70712], [0.5, -0.5]], tokenizer
    rows = sample_rows(*arguments, 100, ALONE)
    assert rows[0] == {
        "tools": [{"name": "f"}, {"name": "g"}], "begun": "",
        "turns": [("user", "before"), ("assistant", "?"), ("user", "q" * 501)],
        "step": 7, "prompt_id": "p0", "completion": "Paris é", "reward": 1.0, "reason": "correct",
        "advantage": 0.7071, "truncated": False, "kind": "choice", "query": "q" * 500 + "…",
        "answer": [{"name": "f", "arguments": {"x": 1}}], "tokens": ["Paris", " ", "", "é", "<|im_end|>"],
        "logprobs": [-0.123, -0.247, -0.37, -0.494, -0.617],
    }
    assert ["tools" in row for row in rows] == [True, False, True, False], "once per prompt: they are long"
    told = [(row["kind"], row["query"], row["truncated"]) for row in rows[2:]]
    assert told == [("none", "", False), ("none", "", True)]
    assert [row["completion"] for row in rows] == ["Paris é", "3 days", "Rome", "taxi"]
    assert [(row["reason"], row["advantage"]) for row in rows[2:]] == [("correct", 0.5), ("no_call", -0.5)]
    assert sample_rows(*arguments, 3, ALONE) == rows[:3] and sample_rows(*arguments, 0, ALONE) == []
    two = SimpleNamespace(world=2, gather=lambda item: [item, ["the other's"]])
    assert sample_rows(*arguments, 3, two) == [*rows[:2], "the other's"], "half of them each, rounded up"


def test_a_reward_falls_over_the_last_tokens(tokenizer):
    """DAPO, equation 13, over the last 4 of 10 tokens; what else a reward says stays."""
    (group,) = groups_of(tokenizer, [["a"] * 6])
    group = replace(group, responses=[[1] * n for n in (1, 6, 7, 8, 9, 10)])
    item = SimpleNamespace(example=Example("p", "xlam", [], [], []))
    arguments = [group], [item], [3], lambda text, answer, tools: Reward(0.5, True, True, "correct")
    (scored,) = score_groups(*arguments, 10, 4)
    assert [one.total for one in scored.rewards] == [0.5, 0.5, 0.25, 0.0, -0.25, -0.5]
    assert {(one.format_ok, one.correct, one.reason) for one in scored.rewards} == {(True, True, "correct")}
    for (scored,) in (score_groups(*arguments, 10, 0), score_groups(*arguments)):
        assert {one.total for one in scored.rewards} == {0.5} and scored.place == 3


def test_speed_counts_every_pass(tokenizer):
    """FLOPs per parameter and token: 2 to sample, 2 for the reference, 2 for old log-probs, 6 per pass."""
    (group,) = groups_of(tokenizer, [["Paris"]])
    work = Work([group], [], 50, 1000, {"rollout": 1.0, "update": 2.0, "reference": 1.0})
    alone = SimpleNamespace(sum=list, device=CPU)
    for iterations, updates in ((1, 1), (1, 2), (3, 1), (3, 2)):
        config = Config(num_iterations=iterations, prompts_per_step=2, minibatch_prompts=2 // updates)
        metrics = speed_metrics(work, config, alone)
        passes = 2 + 2 * (updates > 1) + 6 * iterations
        assert metrics["step_flops"] == 1000 * (2 * group.tokens + passes * 50)
        assert metrics["update/tokens_per_s"] == iterations * 25


def test_think_rate_and_empty_rate(tokenizer):
    """A thought counts where it is closed and not blank; empty is what says [], nothing else."""
    thought, none = "<think>x</think>", "<tool_call>[]</tool_call>"
    calls = '<tool_call>[{"name": "f", "arguments": {}}]</tool_call>'
    replies = [
        [thought + calls, thought + none, thought + "<tool_call>[", thought],
        ["<think> </think>" + none, none, "<think>x", "[]"],
    ]
    groups = [
        replace(group, rewards=tuple(score(text, []) for text in group.texts))
        for group in groups_of(tokenizer, replies)
    ]
    metrics = rollout_metrics(groups, ALONE)
    assert metrics["think_rate"] == 4 / 8 and metrics["empty_rate"] == 3 / 8
    assert metrics["correct_rate"] == 3 / 8 and metrics["format_rate"] == 2 / 8 and metrics["reward"] == 1 / 8
    assert metrics["completions/clipped_ratio"] == 1 / 8
