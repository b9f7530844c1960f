"""Find where to edit: run LocFT-BF at every block and module, measure the result and revert it.

This is the location analysis of LocFT-BF (Fine-tuning Done Right in Model Editing, arXiv 2509.22072) on a sample of
the edits. All places share one prefix cache, which moves up with the blocks: for each new block only the blocks
since the last one run, not the whole prefix.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from fastedit.errors import ConfigError, EditError, Problem, RequestError
from fastedit.evaluation import sampling
from fastedit.evaluation.cells import RATIOS, SHARES, LocateCell
from fastedit.evaluation.predict import Predictions, predict
from fastedit.evaluation.questions import ask
from fastedit.evaluation.report import Requests, compare
from fastedit.methods.locft_bf.config import LocFTBFConfig
from fastedit.methods.locft_bf.method import LocFTBFPlan, plan
from fastedit.models import Model, PrefixCache, Topology, check_own, check_plain, plain_state
from fastedit.progress import Progress, no_progress
from fastedit.requests import AnyPath, EditRequest, as_requests
from fastedit.tensorfile import writing
from fastedit.weights import Snapshot

if TYPE_CHECKING:
    from rich.table import Table

_OWN = ("layer", "module", "seed", "keep_partial")  # fields of the configuration that callers cannot set
_KINDS = ("rewrite", "paraphrase", "neighbour")


@dataclass(frozen=True)
class LocateReport:
    """The measures of an edit at each place; prints as a table.

    Attributes:
        cells: one for each block and module, in ascending order of blocks.
        before: reliability, generalization, perplexity and accuracy of the unedited model.
        sample: positions in the given requests of the edits that were made.
        generated: whether shares are of greedy generation; otherwise they are teacher-forced.
        config: the settings that the edits at all places have in common.
    """

    cells: list[LocateCell]
    before: dict[str, float | None]
    sample: list[int]
    generated: bool
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, for JSON."""
        return asdict(self) | {"cells": [asdict(cell) | {"epochs": cell.epochs} for cell in self.cells]}

    def save(self, path: AnyPath) -> None:
        """Write `to_dict` as JSON, whole or not at all. Raises FileError."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n"
        with writing(path, "the report was not written") as temporary:
            temporary.write_text(text, encoding="utf-8")

    def draw(self, path: AnyPath) -> None:
        """Write a PNG, whole or not at all, with a heat map for each measure that was taken.

        Blocks go from left to right, modules from top to bottom; brighter is better. Shares are in %.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (`pip install 'fastedit-llm[plot]'`).
            FileError: the file cannot be written.
        """
        from fastedit.evaluation.heatmap import draw  # importing matplotlib takes a second

        draw(self.cells, path)

    def __rich__(self) -> Table:
        from rich import box
        from rich.table import Table

        table = Table("block", "module", box=box.SIMPLE_HEAD, padding=0)  # fits 80 columns
        for name in ("relia-\nbility", "general-\nization", "locality", "ppl\nratio", "accuracy\nratio"):
            table.add_column(name, justify="right")
        for name in ("lr", "epochs", "seconds"):
            table.add_column(name, justify="right")
        for cell in self.cells:
            shares = ("—" if (x := getattr(cell, name)) is None else f"{x:.1%}" for name in SHARES)
            ratios = ("—" if (x := getattr(cell, name)) is None else f"{x:.3g}" for name in RATIOS)
            costs = f"{cell.lr:.2g}", str(cell.epochs), f"{cell.seconds:.1f}"
            table.add_row(str(cell.block), cell.module, *shares, *ratios, *costs)
        return table


def locate(model: Model, requests: Requests, *, progress: Progress = no_progress, **options: Any) -> LocateReport:
    """Edit a sample of the requests at each layer and module in turn, and measure the results.

    After each place the model is restored bit for bit, on exceptions and Ctrl-C too.

    Args:
        progress: called with the stages of `predict` for the unedited model, "prefix", and "locate", which counts
            epochs of all places.
        **options: those of `Sweep`.

    Raises:
        ConfigError, ModelError, RequestError: as for `Sweep`. EditError: as for `Sweep.run`.
    """
    return Sweep(model, requests, **options).run(progress)


class Sweep:
    """A sweep over layers and modules. Creating one makes all checks, but does not edit yet.

    Args:
        requests: as for `fastedit.Editor.edit`; generalization is measured on their paraphrases, locality on
            their neighbours.
        layers: blocks to try; None is all.
        modules: modules to try in each layer, named as for `LocFTBFConfig.module`.
        sample: number of edits to make, drawn at random if there are more requests.
        seed: seed of the sample and of the edits.
        text: documents for the perplexity; a str is one document.
        capability: (prompt, answer) pairs on other subjects, for the accuracy.
        generate: measure shares and accuracy by greedy generation, which takes longer; otherwise teacher-forced.
        **config: other fields of `LocFTBFConfig`.

    Raises:
        ConfigError, ModelError, RequestError: a field, a value, a layer, a module, a request or a pair that
            cannot be used.

    Attributes:
        edits: the sample.
        places: (layer, module) pairs, in ascending order of layers.
    """

    @plain_state
    def __init__(
        self,
        model: Model,
        requests: Requests,
        *,
        layers: Sequence[int] | None = None,
        modules: Sequence[str] = ("down_proj",),
        sample: int = 100,
        seed: int = 0,
        text: Sequence[str] = (),
        capability: Sequence[tuple[str, str]] = (),
        generate: bool = False,
        **config: Any,
    ) -> None:
        everything = as_requests(requests)
        known = [field.name for field in fields(LocFTBFConfig) if field.name not in _OWN]
        for name in config:
            if name not in known:
                raise ConfigError(f"locate sets or lacks the field {name!r}; it takes {', '.join(known)}")
        self.places = _places(model.topology, layers, modules)
        layer, module = self.places[0]
        base_config = LocFTBFConfig(layer=layer, module=module, seed=seed, **config)
        self._sample = sampling.draw(range(len(everything)), sample, seed)
        self.edits = [everything[i] for i in self._sample]
        self._questions = _questions(capability)
        self._text, self._generate, self._model = text, generate, model
        ask(model, [*self.edits, *self._questions], kinds=_KINDS, text=text)
        first_plan = plan(model, self.edits, base_config)
        self._plans = [first_plan.placed(*place, no_progress) for place in self.places]

    @plain_state
    def run(self, progress: Progress = no_progress) -> LocateReport:
        """Edit at each place, measure, and revert the edit.

        Raises:
            EditError: a loss or a number of the edited model is not finite; names the layer and the module.
        """
        epochs, places = self._plans[0].config.epochs or 0, self.places
        measure = _Measure(self._model, self.edits, self._questions, self._text, self._generate, progress)
        cells: list[LocateCell] = []
        total = len(places) * epochs
        with self._plans[0].reporting(progress).data.prefix_cache(places[0][0]) as cache:
            for i, place_plan in enumerate(self._plans):
                counting = place_plan.reporting(_counting_epochs(progress, i * epochs, epochs, total))
                cells.append(_try_place(counting, cache, measure))
                progress("locate", (i + 1) * epochs, total, cells[-1].losses[-1])
        before = {name: value for name, value in measure.before.items() if name != "locality"}
        common = asdict(self._plans[-1].config)
        common = {key: value for key, value in common.items() if key not in ("layer", "module", "lr")}
        return LocateReport(cells, before, self._sample, self._generate, common)


class _Measure:
    """Measures a sample of edits and questions on other subjects; `before` holds the unedited model's values."""

    def __init__(
        self,
        model: Model,
        edits: Sequence[EditRequest],
        questions: Sequence[EditRequest],
        text: Sequence[str],
        generate: bool,
        progress: Progress,
    ) -> None:
        self._model, self._edits, self._questions = model, edits, questions
        self._text, self._generate = text, generate
        self._unedited = self._predict(progress)
        self.before = self._shares(self._unedited)

    def now(self) -> dict[str, float | None]:
        """Shares for the current weights, and perplexity and accuracy relative to `before`."""
        values = self._shares(self._predict())
        for name in ("perplexity", "accuracy"):
            values[f"{name}_ratio"] = _ratio(values.pop(name), self.before[name])
        return values

    def _predict(self, progress: Progress = no_progress) -> Predictions:
        asked = [*self._edits, *self._questions]
        options: dict[str, Any] = {"generate": self._generate, "kinds": _KINDS, "text": self._text}
        return predict(self._model, asked, progress=progress, **options)

    def _shares(self, now: Predictions) -> dict[str, float | None]:
        n, way = len(self._edits), "generated" if self._generate else "teacher_forced"
        old = self._unedited
        (of_edits, of_questions) = (
            compare(asked, Predictions(now.answers[part], None), Predictions(old.answers[part], None)).metrics
            for asked, part in ((self._edits, slice(n)), (self._questions, slice(n, None)))
        )
        shares = {name: of_edits[name][way] for name in SHARES}
        return shares | {"perplexity": now.perplexity, "accuracy": of_questions["reliability"][way]}


