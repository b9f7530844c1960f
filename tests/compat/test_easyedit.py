"""Our methods in EasyEdit's registry: a stand-in package with its registry and the loop of its editor."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import CONTEXTS, moments, random_edits, same, tiny_model, values
from standins import EASYEDITOR, standing_in

from fastedit import ConfigError, Editor, FileError
from fastedit.compat import easyedit, memit

YAML = """
alg_name: "{name}"
model_name: "./hugging_cache/tiny"
stats_dir: "./data/stats"
P_loc: "./null_space_project.pt"
device: 0
layers: [0, 2]
clamp_norm_factor: 2
layer_selection: "all"
fact_token: "subject_last"
v_num_grad_steps: 4
v_lr: 3e-1
v_loss_layer: 3
v_weight_decay: 1e-1
kl_factor: 0.0625
mom2_adjustment: true
mom2_update_weight: 7
rewrite_module_tmp: "model.layers.{{}}.mlp.down_proj"
layer_module_tmp: "model.layers.{{}}"
mlp_module_tmp: "model.layers.{{}}.mlp"
attn_module_tmp: "model.layers.{{}}.self_attn"
ln_f_module: "model.norm"
lm_head_module: "lm_head"
mom2_dataset: "wikipedia"
mom2_n_samples: 100000
mom2_dtype: "float32"
emmet_lambda: 0.1
update_norm_lambda: 0
nullspace_threshold: 7e-2
L2: 1
"""
CONFIG: dict[str, Any] = {"steps": 4, "lr": 0.3, "weight_decay": 0.1, "clamp": 2.0, "layers": (0, 2)}


@pytest.fixture
def theirs(tmp_path: Path) -> Iterator[Any]:
    """The module of the stand-in's editor."""
    with standing_in(EASYEDITOR, tmp_path / "path"):
        from easyeditor.editors import editor  # type: ignore[import-not-found]

        yield editor
        easyedit.uninstall()


class Case:
    def __init__(self, tokenizer: Any, folder: Path, seed: int) -> None:
        self.model, self.tokenizer, self.folder = tiny_model("llama"), tokenizer, folder
        self.before, self.edits = values(self.model), random_edits(3, seed)
        moments(self.model, folder, seed)
        self.requests = [
            {"prompt": e.prompt, "target_new": e.target, "subject": e.subject, "ground_truth": None} for e in self.edits
        ]

    @property
    def columns(self) -> tuple[list[Any], ...]:
        return tuple([request[name] for request in self.requests] for name in ("prompt", "target_new", "subject"))

    def hparams(self, name: str, **given: Any) -> Any:
        import yaml

        return SimpleNamespace(
            **yaml.safe_load(YAML.format(name=name))
            | {"model_name": (self.model, self.tokenizer), "stats_dir": str(self.folder), "batch_size": 1}
            | given
        )

    def wanted(self, method: str, *batches: Any, **config: Any) -> dict[str, torch.Tensor]:
        editor = Editor(
            tiny_model("llama"), self.tokenizer, method, statistics=self.folder, contexts=CONTEXTS, **CONFIG | config
        )
        for batch in batches:
            editor.edit(batch)
        return values(editor.model)


@pytest.fixture
def case(tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> Case:
    pytest.importorskip("yaml")
    monkeypatch.setattr(memit, "CONTEXT_TEMPLATES_CACHE", [["{}"], CONTEXTS])
    return Case(tokenizer, tmp_path / "statistics", seed)


def test_methods_are_put_in_and_taken_out_in_place(theirs: Any) -> None:
    registry, own = theirs.ALG_DICT, dict(theirs.ALG_DICT)
    easyedit.install()
    easyedit.install()
    assert {name for name in registry if registry[name] is not own.get(name)} == easyedit.OURS.keys()
    assert registry["R-ROME"] is own["R-ROME"]
    assert theirs.BatchEditor.is_batchable_method("LocFT-BF")
    assert not theirs.BatchEditor.is_batchable_method("ROME")
    with easyedit.installed():
        assert registry["MEMIT"] is easyedit.OURS["MEMIT"]
    assert registry["MEMIT"] is easyedit.OURS["MEMIT"]  # as before the block
    easyedit.uninstall()
    assert registry == own
    assert not theirs.BatchEditor.is_batchable_method("LocFT-BF")
    with pytest.raises(ZeroDivisionError), easyedit.installed():
        assert 1 / (registry["LocFT-BF"] is not easyedit.OURS["LocFT-BF"])
    assert registry == own
    easyedit.uninstall()


@pytest.mark.parametrize("spoil", ["none", "no dictionary", "not a registry"])
def test_a_registry_elsewhere_is_told(spoil: str, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if spoil == "none":
        monkeypatch.setitem(sys.modules, "easyeditor.util.alg_dict", None)
    elif spoil == "no dictionary":
        monkeypatch.delattr(sys.modules["easyeditor.util.alg_dict"], "ALG_DICT")
    else:
        monkeypatch.setattr(sys.modules["easyeditor.util.alg_dict"], "ALG_DICT", {"KN": None})
    with pytest.raises(ConfigError, match=r"easyeditor\.util\.alg_dict"):
        easyedit.install()


def test_edits_are_taken_back_between_requests_and_stay_when_sequential(theirs: Any, case: Case) -> None:
    easyedit.install()
    editor = theirs.BaseEditor.from_hparams(case.hparams("MEMIT"))
    _, model, weights = editor.edit_requests(case.requests)
    assert model is case.model
    assert same(model, case.before)
    assert {*weights} == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 2)}
    editor.edit_requests(case.requests[:1], sequential_edit=True)
    assert same(case.model, case.wanted("memit", case.edits[:1], cov_weight=7.0))


