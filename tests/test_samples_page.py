"""samples_page.py: the page holds the rows, all of them or an even choice, and nothing that a model wrote can
act in it.
"""

import base64
import hashlib
import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from config import ConfigError
from corpus.sources import append_jsonl
from ops import samples_page
from ops.samples_page import TEMPLATE, Line, main, thin, write_page

HOSTILE = [
    "</script><script>document.title = 'taken'</script>", "<img src=x onerror=\"document.title = 'taken'\">", "<!--<script>",
    "line\u2028paragraph\u2029end", "half a pair \ud800", "\u202eturned round", "a\x00b", "&lt;b&gt; ]]>", "__ROWS__",
]


def row(step: int = 1, text: str = "ab", **changes) -> dict:
    """A row as rollout.sample_rows writes it."""
    made = {
        "step": step,
        "prompt_id": f"p{step}",
        "completion": text,
        "reward": 0.0,
        "reason": "no_call",
        "advantage": -0.5,
    }
    made |= {
        "truncated": False,
        "kind": "single",
        "query": "rain?",
        "answer": [{"name": "f", "arguments": {"x": 1.0}}],
    }
    return made | {"tokens": [*text, "<end>"], "logprobs": [-0.25] * (len(text) + 1)} | changes


def old_row(text: str) -> dict:
    """A row from before tokens were logged."""
    return {
        "step": 1,
        "prompt_id": "p",
        "completion": text,
        "reward": 1.0,
        "reason": "correct",
        "advantage": 1.0,
    }


def run_of(folder: Path, rows: list[dict], rest: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(one) + "\n" for one in rows) + rest
    (folder / "samples.jsonl").write_text(text, encoding="utf-8")
    return folder


def embedded(page: Path) -> dict:
    """What the page's script reads."""
    return json.loads(page.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0])


def unpacked(data: dict) -> list[dict]:
    """The rows, with the tables put back in."""
    rows = []
    for step, prompt, reason, reward, advantage, truncated, body, surprise in data["rows"]:
        pid, kind, query, answer = data["prompts"][prompt]
        one = {
            "step": step,
            "prompt_id": pid,
            "reward": reward,
            "reason": data["reasons"][reason],
            "advantage": advantage,
        }
        one |= {"kind": kind, "query": query, "truncated": truncated}
        if isinstance(body, str):
            rows.append(one | {"completion": body})
        else:
            one |= {"answer": [json.loads(line) for line in answer.split("\n") if line]}
            one |= {"tokens": [data["words"][i] for i in body], "logprobs": [-x / 1000 for x in surprise]}
            rows.append(one)
    return rows


# --------------------------------------------------------------------------------------------------- the rows


def test_the_page_holds_the_rows(tmp_path):
    rows = [
        row(1, "ab"),
        row(1, "東京", reason="correct", reward=1.0, answer=[]),
        row(2, "b", truncated=True, kind="none"),
    ]
    page = write_page(run_of(tmp_path / "r", rows))
    assert page == tmp_path / "r" / "samples.html"
    expected = [{key: value for key, value in one.items() if key != "completion"} for one in rows]
    assert unpacked(embedded(page)) == expected
    assert embedded(page)["curves"] == {"single": [[2, 1.0], [0, 0]], "none": [[0, 0], [1, 0.0]]}


def test_rows_without_tokens_show_their_completion(tmp_path):
    """So do rows whose tokens and log-probs do not belong together."""
    broken = row(1, "cd", logprobs=[-1.0])
    (first, second) = unpacked(embedded(write_page(run_of(tmp_path, [old_row("ab"), broken]))))
    assert first["completion"] == "ab" and first["kind"] == first["query"] == ""
    assert second["completion"] == "cd"


def test_a_running_run_and_broken_lines(tmp_path):
    """The last line is half written; what is no row is counted and said, and stops nothing."""
    rest = 'no JSON\n[1]\n{"step": 1}\n{"step": 1e999, "reward": 0}\n' + json.dumps(row(3))[:40]
    data = embedded(write_page(run_of(tmp_path, [row(1), row(2)], rest)))
    assert [one["step"] for one in unpacked(data)] == [1, 2]
    assert data["logged"] == 2 and data["unreadable"] == 4


def test_numbers_that_json_cannot_carry(tmp_path):
    """JSON.parse knows no NaN: one of them would leave the whole page empty."""
    bad = row(reward=math.nan, advantage=math.inf, logprobs=[math.nan, -0.5, -math.inf])
    (shown,) = embedded(write_page(run_of(tmp_path, [bad])))["rows"]
    assert shown[3:5] == [None, None] and shown[7] == [None, 500, None]


def test_a_run_without_samples_yet(tmp_path):
    assert embedded(write_page(run_of(tmp_path, [])))["rows"] == []


# --------------------------------------------------------------------------------------------------- thinning


def steps_shown(page: Path) -> list[int]:
    return [one["step"] for one in unpacked(embedded(page))]


def test_every_step_keeps_equally_many_of_its_first_rows(tmp_path):
    rows = [row(step, f"{k}") for step in range(1, 6) for k in range(4 if step != 2 else 1)]
    data = embedded(write_page(run_of(tmp_path, rows), limit=11))
    assert [(one["step"], one["tokens"][0]) for one in unpacked(data)] == [
        (1, "0"), (1, "1"), (2, "0"), (3, "0"), (3, "1"), (4, "0"), (4, "1"), (5, "0"), (5, "1"),
    ]
    assert data["logged"] == 17 and [n for n, _ in data["curves"]["single"]] == [4, 1, 4, 4, 4], (
        "the curve is of all rows"
    )


