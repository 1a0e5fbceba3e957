"""Training that resumes from its last checkpoint when torchrun starts it again, because a worker has died:

    torchrun --nproc-per-node 2 --max-restarts 3 examples/resume_torch.py runs/resume

The result is bit-identical to that of a job without a death. Any launcher resumes a job that is started again by hand.
"""

import sys
from pathlib import Path
from zlib import crc32

import torch

import lentando.torch as lt

STEPS, SAVE_EVERY_STEPS = 60, 10


def main(folder: Path) -> None:
    lt.init()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = lt.SlowMo(sgd, model=model, period=4, slow_momentum=0.5)

    torch.manual_seed(1 + lt.rank())  # each rank draws data of its own; a checkpoint contains the generator's state
    step = 0
    if lt.broadcast_object((folder / "checkpoint.json").exists()):  # as rank 0 sees it
        step = lt.load(folder, optimizer)["step"]
        if lt.rank() == 0:
            print(f"resumed after step {step}", flush=True)
    while step < STEPS:
        inputs = torch.randn(16, 8)
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True).sin())
        loss.backward()
        optimizer.step(loss=loss)
        step += 1
        if step % SAVE_EVERY_STEPS == 0:
            lt.save(folder, optimizer, extra={"step": step})

    with optimizer.averaged():  # on all ranks
        weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
        print(f"rank {lt.rank()} of {lt.size()} ended with weights {crc32(weights):08x}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
