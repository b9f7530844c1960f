"""The location analysis: the model stays as it was, cells are real edits, and the prefix runs once."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from matplotlib import colormaps, image
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastedit.editor import Editor
from fastedit.errors import ConfigError, EditError, FastEditError, ModelError, RequestError
from fastedit.evaluation import locate as module_under_test
from fastedit.evaluation.locate import LocateReport, Sweep, locate
from fastedit.models import Model, topology
from fastedit.requests import EditRequest

WORDS = [f"w{i}" for i in range(90)]
EDITS = [
    EditRequest(
        prompt=" ".join(WORDS[i : i + 2 + i % 5]),
        target=" ".join(WORDS[60 + i : 61 + i + i % 2]),
        paraphrases=(f"w50 {WORDS[i]} w51",),
        neighbours=((f"w52 {WORDS[i + 20]}", f"w8{i % 10}"),),
    )
    for i in range(12)
]
CAPABILITY = [(f"w{i} w{i + 1}", f"w{i + 2}") for i in range(30)]
TEXT = [" ".join(WORDS[40:70])]
FAST: dict[str, Any] = {"batch_size": 4, "epochs": 3, "lr": 2e-2}


@pytest.fixture
def tokenizer() -> Any:
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "?", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def state(model: Any) -> dict[str, Any]:
    return {
        name: (p.detach().clone().view(torch.uint8), p.requires_grad, p.grad) for name, p in model.named_parameters()
    }


def assert_unchanged(model: Any, before: dict[str, Any]) -> None:
    for name, (bits, *flags) in state(model).items():
        assert torch.equal(bits, before[name][0]), name
        assert flags == list(before[name][1:]), name
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(("family", "augment", "layers"), [("llama", 0, (3, 1)), ("gpt2", 2, (1,))])
def test_a_cell_is_what_the_editor_does_there(
    family: str, augment: int, layers: tuple[int, ...], tokenizer: Any
) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    before = state(model)
    modules = ("down_proj", "attn")
    report = locate(
        Model.of(model, tokenizer),
        EDITS,
        layers=layers,
        modules=modules,
        seed=5,
        text=TEXT,
        capability=CAPABILITY,
        augment=augment,
        **FAST,
    )
    assert_unchanged(model, before)
    assert [(c.block, c.module) for c in report.cells] == list(itertools.product(sorted(layers), modules))
    old = Editor(model, tokenizer).evaluate(EDITS, text=TEXT, generate=False).metrics
    assert report.before["reliability"] == old["reliability"]["teacher_forced"]
    assert report.before["perplexity"] == old["perplexity"]
    questions = [EditRequest(*pair) for pair in CAPABILITY]
    accuracy = Editor(model, tokenizer).evaluate(questions, generate=False).metrics["reliability"]
    assert report.before["accuracy"] == accuracy["teacher_forced"] > 0

    for cell in report.cells:
        editor = Editor(model, tokenizer, seed=5, layer=cell.block, module=cell.module, augment=augment, **FAST)
        result = editor.edit(EDITS)
        assert cell.losses == result.losses
        assert cell.epochs == 3
        assert cell.lr == FAST["lr"]
        now = editor.evaluate(EDITS, text=TEXT, generate=False).metrics
        for name in ("reliability", "generalization", "locality"):
            assert getattr(cell, name) == now[name]["teacher_forced"]
        assert cell.perplexity_ratio == now["perplexity"] / old["perplexity"] != 1
        asked = editor.evaluate(questions, generate=False).metrics["reliability"]["teacher_forced"]
        assert cell.accuracy_ratio == asked / accuracy["teacher_forced"]
        result.revert()
        assert cell.locality != 1
        assert cell.losses[-1] < cell.losses[0]


def test_what_was_not_asked_is_none_and_a_dash(tokenizer: Any) -> None:
    plain = [EditRequest(edit.prompt, edit.target) for edit in EDITS]
    report = locate(Model.of(tiny_model("llama"), tokenizer), plain, layers=[2], **FAST)
    (cell,) = report.cells
    assert cell.reliability is not None
    assert {cell.generalization, cell.locality, cell.perplexity_ratio, cell.accuracy_ratio} == {None}
    assert str(shown(report)).count("—") == 4
    assert cell.lr == FAST["lr"]


def shown(report: LocateReport) -> str:
    file = StringIO()
    Console(file=file, width=80).print(report)
    return file.getvalue()


def test_generated_shares(tokenizer: Any) -> None:
    model = tiny_model("llama")
    report = locate(Model.of(model, tokenizer), EDITS, layers=[2], generate=True, **FAST | {"epochs": 12})
    editor = Editor(model, tokenizer, layer=2, module="down_proj", **FAST | {"epochs": 12})
    editor.edit(EDITS)
    metrics = editor.evaluate(EDITS).metrics
    assert report.generated
    assert report.before["reliability"] == 0 != report.cells[0].reliability
    assert report.cells[0].reliability == metrics["reliability"]["generated"]
    assert report.cells[0].reliability != metrics["reliability"]["teacher_forced"]
    assert report.cells[0].locality == metrics["locality"]["generated"]


def test_the_sample_is_seeded(tokenizer: Any) -> None:
    def run(seed: int) -> LocateReport:
        top = topology(tiny_model("llama"))
        return locate(Model(top, tokenizer), EDITS, layers=[2], sample=5, seed=seed, **FAST)

    report, other = run(3), run(4)
    assert len(set(report.sample)) == 5
    assert report.sample == run(3).sample != other.sample
    editor = Editor(tiny_model("llama"), tokenizer, seed=3, layer=2, module="down_proj", **FAST)
    assert report.cells[0].losses == editor.edit([EDITS[i] for i in report.sample]).losses


def test_the_prefix_runs_once_and_the_unedited_model_is_measured_once(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    top = topology(model)
    assert top.packs  # measured by forward passes of its own
    ran: Counter[int] = Counter()
    evaluations = 0
    forward = type(top.blocks[0]).forward
    predict = module_under_test.predict

    def counted(block: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # training has gradients
            ran[list(top.blocks).index(block)] += 1
        return forward(block, *args, **kwargs)

    def uncounted(*args: Any, **kwargs: Any) -> Any:
        nonlocal evaluations
        evaluations += 1
        with monkeypatch.context() as patch:
            patch.setattr(type(top.blocks[0]), "forward", forward)
            return predict(*args, **kwargs)

    monkeypatch.setattr(type(top.blocks[0]), "forward", counted)
    monkeypatch.setattr(module_under_test, "predict", uncounted)
    locate(Model(top, tokenizer), EDITS, modules=("down_proj", "attn"), layers=(1, 3), **FAST)
    assert ran == {0: 1, 1: 2, 2: 1}  # once more, for what stays frozen beside block 1's down_proj
    assert evaluations == 1 + 4


def interrupt_at(calls: int) -> Callable[..., None]:
    counter = itertools.count(1)

    def progress(stage: str, done: int, total: int, loss: float | None = None) -> None:
        if stage == "locate" and next(counter) == calls:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("calls", [1, 4, 6])  # in training, after a place, in training of the next place
def test_ctrl_c_leaves_the_model_as_it_was(calls: int, tokenizer: Any) -> None:
    model = tiny_model("llama")
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        locate(Model.of(model, tokenizer), EDITS, modules=["block"], progress=interrupt_at(calls), **FAST)
    assert_unchanged(model, before)


def test_a_failed_measurement_leaves_the_model_as_it_was(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before, predict, measured = state(model), module_under_test.predict, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        measured.append(model.get_parameter("model.layers.1.mlp.up_proj.weight").clone())
        if len(measured) == 2:
            raise EditError("no number")
        return predict(*args, **kwargs)

    monkeypatch.setattr(module_under_test, "predict", failing)
    with pytest.raises(EditError, match="block 1, up_proj: no number"):
        locate(Model.of(model, tokenizer), EDITS, layers=[1], modules=["up_proj"], **FAST)
    assert not torch.equal(*measured)  # it was edited when it failed
    assert_unchanged(model, before)


def test_a_loss_that_is_not_finite_names_the_place(tokenizer: Any) -> None:
    model = tiny_model("llama")
    before = state(model)
    with pytest.raises(EditError, match="block 2, attn: the loss is not finite"):
        locate(Model.of(model, tokenizer), EDITS, layers=[2], modules=["attn"], **FAST | {"lr": 1e30})
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"modules": ["down_proj", "gate_proj"]}, ModelError, "block 0 of .* has no gate_proj"),
        ({"layers": [0, 4]}, ModelError, "layer 4 does not exist: .* 0 to 3"),
        ({"modules": ["mlp.act"]}, ModelError, "'mlp.act' of block 0 has no weights"),
        ({"layers": []}, ConfigError, "at least one layer"),
        ({"modules": []}, ConfigError, "at least one layer and one module"),
        ({"sample": 0}, ConfigError, "sample is 0"),
        ({"layer": 2}, ConfigError, "'layer'; it takes lr,"),
        ({"keep_partial": True}, ConfigError, "'keep_partial'"),
        ({"epochs": 0}, ConfigError, "epochs is 0"),
        ({"capability": [("w1", "w2"), ("w1", " ")]}, RequestError, "capability 1: .*'target'"),
        (
            {"capability": [("w1", " "), ("w1", "w2"), (" ", "w2")]},
            RequestError,
            r"^2 capability pairs cannot be used: capability 0: .*'target'.* \| capability 2: .*'prompt'",
        ),
        ({"capability": [("w1 " * 99, "w2")]}, RequestError, "request capability 0, rewrite"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    options: dict[str, Any], error: type[Exception], message: str, tokenizer: Any
) -> None:
    model = tiny_model("gpt2")
    top, work = topology(model), []
    assert top.packs  # measured by forward passes of its own
    model.transformer.h[0].register_forward_hook(lambda *_: work.append(1))
    with pytest.raises(error, match=message):
        locate(Model(top, tokenizer), EDITS, **options)
    assert not work


def test_a_place_without_a_rate_is_refused_before_the_first_is_tried(tokenizer: Any) -> None:
    model = tiny_model("llama")
    model.get_parameter("model.layers.3.mlp.down_proj.weight").data.zero_()
    with pytest.raises(ModelError, match=r"layers\.3\.mlp\.down_proj are all zero.*give lr"):
        Sweep(Model.of(model, tokenizer), EDITS, layers=[1, 3])
    Sweep(Model.of(model, tokenizer), EDITS, layers=[1, 3], lr=1e-3)


def test_progress_counts_all_places(tokenizer: Any) -> None:
    seen: dict[str, list[tuple[int, int, float | None]]] = {}

    def progress(stage: str, done: int, total: int, loss: float | None = None) -> None:
        seen.setdefault(stage, []).append((done, total, loss))

    top = topology(tiny_model("llama"))
    report = locate(Model(top, tokenizer), EDITS, layers=[0, 1], text=TEXT, progress=progress, **FAST)
    assert list(seen) == ["answers", "text", "prefix", "locate"]
    done = [d for d, _, _ in seen["locate"]]
    assert done == sorted(done)
    assert set(done) == set(range(1, 7))
    assert {total for _, total, _ in seen["locate"]} == {6}
    assert seen["locate"][-1][2] == report.cells[-1].losses[-1]


@pytest.fixture
def report() -> LocateReport:
    def cell(block: int, module: str, good: float) -> module_under_test.LocateCell:
        ratio = 1 + block if module == "mlp" else None
        return module_under_test.LocateCell(block, module, good, 1 - good, None, ratio, 0.5, 1e-3, [2.0, 1.0], 0.25)

    cells = [cell(b, m, b / 7 if m == "mlp" else 0.0) for b in range(8) for m in ("mlp", "attn")]
    before = {"reliability": 0.0, "generalization": 0.0, "perplexity": 3.0, "accuracy": 0.5}
    return LocateReport(cells, before, [0, 2], False, {"epochs": 25})


def test_table_and_json(report: LocateReport, tmp_path: Path) -> None:
    assert "…" not in shown(report)
    line = next(line for line in shown(report).splitlines() if line.split()[:2] == ["7", "mlp"])
    assert line.split()[2:] == ["100.0%", "0.0%", "—", "8", "0.5", "0.001", "2", "0.2"]
    report.save(tmp_path / "new" / "report.json")
    saved = json.loads((tmp_path / "new" / "report.json").read_text())
    assert saved == report.to_dict()
    assert saved["cells"][-2]["epochs"] == 2
    assert saved["cells"][-2]["perplexity_ratio"] == 8
    assert saved["before"]["perplexity"] == 3
    assert saved["sample"] == [0, 2]


def test_the_picture_shows_each_measure_at_each_place(report: LocateReport, tmp_path: Path) -> None:
    report.draw(tmp_path / "map.png")
    pixels = image.imread(tmp_path / "map.png")  # [H, W, 4]
    assert pixels.ndim == 3
    assert len(list(tmp_path.iterdir())) == 1
    colors = Counter(map(tuple, (pixels[..., :3] * 255).round().astype(int).reshape(-1, 3).tolist()))
    # reliability in blocks 0, 5 and 7; color bars have few pixels of each color
    for share in (0.0, 5 / 7, 1.0):
        assert colors[colormaps["viridis"](share, bytes=True)[:3]] > 1000
    flat = LocateReport(
        [replace(c, reliability=0.5, generalization=None) for c in report.cells[1::2]],
        *(report.before, report.sample, report.generated, report.config),
    )
    flat.draw(tmp_path / "flat.png")
    smaller = image.imread(tmp_path / "flat.png")
    assert smaller.shape[0] < pixels.shape[0]  # fewer measures, one module
    assert smaller.shape[1] == pixels.shape[1]


def test_many_blocks_fit_the_picture(tmp_path: Path) -> None:
    cells = [
        module_under_test.LocateCell(b, "mlp", b / 99, None, None, None, None, 1.0, [1.0], 1.0) for b in range(100)
    ]
    LocateReport(cells, {}, [0], False, {}).draw(tmp_path / "map.png")
    assert image.imread(tmp_path / "map.png").shape[1] < 4000


@pytest.mark.parametrize("write", [LocateReport.save, LocateReport.draw])
def test_nothing_half_written(
    write: Callable[..., None], report: LocateReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report"
    path.write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(FastEditError, match=r"report was not written: .*No space left.*another path"):
        write(report, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
