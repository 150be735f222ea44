"""Caffe's upgrades of old prototxt files, step by step, as edits of the text.

The steps run in Caffe's order, each on the result of the one before: V0 to V1, data transforms, V1 to V2,
``input`` to an Input layer, BatchNorm's three ``param``, and ``solver_type``. What a step does not name stays
character for character, comments and unknown fields included. V0 blocks are written anew, in the file's
indentation.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from . import schema, text
from .blocks import Block
from .errors import NetError
from .text import Document, Field, Message, Scalar, quote

V1_TYPES = {
    "NONE": "", "ABSVAL": "AbsVal", "ACCURACY": "Accuracy", "ARGMAX": "ArgMax", "BNLL": "BNLL",
    "CONCAT": "Concat", "CONTRASTIVE_LOSS": "ContrastiveLoss", "CONVOLUTION": "Convolution", "DATA": "Data",
    "DECONVOLUTION": "Deconvolution", "DROPOUT": "Dropout", "DUMMY_DATA": "DummyData",
    "EUCLIDEAN_LOSS": "EuclideanLoss", "ELTWISE": "Eltwise", "EXP": "Exp", "FLATTEN": "Flatten",
    "HDF5_DATA": "HDF5Data", "HDF5_OUTPUT": "HDF5Output", "HINGE_LOSS": "HingeLoss", "IM2COL": "Im2col",
    "IMAGE_DATA": "ImageData", "INFOGAIN_LOSS": "InfogainLoss", "INNER_PRODUCT": "InnerProduct", "LRN": "LRN",
    "MEMORY_DATA": "MemoryData", "MULTINOMIAL_LOGISTIC_LOSS": "MultinomialLogisticLoss", "MVN": "MVN",
    "POOLING": "Pooling", "POWER": "Power", "RELU": "ReLU", "SIGMOID": "Sigmoid",
    "SIGMOID_CROSS_ENTROPY_LOSS": "SigmoidCrossEntropyLoss", "SILENCE": "Silence", "SOFTMAX": "Softmax",
    "SOFTMAX_LOSS": "SoftmaxWithLoss", "SPLIT": "Split", "SLICE": "Slice", "TANH": "TanH",
    "WINDOW_DATA": "WindowData", "THRESHOLD": "Threshold",
}  # fmt: skip
SOLVER_TYPES = {
    "SGD": "SGD", "NESTEROV": "Nesterov", "ADAGRAD": "AdaGrad", "RMSPROP": "RMSProp", "ADADELTA": "AdaDelta",
    "ADAM": "Adam",
}  # fmt: skip
TRANSFORMS = ("scale", "mean_file", "crop_size", "mirror")
TRANSFORMED = {"Data": "data_param", "ImageData": "image_data_param", "WindowData": "window_data_param"}

_PADDING = "padding"
_V0_TYPES = {
    "accuracy": "ACCURACY", "bnll": "BNLL", "concat": "CONCAT", "conv": "CONVOLUTION", "data": "DATA",
    "dropout": "DROPOUT", "euclidean_loss": "EUCLIDEAN_LOSS", "flatten": "FLATTEN", "hdf5_data": "HDF5_DATA",
    "hdf5_output": "HDF5_OUTPUT", "im2col": "IM2COL", "images": "IMAGE_DATA", "infogain_loss": "INFOGAIN_LOSS",
    "innerproduct": "INNER_PRODUCT", "lrn": "LRN", "multinomial_logistic_loss": "MULTINOMIAL_LOGISTIC_LOSS",
    "pool": "POOLING", "relu": "RELU", "sigmoid": "SIGMOID", "softmax": "SOFTMAX",
    "softmax_loss": "SOFTMAX_LOSS", "split": "SPLIT", "tanh": "TANH", "window_data": "WINDOW_DATA",
}  # fmt: skip
_V0_BLOCKS = {
    "conv": "convolution_param", "innerproduct": "inner_product_param", "pool": "pooling_param",
    "dropout": "dropout_param", "lrn": "lrn_param", "concat": "concat_param", "data": "data_param",
    "hdf5_data": "hdf5_data_param", "images": "image_data_param", "window_data": "window_data_param",
    "infogain_loss": "infogain_loss_param",
}  # fmt: skip
# V0 field -> its V1 name, and the types of layer in whose parameter block it goes.
_V0_FIELDS = {
    "num_output": ("num_output", ("conv", "innerproduct")),
    "biasterm": ("bias_term", ("conv", "innerproduct")),
    "weight_filler": ("weight_filler", ("conv", "innerproduct")),
    "bias_filler": ("bias_filler", ("conv", "innerproduct")),
    "pad": ("pad", ("conv", "pool")),
    "kernelsize": ("kernel_size", ("conv", "pool")),
    "group": ("group", ("conv",)),
    "stride": ("stride", ("conv", "pool")),
    "pool": ("pool", ("pool",)),
    "dropout_ratio": ("dropout_ratio", ("dropout",)),
    "local_size": ("local_size", ("lrn",)),
    "alpha": ("alpha", ("lrn",)),
    "beta": ("beta", ("lrn",)),
    "k": ("k", ("lrn",)),
    "source": ("source", ("data", "hdf5_data", "images", "window_data", "infogain_loss")),
    "batchsize": ("batch_size", ("data", "hdf5_data", "images", "window_data")),
    "rand_skip": ("rand_skip", ("data", "images")),
    "shuffle_images": ("shuffle", ("images",)),
    "new_height": ("new_height", ("images",)),
    "new_width": ("new_width", ("images",)),
    "concat_dim": ("concat_dim", ("concat",)),
    "det_fg_threshold": ("fg_threshold", ("window_data",)),
    "det_bg_threshold": ("bg_threshold", ("window_data",)),
    "det_fg_fraction": ("fg_fraction", ("window_data",)),
    "det_context_pad": ("context_pad", ("window_data",)),
    "det_crop_mode": ("crop_mode", ("window_data",)),
}
_V0_TRANSFORMS = {
    "scale": "scale",
    "meanfile": "mean_file",
    "cropsize": "crop_size",
    "mirror": "mirror",
}
_V0_NET = ("name", "layers", "input", "input_dim", "force_backward")  # what outlives the first step
_V1_SPECS = {
    "param": "name",
    "blob_share_mode": "share_mode",
    "blobs_lr": "lr_mult",
    "weight_decay": "decay_mult",
}
_INPUTS = ("input", "input_shape", "input_dim")
_BATCH_NORM_PARAMS = 3

_COMMENT = re.compile(r"#[^\n\r]*")
_COMMENT_BEHIND = re.compile(r"[ \t]*[,;]?[ \t]*(#[^\n\r]*)")
_INDENTED_BLOCK = re.compile(r"^([ \t]*)\w[^\n]*[{<][ \t]*(?:#[^\n]*)?\r?\n\1([ \t]+)\S", re.MULTILINE)


@dataclass(frozen=True)
class Upgrade:
    """The upgraded text, and a line for each step that changed something."""

    text: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Node:
    """A field to be written, with the comments above and behind it: a literal value, or a block of nodes."""

    name: str
    value: str | tuple[Node, ...]
    above: tuple[str, ...] = ()
    behind: str = ""

    def lines(self, unit: str = "  ") -> Iterator[str]:
        """The field as lines, blocks indented by ``unit``."""
        behind = f"  {self.behind}" if self.behind else ""
        yield from self.above
        if isinstance(self.value, str):
            yield f"{self.name}: {self.value}{behind}"
        elif not self.value:
            yield f"{self.name} {{ }}{behind}"
        else:
            yield f"{self.name} {{{behind}"
            yield from (unit + line for node in self.value for line in node.lines(unit))
            yield "}"

    def inline(self) -> str:
        """The field in one line, without comments."""
        if isinstance(self.value, str):
            return f"{self.name}: {self.value}"
        return f"{self.name} {{ {''.join(node.inline() + ' ' for node in self.value)}}}"

    @property
    def has_comments(self) -> bool:
        """Whether a comment would be lost in one line."""
        if self.above or self.behind:
            return True
        return not isinstance(self.value, str) and any(node.has_comments for node in self.value)


def upgrade_net_text(document: Document) -> str:
    """The net in V2 form; raises NetError where Caffe refuses to upgrade it."""
    return upgrade_net(document).text


def upgrade_solver_text(document: Document) -> str:
    """The solver with its type as a string; raises NetError where Caffe refuses it."""
    return upgrade_solver(document).text


def upgrade_net(document: Document) -> Upgrade:
    """The net in V2 form, and what was done; raises NetError where Caffe refuses to upgrade it."""
    return _run(document, (_v0_to_v1, _data_transform, _v1_to_v2, _input_layer, _batch_norm))


def upgrade_solver(document: Document) -> Upgrade:
    """The solver with its type as a string, and what was done; raises NetError where Caffe refuses it."""
    return _run(document, (_solver_type,))


def is_solver(document: Document) -> bool:
    """Whether the file sets a solver rather than a net, judged by its fields."""
    names = {field.name for field in document.root.fields}
    of_net = set(schema.descriptor("NetParameter").fields_by_name)
    of_solver = set(schema.descriptor("SolverParameter").fields_by_name) - of_net
    return not names.intersection(("layer", "layers", "input")) and bool(names.intersection(of_solver))


def is_v0(document: Document) -> bool:
    """Whether any block is of the oldest form, ``layers { layer { } }``."""
    return any(message.last("layer") for message in document.root.messages("layers"))


def refuse_mixed(document: Document) -> None:
    """Raise NetError where a net has ``layer`` and ``layers`` blocks."""
    root = document.root
    if root.last("layer") and root.last("layers"):
        raise NetError(
            'the net mixes "layer" and "layers" blocks; Caffe refuses to upgrade such a file',
            path=document.path,
            line=document.line(next(root.all("layers")).start),
            hint="write all of them in one dialect",
        )


def v1_type(kind: str) -> str:
    """The V2 type of a V1 enumerator, given by name or by number; a fork's enumerator as it stands."""
    return V1_TYPES.get(name := _enumerator(kind, "V1LayerParameter.LayerType"), name)


