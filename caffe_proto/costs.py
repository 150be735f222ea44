"""What a net costs: multiply-accumulates, parameters and activations by layer. One MAC is one multiply and one add."""

from __future__ import annotations

from dataclasses import dataclass

from .layers.spec import Shape, Shapes, size
from .shape_inference import Shaped


@dataclass(frozen=True)
class LayerCost:
    """One row: shapes, stored blobs, parameters (0 where another layer owns them), MACs of the whole batch."""

    name: str
    type: str
    tops: tuple[tuple[str, Shape | None], ...]
    blobs: Shapes
    params: int
    macs: int
    known: bool


@dataclass(frozen=True)
class Cost:
    """All rows in net order, and their totals."""

    layers: tuple[LayerCost, ...]

    @property
    def macs(self) -> int:
        """MACs of one forward pass at the net's own batch size."""
        return sum(layer.macs for layer in self.layers)

    @property
    def params(self) -> int:
        """Stored numbers, shared ones counted once; BatchNorm's statistics are among them."""
        return sum(layer.params for layer in self.layers)

    @property
    def conv_macs(self) -> int:
        """MACs of the convolutions alone."""
        return sum(layer.macs for layer in self.layers if layer.type == "Convolution")

    @property
    def by_layer(self) -> dict[str, LayerCost]:
        """Rows by layer name."""
        return {layer.name: layer for layer in self.layers}


def cost(shaped: Shaped) -> Cost:
    """Count every layer of a graph whose shapes are known; layers without shapes count nothing and say so."""
    owners: set[str] = set()
    return Cost(
        tuple(
            _row(shaped, index, owners)
            for index, node in enumerate(shaped.graph.nodes)
            if node.layer.bottoms or node.layer.tops
        )
    )


def _row(shaped: Shaped, index: int, owners: set[str]) -> LayerCost:
    node = shaped.graph.nodes[index]
    if index in shaped.unknown or node.spec is None:
        tops = tuple((name, None) for name in node.layer.tops)
        return LayerCost(node.name, node.layer.type, tops, (), 0, 0, False)
    bottoms, tops_ = shaped.bottoms(index), shaped.tops(index)
    blobs = shaped.blobs(index)
    return LayerCost(
        node.name,
        node.layer.type,
        tuple(zip(node.layer.tops, tops_, strict=True)),
        blobs,
        sum(size(blob) for i, blob in enumerate(blobs) if _owns(node.layer.param_specs, i, owners)),
        node.spec.macs(node.params, bottoms, tops_),
        True,
    )


def _owns(specs: tuple, index: int, owners: set[str]) -> bool:  # type: ignore[type-arg]
    """Whether a blob is the first of its shared name, or not shared at all."""
    name = specs[index].name if index < len(specs) else ""
    if not name:
        return True
    first = name not in owners
    owners.add(name)
    return first
