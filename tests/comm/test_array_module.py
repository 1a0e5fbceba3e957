"""Arrays of a device, as far as a machine without one can show: ``device_arrays`` stands in for CuPy."""

import subprocess
import sys

import device_arrays
import numpy as np
import pytest
from device_arrays import DeviceArray

from lentando.comm.array_module import array_module, copy_into, is_on_host, to_host
from lentando.comm.capabilities import takes_device_arrays
from lentando.comm.flat import BLOCK, Entry, FlatBuffer, FlatLayout, blocks
from lentando.comm.transports.single import SingleTransport


def test_module_of_an_array_is_that_of_its_type() -> None:
    assert array_module(np.zeros(2)) is np
    assert array_module(device_arrays.zeros(2)) is device_arrays
    assert is_on_host(np.zeros(2))
    assert not is_on_host(device_arrays.zeros(2))


@pytest.mark.parametrize("place", [np.asarray, device_arrays.asarray])
@pytest.mark.parametrize("source", [np.asarray, device_arrays.asarray])
def test_copies_go_from_anywhere_to_anywhere(place: object, source: object) -> None:
    out = place(np.zeros(3))  # type: ignore[operator]
    values = source(np.arange(3.0))  # type: ignore[operator]
    copy_into(out[:2], values[1:])
    assert to_host(out).tolist() == [1, 2, 0]


def test_host_memory_is_not_copied_to_where_it_is() -> None:
    array = np.zeros(3)
    assert to_host(array) is array


def test_no_rank_is_asked_for_cupy_before_there_is_an_array_of_it() -> None:
    program = (
        "import sys; sys.modules['cupy'] = sys.modules['nccl'] = None\n"  # importing them is an error
        "import lentando.comm.array_module, lentando.comm.transports.nccl, lentando.optimizers.replica"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_device_buffer_stays_in_one_piece_and_host_memory_in_blocks() -> None:
    assert len(list(blocks(np.zeros(3 * BLOCK)))) == 3
    assert list(blocks(device_arrays.zeros(3 * BLOCK))) == [slice(0, 3 * BLOCK)]
    assert list(blocks(device_arrays.zeros(0))) == []


def test_flat_buffer_on_a_device_finds_what_is_not_finite() -> None:
    layout = FlatLayout([Entry("a", (2,), "float32", 0), Entry("b", (2, 2), "float32", 0)])
    buffer = FlatBuffer(layout, device_arrays.zeros(6, np.float32))
    assert buffer.first_non_finite() is None
    buffer.array[3] = np.inf
    assert buffer.first_non_finite() == "b"
    assert isinstance(buffer.views[1], DeviceArray)
    assert buffer.views[1].shape == (2, 2)


def test_transport_that_says_nothing_takes_no_device_arrays() -> None:
    class Silent(SingleTransport):
        takes_device_arrays = False

    assert not takes_device_arrays(Silent())
    assert not takes_device_arrays(object())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "misuse",
    [
        np.asarray,
        memoryview,
        lambda array: np.copyto(array, array),
        np.ascontiguousarray,
        lambda array: array + np.ones(2),
        lambda array: np.add(np.ones(2), array),
        lambda array: array.__setitem__(slice(None), np.ones(2)),
        lambda array: np.ones(2).__setitem__(slice(None), array),
        np.add.reduce,
    ],
)
def test_stand_in_refuses_to_be_taken_for_an_array_of_numpys(misuse: object) -> None:
    with pytest.raises(TypeError):
        misuse(device_arrays.zeros(2))  # type: ignore[operator]
