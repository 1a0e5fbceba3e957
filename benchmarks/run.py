"""Lentando and its peers, in interleaved jobs: tables and pictures for benchmarks/results/.

    python benchmarks/run.py node                       all-reduce, 2 and 4 ranks on this machine
    sudo python benchmarks/run.py links                 all-reduce, 4 hosts, each behind a link of 1 Gbit/s
    sudo python benchmarks/run.py links --slots 2       2 ranks on each of them
    sudo python benchmarks/run.py iterations            training on 4 hosts; an iteration computes as long as it sends
    sudo python benchmarks/run.py loss                  time to a training loss; 4 hosts at 100 Mbit/s, which send
                                                        4 times as long as they compute
    python benchmarks/run.py horovod                    loops of Horovod's users, under Horovod and under Lentando,
                                                        2 and 4 ranks on this machine
    python benchmarks/run.py synchronous                synchronous SGD against DDP, Horovod and computing alone,
                                                        2 and 4 ranks on this machine
    python benchmarks/run.py tensors                    lt.allreduce_ of ordinary tensors against MPI_Allreduce and Gloo
    python benchmarks/run.py c10d                       all-reduce and DistributedDataParallel over backends of
                                                        torch.distributed, 2 and 4 ranks on this machine
    sudo python benchmarks/run.py c10d_links            the same on 4 hosts, each behind a link of 1 Gbit/s
    python benchmarks/run.py gossip                     what gossip adds to SGD, 2 and 4 ranks on this machine
    python benchmarks/run.py fit                        what a batch of Keras's fit costs besides, on 1 and 2 ranks
    python benchmarks/run.py step                       what step() adds to the bare optimizer's, on 1 and 4 ranks
    python benchmarks/run.py memory                     what options of SlowMo, and synchronous SGD, take besides,
                                                        2 and 4 ranks
    python benchmarks/run.py papers                     the papers' experiments on simulated workers; hours, in parts:
                                                        see python benchmarks/run.py papers --help
    python benchmarks/run.py node --results benchmarks/results

Peers are what is here of Open MPI, MPICH (`make horovod` installs it), Gloo (torch.distributed) and Horovod. No two of
them can live in one process, so each measurement is a job of its own, and the jobs alternate: whatever else the machine
does meets all. A ratio above 1 says that Lentando was faster.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import destinations
import papers
from all_reduce import in_words, numbers_of_bytes
from jobs import HOROVOD_OVER_MPI, OURS, HostGroup, alternate, found_here, program_on, run_job, run_on, take_turns
from measuring import Sample, machine, report, seconds_to, table

MB = 1_000_000
LAYERS = 6
MODEL_BYTES = LAYERS * 512 * 512 * 4
DDP_LAYERS = 24
DDP_BYTES = DDP_LAYERS * 512 * 512 * 4
PAIRS = {
    "AllReduce": ("DDP", "DDP, buckets of 2 MB", "DDP, buckets of 1 MB", "Horovod"),
    "AllReduce(overlap=False)": ("DDP", "DDP, buckets of 2 MB", "Horovod"),
    "SlowMo": ("PostLocalSGD",),
    "SGP": (),
    "OSGP": (),
}
"""Our methods, and the peers' that do the same."""
CHANNELS = 88
RATIO = 4.0
"""Of the seconds that an all-reduce takes to those that an iteration computes, on the way to a loss (``--ratio``)."""
INT8 = 4 * 8 / 8.125
"""Times fewer bytes of an average in 8 bits, than in float32."""
HIDES = 1.1
"""Of the iterations that an average takes at least: the delay of outer steps that hides it."""


