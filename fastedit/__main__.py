"""The `fastedit` command, also `python -m fastedit`: runs the command line, or says which extra is not installed."""

import sys

from fastedit.version import DISTRIBUTION, check_alone

_EXTRAS = {"typer": "cli", "rich": "cli", "matplotlib": "plot"}


def main() -> None:
    check_alone()  # here too: another distribution's __init__.py may have replaced ours
    try:
        from fastedit.cli import main as command

        command()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        sys.exit(f"fastedit: {package} is not installed; get it by: pip install '{DISTRIBUTION}[{_EXTRAS[package]}]'")


if __name__ == "__main__":
    main()
