"""CIFAR-10, CIFAR-100 and Fashion-MNIST as they are published: archives, or the folders that they unpack to.

Nothing is downloaded. Below the folder of ``--data`` lies one of

    cifar-10-batches-bin/  or cifar-10-binary.tar.gz       https://www.cs.toronto.edu/~kriz/cifar.html
    cifar-10-batches-py/   or cifar-10-python.tar.gz
    cifar-100-binary/      or cifar-100-binary.tar.gz
    cifar-100-python/      or cifar-100-python.tar.gz
    fashion-mnist/         four IDX files, with or without .gz: Debian's package dataset-fashion-mnist, or make data

The python versions of CIFAR are pickles, which can run any program when they are loaded. They are not loaded: their
opcodes are read as a list (``pickletools``), which runs none of them, and the pixels and labels are taken from it.
"""

import gzip
import pickletools
import sys
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[1]))
from recipe_loop import DataError

CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
PIXELS = (3, 32, 32)
Bytes = NDArray[np.uint8]
Part = tuple[Bytes, Bytes]
"""Images of shape (count, channels, 32, 32), and labels of shape (count,)."""


@dataclass(frozen=True)
class Data:
    """A dataset in memory: images as uint8 of shape (count, channels, 32, 32), labels as uint8 of shape (count,)."""

    train: Part
    test: Part
    classes: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @property
    def channels(self) -> int:
        return int(self.train[0].shape[1])

    @cached_property
    def checksum(self) -> str:
        """Of all images and labels, to compare whether ranks and runs have the same."""
        total = 0
        for array in (*self.train, *self.test):
            total = zlib.crc32(np.ascontiguousarray(array), total)
        return f"{total:08x}"

    def limited(self, count: int | None) -> "Data":
        """The same with the first training images only."""
        images, labels = self.train
        return replace(self, train=(images[:count], labels[:count]))


