"""Horovod's own tests, with ``import horovod`` pointing to Lentando, on two ranks.

    python tests/horovod_tests FOLDER              (make horovod-tests HOROVOD=FOLDER)
    python tests/horovod_tests FOLDER --reference PYTHON

FOLDER is a clone of Horovod's repository; nothing of it is kept or changed:

    git clone --branch v0.28.1 https://github.com/horovod/horovod.git

(``master`` has the same tests.) A test passes if it passes on every rank. After a test that fails on some ranks only,
or takes too long, a new job runs the rest. Packages that the tests need and that are not installed are installed into a
temporary folder. ``--reference`` runs the tests with the real Horovod of a Python that has it, so that it can be seen
which of them fail there, too. The status is 0 if the tests that do not pass are those that docs/horovod.md lists.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from job import HERE, Result, Tests
from report import differences, print_table, versions_of, write

FILES = {
    "test_torch.py": "torch",
    "test_adasum_pytorch.py": "torch",
    "test_tensorflow.py": "tensorflow",
    "test_tensorflow2_keras.py": "tensorflow",
    "test_keras.py": "tensorflow",
    "test_tensorflow_keras.py": "tensorflow",
}
"""The files of ``test/parallel`` that run, and the framework that each needs."""
NEEDS = ("cloudpickle", "mock", "numpy", "packaging", "parameterized")
"""Modules that the tests import, which are named like their packages."""
WIDTH = 200
SOURCE = "Get one: git clone --branch v0.28.1 https://github.com/horovod/horovod.git"


def main() -> None:
    options = arguments()
    tests_folder = options.folder / "test/parallel"
    if not tests_folder.joinpath("test_torch.py").exists():
        sys.exit(
            f"expected a clone of Horovod's repository, found no test/parallel/test_torch.py in "
            f"{options.folder}\n{SOURCE}"
        )
    python = options.reference or Path(sys.executable)
    with tempfile.TemporaryDirectory(prefix="horovod-tests-") as temporary:
        packages = Path(temporary, "packages")
        install_missing(python, packages, tests_folder.parent)
        path = [HERE / "on_ranks", packages, *([] if options.reference else [HERE / "alias"])]
        environment = {
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
            "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]]),
        }
        launcher = tuple(options.launcher.split()) if options.launcher else (mpirun(python), "-np", str(options.ranks))
        launcher += tuple(shlex.split(options.python)) if options.python else (str(python),)
        tests = Tests(tests_folder.resolve(), python, launcher, options.ranks, environment, options.seconds)
        results, not_run = run(tests, options.files or list(FILES), options.only)
    print_table(results, not_run)
    if options.json:
        write(options.json, results, not_run, versions_of(python, options.folder))
    if not options.reference and not options.only:
        wrong = differences(results, [file for file in options.files or FILES if file not in not_run])
        print("\n".join(["", *wrong]))
        sys.exit(bool(wrong))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="clone of Horovod's repository")
    parser.add_argument("--files", nargs="+", choices=FILES, metavar="FILE", help=f"some of {', '.join(FILES)}")
    parser.add_argument("--only", default="", help="part of the names of the tests to run")
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (default: 2)")
    parser.add_argument("--seconds", type=float, default=180.0, help="that a test may take (default: 180)")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--reference", type=Path, metavar="PYTHON", help="a Python that has the real Horovod")
    parser.add_argument(
        "--launcher", help="command that starts the ranks, in place of mpirun: 'horovodrun --gloo -np 2'"
    )
    parser.add_argument("--python", metavar="COMMAND", help="what begins a rank, in place of this Python")
    options: argparse.Namespace = parser.parse_args()
    return options


def run(tests: Tests, files: list[str], only: str) -> tuple[list[Result], dict[str, str]]:
    """The results of the files, and why files could not be run."""
    results: list[Result] = []
    not_run: dict[str, str] = {}
    for file in files:
        if not has(tests.python, FILES[file], tests.environment):
            not_run[file] = f"{FILES[file]} is not installed"
            continue
        started = time.monotonic()
        print(f"{file} ...", flush=True)
        try:
            for result in tests.run(file, only):
                results.append(result)
                if result.outcome != "passed":
                    print(f"    {result.outcome:8} {result.test}: {result.reason[:WIDTH]}", flush=True)
        except RuntimeError as error:
            lines = str(error).strip().splitlines()
            stated = next((line.removeprefix("E   ").strip() for line in lines if line.startswith("E ")), lines[-1])
            not_run[file] = f"cannot be imported: {stated}"
            print(error)
        print(f"    {time.monotonic() - started:.0f} s", flush=True)
    return results, not_run


def mpirun(python: Path) -> str:
    next_to = python.parent / "mpirun"
    found = str(next_to) if next_to.exists() else shutil.which("mpirun")
    return found or sys.exit("there is no mpirun on the PATH")


def has(python: Path, module: str, environment: dict[str, str]) -> bool:
    asked = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return (
        subprocess.run([python, "-c", asked], env={**os.environ, **environment}, cwd="/", check=False).returncode == 0
    )


def install_missing(python: Path, folder: Path, tests: Path) -> None:
    """Install what the tests import, and the Python does not have, into a folder."""
    text = "\n".join(path.read_text() for path in [*tests.glob("parallel/test_*.py"), *tests.glob("utils/*.py")])
    imported = {module for module in NEEDS if re.search(rf"^\s*(import|from) {module}\b", text, re.MULTILINE)}
    missing = [module for module in {*imported, "pytest"} if not has(python, module, {})]
    if missing:
        pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        subprocess.run([*pip, "--target", folder, *missing], check=True)


if __name__ == "__main__":
    main()
