"""The wire format: what a conversation looks like as text and as tokens, and how a reply is read back."""

import json
import re

import pytest
from tokenizers import decoders, processors

from corpus.tiny_model import build_tiny_tokenizer
from prompts import (
    SYSTEM_TEMPLATE,
    PromptError,
    ToolCall,
    build_messages,
    check_tokenizer,
    decode_reply,
    encode_prompt,
    encode_reply,
    load_template,
    parse_completion,
    render_completion,
    render_prompt,
    stop_ids,
)

# Qwen2.5's way: a default system prompt when none is given, and results of tools inside a turn of the user.
QWEN = """\
{%- if messages[0].role != "system" -%}{{ "<|im_start|>system\nYou are Qwen.<|im_end|>\n" }}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == "tool" -%}
{%- if loop.previtem.role != "tool" -%}{{ "<|im_start|>user" }}{%- endif -%}
{{ "\n<tool_response>\n" + m.content + "\n</tool_response>" }}
{%- if loop.last or loop.nextitem.role != "tool" -%}{{ "<|im_end|>\n" }}{%- endif -%}
{%- else -%}{{ "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\n" }}{%- endif -%}"""

# Llama 3.1's way: a token before all, headers, the date in the system message, results as "ipython".
LLAMA = """\
{%- set ns = namespace(system="", rest=messages) -%}
{%- if messages[0].role == "system" -%}
{%- set ns.system = messages[0].content | trim -%}
{%- set ns.rest = messages[1:] -%}
{%- endif -%}
{{ "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today: " + date_string + "\n\n" + ns.system + "<|eot_id|>" }}
{%- for m in ns.rest -%}
{{ "<|start_header_id|>" + ("ipython" if m.role == "tool" else m.role) + "<|end_header_id|>\n\n" }}
{{- (m.content | tojson if m.role == "tool" else m.content | trim) + "<|eot_id|>" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|start_header_id|>assistant<|end_header_id|>\n\n" }}{%- endif -%}"""

BEGIN = "<|begin_of_text|>"
HEADER = ["<|start_header_id|>", "<|end_header_id|>"]
LLAMA_TOKENS = [BEGIN, *HEADER, "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"]


def qwen(template: str = QWEN):
    """A tokenizer of single bytes: ids 0 to 2 are special, 3 to 258 are the bytes, then come four tags."""
    tokenizer = build_tiny_tokenizer([], 259)
    tokenizer.chat_template = template
    return tokenizer


def llama(template: str = LLAMA):
    """The same bytes, with Llama's special tokens from 263 on. It puts the first before all it encodes."""
    tokenizer = qwen(template)
    tokenizer.add_tokens(LLAMA_TOKENS, special_tokens=True)
    tokenizer.eos_token = "<|eot_id|>"
    add_begin = processors.TemplateProcessing(f"{BEGIN} $A", special_tokens=[(BEGIN, 263)])
    tokenizer.backend_tokenizer.post_processor = add_begin
    assert tokenizer.encode("") == [263]
    return tokenizer


def slow_ids(tokenizer, text: str) -> list[int]:
    """The obvious version of encoding for both: special tokens and tags by name, all else byte by byte."""
    # GPT-2's alphabet of bytes: the printable ones first, then the rest.
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256), *range(0, 33), *range(127, 161), 173]
    ids = []
    for part in re.split(r"(<\|\w+\|>|</?think>|</?tool_call>)", text):
        named = re.fullmatch(r"<.*>", part)
        ids += [tokenizer.get_vocab()[part]] if named else [3 + alphabet.index(b) for b in part.encode()]
    return ids


SPEC = '"name": "add", "description": "é", "parameters": {"a": {"type": "int"}}'
ADD = json.loads(f"{{{SPEC}}}")
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add 1."},
    {"role": "assistant", "content": "I add.", "calls": [ToolCall("add", {"a": 1})]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "Again?"},
]
TEMPLATE = "Tools:\n{tools}"
TOOL_LINE = f'{{"type": "function", "function": {{{SPEC}}}}}'
PAST_TURN = 'I add.\n<tool_call>[{"name": "add", "arguments": {"a": 1}}]</tool_call>'

