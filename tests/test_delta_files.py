"""Files of deltas: damage that is seen, and saving that fails."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import factors, files_of_at_most
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastedit import ModelError, WeightDelta, tensorfile
from fastedit.tensorfile import checksum
from fastedit.weights import LowRank


def test_files_of_the_first_format_can_be_read(tmp_path: Path) -> None:
    """Also names that read like those of factors."""
    tensors = {"a.left": torch.ones(3), "a.right": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "edit", {"format": "fastedit-delta-1", "fastedit": '{"method": "locft-bf"}'})
    loaded = WeightDelta.load(tmp_path / "edit")
    assert loaded.metadata == {"method": "locft-bf"}
    assert loaded.updates.keys() == tensors.keys()
    low = LowRank(torch.ones(4, 1), torch.ones(1, 5))
    WeightDelta(loaded.updates | {"a": low}, {}).save(tmp_path / "both")
    assert WeightDelta.load(tmp_path / "both").updates.keys() == {"a", *tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checksum_sees_every_bit_and_its_place(dtype: torch.dtype, seed: int) -> None:
    """In a weight of several chunks: single bits, two values or rows that change places, -0 for 0."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(520, 1024, generator=rng).to(dtype)
    weight[5, 7], n = 0.0, weight.numel()
    seen = {checksum(weight)}
    assert checksum(weight.T.contiguous().T) in seen  # the values count, not how they lie in memory

    def changed(change: Callable[[Tensor], Any]) -> None:
        other = weight.clone()
        change(other)
        assert not torch.equal(other.view(torch.uint8), weight.view(torch.uint8))
        seen.add(checksum(other))

    def swap(flat: Tensor, i: int, j: int) -> None:
        flat[[i, j]] = flat[[j, i]]

    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    for bit in range(8 * dtype.itemsize):
        place = int(torch.randint(n, (), generator=rng))
        mask = torch.tensor(1 << bit).to(integer)
        changed(lambda w, i=place, m=mask: w.view(integer).view(-1)[i].bitwise_xor_(m))
    distances = [1, 2, 2**18, 2**19, n - 1]
    for distance in distances:
        first = int(torch.randint(n - distance, (), generator=rng))
        while weight.view(-1)[first] == weight.view(-1)[first + distance]:
            first = (first + 1) % (n - distance)
        changed(lambda w, i=first, j=first + distance: swap(w.view(-1), i, j))
    changed(lambda w: swap(w, 3, 400))
    changed(lambda w: w.copy_(w.flip(0)))
    changed(lambda w: w[5, 7].neg_())
    changed(lambda w: w[9].neg_())
    assert len(seen) == 1 + 8 * dtype.itemsize + len(distances) + 4
    assert len({checksum(weight[0, :n]) for n in range(9)}) == 9  # of any size


