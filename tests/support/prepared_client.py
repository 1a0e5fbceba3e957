"""Stands for a process that ``prepared_server.py`` forks: ``python -S prepared_client.py ADDRESS:NUMBER SCRIPT ...``.

Passes signals on to it, and ends as it does. Starts in 20 ms, since it imports next to nothing.
"""

import array
import json
import os
import signal
import socket
import struct
import sys
from contextlib import suppress

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
ENDED = struct.Struct("<i")
RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "HOROVOD_RANK")
"""Variables of torchrun, mpirun and horovodrun."""


def main() -> None:
    """Let the server run the program, and end with its status."""
    address, number = sys.argv[1].rsplit(":", 1)
    # As in a job of usual processes, some ranks iterate over sets in another order than others.
    rank = int(next((os.environ[name] for name in RANK if os.environ.get(name)), 0))
    # Path would take as long to import as all the rest.
    request = {"arguments": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}  # noqa: PTH109
    request["network"] = os.stat("/proc/self/ns/net").st_ino  # noqa: PTH116
    server = socket.socket(socket.AF_UNIX)
    server.connect(f"{address}{rank % int(number)}")
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until they can be passed on
    streams = array.array("i", [0, 1, 2])
    content = json.dumps(request).encode() + b"\n"
    sent = server.sendmsg([content], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    server.sendall(content[sent:])

    def pass_on(received: int, _: object) -> None:
        with suppress(ConnectionError):  # the program has ended, and its status has arrived
            server.sendall(bytes([received]))

    for each in PASSED_ON:
        signal.signal(each, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    status = server.recv(ENDED.size)
    if not status:
        sys.exit("the server that had imported the framework has ended")
    (exit_status,) = ENDED.unpack(status)
    if exit_status < 0:
        if -exit_status in PASSED_ON:
            signal.signal(-exit_status, signal.SIG_DFL)
        os.kill(os.getpid(), -exit_status)
    os._exit(exit_status)


main()
