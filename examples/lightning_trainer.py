"""Lightning's Trainer on several ranks: ``mpirun -np 2 python examples/lightning_trainer.py FOLDER [--resume]``."""

import sys

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

import lentando.torch as lt
from lentando.torch.lightning import LentandoStrategy


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        self.log("loss", self.training_step(batch, _), sync_dist=True)  # of the average of all replicas, on all ranks

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        optimizer = lt.SlowMo(sgd, model=self, period=12, slow_momentum=0.5)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.8)]


lt.init()
folder, resume = sys.argv[1], "--resume" in sys.argv
lightning.seed_everything(0)
x = torch.randn(640, 8)
data = TensorDataset(x, (x.sum(1) > 0).long())
best = ModelCheckpoint(folder, filename="{epoch}", monitor="loss", save_top_k=-1, save_last="link")
trainer = lightning.Trainer(max_epochs=3, strategy=LentandoStrategy(), callbacks=[best], logger=False)
loaders = DataLoader(data, batch_size=16, shuffle=True), DataLoader(data, batch_size=64)
trainer.fit(Classifier(), *loaders, ckpt_path=f"{folder}/last.ckpt" if resume else None)
loss = trainer.callback_metrics.get("loss")
print(f"rank {trainer.global_rank} of {trainer.world_size}:", "all is trained" if loss is None else f"loss {loss:.4f}")
