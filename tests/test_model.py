"""model.py: packed groups give the numbers of plain one-by-one forward passes, and models survive export and reload.

The slow, obvious version is `one_by_one`: transformers' own causal attention over a single prompt + response.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import model as model_module
from model import (
    ModelError,
    build_tiny_model,
    build_tiny_tokenizer,
    count_parameters,
    export,
    load_model,
    load_tokenizer,
    pack,
    prepare_model,
    shared_prefix_attention,
    split_by_tokens,
    token_logprobs,
    use_attention,
)
from prompts import END_TOKENS, TAGS, render_completion, stop_ids

torch.set_num_threads(1)

CPU = torch.device("cpu")
VOCAB, TEMPERATURE = 60, 0.7
FAMILIES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}

# (prompt length, response lengths): uneven everywhere, and every shortest case: a prompt of one token, a response of
# one token, a group of one response.
SHAPES = [(7, [3, 1, 5]), (1, [4, 4]), (12, [2]), (4, [1, 9, 2, 6])]


def random_model(family: str, gradient_checkpointing: bool = False):
    """A random model with 4 heads that share 2 key/value heads, and sharp attention, so that a wrong key is noticed."""
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(1)
    return prepare_model(model_class(config), CPU, gradient_checkpointing).train()


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


# ------------------------------------------------------------------------------------------------ packed log-probs


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logprobs_and_entropy_equal_one_by_one(family):
    model, groups = random_model(family), random_groups()
    logprobs, entropy = token_logprobs(model, pack(groups, CPU), TEMPERATURE)
    slow_logprobs, slow_entropy = one_by_one(model, groups, TEMPERATURE)
    assert logprobs.dtype == torch.float32 and logprobs.requires_grad and not entropy.requires_grad
    assert_close(logprobs, slow_logprobs, atol=1e-5, rtol=1e-5)
    assert_close(entropy, slow_entropy.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_one_by_one(family, gradient_checkpointing):
    """The prompt is computed once but belongs to G sequences: its gradient must be the sum over all of them."""
    model, plain, groups = random_model(family, gradient_checkpointing), random_model(family), random_groups()
    weights = torch.linspace(-1, 2, sum(len(r) for _, responses in groups for r in responses))  # an advantage per token
    fast = gradients(model, (token_logprobs(model, pack(groups, CPU), TEMPERATURE)[0] * weights).sum())
    slow = gradients(plain, (one_by_one(plain, groups, TEMPERATURE)[0] * weights).sum())
    for name in slow:
        assert (fast[name] - slow[name]).norm() <= 1e-5 * slow[name].norm(), name


def test_temperature_divides_the_logits():
    """Log-probs at another temperature than the sampler's are those of another policy."""
    model, groups = random_model("qwen2"), random_groups()
    at = {t: token_logprobs(model, pack(groups, CPU), t)[0] for t in (0.7, 1.0)}
    assert_close(at[1.0], one_by_one(model, groups, 1.0)[0], atol=1e-5, rtol=1e-5)
    assert (at[0.7] - at[1.0]).abs().max() > 0.1


@pytest.mark.parametrize("chunk", [1, 3, 37])
def test_the_chunk_size_of_the_head_changes_nothing(chunk):
    model, packed = random_model("qwen2"), pack(random_groups(), CPU)
    whole, parts = (token_logprobs(model, packed, TEMPERATURE, chunk=size) for size in (4096, chunk))
    assert_close(parts[0], whole[0], atol=1e-5, rtol=1e-5)
    assert_close(parts[1], whole[1], atol=1e-5, rtol=1e-5)
    fast, slow = gradients(model, parts[0].sum()), gradients(model, whole[0].sum())
    for name in slow:
        assert_close(fast[name], slow[name], atol=1e-4, rtol=1e-4)


def test_a_group_depends_on_no_other_group_and_a_response_on_no_other_response():
    model, groups = random_model("qwen2"), random_groups()
    together = token_logprobs(model, pack(groups, CPU), TEMPERATURE)[0]
    alone = [
        token_logprobs(model, pack([(prompt, [response])], CPU), TEMPERATURE)[0]
        for prompt, responses in groups
        for response in responses
    ]
    assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------- packing


def test_a_packed_group_in_full():
    """prompt [10 11 12], responses [20 21] and [30]: positions restart, and the prompt's last token predicts 20 and 30."""
    packed = pack([([10, 11, 12], [[20, 21], [30]])], CPU)
    assert packed.ids.tolist() == [[10, 11, 12, 20, 21, 30]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert packed.target.tolist() == [20, 21, 30]
    assert packed.predict.tolist() == [2, 3, 2]
    assert packed.counts.tolist() == [2, 1]
    # segments: the prompt, then each response, whose keys are the prompt's and its own
    assert packed.layout.cu_q.tolist() == [0, 3, 5, 6]
    assert packed.layout.cu_k.tolist() == [0, 3, 8, 12]
    assert packed.layout.kv_index.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5]
    assert (packed.layout.max_q, packed.layout.max_k) == (3, 5)


