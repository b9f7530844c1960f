"""A budgeted search for the configuration that writes a sample of the edits and preserves the rest.

It is a hill climb that begins with the method's own choices: from the best configuration so far it goes to those that
differ in one value, such as twice the rate or the next blocks. Each trial edits the sample, is measured, and is
reverted. Finished trials are kept in a file, so that an interrupted search continues where it was.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastedit.errors import ConfigError, EditError, FastEditError, FileError
from fastedit.evaluation.predict import Predictions, predict
from fastedit.evaluation.questions import ask
from fastedit.evaluation.report import Requests, compare
from fastedit.evaluation.sampling import draw
from fastedit.methods import DEFAULT_METHOD, METHODS, method_of
from fastedit.models import Model, fingerprint
from fastedit.progress import Progress, no_progress
from fastedit.requests import AnyPath, as_requests
from fastedit.weights import put_back

if TYPE_CHECKING:
    from rich.table import Table

_OTHERS = ("paraphrase", "neighbour")
# fields that depend on the number of edits or the machine; left out of settings unless they were given or tried
_OPEN = (
    *("batch_size", "epochs", "lr_schedule", "published"),
    *("seed", "cache_bytes", "keep_partial", "targets", "state", "save_every"),
)


@dataclass(frozen=True)
class Trial:
    """A configuration and its results on the sample.

    Attributes:
        config: arguments of `fastedit.Editor`, including the method's name.
        resolved: the value of every field, as the method chose it.
        reliability: share of the edits that are written, by generation.
        generalization: share of the paraphrases' target tokens, teacher-forced (None: there are none).
        first_token: share of neighbours whose answers begin as before (None: there are none).
        perplexity_ratio: after the edit / before it (None: no text).
        seconds: time of the edit, without the measurements.
        error: why the edit failed; its shares are then 0.
    """

    config: dict[str, Any]
    resolved: dict[str, Any]
    reliability: float
    generalization: float | None
    first_token: float | None
    perplexity_ratio: float | None
    seconds: float
    error: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `fastedit.Editor` for the same choices, for any edits.

        They leave out the batch size, the epochs and the learning rate's schedule unless they were given or tried,
        because these depend on the number of edits.
        """
        if not self.resolved:
            return self.config
        method = self.config["method"]
        defaults = {f.name: f.default for f in fields(METHODS[method].config)}
        plain: dict[str, Any] = json.loads(json.dumps(self.resolved))
        chosen = {n: v for n, v in plain.items() if v != defaults[n] and _matters(n, plain)}
        chosen.pop("published", None)  # its choices are among the fields
        return {"method": method} | {n: v for n, v in chosen.items() if n not in _OPEN or n in self.config}

    @property
    def kept(self) -> float:
        """How much the edit preserved: the share of first tokens, over the perplexity ratio if that is above 1."""
        share = 1.0 if self.first_token is None else self.first_token
        return share / max(1.0, self.perplexity_ratio or 1.0)

    @property
    def score(self) -> float:
        """The harmonic mean of `reliability` and `kept`."""
        written, kept = self.reliability, self.kept
        return 2 * written * kept / (written + kept) if written + kept else 0.0


