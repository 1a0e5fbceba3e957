"""What PyTorch's users build on torch.distributed, over the backend "lentando", against the same program over gloo.

The cases are the functions of ``tests/support/torch_distributed``. All of them run in one job for each backend and
number of ranks. With two ranks there is one order to add in, so that the results are equal bit for bit.
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from case_selection import selected_cases
from launchers import OPEN_MPI, TORCHRUN
from launching import Job
from safetensors.torch import load_file

PROGRAM = Path(__file__).parents[1] / "support/torch_distributed"
SIZES = selected_cases((2,), (2, 3))
SECONDS = 200
TOLERANCES: dict[str, Any] = {
    "ddp.float16_messages": {"rtol": 1e-2, "atol": 1e-3},
    "ddp.mixed_dtypes": {"rtol": 1e-1, "atol": 1e-2},  # bfloat16
    "sharded.fsdp_in_bfloat16": {"rtol": 1e-1, "atol": 1e-2},
}
"""Of three ranks, where sums are rounded to fewer bits than float32 has."""


@dataclass(frozen=True)
class Results:
    """What a job has found: the tensors and the errors of each rank."""

    tensors: list[dict[str, torch.Tensor]]
    errors: list[dict[str, str]]


Runs = Callable[[str, int], Results]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs the job of a backend and a number of ranks, once. Each saves a checkpoint, or loads that of two ranks."""

    @cache
    def run(backend: str, size: int) -> Results:
        if size != SIZES[0]:
            run(backend, SIZES[0])  # saves the checkpoint
        folder = tmp_path_factory.mktemp(f"{backend}_{size}")
        checkpoint = tmp_path_factory.getbasetemp() / f"checkpoint of {backend}"
        names = [case for case in CASES if size == SIZES[0] or case != "checkpoints.saved"]
        job = start(backend, size, str(folder), "--checkpoint", str(checkpoint), *names)
        assert job.status == 0, job.output
        return Results(
            [load_file(folder / f"{rank}.safetensors") for rank in range(size)],
            [json.loads((folder / f"{rank}.errors.json").read_text()) for rank in range(size)],
        )

    return run


def start(backend: str, size: int, *arguments: str) -> Job:
    launcher = TORCHRUN if backend == "gloo" else OPEN_MPI
    return launcher.run(size, str(PROGRAM), backend, *arguments, timeout_seconds=SECONDS, prepared="lentando.torch")


with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(PROGRAM)
    CASES: list[str] = importlib.import_module("program_cases").names()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_same_results_as_over_gloo(results: Runs, size: int, case: str) -> None:
    if (size, case) == (3, "checkpoints.saved"):
        pytest.skip("three ranks load what two have saved")
    ours, theirs = results("lentando", size), results("gloo", size)
    for rank in range(size):
        assert theirs.errors[rank].get(case) is None, "the case itself is wrong"
        assert ours.errors[rank].get(case) is None, ours.errors[rank][case]
        found, expected = (
            {name: value for name, value in each.tensors[rank].items() if name.startswith(f"{case}: ")}
            for each in (ours, theirs)
        )
        tolerance = {"rtol": 0, "atol": 0} if size == 2 else TOLERANCES.get(case, {"rtol": 1e-4, "atol": 1e-6})
        torch.testing.assert_close(found, expected, **tolerance)
