"""Loss against bytes sent: outer steps and gradients in full precision, and in 8 and 4 bits.

    python benchmarks/quantized.py                            # 8 simulated workers, 3 seeds, a quarter of an hour
    python benchmarks/quantized.py --seeds 1 --steps 120      # two minutes
    python benchmarks/quantized.py --markdown benchmarks/results/quantized.md

A small transformer (one character after the other) learns Python's standard library, which every installation has: each
worker draws its own sequences. The inner optimizer is AdamW, and every method sees the same batches. Training is that
of real ranks, over the simulated transport; the bytes are those that one rank has sent.
"""

import argparse
import statistics
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import destinations
import torch
from measuring import machine
from torch import Tensor, nn
from torch.nn import functional

import lentando.torch as lt
from lentando.comm.simulation import simulate

CONTEXT = 48
VOCABULARY = 128
PERIOD = 24
METHODS: dict[str, dict[str, Any]] = {
    "AllReduce (DDP's average)": {"base": lt.AllReduce()},
    "AllReduce, int8": {"base": lt.AllReduce(wire_dtype="int8")},
    "AllReduce, int4": {"base": lt.AllReduce(wire_dtype="int4")},
    "SlowMo": {},
    "SlowMo, bfloat16": {"wire_dtype": "bfloat16"},
    "SlowMo, int8": {"wire_dtype": "int8"},
    "SlowMo, int4": {"wire_dtype": "int4"},
}


def text() -> Tensor:
    """Characters of Python's standard library, as numbers below ``VOCABULARY``."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    characters = b"".join(file.read_bytes() for file in files)[:2_000_000]
    return torch.frombuffer(bytearray(characters), dtype=torch.uint8).long().clamp(max=VOCABULARY - 1)


class Transformer(nn.Module):
    """A transformer that predicts the next character.

    Args:
        width: features of a position.
        layers: number of layers.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Linear(width, VOCABULARY)

    def forward(self, characters: Tensor) -> Tensor:
        """Scores of the next character, of shape (batch, length, vocabulary)."""
        length = characters.shape[1]
        x = self.characters(characters) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        scores: Tensor = self.out(self.layers(x, mask=mask, is_causal=True))
        return scores


def batch(data: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of characters, and the characters that follow each."""
    starts = torch.randint(len(data) - CONTEXT - 1, (size, 1), generator=generator)
    sequences = data[starts + torch.arange(CONTEXT + 1)]
    return sequences[:, :-1], sequences[:, 1:]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross entropy in nats for each character."""
    return functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def training(
    options: argparse.Namespace, settings: dict[str, Any], seed: int, data: Tensor
) -> Callable[..., tuple[float, int]]:
    """A function that trains one replica, and returns the validation loss of the average and the bytes sent."""
    learned, validation = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]

    def train(*_: Any) -> tuple[float, int]:
        torch.manual_seed(seed)
        model = Transformer(options.width, options.layers)
        inner = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
        make: Any = lt.DistributedOptimizer if "base" in settings else lt.SlowMo
        more = {} if "base" in settings else {"period": PERIOD, "slow_momentum": 0.5}
        optimizer = make(inner, model=model, **more, **settings)
        generator = torch.Generator().manual_seed(1000 * seed + lt.rank())
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * min(1, (step + 1) / 20) * (1 - 0.9 * step / options.steps)
            optimizer.zero_grad()
            loss_of(model, *batch(learned, 8, generator)).backward()
            optimizer.step()
        same = torch.Generator().manual_seed(0)
        with torch.no_grad():
            losses = [float(loss_of(model, *batch(validation, 64, same))) for _ in range(4 if lt.rank() == 0 else 0)]
        return sum(losses) / max(len(losses), 1), optimizer.report()["bytes_sent"]

    return train


def main() -> None:
    """Train by every method, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=480, help=f"inner steps, a multiple of {PERIOD}")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="beginnings of names")
    parser.add_argument("--markdown", type=destinations.file, help="file to write the table to")
    options = parser.parse_args()
    if options.steps % PERIOD:
        parser.error(f"--steps must be a multiple of {PERIOD}, after which all replicas are equal")
    torch.set_num_threads(1)
    data = text()
    parameters = sum(p.numel() for p in Transformer(options.width, options.layers).parameters())
    rows = []
    for name, settings in METHODS.items():
        if not any(name.startswith(chosen) for chosen in options.methods):
            continue
        found = [simulate(training(options, settings, seed, data), options.workers)[0] for seed in range(options.seeds)]
        losses, sent = [loss for loss, _ in found], found[0][1]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        rows.append((name, statistics.mean(losses), spread, sent))
        print(f"{name:28} loss {rows[-1][1]:.4f} +- {spread:.4f}, {sent / 1e6:.3f} MB sent by a rank", flush=True)
    reference = rows[0][3]
    table = [
        "| method | validation loss | standard deviation | MB sent by a rank | fewer bytes |",
        "|---|---|---|---|---|",
    ]
    table += [
        f"| {name} | {loss:.4f} | {spread:.4f} | {sent / 1e6:.3f} | {reference / sent:.1f} times |"
        for name, loss, spread, sent in rows
    ]
    summary = (
        f"{options.workers} simulated workers, transformer of {parameters:,} parameters, {options.steps} steps of "
        f"AdamW, SlowMo with period {PERIOD} and slow momentum 0.5, {options.seeds} seeds. {machine()}"
    )
    if options.markdown is not None:
        options.markdown.write_text("\n".join(["# Loss against bytes", "", summary, "", *table, ""]))


if __name__ == "__main__":
    main()
