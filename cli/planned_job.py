"""The job that ``lentando plan`` predicts: its options, and the compute times and delays that follow from them."""

from dataclasses import dataclass, replace
from enum import Enum
from math import inf
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from lentando.cli.options import CodedDtype, Dtype, quantity
from lentando.cli.quantities import (
    format_bandwidth,
    format_bytes,
    format_seconds,
    parse_bandwidth,
    parse_bytes,
    parse_count,
    parse_seconds,
)
from lentando.comm.cluster import Compute, Network
from lentando.comm.errors import ConfigurationError
from lentando.optimizers.planning import Delays, Measurement, network_delays, read_measurement
from lentando.optimizers.rules.wire import wire_of

__all__ = ["JobOptions", "PlannedJob", "planned_job"]


class Distribution(str, Enum):
    """Distribution of the compute times of single steps."""

    constant = "constant"
    exponential = "exponential"
    lognormal = "lognormal"


@dataclass
class JobOptions:
    """Options that describe the model, the workers and their network."""

    parameters: Annotated[
        int | None, quantity(parse_count, "COUNT", "Number of parameters of the model: 25.6M, 7B.", "--parameters")
    ] = None
    model_size: Annotated[
        int | None, quantity(parse_bytes, "SIZE", "Size of the model, instead of --parameters: 100MB.", "--model-size")
    ] = None
    bandwidth: Annotated[
        float | None,
        quantity(
            parse_bandwidth, "RATE", "Bandwidth of each worker's link, per direction: 10gbit, 1.25GB/s.", "--bandwidth"
        ),
    ] = None
    latency: Annotated[float | None, quantity(parse_seconds, "TIME", "Latency of a message: 50us.", "--latency")] = None
    compute: Annotated[
        float | None,
        quantity(parse_seconds, "TIME", "Mean time of a step without communication: 180ms.", "--compute"),
    ] = None
    workers: Annotated[int | None, quantity(parse_count, "COUNT", "Number of workers.", "--workers")] = None
    distribution: Annotated[
        Distribution | None, typer.Option(help="Distribution of the times of single steps. [default: constant]")
    ] = None
    variation: Annotated[
        float, typer.Option(min=0.0, help="Standard deviation over mean of lognormal times.", show_default=True)
    ] = 0.3
    straggler: Annotated[
        list[str] | None,
        typer.Option(metavar="RANK:FACTOR", help="A rank that is permanently slower: 3:2.5. May be repeated."),
    ] = None
    dtype: Annotated[Dtype, typer.Option(help="Data type of the parameters.", show_default=True)] = Dtype.float32
    wire_dtype: Annotated[
        CodedDtype | None,
        typer.Option(help="How outer steps are sent, with --bandwidth and --latency.", show_default=False),
    ] = None
    measured: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Output of `lentando measure --json`, or an earlier run's report."),
    ] = None

    @property
    def has_network(self) -> bool:
        """Whether the options describe a network, which then replaces measured delays."""
        return self.bandwidth is not None or self.latency is not None


@dataclass
class PlannedJob:
    """A job whose time per step can be predicted.

    Attributes:
        size: number of workers.
        model_bytes: size of the parameters.
        compute: distribution of compute times.
        delays: delays of the operations, in seconds.
        source: origin of the delays, for the page.
        is_gossip_known: whether ``delays`` include those of gossip.
    """

    size: int
    model_bytes: int
    compute: Compute
    delays: Delays
    source: str
    is_gossip_known: bool


def planned_job(options: JobOptions) -> PlannedJob:
    """Combine the options with the measured values of ``--from``; options take precedence.

    Raises:
        ConfigurationError: if the measured values do not determine the delays of this job.
        typer.BadParameter: if options are missing, or contradict each other.
    """
    measurement = None if options.measured is None else read_measurement(options.measured)
    size = options.workers or (measurement.size if measurement else None)
    model_bytes = _model_bytes(options, measurement)
    mean_compute = _mean_compute(options, measurement, size)
    needs_network = measurement is None or options.has_network
    missing = {
        "--parameters (or --model-size)": model_bytes is None,
        "--workers": size is None,
        "--compute": mean_compute is None,
        "--bandwidth": needs_network and options.bandwidth is None,
        "--latency": needs_network and options.latency is None,
    }
    if any(missing.values()):
        names = ", ".join(option for option, is_missing in missing.items() if is_missing)
        file = options.measured
        remedy = f"{file} does not contain them" if file else "give them, or --from a file of measured values"
        raise typer.BadParameter(f"missing {names}: {remedy}")
    assert size is not None and model_bytes is not None and mean_compute is not None
    compute = _with_stragglers(_with_distribution(mean_compute, options), options.straggler or [], size)
    if measurement is None or options.has_network:
        return _on_network(options, size, model_bytes, compute)
    return _as_measured(options, measurement, size, model_bytes, compute)


