"""A virtual environment with exactly the packages that ``pip install 'lentando[EXTRAS]'`` would install, and no others.

Its packages are links to those of this environment, found by what each requires, so that no network is needed. What is
not declared as a requirement, such as an MPI without one of its extras, cannot be imported in it.
"""

import subprocess
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

__all__ = ["make_environment"]

NOT_IN_SITE_PACKAGES = {"..", "__pycache__"}
"""First parts of the paths of scripts, and of compiled files of packages that are a single module."""


def make_environment(folder: Path, *requirements: str) -> Path:
    """Make an environment in a folder and return its Python: ``make_environment(path, "lentando[torch]")``."""
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    answer = subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout
    packages = Path(answer.strip())
    for each in required(*requirements):
        for entry in {file.parts[0] for file in each.files or []} - NOT_IN_SITE_PACKAGES:
            link = packages / entry
            if not link.exists():  # several packages may share a namespace
                link.symlink_to(Path(str(each.locate_file(entry))))
    return python


def required(*requirements: str) -> Iterator[Distribution]:
    """The packages of this environment that requirements name, and all that these require in turn."""
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(text) for text in requirements]
    for requirement in waiting:
        for extra in ("", *requirement.extras):
            if (requirement.name, extra) in seen:
                continue
            seen.add((requirement.name, extra))
            try:
                found = distribution(requirement.name)
            except PackageNotFoundError:
                raise RuntimeError(f"{requirement} is not installed in this environment: make check") from None
            yield found
            needed = map(Requirement, found.requires or [])
            waiting += [each for each in needed if each.marker is None or each.marker.evaluate({"extra": extra})]
