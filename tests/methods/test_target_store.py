"""Targets on disk: found again for the same question, and for no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_edits, same, tiny_model, values
from published import Case, Settings
from safetensors import safe_open
from safetensors.torch import save_file

from fastedit import EditRequest, ModelError
from fastedit.methods.batch import Batch
from fastedit.methods.locate_then_edit import method as method_module
from fastedit.methods.locate_then_edit.config import TargetConfig
from fastedit.methods.locate_then_edit.target_store import TargetStore
from fastedit.methods.locate_then_edit.targets import Targets
from fastedit.models import Model, topology

ABOUT = Settings("least-squares", (0, 1), contexts=("w20 w21 . {}",))
SOUGHT: dict[str, Any] = {"steps": 3, "batch_size": 2}


@pytest.fixture
def case(tokenizer: Any, tmp_path: Path, seed: int) -> Case:
    return Case(tokenizer, tmp_path / "statistics", seed, dtype=torch.float32)


def some_targets(seed: int, n: int = 3) -> Targets:
    rng = torch.Generator().manual_seed(seed)
    z, h0 = torch.randn(2, n, 32, generator=rng)
    loss, probability = torch.rand(2, n, generator=rng)
    z[1] = torch.nan
    return Targets(z, h0, loss, probability, torch.arange(n), (1,), 0.25, ("dropped: edit é",))


class Count:
    """How often targets are sought."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, interrupt: int = 0) -> None:
        self.n, find = 0, method_module.find_targets

        def counted(*args: Any, **named: Any) -> Targets:
            self.n += 1
            if self.n == interrupt:
                raise KeyboardInterrupt
            found: Targets = find(*args, **named)
            return found

        monkeypatch.setattr(method_module, "find_targets", counted)


@pytest.mark.parametrize("lr", [None, 0.3])
def test_a_second_run_seeks_nothing_and_gives_the_same_bits(
    lr: float | None, case: Case, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits, config = random_edits(5, seed), SOUGHT | {"lr": lr, "targets": str(tmp_path / "new" / "targets")}
    plain = case.editor("memit", ABOUT, **config | {"targets": None}).edit(edits)
    wanted = values(case.model)
    plain.revert()
    with monkeypatch.context() as patch:
        interrupted = Count(patch, interrupt=3)
        with pytest.raises(KeyboardInterrupt):
            case.editor("memit", ABOUT, **config).edit(edits)
        assert interrupted.n == 3
        assert same(case.model, case.before)
    count = Count(monkeypatch)
    for sought in (1, 1):  # the batch that was not done; nothing
        result = case.editor("memit", ABOUT, **config).edit(edits)
        assert count.n == sought
        assert same(case.model, wanted)
        assert (result.losses, result.notes) == (plain.losses, plain.notes)
        assert result.delta.metadata["config"] | {"targets": None} == plain.delta.metadata["config"]
        result.revert()
    config["lr"] = result.delta.metadata["config"]["lr"]
    case.editor("emmet", replace(ABOUT, layers=(1,)), **config).edit(edits[:2])
    assert count.n == 1  # another method asks the same of this model


def test_whatever_matters_makes_another_key(tokenizer: Any, tmp_path: Path, seed: int) -> None:
    model, edits, config = tiny_model("llama"), random_edits(3, seed), TargetConfig(lr=0.3)
    written = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]

    def key(**other: Any) -> str:
        store = TargetStore(tmp_path, topology(model), written)
        given = {"edits": edits, "z_layer": 1, "config": config, "contexts": ["w9 {}"]} | other
        batch = Batch(Model.of(model, tokenizer), given.pop("edits"), given.pop("contexts"))
        return store.key(batch, **given)

    wanted, keys = key(), []
    assert key() == wanted
    assert key(edits=[replace(edit, paraphrases=("w9 w10",)) for edit in edits]) == wanted  # nothing reads them
    changes = {"prompt": "w9 " + edits[1].prompt}, {"target": edits[1].target + " w9"}, {"id": "x"}
    keys += [key(edits=[edits[0], replace(edits[1], **change), edits[2]]) for change in changes]
    keys.append(key(edits=[EditRequest("w9 w10 w11", "w12", "w9")]))
    keys.append(key(edits=[EditRequest("w9 w10 w11", "w12", "w10")]))
    keys.append(key(edits=[EditRequest("w9 w10", "w11 w12", "w9")]))  # the same text, cut elsewhere
    keys += [key(edits=edits[::-1]), key(edits=edits[:2]), key(contexts=[]), key(contexts=["w10 {}"]), key(z_layer=2)]
    for change in ({"lr": 0.31}, {"lr": None}, {"steps": 9}, {"site": "mlp"}, {"clamp": 1.0}, {"weight_decay": 0.1}):
        keys.append(key(config=replace(config, **change)))
    keys += [key(config=replace(config, **{name: 0.2})) for name in ("kl_factor", "stop_loss")]
    model.config.rms_norm_eps *= 2
    keys.append(key())
    model.config.rms_norm_eps /= 2
    model.config._name_or_path = "elsewhere"
    assert key() == wanted
    with torch.no_grad():
        for parameter in model.parameters():  # one bit of any weight, wherever it is
            place = int(torch.randint(parameter.numel(), (), generator=torch.Generator().manual_seed(seed)))
            flat = parameter.view(-1).view(torch.int32)
            flat[place] ^= 1
            keys.append(key())
            flat[place] ^= 1
    assert key() == wanted
    model.to(torch.bfloat16)
    keys.append(key())
    assert len({wanted, *keys}) == len(keys) + 1


