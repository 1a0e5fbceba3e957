"""Implementations of the ``Transport`` protocol, one per file, imported only when chosen."""
