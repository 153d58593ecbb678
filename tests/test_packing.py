"""kernel/packing.py and kernel/attention.py: packed groups give the numbers and gradients of plain passes.

The slow, obvious version is `one_by_one`: transformers' own causal attention over a single prompt + response.
"""

import inspect
import sys
import types
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.testing import assert_close

from kernel import attention
from kernel.attention import shared_prefix_attention, use_attention, uses_shared_prefix
from kernel.packing import micro_batches, pack
from model import prepare_model, token_logprobs

CPU = torch.device("cpu")
VOCAB, TEMPERATURE = 60, 0.7

# Families that run on packed groups, and those that cannot, with the reason that must be given.
SHARED = {"Qwen2": {}, "Qwen3": {"head_dim": 8}, "Llama": {}}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
PLAIN = {
    "Qwen2": (WINDOW, "layers of sliding_attention"),
    "Mistral": ({"sliding_window": 16}, "attention uses sliding_window"),  # longer than what is tried
    "Gemma2": ({"head_dim": 8, "layer_types": ["full_attention"] * 2}, "attention uses softcap"),
    "Falcon": ({}, "nats off"),  # has an attention of its own, which the interface does not reach
}

# (prompt length, response lengths): uneven, with a prompt, a response and a group of one.
SHAPES = [(7, [3, 1, 5]), (1, [4, 4]), (12, [2]), (4, [1, 9, 2, 6])]


def random_model(family: str, gradient_checkpointing: bool = False, **settings):
    """A random model whose 4 heads share 2 key/value heads; its attention is sharp, so wrong keys show."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        **{"tie_word_embeddings": False} | SHARED.get(family, {}) | settings,
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    return prepare_model(model, CPU, gradient_checkpointing).train()


def random_groups(shapes=SHAPES) -> list[tuple[list[int], list[list[int]]]]:
    generator = torch.Generator().manual_seed(2)
    draw = lambda size: torch.randint(VOCAB, (size,), generator=generator).tolist()  # noqa: E731
    return [(draw(length), [draw(size) for size in sizes]) for length, sizes in shapes]


def one_by_one(model, groups, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of all response tokens, with one plain forward pass per prompt + response."""
    use_attention(model, "generate")
    logprobs, entropies = [], []
    for prompt, responses in groups:
        for response in responses:
            logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0].float()
            for i, token in enumerate(response):
                distribution = F.log_softmax(logits[len(prompt) + i - 1] / temperature, -1)
                logprobs.append(distribution[token])
                entropies.append(-(distribution.exp() * distribution).sum())
    use_attention(model, "train")
    return torch.stack(logprobs), torch.stack(entropies)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(fast: dict[str, torch.Tensor], slow: dict[str, torch.Tensor]) -> None:
    for name in slow:
        assert (fast[name] - slow[name]).norm() <= 1e-5 * slow[name].norm(), name


def advantages(groups) -> torch.Tensor:
    """A different weight per response token."""
    return torch.linspace(-1, 2, sum(len(r) for _, responses in groups for r in responses))


def assert_equals_one_by_one(model, plain, groups, temperature: float = TEMPERATURE, **options) -> None:
    """Log-probs, entropies and gradients of the packed groups, for two models with the same weights."""
    fast, entropy = token_logprobs(model, pack(groups, CPU, **options), temperature)
    slow, slow_entropy = one_by_one(plain, groups, temperature)
    assert fast.dtype == torch.float32 and not entropy.requires_grad
    assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    assert_close(entropy, slow_entropy.detach(), atol=1e-5, rtol=1e-5)
    fast, slow = ((x * advantages(groups)).sum() for x in (fast, slow))
    assert_same_gradients(gradients(model, fast), gradients(plain, slow))


@pytest.mark.parametrize(("tied", "temperature"), [(False, TEMPERATURE), (True, 1.0)])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("family", SHARED)
def test_packed_groups_equal_one_by_one(family, gradient_checkpointing, tied, temperature):
    """A prompt is computed once but belongs to G sequences: its gradient must be the sum over all of them."""
    model = random_model(family, gradient_checkpointing, tie_word_embeddings=tied)
    assert uses_shared_prefix(model)
    plain = random_model(family, tie_word_embeddings=tied)
    assert_equals_one_by_one(model, plain, random_groups(), temperature)


