"""Lightning's Trainer with ``LentandoStrategy``: the steps of a loop without it, checkpoints, metrics, wrong uses."""

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lentando.torch as lt
from lentando.torch.lightning import LentandoStrategy, RunLogCallback

pytestmark = pytest.mark.filterwarnings("default")  # Lightning warns about much that is of no interest here
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

Optimize = Callable[[torch.nn.Module], torch.optim.Optimizer]


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 6, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


def slowmo(model: torch.nn.Module) -> torch.optim.Optimizer:
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return lt.SlowMo(sgd, model=model, period=2, slow_momentum=0.5)


def all_reduce(model: torch.nn.Module) -> torch.optim.Optimizer:
    return lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), model=model)


def overlapped(model: torch.nn.Module) -> torch.optim.Optimizer:
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    return lt.DistributedOptimizer(sgd, model=model, base=lt.AllReduce(overlap=True))


class Classifier(lightning.LightningModule):
    def __init__(self, optimize: Optimize = slowmo, *, drop: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.network = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(drop), torch.nn.Linear(8, 2))
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(2, average="micro")
        self.optimize = optimize

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.network(x), y)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, _: int) -> None:
        self.accuracy(self.network(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)
        self.log("val", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimize(self)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def trainer(folder: str | Path = "", epochs: int = 2, **arguments: Any) -> lightning.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "num_sanity_val_steps": 0}
    quiet["enable_checkpointing"] = any(isinstance(each, ModelCheckpoint) for each in arguments.get("callbacks", []))
    arguments = {"strategy": LentandoStrategy(), "accelerator": "cpu", "default_root_dir": folder, **quiet, **arguments}
    return lightning.Trainer(max_epochs=epochs, **arguments)


def loader(*, shuffle: bool = True) -> Any:
    return DataLoader(data(), 4, shuffle=shuffle)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def assert_equal_on_all_ranks(tensor: torch.Tensor) -> None:
    assert torch.equal(tensor, lt.broadcast(tensor, root_rank=0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that all ranks see."""
    return Path(lt.broadcast_object(str(tmp_path), root_rank=0))


@pytest.fixture(autouse=True)
def random_state() -> None:
    lightning.seed_everything(5, verbose=False)


@pytest.mark.parametrize("optimize", [slowmo, all_reduce, overlapped])
def test_trainer_takes_the_steps_of_a_loop_without_it(optimize: Optimize) -> None:
    """Accumulated gradients are clipped after they have been averaged, schedulers step, and the data are sharded."""
    if lt.size() == 1:
        return  # Lightning shuffles without the sampler of several ranks
    model = Classifier(optimize, drop=0)
    trainer(accumulate_grad_batches=2, gradient_clip_val=0.3).fit(model, loader())

    twin = Classifier(optimize, drop=0)
    (optimizer,), (scheduler,) = twin.configure_optimizers()
    sampler = DistributedSampler(data(), lt.size(), lt.rank(), seed=5)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(DataLoader(data(), 4, sampler=sampler))
        for first, second in zip(batches[::2], batches[1::2], strict=True):
            optimizer.zero_grad()
            with optimizer.no_sync():
                (twin.loss(first) / 2).backward()
            (twin.loss(second) / 2).backward()
            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.3)
            optimizer.step()
        scheduler.step()
    optimizer.adopt_average()
    assert torch.equal(weights(model), weights(twin))
    assert_equal_on_all_ranks(weights(model))


def test_resume_is_bit_identical_and_the_file_contains_the_average(folder: Path) -> None:
    def fit(epochs: int, subfolder: str, resume: str | None = None) -> Classifier:
        model = Classifier()
        saving = ModelCheckpoint(folder / subfolder, save_top_k=-1, filename="{epoch}", save_last="link")
        trainer(epochs=epochs, callbacks=[saving]).fit(model, loader(), loader(shuffle=False), ckpt_path=resume)
        return model

    whole = fit(3, "whole")
    fit(1, "parts")
    torch.manual_seed(100 + lt.rank())  # dropout continues with the random numbers of the checkpoint
    resumed = fit(3, "parts", str(folder / "parts/last.ckpt"))
    assert torch.equal(weights(whole), weights(resumed))
    average = Classifier.load_from_checkpoint(folder / "whole/epoch=2.ckpt")
    # Training ended in the middle of a round of two steps or at its end; fit() has left the average in the model.
    torch.testing.assert_close(weights(average), weights(whole))
    trainer().validate(average, loader(shuffle=False), verbose=False)


def delayed(model: torch.nn.Module) -> torch.optim.Optimizer:
    return lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=4, delay=2, slow_momentum=0.5)


def streamed(model: torch.nn.Module) -> torch.optim.Optimizer:
    return lt.DiLoCo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=4, fragments=2, delay=1)


@pytest.mark.parametrize("optimize", [slowmo, delayed, streamed])
def test_the_model_that_is_left_is_the_one_that_was_validated_and_saved(folder: Path, optimize: Optimize) -> None:
    """Eight steps end with an outer step, which is in flight if it has a delay."""
    seen, model = SeesWeights(), Classifier(optimize, drop=0)
    callbacks = [seen, ModelCheckpoint(folder)]
    limits = {"limit_train_batches": 8, "use_distributed_sampler": False}
    trainer(epochs=1, callbacks=callbacks, **limits).fit(model, loader(), loader(shuffle=False))
    assert torch.equal(weights(model), seen.during[-1])
    lt.barrier()
    (saved,) = folder.glob("*.ckpt")
    assert torch.equal(weights(model), weights(Classifier.load_from_checkpoint(saved)))
    assert torch.equal(weights(model), seen.before[-1]) == (optimize is slowmo)
    assert_equal_on_all_ranks(weights(model))
    lt.barrier()


def test_checkpoints_that_are_removed_leave_nothing_and_replaced_ones_keep_the_previous(folder: Path) -> None:
    saving = ModelCheckpoint(folder, filename="{epoch}-{val:.3f}", monitor="val", save_last=True)
    trainer(epochs=3, callbacks=[saving]).fit(Classifier(), loader(), loader(shuffle=False))
    lt.barrier()
    left = sorted(path.name for path in folder.iterdir())
    best = Path(saving.best_model_path).name
    assert left == sorted([best, f"{best}.ranks", "last.ckpt", "last.ckpt.ranks"])
    assert len(list((folder / "last.ckpt.ranks").iterdir())) == 2
    lt.barrier()


class SeesWeights(Callback):
    """Keeps the weights before, during and after validation."""

    def __init__(self) -> None:
        self.before, self.during, self.after = ([] for _ in range(3))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.after.append(weights(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.before.append(weights(pl_module))

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.during.append(weights(pl_module))


def test_validation_sees_the_average_and_training_continues_with_the_own_weights(folder: Path) -> None:
    seen = SeesWeights()
    saving = ModelCheckpoint(folder)  # saves at the end of validation, when the model is still the average
    fitted = trainer(epochs=1, callbacks=[seen, saving], limit_train_batches=3)  # one step after an outer step
    fitted.fit(Classifier(), loader(), loader(shuffle=False))
    own = seen.before[-1]
    assert lt.size() == 1 or not torch.equal(own, lt.broadcast(own, root_rank=0)) or lt.rank() == 0
    for during in seen.during:
        torch.testing.assert_close(during, lt.allreduce(own))
    assert torch.equal(seen.after[-1], own)


def test_metrics_are_those_of_all_ranks() -> None:
    fitted = trainer(epochs=1)
    model = Classifier()
    fitted.fit(model, loader(), loader(shuffle=False))
    found = fitted.callback_metrics
    for name in ("accuracy", "val"):
        assert_equal_on_all_ranks(found[name])
    strategy, own = fitted.strategy, torch.tensor(float(lt.rank()))
    expected = {"mean": (lt.size() - 1) / 2, "sum": lt.size() * (lt.size() - 1) / 2, "max": lt.size() - 1.0, "min": 0.0}
    for name, value in expected.items():
        assert strategy.reduce(own, reduce_op=name) == value
    assert strategy.reduce(torch.tensor(lt.rank()), reduce_op=torch.distributed.ReduceOp.SUM) == expected["sum"]
    assert strategy.reduce(torch.tensor([lt.rank()]), reduce_op="mean") == expected["mean"]
    assert torch.equal(model.all_gather(own), torch.arange(lt.size()).float())
    assert strategy.reduce("text") == "text"
    with pytest.raises(lt.ConfigurationError, match="reduce_op must be one of mean, avg"):
        strategy.reduce(own, reduce_op="median")
    listed = torchmetrics.CatMetric()
    module = lightning.LightningModule()
    module.listed = listed
    trainer_of_list = trainer()
    trainer_of_list.strategy.connect(module)
    module.validation_step = lambda *_: listed.update(torch.full((lt.rank() + 1,), float(lt.rank())))
    trainer_of_list.validate(module, DataLoader(torch.zeros(lt.size(), 1)), verbose=False)
    assert listed.compute().tolist() == [float(rank) for rank in range(lt.size()) for _ in range(rank + 1)]


def test_decisions_are_the_same_on_all_ranks_where_metrics_are_not(folder: Path) -> None:
    class Different(Classifier):
        def validation_step(self, batch: Any, _: int) -> None:
            worse = lt.rank() == lt.size() - 1  # on this rank alone
            self.log("own", float(self.current_epoch if worse else -self.current_epoch) + lt.rank())

    callbacks = [EarlyStopping("own"), ModelCheckpoint(folder, "{epoch}-{own}", monitor="own")]
    fitted = trainer(epochs=9, callbacks=callbacks)
    fitted.fit(Different(), loader(), loader(shuffle=False))
    assert fitted.current_epoch == 4  # the last rank has seen no progress three times
    lt.barrier()
    assert len(list(folder.glob("*.ckpt"))) == 1
    lt.barrier()


def test_manual_optimization_of_two_models(folder: Path) -> None:
    class Pair(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.automatic_optimization = False
            self.one, self.other = torch.nn.Linear(6, 2), torch.nn.Linear(6, 2)

        def training_step(self, batch: Any, _: int) -> None:
            for optimizer, part in zip(self.optimizers(), (self.one, self.other), strict=True):
                loss = torch.nn.functional.cross_entropy(part(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 0.3, "norm")
                optimizer.step(loss=loss)

        def configure_optimizers(self) -> Any:
            sgd = torch.optim.SGD(self.other.parameters(), lr=0.1)
            return slowmo(self.one), lt.AdaComm(sgd, model=self.other, initial_period=3, interval_seconds=1e-9)

    def fit(epochs: int, resume: Path | None = None) -> Pair:
        model = Pair()
        saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        trainer(epochs=epochs, callbacks=[saving]).fit(model, loader(), ckpt_path=resume)
        return model

    whole = fit(2)
    resumed = fit(2, folder / "epoch=0.ckpt")
    assert torch.equal(weights(whole.one), weights(resumed.one))
    assert_equal_on_all_ranks(weights(whole))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_16_bit_precision_with_clipping(precision: str) -> None:
    model = Classifier()
    trainer(precision=precision, gradient_clip_val=0.3).fit(model, loader())
    assert weights(model).isfinite().all()
    assert_equal_on_all_ranks(weights(model))


def test_rank_0_alone_writes(folder: Path) -> None:
    fitted = trainer(folder, epochs=1, logger=CSVLogger(folder), log_every_n_steps=1)
    fitted.fit(Classifier(), loader(), loader(shuffle=False))
    assert (fitted.global_rank, fitted.world_size, fitted.local_rank) == (lt.rank(), lt.size(), lt.local_rank())
    lt.barrier()
    assert len(list(folder.rglob("metrics.csv"))) == 1
    assert (lightning.pytorch.utilities.rank_zero_only(lambda: True)() is True) == (lt.rank() == 0)
    lt.barrier()


def test_each_epoch_is_a_line_in_the_log_of_the_run_and_in_the_loggers(folder: Path) -> None:
    callback = RunLogCallback(folder / "run", with_consensus=True)
    fitted = trainer(folder, epochs=2, logger=CSVLogger(folder), callbacks=[callback])
    fitted.fit(Classifier(), loader(), loader(shuffle=False))
    lt.barrier()
    header, *lines = [json.loads(line) for line in (folder / "run" / "run.jsonl").read_text().splitlines()]
    assert header["ranks"] == lt.size()
    assert [line["step"] for line in lines] == [fitted.global_step // 2, fitted.global_step]
    assert all(0 < line["accuracy"] <= 1 and line["consensus_distance"] >= 0 for line in lines)
    (file,) = folder.rglob("metrics.csv")
    with file.open() as rows:
        found = [row["lentando/rounds"] for row in csv.DictReader(rows) if row["lentando/rounds"]]
    assert [float(rounds) for rounds in found] == [line["rounds"] for line in lines]
    lt.barrier()


def test_unequal_numbers_of_batches_are_an_error_on_every_rank() -> None:
    if lt.size() == 1:
        return

    batches = DataLoader([data()[index] for index in range(12 if lt.rank() else 16)], 4)
    with pytest.raises(lt.MismatchError, match="not about to do the same thing"):
        trainer(use_distributed_sampler=False).fit(Classifier(), batches)


def test_wrong_uses_are_refused(folder: Path) -> None:
    with pytest.raises(lt.ConfigurationError, match=r"Trainer\(devices=7\), but the launcher has started"):
        trainer(devices=7)
    with pytest.raises(lt.ConfigurationError, match=r"Trainer\(num_nodes=7\), but"):
        trainer(num_nodes=7)
    with pytest.raises(lt.ConfigurationError, match=r"use lt.SyncBatchNorm in the model"):
        trainer(sync_batchnorm=True).fit(Classifier(), loader())
    with pytest.raises(lt.ConfigurationError, match="configure_optimizers returned SGD, which does not average"):
        trainer().fit(Classifier(lambda model: torch.optim.SGD(model.parameters(), lr=0.1)), loader())
    if lt.size() > 1:
        with pytest.raises(
            lt.ConfigurationError, match=r"Trainer with SingleDeviceStrategy.*use Trainer\(strategy=Len"
        ):
            trainer(strategy="auto").fit(Classifier(), loader())
    torch.save({"state_dict": Classifier().state_dict(), "optimizer_states": [{}], "lr_schedulers": [],
                "pytorch-lightning_version": lightning.__version__, "global_step": 0, "epoch": 0},
               path := folder / f"{lt.rank()}.ckpt")  # fmt: skip
    with pytest.raises(lt.CheckpointError, match="was not saved by this strategy"):
        trainer().fit(Classifier(), loader(), ckpt_path=path)
    lt.barrier()
