"""Models on a GPU train as those on a CPU do, within rounding, on any number of ranks."""

from pathlib import Path

import pytest
import torch
from launching import mpirun

PROGRAM = str(Path(__file__).parent / "train.py")
DIGITS = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.2}
METHODS = ["allreduce", "slowmo", "sgp", "osgp"]
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


def trained(size: int, device: str, method: str, dtype: str, folder: Path, transport: str) -> list[dict[str, object]]:
    job = mpirun(
        size,
        *(PROGRAM, device, method, dtype, str(folder)),
        timeout_seconds=120,
        environment={"LENTANDO_TRANSPORT": transport},
    )
    assert job.status == 0, job.output
    return [torch.load(folder / f"{device}-{rank}.pt", weights_only=True) for rank in range(size)]


def assert_alike(size: int, device: str, method: str, dtype: str, folder: Path, transport: str) -> None:
    expected = trained(size, "cpu", method, dtype, folder, "mpi")
    found = trained(size, device, method, dtype, folder, transport)
    for on_gpu, on_cpu in zip(found, expected, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=DIGITS[dtype], atol=DIGITS[dtype])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DIGITS)
@pytest.mark.parametrize("device", ["cuda", "cuda, a stream of its own"])
def test_model_on_a_gpu_over_nccl(device: str, method: str, dtype: str, tmp_path: Path) -> None:
    assert_alike(1, device, method, dtype, tmp_path, "nccl")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_share_a_gpu_over_mpi(size: int, method: str, tmp_path: Path) -> None:
    assert_alike(size, "cuda", method, "float32", tmp_path, "mpi")


@pytest.mark.parametrize("method", METHODS)
def test_model_on_a_cpu_where_nccl_is_asked_for(method: str, tmp_path: Path) -> None:
    assert_alike(2, "cpu", method, "float64", tmp_path, "nccl")


def test_ranks_that_share_a_gpu_over_nccl_are_refused_on_every_rank() -> None:
    size = torch.cuda.device_count() + 1
    job = mpirun(size, "-c", CHECK, timeout_seconds=60, environment={"LENTANDO_TRANSPORT": "nccl"})
    assert job.status not in (0, None)
    assert (
        job.output.count("ConfigurationError: NCCL needs a GPU for every rank, but one is used by ranks 0 and") == size
    )


@pytest.mark.parametrize("method", METHODS)
def test_ranks_with_a_gpu_each(method: str, tmp_path: Path) -> None:
    size = several_gpus()
    assert_alike(size, "cuda", method, "float32", tmp_path, "nccl")


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
