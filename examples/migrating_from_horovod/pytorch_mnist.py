"""Digits of 28 x 28 pixels, a small convolutional network, synchronous SGD: the first script of many Horovod users.

The images are made here: a blurred figure for each of ten classes, shifted and noisy.
"""

import argparse

import horovod.torch as hvd
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--test-batch-size", type=int, default=200)
parser.add_argument("--images", type=int, default=2000)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--lr", type=float, default=0.02)
parser.add_argument("--momentum", type=float, default=0.5)
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--log-interval", type=int, default=20)
parser.add_argument("--no-cuda", action="store_true")
parser.add_argument("--fp16-allreduce", action="store_true")
parser.add_argument("--use-adasum", action="store_true")
parser.add_argument("--gradient-predivide-factor", type=float, default=1.0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, kernel_size=5)
        self.conv2 = nn.Conv2d(8, 16, kernel_size=5)
        self.dropout = nn.Dropout2d(0.1)
        self.fc1 = nn.Linear(256, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.dropout(self.conv2(x)), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        return F.log_softmax(self.fc2(x), dim=1)


def digits(count, seed):
    """The figures are the same for every seed, the images differ."""
    figures = torch.randn(10, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    figures = F.interpolate(figures, size=(28, 28), mode="bilinear", align_corners=False)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    images = figures[labels] + 0.5 * torch.randn(count, 1, 28, 28, generator=generator)
    shift = int(torch.randint(-2, 3, (1,), generator=generator))
    return TensorDataset(images.roll(shift, dims=3), labels)


def metric_average(value, name):
    return hvd.allreduce(torch.tensor(value), name=name).item()


def train(epoch, model, optimizer, loader, sampler, device, log_interval):
    model.train()
    sampler.set_epoch(epoch)
    for batch, (images, labels) in enumerate(loader):
        optimizer.zero_grad()
        loss = F.nll_loss(model(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        if batch % log_interval == 0 and hvd.rank() == 0:
            print(f"epoch {epoch} [{batch * len(images)}/{len(sampler)}] loss {loss.item():.4f}", flush=True)


def test(model, loader, sampler, device):
    model.eval()
    loss, right = 0.0, 0.0
    with torch.no_grad():
        for images, labels in loader:
            output = model(images.to(device))
            loss += F.nll_loss(output, labels.to(device), reduction="sum").item()
            right += output.argmax(1).eq(labels.to(device)).float().sum().item()
    loss = metric_average(loss / len(sampler), "avg_loss")
    accuracy = metric_average(right / len(sampler), "avg_accuracy")
    if hvd.rank() == 0:
        print(f"test: loss {loss:.4f}, accuracy {accuracy:.4f} on {hvd.size()} ranks", flush=True)


def main():
    args = parser.parse_args()
    hvd.init()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available() and not args.no_cuda
    if cuda:
        torch.cuda.set_device(hvd.local_rank())
    device = torch.device("cuda" if cuda else "cpu")

    train_data, test_data = digits(args.images, seed=1), digits(400, seed=2)
    train_sampler = DistributedSampler(train_data, num_replicas=hvd.size(), rank=hvd.rank())
    test_sampler = DistributedSampler(test_data, num_replicas=hvd.size(), rank=hvd.rank())
    train_loader = DataLoader(train_data, batch_size=args.batch_size, sampler=train_sampler)
    test_loader = DataLoader(test_data, batch_size=args.test_batch_size, sampler=test_sampler)

    model = Net().to(device)
    # Adasum adapts the step itself: no larger learning rate with more ranks, except to sum on a node with NCCL first.
    scale = hvd.size()
    if args.use_adasum:
        scale = hvd.local_size() if cuda and hvd.nccl_built() else 1
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr * scale, momentum=args.momentum)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    compression = hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=compression,
        op=hvd.Adasum if args.use_adasum else hvd.Average,
        gradient_predivide_factor=args.gradient_predivide_factor,
    )
    for epoch in range(1, args.epochs + 1):
        train(epoch, model, optimizer, train_loader, train_sampler, device, args.log_interval)
        test(model, test_loader, test_sampler, device)


if __name__ == "__main__":
    main()
