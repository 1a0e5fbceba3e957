"""Parameters that are frozen, unfrozen, added and removed while training: every method trains them together."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt

RATE = 0.05
PERIOD = 3

METHODS: dict[str, dict[str, Any]] = {
    "AllReduce": {},
    "AllReduce, overlapped": {"base": lt.AllReduce(overlap=True)},
    "LocalSGD": {"base": lt.LocalSGD(), "period": PERIOD},
    "SlowMo": {"base": lt.LocalSGD(), "period": PERIOD, "outer": lt.SlowMomentum(slow_momentum=0.6)},
    "SlowMo without average": {
        "base": lt.SGP(),
        "period": PERIOD,
        "outer": lt.SlowMomentum(slow_momentum=0.6),
        "exact_average": False,
    },
    "DiLoCo": {"base": lt.LocalSGD(), "period": PERIOD, "outer": lt.OuterSGD()},
    "SGP": {"base": lt.SGP()},
    "SGP in rounds": {"base": lt.SGP(), "period": PERIOD, "outer": lt.SlowMomentum(slow_momentum=0.6)},
    "OSGP": {"base": lt.OSGP(staleness=2, deterministic=True)},
    "OSGP in rounds": {"base": lt.OSGP(staleness=2, deterministic=True), "period": PERIOD},
    "DPSGD": {"base": lt.DPSGD()},
    "SGP on an uneven graph": {"base": lt.SGP(lt.StaticExponential(), wire_dtype="bfloat16")},
}
EXACT = ["AllReduce", "AllReduce, overlapped", "LocalSGD", "SlowMo", "DiLoCo", "SGP in rounds", "OSGP in rounds"]
"""Methods whose replicas are equal after an outer step, or always."""


class Parts(nn.Module):
    """Two parts that do not influence each other's gradients, and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.later = nn.Linear(4, 2).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.first(x)).square().mean() + self.first(x).square().mean()
        return result + self.later(x.double()).square().mean().float()


def make(
    method: str, trains_later: bool = False, kind: Callable[..., torch.optim.Optimizer] | None = None
) -> tuple[Parts, Any]:
    torch.manual_seed(0)
    model = Parts()
    model.later.requires_grad_(trains_later)
    base = kind(model.parameters()) if kind else torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.5)
    return model, lt.DistributedOptimizer(base, model=model, **METHODS[method])


def batch(step: int, rank: int | None = None) -> torch.Tensor:
    rank = lt.rank() if rank is None else rank
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(1000 * rank + step))


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss = model(batch(step))
        loss.backward()
        optimizer.step(loss=loss)


def by_rank(tensor: torch.Tensor) -> torch.Tensor:
    gathered: torch.Tensor = lt.allgather(tensor.detach().reshape(1, -1))
    return gathered


def equal_on_all_ranks(model: nn.Module) -> bool:
    return all(bool((by_rank(p) == by_rank(p)[0]).all()) for p in model.parameters())


def test_what_was_trained_before_is_trained_as_if_nothing_had_joined_or_left() -> None:
    """Values, anchors, slow momentum and push-sum state are kept."""
    for method in METHODS:
        expected, reference = make(method)
        model, optimizer = make(method)
        for step in range(3 * PERIOD):
            if step in (PERIOD + 1, 3 * PERIOD - 1):
                model.later.requires_grad_(step == PERIOD + 1)
            train(model, optimizer, range(step, step + 1))
            train(expected, reference, range(step, step + 1))
            for name in ("first.weight", "norm.bias", "norm.running_var"):
                own, wanted = model.state_dict()[name], expected.state_dict()[name]
                if method == "OSGP" and step > PERIOD:
                    continue  # messages in flight were used earlier than they would have been
                if lt.size() < 3:
                    assert torch.equal(own, wanted), (method, step, name)
                else:  # a sum of three depends on the order, and that on where it lies
                    assert torch.allclose(own, wanted, rtol=1e-5, atol=1e-6), (method, step, name)
        assert not model.later.weight.requires_grad
        assert (by_rank(model.later.weight) == by_rank(model.later.weight)[0]).all(), method
        assert not torch.equal(model.later.weight, expected.later.weight), method


