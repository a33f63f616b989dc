"""``python -m benchmarks.methods``: what a step of every method costs, as declared and as measured."""
