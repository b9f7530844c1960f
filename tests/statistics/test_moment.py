"""The accumulator of second moments against fp64, and what its files survive."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import made, rows
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastedit import ModelError, StreamingCovariance
from fastedit.statistics.moment import TAG, WHAT
from fastedit.statistics.npz import load_npz
from fastedit.tensorfile import load_metadata

D = 37


def moment(x: Tensor) -> Tensor:
    return x.double().T @ x.double() / len(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pieces_and_masks_give_the_mean_of_all_kept_rows(dtype: torch.dtype, seed: int) -> None:
    x = rows(seed, 3000).to(dtype)
    mask = torch.rand(3000, generator=torch.Generator().manual_seed(seed)) < 0.6
    found = StreamingCovariance(D)
    for piece, kept in zip(x.split([1, 0, 1500, 1499]), mask.split([1, 0, 1500, 1499]), strict=True):
        found.update(piece, kept)
    found.update(x[:10], torch.zeros(10, dtype=torch.bool))
    assert found.count == int(mask.sum())
    C = found.finalize()
    assert torch.equal(C, C.T)
    torch.testing.assert_close(C, moment(x[mask]), rtol=0, atol=1e-6 * float(moment(x[mask]).abs().max()))
    found.update(x[~mask])  # finalize has not ended it
    torch.testing.assert_close(found.finalize(), moment(x), rtol=0, atol=1e-6 * float(moment(x).abs().max()))


def test_a_mean_far_from_zero_keeps_the_digits_of_what_varies(seed: int) -> None:
    """Sums in fp32 lose them: that is what fp64 totals are for."""
    x = rows(seed, 65536, 8, shift=300.0)
    exact, scale = moment(x), float(moment(x).max())
    plain = torch.zeros(8, 8)
    found = StreamingCovariance(8)
    for piece in x.split(256):
        found.update(piece)
        plain += piece.T @ piece
    ours, theirs = (float((C - exact).abs().max()) / scale for C in (found.finalize(), plain.double() / len(x)))
    assert ours < 3e-7
    assert ours < theirs / 3


def test_strides_do_not_matter(seed: int) -> None:
    x = rows(seed, 400)
    wide = torch.cat([x, x], 1)
    assert torch.equal(made(wide[:, :D]).finalize(), made(x).finalize())
    assert torch.equal(made(wide.T.contiguous().T[::2, :D]).finalize(), made(x[::2].contiguous()).finalize())


def test_merged_parts_are_the_whole(seed: int) -> None:
    x = rows(seed, 2048)
    one, other = made(x[:1024], layer=3), made(x[1024:])
    one.merge(other)
    assert one.count == 2048
    assert torch.equal(one.finalize(), made(x).finalize())
    for wrong in (StreamingCovariance(D + 1), made(x, layer=4)):
        with pytest.raises(ModelError, match="cannot join"):
            one.merge(wrong)
    assert one.count == 2048


def test_what_does_not_fit_is_named_and_changes_nothing(seed: int) -> None:
    x = rows(seed, 50)
    found = made(x)
    before = found.finalize()
    spoiled = x.clone()
    spoiled[31, 5], spoiled[40, 0] = torch.nan, torch.inf
    short, integers = torch.ones(49, dtype=torch.bool), torch.ones(50, dtype=torch.int64)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((spoiled,), "31"),
        ((x[:, :-1],), r"\[36, 36\]|36"),
        ((x.long(),), "int64"),
        ((x[0],), r"\[37\]"),
        ((x, short), "49"),
        ((x, integers), "int64"),
    ]
    for given, message in cases:
        with pytest.raises(ModelError, match=message):
            found.update(*given)
    assert found.count == 50
    assert torch.equal(found.finalize(), before)
    mask = torch.ones(50, dtype=torch.bool)
    mask[[31, 40]] = False
    found.update(spoiled, mask)  # what the mask leaves out may hold anything
    assert found.count == 98
    with pytest.raises(ModelError, match="no rows"):
        StreamingCovariance(D).finalize()


def test_a_saved_run_goes_on_with_the_same_bits(seed: int, tmp_path: Path) -> None:
    x = rows(seed, 3000)
    whole = StreamingCovariance(D)
    for piece in x.split(700):
        whole.update(piece)
    found = StreamingCovariance(D, metadata={"layer": 4, "text": "ä"})
    for piece in x.split(700):
        found.update(piece)
        found.save(tmp_path / "4.safetensors")
        found = StreamingCovariance.load(tmp_path / "4.safetensors")
    assert (found.count, found.metadata) == (3000, {"layer": 4, "text": "ä"})
    assert torch.equal(found.finalize(), whole.finalize())
    about = load_metadata(tmp_path / "4.safetensors", (TAG,), WHAT)
    assert (about["count"], about["dim"]) == (3000, D)


def test_the_file_holds_one_triangle_and_half_of_it_in_fp32(seed: int, tmp_path: Path) -> None:
    found = made(rows(seed, 500, 200))
    sizes = {}
    for dtype in (torch.float64, torch.float32):
        found.save(tmp_path / "C.safetensors", dtype=dtype)
        sizes[dtype] = (tmp_path / "C.safetensors").stat().st_size - 200 * 201 // 2 * dtype.itemsize
        again = StreamingCovariance.load(tmp_path / "C.safetensors")
        assert again.stored == dtype
        bound = 0.0 if dtype == torch.float64 else 1e-7
        assert float((again.finalize() - found.finalize()).norm() / found.finalize().norm()) <= bound
    assert all(0 < size < 1000 for size in sizes.values())


def test_damaged_files_are_refused(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "C.safetensors"
    made(rows(seed, 100)).save(path)
    whole = path.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ModelError, match=message) as error:
            StreamingCovariance.load(path)
        assert str(path) in str(error.value)

    path.write_bytes(whole[:-100])
    refused("not a readable")
    path.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    refused("was changed")
    path.write_bytes(whole)
    with safe_open(tmp_path / "C.safetensors", "pt") as file:
        header, packed = file.metadata(), file.get_tensor("lower").clone()
    about = json.loads(header["fastedit"])
    for change, message in (
        ({"count": 99}, "was changed"),
        ({"dim": D - 1}, "was changed"),
        ({"count": "many"}, "damaged"),
        ({"dim": 0}, "width 0"),
        ({"metadata": 3}, "damaged"),
    ):
        save_file({"lower": packed}, path, header | {"fastedit": json.dumps(about | change)})
        with pytest.raises(ModelError, match=message):
            StreamingCovariance.load(path)
    for broken in ("[]", "{"):
        save_file({"lower": packed}, path, header | {"fastedit": broken})
        refused("damaged")
    save_file({"lower": packed}, path)
    refused("is not a second moment")
    path.unlink()
    refused("not a readable")


def test_a_failed_save_leaves_the_old_file(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "C.safetensors"
    made(rows(seed, 100)).save(path)
    kept = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    for save in (StreamingCovariance.save, StreamingCovariance.save_npz):
        with pytest.raises(ModelError, match=r"C\.safetensors: the statistics could not be saved"):
            save(made(rows(seed, 50)), path)
    assert path.read_bytes() == kept
    assert os.listdir(tmp_path) == [path.name]


def test_published_files_hold_the_sum(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "17_float32_mom2_100000.npz"
    x = rows(seed, 500)
    made(x, documents=12).save_npz(path)
    with np.load(path) as entries:
        assert (int(entries["mom2.count"]), int(entries["sample_size"])) == (500, 12)
        assert entries["mom2.mom2"].dtype == np.float32
        np.testing.assert_allclose(
            entries["mom2.mom2"] / 500, moment(x).numpy(), rtol=0, atol=1e-5 * float(x.max()) ** 2
        )
    found = StreamingCovariance.load(path)
    assert (found.count, found.stored, found.metadata) == (500, torch.float32, {"documents": 12})
    torch.testing.assert_close(found.finalize(), moment(x), rtol=0, atol=1e-6 * float(moment(x).max()))
    made(x).save_npz(path, sample_size=100000)
    with np.load(path) as entries:
        assert int(entries["sample_size"]) == 100000


def test_published_files_that_cannot_be_are_refused(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "17_float32_mom2_100000.npz"
    total = moment(rows(seed, 500)).float().numpy()

    def refused(message: str, **entries: Any) -> None:
        if entries:
            np.savez(path, **{name.replace("__", "."): value for name, value in entries.items()})
        with pytest.raises(ModelError, match=message) as error:
            load_npz(path)
        assert str(path) in str(error.value)

    touched = tmp_path / "touched"

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(touched),)

    refused("pickle", mom2__mom2=np.array([Bomb()], dtype=object), mom2__count=5)
    assert not touched.exists()
    refused("not a published file", mom2__mom2=total)
    refused(r"\[37, 36\]", mom2__mom2=total[:, :-1], mom2__count=5)
    refused("0 tokens", mom2__mom2=total, mom2__count=0)
    refused("not symmetric", mom2__mom2=np.triu(total), mom2__count=5)
    refused("not finite", mom2__mom2=np.full_like(total, np.nan), mom2__count=5)
    refused("floating", mom2__mom2=total.astype(int), mom2__count=5)
    made(rows(seed, 500)).save_npz(path)
    shutil.copy(path, tmp_path / "whole")
    path.write_bytes(path.read_bytes()[:-50])
    refused("not a readable")
    path.unlink()
    refused("not a readable")
