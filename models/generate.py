"""Write the prototxts and READMEs of the well-known nets in this folder: ``python models/generate.py``.

``python models/generate.py NET --table`` counts one net and prints the table of its README, without NET that of all nets.

Each net is one function that adds layers to a ``Net``. The same function makes the deploy form and the
training form; the latter has fillers, learning rates, data layers and losses on top.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

from caffe_proto import Model, cost, net, shapes

HERE = Path(__file__).resolve().parent
WIDTH = 100

Fields = dict[str, Any]

DEFAULT_FILES = "deploy.prototxt", "train_val.prototxt"
MADE_BY = "Written by models/generate.py: change that, not this."

README_FOOT = (
    "Weights that you have for this net are found by layer name. None come with it, and nothing here has been trained by this project: the fillers, rates and data layers of "
    "`train_val.prototxt` are a starting point. Both prototxts and this file are written by `models/generate.py`."
)

INDEX_HEAD = """# Nets

Well-known nets in Caffe's form, as bases to decompose, prune, export and time. A folder holds `deploy.prototxt`,
`train_val.prototxt` and a README with the net's source; LeNet's also holds weights and how they were trained.
"""

INDEX_TABLE = """| net | input | MACs | of convolutions | parameters learnt | BatchNorm statistics |
| --- | --- | ---: | ---: | ---: | ---: |"""

INDEX_FOOT = """MACs are multiply-adds of convolutions and fully connected layers, for one image. Parameters are weights, biases and
the factors and shifts of Scale layers. BatchNorm's mean, variance and factor are stored but not learnt, and have a
column of their own; `caffe-lra info` adds both columns. `python models/generate.py --table` counts all nets and prints
this table, `python models/generate.py NET --table` that of one net's README.

