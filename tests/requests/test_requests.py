"""A request: what its constructor checks, and requests from Python's records and columns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats import FORMATS, OWN

from fastedit.errors import RequestError
from fastedit.requests import EditRequest, as_requests, load_requests


def test_own_fields_survive_a_round_trip() -> None:
    for _, request in FORMATS.values():
        record = json.loads(json.dumps(dataclasses.asdict(request)))
        assert EditRequest.from_dict(record, where="record") == request
    assert EditRequest.from_dict(OWN, where="record").id is None


def test_constructor_cleans_and_checks() -> None:
    request = EditRequest(" p {} \n", "\tt ", paraphrases=["a ", ""], neighbours=[["q ", " b"]])  # type: ignore[arg-type]
    assert request == EditRequest(" p {}", "t", paraphrases=("a",), neighbours=(("q", "b"),))
    assert hash(request)
    for bad in ({"prompt": " "}, {"target": ""}, {"target": None}, {"paraphrases": 3}, {"neighbours": "abc"}):
        with pytest.raises(RequestError, match=next(iter(bad))):
            EditRequest(**{**OWN, **bad})  # type: ignore[arg-type]


@pytest.mark.parametrize("mark", ["{subject}", "{{ subject }}", "[X]", "{}"])
def test_the_subject_stands_for_its_placeholder(mark: str) -> None:
    """In an `EditRequest` as in a record."""
    texts = {"paraphrases": (f"{mark} is of",), "neighbours": ((f"Not {mark} but", "b"),)}
    edit = EditRequest(f"The capital of {mark} is", "Rome", "Lumbria", portability=((f"In {mark}, the", "c"),), **texts)
    assert edit == EditRequest.from_dict(dataclasses.asdict(edit), where="record")
    assert edit.prompt == "The capital of Lumbria is"
    assert (edit.paraphrases, edit.neighbours) == (("Lumbria is of",), (("Not Lumbria but", "b"),))
    assert edit.portability == (("In Lumbria, the", "c"),)
    assert EditRequest(f"The capital of {mark} is", "Rome").prompt == f"The capital of {mark} is"


def test_as_requests_takes_requests_and_records() -> None:
    named = EditRequest("p", "t", id="mine")
    requests = as_requests([named, EditRequest("p", "t"), {"src": "q", "alt": "u"}])
    assert requests[0] is named
    assert [(r.id, r.prompt, r.target) for r in requests] == [
        ("mine", "p", "t"),
        ("1", "p", "t"),
        ("2", "q", "u"),
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_arrays_of_numpy_are_lists(name: str) -> None:
    def numpied(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: numpied(item) for key, item in value.items()}
        if isinstance(value, list):
            found = np.empty(len(value), dtype=object)
            found[:] = [numpied(item) for item in value]
            return found
        return np.int64(value) if type(value) is int else np.str_(value) if type(value) is str else value

    record, expected = FORMATS[name]
    assert as_requests([numpied(record)]) == [expected]
    assert EditRequest.from_dict(numpied(record)) == dataclasses.replace(
        expected, id=None if "id" not in record and "case_id" not in record else expected.id
    )


def test_what_pandas_calls_missing_is_absent_and_its_rows_are_records() -> None:
    class NAType:
        def __eq__(self, other: object) -> Any:
            raise TypeError("boolean value of NA is ambiguous")

    class Row:
        def to_dict(self) -> dict[str, Any]:
            return {**OWN, "subject": NAType(), "paraphrases": np.array(["p", "q"])}

        def tolist(self) -> list[Any]:
            raise AssertionError

    class Frame:
        iloc = None

        def to_dict(self) -> dict[str, Any]:
            return {name: {5: value, 7: value} for name, value in Row().to_dict().items()}

    expected = EditRequest(**OWN, id="0", paraphrases=("p", "q"))
    assert as_requests([Row()]) == [expected]  # type: ignore[list-item]
    assert as_requests(Frame()) == [expected, dataclasses.replace(expected, id="1")]  # type: ignore[arg-type]


COLUMNS = {
    "prompt": ["p", "q"],
    "target": ["s", "t"],
    "id": [5, None],
    "loc": [["x", "y"], []],
    "loc_ans": [["a"] * 2, None],
}


@pytest.mark.parametrize("kind", ["lists", "indexed", "over lines", "NumPy"])
def test_columns_are_read_as_a_table(kind: str, tmp_path: Path) -> None:
    expected = [EditRequest("p", "s", id="5", neighbours=(("x", "a"), ("y", "a"))), EditRequest("q", "t", id="1")]
    columns: dict[str, Any] = COLUMNS
    if kind == "indexed":  # as pandas writes a frame
        columns = {name: {"4": column[0], "2": column[1]} for name, column in COLUMNS.items()}
    if kind == "NumPy":
        columns = {name: np.array([*column, None], dtype=object)[:-1] for name, column in COLUMNS.items()}
    else:
        (tmp_path / "facts").write_text(json.dumps(columns, indent=1 if kind == "over lines" else None))
        assert load_requests(tmp_path / "facts") == expected
    assert as_requests(columns) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("indent", [None, 1])
def test_records_by_id_are_read(indent: int | None, tmp_path: Path) -> None:
    """As pandas writes a frame with ``orient="index"``, and many people their own files."""
    records = {"7": {"prompt": "p", "target": "s"}, "x": {"prompt": "q", "target": "t", "case_id": 3}}
    expected = [EditRequest("p", "s", id="7"), EditRequest("q", "t", id="3")]
    (tmp_path / "facts").write_text(json.dumps(records, indent=indent))
    assert load_requests(tmp_path / "facts") == as_requests(records) == expected  # type: ignore[arg-type]
    records["y"] = {"prompt": "r", "target": ""}
    (tmp_path / "facts").write_text(json.dumps(records, indent=indent))
    with pytest.raises(RequestError, match=r"row 2 \(counted from 0\): field 'target' is missing or empty"):
        load_requests(tmp_path / "facts")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"loc": ["x"]}, "column 'loc' has 1 rows, and the prompts are a column of 2 rows"),
        ({"id": "x"}, "column 'id' has 'x', and the prompts are"),
        ({"target": {"0": "s", "1": "t"}}, "column 'target' has 2 rows"),
        ({"target": ["s", ""]}, "row 1 .counted from 0.: field 'target' is missing or empty"),
    ],
)
def test_columns_of_other_lengths_are_named(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "facts").write_text(json.dumps(COLUMNS | more))
    with pytest.raises(RequestError, match=rf"facts.*{said}"):
        load_requests(tmp_path / "facts")


def test_as_requests_refuses_nothing_and_lone_requests() -> None:
    for empty in ([], ()):
        with pytest.raises(RequestError, match="empty"):
            as_requests(empty)
    for lone in (OWN, EditRequest("p", "t"), None):
        with pytest.raises(RequestError, match="expected a path or a list"):
            as_requests(lone)  # type: ignore[arg-type]