def _enumerator(value: str, enum: str) -> str:
    """The name of an enumerator that may be given by its number."""
    if value.isdigit():
        numbers = {str(number): name for name, number in schema.enum_values(enum).items()}
        return numbers.get(value, value)
    return value


@dataclass(frozen=True)
class Upgraded(Document):
    """The V2 form of a V0 file, which tells its lines by those of the file's own blocks."""

    blocks: tuple[int, ...] = ()  # where the layers begin here
    lines: tuple[int, ...] = ()  # where they begin in the file

    def line(self, offset: int) -> int:
        """The line of the file where the block began that became what stands at ``offset``."""
        index = bisect_right(self.blocks, offset) - 1
        return self.lines[index] if index >= 0 else super().line(offset)


def v0_as_v2(document: Document) -> Document:
    """The layers of a V0 net in V2 form, its inputs as they stand; raises NetError as Caffe does."""
    made = _parse(document, _run(document, (_v0_to_v1, _v1_to_v2)).text)
    kept = [field for field, _, type_ in _v0_layers(document) if type_ != _PADDING]
    lines = tuple(document.line(field.start) for field in kept)
    blocks = tuple(field.start for field in made.root.all("layer"))
    return Upgraded(made.text, made.root, made.path, blocks, lines)


_Step = Callable[["_Editor"], Iterable[str]]


