"""The demo's model and tokenizer, built from a config and texts, without any download."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from prompts import END_TOKENS, TAGS

LAYERS, VOCABULARY = 2, 800  # of the demo's model
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `texts`: any text survives a round trip, digits stay single.

    Words, digits and everything between them are split first, so that a word has the same tokens after a
    space as after a quote: what a small model reads in a query it can then copy into a JSON string.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\p{L}\p{N}]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", *END_TOKENS[:2]]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens(list(TAGS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_config(vocab_size: int, hidden: int, layers: int) -> Qwen2Config:
    """The demo model's config, without the ids of special tokens, which the tokenizer knows."""
    return Qwen2Config(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32768, rope_theta=1e6,
        tie_word_embeddings=True, bos_token_id=None, initializer_range=0.03,
    )


def build_tiny_model(tokenizer, hidden: int, layers: int, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 model of `layers` layers and `hidden` units, initialised from `seed`, in fp32 on the CPU.

    It is bare: model.prepare_model makes it ready for token_logprobs. Attention starts at the identity
    (queries equal keys, outputs undo values, in random orthogonal bases), so a small model learns to copy in
    hundreds of steps instead of thousands: after mimetic initialisation, Trockman and Kolter 2023 (arXiv
    2305.09828). All else is the usual noise; nothing of the task is in it.
    """
    config = tiny_config(len(tokenizer), hidden, layers)
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            for layer in model.model.layers:
                attention = layer.self_attn
                compare, carry = (torch.linalg.qr(torch.randn(hidden, hidden))[0] for _ in range(2))
                attention.q_proj.weight.copy_(compare.T)
                attention.k_proj.weight.copy_(compare.T)
                attention.v_proj.weight.copy_(carry.T)
                attention.o_proj.weight.copy_(carry)
    return model