def all_reduces(options: argparse.Namespace, group: HostGroup, libraries: Sequence[str]) -> None:
    """A table of all-reduces by size and library, and a picture."""
    sizes = options.sizes or [25 * MB] if group.hosts else options.sizes or [MB, 25 * MB, 100 * MB]
    given = {name: [f"all_reduce:{size}" for size in sizes] for name in libraries}
    given[OURS] += [f"outer_step:{size}" for size in sizes]
    if exchanges(group, libraries):
        for name in (OURS, "Open MPI"):
            given[name] += [f"exchange:{size}" for size in sizes]
    by_library = alternate(group, libraries, "operations.py", given, options.repeats)
    found = {size: {name: by_library[name][f"all_reduce:{size}"] for name in libraries} for size in sizes}
    rows = []
    for size, samples in found.items():
        best = min((name for name in libraries if name != OURS), key=lambda name: samples[name].median, default=OURS)
        ratio = f"{samples[OURS].times_faster_than(samples[best]):.2f} ({best})"
        limit = [f"{100 * group.limit_seconds(size) / samples[OURS].median:.0f} %"] if group.hosts else []
        rows.append([in_words(size), *map(str, samples.values()), ratio, *limit])
    header = ["float32 buffer", *libraries, "times faster than the best", *(["of the limit"] if group.hosts else [])]
    caption = (
        "each the median of a few samples of the slowest rank. Times faster: the fastest peer's time / Lentando's, "
        "median of the pairs."
    )
    if group.hosts:
        caption += " The limit is what the link's frames can carry of 2(N - 1)/N of the buffer."
    text = f"{table(header, rows)}\n\n{beyond(group, sizes, by_library)}"
    publish(options, group, text, caption)
    if options.results is not None:
        draw(group, found, options.results / f"{options.what}_{group.ranks}_ranks.png")


def exchanges(group: HostGroup, libraries: Sequence[str]) -> bool:
    """Whether to measure what gossip does: each rank sends to one other, over a link of its own."""
    return group.hosts > 0 and group.slots == 1 and "Open MPI" in libraries


def beyond(group: HostGroup, sizes: Sequence[int], by_library: Mapping[str, Mapping[str, Sample]]) -> str:
    """Describe the times of the outer step and of an exchange with one peer in the same jobs."""
    ours = by_library[OURS]
    sentences = []
    for size in sizes:
        outer, bare = ours[f"outer_step:{size}"], ours[f"all_reduce:{size}"]
        sentences.append(
            f"An outer step of SlowMo on {in_words(size)} takes {bare.times_faster_than(outer):.2f} of its all-reduce."
        )
        if exchanges(group, list(by_library)):
            mine, theirs = (by_library[name][f"exchange:{size}"] for name in (OURS, "Open MPI"))
            share = group.link_seconds(size) / mine.median
            sentences.append(
                f"To send {in_words(size)} to the next rank and receive as much takes {mine}, {100 * share:.0f} % of "
                f"the link's speed; by MPI_Sendrecv {theirs}."
            )
    return " ".join(sentences)


