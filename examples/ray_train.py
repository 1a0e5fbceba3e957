"""Ray Train on several workers: ``python examples/ray_train.py FOLDER``. Needs ``pip install "ray[train]"``."""

import sys
from pathlib import Path

import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lentando.torch as lt


def train(config: dict) -> None:  # in each of Ray's workers
    lt.init()  # uses the process group that Ray has set up
    torch.manual_seed(0)
    x = torch.randn(640, 8)
    data = TensorDataset(x, (x.sum(1) > 0).long())
    sampler = DistributedSampler(data, lt.size(), lt.rank())
    model = torch.nn.Linear(8, 2)  # without ray.train.torch.prepare_model, which would wrap it in DDP
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = lt.SlowMo(sgd, model=model, period=12, slow_momentum=0.5)
    for epoch in range(config["epochs"]):
        sampler.set_epoch(epoch)
        for inputs, targets in DataLoader(data, batch_size=16, sampler=sampler):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        lt.save(config["folder"], optimizer, extra={"epoch": epoch}, keep=2)  # a folder that all nodes see
        ray.train.report({"epoch": epoch, "ranks": lt.size()})
    lt.shutdown()  # before Ray ends the process group


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    ray.init(num_cpus=2, include_dashboard=False)
    scaling, run = ScalingConfig(num_workers=2), RunConfig(name="ray", storage_path=str(folder))
    configuration = {"epochs": 3, "folder": str(folder / "checkpoints")}
    TorchTrainer(train, train_loop_config=configuration, scaling_config=scaling, run_config=run).fit()
