"""Detection of weights on a device that the program sets, without waiting for the device at each step."""

from collections.abc import Iterable

import numpy as np
import torch

from lentando.comm.flat import FlatLayout
from lentando.comm.transport import Array
from lentando.optimizers.weight_watch import is_jump, sampled_elements

__all__ = ["DeviceWatch"]

KEPT = 256
"""Steps whose samples are kept before they are copied to the host and compared."""

Sample = list[torch.Tensor]


class DeviceWatch:
    """Implements ``lentando.optimizers.weight_watch.WeightWatch`` for flat tensors on a device.

    A step launches two small kernels that gather the sample. The samples are compared when ``found`` is read: at outer
    steps, and where gossip waits for the device anyway.

    Args:
        flat: pairs of layout and flat tensor, which hold the parameters of the model.
    """

    def __init__(self, flat: Iterable[tuple[FlatLayout, torch.Tensor]]) -> None:
        self._sampled = [
            (tensor, torch.from_numpy(sampled_elements(layout)).to(tensor.device)) for layout, tensor in flat
        ]
        self._before: Sample = []
        self._after: Sample = []
        self._kept: list[tuple[Sample, Sample, Sample]] = []
        self._found = False

    @property
    def found(self) -> bool:
        kept, self._kept = self._kept, []
        if not self._found:
            self._found = any(_is_jump(*samples) for samples in kept)
        return self._found

    def look(self) -> None:
        now = self._sample()
        if self._after:
            self._kept.append((self._before, self._after, now))
        self._before = now
        if len(self._kept) >= KEPT:
            self._found = self.found

    def mark(self) -> None:
        self._after = self._sample()

    def forget(self) -> None:
        self._before, self._after, self._kept = [], [], []

    def reset(self, found: bool = False) -> None:
        self._found, self._kept = found, []

    def _sample(self) -> Sample:
        return [tensor.index_select(0, elements) for tensor, elements in self._sampled]


def _is_jump(before: Sample, after: Sample, now: Sample) -> bool:
    ended, begun = _values(after), _values(now)
    if np.array_equal(ended, begun, equal_nan=True):
        return False
    return not before or is_jump(_values(before), ended, begun)


def _values(sample: Sample) -> Array:
    return np.concatenate([tensor.to("cpu", torch.float64).numpy() for tensor in sample])
