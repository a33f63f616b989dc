"""Measurements; each module is run by hand and prints its table, or JSON with --json."""
