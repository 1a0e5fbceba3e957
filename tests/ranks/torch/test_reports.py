"""What an optimizer reports, for people and for loggers."""

import json
import math
import socket

import pytest
import torch
from torch import nn

import lentando.torch as lt


@pytest.mark.parametrize("method", ["adacomm", "sgp", "allreduce"])
def test_flat_report_is_one_number_for_each_name(method: str) -> None:
    model = nn.Linear(3, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    if method == "adacomm":
        optimizer = lt.AdaComm(sgd, model=model, initial_period=2, interval_steps=2)
    else:
        optimizer = lt.DistributedOptimizer(sgd, model=model, base=lt.SGP() if method == "sgp" else lt.AllReduce())
    for step in range(9):
        optimizer.zero_grad()
        loss = model(torch.full((2, 3), 1.0 + lt.rank() + step)).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    report, flat = optimizer.report(), optimizer.report(flat=True)
    assert all(type(name) is str and type(value) in (int, float) for name, value in flat.items())
    assert json.loads(json.dumps(flat)) == flat
    assert "decisions" not in flat
    assert {"rounds", "inner_steps", "bytes_sent", "messages", "left_out"} <= flat.keys()
    numbers = [name for name, value in report.items() if isinstance(value, int | float)]
    assert set(numbers) <= flat.keys()
    if report["compute_seconds_by_rank"] is not None:
        by_rank = [flat[f"compute_seconds_by_rank/{rank}"] for rank in range(lt.size())]
        assert all(math.isclose(a, b) for a, b in zip(by_rank, report["compute_seconds_by_rank"], strict=True))
        assert flat["stragglers"] == len(report["stragglers"])
    if method == "adacomm":
        assert report["decisions"]


def test_summary_is_a_table_of_all_ranks_which_is_the_same_on_each() -> None:
    model = nn.Linear(3, 1)
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.01), model=model, period=2)
    assert len(optimizer.summary().splitlines()) == 2 + lt.size()
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.full((2, 3), 1.0 + lt.rank())).square().mean().backward()
        optimizer.step()
    table = optimizer.summary()
    assert lt.allgather_object(table) == [table] * lt.size()
    header, _, *rows = table.splitlines()
    assert header.split()[:4] == ["rank", "host", "steps", "rounds"]
    assert [row.split()[:4] for row in rows] == [
        [str(rank), lt.allgather_object(socket.gethostname())[rank], "6", "3"] for rank in range(lt.size())
    ]


def test_a_summary_that_only_some_ranks_ask_for_is_an_error_on_all() -> None:
    if lt.size() == 1:
        pytest.skip("needs several ranks")
    model = nn.Linear(3, 1)
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.01), model=model, period=2)
    with pytest.raises(lt.MismatchError, match="summary"):
        optimizer.summary() if lt.rank() == 0 else lt.barrier()