def _on_network(options: JobOptions, size: int, model_bytes: int, compute: Compute) -> PlannedJob:
    """Return the job on the network that the options describe."""
    assert options.bandwidth is not None and options.latency is not None
    element_bytes = options.dtype.size_bytes
    gossip_bytes = model_bytes // element_bytes * max(4, element_bytes)
    network = Network(options.latency, options.bandwidth)
    coded_bytes = 0
    if options.wire_dtype is not None:
        elements: Any = np.broadcast_to(np.zeros(1, np.float32), (model_bytes // element_bytes,))
        coded_bytes = wire_of(options.wire_dtype.value).size_bytes(elements)
    delays = network_delays(network, size, model_bytes, gossip_bytes=gossip_bytes, coded_bytes=coded_bytes)
    source = f"links of {format_bandwidth(options.bandwidth)} and {format_seconds(options.latency)}"
    return PlannedJob(size, model_bytes, compute, delays, source, is_gossip_known=True)


def _as_measured(
    options: JobOptions, measurement: Measurement, size: int, model_bytes: int, compute: Compute
) -> PlannedJob:
    """Return the job on the network whose delays were measured."""
    if options.wire_dtype is not None:
        raise ConfigurationError(
            "--wire-dtype needs --bandwidth and --latency: what was measured are averages in full precision"
        )
    if size != measurement.size:
        raise ConfigurationError(
            f"{options.measured} was measured on {measurement.size} ranks: it does not determine the delays on {size}. "
            f"Measure on {size} ranks, or describe the network by --bandwidth and --latency"
        )
    delays = measurement.delays_at(model_bytes)
    if delays is None:
        raise ConfigurationError(
            f"{options.measured} does not determine the delays of a model of {format_bytes(model_bytes)}: run "
            "`lentando measure` for this size, or give --bandwidth and --latency"
        )
    source = f"delays measured, in {options.measured}"
    is_gossip_known = bool(measurement.delays.get("exchange"))
    return PlannedJob(size, model_bytes, compute, delays, source, is_gossip_known)


def _model_bytes(options: JobOptions, measurement: Measurement | None) -> int | None:
    if options.parameters is not None and options.model_size is not None:
        raise typer.BadParameter("give --parameters or --model-size, not both")
    if options.model_size is not None:
        return options.model_size
    if options.parameters is not None:
        return options.parameters * options.dtype.size_bytes
    return None if measurement is None else measurement.model_bytes


def _mean_compute(options: JobOptions, measurement: Measurement | None, size: int | None) -> Compute | None:
    if options.compute is not None:
        return Compute(options.compute)
    return None if measurement is None or size != measurement.size else measurement.compute()


def _with_distribution(compute: Compute, options: JobOptions) -> Compute:
    if options.distribution is None:
        return compute
    return replace(compute, distribution=options.distribution.value, variation=options.variation)


def _with_stragglers(compute: Compute, texts: list[str], size: int) -> Compute:
    """Add stragglers, each written as ``RANK:FACTOR``."""
    factors = dict(compute.stragglers)
    for text in texts:
        rank, _, factor = text.partition(":")
        try:
            number, times = int(rank), float(factor)
        except ValueError:
            number, times = -1, 0.0
        if not 0 <= number < size or not 0 < times < inf:
            raise typer.BadParameter(
                f"--straggler: expected RANK:FACTOR such as 3:2.5, with a rank from 0 to {size - 1}, got {text!r}"
            )
        factors[number] = times
    return replace(compute, stragglers=factors)
