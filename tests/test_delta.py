"""The edit as an object: saved, loaded, applied and reverted without losing a bit, or refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MakeEdits, assert_holds, files_of_at_most, state, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fastedit import Editor, EditResult, ModelError, WeightDelta, tensorfile
from fastedit import delta as delta_module
from fastedit.models import fingerprint
from fastedit.tensorfile import checksum
from fastedit.weights import LowRank

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture
def edit(tokenizer: Any, make_edits: MakeEdits) -> Callable[..., EditResult]:
    """Edits a model: two epochs on the MLP of block 2, which is three matrices."""

    def make(model: nn.Module, salt: int = 0, **config: Any) -> EditResult:
        settings = {"layer": 2, "module": "mlp", "lr": 1e-2, "epochs": 2, "batch_size": 4} | config
        return Editor(model, tokenizer, **settings).edit(make_edits(8, salt))

    return make


@DTYPES
def test_saved_loaded_applied_and_reverted_without_losing_a_bit(
    dtype: torch.dtype, edit: Callable[..., EditResult], tmp_path: Path
) -> None:
    model = tiny_model("llama", dtype=dtype)
    before = state(model)
    result = edit(model)
    after = state(model)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    result.delta.save(tmp_path / "edit.safetensors")
    assert list(tmp_path.iterdir()) == [tmp_path / "edit.safetensors"]

    loaded = WeightDelta.load(tmp_path / "edit.safetensors")
    assert loaded.metadata == result.delta.metadata
    assert loaded.updates.keys() == result.delta.updates.keys()
    for name, update in loaded.updates.items():
        assert update.dtype == torch.float32
        assert torch.equal(update, result.delta.updates[name])
    assert not loaded.applied

    other = tiny_model("llama", dtype=dtype)
    for _ in range(2):
        loaded.apply(other)
        assert loaded.applied
        assert_holds(other, after)
        loaded.revert()
        assert not loaded.applied
        assert_holds(other, before)
    result.revert()
    assert_holds(model, before)
    result.delta.apply(model)
    assert_holds(model, after)


def test_file_is_plain_safetensors_that_says_what_it_is(edit: Callable[..., EditResult], tmp_path: Path) -> None:
    """In a folder that does not exist yet, readable by others as the umask allows."""
    path = tmp_path / "new" / "folder" / "edit.safetensors"
    model = tiny_model("llama")
    made_for = fingerprint(model)
    delta = edit(model).delta
    delta.save(path)
    assert load_file(path).keys() == delta.updates.keys()
    assert delta.metadata["method"] == "locft-bf"
    assert delta.metadata["config"]["lr"] == 1e-2
    assert delta.metadata["edits"] == 8
    assert delta.metadata["fingerprint"] == made_for
    assert delta.metadata["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_applies_to_the_same_checkpoint_in_another_dtype(edit: Callable[..., EditResult]) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    wide = tiny_model("llama", dtype=torch.bfloat16).float()
    before = state(wide)
    delta = edit(model).delta
    delta.revert()
    delta.apply(wide)
    for name, update in delta.updates.items():
        assert torch.equal(wide.get_parameter(name), before[name] + update)
    delta.revert()
    assert_holds(wide, before)


@DTYPES
def test_one_checkpoint_has_one_fingerprint(dtype: torch.dtype, tmp_path: Path) -> None:
    """Whatever dtype it is loaded in; any other has another, also one that differs in a quarter of a weight."""
    model = tiny_model("llama", dtype=dtype)
    wanted = fingerprint(model)
    model.save_pretrained(tmp_path)
    for loaded in (torch.bfloat16, torch.float32):
        assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=loaded)) == wanted
    assert fingerprint(tiny_model("llama", dtype=dtype, seed=1)) != wanted
    for name in ("model.norm.weight", "model.layers.3.mlp.down_proj.weight", "lm_head.weight"):
        for part in range(4):
            changed = tiny_model("llama", dtype=dtype)
            changed.get_parameter(name).data.chunk(4)[part].mul_(1.5)
            assert fingerprint(changed) != wanted, (name, part)


def test_refuses_another_model_unless_forced(edit: Callable[..., EditResult]) -> None:
    delta = edit(tiny_model("llama")).delta
    delta.revert()
    other = tiny_model("llama", seed=1)
    before = state(other)
    with pytest.raises(ModelError, match="fingerprint"):
        delta.apply(other)
    with pytest.raises(ModelError, match="NoneType is no Hugging Face causal language model"):
        delta.apply(None)  # type: ignore[arg-type]
    assert_holds(other, before)
    assert not delta.applied
    delta.apply(other, force=True)
    name, update = next(iter(delta.updates.items()))
    assert torch.equal(other.get_parameter(name), before[name] + update)
    delta.revert()
    assert_holds(other, before)


def test_refuses_a_model_that_is_edited_already(edit: Callable[..., EditResult], tmp_path: Path) -> None:
    model = tiny_model("llama")
    result = edit(model)
    after = state(model)
    result.delta.save(tmp_path / "edit")
    with pytest.raises(ModelError, match="already applied"):
        result.delta.apply(model)
    with pytest.raises(ModelError, match="fingerprint"):
        WeightDelta.load(tmp_path / "edit").apply(model)
    assert_holds(model, after)


@pytest.mark.parametrize("force", [False, True])
def test_refuses_other_shapes_and_names_and_changes_nothing(force: bool) -> None:
    """Also when it is only the last of several weights that does not fit."""
    model = tiny_model("llama")
    before, good = state(model), "model.layers.0.mlp.down_proj.weight"
    for bad, shape, said in (
        ("model.layers.1.mlp.down_proj.weight", (32, 55), r"layers\.1.*\(32, 56\).*\(32, 55\)"),
        ("model.layers.4.mlp.down_proj.weight", (32, 56), r"no parameter model\.layers\.4"),
    ):
        updates = {good: torch.ones(32, 56), bad: torch.ones(shape)}
        delta = WeightDelta(updates, {"fingerprint": fingerprint(model)})
        with pytest.raises(ModelError, match=said):
            delta.apply(model, force=force)
        assert_holds(model, before)
        assert not delta.applied


def test_reverting_twice_is_an_error(edit: Callable[..., EditResult]) -> None:
    result = edit(tiny_model("llama"))
    result.revert()
    with pytest.raises(ModelError, match="nothing to revert"):
        result.revert()


@DTYPES
def test_stacked_edits_are_reverted_last_first(dtype: torch.dtype, edit: Callable[..., EditResult]) -> None:
    model = tiny_model("llama", dtype=dtype)
    states = [state(model)]
    first = edit(model)
    states.append(state(model))
    second = edit(model, salt=1)
    states.append(state(model))
    with pytest.raises(ModelError, match="revert the later edits first"):
        first.revert()
    assert_holds(model, states[2])
    assert first.delta.applied
    second.revert()
    assert_holds(model, states[1])
    first.revert()
    assert_holds(model, states[0])


def test_refuses_to_revert_weights_that_were_changed_by_hand(edit: Callable[..., EditResult]) -> None:
    """Also if it is the last of the weights of the edit: none is put back."""
    model = tiny_model("llama")
    result = edit(model)
    name = list(result.delta.updates)[-1]
    model.get_parameter(name).data[3, 4] += 1
    held = state(model)
    with pytest.raises(ModelError, match=name.replace(".", r"\.") + r" was changed .*or by something else \(undo that"):
        result.revert()
    assert_holds(model, held)


# --- updates in factors ---

LINEAR, CONV = "model.layers.1.mlp.down_proj.weight", "transformer.h.1.mlp.c_proj.weight"  # [out, in] and [in, out]


def factors(shape: torch.Size, seed: int, k: int = 3) -> LowRank:
    rng = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(shape[0], k, generator=rng), torch.randn(k, shape[1], generator=rng) / 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "path"), [("llama", LINEAR), ("gpt2", CONV)])
def test_factors_are_saved_loaded_applied_and_reverted_without_losing_a_bit(
    family: str, path: str, dtype: torch.dtype, seed: int, tmp_path: Path
) -> None:
    """The sum is rounded once, from fp32; a dense update of another weight lies beside the factors."""
    model = tiny_model(family, dtype=dtype, seed=seed)
    before, bias = state(model), path.replace("down_proj.weight", "up_proj.weight").replace("weight", "bias")
    bias = bias if bias in before else path.replace("down_proj", "up_proj")
    dense = torch.randn(before[bias].shape, generator=torch.Generator().manual_seed(seed))
    delta = WeightDelta({path: factors(before[path].shape, seed), bias: dense}, {"fingerprint": fingerprint(model)})
    delta.save(tmp_path / "edit")
    loaded = WeightDelta.load(tmp_path / "edit")
    assert loaded.metadata == delta.metadata
    assert loaded.updates.keys() == delta.updates.keys()
    low, kept = delta.updates[path], loaded.updates[path]
    assert isinstance(low, LowRank)
    assert isinstance(kept, LowRank)
    assert torch.equal(kept.left, low.left)
    assert torch.equal(kept.right, low.right)

    loaded.apply(model)
    exact = before[path].double() + low.left.double() @ low.right.double()
    terms = before[path].abs().double() + low.left.abs().double() @ low.right.abs().double()
    info = torch.finfo(dtype)  # below the smallest normal number, fp16 is as coarse as there
    allowed = exact.abs().clamp(min=info.smallest_normal) * info.eps / 2 + terms * 4 * torch.finfo(torch.float32).eps
    assert ((model.get_parameter(path) - exact).abs() <= allowed).all()
    assert torch.equal(model.get_parameter(bias), (before[bias].float() + dense).to(dtype))
    after = state(model)
    with pytest.raises(ModelError, match="already applied"):
        loaded.apply(model)
    loaded.revert()
    assert_holds(model, before)
    delta.apply(model)
    assert_holds(model, after)


def test_ten_edits_of_a_large_layer_take_the_room_of_their_factors(tmp_path: Path) -> None:
    whole = torch.randn(14336, 20)
    low = LowRank(torch.randn(4096, 10), whole[:, ::2].T)  # a view into something larger
    WeightDelta({"w": low}, {}).save(tmp_path / "edit")
    assert 0 <= (tmp_path / "edit").stat().st_size - 10 * (4096 + 14336) * 4 < 1000
    kept = WeightDelta.load(tmp_path / "edit").updates["w"]
    assert kept.shape == (4096, 14336)
    assert isinstance(kept, LowRank)
    assert torch.equal(kept.right, whole[:, ::2].T)


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


def test_reverts_whatever_arithmetic_wrote_the_weights(seed: int) -> None:
    """Other threads or another device may round a product another way than the one that wrote it."""
    model = tiny_model("llama", seed=seed)
    before, low = state(model), factors(torch.Size((32, 56)), seed)
    p = model.get_parameter(LINEAR)
    p.data.copy_((p.double() + (low.left.double() @ low.right.double())) * (1 + 2e-7))
    delta = WeightDelta({LINEAR: low}, {}, applied_to=model, originals={LINEAR: before[LINEAR]})
    p.data = p.data.T.contiguous().T  # as a move does: other memory, other strides, the same values
    held = p.data[3, 4].clone()
    p.data[3, 4] = held.nextafter(torch.tensor(9.0))
    with pytest.raises(ModelError, match=LINEAR.replace(".", r"\.")):
        delta.revert()
    p.data[3, 4] = held
    delta.revert()
    assert_holds(model, before)


def test_an_interrupted_application_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before, add = state(model), delta_module.add_

    def interrupted(parameter: Tensor, update: Any) -> None:
        add(parameter, update)
        if parameter is model.model.norm.weight:
            raise KeyboardInterrupt

    monkeypatch.setattr(delta_module, "add_", interrupted)
    delta = WeightDelta({LINEAR: torch.ones(32, 56), "model.norm.weight": torch.ones(32)}, {})
    with pytest.raises(KeyboardInterrupt):
        delta.apply(model, force=True)
    assert_holds(model, before)
    assert not delta.applied


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
