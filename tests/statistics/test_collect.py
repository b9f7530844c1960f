"""Statistics of a model: one pass for all layers equals the plain one, stops where it may, and can be interrupted."""

from __future__ import annotations

import random
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAMILIES, WORDS, make_documents, tiny_model
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from transformers import PreTrainedTokenizerFast

from fastedit.errors import ConfigError, ModelError, RequestError
from fastedit.models import Model, Topology, topology
from fastedit.statistics.collect import Collection, Doubling, collect
from fastedit.statistics.moment import StreamingCovariance

ROW = 24


def naive(model: Any, tokenizer: Any, documents: list[str], layers: list[int]) -> dict[int, Tensor]:
    """One document at a time through the whole model."""
    parts = topology(model)
    seen: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    handles = [
        parts.resolve(layer, "down_proj")[1].register_forward_pre_hook(
            lambda _, args, layer=layer: seen[layer].append(args[0].reshape(-1, args[0].shape[-1]).double())
        )
        for layer in layers
    ]
    with torch.no_grad():
        for text in documents:
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]), use_cache=False)
    for handle in handles:
        handle.remove()
    keys = {layer: torch.cat(each) for layer, each in seen.items()}
    return {layer: k.T @ k / len(k) for layer, k in keys.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_equals_one_document_at_a_time_in_every_family(
    family: str, seed: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model(family)
    documents = make_documents(seed, 25)
    wanted = naive(model, tokenizer, documents, [0, 2])
    model.train()  # dropout must not act
    parts = topology(model)
    ran: list[int] = []
    for i, block in enumerate(parts.blocks):
        block.register_forward_hook(lambda _, __, ___, i=i: ran.append(i))
    found = collect(Model(parts, tokenizer), iter(documents), [2, 0], batch_tokens=96, row_tokens=ROW)
    assert set(ran) == {0, 1}  # the last wanted projection ends the pass inside its block
    assert list(found) == [0, 2]
    for layer, moment in found.items():
        assert moment.count == sum(len(text.split()) for text in documents)
        C = moment.finalize()
        torch.testing.assert_close(C, wanted[layer], rtol=0, atol=2e-6 * float(wanted[layer].abs().max()))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_bf16_models_run_in_bf16(seed: int, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = make_documents(seed, 12)
    wanted = naive(tiny_model("llama"), tokenizer, documents, [3])[3]
    model = tiny_model("llama", dtype=torch.bfloat16)
    moment = collect(Model.of(model, tokenizer), documents, [3], row_tokens=ROW)[3]
    assert moment.metadata["dtype"] == "bfloat16"
    assert float((moment.finalize() - wanted).norm() / wanted.norm()) < 0.03
    assert float((moment.finalize() - naive(model, tokenizer, documents, [3])[3]).norm() / wanted.norm()) < 0.01


def test_long_documents_are_cut_and_every_piece_begins_like_a_document(seed: int, tokenizer: Any) -> None:
    """With BOS where the tokenizer puts one."""
    model = tiny_model("llama")
    words = make_documents(seed, 1, longest=1)[0].split() * 1 + random.Random(seed).choices(WORDS, k=50)
    pieces = [" ".join(["<s>", *words[i : i + ROW - 1]]) for i in range(0, len(words), ROW - 1)]
    wanted = naive(model, tokenizer, pieces, [1])[1]
    moment = collect(Model.of(model, tokenizer), [" ".join(["<s>", *words])], [1], row_tokens=ROW)[1]
    torch.testing.assert_close(moment.finalize(), wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))


class Interrupted(Exception):  # noqa: N818  # the plug, not an error
    pass


def interrupted(documents: list[str], after: int) -> Iterator[str]:
    """Documents until somebody pulls the plug."""
    yield from documents[:after]
    raise Interrupted


def parts_of(family: str = "llama") -> Topology:
    return topology(tiny_model(family))


SMALL: dict[str, Any] = {"batch_tokens": 48, "row_tokens": ROW}


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_an_interrupted_run_goes_on_and_gives_the_same_bits(
    family: str, seed: int, tokenizer: Any, tmp_path: Path
) -> None:
    parts, documents = parts_of(family), make_documents(seed, 200)
    whole = collect(Model(parts, tokenizer), documents, [0, 1, 2], **SMALL)
    passes: list[int] = []
    parts.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    given = {**SMALL, "directory": tmp_path, "save_seconds": 0.0}
    with pytest.raises(Interrupted):
        collect(Model(parts, tokenizer), interrupted(documents, 130), [0, 1, 2], **given)
    before, done = len(passes), StreamingCovariance.load(tmp_path / "1.down_proj.safetensors")
    assert 0 < done.count < whole[1].count
    (tmp_path / "2.down_proj.safetensors").unlink()  # one layer has to start again, the others have not
    earlier = collect(Model(parts, tokenizer), documents, [2], **SMALL, max_tokens=done.count // 2)[2]
    earlier.save(tmp_path / "2.down_proj.safetensors")
    again = collect(Model(parts, tokenizer), documents, [0, 1, 2], **given)
    for layer, moment in whole.items():
        on_disk = StreamingCovariance.load(tmp_path / f"{layer}.down_proj.safetensors")
        for found in (again[layer], on_disk):
            assert found.count == moment.count
            assert torch.equal(found.finalize(), moment.finalize())
    assert before < len(passes)
    passes.clear()
    collect(Model(parts, tokenizer), documents, [0, 1, 2], **given)
    assert not passes  # nothing is left to do


def test_more_tokens_go_on_from_fewer(seed: int, tokenizer: Any, tmp_path: Path) -> None:
    parts, documents = parts_of(), make_documents(seed, 200)
    reported: list[tuple[str, int, int]] = []
    few = collect(
        *(Model(parts, tokenizer), documents, [1]),
        **SMALL,
        directory=tmp_path,
        max_tokens=300,
        progress=lambda stage, done, total, loss=None: reported.append((stage, done, total)),
    )[1]
    assert 300 <= few.count < 300 + 48
    assert reported[-1] == ("covariance", few.count, few.count)
    assert reported[0] == ("covariance", 0, 300)
    more = collect(Model(parts, tokenizer), documents, [1], **SMALL, directory=tmp_path, max_tokens=900)[1]
    alone = collect(Model(parts, tokenizer), documents, [1], **SMALL, max_tokens=900)[1]
    assert 900 <= more.count < 948
    assert torch.equal(more.finalize(), alone.finalize())


def test_statistics_of_something_else_are_not_gone_on_with(seed: int, tokenizer: Any, tmp_path: Path) -> None:
    parts, documents = parts_of(), make_documents(seed, 200)
    collect(Model(parts, tokenizer), documents, [1], **SMALL, directory=tmp_path)
    path = tmp_path / "1.down_proj.safetensors"
    kept = path.read_bytes()
    other = topology(tiny_model("llama", seed=1))
    cases: list[tuple[Topology, list[str], dict[str, Any], str]] = [
        (other, documents, SMALL, "has fingerprint"),
        (parts, documents, SMALL | {"batch_tokens": 72}, "has batch_tokens 48, this run has 72"),
        (parts, make_documents(seed + 1, 60), SMALL, "from another text"),
        (parts, [*documents[:140], *make_documents(seed + 1, 60)], SMALL, "from another text"),
    ]
    for model, text, settings, message in cases:
        with pytest.raises(ModelError, match=message):
            collect(Model(model, tokenizer), text, [1], **settings, directory=tmp_path, max_tokens=9999)
        assert path.read_bytes() == kept
    with pytest.raises(ModelError, match="from another text"):  # though nothing is left to do
        collect(Model(parts, tokenizer), make_documents(seed + 1, 60), [1], **SMALL, directory=tmp_path, max_tokens=99)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_key_that_is_not_finite_is_named_and_nothing_is_written(
    family: str, seed: int, tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model(family)
    parts, documents = topology(model), [text.replace("w50", "w51") for text in make_documents(seed, 40)]
    documents[17] = "w9 w50"
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = torch.inf
    with pytest.raises(ModelError, match=r"layer 0 down_proj: document (\d+, )*17[ ,]") as error:
        collect(Model(parts, tokenizer), documents, [0, 2], **SMALL | {"batch_tokens": 9999}, directory=tmp_path)
    shared = re.search(r"document ([\d, ]+) \(", str(error.value))
    assert shared is not None
    named = [int(number) for number in shared[1].split(",")]
    assert sum(len(documents[i].split()) for i in named) <= ROW  # those of its row, and no others
    assert not any(tmp_path.iterdir())


def test_no_text_and_wrong_numbers_are_refused(tokenizer: Any) -> None:
    parts = parts_of()
    with pytest.raises(RequestError, match="no tokens"):
        collect(Model(parts, tokenizer), ["", " "], [1])
    for wrong in ({"layers": []}, {"max_tokens": 0}, {"batch_tokens": 0}, {"row_tokens": 1}):
        with pytest.raises(ConfigError):
            collect(Model(parts, tokenizer), ["w9"], **{"layers": [1], **wrong})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="layer 9 does not exist"):
        collect(Model(parts, tokenizer), ["w9"], [9])
    with pytest.raises(ModelError, match="not a linear map"):
        collect(Model(parts, tokenizer), ["w9"], [1], module="mlp")


def test_it_stops_when_twice_the_text_changes_nothing_and_not_before(seed: int, tokenizer: Any) -> None:
    parts, rng = parts_of(), random.Random(seed)

    def text(words: list[str], n: int) -> list[str]:
        return [" ".join(rng.choices(words, k=8)) for _ in range(n)]

    same, later = text(WORDS[:40], 8000), text(WORDS[:3], 8000)
    reports: list[Doubling] = []
    given: dict[str, Any] = {"batch_tokens": 96, "row_tokens": ROW, "until_converged": True, "tolerance": (0.1, 0.05)}
    calm = collect(Model(parts, tokenizer), same, [0, 1], **given, on_doubling=reports.append)
    count = calm[1].count
    assert calm[1].metadata["converged"]
    assert 10 * calm[1].dim <= count < 8 * len(same)
    assert [d.tokens for d in reports] == [d["tokens"] for d in calm[0].metadata["doublings"]]
    assert reports[-1].change <= 0.1 < reports[0].change
    turned = collect(Model(parts, tokenizer), same[: count // 16] + later, [0, 1], **given)  # after the last first half
    assert turned[1].count > count
    C, more = (moment.finalize() for moment in (calm[1], collect(Model(parts, tokenizer), same, [1])[1]))
    assert float((C - more).norm() / more.norm()) < 0.2


def test_a_converging_run_that_was_interrupted_stops_at_the_same_place(
    seed: int, tokenizer: Any, tmp_path: Path
) -> None:
    parts, documents = parts_of(), make_documents(seed, 3000, longest=9)
    given: dict[str, Any] = {"batch_tokens": 96, "row_tokens": ROW, "until_converged": True, "tolerance": (0.08, 0.05)}
    whole = collect(Model(parts, tokenizer), documents, [0, 1], **given)
    with pytest.raises(Interrupted):
        collect(Model(parts, tokenizer), interrupted(documents, 300), [0, 1], **given, directory=tmp_path)
    assert 0 < StreamingCovariance.load(tmp_path / "1.down_proj.safetensors").count < whole[1].count
    again = collect(Model(parts, tokenizer), documents, [0, 1], **given, directory=tmp_path)
    assert again[1].count == whole[1].count
    assert torch.equal(again[1].finalize(), whole[1].finalize())
    assert again[1].metadata == whole[1].metadata


@pytest.mark.parametrize("cut_off", [1, 3])
def test_a_converging_run_that_was_cut_off_between_the_files_of_two_layers(
    cut_off: int, seed: int, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, documents = parts_of(), make_documents(seed, 3000, longest=9)
    given: dict[str, Any] = {"batch_tokens": 96, "row_tokens": ROW, "until_converged": True, "tolerance": (0.08, 0.05)}
    whole = collect(Model(parts, tokenizer), documents, [0, 1], **given)
    with monkeypatch.context() as patch:
        patch.setattr(StreamingCovariance, "save", cut_off_after(cut_off))
        with pytest.raises(Interrupted):
            collect(Model(parts, tokenizer), documents, [0, 1], **given, directory=tmp_path)
    again = collect(Model(parts, tokenizer), documents, [0, 1], **given, directory=tmp_path)
    for layer, moment in whole.items():
        assert again[layer].count == moment.count
        assert torch.equal(again[layer].finalize(), moment.finalize())
        assert again[layer].metadata == moment.metadata


def cut_off_after(n: int, directory: Path | None = None) -> Callable[..., None]:
    """StreamingCovariance.save, cut off at the n-th file, of those in the directory."""
    save, done = StreamingCovariance.save, 0

    def function(moment: StreamingCovariance, path: Path) -> None:
        nonlocal done
        if directory in (None, path.parent):
            if done == n:
                raise Interrupted
            done += 1
        save(moment, path)

    return function


def _process(
    rank: int, port: int, documents: list[str], directory: Path, tokenizer: Any, cut_off: int | None = None
) -> None:
    torch.set_num_threads(1)
    if cut_off is not None:
        StreamingCovariance.save = cut_off_after(cut_off, directory)  # type: ignore[method-assign]
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    found = collect(Model(parts_of(), tokenizer), documents, [0, 1], **SMALL, directory=directory)
    found[1].save(directory / f"of-{rank}.safetensors")
    torch.distributed.destroy_process_group()


def in_two_processes(*args: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # spawned ones would import everything anew
    torch.multiprocessing.start_processes(_process, (port, *args), nprocs=2, start_method="fork")


@pytest.mark.parametrize("cut_off", [None, 1])
def test_two_processes_share_the_documents_and_sum_up_once(
    cut_off: int | None, seed: int, tokenizer: Any, tmp_path: Path
) -> None:
    """Also when the first attempt is cut off while the sums of both are written."""
    documents = make_documents(seed, 61)
    if cut_off is not None:
        with pytest.raises((ProcessExitedException, ProcessRaisedException)):
            in_two_processes(documents, tmp_path, tokenizer, cut_off)
        assert len(list(tmp_path.glob("*.safetensors"))) == cut_off
    in_two_processes(documents, tmp_path, tokenizer)
    alone = collect(Model(parts_of(), tokenizer), documents, [1], **SMALL)[1]
    names = ("1.down_proj.safetensors", "of-0.safetensors", "of-1.safetensors")
    files = [StreamingCovariance.load(tmp_path / name) for name in names]
    for found in files:
        assert found.count == alone.count
        torch.testing.assert_close(
            found.finalize(), alone.finalize(), rtol=0, atol=2e-6 * float(alone.finalize().max())
        )
        assert torch.equal(found.finalize(), files[0].finalize())
    assert {path.name for path in tmp_path.iterdir()} == {"0.down_proj.safetensors", *names}


@pytest.mark.parametrize(
    ("folder", "processes", "settings", "error", "message"),
    [
        ("part-1-of-2", 1, {}, ModelError, r"part-1-of-2.* has processes 1, this run has 2"),
        ("", 2, {"max_tokens": 9999}, ModelError, r"sums that several processes made, of \d+ tokens"),
        ("new", 2, {"until_converged": True}, ConfigError, "in one process, these are 2"),
    ],
)
def test_several_processes_make_their_refusals_before_they_read_any_text(
    folder: str,
    processes: int,
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
    seed: int,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those that torchrun starts, of which this is the second; files of other processes or settings lie there."""
    model = Model(parts_of(), tokenizer)
    found = collect(model, make_documents(seed, 20), [1], **SMALL)[1]
    found.metadata["processes"] = processes
    found.save(tmp_path / folder / "1.down_proj.safetensors")
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(error, match=message):
        Collection(model, [1], **SMALL, **settings, directory=tmp_path)
