"""Mutated small nets through load, graph, shapes and bind: nothing but our own errors may escape.

    python benchmarks/fuzz.py --count 1000000 --seed 0 --seconds 3600

The seeds are nets written here and, where ../shared/oracle is present, its cases. A mutation works on tokens,
so that many of the results still parse, and on the bytes of the weights. The first escape ends the run; what
caused it is left in a temporary folder.
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from caffe_proto import binding, costs, graph, load, net, schema, shape_inference, wire
from caffe_proto.errors import Error
from caffe_proto.layers import LAYERS
from caffe_proto.weights import NewEntry, Weights

CASES = Path(__file__).resolve().parents[2] / "shared" / "oracle" / "cases"
LARGEST_TEXT, LARGEST_WEIGHTS = 6_000, 50_000  # bytes of a seed

_TOKENS = re.compile(r'"[^"\n]*"|\'[^\'\n]*\'|[\w.]+|\s+|.', re.DOTALL)
_ODD = """
0 1 -1 2 3 5 7 31 32 33 255 256 65536 2147483647 2147483648 -2147483648 4294967295 4294967296
9223372036854775807 9223372036854775808 -9223372036854775808 99999999999999999999 0x7fffffff 017 1e3 1e39 1e999
-1e999 nan -nan inf -inf 0.5 .5f 1. true false TEST TRAIN MAX AVE SUM PROD FULL NONE "" "x" "data" "\\377" 'a"b'
{ } < > [ ] : ; , - # layer layers input input_dim input_shape
""".split()

_INPUT = (
    'layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 4 dim: 8 dim: 8 } } }\n'
)
_LABEL = 'layer { name: "label" type: "Input" top: "label" input_param { shape { dim: 2 } } }\n'
_SMALL = (
    _INPUT
    + """layer { name: "c" type: "Convolution" bottom: "data" top: "c" param { name: "w" lr_mult: 1 } param { lr_mult: 2 }
  convolution_param { num_output: 8 kernel_size: 3 pad: 1 group: 2 weight_filler { type: "xavier" } } }
layer { name: "bn" type: "BatchNorm" bottom: "c" top: "c" batch_norm_param { use_global_stats: true eps: 1e-5 } }
layer { name: "s" type: "Scale" bottom: "c" top: "c" scale_param { bias_term: true } }
layer { name: "r" type: "ReLU" bottom: "c" top: "c" relu_param { negative_slope: 0.1 } }
layer { name: "p" type: "Pooling" bottom: "c" top: "p" pooling_param { pool: MAX kernel_size: 3 stride: 2 pad: 1 } }
layer { name: "sl" type: "Slice" bottom: "p" top: "s1" top: "s2" slice_param { axis: 1 slice_point: 3 } }
layer { name: "cc" type: "Concat" bottom: "s1" bottom: "s2" top: "cc" concat_param { axis: 1 } }
layer { name: "e" type: "Eltwise" bottom: "p" bottom: "cc" top: "e" eltwise_param { operation: SUM coeff: 1 coeff: -1 } }
layer { name: "f" type: "InnerProduct" bottom: "e" top: "f" inner_product_param { num_output: 5 axis: 1 } }
"""
    + _LABEL
    + """layer { name: "loss" type: "SoftmaxWithLoss" bottom: "f" bottom: "label" top: "loss" include { phase: TEST } }
layer { name: "acc" type: "Accuracy" bottom: "f" bottom: "label" top: "acc" exclude { stage: "deploy" } }
"""
)
_SHAPES = (
    _INPUT
    + """layer { name: "flat" type: "Flatten" bottom: "data" top: "flat" flatten_param { axis: 1 end_axis: -1 } }
