"""model.py: what a model can do is found out when it is loaded, and models survive export and reload."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from config import UserError
from corpus.tiny_model import build_tiny_model, build_tiny_tokenizer
from distributed.weights import load_model, model_config
from kernel.attention import use_attention
from model import (
    Capabilities,
    ModelError,
    check_vocabulary,
    count_parameters,
    find_capabilities,
    load_tokenizer,
    prepare_model,
)
from ops.export import export
from prompts import END_TOKENS, TAGS, render_completion, stop_ids

CPU = torch.device("cpu")

TEXTS = ['weather in Paris {"name": "get_weather", "arguments": {"city": "Paris"}}', "a taxi in Rome"] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiny_tokenizer(TEXTS, 330)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """(folder, model) of an export whose model had Qwen2.5-Instruct's sampling defaults."""
    folder = tmp_path_factory.mktemp("exported")
    model = prepare_model(build_tiny_model(tokenizer, hidden=32, layers=2, seed=0), CPU)
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
    assert count_parameters(model) == sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())


def test_a_reloaded_model_gives_equal_logits(exported):
    folder, model = exported
    reloaded, ids = load_model(str(folder), CPU), torch.arange(10)[None]
    for one in (model, reloaded):
        use_attention(one, "generate")
    assert torch.equal(model.eval()(ids).logits, reloaded.eval()(ids).logits)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # as any other program loads it
    assert_close(plain(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-6)


def test_an_export_is_a_hugging_face_folder_without_sampling_defaults(exported, tokenizer):
    """Qwen2.5-Instruct's top_k 20, top_p 0.8 and repetition penalty would colour every later evaluation."""
    folder, _ = exported
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))], "nothing is pickled"
    written = json.loads((folder / "generation_config.json").read_text())
    assert not {"do_sample", "top_k", "top_p", "temperature", "repetition_penalty"} & set(written)
    assert written["eos_token_id"] == stop_ids(tokenizer) and len(stop_ids(tokenizer)) == 2
    assert written["pad_token_id"] == tokenizer.pad_token_id


def test_a_bf16_export_leaves_the_policy_in_fp32(tokenizer, tmp_path):
    model = build_tiny_model(tokenizer, 32, 1, 0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    export(model, tokenizer, tmp_path, torch.bfloat16)
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    rounded = {name: weight.bfloat16().float() for name, weight in before.items()}
    for found, expected in ((model, before), (load_model(str(tmp_path), CPU), rounded)):
        for name, weight in found.state_dict().items():
            assert weight.dtype == torch.float32 and torch.equal(weight, expected[name]), name


def test_load_tokenizer_gives_back_the_tokenizer_that_was_exported(exported, tokenizer):
    """AutoTokenizer gave our BPE the word splitting of Qwen2: other ids for a text, so nothing was learnt."""
    loaded = load_tokenizer(str(exported[0]))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for text in [*TEXTS, ' Paris "Paris" 2024 don\'t', render_completion([], "no tool fits"), "naïve 🙂"]:
        ours, theirs = (one.encode(text, add_special_tokens=False) for one in (loaded, tokenizer))
        assert ours == theirs, text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert loaded.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("load", [load_tokenizer, lambda path: load_model(path, CPU)])
def test_an_unusable_folder_is_one_sentence(load, tmp_path):
    with pytest.raises(ModelError) as caught:
        load(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


UNTRAINABLE = {  # what is in the folder: (its file, words of the sentence)
    "quantised": ({"config.json": {"quantization_config": {"quant_method": "fp8"}}}, "weights .fp8.; take"),
    "a LoRA adapter": ({"config.json": None, "adapter_config.json": {"peft_type": "LORA"}}, "merge it into"),
    "an adapter beside its base": ({"adapter_config.json": {"peft_type": "LORA"}}, "merge it into its base"),
    "no language model": ({"config.json": {"model_type": "vit"}}, "is no causal LM"),
}


@pytest.mark.parametrize("kind", UNTRAINABLE)
def test_weights_that_cannot_be_trained_are_one_sentence(kind, exported, tmp_path):
    """Scales of quantised weights were ignored: numbers 4,000 times too large, and no word."""
    files, words = UNTRAINABLE[kind]
    folder = shutil.copytree(exported[0], tmp_path / "model")
    for name, values in files.items():
        path = folder / name
        before = json.loads(path.read_text()) if path.exists() else {}
        path.unlink(missing_ok=True)
        if values is not None:
            path.write_text(json.dumps(before | values))
    with pytest.raises(UserError, match=words) as caught:
        load_model(str(folder), CPU)
    assert "\n" not in str(caught.value)


def test_a_token_beyond_the_embeddings_is_named(exported, tokenizer):
    """It was an IndexError in the first step, and on CUDA a device-side assert."""
    config = model_config(str(exported[0]))
    check_vocabulary(tokenizer, config)
    config.vocab_size = rows = len(tokenizer) - 1
    with pytest.raises(ModelError, match=f"has the id {rows}, but the model has {rows} embeddings"):
        check_vocabulary(tokenizer, config)


def test_weights_that_no_parameter_takes_are_named(exported, tmp_path):
    folder = shutil.copytree(exported[0], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors") | {"model.norm.scale": torch.ones(1)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"does not ask for: model\.norm\.scale"):
        load_model(str(folder), CPU)


def small_qwen2() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    ))


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_an_ordinary_model_is_prepared_without_a_word(gradient_checkpointing):
    """transformers renamed gradient_checkpointing_enable, and warns of the old name."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = prepare_model(small_qwen2(), CPU, gradient_checkpointing)
    assert model.capabilities == Capabilities("sdpa", True, True, "shared_prefix")
    checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert checkpoints == gradient_checkpointing
    found = model.capabilities
    find_capabilities(model, model, "shared_prefix")
    assert model.capabilities == found, "whatever attention is set when it is asked again"


def test_the_older_name_of_gradient_checkpointing_is_used_where_the_new_one_is_missing(monkeypatch):
    """transformers 5.17."""
    called, model = [], small_qwen2()
    monkeypatch.delattr(type(model).__mro__[2], "activation_checkpointing_enable", raising=False)
    note = lambda self, **options: called.append(options)  # noqa: E731
    monkeypatch.setattr(type(model), "gradient_checkpointing_enable", note)
    prepare_model(model, CPU, gradient_checkpointing=True)
    assert called == [{"gradient_checkpointing_kwargs": {"use_reentrant": False}}]
