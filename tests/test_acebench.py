"""evals/acebench.py: verdicts of the official checker, what the model is asked, columns, files, errors."""

import pytest
from bfcl_cases import reply, score, write_jsonl

from evals import acebench, predict
from evals.acebench import PARTS, find_fault, main, prompt_case, read_problem
from prompts import build_messages

TEXT, WHOLE, TRUE = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
BOOK = {
    "city": TEXT, "nights": WHOLE, "breakfast": TRUE, "price": {"type": "number"}, "note": TEXT, "odd": TEXT,
    "none": {"type": "array", "items": TEXT}, "guests": {"type": "array", "items": TEXT},
    "grid": {"type": "array", "items": {"type": "array"}}, "share": {"type": "float"},
    "extras": {"type": "array", "items": {"type": "object"}}, "period": {"type": "object"},
}
GOLD = {
    "city": "New York", "nights": 2, "breakfast": True, "price": 99.5, "odd": ["x"], "none": [], "share": 0.5,
    "guests": ["Ann-Marie", "Bo"], "grid": [[1, 0], [0, 1]],
    "extras": [{"name": "late check-out", "count": 1}],
    "period": {"start": "2026-05-01", "detail": {"flexible": True}, "days": ["Mo", "Tu"], "kind": ""},
}


def tool(name: str, properties: dict, required: list[str], key: str = "parameters") -> dict:
    schema = {"type": "object", "properties": properties, "required": required}
    return {"name": name, "description": "d", key: schema, "tags": ["t"]}


def case(functions, answers, **more) -> dict:
    row = {"id": "a_0", "question": "user: q\n", "function": functions, **more}
    return read_problem(row, answers, "p")


def period(**changes) -> dict:
    return {"period": {**GOLD["period"], **changes}}


# Changes of the right arguments -> what the official checker says.
VALUES = [
    ({}, True), ({"city": "in new york, please"}, True), ({"city": "New_York*"}, True),
    ({"city": "York"}, False), ({"city": None}, False), ({"city": "true"}, False), ({"nights": 3}, True),
    ({"nights": "2"}, False), ({"nights": 2.0}, True), ({"nights": True}, False),
    ({"breakfast": False}, True), ({"breakfast": "false"}, True), ({"breakfast": "no"}, False),
    ({"price": 1.5}, True), ({"price": 7}, True),
    ({"price": "99.5"}, False), ({"share": 1}, True), ({"share": "0.5"}, False), ({"odd": "other"}, True),
    ({"odd": ["other"]}, True), ({"odd": 5}, False), ({"none": []}, False), ({"none": ["a"]}, False),
    ({"guests": ["ANN*MARIE", "b.o"]}, True), ({"guests": ["Bo", "Ann-Marie"]}, False),
    ({"guests": []}, False), ({"guests": "Ann-Marie, Bo"}, False), ({"grid": [[1, 0], [0, 1]]}, True),
    ({"grid": [[1, 0]]}, False), ({"grid": ["1", "0"]}, False),
    ({"extras": [{"name": "a late check-out", "count": 10}]}, True),
    ({"extras": [{"name": "late check-out", "count": 2}]}, False), ({"extras": []}, False),
    ({"extras": [{"name": "late check-out"}]}, False), ({"extras": ["late check-out"]}, False),
    (period(start="2026/05/01, noon"), True), (period(start="05-01"), False), (period(more=1), False),
    (period(detail={"flexible": "true"}), True), (period(detail={"flexible": "True"}), False),
    (period(detail={}), False), (period(detail="x"), False), (period(days=["Mo"]), False),
    (period(days=["mo", "Tu"]), False), (period(kind="any"), True), ({"period": []}, False),
    ({"note": "x"}, False), ({"pets": 1}, False),
]


def test_case_is_folded_before_quotes_are_unified():
    """As officially: a Greek sigma ends a word before a double quote, and not before an apostrophe."""
    problem = case([tool("book", {"city": TEXT}, ["city"])], {"book": {"city": "ασ'β"}})
    assert find_fault(problem, reply(("book", {"city": "ΑΣ'Β"}))) == ""


@pytest.mark.parametrize("changes, right", VALUES)
def test_values_are_judged_as_by_the_official_checker(changes, right):
    """Arguments that may be missing are missing but for those that change."""
    problem = case([tool("book", BOOK, ["city"])], {"book": GOLD})
    arguments = {"city": GOLD["city"], **changes}
    fault = find_fault(problem, reply(("book", arguments)))
    assert (fault == "") is right, fault
    assert right or fault.rpartition(":")[2] in changes  # it says which
    assert find_fault(problem, reply(("book", {"nights": 2}))) == "missing_argument:city"