@dataclass(frozen=True)
class Layout:
    """One published form of CIFAR: where it lies, its files, and the function that reads one of them."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    read: Callable[[bytes], Part]


def read_binary(content: bytes, label_bytes: int) -> Part:
    """A file of records: ``label_bytes`` labels, the last of which counts (CIFAR-100: coarse, fine), and the pixels."""
    record = label_bytes + int(np.prod(PIXELS))
    if not content or len(content) % record:
        raise ValueError(f"its {len(content)} bytes are not a whole number of records of {record} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return records[:, label_bytes:].reshape(-1, *PIXELS), records[:, label_bytes - 1]


def read_python(content: bytes, labels_key: bytes) -> Part:
    """A pickled dict of an array of pixels and a list of labels, read without running it."""
    pixels, labels, last, by_columns = b"", [], b"", False
    for opcode, argument, _ in pickletools.genops(content):
        if isinstance(argument, str | bytes):
            last = argument if isinstance(argument, bytes) else argument.encode("latin-1")
            pixels = max(pixels, last, key=len)  # the longest string of the file
        elif opcode.name.startswith("BININT") and last == labels_key:
            labels.append(argument)
        elif opcode.name == "NEWTRUE":  # the only flag of such a file: the array is in Fortran's order
            by_columns = True
    if not labels or len(pixels) != len(labels) * np.prod(PIXELS) or max(labels) > 255:
        raise ValueError(f"it holds {len(labels)} labels and {len(pixels)} bytes of pixels")
    images = np.frombuffer(pixels, np.uint8).reshape((len(labels), -1), order="F" if by_columns else "C")
    return images.reshape(-1, *PIXELS), np.array(labels, np.uint8)


def read_idx(content: bytes) -> Bytes:
    """An IDX file of bytes: two zeros, type 8, the number of dimensions, their lengths in 4 bytes each, the data."""
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError("it is not an IDX file of bytes")
    begin = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:begin], ">u4")
    if len(content) - begin != np.prod(shape, dtype=np.int64):
        raise ValueError(f"it holds {len(content) - begin} bytes of data, not {' x '.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


def _cifar(number: int) -> tuple[Layout, Layout]:
    if number == 10:
        train, test = tuple(f"data_batch_{part}" for part in range(1, 6)), ("test_batch",)
        folders, labels_key, label_bytes = ("cifar-10-batches-bin", "cifar-10-batches-py"), b"labels", 1
    else:
        train, test = ("train",), ("test",)
        folders, labels_key, label_bytes = ("cifar-100-binary", "cifar-100-python"), b"fine_labels", 2
    binary = Layout(
        folders[0],
        f"cifar-{number}-binary.tar.gz",
        tuple(f"{name}.bin" for name in train),
        tuple(f"{name}.bin" for name in test),
        lambda content: read_binary(content, label_bytes),
    )
    python = Layout(
        folders[1], f"cifar-{number}-python.tar.gz", train, test, lambda content: read_python(content, labels_key)
    )
    return binary, python


def _contents(root: Path, layout: Layout) -> Mapping[str, bytes]:
    """The needed files of a layout by name, from its folder or else its archive, without those that are missing."""
    names = (*layout.train, *layout.test)
    folder = root / layout.folder
    if folder.is_dir():
        return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    found = {}
    # In memory: nothing is unpacked to the disk.
    with gzip.open(root / layout.archive) as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as archive:
        for member in archive:
            folder_name, _, name = member.name.removeprefix("./").rpartition("/")
            if folder_name == layout.folder and name in names and (file := archive.extractfile(member)) is not None:
                found[name] = file.read()
        while unpacked.read(1 << 20):  # to the end, where the checksum is compared
            pass
    return found


def _read_cifar(number: int, root: Path) -> tuple[Part, Part]:
    layouts = _cifar(number)
    for layout in layouts:
        place = root / layout.folder if (root / layout.folder).is_dir() else root / layout.archive
        if place.exists():
            try:
                contents = _contents(root, layout)
                return _parts(layout, contents, layout.train), _parts(layout, contents, layout.test)
            except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
                raise DataError(f"{place} is damaged: {error}. Get {layout.archive} again from {CIFAR_PAGE}") from error
    wanted = " or ".join(f"{layout.folder}/ or {layout.archive}" for layout in layouts)
    raise DataError(f"{root} holds no CIFAR-{number}: get it from {CIFAR_PAGE}, so that {root} holds {wanted}")


def _parts(layout: Layout, contents: Mapping[str, bytes], names: tuple[str, ...]) -> Part:
    parts = []
    for name in names:
        if name not in contents:
            raise ValueError(f"it has no file {name}")
        try:
            parts.append(layout.read(contents[name]))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def _read_fashion_mnist(root: Path) -> tuple[Part, Part]:
    folder = root / "fashion-mnist"

    def read(name: str) -> Bytes:
        plain, packed = folder / name, folder / f"{name}.gz"
        advice = "make data fetches it from Debian's package dataset-fashion-mnist"
        if not plain.is_file() and not packed.is_file():
            raise DataError(f"there is no file {plain} or {packed.name}: {advice}")
        try:
            return read_idx(plain.read_bytes() if plain.is_file() else gzip.decompress(packed.read_bytes()))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            found = plain if plain.is_file() else packed
            raise DataError(f"{found} is damaged: {error}. Delete {folder}; {advice} again") from error

    def part(name: str) -> Part:
        images, labels = read(f"{name}-images-idx3-ubyte"), read(f"{name}-labels-idx1-ubyte")
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise DataError(f"{folder}: images of shape {images.shape} do not fit labels of shape {labels.shape}")
        return np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None], labels  # 32 x 32, which every model here takes

    return part("train"), part("t10k")


@dataclass(frozen=True)
class Dataset:
    """A published dataset: how it is read, its classes and numbers of images, mean and deviation of its pixels."""

    read: Callable[[Path], tuple[Part, Part]]
    classes: int
    images: tuple[int, int]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


DATASETS = {
    "cifar10": Dataset(
        partial(_read_cifar, 10), 10, (50_000, 10_000), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    ),
    "cifar100": Dataset(
        partial(_read_cifar, 100), 100, (50_000, 10_000), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
    "fashion-mnist": Dataset(_read_fashion_mnist, 10, (60_000, 10_000), (0.2190,), (0.3318,)),
}


@lru_cache  # simulated ranks share it
def load(dataset: str, root: Path, *, any_size: bool = False) -> Data:
    """Read a dataset.

    Args:
        dataset: a key of ``DATASETS``.
        root: folder that holds it, as at the top of this file.
        any_size: whether it may have fewer images than the published one, as in tests.

    Raises:
        DataError: if it is missing or damaged.
    """
    about = DATASETS[dataset]
    train, test = about.read(root)
    found = (len(train[1]), len(test[1]))
    if min(found) == 0 or (found != about.images and not any_size):
        raise DataError(
            f"{dataset} in {root} has {found[0]} images for training and {found[1]} for tests, not "
            f"{about.images[0]} and {about.images[1]}. Get it again, or pass --any-size if that is meant"
        )
    if max(train[1].max(), test[1].max()) >= about.classes:
        raise DataError(f"{dataset} in {root} has labels beyond {about.classes - 1}: files are damaged. Get it again")
    return Data(train, test, about.classes, about.mean, about.deviation)
