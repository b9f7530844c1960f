"""A plan's refusals before any work, and what is found out about edits once."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONTEXTS, random_edits, tiny_model
from published import METHODS as SETTINGS
from published import Case
from typer.testing import CliRunner

from fastedit import ConfigError, Editor, EditRequest, FileError, ModelError, RequestError, cli
from fastedit.methods import METHODS, subjects
from fastedit.methods.batch import Batch
from fastedit.methods.locate_then_edit.config import RECIPES, LocateThenEditConfig
from fastedit.methods.locate_then_edit.recipes import resolve
from fastedit.models import Model, topology

SOUGHT: dict[str, Any] = {"steps": 3, "lr": 0.3, "stop_loss": 0.0}


def nothing_runs(model: Any) -> list[int]:
    """Passes through a block that no look at the model's structure reaches, from now on."""
    calls: list[int] = []
    topology(model).blocks[1].register_forward_hook(lambda *_: calls.append(1))
    return calls


LONG = "w9 " * 70
# offending edits of each kind, and what is said of each
OFFENDING: dict[str, tuple[str, Callable[[EditRequest], EditRequest], str]] = {
    "too long": ("locft-bf", lambda e: replace(e, prompt=LONG + e.prompt), "more than the model's context of 64"),
    "no subject": ("memit", lambda e: replace(e, subject=None), "has no subject"),
    "absent subject": ("memit", lambda e: replace(e, subject="nobody"), "is not in the prompt"),
    "too long in a context": ("memit", lambda e: replace(e, target="w9 " * 62), "more than the model's context"),
    "late subject": ("memit", lambda e: replace(e, prompt=LONG + e.subject), "take 7"),
}


@pytest.mark.parametrize("kind", OFFENDING)
def test_all_offending_edits_are_named_before_any_work(kind: str, case: Case, seed: int) -> None:
    method, spoil, said = OFFENDING[kind]
    edits = [replace(edit, id=f"n{i}") for i, edit in enumerate(random_edits(30, seed))]
    wrong = [2, 11, 29]
    edits = [spoil(edit) if i in wrong else edit for i, edit in enumerate(edits)]
    given = {} if method == "locft-bf" else SETTINGS[method].config | {"statistics": case.folder}
    calls = nothing_runs(case.model)
    editor = Editor(case.model, case.tokenizer, method, **given)
    calls.clear()  # a model with a hook is measured when it is loaded
    with pytest.raises(RequestError, match=r"^3 edits cannot be used: .*edit n2.*edit n11.*edit n29") as error:
        editor.plan(edits)
    assert str(error.value).count(said) == 3
    assert error.value.edits == ("edit n2", "edit n11", "edit n29")
    assert not calls
    if kind == "too long":  # what does run is seen
        editor.edit([edit for i, edit in enumerate(edits) if i not in wrong][:2])
        assert calls


def test_edits_that_offend_in_different_ways_are_named_together(case: Case, seed: int) -> None:
    edits = random_edits(8, seed)
    edits[1] = replace(edits[1], subject=None)
    edits[3] = replace(edits[3], prompt=LONG + edits[3].prompt, id=None)
    edits[6] = replace(edits[6], subject="nobody")
    editor = Editor(case.model, case.tokenizer, "memit", **SETTINGS["memit"].config | {"statistics": case.folder})
    with pytest.raises(RequestError) as error:
        editor.plan(edits)
    assert error.value.edits == ("edit e1", "edit e6", "edit 3")
    said = [r"edit e1: it has no subject.*", r"edit e6: .* is not in the prompt", r"edit 3.*: .* context of 64"]
    assert re.search(r".* \| ".join(["^3 edits cannot be used: " + said[0], *said[1:]]), str(error.value))


def test_all_offending_records_of_a_file_are_named(tmp_path: Path) -> None:
    records = [{"prompt": "a", "target": "b"} if i % 3 else {"prompt": "a"} for i in range(60)]
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(records))
    result = CliRunner().invoke(cli.app, ["edit", "--model", "none", "--requests", str(path), "--output", "o"])
    assert result.exit_code == 2
    said = result.stderr
    assert "20 records cannot be used" in said
    assert "record 27 (counted from 0) and 10 more: the record fits no known format, it lacks target" in said
    assert said.rstrip().endswith(" (--verbose lists them all)")


