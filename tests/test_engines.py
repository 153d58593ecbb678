"""Every rollout engine gives the slow loop's greedy tokens, and samples that follow the model's softmax."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from corpus.tiny_model import build_tiny_tokenizer
from kernel import decode, grid
from kernel.attention import use_attention
from kernel.decode import Prompt, Reply
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


def sample(model, engine, copies, temperature, new, stops, prompts=PROMPTS, rows=1000) -> list[Reply]:
    """Replies of prompt 1 copy 1, prompt 1 copy 2, …"""
    replies = dict(ENGINES[engine](model, prompts, copies, temperature, new, stops, rows))
    assert sorted(replies) == list(range(len(prompts)))
    return [reply for k in range(len(prompts)) for reply in replies[k]]


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
    rows = sample(model, engine, 1, 0.0, 20, STOPS)
    assert [ids for ids, _ in rows] == slow
    assert len({len(ids) for ids in slow}) > 2, "rows do finish at different times"
    assert_trainers_logprobs(model, rows, 1, 1.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_log_probs_of_samples_are_the_trainers_before_and_after_an_update(engine):
    """A kept prompt cache would answer with the old weights: transformers' persistent manager does."""
    model = peaked_model("Qwen2")
    for _ in range(2):
        rows = sample(model, engine, 3, 0.7, 20, STOPS)
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
        rows = sample(model, engine, n, temperature, 1, STOPS, [prompt], n)
    counts = torch.bincount(torch.tensor([ids[0] for ids, _ in rows]), minlength=VOCABULARY).double()
    assert chi_square(counts, F.softmax(logits / temperature, -1)) < 4
    assert chi_square(counts, F.softmax(logits, -1)) > 8, "without the temperature"


class Tape(TorchDispatchMode):
    """Writes down every operator that runs, with its very tensors: on a CPU what a CUDA graph is on a GPU.

    A replay runs the same operators on the same tensors, and puts results where they were. What Python has
    done in between is not repeated: any number that it passed, and any tensor that has moved, is as it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert operator is not torch.ops.aten._local_scalar_dense.default, "the host waits for a value"
        result = operator(*args, **kwargs or {})
        self.calls.append((operator, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for operator, args, kwargs, result in self.calls:
            again = operator(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def taped(monkeypatch):
    """The CUDA policy of the default engine, with graphs, on this CPU -> how many were captured, replayed."""
    counts = {"captured": 0, "replayed": 0}

    def capture(function):
        counts["captured"] += 1
        with Tape() as tape:
            output = function()

        def replay():
            counts["replayed"] += 1
            tape.replay()

        return replay, output

    monkeypatch.setattr(decode, "capture", capture)
    monkeypatch.setattr(decode, "on_gpu", lambda device: True)
    monkeypatch.setattr(decode.Replayed, "works", True)
    return counts


SIZES = [  # and how many rows are decoded at once: 24 are wanted, 4 of each prompt
    (4, dict(CPU_PREFILL_TOKENS=1)), (24, dict(CPU_PREFILL_TOKENS=20)), (16, dict(KEEP_SHARE=0.0)),
    (16, dict(KEEP_SHARE=1.0)), (24, dict(KEEP_SHARE=1.0, ROOM=1)), (8, dict(ROOM=8)),
    (12, dict(PASS_TOKENS=7)), (8, dict(CPU_READ=1)),
    (16, dict(PASS_TOKENS=3, ROOM=1, KEEP_SHARE=1.0)), (20, dict(CUDA_STEPS_PER_CHECK=1)),
    (12, dict(CUDA_STEPS_PER_CHECK=5, ROOM=1)), (24, dict(CHOICE_BLOCK=7, CHOICE_MOST=8)),
]


@pytest.fixture(scope="module")
def samples(model):
    """As they are with the usual sizes: some outgrow every block and pass below, and some end early."""
    rows = sample(model, "shared_prefix", 4, 1.0, 40, STOPS[:1])
    lengths = [len(ids) for ids, _ in rows]
    assert max(lengths) == 40 and min(lengths) < 10
    return rows


@pytest.mark.parametrize(("rows", "sizes"), SIZES, ids=str)
@pytest.mark.parametrize("graphs", [False, True])
def test_no_size_changes_a_sample(model, samples, monkeypatch, request, graphs, rows, sizes):
    """Neither how many rows are decoded at once, nor when groups enter and leave, nor what a GPU replays."""
    counts = request.getfixturevalue("taped") if graphs else {}
    for name, value in sizes.items():
        monkeypatch.setattr(decode if hasattr(decode, name) else grid, name, value)
    found = sample(model, "shared_prefix", 4, 1.0, 40, STOPS[:1], rows=rows)
    assert [ids for ids, _ in found] == [ids for ids, _ in samples]
    for (_, some), (_, others) in zip(found, samples):
        assert_close(some, others, atol=2e-5, rtol=0)
    assert not graphs or counts["replayed"] > counts["captured"] > 0


def test_a_shape_is_captured_once(model, monkeypatch, taped):
    """Sizes are halved, so rows that end one by one cost few graphs; those that go on are all kept."""
    with monkeypatch.context() as patch:
        patch.setattr(decode, "on_gpu", lambda device: False)
        expected = sample(model, "shared_prefix", 8, 1.0, 60, STOPS[:4])
    monkeypatch.setattr(decode, "CUDA_STEPS_PER_CHECK", 1)
    monkeypatch.setattr(grid, "ROOM", 16)
    shapes = []
    real = decode.advance

    def noted(model, batch):
        shapes.append(batch.shape)
        return real(model, batch)

    monkeypatch.setattr(decode, "advance", noted)
    found = sample(model, "shared_prefix", 8, 1.0, 60, STOPS[:4])
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    assert len({slots for _, slots, _, _ in shapes}) > 2, "slots are left out, too"
    assert 3 < len(set(shapes)) < 15 and taped["captured"] <= len(set(shapes)) < taped["replayed"]
    assert len(shapes) - taped["captured"] == len(set(shapes)), "and each runs once without a graph"


def test_a_tensor_that_has_moved_is_captured_anew(taped):
    places = [torch.ones(3)]
    step = decode.Replayed(lambda: 2 * places[0], True)
    for value in (1.0, 2.0, 3.0):
        places[0].fill_(value)
        assert step(lambda: places).tolist() == [2 * value] * 3
    assert taped == {"captured": 1, "replayed": 2}
    places[0] = torch.full((3,), 5.0)
    assert [step(lambda: places).tolist() for _ in range(2)] == [[10.0] * 3] * 2
    assert taped["captured"] == 2


def test_graphs_are_off_by_name(model, samples, taped):
    found = sample(model, "shared_prefix_eager", 4, 1.0, 40, STOPS[:1])
    assert [ids for ids, _ in found] == [ids for ids, _ in samples]
    assert not taped["captured"]


def test_a_step_that_cannot_be_captured_runs_as_it_is(model, monkeypatch, taped):
    """With one warning, and the same samples; but a lack of memory is the caller's: fewer rows may do."""
    expected = sample(model, "shared_prefix_eager", 2, 1.0, 20, STOPS, rows=4)
    tried = []

    def fails(function):
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode, "capture", fails)
    with pytest.warns(UserWarning, match="without CUDA graphs.*not permitted"):
        assert sample(model, "shared_prefix", 2, 1.0, 20, STOPS, rows=4) == expected
    sample(model, "shared_prefix", 2, 1.0, 20, STOPS)
    assert len(tried) == 1, "nor is it tried again"

    def too_much(function):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(decode.Replayed, "works", True)
    monkeypatch.setattr(decode, "capture", too_much)
    with pytest.raises(torch.OutOfMemoryError):
        sample(model, "shared_prefix", 2, 1.0, 20, STOPS)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    "change",
    [lambda batch, width: batch.mask[..., :width].zero_(),
     lambda batch, width: batch.mask[..., width:].zero_(),
     lambda batch, width: [x.copy_(x.flip(0)) for x in batch.prompt_k],
     lambda batch, width: batch.start.add_(1)],
    ids=["padding of prompts is seen", "tokens to come are seen", "a row has another row's prompt",
         "positions are off by one"],
)
def test_a_wrong_cache_is_noticed(model, monkeypatch, request, change, graphs):
    """The comparison with the slow loop would see each of these."""
    if graphs:
        request.getfixturevalue("taped")
    real = decode.admit

    def broken(model, batch, *args):
        result = real(model, batch, *args)
        change(batch, batch.shape[2])
        return result

    monkeypatch.setattr(decode, "admit", broken)
    rows = sample(model, "shared_prefix", 1, 0.0, 20, STOPS)
    assert [ids for ids, _ in rows] != [one_by_one(model, prompt.ids, 20) for prompt in PROMPTS]


