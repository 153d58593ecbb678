"""More examples from the same data: tools taken away, so that [] becomes right, and names replaced by random
ones.

Tool-N1's reference implementation has both, unused by default: irrelevance at a rate of 0.15, and masking,
which is Hammer's idea (arXiv 2410.04587), at a ratio of 0.67. Every choice is a function of the seed and the
example's id.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from corpus.examples import Example
from corpus.schema import properties
from prompts import ToolCall


def _chosen(share: float, seed: int, purpose: str, example: Example) -> bool:
    return random.Random(f"{seed}/{purpose}/{example.id}").random() < share


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be a share from 0 to 1, not {share}")


# ------------------------------------------------------------------------------------------------ irrelevance


def _overlap(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a and b else 0.0


def _alike(tool: dict, other: dict) -> bool:
    """Whether `other` could well do what `tool` does. A false alarm costs one example, a miss teaches a wrong
    refusal.
    """
    bare = [re.sub(r"[\W_]", "", one["name"].lower()) for one in (tool, other)]
    bare = [re.sub(r"^(get|fetch|retrieve)|(api)?(v\d+)?$", "", name) for name in bare]
    words = [set(re.findall(r"\w+", str(one.get("description") or "").lower())) for one in (tool, other)]
    if bare[0] == bare[1] or _overlap(*words) >= 0.6:
        return True
    # GetVisualObjectBounds and "Get Object Bounds" (ToolACE) share nine of ten parameters. Below three,
    # sharing all of them says little: many unrelated tools take a `domain` or a `username`.
    declared = [set(properties(one)) for one in (tool, other)]
    return len(declared[0] | declared[1]) >= 3 and _overlap(*declared) >= 0.8


def _without_answer(example: Example) -> Example | None:
    """The example without the tools of its answer; None where [] would be no certain answer then."""
    called = {call.name for call in example.answer}
    rest = [tool for tool in example.tools if tool["name"] not in called]
    gone = [tool for tool in example.tools if tool["name"] in called]
    if not gone or not rest or any(message.get("calls") for message in example.messages):
        return None
    # Results, and calls that are kept as plain text, name tools too. A user may: then the tool is simply not
    # there.
    said = [message.get("content") or "" for message in example.messages if message["role"] != "user"]
    if any(name in text for name in called for text in said) or any(_alike(a, b) for a in gone for b in rest):
        return None
    return replace(example, id=f"{example.id}#irrelevant", tools=rest, answer=[], demonstrations=())


def irrelevant_examples(examples: Sequence[Example], rate: float, seed: int) -> list[Example]:
    """New examples whose right answer is []: those of the input, without the tools that their answer calls.

    Each suitable example gives one with probability `rate`, decided by (seed, id) alone; its id is
    "id#irrelevant". Suitable: the answer calls something, a tool remains, no earlier turn calls or names what
    is taken away, and no remaining tool is like a removed one: the same name but for case, separators, a
    leading get/fetch/retrieve and a trailing API or V2; 60 % of the descriptions' words in common; or 80 % of
    the names of three or more parameters. A tool that can do anything (a web search, an interpreter) is not
    recognised. ValueError for a rate outside 0..1.
    """
    _check_share("the irrelevance rate", rate)
    made = [_without_answer(example) for example in examples if _chosen(rate, seed, "irrelevance", example)]
    return [example for example in made if example is not None]


# ---------------------------------------------------------------------------------------------------- masking

PROSE = ("description", "title")  # the keys of a declaration under which there is text for the reader
VALUES = ("enum", "default")  # and those under which there are values, in which nothing is a name
LETTERS = string.ascii_letters + string.digits

# Names that no ordinary word looks like, so that a text with one in it means the tool or parameter: sortBy,
# user_id, text1, /email/check, filter[id]. Not so mp3, GSTIN or e-mail: with such words descriptions explain
# things.
_CODE = re.compile(r"[a-z][A-Z]|_|[./:\[]|[A-Za-z]{3}\d$")


def _strings(value: Any) -> list[str]:
    """Everything in a JSON value as text: strings, keys, numbers."""
    if isinstance(value, dict):
        return [*value, *_strings(list(value.values()))]
    return [text for inner in value for text in _strings(inner)] if isinstance(value, list) else [str(value)]


def _declared_values(declaration: dict | list) -> list[str]:
    """Everything in the enums and defaults of a declaration, at any depth."""
    found = []
    for key, inner in declaration.items() if isinstance(declaration, dict) else enumerate(declaration):
        if key in VALUES:
            found += _strings(inner)
        elif isinstance(inner, (dict, list)):
            found += _declared_values(inner)
    return found


def _declared(tools: list[dict]) -> dict[str, set[str]]:
    """Tool name -> its parameters' names, those of all tools of that name: some records list a tool twice."""
    found: dict[str, set[str]] = {}
    for tool in tools:
        found.setdefault(tool["name"], set()).update(properties(tool))
    return found


