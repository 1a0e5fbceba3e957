"""The networks of the papers as they are built for images of 32 x 32 pixels, in Keras.

keras.applications has networks of these names for 224 x 224: their first layers would leave 8 x 8 of a CIFAR image.
Paddings, BatchNorm's momentum and epsilon are those of ``models_torch.py``.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers
from recipes import VGG6, VGG16


def _normalized(images: Any) -> Any:
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(images)


def _convolution(images: Any, outputs: int, kernel: int, stride: int = 1) -> Any:
    if kernel > 1:
        images = layers.ZeroPadding2D(kernel // 2)(images)
    return _normalized(layers.Conv2D(outputs, kernel, stride, use_bias=False)(images))


def _block(images: Any, width: int, stride: int, *, bottleneck: bool) -> Any:
    """A residual block: two convolutions of 3 x 3, or with ``bottleneck`` three of 1 x 1, 3 x 3 and 1 x 1."""
    outputs = 4 * width if bottleneck else width
    if bottleneck:
        residual = layers.ReLU()(_convolution(images, width, 1))
        residual = layers.ReLU()(_convolution(residual, width, 3, stride))
        residual = _convolution(residual, outputs, 1)
    else:
        residual = layers.ReLU()(_convolution(images, width, 3, stride))
        residual = _convolution(residual, outputs, 3)
    same = stride == 1 and images.shape[-1] == outputs
    shortcut = images if same else _convolution(images, outputs, 1, stride)
    return layers.ReLU()(layers.Add()([residual, shortcut]))


def _resnet(
    images: Any, *, width: int, blocks: tuple[int, ...], first_stride: int = 1, bottleneck: bool = False
) -> Any:
    features = layers.ReLU()(_convolution(images, width, 3, first_stride))
    for stage, count in enumerate(blocks):
        for number in range(count):
            stride = 2 if stage > 0 and number == 0 else 1
            features = _block(features, width << stage, stride, bottleneck=bottleneck)
    return layers.GlobalAveragePooling2D()(features)


def _vgg(images: Any, plan: Sequence[int | str]) -> Any:
    features = images
    for entry in plan:
        if isinstance(entry, int):
            features = layers.Conv2D(entry, 3, padding="same")(features)
            features = layers.ReLU()(_normalized(features))
        else:
            features = layers.MaxPooling2D(2)(features)
    return layers.Flatten()(features)


def build(name: str, channels: int, classes: int, seed: int, pixels: int = 32) -> keras.Model:
    """Build a network: resnet18, resnet50, vgg16, or for CPUs resnet8, which begins with stride 2, or vgg6.

    ResNet-50 for larger images, resnet50-imagenet, is that of keras.applications.
    """
    keras.utils.set_random_seed(seed)
    if name == "resnet50-imagenet":
        return keras.applications.ResNet50(
            weights=None, input_shape=(pixels, pixels, channels), classes=classes, classifier_activation=None
        )
    images = keras.Input((pixels, pixels, channels))
    if name == "resnet8":
        features = _resnet(images, width=8, blocks=(1, 1, 1), first_stride=2)
    elif name == "resnet18":
        features = _resnet(images, width=64, blocks=(2, 2, 2, 2))
    elif name == "resnet50":
        features = _resnet(images, width=64, blocks=(3, 4, 6, 3), bottleneck=True)
    else:
        assert name in ("vgg6", "vgg16"), name
        features = _vgg(images, VGG6 if name == "vgg6" else VGG16)
    return keras.Model(images, layers.Dense(classes)(features))
