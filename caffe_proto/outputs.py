"""A net with another num_output in some of its layers, everything else as it was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from .net import Net
from .text import Edit, Field, Message, parse, splice


def with_outputs(net: Net, outputs: Mapping[str, int]) -> Net:
    """The net with these num_output by layer name, in every phase; layers that it lacks are left out."""
    if not outputs:
        return net
    root = net.document.root
    edits = [
        Edit(field.start - root.start, field.end - root.start, f"num_output: {outputs[layer.name]}")
        for layer in net.all_layers
        if layer.name in outputs
        for field in _num_outputs(layer.message)
    ]
    source = splice(net.text[root.start : root.end], edits)
    return replace(net, document=parse(source, net.path))


def _num_outputs(message: Message) -> Iterator[Field]:
    """The num_output fields of a layer's own blocks, or of the layer itself in V0."""
    for field in message.fields:
        if field.name == "num_output":
            yield field
        elif isinstance(field.value, Message):
            yield from _num_outputs(field.value)