def iterations(options: argparse.Namespace, group: HostGroup, libraries: Sequence[str]) -> None:
    """A table of training iterations by method and library."""
    from peers.iterations import ALONE, ALONE_WITH_GOSSIP, FLOOR, ITERATIONS, WITH_GOSSIP

    ratio = options.ratio or 1.0
    seconds = options.compute_seconds or group.limit_seconds(MODEL_BYTES) / ratio
    gossip_seconds = options.compute_seconds or group.link_seconds(MODEL_BYTES) / ratio
    given = ["--compute-seconds", f"{seconds:.6f}", "--gossip-seconds", f"{gossip_seconds:.6f}"]
    given += ["--layers", str(LAYERS)]
    if options.methods is not None:
        given += ["--methods", *options.methods]
    with_methods = [name for name in libraries if name in (OURS, "Gloo", "Horovod")]
    by_library = alternate(group, with_methods, "iterations.py", dict.fromkeys(with_methods, given), options.repeats)
    ours = by_library.pop(OURS)
    peers = {name: sample for figures in by_library.values() for name, sample in figures.items()}
    rows = []
    for method, sample in ours.items():
        alone = ours[ALONE_WITH_GOSSIP if method in WITH_GOSSIP else ALONE]
        over = "" if sample is alone else f"{alone.times_faster_than(sample):.2f}"
        by = {ALONE: "", ALONE_WITH_GOSSIP: "", FLOOR: "Open MPI"}.get(method, OURS)
        rows.append([method, by, str(sample), over, ""])
        for peer in PAIRS.get(method, ()):
            if peer in peers:
                faster = f"{sample.times_faster_than(peers[peer]):.2f}"
                rows.append(["", peer, str(peers[peer]), f"{alone.times_faster_than(peers[peer]):.2f}", faster])
    header = ["method", "by", "iteration", "of compute alone", "Lentando times faster"]
    caption = (
        f"a mean of {ITERATIONS} iterations, two rounds of SlowMo, which follow two others without a pause. "
        f"The model has {in_words(MODEL_BYTES)}. All settings but those named are the defaults. The link "
        f"takes at least {ratio:g} times as long as an iteration computes: {1e3 * seconds:.0f} ms and a bit more "
        f"(all-reduce), with gossip {1e3 * gossip_seconds:.0f} ms, one message (slept, so that sharing "
        "cores counts little)."
    )
    publish(options, group, table(header, rows), caption)


def loss(options: argparse.Namespace, group: HostGroup, libraries: Sequence[str]) -> None:
    """A table of the time in which methods reach the training loss where synchronous SGD ended, and a picture."""
    from peers.loss import PERIOD, Network

    if "Gloo" not in libraries:
        raise SystemExit("the loss to be reached is that of PyTorch's DDP over Gloo, which is not here")
    size = sum(4 * parameter.numel() for parameter in Network(CHANNELS, 0.0).parameters())
    ratio = options.ratio or RATIO
    seconds = options.compute_seconds or group.limit_seconds(size) / ratio
    given = ["--compute-seconds", f"{seconds:.6f}", "--width", str(CHANNELS)]
    delays = [min(PERIOD, math.ceil(HIDES * ratio / times)) for times in (1, INT8)]
    given += ["--delay", str(delays[0]), "--int8-delay", str(delays[1])]
    by_library = take_turns(group, [OURS, "Gloo"], "loss.py", dict.fromkeys([OURS, "Gloo"], given), options.repeats)
    jobs = [theirs | ours for theirs, ours in zip(by_library["Gloo"], by_library[OURS], strict=True)]
    goals = [job["DDP"][-1][1] for job in jobs]
    reached = {
        method: Sample(tuple(seconds_to(job[method], goal) for job, goal in zip(jobs, goals, strict=True)))
        for method in jobs[0]
    }
    rows = []
    for method, sample in reached.items():
        if misses := sample.seconds.count(math.inf):
            rows.append([method, OURS, f"not reached in {misses} of {options.repeats} jobs", ""])
        elif method == "DDP":
            rows.append([method, "Gloo", str(sample), ""])
        else:
            rows.append([method, OURS, str(sample), f"{sample.times_faster_than(reached['DDP']):.2f}"])
    caption = (
        f"until the replicas have a training loss of {statistics.median(goals):.3f}, where synchronous SGD (DDP) "
        f"ended. A convolutional network of {in_words(size)} learns digits; an iteration computes for "
        f"{1e3 * seconds:.3g} ms (what the computation leaves of that is slept), an all-reduce takes the link "
        f"{1e3 * group.limit_seconds(size):.3g} ms at least, {ratio:g} times as long. SlowMo has a period of {PERIOD}."
    )
    publish(options, group, table(["method", "by", "time to the loss", "times sooner than DDP"], rows), caption)
    if options.results is not None:
        name = f"loss_{group.ranks}_ranks{'' if ratio == RATIO else f'_ratio_{ratio:g}'}.png"
        draw_loss(group, jobs[-1], goals[-1], options.results / name)


