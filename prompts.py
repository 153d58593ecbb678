"""The wire format, both directions: messages and tools -> prompt token ids; completion text -> calls.

The only file that knows tags, the JSON of calls, system prompts and chat templates. It imports no torch.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from config import UserError
from corpus.strict_json import MAX_DEPTH, canonical_json, nested_deeper, strict_json

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
TAGS = (THINK, END_THINK, CALL, END_CALL)

# Every token with which a known model family ends its turn. Llama 3 has three of them: stopping at one only
# lets the others run on to the length limit.
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")

# A prompt must not change overnight: templates that print a date, as Llama 3.1's does, print this one. Those
# that ask for it get a macro before them, because transformers hands them no function.
TODAY = datetime(2024, 7, 26)
DATES = "".join(f" | replace('%{code}', '{TODAY:%{code}}')" for code in "aAbBcdHIjmMpSUwWxXyY")
FIXED_DATE = "{% macro strftime_now(form) %}{{ form | replace('%-', '%')" + DATES + " }}{% endmacro %}\n"
TOOL_PROMPT = "{# tool prompt #}"  # begins what ops/export.py puts before a template
SET_BY_US = "{# chat_template_kwargs #}"  # begins the line that set_template_kwargs puts before a template

SYSTEM_TEMPLATE = """\
You answer requests by calling tools. Study the conversation and the tools below, decide which calls fulfil \
the latest request, and compose them. Some requests need one call, some need several, and some need none: \
when no tool fits, or the user has not given a value that a tool requires, the right answer is the empty \
list []. Calls belong in the tool-call section only.

The tools, one JSON object per line:
<tools>
{tools}
</tools>

Write every reply in two parts:
1. First reason about the request between <think> and </think>: what is asked, which tools fit, where each \
argument's value comes from.
2. Then give a JSON list between <tool_call> and </tool_call>. Each item is an object with exactly two keys, \
"name" and "arguments", and "arguments" is an object from parameter names to values.
Both parts are required in the same reply, in this order, with nothing before, between or after them.

A complete reply with two calls looks like this:
<think>Two cities are named, so the forecast tool is called once for each, with the number of days from the \
request.</think>
<tool_call>[{"name": "forecast", "arguments": {"city": "Oslo", "days": 2}}, {"name": "forecast", \
"arguments": {"city": "Lima", "days": 2}}]</tool_call>

Give each argument the JSON type that its tool declares: a number is written 3 and not "3", a truth value \
true and not "true", a list [1, 2] and not "[1, 2]". If no tool applies, finish with \
<tool_call>[]</tool_call>.\
"""


class PromptError(UserError):
    """A template, tokenizer or conversation that cannot be rendered; the message says which and why."""


@dataclass(frozen=True)
class ToolCall:
    """One call: the tool's name and its arguments as JSON values."""

    name: str
    arguments: dict[str, Any]

    def key(self) -> tuple[str, str]:
        """(name, canonical JSON of the arguments), equal for equal calls. 1, 1.0, true and "1" all differ."""
        return self.name, canonical_json(self.arguments)

    def as_dict(self) -> dict[str, Any]:
        """{"name": ..., "arguments": ...}: how a call stands in files and in the wire format."""
        return {"name": self.name, "arguments": self.arguments}


@dataclass(frozen=True)
class Parsed:
    """What a completion says. `calls` may be present beside an error that concerns the thought alone."""

    think: str | None
    calls: list[ToolCall] | None
    error: str | None


# ---------------------------------------------------------------------------------------------- to the model


def tool_prompt(tokenizer) -> str | None:
    """The system template that the model was trained with, where ops/export.py has left it, or None."""
    jinja = tokenizer.chat_template
    jinja = jinja.get("default") if isinstance(jinja, dict) else jinja
    _, found, block = (jinja or "").partition(TOOL_PROMPT)
    return json.JSONDecoder().raw_decode(block, block.index('"'))[0] if found else None


def load_template(path: str, tokenizer=None) -> str:
    """The system template at `path`; for "" the one that the tokenizer's model was trained with, or ours.

    Raises PromptError without a `{tools}` slot.
    """
    if not path:
        return SYSTEM_TEMPLATE if tokenizer is None else tool_prompt(tokenizer) or SYSTEM_TEMPLATE
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"prompt_template: cannot read {path}: {error}") from None
    if text.count("{tools}") != 1:
        raise PromptError(f"prompt_template: {path} must have one {{tools}} slot, where the tools belong")
    return text