A, B, AB = ("ping", {"host": "a"}), ("ping", {"host": "b"}), ("ping", {"host": "ab"})
TWO = {"ping_1": {"host": "a"}, "ping_2": {"host": "b"}}
PING, PING_ALL = tool("ping", {"host": TEXT}, ["host"]), tool("ping_all", {"host": TEXT}, ["host"])
ALL = ("ping_all", {"host": "a"})
CALLS = [
    ([PING], TWO, [A, B], True), ([PING], TWO, [B, A], True), ([PING], TWO, [A], False),
    ([PING], TWO, [A, A], False), ([PING], TWO, [AB, AB], True), ([PING], TWO, [A, B, B], False),
    ([PING], TWO, [A, ALL], False), ([PING], TWO, [], False),
    ([PING], TWO, [("ping_1", {"host": "a"}), B], False), ([PING], TWO, [AB, ALL], False),
    ([PING], [{"ping": {"host": "a"}}, {"ping": {"host": "b"}}], [B], True),
    ([PING], [{"ping": {"host": "c"}}, {"ping": {"host": "d"}}], [B], False),
    ([PING_ALL, PING], {"ping_all": {"host": "a"}}, [ALL], True),
    ([PING, PING_ALL], {"ping_all": {"host": "a"}}, [ALL], False),
    ([{"name": "now", "parameters": {}}], {"now": {}}, [("now", {})], True),
    ([{"name": "now", "parameters": {}}], {"now": {}}, [("now", {"x": 1})], False),
    ([tool("now", {}, [])], {"now": {}}, [("now", {})], False),
    ([tool("now", {}, [])], {"now": {}}, [("now", {"x": 1})], True),
    ([PING], {"ping": {}}, [A], False), ([PING], {"ping": {"host": "a"}}, [("ping", {})], False),
]


@pytest.mark.parametrize("functions, answers, calls, right", CALLS)
def test_calls_are_judged_as_by_the_official_checker(functions, answers, calls, right):
    assert (find_fault(case(functions, answers), reply(*calls)) == "") is right


@pytest.mark.parametrize("output", [
    "", "[ping(host='a')]", "<tool_call>[]", '<tool_call>{"name": "ping"}</tool_call>',
    reply(("ping", ["a"])), "<tool_call>" + "[" * 9999 + "</tool_call>",
])
def test_what_is_no_list_of_calls_is_wrong(output):
    assert find_fault(case([PING], {"ping": {"host": "a"}}), output) == "no_calls"


def test_the_prompt_holds_tools_time_and_dialogue():
    said = (
        'user: Ping a.\nsystem: [ping(host="a", fast=true)]\nsystem: Done.\n'
        "user: Now these:\n- b\nsystem: [b]?\nuser: Yes.\n"
    )
    hidden = tool("other.tool", {"x": TEXT}, [], key="arguments")
    asked = prompt_case(case([hidden, PING], TWO, question=said, time="It is May 1, 2026."), "en")
    assert [set(shown) for shown in asked.tools] == [{"name", "description", "parameters"}] * 2
    assert asked.tools[0]["parameters"]["properties"] == {"x": TEXT}
    system, *turns = build_messages(asked.messages, asked.tools)
    assert system["content"].endswith("It is May 1, 2026.") and '"other.tool"' in system["content"]
    past = '<tool_call>[{"name": "ping", "arguments": {"host": "a", "fast": true}}]</tool_call>'
    told = [("user", "Ping a."), ("assistant", past), ("assistant", "Done."), ("user", "Now these:\n- b")]
    told += [("assistant", "[b]?"), ("user", "Yes.")]
    assert [(turn["role"], turn["content"]) for turn in turns] == told


@pytest.fixture
def data(tmp_path):
    """A checkout with two cases of every English part, and one Chinese one."""
    for language, parts, count in (("en", PARTS, 2), ("zh", PARTS[:1], 1)):
        folder = tmp_path / "ACEBench" / "data_all" / f"data_{language}"
        for part in parts:
            ids = [f"normal_{part}_{i}" for i in range(count)]
            row = {"question": "user: q\n", "function": [PING], "time": ""}
            write_jsonl(folder / f"data_normal_{part}.json", [{"id": i, **row} for i in ids])
            answers = [{"id": i, "ground_truth": {"ping": {"host": "a"}}} for i in ids]
            write_jsonl(folder / "possible_answer" / f"data_normal_{part}.json", answers)
    return tmp_path / "ACEBench"


