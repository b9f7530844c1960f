"""Where statistics are looked for, what is refused with what advice, and the command that makes them."""

from __future__ import annotations

import itertools
import json
import os
import random
import runpy
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import made, rows, tiny_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from fastedit import ModelError, StreamingCovariance, cli
from fastedit.demo import World, checkpoint_path
from fastedit.demo.statistics import documents
from fastedit.errors import RequestError
from fastedit.models import Topology, fingerprint, topology
from fastedit.statistics.documents import read_documents
from fastedit.statistics.store import StatisticsStore, statistics_path, user_directory
from fastedit.tensorfile import checksum

D = 56
parts = topology(tiny_model("llama"))
FP32 = 1e-7
OURS = fingerprint(parts.model)
FACTOR = "1.down_proj.factor.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty user's cache, and no checkpoint on disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "fastedit" / OURS
    parts.model.config._name_or_path = ""  # type: ignore[union-attr]


def keep(folder: Path, x: Tensor, layer: int = 1, of: str = OURS, **how: Any) -> StreamingCovariance:
    found = made(x, fingerprint=of, layer=layer, module="down_proj")
    found.save(statistics_path(parts, folder, layer), **how)
    return found


def loads(folder: Path | None = None, rounding: float = 1e-12) -> Tensor:
    L = StatisticsStore(parts, OURS, directory=folder).cholesky(1)
    C = StatisticsStore(parts, OURS, directory=folder).covariance(1)
    assert torch.equal(L, L.tril())
    assert float((L @ L.T - C).norm() / C.norm()) < rounding
    return C


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


def test_published_files_of_another_width_are_refused(seed: int, tmp_path: Path) -> None:
    made(rows(seed, 300, D + 1)).save_npz(tmp_path / "1_float32_mom2_100000.npz")
    with pytest.raises(ModelError, match="of width 57, the projection reads 56"):
        loads(tmp_path)


# The command


def call(*args: Any) -> Result:
    with torch.random.fork_rng():
        return CliRunner().invoke(cli.app, ["covariance", *map(str, args)])


def fails(*args: Any) -> str:
    result = call(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    return result.stderr.splitlines()[-1]


@pytest.fixture(scope="session")
def world() -> Topology:
    from transformers import AutoModelForCausalLM

    return topology(AutoModelForCausalLM.from_pretrained(checkpoint_path(), dtype=torch.float32))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "world.txt").write_text("\n\n".join(World().prose(60)))
    return tmp_path / "world.txt"


SMALL = ("--dtype", "float32", "--batch-tokens", 512)


def test_the_command_makes_what_editing_looks_for_and_goes_on(
    text: Path, world: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (checkpoint_path(), "--text", text, "--layers", "1-2,5", *SMALL)
    first = call(*arguments, "--tokens", 1000)
    assert first.exit_code == 0, first.stderr
    mark = fingerprint(world.model)
    where = user_directory(mark)
    assert "down_proj of layers 1,2,5: " in first.stdout
    assert first.stdout.rstrip().endswith(f"written to {where}")
    assert sorted(os.listdir(where)) == [f"{layer}.down_proj.safetensors" for layer in (1, 2, 5)]
    StatisticsStore(world, mark, directory=where).cholesky(5)
    before = read(where)
    assert "there already" in call(*arguments, "--tokens", 1000).stdout
    assert read(where) == before
    whole = call(*arguments)
    assert whole.exit_code == 0, whole.stderr
    found = StreamingCovariance.load(where / "5.down_proj.safetensors")
    assert found.count > 1500
    elsewhere = call(*arguments, "--output", tmp_path / "alone")
    assert elsewhere.exit_code == 0
    alone = StreamingCovariance.load(tmp_path / "alone" / "5.down_proj.safetensors")
    assert torch.equal(found.finalize(), alone.finalize())


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if "factor" not in path.name}


def test_the_command_tells_of_convergence_and_of_too_little_text(text: Path, tmp_path: Path) -> None:
    arguments = (checkpoint_path(), "--text", text, "--layers", 1, *SMALL, "--output", tmp_path / "out")
    few = call(*arguments, "--tokens", 100)
    assert "fewer than the width 704" in few.stderr
    ended = call(*arguments, "--until-converged")
    assert "changed C by" in ended.stderr
    assert "not converged" in ended.stderr


