"""Where to edit: LocFT-BF at every block and module, each measured and taken back.

The location analysis of LocFT-BF (Fine-tuning Done Right in Model Editing, arXiv 2509.22072) on a sample of
the edits. All places share one prefix cache, which moves up with the blocks: for each new block only those
since the last one run, not the whole prefix.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import nn

from fastedit.errors import ConfigError, EditError, FastEditError, ModelError, RequestError
from fastedit.evaluate import Requests, compare
from fastedit.files import replacing
from fastedit.methods.base import Progress, no_progress
from fastedit.methods.locft_bf import LocFTBFConfig, locft_bf, prepare
from fastedit.models import Topology
from fastedit.predictions import Predictions, predict
from fastedit.requests import AnyPath, EditRequest, as_requests

if TYPE_CHECKING:
    from rich.table import Table

_OWN = ("layer", "module", "seed", "keep_partial")  # fields of the method that are not the caller's to set
_KINDS = ("rewrite", "paraphrase", "neighbour")
# measures of a cell; of these the ratios are after the edit / before it
_SHARES = ("reliability", "generalization", "locality")
_RATIOS = ("perplexity_ratio", "accuracy_ratio")
_WRITTEN = 40  # blocks up to which the picture has room for numbers


@dataclass(frozen=True)
class LocateCell:
    """LocFT-BF at one place.

    Shares are in 0 … 1, None where nothing was measured. `perplexity_ratio` and `accuracy_ratio` are the
    capability: perplexity on text and accuracy on questions after the edit, divided by those before it (None:
    not asked, or an accuracy of 0 before). `losses` holds the mean loss of each epoch, `seconds` the time of
    training, without the measuring.
    """

    block: int
    module: str
    reliability: float | None
    generalization: float | None
    locality: float | None
    perplexity_ratio: float | None
    accuracy_ratio: float | None
    lr: float
    losses: list[float]
    seconds: float

    @property
    def epochs(self) -> int:
        """Epochs run."""
        return len(self.losses)


@dataclass(frozen=True)
class LocateReport:
    """The measures of an edit at each place; prints as a table.

    Attributes:
        cells: one for each block and module, by blocks from below.
        before: reliability, generalization, perplexity and accuracy of the unedited model.
        sample: positions in the given requests of the edits that were made.
        generated: whether shares are of greedy generation; otherwise they are teacher-forced.
        config: what the edits at all places have in common.
    """

    cells: list[LocateCell]
    before: dict[str, float | None]
    sample: list[int]
    generated: bool
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self) | {"cells": [asdict(cell) | {"epochs": cell.epochs} for cell in self.cells]}

    def save(self, path: AnyPath) -> None:
        """Write `to_dict` as JSON, whole or not at all (then FastEditError)."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n"
        with _writing(path) as file:
            file.write(text.encode())

    def draw(self, path: AnyPath) -> None:
        """Write a PNG, whole or not at all (then FastEditError): a heat map for each measure that was taken.

        Blocks go to the right, modules down; the brighter the better. Shares are in %.
        """
        from matplotlib.colors import LogNorm, Normalize  # here, since importing it takes a second
        from matplotlib.figure import Figure

        blocks = sorted({cell.block for cell in self.cells})
        modules = list(dict.fromkeys(cell.module for cell in self.cells))
        taken = [name for name in _SHARES + _RATIOS if any(getattr(c, name) is not None for c in self.cells)]
        size = 2.5 + 0.45 * min(len(blocks), _WRITTEN), len(taken) * (1 + 0.35 * len(modules))
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        panels = figure.subplots(len(taken), squeeze=False)[:, 0]
        for name, axes in zip(taken, panels, strict=True):
            unit = 100 if name in _SHARES else 1
            known = {(c.module, c.block): unit * value for c in self.cells if (value := getattr(c, name)) is not None}
            values = [[known.get((module, block), math.nan) for block in blocks] for module in modules]
            scale = Normalize(0, max(unit, *known.values()))
            if name == "perplexity_ratio":
                scale = LogNorm(min(1.0, *known.values()), max(2.0, *known.values()))
            colors = "viridis_r" if name == "perplexity_ratio" else "viridis"
            image = axes.imshow(values, colors, norm=scale, aspect="auto")
            figure.colorbar(image, ax=axes).ax.tick_params(which="both", labelsize=7)
            axes.set_title(f"{name}, %" if unit > 1 else name.replace("_ratio", " after / before"), fontsize=9)
            axes.set_yticks(range(len(modules)), modules, fontsize=7)
            step = -(-len(blocks) // _WRITTEN)
            axes.set_xticks(range(0, len(blocks), step), blocks[::step], fontsize=7)
            for y, row in enumerate(values if len(blocks) <= _WRITTEN else []):
                for x, value in enumerate(row):
                    red, green, blue, _ = image.cmap(scale(value))
                    bright = math.isnan(value) or 0.3 * red + 0.6 * green + 0.1 * blue > 0.5
                    color = "black" if bright else "white"
                    axes.text(x, y, _short(value, unit), color=color, fontsize=7, ha="center", va="center")
        panels[-1].set_xlabel("block")
        with _writing(path) as file:
            figure.savefig(file, format="png")

    def __rich__(self) -> Table:
        from rich import box
        from rich.table import Table

        table = Table("block", "module", box=box.SIMPLE_HEAD, padding=0)  # 80 columns
        for name in ("relia-\nbility", "general-\nization", "locality", "ppl\nratio", "accuracy\nratio"):
            table.add_column(name, justify="right")
        for name in ("lr", "epochs", "seconds"):
            table.add_column(name, justify="right")
        for cell in self.cells:
            shares = ("—" if (x := getattr(cell, name)) is None else f"{x:.1%}" for name in _SHARES)
            ratios = ("—" if (x := getattr(cell, name)) is None else f"{x:.3g}" for name in _RATIOS)
            costs = f"{cell.lr:.2g}", str(cell.epochs), f"{cell.seconds:.1f}"
            table.add_row(str(cell.block), cell.module, *shares, *ratios, *costs)
        return table


def locate(
    topology: Topology,
    tokenizer: Any,
    requests: Requests,
    *,
    blocks: Sequence[int] | None = None,
    modules: Sequence[str] = ("down_proj",),
    sample: int = 100,
    seed: int = 0,
    text: Sequence[str] = (),
    capability: Sequence[tuple[str, str]] = (),
    generate: bool = False,
    progress: Progress = no_progress,
    **config: Any,
) -> LocateReport:
    """Edit a sample of the requests at each block and module in turn and measure what it did.

    The model is put back bit for bit after each place, on exceptions and Ctrl-C too.

    Args:
        requests: as for `fastedit.Editor.edit`; generalization is measured on their paraphrases, locality on
            their neighbours.
        blocks: to try; None is all.
        modules: to try in each block: names of `LocFTBFConfig.module`.
        sample: edits to make, at random if there are more requests.
        seed: of the sample, and of the edits.
        text: documents for the perplexity; a str is one.
        capability: (prompt, answer) pairs on other matters for the accuracy.
        generate: measure shares and accuracy by greedy generation, which takes longer; else teacher-forced.
        progress: called with the stages of `fastedit.predictions.predict` for the unedited model, "prefix", and
            "locate", which counts epochs of all places.
        **config: other fields of `LocFTBFConfig`.

    Raises:
        ConfigError, ModelError, RequestError: a field, a value, a block, a module, a request or a pair that
            cannot be used; before the model is touched.
        EditError: a loss or a measured model that is not finite; names the block and the module.
    """
    everything = as_requests(requests)
    known = [field.name for field in fields(LocFTBFConfig) if field.name not in _OWN]
    for name in config:
        if name not in known:
            raise ConfigError(f"locate sets or lacks the field {name!r}; it takes {', '.join(known)}")
    places = _places(topology, blocks, modules)
    if sample < 1:
        raise ConfigError(f"sample is {sample}; give a number of edits, at least 1")
    base = LocFTBFConfig(layer=places[0][0], seed=seed, **config)
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
    chosen: list[int] = order[:sample].sort().values.tolist()
    edits = [everything[i] for i in chosen]
    questions = [_question(i, *pair) for i, pair in enumerate(capability)]

    def measure(progress: Progress = no_progress) -> Predictions:
        return predict(
            topology,
            tokenizer,
            [*edits, *questions],
            generate=generate,
            kinds=_KINDS,
            text=text,
            progress=progress,
        )

    def measures(now: Predictions, old: Predictions) -> dict[str, float | None]:
        n, way = len(edits), "generated" if generate else "teacher_forced"
        (of_edits, of_questions) = (
            compare(asked, Predictions(now.answers[part], None), Predictions(old.answers[part], None)).metrics
            for asked, part in ((edits, slice(n)), (questions, slice(n, None)))
        )
        shares = {name: of_edits[name][way] for name in _SHARES}
        return shares | {"perplexity": now.perplexity, "accuracy": of_questions["reliability"][way]}

    unedited = measure(progress)
    before = measures(unedited, unedited)
    del before["locality"]
    cells: list[LocateCell] = []
    common: dict[str, Any] = {}
    prepared = prepare(topology, tokenizer, edits, base, progress)
    with prepared[1]:
        for i, (block, name) in enumerate(places):

            def count(
                stage: str, done: int, total: int, loss: float | None = None, first: int = i * base.epochs
            ) -> None:
                share = base.epochs * done // total  # depth-first counts edits
                progress("locate", first + share, len(places) * base.epochs, loss)

            place = replace(base, layer=block, module=name)
            with _taken_back(topology.resolve(block, name)[1]):
                try:
                    started = time.perf_counter()
                    found = locft_bf(topology, tokenizer, edits, place, count, prepared)
                    seconds = time.perf_counter() - started
                    after = measures(measure(), unedited)
                except EditError as error:
                    raise EditError(f"block {block}, {name}: {error}") from error
            for key in ("perplexity", "accuracy"):
                after[f"{key}_ratio"] = _ratio(after.pop(key), before[key])
            common, losses = found.config, found.losses
            cells.append(LocateCell(block, name, **after, lr=common["lr"], losses=losses, seconds=seconds))
            progress("locate", (i + 1) * base.epochs, len(places) * base.epochs, losses[-1])
    common = {key: value for key, value in common.items() if key not in ("layer", "module", "lr")}
    return LocateReport(cells, before, chosen, generate, common)


def _places(topology: Topology, blocks: Sequence[int] | None, modules: Sequence[str]) -> list[tuple[int, str]]:
    """(block, module) from below, each once, all known to be there."""
    found = sorted(set(range(topology.n_blocks) if blocks is None else blocks))  # the cache only moves up
    places = [(block, module) for block in found for module in dict.fromkeys(modules)]
    if not places:
        raise ConfigError("there is nothing to try; give at least one block and one module")
    for block, module in places:
        if not any(True for _ in topology.resolve(block, module)[1].parameters()):
            raise ModelError(f"module {module!r} of block {block} has no weights to train")
    return places


def _question(i: int, prompt: str, answer: str) -> EditRequest:
    try:
        return EditRequest(prompt, answer, id=f"capability {i}")
    except RequestError as error:
        raise RequestError(f"capability {i}: {error}") from error


@contextmanager
def _taken_back(module: nn.Module) -> Iterator[None]:
    """Put the module's parameters back, bit for bit, however the block ends."""
    originals = [p.detach().clone() for p in module.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, original in zip(module.parameters(), originals, strict=True):
                p.copy_(original)


def _ratio(after: float | None, before: float | None) -> float | None:
    return None if after is None or not before else after / before


def _short(value: float, unit: int) -> str:
    """A percentage without places, a ratio with at most three digits."""
    if math.isnan(value):
        return "—"
    return f"{value:.0f}" if unit > 1 else f"{value:.2f}" if value < 9.995 else f"{value:.2g}"


@contextmanager
def _writing(path: AnyPath) -> Iterator[IO[bytes]]:
    try:
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            yield file
    except OSError as error:
        raise FastEditError(f"{path}: the report was not written: {error}; give another path") from error
