"""Stopping and continuing through ``lt.save`` and ``lt.load``, on every rank of a job."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from case_selection import selected_cases
from methods import ROUND, methods
from safetensors import safe_open
from torch import nn

import lentando.torch as lt

DECISION_CLOCK = [field.name for field in fields(lt.Decision)].index("clock")


class Net(nn.Module):
    """Convolution, BatchNorm, tied, frozen and unused parameters, two dtypes."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.Linear(3, 3)
        self.first = nn.Linear(3, 3, bias=False)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight
        self.unused = nn.Linear(2, 2)
        self.out = nn.Linear(3, 2).double()
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(images)).relu().mean(dim=(2, 3))
        result: torch.Tensor = self.out(self.tied(self.first(self.frozen(x)).tanh()).double())
        return result


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    groups = [{"params": list(model.parameters())[:3]}, {"params": list(model.parameters())[3:], "lr": 0.02}]
    return torch.optim.Adam(groups, lr=0.01, amsgrad=True)


def train(optimizer: lt.DistributedOptimizer, model: nn.Module, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 * lt.rank() + step)
        images = torch.randn(4, 1, 4, 4, generator=generator)
        labels = torch.randint(0, 2, (4,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step(loss=loss)


def state(optimizer: lt.DistributedOptimizer, model: nn.Module) -> Any:
    """All that a rank holds, as bytes; but clocks continue to run."""
    own = optimizer.state_dict()
    del own["lentando"]["clock"]
    for decision in own["lentando"]["decisions"]:
        del decision[DECISION_CLOCK]
    return [(name, tensor.numpy().tobytes()) for name, tensor in model.state_dict().items()], plain(own)


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def wrap(method: str, optimizer: torch.optim.Optimizer, model: nn.Module) -> lt.DistributedOptimizer:
    return lt.DistributedOptimizer(optimizer, model=model, **methods()[method])


THOROUGH = selected_cases(
    ["slowmo", "osgp", "slowmo over osgp", "slowmo with delay", "diloco in fragments", "adacomm over osgp"],
    [*methods()],
)
"""Resumed at every step: all that differ in what they keep from one step to the next. The others are resumed right
after an outer step and inside a round."""
WITH_ADAM = selected_cases(["allreduce", "slowmo", "bmuf", "slowmo over osgp"], [*methods()])
"""All that differ in what becomes of the state of an optimizer at outer steps."""


@pytest.mark.parametrize(
    ("method", "base_optimizer"), [*((name, sgd) for name in methods()), *((name, adam) for name in WITH_ADAM)]
)
def test_resumed_training_is_the_same_bit_identically(method: str, base_optimizer: Any, shared_path: Path) -> None:
    """O20, at the inner steps of two rounds, in a model that was built again."""
    model = Net(0)
    optimizer = wrap(method, base_optimizer(model), model)
    last = 2 * ROUND + 1
    is_thorough = method in THOROUGH and base_optimizer in selected_cases([sgd], [sgd, adam])
    moments = range(last) if is_thorough else (ROUND, ROUND + 2)
    for step in range(last):
        if step in moments:
            saved = lt.save(shared_path / f"{step}", optimizer, extra={"step": step, "rank": torch.tensor(lt.rank())})
            assert saved == shared_path / f"{step}"
        train(optimizer, model, step, step + 1)
    end = state(optimizer, model)
    for step in moments:
        resumed = Net(7 + lt.rank())
        again = wrap(method, base_optimizer(resumed), resumed)
        train(again, resumed, 0, step % 2)  # into a fresh training, and into one that is in flight
        extra = lt.load(shared_path / f"{step}", again)
        assert extra == {"step": step, "rank": torch.tensor(lt.rank())}
        train(again, resumed, step, last)
        assert state(again, resumed) == end, f"resumed at step {step}"


# --- what is refused ----------------------------------------------------------------------------------------


def slowmo(seed: int = 0, **settings: Any) -> tuple[lt.DistributedOptimizer, Net]:
    model = Net(seed)
    return lt.SlowMo(sgd(model), model=model, **{"period": ROUND, **settings}), model


def saved_at(path: Path, steps: int = 2, **options: Any) -> Path:
    optimizer, model = slowmo()
    train(optimizer, model, 0, steps)
    return lt.save(path, optimizer, **options)


def refused(path: Path, optimizer: lt.DistributedOptimizer, model: nn.Module, stated: str) -> None:
    """On every rank, with the reason, and without having changed anything."""
    before = state(optimizer, model)
    with pytest.raises(lt.CheckpointError, match=stated):
        lt.load(path, optimizer)
    assert state(optimizer, model) == before


def on_rank_0(action: Callable[[], Any]) -> None:
    lt.barrier()
    if lt.rank() == 0:
        action()
    lt.barrier()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def change_manifest(folder: Path, **changes: Any) -> None:
    file = folder / "checkpoint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("whose", ["shared", "last rank's"])
@pytest.mark.parametrize(
    ("damage", "stated"),
    [(cut, r"is damaged: it has \d+ bytes, \d+ were written"), (flip, "is damaged: its checksum"),
     (Path.unlink, "is missing: the checkpoint is not complete")],
)  # fmt: skip
def test_damaged_part_is_refused_on_every_rank(whose: str, damage: Any, stated: str, shared_path: Path) -> None:
    saved_at(shared_path)
    pattern = "*-shared.*" if whose == "shared" else f"*-rank-{lt.size() - 1:05d}.*"
    on_rank_0(lambda: damage(next(shared_path.glob(pattern))))
    finder = "rank" if lt.size() == 1 or whose == "shared" else f"rank {lt.size() - 1}: "
    refused(shared_path, *slowmo(1), rf"loading the checkpoint .* failed\. .*{finder}.*{stated}")


@pytest.mark.parametrize(
    ("damage", "stated"),
    [
        (lambda folder: cut(folder / "checkpoint.json"), "is damaged .* it is not JSON"),
        (lambda folder: (folder / "checkpoint.json").write_text("[1]"), "was not written by Lentando"),
        (lambda folder: change_manifest(folder, format="other"), "was not written by Lentando"),
        (lambda folder: change_manifest(folder, version=5), "is of version 5 of the format, .* reads versions 1"),
        (lambda folder: change_manifest(folder, content={"world_size": 1}), "its checksum is not that of its content"),
        (lambda folder: (folder / "checkpoint.json").unlink(), "expected a checkpoint .* found a folder without one"),
        (shutil.rmtree, "expected a checkpoint .* found nothing"),
    ],
)
def test_damaged_manifest_is_refused_on_every_rank(damage: Any, stated: str, shared_path: Path) -> None:
    saved_at(shared_path / "checkpoint")
    on_rank_0(lambda: damage(shared_path / "checkpoint"))
    refused(shared_path / "checkpoint", *slowmo(1), f"rank 0: .*{stated}")


def test_other_model_is_refused(shared_path: Path) -> None:
    saved_at(shared_path)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten())
    other = lt.SlowMo(sgd(model), model=model, period=ROUND)
    stated = r"it is of another model: its tensor number 0 is 'conv.weight' of shape \[3, 1, 3, 3\], float32, parameter"
    refused(shared_path, other, model, rf"{stated} group 0, the model's is '0.weight'")


def test_a_compiled_model_s_checkpoint_is_refused_with_the_reason_and_loaded_by_a_mapping(shared_path: Path) -> None:
    model, plain = nn.Linear(3, 1), nn.Linear(3, 1)
    compiled: Any = torch.compile(model, backend="eager")
    lt.save(shared_path, lt.SlowMo(sgd(compiled), model=compiled, period=ROUND))
    other = lt.SlowMo(sgd(plain), model=plain, period=ROUND)
    stated = "the model's is 'weight' .* Only names differ: pass the same model as model= as then .*, or give mapping="
    refused(shared_path, other, plain, stated)
    names = [name for name, _ in plain.named_parameters()]
    lt.load(shared_path, other, mapping=lt.WeightMap([lt.WeightRule(f"_orig_mod.{name}", name) for name in names]))
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), plain.parameters(), strict=True))


