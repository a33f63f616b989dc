"""What is evaluated and what is applied; ``python -m benchmarks.exactness``."""
