"""The page of what was timed; ``python -m benchmarks.report``."""
