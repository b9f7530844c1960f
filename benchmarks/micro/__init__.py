"""Microbenchmarks: each operation once on a CPU, at one size, for pytest-benchmark (`make micro`)."""
