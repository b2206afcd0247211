"""Benchmarks: ``python -m benchmarks --help``. Each ``bench_*.py`` file here is one benchmark."""
