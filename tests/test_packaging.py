"""The promises of an installation: its version and extras, a light import, a word where something is in its way."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import fastedit
from fastedit import __main__ as command
from fastedit.version import DISTRIBUTION, version_of

ROOT = Path(__file__).parents[1]
PICTURES = ("fastedit.evaluation.heatmap", "fastedit.evaluation.front_plot")
EXTRAS = ("typer", "rich", "matplotlib")


def python(*code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *code], cwd=folder, capture_output=True, text=True)


def test_version_is_that_of_the_installed_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    assert version_of("pytest") == pytest.__version__
    assert version_of("no-such-distribution") == "unknown"
    assert version_of("no-such-distribution", "none") == "none"
    monkeypatch.setattr(metadata, "version", {DISTRIBUTION: "1.2.3", "fastedit": "0.7.0"}.__getitem__)
    assert fastedit.__version__ == version_of("fastedit") == "1.2.3"


def test_what_messages_tell_to_install_is_there() -> None:
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["name"] == DISTRIBUTION
    assert set(EXTRAS) == command._EXTRAS.keys()
    for package, extra in command._EXTRAS.items():
        assert any(x.startswith(f"{package}>=") for x in project["optional-dependencies"][extra])
        assert not any(x.startswith(package) for x in project["dependencies"])
    module, _, function = project["scripts"]["fastedit"].partition(":")
    assert (module, function) == (command.__name__, command.main.__name__)


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_the_command_says_what_to_install(missing: str) -> None:
    hide = (
        f"import sys; sys.modules['{missing}'] = None; import runpy; runpy.run_module('fastedit', run_name='__main__')"
    )
    done = python("-c", hide, "--help")
    assert done.returncode == 1
    assert done.stderr == f"fastedit: {missing} is not installed; get it by: pip install 'fastedit-llm[cli]'\n"


def test_only_an_extra_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_for(name: str) -> None:
        def fails() -> None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        stub = ModuleType("fastedit.cli")
        stub.main = fails  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fastedit.cli", stub)
        command.main()

    with pytest.raises(SystemExit, match=r"matplotlib is not installed; .*'fastedit-llm\[plot\]'"):
        fails_for("matplotlib.figure")
    with pytest.raises(ModuleNotFoundError, match="torch"):
        fails_for("torch")


@pytest.mark.parametrize(("file", "stranger"), [("Medias.py", "fastedit"), ("rome/rome_main.py", "pyfastedit")])
def test_another_distribution_in_the_same_folder_is_named(file: str, stranger: str, tmp_path: Path) -> None:
    """Files as pip unpacks them, ours last; then theirs last, so that only the command is ours."""
    package = tmp_path / "fastedit"
    package.mkdir()
    for name in ("__init__.py", "__main__.py", "version.py"):
        shutil.copy(ROOT / "fastedit" / name, package)
    assert python("-c", "import fastedit", folder=tmp_path).returncode == 0
    (package / file).parent.mkdir(exist_ok=True)
    (package / file).touch()
    told = f"ImportError: {package} holds files of {stranger} too"
    for how in (["-c", "import fastedit"], ["-m", "fastedit"]):
        done = python(*how, folder=tmp_path)
        assert told in done.stderr
        assert f"pip uninstall {stranger} fastedit-llm, then pip install fastedit-llm" in done.stderr
        (package / "__init__.py").write_text("")


def test_operations_are_imported_without_what_they_do_not_need() -> None:
    heavy = ("transformers", "triton", *EXTRAS)
    code = "import sys, time, torch; start = time.perf_counter(); import fastedit.ops; "
    code += f"print(time.perf_counter() - start, *{{*{heavy}}} & {{*sys.modules}})"
    spent = []
    for _ in range(3):
        seconds, *found = python("-c", code).stdout.split()
        assert found == []
        spent.append(float(seconds))
        if spent[-1] < 0.3:
            break
    assert min(spent) < 0.3, spent


def test_the_library_needs_no_extra() -> None:
    """Every module but those of the command line and of pictures, and the report as text."""
    code = f"""
import sys
sys.modules |= dict.fromkeys({EXTRAS})
from importlib import import_module
from pathlib import Path
for path in sorted(Path("fastedit").rglob("*.py")):
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    if not name.startswith(("fastedit.cli", "fastedit.__main__")) and name not in {PICTURES}:
        import_module(name)
from fastedit.evaluation.report import Predictions, compare
print(compare([], Predictions([], None)))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert re.search("^reliability +0 +— +—$", done.stdout, re.MULTILINE)
