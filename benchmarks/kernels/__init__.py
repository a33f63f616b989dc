"""Times of ops; ``python -m benchmarks.kernels``."""