def test_golden_qwen_prompt():
    expected = (
        f"<|im_start|>system\nTools:\n{TOOL_LINE}\n\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nAdd 1.<|im_end|>\n"
        f"<|im_start|>assistant\n{PAST_TURN}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nIt is 2.<|im_end|>\n"
        "<|im_start|>user\nAgain?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render_prompt(qwen(), TALK, [ADD], TEMPLATE) == expected
    assert encode_prompt(qwen(), TALK, [ADD], TEMPLATE) == slow_ids(qwen(), expected)


def test_golden_llama_prompt():
    def turn(role, text):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"

    expected = "<|begin_of_text|>" + turn("system", f"Today: 26 Jul 2024\n\nTools:\n{TOOL_LINE}\n\nBe brief.")
    expected += turn("user", "Add 1.") + turn("assistant", PAST_TURN) + turn("ipython", '"2"')
    expected += turn("assistant", "It is 2.") + turn("user", "Again?")
    expected += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert render_prompt(llama(), TALK, [ADD], TEMPLATE) == expected
    # the tokenizer alone would add a second <|begin_of_text|>
    assert encode_prompt(llama(), TALK, [ADD], TEMPLATE) == slow_ids(llama(), expected)


def test_one_system_message_ours_first_then_those_of_the_data():
    """It lists a tool once, and one that looks like the slot is not filled again."""
    late = {"role": "system", "content": "Later."}
    odd = {"name": "fill", "description": "replaces {tools}", "parameters": {}}
    messages = build_messages([*TALK, late], [ADD, odd], TEMPLATE)
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant", "user"]
    content = messages[0]["content"]
    assert content.startswith(f"Tools:\n{TOOL_LINE}\n") and content.endswith("\n\nBe brief.\n\nLater.")
    assert content.count("replaces {tools}") == 1


def test_own_template_file(tmp_path):
    path = tmp_path / "prompt.txt"
    for encoding in ("utf-8", "utf-8-sig"):  # the second begins with a byte order mark
        path.write_text("Werkzeuge für dich:\n{tools}\n", encoding=encoding)
        assert load_template(str(path)) == "Werkzeuge für dich:\n{tools}"
    path.write_text("no slot", encoding="utf-8")
    with pytest.raises(PromptError, match=r"prompt.txt must have one \{tools\} slot"):
        load_template(str(path))


@pytest.mark.parametrize("family", [qwen, llama])
def test_good_tokenizers_pass(family):
    check_tokenizer(family(), TEMPLATE)


@pytest.mark.parametrize(
    ("family", "template", "complaint"),
    [
        (qwen, None, "no chat template; use an Instruct model"),
        (llama, LLAMA.replace("+ ns.system", "+ ns.system * 2"), "system prompt exactly once"),
        (qwen, QWEN + "{{ messages[0].content.split('Tools')[1] }}", "adds to the conversation"),
        (qwen, QWEN.replace('messages[0].role != "system"', "true"), "adds a second system prompt"),
        (qwen, QWEN.split("{%- if add_generation_prompt")[0], "does not open the assistant's reply"),
    ],
    ids=["none", "system twice", "tools twice", "own system", "no opening"],
)
def test_chat_templates_that_spoil_the_prompt_are_refused(family, template, complaint):
    with pytest.raises(PromptError, match=complaint):
        check_tokenizer(family(template), TEMPLATE)


def test_tokenizer_that_loses_the_tags_is_refused():
    tokenizer = qwen()
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()  # glues words with spaces, as BERT's does
    with pytest.raises(PromptError, match="<think> </think> <tool_call> </tool_call> do not survive"):
        check_tokenizer(tokenizer)


def test_every_token_that_ends_a_turn_stops():
    assert stop_ids(qwen()) == [1, 2]  # <|im_end|>, <|endoftext|>
    assert stop_ids(llama()) == [1, 2, 266, 267, 268]  # with <|eot_id|>, <|eom_id|>, <|end_of_text|>
    unknown = qwen()
    unknown.add_special_tokens({"eos_token": "<|halt|>"})  # an unknown family still has its own end token
    assert stop_ids(unknown) == [1, 2, 263]


def test_a_reply_to_imitate_is_closed_by_one_end_token():
    tokenizer = llama()
    assert encode_reply(tokenizer, "<think>é") == [*slow_ids(tokenizer, "<think>é"), tokenizer.eos_token_id]


def test_decoding_cuts_one_stop_token_and_shows_the_rest():
    tokenizer, body = llama(), render_completion([ToolCall("add", {"a": 1})], "so , it 's")
    stops = stop_ids(tokenizer)
    ids = tokenizer.encode(body + "<|eot_id|>", add_special_tokens=False)
    assert decode_reply(tokenizer, ids, stops) == body
    assert decode_reply(tokenizer, ids[:-1], stops) == body  # cut off at the length limit
    assert decode_reply(tokenizer, [*ids, ids[-1]], stops) == body + "<|eot_id|>"


@pytest.mark.parametrize(
    "calls",
    [[],
     [ToolCall("get 天气 (2)", {"città": "Malmö 😀 \u2028"}), ToolCall("f", {"x": [1, 1.0, True, None]})],
     [ToolCall("quote", {"text": 'it\'s "quoted"\n\t\\ \x00'})],
     [ToolCall("html", {"body": "</tool_call><tool_call> <think></think> <|im_end|>"})]],
    ids=["no call", "unicode and types", "quotes", "tags in a value"],
)
def test_what_is_rendered_is_parsed_back(calls):
    for think in ("because", "a <b>\n</b> \u2028 😀"):
        parsed = parse_completion(render_completion(calls, think))
        assert (parsed.think, parsed.calls, parsed.error) == (think, calls, None)
        assert repr(parsed.calls) == repr(calls)  # 1 == 1.0 == True to Python, but not here
    assert parse_completion(render_completion(calls, " ")).calls == calls
    assert [ToolCall(**call.as_dict()) for call in calls] == calls


def test_the_example_in_our_system_prompt_follows_its_own_rules():
    [reply] = re.findall(r"^<think>.+</think>\n<tool_call>.+</tool_call>$", SYSTEM_TEMPLATE, re.MULTILINE)
    assert parse_completion(reply).error is None


GOOD = '<think>so</think><tool_call>[{"name": "f", "arguments": {}}]</tool_call>'


@pytest.mark.parametrize(
    "text",
    [GOOD, f" \n{GOOD}\r\n", GOOD.replace("><", ">\n\n<"), GOOD.replace("[", "\n[\t").replace("]", " ]\n")]
    + [f"{GOOD}\n<|{end}|>\n" for end in ("im_end", "endoftext", "eot_id", "eom_id", "end_of_text")],
)
def test_white_space_and_one_end_token_are_accepted(text):
    parsed = parse_completion(text)
    assert (parsed.think, parsed.calls, parsed.error) == ("so", [ToolCall("f", {})], None)


ERRORS = [
    ("not_text", None),
    ("no_think", GOOD.removeprefix("<think>so</think>")),
    ("text_before_think", f"Sure! {GOOD}"),
    ("think_not_closed", GOOD.replace("</think>", "")),
    ("empty_think", GOOD.replace("so", "")),
    ("tag_in_think", GOOD.replace("so", "<tool_call>[]</tool_call>")),
    ("text_before_tool_call", GOOD.replace("><", ">Here: <")),
    ("no_tool_call", "<think>so</think>"),
    ("tool_call_not_closed", GOOD.removesuffix("</tool_call>")),
    ("text_after_tool_call", f"{GOOD} Done."),
    ("several_tool_calls", f"{GOOD}<tool_call>[]</tool_call>"),
    ("bad_json", "<think>so</think><tool_call></tool_call>"),
    ("not_a_list", "<think>so</think><tool_call>{}</tool_call>"),
    ("bad_call", "<think>so</think><tool_call>[[]]</tool_call>"),
    ("bad_call", GOOD.replace("{}", "[]")),
]


@pytest.mark.parametrize(("error", "text"), ERRORS)
def test_every_error_by_name(error, text):
    assert parse_completion(text).error == error