layer { name: "r" type: "ReLU" bottom: "flat" top: "flat" }
layer { name: "again" type: "Power" bottom: "data" top: "again" power_param { power: 2 scale: 0.5 shift: 1 } }
layer { name: "shape" type: "Reshape" bottom: "flat" top: "shape" reshape_param { shape { dim: 0 dim: -1 dim: 8 } axis: 0 num_axes: -1 } }
layer { name: "tile" type: "Tile" bottom: "shape" top: "tile" tile_param { axis: 1 tiles: 3 } }
layer { name: "red" type: "Reduction" bottom: "tile" top: "red" reduction_param { axis: 1 operation: MEAN coeff: 2 } }
layer { name: "arg" type: "ArgMax" bottom: "data" top: "arg" argmax_param { top_k: 2 axis: 1 } }
layer { name: "spp" type: "SPP" bottom: "data" top: "spp" spp_param { pyramid_height: 2 pool: MAX } }
layer { name: "crop" type: "Crop" bottom: "again" bottom: "data" top: "crop" crop_param { axis: 2 offset: 0 offset: 0 } }
layer { name: "up" type: "Deconvolution" bottom: "crop" top: "up" convolution_param { num_output: 4 kernel_size: 2 stride: 2 } }
layer { name: "lrn" type: "LRN" bottom: "up" top: "lrn" lrn_param { local_size: 5 norm_region: WITHIN_CHANNEL } }
layer { name: "mvn" type: "MVN" bottom: "lrn" top: "mvn" mvn_param { across_channels: true } }
layer { name: "emb" type: "Embed" bottom: "red" top: "emb" embed_param { num_output: 3 input_dim: 5 } }
layer { name: "i2c" type: "Im2col" bottom: "data" top: "i2c" convolution_param { kernel_size: 2 dilation: 2 } }
layer { name: "pre" type: "PReLU" bottom: "i2c" top: "i2c" }
layer { name: "sm" type: "Softmax" bottom: "i2c" top: "sm" softmax_param { axis: -1 } }
"""
)
_V1 = """name: "old" input: "data" input_dim: 1 input_dim: 3 input_dim: 9 input_dim: 9
layers { name: "c" type: CONVOLUTION bottom: "data" top: "c" blobs_lr: 1 blobs_lr: 2 weight_decay: 1 weight_decay: 0
  convolution_param { num_output: 4 kernel_h: 3 kernel_w: 1 } }
