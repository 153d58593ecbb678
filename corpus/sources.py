"""Files in and out: files here or on the Hugging Face hub as numbered records; our own JSONL; digests."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import signal
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from config import UserError, first_line
from corpus.schema import without_nulls
from corpus.strict_json import unique_json

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # no records in these
SAVED = "datasets.save_to_disk saved; load it with datasets.load_from_disk, and use to_json or to_parquet"
# The paper's data sets. Naming the file saves a listing where it lies in the hub's cache already.
KNOWN = {
    "Salesforce/xlam-function-calling-60k": "xlam_function_calling_60k.json",
    "Team-ACE/ToolACE": "data.json",
}

# "owner/name/path/in/it", as such or as an address of the hub.
_HUB_ID = re.compile(
    r"(?:(?:https?://huggingface\.co/|hf://)?datasets/)?(\w[\w.-]*/\w[\w.-]*)"
    r"(?:/(?:resolve|blob|raw|tree)/main)?(?:/([^?]+?))?/?(?:\?.*)?"
)
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})(?:-\w+)?\.[.\w]+")  # the split, and how many shards it has
REPAIR = "repair or delete this line"
# Between objects of a line, these say that the whole file is no JSONL.
SEPARATORS = {",": "commas between the records", "{": "several objects on one line"}


class DataError(UserError):
    """A file that cannot be used; the message names the file, the line where there is one, and what to do."""


def find_files(source: str | Path) -> list[Path]:
    """The files that `source` names: one, or the shards of one split, in order.

    source: a path, or the hub's "owner/name" or "owner/name/path/in/it.json", also as an address. A path that
    exists wins. A folder stands for the one data file or split in it; FOLDER/SPLIT names a split by what
    stands before the numbers of its shards. Files of the hub are downloaded once, into the hub's cache. A
    path that cannot be meant for the hub is returned as it is, even where nothing is there. Raises DataError
    with a remedy.
    """
    path, named = Path(os.path.expanduser(source)), _HUB_ID.fullmatch(str(source))
    if path.is_dir():
        names = os.listdir(path)
        if not _splits(names):  # then one level down
            names += [file.relative_to(path).as_posix() for file in path.glob("*/*")]
        return [path / name for name in _one_split(names, str(source))]
    if path.exists():
        return [path]
    if path.parent.is_dir() and path.name in _splits(names := os.listdir(path.parent)):
        return [path.parent / name for name in _one_split(names, str(path.parent), path.name)]
    if not named:
        return [path]
    repository, inner = named.groups()
    parts = Path(source).parts
    # "data/train.jsonl", or "runs/x/train.jsonl" where runs/ is a folder, is a mistyped path, no data set.
    mistyped = Path(parts[0]).is_dir() if len(parts) > 2 else parts[-1].endswith(SUFFIXES)
    if mistyped and repository not in KNOWN:
        return [path]
    return _download(repository, inner or KNOWN.get(repository, ""))


def _splits(names: Iterable[str]) -> dict[str, list[str]]:
    """The data files among `names`: shards under what stands before their numbers, others by themselves."""
    splits: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.endswith(SUFFIXES) and not name.rpartition("/")[2].startswith((".", *ABOUT)):
            shard = _SHARD.fullmatch(name)
            splits.setdefault(shard[1] if shard else name, []).append(name)
    return splits


def _one_split(names: Sequence[str], where: str, wanted: str = "") -> list[str]:
    """The files of the one split among `names`, or of the one that is wanted."""
    splits = {name: files for name, files in _splits(names).items() if wanted in ("", name)}
    if not splits and any(name.endswith(("state.json", "dataset_dict.json")) for name in names):
        raise DataError(f"{where} is what {SAVED}")
    if not splits:
        raise DataError(f"{where} holds no {wanted or ', '.join(SUFFIXES)} file; name another")
    if len(splits) > 1:
        listed = ", ".join(list(splits)[:10])
        raise DataError(f"{where} holds several data files: {listed}; name one, as {where}/FILE")
    [(split, files)] = splits.items()
    shard = _SHARD.fullmatch(files[0])
    if shard and int(shard[2]) != len(files):
        raise DataError(f"{where} holds {len(files)} of {int(shard[2])} shards of {split}; get all of them")
    return files


def _download(repository: str, inner: str) -> list[Path]:
    """The files of a data set on the hub. inner: a file, folder or split in it, or "" for all there is."""
    # Comes with transformers; imported here, because local files do without it.
    from huggingface_hub import HfApi, constants, errors, get_session, hf_hub_download

    page = f"https://huggingface.co/datasets/{repository}"
    try:
        names = [inner]
        if not inner.endswith(SUFFIXES):
            get_session().head(constants.ENDPOINT, timeout=10)  # the next line would try for 20 s
            listed = HfApi().list_repo_files(repository, repo_type="dataset")
            inside = [name for name in listed if name.startswith(f"{inner}/")]
            names = _one_split(inside or listed, repository, "" if inside else inner)
        return [Path(hf_hub_download(repository, name, repo_type="dataset")) for name in names]
    except DataError:
        raise
    except errors.GatedRepoError:
        todo = f"accept its licence at {page} and set HF_TOKEN to a token of that account"
        raise DataError(f"{repository} is a gated data set: {todo}") from None
    except Exception as error:  # no network, no such file, whatever the hub's HTTP library raises
        todo = f"check the name, or download the file at {page} and give its path"
        what = f"{repository} is no file here and could not be fetched from the Hugging Face hub"
        raise DataError(f"{what} ({first_line(error)}); {todo}") from None


def read_files(paths: Sequence[Path]) -> Iterator[tuple[int, Any]]:
    """The records of one file, or of all shards: then their numbers go on from shard to shard."""
    last = 0
    for path in paths:
        before = last
        for number, record in read_records(path):
            last = before + number
            yield last, record


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """A JSON array, JSONL (both perhaps gzipped) or Parquet -> numbered records, one after the other.

    What a file is, its content says. Numbers count from 1: lines of JSONL, else positions. In place of a line
    that is no JSON, and of an object that repeats a key, stands its error. Raises DataError for a file that
    is missing, empty, unreadable or laid out in another way, and for Parquet without pyarrow.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path")
    number = 0
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic in (b"ARRO", b"\xff\xff\xff\xff"):
            raise DataError(f"{path} is part of what {SAVED}")
        if magic == b"PAR1":
            yield from enumerate(_parquet_rows(path), 1)
            return
        opened = gzip.open if magic.startswith(b"\x1f\x8b") else open
        # newline: JSONL's own. A record may hold others, such as a carriage return between its parts.
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, record in _json_records(path, file):
                yield number, record
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        if number and getattr(error, "reason", "") == "unexpected end of data":  # cut off inside a letter
            yield number + 1, error
            return
        raise DataError(f"{path} cannot be read: {error}; give JSON in UTF-8, its .gz, or Parquet") from None


