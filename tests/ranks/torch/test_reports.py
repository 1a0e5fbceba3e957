"""What an optimizer reports, for people and for loggers."""

import json
import math

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
