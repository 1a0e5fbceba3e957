"""ImageNet (ILSVRC 2012) as it lies on disks: class folders of JPEG files, WebDataset shards, or TFRecords.

Nothing is downloaded. Below the folder of ``--data`` lies one of

    train/CLASS/*.JPEG     val/CLASS/*.JPEG     a folder for each class, as PyTorch's ImageFolder takes them
    train*.tar             val*.tar             WebDataset: NAME.jpg (or .jpeg) and NAME.cls, the number of its class
    train-*-of-*           validation-*-of-*    TFRecords of TensorFlow's scripts: image/encoded, and image/class/label,
                                                which counts from 1

All become one index: where each image begins, how long it is, and its class. Every image can then be read alone, so
that ranks shuffle all of them and share them exactly, whichever form they have.
"""

import mmap
import os
import struct
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[1]))
from recipe_loop import DataError

CLASSES = 1000
IMAGES = (1_281_167, 50_000)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg")
END_BYTES = 1024
"""Zeros at the end of a tar archive."""


class Place(NamedTuple):
    """Where an image lies: a file, the offset of its first byte, its length in bytes; and the number of its class."""

    file: str
    offset: int
    length: int
    label: int


@dataclass(frozen=True)
class ImageFiles:
    """An index of images.

    Attributes:
        files: names of the files.
        places: for each image, the number of its file, the offset and the length; of shape (images, 3).
        labels: number of the class of each image.
    """

    files: tuple[str, ...]
    places: NDArray[np.int64]
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, places: list[Place]) -> "ImageFiles":
        numbers: dict[str, int] = {}
        rows = [(numbers.setdefault(file, len(numbers)), offset, length) for file, offset, length, _ in places]
        labels = np.array([place.label for place in places], np.int64)
        return cls(tuple(numbers), np.array(rows, np.int64).reshape(-1, 3), labels)

    def first(self, count: int | None) -> "ImageFiles":
        return replace(self, places=self.places[:count], labels=self.labels[:count])

    def read(self, number: int) -> bytes:
        """The content of an image, a JPEG file."""
        file, offset, length = self.places[number].tolist()
        with open(self.files[file], "rb") as opened:  # noqa: PTH123 - a path of each of a million files costs memory
            opened.seek(offset)
            return opened.read(length)

    def name(self, number: int) -> str:
        file, offset, _ = self.places[number].tolist()
        return f"{self.files[file]}, byte {offset}" if offset else self.files[file]


@dataclass(frozen=True)
class FileData:
    """A dataset on disk: an index of the training images and one of the test images."""

    train: ImageFiles
    test: ImageFiles
    classes: int = CLASSES
    mean: tuple[float, ...] = MEAN
    deviation: tuple[float, ...] = DEVIATION
    channels: int = 3

    def limited(self, count: int | None) -> "FileData":
        """The same with the first training images only."""
        return replace(self, train=self.train.first(count))

    @cached_property
    def checksum(self) -> str:
        """Of what is in the index, apart from the folder, to compare whether ranks and runs have the same images."""
        total = 0
        for part in (self.train, self.test):
            names = "\n".join(Path(file).name for file in part.files).encode()
            total = crc32(part.labels, crc32(part.places, crc32(names, total)))
        return f"{total:08x}"


def _folder(root: Path, name: str) -> list[Place]:
    places = []
    classes = sorted(entry.name for entry in os.scandir(root / name) if entry.is_dir())
    for label, class_name in enumerate(classes):
        for entry in sorted(os.scandir(root / name / class_name), key=lambda entry: entry.name):
            if entry.name.lower().endswith(SUFFIXES):
                places.append(Place(entry.path, 0, entry.stat().st_size, label))
                if places[-1].length == 0:
                    raise DataError(f"{entry.path} is empty: copy it again")
    return places


