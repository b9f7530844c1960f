"""Collect the second moments of all wanted layers of a model in one pass over text.

The published procedure runs the whole model once for every layer, on padded batches. Here all layers are read in one
pass that ends inside the last wanted block, and documents share rows of the model's context without seeing each other.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastedit import parallel
from fastedit.errors import ConfigError, ModelError, RequestError, TensorError
from fastedit.models import Model, Topology, fingerprint, hooked, plain_state
from fastedit.models.forward import run_blocks
from fastedit.models.hooks import Stopped
from fastedit.ops.syrk import LARGEST_VALUE
from fastedit.progress import Progress, no_progress
from fastedit.statistics.documents import DocumentBatch, document_batches
from fastedit.statistics.moment import StreamingCovariance
from fastedit.statistics.store import statistics_path
from fastedit.version import version_of

_ROW = 2048  # most tokens of a row: attention over longer rows costs more than it adds to the statistics
_DIRECTIONS = 64  # leading directions that are compared; at most an eighth of the width


@dataclass(frozen=True)
class Doubling:
    """The change that doubling the tokens made, the largest over all layers.

    `change` is ‖C − C'‖/‖C‖ (Frobenius), where C' is of the first half; `subspace` is the share of C's trace in its
    leading directions that the leading directions of C' miss.
    """

    tokens: int
    change: float
    subspace: float


def _no_report(doubling: Doubling) -> None: ...


def collect(
    model: Model,
    documents: Iterable[str],
    layers: Sequence[int],
    *,
    progress: Progress = no_progress,
    on_doubling: Callable[[Doubling], None] = _no_report,
    **settings: Any,
) -> dict[int, StreamingCovariance]:
    """Collect second moments of a projection's inputs at every token of the documents; runs in the model's dtype.

    Documents longer than a row are cut, and each piece begins with BOS if the tokenizer adds one. Under
    torch.distributed every process takes each n-th document, and all return the same sums.

    Args:
        layers: blocks; one pass serves them all and ends in the last of them.
        progress: called with the stage "covariance" and tokens, before and after each pass.
        on_doubling: called with each comparison of `until_converged`.
        **settings: those of `Collection`.

    Raises:
        ConfigError, ModelError, FileError, RequestError: as for `Collection` and `Collection.run`.
    """
    return Collection(model, layers, **settings).run(documents, progress=progress, on_doubling=on_doubling)


class Collection:
    """A collection of second moments that is ready to begin or to continue; all checks that need no text are done.

    Args:
        layers: blocks; one pass serves them all and ends in the last of them.
        module: the projection, as `Topology.resolve` takes it.
        max_tokens: end with the batch that reaches this; None reads all of the text.
        batch_tokens: tokens per forward pass.
        row_tokens: tokens of a row; None is the model's context, 2,048 at most.
        until_converged: end when doubling the tokens changes C by no more than `tolerance`, but not before there are
            10 times as many tokens as C is wide.
        tolerance: largest `Doubling.change` and `Doubling.subspace`.
        directory: folder for the statistics. A collection of the same model and text that it holds continues where it
            was saved, and ends with the same bits as without the interruption.
        save_seconds: seconds between saves; with `until_converged` it saves at each doubling instead.

    Raises:
        ModelError: no such layer or projection; `directory` holds statistics of another model, or of other settings.
        ConfigError: `until_converged` in several processes, no layers, or numbers out of range.
    """

    @plain_state
    def __init__(
        self,
        model: Model,
        layers: Sequence[int],
        *,
        module: str = "down_proj",
        max_tokens: int | None = None,
        batch_tokens: int = 8192,
        row_tokens: int | None = None,
        until_converged: bool = False,
        tolerance: tuple[float, float] = (0.02, 0.01),
        directory: str | Path | None = None,
        save_seconds: float = 300.0,
    ) -> None:
        topology = model.topology
        self._rank, self._world = parallel.rank(), parallel.world()
        row = min(topology.context_length, row_tokens or _ROW)
        if not layers or batch_tokens < 1 or row < 2 or (max_tokens is not None and max_tokens < 1):
            raise ConfigError(
                "collect needs at least one layer, and at least one token a batch, two a row and one in all"
            )
        if until_converged and self._world > 1:
            raise ConfigError(
                f"until_converged compares in one process, these are {self._world}; give max_tokens instead"
            )
        self._model, self._layers, self._max_tokens = model, sorted(set(layers)), max_tokens
        self._tolerance = tolerance if until_converged else None
        self._save_seconds = save_seconds
        self._settings: dict[str, Any] = {
            "fingerprint": fingerprint(topology.model),
            "module": module,
            "dtype": str(next(topology.backbone.parameters()).dtype).removeprefix("torch."),
            "batch_tokens": batch_tokens,
            "row_tokens": row,
            "processes": self._world,
        }
        self._whole = None if directory is None else Path(directory)
        self._moments = self._begin(self._whole)
        # with several processes, the folder holds sums only after all of them have finished
        self._finished = self._world > 1 and all(moment.count for moment in self._moments.values())
        self._part = self._whole
        if self._finished:
            _check_finished(self._moments, max_tokens, self._whole)
        elif self._world > 1:
            self._part = None if self._whole is None else self._whole / f"part-{self._rank}-of-{self._world}"
            self._moments = self._begin(self._part)

    def _begin(self, directory: Path | None) -> dict[int, StreamingCovariance]:
        return {layer: _start(self._model.topology, layer, self._settings, directory) for layer in self._layers}

    @plain_state
    @parallel.together()
    @torch.no_grad()
    def run(
        self,
        documents: Iterable[str],
        *,
        progress: Progress = no_progress,
        on_doubling: Callable[[Doubling], None] = _no_report,
    ) -> dict[int, StreamingCovariance]:
        """Read the documents; the arguments are those of `collect`.

        Raises:
            ModelError: a key is not finite (names layer and document); the statistics were begun with another text.
                Saved files stay as they were.
            RequestError: the text has no tokens. FileError: the statistics cannot be saved.
        """
        if self._finished:
            return self._moments
        world, topology = self._world, self._model.topology
        share = None if self._max_tokens is None else -(-self._max_tokens // world)
        run = _Run(topology, self._moments, self._part, share, self._save_seconds, progress)
        own = itertools.islice(documents, self._rank, None, world)
        batches = document_batches(self._model, own, self._settings["batch_tokens"], self._settings["row_tokens"])
        if self._tolerance:
            run.until_converged(batches, self._tolerance, on_doubling)
        else:
            run.all(batches)
        if world > 1:
            self._sum_up()
        if not all(moment.count for moment in self._moments.values()):
            raise RequestError("the text has no tokens; give documents that are not empty")
        return self._moments

    def _sum_up(self) -> None:
        """Sum over all processes, write the result, and remove their partial files."""
        topology, module = self._model.topology, self._settings["module"]
        for layer, moment in self._moments.items():
            parallel.gathered(None)  # raises if another process has failed
            moment.all_reduce()
            if self._whole is not None and self._rank == 0:
                moment.save(statistics_path(topology, self._whole, layer, module))
        parallel.gathered(None)
        if (folder := self._part) is not None and folder.is_dir():
            for layer in self._layers:
                statistics_path(topology, folder, layer, module).unlink(missing_ok=True)
            folder.rmdir()


class _Run:
    """The pass over the text: each accumulator takes, in order, the batches that it has not seen."""

    def __init__(
        self,
        topology: Topology,
        moments: dict[int, StreamingCovariance],
        directory: Path | None,
        max_tokens: int | None,
        save_seconds: float,
        progress: Progress,
    ) -> None:
        self.topology, self.moments, self.directory = topology, moments, directory
        self.max_tokens, self.save_seconds, self.progress = max_tokens, save_seconds, progress
        self.module = next(iter(moments.values())).metadata["module"]
        self.saved = {layer: moment.count for layer, moment in moments.items()}

    @property
    def count(self) -> int:
        """Tokens that all accumulators have seen."""
        return min(moment.count for moment in self.moments.values())

    def all(self, batches: Iterator[DocumentBatch]) -> None:
        last = time.monotonic()
        for _ in self._steps(batches):
            if time.monotonic() - last > self.save_seconds:
                self.save()
                last = time.monotonic()
        self.save()

    def until_converged(
        self, batches: Iterator[DocumentBatch], tolerance: tuple[float, float], report: Callable[[Doubling], None]
    ) -> None:
        """Compare at each doubling of the tokens, and save there: these sums are the next first half."""
        widest = max(moment.dim for moment in self.moments.values())
        if all(moment.metadata.get("converged") for moment in self.moments.values()):
            self.max_tokens = min(self.max_tokens or self.count, self.count)
        half, half_means = self.count, self._means() if self.count else {}
        for _ in self._steps(batches):
            if not half and self.count >= widest:  # the first C that is worth comparing
                half, half_means = self.count, self._means()
            elif half and self.count >= 2 * half:
                means = self._means()
                doubling = self._known() or Doubling(self.count, *_difference(half_means, means))
                report(doubling)
                half, half_means = self.count, means
                small = doubling.change <= tolerance[0] and doubling.subspace <= tolerance[1]
                converged = small and self.count >= 10 * widest
                for moment in self.moments.values():
                    earlier = [d for d in moment.metadata.get("doublings", []) if d["tokens"] < self.count]
                    moment.metadata |= {"doublings": [*earlier, asdict(doubling)], "converged": converged}
                self.save()
                if converged:
                    return
        self.save()

    def _known(self) -> Doubling | None:
        """The result for this doubling, if a run was cut off while it saved it: its first layers already have it."""
        doublings = (d for moment in self.moments.values() for d in moment.metadata.get("doublings", []))
        return next((Doubling(**d) for d in doublings if d["tokens"] == self.count), None)

    def save(self) -> None:
        """Write the sums that changed since they were last written."""
        if self.directory is not None:
            for layer, moment in self.moments.items():
                if moment.count != self.saved[layer]:
                    moment.save(statistics_path(self.topology, self.directory, layer, self.module))
                    self.saved[layer] = moment.count

    def _means(self) -> dict[int, Tensor]:
        return {layer: moment.finalize() for layer, moment in self.moments.items()}

    def _steps(self, batches: Iterator[DocumentBatch]) -> Iterator[None]:
        """Run the batches in order; batches that an accumulator had seen when it was saved are checked and skipped."""
        n_batches = 0
        for batch in batches:
            n_batches = batch.number + 1
            lacking = []
            for layer, moment in self.moments.items():
                position = moment.metadata["position"]
                if batch.number == 0 and position["first"] not in ("", batch.digest):
                    self._refuse(layer, "text or tokenizer")
                if batch.number == position["batches"] - 1 and position["digest"] != batch.digest:
                    self._refuse(layer, "text from some document on, or tokenizer")
                if batch.number >= position["batches"]:
                    lacking.append(layer)
            if self.max_tokens is not None and self.count >= self.max_tokens:
                return
            if lacking:
                self._report()
                self._observe(batch, lacking)
                self._report()
                yield
        for layer, moment in self.moments.items():
            if moment.metadata["position"]["batches"] > n_batches:
                self._refuse(layer, "text, which is longer")

    def _report(self) -> None:
        self.progress("covariance", self.count, max(self.max_tokens or 0, self.count))

    def _observe(self, batch: DocumentBatch, layers: Sequence[int]) -> None:
        """Run a forward pass that adds the inputs of the layers' projections."""
        topology, last = self.topology, layers[-1]
        rows = batch.rows.to(topology.device)
        tokens, n = batch.rows.token_rows, rows.index.numel()
        mask = None
        if len(tokens) < n:
            mask = torch.zeros(n, dtype=torch.bool).index_fill_(0, tokens, True).to(topology.device)

        def hook_of(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                keys: Tensor = args[0]
                flat, moment = keys.reshape(-1, keys.shape[-1]).to(topology.device), self.moments[layer]
                flat = flat.float() if flat.dtype == torch.float64 else flat  # the sums are fp64 anyway
                try:
                    moment.update(flat, mask)
                except TensorError as error:
                    if place := _place(batch, flat):
                        error.at(place)
                    error.at(f"layer {layer} {self.module}")
                    raise
                if layer == last:
                    raise Stopped(keys)

            return hook

        projections = ((layer, topology.resolve(layer, self.module)[1]) for layer in layers)
        with hooked(module.register_forward_pre_hook(hook_of(layer)) for layer, module in projections):
            run_blocks(topology, rows, 0, None)
        for layer in layers:
            metadata = self.moments[layer].metadata
            first = metadata["position"]["first"] or batch.digest
            metadata["position"] = {"batches": batch.number + 1, "digest": batch.digest, "first": first}
            metadata["documents"] = batch.documents

    def _refuse(self, layer: int, what: str) -> None:
        raise ModelError(
            f"{self.directory} holds statistics of layer {layer} from another {what}; give another folder, or the "
            "text that they were begun with"
        )


def _start(topology: Topology, layer: int, settings: dict[str, Any], directory: Path | None) -> StreamingCovariance:
    """An empty accumulator, or the saved one to continue with. Raises ModelError if that does not fit this run."""
    module = settings["module"]
    width = topology.input_width(layer, module)
    path = None if directory is None else statistics_path(topology, directory, layer, module)
    position = {"batches": 0, "digest": "", "first": ""}
    fresh = {**settings, "layer": layer, "fastedit": version_of("fastedit"), "position": position}
    if path is None or not path.exists():
        return StreamingCovariance(width, device=topology.device, metadata=fresh)
    moment = StreamingCovariance.load(path, device=topology.device)
    for name in (*settings, "layer"):
        if moment.metadata.get(name) != fresh[name]:
            raise ModelError(
                f"{path} has {name} {moment.metadata.get(name)}, this run has {fresh[name]}; give another folder, or "
                "delete the file"
            )
    if moment.dim != width or moment.stored != torch.float64:
        raise ModelError(f"{path} is not from an interrupted run of this model; give another folder, or delete it")
    return moment


def _check_finished(moments: dict[int, StreamingCovariance], max_tokens: int | None, directory: Path | None) -> None:
    count = min(moment.count for moment in moments.values())
    if count < (max_tokens or 0):
        raise ModelError(
            f"{directory} holds sums that several processes made, of {count} tokens; no run can continue from them; "
            "give another folder"
        )


def _place(batch: DocumentBatch, flat: Tensor) -> str:
    """The document of the first key that is not finite; all documents of its row, since such values spread there."""
    positions, width = batch.rows.target_rows, batch.rows.index.shape[1]
    bad = ~(torch.linalg.vector_norm(flat, torch.inf, dim=1) <= LARGEST_VALUE).cpu()[positions]
    if not bad.any():
        return ""
    row = positions[bad.nonzero()[0]] // width
    owners = batch.owners[batch.rows.sample_of[positions // width == row]].unique().tolist()
    return f"document {', '.join(map(str, owners))} (counted from 0{', in one row' if len(owners) > 1 else ''})"


def _difference(halves: dict[int, Tensor], means: dict[int, Tensor]) -> tuple[float, float]:
    changes, missed = [], []
    for layer, C in means.items():
        before = halves[layer]
        changes.append(float((C - before).norm() / C.norm()))
        rank = max(1, min(_DIRECTIONS, len(C) // 8))
        leading, leading_before = _leading(C, rank), _leading(before, rank)
        trace, trace_before = (float(((C @ basis) * basis).sum()) for basis in (leading, leading_before))
        missed.append(max(0.0, 1 - trace_before / trace))
    return max(changes), max(missed)


def _leading(C: Tensor, rank: int) -> Tensor:
    """An orthonormal basis [d, rank] of approximately the leading eigenvectors, by subspace iteration."""
    start = torch.randn(len(C), rank, generator=torch.Generator().manual_seed(0), dtype=C.dtype)
    basis: Tensor = torch.linalg.qr(start.to(C.device))[0]
    for _ in range(8):
        basis = torch.linalg.qr(C @ basis)[0]
    return basis