@pytest.fixture
def sought(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by the edits whose subjects are looked for, wherever that is."""
    found: list[Any] = []
    seek = subjects.subject_spans
    for name, module in [*sys.modules.items()]:
        if name.startswith("fastedit.") and getattr(module, "subject_spans", None) is seek:
            monkeypatch.setattr(module, "subject_spans", lambda edit: found.append(edit.id) or seek(edit))
    return found


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("locft-bf", {}),  # chooses to preserve the rest, if all edits have subjects
        ("locft-bf", {"layer": (0, 1), "module": "down_proj", "preserve": "both", "tokens": "subject", "augment": 2}),
        ("memit", {"batch_size": 2, "contexts": ("w20 {}",)}),
        ("rome", {"batch_size": 2}),
        ("emmet", {}),
        ("alphaedit", {}),
    ],
)
def test_each_subject_is_looked_for_once(
    method: str, given: dict[str, Any], case: Case, sought: list[Any], seed: int
) -> None:
    edits = random_edits(6, seed)
    solver = {} if method == "locft-bf" else SOUGHT | {"n_contexts": 0}
    editor = Editor(case.model, case.tokenizer, method, statistics=str(case.folder), **solver, **given)
    editor.edit(edits)
    assert sorted(sought) == sorted(edit.id for edit in edits)


def test_texts_are_tokenized_once(case: Case, seed: int) -> None:
    """For a whole run in batches, in a model without preset, which looks at all edits first."""
    edits, tokenized = random_edits(6, seed), []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(case.tokenizer, name)

        def __call__(self, texts: Any, **options: Any) -> Any:
            if texts != ["a"]:  # a look at what the tokenizer puts after a text
                tokenized.append(texts)
            return case.tokenizer(texts, **options)

    given = SETTINGS["memit"].config | {"statistics": case.folder} | SOUGHT | {"lr": None, "batch_size": 2}
    editor = Editor(case.model, Counting(), "memit", **given)
    plan = editor.plan(edits)
    before = len(tokenized)
    # prompts alone, prompts with targets (and again for the places of the subjects), "{subject} is a",
    # both again to note what the tokenizer does not know, and the package's names
    assert before == 6
    editor.run(plan)
    assert len(tokenized) == before


def test_parts_of_a_batch_are_those_that_would_be_made_of_their_edits(case: Case, seed: int) -> None:
    edits, model = random_edits(7, seed), Model.of(case.model, case.tokenizer)
    edits[5] = replace(edits[5], prompt=f"{edits[5].subject} {edits[5].prompt}")  # its subject twice
    whole = Batch(model, edits, CONTEXTS)
    whole.make_samples()
    parts = {
        (3, 4, 5): next(iter([*whole.split(3)][1:2])),
        (6, 0): whole.select([6, 0]),
        (2, 5): whole.select([5, 2, 1]).select([1, 0]),
    }
    for places, part in parts.items():
        wanted = Batch(model, [edits[i] for i in places], CONTEXTS)
        assert part.edits == wanted.edits
        assert part.spans == wanted.spans
        assert part.notes == wanted.notes
        assert torch.equal(part.rewriting[1], wanted.rewriting[1])
        for found, fresh in ((part.prompts, wanted.prompts), (part.rewriting[0], wanted.rewriting[0])):
            assert all(torch.equal(getattr(found, f.name), getattr(fresh, f.name)) for f in fields(found))
    bare, wanted = whole.bare(), Batch(model, edits)
    assert torch.equal(bare.prompts.input_ids, wanted.prompts.input_ids)
    assert torch.equal(bare.rewriting[0].input_ids, wanted.rewriting[0].input_ids)
    assert whole.select([5, 2]).names([1, 0]) == "edit e2, edit e5"


def test_a_plan_can_be_run_with_a_progress_that_is_set_after_it(case: Case, seed: int) -> None:
    editor = Editor(case.model, case.tokenizer, "locft-bf", epochs=2, layer=1)
    edits, stages = random_edits(4, seed), []
    plan = editor.plan(edits)
    editor.progress = lambda stage, *_: stages.append(stage)
    result = editor.run(plan)
    assert {"prefix", "train"} <= set(stages)
    assert result.notes == plan.notes
    with pytest.raises(ModelError, match="changed after this plan was made"):
        editor.run(plan)
    result.revert()
    editor.run(plan).revert()


def test_missing_statistics_are_told_by_the_plan_before_the_model_writes_contexts(case: Case, seed: int) -> None:
    calls = nothing_runs(case.model)
    editor = Editor(case.model, case.tokenizer, "memit", statistics=case.folder / "none", layers=(0, 2))
    calls.clear()
    with pytest.raises(ModelError, match="no statistics of down_proj in layers 0,2 "):
        editor.plan(random_edits(2, seed))
    assert not calls


# what each method decides itself; the rest is the preset's or a rule's
@pytest.mark.parametrize(
    ("method", "decides"),
    [
        ("rome", {"objective": "equality", "distribution": "single", "site": "mlp", "average": "direction"}),
        ("rome", {"batch_size": 1, "alpha": 0.0, "clamp": 4.0, "n_contexts": 20, "layers": (1,)}),
        ("memit", {"objective": "least-squares", "distribution": "spread", "site": "block", "average": "half"}),
        ("memit", {"batch_size": "auto", "n_contexts": 5, "layers": (0, 1)}),
        ("emmet", {"objective": "equality", "distribution": "single", "alpha": 0.1, "batch_size": "auto"}),
        ("alphaedit", {"objective": "null-space", "distribution": "spread", "l2": 10.0}),
    ],
)
def test_what_is_given_goes_before_the_method_and_the_method_before_the_preset(
    method: str, decides: dict[str, Any]
) -> None:
    parts = topology(tiny_model("llama"))
    found = resolve(parts, LocateThenEditConfig(), RECIPES[method]).config
    assert {name: getattr(found, name) for name in decides} == decides
    given = {"alpha": 0.7, "clamp": 0.5, "n_contexts": 2, "average": "half", "batch_size": 3, "layers": (0,)}
    found = resolve(parts, LocateThenEditConfig(**given), RECIPES[method]).config
    assert {name: getattr(found, name) for name in given} == given
    open_fields = [f.name for f in fields(found) if getattr(found, f.name) is None]
    left = {"lr", "null_threshold", "contexts", "names", "statistics", "targets", "state", "cache_bytes"}
    assert set(open_fields) <= left


def test_no_code_asks_for_a_method_s_name() -> None:
    """Methods are data: their names stand where they are listed, and nowhere else."""
    source = Path(subjects.__file__).parents[1]
    named = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        for method in METHODS
        if f'"{method}"' in path.read_text("utf-8")
    }
    # the names in other code, a method that is named by its command, an example in a message
    outside = {"compat/easyedit.py", "compat/memit.py", "cli/app.py", "cli/flags.py"}
    assert named == {"methods/__init__.py", "methods/locate_then_edit/config.py"} | outside


def test_every_method_has_a_plan(case: Case, seed: int) -> None:
    for name, method in METHODS.items():
        given = {"statistics": case.folder, "contexts": ("w20 {}",), "layers": (1,)} if method.recipe else {}
        plan = method.plan(Model.of(case.model, case.tokenizer), random_edits(2, seed), method.config(**given))
        assert callable(plan.run), name
        assert all(isinstance(note, str) for note in plan.notes)


def test_an_error_is_of_the_kind_of_its_subject(case: Case, tmp_path: Path) -> None:
    """A file's error is a FileError that knows its path; the older kind still catches it."""
    (file := tmp_path / "x").write_text("")
    editor = Editor(case.model, case.tokenizer, "memit", targets=file, statistics=case.folder, layers=(0,))
    with pytest.raises(FileError, match="cannot be written: it is a file") as error:
        editor.plan([EditRequest("w9 w10", "w11", "w9")])
    assert error.value.path == file
    assert isinstance(error.value, ModelError)
    with pytest.raises(ConfigError, match="unknown method 'mend'; known methods: locft-bf, rome"):
        Editor(case.model, case.tokenizer, "mend")
