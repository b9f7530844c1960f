"""The decisions of setup.py before a compiler runs, and what it then has compiled, of sources that are small."""

from __future__ import annotations

import json
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

setuptools = pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[1]
SOURCES = {path.name for ending in ("cpp", "cu") for path in (ROOT / "csrc").glob(f"*.{ending}")}
NVCC = """#!/bin/sh
case "$*" in
  *--list-gpu-code*) echo sm_80; echo sm_90; exit;;
  *--dryrun*) echo '#$ TOP={home}' >&2; exit;;
esac
for option; do
  shift
  case $option in -gencode=* | -Xcompiler=* | --threads=0) ;; *) set -- "$@" "$option";; esac
done
exec c++ -fPIC -x c++ "$@"
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of setup.py, which sets nothing up."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py")


def test_pybind11_headers_come_with_torch_where_it_is_not_installed(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    headers: Callable[[], str] = script["pybind11_headers"]
    monkeypatch.setitem(sys.modules, "pybind11", None)
    assert Path(headers(), "pybind11", "pybind11.h").is_file()
    monkeypatch.setitem(headers.__globals__, "find_spec", lambda _: None)
    with pytest.raises(setuptools.errors.CompileError, match="pybind11 is not installed"):
        headers()


def test_architectures_are_those_asked_for_or_that_nvcc_knows(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc, wanted = tmp_path / "nvcc", script["wanted_architectures"]
    nvcc.write_text("#!/bin/sh\necho sm_75\necho sm_80\necho sm_90\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("FASTEDIT_CUDA_ARCHS", raising=False)
    assert wanted(str(nvcc)) == ["80", "90a"]
    monkeypatch.setenv("FASTEDIT_CUDA_ARCHS", "86,90a+PTX")
    assert wanted(str(nvcc)) == ["86", "90a+PTX"]
    monkeypatch.setenv("FASTEDIT_CUDA_ARCHS", "")
    assert wanted(str(nvcc)) == []


def test_a_change_of_any_source_builds_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    (extension,) = given["ext_modules"]
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()} - {"csrc/README.md"}
    assert {*extension.sources, *extension.depends} == files


class Tree:
    """A folder with this setup.py, C++ and CUDA sources of the right names that take no time, and an nvcc."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        (folder / "csrc").mkdir()
        for source in SOURCES:
            headers = {"bindings": ["syrk.h"], "syrk_wgmma": ["wgmma.h"], "syrk_cuda": ["syrk.h", "wgmma.h"]}
            text = "".join(f'#include "{header}"\n' for header in headers.get(Path(source).stem, ["syrk_cpu.h"]))
            self.write(source, text)
        self.write("syrk_cpu.h", '#include "syrk.h"\n')
        self.write("syrk.h", "")
        self.write("wgmma.h", "")
        cuda = folder / "cuda"
        for part in ("bin", "lib64"):
            (cuda / part).mkdir(parents=True)
        (cuda / "lib64" / "libcudart_static.a").write_text("!<arch>\n")
        (cuda / "bin" / "nvcc").write_text(NVCC.format(home=cuda))
        (cuda / "bin" / "nvcc").chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(cuda))
        for variable in ("FASTEDIT_CUDA_ARCHS", "FASTEDIT_REQUIRE_EXT"):
            monkeypatch.delenv(variable, raising=False)

    def write(self, name: str, text: str) -> None:
        (self.folder / "csrc" / name).write_text(text)

    def build(self, *, ninja: bool = True, fails: bool = False) -> str:
        """Runs `setup.py build_ext` and returns what it printed."""
        hide = "import runpy, shutil; which = shutil.which; shutil.which = lambda name, **options: "
        hide += "None if name == 'ninja' else which(name, **options); runpy.run_path('setup.py', run_name='__main__')"
        command = ["setup.py", "build_ext"] if ninja else ["-c", hide, "build_ext"]
        done = subprocess.run([sys.executable, *command], cwd=self.folder, capture_output=True, text=True)
        assert bool(done.returncode) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    def extension(self) -> Path | None:
        return next(self.folder.glob("build/lib*/fastedit/_C*"), None)

    def compiled(self) -> set[str]:
        """Objects that the last build made, by name."""
        ages = {path.stem: path.stat().st_mtime_ns for path in self.folder.glob("build/ninja*/*.o")}
        before, self.ages = getattr(self, "ages", {}), ages
        return {name for name, age in ages.items() if before.get(name) != age}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    return Tree(tmp_path, monkeypatch)


