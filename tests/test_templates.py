"""Chat templates with habits of their own: they open the thought, want variables, print dates, refuse."""

from datetime import datetime

import pytest
from test_layouts import ADD, ids_of
from test_prompts import BEGIN, QWEN, llama, qwen, slow_ids
from transformers import Qwen2Config

from config import Config, ConfigError, load_config, template_kwargs
from corpus.examples import Example, Splits
from corpus.sources import DataError
from corpus.tiny_model import CHATML, build_tiny_tokenizer
from data import tokenize_splits
from model import load_tokenizer
from prompts import (
    PromptError,
    ToolCall,
    check_tokenizer,
    decode_reply,
    encode_prompt,
    encode_reply,
    parse_completion,
    prefilled_reply,
    render_calls,
    render_completion,
    render_prompt,
    set_template_kwargs,
    stop_ids,
)
from reward import score
from session import read_inputs, read_prompts

HEADER = "<|im_start|>assistant\n"
CALLS = [ToolCall("add", {"a": 1})]
ASK = [{"role": "user", "content": "Add 1."}]
# Qwen3.5's way: it thinks unless it is told not to, and then the prompt holds an empty thought.
CHOOSES = QWEN.replace(f'"{HEADER}"', f'"{HEADER}<think>\n" + ("" if thinking else "\n</think>\n\n")')


def opening(tail: str):
    """A tokenizer whose prompts end with `tail` behind the reply's header."""
    return qwen(QWEN.replace(HEADER, HEADER + tail))


@pytest.mark.parametrize("tail", ["<think>\n", "<think>", "So: <think>\nI "])
def test_what_the_prompt_opens_is_part_of_the_reply_and_written_once(tail):
    tokenizer = opening(tail)
    check_tokenizer(tokenizer)
    begun, stops = "<think>" + tail.partition("<think>")[2], stop_ids(tokenizer)
    assert prefilled_reply(tokenizer) == begun
    prompt = encode_prompt(tokenizer, ASK, [ADD])
    for thought in ("why", begun.removeprefix("<think>") + "why"):  # the second is a trace of such a model
        target = encode_reply(tokenizer, f"\n{render_completion(CALLS, thought)}")
        assert slow_ids(tokenizer, "<think>")[0] in prompt and "<think>" not in tokenizer.decode(target)
        reply = decode_reply(tokenizer, target, stops)
        assert reply == render_completion(CALLS, begun.removeprefix("<think>") + "why")
        assert score(reply, CALLS).total == 1
    assert decode_reply(tokenizer, stops[:1], stops) == begun
    bare = decode_reply(tokenizer, encode_reply(tokenizer, render_calls(CALLS)), stops)
    assert parse_completion(bare).calls == CALLS, "bare calls close the thought, or nothing could read them"


@pytest.mark.parametrize("tail", ["<think>\n\n</think>\n\n", "</think>"])
def test_a_thought_that_the_prompt_closes_is_refused(tail):
    with pytest.raises(PromptError, match="closes the thought before the reply; let it think: --chat_templ"):
        check_tokenizer(opening(tail))


def test_plain_templates_and_a_changed_one():
    """Our system prompt speaks of <think>, which opens nothing."""
    for tokenizer in (qwen(), llama()):
        assert prefilled_reply(tokenizer) == ""
    tokenizer.chat_template = opening("<think>").chat_template
    assert prefilled_reply(tokenizer) == "<think>"


def test_template_variables_go_with_the_exported_tokenizer(tmp_path):
    """The template begins with a line break that it prints, as it does in transformers alone."""
    build_tiny_tokenizer([], 259).save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "chat_template.jinja").write_text("\n{{ '' }}{# city, many #}" + CHOOSES)
    plain = load_tokenizer(str(tmp_path / "start"))
    with pytest.raises(PromptError, match="closes the thought"):
        check_tokenizer(plain)
    told = "thinking: true, city: \"Zü '%}\\n\", many: [1, 2.5]"
    tokenizer = load_tokenizer(str(tmp_path / "start"), chat_template_kwargs=told)
    options = dict(tokenize=False, add_generation_prompt=True)
    expected = plain.apply_chat_template(ASK, **options, **template_kwargs(told))
    assert expected.startswith("\n<|im_start|>") and expected.endswith("<think>\n")
    assert tokenizer.apply_chat_template(ASK, **options) == expected
    tokenizer.save_pretrained(tmp_path / "export")
    for again in ("", told):  # without a setting, and with the same a second time
        loaded = load_tokenizer(str(tmp_path / "export"), chat_template_kwargs=again)
        assert loaded.chat_template == tokenizer.chat_template
        assert loaded.apply_chat_template(ASK, **options) == expected
    with pytest.raises(PromptError, match="no variable 'thoughts'"):
        load_tokenizer(str(tmp_path / "export"), chat_template_kwargs="thoughts: true")
    other = load_tokenizer(str(tmp_path / "export"), chat_template_kwargs="thinking: false")
    assert other.apply_chat_template(ASK, **options).endswith("</think>\n\n"), "the new value counts"
    values = qwen("{# thinking #}{{ city }}{{ many[1] }}")
    set_template_kwargs(values, template_kwargs(told))
    assert values.apply_chat_template(ASK, **options) == "Zü '%}\n2.5"


