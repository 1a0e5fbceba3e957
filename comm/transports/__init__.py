"""Implementations of the ``Transport`` protocol, one per file or folder, imported only when they are chosen."""
