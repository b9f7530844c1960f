"""Benchmarks of ours against what a user would do otherwise, in one run: `python -m benchmarks.NAME`."""
