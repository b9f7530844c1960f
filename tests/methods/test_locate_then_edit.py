"""ROME, MEMIT, EMMET and AlphaEdit against the published procedure: one edit at a time, all of the model, d×d."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DENSE, SHARED
from helpers import FAMILIES, at_subject, moments, random_edits, same, tiny_model, values, wanted_keys
from published import FORMULAS, METHODS, Case, Settings, target_of, weight_at
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from fastedit import ConfigError, EditError, Editor, EditRequest, ModelError, RequestError, cli
from fastedit.delta import WeightDelta
from fastedit.methods import LocateThenEditConfig
from fastedit.methods.batch import Batch
from fastedit.methods.keys import KeyWalk
from fastedit.methods.locate_then_edit import method as method_module
from fastedit.methods.locate_then_edit.objectives import LeastSquares
from fastedit.methods.locate_then_edit.targets import Targets
from fastedit.models import Model, topology
from fastedit.statistics.collect import collect
from fastedit.statistics.moment import StreamingCovariance
from fastedit.statistics.store import statistics_path
from fastedit.weights import LowRank


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are `target_of` the edits instead of sought."""

    def find(batch: Batch, *_: Any) -> Targets:
        z = torch.stack([target_of(edit) for edit in batch.edits])
        zeros = torch.zeros(len(batch))
        return Targets(z, z, zeros, zeros, zeros.long(), (), 1.0, ())

    monkeypatch.setattr(method_module, "find_targets", find)


