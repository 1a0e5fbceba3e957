"""The networks of the papers as they are built for images of 32 x 32 pixels, in PyTorch.

torchvision's networks of these names are for 224 x 224: their first layers would leave 8 x 8 of a CIFAR image.
"""

from collections.abc import Sequence

import torch
from recipes import VGG6, VGG16
from torch import nn


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class Block(nn.Module):
    """A residual block: two convolutions of 3 x 3, or with ``bottleneck`` three of 1 x 1, 3 x 3 and 1 x 1."""

    def __init__(self, inputs: int, width: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            parts = [
                _convolution(inputs, width, 1),
                nn.ReLU(),
                _convolution(width, width, 3, stride),
                nn.ReLU(),
                _convolution(width, outputs, 1),
            ]
        else:
            parts = [_convolution(inputs, width, 3, stride), nn.ReLU(), _convolution(width, outputs, 3)]
        self.residual = nn.Sequential(*parts)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.relu(self.residual(images) + self.shortcut(images))


def _resnet(
    channels: int, classes: int, *, width: int, blocks: tuple[int, ...], first_stride: int = 1, bottleneck: bool = False
) -> nn.Sequential:
    layers: list[nn.Module] = [_convolution(channels, width, 3, first_stride), nn.ReLU()]
    inputs = width
    for stage, count in enumerate(blocks):
        for number in range(count):
            stride = 2 if stage > 0 and number == 0 else 1
            layers.append(Block(inputs, width << stage, stride, bottleneck=bottleneck))
            inputs = (width << stage) * (4 if bottleneck else 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def _vgg(channels: int, classes: int, plan: Sequence[int | str]) -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = channels
    for entry in plan:
        if isinstance(entry, int):
            layers += [
                nn.Conv2d(inputs, entry, 3, padding=1),
                nn.BatchNorm2d(entry),
                nn.ReLU(),
            ]
            inputs = entry
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, classes))


class Scores(nn.Module):
    """ResNet-50 of Transformers, which returns its scores alone."""

    def __init__(self, channels: int, classes: int) -> None:
        from transformers import ResNetConfig, ResNetForImageClassification  # takes seconds

        super().__init__()
        self.network = ResNetForImageClassification(ResNetConfig(num_channels=channels, num_labels=classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images).logits


def build(name: str, channels: int, classes: int, seed: int) -> nn.Module:
    """Build a network: resnet18, resnet50, vgg16, or for CPUs resnet8, which begins with stride 2, or vgg6.

    ResNet-50 for larger images, resnet50-imagenet, is that of Transformers.
    """
    torch.manual_seed(seed)
    if name == "resnet50-imagenet":
        return Scores(channels, classes)
    if name == "resnet8":
        return _resnet(channels, classes, width=8, blocks=(1, 1, 1), first_stride=2)
    if name == "resnet18":
        return _resnet(channels, classes, width=64, blocks=(2, 2, 2, 2))
    if name == "resnet50":
        return _resnet(channels, classes, width=64, blocks=(3, 4, 6, 3), bottleneck=True)
    assert name in ("vgg6", "vgg16"), name
    return _vgg(channels, classes, VGG6 if name == "vgg6" else VGG16)