def test_another_tokenizer_makes_another_key(tokenizer: Any, tmp_path: Path, seed: int) -> None:
    class Longer:
        """Puts a token in front."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, texts: Any, **options: Any) -> Any:
            found = tokenizer(texts, **options)
            if not isinstance(texts, str):
                found["input_ids"] = [[0, *ids] for ids in found["input_ids"]]
                if "offset_mapping" in found:
                    found["offset_mapping"] = [[(0, 0), *spans] for spans in found["offset_mapping"]]
            return found

    parts = topology(tiny_model("llama"))
    store = TargetStore(tmp_path, parts, [])
    edits = random_edits(3, seed)
    keys = {store.key(Batch(Model(parts, t), edits), 1, TargetConfig()) for t in (tokenizer, Longer())}
    assert len(keys) == 2


def test_a_key_is_that_of_the_weights_as_they_are_now(tokenizer: Any, tmp_path: Path, seed: int) -> None:
    model, edits = tiny_model("gpt2"), random_edits(2, seed)
    store = TargetStore(tmp_path, topology(model), ["transformer.h.1.mlp.c_proj.weight"])
    before = store.key(Batch(Model.of(model, tokenizer), edits), 1, TargetConfig())
    weight = model.transformer.h[1].mlp.c_proj.weight
    with torch.no_grad():
        weight[3, 5] += 1e-3
    assert store.key(Batch(Model.of(model, tokenizer), edits), 1, TargetConfig()) != before
    with torch.no_grad():
        weight[3, 5] -= 1e-3


def test_what_is_loaded_is_what_was_saved(tmp_path: Path, seed: int) -> None:
    store, targets = TargetStore(tmp_path, topology(tiny_model("llama")), []), some_targets(seed)
    path = store.save("key", targets)
    assert [path] == list(tmp_path.iterdir())
    found = store.load("key")
    assert found is not None
    for name, value in vars(targets).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(found, name), value, rtol=0, atol=0, equal_nan=True)
        else:
            assert getattr(found, name) == value
    assert store.load("other") is None


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["fastedit"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        change(header)
        save_file(tensors, path, {"fastedit": json.dumps(header)})

    return rewrite


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-40] ^= 4
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "text": lambda path: path.write_text("no targets"),
    "a bit": flip,
    "another format": rewritten(lambda header: header.update(format="fastedit-targets-0")),
    "no rate": rewritten(lambda header: header.pop("lr")),
    "no sums": rewritten(lambda header: header.update(sums=3)),
    "no header": lambda path: save_file({"z": torch.zeros(1)}, path, {"fastedit": "[]"}),
    "nothing of ours": lambda path: save_file({"z": torch.zeros(1)}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(damage: str, tmp_path: Path, seed: int) -> None:
    store = TargetStore(tmp_path, topology(tiny_model("llama")), [])
    path = store.save("key", some_targets(seed))
    DAMAGES[damage](path)
    with pytest.raises(ModelError, match=r"key\.safetensors holds no targets \(.*delete it"):
        store.load("key")


def test_a_folder_that_cannot_be_is_told_before_any_work(
    case: Case, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = Count(monkeypatch)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"file cannot be written: it is a file; give another"):
        case.editor("memit", ABOUT, targets=str(tmp_path / "file")).edit(random_edits(2, seed))
    assert count.n == 0
    assert same(case.model, case.before)


def test_a_full_disk_leaves_no_file_and_the_model_as_it_was(
    case: Case, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastedit.tensorfile.save_file", full)
    with pytest.raises(ModelError, match=r"could not be saved: .*No space left.*give another folder"):
        case.editor("memit", ABOUT, targets=str(tmp_path / "targets"), **SOUGHT).edit(random_edits(2, seed))
    assert not list((tmp_path / "targets").iterdir())
    assert same(case.model, case.before)