def _run(document: Document, steps: Sequence[_Step]) -> Upgrade:
    done: list[str] = []
    for step in steps:
        editor = _Editor(document)
        try:
            told = list(step(editor))
        except NetError as error:
            raise error.at(path=document.path) from None
        if told:
            done += told
            document = _parse(document, editor.text())
    return Upgrade(document.text, tuple(done))


def _parse(document: Document, source: str) -> Document:
    return text.parse(source, document.path)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


class _Editor(Block):
    """Edits to a whole file that put blocks in the place of fields."""

    def __init__(self, document: Document) -> None:
        super().__init__(document, 0, len(document.text))
        self.root = document.root

    @cached_property
    def unit(self) -> str:
        """What the file indents a block by."""
        found = _INDENTED_BLOCK.search(self.document.text)
        return found.group(2) if found else "  "

    @cached_property
    def newline(self) -> str:
        """How the file ends its lines."""
        return "\r\n" if "\r\n" in self.document.text else "\n"

    def put(self, start: int, end: int, new: str) -> None:
        """Put text in the place of a span."""
        self._edits[start, end] = new

    def exchange(self, fields: Sequence[Field], nodes: Sequence[Node]) -> None:
        """Put nodes in the place of the first of some fields, and leave the others out."""
        first = fields[0]
        self.put(first.start, self._behind(first)[1], self.fitted(first, nodes))
        for field in fields:
            if field.start != first.start:
                self.remove(field)

    def insert(self, place: Field, node: Node) -> None:
        """Put a node before a field."""
        indent = self._indent(place.start)
        between = " " if indent is None else self.newline + indent
        self.put(place.start, place.start, self.fitted(place, [node]) + between)

    def scalars(self, fields: Iterable[Field], name: str) -> list[Node]:
        """The values of fields under a new name, each with the comment behind it; a list has one for all."""
        seen: set[int] = set()
        made: list[Node] = []
        for field in fields:
            if isinstance(field.value, Scalar):
                comment = "" if field.start in seen else self._behind(field)[0]
                made.append(Node(name, field.value.text, behind=comment))
                seen.add(field.start)
        return made

    def fitted(self, place: Field, nodes: Iterable[Node]) -> str:
        """Nodes as text to stand where a field stands: on lines of their own, or in one line."""
        nodes = tuple(nodes)
        source = self.document.text
        if self._indent(place.start) is None and not any(node.has_comments for node in nodes):
            return " ".join(node.inline() for node in nodes)
        line = source[source.rfind("\n", 0, place.start) + 1 : place.start]
        indent = line[: len(line) - len(line.lstrip(" \t"))]
        return f"{self.newline}{indent}".join(line for node in nodes for line in node.lines(self.unit))

    def layers(self, name: str) -> Iterator[tuple[Field, Message]]:
        """The layer blocks of that name."""
        for field in self.root.all(name):
            if isinstance(field.value, Message):
                yield field, field.value

    def _behind(self, field: Field) -> tuple[str, int]:
        """The comment that goes with a field, and where the field ends with its separator and comment."""
        found = _COMMENT_BEHIND.match(self.document.text, field.end)
        if found is None or self._indent(field.start) is None:
            return "", self._after_separator(field.end)
        return found.group(1), found.end(1)