def test_bad_input_is_told_before_the_model_is_loaded(text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "file").write_text("x")
    good = ("no model", "--text", text, "--layers", "1")
    assert "--layers 3-1" in fails("no model", "--text", text, "--layers", "3-1")
    assert "is empty" in fails("no model", "--text", tmp_path / "empty.txt", "--layers", "1")
    assert "No such file" in fails("no model", "--text", tmp_path / "none.txt", "--layers", "1")
    assert "cannot be written" in fails(*good, "--output", tmp_path / "file")
    assert "--tokens" in fails(*good, "--tokens", 0)
    assert "layer 99 does not exist" in fails(checkpoint_path(), "--text", text, "--layers", "99")


def test_ctrl_c_says_how_to_go_on(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fastedit.statistics.collect._Run._observe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    result = call(checkpoint_path(), "--text", text, "--layers", 1, *SMALL)
    assert result.exit_code == 1
    assert "continues where" in result.stderr


def test_documents_come_from_plain_text_and_json(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n one\ntwo\n\n \n\nthree", "utf-8")
    assert list(read_documents(path)) == ["one\ntwo", "three"]
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "ä\\nb", "body": "x"}\n\n{"text": "", "body": "y"}\n', "utf-8")
    assert list(read_documents(path)) == ["ä\nb", ""]
    assert list(read_documents(path, "body")) == ["x", "y"]
    shutil.copy(path, tmp_path / "lines.json")
    assert list(read_documents(tmp_path / "lines.json")) == ["ä\nb", ""]
    array = tmp_path / "array.json"
    array.write_text('[\n "one\\n\\ntwo",\n {"text": "three", "body": 3}]')
    assert list(read_documents(array)) == ["one\n\ntwo", "three"]
    with pytest.raises(RequestError, match=r"array.json: record 1 .* no text in the field 'body'; its fields are text"):
        list(read_documents(array, "body"))
    for line, message in (("[]", "no text in the field 'text'"), ("{", "not JSON"), ('{"text": 3}', "no text")):
        path.write_text(json.dumps({"text": "a"}) + "\n" + line)
        with pytest.raises(RequestError, match=f"line 2 .*{message}"):
            list(read_documents(path))
    path.write_text('{"text": "a"}\n', encoding="utf-8-sig")
    assert list(read_documents(path)) == ["a"]
    path.write_bytes(b'{"text": "a"}\n\xff')
    with pytest.raises(RequestError, match="UTF-8"):
        list(read_documents(path))


def test_the_fact_world_ships_with_its_own(world: Topology) -> None:
    mark = fingerprint(world.model)
    shipped = sorted(path for path in (checkpoint_path() / "statistics").glob("*_proj.safetensors"))
    assert shipped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in shipped:
            layer = int(path.name.partition(".")[0])
            found = StreamingCovariance.load(path)
            assert (found.metadata["fingerprint"], found.dim) == (mark, world.input_width(layer, "down_proj"))
            assert found.count >= 10 * found.dim
            StatisticsStore(world, mark).covariance(layer)
            before = sorted(checkpoint_path().rglob("*"))
            StatisticsStore(world, mark).cholesky(layer)
            assert sorted(checkpoint_path().rglob("*")) == before


def test_the_fact_world_s_text_is_tokenized_as_in_training() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    both = zip(World().documents(3, curriculum=False), documents(3), strict=True)
    for spans, text in itertools.islice(both, 200):
        pieces = [tokenizer.encode(span.text, add_special_tokens=False) for span in spans]
        assert tokenizer.encode(text) == [tokenizer.bos_token_id, *(t for piece in pieces for t in piece)]


def test_the_fact_world_s_statistics_are_made_by_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--tokens", "800", "--layers", "1", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["fastedit.demo.statistics", *arguments])
    runpy.run_module("fastedit.demo.statistics", run_name="__main__")
    found = StreamingCovariance.load(tmp_path / "1.down_proj.safetensors")
    assert found.count >= 800
    assert found.stored == torch.float32
