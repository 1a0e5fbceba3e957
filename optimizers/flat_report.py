"""A report as loggers take it (TensorBoard, Weights & Biases): one number for each name."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

__all__ = ["flat_report"]


def flat_report(report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a report.

    What is not known (None) and lists of what happened (``decisions``) are left out. A list of numbers by rank gives
    ``NAME/RANK``, a list of ranks how many those are.

    Args:
        report: of ``lentando.optimizers.report.report_of``.
    """
    flat: dict[str, float] = {}
    for name, value in report.items():
        if isinstance(value, Real):
            flat[name] = _plain(value)
        elif name.endswith("_by_rank") and isinstance(value, list):
            flat |= {f"{name}/{rank}": _plain(own) for rank, own in enumerate(value) if isinstance(own, Real)}
        elif name == "stragglers" and value is not None:
            flat[name] = len(value)
    return flat


def _plain(value: Any) -> float:
    return value if type(value) in (int, float) else float(value)
