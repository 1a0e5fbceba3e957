"""A residual network on folders of images: warm-up, several batches in one step, checkpoints from which it resumes.

The images are made here, and the network is small where torchvision is not installed. A second run with the same
``--checkpoint-format`` resumes where the first ended.
"""

import argparse
import importlib.util
import math
from pathlib import Path

import horovod.torch as hvd
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

parser = argparse.ArgumentParser()
parser.add_argument("--checkpoint-format", default="./checkpoint-{epoch}.pth.tar")
parser.add_argument("--fp16-allreduce", action="store_true")
parser.add_argument("--batches-per-allreduce", type=int, default=2, help="batches whose gradients are summed on a rank")
parser.add_argument("--use-adasum", action="store_true")
parser.add_argument("--gradient-predivide-factor", type=float, default=1.0)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--val-batch-size", type=int, default=64)
parser.add_argument("--images", type=int, default=512)
parser.add_argument("--image-size", type=int, default=32)
parser.add_argument("--classes", type=int, default=10)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--base-lr", type=float, default=0.0125, help="for one rank")
parser.add_argument("--warmup-epochs", type=float, default=1)
parser.add_argument("--momentum", type=float, default=0.9)
parser.add_argument("--wd", type=float, default=0.00005)
parser.add_argument("--no-cuda", action="store_true")
parser.add_argument("--seed", type=int, default=42)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(width, channels, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(width, channels, 1, stride=2, bias=False)

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def resnet50(classes):
    if importlib.util.find_spec("torchvision") is None:
        body = [Block(3, 16), Block(16, 32), Block(32, 64)]
        return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
    from torchvision import models

    return models.resnet50(num_classes=classes)


def images(count, seed, args):
    """Each class has a pattern of its own, in noise."""
    size = (3, args.image_size, args.image_size)
    patterns = torch.randn(args.classes, *size, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(args.classes, (count,), generator=generator)
    return TensorDataset(0.5 * patterns[labels] + torch.randn(count, *size, generator=generator), labels)


class Metric:
    """The mean of a value over batches and ranks."""

    def __init__(self, name):
        self.name, self.sum, self.n = name, torch.tensor(0.0), torch.tensor(0.0)

    def update(self, value):
        self.sum += hvd.allreduce(value.detach().cpu(), name=self.name)
        self.n += 1

    @property
    def avg(self):
        return (self.sum / self.n).item()


def adjust_learning_rate(optimizer, epoch, batch, batches, args):
    """From the rate of one rank to that of all in the first epochs, then constant, then a tenth."""
    epoch += batch / batches
    size = hvd.size() * args.batches_per_allreduce
    if epoch < args.warmup_epochs:
        factor = (epoch * (size - 1) / args.warmup_epochs + 1) / size
    else:
        factor = 1.0 if epoch < 2 else 0.1
    for group in optimizer.param_groups:
        group["lr"] = args.base_lr * size * factor


def train(epoch, model, optimizer, loader, sampler, device, args):
    model.train()
    sampler.set_epoch(epoch)
    loss_metric, accuracy_metric = Metric("train_loss"), Metric("train_accuracy")
    for batch, (data, target) in enumerate(loader):
        adjust_learning_rate(optimizer, epoch, batch, len(loader), args)
        optimizer.zero_grad()
        parts = math.ceil(len(data) / args.batch_size)
        for start in range(0, len(data), args.batch_size):  # one backward pass for each batch, one step for all
            x, y = (tensor[start : start + args.batch_size].to(device) for tensor in (data, target))
            output = model(x)
            loss = F.cross_entropy(output, y)
            accuracy_metric.update(output.argmax(1).eq(y).float().mean())
            loss_metric.update(loss)
            (loss / parts).backward()
        optimizer.step()
    if hvd.rank() == 0:
        print(f"epoch {epoch}: loss {loss_metric.avg:.4f}, accuracy {accuracy_metric.avg:.4f}", flush=True)


def validate(epoch, model, loader, device):
    model.eval()
    loss_metric, accuracy_metric = Metric("val_loss"), Metric("val_accuracy")
    with torch.no_grad():
        for data, target in loader:
            output, y = model(data.to(device)), target.to(device)
            loss_metric.update(F.cross_entropy(output, y))
            accuracy_metric.update(output.argmax(1).eq(y).float().mean())
    if hvd.rank() == 0:
        print(
            f"epoch {epoch}: validation loss {loss_metric.avg:.4f}, accuracy {accuracy_metric.avg:.4f} "
            f"on {hvd.size()} ranks",
            flush=True,
        )


def main():
    args = parser.parse_args()
    hvd.init()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available() and not args.no_cuda
    if cuda:
        torch.cuda.set_device(hvd.local_rank())
    device = torch.device("cuda" if cuda else "cpu")

    # Rank 0 knows which checkpoints there are.
    found = [epoch for epoch in range(args.epochs) if Path(args.checkpoint_format.format(epoch=epoch)).exists()]
    resume_from = max(found, default=-1) + 1
    resume_from = hvd.broadcast(torch.tensor(resume_from), root_rank=0, name="resume_from_epoch").item()

    allreduce_batch = args.batch_size * args.batches_per_allreduce
    train_data, val_data = images(args.images, 1, args), images(128, 2, args)
    train_sampler = DistributedSampler(train_data, num_replicas=hvd.size(), rank=hvd.rank())
    val_sampler = DistributedSampler(val_data, num_replicas=hvd.size(), rank=hvd.rank())
    train_loader = DataLoader(train_data, batch_size=allreduce_batch, sampler=train_sampler)
    val_loader = DataLoader(val_data, batch_size=args.val_batch_size, sampler=val_sampler)

    model = resnet50(args.classes).to(device)
    scale = args.batches_per_allreduce * (1 if args.use_adasum else hvd.size())
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.base_lr * scale, momentum=args.momentum, weight_decay=args.wd
    )
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none,
        backward_passes_per_step=args.batches_per_allreduce,
        op=hvd.Adasum if args.use_adasum else hvd.Average,
        gradient_predivide_factor=args.gradient_predivide_factor,
    )
    if resume_from > 0 and hvd.rank() == 0:
        checkpoint = torch.load(args.checkpoint_format.format(epoch=resume_from - 1))
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    for epoch in range(resume_from, args.epochs):
        train(epoch, model, optimizer, train_loader, train_sampler, device, args)
        validate(epoch, model, val_loader, device)
        if hvd.rank() == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, args.checkpoint_format.format(epoch=epoch))


if __name__ == "__main__":
    main()
