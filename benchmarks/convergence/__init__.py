"""``python -m benchmarks.convergence``: how many forwards and seconds methods need to reach a loss."""
