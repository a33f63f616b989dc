"""What Triton kernels compile to; ``python -m tools.compiled``."""
