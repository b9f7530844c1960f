"""The errors fastedit raises on purpose.

Every message names the record, field, file or layer, says what was expected and what to do.
The command line turns any of them into one line on stderr, and exit code 2; 1 where work had begun.
"""

from __future__ import annotations


class FastEditError(Exception):
    """Base of every error that fastedit raises on purpose."""


class RequestError(FastEditError):
    """A file of edit requests, or one record of it, cannot be used."""


class ModelError(FastEditError):
    """The model, one of its layers, or a file made for another model cannot be used."""


class ConfigError(FastEditError):
    """A field of a method's configuration has a value it cannot take."""


class EditError(FastEditError):
    """An edit failed while it ran; the model is as it was before."""