def assert_written(model: nn.Module, wanted: dict[int, Tensor], before: dict[str, Tensor], tolerance: float) -> None:
    """These layers hold these weights, up to an error relative to the change; no other weight has changed."""
    names = {f"{topology(model).resolve(layer, 'down_proj')[0]}.weight": layer for layer in wanted}
    after = values(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == names.keys()
    for name, layer in names.items():
        error = (after[name].double() - wanted[layer]).norm() / (wanted[layer] - before[name].double()).norm()
        assert error < tolerance, (name, float(error))


@pytest.fixture
def case(tokenizer: Any, tmp_path: Path, seed: int) -> Case:
    return Case(tokenizer, tmp_path / "statistics", seed)


TOLERANCE = 3e-5  # keys and residuals in fp32, of the tiny models


MEASURED = [family for family in (*DENSE, *SHARED) if family != "xglm"]  # its masks overflow in fp64


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize(
    ("family", "method"), [*product(FAMILIES, METHODS), *((family, "memit") for family in MEASURED)]
)
def test_weights_are_those_of_the_published_procedure(
    family: str, method: str, tokenizer: Any, tmp_path: Path, seed: int
) -> None:
    case, edits, about = Case(tokenizer, tmp_path, seed, family), random_edits(3, seed), METHODS[method]
    model, before = case.model, case.before
    result = case.editor(method, about).edit(edits)
    assert_written(model, case.published(edits, about), before, TOLERANCE)
    after = values(model)
    result.delta.save(tmp_path / "edit.safetensors")
    result.revert()
    assert same(model, before)
    WeightDelta.load(tmp_path / "edit.safetensors").apply(model)
    assert same(model, after)


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize(
    ("objective", "distribution"), [*product(FORMULAS, ("single", "spread", "endpoints"))], ids=str
)
def test_any_objective_goes_with_any_distribution(objective: str, distribution: str, case: Case, seed: int) -> None:
    edits, rome = random_edits(4, seed), objective != "equality"
    layers = (2,) if distribution == "single" else (0, 1, 2)
    about = Settings(objective, layers, "uniform" if rome else "half", alpha=0.0 if rome else 0.1, batch=2)
    pair = {"objective": objective, "distribution": distribution, "batch_size": 2}
    case.editor("rome" if rome else "memit", about, **pair).edit(edits)
    written = (0, 2) if distribution == "endpoints" else layers
    assert_written(case.model, case.published(edits, replace(about, layers=written)), case.before, TOLERANCE)


def edited(case: Case, edits: Sequence[EditRequest], method: str, about: Settings, **config: Any) -> Tensor:
    """The edited weights of the last layer; the model is put back."""
    result = case.editor(method, about, **config).edit(edits)
    weight = weight_at(case.model, about.layers[-1]).detach().clone()
    result.revert()
    return weight


def assert_close(found: Tensor, wanted: Tensor, before: Tensor, tolerance: float) -> None:
    """Relative to the change."""
    assert float((found - wanted).norm() / (wanted - before).norm()) < tolerance


@pytest.mark.usefixtures("given")
def test_identities(case: Case, seed: int) -> None:
    edits, before = random_edits(5, seed), weight_at(case.model, 1).detach().clone()
    one = Settings("", (1,), cov_weight=7.0)
    memit = edited(case, edits, "memit", one, distribution="single")
    emmet = edited(case, edits, "emmet", replace(one, cov_weight=2.0, alpha=3.5))
    assert_close(emmet, memit, before, 1e-6)

    bare = replace(one, contexts=(), alpha=0.0)  # with contexts ROME takes another average
    rome = edited(case, edits[:1], "rome", bare)
    assert_close(edited(case, edits[:1], "emmet", bare), rome, before, 1e-6)
    assert_close(edited(case, edits[:1], "emmet", replace(bare, cov_weight=0.1)), rome, before, 1e-6)

    emmet = edited(case, edits, "emmet", replace(one, alpha=0.0))
    parts = topology(case.model)
    module = parts.resolve(1, "down_proj")[1]
    keys = wanted_keys(case.model, module, case.tokenizer, edits, "half").double()
    now = [at_subject(case.model, parts.blocks[1], case.tokenizer, e, "{}", output=True) for e in edits]
    asked = torch.stack([target_of(e) for e in edits]) - torch.stack(now)
    assert float((keys @ (emmet - before).T - asked).norm() / asked.norm()) < 1e-5


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize("method", ["memit", "alphaedit", "emmet"])
def test_later_batches_preserve_the_keys_of_edits_that_stand(method: str, case: Case, seed: int) -> None:
    edits, about = random_edits(6, seed), replace(METHODS[method], batch=2)
    wanted = case.published(edits[:5], about)
    in_one = case.editor(method, about, batch_size=2)
    result = in_one.edit(edits[:5])
    assert_written(case.model, wanted, case.before, TOLERANCE)
    assert [result.losses, result.delta.metadata["config"]["batch_size"]] == [[0.0] * 3, 2]
    result.revert()

    editor = case.editor(method, about)
    results = [editor.edit(edits[:2]), editor.edit(edits[2:4]), editor.edit(edits[4:5])]
    assert_written(case.model, wanted, case.before, TOLERANCE)
    results[2].revert()
    results[1].revert()
    later = editor.edit(edits[4:5])  # the batch that was taken back is forgotten
    assert_written(case.model, case.published([*edits[:2], edits[4]], about), case.before, TOLERANCE)
    later.revert()
    results[0].revert()
    assert same(case.model, case.before)
    editor.edit(edits[4:5])
    assert_written(case.model, case.published(edits[4:5], about), case.before, TOLERANCE)


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize("method", ["memit", "alphaedit"])
def test_edits_that_were_taken_back_by_hand_are_not_preserved(method: str, case: Case, seed: int) -> None:
    edits, about = random_edits(4, seed), METHODS[method]
    editor = case.editor(method, about)
    editor.edit(edits[:2])
    for name, parameter in case.model.named_parameters():
        parameter.data.copy_(case.before[name])
    result = editor.edit(edits[2:])
    assert sum("something else changed model.layers" in note for note in result.notes) == 1
    found = values(case.model)
    result.revert()
    result = case.editor(method, about).edit(edits[2:])
    assert same(case.model, found)
    assert not any("something else" in note for note in result.notes)


def break_token(case: Case, token: str = "You") -> None:
    """What reads this token has values that are not finite."""
    with torch.no_grad():
        case.model.get_input_embeddings().weight[case.tokenizer.convert_tokens_to_ids(token)] = torch.nan
    case.before = values(case.model)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name].nan_to_num(), other[name].nan_to_num()) for name in one)


SOUGHT: dict[str, Any] = {"steps": 4, "lr": 0.3, "stop_loss": 0.0}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_rate_of_the_targets_is_that_of_all_edits(batch_size: int, case: Case, seed: int) -> None:
    """Not of those that happen to come first."""
    edits = random_edits(7, seed)
    rates = []
    for given, size in ((edits, len(edits)), (edits, batch_size), (edits[::-1], batch_size)):
        result = case.editor("memit", METHODS["memit"], **SOUGHT | {"lr": None, "batch_size": size}).edit(given)
        rates.append(result.delta.metadata["config"]["lr"])
        assert sum(note.startswith("lr ") for note in result.notes) == 1
        result.revert()
    assert rates == pytest.approx([rates[0]] * 3, rel=1e-6)