def _shard(file: Path) -> Iterator[Place]:
    """The images of a WebDataset shard. Raises ValueError or TarError if it is damaged."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    with tarfile.open(file, "r:") as shard:
        for member in shard:
            folder, slash, file_name = member.name.rpartition("/")
            name, _, ending = file_name.partition(".")
            name = folder + slash + name  # a folder's name may have dots, as in ./0001.jpg
            if f".{ending.lower()}" in SUFFIXES:
                if name in images:
                    raise ValueError(f"it has two images with the name {name}")
                images[name] = member.offset_data, member.size
            elif ending == "cls" and (content := shard.extractfile(member)) is not None:
                labels[name] = int(content.read())
        end = shard.offset
    if file.stat().st_size < end + END_BYTES // 2 or images.keys() != labels.keys():
        raise ValueError(f"it ends early, or not each of its {len(images)} images has a class")
    for name, (offset, length) in images.items():
        yield Place(str(file), offset, length, labels[name])


def _records(file: Path) -> Iterator[Place]:
    """The images of a TFRecord file, without reading their pixels. Raises ValueError if it is damaged."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = 0
        while at < len(content):
            if at + 12 > len(content):
                raise ValueError("it ends early")
            (length,) = struct.unpack_from("<Q", content, at)  # then a checksum of 4 bytes, the record, and another
            begin, at = at + 12, at + 16 + length
            if at > len(content):
                raise ValueError("it ends early")
            found: dict[bytes, tuple[int, int]] = {}
            for features in _fields(content, begin, begin + length):  # tf.train.Example: fields 1 within each other
                for entry in _fields(content, *features[1:]):
                    key, value = (part[1:] for part in _fields(content, *entry[1:]))
                    (kind,) = _fields(content, *value)  # a list of bytes, of floats or of integers
                    for number, *place in _fields(content, *kind[1:]):
                        found[content[slice(*key)]] = (place[0], place[1]) if number == 1 else (0, 0)
            try:
                image, (label, _) = found[b"image/encoded"], found[b"image/class/label"]
            except KeyError as error:
                raise ValueError(f"the record at byte {begin} has no {error}") from error
            yield Place(str(file), image[0], image[1] - image[0], _number(content, label)[0] - 1)


def _fields(content: mmap.mmap, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message of Protocol Buffers: their numbers, and where their values begin and end."""
    while begin < end:
        tag, begin = _number(content, begin)
        if tag & 7 == 2:
            length, begin = _number(content, begin)
            value_end = begin + length
        elif tag & 7 == 0:
            _, value_end = _number(content, begin)
        else:
            raise ValueError(f"byte {begin} has a field of an unknown kind")
        yield tag >> 3, begin, value_end
        begin = value_end


def _number(content: mmap.mmap, begin: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    number = shift = 0
    while True:
        byte = content[begin]
        number |= (byte & 127) << shift
        begin, shift = begin + 1, shift + 7
        if byte < 128:
            return number, begin


def _part(root: Path, names: tuple[str, ...]) -> list[Place]:
    """The images of a part, which has one of these names in any of the three forms."""
    for name in names:
        if (root / name).is_dir():
            return _folder(root, name)
    reads: tuple[tuple[str, Callable[[Path], Iterator[Place]]], ...] = (("*.tar", _shard), ("-*-of-*", _records))
    for pattern, read in reads:
        for name in names:
            if files := sorted(root.glob(name + pattern)):
                return [place for file in files for place in _checked(read, file)]
    return []


def _checked(read: Callable[[Path], Iterator[Place]], file: Path) -> list[Place]:
    try:
        return list(read(file))
    except (ValueError, IndexError, tarfile.TarError) as error:
        raise DataError(f"{file} is damaged: {error}. Copy it again") from error


@lru_cache  # simulated ranks share it
def load(root: Path, *, any_size: bool = False) -> FileData:
    """Make the index.

    Args:
        root: folder that holds the images, as at the top of this file.
        any_size: whether there may be fewer images than published, as in tests.

    Raises:
        DataError: if they are missing or damaged.
    """
    train, test = _part(root, ("train",)), _part(root, ("val", "validation"))
    if not train or not test:
        raise DataError(
            f"{root} holds no ImageNet: it has {len(train)} training and {len(test)} validation images. Get ILSVRC "
            "2012 from https://image-net.org, so that it holds train/CLASS/*.JPEG and val/CLASS/*.JPEG, or train*.tar "
            "and val*.tar, or TFRecords"
        )
    if (len(train), len(test)) != IMAGES and not any_size:
        raise DataError(
            f"ImageNet in {root} has {len(train)} images for training and {len(test)} for validation, not {IMAGES[0]} "
            f"and {IMAGES[1]}. Copy it again, or pass --any-size if that is meant"
        )
    folders = [{Path(place.file).parent.name for place in part} for part in (train, test)]
    if not train[0].offset and folders[0] != folders[1]:
        only = ", ".join(sorted(folders[0] ^ folders[1])[:3])
        raise DataError(f"train and val in {root} have folders of different classes, such as {only}: copy both again")
    labels = {place.label for place in (*train, *test)}
    if min(labels) < 0 or max(labels) >= CLASSES:
        raise DataError(f"ImageNet in {root} has classes from {min(labels)} to {max(labels)}, not 0 to {CLASSES - 1}")
    return FileData(ImageFiles.of(train), ImageFiles.of(test))
