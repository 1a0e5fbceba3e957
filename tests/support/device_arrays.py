"""Stands in for CuPy where there is no GPU: arrays that NumPy cannot get at, and the functions that make them.

Not CuPy, and not a test of it. It refuses what CuPy refuses, so that numerics that take an array for NumPy's own fail:
conversion without being asked (``np.asarray``, ``memoryview``), operations together with NumPy arrays, and assignment
of one. It is stricter than CuPy in that NumPy's functions never take its arrays: only ufuncs do. And it counts what
makes the host wait for a real device.
"""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

_local = threading.local()


def waits() -> int:
    """How often this thread has read values back from its device."""
    return getattr(_local, "waits", 0)


def _wait() -> None:
    _local.waits = waits() + 1


@dataclass(frozen=True)
class Device:
    """As CuPy's."""

    id: int

    def use(self) -> None:
        events.append(f"device {self.id} in {threading.current_thread().name}")


events: list[str] = []
"""Streams that were waited for, and devices that were made current."""


class cuda:  # noqa: N801 - CuPy's module
    class get_current_stream:  # noqa: N801 - CuPy's function
        def synchronize(self) -> None:
            events.append("stream")


class DeviceArray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array on the device. Basic indexing makes views, as in NumPy and CuPy.

    Args:
        memory: what it stands for; shared.
        device: number of the device.
    """

    def __init__(self, memory: np.ndarray, device: int = 0) -> None:
        assert type(memory) is np.ndarray
        self._memory = memory
        self.device = Device(device)

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed (array of a device)")

    def __array_function__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        raise TypeError(f"np.{function.__name__} was given an array of a device: use array_module's")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        if method != "__call__":
            return NotImplemented
        taken = [_taken(value) for value in inputs]
        if out is not None:
            options["out"] = tuple(_memory(array) for array in out)
        with np.errstate(all="ignore"):  # a device notifies no rank
            result = ufunc(*taken, **options)
        return out[0] if out is not None else self._wrapped(result)

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("this device is none that DLPack knows")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The address, which is all that MPI knows of a device's array. It is one in host memory here."""
        typestr = self.dtype.str if self.dtype.kind != "V" else f"<V{self.itemsize}"
        return {"version": 3, "shape": self.shape, "typestr": typestr, "data": (self._memory.ctypes.data, False)}

    def __getitem__(self, key: Any) -> "DeviceArray":
        return self._wrapped(self._memory[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._memory[key] = _taken(value)

    def __len__(self) -> int:
        return len(self._memory)

    def __bool__(self) -> bool:
        _wait()
        return bool(self._memory)

    def __float__(self) -> float:
        _wait()
        return float(self._memory)

    def __int__(self) -> int:
        _wait()
        return int(self._memory)

    def tolist(self) -> Any:
        _wait()
        return self._memory.tolist()

    @property
    def shape(self) -> tuple[int, ...]:
        return self._memory.shape

    @property
    def dtype(self) -> Any:
        return self._memory.dtype

    @property
    def ndim(self) -> int:
        return self._memory.ndim

    @property
    def size(self) -> int:
        return self._memory.size

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    @property
    def itemsize(self) -> int:
        return self._memory.itemsize

    @property
    def flags(self) -> Any:
        return self._memory.flags

    def reshape(self, *shape: Any) -> "DeviceArray":
        return self._wrapped(self._memory.reshape(*shape))

    def view(self, dtype: Any) -> "DeviceArray":
        return self._wrapped(self._memory.view(dtype))

    def astype(self, dtype: Any, copy: bool = True) -> "DeviceArray":
        return self if not copy and dtype == self.dtype else self._wrapped(self._memory.astype(dtype))

    def copy(self) -> "DeviceArray":
        return self._wrapped(self._memory.copy())

    def fill(self, value: float) -> None:
        self._memory.fill(value)

    def sum(self) -> "DeviceArray":
        return self._wrapped(self._memory.sum())

    def max(self) -> "DeviceArray":
        return self._wrapped(self._memory.max())

    def all(self) -> "DeviceArray":
        return self._wrapped(self._memory.all())

    def any(self) -> "DeviceArray":
        return self._wrapped(self._memory.any())

    def argmax(self) -> "DeviceArray":
        return self._wrapped(self._memory.argmax())

    def _wrapped(self, result: Any) -> "DeviceArray":
        return DeviceArray(result if isinstance(result, np.ndarray) else np.array(result), self.device.id)


def _memory(array: DeviceArray) -> np.ndarray:
    return array._memory


def _taken(value: Any) -> Any:
    if isinstance(value, DeviceArray):
        return value._memory
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return value


# What ``array_module`` finds: the functions of CuPy's that Lentando calls.


def empty(shape: Any, dtype: Any = np.float64) -> DeviceArray:
    memory = np.empty(shape, dtype)
    memory.reshape(-1).view(np.uint8).fill(0xAB)  # the reader who reads it before it is written gets nonsense
    return DeviceArray(memory)


def zeros(shape: Any, dtype: Any = np.float64) -> DeviceArray:
    return DeviceArray(np.zeros(shape, dtype))


def asarray(array: Any) -> DeviceArray:
    return array if isinstance(array, DeviceArray) else DeviceArray(np.array(array))


def asnumpy(array: DeviceArray) -> np.ndarray:
    _wait()
    return array._memory.copy()


def copyto(out: DeviceArray, values: Any, casting: Any = "same_kind") -> None:
    assert isinstance(out, DeviceArray)
    with np.errstate(all="ignore"):
        np.copyto(out._memory, _taken(values), casting=casting)
