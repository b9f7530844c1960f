"""Stand-ins of the packages that ours serves: their registry, and the loop of their editor."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

EASYEDITOR = {
    "easyeditor/__init__.py": """
from types import SimpleNamespace
from .editors.editor import BaseEditor
HPARAMS = {}
class MEMITHyperParams:
    @staticmethod
    def from_hparams(path):
        return SimpleNamespace(**HPARAMS)
""",
    "easyeditor/util/__init__.py": "",
    "easyeditor/editors/__init__.py": "",
    "easyeditor/util/alg_dict.py": """
def rome(*args, **kwargs): raise AssertionError("theirs")
def ft(model, tok, requests, hparams, copy=False, return_orig_weights=False, keep_original_weight=False, **kwargs):
    return "theirs", (requests, copy, return_orig_weights)
ALG_DICT = {"ROME": rome, "R-ROME": rome, "MEMIT": rome, "EMMET": rome, "AlphaEdit": rome, "FT": ft, "KN": rome}
""",
    "easyeditor/editors/batch_editor.py": """
from enum import Enum
class BatchEditor(Enum):
    MEMIT = "MEMIT"
    FT = "FT"
    @staticmethod
    def is_batchable_method(alg_name):
        return alg_name in ("MEMIT", "FT")
""",
    "easyeditor/editors/editor.py": """
import torch
from ..util.alg_dict import *
from .batch_editor import BatchEditor
class BaseEditor:
    @classmethod
    def from_hparams(cls, hparams):
        return cls(hparams)
    def __init__(self, hparams):
        self.apply_algo, self.alg_name, self.hparams = ALG_DICT[hparams.alg_name], hparams.alg_name, hparams
        self.model, self.tok = hparams.model_name
    def edit(self, prompts, target_new, subject=None, sequential_edit=False):
        return self.edit_requests(self.requests(prompts, target_new, subject), sequential_edit)
    def requests(self, prompts, target_new, subject):
        found = [{"prompt": p, "target_new": t, "ground_truth": None} for p, t in zip(prompts, target_new)]
        for request, words in zip(found, subject or ()):
            request["subject"] = words
        return found
    def restore(self, weights):
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name][...] = value
    def edit_requests(self, requests, sequential_edit=False):
        assert self.hparams.batch_size == 1
        for request in requests:
            model, weights = self.apply_algo(self.model, self.tok, [request], self.hparams, copy=False,
                return_orig_weights=True, keep_original_weight=False, train_ds=None)
            if not sequential_edit:
                self.restore(weights)
        return [], model, weights
    def batch_edit(self, prompts, target_new, subject=None, sequential_edit=False):
        requests = self.requests(prompts, target_new, subject)
        assert BatchEditor.is_batchable_method(self.alg_name)
        for first in range(0, len(requests), self.hparams.batch_size):
            chunk = requests[first : first + self.hparams.batch_size]
            model, weights = self.apply_algo(self.model, self.tok, chunk, self.hparams, copy=False,
                return_orig_weights=True)
            if not sequential_edit:
                self.restore(weights)
        return [], model, weights
""",
}
"""EasyEdit: path of a file -> its text."""
_HPARAMS = """
from types import SimpleNamespace
HPARAMS = {{}}
class {name}HyperParams:
    @staticmethod
    def from_json(path):
        return SimpleNamespace(**HPARAMS)
def apply_{name}_to_model(model, tok, requests, hparams, **options):
    return model, options.get("cache_c", {{}})
"""
OTHERS = {
    "memit/__init__.py": _HPARAMS.format(name="MEMIT") + "apply_memit_to_model = apply_MEMIT_to_model\n",
    "AlphaEdit/__init__.py": _HPARAMS.format(name="AlphaEdit"),
}
"""memit and AlphaEdit."""


@contextmanager
def standing_in(files: Mapping[str, str], folder: Path) -> Iterator[None]:
    """In which these packages can be imported."""
    packages = {name.partition("/")[0] for name in files}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
            del sys.modules[name]
