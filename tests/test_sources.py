"""Files and hub ids: no record is lost, and what is no data says so in one sentence."""

import gzip
import hashlib
import json
import os
from datetime import date
from pathlib import Path
from unittest.mock import Mock

import pytest
from test_layouts import ids_of, save, xlam

from config import Config
from corpus.examples import Example
from corpus.layouts import load_examples, write_examples
from corpus.sources import (
    DataError,
    append_jsonl,
    atomic_folder,
    file_sha256,
    find_files,
    iter_jsonl,
    read_files,
    read_jsonl,
    write_atomic,
)
from data import load_splits


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path):
    path, one = tmp_path / "e.jsonl", Example("1", "own", [], [], [])
    others = [tmp_path / f"e.jsonl.{suffix}" for suffix in ("tmp", "partial")]
    for other in others:
        other.write_text("of a user")
    write_examples(path, [one])
    with pytest.raises(ZeroDivisionError):
        write_examples(path, (one if i else 1 / 0 for i in (1, 1, 0)))
    assert path.read_text().count("\n") == 1 and set(tmp_path.iterdir()) == {path, *others}
    assert all(other.read_text() == "of a user" for other in others)


def test_broken_lines_are_dropped_with_their_numbers(tmp_path):
    path = tmp_path / "x.jsonl"
    query = "line\u2028separator"  # str.splitlines() would cut this record in two
    good = json.dumps(xlam()).replace(", ", ",\r", 1), json.dumps(xlam(query=query), ensure_ascii=False)
    lines = ["\ufeff" + good[0], "5", '{"id": 1, "que', good[1]]
    path.write_bytes("\n".join(lines).encode())
    examples, dropped = load_examples(path)
    assert [(drop.line, drop.reason) for drop in dropped] == [(2, "broken_json"), (3, "broken_json")]
    assert [example.messages[0]["content"] for example in examples] == ["Add 1.", query]


RECORD = xlam()


def lines(*texts: str) -> bytes:
    """JSONL in which {} stands for a record."""
    return "\n".join(texts).replace("{}", json.dumps(RECORD)).encode()


