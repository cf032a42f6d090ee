"""Measurements: `python -m tests.benchmarks` runs every `bench_*.py` here and writes docs/.

A benchmark is a module with a `TITLE`, a docstring that tells the reader of docs/performance.md
what is measured, and `measure(quick: bool) -> list[dict[str, Any]]`: rows of a table, flat dicts of
JSON values with the same keys, which become its heading. `common.py` has what they share.
"""
