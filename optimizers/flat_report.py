"""A report in the form that loggers such as TensorBoard and Weights & Biases expect: one number for each name."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

__all__ = ["flat_report"]


def flat_report(report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a report, by name.

    Unknown values (None) and lists of events (``decisions``) are omitted. A list of numbers by rank becomes
    ``NAME/RANK``; a list of ranks becomes their number.

    Args:
        report: dict that ``lentando.optimizers.report.report_of`` returned.
    """
    flat: dict[str, float] = {}
    for name, value in report.items():
        if isinstance(value, Real):
            flat[name] = _plain(value)
        elif name.endswith("_by_rank") and isinstance(value, list):
            flat |= {f"{name}/{rank}": _plain(number) for rank, number in enumerate(value) if isinstance(number, Real)}
        elif name == "stragglers" and value is not None:
            flat[name] = len(value)
    return flat


def _plain(value: Any) -> float:
    return value if type(value) in (int, float) else float(value)
