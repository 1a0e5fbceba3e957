"""A job, or one rank of it, that trains a small language model by one method. ``benchmarks/quantized.py`` starts it.

    python benchmarks/peers/language.py simulated --workers 8 --delay 6
    mpirun -np 4 python benchmarks/peers/language.py lentando --compute-seconds 0.1

A transformer reads the reference of the Python language, which every installation of Python has, one character after
the other. Each rank draws its own sequences from the first nine tenths; the last tenth is for validation. The inner
optimizer is AdamW; every library begins with the same weights and takes the same batches. Prints a line of JSON: the
final validation loss of the average of all replicas, the bytes that a rank has sent, and for each round its steps, its
end in seconds, the bytes until then, and the validation loss of rank 0's replica.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pydoc_data.topics import topics
from typing import Any

import torch
from loss import Pace, Paced
from torch import Tensor, nn
from torch.nn import functional

CONTEXT = 48
VOCABULARY = 128
WARM_UP_STEPS = 20
LAST_SHARE = 0.1
"""Of the learning rate that is left at the end; it falls linearly."""
VALIDATION_BATCHES, VALIDATION_SIZE = 4, 64


class Transformer(nn.Module):
    """A transformer that predicts the next character.

    Args:
        width: features of a position.
        layers: number of layers.
        seconds: compute time of an iteration, of which each layer takes a part, a third of it in forward.
    """

    def __init__(self, width: int, layers: int, seconds: float = 0.0) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.out = nn.Linear(width, VOCABULARY)
        self.pace = Pace(seconds)

    def forward(self, characters: Tensor) -> Tensor:
        """Scores of the next character, of shape (batch, length, vocabulary)."""
        length, count = characters.shape[1], len(self.layers)
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.characters(characters) + self.positions.weight[:length]
        self.pace.start()
        for number, layer in enumerate(self.layers):
            there, back = (number + 1) / 3 / count, 1 / 3 + 2 / 3 * (count - number) / count
            x = Paced.apply(layer(x, src_mask=mask, is_causal=True), self.pace, there, back)
        scores: Tensor = self.out(x)
        return scores


class Text:
    """The reference of the Python language, as numbers below ``VOCABULARY``."""

    def __init__(self) -> None:
        characters = "".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
        text = torch.frombuffer(bytearray(characters), dtype=torch.uint8).long().clamp(max=VOCABULARY - 1)
        border = len(text) * 9 // 10
        self.training, self.validation = text[:border], text[border:]

    def loss(self, model: nn.Module) -> float:
        """The validation loss: of the same sequences at every call, in nats for each character."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            losses = [
                loss_of(model, *batch(self.validation, VALIDATION_SIZE, generator)) for _ in range(VALIDATION_BATCHES)
            ]
        return float(sum(losses)) / len(losses)


