"""What the binding calls, in which order. CuPy and nccl4py are recorders here: nothing runs on a GPU.

Where the packages are installed, GPU or not, the calls are held against their real signatures.
"""

import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lentando.comm.errors import TransportError
from lentando.comm.transports.nccl_binding import NCCLBinding


class Recorder:
    """Anything that can be called, entered and asked for an attribute; it notes what is done with it."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self._name, self._notes = name, notes

    def __getattr__(self, name: str) -> "Recorder":
        if name.startswith("__"):
            raise AttributeError(name)
        return Recorder(f"{self._name}.{name}", self._notes)

    def __call__(self, *arguments: Any, **options: Any) -> "Recorder":
        given = [*map(shown, arguments), *(f"{key}={shown(value)}" for key, value in options.items())]
        self._notes.append(f"{self._name}({', '.join(given)})")
        return Recorder(f"{self._name}()", self._notes)

    def __enter__(self) -> None:
        self._notes.append(f"enter {self._name}")

    def __exit__(self, *error: object) -> None:
        self._notes.append(f"leave {self._name}")


def shown(value: Any) -> str:
    return value._name if isinstance(value, Recorder) else repr(value)


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    cupy, nccl = ModuleType("cupy"), ModuleType("nccl")
    cupy.cuda = Recorder("cuda", found)  # type: ignore[attr-defined]
    core = ModuleType("nccl.core")
    for name in ("Communicator", "UniqueId", "group", "SUM", "MIN", "MAX"):
        setattr(core, name, Recorder(name, found))
    core.get_error_string = lambda state: f"state {state}"  # type: ignore[attr-defined]
    nccl.core = core  # type: ignore[attr-defined]
    for module in (cupy, nccl, core):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def test_communicator_has_a_stream_of_its_own_that_does_not_block_on_the_default_one(notes: list[str]) -> None:
    NCCLBinding().open(4, 2, b"name", 1)
    assert notes == [
        "cuda.Device(1)",
        "enter cuda.Device()",
        "cuda.Stream(non_blocking=True)",
        "UniqueId.from_bytes(b'name')",
        "Communicator.init(4, 2, UniqueId.from_bytes())",
        "leave cuda.Device()",
    ]


def test_group_begins_after_what_the_current_stream_was_given_and_is_marked_behind_its_end(notes: list[str]) -> None:
    communicator = NCCLBinding().open(4, 2, b"name", 1)
    notes.clear()
    with communicator.group():
        communicator.receive("array", 3)  # type: ignore[arg-type]
        communicator.send("array", 1)  # type: ignore[arg-type]
    communicator.mark()
    stream = "stream=cuda.Stream().ptr"
    assert notes == [
        "cuda.Device(1)",
        "enter cuda.Device()",
        "cuda.Event(disable_timing=True)",
        "cuda.get_current_stream()",
        "cuda.Event().record(cuda.get_current_stream())",
        "cuda.Stream().wait_event(cuda.Event())",
        "group()",
        "enter group()",
        f"Communicator.init().recv('array', 3, {stream})",
        f"Communicator.init().send('array', 1, {stream})",
        "leave group()",
        "leave cuda.Device()",
        "cuda.Device(1)",
        "enter cuda.Device()",
        "cuda.Event(disable_timing=True)",
        "cuda.Stream().record(cuda.Event())",
        "leave cuda.Device()",
    ]


def test_collectives_work_in_place_on_the_stream(notes: list[str]) -> None:
    communicator: Any = NCCLBinding().open(4, 2, b"name", 1)
    notes.clear()
    communicator.allreduce("a", "max")
    communicator.broadcast("a", 3)
    communicator.allgather("a", "b")
    communicator.reduce_scatter("a", "b")
    stream = "stream=cuda.Stream().ptr"
    assert notes == [
        f"Communicator.init().allreduce('a', 'a', MAX, {stream})",
        f"Communicator.init().broadcast('a', 'a', 3, {stream})",
        f"Communicator.init().allgather('a', 'b', {stream})",
        f"Communicator.init().reduce_scatter('a', 'b', SUM, {stream})",
    ]


@pytest.mark.parametrize(("state", "words"), [(0, None), (6, "state 6; the last output")])
def test_asynchronous_error_is_reported_in_nccls_words(notes: list[str], state: int, words: str | None) -> None:
    communicator: Any = NCCLBinding().open(1, 0, b"name", 0)
    communicator._comm = SimpleNamespace(get_async_error=lambda: state, get_last_error=lambda: "the last output")
    assert communicator.error() == words


def test_error_of_a_call_is_ours_and_ends_the_group(notes: list[str]) -> None:
    communicator: Any = NCCLBinding().open(1, 0, b"name", 0)
    with pytest.raises(TransportError, match="NCCL failed: out of luck"), communicator.group():
        raise OSError("out of luck")
    assert notes[-2:] == ["leave group()", "leave cuda.Device()"]


def test_calls_fit_the_signatures_of_nccl4py() -> None:
    core = pytest.importorskip("nccl.core", exc_type=ImportError)
    with_stream = {"stream": 0}
    calls = {
        "send": ("array", 1),
        "recv": ("array", 1),
        "allreduce": ("array", "array", core.SUM),
        "broadcast": ("array", "array", 0),
        "allgather": ("array", "array"),
        "reduce_scatter": ("array", "array", core.SUM),
    }
    for name, arguments in calls.items():
        inspect.signature(getattr(core.Communicator, name)).bind("self", *arguments, **with_stream)
    for name in ("get_async_error", "get_last_error", "abort", "destroy"):
        inspect.signature(getattr(core.Communicator, name)).bind("self")
    inspect.signature(core.Communicator.init).bind(4, 2, core.UniqueId.from_bytes(bytes(128)))
    assert {core.SUM, core.MIN, core.MAX} == {0, 2, 3}
    assert core.get_error_string(6)
    assert len(NCCLBinding().unique_id()) == 128
