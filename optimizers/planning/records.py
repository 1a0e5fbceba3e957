"""Files of measured values, which ``optimizer.report()`` and ``lentando measure`` write and ``lentando plan`` reads.

The format is JSON Lines. A line is read if it is an object whose ``"format"`` is ``"lentando-measurement-1"``, or has
such an object under ``"report"``; all other lines (losses, epochs) are ignored. These are its keys, all optional except
``size``, with times in seconds:

- ``size``: number of ranks.
- ``model_bytes``: size of the parameters.
- ``compute_seconds_by_rank``, ``compute_deviation_seconds_by_rank``: mean and standard deviation of a step.
- ``delays``: by operation (an attribute of ``Delays``, or ``"control"``), a list of [bytes of the model, seconds].

Each line adds to the lines before it, and replaces values that both contain.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lentando.comm.cluster import Compute
from lentando.comm.errors import ConfigurationError
from lentando.optimizers.planning.delays import Delays, LinearDelay, fit_delay
from lentando.optimizers.planning.estimate import as_compute

__all__ = ["FORMAT", "Measurement", "Points", "append_measurement", "measurement_line", "read_measurement"]

FORMAT = "lentando-measurement-1"

Points: TypeAlias = "list[tuple[int, float]]"
"""Pairs of (bytes of the model, seconds), in increasing order of bytes."""

_OPERATIONS = ("control", "gradient_average", "outer_step", "slow_momentum", "exchange", "exchange_local")


@dataclass
class Measurement:
    """Measured compute times and delays of a job.

    Attributes:
        size: number of ranks.
        model_bytes: size of the parameters in bytes, or None if unknown.
        compute_seconds_by_rank: mean time of a step of each rank; empty if unknown.
        compute_deviation_seconds_by_rank: standard deviation of a step of each rank, NaN where unknown; empty like the
            means.
        delays: measured points of each operation.

    Example:
        >>> measured = Measurement(size=4, delays={"outer_step": [(1_000_000, 0.002), (4_000_000, 0.005)]})
        >>> measured.delay_at("outer_step", 2_500_000)
        0.0035
    """

    size: int
    model_bytes: int | None = None
    compute_seconds_by_rank: Sequence[float] = ()
    compute_deviation_seconds_by_rank: Sequence[float] = ()
    delays: dict[str, Points] = field(default_factory=dict)

    def compute(self) -> Compute | None:
        """Return the compute model of these ranks, or None if their compute times are unknown."""
        if not self.compute_seconds_by_rank:
            return None
        return as_compute(self.compute_seconds_by_rank, self.compute_deviation_seconds_by_rank)

    def delay_at(self, operation: str, model_bytes: int) -> float | None:
        """Return the delay of an operation for a model of this size: interpolated, or from the fit beyond."""
        points = self.delays.get(operation)
        if not points:
            return None
        sizes, seconds = zip(*points, strict=True)
        if sizes[0] <= model_bytes <= sizes[-1]:
            return float(np.interp(model_bytes, sizes, seconds))
        fitted = self.fit(operation)
        return None if fitted is None else fitted.seconds(model_bytes)

    def fit(self, operation: str) -> LinearDelay | None:
        """Return latency and bandwidth of an operation, or None if too few sizes were measured to separate them."""
        points = [point for point in self.delays.get(operation, []) if point[1] > 0]
        return fit_delay(*zip(*points, strict=True)) if len(points) > 1 else None

    def delays_at(self, model_bytes: int) -> Delays | None:
        """Return all delays for a model of this size, or None if neither average was measured.

        If only one of the two averages was measured, its delay is used for both: by the ring they cost the same.
        """
        gradients = self.delay_at("gradient_average", model_bytes)
        outer = self.delay_at("outer_step", model_bytes)
        if gradients is None and outer is None:
            return None
        exchange = self.delay_at("exchange", model_bytes) or 0.0
        fitted = self.fit("exchange")
        busy = exchange if fitted is None else min(exchange, fitted.seconds_per_byte * model_bytes)
        return Delays(
            gradient_average=outer if gradients is None else gradients,  # type: ignore[arg-type] # one of the two is known
            outer_step=gradients if outer is None else outer,  # type: ignore[arg-type]
            slow_momentum=self.delay_at("slow_momentum", model_bytes) or 0.0,
            exchange=exchange,
            exchange_busy=busy,
            exchange_local=self.delay_at("exchange_local", model_bytes) or 0.0,
        )


def measurement_line(measured: "Measurement | Mapping[str, Any]") -> dict[str, Any]:
    """Return the line of a ``Measurement``, or of all that ``optimizer.report()`` returned, as a JSON object."""
    if isinstance(measured, Measurement):
        line: dict[str, Any] = {"format": FORMAT, **vars(measured)}
    else:
        delay, size_bytes = measured["delay_seconds"], measured["model_bytes"]
        operation = "gradient_average" if measured["period"] is None else "outer_step"
        delays = {} if delay is None else {operation: [[size_bytes, delay]]}
        line = {"format": FORMAT, **measured, "delays": delays}
    for key, value in line.items():
        if isinstance(value, Sequence) and not isinstance(value, str):  # JSON has no NaN
            line[key] = [None if isinstance(v, float) and not isfinite(v) else v for v in value]
    return line


def append_measurement(path: Path, measured: "Measurement | Mapping[str, Any]") -> None:
    """Append a ``Measurement``, or what ``optimizer.report()`` returned, to a file."""
    with path.open("a") as file:
        file.write(json.dumps(measurement_line(measured), allow_nan=False) + "\n")


def read_measurement(path: Path) -> Measurement:
    """Return the measurement that a file holds.

    Raises:
        ConfigurationError: if the file cannot be read, holds no measurement, or holds measurements of different numbers
            of ranks.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    measurement: Measurement | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigurationError(f"{path}, line {number}: expected JSON Lines, got {line[:40]!r}") from error
        if isinstance(record, dict) and isinstance(record.get("report"), dict):
            record = record["report"]
        if isinstance(record, dict) and record.get("format") == FORMAT:
            try:
                measurement = _merge(measurement, record)
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigurationError(f"{path}, line {number}: not in the format {FORMAT}: {error}") from error
    if measurement is None:
        raise ConfigurationError(
            f'{path} has no measured values: expected a line of JSON with "format": "{FORMAT}", as lentando measure '
            "--json and lentando.optimizers.planning.append_measurement write it"
        )
    return measurement


