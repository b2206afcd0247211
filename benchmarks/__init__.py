"""Benchmarks: ``python -m benchmarks --help``. Each ``bench_*.py`` here is one, found by its file name."""
