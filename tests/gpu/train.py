"""Trains a small model by several methods and writes it down: ``train.py DEVICE FOLDER METHOD:DTYPE ...``.

Started on ranks by the tests. DEVICE is cpu, cuda, or own-stream: CUDA on a stream of the program's own. In a dry run
all of them are the CPU.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lentando.torch as lt
from lentando.comm import world
from lentando.comm.capabilities import takes_device_arrays

METHODS: dict[str, Any] = {
    "allreduce": {"base": lt.AllReduce()},
    "slowmo": {"base": lt.LocalSGD(), "outer": lt.SlowMomentum(0.8, 0.5), "period": 3, "base_buffers": "average"},
    "sgp": {"base": lt.SGP(), "outer": lt.SlowMomentum(), "period": 4},
    "osgp": {"base": lt.OSGP(deterministic=True), "period": 4},
}
STEPS, SAVED_AT = 9, 5


def main(device_name: str, folder: Path, *cases: str) -> None:
    lt.init()
    is_cpu = device_name == "cpu" or os.environ.get("LENTANDO_GPU_DRY_RUN") == "1"
    device, stream = torch.device("cpu"), contextlib.nullcontext()
    if not is_cpu:
        device = torch.device("cuda", lt.local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
        if device_name == "own-stream":
            stream = torch.cuda.stream(torch.cuda.Stream())
    with stream:
        for case in cases:
            method, dtype = case.split(":")
            states = train(device, METHODS[method], getattr(torch, dtype), folder / f"{case}-{device_name}")
            torch.save(states, folder / f"{case}-{device_name}-{lt.rank()}.pt")
    lt.shutdown()


def train(device: torch.device, settings: dict[str, Any], dtype: torch.dtype, checkpoint: Path) -> list[Any]:
    """The model after the last step, and after those that follow the checkpoint were taken again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).to(dtype).to(device)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = lt.DistributedOptimizer(sgd, model=model, **settings)
    found = optimizer._model._memory[0].placement
    expected = "host" if device.type == "cpu" else "device" if takes_device_arrays(world.transport()) else "staged"
    assert found == expected, f"{found}, expected {expected}"

    def take_steps(first: int, last: int) -> dict[str, torch.Tensor]:
        for step in range(first, last):
            images = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * step + lt.rank())).to(dtype)
            images = images.to(device)
            optimizer.zero_grad()
            loss = (model(images) - images.sum(dim=1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step(loss=loss)
        return {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}

    take_steps(0, SAVED_AT)
    lt.save(checkpoint, optimizer)
    trained = take_steps(SAVED_AT, STEPS)
    lt.load(checkpoint, optimizer)
    return [trained, take_steps(SAVED_AT, STEPS)]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