def render_tools(tools: list[dict]) -> str:
    """One `{"type": "function", "function": {...}}` object per line."""
    return "\n".join(json.dumps({"type": "function", "function": tool}, ensure_ascii=False) for tool in tools)


def render_calls(calls: list[ToolCall]) -> str:
    """The tool-call section for `calls`; an empty list gives `<tool_call>[]</tool_call>`."""
    return f"{CALL}{json.dumps([call.as_dict() for call in calls], ensure_ascii=False)}{END_CALL}"


def render_completion(calls: list[ToolCall], think: str) -> str:
    """A whole reply in the format that the reward asks for. A blank `think` leaves the thought out."""
    thought = f"{THINK}{think}{END_THINK}" if think.strip() else ""
    return thought + render_calls(calls)


def build_messages(messages: list[dict], tools: list[dict], template: str = SYSTEM_TEMPLATE) -> list[dict]:
    """Chat messages for a tokenizer's template: one system message, then the conversation.

    messages: dicts with `role` (system, user, assistant, tool), `content`, and for past calls `calls` (a list
    of ToolCall). System messages of the data follow ours inside the single system message; past calls are
    rendered as calls. Tools are never handed to the chat template, or they would stand in the prompt twice.
    """
    system = [template.replace("{tools}", render_tools(tools))]
    turns = []
    for message in messages:
        role = message["role"]
        content = message.get("content") or ""
        if role == "system":
            system.append(content)
        elif role in ("user", "assistant", "tool"):
            if message.get("calls") is not None:
                content = "\n".join(part for part in (content, render_calls(message["calls"])) if part)
            turns.append({"role": role, "content": content})
        else:
            raise PromptError(f"unknown role {role!r}; roles are system, user, assistant and tool")
    return [{"role": "system", "content": "\n\n".join(system)}, *turns]


def _name(tokenizer) -> str:
    return tokenizer.name_or_path or "tokenizer"


def _chat_template(tokenizer) -> str:
    """The template that the tokenizer asks with. Raises PromptError where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    remedy = "the tokenizer has no chat template; use an Instruct model"
    if isinstance(template, dict):
        names, template = ", ".join(template), template.get("default")
        remedy = f"the tokenizer has several chat templates, {names}, and none is the default; leave it one"
    if not template:
        raise PromptError(f"{_name(tokenizer)}: {remedy}")
    return template


def set_template_kwargs(tokenizer, kwargs: dict[str, Any]) -> None:
    """Sets variables of the chat template inside it, so that an export asks as training did.

    They replace those of an earlier call; without any, the template stays as it is. Raises PromptError for a
    variable that the template does not have.
    """
    if kwargs:
        template = _chat_template(tokenizer)
        if template.startswith(SET_BY_US):
            template = template.partition("\n")[2]
        if unknown := [key for key in kwargs if key not in template]:
            raise PromptError(f"{_name(tokenizer)}: its chat template has no variable {unknown[0]!r}")
        values = {key: json.dumps(value, ensure_ascii=False) for key, value in kwargs.items()}
        sets = "".join(f"{{% set {key} = {value} %}}" for key, value in values.items())
        # transformers trims one line break after a block: this one, and not one of the template's own.
        tokenizer.chat_template = f"{SET_BY_US}{sets}\n{template}"


def render_prompt(
    tokenizer, messages: list[dict], tools: list[dict], template: str = SYSTEM_TEMPLATE,
    generation_prompt: bool = True,
) -> str:
    """The prompt as text, up to and including the header of the assistant's reply.

    Raises PromptError when the tokenizer has no chat template or the template refuses the conversation.
    """
    jinja = _chat_template(tokenizer)
    chat = build_messages(messages, tools, template)
    try:
        return tokenizer.apply_chat_template(
            chat, chat_template=FIXED_DATE + jinja if "strftime_now" in jinja else jinja, tokenize=False,
            add_generation_prompt=generation_prompt, date_string=f"{TODAY:%d %b %Y}",
        )
    except jinja2.TemplateError as error:
        roles = " ".join(message["role"] for message in chat)
        refused = f"its chat template refuses the roles {roles}: {error}"
        raise PromptError(f"{_name(tokenizer)}: {refused}") from None


def encode_prompt(
    tokenizer, messages: list[dict], tools: list[dict], template: str = SYSTEM_TEMPLATE,
    answer: Sequence[ToolCall] = (),
) -> list[int]:
    """The prompt as token ids; special tokens come from the chat template alone.

    Raises PromptError where the conversation, the tools or the right calls hold the text of one: in a prompt
    it would become that token, and a reply would end there.
    """
    said = [message["content"] for message in build_messages(messages, tools, "{tools}")]
    _refuse_control_tokens(tokenizer, "\n".join([*said, render_calls(answer)]))
    return tokenizer.encode(render_prompt(tokenizer, messages, tools, template), add_special_tokens=False)


def _refuse_control_tokens(tokenizer, text: str) -> None:
    if found := _control_tokens(tokenizer, len(tokenizer)).search(text):
        raise PromptError(f"bad_text: the control token {found[0]} stands in text, tools or right calls")


@functools.lru_cache(maxsize=8)  # asked for every prompt
def _control_tokens(tokenizer, size: int) -> re.Pattern:
    """Finds the text of special tokens, but for our tags. size: tells whether the tokenizer has changed."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = [token.content for token in added if token.special and token.content not in TAGS]
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