def test_looking_at_all_edits_for_the_rate_is_no_stage_of_its_own(case: Case, seed: int) -> None:
    """A bar of keys would come to its end before the work begins."""
    stages: dict[float | None, list[tuple[str, int, int]]] = {0.3: [], None: []}
    for lr, seen in stages.items():
        editor = case.editor("memit", METHODS["memit"], **SOUGHT | {"lr": lr, "batch_size": 2})
        editor.progress = lambda stage, done, total, _=None, seen=seen: seen.append((stage, done, total))
        editor.edit(random_edits(4, seed)).revert()
    assert ("keys", 2 * 4, 2 * 4) in stages[0.3]
    assert stages[None] == stages[0.3]


def test_edits_without_a_target_are_dropped_and_the_others_made(tokenizer: Any, tmp_path: Path, seed: int) -> None:
    case = Case(tokenizer, tmp_path, seed, dtype=torch.float32)
    break_token(case)
    moments(case.model, tmp_path, seed)
    edits, about = random_edits(5, seed), METHODS["memit"]
    edits[1] = replace(edits[1], target="You w9")
    edits[3] = replace(edits[3], prompt=f"You {edits[3].prompt}")
    good = [edits[i] for i in (0, 2, 4)]
    for batch_size in (1, "auto"):
        config = SOUGHT | {"batch_size": batch_size}
        result = case.editor("memit", about, **config).edit(edits)
        assert [n for n in result.notes if "dropped" in n] == [
            "dropped, because the loss is not finite: edit e1, edit e3"
        ]
        found = values(case.model)
        result.revert()
        result = case.editor("memit", about, **config).edit(good)
        wanted = values(case.model)
        result.revert()
        assert equal(values(case.model), case.before)
        for layer in about.layers:
            name = f"model.layers.{layer}.mlp.down_proj.weight"
            if batch_size == 1:  # the dropped ones had batches to themselves
                assert torch.equal(found[name], wanted[name])
            assert_close(found[name], wanted[name], case.before[name], 2e-2)
    first = case.editor("memit", about, batch_size=1, steps=2).edit([edits[3], *good])
    assert first.delta.metadata["config"]["lr"] > 0  # of those that have states
    first.revert()
    with pytest.raises(EditError, match="no edit has a target"):
        case.editor("memit", about, batch_size=1, steps=2).edit([edits[1], edits[3]])
    assert equal(values(case.model), case.before)


TWINS = [
    EditRequest("w10 w11 w12 is", "w30", "w11 w12", id="one"),
    EditRequest("w40 w41 is", "w31", "w41", id="other"),
    EditRequest("w10 w11 w12 was w13", "w32", "w11 w12", id="two"),
]


@pytest.mark.usefixtures("given")
def test_edits_of_one_key(case: Case) -> None:
    about = replace(METHODS["emmet"], alpha=0.0)
    for method, more in (("emmet", {}), ("memit", {"objective": "equality", "layers": (0, 2)})):
        with pytest.raises(
            EditError, match=r"depend on one another at layer \d.*: edit one, edit two\. .*on_duplicates"
        ) as error:
            case.editor(method, about, **more).edit(TWINS)
        assert error.value.edits == ("edit one", "edit two")
        assert same(case.model, case.before)

    merged = (target_of(TWINS[0]) + target_of(TWINS[2])) / 2
    for choice, edits, batch in (("merge", TWINS[:2], 9), ("sequential", [TWINS[0], TWINS[1], TWINS[2]], 2)):
        result = case.editor("emmet", about, on_duplicates=choice).edit(TWINS)
        wanted: Callable[..., Tensor] = target_of
        if choice == "merge":
            wanted = lambda edit: merged if edit.id == "one" else target_of(edit)  # noqa: E731
        reference = case.published(edits, replace(about, batch=batch), wanted)
        assert_written(case.model, reference, case.before, TOLERANCE)
        result.revert()
        assert same(case.model, case.before)
    case.editor("emmet", replace(about, alpha=0.1)).edit(TWINS)  # needs no choice
    assert_written(case.model, case.published(TWINS, METHODS["emmet"]), case.before, TOLERANCE)