def _json_records(path: Path, file: io.TextIOBase) -> Iterator[tuple[int, Any]]:
    filled = ((number, line) for number, line in enumerate(file, 1) if not line.isspace())
    start, first = next(filled, (0, ""))
    if not first:
        raise DataError(f"{path} is empty; give a file with at least one record")
    if first.lstrip().startswith("["):
        yield from enumerate(unique_json(first + file.read()), 1)
        return
    lines = file
    if isinstance(_decoded(first), Exception):  # one object over several lines, or JSONL that begins badly
        rest = file.read()
        whole = _decoded(first + rest)
        if not isinstance(whole, Exception):
            yield 1, whole
            return
        if _after_object(whole) and whole.pos > len(first):
            raise DataError(f"{path} holds objects over several lines; write each on one line, or an array")
        lines = io.StringIO(rest)
    for number, line in enumerate(chain([first], lines), start):
        if not line.isspace():
            record = _decoded(line)
            if isinstance(record, Exception) and (found := SEPARATORS.get(_after_object(record))):
                raise DataError(f"{path}:{number}: {found}; give a JSON array or one JSON object per line")
            yield number, record


def _decoded(text: str) -> Any:
    try:
        return unique_json(text)
    except (ValueError, RecursionError) as error:
        return error


def _after_object(error: Exception) -> str:
    """What stands behind an object, or before it, where JSON has nothing; "" for another error."""
    if not isinstance(error, json.JSONDecodeError) or not error.doc.lstrip(" ,").startswith("{"):
        return ""
    return error.doc[error.pos] if error.msg == "Extra data" or error.doc.lstrip().startswith(",") else ""