def test_the_first_response_token_is_predicted_by_the_prompts_last_position():
    model, prompt = random_model("qwen2"), [5, 6, 7]
    use_attention(model, "generate")
    after_prompt = F.log_softmax(model(torch.tensor([prompt])).logits[0, -1] / TEMPERATURE, -1)
    use_attention(model, "train")
    logprobs, _ = token_logprobs(model, pack([(prompt, [[8, 1], [9], [3, 3, 3]])], CPU), TEMPERATURE)
    assert_close(logprobs[[0, 2, 3]], after_prompt[[8, 9, 3]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group", [([], [[1]]), ([1], []), ([1], [[2], []])])
def test_empty_prompts_and_responses_are_refused(group):
    with pytest.raises(ValueError, match="at least one token"):
        pack([([1, 2], [[3]]), group], CPU)


def test_split_by_tokens():
    assert split_by_tokens([3, 3, 3], 6) == [[0, 1], [2]]
    assert split_by_tokens([3, 9, 3, 3], 6) == [[0], [1], [2, 3]], "a group above the budget stands alone"
    assert split_by_tokens([6], 6) == [[0]]
    assert split_by_tokens([], 6) == []
    sizes = [5, 1, 8, 2, 2, 7, 1]
    batches = split_by_tokens(sizes, 10)
    assert [i for batch in batches for i in batch] == list(range(len(sizes))), "every index once, in order"
    assert all(sum(sizes[i] for i in batch) <= 10 for batch in batches)


# --------------------------------------------------------------------------------- the form that runs on CUDA


def slow_varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size):
    """What torch.nn.attention.varlen.varlen_attn promises, one segment and one query at a time. [total, H, D] each."""
    assert window_size == (-1, 0), "causal: any number of keys to the left, none to the right"
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    assert len(key) == len(value) == cu_k[-1] and query.shape[1:] == key.shape[1:]
    output = torch.empty_like(query)
    for (q0, q1), (k0, k1) in zip(zip(cu_q[:-1], cu_q[1:]), zip(cu_k[:-1], cu_k[1:])):
        for i in range(q0, q1):
            seen = slice(k0, k1 - (q1 - 1 - i))  # aligned to the bottom right: the last query sees every key
            scores = torch.einsum("hd,khd->hk", query[i], key[seen]) * scale
            output[i] = torch.einsum("hk,khd->hd", scores.softmax(-1), value[seen])
    return output


def test_the_variable_length_form_equals_the_cpu_form(monkeypatch):
    """CUDA kernels cannot run here; what is handed to them (indices, lengths, repeated heads) can be checked."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", slow_varlen_attn)
    packed = pack(random_groups(), CPU)
    total, generator = packed.ids.shape[1], torch.Generator().manual_seed(3)
    query = torch.randn(total, 4, 8, generator=generator)
    key, value = torch.randn(2, total, 2, 8, generator=generator)
    ours = model_module._varlen_attention(query, key, value, 0.5, packed.layout)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    reference, _ = shared_prefix_attention(None, query, key, value, None, scaling=0.5, shared=packed.layout)
    assert_close(ours, reference[0], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------- tokenizer, export, loading

TEXTS = ['weather in Paris for 3 days {"name": "get_weather", "arguments": {"city": "Paris"}}', "a taxi in Rome"] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiny_tokenizer(TEXTS, 330)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """(folder, model) of an export whose model had Qwen2.5-Instruct's sampling defaults."""
    folder, model = tmp_path_factory.mktemp("exported"), build_tiny_model(tokenizer, hidden=32, layers=2, seed=0)
    defaults = dict(do_sample=True, top_k=20, top_p=0.8, temperature=0.7, repetition_penalty=1.05)
    for name, value in defaults.items():
        setattr(model.generation_config, name, value)
    export(model, tokenizer, folder)
    assert model.generation_config.top_k == 20, "export leaves the model as it was"
    return folder, model


ODD_TEXTS = ["", "  a  b\n\tc ", "Paris", 'x"3"', "naïve — 東京 🙂\u2028", "\\u00e9 </tool_call>", "2024"]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_survives_the_tiny_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


def test_tiny_tokens(tokenizer):
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    for token in (*TAGS, *END_TOKENS[:2], "<|im_start|>"):
        assert len(encode(token)) == 1, f"{token} is one token"
    assert len(encode("2024")) == 4, "digits stay single"
    # What is read after a space can be written after a quote with the same tokens.
    word = encode("Paris")
    assert encode(" Paris")[-len(word) :] == word and encode('"Paris"')[1 : 1 + len(word)] == word


def test_a_model_is_decided_by_its_seed(tokenizer):
    state = torch.get_rng_state()
    first, same, other = (build_tiny_model(tokenizer, 32, 1, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state()), "the caller's random numbers are untouched"
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_tied_parameters_count_once(tokenizer):
    model = build_tiny_model(tokenizer, 32, 1, 0)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    unique = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert count_parameters(model) == sum(unique.values())


def test_a_reloaded_model_gives_equal_logits(exported):
    folder, model = exported
    reloaded, ids = load_model(str(folder), CPU), torch.arange(10)[None]
    for one in (model, reloaded):
        use_attention(one, "generate")
    assert torch.equal(model.eval()(ids).logits, reloaded.eval()(ids).logits)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # as any other program loads it
    assert_close(plain(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-6)


def test_an_export_is_a_complete_hugging_face_folder(exported, tokenizer):
    folder, _ = exported
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))], "nothing is pickled"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    chat = [{"role": "user", "content": "hello"}]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert theirs == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert theirs == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def test_sampling_defaults_are_not_exported(exported, tokenizer):
    """Qwen2.5-Instruct brings top_k 20, top_p 0.8 and a repetition penalty, which would colour every later evaluation."""
    written = json.loads((exported[0] / "generation_config.json").read_text())
    assert not {"do_sample", "top_k", "top_p", "temperature", "repetition_penalty"} & set(written)
    assert written["eos_token_id"] == stop_ids(tokenizer) and len(stop_ids(tokenizer)) == 2
    assert written["pad_token_id"] == tokenizer.pad_token_id


