"""Embed, BatchReindex, Filter, Parameter, Im2col, HDF5Output and MemoryData on numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from layer_nets import Array, macs, model, run, run_open_batch, shapes, text

from caffe_proto.errors import NetError
from caffe_proto.runtime import session

RNG = np.random.default_rng(8)
EMBED = "embed_param { num_output: 2 input_dim: 3 }"


def test_embed_looks_rows_up() -> None:
    weight, bias = [[1, 2], [3, 4], [5, 6]], [10, 20]
    (top,) = run("Embed", EMBED, [weight, bias], x=[[2, 0]])
    assert top.tolist() == [[[15, 26], [11, 22]]]
    (plain,) = run("Embed", EMBED.replace("}", "bias_term: false }"), [weight], x=[1.9])
    assert plain.tolist() == [[3, 4]]


def test_embed_multiplies_nothing() -> None:
    assert macs(text("Embed", EMBED, x=(7,))) == 0


def test_batch_reindex_takes_items_in_any_order() -> None:
    (top,) = run("BatchReindex", x=[[1, 2], [3, 4], [5, 6]], y=[2, 0, 0, 1])
    assert top.tolist() == [[5, 6], [1, 2], [1, 2], [3, 4]]


@pytest.mark.parametrize("selector", [[0, 1, -0.5], [[0], [1], [-0.5]]])
def test_filter_keeps_the_items_that_are_chosen(selector: list[object]) -> None:
    first, second = run("Filter", "", (), 2, x=[[1, 2], [3, 4], [5, 6]], y=[7, 8, 9], z=selector)
    assert first.tolist() == [[3, 4], [5, 6]]
    assert second.tolist() == [8, 9]


def test_filter_may_keep_nothing() -> None:
    (top,) = run("Filter", x=[[1, 2], [3, 4]], y=[0, 0])
    assert top.shape == (0, 2)


def test_filter_is_set_up_as_if_all_items_stayed() -> None:
    assert shapes(text("Filter", "", 2, x=(4, 3, 2), y=(4,), z=(4, 1, 1)))["t0"] == (4, 3, 2)


def test_parameter_is_its_blob() -> None:
    with session(
        model(text("Parameter", "parameter_param { shape { dim: 2 dim: 1 } }"), [[[4], [5]]])
    ) as opened:
        assert opened.run({})["t0"].tolist() == [[4], [5]]


@pytest.mark.parametrize(
    ("settings", "kernel", "stride", "pad", "dilation"),
    [
        ("kernel_size: 2", (2, 2), (1, 1), (0, 0), (1, 1)),
        ("kernel_h: 3 kernel_w: 2 stride_h: 2 stride_w: 1 pad_h: 1 pad_w: 0", (3, 2), (2, 1), (1, 0), (1, 1)),
        ("kernel_size: 2 stride: 2 pad: 2 dilation: 3 dilation: 1", (2, 2), (2, 2), (2, 2), (3, 1)),
    ],
)
def test_im2col_puts_windows_into_channels(
    settings: str,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    x = RNG.standard_normal((2, 3, 5, 6)).astype(np.float32)
    (top,) = run("Im2col", f"convolution_param {{ {settings} }}", x=x)
    padded = np.pad(x, ((0, 0), (0, 0), (pad[0], pad[0]), (pad[1], pad[1])))
    for n, channel, h, w in np.ndindex(*top.shape):
        c, i, j = np.unravel_index(channel, (3, *kernel))
        row, column = h * stride[0] + i * dilation[0], w * stride[1] + j * dilation[1]
        assert top[n, channel, h, w] == padded[n, c, row, column]


def test_im2col_along_one_and_three_axes() -> None:
    (top,) = run("Im2col", "convolution_param { kernel_size: 2 }", x=[[[1, 2, 3]]])
    assert top.tolist() == [[[1, 2], [2, 3]]]
    assert shapes(text("Im2col", "convolution_param { kernel_size: 2 }", x=(1, 2, 3, 3, 3)))["t0"] == (
        1,
        16,
        2,
        2,
        2,
    )
    (inner,) = run("Im2col", "convolution_param { kernel_size: 2 axis: 0 }", x=[[1, 2, 3]])
    assert inner.tolist() == [[1, 2], [2, 3]]


def test_im2col_copies_what_is_not_finite() -> None:
    (top,) = run("Im2col", "convolution_param { kernel_size: 1 }", x=[[[[np.inf, 1]]]])
    assert top.tolist() == [[[[np.inf, 1]]]]


def test_hdf5_output_is_a_sink() -> None:
    settings = 'hdf5_output_param { file_name: "out.h5" }'
    assert set(shapes(text("HDF5Output", settings, 0, x=(2, 3), y=(2,)))) == {"x", "y"}


MEMORY = "memory_data_param { batch_size: 2 channels: 1 height: 3 width: 4 }"


def test_memory_data_gives_its_label_four_axes() -> None:
    assert shapes(text("MemoryData", MEMORY, 2)) == {"t0": (2, 1, 3, 4), "t1": (2, 1, 1, 1)}


@pytest.mark.parametrize(
    ("kind", "settings", "tops", "bottoms", "cause"),
    [
        ("Embed", "embed_param { input_dim: 3 }", 1, [(2,)], "num_output"),
        ("Embed", "embed_param { num_output: 3 }", 1, [(2,)], "input_dim"),
        ("BatchReindex", "", 1, [(2, 3), (2, 1)], "1 axis"),
        ("Filter", "", 1, [(2, 3), (2,), (2,)], "makes one top"),
        ("Filter", "", 1, [(2, 3), (2, 2)], "one number"),
        ("Filter", "", 1, [(2, 3), (3,)], "first axis"),
        ("Parameter", "parameter_param { shape { dim: -1 } }", 1, [], "dimension"),
        ("Im2col", "", 1, [(1, 2, 3, 3)], "kernel_size"),
        ("Im2col", "convolution_param { kernel_size: 0 }", 1, [(1, 2, 3, 3)], "kernel size"),
        ("Im2col", "convolution_param { kernel_size: 2 stride: 0 }", 1, [(1, 2, 3, 3)], "stride"),
        ("Im2col", "convolution_param { kernel_size: 2 kernel_h: 2 }", 1, [(1, 2, 3, 3)], "both given"),
        ("Im2col", "convolution_param { kernel_h: 2 kernel_w: 2 }", 1, [(1, 2, 3)], "two spatial axes"),
        ("Im2col", "convolution_param { kernel_size: 2 }", 1, [(1, 2)], "no spatial axis"),
        ("Im2col", "convolution_param { kernel_size: 4 }", 1, [(1, 2, 3, 3)], "does not fit"),
        ("HDF5Output", "", 0, [(2,), (2,)], "file_name"),
        ("HDF5Output", 'hdf5_output_param { file_name: "a" }', 0, [(2,), (3,)], "first axis"),
        ("MemoryData", MEMORY, 1, [], "1 top"),
        ("MemoryData", "", 2, [], "batch_size"),
    ],
)
def test_refusals(kind: str, settings: str, tops: int, bottoms: list[tuple[int, ...]], cause: str) -> None:
    with pytest.raises(NetError, match=cause):
        shapes(text(kind, settings, tops, **{f"x{i}": shape for i, shape in enumerate(bottoms)}))


@pytest.mark.parametrize(
    ("kind", "settings", "feeds"),
    [
        ("Embed", EMBED, {"x": [0, 2, 1]}),
        ("BatchReindex", "", {"x": [[1], [2], [3]], "y": [2, 2, 0]}),
        ("Filter", "", {"x": [[1], [2], [3]], "y": [1, 0, 1]}),
        ("Im2col", "convolution_param { kernel_size: 2 }", {"x": RNG.standard_normal((3, 2, 3, 3))}),
    ],
)
def test_an_open_batch_gives_what_a_fixed_one_gives(
    kind: str, settings: str, feeds: dict[str, Array]
) -> None:
    blobs: list[Array] = [np.arange(6).reshape(3, 2), [0, 1]] if kind == "Embed" else []
    smaller = {name: (2, *np.asarray(array).shape[1:]) for name, array in feeds.items()}
    open_ = run_open_batch(text(kind, settings, **smaller), feeds, blobs)
    (fixed,) = run(kind, settings, blobs, **feeds)
    assert np.array_equal(open_["t0"], fixed)
