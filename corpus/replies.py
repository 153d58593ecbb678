"""A reply as text, also where a trainer or a server has taken it apart into thought, text and calls; and what
its tokens are as texts.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from corpus.schema import decoded
from prompts import CALL, END_CALL, END_THINK, THINK, stop_ids

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
    known = ("role", "content", "tool_calls", *THOUGHTS)
    if others := [key for key, one in message.items() if one and key not in known]:
        raise ValueError(f"a message with {others[0]!r} cannot be read; known are {', '.join(known)}")
    content, calls = text_of(message.get("content")), message.get("tool_calls")
    thoughts = [thought for thought in map(message.get, THOUGHTS) if thought]
    if any(not isinstance(thought, str) or thought != thoughts[0] for thought in thoughts):
        raise ValueError(f"the thought must be one text, not {thoughts!r:.80}")
    thought = thoughts[0] if thoughts else ""
    if END_THINK in thought:  # no parser goes on behind it
        raise ValueError(f"the thought must come without its tags, not {thought!r:.80}")
    if (thought and THINK in content and thought.strip() in content) or (calls and CALL in content):
        raise ValueError("the thought or the calls stand twice, in content and beside it; keep one of them")
    if calls == [] and not content.strip():
        raise ValueError("with empty tool_calls and content, no call and no answer look alike; keep the text")
    start = f"{THINK}{thought}{END_THINK}" if thought else ""
    return start + content + (_section(calls) if calls else "")


def text_of(content: Any) -> str:
    """A message's content as text: OpenAI's list of text parts is joined, null is "". Raises ValueError."""
    parts = content if isinstance(content, list) else ["" if content is None else content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"content must be text, or a list of text parts, not {content!r:.80}")
    return "".join(texts)


def _section(calls: Any) -> str:
    """`tool_calls` as tool-call section. A parser that expects one call in a section finds our list there."""
    functions = []
    for call in calls if isinstance(calls, list) else [calls]:
        fields = call if isinstance(call, dict) else {"type": call}
        function = fields.get("function", {key: one for key, one in fields.items() if key not in LABELS})
        if fields.get("type") not in (None, "function") or not isinstance(function, (dict, list)):
            raise ValueError(f"a call must be of type function, with name and arguments, not {call!r:.80}")
        functions.append(function)
    whole = any(isinstance(function, list) for function in functions)
    sections = functions if whole else [[_call(function) for function in functions]]
    return "".join(f"{CALL}{json.dumps(one, ensure_ascii=False)}{END_CALL}" for one in sections)


def _call(function: dict) -> dict:
    """The call with its arguments as an object: of JSON text, or of nothing where there are no parameters."""
    given = function.get("arguments")
    arguments = {} if given in (None, "") else given
    try:
        return function | {"arguments": decoded(arguments, "arguments")}
    except ValueError:
        return function  # the model wrote no JSON


# ------------------------------------------------------------------------------------------- tokens and texts


def shortened(text: str, limit: int) -> str:
    """The text, or its start and an ellipsis."""
    return text[:limit] + "…" * (len(text) > limit)


def token_texts(tokenizer, responses: Sequence[list[int]]) -> list[list[str]]:
    """The tokens of each response as texts that, joined, are the whole response as it decodes, its end token
    included. A character whose bytes lie in several tokens stands at the last of them, and the others are "".
    """
    first = stop_ids(tokenizer)[:1]

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def later(ids: Sequence[int]) -> str:  # some tokenizers take the space from the first token of a text
        return decode([*first, *ids])[len(decode(first)) :]

    alone = {i: later([i]) for i in set().union(*responses)}
    rows = []
    for ids in responses:
        texts: list[str] = []
        start = 0
        for end, token in enumerate(ids, 1):
            broken = "\ufffd" in alone[token] and end < len(ids)  # bytes of a character that is not complete
            if broken and end - start > 8:  # no character has so many: noise, which would take quadratic time
                continue
            if start == 0:
                part = decode(ids[:end])
            else:
                part = alone[token] if end - start == 1 else later(ids[start:end])
            if not (broken and part.endswith("\ufffd")):
                texts += [""] * (end - start - 1) + [part]
                start = end
        whole = decode(ids)
        rows.append(texts if "".join(texts) == whole else [whole] + [""] * (len(ids) - 1))
    return rows


def thought_tokens(tokenizer, ids: list[int], text: str) -> int:
    """How many of the reply's first tokens reach to the end of its `</think>`; 0 without a closed thought.

    text: the whole reply, with what the prompt has begun of it (prompts.decode_reply).
    """
    if not text.lstrip().startswith(THINK) or END_THINK not in text:
        return 0

    def closed(end: int) -> bool:
        said = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return END_THINK in said

    return bisect_left(range(len(ids)), True, key=closed)
