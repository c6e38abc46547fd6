"""Benchmarks, run as `python -m benchmarks.NAME`; their figures are kept in RESULTS.md."""