class Interrupts:
    """Ctrl-C at the n-th update of a layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        update = LeastSquares.update
        self.left = at

        def counted(objective: LeastSquares, *args: Tensor) -> Any:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return update(objective, *args)

        monkeypatch.setattr(LeastSquares, "update", counted)


@pytest.mark.usefixtures("given")
def test_ctrl_c(case: Case, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    edits, about = random_edits(8, seed), METHODS["memit"]
    config: dict[str, Any] = {"batch_size": 2}
    plain = case.editor("memit", about, **config)
    plain.edit(edits[:4])
    wanted = values(case.model)
    plain.edit(edits[6:])
    later = values(case.model)

    def restart() -> None:
        case.model.load_state_dict(case.before, strict=False)

    for at, keep in ((6, False), (1, True), (2, True)):  # layers 0, 2 of batch 1, 0, 2 of batch 2, …
        restart()
        editor = case.editor("memit", about, **config, keep_partial=keep)
        with monkeypatch.context() as patch:
            Interrupts(patch, at)
            with pytest.raises(KeyboardInterrupt):
                editor.edit(edits)
        assert same(case.model, case.before)
    editor = case.editor("memit", about, **config, keep_partial=True)
    with monkeypatch.context() as patch:
        Interrupts(patch, 6)  # batch 3 has written layer 0
        result = editor.edit(edits)
    assert same(case.model, wanted)
    assert "interrupted; kept the first 4 edits" in result.notes
    more = editor.edit(edits[6:])  # preserves the keys of the four, and not of the batch that was left
    assert same(case.model, later)
    more.revert()
    result.revert()
    assert same(case.model, case.before)


def test_ctrl_c_where_no_batch_wrote_anything(
    tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tokenizer, tmp_path, seed, dtype=torch.float32)
    break_token(case)
    moments(case.model, tmp_path, seed)
    edits = random_edits(2, seed)
    edits[0] = replace(edits[0], target="You w9")
    Interrupts(monkeypatch, 2)  # edit 0 is dropped, edit 1 has written layer 0
    with pytest.raises(KeyboardInterrupt):
        case.editor("memit", METHODS["memit"], batch_size=1, keep_partial=True, **SOUGHT).edit(edits)
    assert equal(values(case.model), case.before)


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_sum_their_batches_in_fp32(
    dtype: torch.dtype, tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tokenizer, tmp_path, seed, dtype=dtype)
    update, weight = LeastSquares.update, weight_at(case.model, 1)
    start, rounded = weight.detach().double(), weight.detach().clone()
    total = torch.zeros_like(start)

    def watched(objective: LeastSquares, keys: Tensor, residuals: Tensor) -> Any:
        nonlocal total, rounded
        assert keys.dtype == residuals.dtype == torch.float32
        assert ((start + total).to(dtype) != weight).float().mean() < 0.01  # what this batch is measured on
        left, right = update(objective, keys, residuals)
        total = total + left.double() @ right.double()
        rounded = (rounded.double() + left.double() @ right.double()).to(dtype)
        return left, right

    monkeypatch.setattr(LeastSquares, "update", watched)
    about = replace(METHODS["memit"], layers=(1,))
    result = case.editor("memit", about, batch_size=1).edit(random_edits(12, seed))
    assert ((start + total).to(dtype) != weight).float().mean() < 0.01  # a sum in another order rounds another way
    assert (rounded != weight).float().mean() > 0.1
    (change,) = result.delta.updates.values()
    change = change.dense() if isinstance(change, LowRank) else change
    assert_close(change.double(), total, torch.zeros(()), 1e-5)
    result.revert()
    assert same(case.model, case.before)


@pytest.mark.usefixtures("given")
def test_fp64_weights_keep_their_digits(case: Case, seed: int) -> None:
    weight = weight_at(case.model, 1)
    with torch.no_grad():
        weight *= 1 + 1e-9 * torch.randn(weight.shape, dtype=torch.float64)
    start = weight.detach().clone()
    moments(case.model, case.folder, seed)
    result = case.editor("emmet", METHODS["emmet"]).edit(random_edits(2, seed))
    (change,) = result.delta.updates.values()
    assert isinstance(change, LowRank)
    torch.testing.assert_close(
        weight.detach(), start + change.left.double() @ change.right.double(), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("method", METHODS)
def test_from_text_to_an_edited_model(
    method: str, tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics of text, targets that are sought, and contexts of the model's own; weights by those targets."""
    model, edits = tiny_model("llama"), random_edits(4, seed)
    texts = [edit.prompt for edit in random_edits(150, seed + 1)]
    collect(Model.of(model, tokenizer), texts, [0, 1], directory=tmp_path)
    before = values(model)
    found: list[Targets] = []
    find = method_module.find_targets
    monkeypatch.setattr(
        method_module, "find_targets", lambda *args, **named: found.append(find(*args, **named)) or found[-1]
    )
    editor = Editor(model, tokenizer, method, statistics=str(tmp_path), clamp=4.0, cov_weight=0.1, null_threshold=0.3)
    result = editor.edit(edits)
    assert result.losses == pytest.approx([float(targets.loss.mean()) for targets in found])
    assert not same(model, before)
    again = Editor(tiny_model("llama"), tokenizer, method, **dict(editor.config.__dict__))
    monkeypatch.setattr(method_module, "find_targets", lambda *_, **__: found.pop(0))
    again.edit(edits)
    assert same(again.model, values(model))
    config = result.delta.metadata["config"]
    assert None not in [config[name] for name in config if name not in ("contexts", "targets", "state", "cache_bytes")]
    assert json.loads(json.dumps(config))["layers"] == list(config["layers"])
    result.revert()
    assert same(model, before)