@functools.lru_cache(maxsize=8)  # asked for every reply
def _header(tokenizer, chat_template: str) -> str:
    """What the template puts at the end of every prompt, where the reply begins."""
    ask = functools.partial(render_prompt, tokenizer, [{"role": "user", "content": "probe"}], [])
    prompt = ask()
    return prompt[len(os.path.commonprefix([prompt, ask(generation_prompt=False)])) :]


def prefilled_reply(tokenizer) -> str:
    """How every prompt begins the reply, from `<think>` on: "" unless the model always thinks.

    Raises PromptError where the prompt also closes the thought: the policy could write none.
    """
    header = _header(tokenizer, _chat_template(tokenizer))
    if END_THINK in header:
        closed = "its chat template closes the thought before the reply"
        remedy = "let it think: --chat_template_kwargs 'enable_thinking: true', or what it asks for"
        raise PromptError(f"{_name(tokenizer)}: {closed}; {remedy}")
    return header[header.index(THINK) :] if THINK in header else ""


def encode_reply(tokenizer, text: str) -> list[int]:
    """A reply to imitate as token ids, closed by an end token, so that the policy learns to stop.

    What the prompt has begun of it is left out. A reply without a thought closes the one that is begun.
    Raises PromptError for a control token that is not at its end: no policy could write on.
    """
    text = _without_end(text)
    _refuse_control_tokens(tokenizer, text)
    if begun := prefilled_reply(tokenizer):
        thinks = (text := text.lstrip()).startswith(THINK)
        text = text[len(THINK) :].removeprefix(begun[len(THINK) :]) if thinks else END_THINK + text
    return [*tokenizer.encode(text, add_special_tokens=False), _end_ids(tokenizer)[0]]


def _end_ids(tokenizer) -> list[int]:
    """The tokens that end a reply: the tokenizer's own, then those of END_TOKENS that it knows."""
    ids = [tokenizer.eos_token_id, *map(tokenizer.convert_tokens_to_ids, END_TOKENS)]
    names = [tokenizer.eos_token, *END_TOKENS]  # of what it does not know, it gives None or its unknown token
    known = [i for i, name in zip(ids, names) if i is not None and tokenizer.convert_ids_to_tokens(i) == name]
    if not known:
        raise PromptError(f"{_name(tokenizer)}: the tokenizer has no end token, so replies would never stop")
    return known


def stop_ids(tokenizer) -> list[int]:
    """Sorted ids of the tokens that end a reply: the tokenizer's own, and those of END_TOKENS it knows."""
    return sorted(set(_end_ids(tokenizer)))


