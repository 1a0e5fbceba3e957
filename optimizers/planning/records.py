"""Measured values in a file: what ``optimizer.report()`` and ``lentando measure`` write, and ``lentando plan`` reads.

JSON Lines. A line counts if it is an object whose ``"format"`` is ``"lentando-measurement-1"``, or that has such an
object under ``"report"``; all other lines (losses, epochs) are left to whoever wrote them. Its keys, each optional but
``size``, times in seconds:

- ``size``: number of ranks.
- ``model_bytes``: of the parameters.
- ``compute_seconds_by_rank``, ``compute_deviation_seconds_by_rank``: mean and standard deviation of a step.
- ``delays``: by operation (an attribute of ``Delays``, or ``"control"``), a list of [bytes of the model, seconds].

Of several lines each adds to those before it, and what it says itself holds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lentando.comm.cluster.compute import Compute
from lentando.comm.errors import ConfigurationError
from lentando.optimizers.planning.delays import Delay, Delays, fit_delay
from lentando.optimizers.planning.estimate import as_compute

__all__ = ["FORMAT", "Measurement", "Points", "append_measurement", "measurement_line", "read_measurement"]

FORMAT = "lentando-measurement-1"

Points: TypeAlias = "list[tuple[int, float]]"
"""(bytes of the model, seconds), in the order of bytes."""

_OPERATIONS = ("control", "gradient_average", "outer_step", "slow_momentum", "exchange", "exchange_local")


@dataclass
class Measurement:
    """What was measured, of a job or of its network.

    Attributes:
        size: number of ranks.
        model_bytes: of the parameters, or None.
        compute_seconds_by_rank: mean of a step; empty if unknown, like the next.
        compute_deviation_seconds_by_rank: standard deviation of a step; NaN where unknown.
        delays: by operation.
    """

    size: int
    model_bytes: int | None = None
    compute_seconds_by_rank: Sequence[float] = ()
    compute_deviation_seconds_by_rank: Sequence[float] = ()
    delays: dict[str, Points] = field(default_factory=dict)

    def compute(self) -> Compute | None:
        """The compute model of these ranks."""
        if not self.compute_seconds_by_rank:
            return None
        return as_compute(self.compute_seconds_by_rank, self.compute_deviation_seconds_by_rank)

    def delay_at(self, operation: str, model_bytes: int) -> float | None:
        """The delay of an operation for a model of this size: between measured sizes by a line, beyond by the fit."""
        points = self.delays.get(operation)
        if not points:
            return None
        sizes, seconds = zip(*points, strict=True)
        if sizes[0] <= model_bytes <= sizes[-1]:
            return float(np.interp(model_bytes, sizes, seconds))
        fitted = self.fit(operation)
        return None if fitted is None else fitted.seconds(model_bytes)

    def fit(self, operation: str) -> Delay | None:
        """Latency and bandwidth of an operation, if sizes enough were measured to tell them apart."""
        points = [point for point in self.delays.get(operation, []) if point[1] > 0]
        return fit_delay(*zip(*points, strict=True)) if len(points) > 1 else None

    def delays_at(self, model_bytes: int) -> Delays | None:
        """All delays for a model of this size; None if neither average was measured.

        Where one of the two averages is missing, the other stands in for it: by the ring they cost the same.
        """
        gradients = self.delay_at("gradient_average", model_bytes)
        outer = self.delay_at("outer_step", model_bytes)
        if gradients is None and outer is None:
            return None
        exchange = self.delay_at("exchange", model_bytes) or 0.0
        fitted = self.fit("exchange")
        busy = exchange if fitted is None else min(exchange, fitted.seconds_per_byte * model_bytes)
        return Delays(
            gradient_average=outer if gradients is None else gradients,  # type: ignore[arg-type] # one of them is known
            outer_step=gradients if outer is None else outer,  # type: ignore[arg-type]
            slow_momentum=self.delay_at("slow_momentum", model_bytes) or 0.0,
            exchange=exchange,
            exchange_busy=busy,
            exchange_local=self.delay_at("exchange_local", model_bytes) or 0.0,
        )


def measurement_line(measured: "Measurement | Mapping[str, Any]") -> dict[str, Any]:
    """A line of the format: of a ``Measurement``, or of ``optimizer.report()``, all of which stays in it."""
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
    """Add a line to the file: a ``Measurement``, or what ``optimizer.report()`` returned."""
    with path.open("a") as file:
        file.write(json.dumps(measurement_line(measured), allow_nan=False) + "\n")


def read_measurement(path: Path) -> Measurement:
    """What a file says.

    Raises:
        ConfigurationError: if it cannot be read, says nothing, or speaks of different numbers of ranks.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    found: Measurement | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
        except ValueError as error:
            raise ConfigurationError(f"{path}, line {number}: expected JSON Lines, got {line[:40]!r}") from error
        if isinstance(told, dict) and isinstance(told.get("report"), dict):
            told = told["report"]
        if isinstance(told, dict) and told.get("format") == FORMAT:
            try:
                found = _added(found, told)
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigurationError(f"{path}, line {number}: not in the format {FORMAT}: {error}") from error
    if found is None:
        raise ConfigurationError(
            f'{path} has no measured values: expected a line of JSON with "format": "{FORMAT}", as lentando measure '
            "--json and lentando.optimizers.planning.append_measurement write it"
        )
    return found


def _added(before: Measurement | None, told: Mapping[str, Any]) -> Measurement:
    size = int(told["size"])
    if size < 1 or (before is not None and before.size != size):
        was = "" if before is None else f" after {before.size}"
        raise ConfigurationError(f"size is {size}{was}, but all lines must speak of the same number of ranks")
    found = before or Measurement(size)
    if told.get("model_bytes") is not None:
        found.model_bytes = int(told["model_bytes"])
    means = told.get("compute_seconds_by_rank") or ()
    if means:
        deviations = told.get("compute_deviation_seconds_by_rank") or [None] * len(means)
        if len(means) != size or len(deviations) != size:
            raise ConfigurationError(f"expected compute times of {size} ranks, got {len(means)} and {len(deviations)}")
        found.compute_seconds_by_rank = [_positive(value) for value in means]
        found.compute_deviation_seconds_by_rank = [nan if v is None else _positive(v) for v in deviations]
    for operation, points in (told.get("delays") or {}).items():
        if operation in _OPERATIONS:
            merged = dict(found.delays.get(operation, ()))
            merged |= {int(size_bytes): _positive(seconds) for size_bytes, seconds in points}
            found.delays[operation] = sorted(merged.items())
    return found


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (isfinite(value) and value >= 0):
        raise ConfigurationError(f"expected a time in seconds >= 0, got {value!r}")
    return float(value)
