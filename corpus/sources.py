"""Files in and out: a file here or on the Hugging Face hub as numbered records; our own JSONL; digests."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from config import UserError, first_line

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
# The paper's data sets. Naming the file saves a listing where it lies in the hub's cache already.
KNOWN = {
    "Salesforce/xlam-function-calling-60k": "xlam_function_calling_60k.json",
    "Team-ACE/ToolACE": "data.json",
}

_HUB_ID = re.compile(r"(\w[\w.-]*)/(\w[\w.-]*)(?:/(.+))?")
_DECODER = json.JSONDecoder()


class DataError(UserError):
    """A file that cannot be used; the message names the file, the line where there is one, and what to do."""


# --------------------------------------------------------------------------------------------- finding a file


def find_file(source: str | Path) -> Path:
    """The file that `source` names: a path, or the hub's "owner/name" or "owner/name/path/in/it.json".

    A path that exists wins; a folder stands for the one data file in it. Files of the hub are downloaded
    once, into the hub's cache. A path that cannot be meant for the hub is returned as it is, even where
    nothing is there. Raises DataError with a remedy.
    """
    path, named = Path(source), _HUB_ID.fullmatch(str(source))
    if path.is_dir():
        return path / _only_file([file.name for file in path.iterdir() if file.is_file()], str(path))
    if path.exists() or not named:
        return path
    owner, name, inner = named.groups()
    repository = f"{owner}/{name}"
    # "data/train.jsonl", or "runs/x/train.jsonl" where runs/ is a folder, is a mistyped path, no data set.
    if repository not in KNOWN and (Path(owner).is_dir() if inner else name.endswith(SUFFIXES)):
        return path
    return _download(repository, inner or KNOWN.get(repository))


def _only_file(names: Sequence[str], where: str) -> str:
    """The one data file among `names`."""
    found = sorted(name for name in names if name.endswith(SUFFIXES) and name != "dataset_infos.json")
    if not found:
        raise DataError(f"{where} holds no {', '.join(SUFFIXES)} file; name another")
    if len(found) > 1:
        listed = ", ".join(found[:10])
        raise DataError(f"{where} holds several data files: {listed}; name one, as {where}/FILE")
    return found[0]


def _download(repository: str, name: str | None) -> Path:
    # Comes with transformers; imported here, because local files do without it.
    from huggingface_hub import HfApi, errors, hf_hub_download

    page = f"https://huggingface.co/datasets/{repository}"
    try:
        if name is None:
            name = _only_file(HfApi().list_repo_files(repository, repo_type="dataset"), repository)
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except DataError:
        raise
    except errors.GatedRepoError:
        todo = f"accept its licence at {page} and set HF_TOKEN to a token of that account"
        raise DataError(f"{repository} is a gated data set: {todo}") from None
    except Exception as error:  # no network, no such file, whatever the hub's HTTP library raises
        todo = f"check the name, or download the file at {page} and give its path"
        what = f"{repository} is no file here and could not be fetched from the Hugging Face hub"
        raise DataError(f"{what} ({first_line(error)}); {todo}") from None


# ------------------------------------------------------------------------------------------- files -> records


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """A JSON array, JSONL (both perhaps gzipped) or Parquet -> numbered records, one after the other.

    Numbers count from 1: lines of JSONL, else positions. In place of a broken line stands its error. Raises
    DataError for a file that is missing, empty or cannot be read, and for Parquet without pyarrow.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        # newline: JSONL's own. A record may hold others, such as a carriage return between its parts.
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            if not start:
                raise DataError(f"{path} is empty; give a file with at least one record")
            file.seek(0)
            yield from enumerate(_DECODER.decode(file.read()), 1) if start == "[" else _lines(file)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}; give JSON in UTF-8 or its .gz") from None


def _lines(file: TextIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if not line.isspace():
            try:
                record = _DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                record = error
            yield number, record


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        from pyarrow import parquet
    except ImportError:
        todo = "run: python -m pip install pyarrow"
        raise DataError(f"{path}: reading Parquet needs pyarrow; {todo}") from None
    with parquet.ParquetFile(path) as file:
        batches = file.iter_batches(batch_size=1000)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


# ------------------------------------------------------------------------------------- our own JSONL, digests


def append_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Appends one JSON line per row."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict]:
    """All rows of a JSONL file that we wrote, without a line that a kill cut off; [] if there is none."""
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [json.loads(line) for line in lines[:-1]]  # not splitlines(): a completion may hold U+2028


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
