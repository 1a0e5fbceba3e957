"""``lentando measure``: the measured cost of communication between the ranks of a job."""

import json
from typing import Annotated

import typer

from lentando.cli.options import Dtype, quantity
from lentando.cli.quantities import format_bandwidth, format_bytes, format_seconds, parse_count
from lentando.cli.tables import print_table
from lentando.comm import world
from lentando.comm.long_work import announced_if_long
from lentando.optimizers.measure import measure_delays
from lentando.optimizers.planning import Measurement, measurement_line

__all__ = ["measure"]

OPERATIONS = {
    "gradient_average": "all-reduce of gradients",
    "outer_step": "outer step (exact average)",
    "slow_momentum": "slow momentum, additional",
    "exchange": "gossip with one peer",
    "exchange_local": "gossip, arithmetic",
}


def measure(
    parameters: Annotated[
        int, quantity(parse_count, "COUNT", "Number of parameters of the model: 25.6M, 7B.", "--parameters")
    ],
    dtype: Annotated[Dtype, typer.Option(help="Data type of the parameters.", show_default=True)] = Dtype.float32,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each operation and size.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for lentando plan --from.")] = False,
) -> None:
    """Measure latency, bandwidth and delay of averages and gossip, with the code that training runs.

    Run it under the launcher of the training, on the same nodes:

    mpirun -np 4 lentando measure --parameters 25.6M

    mpirun -np 4 lentando measure --parameters 25.6M --json > cluster.jsonl
    """
    world.init()
    with announced_if_long(f"measuring averages and gossip, {repeats} times each", world.rank()):
        measured = measure_delays(world.transport(), parameters, dtype.value, repeats)
    if world.rank() == 0:
        if as_json:
            typer.echo(json.dumps(measurement_line(measured), allow_nan=False))
        else:
            _print(measured)
    world.shutdown()


def _print(measured: Measurement) -> None:
    assert measured.model_bytes is not None
    typer.echo(f"{measured.size} ranks, model of {format_bytes(measured.model_bytes)}\n")
    rows = [["control message", format_seconds(measured.delays["control"][0][1]), "", ""]]
    for operation, name in OPERATIONS.items():
        delay = measured.delay_at(operation, measured.model_bytes)
        if delay is None:
            continue
        fitted = measured.fit(operation)
        latency = bandwidth = ""
        if fitted is not None:
            latency = format_seconds(fitted.latency_seconds)
            bandwidth = format_bandwidth(1 / fitted.seconds_per_byte) if fitted.seconds_per_byte else ""
        rows.append([name, format_seconds(delay), latency, bandwidth])
    print_table(["operation", "delay", "latency", "model bytes per time"], rows)
