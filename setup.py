"""Build entry point: packages, and the extension fastedit._C; everything static is in pyproject.toml.

Environment:
    FASTEDIT_REQUIRE_EXT=1   an extension that cannot be built is an error, not a notice
    FASTEDIT_CUDA_ARCHS      what nvcc compiles for, such as "80;90a+PTX"; empty for no CUDA
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

REQUIRED = os.environ.get("FASTEDIT_REQUIRE_EXT") == "1"
ARCHITECTURES = "80;86;89;90a;100;120+PTX"
SOURCES = ["csrc/bindings.cpp", *sorted(glob("csrc/syrk_cpu*.cpp"))]


class BuildExtension(build_ext):
    """C++ always, CUDA where nvcc is, GPU or not, in one binary."""

    def build_extension(self, ext: Extension) -> None:
        try:
            ext.include_dirs.append(pybind11_headers())
            if (nvcc := find_nvcc()) and (architectures := wanted_architectures(nvcc)):
                self.add_cuda(ext, nvcc, architectures)
            super().build_extension(ext)
        except Exception as error:
            reason = "the command above failed" if "exit" in str(error) else error
            self.warn(
                f"fastedit._C is not built: {reason}. fastedit works without it, slower where it would serve; "
                "it takes a C++20 compiler (GCC 11, Clang 14), pybind11, and nvcc 12 for CUDA"
            )
            raise  # setuptools goes on where the extension is optional

    def add_cuda(self, ext: Extension, nvcc: str, architectures: list[str]) -> None:
        target = Path(self.build_temp, "syrk_cuda.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [
            nvcc,
            "-c",
            "csrc/syrk_cuda.cu",
            "-o",
            str(target),
            "-O3",
            "-std=c++17",
            "-Xcompiler=-fPIC",
            "--threads=0",
        ]
        for architecture in architectures:
            number = architecture.removesuffix("+PTX")
            command.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if architecture != number:
                command.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        self.announce(" ".join(command), level=2)
        subprocess.run(command, check=True)
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        home = re.search(r"^#\$ TOP=(.*)$", dry, re.MULTILINE)[1].strip()
        ext.library_dirs += [path for part in ("lib64", "lib", "targets/*/lib") for path in glob(f"{home}/{part}")]
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
        ext.extra_objects.append(str(target))
        ext.define_macros.append(("FASTEDIT_CUDA", f'"{" ".join(architectures)}"'))


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


def find_nvcc() -> str | None:
    homes = [os.environ[name] + "/bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    return shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def wanted_architectures(nvcc: str) -> list[str]:
    """Those of the environment, or those of ARCHITECTURES that this nvcc knows."""
    if (wanted := os.environ.get("FASTEDIT_CUDA_ARCHS")) is not None:
        return wanted.replace(",", ";").split(";") if wanted else []
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in ARCHITECTURES.split(";") if "sm_" + re.match(r"\d+", name)[0] in known]


setup(
    packages=[
        "fastedit",
        "fastedit.demo",
        "fastedit.kernels",
        "fastedit.methods",
        "fastedit.models",
        "fastedit.ops",
    ],
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
