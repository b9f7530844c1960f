"""The records of a file, and where in it each of them stands."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from fastedit.errors import RequestError

AnyPath = str | os.PathLike[str]


def _unzstd(content: bytes) -> bytes:
    unpacker = import_module("zstandard").ZstdDecompressor()
    unpacked: bytes = unpacker.stream_reader(io.BytesIO(content), read_across_frames=True).read()
    return unpacked


# The first bytes of a compressed file, how it is compressed, and what unpacks it.
_COMPRESSED: tuple[tuple[bytes, str, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", "gzip", gzip.decompress),
    (b"BZh", "bzip2", bz2.decompress),
    (b"\xfd7zXZ", "xz", lzma.decompress),
    (b"\x28\xb5\x2f\xfd", "zstd", _unzstd),
)
_SEPARATORS = ",;\t"
# A name of a column that a table of edits has; a first line with one and a separator is a head of columns.
_HEAD = re.compile(r'(?:^|.*[,;\t])\s*"?(prompt|subject|question|target|target_new|src|text|update)"?\s*(?:[,;\t]|$)')


def read_records(path: AnyPath) -> Iterator[tuple[str, Any]]:
    """(place, record) for each record of a file; the record is an error where a line cannot be read.

    The file is a JSON array, JSON Lines, a table with a line of column names (CSV, TSV), or Parquet; all but Parquet
    may be compressed by gzip, bzip2, xz or zstd. Empty cells of a table are absent, and cells that hold a JSON array or
    object are that.

    Raises:
        RequestError: the file is missing, empty, damaged, of another kind, not UTF-8, or an array that is not JSON; it
            takes a package that is not installed.
    """
    content = _unpacked(path)
    if content.startswith(b"PAR1"):
        return _parquet(content, path)
    text = _text_of(content, path)
    start = text.lstrip()[:1]
    if start in ("[", "{"):
        return _array(text, path) if start == "[" else _lines(text, path)
    head = text.lstrip()[:2000].split("\n", 1)[0].rstrip()
    if _HEAD.match(head) and (re.search(f"[{_SEPARATORS}]", head) or "csv" in "".join(Path(path).suffixes).lower()):
        return _table(text, head, path)
    found = f"it starts with {start!r}" if start else "it is empty"
    raise RequestError(
        f"{path}: expected a JSON array of records, JSON Lines, or a table whose first line names its columns (prompt, "
        f"target, subject, …), but {found}"
    )


def _unpacked(path: AnyPath) -> bytes:
    """What a file holds, compressed or not."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    if content.startswith(b"PK\x03\x04"):
        raise RequestError(f"{path} is compressed (zip), and may hold several files; unpack it first, with unzip")
    for head, kind, unpack in _COMPRESSED:
        if content.startswith(head):
            try:
                return unpack(content)
            except ModuleNotFoundError as error:
                raise RequestError(
                    f"{path} is compressed ({kind}): pip install {error.name}, or unpack it first"
                ) from None
            except Exception as error:  # each package has its own
                raise RequestError(f"{path}: the {kind} file is damaged or truncated: {error}") from error
    return content


def _text_of(content: bytes, path: AnyPath) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{path}, line {line}: byte {error.start} is not UTF-8; save as UTF-8") from None


def _table(text: str, head: str, path: AnyPath) -> Iterator[tuple[str, Any]]:
    """The rows below the line of column names, which is separated by whatever it has most of."""
    separator = max(_SEPARATORS, key=head.count)
    rows = csv.reader(io.StringIO(text.lstrip(), newline=""), delimiter=separator, strict=True)
    columns = [name.strip() for name in next(rows)]
    skipped = text[: len(text) - len(text.lstrip())].count("\n")
    try:
        for cells in rows:
            where = f"{path}, line {skipped + rows.line_num}"
            if len(cells) > len(columns):
                found = f"{where}: {len(cells)} cells for {len(columns)} columns"
                yield where, RequestError(f"{found}; put cells that hold a {separator!r} into quotes")
            elif any(map(str.strip, cells)):
                yield where, {name: _cell(cell) for name, cell in zip(columns, cells, strict=False) if cell.strip()}
    except csv.Error as error:
        where = f"{path}, line {skipped + rows.line_num}"
        yield where, RequestError(f"{where}: {error}; is a quote missing?")


def _cell(text: str) -> Any:
    if text.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            return json.loads(text)
    return text


def _parquet(content: bytes, path: AnyPath) -> Iterator[tuple[str, Any]]:
    try:
        rows = import_module("pyarrow.parquet").read_table(io.BytesIO(content)).to_pylist()
    except ModuleNotFoundError:
        raise RequestError(f"{path} is a Parquet file: pip install pyarrow, or write it as JSON Lines") from None
    except Exception as error:  # pyarrow has its own
        raise RequestError(f"{path}: the Parquet file is damaged or truncated: {error}") from error
    for index, row in enumerate(rows):
        yield (
            f"{path}, record {index} (counted from 0)",
            {name: value for name, value in row.items() if value is not None},
        )


def _array(text: str, path: AnyPath) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"{path}, record {_whole_records(text)} (counted from 0)"
        raise RequestError(f"{where}: not valid JSON, is the file truncated? {error}") from error
    for index, record in enumerate(records):
        yield f"{path}, record {index} (counted from 0)", record


def _whole_records(text: str) -> int:
    """How many items at the head of a broken JSON array are whole."""
    decoder, position, count = json.JSONDecoder(), text.index("[") + 1, 0
    while between := re.compile(r"[\s,]*").match(text, position):
        try:
            _, position = decoder.raw_decode(text, between.end())
        except (ValueError, RecursionError):
            break
        count += 1
    return count


def _lines(text: str, path: AnyPath) -> Iterator[tuple[str, Any]]:
    try:
        alone = json.loads(text) if "\n" in text.strip() else None  # one object over several lines
    except (ValueError, RecursionError):
        alone = None
    if alone is not None:
        yield f"{path}, record 0 (counted from 0)", alone
        return
    # Not splitlines(): U+2028 and its like may stand in a JSON string as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield (
                    where,
                    RequestError(
                        f"{where}: not a whole JSON object: {error}. Is it truncated? Several objects over more than a "
                        "line each have to stand in an array"
                    ),
                )
