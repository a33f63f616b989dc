"""What Triton kernels compile to; ``python -m benchmarks.compiled``."""
