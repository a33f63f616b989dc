"""Tools for development that are not part of the package: ``python -m tools.NAME``."""
