"""A job whose training ends with NaN in the middle of a round says so on every rank, and does not end with status 0."""

from launching import mpirun

PROGRAM = """
import torch
import lentando.torch as lt

def train():
    model = torch.nn.Linear(3, 3)
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), 0.1), model=model, period=4)
    for step in range(6):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        if step == 5 and lt.rank() == 1:
            model.weight.grad.fill_(float("nan"))
        optimizer.step()

lt.init()
train()  # and the optimizer is gone when the program ends
"""


def test_job_that_ends_with_nan_fails_and_names_the_rank() -> None:
    job = mpirun(2, "-c", PROGRAM, timeout_seconds=120)
    assert job.status == 1
    stated = (
        "rank 0: all is finite; rank 1: parameter 'weight' is not finite at the end of training, after inner step 6"
    )
    assert job.output.count(stated) == 2