def batch(text: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of characters, and the characters that follow each."""
    starts = torch.randint(len(text) - CONTEXT - 1, (size, 1), generator=generator)
    sequences = text[starts + torch.arange(CONTEXT + 1)]
    return sequences[:, :-1], sequences[:, 1:]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross entropy in nats for each character."""
    return functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


class Job:
    """One method on one rank.

    Args:
        options: options of this program.
        rank: number of this rank.
        module: what computes the loss in training, a wrapper of the model or the model itself.
        optimizer: optimizer of the method.
        bytes_sent: function that returns the bytes that this rank has sent by then, after so many steps.
        averaged: function that returns a block inside which the model is the average of all replicas.
        barrier: function in which ranks wait for each other.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        rank: int,
        model: Transformer,
        module: nn.Module,
        optimizer: Any,
        bytes_sent: Callable[[int], int],
        averaged: Callable[[], AbstractContextManager[None]],
        barrier: Callable[[], object],
    ) -> None:
        self._options, self.rank, self._model, self._module = options, rank, model, module
        self._optimizer, self._bytes_sent, self._averaged, self._barrier = optimizer, bytes_sent, averaged, barrier

    def train(self) -> dict[str, Any]:
        """Train, and return what rank 0 prints. Validation takes place after training, which is timed."""
        options, text = self._options, Text()
        generator = torch.Generator().manual_seed(1000 * options.seed + self.rank)
        seen = []
        self._barrier()
        started = time.perf_counter()
        for step in range(options.steps):
            for group in self._optimizer.param_groups:
                falling = 1 - (1 - LAST_SHARE) * step / options.steps
                group["lr"] = options.learning_rate * min(1, (step + 1) / WARM_UP_STEPS) * falling
            self._optimizer.zero_grad()
            loss_of(self._module, *batch(text.training, options.batch_size, generator)).backward()
            self._optimizer.step()
            taken = step + 1
            if taken % options.period == 0:
                weights = nn.utils.parameters_to_vector(self._model.parameters()).detach() if self.rank == 0 else None
                seen.append((taken, time.perf_counter() - started, self._bytes_sent(taken), weights))
        self._model.pace = Pace(0.0)
        with self._averaged():
            loss = text.loss(self._model) if self.rank == 0 else 0.0
        if self.rank:
            return {}
        # With a delay, the average of the last round is in flight: each round has sent what the one before it has.
        sent = len(seen) * (seen[-1][2] - seen[-2][2])
        replica = Transformer(options.width, options.layers)
        points = []
        for *numbers, weights in seen:
            nn.utils.vector_to_parameters(weights, replica.parameters())
            points.append((*numbers, text.loss(replica)))
        parameters = sum(parameter.numel() for parameter in self._model.parameters())
        return {"loss": loss, "bytes_sent": sent, "parameters": parameters, "points": points}


def lentando(options: argparse.Namespace) -> Job:
    """A method of Lentando, on the ranks that the launcher has started or on simulated ones."""
    import lentando.torch as lt

    torch.manual_seed(options.seed)
    model = Transformer(options.width, options.layers, options.compute_seconds)
    inner = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    optimizer: Any
    if options.every_step:
        optimizer = lt.DistributedOptimizer(inner, model=model, base=lt.AllReduce(wire_dtype=options.wire_dtype))
    else:
        optimizer = lt.SlowMo(
            inner, model=model, period=options.period, slow_momentum=0.5,
            delay=options.delay, fragments=options.fragments, wire_dtype=options.wire_dtype,
        )  # fmt: skip

    def bytes_sent(_: int) -> int:
        sent: int = optimizer.report()["bytes_sent"]
        return sent

    return Job(options, lt.rank(), model, model, optimizer, bytes_sent, optimizer.averaged, lt.barrier)


def on_ranks(options: argparse.Namespace) -> dict[str, Any]:
    """Train on the ranks that the launcher has started."""
    import lentando.torch as lt

    lt.init()
    found = lentando(options).train()
    lt.barrier()
    return found


def simulated(options: argparse.Namespace) -> dict[str, Any]:
    """Train on simulated ranks. Their seconds are those of the simulation, on one processor."""
    from lentando.comm.simulation import simulate

    found: dict[str, Any] = simulate(lambda *_: lentando(options).train(), options.workers)[0]
    return found


def gloo(options: argparse.Namespace) -> dict[str, Any]:
    """Train by PyTorch's DistributedDataParallel."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    torch.manual_seed(options.seed)
    model = Transformer(options.width, options.layers, options.compute_seconds)
    parallel = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=options.bucket_mb)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=options.learning_rate)
    size = sum(4 * parameter.numel() for parameter in model.parameters())
    size = 2 * size * (dist.get_world_size() - 1) // dist.get_world_size()
    return Job(
        options, dist.get_rank(), model, parallel, optimizer, lambda steps: steps * size, nullcontext, dist.barrier
    ).train()


LIBRARIES = {"lentando": on_ranks, "gloo": gloo, "simulated": simulated}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--workers", type=int, default=8, help="simulated ranks (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=144, help="a multiple of the period (default %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="features of a position (default %(default)s)")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of a rank (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--compute-seconds", type=float, default=0.0, help="what an iteration computes at least")
    parser.add_argument("--period", type=int, default=16, help="steps of a round (default %(default)s)")
    parser.add_argument("--every-step", action="store_true", help="average gradients at every step, without SlowMo")
    parser.add_argument("--delay", type=int, default=0)
    parser.add_argument("--fragments", type=int, default=1)
    parser.add_argument("--wire-dtype", help="of SlowMo's averages, or of the gradients")
    parser.add_argument("--bucket-mb", type=float, default=1.0, help="of DistributedDataParallel (default %(default)s)")
    options = parser.parse_args()
    if options.steps % options.period or options.steps < 2 * options.period:
        parser.error("--steps must be a multiple of --period, two rounds at least")
    torch.set_num_threads(1)
    if found := LIBRARIES[options.library](options):
        print(json.dumps(found), flush=True)
    if options.library == "gloo":
        torch.distributed.barrier()
        os._exit(0)  # its threads may log errors after their store is closed


if __name__ == "__main__":
    main()
