"""Keep the measures of an unedited model in the user's cache, for the next edit of the same requests."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from fastedit import parallel
from fastedit.errors import FileError
from fastedit.evaluation.first_token import Head
from fastedit.evaluation.predict import Prediction, Predictions, predict
from fastedit.evaluation.questions import KINDS
from fastedit.models import Model, fingerprint, stored
from fastedit.progress import Progress, no_progress
from fastedit.requests import EditRequest
from fastedit.statistics.store import user_directory
from fastedit.tensorfile import checksums, load_tensors, save_tensors
from fastedit.version import version_of

log = logging.getLogger(__name__)

_TAG = "fastedit-predictions-2"
_WHAT = "the measures of an unedited model"
_MOST_BYTES = 2**28  # bytes of a file, at most
_FILES = 8  # files per model; the oldest are deleted
_PLAIN = tuple(f.name for f in fields(Prediction) if f.name != "first")


def predict_unedited(
    model: Model,
    edits: Sequence[EditRequest],
    *,
    generate: bool = True,
    kinds: Sequence[str] = KINDS,
    text: Sequence[str] = (),
    keep_head: bool = False,
    progress: Progress = no_progress,
) -> Predictions:
    """Measure a model as `predict` does, or take the result from the user's cache if it is there.

    The key of a file covers every bit of the weights, the configuration, the tokenizer, the questions and the text, and
    the device and versions, which decide how sums round. If a file cannot be read, the model is measured again and the
    file replaced; if it cannot be written, nothing is kept.

    Raises:
        RequestError, EditError: as for `predict`.
    """
    options: dict[str, Any] = {"generate": generate, "kinds": tuple(kinds), "text": text}
    folder = user_directory(fingerprint(model.network)) / "measured"

    def known() -> tuple[Path, tuple[list[dict[str, list[Prediction]]], float | None] | None]:
        path = folder / f"{_key(model, edits, options)}.safetensors"
        try:
            return path, _load(path)
        except FileError:
            return path, None

    path, measured = parallel.of_first(known)
    if measured is None:
        predictions = predict(model, edits, **options, keep_head=keep_head, progress=progress)
        parallel.of_first(lambda: _save(path, predictions))
        return predictions
    log.info("the unedited model was measured before: %s", path)
    with suppress(OSError):
        path.touch()  # so that it is deleted last
    answers, perplexity = measured
    neighbours = any(by_kind["neighbour"] for by_kind in answers)
    head = Head(model.topology, keep=keep_head) if neighbours else None
    return Predictions(answers, perplexity, head, model.chat is not None)


def _key(model: Model, edits: Sequence[EditRequest], options: dict[str, Any]) -> str:
    network, tokenizer = model.network, model.tokenizer
    config: Any = model.topology.config
    backend = getattr(tokenizer, "backend_tokenizer", None)
    generation_config: Any = getattr(network, "generation_config", None)
    identity = [
        _TAG,
        {**config.to_dict(), "_name_or_path": None},
        config._attn_implementation,
        [checksums({name: values}) for name, values in stored(network)],
        checksums(dict(network.named_buffers())),
        backend.to_str() if backend is not None else tokenizer.get_vocab(),
        [tokenizer.eos_token_id, getattr(generation_config, "eos_token_id", None), model.chat],
        [asdict(request) for request in edits],
        options,
        [torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type],
        [version_of(name) for name in ("torch", "transformers", "fastedit")],
    ]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _save(path: Path, predictions: Predictions) -> None:
    groups = [answers[kind] for answers in predictions.answers for kind in KINDS]
    firsts = {
        id(p.first): p.first for group in groups for p in group if p.first is not None
    }  # equal questions share it
    places = {key: place for place, key in enumerate(firsts)}
    rows = [[[*(getattr(p, name) for name in _PLAIN), places.get(id(p.first))] for p in group] for group in groups]
    content = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8)
    tensors = {"answers": content} | ({"first": torch.stack([*firsts.values()])} if firsts else {})
    if sum(tensor.nbytes for tensor in tensors.values()) > _MOST_BYTES:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, tensors, _TAG, {"perplexity": predictions.perplexity}, _WHAT)
        for old in sorted(path.parent.glob("*.safetensors"), key=lambda p: -p.stat().st_mtime)[_FILES:]:
            old.unlink(missing_ok=True)
    except (OSError, FileError) as error:
        log.info("the measures of the unedited model are not kept: %s", error)


def _load(path: Path) -> tuple[list[dict[str, list[Prediction]]], float | None]:
    """Load the answers and the perplexity. Raises FileError if there is no file, or if it is damaged."""
    tensors, metadata, _ = load_tensors(path, (_TAG,), _WHAT)
    first = [*tensors.get("first", ())]

    def prediction(row: list[Any]) -> Prediction:
        *plain, place = row
        plain = [tuple(value) if isinstance(value, list) else value for value in plain]
        return Prediction(**dict(zip(_PLAIN, plain, strict=True)), first=None if place is None else first[place])

    rows = json.loads(tensors["answers"].numpy().tobytes())
    predictions = [[prediction(row) for row in group] for group in rows]
    n = len(KINDS)
    answers = [dict(zip(KINDS, predictions[i : i + n], strict=True)) for i in range(0, len(predictions), n)]
    return answers, metadata["perplexity"]
