"""Hugging Face's Trainer on the ranks of a job: ``Trainer(..., callbacks=[LentandoCallback()])``. Needs Transformers.

It is no part of ``lentando.torch`` until ``lentando.torch.hugging_face`` is imported, which loads Transformers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lentando.comm.errors import ConfigurationError, grouped_by_rank
from lentando.comm.world import size
from lentando.torch.functions import allgather_object
from lentando.torch.optimizer import DistributedOptimizer

__all__ = ["LentandoCallback"]


class LentandoCallback(TrainerCallback):
    """Checks, when training begins, that the Trainers of all ranks fit together, and lets it end with the average.

    The Trainer of each rank trains one replica as if it were alone, because ``lt.init(hide_launcher=True)`` hides the
    other ranks from it. After ``train()`` the model is the average of all replicas on every rank.

    Raises:
        ConfigurationError: on every rank, in ``train()``, if torch.distributed or several GPUs train the same model, if
            the optimizer is not one of Lentando's, if Transformers would save the model of one rank only, if the ranks
            would take different numbers of steps, or if they would save in the same folder.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the Trainers of all ranks."""
        folder = str(Path(args.output_dir or ".").resolve())
        by_rank = allgather_object((_obstacle(args, kwargs["optimizer"]), state.max_steps, folder))
        obstacles, steps, folders = zip(*by_rank, strict=True)
        for number, obstacle in enumerate(obstacles):
            if obstacle is not None:
                raise ConfigurationError(f"on rank {number}: {obstacle}")
        if len(set(steps)) > 1:
            raise ConfigurationError(
                f"the ranks would take different numbers of steps ({_by_rank(steps)}): give them shards of equal "
                "length, or the same max_steps"
            )
        if len(set(folders)) < size():
            raise ConfigurationError(
                f"several ranks would save in one folder ({_by_rank(folders)}): each needs an output_dir of its own, "
                f'such as f"{args.output_dir}/rank{{lt.rank()}}"'
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Continue with the average of all replicas."""
        _unwrapped(kwargs["optimizer"]).adopt_average()


def _obstacle(args: TrainingArguments, optimizer: Any) -> str | None:
    if not isinstance(_unwrapped(optimizer), DistributedOptimizer):
        return (
            f"the optimizer is {type(_unwrapped(optimizer)).__name__}, which does not average the ranks' models: pass "
            "Trainer(..., optimizers=(lt.SlowMo(...), scheduler))"
        )
    if args.world_size > 1:
        return (
            f"Accelerate has started torch.distributed on {args.world_size} ranks, and averages gradients at every "
            "step: call lt.init(hide_launcher=True) before TrainingArguments or an Accelerator is created"
        )
    if distributed.is_available() and distributed.is_initialized() and args.save_strategy != "no":
        return (
            "torch.distributed has a default process group, and Transformers then saves the model of its rank 0 only: "
            "leave init_process_group to lt.init(hide_launcher=True), which makes none, or set save_strategy='no'"
        )
    if args.n_gpu > 1:
        return (
            f"the Trainer would split each batch among {args.n_gpu} GPUs: let each rank see one, by "
            'os.environ["CUDA_VISIBLE_DEVICES"] = str(lt.local_rank()) after lt.init()'
        )
    return None


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer that the program has passed: Accelerate wraps it."""
    return getattr(optimizer, "optimizer", optimizer)


def _by_rank(values: Sequence[Any]) -> str:
    return grouped_by_rank([str(value) for value in values])
