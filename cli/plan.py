"""``lentando plan``: how long a step will take with each algorithm, before the cluster is rented."""

import json
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from lentando.cli.options import quantity
from lentando.cli.predictions import Prediction, Recommendation, predict, recommend
from lentando.cli.quantities import (
    format_bandwidth,
    format_bytes,
    format_seconds,
    parse_bandwidth,
    parse_bytes,
    parse_count,
    parse_seconds,
    parse_share,
)
from lentando.cli.tables import print_table
from lentando.comm.cluster import Compute, Network
from lentando.comm.errors import ConfigurationError
from lentando.optimizers.planning import Delays, Problem, mean_seconds, network_delays, read_measurement

__all__ = ["Dtype", "plan"]

PERIODS = (4, 12, 48)


class Dtype(str, Enum):
    """Of the parameters."""

    float32 = "float32"
    float64 = "float64"
    float16 = "float16"
    bfloat16 = "bfloat16"

    @property
    def size_bytes(self) -> int:
        """Of one parameter."""
        return {"float64": 8, "float32": 4}.get(self.value, 2)


class Distribution(str, Enum):
    """Of compute times."""

    constant = "constant"
    exponential = "exponential"
    lognormal = "lognormal"


def plan(
    parameters: Annotated[
        int | None, quantity(parse_count, "COUNT", "Parameters of the model: 25.6M, 7B.", "--parameters")
    ] = None,
    model_size: Annotated[
        int | None, quantity(parse_bytes, "SIZE", "Of the model, instead of its parameters: 100MB.", "--model-size")
    ] = None,
    bandwidth: Annotated[
        float | None,
        quantity(parse_bandwidth, "RATE", "Of each worker's link, each way: 10gbit, 1.25GB/s.", "--bandwidth"),
    ] = None,
    latency: Annotated[float | None, quantity(parse_seconds, "TIME", "Of a message: 50us.", "--latency")] = None,
    compute: Annotated[
        float | None,
        quantity(parse_seconds, "TIME", "Mean time of a step, without communication: 180ms.", "--compute"),
    ] = None,
    workers: Annotated[int | None, quantity(parse_count, "COUNT", "Number of workers.", "--workers")] = None,
    distribution: Annotated[
        Distribution | None, typer.Option(help="How the times of single steps are distributed. [default: constant]")
    ] = None,
    variation: Annotated[
        float, typer.Option(min=0.0, help="Standard deviation over mean of lognormal times.", show_default=True)
    ] = 0.3,
    straggler: Annotated[
        list[str] | None,
        typer.Option(metavar="RANK:FACTOR", help="A rank that is slower for good: 3:2.5. May be repeated."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the parameters.", show_default=True)] = Dtype.float32,
    period: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Inner steps between averages. May be repeated. [default: 4, 12, 48]"),
    ] = None,
    staleness: Annotated[int, typer.Option(min=1, help="Of OSGP, in steps.", show_default=True)] = 1,
    overhead: Annotated[
        float,
        quantity(parse_share, "SHARE", "What communication may cost at the recommended period: 10%.", "--overhead"),
    ] = 0.1,
    measured: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Values of `lentando measure --json`, or an earlier run's report."),
    ] = None,
    loss_gap: Annotated[float | None, typer.Option(help="For tau*: F(x_1) - F_inf, how far the loss can fall.")] = None,
    lipschitz: Annotated[float | None, typer.Option(help="For tau*: L, Lipschitz constant of the gradient.")] = None,
    variance: Annotated[float | None, typer.Option(help="For tau*: sigma^2 of the stochastic gradient.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="For tau*: eta.")] = None,
    time: Annotated[
        float | None, quantity(parse_seconds, "TIME", "For tau*: how long the training lasts: 2h.", "--time")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the time per step against the period (matplotlib).")
    ] = None,
) -> None:
    """Predict the time per step of each algorithm, and the period for AdaComm to begin with.

    From a description of the cluster:

    lentando plan --parameters 25.6M --bandwidth 10gbit --latency 50us --compute 180ms --workers 32
    --distribution exponential

    From measurements on it, which options may override:

    mpirun -np 4 lentando measure --parameters 25.6M --json > cluster.jsonl

    lentando plan --from cluster.jsonl --compute 180ms

    Times are expectations under the delay model of AdaComm (arXiv 1810.08313): independent compute times, constant
    delays, one rank per node. SGP gossips with one peer per step.
    """
    described = _Described(
        parameters, model_size, bandwidth, latency, compute, workers, distribution, variation, straggler or [], dtype
    )
    job = _job(described, measured)
    periods = sorted(set(period or PERIODS))
    predictions = predict(job.compute, job.size, job.delays, periods, staleness, job.gossip_is_known)
    problem = _problem(loss_gap, lipschitz, variance, learning_rate, time)
    recommended = recommend(job.compute, job.size, job.delays, overhead, problem)
    if as_json:
        typer.echo(json.dumps(_told(job, predictions, recommended), allow_nan=False))
    else:
        _print(job, predictions, recommended)
    if plot is not None:
        from lentando.cli.picture import draw

        draw(plot, job.compute, job.size, job.delays, predictions, recommended)
        typer.echo(f"picture written to {plot}", err=True)


@dataclass
class _Described:
    """What the options say of the job."""

    parameters: int | None
    model_size: int | None
    bandwidth: float | None
    latency: float | None
    compute: float | None
    workers: int | None
    distribution: Distribution | None
    variation: float
    straggler: list[str]
    dtype: Dtype


@dataclass
class _Job:
    """What is predicted, and where it comes from."""

    size: int
    model_bytes: int
    compute: Compute
    delays: Delays
    source: str
    gossip_is_known: bool


def _job(given: _Described, measured: Path | None) -> _Job:
    measurement = None if measured is None else read_measurement(measured)
    size = given.workers or (measurement.size if measurement else None)
    model_bytes = None if measurement is None else measurement.model_bytes
    if given.parameters is not None and given.model_size is not None:
        raise typer.BadParameter("give --parameters or --model-size, not both")
    if given.model_size is not None:
        model_bytes = given.model_size
    if given.parameters is not None:
        model_bytes = given.parameters * given.dtype.size_bytes
    known = None if measurement is None or size != measurement.size else measurement.compute()
    if given.compute is not None:
        known = Compute(given.compute)
    network_given = given.bandwidth is not None or given.latency is not None
    missing = [
        option
        for option, is_missing in (
            ("--parameters (or --model-size)", model_bytes is None),
            ("--workers", size is None),
            ("--compute", known is None),
            ("--bandwidth", given.bandwidth is None and (measurement is None or network_given)),
            ("--latency", given.latency is None and (measurement is None or network_given)),
        )
        if is_missing
    ]
    if missing:
        told = f"{measured} does not tell" if measured else "give them, or --from a file of measured values"
        raise typer.BadParameter(f"missing {', '.join(missing)}: {told}")
    assert size is not None and model_bytes is not None and known is not None
    compute = _with_stragglers(_distributed(known, given), given.straggler, size)
    if network_given or measurement is None:
        assert given.bandwidth is not None and given.latency is not None
        gossip_bytes = model_bytes // given.dtype.size_bytes * max(4, given.dtype.size_bytes)
        network = Network(given.latency, given.bandwidth)
        delays = network_delays(network, size, model_bytes, gossip_bytes=gossip_bytes)
        source = f"links of {format_bandwidth(given.bandwidth)} and {format_seconds(given.latency)}"
        return _Job(size, model_bytes, compute, delays, source, gossip_is_known=True)
    if size != measurement.size:
        raise ConfigurationError(
            f"{measured} was measured on {measurement.size} ranks: delays on {size} cannot be told from it. Measure on "
            f"{size}, or describe the network by --bandwidth and --latency"
        )
    found = measurement.delays_at(model_bytes)
    if found is None:
        raise ConfigurationError(
            f"{measured} tells no delays for a model of {format_bytes(model_bytes)}: run `lentando measure` for this "
            "size, or give --bandwidth and --latency"
        )
    gossips = bool(measurement.delays.get("exchange"))
    return _Job(size, model_bytes, compute, found, f"delays measured, in {measured}", gossips)


def _distributed(known: Compute, given: _Described) -> Compute:
    if given.distribution is None:
        return known
    return replace(known, distribution=given.distribution.value, variation=given.variation)


def _with_stragglers(compute: Compute, told: list[str], size: int) -> Compute:
    factors = dict(compute.stragglers)
    for text in told:
        rank, _, factor = text.partition(":")
        try:
            number, times = int(rank), float(factor)
        except ValueError:
            number, times = -1, 0.0
        if not 0 <= number < size or not 0 < times < float("inf"):
            raise typer.BadParameter(
                f"--straggler: expected RANK:FACTOR such as 3:2.5, with a rank from 0 to {size - 1}, got {text!r}"
            )
        factors[number] = times
    return replace(compute, stragglers=factors)


def _problem(
    loss_gap: float | None,
    lipschitz: float | None,
    variance: float | None,
    learning_rate: float | None,
    time_seconds: float | None,
) -> Problem | None:
    told = {
        "--loss-gap": loss_gap,
        "--lipschitz": lipschitz,
        "--variance": variance,
        "--learning-rate": learning_rate,
        "--time": time_seconds,
    }
    missing = [option for option, value in told.items() if value is None]
    if len(missing) == len(told):
        return None
    if missing:
        raise typer.BadParameter(f"tau* needs all five of {', '.join(told)}: missing {', '.join(missing)}")
    values: list[Any] = list(told.values())
    return Problem(*values)


def _print(job: _Job, predictions: list[Prediction], recommended: Recommendation) -> None:
    compute = job.compute
    slowest = max(mean_seconds(compute, rank) for rank in range(job.size))
    typer.echo(
        f"{job.size} workers, model of {format_bytes(job.model_bytes)}; a step computes {format_seconds(slowest)} "
        f"({compute.distribution}{', slowest rank' if compute.stragglers else ''}); {job.source}\n"
    )
    rows = [
        [
            row.algorithm,
            "" if row.period is None else str(row.period),
            "unknown" if row.seconds_per_step is None else format_seconds(row.seconds_per_step),
            "" if row.speed_up is None else f"{row.speed_up:.2f}",
            "" if row.communication_share is None else f"{100 * row.communication_share:.0f} %",
            row.known,
        ]
        for row in predictions
    ]
    print_table(["algorithm", "period", "time per step", "speed-up", "not computing", "known"], rows)
    begin = f"begin with period {recommended.period}" if recommended.period else "no period"
    typer.echo(f"\nAdaComm: {begin}: {recommended.reason}.")


def _told(job: _Job, predictions: list[Prediction], recommended: Recommendation) -> dict[str, Any]:
    return {
        "size": job.size,
        "model_bytes": job.model_bytes,
        "compute": {
            "mean_seconds_by_rank": [mean_seconds(job.compute, rank) for rank in range(job.size)],
            "distribution": job.compute.distribution,
        },
        "delays": asdict(job.delays),
        "source": job.source,
        "predictions": [asdict(row) for row in predictions],
        "recommended": asdict(recommended),
    }
