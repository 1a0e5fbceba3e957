"""A process that has imported a framework, and forks a copy of itself for each program that is to run with it.

Started by ``prepared_python.py``. In a copy, ``serve`` returns the program's code, which replaces ``__main__``. A copy
has the command line, the folder, the environment and the standard streams of its client (``prepared_client.py``), and
the launcher sees only the client.
"""

import gc
import importlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from types import CodeType

ENDED = struct.Struct("<i")
"""Exit status of a program; negative, the signal that has ended it."""
USED_LATER = {"lentando.torch": ("torch._dynamo", "sklearn.datasets"), "lentando.tensorflow": ("sklearn.datasets",)}
"""What most programs import soon: an optimizer of PyTorch, in its first step, and the examples."""
RUN_MODULE = "import runpy, sys; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
IDLE_SECONDS = 60.0
"""A server that has had no connection for so long ends."""


def serve() -> CodeType:
    """Fork a copy for each connection, and return in the copies."""
    address, modules = sys.argv[1:]
    del sys.path[:2]  # this folder, and that in which the tests are run
    for module in modules.split(","):
        for each in (module, *USED_LATER.get(module, ())):
            importlib.import_module(each)
    gc.freeze()  # a copy then shares the pages of what has been imported
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    os.write(1, b"ready\n")
    return _Server(listener).run()


class _Server:
    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._programs: dict[int, socket.socket] = {}
        self._clients: set[socket.socket] = {listener}

    def run(self) -> CodeType:
        wakeup, woken = socket.socketpair()
        woken.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(woken.fileno())
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(wakeup, selectors.EVENT_READ)
        while ready := self._selector.select(None if len(self._clients) > 1 else IDLE_SECONDS):
            for key, _ in ready:
                source = key.fileobj
                assert isinstance(source, socket.socket)
                if source is wakeup:
                    wakeup.recv(1024)
                    self._report_ended()
                elif source is self._listener:
                    self._add(self._listener.accept()[0])
                elif source not in self._clients:
                    pass  # it was removed a moment ago, when its program had ended
                elif (code := self._receive(source)) is not None:
                    wakeup.close()
                    woken.close()
                    return code
        address = Path(self._listener.getsockname())
        address.unlink()
        with suppress(OSError):  # another server has not ended yet
            address.parent.rmdir()
        sys.exit()

    def _add(self, client: socket.socket) -> None:
        self._clients.add(client)
        self._selector.register(client, selectors.EVENT_READ)

    def _remove(self, client: socket.socket) -> None:
        self._selector.unregister(client)
        self._clients.remove(client)
        client.close()

    def _receive(self, client: socket.socket) -> CodeType | None:
        """Serve a message of a client. Returns code in a copy only."""
        content, streams = b"", []
        with suppress(ConnectionResetError):  # a client that was killed
            content, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
        running = [pid for pid, other in self._programs.items() if other is client]
        if not content:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            self._remove(client)
        elif running:
            for number in content:
                os.kill(running[0], number)
        elif streams:
            while not content.endswith(b"\n"):
                content += client.recv(1 << 20)
            pid = os.fork()
            if pid == 0:
                return self._become(json.loads(content), streams)
            self._programs[pid] = client
            for stream in streams:
                os.close(stream)
        return None

    def _report_ended(self) -> None:
        while self._programs:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            client = self._programs.pop(pid)
            if client in self._clients:
                with suppress(ConnectionError):
                    client.sendall(ENDED.pack(os.waitstatus_to_exitcode(status)))
                self._remove(client)

    def _become(self, request: dict[str, object], streams: list[int]) -> CodeType:
        """Turn this copy into the program."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for client in self._clients:
            client.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        assert request["network"] == Path("/proc/self/ns/net").stat().st_ino, "a program on a network of its own"
        os.setpgid(0, 0)
        os.chdir(str(request["folder"]))
        os.environ.clear()
        os.environ.update(request["environment"])  # type: ignore[call-overload]
        sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()  # as if it had been imported here
        sys.argv = request["arguments"]  # type: ignore[assignment]
        main = sys.modules["__main__"]
        del main.serve  # type: ignore[attr-defined]
        given, name = sys.argv[0], "<string>"
        if given == "-c":
            folder, source = "", sys.argv.pop(1)
        elif given == "-m":
            folder, source = str(Path.cwd()), RUN_MODULE
        else:
            path = Path(given, "__main__.py") if Path(given).is_dir() else Path(given)
            name = main.__file__ = str(path)
            folder, source = str(path.resolve().parent), path.read_text("utf-8")
        paths = [str(Path(path).absolute()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        sys.path[:0] = [folder, *(path for path in paths if path not in sys.path)]
        return compile(source, name, "exec", dont_inherit=True)
