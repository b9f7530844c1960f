"""The Triton kernels of the top-level folder `kernels/`, as the package `fastedit.kernels`.

A wheel carries that folder inside the package, a checkout beside it. It has no `__init__.py` (`kernels` is a package of
PyPI too, which a regular one at the root would shadow), so that this module is the package.
"""

from pathlib import Path

_HERE = Path(__file__).parent
__path__ = [str(next(folder for folder in (_HERE / "kernels", _HERE.parent / "kernels") if folder.is_dir()))]
