"""The choices of ROME, MEMIT, EMMET and AlphaEdit where nothing is given, and their refusals before the work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import moments, random_edits, same, tiny_model
from published import METHODS, TOLERANCE, Case, assert_written

from fastedit import ConfigError, Editor, EditRequest, ModelError, RequestError
from fastedit.methods.locate_then_edit import method as method_module
from fastedit.models import topology
from fastedit.statistics.moment import StreamingCovariance
from fastedit.statistics.store import statistics_path


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
