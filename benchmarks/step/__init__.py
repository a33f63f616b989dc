"""Times of whole steps; ``python -m benchmarks.step``."""
