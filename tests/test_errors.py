"""Errors: their texts are made from their fields, and copies keep them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from fastedit.errors import (
    EditError,
    FastEditError,
    FileError,
    InputFileError,
    ModelError,
    Problem,
    RequestError,
    TensorError,
    listed,
)
from fastedit.models import PairError
from fastedit.models.tokens import PairProblem
from fastedit.ops import DependentKeysError
from fastedit.ops.cholesky import FewTokensError
from fastedit.statistics.store import MissingStatisticsError

ERRORS = [
    RequestError("wrong", edits=["edit 1"]),
    RequestError.of_edits([Problem("edit 1", "wrong"), Problem("edit 2", "wrong")]).add("all else is right"),
    EditError("wrong", edits=["edit 1"]),
    TensorError("wrong").at("row 3").at("layer 2"),
    FileError("a/b", "cannot be read").at("layer 2"),
    FileError("a/b", "{path} is a folder"),
    InputFileError("a/b", "cannot be read"),
    FewTokensError(3, 9, "allow_few").at("a/b"),
    DependentKeysError([[1, 2]], None),
    PairError([PairProblem(4, "it is long", "the text", "prompt")]),
    MissingStatisticsError("no statistics", [3, 4]),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_copies_keep_text_places_and_fields(error: FastEditError) -> None:
    """As errors that come out of another process are copies."""
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert vars(other) == vars(error)


def test_places_stand_in_front_the_outermost_first() -> None:
    assert str(TensorError("wrong").at("row 3").at("layer 2")) == "layer 2: row 3: wrong"
    assert str(FileError("a/b", "cannot be read")) == "a/b: cannot be read"
    assert str(FileError("a/b", "{path} is a folder; give {x}")) == "a/b is a folder; give {x}"
    assert FileError("a/b", "x").path == Path("a/b")
    assert issubclass(FileError, ModelError)
    missing = InputFileError("a/b", "cannot be read")
    assert str(missing) == "a/b: cannot be read"
    assert isinstance(missing, FileError)
    assert isinstance(missing, RequestError)


def test_additions_follow_the_text() -> None:
    error = FileError("a/b", "cannot be written").add("nothing is lost").add("try again").at("saving")
    assert str(error) == "saving: a/b: cannot be written; nothing is lost; try again"
    assert str(RequestError("bad", advice="Read the page").add("it is open")) == "bad; it is open. Read the page"
    assert str(Problem("edit 1", "too long", "after the context '{}'")) == "edit 1, after the context '{}': too long"


def test_one_problem_speaks_for_itself_and_many_are_counted() -> None:
    one = RequestError.of_edits([Problem("edit 1", "wrong")])
    assert (str(one), one.edits) == ("edit 1: wrong", ("edit 1",))
    many = RequestError.of_edits([Problem(f"edit {i}", "wrong") for i in range(13)])
    assert str(many).startswith("13 edits cannot be used: edit 0: wrong | edit 1: wrong")
    assert str(many).endswith("edit 9: wrong | and 3 more")
    assert len(many.edits) == 13
    assert many.sentences == tuple(f"edit {i}: wrong" for i in range(13))
    assert len(PairError([PairProblem(i, "it is empty") for i in range(13)]).sentences) == 13
    assert RequestError.of([Problem("record 1", "wrong")], "records").edits == ()
    assert listed([str(i) for i in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"


def test_what_is_wrong_with_several_is_said_once_with_their_names() -> None:
    causes = ["bad"] * 2 + ["worse"] + ["bad"] * 11 + ["of line 3"]
    problems = [Problem(f"a, b.json, line {i}", cause) for i, cause in enumerate(causes)]
    error = RequestError.of([*problems, Problem("id 7", "it is taken")], "records", "read the page")
    lines = ", ".join(f"line {i}" for i in (1, 3, 4, 5, 6, 7, 8, 9, 10))
    assert str(error.at("here")) == (
        f"here: 16 records cannot be used: a, b.json, line 0, {lines} and 3 more: bad | a, b.json, line 2: worse | "
        "a, b.json, line 14: of line 3 | id 7: it is taken. read the page"
    )
    assert len(error.sentences) == 16
    assert "read the page" not in error.sentence