def horovod(options: argparse.Namespace, group: HostGroup, libraries: Sequence[str]) -> None:
    """A table of loops that run unchanged under Horovod and under Lentando."""
    from peers.horovod_loops import ALONE, LARGE, SCALE, SMALL, resnet50_shapes

    if "Horovod" not in libraries:
        raise SystemExit("Horovod is not here: make horovod")
    names = [OURS, "Horovod", HOROVOD_OVER_MPI]
    by_library = alternate(group, names, "horovod_loops.py", dict.fromkeys(names, ()), options.repeats)
    ours, peers = by_library[OURS], {name: by_library[name] for name in names[1:]}
    rows = []
    for loop in ours:
        best = min(peers, key=lambda name: peers[name][loop].median)
        ratio = "" if loop.endswith(ALONE) else f"{ours[loop].times_faster_than(peers[best][loop]):.2f} ({best})"
        rows.append([loop, *(str(by_library[name][loop]) for name in names), ratio])
    size = 4 * sum(math.prod(shape) for shape in resnet50_shapes(SCALE))
    caption = (
        f"each a mean of many iterations on the slowest rank. {SMALL}: shapes of ResNet-50's parameters with its "
        f"channels / {SCALE}, {in_words(size)} together; {LARGE}: a single parameter. The models do little but receive "
        "gradients. All settings are the defaults of both. Times faster: iterations per second / those of the faster "
        "Horovod, median of the pairs."
    )
    publish(
        options, group, table(["loop", OURS, "horovodrun --gloo", "horovodrun --mpi", "times faster"], rows), caption
    )


def synchronous(options: argparse.Namespace, group: HostGroup, libraries: Sequence[str]) -> None:
    """A table of iterations of synchronous SGD by model and library, and of other methods on many small parameters."""
    from peers.synchronous import ALONE, MLP, MODELS, RESNET, SYNCHRONOUS

    names = [name for name in (OURS, "Gloo", "Horovod", HOROVOD_OVER_MPI) if name.split()[0] in libraries]
    # Ranks that share cores compute for so long that many small parameters say nothing more.
    given = [] if group.ranks == 2 else ["--models", MLP, RESNET]
    by_library = alternate(group, names, "synchronous.py", dict.fromkeys(names, given), options.repeats)
    ours = by_library[OURS]
    rows = []
    for loop in sorted(ours, key=lambda loop: list(MODELS).index(loop.rpartition(", ")[0])):
        model, _, method = loop.rpartition(", ")
        peers = [by_library[name][f"{model}, {SYNCHRONOUS}"] for name in names[1:]]
        best = min(peers, key=lambda sample: sample.median, default=ours[loop])
        is_alone = method == ALONE
        of_alone = "" if is_alone else f"{ours[f'{model}, {ALONE}'].times_faster_than(ours[loop]):.2f}"
        theirs = [str(by_library[name].get(loop, "")) for name in names[1:]]
        faster = f"{ours[loop].times_faster_than(best):.2f}" if method == SYNCHRONOUS else ""
        rows.append([loop, str(ours[loop]), *theirs, of_alone, faster])
    header = ["loop", OURS, *("DDP over Gloo" if name == "Gloo" else name for name in names[1:])]
    header += ["of compute alone", "times faster than the best"]
    caption = (
        f"each a mean of many iterations on the slowest rank. {', '.join(MODELS)}: as benchmarks/peers/synchronous.py "
        "makes them. Synchronous SGD: all settings are the defaults, of DDP and Horovod, too. Of compute alone: the "
        "time of an iteration / that of the bare optimizer on the same ranks. Medians of the pairs. Python's garbage "
        "collector did not run in these iterations, and malloc kept what was free."
    )
    publish(options, group, table(header, rows), caption)


