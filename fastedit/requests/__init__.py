"""Edit requests: one class, readers for published record formats, and conflicts among requests."""

from fastedit.requests.conflicts import RequestReport, find_conflicts
from fastedit.requests.load import as_requests, load_requests
from fastedit.requests.request import REFUSAL, EditRequest
from fastedit.requests.source import AnyPath

__all__ = ["REFUSAL", "AnyPath", "EditRequest", "RequestReport", "as_requests", "find_conflicts", "load_requests"]
