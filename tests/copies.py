"""Copies of a model: most of what `copy.deepcopy` does for one is the same for the next."""

from __future__ import annotations

import io
import pickle
from copy import deepcopy
from typing import Any

from torch import Tensor


class Copies:
    """A model packed once, without its tensors, which are copied for each copy of the model."""

    def __init__(self, model: Any) -> None:
        file = io.BytesIO()
        packer = _Packer(file)
        packer.dump(model)
        self._packed, self._tensors = file.getvalue(), packer.tensors

    def one(self) -> Any:
        return _Unpacker(self._packed, self._tensors).load()


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: dict[int, Tensor] = {}

    def persistent_id(self, thing: Any) -> int | None:
        if not isinstance(thing, Tensor):
            return None
        self.tensors[id(thing)] = thing
        return id(thing)


class _Unpacker(pickle.Unpickler):
    """Tensors that are one, or share memory, do so in the copy."""

    def __init__(self, packed: bytes, tensors: dict[int, Tensor]) -> None:
        super().__init__(io.BytesIO(packed))
        self._tensors, self._copied = tensors, dict[int, Any]()

    def persistent_load(self, at: int) -> Tensor:
        return deepcopy(self._tensors[at], self._copied)
