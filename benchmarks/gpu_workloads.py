"""What is trained to measure what an optimizer costs on a GPU: ResNet-50 and a GPT of 124 million parameters."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

RESNET, GPT = "ResNet-50", "GPT of 124 million parameters"


class AttentionBlock(nn.Module):
    """Causal attention and a feed-forward network, each behind a LayerNorm and with a connection around it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        batch, length, width = states.shape
        parts = self.queries_keys_values(self.attention_norm(states)).view(batch, length, 3, self.heads, -1)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        states = states + self.projection(attended.transpose(1, 2).reshape(batch, length, width))
        result: torch.Tensor = states + self.feed_forward(self.norm(states))
        return result


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019) without dropout; the last layer shares the weights of the embedding."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(AttentionBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("numbers", torch.arange(length))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states = self.tokens(tokens) + self.positions(self.numbers[: tokens.shape[1]])
        return nn.functional.linear(self.norm(self.blocks(states)), self.tokens.weight)


class Workload:
    """A model on a device, and both passes of one fixed batch, in bfloat16 where autocast allows it."""

    def __init__(self, name: str, device: torch.device, small: bool) -> None:
        self.device = device
        torch.manual_seed(1)
        self.model, self._inputs, self._targets = MAKERS[name](small)
        self.model.to(device)
        self._inputs, self._targets = self._inputs.to(device), self._targets.to(device)

    def compute(self) -> torch.Tensor:
        """Add the gradients of the batch to those of the parameters. Returns the loss."""
        # Autocast's cache of weights must not be used again after a pass that is captured as a CUDA graph.
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            scores = self.model(self._inputs)
            loss = nn.functional.cross_entropy(scores.flatten(0, -2), self._targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    @property
    def model_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def optimizer(self, *, fused: bool) -> torch.optim.Optimizer:
        """SGD with momentum for images, AdamW for text, as most people train them."""
        options: dict[str, Any] = {"fused": True} if fused else {}
        if isinstance(self.model, GPT2):
            return torch.optim.AdamW(self.model.parameters(), lr=1e-4, **options)
        return torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, **options)


Made = tuple[nn.Module, torch.Tensor, torch.Tensor]
"""A model, inputs and targets."""


def _resnet50(small: bool) -> Made:
    """That of the papers' recipes, with a batch of CIFAR's size."""
    sys.path.append(str(Path(__file__).parents[1] / "examples/cifar"))
    import models_torch

    batch, classes = (2 if small else 256), 10
    model = models_torch.build("resnet8" if small else "resnet50", 3, classes, seed=1)
    return model, torch.randn(batch, 3, 32, 32), torch.randint(classes, (batch,))


def _gpt(small: bool) -> Made:
    vocabulary, length, width, heads, layers = (100, 8, 16, 2, 2) if small else (50_257, 1024, 768, 12, 12)
    tokens = torch.randint(vocabulary, (2 if small else 8, length + 1))
    return GPT2(vocabulary, length, width, heads, layers), tokens[:, :-1].clone(), tokens[:, 1:].clone()


MAKERS: dict[str, Callable[[bool], Made]] = {RESNET: _resnet50, GPT: _gpt}
