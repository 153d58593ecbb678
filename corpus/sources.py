"""Where records come from: a file here or on the Hugging Face hub, read as a stream of numbered records."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from config import UserError

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
# the data sets of the paper, so that no listing is needed where the file lies in the hub's cache already
KNOWN = {
    "Salesforce/xlam-function-calling-60k": "xlam_function_calling_60k.json",
    "Team-ACE/ToolACE": "data.json",
}
CHUNK = 1 << 20  # characters

_HUB_ID = re.compile(r"(\w[\w.-]*)/(\w[\w.-]*)(?:/(.+))?")
_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()


class DataError(UserError):
    """A file that cannot be used; the message names the file, the line where there is one, and what to do."""


# --------------------------------------------------------------------------------------------- finding a file


def find_file(source: str | Path) -> Path:
    """The file that `source` names: a path, or a data set of the hub as "owner/name" or
    "owner/name/path/in/it.json".

    A path that exists wins; a folder stands for the one data file in it. Files of the hub are downloaded
    once, into the hub's cache. A path that cannot be meant for the hub is returned as it is, even where
    nothing is there. Raises DataError with a remedy: offline, unknown, gated, or several files to choose
    from.
    """
    path, named = Path(source), _HUB_ID.fullmatch(str(source))
    if path.is_dir():
        return path / _only_file([file.name for file in path.iterdir() if file.is_file()], str(path))
    if path.exists() or not named:
        return path
    owner, name, inner = named.groups()
    # data/train.jsonl, or runs/x/train.jsonl where runs/ is a folder: a mistyped path rather than somebody's
    # data set.
    if f"{owner}/{name}" not in KNOWN and (name.endswith(SUFFIXES) if not inner else Path(owner).is_dir()):
        return path
    return _download(f"{owner}/{name}", inner or KNOWN.get(f"{owner}/{name}"))


def _only_file(names: Sequence[str], where: str) -> str:
    """The one data file among `names`."""
    found = sorted(name for name in names if name.endswith(SUFFIXES) and name != "dataset_infos.json")
    if len(found) != 1:
        listed = f"several data files: {', '.join(found[:10])}{' …' if len(found) > 10 else ''}; name one, as {where}/FILE"
        raise DataError(
            f"{where} holds {listed if found else 'no ' + ', '.join(SUFFIXES) + ' file; name another'}"
        )
    return found[0]


def _download(repository: str, name: str | None) -> Path:
    # Comes with transformers; here, because local files do without.
    from huggingface_hub import HfApi, errors, hf_hub_download

    page = f"https://huggingface.co/datasets/{repository}"
    by_hand = f"download the file at {page} and give its path"
    try:
        if name is None:
            name = _only_file(HfApi().list_repo_files(repository, repo_type="dataset"), repository)
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except DataError:
        raise
    except errors.GatedRepoError:
        todo = f"accept its licence at {page} and set HF_TOKEN to a token of that account, or {by_hand}"
        raise DataError(f"{repository} is a gated data set: {todo}") from None
    except errors.RepositoryNotFoundError:
        todo = "check the path or the id; a private data set needs HF_TOKEN"
        raise DataError(
            f"{repository} is neither a file here nor a data set on the Hugging Face hub; {todo}"
        ) from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        raise DataError(
            f"{repository} is no file here, and the Hugging Face hub is out of reach (no network, or HF_HUB_OFFLINE is "
            f"set); where there is a network, {by_hand}"
        ) from None
    except errors.EntryNotFoundError:
        raise DataError(
            f"{repository} on the Hugging Face hub has no file {name}; its files: {page}/tree/main"
        ) from None
    except Exception as error:  # whatever the hub's HTTP library raises
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{repository} could not be fetched from the Hugging Face hub: {first}; {by_hand}"
        ) from None


# ------------------------------------------------------------------------------------------- files -> records


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """A JSON array, JSONL (both perhaps gzipped) or Parquet -> numbered records, one after the other.

    Numbers count from 1: lines of JSONL, else positions. In place of a broken line stands its error. Raises
    DataError for a file that is missing, empty or cannot be read, for an array that is not JSON, and for
    Parquet without pyarrow.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        # newline: JSONL's own. Others may stand inside a record: U+2028 in its strings, a carriage return
        # between them.
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            start, lines = file.read(1), 0
            while start.isspace():
                lines += start == "\n"
                start = file.read(1)
            if not start:
                raise DataError(f"{path} is empty; give a file with at least one record")
            if start == "[":
                yield from _array_items(file, path, lines)
            else:
                file.seek(0)
                yield from _lines(file)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; give a UTF-8 text file or its .gz") from None


def _lines(file: TextIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if not line.isspace():
            try:
                record = _DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                record = error
            yield number, record


def _array_item(text: str, at: int) -> tuple[Any, int]:
    """(the item at `at`, where the comma or bracket after it stands). ValueError, also where the text is cut
    short.
    """
    value, end = _DECODER.raw_decode(text, at)
    end = _SPACE.match(text, end).end()
    if text[end : end + 1] not in (",", "]"):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
    return value, end


def _array_items(file: TextIO, path: Path, lines: int) -> Iterator[tuple[int, Any]]:
    """The items of an array whose bracket was just read, after so many lines. Only a chunk of text is in
    memory.
    """
    text, at, number = "", 0, 0
    while True:
        at = _SPACE.match(text, at).end()
        if number == 0 and text.startswith("]", at):
            at += 1
            break
        try:
            value, end = _array_item(text, at)
        except RecursionError:
            raise DataError(f"{path}: item {number + 1} is nested too deeply; remove it") from None
        except ValueError as error:
            # Perhaps the item goes on beyond the chunk. Chunks grow, or an item of many would be read anew
            # for each.
            more = file.read(max(CHUNK, len(text) - at))
            if not more:
                line = lines + text.count("\n", 0, getattr(error, "pos", at)) + 1
                what = f"not a JSON array: {getattr(error, 'msg', error)} in line {line}"
                raise DataError(f"{path}: {what}; repair the file or fetch it again") from None
            lines += text.count("\n", 0, at)
            text, at = text[at:] + more, 0
            continue
        number += 1
        yield number, value
        at = end + 1
        if text[end] == "]":
            break
    if text[at:].strip() or file.read().strip():
        raise DataError(f"{path}: not a JSON array: text after its end; repair the file or fetch it again")


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow; run: python -m pip install pyarrow"
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, ArrowException) as error:
        raise DataError(
            f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}; fetch it again"
        ) from None


def append_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Appends one JSON line per row."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict]:
    """All whole rows of a JSONL file that we wrote; [] if there is none. A last line cut off by a kill is
    left out.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [json.loads(line) for line in lines[:-1]]  # not splitlines(): a completion may hold U+2028


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