def c10d(options: argparse.Namespace, group: HostGroup, libraries: Sequence[str]) -> None:
    """A table of all-reduces and of training by DistributedDataParallel, over backends of torch.distributed."""
    names = [name for name in (OURS, "Gloo", "Horovod") if name in libraries]
    sizes = options.sizes or [MB, 25 * MB, 100 * MB]
    seconds = options.compute_seconds or (group.limit_seconds(DDP_BYTES) if group.hosts else 0.0)
    given = ["--layers", str(DDP_LAYERS), "--compute-seconds", f"{seconds:.6f}", "--sizes", *map(str, sizes)]
    by_library = alternate(group, names, "c10d.py", dict.fromkeys(names, given), options.repeats)
    rows = []
    for figure in by_library[OURS]:
        _, _, size = figure.partition("all_reduce:")
        found = [by_library[name][figure] for name in names]
        is_alone = figure.endswith("alone")
        ratios = ["" if is_alone else f"{found[0].times_faster_than(other):.2f}" for other in found[1:]]
        rows.append([f"all_reduce, {in_words(int(size))}" if size else figure, *map(str, found), *ratios])
    header = ["", 'backend "lentando"', *names[1:], *(f"times faster than {name}" for name in names[1:])]
    slept = f", and sleep for {1e3 * seconds:.0f} ms, in which the link could carry their gradients" if seconds else ""
    caption = (
        "each the median of a few samples of the slowest rank, of an all-reduce or of a training iteration. "
        f"Layers: {DDP_LAYERS} layers of 1 MB, which compute on a batch of 8{slept}. 160 tensors: shapes of "
        "ResNet-50's parameters with its channels / 8, which compute little. The backends train by "
        "DistributedDataParallel, Horovod by its DistributedOptimizer; all settings are the defaults. Times faster: "
        "median of the pairs."
    )
    publish(options, group, table(header, rows), caption)


def memory(options: argparse.Namespace, group: HostGroup, _: Sequence[str]) -> None:
    """A table of the memory that options of SlowMo take; no times, so that each is measured once."""
    rows = []
    for given in MEMORY_OPTIONS:
        found = run_job(program_on(group.ranks, "memory.py", [*given, "--json"]))
        words = "synchronous SGD" if "--base" in given else " ".join(given).replace("--", "") or "defaults"
        rows.append([words, *(f"{found[figure]:.2f}" for figure in ("largest", "smallest", "expected"))])
    text = table(["SlowMo over Local SGD, by options", "copies, largest rank", "smallest rank", "expected"], rows)
    about = f"Copies of a model of 100 MB in float32, beyond SGD with momentum. {group}. {machine()}."
    report(f"{text}\n\n{about}", options.results and options.results / "memory.md")


def draw_loss(group: HostGroup, curves: Mapping[str, Sequence[tuple[float, float]]], goal: float, file: Path) -> None:
    """Training loss against time, a line for each method."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for method, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), marker=".", label=method)
    axes.axhline(goal, color="black", linestyle="--", label="where DDP ended")
    axes.set(xlabel="seconds", ylabel="training loss", yscale="log", title=str(group))
    axes.legend()
    figure.savefig(file)


def publish(options: argparse.Namespace, group: HostGroup, text: str, caption: str) -> None:
    about = f"{group}. {machine()}. Median and quartiles of {options.repeats} jobs in turn, {caption}"
    file = None if options.results is None else options.results / f"{options.what}.md"
    report(f"{text}\n\n{about}", file)


def draw(group: HostGroup, found: Mapping[int, Mapping[str, Sample]], file: Path) -> None:
    """Bars: the speed of each library, as bytes of the buffer per second."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    libraries = list(next(iter(found.values())))
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    width = 0.8 / len(libraries)
    for number, name in enumerate(libraries):
        speeds = [size / samples[name].median / 1e9 for size, samples in found.items()]
        axes.bar([x + width * number for x in range(len(found))], speeds, 0.9 * width, label=name)
    axes.set_xticks([x + 0.4 for x in range(len(found))], [in_words(size) for size in found])
    axes.set(xlabel="float32 buffer", ylabel="all-reduced, GB/s", title=str(group))
    if group.hosts:
        fastest = statistics.median(size / group.limit_seconds(size) / 1e9 for size in found)
        axes.axhline(fastest, color="black", linestyle="--", label="limit of the link")
    axes.legend()
    figure.savefig(file)


