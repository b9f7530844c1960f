"""Published statistics: the trees and files that are found, and those that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import made, rows
from stored import FP32, OURS, D, loads, parts

from fastedit import ModelError
from fastedit.statistics.store import StatisticsStore

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize(
    "name",
    [
        "stats/{model}/wikipedia_stats/1_float32_mom2_100000.npz",
        "stats/{model}/wikipedia_stats/model.layers.1.mlp.down_proj_float32_mom2_t512_100000.npz",
        "stats/wikipedia_stats/model.layers.1.mlp.down_proj_float32_mom2.npz",
        "stats/1_float64_mom2_20.npz",
    ],
)
@pytest.mark.parametrize("model", ["org_name", "name"])
def test_published_trees_are_read(name: str, model: str, seed: int, tmp_path: Path) -> None:
    parts.model.config._name_or_path = "org/name"  # type: ignore[union-attr]
    path = tmp_path / name.format(model=model)
    path.parent.mkdir(parents=True)
    wanted = made(rows(seed, 300, D))
    wanted.save_npz(path)
    for other in (
        "11_float32_mom2_100000.npz",
        "model.layers.1.mlp.up_proj_float32_mom2_100000.npz",
        "1_float32_mean_9.npz",
    ):
        made(rows(seed, 300, 32)).save_npz(path.with_name(other))
    C = loads(tmp_path / "stats", FP32)
    torch.testing.assert_close(C, wanted.finalize(), rtol=0, atol=1e-6 * float(C.max()))
    made(rows(seed + 1, 300, D)).save_npz(path)
    assert not torch.allclose(loads(tmp_path / "stats", FP32), C)  # the factor beside it belongs to the old one
    made(rows(seed, 300, D)).save_npz(path.with_name("1_float32_mom2_50.npz"))
    with pytest.raises(ModelError, match="several statistics of layer 1"):
        loads(tmp_path / "stats", FP32)


@pytest.mark.parametrize(
    "name",
    [
        "fw",
        "fw/",
        "fw//",
        "./fw",
        "./fw/",
        "fw/.",
        "models/fw/",
        "{here}/fw/",
        "fw\\",
        "models\\fw",
        "C:\\models\\fw\\",
    ],
)
def test_published_trees_are_found_however_the_folder_is_spelled(
    name: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slash at the end is what a shell completes; a backslash is Windows's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fw").mkdir()
    parts.model.config._name_or_path = name.format(here=tmp_path)  # type: ignore[union-attr]
    path = tmp_path / "stats" / "fw" / "wikipedia_stats" / "1_float32_mom2_100000.npz"
    path.parent.mkdir(parents=True)
    made(rows(seed, 300, D)).save_npz(path)
    StatisticsStore(parts, OURS, directory=tmp_path / "stats").require([1])


def test_a_published_tree_is_found_from_inside_the_model_s_folder(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fw" / "deep").mkdir(parents=True)
    path = tmp_path / "stats" / "fw" / "wikipedia_stats" / "1_float32_mom2_100000.npz"
    path.parent.mkdir(parents=True)
    made(rows(seed, 300, D)).save_npz(path)
    for inside, name in ((tmp_path / "fw", "."), (tmp_path / "fw" / "deep", "..")):
        monkeypatch.chdir(inside)
        parts.model.config._name_or_path = name  # type: ignore[union-attr]
        StatisticsStore(parts, OURS, directory=tmp_path / "stats").require([1])


def test_published_files_under_unknown_names_are_told_of(seed: int, tmp_path: Path) -> None:
    """With the name that would count."""
    for name in ("1_mom2.npz", "layer1.npz", "2_float32_mom2_100000.npz", "z.npz"):
        made(rows(seed, 300, D)).save_npz(tmp_path / name)
    listed = r"1_mom2\.npz, 2_float32_mom2_100000\.npz, layer1\.npz and 1 more, none is called such as"
    with pytest.raises(ModelError, match=rf"{listed} 1_float32_mom2_100000\.npz\); make them"):
        loads(tmp_path)
    with pytest.raises(ModelError, match=r"such as model\.layers\.1\.mlp\.up_proj_float32_mom2_100000\.npz\)"):
        StatisticsStore(parts, OURS, "up_proj", tmp_path).cholesky(1)


def test_published_files_of_another_width_are_refused(seed: int, tmp_path: Path) -> None:
    made(rows(seed, 300, D + 1)).save_npz(tmp_path / "1_float32_mom2_100000.npz")
    with pytest.raises(ModelError, match="of width 57, the projection reads 56"):
        loads(tmp_path)