# --- V0 to V1 -------------------------------------------------------------------------------------


def _v0_layers(document: Document) -> Iterator[tuple[Field, Message, str]]:
    """The ``layers`` blocks of a V0 file, each with the type that its inner block names."""
    for field in document.root.all("layers"):
        if isinstance(field.value, Message):
            inner = _inner(field.value)
            yield field, field.value, inner.string("type") if inner else ""


def _inner(message: Message) -> Message | None:
    field = message.last("layer")
    return field.value if field and isinstance(field.value, Message) else None


def _v0_to_v1(editor: _Editor) -> Iterator[str]:
    """``layers { layer { } }`` as V1 ``layers``, padding layers folded into what they pad."""
    document, root = editor.document, editor.root
    if not is_v0(document):
        return
    layers = list(_v0_layers(document))
    folded = _fold_padding(document, layers)
    dropped: list[str] = []
    blocks: dict[tuple[int, int], list[Node]] = {}
    for index, (field, message, kind) in enumerate(layers):
        made = blocks.setdefault((field.start, field.end), [])
        if kind != _PADDING:
            made.append(_v1_layer(document, field, message, folded.get(index), dropped))
    for field, _, _ in layers:
        nodes = blocks.pop((field.start, field.end), None)
        if nodes:
            one_line = "\n" not in document.text[field.start : field.end]
            new = " ".join(n.inline() for n in nodes) if one_line else editor.fitted(field, nodes)
            editor.put(field.start, field.end, new)
        elif nodes is not None:
            editor.remove(field)
    for field in root.fields:
        if field.name not in _V0_NET and _is_known("NetParameter", field.name):
            editor.remove(field)
            dropped.append(f'dropped "{field.name}" of the net, as Caffe does')
    pads = sum(kind == _PADDING for _, _, kind in layers)
    tail = f", {_count(pads, 'padding layer')} folded" if pads else ""
    yield f"V0 -> V1: {_count(len(layers) - pads, 'layer')}{tail}"
    yield from dropped


def _is_known(message: str, field: str) -> bool:
    """Whether a field is one of BVLC's."""
    known = field in schema.descriptor(message).fields_by_name
    return known and schema.fork_of(message, field) is None


@dataclass(frozen=True)
class _Pad:
    """What a layer gets from the padding layer below it."""

    pad: str
    bottom: str


