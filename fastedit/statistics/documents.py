"""Read documents from text files, and lay them out in batches of rows."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastedit.errors import InputFileError, RequestError, listed
from fastedit.models import Model, Rows, Samples, encode, pack, without_rows
from fastedit.models.tokens import first_fit_decreasing

JSON = (".json", ".jsonl", ".ndjson")
"""Names of files end so that hold documents as a JSON array or as JSON Lines."""
_CHUNK = 8  # batches that are laid out together, so that there are enough documents to fill rows
_TEXTS = 64  # documents per tokenizer call


def read_documents(path: Path, column: str | None = None) -> Iterator[str]:
    """Yield the documents of a UTF-8 file: paragraphs separated by blank lines, or the texts of a JSON array or of JSON
    Lines, whose records are texts or objects with a text in one field.

    Args:
        column: the field of the objects, of a file with any name. By default it is "text", and only for files whose
            names end as `JSON` says.

    Raises:
        InputFileError: the file cannot be read, or is not UTF-8. RequestError: a line is not JSON, or a record has no
            such text; names the line or the record.
    """
    if path.suffix == ".json" and (records := _array(path)) is not None:
        for number, record in enumerate(records):
            yield _text(record, column or "text", f"{path}: record {number} (counted from 0)")
        return
    paragraph: list[str] = []
    number = 0
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                line.encode()  # raises for bytes that are not UTF-8, with the line at hand
                if column or path.suffix in JSON:
                    if line.strip():
                        yield _field(line, column or "text", f"{path}: line {number}")
                elif line.strip():
                    paragraph.append(line)
                elif paragraph:
                    yield "".join(paragraph).strip()
                    paragraph = []
    except OSError as error:
        raise InputFileError(path, f"cannot be read: {error.strerror}") from error
    except UnicodeEncodeError:
        raise InputFileError(path, f"line {number} is not UTF-8; save as UTF-8") from None
    if paragraph:
        yield "".join(paragraph).strip()


def _array(path: Path) -> list[Any] | None:
    """The records of a file that is one JSON value; None if it is not, as JSON Lines and what cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, list) else [content]


def _field(line: str, name: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{where} is not JSON: {error}") from None
    return _text(record, name, where)


def _text(record: Any, name: str, where: str) -> str:
    text = record.get(name) if isinstance(record, dict) else record
    if isinstance(text, str):
        return text
    fields = f"; its fields are {listed(list(record))}" if isinstance(record, dict) and record else ""
    raise RequestError(f"{where} has no text in the field {name!r}{fields}")


@dataclass(frozen=True)
class DocumentBatch:
    """Rows of some documents on the CPU; every token is a target row. `owners` are the documents' numbers."""

    number: int
    rows: Rows
    owners: Tensor
    documents: int  # documents begun so far
    digest: str  # of this batch and all before


def document_batches(model: Model, documents: Iterator[str], batch_tokens: int, row: int) -> Iterator[DocumentBatch]:
    """Lay documents out in rows of at most `row` tokens, about `batch_tokens` per batch; deterministic."""
    numbers, digest = itertools.count(), ""
    for samples, owners in _chunks(model, documents, _CHUNK * batch_tokens, row):
        for select in _grouped(samples.lengths - 1, batch_tokens, row, model.topology.packs):
            rows = pack(samples, select, packed=model.topology.packs, min_row=row)
            state = hashlib.sha256(f"{digest} {list(rows.input_ids.shape)}".encode())
            state.update(torch.stack([rows.input_ids, rows.position_ids]).numpy().tobytes())
            digest = state.hexdigest()
            yield DocumentBatch(next(numbers), rows, owners[select], int(owners.max()) + 1, digest)


def _chunks(model: Model, documents: Iterator[str], chunk_tokens: int, row: int) -> Iterator[tuple[Samples, Tensor]]:
    """Yield tokenized pieces of some documents at a time, and the document number of each piece."""
    pieces: list[list[int]] = []
    owners: list[int] = []
    total = 0
    for first in itertools.count(0, _TEXTS):
        texts = list(itertools.islice(documents, _TEXTS))
        encoded = encode(model.tokenizer, texts)
        for number, ids in enumerate(encoded, first):
            if missing := without_rows(model.tokenizer, ids, model.vocabulary):
                raise RequestError(f"document {number} (counted from 0): {missing}")
            cut = _cut(ids, row, model.tokenizer.bos_token_id)
            pieces += cut
            owners += [number] * len(cut)
            total += len(ids)
        if pieces and (not texts or total >= chunk_tokens):
            flat = torch.tensor([token for piece in pieces for token in (*piece, 0)])  # the 0 is only a label
            offsets = torch.tensor([0, *(len(piece) + 1 for piece in pieces)]).cumsum(0)
            yield Samples(flat, offsets, torch.ones(len(pieces), dtype=torch.int64)), torch.tensor(owners)
            pieces, owners, total = [], [], 0
        if not texts:
            return


def _cut(ids: list[int], row: int, bos: int | None) -> list[list[int]]:
    if len(ids) <= row:
        return [ids] if ids else []
    start = ids[:1] if ids[0] == bos else []
    step = row - len(start)
    return [start + ids[i : i + step] for i in range(len(start), len(ids), step)]


def _grouped(lengths: Tensor, batch_tokens: int, row: int, packs: bool) -> list[Tensor]:
    """The samples of each batch: full rows of long and short documents; or, with one per row, of similar length."""
    if packs:
        bins, _, n_rows, _ = first_fit_decreasing(lengths, row)
        n = -(-n_rows // max(1, batch_tokens // row))
        return [(bins % n == i).nonzero()[:, 0] for i in range(n)]
    ordered, order = lengths.sort(descending=True, stable=True)
    widths, groups, first = ordered.tolist(), list[Tensor](), 0
    for end in range(1, len(widths) + 1):
        if end == len(widths) or (end + 1 - first) * widths[first] > batch_tokens:
            groups.append(order[first:end])
            first = end
    return sorted(groups, key=lambda group: int(group.min()))  # so that long documents do not all come first
