"""Parsing and formatting of quantities: 25.6M parameters, 180ms, 100MB, 10gbit."""

import re
from collections.abc import Mapping
from math import isfinite

from lentando.comm.errors import ConfigurationError

__all__ = [
    "format_bandwidth",
    "format_bytes",
    "format_seconds",
    "parse_bandwidth",
    "parse_bytes",
    "parse_count",
    "parse_seconds",
    "parse_share",
]

_NUMBER = re.compile(r"([-+]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?)\s*(\D*)", re.IGNORECASE)

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_COUNTS = {**_DECIMAL, "K": 1e3, "m": 1e6, "B": 1e9, "b": 1e9}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_BYTES = {"": 1.0, **{f"{p}B": v for p, v in (_DECIMAL | _BINARY).items()}, "KB": 1e3}
_PER_SECOND = {
    **{f"{prefix}B/s": value for prefix, value in (_DECIMAL | _BINARY).items()},
    "KB/s": 1e3,
    **{
        spelled: value / 8
        for prefix, value in (_DECIMAL | _BINARY).items()
        for short in {prefix, prefix.lower(), prefix.upper()} - ({"I"} if len(prefix) == 2 else set())
        for spelled in (f"{short}bit", f"{short}bit/s", f"{short}bps")
    },
}


def parse_count(text: str) -> int:
    """Parse a whole number >= 1: ``1000``, ``25.6M``, ``7B`` (billion)."""
    value = _parse(text, _COUNTS, "a number such as 1000, 64k, 25.6M or 7B")
    if value < 1 or abs(value - round(value)) > 1e-9 * value:  # 64.35k is not exact in binary
        raise ConfigurationError(f"expected a whole number >= 1, got {text!r}")
    return round(value)


def parse_seconds(text: str) -> float:
    """Parse a time >= 0 into seconds: ``50us``, ``180ms``, ``1.5s``, ``2min``, ``1h``; 0 needs no unit."""
    expected = "a time with its unit, such as 50us, 180ms, 1.5s, 2min or 1h"
    if text.strip() in ("0", "0.0"):
        return 0.0
    return _parse(text, _SECONDS, expected)


def parse_bytes(text: str) -> int:
    """Parse a size >= 0 into bytes: ``4096``, ``100MB``, ``64KiB``."""
    value = _parse(text, _BYTES, "a size such as 4096 (bytes), 64KiB, 100MB or 1.5GiB")
    return round(value)


def parse_bandwidth(text: str) -> float:
    """Parse a bandwidth > 0 into bytes per second: ``10gbit``, ``100Mbit/s``, ``25Gbps``, ``900MiB/s``."""
    value = _parse(text, _PER_SECOND, "a bandwidth such as 10gbit, 100Mbit/s, 25Gbps, 1.25GB/s or 900MiB/s")
    if value == 0:
        raise ConfigurationError(f"expected a bandwidth > 0, got {text!r}")
    return value


def parse_share(text: str) -> float:
    """Parse a share > 0: ``10%`` or ``0.1``."""
    value = _parse(text, {"": 1.0, "%": 0.01}, "a share such as 10% or 0.1")
    if value == 0:
        raise ConfigurationError(f"expected a share > 0, got {text!r}")
    return value


def format_seconds(seconds: float) -> str:
    """Format a time with four digits: ``180 ms``."""
    return _format(seconds, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)))


def format_bytes(size_bytes: float) -> str:
    """Format a size with four digits: ``102.4 MB``."""
    return _format(size_bytes, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def format_bandwidth(bytes_per_second: float) -> str:
    """Format a bandwidth with four digits: ``1.25 GB/s``."""
    return f"{format_bytes(bytes_per_second)}/s"


def _parse(text: str, units: Mapping[str, float], expected: str) -> float:
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise ConfigurationError(f"expected {expected}, got {text!r}")
    number, unit = match[1], match[2].strip()
    if unit not in units:
        reason = f"there is no unit {unit!r}" if unit else "the unit is missing"
        raise ConfigurationError(f"expected {expected}, got {text!r}: {reason}")
    try:
        value = float(number) * units[unit]
    except ValueError:  # misplaced underscores
        raise ConfigurationError(f"expected {expected}, got {text!r}") from None
    if not isfinite(value) or value < 0:
        raise ConfigurationError(f"expected {expected}, finite and not negative, got {text!r}")
    return value


def _format(value: float, units: tuple[tuple[str, float], ...]) -> str:
    for unit, size in units:
        if abs(value) >= size * 0.99995:  # a value that rounds to 1000 of one unit is 1 of the next
            return f"{value / size:.4g} {unit}".rstrip()
    unit, size = units[-1]
    return f"{value / size:.4g} {unit}".rstrip()