def _fold_padding(document: Document, layers: Sequence[tuple[Field, Message, str]]) -> dict[int, _Pad]:
    """By index of its consumer, each padding layer; raises NetError where Caffe cannot fold it."""
    written: dict[str, int | None] = dict.fromkeys(document.root.strings("input"))
    folded: dict[int, _Pad] = {}
    for index, (field, message, kind) in enumerate(layers):
        bottoms = message.strings("bottom")
        inner = _inner(message)
        try:
            for blob in bottoms:
                if blob not in written:
                    raise NetError(f'bottom "{blob}" is written by no layer above')
                source = written[blob]
                if source is not None and layers[source][2] == _PADDING:
                    folded[index] = _pad(layers[source][1], kind, len(bottoms))
        except NetError as error:
            name = inner.string("name") if inner else ""
            raise error.at(line=document.line(field.start), layer=name) from None
        written.update(dict.fromkeys(message.strings("top"), index))
    return folded


def _pad(padding: Message, kind: str, bottoms: int) -> _Pad:
    if kind not in ("conv", "pool"):
        raise NetError(f'a padding layer is read by a layer of type "{kind}"; only conv and pool can take it')
    if bottoms != 1:
        raise NetError(f"a padding layer is read by a layer of {bottoms} bottoms; Caffe folds it into one")
    below, above = padding.strings("bottom"), padding.strings("top")
    if len(below) != 1 or len(above) != 1:
        raise NetError(
            f"its padding layer has {len(below)} bottoms and {len(above)} tops; Caffe takes one each"
        )
    inner = _inner(padding)
    return _Pad(inner.string("pad", "0") if inner else "0", below[0])


def _v1_layer(
    document: Document, field: Field, message: Message, pad: _Pad | None, dropped: list[str]
) -> Node:
    """One V0 block as a V1 block."""
    outer = _nodes(document, message)
    late = [node for node in outer if not _is_known("V1LayerParameter", node.name)]
    lost = [node.name for node in outer if node.name not in ("bottom", "top", "layer") and node not in late]
    bottoms = [node for node in outer if node.name == "bottom"]
    tops = [node for node in outer if node.name == "top"]
    if pad is not None:
        bottoms = [replace(bottoms[0], value=quote(pad.bottom))]
    made: list[Node] = []
    comments: tuple[str, ...] = ()
    name, inner = "", _inner(message)
    for node in outer:
        if inner is not None and node.name == "layer" and isinstance(node.value, tuple):
            kind, name = inner.string("type"), inner.string("name")
            if inner.last("type") and kind not in _V0_TYPES:
                line = document.line(field.start)
                raise NetError(f'unknown V0 layer type "{kind}"', line=line, layer=name)
            comments = (*node.above, *filter(None, [node.behind]))
            made = _sorted_out(_padded(node.value, pad), kind, late, lost)
    dropped += [f'dropped {one} of "{name}", as Caffe does' for one in lost]
    first = [node for node in made if node.name in ("name", "type")]
    rest = [node for node in made if node.name not in ("name", "type")]
    parts = _with_above([*first, *bottoms, *tops, *rest, *late], comments)
    return Node("layers", tuple(parts), behind=" ".join(_head(document, message)))


def _padded(nodes: Sequence[Node], pad: _Pad | None) -> Sequence[Node]:
    """The fields of a layer with the pad of its padding layer, in place of its own or before its fillers."""
    if pad is None:
        return nodes
    kept = [node for node in nodes if node.name != "pad"]
    place = next((i for i, node in enumerate(kept) if not isinstance(node.value, str)), len(kept))
    return [*kept[:place], Node("pad", pad.pad), *kept[place:]]


def _sorted_out(nodes: Sequence[Node], kind: str, late: list[Node], lost: list[str]) -> list[Node]:
    """The fields of an inner block where V1 has them; those it does not know and those on a wrong type apart."""
    made: list[Node] = []
    blocks: dict[str, list[Node]] = {}
    for node in nodes:
        name, types = _V0_FIELDS.get(node.name, ("", ()))
        if node.name == "type":
            made.append(replace(node, value=_V0_TYPES[kind]))
        elif node.name in ("name", "blobs", "blobs_lr", "weight_decay"):
            made.append(node)
        elif kind in types:
            blocks.setdefault(_V0_BLOCKS[kind], []).append(replace(node, name=name))
        elif node.name in _V0_TRANSFORMS:
            moved = replace(node, name=_V0_TRANSFORMS[node.name])
            blocks.setdefault("transform_param", []).append(moved)
        elif node.name == "hdf5_output_param" and kind == "hdf5_output":
            made.append(node)
        elif _is_known("V0LayerParameter", node.name):
            lost.append(node.name)
        else:
            late.append(node)
    return [*made, *(Node(name, tuple(inside)) for name, inside in blocks.items())]


