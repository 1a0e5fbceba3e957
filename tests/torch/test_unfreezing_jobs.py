"""Whole programs under mpirun whose ranks do not freeze and unfreeze the same."""

from launching import mpirun

PROGRAM = """
import torch
import lentando.torch as lt

lt.init()
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
model[0].requires_grad_(False)
optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, base=lt.SGP())
for step in range(40):
    if step == 2 and lt.rank() == 1:
        model[0].requires_grad_(True)
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
"""


def test_gossip_does_not_wait_for_a_rank_that_unfreezes_alone() -> None:
    """Between its steps no message compares the ranks; the one that waits for the others is asked what it does."""
    job = mpirun(3, "-c", PROGRAM, prepared="lentando.torch")
    assert job.status not in (0, None), job.output
    assert "changes which parameters it trains" in job.output
