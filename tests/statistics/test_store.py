"""Where statistics are looked for, what is made of them, and what is refused with what advice."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import made, rows, tiny_model
from safetensors import safe_open
from safetensors.torch import save_file
from stored import FACTOR, OURS, D, keep, loads, parts
from torch import Tensor

from fastedit import ModelError
from fastedit.models import fingerprint, topology
from fastedit.statistics.store import StatisticsStore, statistics_path
from fastedit.tensorfile import checksum

pytestmark = pytest.mark.usefixtures("cache")


def test_a_given_folder_then_the_checkpoint_s_then_the_user_s(seed: int, tmp_path: Path, cache: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    wanted = [
        keep(folder, rows(seed + i, 200, D)) for i, folder in enumerate((cache, checkpoint / "statistics", tmp_path))
    ]
    assert torch.equal(loads(), wanted[0].finalize())
    parts.model.config._name_or_path = str(checkpoint)  # type: ignore[union-attr]
    checkpoint.mkdir(exist_ok=True)
    assert torch.equal(loads(), wanted[1].finalize())
    assert torch.equal(loads(tmp_path), wanted[2].finalize())
    keep(checkpoint / "statistics", rows(seed + 3, 200, D), of="of an edited model")
    assert torch.equal(loads(), wanted[0].finalize())  # another model's are passed over where others fit
    with pytest.raises(ModelError, match="no statistics"):
        loads(tmp_path / "empty")  # a given folder is the only one


def test_all_spellings_of_a_projection_are_one(seed: int, tmp_path: Path) -> None:
    keep(tmp_path, rows(seed, 200, D))
    for module in ("down_proj", "mlp.down_proj", "model.layers.1.mlp.down_proj"):
        StatisticsStore(parts, OURS, module, tmp_path).covariance(1)
    assert statistics_path(parts, tmp_path, 2, "mlp.up_proj").name == "2.mlp.up_proj.safetensors"


MADE_ONCE: dict[str, tuple[str, Callable[[StatisticsStore], Tensor]]] = {
    "factor": ("fastedit.statistics.store.factor_covariance", lambda store: store.cholesky(1)),
    "eigen": ("torch.linalg.eigh", lambda store: torch.cat([store.eigen(1)[0][None], store.eigen(1)[1]])),
}


@pytest.mark.parametrize("kind", MADE_ONCE)
def test_what_is_made_of_statistics_is_made_once_and_anew_when_they_change(
    kind: str, seed: int, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    makes, loaded = MADE_ONCE[kind]
    store = StatisticsStore(parts, OURS, directory=tmp_path)

    def kept() -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(makes, lambda *_, **__: pytest.fail("it is not kept"))
            return loaded(store)

    keep(tmp_path, rows(seed, 200, D))
    first = loaded(store)
    assert torch.equal(kept(), first)
    keep(tmp_path, rows(seed + 1, 200, D))
    loaded(store)
    second = kept()
    assert not torch.equal(second, first)
    place = cache / FACTOR.replace("factor", kind)
    whole = place.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    flipped = begin + random.Random(seed).randrange(len(whole) - begin)
    for damaged in (
        whole[:-9],
        b"",
        whole.replace(f"fastedit-{kind}".encode(), f"fastedot-{kind}".encode()),
        whole.replace(b"checksum", b"checksun"),
        whole[:flipped] + bytes([whole[flipped] ^ 1]) + whole[flipped + 1 :],
    ):
        place.write_bytes(damaged)
        loaded(store)
        assert torch.equal(kept(), second)


def test_a_damaged_factor_of_0_1_is_made_anew(seed: int, tmp_path: Path, cache: Path) -> None:
    """Version 0.1 kept the checksum in the description, where nobody looks for it now."""
    keep(tmp_path, rows(seed, 200, D))
    wanted = loads(tmp_path)
    with safe_open(cache / FACTOR, "pt") as file:
        about, packed = json.loads(file.metadata()["fastedit"]), file.get_tensor("lower")
    old = {"format": "fastedit-factor-1", "fastedit": json.dumps(about | {"checksum": checksum(packed)})}
    save_file({"lower": 2 * packed}, cache / FACTOR, old)
    assert torch.equal(loads(tmp_path), wanted)


@pytest.mark.parametrize("where", ["given", "checkpoint", "published"])
def test_factors_go_to_the_cache_and_nothing_to_where_statistics_lie(
    where: str, seed: int, tmp_path: Path, cache: Path
) -> None:
    """It may be a folder that others share, or the package's own."""
    folder = tmp_path / "there" / "statistics"
    if where == "published":
        folder.mkdir(parents=True)
        made(rows(seed, 200, D)).save_npz(folder / "1_float32_mom2_200.npz")
    else:
        keep(folder, rows(seed, 200, D))
    if where == "checkpoint":
        parts.model.config._name_or_path = str(folder.parent)  # type: ignore[union-attr]
    before = sorted(folder.parent.rglob("*"))
    StatisticsStore(parts, OURS, directory=None if where == "checkpoint" else folder).cholesky(1)
    assert sorted(folder.parent.rglob("*")) == before
    assert [path.name for path in cache.iterdir()] == [FACTOR]