def _nodes(document: Document, message: Message) -> list[Node]:
    """The fields of a message as nodes, with their comments."""
    above: list[str] = []
    made: list[Node] = []
    position, previous = message.start, None
    for field in message.fields:
        if field.start >= position:
            gap = document.text[position : field.start]
            behind, above = _comments(gap, previous)
            made[-1:] = [replace(node, behind=behind) for node in made[-1:]]
        value = field.value
        if isinstance(value, Scalar):
            made.append(Node(field.name, value.text, tuple(above)))
        else:
            inside = _with_above(_nodes(document, value), _head(document, value))
            made.append(Node(field.name, tuple(inside), tuple(above)))
        above, position, previous = [], field.end, field
    behind, left = _comments(document.text[position : message.end], previous)
    return [
        *made[:-1],
        *(replace(node, behind=" ".join(filter(None, (behind, *left)))) for node in made[-1:]),
    ]


def _comments(gap: str, previous: Field | None) -> tuple[str, list[str]]:
    """The comment on the line of the field before a gap, and those on lines of their own."""
    first, newline, rest = gap.partition("\n")
    if previous is None:
        return "", _COMMENT.findall(rest) if newline else []
    return " ".join(_COMMENT.findall(first)), _COMMENT.findall(rest)


def _head(document: Document, message: Message) -> tuple[str, ...]:
    """The comment behind the opening brace of a block."""
    first = document.text[message.start : message.end].partition("\n")[0]
    return tuple(_COMMENT.findall(first)) if first.lstrip(" \t").startswith("#") else ()


def _with_above(nodes: Sequence[Node], comments: Iterable[str]) -> list[Node]:
    """Nodes with comments put above the first of them."""
    return [*(replace(node, above=(*comments, *node.above)) for node in nodes[:1]), *nodes[1:]]


# --- V1 to V2 -------------------------------------------------------------------------------------


def _data_transform(editor: _Editor) -> Iterator[str]:
    """scale, mean_file, crop_size and mirror of the data layers into transform_param."""
    changed = 0
    for _, message in editor.layers("layers"):
        block = TRANSFORMED.get(v1_type(message.string("type")))
        found = message.last(block) if block else None
        if found is None or not isinstance(found.value, Message):
            continue
        moved = [field for field in found.value.fields if field.name in TRANSFORMS]
        if moved:
            changed += 1
            _move_transforms(editor, message, found, moved)
    if changed:
        yield f"data fields -> transform_param: {_count(changed, 'layer')}"


def _move_transforms(editor: _Editor, message: Message, block: Field, moved: Sequence[Field]) -> None:
    inside = tuple(node for field in moved for node in editor.scalars([field], field.name))
    target = message.last("transform_param")
    for field in moved:
        editor.remove(field)
    if target is not None and isinstance(target.value, Message):
        for node in inside:
            editor.set(target.value, node.name, [str(node.value)])
        return
    editor.add(message, [editor.fitted(block, [Node("transform_param", inside)])], (block.name,))


def _v1_to_v2(editor: _Editor) -> Iterator[str]:
    """``layers`` as ``layer``: types as strings, settings of learnt blobs as ``param`` blocks."""
    refuse_mixed(editor.document)
    layers = list(editor.layers("layers"))
    for field, message in layers:
        editor.put(field.start, field.start + len("layers"), "layer")
        for kind in message.all("type"):
            if isinstance(kind.value, Scalar):
                name = v1_type(kind.value.text)
                editor.put(kind.value.start, kind.value.end, quote(name))
        _param_blocks(editor, message)
    if layers:
        yield f"V1 -> V2: {_count(len(layers), 'layer')}"


