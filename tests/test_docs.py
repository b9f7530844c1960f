"""References of the pages are there: names in the API pages, files that links name."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md", *(ROOT / "docs" / "pages").rglob("*.md")]
NAMES = [
    name
    for page in sorted((ROOT / "docs" / "pages" / "api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
]


@pytest.mark.parametrize("name", NAMES)
def test_api_pages_name_what_can_be_imported(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    try:
        import_module(name)
    except ModuleNotFoundError:
        assert hasattr(import_module(module), attribute)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles]


@pytest.mark.parametrize("path", sorted((ROOT / "fastedit").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_sections_of_errors_begin_with_their_names(path: Path) -> None:
    """Or the API reference cannot be built: its first line is "Name, Name: when"."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    for docstring in filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))):
        for section in re.findall(r"^Raises:\n((?:    .*\n?)+)", docstring, re.MULTILINE):
            for line in (line for line in section.splitlines() if re.match(r" {4}\S", line)):
                assert re.match(r"    \w+(, \w+)*: ", line), line