@pytest.mark.parametrize("block", [2, 4, 5])
def test_prompts_in_blocks_of_queries_give_the_same(block, monkeypatch):
    """Blocks that divide the prompts of SHAPES evenly, unevenly and not at all."""
    monkeypatch.setattr(attention, "CAUSAL_BLOCK", block)
    assert_equals_one_by_one(random_model("Qwen2"), random_model("Qwen2"), random_groups())


def causal(by: int = 0):
    """A mask in which every query sees `by` keys more, or fewer."""
    return lambda queries, keys, like: torch.full((queries, keys), -torch.inf).triu(keys - queries + 1 + by)


def without_first(queries: int, keys: int, like: torch.Tensor) -> torch.Tensor:
    return causal()(queries, keys, like).index_fill(1, torch.tensor([0]), -torch.inf)


MASKS = {"the future is seen": causal(1), "a token does not see itself": causal(-1),
         "the prompt's first token is not seen": without_first}
FIELDS = {
    "positions run on": lambda p: {"positions": torch.arange(p.ids.shape[1])[None]},
    "long responses are one position too far": lambda p: {"positions": p.positions + (p.positions >= 7)},
    "the predictor is the token itself": lambda p: {"predict": p.predict + 1},
    "the predictor is one too early": lambda p: {"predict": (p.predict - 1).clamp(min=0)},
}


@pytest.mark.parametrize("broken", [*MASKS, *FIELDS])
def test_the_comparison_notices_whatever_is_broken(broken, monkeypatch):
    model, groups = random_model("Qwen2"), random_groups()
    slow, _ = one_by_one(model, groups, TEMPERATURE)
    right = pack(groups, CPU)
    monkeypatch.setattr(attention, "causal_mask", causal())
    assert (token_logprobs(model, right, TEMPERATURE)[0] - slow).abs().max() < 1e-5
    monkeypatch.setattr(attention, "causal_mask", MASKS.get(broken, causal()))
    wrong = replace(right, **FIELDS.get(broken, lambda p: {})(right))
    assert (token_logprobs(model, wrong, TEMPERATURE)[0] - slow).abs().max() > 1e-2


def test_a_packed_group_in_full():
    """Positions restart after the prompt, whose last token predicts 20 and 30."""
    packed = pack([([10, 11, 12], [[20, 21], [30]])], CPU)
    assert packed.ids.tolist() == [[10, 11, 12, 20, 21, 30]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert packed.target.tolist() == [20, 21, 30] and packed.counts.tolist() == [2, 1]
    assert packed.predict.tolist() == [2, 3, 2]
    # segments: the prompt, then each response, whose keys are the prompt's and its own
    assert packed.layout.cu_q.tolist() == [0, 3, 5, 6]
    assert packed.layout.cu_k.tolist() == [0, 3, 8, 12]
    assert packed.layout.kv_index.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5]
    assert (packed.layout.max_q, packed.layout.max_k) == (3, 5)