def test_batches_are_edited_together(theirs: Any, case: Case) -> None:
    easyedit.install()
    editor = theirs.BaseEditor(case.hparams("MEMIT", batch_size=3))
    editor.batch_edit(*case.columns, sequential_edit=True)
    assert same(case.model, case.wanted("memit", case.edits, cov_weight=7.0))


@pytest.mark.parametrize("name", ["ROME", "EMMET"])
def test_single_layer_methods_run_by_their_files(name: str, theirs: Any, case: Case) -> None:
    easyedit.install()
    editor = theirs.BaseEditor(case.hparams(name, layers=[1]))
    editor.edit_requests(case.requests[:1], sequential_edit=True)
    config = {"layers": (1,)} if name == "ROME" else {"layers": (1,), "cov_weight": 7.0, "site": "block"}
    assert same(case.model, case.wanted(name.lower(), case.edits[:1], **config))
    case.model.load_state_dict(case.before)
    editor.edit_requests(case.requests[:1])
    assert same(case.model, case.before)


def test_alphaedit_preserves_the_edits_that_stand(theirs: Any, case: Case) -> None:
    easyedit.install()
    editor = theirs.BaseEditor(case.hparams("AlphaEdit", P_loc=str(case.folder / "P.pt")))
    config = {"l2": 1.0, "null_threshold": 0.07}
    editor.edit_requests(case.requests[:2])  # taken back, and not preserved
    editor.edit_requests(case.requests, sequential_edit=True)
    assert same(case.model, case.wanted("alphaedit", *([edit] for edit in case.edits), **config))
    torch.save(torch.eye(56).repeat(2, 1, 1), case.folder / "P.pt")
    editor.edit_requests(case.requests[:1])
    times = (case.folder / "P.pt").stat()
    torch.save({"P": 1}, case.folder / "P.pt")
    os.utime(case.folder / "P.pt", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(FileError, match="P_loc holds a dict"):
        editor.edit_requests(case.requests)


PUT_BACK: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "in place": lambda weight, before: weight.copy_(before),
    "data in place": lambda weight, before: weight.data.copy_(before),
    "data": lambda weight, before: setattr(weight, "data", before.clone()),
}


@pytest.mark.parametrize("way", PUT_BACK)
def test_alphaedit_sees_how_ever_weights_are_put_back(way: str, theirs: Any, case: Case) -> None:
    easyedit.install()
    apply, hparams = theirs.ALG_DICT["AlphaEdit"], case.hparams("AlphaEdit")
    _, weights = apply(case.model, case.tokenizer, case.requests[:1], hparams, False, True)
    with torch.no_grad():
        for name, before in weights.items():
            PUT_BACK[way](case.model.get_parameter(name), before)
    assert same(case.model, case.before)
    apply(case.model, case.tokenizer, case.requests[1:2], hparams)
    assert same(case.model, case.wanted("alphaedit", case.edits[1:2], l2=1.0, null_threshold=0.07))


def test_ft_at_the_prompt_s_last_token_stays_theirs(theirs: Any, case: Case) -> None:
    easyedit.install()
    fields = {"num_steps": 2, "lr": 1e-3, "weight_decay": 0, "norm_constraint": False, "layers": [2]}
    hparams = case.hparams("FT", objective_optimization="prompt_last", **fields)
    longer = [{"prompt": "w9", "target_new": "w10 w11"}]
    apply = theirs.ALG_DICT["FT"]
    assert apply(case.model, case.tokenizer, longer, hparams, False, True) == ("theirs", (longer, False, True))
    hparams.objective_optimization = "target_new"
    model, weights = apply(case.model, case.tokenizer, longer, hparams, False, True)
    assert model is case.model
    assert {*weights} == {"model.layers.2.mlp.down_proj.weight"}


def test_locft_bf_is_a_method_of_theirs_now(theirs: Any, case: Case, tmp_path: Path) -> None:
    easyedit.install()
    (tmp_path / "locft.yaml").write_text(
        "alg_name: LocFT-BF\nmodel_name: x\nconfig: {lr: 1e-2, epochs: 3, layer: 2}\n"  # a text, to YAML 1.1
    )
    hparams = easyedit.LocFTBFHyperParams.from_hparams(tmp_path / "locft")
    hparams.model_name, hparams.batch_size = (case.model, case.tokenizer), 3
    theirs.BaseEditor(hparams).batch_edit(*case.columns, sequential_edit=True)
    editor = Editor(tiny_model("llama"), case.tokenizer, lr=1e-2, epochs=3, layer=2)
    editor.edit(case.edits)
    assert same(case.model, values(editor.model))
    hparams.config = {"rate": 1}
    with pytest.raises(ConfigError, match="locft-bf has no field 'rate'"):
        theirs.BaseEditor(hparams).batch_edit(*case.columns)
    for content in ("alg_name: LocFT-BF\nmodel_name: x\nconfig: [lr]\n", "LocFT-BF"):
        (tmp_path / "locft.yaml").write_text(content)
        with pytest.raises(FileError, match="no hyperparameters of LocFT-BF can be read"):
            easyedit.LocFTBFHyperParams.from_hparams(tmp_path / "locft.yaml")
    (tmp_path / "locft.yaml").write_text("alg_name: MEMIT\nmodel_name: x\n")
    with pytest.raises(FileError, match="is of MEMIT, expected alg_name LocFT-BF"):
        easyedit.LocFTBFHyperParams.from_hparams(tmp_path / "locft.yaml")
