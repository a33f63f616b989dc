"""Measurements: what is run by ``python -m benchmarks.NAME`` prints its table, or writes JSON with --json."""