@dataclass(frozen=True)
class TuneReport:
    """All trials of a search, in their order; prints as a table, the best first.

    Attributes:
        trials: the trials, at least one.
        finished: whether nothing was left to try; otherwise the budget ended the search.
    """

    trials: list[Trial]
    finished: bool

    @property
    def best(self) -> Trial:
        """The trial with the highest score, the fastest of equal ones; a failed one only if all failed."""
        return max(self.trials, key=lambda trial: (trial.error is None, trial.score, -trial.seconds))

    @property
    def front(self) -> list[Trial]:
        """The Pareto front of written against kept, beginning with the trial that keeps most."""
        front: list[Trial] = []
        for trial in sorted(self.trials, key=lambda t: (-t.kept, -t.reliability)):
            if trial.error is None and (not front or trial.reliability > front[-1].reliability):
                front.append(trial)
        return front

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, for JSON."""
        return {
            "finished": self.finished,
            "best": self.trials.index(self.best),
            "front": [self.trials.index(trial) for trial in self.front],
            "trials": [asdict(t) | {"settings": t.settings, "kept": t.kept, "score": t.score} for t in self.trials],
        }

    def draw(self, path: AnyPath) -> None:
        """Write a PNG of what was written against what was kept, with a point per trial, whole or not at all.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (`pip install 'fastedit-llm[plot]'`).
            FileError: the file cannot be written.
        """
        from fastedit.evaluation.front_plot import draw_front  # importing matplotlib takes a second

        shown = [(i, trial.kept, trial.reliability) for i, trial in enumerate(self.trials) if trial.error is None]
        front = [(trial.kept, trial.reliability) for trial in self.front]
        draw_front(shown, front, self.trials.index(self.best), path)

    def __rich__(self) -> Table:
        from rich import box
        from rich.table import Table

        ended = "nothing is left to try" if self.finished else "the budget is used up; a larger one continues from here"
        caption = f"{len(self.trials)} trials, {ended}. Stars are on the front of written against kept."
        table = Table("trial", box=box.SIMPLE_HEAD, padding=0, caption=caption, caption_justify="left")
        titles = "score", "written", "general-\nization", "first\ntoken", "perplexity\nratio", "seconds"
        for title in titles:
            table.add_column(title, justify="right")
        table.add_column("configuration")
        front, base = self.front, self.trials[0].config
        for trial in sorted(self.trials, key=lambda t: -t.score):
            shares = (trial.score, trial.reliability, trial.generalization, trial.first_token)
            ratio = "—" if trial.perplexity_ratio is None else f"{trial.perplexity_ratio:.3f}"
            cells = [*("—" if share is None else f"{share:.1%}" for share in shares), ratio, f"{trial.seconds:.1f}"]
            star = "*" if any(trial is other for other in front) else ""
            description = trial.error or _difference(trial.config, base) or "the method's choices"
            table.add_row(f"{self.trials.index(trial)}{star}", *cells, description)
        return table


def tune(model: Model, requests: Requests, *, progress: Progress = no_progress, **options: Any) -> TuneReport:
    """Search for a configuration on a sample of the requests. After each trial the model is restored bit for bit.

    Args:
        progress: called with the stage "tune" and trials, and with the stages of each trial.
        **options: those of `Search`.

    Raises:
        ConfigError, ModelError, RequestError, FileError: as for `Search`. EditError: as for `Search.run`.
    """
    return Search(model, requests, **options).run(progress)


class Search:
    """A search over a method's configurations. Creating one makes all checks, but does not edit yet.

    Args:
        requests: as for `fastedit.Editor.edit`; what is kept is measured on their neighbours, or on `text`.
        method: one of `fastedit.methods.METHODS`.
        sample: number of edits to make, drawn with `seed` if there are more requests.
        minutes: begin no trial that would likely end after this time; at least one trial is made.
        trials: make at most this many trials, including those of `journal`.
        seed: seed of the sample and of the edits.
        text: documents for the perplexity; a str is one document.
        journal: a file that keeps finished trials; its trials are not made again.
        **config: fields of the method's configuration that all trials have in common.

    Raises:
        ConfigError, ModelError, RequestError: a field, a value or a request cannot be used; there are neither
            neighbours nor text to measure what is kept.
        FileError: the journal cannot be read, or belongs to another search.
    """

    def __init__(
        self,
        model: Model,
        requests: Requests,
        *,
        method: str = DEFAULT_METHOD,
        sample: int = 50,
        minutes: float = 30.0,
        trials: int | None = None,
        seed: int = 0,
        text: Sequence[str] = (),
        journal: AnyPath | None = None,
        **config: Any,
    ) -> None:
        for name, value in (("minutes", minutes), ("trials", trials)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}; give a positive number")
        method_of(method, config)
        self.edits = draw(as_requests(requests), sample, seed)
        if not text and not any(edit.neighbours for edit in self.edits):
            raise ConfigError("nothing tells what an edit keeps: give text, or requests with neighbours")
        self._model, self._method, self._text = model, method, text
        self._common = {**config, "seed": seed}
        self._seconds, self._limit = 60.0 * minutes, trials or math.inf
        ask(model, self.edits, text=text)
        METHODS[method].plan(model, self.edits, METHODS[method].config(**self._common))
        self._journal = None if journal is None else Path(journal)
        description = repr((self.edits, text, method, self._common, str(model.device), model.chat))
        self._about = {"model": fingerprint(model.network), "search": sha256(description.encode()).hexdigest()[:32]}
        self.trials = self._read()

    def run(
        self, progress: Progress = no_progress, on_trial: Callable[[TuneReport], None] = lambda _: None
    ) -> TuneReport:
        """Try configurations until the budget is used up, or until none of the best one's neighbours is better.

        Args:
            on_trial: called after each trial with the report so far.

        Raises:
            EditError: all trials failed.
        """
        started, earlier = time.perf_counter(), {_key(trial.config): trial for trial in self.trials}
        self.trials, finished = [], True
        unedited: tuple[Predictions, Predictions] | None = None
        slowest = 0.0
        for config in self._candidates():
            trial, begun = earlier.get(_key(config)), time.perf_counter()
            late = trial is None and self.trials and begun - started + slowest > self._seconds
            if late or len(self.trials) >= self._limit:
                finished = False
                break
            if trial is None:
                unedited = unedited or self._measure(progress)
                trial = self._try(config, unedited, progress)
                slowest = max(slowest, time.perf_counter() - begun)
                self._keep(trial)
            self.trials.append(trial)
            progress("tune", len(self.trials), int(min(self._limit, len(self.trials) + 1)))
            on_trial(TuneReport([*self.trials], False))
        report = TuneReport(self.trials, finished)
        if report.best.error:
            raise EditError(f"no trial could be made: {report.best.error}")
        return report

    def _candidates(self) -> Iterator[dict[str, Any]]:
        """Yield the configurations to try; they depend only on the trials so far."""
        fixed = {name: value for name, value in self._common.items() if name != "seed"}
        for start in ({}, *METHODS[self._method].starts):
            if not start.keys() & fixed.keys():
                yield {"method": self._method, **fixed, **start}
        tried = {_key(trial.config) for trial in self.trials}
        while True:
            best = TuneReport(self.trials, False).best
            following = next((c for c in self._neighbours(best) if _key(c) not in tried), None)
            if following is None:
                return
            tried.add(_key(following))
            yield following

    def _neighbours(self, trial: Trial) -> Iterator[dict[str, Any]]:
        """The configurations that differ from a trial's in one value; fields that all trials share stay."""
        plain: dict[str, Any] = json.loads(json.dumps(trial.resolved))
        for name, steps in _STEPS.items():
            if plain.get(name) is not None and name not in self._common and _matters(name, plain):
                for value in steps(plain[name], self._model.topology.n_blocks):
                    yield {**trial.settings, name: value}

    def _try(self, config: dict[str, Any], unedited: tuple[Predictions, Predictions], progress: Progress) -> Trial:
        """Edit and measure; the parameters are restored bit for bit in any case."""
        model, method = self._model, METHODS[self._method]
        options = {name: value for name, value in config.items() if name != "method"}
        started, resolved = time.perf_counter(), {}
        try:
            method_config = method.config(**self._common | options)
            result = method.plan(model, self.edits, method_config, progress=progress).run()
            try:
                seconds, resolved = time.perf_counter() - started, result.config
                if result.interrupted:  # a partial edit (keep_partial) is not a trial
                    raise KeyboardInterrupt
                (written, others), before = self._measure(progress), unedited[1]
            finally:
                put_back(dict(model.network.named_parameters()), result.originals)
        except FastEditError as error:
            return Trial(config, resolved, 0.0, 0.0, 0.0, None, time.perf_counter() - started, str(error))
        metrics = compare(self.edits, others, before).metrics
        ratio = others.perplexity / before.perplexity if others.perplexity and before.perplexity else None
        shares = metrics["generalization"]["teacher_forced"], metrics["first_token"]
        reliability = compare(self.edits, written).metrics["reliability"]["generated"]
        return Trial(config, resolved, reliability, *shares, ratio, seconds)

    def _measure(self, progress: Progress) -> tuple[Predictions, Predictions]:
        """Measure the edits by generation, and what should be preserved by teacher forcing."""
        written = predict(self._model, self.edits, kinds=("rewrite",), progress=progress)
        others = predict(self._model, self.edits, kinds=_OTHERS, generate=False, text=self._text, progress=progress)
        return written, replace(others, head=None)  # KL is not needed

    def _read(self) -> list[Trial]:
        """The trials of the journal. Raises FileError."""
        path = self._journal
        if path is None or not path.exists():
            return []
        try:
            header, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            ours, trials = header == self._about, [Trial(**line) for line in lines]
            what = "other edits, text or options" if header["model"] == self._about["model"] else "another model"
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise FileError(path, f"{{path}} is not a journal of trials ({error}); give a new folder") from None
        if not ours:
            raise FileError(path, f"{{path}} holds trials of {what}; give a new folder")
        return trials

    def _keep(self, trial: Trial) -> None:
        if self._journal is None:
            return
        try:
            self._journal.parent.mkdir(parents=True, exist_ok=True)
            new = not self._journal.exists()
            with self._journal.open("a", encoding="utf-8") as file:
                for line in [self._about] * new + [asdict(trial)]:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise FileError(self._journal, f"{{path}} cannot be written: {error.strerror}") from error


