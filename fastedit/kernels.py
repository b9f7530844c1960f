"""The Triton kernels of the top-level folder `kernels/`, as the package `fastedit.kernels`.

A wheel carries that folder inside the package, a checkout beside it. The folder has no `__init__.py`, because a regular
package `kernels` at the root would shadow the PyPI package of that name. This module is the package instead.
"""

from pathlib import Path

_HERE = Path(__file__).parent
__path__ = [str(next(folder for folder in (_HERE / "kernels", _HERE.parent / "kernels") if folder.is_dir()))]
