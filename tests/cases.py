"""Runs a folder of small programs that show what should happen, each started as its first lines say.

    python tests/cases.py FOLDER [--ranks 2 3] [--only NAME ...]          (make cases CASES=FOLDER)

A case is a Python file whose first lines hold its command: ``python NAME.py``, or ``mpirun -np 2 python NAME.py``, with
``KEY=VALUE`` and ``timeout SECONDS`` before it if need be, and choices of arguments as ``[one|other]`` behind it. Cases
with ``mpirun`` are run on each of the numbers of ranks. A case passes if it ends with status 0 within its time. Where
its first lines expect an error, the table shows which it was.
"""

import argparse
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

COMMAND = re.compile(
    r"(?P<environment>(?:[A-Z_]+=\S+ )*)(?:timeout (?P<seconds>\d+) )?(?P<ranks>(?:mpirun|mpiexec) -np? \d+ )?"
    r"python (?P<file>\w+\.py)(?P<choices>(?: \[[\w|]+\])*)"
)
NEEDS = re.compile(r"pip install ([\w ]+);")
ERROR = re.compile(r"[\w.]*(Error|Exception)\b.*:")
HEAD_LINES = 6
SECONDS = 180
SHOWN_LINES = 12


@dataclass(frozen=True)
class Run:
    """One run of a case.

    Attributes:
        title: for the table.
        command: the program and its arguments.
        environment: variables to set.
        seconds: after which it is ended.
    """

    title: str
    command: list[str]
    environment: dict[str, str]
    seconds: float


def runs_of(case: Path, ranks: list[int]) -> list[Run]:
    """The runs that the first lines of a case ask for."""
    head = "\n".join(case.read_text().splitlines()[:HEAD_LINES])
    found = next((match for match in COMMAND.finditer(head) if match["file"] == case.name), None)
    if found is None:
        raise SystemExit(
            f"{case}: its first {HEAD_LINES} lines hold no command such as: mpirun -np 2 python {case.name}"
        )
    started = next((match for match in COMMAND.finditer(head) if match["file"] == case.name and match["ranks"]), found)
    environment = dict(pair.split("=", 1) for pair in started["environment"].split())
    choices = [choice.split("|") for choice in re.findall(r"\[([\w|]+)\]", started["choices"])]
    sizes: list[int | None] = [*ranks] if started["ranks"] else [None]
    seconds = max(float(started["seconds"] or 0), SECONDS)
    runs = []
    for size, arguments in itertools.product(sizes, itertools.product(*choices)):
        launcher = [] if size is None else [shutil.which("mpirun") or "mpirun", "-np", str(size)]
        title = " ".join([case.stem, *arguments, *([] if size is None else [f"({size} ranks)"])])
        runs.append(Run(title, [*launcher, sys.executable, str(case), *arguments], environment, seconds))
    return runs


def missing(case: Path) -> list[str]:
    """Packages that a case needs and that are not installed."""
    found = NEEDS.search("\n".join(case.read_text().splitlines()[:HEAD_LINES]))
    return [name for name in found[1].split() if find_spec(name) is None] if found else []


def ended(run: Run) -> tuple[int | None, str]:
    """The status of a run, None if it had to be ended, and what it printed."""
    process = subprocess.Popen(
        run.command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **run.environment},
        start_new_session=True,
        text=True,
        errors="replace",
    )
    try:
        output, _ = process.communicate(timeout=run.seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    return process.returncode, output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the cases")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3], help="numbers of ranks (default: 2 3)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of cases, in place of all")
    options = parser.parse_args()
    cases = sorted(options.folder.glob("*.py"))
    if options.only:
        unknown = set(options.only) - {case.stem for case in cases}
        if unknown:
            parser.error(f"there are no cases {sorted(unknown)} in {options.folder}")
        cases = [case for case in cases if case.stem in options.only]
    if not cases:
        parser.error(f"expected cases (Python files) in {options.folder}, found none")
    failed, skipped = [], []
    for case in cases:
        if lacking := missing(case):
            skipped.append(case.stem)
            print(f"SKIPPED {case.stem}: needs {' '.join(lacking)}", flush=True)
            continue
        for run in runs_of(case, options.ranks):
            started = time.monotonic()
            status, output = ended(run)
            took = time.monotonic() - started
            print(f"{'ok     ' if status == 0 else 'FAILED '} {run.title}  {took:.0f} s", flush=True)
            lines = [line for line in output.splitlines() if line.strip()]
            if status != 0:
                failed.append(run.title)
                print(f"        {'ended after its time' if status is None else f'status {status}'}")
                errors = [line for line in lines if ERROR.match(line)]
                lines = errors[-1:] or lines[-SHOWN_LINES:]
            for line in lines[-3 if status == 0 else -SHOWN_LINES :]:
                print(f"        {line[:300]}", flush=True)
    print(
        f"\n{len(failed)} failed: {', '.join(failed) or 'none'}; {len(skipped)} skipped: {', '.join(skipped) or 'none'}"
    )
    sys.exit(bool(failed or skipped))


if __name__ == "__main__":
    main()
