"""Every parser on 100,000 characters of each kind of hostile text: linear time, and no error but its own.

The limit is no stopwatch: a row takes few seconds of CPU time, and minutes to days if a pattern is quadratic.
"""

import random
import signal
from contextlib import suppress
from functools import partial

import pytest
from bfcl_cases import problem

from corpus import dialogues, schema, toolace
from corpus.examples import Unusable
from corpus.overlap import normalise
from corpus.rules import STRICT, names_call
from corpus.toolrl import read_row
from evals import apibank_check, apibank_data, bfcl_check
from prompts import ToolCall
from reward import REWARDS, decode_answer, score

SIZE, SECONDS = 100_000, 30
UNITS = r"""~ \ " ' [ ] ( ) { } < , : = - a 1 [] [[1], [{ [{"a":1}, {"a": '\ \" [a( f(x= f(x=1), a=1, a:1,
1~ f~ {a: add( new~int[]{ put("a",~ new~Array([ new~HashMap< new~HashMap<>()~{{~put("a",~ new~ArrayList<>()~{{
``` new~ArrayList<>(Arrays.asList( List[ <tools> <user> <think> </think> <tool_call> </tool_call>
<tool_response> </tool_response> <tool_call>[]</tool_call> <tool_call></tool_call><obs>
</tool_call><response></response> </user><obs>"""
UNITS = ["\n", "\0", "\ud800", "\u0663", "日", *(unit.replace("~", " ") for unit in UNITS.split())]
HALVES = [("[", "]"), ("{", "}"), ("a", " "), (" ", "a"), (":", "a"), ("\u0300", "\u0316"), ('[{"a":', "1,")]


def fill(unit, size=SIZE):
    return (unit * (size // len(unit) + 1))[:size]


def mixture(seed):
    rng = random.Random(seed)
    return "".join(rng.choices(rng.sample(UNITS, 4), k=SIZE))[:SIZE]


def literals(language, text):
    for declared in ("integer", "float", *bfcl_check.COLLECTIONS):
        with suppress(ValueError):  # more digits than Python reads
            bfcl_check.read_literal(text, declared, "integer", language)


def turns(text):
    for role in ("function_call", "tool"):
        dialogues.read_turns([{"from": role, "value": text}, {"from": "tool", "value": "1"}], ["f"])


def dialogue(text):
    item = {"system": text, "user": text, "answer": [{"parameters": {}}], "other": {"sample_id": 1}}
    apibank_data.with_dialogue(apibank_data.GoldCall("level-3#0", 3, None, {}, {}, [], []), [item])


def toolrl(text):
    listed = "1. Name: f\nDescription: \nParameters: {}"
    for parts in ((text, "", ""), (listed, text, ""), (listed, "", text)):
        with suppress(Unusable):
            read_row(*parts, "1", STRICT, True)


API = {"f": {"input_parameters": {"x": {"type": "str"}}, "required": []}}
GOLD = apibank_data.GoldCall("1", 1, ToolCall("f", {"x": "a"}), {"x": "a"}, API, ["f"], [])
CALL = '<think>a</think><tool_call>[{"name": "f", "arguments": {"x": %s}}]</tool_call>'
TOOLS = [{"name": name, "parameters": {"x": {}}} for name in "fa"]
PARSERS = {  # function, the errors that it documents, texts around the hostile one
    "reward": (lambda text: [score(text, [], row) for row in REWARDS], (), "%s", "<think>%s</think>", CALL),
    "answer": (decode_answer, [ValueError], "%s", '[{"name": "f", "arguments": {"x": %s}}]'),
    "apibank": (partial(apibank_check.judge, GOLD), (), "%s", CALL),
    "bfcl": (partial(bfcl_check.bfcl_verdict, problem("dict", [{"a": [1]}])), (), "%s", CALL),
    "java": (partial(literals, "java"), (), "%s", 'new HashMap<>() {{ put("a", %s); }}', "new int[]{%s}"),
    "javascript": (partial(literals, "javascript"), (), "%s", "{a: %s}", "[%s]", "new Array(%s)"),
    "types": (lambda text: schema.json_type({"type": text}), (), "%s", "Optional[%s]", "str%s, optional"),
    "toolace": (partial(toolace.parse_toolace_calls, tool_names="fa"), (), "%s", "[f(%s)]", "[f(x=[%s])]"),
    "literals": (toolace.read_literals, (ValueError, SyntaxError, RecursionError), "%s", "['%s']"),
    "tools": (schema.read_tools, [ValueError], "%s", '[{"name": "f", "parameters": {"x": %s}}]'),
    "toolrl": (toolrl, (), "%s", "<user>%s", "<tool_call>%s", "1. Name: f\nDescription: %s\nParameters: {}"),
    "listed tools": (dialogues.find_tools, (), "%s%s%s", "<tools>%s</tools>"),
    "turns": (turns, [Unusable], "%s", "<tool_response>%s</tool_response>"),
    "mentions": (partial(names_call, tools=TOOLS), (), "%s%s%s"),
    "words": (normalise, (), "%s%s%s"),
    "dialogue": (dialogue, apibank_data.BROKEN, "%s", "<tool_call></tool_call><obs>{'a': %s}</obs>"),
}
KINDS = [*map(fill, UNITS), *map(mixture, range(10))]
KINDS += [fill(first, SIZE // 2) + fill(second, SIZE // 2) for first, second in HALVES]


@pytest.mark.parametrize("name", PARSERS)
def test_hostile_text_costs_linear_time(name):
    function, errors, *frames = PARSERS[name]
    signal.signal(signal.SIGVTALRM, lambda *_: pytest.fail("it takes more than linear time"))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        for text in (frame.replace("%s", kind) for kind in KINDS for frame in frames):
            with suppress(*errors):
                function(text)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