def damaged(path: Path, how: str) -> None:
    """A file that is no delta, or no longer one."""
    content = path.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # they are mapped
    header_size = int.from_bytes(content[:8], "little")
    if how == "missing":
        path.unlink()
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how.startswith("cut"):
        cuts = {"to nothing": 0, "in the size": 5, "in the header": 100, "in the data": -1}
        path.write_bytes(content[: cuts[how[4:]]])
    elif how == "longer":
        path.write_bytes(content + b"\0")
    elif how == "noise":
        path.write_bytes(os.urandom(1000))
    elif how == "header":
        path.write_bytes(
            content[:8] + content[8 : 8 + header_size].replace(b"F32", b"F99") + content[8 + header_size :]
        )
    elif how == "pickle":
        torch.save(tensors, path)
    elif how == "other tensors":
        save_file(tensors, path)
    elif how in ("half of the factors", "factors that do not fit"):
        save_file(
            {"a..left": torch.ones(3, 2)} | ({} if how[0] == "h" else {"a..right": torch.ones(3, 2)}),
            path,
            {"format": "fastedit-delta-2", "fastedit": "{}"},
        )
    else:
        metadata = {
            "other format": {"format": "pt", "fastedit": "{}"},
            "no metadata": {"format": "fastedit-delta-1"},
            "broken metadata": {"format": "fastedit-delta-1", "fastedit": '{"method": "loc'},
            "a list as metadata": {"format": "fastedit-delta-1", "fastedit": "[1, 2]"},
            "a number as metadata": {"format": "fastedit-delta-1", "fastedit": "3"},
        }[how]
        save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "a folder",
        "cut to nothing",
        "cut in the size",
        "cut in the header",
        "cut in the data",
        "longer",
        "noise",
        "header",
        "pickle",
        "other tensors",
        "other format",
        "no metadata",
        "broken metadata",
        "a list as metadata",
        "a number as metadata",
        "half of the factors",
        "factors that do not fit",
    ],
)
def test_damaged_files_are_errors_that_name_the_file(how: str, tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    WeightDelta({"a": torch.ones(30, 5)}, {"method": "locft-bf", "fingerprint": "0"}).save(path)
    assert WeightDelta.load(path).metadata["method"] == "locft-bf"
    damaged(path, how)
    with pytest.raises(ModelError, match=r"edit\.safetensors"):
        WeightDelta.load(path)


@pytest.mark.parametrize("kind", ["dense", "factors"])
def test_one_bit_that_flips_in_a_file_is_seen(kind: str, seed: int, tmp_path: Path) -> None:
    """Wherever in the tensors; files of before there were checksums still load."""
    path, rng = tmp_path / "edit.safetensors", torch.Generator().manual_seed(seed)
    update = torch.randn(30, 5, generator=rng) if kind == "dense" else factors(torch.Size((30, 5)), seed)
    WeightDelta({"a": update, "b": torch.randn(7, generator=rng)}, {}).save(path)
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for bit in torch.randint(8 * begin, 8 * len(whole), (20,), generator=rng).tolist():
        flipped = whole[bit // 8] ^ (1 << bit % 8)
        path.write_bytes(whole[: bit // 8] + bytes([flipped]) + whole[bit // 8 + 1 :])
        with pytest.raises(ModelError, match=r"edit\.safetensors: the delta is damaged .*changed since it was written"):
            WeightDelta.load(path)
    path.write_bytes(whole)
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    del header["checksums"]
    save_file(tensors, path, header)
    assert WeightDelta.load(path).updates.keys() == {"a", "b"}


def test_a_loaded_delta_needs_its_file_no_more(tmp_path: Path) -> None:
    """It is not mapped into memory: what happens to the file would happen to the edit."""
    path = tmp_path / "edit.safetensors"
    WeightDelta({"a": torch.ones(300, 50)}, {}).save(path)
    loaded = WeightDelta.load(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded.updates["a"], torch.ones(300, 50))


def write_half(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    save_file(tensors, path, metadata)
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("how", ["half written", "file too large"])
def test_a_full_disk_leaves_the_old_file_whole(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "edit.safetensors"
    WeightDelta({"a": torch.ones(30, 5)}, {}).save(path)
    old = path.read_bytes()
    delta = WeightDelta({"b": torch.ones(300, 50)}, {})
    full = monkeypatch.context() if how == "half written" else files_of_at_most(1000)
    with full as patch:
        if patch:
            patch.setattr(tensorfile, "save_file", write_half)
        with pytest.raises(ModelError, match=r"edit\.safetensors.*could not be saved"):
            delta.save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    delta.save(path)
    assert list(WeightDelta.load(path).updates) == ["b"]


def test_ctrl_c_while_saving_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "edit.safetensors"
    WeightDelta({"a": torch.ones(30, 5)}, {}).save(path)

    def interrupted(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorfile, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        WeightDelta({"b": torch.ones(3)}, {}).save(path)
    assert list(WeightDelta.load(path).updates) == ["a"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "edit.safetensors", tmp_path / "folder"):
        with pytest.raises(ModelError, match="could not be saved"):
            WeightDelta({"a": torch.ones(3)}, {}).save(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "text"


def test_metadata_is_json_as_it_was_given(tmp_path: Path) -> None:
    metadata = {"ü": [1, 2.5, None, True], "config": {"lr": 5e-4, "note": 'a "quoted" line\n'}}
    WeightDelta({"a": torch.ones(3)}, json.loads(json.dumps(metadata))).save(tmp_path / "x")
    assert WeightDelta.load(tmp_path / "x").metadata == metadata