`python models/generate.py` writes every prototxt and README here but LeNet's solver and README; what the READMEs say
in words is in `nets.toml`.
"""


# ------------------------------------------------------------------------------- text


class Word(str):
    """A value that is written without quotes: an enumerator."""


MAX, AVE, TRAIN, TEST = Word("MAX"), Word("AVE"), Word("TRAIN"), Word("TEST")


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) and not isinstance(value, Word) else str(value)


def _pairs(fields: Fields) -> Iterator[tuple[str, Any]]:
    """Fields one by one: lists repeat, None is left out."""
    for key, value in fields.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                yield key, one


def _inline(key: str, value: Any) -> str:
    if not isinstance(value, dict):
        return f"{key}: {_scalar(value)}"
    return " ".join([key, "{", *(_inline(*pair) for pair in _pairs(value)), "}"])


def _lines(key: str, value: Any, indent: str) -> list[str]:
    """One field: on one line where it fits, else its numbers on one line and its blocks below."""
    line = indent + _inline(key, value)
    if not isinstance(value, dict) or len(line) <= WIDTH:
        return [line]
    pairs, deeper = list(_pairs(value)), indent + "  "
    scalars = " ".join(_inline(*pair) for pair in pairs if not isinstance(pair[1], dict))
    blocks = [line for pair in pairs if isinstance(pair[1], dict) for line in _lines(*pair, deeper)]
    return [f"{indent}{key} {{", *([deeper + scalars] if scalars else []), *blocks, indent + "}"]


def _layer_text(layer: Fields) -> str:
    fields = [line for pair in _pairs(layer) for line in _lines(*pair, "  ")]
    return "\n".join(["layer {", *fields, "}", ""])


# ------------------------------------------------------------------------------- layers


def gaussian(std: float) -> Fields:
    """A filler that draws from the normal distribution."""
    return {"type": "gaussian", "std": std}


XAVIER: Fields = {"type": "xavier"}
MSRA: Fields = {"type": "msra"}
FIXED: Fields = {"lr_mult": 0, "decay_mult": 0}


def _unless(default: int, value: int) -> int | None:
    return None if value == default else value


@dataclass(frozen=True)
class Loss:
    """The names of a loss and of what is measured beside it."""

    layer: str = "loss"
    top: str = "loss"
    top1: str = "accuracy"
    top5: str = "accuracy_top5"


class Net:
    """The layers of one form of a net. Methods add a layer and return the name of its top."""

    def __init__(self, *, train: bool, filler: Fields = XAVIER, bias: float = 0, bias_decay: int = 0) -> None:
        self.train = train
        self.layers: list[Fields] = []
        self._filler, self._bias, self._bias_decay = filler, bias, bias_decay

    def add(self, kind: str, name: str, bottom: str | list[str], top: str = "", **fields: Any) -> str:
        """Any layer with one top, which is called like the layer where nothing else is said."""
        head = {"name": name, "type": kind, "bottom": bottom, "top": top or name}
        self.layers.append({**head, **fields})
        return top or name

    def halves(self, name: str, bottom: str) -> tuple[str, str]:
        """The first and the second half of the channels."""
        tops = f"{bottom}_before", f"{bottom}_behind"
        self.layers.append({"name": name, "type": "Slice", "bottom": bottom, "top": list(tops)})
        return tops

    def _learnt(
        self, block: str, param: Fields, *, filler: Fields | None, bias: float | None, decay: int
    ) -> Fields:
        """A layer's own block, for training with fillers and learning rates; ``bias`` None: it has none."""
        if not self.train:
            return {block: param}
        weight = {"lr_mult": 1, "decay_mult": decay}
        rates = [weight] if bias is None else [weight, {"lr_mult": 2, "decay_mult": self._bias_decay}]
        constant = None if bias is None else {"type": "constant", "value": bias}
        fillers = {"weight_filler": filler or self._filler, "bias_filler": constant}
        return {"param": rates, block: {**param, **fillers}}

    def conv(
        self,
        name: str,
        bottom: str,
        width: int,
        kernel: int,
        *,
        stride: int = 1,
        pad: int = 0,
        group: int = 1,
        has_bias: bool = True,
        filler: Fields | None = None,
        bias: float | None = None,
    ) -> str:
        """A convolution."""
        param = {
            "num_output": width,
            "bias_term": None if has_bias else False,
            "pad": _unless(0, pad),
            "kernel_size": kernel,
            "stride": _unless(1, stride),
            "group": _unless(1, group),
        }
        filled = (self._bias if bias is None else bias) if has_bias else None
        learnt = self._learnt("convolution_param", param, filler=filler, bias=filled, decay=1)
        return self.add("Convolution", name, bottom, **learnt)

    def fc(
        self,
        name: str,
        bottom: str,
        width: int,
        *,
        filler: Fields | None = None,
        bias: float = 0,
        decay: int = 1,
    ) -> str:
        """A fully connected layer."""
        param = {"num_output": width}
        learnt = self._learnt("inner_product_param", param, filler=filler, bias=bias, decay=decay)
        return self.add("InnerProduct", name, bottom, **learnt)

    def relu(self, name: str, blob: str) -> str:
        """ReLU in place."""
        return self.add("ReLU", name, blob, blob)

    def dropout(self, name: str, blob: str, ratio: float = 0.5) -> str:
        """Dropout in place."""
        return self.add("Dropout", name, blob, blob, dropout_param={"dropout_ratio": ratio})

    def pool(
        self,
        name: str,
        bottom: str,
        method: Word,
        kernel: int,
        stride: int,
        *,
        pad: int = 0,
        floor: bool = False,
    ) -> str:
        """Pooling; ``floor`` rounds sizes down, where Caffe's habit is up."""
        param = {
            "pool": method,
            "kernel_size": kernel,
            "stride": _unless(1, stride),
            "pad": _unless(0, pad),
            "round_mode": Word("FLOOR") if floor else None,
        }
        return self.add("Pooling", name, bottom, pooling_param=param)

    def global_average(self, name: str, bottom: str) -> str:
        """The mean of each channel."""
        return self.add("Pooling", name, bottom, pooling_param={"pool": AVE, "global_pooling": True})

    def lrn(self, name: str, bottom: str) -> str:
        """Local response normalization across five channels."""
        return self.add("LRN", name, bottom, lrn_param={"local_size": 5, "alpha": 0.0001, "beta": 0.75})

    def batch_norm(self, norm: str, scale: str, bottom: str, top: str = "") -> str:
        """BatchNorm, and Scale in place behind it; without ``top`` both are in place."""
        fixed: Fields = {"param": [FIXED] * 3} if self.train else {}
        rates: Fields = {"param": [{"lr_mult": 1, "decay_mult": 0}] * 2} if self.train else {}
        blob = self.add("BatchNorm", norm, bottom, top or bottom, **fixed)
        return self.add("Scale", scale, blob, blob, **rates, scale_param={"bias_term": True})

    def loss(self, scores: str, names: Loss, weight: float | None = None) -> None:
        """SoftmaxWithLoss, and the accuracies of the test phase."""
        seen: Fields = {"include": {"phase": TEST}}
        self.add("Accuracy", names.top1, [scores, "label"], **seen)
        if names.top5:
            self.add("Accuracy", names.top5, [scores, "label"], **seen, accuracy_param={"top_k": 5})
        self.add("SoftmaxWithLoss", names.layer, [scores, "label"], names.top, loss_weight=weight)


# ------------------------------------------------------------------------------- LeNet, CIFAR-10 of Caffe


def _lenet(n: Net) -> str:
    blob = n.pool("pool1", n.conv("conv1", "data", 20, 5), MAX, 2, 2)
    blob = n.pool("pool2", n.conv("conv2", blob, 50, 5), MAX, 2, 2)
    return n.fc("ip2", n.relu("relu1", n.fc("ip1", blob, 500)), 10)


