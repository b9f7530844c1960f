"""Edit requests: one class, readers for the record formats that the field publishes, conflicts among requests."""

from fastedit.requests.conflicts import RequestReport, find_conflicts
from fastedit.requests.load import AnyPath, as_requests, load_requests
from fastedit.requests.request import EditRequest

__all__ = ["AnyPath", "EditRequest", "RequestReport", "as_requests", "find_conflicts", "load_requests"]
