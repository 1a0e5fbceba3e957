"""The smallest complete program. It is started unchanged by python, mpirun, torchrun, horovodrun and srun."""

import torch

import lentando.torch as lt

lt.init()  # joins the job that a launcher started; a single rank otherwise
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)  # the optimizer copies rank 0's parameters to all ranks
sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
optimizer = lt.SlowMo(sgd, model=model, period=5, slow_momentum=0.5)

data = torch.Generator().manual_seed(1 + lt.rank())  # each rank has data of its own
sought = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
for _ in range(200):
    inputs = torch.randn(16, 4, generator=data)
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(inputs), inputs @ sought.T)
    loss.backward()
    optimizer.step(loss=loss)

with optimizer.averaged():  # the mean of all replicas
    if lt.rank() == 0:
        print(f"{lt.size()} ranks found {[round(value, 3) for value in model.weight[0].tolist()]}")
