"""PyTorch's own tests of c10d backends, which its wheel contains, on backend lentando and on gloo.

    python tests/c10d_tests lentando --ranks 3 --json runs/c10d_lentando_3.json      (make c10d-tests)
    python tests/c10d_tests gloo --ranks 3 --json runs/c10d_gloo_3.json
    python tests/c10d_tests --compare runs/c10d_gloo_3.json runs/c10d_lentando_3.json

The tests are those of ``torch.testing._internal.distributed.distributed_test``. They choose by the backend's name what
to run, and most of them know three names only. Where they ask for gloo, the groups are therefore made by the backend
that is tested. mpirun starts the ranks, for gloo as well. A test passes if it passes on every rank, and is skipped if
rank 0 skips it. After a test that does not pass, a new job runs the rest.
"""

import argparse
import atexit
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
NEEDS = ("expecttest",)
"""Modules that the tests import, which are named like their packages."""
GRACE_SECONDS = 3.0
"""After a failure on one rank, the time in which the others may report theirs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", nargs="?", choices=["lentando", "gloo"], default="lentando")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--resume", action="store_true", help="keep what the file of --json contains, and run the rest")
    parser.add_argument("--only", default="", help="run the tests whose names contain this")
    parser.add_argument("--passed-by", type=Path, metavar="RESULTS", help="run the tests that passed there")
    parser.add_argument("--seconds", type=float, default=100.0, help="limit for one test")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("GLOO", "LENTANDO"), help="compare two results")
    options = parser.parse_args()
    if options.compare:
        sys.exit(compare(*(json.loads(path.read_text()) for path in options.compare)))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    install_missing()
    results: dict[str, list[str]] = {}
    if options.resume and options.json.exists():
        results = json.loads(options.json.read_text())
    remaining = [name for name in names() if options.only in name and name not in results]
    if options.passed_by:
        before = json.loads(options.passed_by.read_text())
        remaining = [name for name in remaining if before.get(name, ["missing"])[0] == "passed"]
    while remaining:
        done, is_stopped = run_job(options.backend, options.ranks, remaining, options.seconds)
        results.update(done)
        for name, (outcome, text) in done.items():
            if outcome == "failed":
                print(f"FAILED {name}: {summary(text)}", flush=True)
        remaining = [name for name in remaining if name not in results]
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(results, indent=1))
        if is_stopped:
            break
    print(dict(Counter(outcome for outcome, _ in results.values())))


def install_missing() -> None:
    """Install what the tests import and is not here into a temporary folder, for this program and those it starts."""
    missing = [module for module in NEEDS if find_spec(module) is None]
    if missing:
        folder = tempfile.mkdtemp(prefix="c10d-tests-packages-")
        atexit.register(shutil.rmtree, folder)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *missing]
        subprocess.run(command, check=True)
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])


def names() -> list[str]:
    """The names of all tests of the suite, which is imported in another process."""
    program = (
        "from torch.testing._internal.distributed.distributed_test import DistributedTest as tests\n"
        "print(*(name for name in dir(tests._DistTestBase) if name.startswith('test')))"
    )
    environment = {**os.environ, "BACKEND": "gloo", "WORLD_SIZE": "1", "TEMP_DIR": "."}
    output = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    )
    return output.stdout.split()


def run_job(backend: str, ranks: int, tests: list[str], seconds: float) -> tuple[dict[str, list[str]], bool]:
    """Run tests in one job until one of them does not pass.

    Returns the outcome and text of each that was run, and whether this program was asked to stop meanwhile.
    """
    with tempfile.TemporaryDirectory(prefix="c10d-tests-") as temporary:
        folder = Path(temporary)
        for name in ("barrier", "test_dir", "init_dir"):
            (folder / name).mkdir()
        (folder / "tests.json").write_text(json.dumps(tests))
        command = [shutil.which("mpirun") or "mpirun", "-np", str(ranks), sys.executable, str(HERE / "worker.py")]
        with (folder / "output").open("w+") as output:
            process = subprocess.Popen(
                [*command, backend, str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            is_stopped = False
            try:
                reason = wait(process, folder, ranks, seconds)
            except KeyboardInterrupt:
                is_stopped, reason = True, ""
            stop(process)
            output.seek(0)
            tail = output.read()[-3000:]
        return outcomes(folder, ranks, tests, None if is_stopped else f"{reason}\n{tail}"), is_stopped


def wait(process: "subprocess.Popen[bytes]", folder: Path, ranks: int, seconds: float) -> str:
    """Wait for the end of the job, or for a test that takes too long. Returns what happened."""
    count, since, failed_at = -1, time.monotonic(), None
    while process.poll() is None:
        lines = reports(folder, ranks)
        total = sum(map(len, lines))
        if total != count:
            count, since = total, time.monotonic()
        if failed_at is None and any(outcome == "failed" for each in lines for _, outcome, _ in each):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + GRACE_SECONDS:
            return "another rank has failed"
        if time.monotonic() > since + seconds:
            return f"took longer than {seconds:g} s"
        time.sleep(0.1)
    return f"the job ended with status {process.returncode}"


def stop(process: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
        return


def reports(folder: Path, ranks: int) -> list[list[list[str]]]:
    """The complete lines that each rank has written."""
    paths = [folder / f"results-{rank}" for rank in range(ranks)]
    texts = [path.read_text() if path.exists() else "" for path in paths]
    return [[json.loads(line) for line in text.split("\n")[:-1]] for text in texts]


def outcomes(folder: Path, ranks: int, tests: list[str], reason: str | None) -> dict[str, list[str]]:
    by_test: dict[str, list[str]] = {}
    lines = reports(folder, ranks)
    for number, name in enumerate(tests):
        reported = [each[number] for each in lines if len(each) > number]
        failures = [f"rank {rank}: {each[number][2]}" for rank, each in enumerate(lines)
                    if len(each) > number and each[number][1] == "failed"]  # fmt: skip
        if failures:
            by_test[name] = ["failed", failures[0]]
            break
        if len(reported) < ranks:
            if reason is not None:
                by_test[name] = ["failed", reason]
            break
        by_test[name] = [*reported[0][1:]]
    return by_test


def summary(text: str) -> str:
    """The last line of a traceback that says what was raised."""
    errors = [line for line in text.splitlines() if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return (errors or text.strip().splitlines() or [""])[-1][:200]


def compare(gloo: dict[str, list[str]], lentando: dict[str, list[str]]) -> int:
    """Print what differs; return 1 if fewer than 90 % of the tests that gloo passes are passed."""
    for title, results in (("gloo", gloo), ("lentando", lentando)):
        print(f"{title}: {dict(Counter(outcome for outcome, _ in results.values()))}")
    passed = [name for name, (outcome, _) in gloo.items() if outcome == "passed"]
    also = [name for name in passed if lentando.get(name, ["missing"])[0] == "passed"]
    print(f"of {len(passed)} tests that gloo passes, lentando passes {len(also)} ({len(also) / len(passed):.1%})")
    for name in gloo:
        before, after = gloo[name][0], lentando.get(name, ["missing", ""])
        if before != after[0]:
            print(f"{name}: gloo {before}, lentando {after[0]} {summary(after[1])}")
    return int(len(also) < 0.9 * len(passed))


if __name__ == "__main__":
    main()