def is_columns(record: dict) -> bool:
    """Whether an object holds whole columns, as pandas and datasets write them, and is no record."""
    values = list(record.values())
    if all(isinstance(value, dict) for value in values):
        return bool(values)
    lists = all(isinstance(value, list) for value in values) and len(set(map(len, values))) == 1
    return lists and bool(values[0]) and not any(isinstance(one, dict) for one in chain(*values))


def _parquet_rows(path: Path) -> Iterator[dict]:
    """Arrow gives every struct the keys of all rows, as null: these are left out again."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        todo = "python -m pip install pyarrow"
        raise DataError(f"{path}: reading Parquet needs pyarrow; run: {todo}") from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    yield {key: without_nulls(value) for key, value in row.items()}
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}; get it again") from None


def append_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Appends one JSON line per row, with null for NaN and the infinities, for which JSON has no number."""
    # A reply may hold half a surrogate pair, which is no UTF-8; its escape is right in JSON.
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(f"{_line(row)}\n" for row in rows)


def _line(row: dict) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(row), ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def iter_jsonl(path: Path, **kinds: type) -> Iterator[dict]:
    """The rows of a JSONL file that we wrote, one after the other; none if there is no such file.

    kinds: keys that every row has, with the types of their values. Blank lines, a last line that a kill cut
    off and the NUL bytes that a power cut leaves are passed over. Raises DataError, which names the line.
    """
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        for number, line in enumerate(file, 1):  # by bytes: a completion may hold U+2028
            text = line.strip(b"\0 \t\r\n")
            if not text or not line.endswith(b"\n"):
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict) or any(type(row.get(key)) is not kinds[key] for key in kinds):
                wanted = " and ".join([f"with {kinds[key].__name__} {key!r}" for key in kinds])
                raise DataError(f"{path}:{number}: not a JSON object {wanted}".rstrip() + f"; {REPAIR}")
            yield row


def read_jsonl(path: Path, **kinds: type) -> list[dict]:
    """All rows that iter_jsonl yields."""
    return list(iter_jsonl(path, **kinds))


@contextmanager
def as_command(name: str) -> Iterator[None]:
    """Around a command: SIGTERM ends it as Ctrl-C does, so that it takes away what it has half written, and
    what the operating system refuses is a UserError.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        said = f"{error.filename}: {error.strerror}" if error.strerror else first_line(error)
        raise UserError(f"{name}: {said}") from None


def folder_above(path: Path) -> Path:
    """The nearest folder at or above `path` that is there. Raises UserError where one cannot write in it."""
    above = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: {above} is no folder, or may not be written in")
    return above


@contextmanager
def written_beside(path: Path, name: str = "") -> Iterator[Path]:
    """A file to write, which takes the place of `path` once all is on disk. After an error there is none.

    name: of that file; by default one that is nobody's, and ends as `path` does.
    """
    beside = path.with_name(name or f".{os.getpid()}.{path.name}")
    try:
        yield beside
        sync(beside)
        beside.replace(path)
        sync(path.parent)  # the new name too
    except OSError as error:
        error.filename = str(path)  # a full disk names none
        raise
    finally:
        with suppress(OSError):
            beside.unlink()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, synced and renamed to `path` at the end: one of that name is always complete.

    It replaces what was there. After an error or an interrupt nothing new is left.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # nobody else's
    before = temporary.with_name(f"{temporary.name}.old.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for folder, _, files in os.walk(temporary, topdown=False):
            for name in (*files, ""):
                sync(Path(folder) / name)
        if path.exists():
            path.rename(before)
        temporary.rename(path)
        sync(path.parent)
    finally:
        for leftover in (temporary, before):
            shutil.rmtree(leftover, ignore_errors=True)


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str, mode: int = 0o666) -> None:
    """Gives a file of ours this content at once: after a kill or a power cut it is the old or the new one.

    What a kill leaves beside it, NAME.tmp, the next call takes.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with written_beside(path, f"{path.name}.tmp") as beside:
        with open(os.open(beside, flags, mode), "w", encoding="utf-8") as file:
            file.write(text)


def file_sha256(*paths: Path) -> str:
    """SHA-256 of a file, or of the bytes of several one after the other, in hex."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