@pytest.mark.usefixtures("given")
def test_statistics_that_cannot_serve(case: Case, tmp_path: Path, seed: int) -> None:
    edits, about, other = random_edits(2, seed), METHODS["memit"], tmp_path / "other"

    def refused(match: str, **config: Any) -> None:
        with pytest.raises(ModelError, match=match):
            case.editor("memit", about, **{"statistics": str(other)} | config).edit(edits)
        assert same(case.model, case.before)

    refused(r"layers 0,2 .*fastedit covariance .* --layers 0,2 --output .*other")
    moments(case.model, other, seed, layers=(0,))
    refused(r"layer 2 .*--layers 2 ")
    moments(tiny_model("llama", seed=1), other, seed)
    refused("another|fingerprint.*unchecked_statistics")
    with pytest.warns(RuntimeWarning, match="another model"):
        result = case.editor("memit", about, statistics=str(other), unchecked_statistics=True).edit(edits)
    result.revert()
    moments(tiny_model("gpt2"), other, seed)
    for unchecked in (False, True):
        refused("width 128.* reads 56", unchecked_statistics=unchecked)
    moments(case.model, other, seed, tokens=20)
    for objective in ("least-squares", "null-space"):
        refused("20 tokens, fewer than its width 56.*560 tokens.*unchecked_statistics", objective=objective)
        config = {"statistics": str(other), "unchecked_statistics": True, "objective": objective}
        with pytest.warns(RuntimeWarning, match="20 tokens"):
            result = case.editor("memit", about, **config).edit(edits)
        result.revert()
    moments(case.model, other, seed)
    for layer in about.layers:
        path = statistics_path(topology(case.model), other, layer)
        broken = StreamingCovariance.load(path)
        broken._total[3, 2] = torch.nan
        broken.save(path)
    refused("not finite")
    refused("not finite", unchecked_statistics=True)


