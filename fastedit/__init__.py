"""fastedit: fast knowledge editing of large language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastedit.version import check_alone, version_of

if TYPE_CHECKING:
    from fastedit.delta import WeightDelta
    from fastedit.editor import Editor
    from fastedit.errors import ConfigError, EditError, FastEditError, FileError, ModelError, RequestError, TensorError
    from fastedit.evaluation.report import EvaluationReport
    from fastedit.ledger import Ledger
    from fastedit.requests import EditRequest, load_requests
    from fastedit.results import EachEditResult, EditResult
    from fastedit.statistics.moment import StreamingCovariance

    __version__: str

check_alone()

__all__ = [
    "ConfigError",
    "EachEditResult",
    "EditError",
    "EditRequest",
    "EditResult",
    "Editor",
    "EvaluationReport",
    "FastEditError",
    "FileError",
    "Ledger",
    "ModelError",
    "RequestError",
    "StreamingCovariance",
    "TensorError",
    "WeightDelta",
    "load_requests",
]

_HOMES = {
    "StreamingCovariance": "statistics.moment",
    "WeightDelta": "delta",
    "EachEditResult": "results",
    "Editor": "editor",
    "EditResult": "results",
    "EvaluationReport": "evaluation.report",
    "Ledger": "ledger",
    "EditRequest": "requests",
    "load_requests": "requests",
}


def __getattr__(name: str) -> Any:  # on first use (PEP 562): torch and transformers take seconds to import
    if name == "__version__":
        return version_of("fastedit")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