def test_a_place_of_the_batch_is_filled_again_before_the_longest_reply_has_ended(model, monkeypatch):
    """Rows are not held up by the longest reply: fewer steps than with one batch after the other."""
    lengths = [len(ids) for ids, _ in sample(model, "shared_prefix", 1, 1.0, 40, STOPS[:1])]
    order = sorted(range(len(PROMPTS)), key=lambda i: -len(PROMPTS[i].ids))  # as they enter
    batches = [max(lengths[i] for i in order[k : k + 2]) for k in range(0, len(order), 2)]
    steps = []
    real = decode.advance
    monkeypatch.setattr(decode, "advance", lambda *args: steps.append(1) or real(*args))
    sample(model, "shared_prefix", 1, 1.0, 40, STOPS[:1], rows=2)
    assert len(steps) < sum(batches) - len(batches)


@pytest.mark.parametrize("size", [5, 256, 4096, 4097, 6000])
def test_a_token_is_drawn_where_the_running_sum_passes_the_number(size):
    """Also from weights that are mostly 0, and with numbers next to 0 and 1: a weight of 0 is never drawn."""
    generator = torch.Generator().manual_seed(size)
    weights = torch.rand(400, size, generator=generator)
    weights = weights * (torch.rand(400, size, generator=generator) < torch.rand(400, 1, generator=generator))
    weights[:, size // 2] = 1e-3
    uniform = torch.rand(400, 1, generator=generator, dtype=torch.float64)
    uniform[:20], uniform[20:40] = 0.0, 1 - 2**-53
    diverged, _ = decode.inverse_cdf(torch.full((2, size), torch.nan), uniform[:2])
    assert ((diverged >= 0) & (diverged < size)).all(), "NaN: for the update to report"
    token, total = decode.inverse_cdf(weights, uniform)
    cdf = weights.double().cumsum(-1)
    assert (weights.gather(-1, token) > 0).all()
    assert_close(total, cdf[:, -1].float())
    goal, upper = uniform * cdf[:, -1:], cdf.gather(-1, token)
    near = 1e-6 * cdf[:, -1:]
    assert (goal <= upper + near).all() and (goal >= upper - weights.gather(-1, token) - near).all()


def test_a_partial_result_of_continuous_batching_is_an_error(model, monkeypatch):
    """The library prints its exception, returns what it has, and says nothing."""
    real = model.generate_batch
    monkeypatch.setattr(model, "generate_batch", lambda *a, **k: dict(list(real(*a, **k).items())[1:]))
    with pytest.raises(EngineError, match="returned 11 of 12 completions"):
        sample(model, "continuous_batching", 2, 1.0, 4, STOPS)


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