MEMORY_OPTIONS = (
    [],
    ["--delay", "1"],
    ["--delay", "1", "--fragments", "2"],
    ["--wire-dtype", "int8"],
    ["--wire-dtype", "int4"],
    ["--delay", "1", "--wire-dtype", "int8"],
    ["--weighting", "samples"],
    ["--base", "all-reduce"],
)
"""Options of ``memory.py``."""
ON_THIS_MACHINE = {"node": all_reduces, "horovod": horovod, "synchronous": synchronous, "c10d": c10d, "memory": memory}
OVER_LINKS = {
    "links": (all_reduces, 1e9),
    "iterations": (iterations, 1e9),
    "loss": (loss, 1e8),
    "c10d_links": (c10d, 1e9),
}
"""What is measured on hosts, and the bits per second of their links."""
IN_ONE_JOB = {
    "step": ("step_overhead.py", (1, 4)),
    "gossip": ("gossip_on_node.py", (2, 4)),
    "fit": ("fit_overhead.py", (1, 2)),
    "tensors": ("ordinary_tensors.py", (2, 4)),
}
"""What is measured in one job, with or without peers: the program, and the numbers of ranks on this machine."""


def main() -> None:
    assert __doc__ is not None
    if sys.argv[1:2] == ["papers"]:  # has other options
        papers.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*ON_THIS_MACHINE, *OVER_LINKS, *IN_ONE_JOB, "papers"))
    parser.add_argument(
        "--ranks", type=int, nargs="+", help="of jobs on this machine alone (default 2 and 4, or as above)"
    )
    parser.add_argument("--hosts", type=int, default=4, help="behind links (default %(default)s)")
    parser.add_argument("--slots", type=int, default=1, help="ranks on each host (default %(default)s)")
    parser.add_argument("--rate", type=float, help="bits per second of each link (default 1e9, for loss 1e8)")
    parser.add_argument(
        "--sizes",
        type=numbers_of_bytes,
        help="of the buffer that is all-reduced (default 1MB,25MB,100MB; over links 25MB)",
    )
    parser.add_argument("--compute-seconds", type=float, help="of an iteration (default: by --ratio)")
    parser.add_argument(
        "--ratio", type=float, help="time of an all-reduce / time of an iteration's computation (default 1, for loss 4)"
    )
    parser.add_argument(
        "--libraries", type=lambda text: text.split(","), help="which peers (default: all that are here)"
    )
    parser.add_argument("--methods", nargs="+", help="of iterations (default: all; compute alone in any case)")
    parser.add_argument("--repeats", type=int, default=7, help="jobs of each library, in turn (default %(default)s)")
    parser.add_argument(
        "--results", type=destinations.folder, metavar="FOLDER", help="append the table there, and draw the pictures"
    )
    options = parser.parse_args()

    libraries = found_here()
    if options.libraries is not None:
        unknown = set(options.libraries) - set(libraries)
        if unknown:
            parser.error(f"not here: {', '.join(sorted(unknown))}; here are {', '.join(libraries)}")
        libraries = [name for name in libraries if name == OURS or name in options.libraries]
    if options.what in ON_THIS_MACHINE:
        for ranks in options.ranks or (2, 4):
            ON_THIS_MACHINE[options.what](options, HostGroup(0, ranks), libraries)
    elif options.what in IN_ONE_JOB:
        program, numbers = IN_ONE_JOB[options.what]
        file = [] if options.results is None else ["--markdown", str(options.results / f"{options.what}.md")]
        for ranks in options.ranks or numbers:
            run_on(ranks, program, file)
    else:
        work, rate = OVER_LINKS[options.what]
        work(options, HostGroup(options.hosts, options.slots, options.rate or rate), libraries)


if __name__ == "__main__":
    main()