@pytest.mark.usefixtures("given")
def test_edits_that_cannot_be_made_are_named_before_any_work(
    case: Case, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits, about = random_edits(2, seed), METHODS["memit"]
    monkeypatch.setattr(method_module, "find_targets", lambda *_, **__: pytest.fail("a target was sought"))
    wrong = {
        "edit x: the subject 'w11' is not in the prompt": EditRequest("w10 w12", "w13", "w11", id="x"),
        "edit 2: it has no subject": EditRequest("w10 w12", "w13"),
        "edit x: prompt and target take": EditRequest("w10 " * 70, "w13", "w10", id="x"),
    }
    for message, edit in wrong.items():
        with pytest.raises(RequestError, match=message):
            case.editor("memit", about, batch_size=1).edit([*edits, edit])
        assert same(case.model, case.before)


@pytest.mark.usefixtures("given")
def test_a_subject_that_stands_twice_is_said_once(case: Case) -> None:
    edits = [EditRequest(f"w10 w11 w10 w1{i}", "w12", "w10", id=f"e{i}") for i in range(2, 4)]
    result = case.editor("memit", METHODS["memit"], batch_size=1).edit(edits)
    (said,) = [note for note in result.notes if "more than once" in note]
    assert said.endswith("edit e2, edit e3")
    assert_written(case.model, case.published(edits, replace(METHODS["memit"], batch=1)), case.before, TOLERANCE)


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("objective is 'memit'; give one of least-squares, equality, null-space", {"objective": "memit"}),
    ("distribution is 'all'; give one of single, spread, endpoints", {"distribution": "all"}),
    ("on_duplicates is 'drop'; give one of error, merge, sequential", {"on_duplicates": "drop"}),
    ("layers is 3; give a tuple", {"layers": 3}),
    ("layers is 'last'; give a tuple", {"layers": "last"}),
    (r"layers is \(1, True\); give a tuple, each item a whole number", {"layers": (1, True)}),
    ("contexts is 'w10 {}'; give a tuple", {"contexts": "w10 {}"}),
    ("steps is 'x'; give a whole number, or leave it out", {"steps": "x"}),
    *((f"{name} is 'x'; give a number, or leave it out", {name: "x"}) for name in ("lr", "alpha", "null_threshold")),
    ("kl_factor is None; give a number$", {"kl_factor": None}),
    ("n_contexts is 2.5; give a whole number", {"n_contexts": 2.5}),
    *((f"{name} is 5; give a text", {name: 5}) for name in ("module", "statistics", "targets")),
    ("unchecked_statistics is 'no'; give True or False", {"unchecked_statistics": "no"}),
    ("cache_bytes is -5; give 0 or more", {"cache_bytes": -5}),
    ("cache_bytes is '1G'; give a whole number", {"cache_bytes": "1G"}),
    *((f"seed is {seed}; give 0 to", {"seed": seed}) for seed in (-1, 2**63)),
    ("seed is None; give a whole number$", {"seed": None}),
    (r"layers is \(\); give different layers", {"layers": ()}),
    (r"layers is \(2, 0\); give different layers from the lowest", {"layers": (2, 0)}),
    (r"layers is \(1, 1\)", {"layers": (1, 1)}),
    (r"layers is \(0, 1\), but a single layer", {"layers": (0, 1), "distribution": "single"}),
    ("layers ends with 3, the last block.*choose among 0 to 2", {"layers": (0, 3)}),
    ("layer 4 does not exist", {"layers": (0, 4)}),
    ("layer -1 does not exist", {"layers": (-1,)}),
    ("batch_size is 0", {"batch_size": 0}),
    ("batch_size is 'all'", {"batch_size": "all"}),
    *((f"{name} is {value}", {name: value}) for name in ("cov_weight", "l2", "null_threshold") for value in (0, -1.0)),
    *(
        (f"{name} is 10000.*; give a number", {name: 10**400})
        for name in ("alpha", "null_threshold", "kl_factor", "lr")
    ),
    ("cov_weight is nan", {"cov_weight": float("nan")}),
    ("alpha is -0.1", {"alpha": -0.1}),
    ("n_contexts is -1", {"n_contexts": -1}),
    ("site is 'attn'", {"site": "attn"}),
    ("steps is 0", {"steps": 0}),
    ("lr is -1", {"lr": -1.0}),
    ("clamp is 0", {"clamp": 0.0}),
    ("kl_factor is -1", {"kl_factor": -1.0}),
    ("the context 'w10' needs exactly one", {"contexts": ("w10",)}),
    ("site mlp is one layer's MLP.*take site block", {"site": "mlp"}),
    ("o_proj is written; take site block", {"site": "mlp", "layers": (1,), "module": "self_attn.o_proj"}),
    ("not a linear map", {"module": "attn"}),
    ("module 'w9' does not exist", {"module": "w9"}),
    *((f"{m} does not write to the residual stream", {"module": m}) for m in ("mlp.up_proj", "self_attn.q_proj")),
    ("no eigenvalue of C is below .*raise null_threshold", {"objective": "null-space", "null_threshold": 1e-9}),
]


@pytest.mark.usefixtures("given")
def test_choices_that_make_no_sense_are_named(case: Case, seed: int) -> None:
    edits, about = random_edits(2, seed), METHODS["memit"]
    for message, wrong in WRONG:
        with pytest.raises((ConfigError, ModelError), match=message):
            case.editor("memit", about, **{"null_threshold": 0.07} | wrong).edit(edits)
    with pytest.raises(ConfigError, match=r"memit has no field 'layer'; its fields: .*layers"):
        case.editor("memit", about, layer=1)
    assert same(case.model, case.before)


