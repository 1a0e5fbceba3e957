"""Small JPEG files as class folders, WebDataset shards and TFRecords, byte by byte as their own tools write them."""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 3


def jpeg(number: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """An image whose colour is that of its class, ``number % CLASSES``."""
    pixels = np.random.default_rng(number).integers(0, 60, (size[1], size[0], 3), np.uint8)
    pixels[..., number % CLASSES] += 180
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=95)
    return content.getvalue()


def write_folder(root: Path, train: int = 24, test: int = 9) -> Path:
    """train/CLASS/*.JPEG and val/CLASS/*.JPEG."""
    for part, count in (("train", train), ("val", test)):
        for number in range(count):
            file = root / part / f"n{number % CLASSES}" / f"{number:04}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(jpeg(number))
    return root


def write_shards(root: Path, train: int = 24, test: int = 9) -> Path:
    """train-00000.tar, ... with NAME.jpg and NAME.cls, as WebDataset's TarWriter writes them."""
    root.mkdir(parents=True, exist_ok=True)
    for part, count, shards in (("train", train, 3), ("val", test, 1)):
        for shard in range(shards):
            with tarfile.open(root / f"{part}-{shard:05}.tar", "w") as archive:
                for number in range(shard, count, shards):
                    for ending, content in (("cls", str(number % CLASSES).encode()), ("jpg", jpeg(number))):
                        member = tarfile.TarInfo(f"{number:04}.{ending}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
    return root


def _varint(number: int) -> bytes:
    content = bytearray()
    while number > 127:
        content.append(number & 127 | 128)
        number >>= 7
    return bytes([*content, number])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def example(number: int) -> bytes:
    """A tf.train.Example with the features of an image, and one more."""
    features = {
        b"image/class/label": _field(3, _field(1, _varint(number % CLASSES + 1))),
        b"image/encoded": _field(1, _field(1, jpeg(number))),
        b"image/format": _field(1, _field(1, b"JPEG")),
    }
    entries = b"".join(_field(1, _field(1, key) + _field(2, value)) for key, value in features.items())
    return _field(1, entries)


def write_records(root: Path, train: int = 24, test: int = 9) -> Path:
    """train-00000-of-00002, ...; checksums, which the reader leaves alone, are zero."""
    root.mkdir(parents=True, exist_ok=True)
    for part, count, files in (("train", train, 2), ("validation", test, 1)):
        for file in range(files):
            records = [example(number) for number in range(file, count, files)]
            content = b"".join(struct.pack("<Q", len(record)) + bytes(4) + record + bytes(4) for record in records)
            (root / f"{part}-{file:05}-of-{files:05}").write_bytes(content)
    return root
