"""Questions that need third-party code, which may crash or hang and therefore runs in a separate process.

``python -m lentando.cli.doctor.questions torch horovod`` prints each answer as a line of JSON, and loads PyTorch once.
"""

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any


def library() -> dict[str, Any]:
    """Return version and path of the MPI library that mpi4py loads, without initialising MPI."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py raises RuntimeError for a missing library
        return {"error": " ".join(str(error).split())}
    return {"version": MPI.Get_library_version().strip("\0 \n"), "path": _loaded("libmpi")}


def horovod() -> dict[str, Any]:
    """Return what Horovod was built with. Its own check would import each framework several times."""
    package = importlib.util.find_spec("horovod")
    folders = [Path(folder) for folder in (package.submodule_search_locations or [])] if package else []
    bindings = [
        name for name in ("torch", "tensorflow") if any(any(folder.glob(f"{name}/mpi_lib*")) for folder in folders)
    ]
    modules: list[Any] = [importlib.import_module(f"horovod.{name}") for name in bindings[:1]]  # compiled together
    return {
        "bindings": bindings,
        "controllers": [name for name in ("mpi", "gloo") if any(getattr(hvd, f"{name}_built")() for hvd in modules)],
        "nccl": any(bool(hvd.nccl_built()) for hvd in modules),
    }


def torch() -> dict[str, Any]:
    """Return the backends of torch.distributed, the GPUs, and the versions of CUDA and NCCL that torch uses."""
    import torch
    from torch import distributed

    is_built: dict[str, Any] = {}  # torch.distributed is empty where torch was built without it
    if distributed.is_available():
        is_built = {name: getattr(distributed, f"is_{name}_available") for name in ("gloo", "nccl", "mpi")}
    available = torch.cuda.is_available()
    nccl: Any = torch.cuda.nccl.version if available else None  # untyped
    return {
        "backends": {name: bool(ask()) for name, ask in is_built.items()},
        "cuda": torch.version.cuda,
        "devices": torch.cuda.device_count() if available else 0,
        "nccl": ".".join(map(str, nccl())) if nccl else None,
    }


def _loaded(name: str) -> str | None:
    """Return the file of a shared library of this process, or None if the system does not list it (Linux does)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    paths = (line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if line.count(" ") > 5 and "/" in line)
    return next((path for path in paths if Path(path).name.partition(".so")[0] == name), None)


def main(questions: list[str]) -> None:
    """Print an answer to each question as soon as it is found."""
    functions = {function.__name__: function for function in (library, horovod, torch)}
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what libraries print
        for question in questions:
            answers.write(f"{json.dumps(functions[question]())}\n")
            answers.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
