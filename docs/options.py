"""Shows a field that is made by `fastedit.configs.option(default, help)` with its default and its help."""

from ast import literal_eval
from typing import Any

from griffe import Attribute, Docstring, Extension


class Options(Extension):
    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        value: Any = attr.value
        if str(getattr(value, "function", "")) == "option":
            default, text = value.arguments[:2]
            attr.value = default
            attr.docstring = Docstring(literal_eval(str(text)), parent=attr)