@pytest.mark.parametrize("content, complaint", [
    (b" \n", "is empty"),
    (b"id,query\n1,hello\n", "x.json:1: .*id,query.*JSON object per line"),
    (b'[{"query": ""},\n oops]', "cannot be read: Expecting value: line 2"),
    (b"[" * 99999, "cannot be read: .*recursion"),
    (b"\xff\xfe\x00", "cannot be read.*UTF-8"),
    (b"\xff\xff\xff\xff\x10", "x.json is part of what datasets.save_to_disk saved"),
    (lines("[{}, {}"), "cannot be read: .*delimiter"),
    (lines("[{} {}]"), "cannot be read: .*delimiter"),
    (lines("[{}] {}"), "cannot be read: Extra data"),
    (lines("{},", "{}"), "x.json:1: commas between the records"),
    (lines("{}", "", ", {}"), "x.json:3: commas between the records"),
    (lines("{}", "{} {}"), "x.json:2: several objects on one line"),
    (b"{}\r{}\r", "x.json:1: several objects on one line"),
    (json.dumps(RECORD, indent=1).encode() * 2, "x.json holds objects over several lines"),
    (json.dumps({"v": 1, "data": [RECORD]}).encode(), "x.json:1: an object around the array .* 'data'"),
    (json.dumps({"v": 1, "data": [RECORD]}, indent=1).encode(), "an object around the array .* 'data'"),
    (b'{"v": 1, "rows": [\n%b,\n%b\n' % (2 * (json.dumps(RECORD).encode(),)), "x.json:2: commas"),
    (json.dumps({key: {"0": value, "4": value} for key, value in RECORD.items()}).encode(), "pandas"),
    (json.dumps({"0": RECORD, "4": RECORD}, indent=1).encode(), "pandas"),
    (json.dumps({key: [value, value] for key, value in RECORD.items()}).encode(), "an object of columns"),
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


@pytest.mark.parametrize("content", [
    gzip.compress(lines("{}")), b"\xef\xbb\xbf" + lines("{}"), lines("\n [ {} ]\n"), lines("\n{}", " "),
    json.dumps(RECORD, indent=1).encode(), gzip.compress(lines("[{}")) + gzip.compress(b"]"),
])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl.gz", "x.parquet"])
def test_the_content_says_what_a_file_is(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    examples, dropped = load_examples(tmp_path / name)
    assert ids_of(examples) == ["7"] and dropped == []


@pytest.mark.parametrize("form", ["\n".join, lambda texts: f"[{', '.join(texts)}]"])
def test_what_json_does_not_have_drops_its_record_alone_and_only_where_it_is_read(tmp_path, form):
    good = json.dumps(xlam(tools=[{"name": "add"}], answers=[{"name": "add", "arguments": {"a": 0}}], more=0))
    texts = [good.replace("Add", f"Add {i}").replace('"id": 7', f'"id": {i}') for i in range(6)]
    repeated = '{"x": 1, "x": 2}'
    for index, field, value in (
        (0, "more", "NaN"), (1, "a", "NaN"), (2, "a", "1e999"), (3, "a", repeated), (4, "more", repeated),
    ):
        texts[index] = texts[index].replace(f'"{field}": 0', f'"{field}": {value}')
    (tmp_path / "x.json").write_text(form(texts))
    examples, dropped = load_examples(tmp_path / "x.json")
    assert ids_of(examples) == ["0", "4", "5"]
    assert [(drop.line, drop.reason) for drop in dropped] == [(line, "broken_json") for line in (2, 3, 4)]


def test_arrow_s_nulls_in_structs_are_not_read(tmp_path):
    """A column of structs has one set of keys: each row would get those of all others, with null as value."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    other = {"name": "sub", "description": "Takes away.", "parameters": {"b": {"type": "int", "default": 1}}}
    calls = [{"name": "add", "arguments": {"a": 1}}], [{"name": "sub", "arguments": {"b": 2}}]
    tools = json.loads(RECORD["tools"]), [other]
    rows = [xlam(id=i, query=f"{i}", tools=t, answers=c) for i, (t, c) in enumerate(zip(tools, calls))]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert load_examples(tmp_path / "x.parquet") == load_examples(save(tmp_path / "x.json", *rows))
    dated = xlam(tools=[{"name": "add"}], answers=[{"name": "add", "arguments": {"day": date(2024, 5, 16)}}])
    parquet.write_table(pyarrow.Table.from_pylist([dated]), tmp_path / "y.parquet")
    assert [drop.reason for drop in load_examples(tmp_path / "y.parquet")[1]] == ["broken_json"]
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match="x.parquet cannot be read"):
        load_examples(tmp_path / "x.parquet")


def save_shards(folder: Path, split: str, count: int, of: int) -> list[Path]:
    """JSONL shards of two records each, with a line between them that is no JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{split}-{i:05}-of-{of:05}.jsonl" for i in range(count)]
    for i, path in enumerate(paths):
        rows = [json.dumps(xlam(id=f"{split}{i}{j}", query=f"{split} {i} {j}")) for j in range(2)]
        path.write_text("\noops\n".join(rows) + "\n")
    return paths


def test_the_shards_of_a_split_are_one_file(tmp_path):
    paths = save_shards(tmp_path / "data", "train", 3, 3)
    (tmp_path / "data/._train.jsonl").write_bytes(b"\x00\x05")  # a Mac's own
    for source in (tmp_path, tmp_path / "data", tmp_path / "data/train"):
        assert find_files(source) == paths
        examples, dropped = load_examples(source)
        assert ids_of(examples) == [f"train{i}{j}" for i in range(3) for j in range(2)]
        assert [drop.line for drop in dropped] == [2, 5, 8]
    assert [number for number, _ in read_files(paths)] == list(range(1, 10))
    assert find_files(paths[1]) == paths[1:2]
    assert file_sha256(*paths) == hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    save_shards(tmp_path / "data", "test", 1, 2)
    with pytest.raises(DataError, match="several data files: test, train; name one"):
        find_files(tmp_path / "data")
    assert find_files(tmp_path / "data/train") == paths
    with pytest.raises(DataError, match="1 of 2 shards of test"):
        find_files(tmp_path / "data/test")


@pytest.mark.parametrize("files", [["state.json", "dataset_info.json", "data-00000-of-00001.arrow"],
                                   ["dataset_dict.json", "train/state.json"]])
def test_a_folder_of_save_to_disk_is_named(tmp_path, files):
    (tmp_path / "train").mkdir()
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match="save_to_disk.* use to_json or to_parquet"):
        find_files(tmp_path)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of a few files, without a network. Returns the names that were asked for."""
    asked = []

    def download(repository: str, name: str, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(save(tmp_path / "downloaded.json", xlam()))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    shards = [f"-0000{i}-of-00002-3f.parquet" for i in (1, 0)]
    files = {
        "me/one": ["README.md", "data/train.json"], "me/two": ["a.jsonl", "b.parquet"],
        "me/shards": [f"data/train{shard}" for shard in shards] + [f"data/test{shard}" for shard in shards],
        "me/saved": ["dataset_dict.json", "train/state.json", "train/data-00000-of-00001.arrow"],
    }
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, name, repo_type: files[name])
    monkeypatch.setattr("huggingface_hub.get_session", Mock())
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize("source, fetched", [
    ("Team-ACE/ToolACE", ("Team-ACE/ToolACE", "data.json", "dataset")),
    ("me/one", ("me/one", "data/train.json", "dataset")),
    ("me/two/sub/b.json", ("me/two", "sub/b.json", "dataset")),
    ("datasets/me/one", ("me/one", "data/train.json", "dataset")),
    ("hf://datasets/me/one/data/train.json", ("me/one", "data/train.json", "dataset")),
    ("https://huggingface.co/datasets/me/one", ("me/one", "data/train.json", "dataset")),
    ("https://huggingface.co/datasets/me/one/tree/main/", ("me/one", "data/train.json", "dataset")),
    ("https://huggingface.co/datasets/me/one/resolve/main/b/c.jsonl?download=true",
     ("me/one", "b/c.jsonl", "dataset")),
    ("https://huggingface.co/datasets/me/one/blob/main/x.json", ("me/one", "x.json", "dataset")),
])
def test_hub_ids_are_fetched_also_by_a_training_run(hub, source, fetched):
    assert ids_of(load_splits(Config(data=source, test_share=0.0)).train) == ["7"]
    assert hub == [fetched]


def test_splits_of_the_hub_are_fetched_whole(hub):
    for source in ("me/shards/data/train", "https://huggingface.co/datasets/me/shards/tree/main/data/train"):
        assert len(find_files(source)) == 2
        names = [f"data/train-0000{i}-of-00002-3f.parquet" for i in range(2)]
        assert [name for _, name, _ in hub] == names
        hub.clear()
    for source, complaint in (("me/shards", "several data files: data/test, data/train; name one"),
                              ("me/shards/train", "holds no train"), ("me/saved", "save_to_disk")):
        with pytest.raises(DataError, match=complaint):
            find_files(source)


def test_a_path_that_exists_wins_and_a_mistyped_one_is_no_hub_id(hub, tmp_path, monkeypatch):
    (tmp_path / "me/one").mkdir(parents=True)
    save(tmp_path / "me/one/data.json", xlam(id="local"))
    for path in ("me/one", "me/one/data.json"):
        assert ids_of(load_examples(path)[0]) == ["local"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ids_of(load_examples("~/me/one/data.json")[0]) == ["local"]
    (tmp_path / "datasets").mkdir()
    for path in ("you/data.json", "me/one/other.json", "datasets/me/two", "./x/y", "../x/y", "/x/y"):
        with pytest.raises(DataError, match=f"{path.lstrip('./')} does not exist; check the path"):
            load_examples(path)
    assert hub == []
    with pytest.raises(DataError, match="several data files: a.jsonl, b.parquet; name one, as me/two/FILE"):
        load_examples("me/two")


@pytest.mark.parametrize(
    ("broken", "place"),
    [
        ('{"step": 2, "x', ":2"), ("[1]", ":2"), ("3", ":2"), ("{}", ":2"), ('{"step": "2"}', ":2"),
        ('{"step": true}', ":2"), ('{"a":' * 9999, ":2"), ("\n\n\udcff", ":4"),
        ('{"step": 2}{"step": 3}', ":2"),
        ("", ""), ("  \r", ""), ("\0\0\0", ""),
    ],
)
def test_a_broken_line_of_our_own_files_is_named_and_what_a_power_cut_left_is_passed_over(
    tmp_path, broken, place
):
    path = tmp_path / "log.jsonl"
    text = f'{{"step": 1, "text": "\u2028"}}\n{broken}\n\0\0{{"step": 4}}\n{{"step": 5'
    path.write_bytes(text.encode(errors="surrogateescape"))
    if place:
        with pytest.raises(DataError, match=f"^{path}{place}: not a JSON object .*repair or delete"):
            read_jsonl(path, step=int)
    else:
        assert [row["step"] for row in iter_jsonl(path, step=int)] == [1, 4]
    rows = iter_jsonl(path, step=int)
    assert next(rows) == {"step": 1, "text": "\u2028"}, "rows come one by one, before the broken line is read"


def test_what_is_appended_any_reader_of_json_can_read(tmp_path):
    path, inf = tmp_path / "new.jsonl", float("inf")
    append_jsonl(path, [{"kl": float("nan"), "all": [[-inf, 1.5], {"x": (inf,)}]}, {"text": "half \ud83d"}])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == '{"kl": null, "all": [[null, 1.5], {"x": [null]}]}'
    assert read_jsonl(path)[1] == {"text": "half \ud83d"} and read_jsonl(tmp_path / "none") == []
    with pytest.raises(DataError, match="cannot be read"):
        read_jsonl(tmp_path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_atomic(path, "old")
    monkeypatch.setattr("os.fsync", lambda _: 1 / 0)  # the disk is full, or Ctrl-C
    with pytest.raises(ZeroDivisionError):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["state.json"]


def test_a_folder_is_whole_or_not_there(tmp_path):
    """Disk full while a model is written: the one before is still whole. Nobody's OUT.tmp is touched."""
    target, other = tmp_path / "model", tmp_path / "model.tmp"
    other.mkdir()
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")
        assert not target.exists()
    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error, match="disk full"), atomic_folder(target) as folder:
            (folder / "b").write_text("half")
            raise error("disk full")
        assert {path.name: path.read_text() for path in target.iterdir()} == {"a": "old"}
        assert sorted(os.listdir(tmp_path)) == ["model", "model.tmp"]
    with atomic_folder(target) as folder:
        assert not any(folder.iterdir()), "the next try starts clean"
    assert sorted(os.listdir(tmp_path)) == ["model", "model.tmp"]
