"""The comparison of versions that Horovod's tests use."""

from packaging.version import Version


def is_version_greater_equal_than(version: str, other: str) -> bool:
    return Version(version) >= Version(other)
