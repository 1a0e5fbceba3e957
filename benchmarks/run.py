"""All-reduce by Lentando and by its peers, in jobs that take turns; a table and a picture for benchmarks/results/.

    python benchmarks/run.py node                       2 and 4 ranks on this machine
    sudo python benchmarks/run.py links                 4 hosts, each behind a link of 1 Gbit/s
    sudo python benchmarks/run.py links --slots 2       2 ranks on each of them
    python benchmarks/run.py node --results benchmarks/results

Peers are what is here of Open MPI, MPICH (`make horovod` installs it), Gloo (torch.distributed) and Horovod. No two of
them can live in one process, so each measurement is a job of its own, and the jobs alternate: whatever else the machine
does meets all. A ratio above 1 says that Lentando was faster than the fastest peer.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from all_reduce import in_words, number_of_bytes
from measuring import Sample, machine, report, table
from tqdm import tqdm

HERE = Path(__file__).parent
PROGRAM = str(HERE / "peers" / "all_reduce.py")
OURS = "Lentando"
PAYLOAD = 1448 / 1514
"""What TCP carries of the Ethernet frames that a link's limit counts."""
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMP_NUM_THREADS": "1",
}
JOB_SECONDS = 300


@dataclass(frozen=True)
class Place:
    """Where jobs run.

    Attributes:
        hosts: number of them; 0 is this machine, without links.
        slots: ranks on each.
        rate: of each link, in bits per second.
    """

    hosts: int
    slots: int
    rate: float = 0.0

    @property
    def ranks(self) -> int:
        return max(self.hosts, 1) * self.slots

    def __str__(self) -> str:
        if not self.hosts:
            return f"{self.slots} ranks on one node"
        each = "a rank" if self.slots == 1 else f"{self.slots} ranks"
        return f"{each} on each of {self.hosts} hosts, {self.rate / 1e9:g} Gbit/s"

    def limit_seconds(self, size: int) -> float:
        """2(N - 1)/N of the buffer through one link in each direction."""
        return 2 * (self.hosts - 1) / self.hosts * size * 8 / (self.rate * PAYLOAD)

    def command(self, library: str, sizes: Sequence[int]) -> list[str]:
        """The job that times a library."""
        python = shutil.which("python", path=str(Path(sys.executable).parent)) or sys.executable
        beside = Path(python).parent
        work = [PROGRAM, LIBRARIES[library], *map(str, sizes)]
        each = False
        if library == "MPICH":
            job = [str(_mpich() / "mpiexec"), "-np", str(self.ranks), str(_mpich() / "python"), *work]
        elif library == "Horovod":
            job = [str(beside / "horovodrun"), "--gloo", "-np", str(self.ranks)]
            if self.hosts:
                places = ",".join(f"h{host}:{self.slots}" for host in range(self.hosts))
                job += ["-H", places, "--network-interfaces", "eth0"]
            job += [python, *work]
        elif library == "Gloo" and self.hosts:
            each, job = True, [python, *work]
        elif library == "Gloo":
            job = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks), *work]
        else:
            job = [str(beside / "mpirun"), "-np", str(self.ranks), python, *work]
        if not self.hosts:
            return job
        cluster = [python, str(HERE / "cluster"), "run", "--hosts", str(self.hosts), "--slots", str(self.slots)]
        return [*cluster, "--rate", f"{self.rate:.0f}bit", *(["--each"] if each else []), "--", *job]


LIBRARIES = {OURS: "lentando", "Open MPI": "mpi", "MPICH": "mpi", "Gloo": "gloo", "Horovod": "horovod"}


def _mpich() -> Path:
    return Path(sys.prefix, "mpich/bin")


def found_here() -> list[str]:
    """The libraries that can be measured on this machine."""
    here = {
        OURS: True,
        "Open MPI": True,
        "MPICH": (_mpich() / "mpiexec").exists(),
        "Gloo": find_spec("torch") is not None,
        "Horovod": find_spec("horovod") is not None,
    }
    return [name for name, there in here.items() if there]


def one_job(place: Place, library: str, sizes: Sequence[int]) -> dict[int, float]:
    """Seconds of one all-reduce by size in bytes."""
    command = place.command(library, sizes)
    done = subprocess.run(
        command, env={**OPEN_MPI, **os.environ}, capture_output=True, text=True, timeout=JOB_SECONDS, check=False
    )
    told = re.search(r"\{.*\}", done.stdout)
    if done.returncode or told is None:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return {int(size): seconds for size, seconds in json.loads(told[0]).items()}