layers { name: "r" type: RELU bottom: "c" top: "c" }
layers { name: "f" type: 14 bottom: "c" top: "f" param: "w" param: "b" inner_product_param { num_output: 3 } }
layers { name: "p" type: SOFTMAX bottom: "f" top: "p" }
"""
_V0 = """name: "older" input: "data" input_dim: 1 input_dim: 3 input_dim: 9 input_dim: 9
layers { layer { name: "pad" type: "padding" pad: 1 } bottom: "data" top: "pad" }
layers { layer { name: "c" type: "conv" num_output: 4 kernelsize: 3 stride: 2 blobs_lr: 1. weight_filler { type: "gaussian" } } bottom: "pad" top: "c" }
layers { layer { name: "r" type: "relu" } bottom: "c" top: "c" }
layers { layer { name: "p" type: "pool" kernelsize: 2 stride: 2 pool: MAX } bottom: "c" top: "p" }
layers { layer { name: "f" type: "innerproduct" num_output: 3 biasterm: false } bottom: "p" top: "f" }
"""
_LSTM = """layer { name: "in" type: "Input" top: "x" top: "cont" input_param { shape { dim: 3 dim: 2 dim: 4 } shape { dim: 3 dim: 2 } } }
layer { name: "l" type: "LSTM" bottom: "x" bottom: "cont" top: "h" recurrent_param { num_output: 5 expose_hidden: false } }
"""


@dataclass(frozen=True)
class Seed:
    """A net and the weights that fit it."""

    text: str
    weights: bytes | None


def seeds() -> list[Seed]:
    """The nets written here, with random weights, and the small ones of the oracle."""
    made = [Seed(source, fitting(source)) for source in (_SMALL, _SHAPES, _V1, _V0, _LSTM)]
    for folder in sorted(CASES.iterdir()) if CASES.is_dir() else ():
        path, stored = folder / "net.prototxt", folder / "weights.caffemodel"
        if not path.is_file() or path.stat().st_size > LARGEST_TEXT:
            continue
        small = stored.is_file() and stored.stat().st_size <= LARGEST_WEIGHTS
        made.append(Seed(path.read_text(), stored.read_bytes() if small else None))
    return made


def fitting(source: str) -> bytes:
    """A caffemodel of ones for a net."""
    shaped = shape_inference.infer(graph.build(net.parse(source)))
    entries = [
        NewEntry(node.name, tuple(np.ones(shape, np.float32) for shape in shaped.blobs(index)))
        for index, node in enumerate(shaped.graph.nodes)
        if shaped.blobs(index)
    ]
    file = BytesIO()
    Weights(entries).write_caffemodel(file)
    return file.getvalue()


# --- mutations ------------------------------------------------------------------------------------


def field_names() -> list[str]:
    """Names of fields that layers and their blocks have."""
    names = [info.name for info in schema.descriptor("LayerParameter").fields]
    for info in schema.descriptor("LayerParameter").fields:
        if info.message_type is not None:
            names += [inner.name for inner in info.message_type.fields]
    return names


class Mutator:
    """Changes of text by tokens and of weights by bytes, all from one generator of random numbers."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def text(self, source: str, words: Sequence[str]) -> str:
        """``source`` with one to four tokens or blocks changed, now and then without regard to its syntax."""
        tokens = _TOKENS.findall(source)
        steps = _CRUDE_STEPS if self.rng.random() < 0.1 else _TEXT_STEPS
        for _ in range(self.rng.randint(1, 4)):
            if tokens:
                self.rng.choice(steps)(self, tokens, words)
        return "".join(tokens)

    def place(self, tokens: Sequence[str]) -> int:
        """The index of a token, rarely of white space."""
        index = self.rng.randrange(len(tokens))
        return index + 1 if tokens[index].isspace() and index + 1 < len(tokens) else index

    def replace(self, tokens: list[str], words: Sequence[str]) -> None:
        """Put an odd value, a known word, or another token of the file in a token's place."""
        source = self.rng.choice((_ODD, _ODD, words, tokens))
        tokens[self.place(tokens)] = self.rng.choice(source)

    def field(self, tokens: list[str], words: Sequence[str]) -> None:
        """Give a field another name, one of this file or any."""
        names = [i for i, token in enumerate(tokens) if token[:1].isalpha() and _is_field(tokens, i)]
        if names:
            other = self.rng.choice(words) if self.rng.random() < 0.5 else tokens[self.rng.choice(names)]
            tokens[self.rng.choice(names)] = other

    def value(self, tokens: list[str], _words: Sequence[str]) -> None:
        """Write a field ``name: value`` twice, or elsewhere too."""
        ends = [i for i in range(3, len(tokens)) if tokens[i - 2 : i] == [":", " "]]
        if ends:
            at = self.rng.choice(ends)
            to = at + 1 if self.rng.random() < 0.5 else self.rng.choice(ends) + 1
            tokens[to:to] = [" ", *tokens[at - 3 : at + 1], " "]

    def number(self, tokens: list[str], _words: Sequence[str]) -> None:
        """Change a number."""
        numbers = [i for i, token in enumerate(tokens) if token[:1].isdigit()]
        if numbers:
            tokens[self.rng.choice(numbers)] = self.rng.choice(_ODD[:24])

    def name(self, tokens: list[str], _words: Sequence[str]) -> None:
        """Put one quoted string in the place of another: bottoms, tops and types move about."""
        strings = [i for i, token in enumerate(tokens) if token[:1] in "\"'"]
        if strings:
            tokens[self.rng.choice(strings)] = tokens[self.rng.choice(strings)]

    def type(self, tokens: list[str], _words: Sequence[str]) -> None:
        """Give a layer another type."""
        types = [i for i, token in enumerate(tokens) if token.strip("\"'") in LAYERS]
        if types:
            tokens[self.rng.choice(types)] = f'"{self.rng.choice(list(LAYERS))}"'

    def drop(self, tokens: list[str], _words: Sequence[str]) -> None:
        """Leave a token out."""
        del tokens[self.place(tokens)]

    def double(self, tokens: list[str], _words: Sequence[str]) -> None:
        """Write some tokens twice."""
        at = self.place(tokens)
        end = at + self.rng.randint(1, 6)
        tokens[at:at] = [*tokens[at:end], " "]

    def block(self, tokens: list[str], _words: Sequence[str]) -> None:
        """Remove a block, write it twice, or move it elsewhere."""
        found = _a_block(tokens, self.rng)
        if found is None:
            return
        start, end = found
        taken = [*tokens[start:end], "\n"]
        action = self.rng.randrange(3)
        if action != 1:
            del tokens[start:end]
        if action != 0:
            ends = [i + 1 for i, token in enumerate(tokens) if token == "}"]
            at = self.rng.choice(ends or [0])
            tokens[at:at] = taken

    def weights(self, data: bytes) -> bytes:
        """A caffemodel with some bytes changed, cut off, put in or written twice."""
        made = bytearray(data)
        for _ in range(self.rng.randint(1, 4)):
            if not made:
                break
            at = self.rng.randrange(min(len(made), 400) if self.rng.random() < 0.7 else len(made))
            action = self.rng.randrange(6)
            if action == 0:
                made[at] ^= 1 << self.rng.randrange(8)
            elif action == 1:
                made[at] = self.rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x2A, 0x3A))
            elif action == 2:
                del made[at:]
            elif action == 3:
                made[at:at] = wire.encode_varint(self.rng.getrandbits(self.rng.choice((7, 31, 32, 63, 64))))
            elif action == 4:
                del made[at : at + self.rng.randint(1, 9)]
            else:
                made[at:at] = made[at : at + self.rng.randint(1, 60)]
        return bytes(made)


