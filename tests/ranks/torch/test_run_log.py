"""The log of a run: means over ranks, one line at a time, continued by a resumed run."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import lentando.torch as lt
from lentando.cli.report.logs import read_run


def trained(steps: int) -> "lt.SlowMo":
    model = nn.Linear(3, 1)
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.01), model=model, period=2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 3), 1.0 + lt.rank())).square().mean().backward()
        optimizer.step()
    return optimizer


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]


def test_a_line_contains_means_over_ranks_and_is_the_same_on_each(shared_path: Path) -> None:
    optimizer = trained(4)
    log = optimizer.open_log(shared_path / "run")
    line = log.write(loss=float(lt.rank()), accuracy=0.5, with_consensus=True)
    assert lt.allgather_object(line) == [line] * lt.size()
    assert line["loss"] == sum(range(lt.size())) / lt.size()
    assert (line["step"], line["rounds"], line["period"], line["accuracy"]) == (4, 2, 2, 0.5)
    assert line["consensus_distance"] == 0.0  # right after an outer step
    assert line["bytes_sent"] == sum(lt.allgather_object(optimizer.report()["bytes_sent"]))
    header, written = lines(shared_path / "run")
    assert written == line
    assert (header["method"], header["ranks"]) == (repr(optimizer), lt.size())


def test_a_log_is_continued_and_numbers_that_are_not_finite_are_null(shared_path: Path) -> None:
    for loss in (1.0, math.nan):
        trained(2).open_log(shared_path / "run").write(loss=loss)
    assert [line["loss"] for line in lines(shared_path / "run") if "loss" in line] == [1.0, None]
    assert sum("method" in line for line in lines(shared_path / "run")) == 2


def test_values_and_names_that_do_not_fit_are_errors_on_every_rank(shared_path: Path) -> None:
    log = trained(2).open_log(shared_path / "run")
    last = lt.size() - 1
    with pytest.raises(lt.ConfigurationError, match=f"a log takes numbers by name, got loss='high' on rank {last}"):
        log.write(loss="high" if lt.rank() == last else 1.0)
    if lt.size() > 1:
        with pytest.raises(lt.MismatchError):
            log.write(**{"loss" if lt.rank() == 0 else "accuracy": 1.0})
    for taken in ("step", "method", "consensus_distance", "compute_seconds_by_rank/0"):
        with pytest.raises(lt.ConfigurationError, match=f"{taken}, a name of its own, on rank 0"):
            log.write(**{taken: 1.0})
    log.write(loss=2.0)  # the log still works
    assert lines(shared_path / "run")[-1]["loss"] == 2.0


def test_a_folder_that_cannot_be_written_is_an_error_on_every_rank(shared_path: Path) -> None:
    if lt.rank() == 0:
        (shared_path / "file").write_text("")
    lt.barrier()
    with pytest.raises(lt.ConfigurationError, match="rank 0 cannot write the log of the run"):
        trained(1).open_log(shared_path / "file")


def test_a_line_that_was_cut_off_by_a_kill_is_left_behind(shared_path: Path) -> None:
    trained(2).open_log(shared_path / "run").write(loss=1.0)
    if lt.rank() == 0:
        with (shared_path / "run" / "run.jsonl").open("a") as file:
            file.write('{"step": 4, "lo')
    lt.barrier()
    trained(2).open_log(shared_path / "run").write(loss=2.0)
    text = (shared_path / "run" / "run.jsonl").read_text()
    assert [line.startswith("{") for line in text.splitlines()] == [True] * 5
    assert read_run(shared_path / "run").lines[-1]["loss"] == 2.0
