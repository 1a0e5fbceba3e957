"""Do to real jobs what happens to real jobs, and see whether they keep what Lentando promises.

    python tests/faults                                        # everything; about twenty minutes on two cores
    python tests/faults --only torch/sgp --only "*/osgp/kills"
    python tests/faults --only tensorflow/slowmo/kills --seed 1234 --jobs 1     # one job again

Each job is real processes under mpirun that train a small network on the handwritten digits. What hits whom, and
when, is drawn from the job's seed, which is printed when a job breaks a promise, with the command that runs it again.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from random import Random
from typing import Any

from injection import BrokenPromise, Kill, Moment, holds
from tqdm import tqdm
from trainings import write_digits

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "support"))

from launching import find_mpirun, launch  # noqa: E402 - it is found only now

FRAMEWORKS = ("torch", "tensorflow")
METHODS = ("slowmo", "sgp", "osgp", "allreduce")
MISHAPS = (
    "stopped", "slow", "uneven", "not a number", "not a number left out", "corrupted byte", "full disk",
)  # fmt: skip
ENDING: dict[Moment, str] = {
    "instant": "kill -9, then resume",
    "outer": "kill in an outer step, then resume",
    "checkpoint": "kill in a checkpoint, then resume",
}
PERIOD = 6
START_SECONDS = {"torch": 120.0, "tensorflow": 240.0}
"""How long a job of several ranks may take to start, on cores that are busy with other things."""
END_SECONDS = 60.0
"""How long a job may take to end when a rank of it has died."""
STEPS = 180


@dataclass
class Result:
    """What became of one case: a kind of fault, a method and a framework.

    Attributes:
        name: framework/method/fault.
        tried: how many times.
        broken: what was broken, with the command that shows it again.
        detail: something worth reporting.
        seconds: it took.
    """

    name: str
    tried: int = 0
    broken: list[str] = field(default_factory=list)
    detail: str = ""
    seconds: float = 0.0


class Runner:
    def __init__(self, options: argparse.Namespace, digits: Path) -> None:
        self.options = options
        self.digits = digits
        self.results: dict[str, Result] = {}
        self.references: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {}
        self.kills = 0
        self.python = shlex.split(options.python)

    def wanted(self, name: str) -> bool:
        patterns = self.options.only
        return not patterns or any(fnmatch(name, f"{pattern}*") for pattern in patterns)

    def changed(self) -> str:
        """The options that decide what a job does, where they are not the default."""
        given = {"--kills": 5, "--ranks": 6, "--stop-seconds": 20.0}
        own = {name: getattr(self.options, name[2:].replace("-", "_")) for name in given}
        return "".join(f" {name} {own[name]}" for name, default in given.items() if own[name] != default)

    def job(self, size: int, order: dict[str, Any], seconds: float, *mpirun: str) -> tuple[int | None, str, list[Any]]:
        """Run it; exit status, what was written, and what each rank found that came to its end."""
        folder = Path(order["folder"])
        for old in folder.glob("found-*.json"):
            old.unlink()
        command = [find_mpirun(), *mpirun, "-np", str(size), *self.python, str(HERE / "rank.py"), json.dumps(order)]
        limit = START_SECONDS[order["framework"]] + seconds
        finished = launch(command, limit)
        found = [json.loads(path.read_text()) for path in sorted(folder.glob("found-*.json"))]
        if self.options.verbose:
            print(finished.output, file=sys.stderr)
        holds(finished.status is not None, f"it hung: not over after {limit:g} s\n{finished.output[-2000:]}")
        return finished.status, finished.output, found

    def order(self, framework: str, folder: str, seed: int, **more: Any) -> dict[str, Any]:
        return {
            "framework": framework, "folder": folder, "seed": seed, "steps": STEPS, "digits": str(self.digits), **more
        }  # fmt: skip

    @contextmanager
    def case(self, name: str, seed: int) -> Iterator[Result]:
        """Counts a try, and records what it breaks."""
        result = self.results.setdefault(name, Result(name))
        result.tried += 1
        started = time.perf_counter()
        try:
            yield result
        except KeyboardInterrupt:
            result.tried -= 1
            raise
        except BrokenPromise as error:
            again = f"python tests/faults --only {shlex.quote(name)} --seed {seed} --jobs 1{self.changed()}"
            result.broken.append(f"{error}\n    again: {again}")
            print(f"{name}, seed {seed}: {error}\n    again: {again}", file=sys.stderr, flush=True)
        result.seconds += time.perf_counter() - started

    # --- what no rank dies of: one job for all of it ----------------------------------------------------------

    def survivable_faults(self, framework: str, method: str, elastic: bool = False) -> None:
        """In an elastic job, a rank that stands still must not be taken for a dead one."""
        every, suffix = (("stopped",), ", elastic") if elastic else (MISHAPS, "")
        cases = [case for case in every if self.wanted(f"{framework}/{method}/{case}{suffix}")]
        if not cases:
            return
        seed = self.options.seed
        with tempfile.TemporaryDirectory(prefix="lentando-faults-") as folder, tiny_disk() as disk:
            order = self.order(
                framework, folder, seed, task="survivable faults", methods=[method], cases=cases, disk=disk,
                elastic=elastic,
                stop_seconds=self.options.stop_seconds,
            )  # fmt: skip
            try:
                ft = ("--with-ft", "ulfm") if elastic else ()
                status, output, found = self.job(3, order, self.options.stop_seconds + 120, *ft)
                holds(status == 0 and len(found) == 3, f"it ended with status {status}\n{output[-2000:]}")
            except BrokenPromise as error:
                with self.case(f"{framework}/{method}/{cases[0]}{suffix}", seed):
                    raise BrokenPromise(str(error)) from error
                return
        for by_rank in zip(*found, strict=True):
            case = by_rank[0]["case"]
            name = f"{framework}/{method}/{case}{suffix}"
            if case == "undisturbed" or not self.wanted(name):
                continue
            with self.case(name, seed) as result:
                result.seconds += by_rank[0]["seconds"]
                result.detail = by_rank[0]["detail"] or ""
                if case == "full disk":
                    result.detail = ("a tmpfs: " if disk else "RLIMIT_FSIZE: ") + result.detail[-40:]
                broken = [f"rank {rank}: {own['broken']}" for rank, own in enumerate(by_rank) if own["broken"]]
                holds(not broken, "; ".join(broken))

    # --- ranks that are killed, and the job with them ----------------------------------------------------------

    def kills_that_end_the_job(self, framework: str, method: str) -> None:
        """Kill the job again and again; each start continues from the newest checkpoint, the last to the end."""
        names = {moment: f"{framework}/{method}/{fault}" for moment, fault in ENDING.items()}
        if not any(map(self.wanted, names.values())):
            return
        size, seed = 2, self.options.seed
        random = Random(f"{framework}/{method} {seed}")
        with tempfile.TemporaryDirectory(prefix="lentando-faults-") as folder:
            order = self.order(framework, folder, seed, task="train", methods=[method])
            window = STEPS // (len(ENDING) + 1)
            for number, (moment, name) in enumerate(names.items(), 1):
                # A checkpoint is due every second round, so that the step of each kill is after the last one before it.
                last = number * window
                kill = Kill.draw(random, random.randrange(size), [moment], last - 2 * PERIOD, last)
                with self.case(name, seed) as result:
                    self.kills += 1
                    result.detail = str(kill)
                    status, output, found = self.job(size, {**order, "kills": [str(kill)]}, END_SECONDS)
                    holds(
                        status not in (0, None), f"{kill}: the job ended with status {status}, as if no rank had died"
                    )
                    holds(not found, f"{kill}: {len(found)} ranks came to the end of a job that had lost one")
                    reported = any(text in output for text in ("signal 9", "Killed"))
                    holds(reported, f"{kill}: nothing was reported of the death\n{output[-2000:]}")
            status, output, found = self.job(size, {**order, "kills": []}, END_SECONDS)
        for name in names.values():
            with self.case(name, seed) as result:
                result.tried -= 1
                holds(status == 0 and len(found) == size, f"what was left could not be resumed\n{output[-2000:]}")
                resumed_at = found[0][0]["resumed_at"]
                holds(resumed_at >= len(ENDING) * window - 4 * PERIOD, f"resumed at step {resumed_at}")
                expected = self.reference(framework, method, size)
                for rank, (own, undisturbed) in enumerate(zip(found, expected, strict=True)):
                    same = own[0]["checksum"] == undisturbed["checksum"]
                    holds(same, f"rank {rank}: the parameters are not those of the undisturbed training")

    def reference(self, framework: str, method: str, size: int) -> list[dict[str, Any]]:
        """What the ranks of an undisturbed job find, by rank."""
        if (framework, size) not in self.references:
            faults = (*ENDING.values(), "kills")
            methods = [one for one in METHODS if any(self.wanted(f"{framework}/{one}/{fault}") for fault in faults)]
            with tempfile.TemporaryDirectory(prefix="lentando-faults-") as folder:
                order = self.order(framework, folder, 0, task="train", methods=methods, kills=[], saves=False)
                status, output, found = self.job(size, order, 120.0)
                holds(status == 0 and len(found) == size, f"the undisturbed training failed\n{output[-2000:]}")
                by_method = {own[0]["method"]: list(own) for own in zip(*found, strict=True)}
                self.references[framework, size] = by_method
        return self.references[framework, size][method]

    # --- ranks that are killed, and the rest continues -----------------------------------------------------------

    def elastic_kills(self, framework: str, method: str, jobs: int) -> None:
        name = f"{framework}/{method}/kills"
        if not self.wanted(name):
            return
        size, count = self.options.ranks, self.options.kills
        for number in range(jobs):
            seed = self.options.seed + number
            random = Random(f"{name} {seed}")
            victims = random.sample(range(size), count)
            moments = ("instant", "instant", "outer", "checkpoint")
            kills = [Kill.draw(random, rank, moments, 6, STEPS - 12) for rank in victims]
            with self.case(name, seed) as result, tempfile.TemporaryDirectory(prefix="lentando-faults-") as folder:
                order = self.order(
                    framework, folder, seed, task="train", methods=[method], elastic=True, kills=list(map(str, kills))
                )
                try:
                    self.survivors(framework, method, size, order)
                except BrokenPromise as error:
                    raise BrokenPromise(f"kills {' '.join(map(str, kills))}: {error}") from error
                self.kills += count
                result.detail = f"{result.tried * count} kills, {count} of {size} ranks in each job"

    def survivors(self, framework: str, method: str, size: int, order: dict[str, Any]) -> None:
        left = size - len(order["kills"])
        _, output, found = self.job(size, order, 60.0, "--with-ft", "ulfm")
        holds(len(found) == left, f"{len(found)} ranks came to the end, expected {left}\n{output[-3000:]}")
        own = [by_rank[0] for by_rank in found]
        for key in ("average", "size", "steps"):
            values = [one[key] for one in own]
            holds(len(set(values)) == 1, f"{key} differs between those that were left: {values}")
        holds(own[0]["size"] == left, f"size() is {own[0]['size']}, expected {left}")
        holds(own[0]["steps"] == STEPS, f"{own[0]['steps']} steps, expected {STEPS}")
        if method != "allreduce":
            holds(len({one["checksum"] for one in own}) == 1, "the parameters differ after the last average")
        undisturbed = self.reference(framework, method, size)[0]["accuracy"]
        accuracy = own[0]["accuracy"]
        holds(accuracy >= undisturbed - self.options.margin, f"accuracy {accuracy:.4f}, undisturbed {undisturbed:.4f}")


@contextmanager
def tiny_disk() -> Iterator[str | None]:
    """A file system of 1 MB, if this user may mount one."""
    with tempfile.TemporaryDirectory(prefix="lentando-disk-") as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        try:
            yield folder if mounted else None
        finally:
            if mounted:
                subprocess.run(["umount", folder], check=True)


def print_table(results: Sequence[Result], kills: int, seed: int, seconds: float) -> None:
    print("\n| framework | method | fault | times | kept | seconds | |")
    print("|---|---|---|---|---|---|---|")
    for result in results:
        kept = "yes" if not result.broken else f"**broken {len(result.broken)} times**"
        framework, method, fault = result.name.split("/")
        detail = " ".join(result.detail.split()).replace("|", "/")
        print(f"| {framework} | {method} | {fault} | {result.tried} | {kept} | {result.seconds:.1f} | {detail} |")
    broken = sum(len(result.broken) for result in results)
    print(f"\n{len(results)} cases, {kills} kills, seeds from {seed} on, {seconds:.0f} s: {broken} broken")


def run(runner: Runner) -> None:
    work: list[tuple[str, Callable[..., None], tuple[Any, ...]]] = []
    for framework in FRAMEWORKS:
        for method in METHODS:
            work.append((f"{framework}/{method}, what no rank dies of", runner.survivable_faults, (framework, method)))
            work.append(
                (f"{framework}/{method}, a rank stands still", runner.survivable_faults, (framework, method, True))
            )
            work.append((f"{framework}/{method}, kill and resume", runner.kills_that_end_the_job, (framework, method)))
            jobs = runner.options.jobs or {"torch": 8, "tensorflow": 2}[framework]
            work.append((f"{framework}/{method}, kills", runner.elastic_kills, (framework, method, jobs)))
    progress = tqdm(work, unit="", disable=not sys.stderr.isatty())
    for about, action, arguments in progress:
        progress.set_description(about)
        action(*arguments)
        if progress.disable:
            print(f"{about}: done", file=sys.stderr, flush=True)


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="of the first job of each case; the next have the next ones"
    )
    parser.add_argument(
        "--only", action="append", metavar="PATTERN",
        help="framework/method/fault, or its beginning; * stands for anything; may be repeated",
    )  # fmt: skip
    parser.add_argument("--kills", type=int, default=5, help="ranks that die in an elastic job (default 5)")
    parser.add_argument("--ranks", type=int, default=6, help="ranks of an elastic job (default 6)")
    parser.add_argument("--jobs", type=int, help="elastic jobs for each method and framework (default: 8 and 2)")
    parser.add_argument("--stop-seconds", type=float, default=20.0, help="how long SIGSTOP lasts (default 20)")
    parser.add_argument(
        "--margin", type=float, default=0.01, help="by how much the accuracy of an elastic job may fall (default 0.01)"
    )
    parser.add_argument(
        "--python", default=shlex.quote(sys.executable), metavar="COMMAND", help="what begins a rank (this Python)"
    )
    parser.add_argument("--verbose", action="store_true", help="print what the jobs write")
    options = parser.parse_args()
    if not 0 < options.kills < options.ranks:
        parser.error("--kills must be at least 1, and less than --ranks")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the job in flight ends, too
    with tempfile.TemporaryDirectory(prefix="lentando-faults-") as folder:
        digits = Path(folder, "digits.npz")
        write_digits(digits)
        runner = Runner(options, digits)
        started = time.perf_counter()
        try:
            run(runner)
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
        seconds = time.perf_counter() - started
    results = [result for result in runner.results.values() if result.tried]
    print_table(results, runner.kills, options.seed, seconds)
    return 1 if interrupted or not results or any(result.broken for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