@pytest.fixture
def ninja(script: dict[str, Any]) -> None:
    if not script["find_ninja"]():
        pytest.skip("no ninja")


@pytest.mark.usefixtures("ninja")
def test_ninja_is_told_an_object_for_each_source(tree: Tree) -> None:
    tree.build()
    assert tree.extension()
    stated = json.loads((tree.folder / "build" / "compile_commands.json").read_text())
    commands = {Path(entry["file"]).name: shlex.split(entry["command"]) for entry in stated}
    assert commands.keys() == SOURCES
    assert all(Path(entry["directory"]) == tree.folder for entry in stated)

    def architectures(source: str) -> list[str]:
        return [option.partition(",code=")[2] for option in commands[source] if option.startswith("-gencode")]

    assert architectures("syrk_cuda.cu") == ["sm_80", "sm_90a"]
    assert architectures("syrk_wgmma.cu") == ["sm_90a"]
    assert {name for name, command in commands.items() if '-DFASTEDIT_CUDA="80 90a"' in command} == {"bindings.cpp"}


@pytest.mark.usefixtures("ninja")
def test_only_what_changed_is_compiled(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.build()
    everything = tree.compiled()
    cpu = {name for name in everything if name.startswith("syrk_cpu")}
    assert everything == cpu | {"bindings", "syrk_cuda", "syrk_wgmma"}
    assert len(cpu) == 4

    for name, users in (
        ("syrk_cpu_avx2.cpp", {"syrk_cpu_avx2"}),
        ("syrk_cpu.h", cpu),
        ("wgmma.h", {"syrk_cuda", "syrk_wgmma"}),
        ("syrk.h", everything - {"syrk_wgmma"}),
    ):
        linked = tree.extension().stat().st_mtime_ns
        tree.write(name, (tree.folder / "csrc" / name).read_text() + "\n")
        tree.build()
        assert tree.compiled() == users
        assert tree.extension().stat().st_mtime_ns > linked
    linked = tree.extension().stat().st_mtime_ns
    tree.build()
    assert tree.compiled() == set()
    assert tree.extension().stat().st_mtime_ns == linked
    monkeypatch.setenv("FASTEDIT_CUDA_ARCHS", "80")
    tree.build()
    assert tree.compiled() == {"bindings", "syrk_cuda", "syrk_wgmma"}


@pytest.mark.usefixtures("ninja")
def test_headers_that_were_only_installed_anew_compile_nothing(script: dict[str, Any], tmp_path: Path) -> None:
    """As an isolated build does each time, and elsewhere."""
    target, ages = tmp_path / "mirror", []
    for isolated, text in enumerate(("same", "same", "other")):
        (source := tmp_path / str(isolated) / "detail").mkdir(parents=True)
        (source / "common.h").write_text(text)
        script["mirrored"](source.parent, target)
        ages.append((target / "detail" / "common.h").stat().st_mtime_ns)
    assert ages[0] == ages[1] < ages[2]
    assert (target / "detail" / "common.h").read_text() == "other"


def test_without_ninja_setuptools_compiles(tree: Tree) -> None:
    tree.build(ninja=False)
    assert tree.extension()
    assert not list(tree.folder.glob("build/ninja*"))
    objects = {path.stem for path in tree.folder.glob("build/temp*/**/*.o")}
    assert objects == {Path(source).stem for source in SOURCES}


@pytest.mark.parametrize("ninja", [True, False])
@pytest.mark.parametrize("source", ["bindings.cpp", "syrk_wgmma.cu"])
def test_what_cannot_be_compiled_is_told_and_an_error_only_where_that_is_asked_for(
    source: str, ninja: bool, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.write(source, "int broken")
    told = "fastedit._C is not built: the command above failed. fastedit works without it"
    assert told in tree.build(ninja=ninja)
    assert not tree.extension()
    monkeypatch.setenv("FASTEDIT_REQUIRE_EXT", "1")
    assert told in tree.build(ninja=ninja, fails=True)