def decode_reply(tokenizer, ids: list[int], stops: list[int]) -> str:
    """Sampled ids -> the whole reply, with what the prompt has begun of it, without the closing stop token.

    Special tokens stay: tags may be among them. Ids beyond the tokenizer, for which many models have rows
    (Qwen2.5: 271), decode to nothing and would be paid for; they are named at the end, where a reply must
    have no text. No training text has them, so they are hardly ever sampled.
    """
    body = ids[:-1] if ids and ids[-1] in stops else ids
    text = tokenizer.decode(body, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    unknown = [token for token in dict.fromkeys(body) if tokenizer.convert_ids_to_tokens(token) is None]
    return prefilled_reply(tokenizer) + text + "".join(f"<|unknown:{token}|>" for token in unknown)


def check_tokenizer(tokenizer, template: str = SYSTEM_TEMPLATE) -> None:
    """Raises PromptError where a run would train on wrong prompts: when tags are lost in a round trip, or the
    chat template drops, repeats or adds something.
    """
    name = _name(tokenizer)
    tool = {"name": "probe_tool", "description": "", "parameters": {}}
    reply = render_completion([ToolCall("probe_tool", {"x": 1})], "probe")
    ids = tokenizer.encode(reply, add_special_tokens=False)
    if decode_reply(tokenizer, ids, []) != prefilled_reply(tokenizer) + reply:
        raise PromptError(f"{name}: the tags {' '.join(TAGS)} do not survive encoding and decoding")
    turns = [
        {"role": "user", "content": "probe question"},
        {"role": "assistant", "content": "", "calls": [ToolCall("probe_call", {})]},
        {"role": "tool", "content": "probe result"},
    ]
    text = render_prompt(tokenizer, turns, [tool], template)
    # A template may strip the ends of a message (Llama 3 does) but not touch what is inside.
    system = template.replace("{tools}", render_tools([tool])).strip()
    if text.count(system) != 1:
        raise PromptError(f"{name}: its chat template does not print the system prompt exactly once")
    rest = text.replace(system, "")
    said = ("probe question", "probe_call", "probe result")
    if "probe_tool" in rest or any(rest.count(words) != 1 for words in said):
        remedy = "choose another tokenizer"
        raise PromptError(f"{name}: its chat template adds to the conversation or drops turns; {remedy}")
    if "You are" in rest or rest.count("system") > 1:
        raise PromptError(f"{name}: its chat template adds a second system prompt")
    if text == render_prompt(tokenizer, turns, [tool], template, generation_prompt=False):
        raise PromptError(f"{name}: its chat template does not open the assistant's reply")


# -------------------------------------------------------------------------------------------- from the model


def _parse_calls(text: str) -> tuple[list[ToolCall] | None, str | None]:
    """The tool-call section alone, without surrounding white space -> (calls, None) or (None, reason)."""
    if not text.startswith(CALL):
        return None, "text_before_tool_call" if CALL in text else "no_tool_call"
    if not text.endswith(END_CALL):
        return None, "text_after_tool_call" if END_CALL in text else "tool_call_not_closed"
    inner = text[len(CALL) : -len(END_CALL)]
    try:
        # From the first opening tag to the last closing one: a value may contain a tag inside its quotes,
        # whereas two blocks in a row are not JSON.
        listed = strict_json(inner)
    except (ValueError, RecursionError):
        return None, "several_tool_calls" if CALL in inner else "bad_json"
    if not isinstance(listed, list):
        return None, "not_a_list"
    if nested_deeper(listed, MAX_DEPTH):
        return None, "bad_json"
    calls = []
    for item in listed:
        if not isinstance(item, dict) or set(item) != {"name", "arguments"}:
            return None, "bad_call"
        if not isinstance(item["name"], str) or not isinstance(item["arguments"], dict):
            return None, "bad_call"
        calls.append(ToolCall(item["name"], item["arguments"]))
    return calls, None


def _without_end(text: str) -> str:
    """A reply without one end token at its end, and without the white space before that."""
    token = next((token for token in END_TOKENS if text.endswith(token)), "")
    return text[: -len(token)].rstrip() if token else text


def parse_completion(text: str) -> Parsed:
    """Reads a reply strictly: `<think>…</think>` with something in it, then `<tool_call>[…]</tool_call>`.

    White space around the two parts and one end token are allowed, anything else is an error. Never raises.
    `error` is None or one of: not_text, no_think, text_before_think, think_not_closed, empty_think,
    tag_in_think, text_before_tool_call, no_tool_call, tool_call_not_closed, text_after_tool_call,
    several_tool_calls, bad_json, not_a_list, bad_call. Without any thought, the calls are still read, for
    rewards without reasoning.
    """
    if not isinstance(text, str):
        return Parsed(None, None, "not_text")
    text = _without_end(text.strip())
    if not text.startswith(THINK):
        first_call, first_think = text.find(CALL), text.find(THINK)
        if first_call == 0:
            calls, error = _parse_calls(text)
            return Parsed(None, calls, "no_think" if calls is not None else error)
        thought_later = first_think > 0 and (first_call < 0 or first_think < first_call)
        return Parsed(None, None, "text_before_think" if thought_later else "no_think")
    think, closed, rest = text[len(THINK) :].partition(END_THINK)
    if not closed:
        return Parsed(None, None, "think_not_closed")
    calls, error = _parse_calls(rest.strip())
    if any(tag in think for tag in TAGS):
        return Parsed(think, None, "tag_in_think")
    if not think.strip():
        return Parsed(think, calls, error or "empty_think")
    return Parsed(think, calls, error)
