"""Images per second of a network that trains on random images, on all ranks together."""

import argparse
import importlib.util
import statistics
import timeit

import horovod.torch as hvd
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--fp16-allreduce", action="store_true")
parser.add_argument("--model", default="resnet50", help="of torchvision, where it is installed")
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--image-size", type=int, default=32)
parser.add_argument("--num-warmup-batches", type=int, default=2)
parser.add_argument("--num-batches-per-iter", type=int, default=2)
parser.add_argument("--num-iters", type=int, default=3)
parser.add_argument("--no-cuda", action="store_true")
parser.add_argument("--use-adasum", action="store_true")


def small_network():
    """In place of torchvision's."""
    layers, width = [], 3
    for channels in (16, 32, 64):
        layers += [nn.Conv2d(width, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


def network(name):
    if importlib.util.find_spec("torchvision") is None:
        return small_network()
    from torchvision import models

    return getattr(models, name)()


def log(text):
    if hvd.rank() == 0:
        print(text, flush=True)


args = parser.parse_args()
hvd.init()
torch.set_num_threads(1)
cuda = torch.cuda.is_available() and not args.no_cuda
if cuda:
    torch.cuda.set_device(hvd.local_rank())
device = torch.device("cuda" if cuda else "cpu")

model = network(args.model).to(device)
scale = (hvd.local_size() if cuda and hvd.nccl_built() else 1) if args.use_adasum else hvd.size()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01 * scale)
optimizer = hvd.DistributedOptimizer(
    optimizer,
    named_parameters=model.named_parameters(),
    compression=hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none,
    op=hvd.Adasum if args.use_adasum else hvd.Average,
)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)

data = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
target = torch.randint(1000, (args.batch_size,), device=device)


def benchmark_step():
    optimizer.zero_grad()
    F.cross_entropy(model(data), target).backward()
    optimizer.step()


log(f"model {args.model}, batches of {args.batch_size} on {hvd.size()} ranks, {device.type}")
timeit.timeit(benchmark_step, number=args.num_warmup_batches)
speeds = []
for iteration in range(args.num_iters):
    seconds = timeit.timeit(benchmark_step, number=args.num_batches_per_iter)
    speeds.append(args.batch_size * args.num_batches_per_iter / seconds)
    log(f"iteration {iteration}: {speeds[-1]:.1f} images/s per rank")
log(f"images/s per rank: {statistics.mean(speeds):.1f} +- {1.96 * statistics.pstdev(speeds):.1f}")
log(f"total images/s on {hvd.size()} ranks: {hvd.size() * statistics.mean(speeds):.1f}")