def test_other_settings_are_refused(shared_path: Path) -> None:
    saved_at(shared_path)
    refused(shared_path, *slowmo(period=4), "saved by training with other settings: period was 3, and is 4 here")


def test_other_optimizer_is_refused_unless_its_state_is_not_wanted(shared_path: Path) -> None:
    saved_at(shared_path)
    model = Net(3)
    other = lt.SlowMo(torch.optim.Adam(model.parameters()), model=model, period=ROUND, base_buffers="reset")
    refused(shared_path, other, model, r"holds the state of SGD \(momentum with momentum\), .* Adam \(adam with first")
    lt.load(shared_path, other, optimizer_state="new")
    assert not other.state
    assert other.report()["inner_steps"] == 2


def test_state_right_after_a_reset_suits_any_optimizer(shared_path: Path) -> None:
    saved_at(shared_path, steps=ROUND)  # SlowMo resets it
    model = Net(3)
    other = lt.SlowMo(torch.optim.Rprop(model.parameters()), model=model, period=ROUND)
    lt.load(shared_path, other)
    assert not other.state
    train(other, model, ROUND, 2 * ROUND)


# --- failing while saving -----------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["part", "manifest"])
def test_rank_that_cannot_write_leaves_the_earlier_checkpoint(
    moment: str, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, model = slowmo()
    train(optimizer, model, 0, 1)
    lt.save(shared_path, optimizer)
    before = sorted(shared_path.iterdir())
    end = state(optimizer, model)
    train(optimizer, model, 1, 2)
    failing = 0 if moment == "manifest" else lt.size() - 1

    def replace(self: Path, target: Path) -> Path:
        if lt.rank() == failing and (target.suffix == ".json") == (moment == "manifest"):
            raise OSError(28, "No space left on device", str(self))
        self.rename(target)
        return target

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", replace)
        with pytest.raises(lt.CheckpointError, match=rf"rank {failing}: OSError: .* No space left on device"):
            lt.save(shared_path, optimizer)
    lt.barrier()
    assert sorted(shared_path.iterdir()) == before
    again, resumed = slowmo(4)
    lt.load(shared_path, again)
    assert state(again, resumed) == end
    lt.barrier()
    lt.save(shared_path, optimizer)
    lt.barrier()
    assert len(list(shared_path.iterdir())) == lt.size() + 2  # parts, what is shared, manifest: nothing is left over


def test_extra_that_cannot_be_saved_is_an_error_on_every_rank(shared_path: Path) -> None:
    optimizer, _ = slowmo()
    extra = {"net": object()} if lt.rank() == lt.size() - 1 else None
    with pytest.raises(lt.CheckpointError, match=rf"rank {lt.size() - 1}: extra\['net'\] is a object"):
        lt.save(shared_path, optimizer, extra)


def test_ranks_must_do_the_same_at_the_same_step(shared_path: Path) -> None:
    optimizer, model = slowmo()
    if lt.size() > 1:
        with pytest.raises(lt.CheckpointError, match="save to different places: .*rank 0: saves to "):
            lt.save(shared_path / str(lt.rank()), optimizer)
        with pytest.raises(lt.MismatchError, match="saves a checkpoint of its model.*loads a checkpoint of its model"):
            (lt.save if lt.rank() == 0 else lt.load)(shared_path, optimizer)
        train(optimizer, model, 0, 1 if lt.rank() else 2)
        with pytest.raises(lt.MismatchError, match="after 2 steps .*after 1 steps"):
            lt.save(shared_path, optimizer)


# --- several checkpoints ------------------------------------------------------------------------------------


def test_newest_are_kept(shared_path: Path) -> None:
    optimizer, model = slowmo()
    for step in range(5):
        if step == 3:  # what a killed job leaves behind
            on_rank_0((shared_path / "step-00000002/step-00000002-0123abcd-rank-00009.safetensors").touch)
            on_rank_0((shared_path / "step-00000001/notes.txt").touch)
        lt.save(shared_path, optimizer, {"step": step}, keep=2)
        train(optimizer, model, step, step + 1)
    lt.barrier()
    complete = sorted(path.parent.name for path in shared_path.glob("*/checkpoint.json"))
    assert complete == ["step-00000003", "step-00000004"]
    assert [path.name for path in (shared_path / "step-00000001").iterdir()] == ["notes.txt"]  # the user's own
    assert not (shared_path / "step-00000002").exists()
    again, _ = slowmo()
    assert lt.load(shared_path, again) == {"step": 4}
    assert lt.load(shared_path / "step-00000003", again) == {"step": 3}
    with pytest.raises(lt.CheckpointError, match="holds step-00000004, later than this run's step 3, and would be"):
        lt.save(shared_path, again, keep=2)
    with pytest.raises(lt.CheckpointError, match="holds checkpoints by step"):
        lt.save(shared_path, again)
    with pytest.raises(lt.CheckpointError, match="is a checkpoint itself"):
        lt.save(shared_path / "step-00000003", again, keep=1)
    with pytest.raises(lt.ConfigurationError, match="keep must be an integer >= 1"):
        lt.save(shared_path, again, keep=0)


def test_what_is_equal_on_all_ranks_is_written_once(shared_path: Path) -> None:
    model = Net(0)
    optimizer = lt.DistributedOptimizer(adam(model), model=model)
    train(optimizer, model, 0, 2)
    lt.save(shared_path, optimizer)
    shared = set(tensors_of(next(shared_path.glob("*-shared.*"))))
    assert {"model/conv.weight", "optimizer/exp_avg/conv.weight"} <= shared
    own = set(tensors_of(next(shared_path.glob(f"*-rank-{lt.rank():05d}.*"))))
    assert not own & shared
    assert ("model/norm.running_mean" in own) == (lt.size() > 1)  # not averaged by AllReduce


def tensors_of(file: Path) -> list[str]:
    with safe_open(file, "numpy") as opened:
        return list(opened.keys())


# --- crossing -----------------------------------------------------------------------------------------------


class Renamed(nn.Module):
    """The same model with other names, made in another order, in one parameter group."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.head = nn.Linear(3, 2).double()
        self.hidden = nn.Linear(3, 3, bias=False)
        self.start = nn.Conv2d(1, 3, 3, padding=1)
        self.statistics = nn.BatchNorm2d(3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.statistics(self.start(images)).relu().mean(dim=(2, 3))
        result: torch.Tensor = self.head(self.hidden(x).tanh().double())
        return result


class Small(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.first = nn.Linear(3, 3, bias=False)
        self.out = nn.Linear(3, 2).double()

    forward = Renamed.forward
    statistics = property(lambda self: self.norm)
    start = property(lambda self: self.conv)
    hidden = property(lambda self: self.first)
    head = property(lambda self: self.out)


NAMES = {"conv": "start", "norm": "statistics", "first": "hidden", "out": "head"}
PARTS = {"conv": "weight bias", "norm": "weight bias running_mean running_var", "first": "weight", "out": "weight bias"}
MAPPING = lt.WeightMap(
    lt.WeightRule(f"{name}.{part}", f"{NAMES[name]}.{part}") for name, parts in PARTS.items() for part in parts.split()
)


def named(model: nn.Module, name: str) -> torch.Tensor:
    found: torch.Tensor = model.state_dict()[name]
    return found


def two_groups(model: Small) -> torch.optim.Optimizer:
    late = [model.out.weight, model.out.bias]
    early = [parameter for parameter in model.parameters() if not any(parameter is other for other in late)]
    return torch.optim.AdamW([{"params": early}, {"params": late}], lr=0.01)


@pytest.mark.parametrize(
    ("method", "base_optimizer"),
    selected_cases(
        [("slowmo", "sgd"), ("slowmo over osgp", "adamw"), ("allreduce", "adamw")],
        [
            *itertools.product(
                ["slowmo", "slowmo over sgp", "slowmo over osgp", "allreduce"],
                ["sgd", "adamw"],
            )
        ],
    ),
)
def test_training_continues_under_other_names_in_another_order(
    method: str, base_optimizer: str, shared_path: Path
) -> None:
    """Shards of anchors and slow momenta, messages in flight, momenta and groups find their new places."""
    if base_optimizer == "adamw" and lt.size() > 3:
        return
    model = Small(0)
    optimizer = wrap(method, two_groups(model) if base_optimizer == "adamw" else sgd(model), model)
    for step in range(2 * ROUND):
        if step in (0, ROUND - 1, ROUND, ROUND + 2):
            lt.save(shared_path / str(step), optimizer)
        train(optimizer, model, step, step + 1)
    for step in (0, ROUND - 1, ROUND, ROUND + 2):
        other = Renamed(step)
        base = sgd(other) if base_optimizer == "sgd" else torch.optim.AdamW(other.parameters(), lr=0.01)
        again = wrap(method, base, other)
        lt.load(shared_path / str(step), again, MAPPING)
        train(again, other, step, 2 * ROUND)
        for rule in MAPPING.rules.values():
            one, two = named(model, rule.source), named(other, rule.target)
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, msg=f"{rule.source} from step {step}")
        again_back = lt.save(shared_path / "back", again)
        third = Small(9)
        base = two_groups(third) if base_optimizer == "adamw" else sgd(third)
        back = wrap(method, base, third)
        lt.load(again_back, back, MAPPING.inverse)
        for rule in MAPPING.rules.values():
            one, two = named(third, rule.source), named(other, rule.target)
            assert torch.equal(one, two), rule.source


def test_mapping_that_does_not_fit_is_refused(shared_path: Path) -> None:
    model = Small(0)
    optimizer = lt.SlowMo(sgd(model), model=model, period=ROUND)
    lt.save(shared_path, optimizer)
    other = Renamed(0)
    again = lt.SlowMo(sgd(other), model=other, period=ROUND)
    rules = list(MAPPING.rules.values())
    with pytest.raises(lt.CheckpointError, match="leaves out tensors of the checkpoint: 'conv.weight'"):
        lt.load(shared_path, again, lt.WeightMap(rules[1:]))
    swapped = [lt.WeightRule(rules[0].source, rules[0].target, (1, 0, 2, 3)), *rules[1:]]
    with pytest.raises(lt.CheckpointError, match=r"becomes \(1, 3, 3, 3\) by the mapping, but 'start.weight' of the"):
        lt.load(shared_path, again, lt.WeightMap(swapped))