def test_columns_are_means_of_their_parts(tmp_path, data):
    """A part with fewer replies weighs as much as the others; both means say which they are."""
    rows = [{"id": f"normal_{part}_0", "output": reply(A)} for part in PARTS[1:]]
    rows += [{"id": f"normal_{PARTS[0]}_{i}", "output": reply(A) if i else "no"} for i in range(2)]
    read = score(tmp_path, rows, data, main=main)
    found = {row["name"]: row["accuracy"] for row in read("scores.json")["table"]}
    expected = {"atom": 550 / 6, "single_turn": 100, "mean of 8 parts": 93.75}
    expected["mean of both columns"] = 575 / 6
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found[PARTS[0]] == 50 and found["Tool-N1-7B"] == 81.63
    assert [row["valid"] for row in read("verdicts.jsonl")] == [True] * 7 + [False, True]
    assert main(["--diff", str(tmp_path / "o"), str(tmp_path / "o")]) == 0
    read = score(tmp_path, rows[1:], data, main=main)  # a column that lacks a part has no figure
    columns = read("scores.json")["table"][len(PARTS) : len(PARTS) + 4]
    assert [row["accuracy"] for row in columns] == [None, 100, None, None]


def test_generate_asks_the_chosen_parts_in_the_chosen_language(data, monkeypatch):
    asked = []
    monkeypatch.setattr(predict, "generate", lambda args, cases, benchmark: asked.append((cases, benchmark)))
    paths, parts = ["--model", "m", "--out", "o", "--data"], "single_turn,normal_atom_bool"
    assert main(["generate", *paths, str(data), "--categories", parts, "--limit", "1"]) == 0
    assert main(["generate", *paths, str(data / "data_all" / "data_zh"), "--language", "zh"]) == 0
    (english, named), (chinese, other) = asked
    assert [case.id for case in english] == [f"normal_{part}_0" for part in (PARTS[0], *PARTS[-2:])]
    assert [case.id for case in chinese] == ["normal_atom_bool_0"]
    assert (named, other) == ("ACEBench en", "ACEBench zh")


def test_diff_refuses_two_languages_whose_ids_are_the_same(tmp_path, data, capsys):
    (tmp_path / "zh").mkdir()
    for place, language in ((tmp_path, "en"), (tmp_path / "zh", "zh")):
        rows = [{"id": "normal_atom_bool_0", "output": reply(A)}]
        score(place, rows, data, "--language", language, main=main)
    assert main(["--diff", str(tmp_path / "o"), str(tmp_path / "zh" / "o")]) == 2
    assert "scored on ACEBench en" in capsys.readouterr().err


def spoil(data, part="atom_enum", answers=True, text="{}\n"):
    folder = data / "data_all" / "data_en"
    (folder / ("possible_answer" if answers else ".") / f"data_normal_{part}.json").write_text(text)


@pytest.mark.parametrize("harm, told", [
    (lambda data: spoil(data), "2 cases, but 1 answers"),
    (lambda data: spoil(data, text='{"ground_truth": {"ping": 5}}\n' * 2), "_enum.json:1: no usable case"),
    (lambda data: spoil(data, answers=False, text='{"id": "x"}\n' * 2), "1: no usable case (KeyError('fun"),
    (lambda data: (data / "data_all").rename(data / "elsewhere"), "no ACEBench data"),
    (lambda data: None, "p.jsonl:1: "),  # a case that is not there
])
def test_errors_are_one_sentence(tmp_path, data, capsys, harm, told):
    harm(data)
    write_jsonl(tmp_path / "p.jsonl", [{"id": "normal_atom_bool_9", "output": ""}])
    paths = ["--predictions", str(tmp_path / "p.jsonl"), "--data", str(data), "--out", str(tmp_path)]
    assert main(["score", *paths]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_the_other_language_is_not_taken_for_this_one(data):
    with pytest.raises(acebench.ReportError, match="--language zh"):
        acebench.load_problems(data / "data_all" / "data_en", "zh")
    with pytest.raises(acebench.ReportError, match="unknown 'agent'"):
        acebench.choose_parts(["atom,agent"])
