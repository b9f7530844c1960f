"""Text that a model writes itself, and second moments from it: statistics that need nothing but the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastedit import parallel
from fastedit.errors import FileError, ModelError
from fastedit.models import Model, generate_by, plain_state, sampling
from fastedit.models.generation import NOT_FINITE
from fastedit.models.hooks import eval_mode
from fastedit.models.tokens import prompt_tokens
from fastedit.progress import Progress, no_progress
from fastedit.statistics.collect import collect
from fastedit.statistics.store import StatisticsStore, statistics_path, user_directory

log = logging.getLogger(__name__)

_OPENINGS = ("The", "In", "A", "I", "It", "What", "How", "She", "This", "For", "When", "You", "1", "If", "And", "To")
_LENGTH, _ROWS = 128, 64  # tokens of a text, texts that are written at once
_TOKENS = 4  # tokens for each input dimension of the projection


def own_text_directory(fingerprint: str) -> Path:
    """The folder in the user's cache for statistics of a model's own text, separate from those of real text."""
    return user_directory(fingerprint) / "own-text"


@dataclass(frozen=True)
class OwnText:
    """Second moments of text that a model writes itself, made when they are first needed.

    Attributes:
        fingerprint: fingerprint of the unedited model.
        module: the projection with these inputs, as `Topology.resolve` takes it.
    """

    model: Model
    fingerprint: str
    module: str

    def missing(self, layers: Sequence[int]) -> list[int]:
        """The layers without kept statistics."""
        missing = []
        for layer in layers:
            try:
                self._kept.require([layer])
            except ModelError:  # a damaged file counts as none
                missing.append(layer)
        return missing

    def statistics(self, layers: Sequence[int], progress: Progress = no_progress) -> StatisticsStore:
        """The statistics of these layers. Missing ones are made, and kept in the user's cache if it can be written.

        Raises:
            ModelError: the model computes NaN or infinity.
        """
        in_memory: dict[str, Tensor] = {}
        missing = parallel.of_first(lambda: self.missing(layers))
        if missing:
            topology = self.model.topology
            tokens = _TOKENS * max(topology.input_width(layer, self.module) for layer in missing)
            texts = write_text(self.model, tokens)
            report: Progress = lambda stage, done, _, loss=None: progress(stage, min(done, tokens), tokens, loss)  # noqa: E731
            moments = collect(self.model, texts, missing, module=self.module, progress=report)
            for layer, moment in moments.items():
                if parallel.world() > 1:  # the others need not wait for the first one's file
                    in_memory[topology.resolve(layer, self.module)[0]] = moment.finalize()
                if not parallel.first():
                    continue
                try:
                    moment.save(statistics_path(topology, str(self._kept.directory), layer, self.module))
                except FileError as error:
                    in_memory[topology.resolve(layer, self.module)[0]] = moment.finalize()
                    log.info("the statistics of layer %d are not kept: %s", layer, error)
        return replace(self._kept, given=in_memory)

    @property
    def _kept(self) -> StatisticsStore:
        return StatisticsStore(self.model.topology, self.fingerprint, self.module, own_text_directory(self.fingerprint))


@plain_state
@torch.no_grad()
def write_text(model: Model, n_tokens: int, *, seed: int = 0) -> list[str]:
    """Sample texts from the model's whole distribution, with `n_tokens` tokens in all, or a few more.

    They are reproducible from `seed`; the caller's random state does not change.

    Raises:
        ModelError: the model computes NaN or infinity.
    """
    network: Any = model.network
    tokenizer, device = model.tokenizer, model.device
    starts = prompt_tokens(tokenizer, _OPENINGS)
    prompt_length = min(map(len, starts))
    length = min(_LENGTH, model.topology.context_length) - prompt_length
    rows = torch.tensor([ids[:prompt_length] for ids in starts], device=device)
    with eval_mode(network):
        logits = network(input_ids=rows, use_cache=False).logits[:, -1]
    if not logits.isfinite().all():  # sampling from these could abort the process
        raise ModelError(NOT_FINITE)
    n_texts = -(-n_tokens // (prompt_length + length))
    config = sampling(tokenizer, length)
    texts: list[str] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for select in torch.arange(n_texts, device=device).split(_ROWS):
            generated = generate_by(network, config, rows[select % len(rows)])
            texts += tokenizer.batch_decode(generated, skip_special_tokens=True)
    return texts
