"""``lentando plan``: the predicted time per step of each algorithm, before the cluster is rented."""

import json
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lentando.cli.options import grouped, quantity
from lentando.cli.planned_job import JobOptions, PlannedJob, planned_job
from lentando.cli.predictions import Prediction, Recommendation, predict, recommend
from lentando.cli.quantities import format_bytes, format_seconds, parse_seconds, parse_share
from lentando.cli.tables import print_table
from lentando.comm.long_work import announced_if_long
from lentando.optimizers.planning import Problem, mean_seconds

__all__ = ["plan"]

PERIODS = (4, 12, 48)


@dataclass
class PredictionOptions:
    """Options for the algorithms that are compared, and for the output."""

    period: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Inner steps between averages. May be repeated. [default: 4, 12, 48]"),
    ] = None
    staleness: Annotated[int, typer.Option(min=1, help="Staleness of OSGP, in steps.", show_default=True)] = 1
    overhead: Annotated[
        float,
        quantity(parse_share, "SHARE", "Cost of communication accepted at the recommended period: 10%.", "--overhead"),
    ] = 0.1
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the time per step against the period (matplotlib).")
    ] = None


@dataclass
class LossOptions:
    """Options for the constants of the training run that tau* depends on."""

    loss_gap: Annotated[float | None, typer.Option(help="For tau*: F(x_1) - F_inf, by how much the loss can fall.")] = (
        None
    )
    lipschitz: Annotated[float | None, typer.Option(help="For tau*: L, Lipschitz constant of the gradient.")] = None
    variance: Annotated[float | None, typer.Option(help="For tau*: sigma^2 of the stochastic gradient.")] = None
    learning_rate: Annotated[float | None, typer.Option(help="For tau*: eta, the learning rate.")] = None
    time: Annotated[
        float | None, quantity(parse_seconds, "TIME", "For tau*: T, the duration of the training: 2h.", "--time")
    ] = None

    def problem(self) -> Problem | None:
        """Return the constants, or None if none is given."""
        values = {f"--{name.replace('_', '-')}": value for name, value in vars(self).items()}
        missing = [option for option, value in values.items() if value is None]
        if len(missing) == len(values):
            return None
        if missing:
            raise typer.BadParameter(f"tau* needs all five of {', '.join(values)}: missing {', '.join(missing)}")
        return Problem(*astuple(self))


@grouped
def plan(described: JobOptions, wanted: PredictionOptions, loss: LossOptions) -> None:
    """Predict the time per step of each algorithm, and an initial period for AdaComm.

    From a description of the cluster:

    lentando plan --parameters 25.6M --bandwidth 10gbit --latency 50us --compute 180ms --workers 32
    --distribution exponential

    From measurements on it, which options may override:

    mpirun -np 4 lentando measure --parameters 25.6M --json > cluster.jsonl

    lentando plan --from cluster.jsonl --compute 180ms

    Times are expectations under the delay model of AdaComm (arXiv 1810.08313): independent compute times, constant
    delays, one rank per node. SGP gossips with one peer per step.
    """
    job = planned_job(described)
    periods = sorted(set(wanted.period or PERIODS))
    with announced_if_long(f"predicting the steps of {job.size} workers"):
        predictions = predict(job.compute, job.size, job.delays, periods, wanted.staleness, job.is_gossip_known)
        recommended = recommend(job.compute, job.size, job.delays, wanted.overhead, loss.problem())
    if wanted.as_json:
        typer.echo(json.dumps(_document(job, predictions, recommended), allow_nan=False))
    else:
        _print(job, predictions, recommended)
    if wanted.plot is not None:
        from lentando.cli.picture import draw

        draw(wanted.plot, job, predictions, recommended)
        typer.echo(f"picture written to {wanted.plot}", err=True)


def _print(job: PlannedJob, predictions: list[Prediction], recommended: Recommendation) -> None:
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
    advice = f"begin with period {recommended.period}" if recommended.period else "no period"
    typer.echo(f"\nAdaComm: {advice}: {recommended.reason}.")


def _document(job: PlannedJob, predictions: list[Prediction], recommended: Recommendation) -> dict[str, Any]:
    """Return the prediction as a JSON object."""
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
