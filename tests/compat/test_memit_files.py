"""Statistics and targets of the calls of rome, memit, EMMET and AlphaEdit, in memory and in files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import moments, random_edits, same, tiny_model, values
from memit_calls import Case, close, hparams, requests_of

from fastedit import ConfigError, FileError, ModelError, RequestError
from fastedit.compat import memit
from fastedit.methods.locate_then_edit import method as method_module
from fastedit.models import topology
from fastedit.statistics.moment import StreamingCovariance
from fastedit.statistics.store import statistics_path


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (torch.Tensor.tolist, "is a list, expected (56, 56)"),
        (lambda C: C[:3], "has shape (3, 56), expected (56, 56)"),
        (torch.Tensor.long, "is torch.int64"),
    ],
)
def test_what_is_no_second_moment_is_refused_by_its_key(spoil: Callable[..., Any], said: str, case: Case) -> None:
    key = "org_tiny", "model.layers.2.mlp.down_proj"
    case.C[key] = spoil(case.C[key])
    with pytest.raises(ConfigError, match=re.escape(f"COV_CACHE[{key}] {said}")):
        case.call("memit")
    assert same(case.model, case.before)


def test_published_statistics_are_read_and_kept(case: Case, tmp_path: Path) -> None:
    memit.COV_CACHE.clear()
    folder = tmp_path / "stats" / "tiny" / "wikipedia_stats"  # EasyEdit's name of a model
    for layer in (0, 2):
        found = StreamingCovariance.load(statistics_path(topology(case.model), case.folder, layer))
        folder.mkdir(parents=True, exist_ok=True)
        found.save_npz(folder / f"model.layers.{layer}.mlp.down_proj_float32_mom2_100000.npz", sample_size=100000)
    given = hparams("memit", stats_dir=str(tmp_path / "stats"))
    model, _ = case.call("memit", given=given)
    assert close(model, case.wanted("memit"), case.before)
    assert {*memit.COV_CACHE} == {("org_tiny", f"model.layers.{layer}.mlp.down_proj") for layer in (0, 2)}
    memit.COV_CACHE.clear()
    given.mom2_n_samples = 1000
    with pytest.raises(ModelError, match=r"there is no file .*0\.mlp\.down_proj_float32_mom2_1000\.npz, .*layers 0,2"):
        case.call("memit", given=given)
    given.stats_dir = str(case.folder)  # statistics of `fastedit covariance`
    case.model = tiny_model("llama")
    model, _ = case.call("memit", given=given)
    assert same(model, case.wanted("memit"))


def test_statistics_are_read_again_where_their_file_is_another(case: Case, tmp_path: Path) -> None:
    key, moved = ("org_tiny", "model.layers.2.mlp.down_proj"), case.C["org_tiny", "model.layers.3.mlp.down_proj"]
    given = hparams("memit", layers=[2], stats_dir=str(tmp_path))

    def write(dataset: str, layer: int) -> Path:
        file = tmp_path / "tiny" / f"{dataset}_stats" / "model.layers.2.mlp.down_proj_float32_mom2_100000.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        found = StreamingCovariance.load(statistics_path(topology(case.model), case.folder, layer))
        found.save_npz(file, sample_size=100000)
        return file

    def read() -> torch.Tensor:
        case.call("memit", given=given)
        return memit.COV_CACHE[key]

    own = case.C[key]
    file = write("wikipedia", 3)
    assert read() is own  # the caller's
    case.C.clear()
    first = read()
    torch.testing.assert_close(first, moved.float())
    assert read() is first
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    other = write("wikipedia", 2).rename(tmp_path / "other")
    write("wikipedia", 3)  # so that the inode is another
    os.replace(other, file)
    os.utime(file, ns=times)
    torch.testing.assert_close(read(), own.float())
    write("wikitext", 3)
    given.mom2_dataset = "wikitext"
    torch.testing.assert_close(read(), moved.float())


def test_own_statistics_serve_later_calls_on_the_edited_model(case: Case, seed: int) -> None:
    memit.COV_CACHE.clear()
    given = hparams("memit", stats_dir=str(case.folder))
    case.call("memit", given=given)
    case.call("memit", requests_of(random_edits(2, seed + 1)), given=given)


def test_own_statistics_that_changed_are_read_again(case: Case, seed: int) -> None:
    memit.COV_CACHE.clear()
    given = hparams("memit", stats_dir=str(case.folder))
    case.call("memit", given=given)
    case.model.load_state_dict(case.before)
    first = case.wanted("memit")
    moments(case.model, case.folder, seed + 1)
    model, _ = case.call("memit", given=given)
    assert same(model, case.wanted("memit"))
    assert not same(model, first)


def test_targets_are_kept_in_files_and_read_again(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = tmp_path / "kv" / "layer_{}_clamp_{}_case_{}.npz"
    case.call("memit", case.requests[:2], cache_template=str(template))
    names = {f"layer_2_clamp_2_case_{i}.npz" for i in (0, 1)}  # the clamp as the hparams have it
    assert {path.name for path in template.parent.iterdir()} == names
    wanted, sought = np.full(32, 3.0, np.float32), []
    np.savez(template.parent / "layer_2_clamp_2_case_0.npz", v_star=wanted)
    find = method_module.find_targets

    def counted(batch: Any, *rest: Any) -> Any:
        sought.extend(edit.id for edit in batch.edits)
        return find(batch, *rest)

    def noted(batch: Any, z: torch.Tensor, *rest: Any) -> Any:
        written.append(z)
        return walk(batch, z, *rest)

    written: list[torch.Tensor] = []
    walk = method_module._walk_layers
    monkeypatch.setattr(method_module, "find_targets", counted)
    monkeypatch.setattr(method_module, "_walk_layers", noted)
    case.model = tiny_model("llama")
    case.model.config._name_or_path = "org/tiny"
    case.call("memit", cache_template=template)
    assert sought == ["2"]
    assert torch.equal(written[0][0], torch.from_numpy(wanted))
    (template.parent / "layer_2_clamp_2_case_1.npz").write_bytes(b"PK")
    before = values(case.model)
    with pytest.raises(FileError, match=r"case_1\.npz holds no target v_star"):
        case.call("memit", cache_template=template)
    assert same(case.model, before)
    with pytest.raises(RequestError, match="edit 0: it has no case_id"):
        case.call("memit", [{**case.requests[0], "case_id": None}], cache_template=template)
    with pytest.raises(ConfigError, match="cache_template of ROME"):
        case.call("rome", cache_template=template)


@pytest.mark.parametrize("template", ["{}_{}_{}_{}.npz", "{layer}_{}_{}.npz", "{}_{}_{}_}.npz", "{0.z}.npz"])
def test_a_template_that_cannot_be_filled_is_refused(template: str, case: Case, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cache_template is .*, which cannot be filled \(.*give three \{\}"):
        case.call("memit", cache_template=tmp_path / template)
    assert same(case.model, case.before)


@pytest.mark.parametrize(
    ("template", "ids"), [("z.npz", (0, 1, 2)), ("{}_{}.npz", (0, 1, 2)), ("{}_{}_{}.npz", (7, 7, 7))]
)
def test_edits_that_would_share_a_file_of_targets_are_refused(
    template: str, ids: tuple[int, ...], case: Case, tmp_path: Path
) -> None:
    """The next call would read the target of the last one for all."""
    requests = [request | {"case_id": id_} for request, id_ in zip(case.requests, ids, strict=True)]
    with pytest.raises(RequestError) as raised:
        case.call("memit", requests, cache_template=tmp_path / "kv" / template)
    assert len(raised.value.sentences) == 2
    assert all(
        re.search(r"^edit .*: requests\[[12]\] has the file of requests\[0\] by", text)
        for text in raised.value.sentences
    )
    assert not (tmp_path / "kv").exists()
    case.call("memit", [requests[0], requests[0]], cache_template=tmp_path / "kv" / template)  # one edit, given twice
