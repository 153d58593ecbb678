"""Every rollout engine gives the slow loop's greedy tokens, and samples that follow the model's softmax."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.testing import assert_close

from corpus.tiny_model import build_tiny_tokenizer
from kernel import decode
from kernel.attention import use_attention
from kernel.decode import Prompt, shared_prefix
from kernel.hf_engines import EngineError
from kernel.packing import pack
from model import prepare_model, token_logprobs
from rollout import ENGINES, Decoding, sample_groups

VOCABULARY = 50
STOPS = list(range(3, VOCABULARY, 6))
FAMILIES = {"Qwen2": {}, "Qwen3": {"head_dim": 16}, "Llama": {}}  # Qwen3: heads wider than hidden / heads


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [Prompt(f"p{i}", random_ids(n, i), 100 + i) for i, n in enumerate([5, 1, 17, 9, 2, 30])]


def random_model(family: str, engine: str = "shared_prefix", **settings):
    shape = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, eos_token_id=3,
        num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=None, pad_token_id=None,
    )
    config = getattr(transformers, f"{family}Config")(**{"vocab_size": VOCABULARY} | shape | settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    return prepare_model(model, torch.device("cpu"), engine=engine).eval()


def peaked_model(family: str):
    model = random_model(family, **FAMILIES[family])
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.add_(0.25 * torch.randn_like(weight))
    return model


@pytest.fixture(scope="module")
def model():
    return peaked_model("Qwen2")


def one_by_one(model, prompt: list[int], max_new_tokens: int, stops: Sequence[int] = STOPS) -> list[int]:
    """Greedy decoding that computes everything anew for each token."""
    use_attention(model, "generate")
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens:
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


def assert_trainers_logprobs(model, rows, copies: int, temperature: float) -> None:
    use_attention(model, "train")
    groups = [(p.ids, [ids for ids, _ in rows[i * copies : (i + 1) * copies]]) for i, p in enumerate(PROMPTS)]
    with torch.no_grad():
        slow = token_logprobs(model, pack(groups, torch.device("cpu")), temperature)[0]
    assert_close(torch.tensor([x for _, chances in rows for x in chances]), slow, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_the_slow_loop(family, engine):
    model = peaked_model(family)
    slow = [one_by_one(model, prompt.ids, 20) for prompt in PROMPTS]
    rows = ENGINES[engine](model, PROMPTS, 1, 0.0, 20, STOPS)
    assert [ids for ids, _ in rows] == slow
    assert len({len(ids) for ids in slow}) > 2, "rows do finish at different times"
    assert_trainers_logprobs(model, rows, 1, 1.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_log_probs_of_samples_are_the_trainers_before_and_after_an_update(engine):
    """A kept prompt cache would answer with the old weights: transformers' persistent manager does."""
    model = peaked_model("Qwen2")
    for _ in range(2):
        rows = ENGINES[engine](model, PROMPTS, 3, 0.7, 20, STOPS)
        assert len(rows) == 3 * len(PROMPTS)
        assert_trainers_logprobs(model, rows, 3, 0.7)
        for ids, _ in rows:
            assert not set(ids[:-1]) & set(STOPS) and (len(ids) == 20 or ids[-1] in STOPS)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.1)