def _described(tools: list[dict]) -> dict[str, bool]:
    """Name of a tool or parameter -> whether its description says more than the name, wherever it is
    declared.
    """
    found: dict[str, bool] = {}
    for tool in tools:
        for name, one in [(tool["name"], tool), *properties(tool).items()]:
            text = one.get("description") if isinstance(one, dict) else None
            says = isinstance(text, str) and re.search(r"[^\W\d_]", text.replace(name, "")) is not None
            found[name] = says and found.get(name, True)
    return found


def _random_name(rng: random.Random, shortest: int, longest: int) -> str:
    """Letters and digits, first a letter, and no word: at least one digit or inner capital."""
    while True:
        name = "".join(rng.choices(LETTERS, k=rng.randint(shortest, longest)))
        if name[0].isalpha() and re.search(r"[a-z][A-Z]|\d", name):
            return name


def draw_masks(example: Example, seed: int) -> dict[str, str]:
    """Name -> random name for the tools and their parameters; fields inside an object parameter have no mask.

    One mask per name: a parameter of two tools gets the same in both, or a text could not say which is meant.
    A name stays as it is, and out of the result, when nothing describes it; when a call gives it without its
    being declared; when it is a whole word in an argument of the answer or of a past call, in an enum or a
    default; or when such an argument is a part of it: else a text that shows the value could lose it with the
    name.
    """
    declared, undeclared, values = _declared(example.tools), set(), []
    for call in [
        *example.answer,
        *(call for message in example.messages for call in message.get("calls") or ()),
    ]:
        values += _strings(list(call.arguments.values()))
        undeclared |= call.arguments.keys() - declared.get(call.name, set())
        undeclared |= {call.name} - declared.keys()
    text = "\n".join(values + _declared_values(example.tools))
    words, parts = set(re.findall(r"\w+", text)), {value.lower() for value in values if len(value) > 1}
    taken, rng, masks = repr(example).lower(), random.Random(f"{seed}/names/{example.id}"), {}
    for name, described in _described(example.tools).items():
        shown = name in (words if re.fullmatch(r"\w+", name) else text)
        if shown or not described or name in undeclared or any(part in name.lower() for part in parts):
            continue
        lengths = (8, 15) if name in declared else (5, 10)
        while (mask := _random_name(rng, *lengths)).lower() in taken:
            pass
        masks[name], taken = mask, f"{taken} {mask.lower()}"
    return masks


