"""`fastedit edit --config`: a configuration from a file, and flags that change it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calling import call, fails


@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        (None, [], "config.json: cannot be read: No such file or directory"),
        ("{", [], "config.json: is not JSON"),
        ("[" * 100_000, [], "config.json: is not JSON"),
        ('{"lr": 0.1, "epochs": 2, "lr": 0.2}', [], "config.json: lr given more than once in an object; keep one"),
        ("[1]", [], "config.json: expected an object of fields"),
        ('{"method": 3}', [], "config.json: expected an object of fields"),
        ('{"method": "nonsense"}', [], "config.json: unknown method 'nonsense'"),
        ('{"lrr": 1}', [], "config.json: locft-bf has no field 'lrr'"),
        ('{"lr": -1}', [], "config.json: lr is -1"),
        ('{"method": "memit"}', ["--method", "rome"], "--method rome does not fit"),
        ('{"lr": 0.1}', ["--clamp", "2"], "locft-bf has no field 'clamp'"),
    ],
)
def test_a_configuration_file_that_cannot_be_used(
    model: Path, facts: Path, tmp_path: Path, content: str | None, flags: list[str], said: str
) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    output = tmp_path / "edited"
    assert said in fails(2, "edit", "--model", model, "--requests", facts, "--output", output, "--config", file, *flags)
    assert not output.exists()


def test_a_configuration_file_may_give_layers_that_flags_change(model: Path, facts: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for content, flags, layer in (
        ({"layer": [0, 1]}, [], [0, 1]),
        ({"layer": 1}, [], 1),
        ({"layer": [0, 1]}, ["--layers", "1"], 1),
        ({"layers": [1]}, ["--layers", "0"], 0),
    ):
        file.write_text(json.dumps(content | {"epochs": 1, "lr": 0.01}))
        output = tmp_path / "edited"
        done = call(
            "edit", "--model", model, "--requests", facts, "--output", output, "--no-evaluate", "--delta-only",
            "--config", file, *flags,
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr
        assert json.loads((output / "report.json").read_text())["edit"]["config"]["layer"] == layer
