"""Saving and loading that take long are announced on rank 0."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import lentando.torch as lt
from lentando.comm import long_work
from lentando.optimizers.checkpoint import loading, saving


def test_slow_disk_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_announced, write = threading.Event(), long_work._write

    def written(line: str) -> None:
        write(line)
        if line.endswith("..."):
            is_announced.set()

    def slow(function: Any) -> Any:
        def slowed(*args: Any, **options: Any) -> Any:
            assert is_announced.wait(60)
            is_announced.clear()
            return function(*args, **options)

        return slowed

    monkeypatch.setattr(long_work, "QUIET_SECONDS", 0.05)
    monkeypatch.setattr(long_work, "_write", written)
    monkeypatch.setattr(saving, "write_manifest", slow(saving.write_manifest))
    monkeypatch.setattr(loading, "read_manifest", slow(loading.read_manifest))
    lt.init()
    try:
        model = torch.nn.Linear(2, 1)
        optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=2)
        lt.save(tmp_path / "run", optimizer)
        assert f"Lentando: saving a checkpoint to {tmp_path / 'run'} ...\n" in capsys.readouterr().err
        lt.load(tmp_path / "run", optimizer)
        assert f"Lentando: loading the checkpoint in {tmp_path / 'run'} ...\n" in capsys.readouterr().err
    finally:
        lt.shutdown()