_TextStep = Callable[[Mutator, list[str], Sequence[str]], None]
_TEXT_STEPS: tuple[_TextStep, ...] = (
    Mutator.number, Mutator.number, Mutator.number, Mutator.name, Mutator.name, Mutator.type, Mutator.field,
    Mutator.value, Mutator.block,
)  # fmt: skip
_CRUDE_STEPS: tuple[_TextStep, ...] = (*_TEXT_STEPS, Mutator.replace, Mutator.drop, Mutator.double)


def _is_field(tokens: Sequence[str], index: int) -> bool:
    """Whether a token is the name of a field: a colon or a block follows."""
    after = "".join(tokens[index + 1 : index + 3]).lstrip()
    return after[:1] in (":", "{")


def _a_block(tokens: Sequence[str], rng: random.Random) -> tuple[int, int] | None:
    """The tokens of some ``name { ... }``, or None."""
    opening = [i for i, token in enumerate(tokens) if token == "{"]
    if not opening:
        return None
    start = end = rng.choice(opening)
    depth = 0
    while end < len(tokens):
        depth += (tokens[end] == "{") - (tokens[end] == "}")
        end += 1
        if depth == 0:
            break
    while start > 0 and (tokens[start] in ("{", ":") or tokens[start].isspace()):
        start -= 1
    return start, end


# --- driving --------------------------------------------------------------------------------------


def drive(folder: Path, text: str | bytes, weights: bytes | None) -> str:
    """One case through everything; how far it came. Whatever is no ``Error`` escapes."""
    path, stored = folder / "net.prototxt", folder / "weights.caffemodel"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape"))
    if weights is not None:
        stored.write_bytes(weights)
    reached = "refused as text or weights"
    try:
        model = load(path, stored if weights is not None else None)
        reached = "refused as layers"
        built = graph.build(model.net)
        reached = "refused as shapes"
        costs.cost(shape_inference.infer(built, partial=True))
        shaped = shape_inference.infer(built)
        reached = "refused as weights of the net"
        costs.cost(shaped)
        if model.weights is not None:
            binding.bind(shaped, model.weights)
        return "sound"
    except Error as error:
        told = str(error)
        if not told or "\n" in told:
            raise AssertionError(f"an error of no line, or of several: {told!r}") from error
        return reached


def case(number: int, seed: int, known: Sequence[Seed], words: Sequence[str]) -> Seed:
    """The mutated net and weights of that number."""
    rng = random.Random(seed << 40 | number)
    chosen, mutator = rng.choice(known), Mutator(rng)
    what = rng.randrange(4)
    text = mutator.text(chosen.text, words) if what else chosen.text
    weights = chosen.weights
    if weights is not None and (what == 0 or rng.random() < 0.2):
        weights = mutator.weights(weights)
    return Seed(text, weights)


def keep(made: Seed) -> Path:
    """Write a case to a folder that stays."""
    folder = Path(tempfile.mkdtemp(prefix="caffe-lra-escape-"))
    (folder / "net.prototxt").write_bytes(made.text.encode("utf-8", "surrogateescape"))
    if made.weights is not None:
        (folder / "weights.caffemodel").write_bytes(made.weights)
    return folder


def main() -> int:
    """Mutate and drive until the count, the time or an escape ends it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3600.0)
    given = parser.parse_args()
    known, words = seeds(), [*field_names(), *(f'"{name}"' for name in LAYERS)]
    ends: Counter[str] = Counter()
    slowest, slowest_number, number = 0.0, -1, 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        while number < given.count and time.monotonic() - started < given.seconds:
            made = case(number, given.seed, known, words)
            before = time.monotonic()
            try:
                ends[drive(Path(name), made.text, made.weights)] += 1
            except Exception:
                traceback.print_exc()
                print(f"case {number} of seed {given.seed} escaped; it is kept in {keep(made)}")
                return 1
            took = time.monotonic() - before
            if took > slowest:
                slowest, slowest_number = took, number
            number += 1
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{number:,} cases of {len(known)} seeds in {seconds:.0f} s, {number / seconds:.0f} a second")
    print(f"slowest {slowest:.3f} s (case {slowest_number}), peak memory {peak:.0f} MiB")
    for what, count in ends.most_common():
        print(f"{count:9,}  {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