def _mask_text(text: str, masks: dict[str, str], tools: Container[str]) -> str:
    """The text with masks for the names in it, where they are surely meant as names.

    Code-like ones as whole words; tool names of several words in quotes or before "tool" or "function", since
    "the Standard Deviation of …" is no mention of a tool; any tool's name after `"name": `, as ToolACE's
    results have it.
    """
    found = [name for name in masks if name in text]
    if not found:
        return text
    found.sort(key=len, reverse=True)  # "user.id.type" before "user.id"
    code = [name for name in found if " " not in name and _CODE.search(name)]
    spaced = [name for name in found if " " in name and name in tools]
    listed = [name for name in found if name in tools] if "name" in text else []
    places = [
        (r"(?<!\w)", code, r"(?!\w)"),
        (r"""(?<=["'`])""", spaced, r"""(?=["'`])"""),
        (r"(?<!\w)", spaced, r"(?= (?:tool|function)\b)"),
        (r"""(?:(?<=["']name["']: ["'])|(?<=["']name["']:["']))""", listed, """(?=["'])"""),
    ]
    pattern = "|".join(
        f"{before}(?:{'|'.join(map(re.escape, names))}){after}" for before, names, after in places if names
    )
    return re.sub(pattern, lambda match: masks[match[0]], text) if pattern else text


def _map_prose(declaration: dict, change: Callable[[str], str]) -> dict:
    """A copy of a declaration in which every description, at any depth, went through `change`."""
    made = dict(declaration)
    for key, inner in declaration.items():
        if isinstance(inner, str) and key in PROSE:
            made[key] = change(inner)
        elif isinstance(inner, dict):
            made[key] = _map_prose(inner, change)
        elif isinstance(inner, list):
            made[key] = [_map_prose(one, change) if isinstance(one, dict) else one for one in inner]
    return made


def _mask_tool(tool: dict, masks: dict[str, str], change: Callable[[str], str]) -> dict:
    known, parameters = properties(tool), tool.get("parameters")
    made = _map_prose({**tool, "parameters": {}} if known else tool, change)
    made["name"] = masks.get(tool["name"], tool["name"])
    if known:
        renamed = {name: masks.get(name, name) for name in known}
        inner = {renamed[k]: _map_prose(v, change) if isinstance(v, dict) else v for k, v in known.items()}
        if parameters is not known:
            inner = {**_map_prose({**parameters, "properties": {}}, change), "properties": inner}
        made["parameters"] = inner
        for holder in (made, inner):  # ToolACE lists the required parameters beside `parameters`
            if isinstance(holder.get("required"), list):
                holder["required"] = [
                    renamed.get(n, n) if isinstance(n, str) else n for n in holder["required"]
                ]
    return made


def mask_names(example: Example, seed: int) -> Example:
    """The example with the masks of `draw_masks` in its tools, calls and texts, and the id "id#masked".

    Argument values, enums and defaults never change. Demonstrations are left out, since a thought may say a
    name in words that no rule finds. An example without a name that can be masked is returned as it is.
    """
    masks, tools = draw_masks(example, seed), {tool["name"] for tool in example.tools}
    if not masks:
        return example
    change = partial(_mask_text, masks=masks, tools=tools)

    def mask_calls(calls: list[ToolCall]) -> list[ToolCall]:
        # What is not declared, and what an unlisted tool is given, has no mask: draw_masks keeps those names.
        return [
            ToolCall(masks.get(c.name, c.name), {masks.get(k, k): v for k, v in c.arguments.items()})
            for c in calls
        ]

    messages = [
        message
        | ({"content": change(message["content"])} if message.get("content") else {})
        | ({"calls": mask_calls(message["calls"])} if message.get("calls") else {})
        for message in example.messages
    ]
    return replace(
        example,
        id=f"{example.id}#masked",
        messages=messages,
        tools=[_mask_tool(tool, masks, change) for tool in example.tools],
        answer=mask_calls(example.answer),
        demonstrations=(),
    )


def masked_examples(examples: Sequence[Example], ratio: float, seed: int) -> list[Example]:
    """The examples in their order, each with probability `ratio` masked by `mask_names`, as (seed, id)
    decides.

    A policy that meets random names has to read the descriptions. ValueError for a ratio outside 0..1.
    """
    _check_share("the masking ratio", ratio)
    return [
        mask_names(example, seed) if _chosen(ratio, seed, "masking", example) else example
        for example in examples
    ]
