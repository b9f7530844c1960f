"""The command line; `app` is the application, `main` the console script."""

from fastedit.cli.app import app, main, make_app

__all__ = ["app", "main", "make_app"]
