"""The wire format, both directions: messages and tools -> prompt token ids; completion text -> calls.

The only file that knows tags, the JSON of calls, system prompts and chat templates. It imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from config import UserError

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
TAGS = (THINK, END_THINK, CALL, END_CALL)

# Deeper JSON is refused: Python's own limit depends on the caller's stack, and a verdict must not.
MAX_DEPTH = 64

# Every token with which a known model family ends its turn. Llama 3 has three of them: stopping at one only
# lets the others run on to the length limit.
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")

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


def load_template(path: str) -> str:
    """The system template at `path`, or ours for "". Raises PromptError without a `{tools}` slot."""
    if not path:
        return SYSTEM_TEMPLATE
    try:
        text = Path(path).read_text(encoding="utf-8").rstrip("\n")
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


def render_prompt(
    tokenizer, messages: list[dict], tools: list[dict], template: str = SYSTEM_TEMPLATE,
    generation_prompt: bool = True,
) -> str:
    """The prompt as text, up to and including the header of the assistant's reply.

    Raises PromptError when the tokenizer has no chat template or the template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(f"{_name(tokenizer)}: the tokenizer has no chat template; use an Instruct model")
    chat = build_messages(messages, tools, template)
    try:
        # Llama 3.1 prints a date into the system header: a prompt must not change overnight.
        return tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=generation_prompt, date_string="26 Jul 2024"
        )
    except jinja2.TemplateError as error:
        roles = " ".join(message["role"] for message in chat)
        refused = f"its chat template refuses the roles {roles}: {error}"
        raise PromptError(f"{_name(tokenizer)}: {refused}") from None


def encode_prompt(
    tokenizer, messages: list[dict], tools: list[dict], template: str = SYSTEM_TEMPLATE
) -> list[int]:
    """The prompt as token ids; special tokens come from the chat template alone."""
    return tokenizer.encode(render_prompt(tokenizer, messages, tools, template), add_special_tokens=False)


def encode_reply(tokenizer, text: str) -> list[int]:
    """A reply to imitate as token ids, closed by the end token, so that the policy learns to stop."""
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def stop_ids(tokenizer) -> list[int]:
    """Sorted ids of the tokens that end a reply: the tokenizer's own, and those of END_TOKENS it knows."""
    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[token] for token in END_TOKENS if token in vocabulary}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise PromptError(f"{_name(tokenizer)}: the tokenizer has no end token, so replies would never stop")
    return sorted(ids)


def decode_reply(tokenizer, ids: list[int], stops: list[int]) -> str:
    """Sampled ids -> text without the closing stop token. Special tokens stay: tags may be among them."""
    body = ids[:-1] if ids and ids[-1] in stops else ids
    return tokenizer.decode(body, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check_tokenizer(tokenizer, template: str = SYSTEM_TEMPLATE) -> None:
    """Raises PromptError where a run would train on wrong prompts: when tags are lost in a round trip, or the
    chat template drops, repeats or adds something.
    """
    name = _name(tokenizer)
    tool = {"name": "probe_tool", "description": "", "parameters": {}}
    reply = render_completion([ToolCall("probe_tool", {"x": 1})], "probe")
    if decode_reply(tokenizer, tokenizer.encode(reply, add_special_tokens=False), []) != reply:
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


# Kept, because json.dumps makes one for every call.
_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=True, separators=(",", ":"))


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, so that equal values give equal text. Keeps 1, 1.0, true and "1" apart."""
    return _CANONICAL.encode(value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError("a number overflows")
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is repeated")
    return result


_STRICT = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_finite_float, object_pairs_hook=_unique_keys
)


def strict_json(text: str) -> Any:
    """json.loads without NaN, Infinity, overflow or repeated keys, each of which could hide a second reading.

    Raises ValueError (json.JSONDecodeError is one) or RecursionError for absurd nesting.
    """
    return _STRICT.decode(text)


def _nested_deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested more than `limit` deep. Without recursion: nothing overflows."""
    level = [value]
    for _ in range(limit + 1):
        inner = []
        for outer in level:
            if isinstance(outer, dict):
                inner += outer.values()
            elif isinstance(outer, list):
                inner += outer
        if not inner:
            return False
        level = inner
    return True


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
    if _nested_deeper(listed, MAX_DEPTH):
        return None, "bad_json"
    calls = []
    for item in listed:
        if not isinstance(item, dict) or set(item) != {"name", "arguments"}:
            return None, "bad_call"
        if not isinstance(item["name"], str) or not isinstance(item["arguments"], dict):
            return None, "bad_call"
        calls.append(ToolCall(item["name"], item["arguments"]))
    return calls, None


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
    text = text.strip()
    for token in END_TOKENS:
        if text.endswith(token):
            text = text[: -len(token)].rstrip()
            break
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