def test_the_same_group_as_plain_rows():
    """Right-padded with 0, a token that nothing predicts and that no real token can see."""
    packed = pack([([10, 11, 12], [[20, 21], [30]])], CPU, share_prompt=False)
    assert packed.ids.tolist() == [[10, 11, 12, 20, 21], [10, 11, 12, 30, 0]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert packed.target.tolist() == [20, 21, 30] and packed.counts.tolist() == [2, 1]
    assert packed.predict.tolist() == [2, 3, 5 + 2] and packed.layout is None


@pytest.mark.parametrize("group", [([], [[1]]), ([1], [[2], []])])
def test_empty_prompts_and_responses_are_refused(group):
    with pytest.raises(ValueError, match="at least one token"):
        pack([group], CPU)


def responses_of(sizes, batches):
    """The (group, response) pairs in the order of the micro-batches."""
    return [(i, k) for batch in batches for i, part in batch for k in range(len(sizes[i][1]))[part]]


def test_groups_fill_micro_batches_in_order_and_are_cut_where_they_must_be():
    sizes = [(2, [1]), (2, [1]), (1, [1, 1]), (4, [2])]  # 3, 3, 3 and 6 tokens
    whole = [(0, slice(0, 1)), (1, slice(0, 1)), (2, slice(0, 2)), (3, slice(0, 1))]
    assert micro_batches(sizes, 6) == [whole[:2], whole[2:3], whole[3:]]
    # 4 + 2 + 2 fit into 8, another 2 do not; the group behind it fits beside the last part
    cut = [[(0, slice(0, 2))], [(0, slice(2, 3)), (1, slice(0, 1))]]
    assert micro_batches([(4, [2, 2, 2]), (1, [1])], 8) == cut
    # a response above the budget stands alone
    assert micro_batches([(4, [1, 9, 1])], 8) == [[(0, slice(0, 1))], [(0, slice(1, 2))], [(0, slice(2, 3))]]


def test_plain_rows_are_counted_with_their_padding():
    # rows of 5 and 3 tokens: 10 with padding, though only 8 tokens
    assert len(micro_batches([(2, [3, 1])], 8)) == 1
    assert len(micro_batches([(2, [3, 1])], 8, share_prompt=False)) == 2
    assert len(micro_batches([(2, [3]), (2, [1])], 10, share_prompt=False)) == 1


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("budget", [1, 16, 17, 1000])
def test_micro_batches_change_neither_loss_nor_gradients(budget, share_prompt):
    """Every response once, in order, within the budget where possible; the sums are those of one batch."""
    groups, model = random_groups(), random_model("Llama")
    sizes = [(len(prompt), [len(r) for r in responses]) for prompt, responses in groups]
    batches = micro_batches(sizes, budget, share_prompt)
    assert responses_of(sizes, batches) == [(i, k) for i, (_, r) in enumerate(sizes) for k in range(len(r))]
    packed = []
    for batch in batches:
        packed.append(pack([(groups[i][0], groups[i][1][part]) for i, part in batch], CPU, share_prompt))
        assert packed[-1].ids.numel() <= budget or len(responses_of(sizes, [batch])) == 1
    use_attention(model, "train" if share_prompt else "generate")
    parts = [token_logprobs(model, micro, TEMPERATURE)[0] for micro in packed]
    fast = gradients(model, (torch.cat(parts) * advantages(groups)).sum())
    use_attention(model, "train")
    whole = token_logprobs(model, pack(groups, CPU), TEMPERATURE)[0]
    assert_same_gradients(fast, gradients(model, (whole * advantages(groups)).sum()))


@pytest.mark.parametrize("family", PLAIN)
def test_other_models_are_trained_on_plain_rows_and_say_so_once(family):
    settings, reason = PLAIN[family]
    with pytest.warns(UserWarning, match=reason) as caught:
        model = random_model(family, **settings)
    assert len(caught) == 1 and not uses_shared_prefix(model)
    groups = random_groups([*SHAPES, (9, [14, 3])])  # longer than any window
    assert_equals_one_by_one(model, model, groups, share_prompt=False)
    with pytest.raises(ValueError, match="share_prompt=uses_shared_prefix"):
        token_logprobs(model, pack(groups, CPU), TEMPERATURE)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("family", SHARED)
def test_the_last_layer_computes_for_predicting_tokens_only(family, gradient_checkpointing, monkeypatch):
    model, groups = random_model(family, gradient_checkpointing), random_groups()
    rows, queries, sdpa = {}, [], F.scaled_dot_product_attention

    def note(part, inputs):
        rows.setdefault(part, set()).add(inputs[0].shape[1])

    def noting_sdpa(query, *args, **kwargs):
        queries.append(query.shape[2])
        return sdpa(query, *args, **kwargs)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(note)
        layer.mlp.down_proj.register_forward_pre_hook(note)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noting_sdpa)
    packed = pack(groups, CPU)
    logprobs = token_logprobs(model, packed, TEMPERATURE)[0]
    prompts = queries[::2]  # a group's prompt, then its responses
    assert prompts == [*(len(prompt) for prompt, _ in groups), *[1] * len(groups)]
    logprobs.sum().backward()  # checkpointing computes it all again
    needed = sum(1 + sum(len(r) - 1 for r in responses) for _, responses in groups)
    assert [*rows.values()] == [{packed.ids.numel()}] * 2 + [{needed}] * 2


