"""The house: imports point down only, also those for types, and none of them runs in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# from the ground up; a place may import what stands on its own floor or below
FLOORS = [
    ["fastedit.kernels"],
    ["fastedit.errors", "fastedit.progress", "fastedit.version"],
    ["fastedit.files", "fastedit.configs", "fastedit.tensorfile", "fastedit.parallel"],
    ["fastedit.ops"],
    ["fastedit.weights", "fastedit.models", "fastedit.undo"],
    ["fastedit.statistics"],
    ["fastedit.methods"],
    ["fastedit.requests", "fastedit.delta", "fastedit.compose", "fastedit.directions"],
    ["fastedit.evaluation", "fastedit.loading", "fastedit.saving", "fastedit.checkpoints"],
    ["fastedit.results", "fastedit.planning"],
    ["fastedit.editor"],
    ["fastedit.compat", "fastedit.ledger"],
    ["fastedit.demo"],
    ["fastedit.cli"],
]
FACES = {"fastedit", "fastedit.__main__"}  # hand names on


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "fastedit").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Modules of this package that a module names, inside functions and for types too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "fastedit":
                yield name if name in MODULES else name.rpartition(".")[0]


def floor(module: str) -> int:
    found = [i for i, places in enumerate(FLOORS) for place in places if f"{module}.".startswith(f"{place}.")]
    assert len(found) == 1, f"{module} has no floor: give it one in {Path(__file__).name}"
    return found[0]


@pytest.mark.parametrize("module", [m for m in MODULES if m not in FACES])
def test_imports_point_down(module: str) -> None:
    above = [name for name in imports(MODULES[module]) if name in FACES or floor(name) > floor(module)]
    assert not above


def test_no_imports_run_in_a_circle() -> None:
    edges = {module: set(imports(path)) - {module} for module, path in MODULES.items() if module not in FACES}
    edges = {module: {name for name in named if name in edges} for module, named in edges.items()}
    while loose := [module for module, named in edges.items() if not named & edges.keys()]:
        for module in loose:
            del edges[module]
    assert not edges, f"circles among {sorted(edges)}"


def test_methods_share_what_lies_beside_them_and_nothing_of_each_other() -> None:
    folders = {path.parent.name for path in (ROOT / "fastedit/methods").glob("*/__init__.py")}
    assert {"locft_bf", "locate_then_edit"} <= folders
    for module, path in MODULES.items():
        if module.startswith("fastedit.methods."):
            own, *theirs = (
                name.split(".")[2:3] for name in (module, *imports(path)) if name.startswith("fastedit.methods.")
            )
            assert all(name == own for name in theirs if name[0] in folders), f"{module} imports {theirs}"


def test_kernels_know_nothing_above_them() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        assert set(imports(path)) <= {"fastedit.kernels"}


@pytest.mark.parametrize("module", ["fastedit.cli", "fastedit.methods"])
def test_what_only_names_things_takes_no_torch(module: str) -> None:
    script = f"import sys, {module}; print(*{{'torch', 'transformers', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
