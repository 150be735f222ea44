"""Forks' forms of Convolution and InnerProduct: depthwise under a name of its own, and weights under a mask."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import NetError, ShapeError
from . import conv, dense
from .channels import Channels
from .emit import Emitter
from .spec import LayerSpec, Request, Shapes, fork_fields, text

_CONVOLUTION = conv.SPECS["Convolution"]


def _per_channel(p: conv.ConvParams, bottoms: Shapes) -> conv.ConvParams:
    """One filter a channel, whatever num_output and group say."""
    if len(bottoms[0]) != 4:
        raise ShapeError(f"ConvolutionDepthwise needs a bottom of 4 axes, found {text(bottoms[0])}")
    channels = bottoms[0][1]
    return replace(p, num_output=channels, group=channels, axis=1)


def _checked(p: conv.ConvParams, bottoms: Shapes) -> conv.ConvParams:
    """The settings themselves, which the layer's two forms, CPU and GPU, read alike only where all three agree."""
    channels = bottoms[0][1] if len(bottoms[0]) == 4 else 0
    if not channels == p.group == p.num_output or p.axis != 1:
        raise ShapeError(
            f"DepthwiseConvolution with num_output {p.num_output} and group {p.group} on {text(bottoms[0])}: "
            "num_output and group must be the number of channels"
        )
    return p


def _depthwise(settle: Any, tops: tuple[int, int | None]) -> LayerSpec:
    """Convolution with the settings that ``settle`` makes of those written."""

    def onnx(e: Emitter, p: conv.ConvParams) -> None:
        assert _CONVOLUTION.onnx is not None
        _CONVOLUTION.onnx(e, settle(p, e.in_shapes))

    return replace(
        _CONVOLUTION,
        infer=lambda p, bottoms: _CONVOLUTION.infer(settle(p, bottoms), bottoms),
        blobs=lambda p, bottoms: _CONVOLUTION.blobs(settle(p, bottoms), bottoms),
        macs=lambda p, bottoms, made: _CONVOLUTION.macs(settle(p, bottoms), bottoms, made),
        channels=lambda c, p: _CONVOLUTION.channels(c, settle(p, c.in_shapes)),
        onnx=onnx,
        bottoms=tops,
        tops=tops,
        understood=frozenset(),
    )


@dataclass(frozen=True)
class MaskedParams:
    """The layer's own settings, and whether the bias has a mask too (Dynamic Network Surgery)."""

    inner: Any
    bias_mask: bool


_PRUNING = ("is_pruning", "upper_bound", "inter_iter")
_SURGERY = ("gamma", "power", "c_rate", "bias_mask_filler")


def _masked(base: LayerSpec, block: str) -> LayerSpec:
    """``base`` with weights times a mask that is stored behind them."""

    def params(request: Request) -> MaskedParams:
        p = request[block]
        pruning, surgery = ([name for name in names if name in p] for names in (_PRUNING, _SURGERY))
        if pruning and surgery:
            raise NetError(f"{pruning[0]} and {surgery[0]} are fields of two forks", line=p.line(surgery[0]))
        inner = base.params(request)
        if not pruning and not inner.bias:
            raise NetError("Dynamic Network Surgery masks no layer without a bias", line=p.line())
        return MaskedParams(inner, not pruning)

    def blobs(p: MaskedParams, bottoms: Shapes) -> Shapes:
        plain = base.blobs(p.inner, bottoms)
        return plain + (plain if p.bias_mask else plain[:1])

    def channels(c: Channels, p: MaskedParams) -> None:
        base.channels(c, p.inner)
        count = 1 + p.inner.bias
        masked = count if p.bias_mask else 1
        c.cuts += [replace(cut, blob=cut.blob + count, zero=False) for cut in c.cuts if cut.blob < masked]

    def onnx(e: Emitter, p: MaskedParams) -> None:
        assert base.onnx is not None
        count = 1 + p.inner.bias
        masks = e.blobs[count:]
        masked = tuple(blob * mask for blob, mask in zip(e.blobs, masks, strict=False))
        base.onnx(replace(e, blobs=masked + e.blobs[len(masks) : count]), p.inner)

    return replace(
        base,
        params=params,
        infer=lambda p, bottoms: base.infer(p.inner, bottoms),
        blobs=blobs,
        macs=lambda p, bottoms, tops: base.macs(p.inner, bottoms, tops),
        channels=channels,
        onnx=onnx,
        understood=fork_fields(block),
    )


SPECS = {
    "DepthwiseConvolution": _depthwise(_checked, (1, None)),
    "ConvolutionDepthwise": _depthwise(_per_channel, (1, 1)),
    "CConvolution": _masked(_CONVOLUTION, "cconvolution_param"),
    "CInnerProduct": _masked(dense.SPECS["InnerProduct"], "cinner_product_param"),
}
