"""Models on a GPU train as those on a CPU do, within rounding, on any number of ranks, and resume bit-identically."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from launchers import TORCHRUN
from launching import Job, mpirun

PROGRAM = str(Path(__file__).parent / "train.py")
DIGITS = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.2}
METHODS = ["allreduce", "slowmo", "sgp", "osgp"]
CASES = [f"{method}:{dtype}" for dtype in DIGITS for method in METHODS]
CHECK = """
import cupy
from lentando.comm import world
from lentando.comm.testing import check_device_arrays, check_transport
world.init()
cupy.cuda.Device(world.local_rank() % cupy.cuda.runtime.getDeviceCount()).use()
check_transport(world.transport())
check_device_arrays(world.transport(), cupy.asarray)
print("promises kept")
"""

Trained = Callable[[int, str, str], Callable[[str], list[Any]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, dry_run: bool) -> Trained:
    """Trains all cases in one job of so many ranks, on a device, over a transport; what each rank has of one of them.

    A job that fails has trained the cases before.
    """
    prepared = "lentando.torch" if dry_run else None  # a process that was forked cannot use CUDA
    cases = [case for case in CASES if not dry_run or case.endswith("float32")]

    def job(size: int, device: str, transport: str, folder: Path) -> Job:
        arguments = PROGRAM, device, str(folder), *cases
        if transport == "torch":
            return TORCHRUN.run(size, *arguments, timeout_seconds=120, prepared=prepared)
        environment: dict[str, str | None] = {"LENTANDO_TRANSPORT": "mpi" if dry_run else transport}
        return mpirun(size, *arguments, timeout_seconds=120, environment=environment, prepared=prepared)

    @cache
    def run(size: int, device: str, transport: str) -> Callable[[str], list[Any]]:
        folder = tmp_path_factory.mktemp("trained")
        done = job(size, device, transport, folder)

        def of(case: str) -> list[Any]:
            if case not in cases:
                pytest.skip("a dry run: float32 alone")
            files = [folder / f"{case}-{device}-{rank}.pt" for rank in range(size)]
            assert all(file.exists() for file in files), f"status {done.status}\n{done.output}"
            return [torch.load(file, weights_only=True) for file in files]

        return of

    return run


def assert_alike(trained: Trained, case: str, size: int, device: str, transport: str) -> None:
    digits = DIGITS[case.partition(":")[2]]
    expected = trained(size, "cpu", "mpi")(case)
    found = trained(size, device, transport)(case)
    for (on_gpu, resumed), (on_cpu, _) in zip(found, expected, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=digits, atol=digits)
        torch.testing.assert_close(resumed, on_gpu, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", ["cuda", "own-stream"])
def test_model_on_a_gpu_over_nccl(device: str, case: str, trained: Trained) -> None:
    assert_alike(trained, case, 1, device, "nccl")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_share_a_gpu_over_mpi(size: int, case: str, trained: Trained) -> None:
    assert_alike(trained, case, size, "cuda", "mpi")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 2])
def test_ranks_that_share_a_gpu_over_torch_distributed(size: int, case: str, trained: Trained) -> None:
    assert_alike(trained, case, size, "cuda", "torch")


@pytest.mark.parametrize("case", CASES)
def test_model_on_a_cpu_where_nccl_is_asked_for(case: str, trained: Trained) -> None:
    assert_alike(trained, case, 2, "cpu", "nccl")


@pytest.mark.usefixtures("only_on_a_gpu")
def test_ranks_that_share_a_gpu_over_nccl_are_refused_on_every_rank() -> None:
    size = torch.cuda.device_count() + 1
    job = mpirun(size, "-c", CHECK, timeout_seconds=60, environment={"LENTANDO_TRANSPORT": "nccl"})
    assert job.status not in (0, None)
    assert (
        job.output.count("ConfigurationError: NCCL needs a GPU for every rank, but one is used by ranks 0 and") == size
    )


@pytest.mark.parametrize("case", CASES)
def test_ranks_with_a_gpu_each(case: str, trained: Trained) -> None:
    assert_alike(trained, case, several_gpus(), "cuda", "nccl")


def test_nccl_of_several_ranks_keeps_the_promises() -> None:
    size = several_gpus()
    job = mpirun(size, "-c", CHECK, timeout_seconds=120, environment={"LENTANDO_TRANSPORT": "nccl"})
    assert job.status == 0, job.output
    assert job.output.count("promises kept") == size


def several_gpus() -> int:
    """How many ranks can have one each."""
    found = torch.cuda.device_count()
    if found < 2:
        pytest.skip("needs two GPUs")
    return min(found, 4)