def test_a_cache_that_cannot_be_written_does_not_matter(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path / "given", rows(seed, 200, D))

    def refuse(source: Any, target: Path) -> None:
        raise PermissionError("Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    for _ in range(2):
        loads(tmp_path / "given")
    assert not list(tmp_path.rglob("*factor*"))


def test_missing_statistics_are_told_with_the_command(tmp_path: Path) -> None:
    parts.model.config._name_or_path = "org/name"  # type: ignore[union-attr]
    with pytest.raises(ModelError, match=r"fastedit covariance --model org/name --text FILE --layers 1,2,3$"):
        StatisticsStore(parts, OURS).require([1, 2, 3])
    with pytest.raises(ModelError, match=f"--layers 2 --module up_proj --output {tmp_path}$"):
        StatisticsStore(parts, OURS, "up_proj", tmp_path).cholesky(2)
    with pytest.raises(ModelError, match="layer 9 does not exist"):
        StatisticsStore(parts, OURS).cholesky(9)


def test_only_the_layers_without_statistics_are_named(seed: int, tmp_path: Path) -> None:
    keep(tmp_path, rows(seed, 200, D), layer=2)
    with pytest.raises(ModelError, match="--layers 1,3"):
        StatisticsStore(parts, OURS, directory=tmp_path).require([1, 2, 3])
    StatisticsStore(parts, OURS, directory=tmp_path).require([2])


def test_statistics_of_another_model_only_unchecked(seed: int, tmp_path: Path) -> None:
    keep(tmp_path, rows(seed, 200, D), of="0123")
    for load in (StatisticsStore.cholesky, StatisticsStore.covariance):
        with pytest.raises(ModelError, match="fingerprint 0123"):
            load(StatisticsStore(parts, OURS, directory=tmp_path), 1)
        with pytest.warns(RuntimeWarning, match="another model"):
            load(StatisticsStore(parts, OURS, directory=tmp_path, unchecked=True), 1)
    keep(tmp_path, rows(seed, 200, D - 1))
    for unchecked in (False, True):
        with pytest.raises(ModelError, match="width 55, layer 1 down_proj reads 56"):
            StatisticsStore(parts, OURS, directory=tmp_path, unchecked=unchecked).cholesky(1)


def test_too_few_tokens_only_unchecked_and_never_kept(seed: int, tmp_path: Path) -> None:
    keep(tmp_path, rows(seed, D - 1, D))
    with pytest.raises(ModelError, match="55 tokens, fewer than its width 56"):  # by the header, before any work
        StatisticsStore(parts, OURS, directory=tmp_path).require([1])
    StatisticsStore(parts, OURS, directory=tmp_path, unchecked=True).require([1])
    for load in (StatisticsStore.cholesky, StatisticsStore.covariance):
        with pytest.raises(ModelError, match="55 tokens, fewer than its width 56"):
            load(StatisticsStore(parts, OURS, directory=tmp_path), 1)
        with pytest.warns(RuntimeWarning, match="55 tokens"):
            load(StatisticsStore(parts, OURS, directory=tmp_path, unchecked=True), 1)
    with pytest.raises(ModelError, match="fewer than"):  # what unchecked made is not taken from a file now
        StatisticsStore(parts, OURS, directory=tmp_path).cholesky(1)


def test_what_is_not_positive_definite_is_named(seed: int, tmp_path: Path) -> None:
    x = rows(seed, 300, D)
    x[:, 7] = 0
    keep(tmp_path, x)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"1\.down_proj\.safetensors: .*not positive definite: dimension 7"):
            StatisticsStore(parts, OURS, directory=tmp_path).cholesky(1)
        StatisticsStore(parts, OURS, directory=tmp_path).covariance(1)  # AlphaEdit wants exactly such directions
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keep(tmp_path, rows(seed, 300, D), dtype=torch.float32)
        StatisticsStore(parts, OURS, directory=tmp_path).cholesky(1)


def test_in_fp16_it_is_said_that_a_fingerprint_is_another(seed: int, tmp_path: Path) -> None:
    """Of the very model that the statistics were made of."""
    half = topology(tiny_model("llama", dtype=torch.float16))
    mark = fingerprint(half.model)
    assert mark != OURS
    keep(tmp_path, rows(seed, 200, D))
    with pytest.raises(ModelError, match=r"made for \(in fp16 a model has another .* or continue with unchecked_stat"):
        StatisticsStore(half, mark, directory=tmp_path).cholesky(1)
    with pytest.raises(ModelError, match=r"no statistics .*; in fp16 a model has another fingerprint"):
        StatisticsStore(half, mark).cholesky(1)
