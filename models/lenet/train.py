"""Train LeNet on MNIST with torch and write it as a caffemodel through caffe_proto.

The recipe is the one that lenet_solver.prototxt and lenet_train_val.prototxt state; on top of it each
training image is shifted by up to two pixels, which Caffe's data layers do not do.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from caffe_proto.schema import message_class
from caffe_proto.weights import NewEntry, Weights

BATCH = 64
BASE_LR = 0.02
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
SCALE = 1 / 256
SHIFT = 2
TYPES = {"conv1": "Convolution", "conv2": "Convolution", "ip1": "InnerProduct", "ip2": "InnerProduct"}


class LeNet(nn.Module):
    """The layers of lenet.prototxt under the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.ip1 = nn.Linear(800, 500)
        self.ip2 = nn.Linear(500, 10)
        for name in TYPES:
            layer = self.get_submodule(name)
            _fill(layer.get_parameter("weight"), layer.get_parameter("bias"))

    def forward(self, data: Tensor) -> Tensor:
        """Images (n, 1, 28, 28), scaled, to scores (n, 10) before the softmax."""
        pool1 = functional.max_pool2d(self.conv1(data), 2)
        pool2 = functional.max_pool2d(self.conv2(pool1), 2)
        scores: Tensor = self.ip2(functional.relu(self.ip1(pool2.flatten(1))))
        return scores


def _fill(weight: Tensor, bias: Tensor) -> None:
    """Caffe's "xavier" filler (uniform, variance 1 / fan-in) for the weight, zeros for the bias."""
    bound = (3 / weight[0].numel()) ** 0.5
    nn.init.uniform_(weight, -bound, bound)
    nn.init.zeros_(bias)


def read_idx(path: Path) -> Tensor:
    """A gzipped idx file of bytes as a uint8 tensor of the shape in its header."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no idx file of unsigned bytes")
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", rank, 4).astype(int)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, -1, 4 + 4 * rank).reshape(shape).copy())


def read_mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images (n, 28, 28) uint8 and labels (n,) int64 of the part "train" or "t10k"."""
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    return images, labels.long()


def shifted(padded: Tensor, indices: Tensor) -> Tensor:
    """Random 28x28 crops (b, 1, 28, 28), scaled, of the indexed padded images (n, 28 + 2 SHIFT, same)."""
    corner = torch.randint(0, 2 * SHIFT + 1, (2, len(indices), 1))
    rows, columns = corner + torch.arange(28)
    crops = padded[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
    return crops[:, None].float() * SCALE


def train(net: LeNet, images: Tensor, labels: Tensor, epochs: int) -> None:
    """SGD with the rate falling to zero in a straight line; biases learn twice as fast, as in Caffe."""
    padded = functional.pad(images, (SHIFT,) * 4)
    groups = [
        {"params": [p for p in net.parameters() if p.dim() > 1], "lr": BASE_LR},
        {"params": [p for p in net.parameters() if p.dim() == 1], "lr": 2 * BASE_LR},
    ]
    sgd = torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1 - step / steps)
    for epoch in range(epochs):
        order = torch.randperm(len(images))
        total = torch.zeros(())
        for indices in torch.split(order[: len(images) // BATCH * BATCH], BATCH):
            loss = functional.cross_entropy(net(shifted(padded, indices)), labels[indices])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            schedule.step()
            total += loss.detach()
        print(f"epoch {epoch + 1}: training loss {total.item() / (len(images) // BATCH):.4f}", flush=True)


@torch.no_grad()
def accuracy(net: LeNet, images: Tensor, labels: Tensor) -> float:
    """Share of images (n, 28, 28) uint8 whose highest score is that of their label (n,)."""
    guesses = torch.cat([net(part[:, None].float() * SCALE).argmax(1) for part in torch.split(images, 1000)])
    return float((guesses == labels).float().mean())


def write(net: LeNet, path: Path) -> None:
    """The four trained layers as a caffemodel, behind the name of the net."""
    entries = []
    for name, kind in TYPES.items():
        layer = net.get_submodule(name)
        arrays = tuple(layer.get_parameter(blob).detach().numpy() for blob in ("weight", "bias"))
        definition = message_class("LayerParameter")(name=name, type=kind)
        entries.append(NewEntry(name, arrays, definition.SerializeToString()))
    with path.open("wb") as file:
        file.write(message_class("NetParameter")(name="LeNet").SerializeToString())
        Weights(entries).write_caffemodel(file)


def main() -> None:
    """Train, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four MNIST idx .gz files")
    parser.add_argument("-o", "--output", type=Path, required=True, help="caffemodel to write")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    net = LeNet()
    start = time.perf_counter()
    train(net, *read_mnist(args.data, "train"), args.epochs)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    print(f"test accuracy {accuracy(net, *read_mnist(args.data, 't10k')):.2%}")
    write(net, args.output)


if __name__ == "__main__":
    main()