def measure(place: Place, libraries: Sequence[str], sizes: Sequence[int], repeats: int) -> dict[int, dict[str, Sample]]:
    """By size and library; the jobs alternate, in turn forwards and backwards."""
    seconds: dict[int, dict[str, list[float]]] = {size: {name: [] for name in libraries} for size in sizes}
    with tqdm(total=repeats * len(libraries), desc=str(place), leave=False) as progress:
        for repeat in range(repeats):
            for name in libraries if repeat % 2 else reversed(libraries):
                for size, found in one_job(place, name, sizes).items():
                    seconds[size][name].append(found)
                progress.update()
    return {size: {name: Sample(tuple(each)) for name, each in by_name.items()} for size, by_name in seconds.items()}


def best_peer(samples: Mapping[str, Sample]) -> str:
    return min((name for name in samples if name != OURS), key=lambda name: samples[name].median)


def rows(place: Place, found: Mapping[int, Mapping[str, Sample]]) -> list[list[str]]:
    cells = []
    for size, samples in found.items():
        best = best_peer(samples)
        row = [in_words(size), *(str(sample) for sample in samples.values())]
        row.append(f"{samples[OURS].times_faster_than(samples[best]):.2f} ({best})")
        if place.hosts:
            row.append(f"{100 * place.limit_seconds(size) / samples[OURS].median:.0f} %")
        cells.append(row)
    return cells


def draw(place: Place, found: Mapping[int, Mapping[str, Sample]], file: Path) -> None:
    """Bars: the speed of each library, as bytes of the buffer per second."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    libraries = list(next(iter(found.values())))
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for number, name in enumerate(libraries):
        speeds = [size / samples[name].median / 1e9 for size, samples in found.items()]
        axes.bar(
            [x + 0.8 * number / len(libraries) for x in range(len(found))], speeds, 0.75 / len(libraries), label=name
        )
    axes.set_xticks([x + 0.4 for x in range(len(found))], [in_words(size) for size in found])
    axes.set(xlabel="float32 buffer", ylabel="all-reduced, GB/s", title=str(place))
    if place.hosts:
        fastest = statistics.median(size / place.limit_seconds(size) / 1e9 for size in found)
        axes.axhline(fastest, color="black", linestyle="--", label="limit of the link")
    axes.legend()
    figure.savefig(file)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", choices=("node", "links"))
    parser.add_argument("--hosts", type=int, default=4, help="for links (default %(default)s)")
    parser.add_argument("--slots", type=int, default=1, help="ranks on each host (default %(default)s)")
    parser.add_argument("--rate", type=float, default=1e9, help="bits per second of each link (default %(default)g)")
    parser.add_argument(
        "--sizes",
        type=lambda text: [number_of_bytes(size) for size in text.split(",")],
        help="of the float32 buffer (default 1MB,25MB,100MB; over links 25MB)",
    )
    parser.add_argument(
        "--libraries", type=lambda text: text.split(","), help="which peers (default: all that are here)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="jobs of each library, in turn (default %(default)s)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="append the table there, and draw the pictures")
    options = parser.parse_args()

    libraries = found_here()
    if options.libraries is not None:
        unknown = set(options.libraries) - set(libraries)
        if unknown:
            parser.error(f"not here: {', '.join(sorted(unknown))}; here are {', '.join(libraries)}")
        libraries = [name for name in libraries if name == OURS or name in options.libraries]
    links = options.where == "links"
    places = [Place(options.hosts, options.slots, options.rate)] if links else [Place(0, 2), Place(0, 4)]
    sizes = options.sizes or [number_of_bytes(size) for size in (("25MB",) if links else ("1MB", "25MB", "100MB"))]
    for place in places:
        found = measure(place, libraries, sizes, options.repeats)
        header = ["float32 buffer", *libraries, "times faster than the best"] + (["of the limit"] if links else [])
        caption = (
            f"{place}. {machine()}. Median and quartiles of {options.repeats} jobs in turn, each the median of a few "
            "samples of the slowest rank. Times faster: the fastest peer's time / Lentando's, median of the pairs."
        )
        name = "peers_links" if links else "peers_node"
        file = None if options.results is None else options.results / f"{name}.md"
        report(f"{table(header, rows(place, found))}\n\n{caption}", file)
        if options.results is not None:
            draw(place, found, options.results / f"{name}_{place.ranks}_ranks.png")


if __name__ == "__main__":
    main()
