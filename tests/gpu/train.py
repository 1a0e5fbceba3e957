"""Trains a small model and writes it down: ``train.py DEVICE METHOD DTYPE FOLDER``. Started on ranks by the tests."""

import contextlib
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


def main(device_name: str, method: str, dtype_name: str, folder: str) -> None:
    lt.init()
    dtype = getattr(torch, dtype_name)
    device, stream = torch.device("cpu"), contextlib.nullcontext()
    if device_name != "cpu":
        device = torch.device("cuda", lt.local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
        if device_name == "cuda, a stream of its own":
            stream = torch.cuda.stream(torch.cuda.Stream())
    with stream:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).to(dtype).to(device)
        sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        optimizer = lt.DistributedOptimizer(sgd, model=model, **METHODS[method])
        for step in range(9):
            if step == 5:
                lt.save(Path(folder) / f"checkpoint-{device_name}", optimizer)
            images = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * step + lt.rank())).to(dtype)
            images = images.to(device)
            optimizer.zero_grad()
            loss = (model(images) - images.sum(dim=1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step(loss=loss)
        place = optimizer._model._memory[0].place
        state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        lt.load(Path(folder) / f"checkpoint-{device_name}", optimizer)
    expected = "host" if device.type == "cpu" else "device" if takes_device_arrays(world.transport()) else "staged"
    assert place == expected, place
    torch.save(state, Path(folder) / f"{device_name}-{lt.rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