def _cifar10_body(n: Net, normalize: Callable[[str, str], str]) -> str:
    """Three convolutions of Caffe's CIFAR-10 nets, the first pooled before its ReLU."""
    blob = n.conv("conv1", "data", 32, 5, pad=2, filler=gaussian(0.0001))
    blob = n.relu("relu1", n.pool("pool1", blob, MAX, 3, 2))
    blob = n.conv("conv2", normalize("norm1", blob), 32, 5, pad=2)
    blob = n.pool("pool2", n.relu("relu2", blob), AVE, 3, 2)
    blob = n.conv("conv3", normalize("norm2", blob), 64, 5, pad=2)
    return n.pool("pool3", n.relu("relu3", blob), AVE, 3, 2)


def _cifar10_quick(n: Net) -> str:
    blob = _cifar10_body(n, lambda _name, blob: blob)
    return n.fc("ip2", n.fc("ip1", blob, 64, filler=gaussian(0.1)), 10, filler=gaussian(0.1))


def _cifar10_full(n: Net) -> str:
    def within(name: str, blob: str) -> str:
        param = {"local_size": 3, "alpha": 0.00005, "beta": 0.75, "norm_region": Word("WITHIN_CHANNEL")}
        return n.add("LRN", name, blob, lrn_param=param)

    return n.fc("ip1", _cifar10_body(n, within), 10, decay=250)


# ------------------------------------------------------------------------------- AlexNet, CaffeNet, VGG


def _alexnet(n: Net, *, pool_first: bool, bias: float) -> str:
    """AlexNet, or CaffeNet, which pools before it normalizes; ``bias`` fills where AlexNet's paper has 1."""

    def shrink(number: int, blob: str) -> str:
        pool, norm = f"pool{number}", f"norm{number}"
        if pool_first:
            return n.lrn(norm, n.pool(pool, blob, MAX, 3, 2))
        return n.pool(pool, n.lrn(norm, blob), MAX, 3, 2)

    blob = shrink(1, n.relu("relu1", n.conv("conv1", "data", 96, 11, stride=4)))
    blob = shrink(2, n.relu("relu2", n.conv("conv2", blob, 256, 5, pad=2, group=2, bias=bias)))
    blob = n.relu("relu3", n.conv("conv3", blob, 384, 3, pad=1))
    blob = n.relu("relu4", n.conv("conv4", blob, 384, 3, pad=1, group=2, bias=bias))
    blob = n.relu("relu5", n.conv("conv5", blob, 256, 3, pad=1, group=2, bias=bias))
    blob = n.pool("pool5", blob, MAX, 3, 2)
    return _classifier(n, blob, filler=gaussian(0.005), bias=bias)


def _classifier(n: Net, blob: str, *, filler: Fields | None = None, bias: float = 0) -> str:
    """fc6, fc7 and fc8 with dropout."""
    for i in (6, 7):
        blob = n.relu(f"relu{i}", n.fc(f"fc{i}", blob, 4096, filler=filler, bias=bias))
        blob = n.dropout(f"drop{i}", blob)
    return n.fc("fc8", blob, 1000)


VGG_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def _vgg_body(n: Net, *, normalize: bool, last: Word) -> str:
    """The thirteen convolutions, with or without BatchNorm; ``last`` is how pool5 pools."""
    blob = "data"
    for i, (width, depth) in enumerate(VGG_STAGES, 1):
        for j in range(1, depth + 1):
            name = f"conv{i}_{j}"
            blob = n.conv(name, blob, width, 3, pad=1)
            if normalize:
                blob = n.batch_norm(f"{name}/bn", f"{name}/scale", blob)
            blob = n.relu(f"relu{i}_{j}", blob)
        blob = n.pool(f"pool{i}", blob, last if i == len(VGG_STAGES) else MAX, 2, 2)
    return blob


def _vgg_16(n: Net) -> str:
    return _classifier(n, _vgg_body(n, normalize=False, last=MAX))


def _vgg_16_bn(n: Net) -> str:
    blob = n.fc("fc6", _vgg_body(n, normalize=True, last=AVE), 512)
    return n.fc("fc7", n.relu("relu6", n.batch_norm("fc6/bn", "fc6/scale", blob)), 10)


# ------------------------------------------------------------------------------- GoogLeNet

# 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection
INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
POOLS = {"3b": "pool3/3x3_s2", "4e": "pool4/3x3_s2"}
Conv = Callable[..., str]


