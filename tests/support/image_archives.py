"""Small datasets in the formats of CIFAR's and Fashion-MNIST's archives, byte by byte as the published ones."""

import gzip
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]


def images(count: int, classes: int = 10, seed: int = 0, channels: int = 3) -> tuple[Images, Images]:
    """Noise around a colour of each class, so that a network learns it, and labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count, dtype=np.uint8)
    colours = np.random.default_rng(1).integers(0, 200, (classes, channels, 1, 1), dtype=np.uint8)
    noise = generator.integers(0, 56, (count, channels, 32, 32), dtype=np.uint8)
    return colours[labels] + noise, labels


def binary_file(pixels: Images, labels: Images, *, coarse: bool = False) -> bytes:
    """A file of the binary version: one label (CIFAR-100: a coarse one before it) and the pixels, image by image."""
    columns = [labels[:, None] // 5, labels[:, None]] if coarse else [labels[:, None]]
    return np.concatenate([*columns, pixels.reshape(len(labels), -1)], axis=1).tobytes()


def python_file(pixels: Images, labels: Images, labels_key: bytes) -> bytes:
    """A file of the python version: a dict, as Python 2 pickled it in protocol 2."""
    names = b"".join(b"U" + bytes([len(name)]) + name for name in (b"image_%04d.png" % n for n in range(len(labels))))
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\tU\x01b\x87Rq\n"
    shape = b"M" + len(labels).to_bytes(2, "little") + b"M\x00\x0c\x86"
    dtype = b"cnumpy\ndtype\nq\x0bU\x02u1K\x00K\x01\x87Rq\x0c(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return b"".join([
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03",
        b"U", bytes([len(labels_key)]), labels_key, b"q\x04]q\x05(", *(b"K" + bytes([label]) for label in labels), b"e",
        b"U\x04dataq\x06", array, b"(K\x01", shape, dtype,
        b"\x89T", pixels.size.to_bytes(4, "little"), pixels.tobytes(), b"tb",
        b"U\tfilenamesq\x0d]q\x0e(", names, b"eu.",
    ])  # fmt: skip


def idx_file(values: Images) -> bytes:
    """An IDX file: type 8 (bytes), the lengths of the dimensions, big-endian, and the values."""
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def write_cifar10_binary(root: Path, per_file: int = 20) -> Path:
    """Five files for training and one for tests. Returns their folder."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for number in range(1, 6):
        (folder / f"data_batch_{number}.bin").write_bytes(binary_file(*images(per_file, seed=number)))
    (folder / "test_batch.bin").write_bytes(binary_file(*images(2 * per_file, seed=6)))
    return folder


def write_cifar100_python(root: Path, count: int = 24) -> Path:
    """A file for training and one for tests, packed. Returns the archive."""
    archive = root / "cifar-100-python.tar.gz"
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as packed:
        for seed, name in enumerate(("train", "test")):
            unpacked = root / name
            unpacked.write_bytes(python_file(*images(count, 100, seed), b"fine_labels"))
            packed.add(unpacked, f"cifar-100-python/{name}")
            unpacked.unlink()
    return archive


def write_fashion_mnist(root: Path, count: int = 100) -> Path:
    """Images and labels for training and for tests, compressed. Returns their folder."""
    folder = root / "fashion-mnist"
    folder.mkdir(parents=True)
    for seed, (name, number) in enumerate((("train", count), ("t10k", count // 2))):
        pixels, labels = images(number, channels=1, seed=seed)
        cropped = np.ascontiguousarray(pixels[:, 0, 2:-2, 2:-2])
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_file(cropped)))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_file(labels)))
    return folder
