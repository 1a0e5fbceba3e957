"""``LentandoStrategy``: what Lightning's Trainer needs to know about ranks, replicas and their checkpoints."""

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from lentando.comm.errors import CheckpointError, ConfigurationError
from lentando.comm.operations import Average, Max, Min, Op, Product, Sum, barrier
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.comm.world import rank, size
from lentando.optimizers.checkpoint.loading import load
from lentando.optimizers.checkpoint.saving import save
from lentando.torch.functions import allgather, allreduce, broadcast_object, broadcast_parameters
from lentando.torch.lightning.environment import JobEnvironment, check_places, device_of_rank
from lentando.torch.lightning.metrics import connect_metrics
from lentando.torch.optimizer import DistributedOptimizer

__all__ = ["LentandoStrategy"]

OPS: dict[str, Op] = {"mean": Average, "avg": Average, "sum": Sum, "min": Min, "max": Max, "product": Product}
"""Ops by the names that Lightning and ``torch.distributed.ReduceOp`` have for them."""


class LentandoStrategy(ParallelStrategy):
    """Trains one replica of a ``LightningModule`` on each rank of the job that ``lt.init()`` has joined.

    ``configure_optimizers`` returns Lentando's optimizers, which average the replicas. Lightning neither starts
    processes nor wraps the model; it shards the data among the ranks, reduces metrics over them, and writes files on
    rank 0. During ``fit``, validation evaluates the average of all replicas. Afterwards the model is that average.

    A checkpoint ``x.ckpt`` is an ordinary one, with the average of all replicas as its weights. The folder
    ``x.ckpt.ranks`` in the same place contains the state of each rank as ``lt.save`` writes it, from which
    ``fit(ckpt_path="x.ckpt")`` resumes: bit-identically, if as many ranks have saved it.

    Args:
        **arguments: ``accelerator``, ``checkpoint_io`` and ``precision_plugin`` of any strategy of Lightning.

    Raises:
        NotInitializedError: before ``lt.init()``.
        ConfigurationError: if the arguments of the Trainer do not agree with the job, or if ``configure_optimizers``
            returns an optimizer that does not average.
        CheckpointError: on every rank, if the states of the ranks cannot be saved or loaded.
    """

    strategy_name = "lentando"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(cluster_environment=JobEnvironment(), **arguments)
        self.num_nodes = 1  # the Trainer sets what it was given
        self._average = ExitStack()
        self._is_averaged = False
        self._resumed_from: str | Path = ""

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register(cls.strategy_name, cls, description="Lentando's optimizers average the ranks")

    @property
    def is_distributed(self) -> bool:
        """Whether the Trainer shards data and reduces metrics."""
        return size() > 1

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": size(), "rank": rank()}

    @property
    def root_device(self) -> torch.device:
        return device_of_rank(self.parallel_devices or [])

    def set_world_ranks(self) -> None:
        """Check what the Trainer was given, which is known now, and let rank 0 alone write."""
        check_places(self.parallel_devices or [], self.num_nodes)
        rank_zero_only.rank = rank()  # type: ignore[attr-defined]

    def setup(self, trainer: Trainer) -> None:
        if self._layer_sync is not None:
            raise ConfigurationError(
                "Trainer(sync_batchnorm=True) synchronizes over torch.distributed: use lt.SyncBatchNorm in the model"
            )
        super().setup(trainer)
        assert self.lightning_module is not None
        connect_metrics(self.lightning_module)
        if trainer.state.fn != TrainerFn.FITTING:  # otherwise the optimizers have made the models equal
            broadcast_parameters(self.lightning_module.state_dict(), root_rank=0)

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if not isinstance(optimizer, DistributedOptimizer):
                raise ConfigurationError(
                    f"configure_optimizers returned {type(optimizer).__name__}, which does not average the models of "
                    f"the ranks: return an optimizer of Lentando's, such as lt.SlowMo({type(optimizer).__name__}(...), "
                    "model=self)"
                )
            if getattr(self.precision_plugin, "scaler", None) is None:
                # No loss is scaled, and with this mark Lightning would refuse to clip gradients.
                optimizer._step_supports_amp_scaling = False  # noqa: SLF001

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **arguments: Any) -> Any:
        def averaged() -> Any:
            return optimizer.synchronize(loss=closure())  # before the Trainer clips the gradients

        return super().optimizer_step(optimizer, averaged, model, **arguments)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        with ExitStack() as blocks:
            for optimizer in self._replicas().values():
                blocks.enter_context(optimizer.no_sync())
            yield

    def reduce(self, tensor: Any, group: ProcessSet | None = None, reduce_op: Any = "mean") -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor
        name = str(reduce_op).rpartition(".")[2].lower()
        if name not in OPS:
            raise ConfigurationError(f"reduce_op must be one of {', '.join(OPS)}, got {reduce_op!r}")
        if OPS[name] is Average and not tensor.is_floating_point():
            tensor = tensor.float()
        return allreduce(tensor.detach(), op=OPS[name], process_set=group or global_process_set)

    def all_gather(
        self, tensor: torch.Tensor, group: ProcessSet | None = None, sync_grads: bool = False
    ) -> torch.Tensor:
        given = tensor if sync_grads else tensor.detach()
        return allgather(given.unsqueeze(0), process_set=group or global_process_set)

    def barrier(self, name: str | None = None) -> None:
        barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return broadcast_object(obj, root_rank=src)

    def on_validation_start(self) -> None:
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            self._enter_average()

    def on_validation_end(self) -> None:
        self._leave_average()

    def on_exception(self, exception: BaseException) -> None:
        self._leave_average()

    def on_train_end(self) -> None:
        for optimizer in self._replicas().values():
            optimizer.adopt_average()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._is_averaged or not self._replicas():
            return self._copied_state()
        self._enter_average()
        try:
            return self._copied_state()
        finally:
            self._leave_average()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        return {}  # each rank has a state of its own, which save_checkpoint saves

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        filepath = self.broadcast(str(filepath))  # it may contain metrics, which may differ between ranks
        if "optimizer_states" in checkpoint and (replicas := self._replicas()):
            was_averaged = self._is_averaged
            self._leave_average()
            # The previous state is kept, because x.ckpt refers to it until it has been replaced.
            checkpoint["lentando"] = save(_folder_of_ranks(filepath), replicas, keep=2).name
            if was_averaged:
                self._enter_average()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        self._resumed_from = checkpoint_path
        return super().load_checkpoint(checkpoint_path, weights_only)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        if "lentando" not in checkpoint:
            raise CheckpointError(
                f"{self._resumed_from} was not saved by this strategy, and contains no state of Lentando's optimizers: "
                "to start with its weights, use load_from_checkpoint, and fit without ckpt_path"
            )
        load(_folder_of_ranks(self._resumed_from) / checkpoint["lentando"], self._replicas())

    def remove_checkpoint(self, filepath: str | Path) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            shutil.rmtree(_folder_of_ranks(filepath), ignore_errors=True)

    def teardown(self) -> None:
        # The model stays on its device: the optimizers, from which save_checkpoint saves, are bound to its memory.
        self._leave_average()
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    def _replicas(self) -> dict[str, DistributedOptimizer]:
        """The optimizers by the names under which they are saved."""
        replicas = [optimizer for optimizer in self.optimizers if isinstance(optimizer, DistributedOptimizer)]
        return {f"optimizer {number}": replica for number, replica in enumerate(replicas)}

    def _enter_average(self) -> None:
        for optimizer in self._replicas().values():
            self._average.enter_context(optimizer.averaged())
        self._is_averaged = True

    def _leave_average(self) -> None:
        self._average.close()
        self._is_averaged = False

    def _copied_state(self) -> dict[str, Any]:
        """The state of the model; on rank 0, which saves it, a copy that outlasts the block of the average."""
        state = super().lightning_module_state_dict()
        return copy.deepcopy(state) if self.is_global_zero else state


def _folder_of_ranks(checkpoint: str | Path) -> Path:
    """The folder of the ranks' states, next to the file that links lead to."""
    if "://" in str(checkpoint):
        raise CheckpointError(
            f"{checkpoint} is not on a file system: the states of the ranks need a folder that all see"
        )
    path = Path(checkpoint).resolve()
    return path.with_name(f"{path.name}.ranks")


LentandoStrategy.register_strategies(StrategyRegistry)