@pytest.mark.parametrize("method", EXACT)
def test_replicas_are_equal_after_the_next_outer_step(method: str) -> None:
    model, optimizer = make(method)
    train(model, optimizer, range(PERIOD + 1))
    model.later.requires_grad_(True)
    train(model, optimizer, range(PERIOD + 1, 2 * PERIOD))
    assert equal_on_all_ranks(model)
    train(model, optimizer, range(2 * PERIOD, 3 * PERIOD))
    assert equal_on_all_ranks(model)
    entries = sum(p.numel() * p.element_size() for p in model.parameters())
    statistics = sum(b.numel() * b.element_size() for b in model.buffers() if b.is_floating_point())
    assert optimizer.report()["model_bytes"] == entries + statistics


@pytest.mark.parametrize("method", ["SGP", "OSGP", "DPSGD"])
def test_gossip_without_rounds_takes_a_layer_in_at_once(method: str) -> None:
    """The first step with it ends in its mean, and the sum of all replicas then stays what it is but for gradients."""
    model, optimizer = make(method)
    train(model, optimizer, range(2))
    model.later.requires_grad_(True)
    optimizer.zero_grad()
    model(batch(2)).backward()
    stepped = model.later.weight - RATE * model.later.weight.grad
    optimizer.step()
    assert torch.allclose(model.later.weight, by_rank(stepped).mean(dim=0).reshape(2, 4))
    expected = model.later.weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, range(3, 6))
    with optimizer.averaged():
        assert torch.allclose(model.later.weight, expected)


def test_slow_momentum_of_all_parts_follows_the_rule() -> None:
    """Against replicas that one process trains, with the rule written out."""
    beta = 0.6
    torch.manual_seed(0)
    first = Parts()
    replicas = [copy.deepcopy(first) for _ in range(lt.size())]
    optimizers = [torch.optim.SGD(replica.parameters(), lr=RATE, momentum=0.5) for replica in replicas]
    model, optimizer = make("SlowMo")
    names = [name for name, _ in model.named_parameters()]
    averaged = {name for name in names if not name.startswith("later")}
    start = dict(replicas[0].named_parameters())
    anchors = {name: start[name].detach().clone() for name in averaged}
    slow = {name: torch.zeros_like(start[name]) for name in averaged}
    for step in range(4 * PERIOD):
        trains_later = PERIOD + 1 <= step < 3 * PERIOD - 1
        for own in (model, *replicas):
            own.later.requires_grad_(trains_later)
        train(model, optimizer, range(step, step + 1))
        for rank, (replica, base) in enumerate(zip(replicas, optimizers, strict=True)):
            base.zero_grad()
            replica(batch(step, rank)).backward()
            base.step()
        if step % PERIOD != PERIOD - 1:
            continue
        now = {name for name in names if trains_later or not name.startswith("later")}
        for name in averaged | now:
            mean = torch.stack([dict(r.named_parameters())[name].detach() for r in replicas]).mean(dim=0)
            if name in averaged & now:
                slow[name] = beta * slow[name] + (anchors[name] - mean) / RATE
                mean = anchors[name] - RATE * slow[name]
            else:
                slow[name] = torch.zeros_like(mean)
            anchors[name] = mean
            for replica in replicas:
                dict(replica.named_parameters())[name].data.copy_(mean)
        averaged = now
        for replica in replicas:
            for name, buffer in replica.named_buffers():
                if buffer.is_floating_point():
                    mean = torch.stack([dict(r.named_buffers())[name] for r in replicas]).mean(dim=0)
                    for other in replicas:
                        dict(other.named_buffers())[name].copy_(mean)
        for name, own in model.named_parameters():
            if name in anchors:
                assert torch.allclose(own, anchors[name], rtol=1e-4, atol=1e-5), (step, name)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("behind", [False, True], ids=["by the wrapper", "behind its back"])
