"""Help: of every command and every field, quick, and whatever backend is asked for."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest
from calling import fails, works

from fastedit import Editor, cli, methods
from fastedit.configs import option
from fastedit.methods import LocFTBFConfig


def test_every_field_of_a_config_is_a_flag_with_its_help(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = works("edit", "--help", COLUMNS="200").stdout
    for field in fields(LocFTBFConfig):
        assert f"--{field.name.replace('_', '-').replace('layer', 'layers')} " in text
    text = " ".join(text.split())
    assert "a batch whose loss is below does no backward pass" in text
    assert "α that stabilizes equality. By default 0 for rome and 0.1 for the others." in text
    assert "The same command again continues from there, and ends" in text  # as one line, whatever the source has

    seen = []

    @dataclass(frozen=True)
    class Toy:
        """A method to come."""

        seed: int = option(0, "of everything.")
        layers: tuple[int, ...] = option((1, 2), "the blocks that it edits.")
        mode: Literal["a", "b"] = "a"
        fast: bool | None = option(None, "does less.", unset="True")

    class ToyMethod(methods.Method):
        def plan(self, model: Any, edits: Any, config: Any, **_: Any) -> Any:
            seen.append(config)
            raise KeyboardInterrupt

    monkeypatch.setitem(methods.METHODS, "toy", ToyMethod(Toy, ""))
    monkeypatch.setattr(cli, "app", cli.make_app())
    help_text = " ".join(works("edit", "--help", COLUMNS="200").stdout.split())
    assert "the blocks that it edits. (default (1, 2)) Such as 4-8 or" in help_text
    assert "does less. By default True." in help_text
    common = ("edit", "--model", model, "--requests", facts, "--output", tmp_path / "o", "--no-evaluate")
    fails(1, *common, "--method", "toy", "--layers", "0,2-3", "--mode", "b", "--no-fast")
    fails(1, *common, "--method", "toy")
    assert seen == [Toy(layers=(0, 2, 3), mode="b", fast=False), Toy()]
    assert "expected INT,…, got '1,x'" in fails(2, *common, "--method", "toy", "--layers", "1,x")
    assert "expected a|b, got 'c'" in fails(2, *common, "--method", "toy", "--mode", "c")
    assert "toy has no field 'lr'" in fails(2, *common, "--method", "toy", "--lr", "1")


COMMANDS: dict[str, tuple[str, ...]] = {
    "edit": ("--model", "./m", "--requests", "./r", "--output", "./o"),
    "evaluate": ("--model", "./m", "--requests", "./r"),
    "check": ("--model", "./m", "--requests", "./r"),
    "locate": ("--model", "./m", "--requests", "./r"),
    "covariance": ("./m", "--text", "./t", "--layers", "1"),
    "check-model": ("./m",),
    "demo": (),
    "env": (),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_backend_is_told_first_by_every_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Editor, "from_pretrained", None)
    said = fails(2, command, *COMMANDS[command], FASTEDIT_BACKEND="nonsense")
    assert "FASTEDIT_BACKEND=nonsense: there is no such backend; set one of auto" in said
    works(command, "--help", FASTEDIT_BACKEND="nonsense")


@pytest.mark.parametrize("command", ["edit", "evaluate", "check", "demo", "locate", "check-model", "env"])
def test_help_shows_an_example(command: str) -> None:
    assert f"Example: fastedit {command}" in works(command, "--help").stdout


@pytest.mark.parametrize("command", ["--help", *COMMANDS])
def test_help_is_quick(command: str) -> None:
    """Without torch, transformers and pydantic; half a second of a processor for the command itself."""
    arguments = [command] if command == "--help" else [command, "--help"]
    script = (
        "import sys, time\nstart = time.process_time()\nimport fastedit.cli\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try:\n    fastedit.cli.main()\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "    print(time.process_time() - start, heavy, file=sys.stderr)"
    )
    spent = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        seconds, heavy = done.stderr.split(maxsplit=1)
        assert heavy.strip() == "set()"
        spent.append(float(seconds))
        if spent[-1] < 0.5:
            break
    assert min(spent) < 0.5, spent  # 0.35 s on a machine without other work
