"""A cluster in one machine: hosts with addresses of their own, joined by links of a given speed.

    sudo python benchmarks/cluster run --hosts 4 --rate 1gbit -- mpirun -np 4 python benchmarks/all_reduce.py
    sudo python benchmarks/cluster run --hosts 2 --each -- python train_with_gloo.py

or, for several commands on the same cluster:

    sudo python benchmarks/cluster up --hosts 4 --rate 100mbit
    sudo python benchmarks/cluster run -- mpirun -np 4 python examples/digits_torch.py
    sudo python benchmarks/cluster down

A host is a network namespace on a bridge; the kernel limits its link in both directions. mpirun of Open MPI or MPICH
and horovodrun find the hosts in their environment, and start their ranks there. Everything lives in namespaces that
belong to one process: whatever ends it, kill -9 too, nothing of the cluster is left, and nothing outside was changed.
The hosts share this machine's processors and files. Needs Linux, root, and the commands ip, tc, unshare, nsenter and
setpriv.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from hosts import DIE_WITH_PARENT, Hosts, build
from launchers import environment, one_process_per_slot

HOLDER = Path("/run/lentando-cluster")
"""What ``up`` leaves: process number, number of hosts and slots."""

NAMESPACES = ("--mount", "--net", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc")


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="verb", required=True, metavar="up | run | down")
    up = commands.add_parser("up", help="make a cluster and keep it")
    run = commands.add_parser("run", help="run a command on the kept cluster, or on one that lives as long as it")
    commands.add_parser("down", help="end the kept cluster, and every process in it")
    inside = commands.add_parser("inside")  # how this program calls itself within the namespaces
    for verb in (up, run, inside):
        verb.add_argument("--hosts", type=int, metavar="N", help="number of hosts (default 4)")
        verb.add_argument("--rate", metavar="RATE", help="speed of each link, as tc writes it (default 1gbit)")
        verb.add_argument("--slots", type=int, metavar="N", help="ranks that a host takes (default 1)")
    for verb in (run, inside):
        verb.add_argument(
            "--each", action="store_true",
            help="start the command in each slot of each host, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set",
        )  # fmt: skip
        verb.add_argument(
            "command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run on the first host"
        )
    options = parser.parse_args()
    if options.verb != "down":
        _check(parser, options)
    if options.verb == "inside":
        return _inside(options)
    if os.geteuid() != 0:
        parser.error("namespaces and link limits need root: sudo python benchmarks/cluster ...")
    missing = [command for command in ("ip", "tc", "unshare", "nsenter", "setpriv") if shutil.which(command) is None]
    if missing:
        parser.error(f"not found: {', '.join(missing)} (Debian packages iproute2 and util-linux)")
    return {"up": _up, "run": _run, "down": _down}[options.verb](parser, options)


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if any(given is not None and not 1 <= given <= 200 for given in (options.hosts, options.slots)):
        parser.error("--hosts and --slots must be between 1 and 200")
    if options.verb == "run" and options.command[:1] == ["--"]:
        del options.command[0]
    if options.verb == "run" and not options.command:
        parser.error("what is to be run? cluster run [--hosts N] [--rate RATE] -- COMMAND")


def _up(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if _holder() is not None:
        parser.error("there is a cluster already: end it with `cluster down`")
    hosts = _hosts(options)
    ready, writer = os.pipe()
    with subprocess.Popen(
        [*_enter_new(), "--hosts", str(hosts.count), "--rate", hosts.rate, "--slots", str(hosts.slots)],
        stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        # It must not inherit open files of this program, whose readers would wait for its end.
        assert process.stderr is not None
        os.close(writer)
        first = os.read(ready, 100)  # the number of its own process as seen from here comes from /proc
        if not first:
            sys.stderr.write(process.stderr.read())
            return process.wait()
        HOLDER.write_text(f"{_only_child(process.pid)} {hosts.count} {hosts.rate} {hosts.slots}\n")
        process.returncode = 0  # it outlives this program
    print(f"{hosts.count} hosts at {hosts.rate}: {', '.join(hosts.names)}")
    return 0


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    each = ["--each"] if options.each else []
    kept = _holder()
    if kept is None:
        hosts = _hosts(options)
        enter = _enter_new()
    elif (options.hosts, options.rate, options.slots) != (None, None, None):
        parser.error(
            "there is a cluster already: run without --hosts, --rate and --slots, or end it with `cluster down`"
        )
    else:
        pid, hosts = kept
        enter = ["nsenter", "--target", str(pid), "--mount", "--net", "--pid", f"--wdns={Path.cwd()}", *_this_program()]
    about = ["--hosts", str(hosts.count), "--rate", hosts.rate, "--slots", str(hosts.slots)]
    _leave_interrupts_to_the_command()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with subprocess.Popen([*DIE_WITH_PARENT, *enter, *about, *each, "--", *options.command]) as process:
        try:
            return process.wait()
        finally:
            process.kill()


def _down(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    kept = _holder()
    if kept is None:
        print("there is no cluster")
        return 0
    os.kill(kept[0], signal.SIGKILL)  # the first process of its namespace: all others in there end with it
    HOLDER.unlink()
    return 0


def _inside(options: argparse.Namespace) -> int:
    """Within the namespaces: build what is not there, then run the command or hold the cluster."""
    hosts = _hosts(options)
    if not hosts.exist():
        build(hosts)
    _leave_interrupts_to_the_command()
    command = options.command[1:]
    if not command:
        os.write(1, b"ready")
        os.close(1)
        while True:
            signal.pause()
    if options.each:
        return one_process_per_slot(hosts, command)
    return subprocess.run(
        hosts.on(hosts.names[0], command), env=os.environ | environment(hosts), check=False
    ).returncode


def _leave_interrupts_to_the_command() -> None:
    """Ignore SIGINT, which the terminal also sends to the command, and wait for the command."""
    signal.signal(signal.SIGINT, lambda *_: None)


def _hosts(options: argparse.Namespace) -> Hosts:
    return Hosts(options.hosts or 4, options.rate or "1gbit", options.slots or 1)


def _holder() -> tuple[int, Hosts] | None:
    """The process that keeps a cluster, if it lives."""
    if not HOLDER.exists():
        return None
    pid, count, rate, slots = HOLDER.read_text().split()
    program = Path(f"/proc/{pid}/cmdline")
    if not program.exists() or b"inside" not in program.read_bytes().split(b"\0"):
        HOLDER.unlink()
        return None
    return int(pid), Hosts(int(count), rate, int(slots))


def _enter_new() -> list[str]:
    return ["unshare", *NAMESPACES, *_this_program()]


def _this_program() -> list[str]:
    return [*DIE_WITH_PARENT, sys.executable, str(Path(__file__).parent), "inside"]


def _only_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


if __name__ == "__main__":
    sys.exit(main())
