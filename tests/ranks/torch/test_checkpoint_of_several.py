"""Several optimizers of one job, such as a GAN's two, as one checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt


class Gan:
    """Two models that train against each other, with different methods and different numbers of steps."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.g, self.d = nn.Linear(2, 2), nn.Linear(2, 1)
        self.optimizers = {
            "generator": lt.SlowMo(torch.optim.Adam(self.g.parameters(), 0.01), model=self.g, period=3),
            "discriminator": lt.DistributedOptimizer(
                torch.optim.SGD(self.d.parameters(), 0.1, momentum=0.9), model=self.d, base=lt.SGP(), period=4
            ),
        }

    def train(self, first: int, last: int) -> None:
        for iteration in range(first, last):
            x = torch.randn(4, 2, generator=torch.Generator().manual_seed(100 * lt.rank() + iteration))
            for _ in range(2):
                self.optimizers["discriminator"].zero_grad()
                (self.d(self.g(x).detach()).square() - self.d(x)).mean().backward()
                self.optimizers["discriminator"].step()
            self.optimizers["generator"].zero_grad()
            self.d(self.g(x)).mean().backward()
            self.optimizers["generator"].step()

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in (*self.g.parameters(), *self.d.parameters())]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("saved_after", [1, 2, 3])
def test_resumed_gan_is_bit_identical(saved_after: int, shared_path: Path) -> None:
    gan = Gan(0)
    gan.train(0, saved_after)
    lt.save(shared_path, gan.optimizers, extra={"iteration": saved_after, "rank": lt.rank()})
    gan.train(saved_after, 5)
    resumed = Gan(1)
    resumed.train(0, 1)
    # The order of a dict does not matter.
    extra = lt.load(shared_path, dict(reversed(resumed.optimizers.items())))
    assert extra == {"iteration": saved_after, "rank": lt.rank()}
    resumed.train(saved_after, 5)
    assert equal(gan.weights(), resumed.weights())


def test_checkpoints_by_step_are_named_by_the_largest_count(shared_path: Path) -> None:
    gan = Gan(0)
    for iteration in range(3):
        gan.train(iteration, iteration + 1)
        saved = lt.save(shared_path, gan.optimizers, keep=2)
        assert saved == shared_path / f"step-{2 * (iteration + 1):08d}"
    lt.barrier()
    assert sorted(path.name for path in shared_path.iterdir()) == ["step-00000004", "step-00000006"]
    parts = 2 * (lt.size() + 1)
    assert len(list((shared_path / "step-00000006").iterdir())) == parts + 1
    lt.load(shared_path, gan.optimizers)


def test_one_checkpoint_that_fails_loses_nothing_of_the_earlier_one(
    shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rank cannot write its last file, when all others are on the disk."""
    gan = Gan(0)
    lt.save(shared_path, gan.optimizers)
    lt.barrier()
    before, weights = sorted(shared_path.iterdir()), gan.weights()
    gan.train(0, 1)
    replaced: list[str] = []

    def replace(self: Path, target: Path) -> Path:
        replaced.append(target.name)
        if lt.rank() == lt.size() - 1 and sum("rank" in name for name in replaced) == 2:
            raise OSError(28, "No space left on device", str(self))
        self.rename(target)
        return target

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", replace)
        with pytest.raises(lt.CheckpointError, match="No space left on device"):
            lt.save(shared_path, gan.optimizers)
    lt.barrier()
    assert sorted(shared_path.iterdir()) == before
    lt.load(shared_path, gan.optimizers)
    assert equal(gan.weights(), weights)


def test_names_must_be_those_that_were_saved(shared_path: Path) -> None:
    gan = Gan(0)
    both, one = shared_path / "both", shared_path / "one"
    lt.save(both, gan.optimizers)
    lt.save(one, gan.optimizers["generator"])
    wanted = r"expected a dict of all of them, \{'discriminator': \.\.\., 'generator': \.\.\.\}, got"
    for given, stated in (
        (gan.optimizers["generator"], f"{wanted} one optimizer alone"),
        ({"generator": gan.optimizers["generator"]}, rf"{wanted} a dict of \['generator'\]"),
    ):
        with pytest.raises(lt.CheckpointError, match=stated):
            lt.load(both, given)
    with pytest.raises(lt.CheckpointError, match="it is of one optimizer alone"):
        lt.load(one, gan.optimizers)


def test_dicts_that_cannot_be_saved_are_refused(shared_path: Path) -> None:
    g = Gan(0).optimizers["generator"]
    refused: list[tuple[Any, str]] = [
        ({}, "expected a dict of optimizers by name"),
        ({"": g}, "expected a dict of optimizers by name"),
        ({1: g}, "expected a dict of optimizers by name"),
        ({"g": torch.optim.SGD([torch.ones(1)], 0.1)}, "expected a DistributedOptimizer for 'g', got SGD"),
        ({"g": g, "same": g}, r"one optimizer is given under several of the names \['g', 'same'\]"),
    ]
    for given, stated in refused:
        with pytest.raises(lt.ConfigurationError, match=stated):
            lt.save(shared_path, given)
    with pytest.raises(lt.ConfigurationError, match="mapping must be a dict of WeightMaps by the names"):
        lt.load(shared_path, {"g": g}, lt.WeightMap([]))


def test_ranks_that_save_other_optimizers_fail_alike(shared_path: Path) -> None:
    if lt.size() == 1:
        return
    gan = Gan(0)
    names = ["generator", "discriminator"] if lt.rank() else ["discriminator", "generator"]
    mixed = dict(zip(names, gan.optimizers.values(), strict=True))
    with pytest.raises((lt.MismatchError, lt.CheckpointError)):
        lt.save(shared_path, mixed)