def test_groups_are_added(method: str, behind: bool) -> None:
    model, optimizer = make(method)
    train(model, optimizer, range(PERIOD + 1))
    torch.manual_seed(lt.rank())
    head = nn.Linear(4, 2, bias=False)
    frozen = nn.Linear(4, 2, bias=False).requires_grad_(False)
    model.head, model.frozen = head, frozen
    mine = head.weight.detach().clone()
    group = {"params": [head.weight, frozen.weight], "lr": 0.25}
    (optimizer.base_optimizer if behind else optimizer).add_param_group(group)
    if not behind:
        assert torch.equal(head.weight, by_rank(mine)[0].reshape(2, 4))
        assert (by_rank(frozen.weight) == by_rank(frozen.weight)[0]).all()

    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return model(x) + head(x).square().mean() + frozen(x).mean()

    train(Both(), optimizer, range(PERIOD + 1, 2 * PERIOD))
    assert len(optimizer.param_groups) == 2
    assert equal_on_all_ranks(model)
    assert not torch.equal(head.weight, mine)
    train(Both(), optimizer, range(2 * PERIOD, 3 * PERIOD))
    assert equal_on_all_ranks(model)


def test_parameter_groups_may_be_assigned_again() -> None:
    torch.manual_seed(0)
    model = Parts()
    groups = [{"params": list(part.parameters()), "lr": RATE} for part in (model.first, model.norm, model.later)]
    optimizer = lt.DistributedOptimizer(torch.optim.SGD(groups, lr=1.0), model=model, **METHODS["SlowMo"])
    train(model, optimizer, range(PERIOD + 1))
    optimizer.param_groups = [optimizer.param_groups[2], optimizer.param_groups[0]]
    train(model, optimizer, range(PERIOD + 1, 3 * PERIOD))
    assert equal_on_all_ranks(model)
    norm = model.norm.weight.detach().clone()
    train(model, optimizer, range(3 * PERIOD, 4 * PERIOD))
    assert torch.equal(model.norm.weight, norm)


@pytest.mark.parametrize("method", [method for method in METHODS if "period" in METHODS[method] or "All" in method])
def test_ranks_that_change_different_parameters_are_named_on_every_rank(method: str) -> None:
    if lt.size() == 1 or METHODS[method].get("exact_average") is False:
        return
    model, optimizer = make(method)
    train(model, optimizer, range(PERIOD))
    if lt.rank() == lt.size() - 1:
        model.later.requires_grad_(True)
    with pytest.raises(lt.MismatchError) as error:
        train(model, optimizer, range(PERIOD, 2 * PERIOD))
    text = str(error.value)
    named = "with 'later.weight', 'later.bias' trained from now on"
    assert named in text.partition(f"rank {lt.size() - 1}: ")[2].partition("; ")[0]
    assert text.count("trained from now on") == 1


def test_everything_frozen_is_an_error() -> None:
    model, optimizer = make("AllReduce")
    train(model, optimizer, range(1))
    loss = model(batch(1))
    model.requires_grad_(False)
    loss.backward()
    with pytest.raises(lt.ConfigurationError, match="no trainable parameter"):
        optimizer.step()