def test_every_end_token_is_exported(tmp_path):
    """Llama 3 ends turns with three tokens; a server that knows only one runs on to the length limit."""
    tokenizer = build_tiny_tokenizer(TEXTS, 330)
    tokenizer.add_tokens(["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"], special_tokens=True)
    export(build_tiny_model(tokenizer, 32, 1, 0), tokenizer, tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(written) == sorted(tokenizer.convert_tokens_to_ids(list(END_TOKENS)))


def test_a_bf16_export_leaves_the_policy_in_fp32(tokenizer, tmp_path):
    model = build_tiny_model(tokenizer, 32, 1, 0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    export(model, tokenizer, tmp_path, torch.bfloat16)
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert all(w.dtype == torch.float32 and torch.equal(w, before[name]) for name, w in model.state_dict().items())
    rounded = load_model(str(tmp_path), CPU).state_dict()
    assert all(w.dtype == torch.float32 and torch.equal(w, before[name].bfloat16().float()) for name, w in rounded.items())


def test_load_tokenizer_gives_back_the_tokenizer_that_was_exported(exported, tokenizer):
    """AutoTokenizer went by the model type, silently gave our BPE the word splitting of Qwen2, and nothing was learnt.

    The ids of a text changed between the warm-up and GRPO, while every round trip of text still worked.
    """
    loaded = load_tokenizer(str(exported[0]))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    parts = [json.loads(one.backend_tokenizer.to_str()) for one in (loaded, tokenizer)]
    assert parts[0]["pre_tokenizer"] == parts[1]["pre_tokenizer"] and parts[0]["decoder"] == parts[1]["decoder"]
    texts = [*TEXTS, ' Paris "Paris" 2024 don\'t', render_completion([], "no tool fits"), "naïve 🙂"]
    for text in texts:
        assert loaded.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False), text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert loaded.chat_template == tokenizer.chat_template


def test_a_second_export_changes_nothing(exported, tmp_path):
    export(load_model(str(exported[0]), CPU), load_tokenizer(str(exported[0])), tmp_path)
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (exported[0] / name).read_bytes(), name


@pytest.mark.parametrize("load", [load_tokenizer, lambda path: load_model(path, CPU)])
@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["missing", "empty"])
def test_an_unusable_folder_is_one_sentence(load, make, tmp_path):
    make(tmp_path / "model")
    with pytest.raises(ModelError) as caught:
        load(str(tmp_path / "model"))
    assert str(tmp_path / "model") in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_weights_are_one_sentence(exported, tmp_path):
    """A download or copy that broke off."""
    export(exported[1], load_tokenizer(str(exported[0])), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(tmp_path), CPU)


def test_sliding_windows_are_refused():
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=4,
    )  # fmt: skip
    with pytest.raises(ModelError, match="sliding-window"):
        prepare_model(Qwen2ForCausalLM(config), CPU)
