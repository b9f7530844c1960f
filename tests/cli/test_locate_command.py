"""`fastedit locate`: the places that it tries, under the new spelling and the old one."""

from __future__ import annotations

import json
from pathlib import Path

from calling import fails, works


def test_locate_tries_the_places_it_is_told(model: Path, facts: Path, tmp_path: Path) -> None:
    picture, saved = tmp_path / "heat.png", tmp_path / "located.json"
    common = ("locate", "--model", model, "--requests", facts, "--sample", 2, "--epochs", 1)
    files = ("--picture", picture, "--json", saved, "--capability", facts)
    result = works(*common, "--blocks", "0,1-2", "--modules", "down_proj,up_proj", "--lr", 1e-3, *files)
    cells = json.loads(saved.read_text())["cells"]
    places = [(cell["block"], cell["module"]) for cell in cells]
    assert places == [(block, module) for block in range(3) for module in ("down_proj", "up_proj")]
    assert {cell["lr"] for cell in cells} == {1e-3}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(saved.read_text())["before"]["accuracy"] is not None
    assert "up_proj" in result.stdout
    assert "blocks 0 to 2" in fails(2, *common, "--blocks", "2-3")
    assert "expected numbers and ranges" in fails(2, *common, "--blocks", "3-1")


def test_an_old_spelling_works_and_says_so(model: Path, facts: Path, tmp_path: Path) -> None:
    saved = tmp_path / "located.json"
    common = ("locate", "--model", model, "--requests", facts, "--sample", 2, "--epochs", 1, "--json", saved)
    old = works(*common, "--blocks", "1")
    assert "--blocks is an old spelling of --layers" in old.stderr
    assert "--blocks" not in works("locate", "--help").stdout
    of_old = json.loads(saved.read_text())["cells"]
    assert not works(*common, "--layers", "1").stderr
    assert [c["block"] for c in json.loads(saved.read_text())["cells"]] == [c["block"] for c in of_old] == [1]
