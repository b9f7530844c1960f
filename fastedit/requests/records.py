"""Read the records of a file, one after the other, each with its place in the file."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from fastedit.errors import InputFileError, RequestError, listed
from fastedit.requests.formats import ID, table, wrapped
from fastedit.requests.source import AnyPath, Source

_SEPARATORS = ",;\t"
# Names of columns in tables of edits; a first line with one of them and a separator names the columns.
_HEAD = re.compile(
    r'(?:^|.*[,;\t])\s*"?(prompt|subject|question|target|target_new|src|text|update)"?\s*(?:[,;\t]|$)', re.I
)
_HEAD_LENGTH = 2000
_PIECE = 1 << 18  # characters that are read at a time
_QUOTED = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", re.S)  # a text as Python writes it
_FLOAT = re.compile(r"\d+\.0")
_LISTED = re.compile(r"""\s*[\[{][\[({\s]*['"].*[\])}]\s*""", re.S)  # what is meant as a list
_SPACE, _AFTER = re.compile(r"\s*"), re.compile(r"\s*([,\]])")
Records = Iterator[tuple[str, Any]]
_BROKEN = (ValueError, RecursionError)  # raised for text that is not JSON


def read_records(path: AnyPath) -> Records:
    """Yield (place, record) for each record of a file; for a line that cannot be read, the record is the error.

    The file is a JSON array, JSON Lines, a JSON object of columns, a table with a line of column names (CSV, TSV), or
    Parquet; all but Parquet may be compressed by gzip, bzip2, xz or zstd. Case does not matter in a table's column
    names, and a column without a name is left out. Empty cells are absent, and cells with an array or object, in JSON
    or as Python writes it, are parsed. The file is read as the records are taken, and need not fit into memory.

    Raises:
        RequestError: the file is missing, empty, of another kind, or needs a package that is not installed; while it
            is read, also that it is damaged, not UTF-8, or an array that is not JSON.
    """
    source = Source(path)
    with source.bytes() as file:
        parquet = file.read(4) == b"PAR1"
    if parquet:
        return _parquet(source)
    try:
        beginning = _beginning(source)
    except UnicodeDecodeError:
        raise source.not_utf8() from None
    start, head = beginning[:1], beginning.split("\n", 1)[0].rstrip()
    if start in ("[", "{"):
        return _told(source, _array(source) if start == "[" else _lines(source))
    if _HEAD.match(head) and (re.search(f"[{_SEPARATORS}]", head) or "csv" in "".join(Path(path).suffixes).lower()):
        return _told(source, _table(source, max(_SEPARATORS, key=head.count)))
    actual = f"it starts with {start!r}" if start else "it is empty"
    raise RequestError(
        f"{path}: expected a JSON array of records, JSON Lines, or a table whose first line names its columns (prompt, "
        f"target, subject, …), but {actual}"
    )


def _beginning(source: Source) -> str:
    """The beginning of the text, without leading white space."""
    with source.text() as text:
        beginning = ""
        while len(beginning) < _HEAD_LENGTH and (piece := text.read(_PIECE)):
            beginning = (beginning + piece).lstrip()
    return beginning[:_HEAD_LENGTH]


def _told(source: Source, records: Records) -> Records:
    try:
        yield from records
    except UnicodeDecodeError:
        raise source.not_utf8() from None


def _table(source: Source, separator: str) -> Records:
    """The rows below the line of column names."""
    with source.text(newline="") as text:
        skipped, head = next((i, line) for i, line in enumerate(text) if line.strip())
        rows = csv.reader(chain([head.lstrip(" ")], text), delimiter=separator, strict=True)
        try:
            columns = _columns(source, next(rows))
            for cells in rows:
                where = f"{source.path}, line {skipped + rows.line_num}"
                if not any(map(str.strip, cells)):
                    continue
                if len(cells) != len(columns):
                    mismatch = f"{len(cells)} cells for {len(columns)} columns"
                    yield where, RequestError(f"{mismatch}; put cells that hold a {separator!r} into quotes, and write "
                                              "empty cells too")  # fmt: skip
                else:
                    yield where, _row(columns, cells)
        except csv.Error as error:
            yield f"{source.path}, line {skipped + rows.line_num}", RequestError(f"{error}; is a quote missing?")


def _columns(source: Source, cells: list[str]) -> list[str]:
    """The names of a table's columns, in lower case; a column without a name is an index, as pandas writes it.

    Raises:
        RequestError: two columns of one name.
    """
    names = [cell.strip().lower() for cell in cells]
    if twice := [name for name, count in Counter(filter(None, names)).items() if count > 1]:
        raise RequestError(
            f"{source.path}: {listed(twice)} named more than once among the columns (case does not count); keep one "
            "column of each name"
        )
    return names


def _row(columns: list[str], cells: list[str]) -> Any:
    """A record of the cells that hold something, or an error."""
    record = {}
    for name, cell in zip(columns, cells, strict=True):
        if name and cell.strip():
            # in a column with gaps pandas writes integers as floats
            value = cell.strip()[:-2] if name in ID and _FLOAT.fullmatch(cell.strip()) else _cell(cell)
            if isinstance(value, str) and _LISTED.fullmatch(value):
                problem = f"column '{name}': {cell!r:.60} is neither a list nor a text"
                return RequestError(f'{problem}; write a list as ["one", "two"]')
            record[name] = value
    return record


def _cell(text: str) -> Any:
    """The list or object that a cell holds, in JSON or as Python writes it (pandas does so), else its text."""
    if text.lstrip()[:1] in ("[", "{"):
        with suppress(*_BROKEN):
            return json.loads(text)
        with suppress(*_BROKEN, SyntaxError, MemoryError):
            tree = ast.parse(text.strip(), mode="eval")
            texts = sum(isinstance(node, ast.Constant) and isinstance(node.value, str) for node in ast.walk(tree))
            value = ast.literal_eval(tree)
            # Python joins texts that no comma parts, as in the arrays of NumPy
            if isinstance(value, list | dict) and texts == len(_QUOTED.findall(text)):
                return value
    return text


def _parquet(source: Source) -> Records:
    path = source.path
    try:
        with source.bytes() as file:
            parquet = import_module("pyarrow.parquet").ParquetFile(path if source.plain else io.BytesIO(file.read()))
        columns = _columns(source, parquet.schema_arrow.names)
        rows = (row for batch in parquet.iter_batches() for row in batch.to_pylist())
        for index, row in enumerate(rows):
            cells = zip(columns, row.values(), strict=True)
            known = {name: value for name, value in cells if name and value is not None}
            yield f"{path}, record {index} (counted from 0)", known
    except ModuleNotFoundError:
        raise InputFileError(path, "{path} is a Parquet file: pip install pyarrow, or write it as JSON Lines") from None
    except RequestError:
        raise
    except Exception as error:  # pyarrow raises its own types
        raise InputFileError(path, f"the Parquet file is damaged or truncated: {error}") from error


def _array(source: Source) -> Records:
    """The items of a JSON array, read one by one. If that stops early, the array is read as a whole to tell why."""
    count, at, decoder = 0, 1, json.JSONDecoder()  # `at` is after the "["
    with source.text() as text:
        held = ""
        while not held:
            held = text.read(_PIECE).lstrip()
        while True:
            try:
                item, end = decoder.raw_decode(held, _SPACE.match(held, at).end())  # type: ignore[union-attr]
                after = _AFTER.match(held, end)
            except _BROKEN:
                after = None
            if after is None:  # the item continues in the next piece, or is broken
                piece = text.read(max(_PIECE, len(held) - at))
                if not piece:
                    break
                held, at = held[at:] + piece, 0
                continue
            where = f"{source.path}, record {count} (counted from 0)"
            yield where, _once(item, held, at, end)
            count, at = count + 1, after.end()
            if after[1] == "]":
                if not held[at:].strip() and not text.read().strip():
                    return
                break
    try:
        with source.text() as text:
            whole = json.load(text)
    except UnicodeDecodeError:
        raise
    except _BROKEN as error:
        where = f"{source.path}, record {count} (counted from 0)"
        raise RequestError(f"{where}: not valid JSON, is the file truncated? {error}") from error
    for index, record in enumerate(whole[count:], count):
        yield f"{source.path}, record {index} (counted from 0)", record


def _once(record: Any, text: str, start: int, end: int) -> Any:
    """The record in text[start:end], or an error if one of its objects has a field twice; json keeps only one of them.

    A hook of the decoder takes up to half of the decoding time, so it is used only if the text may have more fields.
    """
    fields = text.count('":', start, end) + text.count('" :', start, end)
    if not isinstance(record, dict) or fields == len(record) or fields == _count(record):
        return record
    twice: dict[str, None] = {}

    def look(pairs: list[tuple[str, Any]]) -> None:
        twice.update((name, None) for name, count in Counter(name for name, _ in pairs).items() if count > 1)

    with suppress(*_BROKEN):
        json.loads(text[start:end], object_pairs_hook=look)
    if twice:
        return RequestError(f"{listed(list(twice))} given more than once in an object; keep one")
    return record


def _count(value: Any) -> int:
    """The number of fields in an object or a list, including inner objects, but not in lists that begin with a text."""
    count = len(value) if isinstance(value, dict) else 0
    for item in value.values() if isinstance(value, dict) else value:
        kind = type(item)
        if kind is dict or (kind is list and item and type(item[0]) is not str):
            count += _count(item)
    return count


def _lines(source: Source) -> Records:
    with source.text() as text:  # split at "\n" only: JSON strings may hold U+2028 and the like
        begun = False
        for number, line in enumerate(text, start=1):
            if not line.strip():
                continue
            where = f"{source.path}, line {number}"
            try:
                record = _once(json.loads(line.rstrip("\n")), line, 0, len(line))
            except _BROKEN as error:
                if not begun and (alone := _alone(source)) is not None:
                    yield from _unwrapped(str(source.path), f"{source.path}, record 0 (counted from 0)", alone)
                    return
                record = RequestError(
                    f"not a whole JSON object: {error}",
                    advice="Is it truncated? Several objects over more than a line each have to stand in an array",
                )
            begun = True
            yield from _unwrapped(where, where, record)


def _unwrapped(place: str, where: str, record: Any) -> Records:
    """The records of an object that only wraps a list, such as {"data": [...]}, or has columns; else the record."""
    try:
        rows = table(record)
    except RequestError as error:
        yield where, error
        return
    if rows is not None:
        yield from ((f"{place}, row {index} (counted from 0)", row) for index, row in enumerate(rows))
        return
    if (inner := wrapped(record)) is None:
        yield where, record
        return
    for index, item in enumerate(inner[1]):
        yield f"{place}, record {index} of {inner[0]!r} (counted from 0)", item


def _alone(source: Source) -> Any:
    """The object, if the file is a single one over several lines; else None."""
    with suppress(*_BROKEN), source.text() as text:
        held = text.read()
        return _once(json.loads(held), held, 0, len(held))
    return None
