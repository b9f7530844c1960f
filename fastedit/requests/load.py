"""Edit requests from files and lists."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fastedit.errors import RequestError, listed
from fastedit.requests.formats import PUBLISHED
from fastedit.requests.request import EditRequest

AnyPath = str | os.PathLike[str]
_OWN = {field.name: None for field in fields(EditRequest)}  # in order
_FOREIGN = PUBLISHED - _OWN.keys()
_log = logging.getLogger(__name__)


def load_requests(path: AnyPath) -> list[EditRequest]:
    """Read a UTF-8 file of edit requests: a JSON array of records, JSON Lines or one record, formats mixed at will.

    Unknown fields of records in this package's own format are logged as a warning, once for each name.
    The id of a record without one is its position in the list, counted from 0.

    Raises:
        RequestError: the file is missing, empty, truncated, not UTF-8 or not JSON, or a record cannot be used
            (see `EditRequest.from_dict`). The message names the file and the record: the position in an
            array, counted from 0, or the line of JSON Lines, counted from 1.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{path}, line {line}: byte {error.start} is not UTF-8; save as UTF-8") from None
    start = text.lstrip()[:1]
    if start not in ("[", "{"):
        found = f"it starts with {start!r}" if start else "it is empty"
        raise RequestError(f"{path}: expected a JSON array of records, or JSON Lines, but {found}")
    records = _array(text, path) if start == "[" else _lines(text, path)
    requests = _read_all(records, str(path))
    if not requests:
        raise RequestError(f"{path}: expected edit requests, but the array is empty")
    return requests


def _read_all(records: Iterable[tuple[str, Any]], name: str) -> list[EditRequest]:
    """The requests of (place, record or request) pairs; the error names all records that cannot be used."""
    requests: list[EditRequest] = []
    problems: list[tuple[str, str]] = []
    unread = set[str]()
    try:
        for index, (where, record) in enumerate(records):
            if isinstance(record, EditRequest):
                requests.append(record if record.id is not None else replace(record, id=str(index)))
                continue
            try:
                requests.append(EditRequest.from_dict(record, where=where, default_id=str(index)))
            except RequestError as error:
                problems.append((where, str(error)))
            else:
                unread |= _unread_fields(record)
    except RequestError as error:  # a line that is not JSON: nothing can be read after it
        if not problems:
            raise
        problems.append((name, str(error)))
    if problems:
        raise RequestError.of(problems, "records")
    if unread:
        _log.warning("%s: unknown and not read: %s; known: %s", name, listed(sorted(unread)), ", ".join(_OWN))
    return requests


def _unread_fields(record: Mapping[str, Any]) -> set[str]:
    """Unknown fields of a record in our own format; the published formats have more than an edit needs."""
    ours = "prompt" in record and "target" in record and _FOREIGN.isdisjoint(record)
    return {str(name) for name in record if name not in _OWN} if ours else set()


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
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RequestError(
                    f"{where}: not a whole JSON object: {error}. Is it truncated? Several objects over more than a "
                    "line each have to stand in an array"
                ) from error
            yield where, record


def as_requests(requests: AnyPath | Sequence[EditRequest | Mapping[str, Any]]) -> list[EditRequest]:
    """The requests of a file, or of a list of `EditRequest` and records of any known format.

    A request without an id gets its position in the list, counted from 0.

    Raises:
        RequestError: there are none, or one cannot be used (see `load_requests`).
    """
    if isinstance(requests, (str, os.PathLike)):
        return load_requests(requests)
    if isinstance(requests, (EditRequest, Mapping)) or not isinstance(requests, Iterable):
        raise RequestError(f"expected a path or a list of edit requests, got {type(requests).__name__}")
    result = _read_all(((f"requests[{index}]", item) for index, item in enumerate(requests)), "requests")
    if not result:
        raise RequestError("the list of edit requests is empty; give at least one")
    return result
