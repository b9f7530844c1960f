"""Edit requests from files and lists."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastedit.errors import Problem, RequestError, told
from fastedit.requests.formats import table
from fastedit.requests.records import read_records
from fastedit.requests.request import EditRequest, edits_of, warn_of_unread
from fastedit.requests.source import AnyPath
from fastedit.requests.values import plain_data

_log = logging.getLogger(__name__)


def load_requests(path: AnyPath, *, skip_bad: bool = False, numbered: bool = True) -> list[EditRequest]:
    """Read a file of edit requests: a JSON array of records, JSON Lines, one record, or a table; formats mixed at will.

    Tables are CSV or TSV with a line of column names, or Parquet (takes pyarrow). Text is UTF-8, and may be compressed
    by gzip, bzip2, xz or zstd (takes zstandard).

    What is not read, such as unknown fields and prompts without an answer, is logged as one warning with counts. A
    record without an id gets its position in the list, counted from 0. A record with several edits gives several
    requests: "7.0", "7.1" for the rewrites of case 7 in MQuAKE, "7.en", "7.de" for the languages of MzsRE.

    Args:
        skip_bad: leave out records that cannot be used, with a warning that counts and lists them.
        numbered: give a request without an id its position as id; otherwise it has none.

    Raises:
        RequestError: the file is missing, empty, truncated, not UTF-8 or of another kind, or needs a package that is
            not installed; or records cannot be used (see `EditRequest.from_dict`), with `skip_bad` all of them. The
            message names the file and the records by their position in an array, counted from 0, or their line of
            JSON Lines, counted from 1; `sentences` has all of them.
    """
    requests = _read_all(read_records(path), str(path), skip_bad, numbered)
    if not requests:
        raise RequestError(f"{path}: expected edit requests, but the array is empty")
    return requests


def _read_all(
    records: Iterable[tuple[str, Any]], name: str, skip_bad: bool = False, numbered: bool = True
) -> list[EditRequest]:
    """The requests from pairs of a place and a record, request or error; raises one error for all unusable records."""
    requests: list[EditRequest] = []
    problems: list[Problem] = []
    unread = Counter[str]()
    advice: dict[str, None] = {}
    index = -1
    for index, (where, record) in enumerate(records):
        position = str(index) if numbered else None
        if isinstance(record, EditRequest):
            requests.append(record if record.id is not None else replace(record, id=position))
            continue
        try:
            if isinstance(record, RequestError):
                raise record
            left_out = set[str]()
            requests += edits_of(record, left_out, position)
        except RequestError as error:
            problems.append(Problem(where, error.sentence))
            advice[error.advice] = None
        else:
            unread.update(left_out)
    if problems and not (skip_bad and requests):
        raise RequestError.of(problems, "records", ". ".join(filter(None, advice)))
    if problems:
        _log.warning("%s: %d of %d records are left out: %s", name, len(problems), index + 1, told(problems))
        for problem in problems:
            _log.info("left out: %s", problem)
    warn_of_unread(name, unread)
    return requests


def as_requests(
    requests: AnyPath | Sequence[EditRequest | Mapping[str, Any]], *, numbered: bool = True
) -> list[EditRequest]:
    """The requests of a file, or of a list of `EditRequest` and records of any known format, or a mapping of columns.

    Records may hold arrays and scalars of NumPy, as `datasets` and pandas give them. With `numbered`, a request without
    an id gets its position in the list, counted from 0.

    Raises:
        RequestError: there are no requests, or some cannot be used (see `load_requests`).
    """
    if isinstance(requests, (str, os.PathLike)):
        return load_requests(requests, numbered=numbered)
    untyped: Any = requests
    columns = untyped.to_dict() if hasattr(untyped, "iloc") else untyped  # a data frame of pandas
    if (rows := table(plain_data(columns) if isinstance(columns, Mapping) else None)) is not None:
        requests = rows
    elif isinstance(columns, (EditRequest, Mapping)) or not isinstance(requests, Iterable):
        raise RequestError(f"expected a path or a list of edit requests, got {type(requests).__name__}")
    result = _read_all(
        (
            (f"requests[{index}]", item if isinstance(item, EditRequest) else plain_data(item))
            for index, item in enumerate(requests)
        ),
        "requests",
        numbered=numbered,
    )
    if not result:
        raise RequestError("the list of edit requests is empty; give at least one")
    return result
