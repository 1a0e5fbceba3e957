"""A small network that learns the handwritten digits, in either framework: what the faults hit."""

import sys
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

PERIOD = 6
METHODS = ("slowmo", "sgp", "osgp", "allreduce")


def settings(lt: Any, method: str) -> dict[str, Any]:
    return {
        "slowmo": {"base": lt.LocalSGD(), "outer": lt.SlowMomentum(1.0, 0.5), "period": PERIOD},
        "sgp": {"base": lt.SGP(), "period": PERIOD},
        "osgp": {"base": lt.OSGP(deterministic=True), "period": PERIOD},
        "allreduce": {"base": lt.AllReduce()},
    }[method]


def write_digits(path: Path) -> None:
    """The handwritten digits, as the examples split them: ranks read a file sooner than they import scikit-learn."""
    sys.path.append(str(Path(__file__).parents[2] / "examples"))
    from digits_common import load_digits

    np.savez(path, **vars(load_digits(0, 1)))


class Training:
    """One rank's. ``share`` says in what order it sees the data, and stays when ranks are renumbered."""

    lt: Any
    optimizer: Any

    def __init__(self, digits: Path, share: int) -> None:
        self.share = share
        with np.load(digits) as data:
            self.images, self.labels = data["train_images"].reshape(-1, 64), data["train_labels"]
            self.test_images, self.test_labels = data["test_images"].reshape(-1, 64), data["test_labels"]
        self.steps = 0
        self.poisoned_at: int | None = None

    def batch(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        chosen = np.random.default_rng([self.share, self.steps]).integers(0, len(self.labels), 256)
        return self.images[chosen], self.labels[chosen]

    def step(self) -> None:
        images, labels = self.batch()
        poison = np.nan if self.steps == self.poisoned_at else 1.0
        self.steps += 1
        self.learn(images, labels, poison)

    def learn(self, images: Any, labels: Any, poison: float) -> None:
        raise NotImplementedError

    def tensors(self) -> list[NDArray[np.float32]]:
        raise NotImplementedError

    def predicted(self, images: Any) -> Any:
        raise NotImplementedError

    def checksum(self) -> int:
        return crc32(b"".join(tensor.tobytes() for tensor in self.tensors()))

    def is_finite(self) -> bool:
        return all(bool(np.isfinite(tensor).all()) for tensor in self.tensors())

    def averaged(self) -> tuple[float, int]:
        """Accuracy and checksum of the average of all replicas. Collective."""
        with self.optimizer.averaged():
            right = self.predicted(self.test_images) == self.test_labels
            return float(right.mean()), self.checksum()

    def save(self, path: Path) -> None:
        self.lt.save(path, self.optimizer, {"steps": self.steps}, keep=2)

    def load(self, path: Path) -> None:
        self.steps = self.lt.load(path, self.optimizer)["steps"]


def torch_training() -> type[Training]:
    import torch
    from torch import nn

    import lentando.torch as lt

    torch.set_num_threads(1)

    class TorchTraining(Training):
        def __init__(self, method: str, digits: Path, share: int, **options: Any) -> None:
            super().__init__(digits, share)
            self.lt = lt
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
            sgd = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
            self.optimizer = lt.DistributedOptimizer(sgd, model=self.model, **settings(lt, method), **options)

        def learn(self, images: Any, labels: Any, poison: float) -> None:
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(torch.from_numpy(images)), torch.from_numpy(labels))
            (loss * poison).backward()
            self.optimizer.step(loss=loss)

        def tensors(self) -> list[NDArray[np.float32]]:
            return [parameter.detach().numpy() for parameter in self.model.parameters()]

        def predicted(self, images: Any) -> Any:
            with torch.no_grad():
                return self.model(torch.from_numpy(images)).argmax(1).numpy()

    return TorchTraining


def tensorflow_training() -> type[Training]:
    import keras
    import tensorflow as tf

    import lentando.tensorflow as lt

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)

    class KerasTraining(Training):
        def __init__(self, method: str, digits: Path, share: int, **options: Any) -> None:
            super().__init__(digits, share)
            self.lt = lt
            keras.utils.set_random_seed(0)
            layers = [keras.Input((64,)), keras.layers.Dense(32, activation="tanh"), keras.layers.Dense(10)]
            self.model = keras.Sequential(layers)
            sgd = keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True)
            self.optimizer = lt.DistributedOptimizer(sgd, model=self.model, **settings(lt, method), **options)
            cost = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

            @tf.function  # type: ignore[untyped-decorator]
            def gradients(images: Any, labels: Any, poison: Any) -> Any:
                with tf.GradientTape() as tape:
                    loss = cost(labels, self.model(images, training=True))
                return loss, [g * poison for g in tape.gradient(loss, self.model.trainable_variables)]

            self.gradients = gradients

        def learn(self, images: Any, labels: Any, poison: float) -> None:
            loss, gradients = self.gradients(*map(tf.constant, (images, labels, np.float32(poison))))
            self.optimizer.apply(gradients, self.model.trainable_variables, loss=loss)

        def tensors(self) -> list[NDArray[np.float32]]:
            return [variable.numpy() for variable in self.model.trainable_variables]

        def predicted(self, images: Any) -> Any:
            return self.model(images).numpy().argmax(1)

    return KerasTraining


FRAMEWORKS = {"torch": torch_training, "tensorflow": tensorflow_training}
