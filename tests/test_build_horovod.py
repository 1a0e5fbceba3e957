"""``make horovod`` compiles for processors, also where PyTorch is the CUDA build and some nvcc is found.

The machine is simulated: an ``nvcc`` that can do nothing but print its version is on the PATH and in CUDA_HOME, and the
installed torch says that it was built for CUDA. Both make Horovod's CMake files look for a CUDA toolkit.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
NVCC = """#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88" ;; *) exit 1 ;; esac
"""
ASKS_TORCH = """
import torch
torch.cuda._is_compiled = lambda: True  # as in a CUDA build
torch.cuda.is_available = lambda: False  # without a GPU
from torch.utils.cpp_extension import CUDA_HOME
print(torch.version.cuda is not None and CUDA_HOME is not None)
"""
LOOKS_FOR_CUDA = """
cmake_minimum_required(VERSION 3.13)
project(looks_for_cuda LANGUAGES CXX)
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
    find_package(CUDAToolkit)
    if(CUDAToolkit_BIN_DIR)
        set(CMAKE_CUDA_COMPILER "${CUDAToolkit_BIN_DIR}/nvcc")
    endif()
endif()
if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
endif()
"""


@dataclass
class Machine:
    """A machine with some nvcc, and the environment in which Horovod is compiled on it.

    Attributes:
        place: the environment.
        variables: with nvcc on the PATH and in CUDA_HOME.
        torch: the torch that says that it was built for CUDA.
    """

    place: Path
    variables: dict[str, str]
    torch: Path


def build_horovod() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_horovod", ROOT / ".ci/build_horovod.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("HOROVOD_GPU_OPERATIONS", "NCCL")
    monkeypatch.setenv("PATH", os.pathsep.join([str(nvcc.parent), os.environ["PATH"]]))
    place = tmp_path / "environment"
    venv.create(place)
    return Machine(place, dict(os.environ), tmp_path / "torch_for_cuda/torch")


def torch_for_cuda(machine: Machine) -> None:
    """The installed torch, but for the file that holds what it was built for."""
    pytest.importorskip("torch")
    installed = Path(importlib.util.find_spec("torch").origin).parent
    machine.torch.mkdir(parents=True)
    for path in installed.iterdir():
        if path.name not in ("version.py", "__pycache__"):
            machine.torch.joinpath(path.name).symlink_to(path)
    version, changed = re.subn(r"(?m)^cuda\b.*$", 'cuda = "13.0"', installed.joinpath("version.py").read_text())
    assert changed == 1
    machine.torch.joinpath("version.py").write_text(version)


def output(*command: str | Path, **settings: object) -> tuple[int, str]:
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **settings)
    return run.returncode, run.stdout


def test_torch_says_that_it_was_built_without_cuda(machine: Machine) -> None:
    build, python = build_horovod(), machine.place / "bin/python"
    torch_for_cuda(machine)
    build.see(python, build.packages(Path(sys.executable)))
    seen = {"env": {**machine.variables, "PYTHONPATH": str(machine.torch.parent)}}
    assert output(python, "-c", ASKS_TORCH, **seen)[1].splitlines()[-1] == "True", "the machine is not simulated"
    build.without_gpu(machine.place)
    assert output(python, "-c", ASKS_TORCH, **seen) == (0, "False\n")


def test_cmake_does_not_look_for_cuda(machine: Machine, tmp_path: Path) -> None:
    if not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("no cmake, or no compiler")
    tmp_path.joinpath("CMakeLists.txt").write_text(LOOKS_FOR_CUDA)
    status, stated = output("cmake", "-B", tmp_path / "before", tmp_path, env=machine.variables)
    assert status != 0, "the machine is not simulated"
    assert "Could NOT find CUDAToolkit" in stated
    variables = build_horovod().without_gpu(machine.place)
    assert "HOROVOD_GPU_OPERATIONS" not in variables
    configure = output(variables["HOROVOD_CMAKE"], "-B", tmp_path / "after", tmp_path, env=variables)
    assert configure[0] == 0, configure[1]
    assert output(variables["HOROVOD_CMAKE"], "--build", tmp_path / "after", env=variables)[0] == 0
    assert "nvcc" not in tmp_path.joinpath("after/CMakeCache.txt").read_text()