def test_of_more_steps_than_rows_every_third_is_shown(tmp_path):
    run = run_of(tmp_path, [row(step) for step in range(1, 13)])
    assert steps_shown(write_page(run, limit=12)) == list(range(1, 13))
    assert steps_shown(write_page(run, limit=4)) == [1, 4, 7, 10]


def test_long_rows_make_a_page_of_fewer_rows(tmp_path, monkeypatch):
    rows = [row(step, "".join(map(chr, range(200, 800)))) for step in range(1, 101)]
    run = run_of(tmp_path, rows)
    assert len(steps_shown(write_page(run))) == 100
    monkeypatch.setattr(samples_page, "MAX_BYTES", 100_000)
    page = write_page(run)
    assert len(page.read_bytes()) < 100_000 + len(TEMPLATE.read_bytes())
    assert 10 < len(steps_shown(page)) < 30 and len(set(steps_shown(page))) == len(steps_shown(page))


def test_no_more_bytes_are_read_than_a_page_may_need():
    """Replies of thousands of tokens would fill the memory before their page is found to be too large."""
    lines = [Line(100 * k, 100, k // 4, "", 0.0) for k in range(12)]
    assert thin(lines, 100, 600) == [lines[k] for k in (0, 1, 4, 5, 8, 9)]


# ----------------------------------------------------------------------------------------- alone and harmless


def hostile_page(folder: Path, texts: list[str]) -> Path:
    """Each text in every place that the page shows, and in an old row."""
    rows = []
    for text in texts:
        rows.append(
            row(1, text, reason=text, kind=text, query=text, prompt_id=text, tokens=[text], logprobs=[-1.0])
        )
        rows.append(row(1, "-", answer=[{"name": text, "arguments": {text: text}}]))
    return write_page(run_of(folder, rows + [old_row(text) for text in texts]))


def test_what_a_model_writes_stays_text(tmp_path):
    """Inside a script element `</script>` ends it and `<!--<script>` hides its end; the rest of the page
    would be HTML.
    """
    path = hostile_page(tmp_path, HOSTILE)
    assert [one["completion"] for one in unpacked(embedded(path))[-len(HOSTILE) :]] == HOSTILE
    page, template = path.read_text(encoding="utf-8"), TEMPLATE.read_text(encoding="utf-8")
    block = page[len(page.partition('id="data">')[0]) + 10 : -len(template.partition("__ROWS__")[2])]
    assert block.isascii() and block.isprintable() and not set("<>&") & set(block)
    assert page.count("<") == template.count("<"), "and nothing of it is anywhere else"


def test_only_the_pages_own_script_may_run(tmp_path):
    """A second lock: even text that became a script element by some mistake of ours would not be run."""
    page = hostile_page(tmp_path, HOSTILE).read_text(encoding="utf-8")
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    assert "innerHTML" not in script and "insertAdjacent" not in script and "document.write" not in script


def test_the_page_asks_for_nothing_else():
    text = TEMPLATE.read_text(encoding="utf-8").replace(
        "http://www.w3.org/2000/svg", ""
    )  # a name, not an address
    assert not re.search(r"https?:|\bsrc=|\bhref=|url\(|@import|fetch\(|<link", text)


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), ""
)


@pytest.mark.skipif(not BROWSER, reason="no Chromium is installed; the page's script is tried in it")
@pytest.mark.parametrize(
    ("view", "count"),
    [
        ("", "4 completions, 2 right (50.0 %)"),  # the last step
        ("step=1", "24 completions, 8 right (33.3 %)"),
        ("step=all&kind=none&verdict=wrong&color=logprob", "1 completion, 0 right (0.0 %)"),
        ("reason=correct&q=PARIS", "1 completion, 1 right (100.0 %)"),
    ],
)
def test_in_a_browser(tmp_path, view, count):
    texts = [text for text in HOSTILE if "\ud800" not in text]  # which Chromium shows, but cannot print
    page = hostile_page(tmp_path / "hostile", texts)
    some = (
        ("Paris", "single", "correct"),
        ("Paris", "single", "no"),
        ("Rome", "none", "correct"),
        ("Rome", "none", "no"),
    )
    rows = [row(2, city, kind=kind, reason=reason) for city, kind, reason in some]
    append_jsonl(page.with_name("samples.jsonl"), rows)
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += ["--dump-dom", f"{write_page(page.parent).as_uri()}#{view}"]
    shown = subprocess.run(command, capture_output=True, timeout=60).stdout.decode()
    assert f'<p id="count" role="status">{count}</p>' in shown
    assert "<title>Samples of hostile</title>" in shown, "no text has become a script or an image"
    if view == "step=1":
        assert f">{html.escape(texts[0], quote=False)}</span>" in shown, "it is shown as it is"


# ----------------------------------------------------------------------------------------------- command line


def test_command_line(tmp_path, capsys):
    run = run_of(tmp_path / "run", [row(1), row(2)])
    main([str(run), "--out", str(tmp_path / "page.html"), "--limit", "1"])
    assert steps_shown(tmp_path / "page.html") == [1] and not (run / "samples.html").exists()
    assert capsys.readouterr().out == f"page: {tmp_path / 'page.html'} (0.0 MB)\n"


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="has no samples.jsonl; give the folder of a run of grpo.py"):
        main([str(tmp_path / "nothing")])
    with pytest.raises(ConfigError, match="limit must be at least 1, not 0"):
        main([str(run_of(tmp_path, [row()])), "--limit", "0"])
    with pytest.raises(ConfigError, match="no/page.html cannot be written: No such file or directory"):
        main([str(tmp_path), "--out", str(tmp_path / "no" / "page.html")])
