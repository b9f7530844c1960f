"""Build entry point: packages, and the extension fastedit._C; everything static is in pyproject.toml.

Ninja compiles the objects side by side, and only those whose source, headers or command changed, as build.ninja in
build/ninja.* states them; editors find build/compile_commands.json. Without ninja setuptools compiles all of them.

Environment:
    FASTEDIT_REQUIRE_EXT=1   an extension that cannot be built is an error, not a notice
    FASTEDIT_CUDA_ARCHS      what nvcc compiles for, such as "80;90a+PTX"; empty for no CUDA
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from copy import copy
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

REQUIRED = os.environ.get("FASTEDIT_REQUIRE_EXT") == "1"
ARCHITECTURES = "80;86;89;90a;100;120+PTX"
BINDINGS = "csrc/bindings.cpp"  # alone knows Python, pybind11 and what CUDA is compiled for
SOURCES = sorted(glob("csrc/*.cpp"))
RULES = """\
ninja_required_version = 1.3
builddir = {folder}
rule object
  command = $compile -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
"""


# folders of data, named so that setuptools does not warn of them
DATA = ["fastedit.demo.fact_world", "fastedit.demo.fact_world.statistics"]


class BuildExtension(build_ext):
    """C++ always, CUDA where nvcc is, GPU or not, in one binary."""

    def build_extension(self, ext: Extension) -> None:
        ext, cuda = copy(ext), {}
        try:
            if (nvcc := find_nvcc()) and (architectures := wanted_architectures(nvcc)):
                cuda = cuda_commands(nvcc, architectures)
                ext.define_macros = [("FASTEDIT_CUDA", f'"{" ".join(architectures)}"')]
                ext.library_dirs = cuda_libraries(nvcc)
                ext.libraries = ["cudart_static", "dl", "rt", "pthread"]
            if (ninja := find_ninja()) and self.compiler.compiler_type == "unix":
                ext.extra_objects = ext.depends = self.by_ninja(ninja, ext, cuda)
                ext.sources = []  # setuptools links
            else:
                ext.include_dirs, ext.extra_objects = [pybind11_headers()], []
                for source, command in cuda.items():
                    target = Path(self.build_temp, Path(source).stem + ".o")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    run([*command, "-c", source, "-o", target])
                    ext.extra_objects.append(str(target))
            super().build_extension(ext)
        except Exception as error:
            reason = "the command above failed" if "exit" in str(error) else error
            self.warn(
                f"fastedit._C is not built: {reason}. fastedit works without it, slower where it would serve; "
                "it takes a C++20 compiler (GCC 11, Clang 14), pybind11, and nvcc 12 for CUDA"
            )
            raise CompileError(str(error)) from error  # of setuptools: it goes on where the extension is optional

    def by_ninja(self, ninja: str, ext: Extension, cuda: dict[str, list[str]]) -> list[str]:
        """The objects, brought up to date. They stay in build/, as build_temp is another for each editable install."""
        folder = Path("build", f"ninja.{self.plat_name}-{sys.implementation.cache_tag}")
        commands = {source: [*self.compiler.compiler_so_cxx, *ext.extra_compile_args] for source in ext.sources}
        headers = mirrored(Path(pybind11_headers(), "pybind11"), folder / "include" / "pybind11").parent
        commands[BINDINGS] += [f"-D{name}={value}" for name, value in ext.define_macros]
        commands[BINDINGS] += [f"-I{path}" for path in (headers, *self.compiler.include_dirs)]
        objects, statement = [], RULES.format(folder=folder)
        for source, command in (commands | cuda).items():
            objects.append(f"{folder / Path(source).stem}.o")
            statement += f"build {objects[-1]}: object {source}\n  compile = {shlex.join(command).replace('$', '$$')}\n"
        stated = folder / "build.ninja"
        stated.write_text(statement, encoding="utf-8")
        compdb = run([ninja, "-f", stated, "-t", "compdb", "object"], stdout=subprocess.PIPE).stdout
        Path("build", "compile_commands.json").write_text(compdb, encoding="utf-8")
        run([ninja, "-f", stated])
        return objects


def cuda_commands(nvcc: str, architectures: list[str]) -> dict[str, list[str]]:
    """What compiles each source: wgmma is of sm_90a alone; where that is not wanted, something that is never called."""
    hopper = [name for name in architectures if name.startswith("90a")]
    groups = {"csrc/syrk_cuda.cu": architectures, "csrc/syrk_wgmma.cu": hopper or architectures[:1]}
    commands = {}
    for source, group in groups.items():
        commands[source] = [nvcc, "-O3", "-std=c++17", "-Xcompiler=-fPIC", "--threads=0"]
        for architecture in group:
            number = architecture.removesuffix("+PTX")
            commands[source].append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if architecture != number:
                commands[source].append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return commands


def cuda_libraries(nvcc: str) -> list[str]:
    dry = run([nvcc, "--dryrun", "-x", "cu", os.devnull], stderr=subprocess.PIPE).stderr
    home = re.search(r"^#\$ TOP=(.*)$", dry, re.MULTILINE)[1].strip()
    return [path for part in ("lib64", "lib", "targets/*/lib") for path in glob(f"{home}/{part}")]


def run(command: list[str | Path], **streams: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=True, text=True, **streams)


def pybind11_headers() -> str:
    """Where pybind11 is not installed, as on a machine without a network, those that come with torch."""
    try:
        import pybind11

        return pybind11.get_include()
    except ModuleNotFoundError:
        torch = find_spec("torch")
        for place in (torch and torch.submodule_search_locations) or ():
            if Path(place, "include", "pybind11", "pybind11.h").is_file():
                return str(Path(place, "include"))
        raise CompileError("pybind11 is not installed") from None


def mirrored(source: Path, target: Path) -> Path:
    """A copy whose files are as old as their content: an isolated build installs pybind11 anew, elsewhere each time."""
    for file in source.rglob("*.h"):
        copied = target / file.relative_to(source)
        if not copied.exists() or copied.read_bytes() != file.read_bytes():
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copied)
    return target


def find_ninja() -> str | None:
    return shutil.which("ninja", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))


def find_nvcc() -> str | None:
    homes = [os.environ[name] + "/bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    return shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def wanted_architectures(nvcc: str) -> list[str]:
    """Those of the environment, or those of ARCHITECTURES that this nvcc knows."""
    if (wanted := os.environ.get("FASTEDIT_CUDA_ARCHS")) is not None:
        return wanted.replace(",", ";").split(";") if wanted else []
    known = run([nvcc, "--list-gpu-code"], stdout=subprocess.PIPE).stdout.split()
    return [name for name in ARCHITECTURES.split(";") if "sm_" + re.match(r"\d+", name)[0] in known]


setup(
    packages=[*find_packages(include=["fastedit*"]), "fastedit.kernels", *DATA],
    package_dir={"fastedit.kernels": "kernels"},
    ext_modules=[
        Extension(
            "fastedit._C",
            SOURCES,
            depends=sorted({*glob("csrc/*.[ch]*")} - {*SOURCES}),
            extra_compile_args=["-std=c++20", "-O3", "-g0", "-fvisibility=hidden"],
            extra_link_args=["-pthread"],
            language="c++",
            optional=not REQUIRED,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
