"""samples_page.py: the page holds the rows, or an even choice; nothing that a model wrote can act in it."""

import base64
import hashlib
import json
import math
import re
from pathlib import Path

import pytest

from config import ConfigError
from ops import samples_page
from ops.samples_page import TEMPLATE, main, write_page
from prompts import ToolCall, render_completion

HOSTILE = [
    "</script><script>document.title = 'taken'</script>", "<img src=x onerror=\"document.title = 'taken'\">",
    "<!--<script>", "line\u2028end", "half a pair \ud800", "a\x00b", "&lt;b&gt; ]]>", "__ROWS__",
]


def row(step: int = 1, text: str = "ab", **changes) -> dict:
    made = {
        "step": step, "prompt_id": f"p{step}", "completion": text, "reward": 0.0, "reason": "no_call",
        "advantage": -0.5, "truncated": False, "kind": "single", "query": "rain?",
        "answer": [{"name": "f", "arguments": {"x": 1.0}}], "tokens": [*text, "<end>"],
        "logprobs": [-0.25] * (len(text) + 1),
    }
    return made | changes


def run_of(folder: Path, rows: list[dict], rest: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(one) + "\n" for one in rows) + rest
    (folder / "samples.jsonl").write_text(text, encoding="utf-8")
    return folder


def embedded(page: Path) -> dict:
    """What the page's script reads."""
    return json.loads(page.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0])


def unpacked(page: Path) -> list[dict]:
    """The rows of a page, with the tables put back in."""
    data, rows = embedded(page), []
    for step, prompt, reason, reward, advantage, truncated, body, surprise, _ in data["rows"]:
        tokens = [data["words"][i] for i in body]
        one = row(step, "".join(tokens).removesuffix("<end>"), reward=reward, advantage=advantage)
        one |= dict(zip(("prompt_id", "kind", "query"), data["prompts"][prompt]))
        one["answer"] = [json.loads(line) for line in data["prompts"][prompt][3].split("\n") if line]
        one |= {"reason": data["reasons"][reason], "truncated": truncated, "tokens": tokens}
        rows.append(one | {"logprobs": [-x / 1000 for x in surprise]})
    return rows


def test_the_page_holds_the_rows_of_a_run_that_goes_on(tmp_path):
    two = [{"name": name, "arguments": {}} for name in ("g", "h")]
    rows = [row(1), row(1, "東京", reason="correct", reward=1.0, answer=[]), row(2, "c", answer=two)]
    rows.append(row(2, "b", truncated=True, kind="none"))
    main([str(run_of(tmp_path, rows, rest=json.dumps(row(3))[:40]))])  # a line is being written
    page = tmp_path / "samples.html"
    assert unpacked(page) == rows
    assert embedded(page)["curves"] == {"single": [[2, 1.0], [1, 0.0]], "none": [[0, 0], [1, 0.0]]}
    with pytest.raises(ConfigError, match="has no samples.jsonl; give the folder of a run of grpo.py"):
        main([str(tmp_path / "nothing")])


def test_a_prompt_shows_its_tools_its_turns_and_what_it_begins_of_the_reply(tmp_path):
    """They stand in its first row alone. Rows of older runs have none of it, some not even tokens."""
    turns, tools = [["user", "a"], ["tool", "b"], ["user", "rain?"]], [{"name": "f"}]
    rows = [row(1, tools=tools, turns=turns, begun="<think>\n"), row(1, "c"), row(2)]
    old = {"step": 3, "prompt_id": "p", "completion": "…", "reward": 1.0}
    data = embedded(write_page(run_of(tmp_path, [*rows, old])))
    assert data["prompts"][0][4:] == [[["f", '{"name": "f"}']], turns, "<think>\n"]
    assert data["prompts"][1][4:] == data["prompts"][2][4:] == [[], [], ""]
    assert [one[1] for one in data["rows"]] == [0, 0, 1, 2] and data["words"][data["rows"][3][6][0]] == "…"


def test_a_line_that_is_no_row_is_left_out_and_told(tmp_path, capsys):
    lines = ["{", "7", "{}", json.dumps(row(1, reward=math.nan)), json.dumps(row(1, logprobs=["x"] * 3))]
    run_of(tmp_path, [row(1)], rest="\n".join([*lines, "", "\0\0"]) + "\n\0\0")  # the last: of a power cut
    assert unpacked(write_page(tmp_path)) == [row(1)]
    run_of(tmp_path / "copied", [row(1)], rest=json.dumps(row(2)))  # whole, but for its line break
    assert unpacked(write_page(tmp_path / "copied")) == [row(1), row(2)]
    assert f"left out {len(lines)} " in capsys.readouterr().err


