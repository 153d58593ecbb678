"""Asks a model with tools, and shows its thought and its calls.

    python -m ops.chat MODEL --tools tools.json "a hotel in Oslo for 3 nights"

Without a query it is a conversation: a line is a message, or what the calls gave if it begins with "tool:".
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch

from config import UserError, printable
from corpus.schema import read_tools
from distributed.ranks import run_script
from distributed.weights import load_model, model_config
from kernel.decode import Prompt
from model import check_vocabulary, load_tokenizer
from prompts import Parsed, PromptError, check_tokenizer, encode_prompt, load_template, parse_completion
from rollout import Decoding, sample_groups


def show(reply: Parsed, text: str) -> Iterator[str]:
    """A reply for people, line by line: the thought, each call as name(argument=JSON), or what is wrong."""
    if reply.error:
        yield f"malformed ({reply.error}): {text}"
    elif reply.think:
        yield f"thought: {reply.think.strip()}"
    if reply.calls == []:
        yield "no call"
    for call in reply.calls or ():
        values = (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in call.arguments.items())
        yield f"{call.name}({', '.join(values)})"


def typed() -> Iterator[str]:
    """What the user types, up to an empty line, Ctrl-D or Ctrl-C."""
    print('A message, or "tool: …" with what the calls gave; an empty line ends.')
    try:
        while line := input("> ").strip():
            yield line
    except (EOFError, KeyboardInterrupt):
        print()


def main(arguments: list[str]) -> None:
    """`MODEL --tools FILE [QUERY]`. Raises UserError."""
    parser = argparse.ArgumentParser(prog="python -m ops.chat", description="Asks a model with tools.")
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("query", nargs="?", help="without it, a conversation")
    parser.add_argument("--tools", type=Path, required=True, metavar="FILE", help="a JSON list of tools")
    template = "with a {tools} slot (default: the prompt that the model was trained with, or our own)"
    parser.add_argument("--prompt_template", default="", metavar="FILE", help=template)
    parser.add_argument("--max_new_tokens", type=int, default=512, help="of a reply (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="(default: 0, greedy)")
    args = parser.parse_intermixed_args(arguments)  # or Python 3.11 finds no query behind an option
    if not args.temperature >= 0 or args.max_new_tokens < 1:
        parser.error("--temperature is at least 0, and --max_new_tokens at least 1")
    try:
        tools = read_tools(args.tools.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"tools: {args.tools} is no JSON list of tools: {error}") from None
    tokenizer = load_tokenizer(args.model)
    template = load_template(args.prompt_template, tokenizer)
    check_tokenizer(tokenizer, template)
    check_vocabulary(tokenizer, model_config(args.model))
    model = load_model(args.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    decoding = Decoding(1, args.temperature, args.max_new_tokens, 1)
    messages: list[dict] = []
    for line in [args.query] if args.query else typed():
        result = line.startswith("tool:")
        said = {"role": "tool" if result else "user", "content": line.removeprefix("tool:").strip()}
        try:
            ids = encode_prompt(tokenizer, [*messages, said], tools, template)
        except PromptError as error:
            if args.query:
                raise
            print(f"left out: {error}")
            continue
        [group] = sample_groups(model, tokenizer, [Prompt("chat", ids, random.getrandbits(62))], decoding)
        reply = parse_completion(group.texts[0])
        print(printable("\n".join(show(reply, group.texts[0]))))
        if reply.calls is not None:  # a malformed reply is forgotten, with what was said
            messages += [said, {"role": "assistant", "content": "", "calls": reply.calls}]


if __name__ == "__main__":
    run_script(main)
