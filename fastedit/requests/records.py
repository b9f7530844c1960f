"""The records of a file, and where in it each of them stands."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastedit.errors import RequestError

AnyPath = str | os.PathLike[str]
# The first bytes of files that are not text, what such a file is, and what makes JSON of it.
_PANDAS = "read it with pandas and write it with to_json(…, orient='records', lines=True)"
_BINARY = (
    (b"\x1f\x8b", "is compressed (gzip)", "unpack it first, with gunzip --keep"),
    (b"BZh", "is compressed (bzip2)", "unpack it first, with bunzip2 --keep"),
    (b"\xfd7zXZ", "is compressed (xz)", "unpack it first, with unxz --keep"),
    (b"\x28\xb5\x2f\xfd", "is compressed (zstd)", "unpack it first, with unzstd --keep"),
    (b"PK\x03\x04", "is compressed (zip)", "unpack it first, with unzip"),
    (b"PAR1", "is a Parquet file", _PANDAS),
)
# A name of a column that a table of edits has; a first line with one and a separator is a head of columns.
_HEAD = re.compile(r'(?:^|.*[,;\t])\s*"?(prompt|subject|question|target|target_new|src|text|update)"?\s*(?:[,;\t]|$)')


def read_records(path: AnyPath) -> Iterator[tuple[str, Any]]:
    """(place, record) for each record of a file; in JSON Lines the record is an error where a line is not JSON.

    Raises:
        RequestError: the file is missing, empty, not UTF-8, a table, compressed, or an array that is not JSON.
    """
    text = _text_of(path)
    start = text.lstrip()[:1]
    if start not in ("[", "{"):
        found = f"it starts with {start!r}" if start else "it is empty"
        raise RequestError(f"{path}: expected a JSON array of records, or JSON Lines, but {found}")
    return _array(text, path) if start == "[" else _lines(text, path)


def _text_of(path: AnyPath) -> str:
    """What a file says; files of other kinds are named as what they are."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    for head, kind, remedy in _BINARY:
        if content.startswith(head):
            raise RequestError(f"{path} {kind}; requests are JSON or JSON Lines: {remedy}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{path}, line {line}: byte {error.start} is not UTF-8; save as UTF-8") from None
    head_line = text.lstrip()[:2000].split("\n", 1)[0].rstrip()
    separated = re.search(r"[,;\t]", head_line) and _HEAD.match(head_line)
    if head_line[:1] not in ("[", "{") and (separated or Path(path).suffix.lower() in (".csv", ".tsv")):
        raise RequestError(
            f"{path} is a CSV file; requests are JSON or JSON Lines: {_PANDAS}, with columns named as the fields of a "
            "request (prompt, target, subject, …)"
        )
    return text


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
