"""How the tests lie: what several of them share is in modules that are no tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MODULES = sorted(TESTS.rglob("*.py"))


def imported(module: Path) -> Iterator[str]:
    """Every part of every name that a module imports, in functions too."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            for name in names if isinstance(node, ast.Import) else [node.module or "", *names]:
                yield from name.split(".")


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_no_module_imports_a_test_or_conftest(module: Path) -> None:
    tests = {path.stem for path in MODULES if path.stem.startswith("test_")}
    assert not {*imported(module)} & {*tests, "conftest"}


def test_every_module_has_a_name_of_its_own() -> None:
    """Their folders are no packages: all of them stand beside one another on sys.path.

    A conftest has none, since pytest loads it for its folder and nothing imports it.
    """
    names = [path.stem for path in MODULES if path.stem != "conftest"]
    assert sorted(set(names)) == sorted(names)