def _times(factor: float, *, whole: bool = False, below: float = math.inf) -> Callable[[Any, int], list[Any]]:
    def steps(value: Any, _: int) -> list[Any]:
        scaled = [] if value == "auto" else [float(f"{value * f:.3g}") for f in (factor, 1 / factor)]
        return [max(1, round(x)) if whole else x for x in scaled if x < below]

    return steps


def _other_blocks(layers: int | list[int], n_blocks: int) -> list[Any]:
    """The same pattern of blocks, a twelfth of the depth higher and lower."""
    patterns = []
    for step in (max(1, n_blocks // 12), -max(1, n_blocks // 12)):
        moved = [layer + step for layer in (layers if isinstance(layers, list) else [layers])]
        if min(moved) >= 0 and max(moved) < n_blocks:
            patterns.append(moved if isinstance(layers, list) else moved[0])
    return patterns


# field -> function from a value to others to try; the most important field comes first
_STEPS: dict[str, Callable[[Any, int], list[Any]]] = {
    "lr": _times(2.0),
    "layer": _other_blocks,
    "layers": _other_blocks,
    "null_space": _times(1.5, below=0.95),
    "cov_weight": _times(4.0),
    "l2": _times(4.0),
    "clamp": _times(2.0),
    "epochs": _times(1.6, whole=True),
    "batch_size": _times(2.0, whole=True),
}


def _matters(name: str, resolved: Mapping[str, Any]) -> bool:
    """Whether a field has an effect in this configuration."""
    if name == "null_space":
        return str(resolved.get("preserve")) in ("null-space", "both")
    if name in ("l2", "cov_weight"):
        return (name == "l2") == (str(resolved.get("objective")) == "null-space")
    return True


def _key(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def _difference(config: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """The fields in which a configuration differs from the base, as text."""
    return ", ".join(f"{name} {value}" for name, value in config.items() if base.get(name) != value)
