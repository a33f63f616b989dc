"""Seconds that a step takes outside of kernels; ``python -m benchmarks.host``."""