def chi_square(counts: torch.Tensor, distribution: torch.Tensor) -> float:
    """Pearson's statistic in units of its standard deviation, over tokens expected 5 times or more."""
    expected = distribution * counts.sum()
    often = expected >= 5
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
    freedom = int(often.sum()) - 1
    return float((chi2 - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_follow_the_softmax_whatever_the_models_own_defaults_say(model, engine, monkeypatch):
    """generate() silently inherits them; Qwen2.5-Instruct has top_k 20, top_p 0.8, a repetition penalty."""
    prompt, temperature, n = PROMPTS[2], 0.7, 1200
    use_attention(model, "generate")
    with torch.no_grad():
        logits = model(torch.tensor([prompt.ids])).logits[0, -1].double()
    defaults = dict(do_sample=True, top_k=5, top_p=0.5, repetition_penalty=1.5, temperature=0.3, min_p=0.2)
    defaults |= dict(epsilon_cutoff=0.1, no_repeat_ngram_size=1, suppress_tokens=[5])
    with monkeypatch.context() as patch:
        for name, value in defaults.items():
            patch.setattr(model.generation_config, name, value)
        rows = ENGINES[engine](model, [prompt], n, temperature, 1, STOPS)
    counts = torch.bincount(torch.tensor([ids[0] for ids, _ in rows]), minlength=VOCABULARY).double()
    assert chi_square(counts, F.softmax(logits / temperature, -1)) < 4
    assert chi_square(counts, F.softmax(logits, -1)) > 8, "without the temperature"


@pytest.mark.parametrize(
    ("setting", "value"), [("PREFILL_TOKENS", 1), ("PREFILL_TOKENS", 20), ("KEEP_SHARE", 0.0),
                           ("KEEP_SHARE", 1.0), ("BLOCK", 1), ("BLOCK", 8)],
)
def test_neither_prefill_rows_nor_blocks_nor_dropping_change_a_sample(model, monkeypatch, setting, value):
    expected = shared_prefix(model, PROMPTS, 4, 1.0, 40, STOPS[:1])
    assert max(len(ids) for ids, _ in expected) > 30, "responses outgrow several blocks"
    monkeypatch.setattr(decode, setting, value)
    if setting == "BLOCK":  # random numbers come in blocks, too: those must stay as they were
        monkeypatch.setattr(decode, "uniform_numbers", in_blocks_of_64)
    rows = shared_prefix(model, PROMPTS, 4, 1.0, 40, STOPS[:1])
    assert [ids for ids, _ in rows] == [ids for ids, _ in expected]


def in_blocks_of_64(prompts, copies, device):
    generators = [torch.Generator().manual_seed(p.seed) for p in prompts]
    while True:
        yield from torch.cat([torch.rand(copies, 64, generator=g, dtype=torch.float64) for g in generators]).T


@pytest.mark.parametrize(
    "change",
    [lambda cache: cache.prompt_mask.zero_(), lambda cache: cache.own_mask.zero_(),
     lambda cache: [x.copy_(x.flip(0)) for x in cache.prompt_k]],
    ids=["padding of prompts is seen", "tokens to come are seen", "a row has another row's prompt"],
)
def test_a_wrong_cache_is_noticed(model, monkeypatch, change):
    """The comparison with the slow loop would see each of these."""
    real = decode._prefill

    def broken(*args):
        cache, logits = real(*args)
        change(cache)
        return cache, logits

    monkeypatch.setattr(decode, "_prefill", broken)
    rows = shared_prefix(model, PROMPTS, 1, 0.0, 20, STOPS)
    assert [ids for ids, _ in rows] != [one_by_one(model, prompt.ids, 20) for prompt in PROMPTS]


def test_a_partial_result_of_continuous_batching_is_an_error(model, monkeypatch):
    """The library prints its exception, returns what it has, and says nothing."""
    real = model.generate_batch
    monkeypatch.setattr(model, "generate_batch", lambda *a, **k: dict(list(real(*a, **k).items())[1:]))
    with pytest.raises(EngineError, match="returned 11 of 12 completions"):
        ENGINES["continuous_batching"](model, PROMPTS, 2, 1.0, 4, STOPS)


@pytest.mark.parametrize("engine", ["shared_prefix", "continuous_batching"])
def test_an_engine_that_leaves_out_a_cap_is_not_used(engine):
    """Continuous batching hands no soft cap to its attention: samples of another model, without a word."""
    settings = dict(
        head_dim=8, attn_logit_softcapping=0.2, final_logit_softcapping=None, initializer_range=0.3,
        layer_types=["full_attention"] * 2,
    )
    with pytest.warns(UserWarning, match="softcap"):
        model = random_model("Gemma2", engine=engine, **settings)
    decoding = Decoding(1, 1.0, 5, 4, engine)
    [group] = sample_groups(model, build_tiny_tokenizer(["a"], 300), PROMPTS[2:3], decoding)
    packed = pack([(group.prompt.ids, group.responses)], torch.device("cpu"), share_prompt=False)
    truth = token_logprobs(model, packed, 1.0)[0]
    assert_close(torch.tensor(group.logprobs[0]), truth.detach(), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "settings"),
    [("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=0)),
     ("Granite", dict(logits_scaling=4.0))],
)
def test_what_the_default_engine_cannot_do_is_sampled_by_generate(family, settings, monkeypatch):
    """It has full attention and applies the head alone: a window or a scale would be silently ignored."""
    model = random_model(family, vocab_size=300, **settings)
    called = []
    for name, engine in list(ENGINES.items()):
        counted = lambda *args, name=name, engine=engine: called.append(name) or engine(*args)  # noqa: E731
        monkeypatch.setitem(ENGINES, name, counted)
    tokenizer, prompt = build_tiny_tokenizer(["a"], 300), Prompt("long", random_ids(30, 1))
    decoding = Decoding(group_size=1, temperature=0, max_new_tokens=10, batch_size=4)
    [group] = sample_groups(model, tokenizer, [prompt], decoding)
    assert called == ["generate"]
    assert group.responses[0][:10] == one_by_one(model, prompt.ids, 10, stops=())
