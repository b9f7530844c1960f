"""Triton's interpreter without what takes a third of its time."""

from __future__ import annotations

import inspect
from typing import Any


def remember_builtins() -> None:
    """Which names of its language are builtins is found once: not for each call of a function inside a kernel."""
    try:
        from triton.language import core
        from triton.runtime import interpreter
    except ImportError:
        return
    known: dict[Any, list[str]] = {}
    patched: set[int] = set()

    def patch_builtin(owner: Any, *rest: Any) -> None:
        if owner not in known:
            known[owner] = [name for name, member in inspect.getmembers(owner) if core.is_builtin(member)]
        if any(core.is_builtin(getattr(owner, name)) for name in known[owner][:1]):  # else a caller has patched it
            for name in known[owner]:
                interpreter._patch_attr(owner, name, getattr(owner, name), *rest)

    interpreter._patch_builtin = patch_builtin
    if not hasattr(interpreter, "_LangPatchScope"):
        return

    class Scope(interpreter._LangPatchScope):  # type: ignore[misc,name-defined]
        def restore(self) -> None:
            patched.clear()
            super().restore()

    patch_lang = interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        """A launch asks for it again for each function that its kernel calls, and undoes it at its end."""
        module = id(function.__globals__)
        if module in patched:
            return Scope()
        scope = patch_lang(function)
        patched.add(module)
        return scope

    interpreter._LangPatchScope, interpreter._patch_lang = Scope, patch_once
