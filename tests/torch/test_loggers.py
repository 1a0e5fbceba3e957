"""A log of a run is written to TensorBoard, W&B and MLflow as well: their own packages, offline, where installed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lentando.torch as lt

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # loggers warn about what is of no interest here
LOSSES = [1.0, 0.5]
NAMES = {"loss", "val/accuracy", "lentando/seconds", "lentando/period", "lentando/rounds", "lentando/bytes_sent"}


@pytest.fixture(autouse=True)
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LENTANDO_TRANSPORT", "single")
    lt.init()
    yield
    lt.shutdown()


def train(folder: Path, to: Any) -> None:
    """Two epochs of three steps, each with a line in the log."""
    model = torch.nn.Linear(2, 1)
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=3)
    log = optimizer.open_log(folder, to=to)
    for loss in LOSSES:
        for _ in range(3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        log.write(loss=loss, **{"val/accuracy": 0.75})


def test_a_function_gets_each_line_with_its_step(tmp_path: Path) -> None:
    found: list[tuple[dict[str, float], int]] = []
    train(tmp_path, lambda numbers, step: found.append((numbers, step)))
    assert [(numbers["loss"], numbers["lentando/rounds"], step) for numbers, step in found] == [
        (1.0, 1, 3),
        (0.5, 2, 6),
    ]
    assert set(found[0][0]) > NAMES
    assert "lentando/step" not in found[0][0]
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines[1:]] == LOSSES


def test_what_is_no_logger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lt.ConfigurationError, match=r"to a SummaryWriter, got to='runs' on rank 0"):
        train(tmp_path, "runs")


def test_an_error_of_the_logger_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, lambda _numbers, step: step / 0)


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "board")) as writer:
        train(tmp_path, writer)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert set(events.Tags()["scalars"]) > NAMES
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 1.0), (6, 0.5)]


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "wandb"))
    with wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True)) as run:
        train(tmp_path, run.log)
        run.log({"end": 1})  # W&B writes a step once the next one has come
        found = dict(run.summary)
    assert set(found) > NAMES
    assert (found["loss"], found["_step"]) == (0.5, 6)


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with mlflow.start_run() as run:
        train(tmp_path, mlflow.log_metrics)
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(3, 1.0), (6, 0.5)]
    assert set(mlflow.get_run(run.info.run_id).data.metrics) > NAMES
