"""Handwritten digits in PyTorch, trained on several ranks."""

import argparse

import lentando.torch as hvd
import torch
from sklearn.datasets import load_digits
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--save", help="file for the trained weights")
args = parser.parse_args()

hvd.init()
torch.manual_seed(42)
torch.set_num_threads(1)
device = torch.device(f"cuda:{hvd.local_rank()}" if torch.cuda.is_available() else "cpu")

pixels, labels = load_digits(return_X_y=True)
x = torch.tensor(pixels, dtype=torch.float32) / 16
y = torch.tensor(labels)
train = torch.utils.data.TensorDataset(x[:1500], y[:1500])
sampler = torch.utils.data.distributed.DistributedSampler(train, num_replicas=hvd.size(), rank=hvd.rank())
loader = torch.utils.data.DataLoader(train, batch_size=16, sampler=sampler)

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * hvd.size(), momentum=0.9)
optimizer = hvd.SlowMo(optimizer, named_parameters=model.named_parameters(), period=12)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)

for epoch in range(args.epochs):
    sampler.set_epoch(epoch)
    for images, targets in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images.to(device)), targets.to(device))
        loss.backward()
        optimizer.step()
    loss = hvd.allreduce(loss.detach(), name="loss")
    if hvd.rank() == 0:
        print(f"epoch {epoch}: loss {loss.item():.4f}", flush=True)

right = (model(x[1500:].to(device)).argmax(1).cpu() == y[1500:]).float().mean()
right = hvd.allreduce(right, name="accuracy")
if hvd.rank() == 0:
    print(f"accuracy {right.item():.4f} on {hvd.size()} ranks", flush=True)
    if args.save:
        torch.save(model.state_dict(), args.save)