@pytest.mark.usefixtures("given")
def test_an_independent_edit_that_there_is_not_is_named(case: Case, seed: int) -> None:
    each = case.editor("memit", METHODS["memit"]).edit_each(random_edits(2, seed))
    assert each.delta(1).metadata["edits"] == 1
    for wrong in (2, -1, "0", None, 1.0):
        with pytest.raises(ConfigError, match=f"there is no edit {wrong!r}: 2 were made"):
            each.delta(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_is_reached_or_it_is_said_that_it_is_not(
    family: str, tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With next to nothing to preserve. A norm after the MLP keeps a block's output from following an update."""
    case = Case(tokenizer, tmp_path, seed, family, dtype=torch.float32)  # Gemma 2's softmax is fp32, 0/0 in fp64
    edits = random_edits(2, seed)
    found: list[Any] = []
    seek = method_module.find_targets
    monkeypatch.setattr(
        method_module, "find_targets", lambda *args, **named: found.append(seek(*args, **named)) or found[-1]
    )
    config: dict[str, Any] = {"statistics": str(case.folder), "n_contexts": 0, "cov_weight": 1e-9, "steps": 5}
    for layers, options in (((1,), {"distribution": "single"}), ((0, 1), {})):
        editor = Editor(case.model, tokenizer, "memit", layers=layers, **config, **options)
        result = editor.edit(edits)
        site = result.delta.metadata["config"]["site"]
        with KeyWalk(Batch(editor.parts, edits), 1) as walk:
            now = walk.outputs(1, "down_proj" if site == "mlp" else "block")
        z, h0 = found[-1].z, found[-1].h0
        reached = bool((now - z).norm() < 1e-3 * (z - h0).norm())
        assert reached != any("targets are reached in part" in note for note in result.notes)
        assert reached or (len(layers) > 1 and family in ("gemma2", "gemma3", "olmo2", "opt_post_norm"))
        result.revert()


@pytest.mark.parametrize("family", ["llama", "granite", "gemma3", "olmo2", "opt_post_norm"])
def test_one_layer_is_written_where_a_norm_bounds_what_each_adds(
    family: str, tokenizer: Any, tmp_path: Path, seed: int
) -> None:
    case = Case(tokenizer, tmp_path, seed, family, dtype=torch.float32)
    bounded = family not in ("llama", "granite")
    for method, given in (("memit", {}), ("alphaedit", {}), ("memit", {"layers": (0, 1)}), ("memit", {"layers": (1,)})):
        made = Editor(case.model, tokenizer, method, statistics=str(case.folder), steps=2, n_contexts=0, **given)
        result = made.edit(random_edits(2, seed))
        config = result.delta.metadata["config"]
        mlp = len(config["layers"]) == 1 and family != "llama"  # Granite has a factor there
        assert config["distribution"] == ("single" if bounded and not given else "spread")
        assert config["site"] == ("mlp" if mlp else "block")
        assert any("distribution single" in note for note in result.notes) == (bounded and given != {"layers": (1,)})
        result.revert()


def test_an_update_before_a_norm_is_of_the_size_of_the_outputs_there(tokenizer: Any, tmp_path: Path, seed: int) -> None:
    """In Gemma 3 the outputs of `down_proj` are hundreds of times smaller than what the norm makes of them."""
    case = Case(tokenizer, tmp_path, seed, "gemma3", dtype=torch.float32)
    weights = {path: w for path, w in case.model.named_parameters() if "down_proj" in path}
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(0.01)
    moments(case.model, case.folder, seed)
    before = {path: weight.norm().item() for path, weight in weights.items()}
    sizes = []
    for through_norm in (True, False):
        config = {"statistics": str(case.folder), "n_contexts": 0, "cov_weight": 1e-6}
        config |= {"through_norm": through_norm, "module": "mlp.down_proj"}
        editor = Editor(case.model, tokenizer, "memit", layers=(0, 1), **config)
        result = editor.edit(random_edits(3, seed))
        updates = {path: u.dense() if isinstance(u, LowRank) else u for path, u in result.delta.updates.items()}
        assert any("may be far too large" in note for note in result.notes) != through_norm
        sizes.append(max(float(u.norm()) / before[path] for path, u in updates.items()))
        result.revert()
    assert sizes[0] < 3
    assert sizes[1] > 10 * sizes[0]


@pytest.mark.parametrize(
    ("method", "layers", "cov_weight", "rule"),
    [
        ("memit", (0, 1), 112, "2 times the key width"),
        ("emmet", (1,), 1120, "2 times the key width, divided by alpha"),
        ("rome", (1,), 112, "2 times the key width"),
    ],
)
def test_what_was_chosen_is_said(
    method: str, layers: tuple[int, ...], cov_weight: float, rule: str, case: Case, seed: int
) -> None:
    editor = Editor(case.model, case.tokenizer, method, statistics=str(case.folder), steps=2)
    result = editor.edit(random_edits(2, seed))
    config = result.delta.metadata["config"]
    assert config["layers"] == layers
    assert config["cov_weight"] == cov_weight
    assert [note for note in result.notes if "more than once" not in note] == [
        f"layers {', '.join(map(str, layers))} (no preset for this model)",
        f"cov_weight {cov_weight} (no preset for this model: {rule})",
        f"lr {config['lr']:.3g} (no preset for this model: half the root mean square of a typical state)",
    ]


def call(*args: Any, **env: str) -> Result:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], env=env)