@pytest.mark.parametrize("method", ["SlowMo", "SGP in rounds", "AllReduce"])
def test_checkpoints_of_a_changed_model_resume_bit_identically(method: str, shared_path: Path) -> None:
    model, optimizer = make(method)
    train(model, optimizer, range(PERIOD + 1))
    model.later.requires_grad_(True)
    train(model, optimizer, range(PERIOD + 1, 2 * PERIOD + 1))
    lt.save(shared_path / "run", optimizer)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(2 * PERIOD + 1, 4 * PERIOD))
    resumed, other = make(method, trains_later=True)
    lt.load(shared_path / "run", other)
    train(resumed, other, range(2 * PERIOD + 1, 4 * PERIOD))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    resumed, other = make(method, trains_later=True)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    train(resumed, other, range(2 * PERIOD + 1, 4 * PERIOD))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_checkpoints_of_other_trainable_parameters_are_refused(shared_path: Path) -> None:
    model, optimizer = make("SlowMo", trains_later=True)
    train(model, optimizer, range(PERIOD))
    lt.save(shared_path / "run", optimizer)
    state = optimizer.state_dict()
    other_model, other = make("SlowMo")
    with pytest.raises(lt.CheckpointError, match=r"'later\.bias' was trained when it was saved, and is frozen here"):
        lt.load(shared_path / "run", other)
    with pytest.raises(lt.ConfigurationError, match="the same parameters must be trainable"):
        other.load_state_dict(state)
    other_model.later.requires_grad_(True)
    lt.load(shared_path / "run", other)  # all ranks have unfrozen it by then
    train(model, optimizer, range(PERIOD, 2 * PERIOD))
    train(other_model, other, range(PERIOD, 2 * PERIOD))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other_model.parameters(), strict=True))


def test_a_change_in_the_middle_of_a_round_is_followed_by_whatever_communicates(shared_path: Path) -> None:
    model, optimizer = make("SlowMo")
    train(model, optimizer, range(PERIOD + 1))
    model.later.requires_grad_(True)
    train(model, optimizer, range(PERIOD + 1, PERIOD + 2))
    own = model.later.weight.detach().clone()
    with pytest.raises(lt.ConfigurationError, match="this state could not be loaded again"):
        optimizer.state_dict()
    with optimizer.averaged():
        assert torch.allclose(model.later.weight, by_rank(own).mean(dim=0).reshape(2, 4))
    assert equal_on_all_ranks(model.later)
    model.later.requires_grad_(False)
    lt.save(shared_path / "run", optimizer)
    assert optimizer.state_dict()["lentando"]["steps"] == 2
    model.later.requires_grad_(True)
    optimizer.consensus_distance()
    with optimizer.averaged():
        model.later.requires_grad_(False)
        with pytest.raises(lt.ConfigurationError, match="inside averaged"):
            optimizer.consensus_distance()
    train(model, optimizer, range(PERIOD + 2, 2 * PERIOD))
    assert equal_on_all_ranks(model)


def test_a_new_model_is_unfrozen_before_its_first_step() -> None:
    for method in EXACT:
        model, optimizer = make(method)
        torch.nn.init.normal_(model.later.weight)  # other values on every rank
        model.later.requires_grad_(True)
        train(model, optimizer, range(PERIOD))
        assert equal_on_all_ranks(model), method


def test_after_a_change_rounds_cost_what_they_cost_a_model_that_was_wrapped_so() -> None:
    model, optimizer = make("SlowMo")
    train(model, optimizer, range(PERIOD))
    model.later.requires_grad_(True)
    train(model, optimizer, range(PERIOD, 2 * PERIOD))
    other_model, other = make("SlowMo", trains_later=True)
    train(other_model, other, range(PERIOD))
    costs = []
    for wrapped, own in ((optimizer, model), (other, other_model)):
        before = wrapped.report()
        train(own, wrapped, range(2 * PERIOD, 4 * PERIOD))
        after = wrapped.report()
        costs.append([after[key] - before[key] for key in ("messages", "bytes_sent")])
    assert costs[0] == costs[1]


def test_a_layer_that_is_frozen_after_an_outer_step_stays_what_it_is() -> None:
    """Slow momentum does not move it once more."""
    for method in EXACT:
        model, optimizer = make(method, trains_later=True)
        train(model, optimizer, range(2 * PERIOD))
        model.later.requires_grad_(False)
        before = copy.deepcopy(model.later.state_dict())
        train(model, optimizer, range(2 * PERIOD, 4 * PERIOD))
        for name, value in model.later.state_dict().items():
            if "GP" in method:  # it was gossiped for the rest of a round, which rounds
                assert torch.allclose(before[name], value, rtol=1e-12), method
            else:
                assert torch.equal(before[name], value), method