def test_a_window_that_no_layer_uses_is_no_reason():
    """Qwen2's config has a window from layer max_window_layers on, and most checkpoints have fewer layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = random_model("Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2)
    assert uses_shared_prefix(model)


def test_capped_logits_are_capped_in_the_log_probs_too():
    """Gemma 2 puts a tanh behind its LM head: log-probs of the head alone would be silently wrong."""
    with pytest.warns(UserWarning, match="logits are not its LM head's output alone"):
        model = random_model("Gemma2", head_dim=8, final_logit_softcapping=3.0)
    groups = random_groups()
    logprobs = token_logprobs(model, pack(groups, CPU, share_prompt=False), TEMPERATURE)[0]
    assert_close(logprobs, one_by_one(model, groups, TEMPERATURE)[0], atol=1e-5, rtol=1e-5)
    assert logprobs.min() >= -2 * 3.0 / TEMPERATURE - torch.tensor(VOCAB).log()


def slow_varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What torch.nn.attention.varlen.varlen_attn promises, one query at a time. [total, H, D] each."""
    assert window_size == (-1, 0), "causal: any number of keys to the left, none to the right"
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    assert len(key) == len(value) == cu_k[-1] and len(query) == cu_q[-1]
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    output = []
    for (q0, q1), (k0, k1) in zip(zip(cu_q[:-1], cu_q[1:]), zip(cu_k[:-1], cu_k[1:])):
        for i in range(q0, q1):
            seen = slice(k0, k1 - (q1 - 1 - i))  # aligned to the bottom right: the last query sees every key
            scores = torch.einsum("hd,khd->hk", query[i], key[seen]) * scale
            output.append(torch.einsum("hk,khd->hd", scores.softmax(-1), value[seen]))
    return torch.stack(output)


def older_varlen_attn(*tensors, scale, window_size):
    """torch 2.11's, which takes fewer key heads as they come and has no option for it."""
    return slow_varlen_attn(*tensors, scale=scale, window_size=window_size, enable_gqa=True)


def flash_attn_varlen_func(*tensors, softmax_scale, causal, deterministic):
    """The flash-attn package's, which takes fewer key heads as they come."""
    assert causal
    return slow_varlen_attn(*tensors, scale=softmax_scale, window_size=(-1, 0), enable_gqa=True)


@pytest.mark.parametrize("kernel", [slow_varlen_attn, older_varlen_attn, flash_attn_varlen_func])
def test_the_variable_length_form_equals_the_cpu_form(kernel, monkeypatch):
    """CUDA kernels cannot run here, but what is handed to them (indices, lengths, heads) can be checked."""
    if kernel is flash_attn_varlen_func:
        monkeypatch.setattr(attention, "attention_backend", lambda device: "flash_attn")
        monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=kernel))
    else:
        varlen = pytest.importorskip("torch.nn.attention.varlen")
        assert {"scale", "window_size"} <= set(inspect.signature(varlen.varlen_attn).parameters)
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
    layout, generator = pack(random_groups(), CPU).layout, torch.Generator().manual_seed(3)
    total = int(layout.cu_q[-1])
    query, key, value, weights = (torch.randn(total, heads, 8, generator=generator) for heads in (4, 2, 2, 4))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    varlen_form = attention._varlen_attention(query, key, value, 0.5, layout)
    transposed = (x.transpose(0, 1)[None] for x in (query, key, value))
    cpu_form = shared_prefix_attention(None, *transposed, None, scaling=0.5, layout=layout)[0][0]
    assert_close(varlen_form, cpu_form, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), inputs) for x in (varlen_form, cpu_form))
    for one, other in zip(ours, theirs):
        assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_prompts_gradient_is_added_in_fp32():
    """In bf16, a sum of 601 equal parts would stop growing at 256."""
    layout = pack([([1, 2], [[3]] * 600)], CPU).layout
    x = torch.zeros(602, 1, 1, requires_grad=True)
    rows = attention._GatherSegments.apply(x, torch.bfloat16, layout.kv_index, layout.by_source, layout.uses)
    assert rows.dtype == torch.bfloat16
    rows.backward(torch.ones_like(rows))
    assert x.grad.flatten().tolist() == [601.0, 601.0] + [1.0] * 600
