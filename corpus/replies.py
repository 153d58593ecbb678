"""A reply as text, also where a trainer or a server has taken it apart into thought, text and calls."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from corpus.strict_json import strict_json
from prompts import CALL, END_CALL, END_THINK, THINK

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
LABELS = ("id", "index", "type")  # of a call in OpenAI's layout


def reply_text(completion: Any) -> str:
    """A completion in the wire format: a text as it is, an assistant message, also in a list, put together.

    What the model wrote wrong stays wrong; the reward judges it. Raises ValueError where it cannot be said
    what the model wrote: for other messages, keys and parts of content.
    """
    if isinstance(completion, str):
        return completion
    messages = completion if isinstance(completion, list) else [completion]
    if len(messages) != 1 or not isinstance(messages[0], dict):
        raise ValueError(f"a completion is a text or one assistant message, not {completion!r:.80}")
    message = messages[0]
    if (message.get("role") or "assistant") != "assistant":
        raise ValueError(f"a completion is the assistant's message, not that of role {message['role']!r:.80}")
    _refuse_others("message", message, ("role", "content", "tool_calls", *THOUGHTS))
    content, calls = _content(message.get("content")), message.get("tool_calls")
    thoughts = [thought for thought in map(message.get, THOUGHTS) if thought]
    if any(not isinstance(thought, str) or thought != thoughts[0] for thought in thoughts):
        raise ValueError(f"the thought must be one text, not {thoughts!r:.80}")
    if thoughts and END_THINK in thoughts[0]:  # no parser goes on behind it
        raise ValueError(f"the thought must come without its tags, not {thoughts[0]!r:.80}")
    thought = f"{THINK}{thoughts[0]}{END_THINK}" if thoughts else ""
    if (thought and THINK in content and thoughts[0].strip() in content) or (calls and CALL in content):
        raise ValueError("the thought or the calls stand twice, in content and beside it; keep one of them")
    if calls == [] and not content.strip():
        raise ValueError("with empty tool_calls and content, no call and no answer look alike; keep the text")
    return thought + content + (_section(calls) if calls else "")


def _refuse_others(what: str, value: dict, known: Collection[str]) -> None:
    if others := [key for key, one in value.items() if one and key not in known]:
        raise ValueError(f"a {what} with {others[0]!r} cannot be read; known are {', '.join(known)}")


def _content(content: Any) -> str:
    """The text of a message's content: a text, or a list of {"type": "text", "text": ...}."""
    texts = []
    for part in content if isinstance(content, list) else [{"type": "text", "text": content or ""}]:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"content must be text, or parts of type text, not {part!r:.80}")
        _refuse_others("part of content", part, ("type", "text"))
        texts.append(part["text"])
    return "".join(texts)


def _section(calls: Any) -> str:
    """`tool_calls` as tool-call section. A parser that expects one call in a section finds our list there."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"tool_calls must be a list of objects, not {calls!r:.80}")
    functions = []
    for call in calls:
        function = call.get("function")
        if function is None:  # not wrapped
            function = {key: one for key, one in call.items() if key not in LABELS}
        else:
            _refuse_others("call", call, (*LABELS, "function"))
        if call.get("type") not in (None, "function") or not isinstance(function, (dict, list)):
            raise ValueError(f"a call must be of type function, with name and arguments, not {call!r:.80}")
        functions.append(function)
    whole = any(isinstance(function, list) for function in functions)
    sections = functions if whole else [[_call(function) for function in functions]]
    try:
        return "".join(f"{CALL}{json.dumps(one, ensure_ascii=False)}{END_CALL}" for one in sections)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"tool_calls hold what is not JSON: {error}") from None


def _call(function: dict) -> dict:
    """The call with its arguments as an object: of JSON text, or of nothing where there are no parameters."""
    arguments = function.get("arguments")
    if arguments in (None, ""):
        arguments = {}
    elif isinstance(arguments, str):
        try:
            arguments = strict_json(arguments)
        except (ValueError, RecursionError):
            pass  # the model wrote no JSON
    return function | {"arguments": arguments}