def test_a_run_asks_with_its_template_variables(tmp_path):
    tokenizer = qwen(CHOOSES)
    tokenizer.save_pretrained(tmp_path)
    Qwen2Config(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    config = Config(data="synthetic", synthetic_train=20, eval_cases=2, chat_template_kwargs="thinking: true")
    inputs = read_prompts(config, str(tmp_path), read_inputs(config), quiet=True)
    assert all(tokenizer.decode(one.ids).endswith("<think>\n") for one in inputs.tokenized.train)


def test_template_variables_are_text_or_a_mapping_and_survive_the_run_dir(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("chat_template_kwargs: {enable_thinking: false, mode: 'a: b'}\n")
    loaded = load_config(["--config", str(path)]).chat_template_kwargs
    assert template_kwargs(loaded) == {"enable_thinking": False, "mode": "a: b"}
    assert load_config(["--chat_template_kwargs", loaded]).chat_template_kwargs == loaded
    assert template_kwargs(Config().chat_template_kwargs) == {}
    sentence = "^chat_template_kwargs must be names and values such as [^\n]*$"
    for bad in ("enable_thinking", "enable_thinking false", "a: [", "a: .nan", "a: 2024-07-26", "2: 3"):
        with pytest.raises(ConfigError, match=sentence):
            load_config([f"--chat_template_kwargs={bad}"])


def test_dates_do_not_change_overnight():
    dated = QWEN.replace("\\n<|im_end|>", "") + "{{ strftime_now('%d %B %Y, %-d') }}{{ date_string }}"
    text = render_prompt(qwen(dated), ASK, [])
    assert text.endswith("26 July 2024, 2626 Jul 2024") and f"{datetime.now():%d %B %Y}" not in text


def test_several_templates_need_a_default():
    tokenizer = qwen({"rag": QWEN, "tool_use": QWEN})
    with pytest.raises(PromptError, match="several chat templates, rag, tool_use, and none is the default"):
        check_tokenizer(tokenizer)
    tokenizer = qwen({"default": QWEN, "tool_use": "x"})
    check_tokenizer(tokenizer)
    assert render_prompt(tokenizer, ASK, []) == render_prompt(qwen(), ASK, [])


def test_without_an_own_end_token_a_known_one_closes(monkeypatch):
    tokenizer = llama()
    tokenizer.eos_token = None
    tokenizer.unk_token = "<|end_of_text|>"  # what it gives for tokens that it does not know
    assert encode_reply(tokenizer, "x") == [*slow_ids(tokenizer, "x"), 1] and stop_ids(tokenizer)[0] == 1
    monkeypatch.setattr("prompts.END_TOKENS", ["<|other|>"])
    with pytest.raises(PromptError, match="no end token, so replies would never stop"):
        encode_reply(tokenizer, "x")


def test_ids_beyond_the_tokenizer_are_no_clean_reply():
    tokenizer, stops = qwen(), [1, 2]
    ids = encode_reply(tokenizer, render_completion(CALLS, "why"))
    assert score(decode_reply(tokenizer, ids, stops), CALLS).total == 1
    for place in (0, 10, len(ids) - 1):
        text = decode_reply(tokenizer, [*ids[:place], 300, *ids[place:]], stops)
        assert text.endswith("<|unknown:300|>") and score(text, CALLS).total == 0


NEEDS_USER = "{% if messages[1].role != 'user' %}{{ raise_exception('no user message') }}{% endif %}" + CHATML


def example(rid: str, text: str = "Add 1.", role: str = "user", tool: dict = ADD, a: object = 1) -> Example:
    return Example(rid, "x", [{"role": role, "content": text}], [tool], [ToolCall("add", {"a": a})])


@pytest.mark.parametrize("bad, reason", [
    (example("bad", role="assistant"), "refuses the roles system assistant: no user message"),
    (example("bad", "What is <|im_start|>?"), "bad_text: the control token <|im_start|>"),
    (example("bad", tool=ADD | {"description": "a <|im_end|>"}), "bad_text: the control token <|im_end|>"),
    (example("bad", a="<|endoftext|>"), "bad_text: the control token <|endoftext|>"),
], ids=["refused by the template", "in a message", "in a tool", "in the answer"])
def test_one_record_that_cannot_be_asked_stops_no_run(bad, reason, capsys):
    tokenizer = qwen(NEEDS_USER)
    good = example("good", "Say <think> and <tool_call>.")  # tags are no control tokens
    splits = Splits([good, bad], {"held_out": [bad, good]})
    tokenized = tokenize_splits(splits, tokenizer, "{tools}", Config())
    assert ids_of(one.example for one in tokenized.train) == ["good"]
    assert ids_of(one.example for one in tokenized.held_out["held_out"]) == ["good"]
    printed = capsys.readouterr().out
    assert "data: 2 prompts are refused and skipped" in printed and printed.count("id=bad: ") == 2
    assert reason in printed
    with pytest.raises(DataError, match="refused; id=bad: ") as caught:
        tokenize_splits(Splits([bad], {}), tokenizer, "{tools}", Config())
    assert reason in str(caught.value)


def test_a_token_of_another_family_is_plain_text():
    encode_prompt(qwen(), [{"role": "user", "content": BEGIN}], [])
    with pytest.raises(PromptError, match="control token"):
        encode_prompt(llama(), [{"role": "user", "content": BEGIN}], [])