def test_the_command_line(tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, edits = tiny_model("llama"), random_edits(4, seed)
    checkpoint, requests, output = tmp_path / "model", tmp_path / "edits.json", tmp_path / "edited"
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    requests.write_text(json.dumps([{"prompt": e.prompt, "target": e.target, "subject": e.subject} for e in edits]))
    records = json.loads(requests.read_text())
    records[3]["subject"] = "w9 w9 w9"
    (wrong := tmp_path / "wrong.json").write_text(json.dumps(records))
    common = ("edit", "--model", checkpoint, "--requests", requests, "--output", output)
    memit = ("--method", "memit", "--layers", "0,1", "--steps", 3, "--batch-size", 2, "--contexts", "w20 {},w21 . {}")

    for text, arguments in (
        ("no statistics of down_proj in layers 0,1 ", memit),
        (f"fastedit covariance --model {checkpoint} --text FILE --layers 0,1", memit),
        ("layers ends with 3, the last block", (*memit, "--layers", 3)),
        ("expected INT,…, got 'low'", (*memit, "--layers", "low")),
        ("memit has no field 'epochs'", (*memit, "--epochs", 1)),
        ("objective", (*memit, "--objective", "best")),
        ("edit 3: the subject 'w9 w9 w9' is not in the prompt", (*memit, "--requests", wrong)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("fastedit.cli.arguments.measure", lambda *_: pytest.fail("the model was measured"))
            result = call(*common, *arguments)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("fastedit: ")
        assert text in result.stderr.splitlines()[-1]
        assert not output.exists()

    moments(model, checkpoint / "statistics", seed)  # where an edit looks by itself
    result = call(*common, *memit)
    assert result.exit_code == 0, result.stderr
    assert "memit: cov_weight 112 (no preset for this model: 2 times the key width)" in result.stderr
    config: dict[str, Any] = {"layers": (0, 1), "steps": 3, "batch_size": 2, "contexts": ("w20 {}", "w21 . {}")}
    editor = Editor.from_pretrained(checkpoint, "memit", **config)
    wanted = editor.edit(requests)
    assert same(AutoModelForCausalLM.from_pretrained(output), values(editor.model))
    report = json.loads((output / "report.json").read_text())
    assert report["edit"]["method"] == "memit"
    assert report["edit"]["config"] == json.loads(json.dumps(wanted.delta.metadata["config"]))
    assert report["edit"]["losses"] == wanted.losses
    assert report["edit"]["notes"] == wanted.notes
    delta = WeightDelta.load(output / "delta.safetensors")
    wanted.revert()
    delta.apply(editor.model)
    assert same(AutoModelForCausalLM.from_pretrained(output), values(editor.model))


def test_help_tells_each_method_what_a_flag_means_to_it() -> None:
    """Flags that LocFT-BF has too, and those of its own; `locate` runs LocFT-BF only."""
    words = " ".join(call("edit", "--help", COLUMNS="250").stdout.replace("│", " ").split())
    alone, ours = words.split("Configuration of several methods")[1].split("Configuration of rome, memit, emmet")
    for flag, of_locft_bf, of_ours in (
        ("--lr", "Adam's learning rate", "Adam's rate for a target"),
        ("--batch-size", "edits a step", "edits that are solved together"),
        ("--stop-loss", "stop after an epoch", "a target whose loss is below is done. (default 0.05)"),
        ("--keep-partial", "on Ctrl-C keep the last whole epoch", "on Ctrl-C keep the batches"),
    ):
        assert re.search(
            rf"{flag} .*locft-bf: {of_locft_bf}.* rome, memit, emmet, alphaedit: {re.escape(of_ours)}", alone
        )
    for field in fields(LocateThenEditConfig):
        flag = f"--{field.name.replace('_', '-')} "
        assert (flag in alone) != (flag in ours)
    help_of_locate = call("locate", "--help", COLUMNS="250").stdout
    assert "--cov-weight" not in help_of_locate
    assert "--epochs" in help_of_locate
