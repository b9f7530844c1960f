"""Show a field that is made by `fastedit.configs.option(default, help, unset=…)` with its default and its help."""

from ast import literal_eval
from typing import Any

from griffe import Attribute, Docstring, Extension


class Options(Extension):
    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        value: Any = attr.value
        if str(getattr(value, "function", "")) == "option":
            default, text, *more = value.arguments
            attr.value = default
            said = literal_eval(str(text))
            for unset in more:  # the keyword argument
                said += f" None is {literal_eval(str(unset.value))}."
            attr.docstring = Docstring(said, parent=attr)
