"""Versions of installed packages, and a check that no other distribution has written into this package's folder."""

from __future__ import annotations

import os

DISTRIBUTION = "fastedit-llm"
_STRANGERS = {"Medias.py": "fastedit", "rome/rome_main.py": "pyfastedit"}
"""A file that only it has -> another distribution on PyPI that installs a package called fastedit."""


def version_of(package: str, otherwise: str = "unknown") -> str:
    """The version of an installed distribution, or `otherwise`; ours is given by its import name, "fastedit"."""
    from importlib.metadata import PackageNotFoundError, version  # here, to keep `import fastedit` fast

    try:
        return version(DISTRIBUTION if package == "fastedit" else package)
    except PackageNotFoundError:
        return otherwise


def check_alone() -> None:
    """Raise ImportError if this folder also holds another distribution's files: each overwrites the other's."""
    folder = os.path.dirname(__file__)
    for file, stranger in _STRANGERS.items():
        if os.path.exists(os.path.join(folder, file)):
            raise ImportError(
                f"{folder} holds files of {stranger} too, another distribution whose package is called fastedit. Each "
                f"overwrites files of the other, so keep one: pip uninstall {stranger} {DISTRIBUTION}, then pip "
                f"install {DISTRIBUTION}"
            )
