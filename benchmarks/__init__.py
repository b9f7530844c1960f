"""What a user would do otherwise, and ours, in one run: `python -m benchmarks.NAME` or `python benchmarks/NAME.py`."""
