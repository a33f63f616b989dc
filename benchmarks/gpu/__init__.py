"""Everything worth knowing of a GPU in a few minutes; ``python -m benchmarks.gpu``."""