def _inception(n: Net, tag: str, bottom: str, unit: Conv, third_branch: Sequence[str]) -> str:
    """Four branches side by side; ``third_branch`` names a 1x1 convolution and one or two wider ones."""
    ones, reduce3, threes, reduce5, fives, projected = INCEPTIONS[tag]
    at = f"inception_{tag}/"
    first = unit(at, "1x1", bottom, ones, 1)
    second = unit(at, "3x3", unit(at, "3x3_reduce", bottom, reduce3, 1), threes, 3, pad=1)
    reduce, *wider = third_branch
    third, kernel = unit(at, reduce, bottom, reduce5, 1), 5 if len(wider) == 1 else 3
    for name in wider:
        third = unit(at, name, third, fives, kernel, pad=kernel // 2)
    pooled = n.pool(at + "pool", bottom, MAX, 3, 1, pad=1)
    fourth = unit(at, "pool_proj", pooled, projected, 1)
    return n.add("Concat", at + "output", [first, second, third, fourth])


def _googlenet(n: Net) -> str:
    def unit(at: str, name: str, bottom: str, width: int, kernel: int, **settings: Any) -> str:
        blob = n.conv(at + name, bottom, width, kernel, **settings)
        return n.relu(f"{at}relu_{name.removesuffix('_s2')}", blob)

    blob = unit("conv1/", "7x7_s2", "data", 64, 7, stride=2, pad=3)
    blob = n.lrn("pool1/norm1", n.pool("pool1/3x3_s2", blob, MAX, 3, 2))
    blob = unit("conv2/", "3x3", unit("conv2/", "3x3_reduce", blob, 64, 1), 192, 3, pad=1)
    blob = n.pool("pool2/3x3_s2", n.lrn("conv2/norm2", blob), MAX, 3, 2)
    for tag in INCEPTIONS:
        blob = _inception(n, tag, blob, unit, ["5x5_reduce", "5x5"])
        if tag in POOLS:
            blob = n.pool(POOLS[tag], blob, MAX, 3, 2)
        if n.train and tag in ("4a", "4d"):
            _side_loss(n, "loss1" if tag == "4a" else "loss2", blob, unit)
    blob = n.dropout("pool5/drop_7x7_s1", n.pool("pool5/7x7_s1", blob, AVE, 7, 1), 0.4)
    return n.fc("loss3/classifier", blob, 1000)


def _side_loss(n: Net, name: str, bottom: str, unit: Conv) -> None:
    """One of the two classifiers that help the lower layers to learn."""
    blob = n.pool(f"{name}/ave_pool", bottom, AVE, 5, 3)
    blob = n.fc(f"{name}/fc", unit(f"{name}/", "conv", blob, 128, 1), 1024, bias=0.2)
    blob = n.dropout(f"{name}/drop_fc", n.relu(f"{name}/relu_fc", blob), 0.7)
    scores = n.fc(f"{name}/classifier", blob, 1000)
    n.loss(scores, Loss(f"{name}/loss", f"{name}/loss1", f"{name}/top-1", f"{name}/top-5"), 0.3)


def _googlenet_cifar(n: Net) -> str:
    def unit(at: str, name: str, bottom: str, width: int, kernel: int, **settings: Any) -> str:
        blob = n.conv(at + name, bottom, width, kernel, **settings)
        blob = n.batch_norm(f"{at}{name}/bn", f"{at}{name}/scale", blob)
        return n.relu(f"{at}relu_{name}", blob)

    blob = unit("conv1/", "3x3", "data", 192, 3, pad=1)
    third_branch = ["double3x3_reduce", "double3x3_1", "double3x3_2"]
    for tag in INCEPTIONS:
        blob = _inception(n, tag, blob, unit, third_branch)
        if tag in POOLS:
            blob = n.pool(POOLS[tag], blob, MAX, 3, 2, pad=1, floor=True)
    return n.fc("classifier", n.global_average("pool5/8x8", blob), 10)


# ------------------------------------------------------------------------------- ResNets of ImageNet


def _res_conv(
    n: Net, name: str, bottom: str, width: int, kernel: int, stride: int = 1, *, has_bias: bool = False
) -> str:
    """A convolution padded to keep its size, with BatchNorm and Scale, named as in He's files."""
    blob = n.conv(name, bottom, width, kernel, stride=stride, pad=kernel // 2, has_bias=has_bias)
    tag = name.removeprefix("res") if name.startswith("res") else f"_{name}"
    return n.batch_norm(f"bn{tag}", f"scale{tag}", blob)


def _branch(n: Net, name: str, blob: str, convs: Iterable[tuple[int, int, int]]) -> str:
    """Convolutions (width, kernel, stride) named branch2a, branch2b, ..., with ReLU between them."""
    for letter, conv in zip("abc", convs, strict=False):
        if letter > "a":
            blob = n.relu(f"{blob}_relu", blob)
        blob = _res_conv(n, f"{name}_branch2{letter}", blob, *conv)
    return blob


def _resnet(n: Net, depths: Sequence[int], *, bottleneck: bool, later: bool = False) -> str:
    """A ResNet with one projection a stage where the width changes; a bottleneck's stride is in its first 1x1.

    ``later``: in its 3x3, and no bias in conv1.
    """
    blob = _res_conv(n, "conv1", "data", 64, 7, 2, has_bias=bottleneck and not later)
    blob, width_in = n.pool("pool1", n.relu("conv1_relu", blob), MAX, 3, 2), 64
    for stage, depth in enumerate(depths, 2):
        width = 16 << stage
        width_out = 4 * width if bottleneck else width
        for letter in "abcdef"[:depth]:
            name, stride = f"res{stage}{letter}", 2 if letter == "a" and stage > 2 else 1
            convs = [(width, 3, stride), (width, 3, 1)]
            if bottleneck:
                strides = (1, stride) if later else (stride, 1)
                convs = [(width, 1, strides[0]), (width, 3, strides[1]), (width_out, 1, 1)]
            shortcut = blob
            if width_in != width_out:
                shortcut = _res_conv(n, f"{name}_branch1", blob, width_out, 1, stride)
            blob = n.add("Eltwise", name, [shortcut, _branch(n, name, blob, convs)])
            blob, width_in = n.relu(f"{name}_relu", blob), width_out
    return n.fc("fc1000", n.pool("pool5", blob, AVE, 7, 1), 1000)


# ------------------------------------------------------------------------------- ResNets of CIFAR


def _projection(n: Net, name: str, blob: str, width: int) -> str:
    """The shortcut of Wen's ResNets: a plain 1x1 convolution with stride 2."""
    return n.conv(f"{name}_downsampling", blob, width, 1, stride=2, has_bias=False)


def _option_a(n: Net, name: str, blob: str, _width: int) -> str:
    """The shortcut without weights: every second pixel, between as many zero channels as it has itself."""
    kept = n.pool(f"{name}_subsample", blob, MAX, 1, 2, floor=True)
    zeros = n.add("Power", f"{name}_zeros", kept, power_param={"scale": 0})
    before, behind = n.halves(f"{name}_halves", zeros)
    return n.add("Concat", f"{name}_shortcut", [before, kept, behind])


def _cifar_resnet(
    n: Net, depth: int, shortcut: Callable[[Net, str, str, int], str], *, has_bias: bool
) -> str:
    """Three groups of ``depth`` blocks of two 3x3 convolutions; ``has_bias``: that of conv1 alone."""

    def unit(name: str, bottom: str, width: int, stride: int = 1, *, biased: bool = False) -> str:
        blob = n.conv(name, bottom, width, 3, stride=stride, pad=1, has_bias=biased)
        norm = "conv1_bn" if name == "conv1" else name.replace("_conv", "_bn")
        return n.batch_norm(f"{norm}_norm", f"{norm}_scale", blob)

    blob = n.relu("conv1_relu", unit("conv1", "data", 16, biased=has_bias))
    for group, width in enumerate((16, 32, 64), 1):
        for block in range(1, depth + 1):
            name, changes = f"res_grp{group}_{block}", group > 1 and block == 1
            inner = n.relu(f"{name}_relu1", unit(f"{name}_conv1", blob, width, 2 if changes else 1))
            inner = unit(f"{name}_conv2", inner, width)
            past = shortcut(n, name, blob, width) if changes else blob
            blob = n.add("ReLU", name, n.add("Eltwise", f"{name}_add", [past, inner]))
    return n.fc("ip1", n.global_average("pool1", blob), 10)


# ------------------------------------------------------------------------------- DenseNet, SqueezeNet, MobileNet


def _densenet_40(n: Net) -> str:
    """Three blocks of twelve convolutions of twelve filters each, on top of everything before them."""

    def normalized(name: str, bottom: str) -> str:
        blob = n.batch_norm(f"{name}/bn", f"{name}/scale", bottom, f"{name}/bn")
        return n.relu(f"{name}/relu", blob)

    blob, width = n.conv("conv1", "data", 24, 3, pad=1, has_bias=False), 24
    for block in (1, 2, 3):
        for number in range(1, 13):
            name = f"dense{block}_{number}"
            grown = n.conv(f"{name}/conv", normalized(name, blob), 12, 3, pad=1, has_bias=False)
            blob, width = n.add("Concat", f"{name}/concat", [blob, grown]), width + 12
        if block < 3:
            name = f"trans{block}"
            blob = n.conv(f"{name}/conv", normalized(name, blob), width, 1, has_bias=False)
            blob = n.pool(f"{name}/pool", blob, AVE, 2, 2)
    return n.fc("fc", n.global_average("pool3", normalized("final", blob)), 10)


FIRES = {
    2: (16, 64),
    3: (16, 64),
    4: (32, 128),
    5: (32, 128),
    6: (48, 192),
    7: (48, 192),
    8: (64, 256),
    9: (64, 256),
}


def _squeezenet(n: Net) -> str:
    def unit(name: str, part: str, bottom: str, width: int, kernel: int) -> str:
        blob = n.conv(f"{name}/{part}", bottom, width, kernel, pad=kernel // 2)
        return n.relu(f"{name}/relu_{part}", blob)

    blob = n.relu("relu_conv1", n.conv("conv1", "data", 64, 3, stride=2))
    blob = n.pool("pool1", blob, MAX, 3, 2)
    for number, (squeeze, expand) in FIRES.items():
        name = f"fire{number}"
        thin = unit(name, "squeeze1x1", blob, squeeze, 1)
        wide = [unit(name, f"expand{k}x{k}", thin, expand, k) for k in (1, 3)]
        blob = n.add("Concat", f"{name}/concat", wide)
        if number in (3, 5):
            blob = n.pool(f"pool{number}", blob, MAX, 3, 2)
    blob = n.conv("conv10", n.dropout("drop9", blob), 1000, 1, filler=gaussian(0.01))
    return n.global_average("pool10", n.relu("relu_conv10", blob))


# name behind "conv", output channels, stride of the depthwise convolution
SEPARABLE = (
    ("2_1", 64, 1),
    ("2_2", 128, 2),
    ("3_1", 128, 1),
    ("3_2", 256, 2),
    ("4_1", 256, 1),
    ("4_2", 512, 2),
    *((f"5_{i}", 512, 1) for i in range(1, 6)),
    ("5_6", 1024, 2),
    ("6", 1024, 1),
)


def _mobilenet(n: Net) -> str:
    def unit(tag: str, bottom: str, width: int, kernel: int, **settings: Any) -> str:
        name = f"conv{tag}"
        blob = n.conv(name, bottom, width, kernel, pad=kernel // 2, has_bias=False, **settings)
        return n.relu(f"relu{tag}", n.batch_norm(f"{name}/bn", f"{name}/scale", blob))

    blob, width_in = unit("1", "data", 32, 3, stride=2), 32
    for tag, width, stride in SEPARABLE:
        blob = unit(f"{tag}/dw", blob, width_in, 3, stride=stride, group=width_in)
        blob, width_in = unit(f"{tag}/sep", blob, width, 1), width
    return n.conv("fc7", n.global_average("pool6", blob), 1000, 1)


# ------------------------------------------------------------------------------- the nets


@dataclass(frozen=True)
class Data:
    """What goes into a net: the size of an image, how it is prepared, and where training images come from."""

    size: tuple[int, int, int]
    colours: str
    lmdb: str
    test: str
    batches: tuple[int, int]
    layer: str = "data"
    mirror: bool = False
    crop: int | None = None
    mean_file: str | None = None
    means: tuple[float, ...] = ()
    scale: float | None = None

    @property
    def prepared(self) -> str:
        """The preparation in words."""
        means = ", ".join(map(str, self.means)) or (self.mean_file and "the mean image of the training set")
        steps = [f" minus {means}" if means else "", f", times {self.scale}" if self.scale else ""]
        return f"{self.colours} values 0..255" + "".join(steps)

    def layers(self) -> list[Fields]:
        """The data layers of training and of testing."""
        return [self._layer(TRAIN, "train", self.batches[0]), self._layer(TEST, self.test, self.batches[1])]

    def _layer(self, phase: Word, part: str, batch: int) -> Fields:
        transform = {
            "mirror": True if self.mirror and phase == TRAIN else None,
            "crop_size": self.crop,
            "mean_file": self.mean_file,
            "mean_value": list(self.means),
            "scale": self.scale,
        }
        source = {"source": f"{self.lmdb}_{part}_lmdb", "backend": Word("LMDB"), "batch_size": batch}
        head = {"name": self.layer, "type": "Data", "top": ["data", "label"], "include": {"phase": phase}}
        return {**head, "transform_param": transform, "data_param": source}


def _imagenet(size: int, means: tuple[float, ...] = (104, 117, 123), scale: float | None = None) -> Data:
    return Data(
        size=(3, size, size),
        colours="blue, green, red",
        lmdb="ilsvrc12",
        test="val",
        batches=(256 if size == 227 else 32, 50),
        mirror=True,
        crop=size,
        means=means,
        scale=scale,
    )


_MNIST = Data((1, 28, 28), "gray", "mnist", "test", (64, 100), layer="mnist", scale=1 / 256)
_CIFAR_MEAN_IMAGE = Data(
    size=(3, 32, 32),
    colours="red, green, blue",
    lmdb="cifar10",
    test="test",
    batches=(100, 100),
    layer="cifar",
    mean_file="cifar10_mean.binaryproto",
)
_CIFAR = Data(
    size=(3, 32, 32),
    colours="red, green, blue",
    lmdb="cifar10_pad4",
    test="test",
    batches=(128, 100),
    layer="cifar",
    mirror=True,
    crop=32,
    means=(125.3, 123, 113.9),
    scale=0.0196,
)


@dataclass(frozen=True)
class Entry:
    """One net: its folder, its layers and how it is trained. What its README says is in nets.toml.

    ``heads`` are the comments at the top of the two ``files``; without any they are made. A net with files of
    its own naming has a README written by hand.
    """

    folder: str
    body: Callable[[Net], str]
    data: Data
    filler: Fields = field(default_factory=lambda: XAVIER)
    bias: float = 0
    bias_decay: int = 0
    loss: Loss = Loss()
    files: tuple[str, str] = DEFAULT_FILES
    heads: tuple[str, str] | None = None

    @property
    def words(self) -> dict[str, Any]:
        """name, about, source and notes."""
        found: dict[str, Any] = _WORDS[self.folder]
        return found


_WORDS = tomllib.loads((HERE / "nets.toml").read_text(encoding="utf-8"))
_TEN = Loss(top5="")
_cifar10 = partial(Entry, data=_CIFAR_MEAN_IMAGE, filler=gaussian(0.01), bias_decay=1, loss=_TEN)
_cifar_norm = partial(Entry, data=_CIFAR, filler=MSRA, loss=_TEN)
_LENET_HEADS = (
    "# LeNet for 28x28 gray digits. Feed gray values 0..255 multiplied by 0.00390625 (1/256).\n",
    "# LeNet with the data layers and the loss that lenet_solver.prototxt trains it with.\n"
    "# Each Data layer reads an LMDB of 28x28 gray images; the net sees gray * 0.00390625 (1/256).\n",
)
_LENET_FILES = "lenet.prototxt", "lenet_train_val.prototxt"

ZOO = (
    Entry("lenet", _lenet, _MNIST, bias_decay=1, loss=_TEN, files=_LENET_FILES, heads=_LENET_HEADS),
    _cifar10("cifar10_quick", _cifar10_quick),
    _cifar10("cifar10_full", _cifar10_full),
    Entry("alexnet", partial(_alexnet, pool_first=False, bias=0.1), _imagenet(227), gaussian(0.01)),
    Entry("caffenet", partial(_alexnet, pool_first=True, bias=1), _imagenet(227), gaussian(0.01)),
    Entry("vgg_16", _vgg_16, _imagenet(224, (103.939, 116.779, 123.68))),
    Entry(
        "googlenet",
        _googlenet,
        _imagenet(224),
        bias=0.2,
        loss=Loss("loss3/loss3", "loss3/loss3", "loss3/top-1", "loss3/top-5"),
    ),
    Entry("resnet_18", partial(_resnet, depths=(2, 2, 2, 2), bottleneck=False), _imagenet(224), MSRA),
    Entry("resnet_50", partial(_resnet, depths=(3, 4, 6, 3), bottleneck=True), _imagenet(224), MSRA),
    Entry(
        "resnet_50_v1.5",
        partial(_resnet, depths=(3, 4, 6, 3), bottleneck=True, later=True),
        _imagenet(224),
        MSRA,
    ),
    Entry("squeezenet_v1.1", _squeezenet, _imagenet(227)),
    Entry("mobilenet_v1", _mobilenet, _imagenet(224, (103.94, 116.78, 123.68), 0.017), MSRA),
    _cifar_norm("vgg_16_bn", _vgg_16_bn),
    _cifar_norm("googlenet_cifar", _googlenet_cifar),
    _cifar_norm("resnet_20", partial(_cifar_resnet, depth=3, shortcut=_projection, has_bias=True)),
    _cifar_norm("resnet_56", partial(_cifar_resnet, depth=9, shortcut=_option_a, has_bias=False)),
    _cifar_norm("resnet_110", partial(_cifar_resnet, depth=18, shortcut=_option_a, has_bias=False)),
    _cifar_norm("densenet_40", _densenet_40),
)


# ------------------------------------------------------------------------------- files


def _net(entry: Entry, *, train: bool) -> Net:
    return Net(train=train, filler=entry.filler, bias=entry.bias, bias_decay=entry.bias_decay)


def _text(head: str, name: str, layers: Sequence[Fields]) -> str:
    return f'{head}name: "{name}"\n' + "".join(map(_layer_text, layers))


def deploy(entry: Entry) -> str:
    """The form that classifies."""
    made = _net(entry, train=False)
    shape: Fields = {"dim": [1, *entry.data.size]}
    source: Fields = {"name": "data", "type": "Input", "top": "data", "input_param": {"shape": shape}}
    made.add("Softmax", "prob", entry.body(made))
    head = entry.heads[0] if entry.heads else f"# Feed {entry.data.prepared}.\n# {MADE_BY}\n"
    return _text(head, entry.words["name"], [source, *made.layers])


def train_val(entry: Entry) -> str:
    """The form that learns, and is tested meanwhile."""
    made = _net(entry, train=True)
    made.loss(entry.body(made), entry.loss)
    head = entry.heads[1] if entry.heads else f"# {MADE_BY}\n"
    return _text(head, entry.words["name"], [*entry.data.layers(), *made.layers])


@dataclass(frozen=True)
class Counts:
    """What a deploy form costs, for one image."""

    macs: int
    conv_macs: int
    learnt: int
    scales: int
    statistics: int
    top: tuple[int, ...]


def counts(entry: Entry) -> Counts:
    """Count a net. BatchNorm's statistics are stored, but not learnt."""
    model = Model(net.parse(deploy(entry)))
    total = cost(model)
    by_type = {"BatchNorm": 0, "Scale": 0}
    for layer in total.layers:
        by_type[layer.type] = by_type.get(layer.type, 0) + layer.params
    statistics = by_type["BatchNorm"]
    learnt = total.params - statistics
    return Counts(total.macs, total.conv_macs, learnt, by_type["Scale"], statistics, shapes(model)["prob"])


def _parameters(found: Counts) -> Iterator[tuple[str, str]]:
    if not found.statistics:
        yield "Parameters", f"{found.learnt:,}"
        return
    yield "Parameters learnt", f"{found.learnt:,}, of them {found.scales:,} in Scale layers behind BatchNorm"
    total = found.learnt + found.statistics
    yield (
        "BatchNorm statistics",
        f"{found.statistics:,}: mean, variance and one factor a layer. `caffe-lra info` counts them as well: {total:,}",
    )


def _rows(entry: Entry, found: Counts) -> Iterator[tuple[str, str]]:
    if "source" in entry.words:
        yield "Source", entry.words["source"]
    yield "Input", f"`data`, {_by((1, *entry.data.size))}: {entry.data.prepared}"
    yield "Output", f"`prob`, {_by(found.top)}"
    yield "MACs", f"{found.macs:,} for one image: multiply-adds of convolutions and fully connected layers"
    yield "MACs of convolutions", f"{found.conv_macs:,}"
    yield from _parameters(found)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _filled(text: str, behind: str = "") -> str:
    """Prose on lines of 110 columns, those after the first behind some spaces."""
    words = " ".join(text.split())
    return fill(words, 110, subsequent_indent=behind, break_long_words=False, break_on_hyphens=False)


def table(entry: Entry) -> str:
    """What the net is fed, gives and costs, as its README has it."""
    rows = (f"| {key} | {value} |" for key, value in _rows(entry, counts(entry)))
    return "\n".join(["| | |", "| --- | --- |", *rows])


def readme(entry: Entry) -> str:
    """What the net is and what it costs."""
    batch = entry.data.batches[0]
    shape = "" if entry.data.crop else f" --input-shape data={batch},3,32,32 --input-shape label={batch}"
    at, title = f"models/{entry.folder}", entry.words["name"].replace("_", " ")
    return "\n".join(
        [
            f"# {title}\n",
            _filled(entry.words["about"]) + "\n",
            table(entry) + "\n",
            "The same table, counted again from the net:\n",
            f"    python models/generate.py {entry.folder} --table\n",
            *(_filled(f"- {note}", "  ") for note in entry.words["notes"]),
            *([""] if entry.words["notes"] else []),
            "Every layer with its shape, parameters and MACs:\n",
            f"    caffe-lra info {at}/deploy.prototxt",
            f"    caffe-lra info {at}/train_val.prototxt --phase TRAIN{shape}\n",
            _filled(README_FOOT),
            "",
        ]
    )


def index_table() -> str:
    """All nets, one row each."""
    rows = []
    for entry in ZOO:
        found, link = counts(entry), f"[{entry.folder}]({entry.folder}/{entry.files[0]})"
        numbers = (found.macs, found.conv_macs, found.learnt, found.statistics)
        rows.append(f"| {link} | {_by(entry.data.size)} | " + " | ".join(f"{n:,}" for n in numbers) + " |")
    return "\n".join([INDEX_TABLE, *rows])


def index() -> str:
    """The README of this folder."""
    return "\n".join([INDEX_HEAD, index_table(), "", INDEX_FOOT])


def files() -> dict[str, str]:
    """All that this program writes: text by path in this folder."""
    made = {"README.md": index()}
    for entry in ZOO:
        texts = deploy(entry), train_val(entry)
        made.update({f"{entry.folder}/{name}": text for name, text in zip(entry.files, texts, strict=True)})
        if entry.files == DEFAULT_FILES:
            made[f"{entry.folder}/README.md"] = readme(entry)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Write all files, or print a table."""
    asked = argparse.ArgumentParser(
        description="Write the nets of this folder, or print the table of a README."
    )
    asked.add_argument(
        "net", nargs="?", choices=[entry.folder for entry in ZOO], help="with --table: this net"
    )
    asked.add_argument("--table", action="store_true", help="print what the nets cost, and write nothing")
    given = asked.parse_args(arguments)
    if given.table:
        named = [entry for entry in ZOO if entry.folder == given.net]
        print(table(named[0]) if named else index_table())
    elif given.net:
        asked.error("NET goes with --table alone: all files are written together")
    else:
        write()


def write() -> None:
    """Write all files."""
    for name, text in files().items():
        path = HERE / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
