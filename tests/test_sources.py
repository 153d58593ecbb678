"""Files and hub ids: no record is lost, and what is no data says so in one sentence."""

import gzip
import json

import pytest
from test_layouts import ids_of, save, xlam

from config import Config
from corpus.examples import Example
from corpus.layouts import load_examples, write_examples
from corpus.sources import DataError
from data import load_splits


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path):
    path, one = tmp_path / "e.jsonl", Example("1", "own", [], [], [])
    write_examples(path, [one])
    with pytest.raises(ZeroDivisionError):
        write_examples(path, (one if i else 1 / 0 for i in (1, 1, 0)))
    assert path.read_text().count("\n") == 1 and [file.name for file in tmp_path.iterdir()] == ["e.jsonl"]


def test_broken_lines_are_dropped_with_their_numbers(tmp_path):
    path = tmp_path / "x.jsonl"
    query = "line\u2028separator"  # str.splitlines() would cut this record in two
    good = json.dumps(xlam()).replace(", ", ",\r", 1), json.dumps(xlam(query=query), ensure_ascii=False)
    lines = ["\ufeff" + good[0], "5", '{"id": 1, "que', good[1]]
    path.write_bytes("\n".join(lines).encode())
    examples, dropped = load_examples(path)
    assert [(drop.line, drop.reason) for drop in dropped] == [(2, "broken_json"), (3, "broken_json")]
    assert [example.messages[0]["content"] for example in examples] == ["Add 1.", query]


@pytest.mark.parametrize("content, complaint", [
    (b" \n", "is empty"),
    (b"id,query\n1,hello\n", "x.json:1: .*JSON object per line"),
    (b'[{"query": ""},\n oops]', "cannot be read: Expecting value: line 2"),
    (b"[" * 99999, "cannot be read: .*recursion"),
    (b"\xff\xfe\x00", "cannot be read.*UTF-8"),
])
def test_a_file_that_is_no_data_says_what_is_wrong(tmp_path, content, complaint):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        load_examples(tmp_path / "x.json")


def test_a_file_that_is_cut_off_gives_nothing_away(tmp_path):
    """What was read before the end of a broken download must not pass for all there is."""
    whole = gzip.compress(json.dumps([xlam(id=i, query=str(i)) for i in range(500)]).encode())
    for name, data in (("x.json.gz", whole[:-400]), ("x.json", gzip.decompress(whole)[:-5])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="cannot be read"):
            load_examples(tmp_path / name)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of a few files, without a network. Returns the names that were asked for."""
    asked = []

    def download(repository: str, name: str, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(save(tmp_path / "downloaded.json", xlam()))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    files = {"me/one": ["README.md", "data/train.json"], "me/two": ["a.jsonl", "b.parquet"]}
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, name, repo_type: files[name])
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize("source, fetched", [
    ("Team-ACE/ToolACE", ("Team-ACE/ToolACE", "data.json", "dataset")),
    ("me/one", ("me/one", "data/train.json", "dataset")),
    ("me/two/sub/b.json", ("me/two", "sub/b.json", "dataset")),
])
def test_hub_ids_are_fetched_also_by_a_training_run(hub, source, fetched):
    assert ids_of(load_splits(Config(data=source, test_share=0.0)).train) == ["7"]
    assert hub == [fetched]


def test_a_path_that_exists_wins_a_mistyped_one_is_no_hub_id_and_there_must_be_one_file(hub, tmp_path):
    (tmp_path / "me/one").mkdir(parents=True)
    save(tmp_path / "me/one/data.json", xlam(id="local"))
    for path in ("me/one", "me/one/data.json"):
        assert ids_of(load_examples(path)[0]) == ["local"]
    for path in ("you/data.json", "me/one/other.json", "./x/y", "../x/y", "/x/y"):
        with pytest.raises(DataError, match=f"{path.lstrip('./')} does not exist; check the path"):
            load_examples(path)
    assert hub == []
    with pytest.raises(DataError, match="several data files: a.jsonl, b.parquet; name one, as me/two/FILE"):
        load_examples("me/two")