def test_a_log_prob_that_was_no_number_is_missing(tmp_path):
    """log.jsonl and samples.jsonl have null for NaN; older ones have NaN."""
    rows = [row(1, "a", logprobs=[odd, -0.25]) for odd in (None, math.nan, -math.inf)]
    assert [one[7] for one in embedded(write_page(run_of(tmp_path, rows)))["rows"]] == [[None, 250]] * 3


ASKED = [ToolCall("f", {"x": 1, "city": "Łódź"}), ToolCall("g", {})]


@pytest.mark.parametrize("calls, expected", [
    (ASKED[::-1], []),
    ([ToolCall("f", {"x": 1.0, "city": "Łódź"}), ASKED[1]], ["f: x is 1.0 instead of 1"]),
    ([ToolCall("f", {"x": 1, "y": [2]}), ASKED[1]], ['f: city is missing: "Łódź"', "f: y is extra: [2]"]),
    ([ASKED[0]], ['missing call: {"name": "g", "arguments": {}}']),
    ([*ASKED, ToolCall("h", {})], ['extra call: {"name": "h", "arguments": {}}']),
    ([ToolCall("f", {"x": 2}), *ASKED], ['extra call: {"name": "f", "arguments": {"x": 2}}']),
    ([], [f"missing call: {samples_page.shown(call)}" for call in ASKED]),
])
def test_what_differs_from_the_ground_truth_is_named(calls, expected):
    assert samples_page.differences(render_completion(calls, "x"), ASKED) == expected
    assert samples_page.differences("no calls", ASKED) == []


@pytest.mark.parametrize("limit, most", [("MAX_ROWS", 6), ("MAX_BYTES", 2000)])
def test_of_a_long_run_every_nth_step_is_shown(tmp_path, monkeypatch, limit, most):
    monkeypatch.setattr(samples_page, limit, most)
    page = write_page(run_of(tmp_path, [row(step, f"{k}") for step in range(1, 6) for k in range(3)]))
    kept = [f"{one['step']}:{one['completion']}" for one in unpacked(page)]
    assert kept == "1:0 1:1 1:2 4:0 4:1 4:2".split()
    assert [n for n, _ in embedded(page)["curves"]["single"]] == [3] * 5, "the curve is of all rows"


def hostile_page(folder: Path, texts: list[str]) -> Path:
    """A page with each text in every place that it shows."""
    rows = []
    for text in texts:
        answer = [{"name": text, "arguments": {text: text}}]
        places = dict.fromkeys(("reason", "kind", "query", "prompt_id"), text)
        places |= {"tools": [{text: text}], "turns": [[text, text]], "begun": text}
        rows.append(row(1, text, tokens=[text], logprobs=[-1.0], answer=answer, **places))
    return write_page(run_of(folder, rows))


def test_what_a_model_writes_stays_text(tmp_path):
    """Inside a script element `</script>` ends it, `<!--<script>` hides its end: the rest would be HTML."""
    path = hostile_page(tmp_path, HOSTILE)
    assert [one["completion"] for one in unpacked(path)] == HOSTILE
    page, template = path.read_text(encoding="utf-8"), TEMPLATE.read_text(encoding="utf-8")
    block = page[len(page.partition('id="data">')[0]) + 10 : -len(template.partition("__ROWS__")[2])]
    assert block.isascii() and block.isprintable() and not set("<>&") & set(block)
    assert page.count("<") == template.count("<"), "and nothing of it is anywhere else"


def test_only_the_pages_own_script_may_run_and_it_asks_for_nothing_else(tmp_path):
    """A second lock: even text that became a script element by some mistake of ours would not be run."""
    page = hostile_page(tmp_path, HOSTILE).read_text(encoding="utf-8")
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    assert "innerHTML" not in script and "insertAdjacent" not in script and "document.write" not in script
    template = TEMPLATE.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")  # a name
    assert not re.search(r"https?:|\bsrc=|\bhref=|url\(|@import|fetch\(|<link", template)
