"""Batches of JPEG files for one rank, decoded by several threads, and a command that measures their speed.

    python examples/cifar/jpeg_loader.py --data ~/imagenet          images a second of one rank's loader
    python examples/cifar/jpeg_loader.py --fabricate 256 --train    the same of made-up images of ImageNet's mean size,
                                                                    and how many ResNet-50 trains on here

Training images are crops of a random area (8 to 100 %) and shape (3:4 to 4:3), half of them flipped; test images are
the middle of the image, whose shorter side has 8/7 of the pixels. What an image becomes depends on the seed, the epoch
and its number alone.
"""

import argparse
import io
import math
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from image_files import CLASSES, DEVIATION, MEAN, DataError, ImageFiles, load
from loader import Batch, Shards
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

AREA = (0.08, 1.0)
SHAPE = (3 / 4, 4 / 3)
ATTEMPTS = 10
FORMATS = ("JPEG", "PNG")
"""A file of ImageNet, n02105855_2933.JPEG, is a PNG file."""


class JpegLoader(Shards):
    """Batches of one rank, from an index of images.

    Pillow decodes and resizes without Python's lock: threads decode as fast as processes would, and send nothing.

    Args:
        files: the index.
        mean: mean of the pixels of each channel, of white = 1.
        deviation: their standard deviation.
        pixels: height and width of the images that it makes.
        threads: how many decode; the cores that this process may use by default.
        **shard: the arguments of ``Shards``.
    """

    def __init__(
        self,
        files: ImageFiles,
        mean: tuple[float, ...],
        deviation: tuple[float, ...],
        *,
        pixels: int,
        threads: int | None = None,
        **shard: Any,
    ) -> None:
        super().__init__(len(files.labels), mean, deviation, **shard)
        self._files, self._pixels = files, pixels
        self._threads = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)))

    def _batch(self, epoch: int, step: int, chosen: NDArray[np.int64]) -> Batch:
        decoded = self._threads.map(lambda number: self._image(epoch, number), chosen.tolist())
        return self._normalized(np.stack(list(decoded))), self._files.labels[chosen]

    def _image(self, epoch: int, number: int) -> NDArray[np.uint8]:
        """An image as bytes of shape (3, pixels, pixels)."""
        try:
            with Image.open(io.BytesIO(self._files.read(number)), formats=FORMATS) as image:
                if self._augment:
                    cut = _randomly_cut(image, self._pixels, np.random.default_rng([self._seed, epoch, number]))
                else:
                    cut = _middle(image, self._pixels)
                return np.asarray(cut.convert("RGB")).transpose(2, 0, 1)
        except UnidentifiedImageError as error:
            raise DataError(f"{self._files.name(number)} is no JPEG file, or is damaged. Copy it again") from error
        except (OSError, Image.DecompressionBombError) as error:
            raise DataError(f"{self._files.name(number)} is damaged: {error}. Copy it again") from error


def _randomly_cut(image: Image.Image, pixels: int, generator: np.random.Generator) -> Image.Image:
    width, height = image.size
    for _ in range(ATTEMPTS):
        area = width * height * generator.uniform(*AREA)
        shape = math.exp(generator.uniform(*map(math.log, SHAPE)))
        across, down = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < across <= width and 0 < down <= height:
            break
    else:
        across = down = min(width, height)
    left, top = generator.integers(0, [width - across + 1, height - down + 1]).tolist()
    cut = image.resize((pixels, pixels), Image.Resampling.BILINEAR, (left, top, left + across, top + down))
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else cut


def _middle(image: Image.Image, pixels: int) -> Image.Image:
    side = min(image.size) * 7 / 8
    left, top = ((length - side) / 2 for length in image.size)
    return image.resize((pixels, pixels), Image.Resampling.BILINEAR, (left, top, left + side, top + side))


def fabricate(folder: Path, images: int, classes: int = 4, size: tuple[int, int] = (500, 375)) -> None:
    """Write made-up JPEG files, smooth as photographs are, as train/CLASS/*.JPEG and as many in val/."""
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for number in range(images):
            file = folder / part / f"class{number % classes}" / f"{number}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            coarse = generator.integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
            coarse[..., number % 3] //= 1 + number % classes
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, quality=90)


def images_per_second(batches: Iterator[Batch], seconds: float) -> float:
    """How many images come within about so many seconds, after a first batch."""
    next(batches)
    began, made = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        made += len(next(batches)[1])
    return made / (time.perf_counter() - began)


def training_images_per_second(batch: Batch, model: str, seconds: float) -> float:
    """How many images a model trains on here, by PyTorch."""
    import torch
    from recipes import PRESETS
    from train_torch import TorchLearner

    import lentando.torch as lt

    lt.init()
    recipe = replace(PRESETS["slowmo-imagenet"]["ar-sgd"], model=model)
    learner = TorchLearner(argparse.Namespace(recipe=recipe, seed=0, reduction="auto"), 3, CLASSES)
    learner.step(batch, 0.01)
    began, trained = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        learner.step(batch, 0.01)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        trained += len(batch[1])
    return trained / (time.perf_counter() - began)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of ImageNet, as image_files.py describes")
    parser.add_argument("--fabricate", type=int, metavar="N", help="make up N images instead, of 500 x 375 pixels")
    parser.add_argument("--train", action="store_true", help="train, too, and compare")
    parser.add_argument("--model", default="resnet50-imagenet", help="that trains (default: resnet50-imagenet)")
    parser.add_argument("--threads", type=int, metavar="N", help="that decode (default: the cores)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="(default: 32)")
    parser.add_argument("--pixels", type=int, default=224, metavar="N", help="height and width (default: 224)")
    parser.add_argument("--seconds", type=float, default=5.0, help="that each is measured (default: 5)")
    options = parser.parse_args()
    if (options.data is None) == (options.fabricate is None):
        parser.error("give either --data or --fabricate")
    with tempfile.TemporaryDirectory() as made:
        if options.fabricate is not None:
            fabricate(Path(made), options.fabricate)
        files = load(options.data or Path(made), any_size=True).train
        loader = JpegLoader(
            files, MEAN, DEVIATION, pixels=options.pixels, threads=options.threads, batch_size=options.batch_size,
            rank=0, size=1,
        )  # fmt: skip
        speed = images_per_second((batch for epoch in count() for batch in loader.batches(epoch)), options.seconds)
        print(
            f"the loader makes {speed:,.0f} images of {options.pixels} x {options.pixels} pixels a second", flush=True
        )
        if options.train:
            batch = next(loader.batches(0))
            trained = training_images_per_second(batch, options.model, options.seconds)
            print(
                f"{options.model} trains on {trained:,.1f} a second: the loader is {speed / trained:,.1f} times as fast"
            )


if __name__ == "__main__":
    main()