def _param_blocks(editor: _Editor, message: Message) -> None:
    """``param`` blocks in the place of the lists of names, share modes and multipliers."""
    fields = [f for f in message.fields if f.name in _V1_SPECS and isinstance(f.value, Scalar)]
    specs: list[list[Node]] = []
    for name, new in _V1_SPECS.items():
        for i, node in enumerate(editor.scalars([field for field in fields if field.name == name], new)):
            specs += [[] for _ in range(i + 1 - len(specs))]
            specs[i].append(node)
    if fields:
        editor.exchange(fields, [Node("param", tuple(spec)) for spec in specs])


# --- V2 -------------------------------------------------------------------------------------------


def _input_layer(editor: _Editor) -> Iterator[str]:
    """``input`` with ``input_shape`` or ``input_dim`` as an Input layer above all others."""
    root = editor.root
    names = [field for field in root.all("input") if isinstance(field.value, Scalar)]
    if not names:
        return
    fields = [field for field in root.fields if field.name in _INPUTS]
    shapes = _shapes(editor, names)
    layers = list(root.all("layer"))
    if shapes is None:
        for field in fields:
            editor.remove(field)
        yield "input without a shape: dropped, as Caffe does"
        return
    tops = editor.scalars(names, "top")
    kind = [Node("name", '"input"'), Node("type", '"Input"'), *tops, Node("input_param", shapes)]
    node = Node("layer", tuple(kind))
    if not layers or fields[0].start < layers[0].start:
        editor.exchange(fields, [node])
    else:
        editor.insert(layers[0], node)
        for field in fields:
            editor.remove(field)
    yield f"input -> Input layer: {_count(len(names), 'top')}"


def _shapes(editor: _Editor, names: Sequence[Field]) -> tuple[Node, ...] | None:
    """A ``shape`` for each input, from ``input_shape`` or else four ``input_dim``; None where neither is."""
    document, root = editor.document, editor.root
    shapes = list(root.messages("input_shape"))
    dims = [field for field in root.all("input_dim") if isinstance(field.value, Scalar)]
    wanted = len(names) if shapes else 4 * len(names)
    if not shapes and not dims:
        return None
    if len(shapes or dims) < wanted:
        what = "input_shape" if shapes else "input_dim"
        raise NetError(
            f"{_count(len(names), 'input')} need {wanted} {what}, the file has {len(shapes or dims)}",
            line=document.line(names[0].start),
        )
    if shapes:
        return tuple(Node("shape", tuple(_nodes(document, shape))) for shape in shapes[: len(names)])
    nodes = editor.scalars(dims, "dim")
    return tuple(Node("shape", tuple(nodes[i : i + 4])) for i in range(0, wanted, 4))


def _batch_norm(editor: _Editor) -> Iterator[str]:
    """No learning of the statistics of a BatchNorm layer that has three ``param``."""
    changed = 0
    for _, message in editor.layers("layer"):
        specs = list(message.messages("param"))
        if message.string("type") != "BatchNorm" or len(specs) != _BATCH_NORM_PARAMS:
            continue
        wrong = [
            spec for spec in specs if not all(_is_zero(spec, name) for name in ("lr_mult", "decay_mult"))
        ]
        for spec in wrong:
            editor.set(spec, "lr_mult", ["0"])
            editor.set(spec, "decay_mult", ["0"], ("lr_mult",))
        changed += bool(wrong)
    if changed:
        yield f"BatchNorm param -> lr_mult and decay_mult 0: {_count(changed, 'layer')}"


def _is_zero(spec: Message, name: str) -> bool:
    try:
        return float(spec.string(name).rstrip("fF")) == 0
    except ValueError:
        return False


def _solver_type(editor: _Editor) -> Iterator[str]:
    """``solver_type: ADAM`` as ``type: "Adam"``."""
    root, document = editor.root, editor.document
    old = root.last("solver_type")
    if old is None:
        return
    line = document.line(old.start)
    if root.last("type"):
        raise NetError("solver_type and type are both given; Caffe takes one", line=line)
    kind = _enumerator(root.string("solver_type"), "SolverParameter.SolverType")
    if kind not in SOLVER_TYPES:
        raise NetError(f'there is no solver_type "{kind}"', line=line, hint=", ".join(SOLVER_TYPES))
    new = f"type: {quote(SOLVER_TYPES[kind])}"
    editor.put(old.start, old.end, new)
    yield f"solver_type -> {new}"
