"""What the benchmarks share: one timer, one table, one kind of target, the options of the command lines."""
