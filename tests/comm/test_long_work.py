"""Work that takes long is announced on rank 0, and shorter work is not."""

import re
import time

import pytest

from lentando.comm import long_work
from lentando.comm.long_work import announced_if_long


def test_long_work_is_announced_when_it_takes_long_and_when_it_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_work, "QUIET_SECONDS", 0.01)
    written = ""
    with announced_if_long("reading the data"):
        for _ in range(1000):
            written += capsys.readouterr().err
            if written:
                break
            time.sleep(0.01)
    assert written == "Lentando: reading the data ...\n"
    assert re.fullmatch(r"Lentando: reading the data has ended after \d s\n", capsys.readouterr().err)


def test_work_that_ends_in_time_is_not_mentioned(capsys: pytest.CaptureFixture[str]) -> None:
    with announced_if_long("reading the data"):
        pass
    assert capsys.readouterr().err == ""


def test_other_ranks_write_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_work, "QUIET_SECONDS", 0.0)
    with announced_if_long("reading the data", rank=1):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_an_error_is_passed_on_and_ends_the_announcement(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_work, "QUIET_SECONDS", 0.01)

    def fail() -> None:
        while not capsys.readouterr().err:
            time.sleep(0.01)
        raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"), announced_if_long("saving"):
        fail()
    assert "saving has ended after" in capsys.readouterr().err