def _merge(before: Measurement | None, record: Mapping[str, Any]) -> Measurement:
    """Add the values of a line to a measurement; they replace values of earlier lines."""
    size = int(record["size"])
    if size < 1 or (before is not None and before.size != size):
        was = "" if before is None else f" after {before.size}"
        raise ConfigurationError(f"size is {size}{was}, but all lines must be of the same number of ranks")
    merged = before or Measurement(size)
    if record.get("model_bytes") is not None:
        merged.model_bytes = int(record["model_bytes"])
    means = record.get("compute_seconds_by_rank") or ()
    if means:
        deviations = record.get("compute_deviation_seconds_by_rank") or [None] * len(means)
        if len(means) != size or len(deviations) != size:
            raise ConfigurationError(f"expected compute times of {size} ranks, got {len(means)} and {len(deviations)}")
        merged.compute_seconds_by_rank = [_positive(value) for value in means]
        merged.compute_deviation_seconds_by_rank = [nan if v is None else _positive(v) for v in deviations]
    for operation, points in (record.get("delays") or {}).items():
        if operation in _OPERATIONS:
            by_size = dict(merged.delays.get(operation, ()))
            by_size |= {int(size_bytes): _positive(seconds) for size_bytes, seconds in points}
            merged.delays[operation] = sorted(by_size.items())
    return merged


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (isfinite(value) and value >= 0):
        raise ConfigurationError(f"expected a time in seconds >= 0, got {value!r}")
    return float(value)