def _counting_epochs(progress: Progress, before: int, epochs: int, of_all: int) -> Progress:
    """A progress for one place that reports it as a part of all places."""

    def count(stage: str, done: int, total: int, loss: float | None = None) -> None:
        if stage == "train":
            progress("locate", before + epochs * done // total, of_all, loss)  # depth-first counts edits

    return count


def _try_place(place: LocFTBFPlan, cache: PrefixCache, measure: _Measure) -> LocateCell:
    """Edit at one place and measure; the parameters are restored bit for bit in any case."""
    (layer,), module = place.config.layers, place.config.module
    assert module is not None
    parameters = dict(place.data.batch.model.topology.resolve(layer, module)[1].named_parameters())
    with Snapshot(parameters, always=True):
        try:
            started = time.perf_counter()
            result = place.run(cache)
            seconds = time.perf_counter() - started
            after: dict[str, Any] = measure.now()
        except EditError as error:
            error.at(f"block {layer}, {module}")
            raise
    return LocateCell(layer, module, **after, lr=result.config["lr"], losses=result.losses, seconds=seconds)


def _places(topology: Topology, layers: Sequence[int] | None, modules: Sequence[str]) -> list[tuple[int, str]]:
    """The (block, module) pairs to try, ascending and without repetition. Raises an error if one cannot be edited."""
    blocks = sorted(set(range(topology.n_blocks) if layers is None else layers))  # the cache only moves up
    places = [(block, module) for block in blocks for module in dict.fromkeys(modules)]
    if not places:
        raise ConfigError("there is nothing to try; give at least one layer and one module")
    check_plain(topology.model, (topology.resolve(*place)[0] for place in places))
    for block, module in places:
        topology.check_trainable(block, module)
        check_own(topology, [block], module)
    return places


def _questions(capability: Sequence[tuple[str, str]]) -> list[EditRequest]:
    questions: list[EditRequest] = []
    problems: list[Problem] = []
    for i, (prompt, answer) in enumerate(capability):
        name = f"capability {i}"
        try:
            questions.append(EditRequest(prompt, answer, id=name))
        except RequestError as error:
            problems.append(Problem(name, str(error)))
    if problems:
        raise RequestError.of(problems, "capability pairs")
    return questions


def _ratio(after: float | None, before: float | None) -> float | None:
    return None if after is None or not before else after / before
