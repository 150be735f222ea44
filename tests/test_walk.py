"""Walking two nets over images: what is gathered at a place is what the layer reads there, wherever it is kept."""

from __future__ import annotations

from pathlib import Path

import nets
import numpy as np
import pytest

from caffe_proto import binding
from caffe_proto.errors import FileError
from caffe_proto.graph import Value, build
from caffe_proto.runtime import Engine
from caffe_proto.segments import Segments
from caffe_proto.shape_inference import infer
from caffe_proto.walk import Stack, Store, advance, batches
from lra import jobs
from lra.decomposition import Decomposition, Geometry, Shape, Step
from lra.responses import Job
from lra.schemes import cross_filter, spatial
from lra.targets import Target
from lra.walk import Chain, Places, Window, patches

# (out, in/group, kh, kw), geometry, input (h, w)
CASES = [
    ((8, 3, 3, 3), Geometry(pad=(1, 1)), (7, 9)),
    ((8, 3, 3, 5), Geometry((2, 3), (1, 2), (1, 1), 1), (11, 14)),
    ((6, 2, 5, 3), Geometry((1, 2), (2, 3), (2, 1), 2), (13, 9)),
    ((6, 4, 1, 3), Geometry((2, 1), (1, 0), (3, 2), 3), (6, 9)),
    ((12, 2, 3, 3), Geometry((1, 1), (2, 2), (2, 2), 4), (8, 8)),
    ((4, 5, 1, 1), Geometry(), (3, 2)),
]


def reads(maps: np.ndarray, image: int, row: int, column: int, window: Window) -> np.ndarray:
    """What a convolution reads for one place of its output, tap by tap: (c, kh, kw)."""
    seen = np.zeros((maps.shape[1], *window.kernel), np.float32)
    for a in range(window.kernel[0]):
        for b in range(window.kernel[1]):
            y = row * window.stride[0] - window.pad[0] + a * window.dilation[0]
            x = column * window.stride[1] - window.pad[1] + b * window.dilation[1]
            if 0 <= y < maps.shape[2] and 0 <= x < maps.shape[3]:
                seen[:, a, b] = maps[image, :, y, x]
    return seen


def output_size(hw: tuple[int, int], window: Window) -> tuple[int, int]:
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(hw, window.kernel, window.stride, window.pad, window.dilation, strict=True)
    ]
    return size[0], size[1]


def everywhere(n: int, hw: tuple[int, int]) -> Places:
    """All places of n maps."""
    return Places.draw(np.random.default_rng(0), n, hw, hw[0] * hw[1])


def window_of(shape: Shape, g: Geometry | Step) -> Window:
    return Window((shape[2], shape[3]), g.stride, g.pad, g.dilation)


def layer(shape: Shape, g: Geometry, hw: tuple[int, int]) -> tuple[Target, np.ndarray, np.ndarray]:
    """A layer, its weight, and maps in front of it."""
    rng = np.random.default_rng(1)
    maps = rng.standard_normal((3, shape[1] * g.group, *hw)).astype(np.float32)
    target = Target("layer", 1, False, False, shape, g, hw, 1, "")
    return target, rng.standard_normal(shape), maps


@pytest.mark.parametrize(("shape", "g", "hw"), CASES)
def test_patches_are_what_the_convolution_reads(shape: Shape, g: Geometry, hw: tuple[int, int]) -> None:
    """Against taps taken one by one, and, group by group times the weight, against the convolution itself."""
    _, weight, maps = layer(shape, g, hw)
    window = window_of(shape, g)
    size = output_size(hw, window)
    places = everywhere(3, size)
    found = patches(maps, places, window)
    spots = zip(places.images, places.rows, places.columns, strict=True)
    np.testing.assert_array_equal(found, [reads(maps, *spot, window) for spot in spots])
    parts = zip(np.split(found, g.group, axis=1), np.split(weight, g.group), strict=True)
    made = np.concatenate([np.tensordot(x, w, axes=((1, 2, 3), (1, 2, 3))) for x, w in parts], axis=1)
    whole = Chain([Step("", weight, None, g.stride, g.pad, g.dilation, g.group)], Engine(1), maps.shape)
    np.testing.assert_allclose(places.take(whole(maps)), made, rtol=1e-4, atol=1e-4)


def jobs_of(target: Target, weight: np.ndarray) -> list[tuple[str, Job]]:
    """A pair whose second step is free, one where a map stands in for it, and the whole layer."""
    g = target.geometry
    whole = Step("", weight, None, g.stride, g.pad, g.dilation, g.group)
    passing = jobs._identity(target)
    made = []
    for name, spectrum in (
        ("spatial", spatial.spectrum(weight, g)),
        ("pca", cross_filter.pca_spectrum(weight, g)),
    ):
        pair = spectrum.factor(2 * g.group if spectrum.max_rank >= 2 * g.group else g.group)
        made += [(name, jobs.pair_job(target, pair)), (f"{name} map", job(target, pair.steps, passing))]
    return [*made, ("whole", job(target, (), whole)), ("whole map", job(target, (whole,), passing))]


def job(target: Target, first: tuple[Step, ...], free: Step) -> Job:
    return Job(target, first, free, None, lambda _mapping: Decomposition((*first, free)))


@pytest.mark.parametrize(("shape", "g", "hw"), CASES)
def test_what_the_free_step_sees_is_what_the_steps_before_it_make(
    shape: Shape, g: Geometry, hw: tuple[int, int]
) -> None:
    """At every place, borders included: the first steps run over whole maps, then the free one's own window."""
    target, weight, maps = layer(shape, g, hw)
    for name, one in jobs_of(target, weight):
        between = Chain(one.first, Engine(1), maps.shape)(maps) if one.first else maps
        window = window_of(one.free.shape, one.free)
        places = everywhere(3, output_size(between.shape[2:], window))  # type: ignore[arg-type]
        assert len(places) == 3 * np.prod(output_size(hw, one.window))
        spots = zip(places.images, places.rows, places.columns, strict=True)
        expected = np.stack([reads(between, *spot, window) for spot in spots])
        found = one.sees(patches(maps, places, one.window))
        flat = expected.reshape(*expected.shape[:2], -1)
        np.testing.assert_allclose(found, flat, rtol=1e-4, atol=1e-4, err_msg=name)


def test_a_chain_is_its_steps_one_after_another() -> None:
    """Two steps with biases, by definition: the second reads zeros, not the first one's bias, outside the map."""
    rng = np.random.default_rng(2)
    first = Step("_v", rng.standard_normal((4, 3, 3, 1)), rng.standard_normal(4), (2, 1), (1, 0), (1, 1), 1)
    second = Step("_h", rng.standard_normal((6, 2, 1, 3)), rng.standard_normal(6), (1, 2), (0, 2), (1, 2), 2)
    maps = rng.standard_normal((2, 3, 7, 8)).astype(np.float32)
    expected = maps
    for step in (first, second):
        window = window_of(step.shape, step)
        size = output_size(expected.shape[2:], window)  # type: ignore[arg-type]
        made = np.empty((2, len(step.weight), *size), np.float32)
        assert step.bias is not None
        for image, row, column in np.ndindex(2, *size):
            parts = np.split(reads(expected, image, row, column, window), step.group)
            kernels = np.split(step.weight, step.group)
            sums = [np.tensordot(w, x, axes=3) for x, w in zip(parts, kernels, strict=True)]
            made[image, :, row, column] = np.concatenate(sums) + step.bias
        expected = made
    np.testing.assert_allclose(
        Chain([first, second], Engine(1), maps.shape)(maps), expected, rtol=1e-4, atol=1e-4
    )


def test_places_count_from_where_they_are_told() -> None:
    maps = np.arange(5 * 2 * 3 * 4, dtype=np.float32).reshape(5, 2, 3, 4)
    places = Places.draw(np.random.default_rng(3), 5, (3, 4), 6)
    whole = places.take(maps)
    for i, (image, row, column) in enumerate(zip(places.images, places.rows, places.columns, strict=True)):
        np.testing.assert_array_equal(whole[i], maps[image, :, row, column])
    here, which = places.within(2, 4)
    np.testing.assert_array_equal(here.take(maps[2:4], 2), whole[which])
    np.testing.assert_array_equal(here.since(2).take(maps[2:4]), whole[which])
    assert len(here) == 12 and set(here.images) == {2, 3}


@pytest.mark.parametrize(("n", "size"), [(1, 1), (7, 3), (8, 4), (5, 5), (6, 4)])
def test_batches_are_full_and_leave_nothing_out(n: int, size: int) -> None:
    found = list(batches(n, size))
    assert all(stop - start == size for start, stop in found)
    assert {image for start, stop in found for image in range(start, stop)} == set(range(n))
    assert len(found) == -(-n // size)


NET = (
    nets.inputs(data=(4, 3, 9, 8))
    + """
layer { name: "a" type: "Convolution" bottom: "data" top: "a" convolution_param { num_output: 5 kernel_size: 3 pad: 1 } }
layer { name: "ra" type: "ReLU" bottom: "a" top: "a" }
layer { name: "b" type: "Convolution" bottom: "a" top: "b" convolution_param { num_output: 5 kernel_size: 3 pad: 1 } }
layer { name: "sum" type: "Eltwise" bottom: "a" bottom: "b" top: "sum" }
layer { name: "c" type: "Convolution" bottom: "sum" top: "c" convolution_param { num_output: 6 kernel_size: 3 } }
layer { name: "side" type: "Convolution" bottom: "data" top: "side" convolution_param { num_output: 2 kernel_size: 1 } }
"""
)
N = 7  # images, in batches of 4


def parts() -> Segments:
    model = nets.model(NET)
    shaped = infer(build(model.net))
    return Segments(shaped, binding.bind(shaped, model.weights), Engine(1))  # type: ignore[arg-type]


PARTS = parts()
NODES = {node.name: index for index, node in enumerate(PARTS.graph.nodes)}
X = np.random.default_rng(4).standard_normal((N, 3, 9, 8)).astype(np.float32)


def expected(value: Value) -> np.ndarray:
    """A value for all images, computed at once."""
    (source,) = PARTS.graph.sources
    made = np.empty((N, *PARTS.shaped.shapes[value][1:]), np.float32)
    for start, stop in batches(N, 4):
        made[start:stop] = PARTS.run({source: X[start:stop]}, [value])[value]
    return made


def store_of_images(folder: Path, memory: int) -> Store:
    store = Store(folder, N, memory)
    (stack,) = store.new([X.shape])
    stack.write(0, X)
    store.put(PARTS.graph.sources[0], stack)
    return store


GOALS = [PARTS.graph.nodes[NODES["c"]].inputs[0]]  # so that "side" is not needed


def check(store: Store, *names: str) -> None:
    """Exactly the values of these nodes are stored, and rightly so."""
    assert {PARTS.graph.nodes[value.node].name for value in store.values} == set(names)
    for value in store.values:
        for start, stop in ((0, 4), (3, 7), (6, 7)):
            np.testing.assert_allclose(
                store.read(start, stop)[value], expected(value)[start:stop], rtol=1e-5, atol=1e-5
            )


SIZE = 4 * X.size  # bytes of the images; every other value takes 5/3 of it


@pytest.mark.parametrize("memory", [0, 2 * SIZE, 2**30])
def test_memory_and_files_hold_the_same(tmp_path: Path, memory: int) -> None:
    store = store_of_images(tmp_path, memory)
    assert (tmp_path / "1.f32").exists() is (memory == 0)
    for name, stored in (("a", ["a"]), ("ra", ["ra"]), ("b", ["ra", "b"]), ("sum", ["sum"])):
        advance(PARTS, store, 4, NODES[name], GOALS)
        check(store, *stored)
    store.sweep()
    on_disk = {path.name for path in tmp_path.iterdir()}
    assert len(on_disk) == (0 if memory == 2**30 else 1)
    store.close()


def test_what_stands_in_for_a_layer_is_read_by_what_follows(tmp_path: Path) -> None:
    store = store_of_images(tmp_path, 2**30)
    advance(PARTS, store, 4, NODES["ra"], GOALS)
    b = Value(NODES["b"], 0)

    def produce(given: dict[Value, np.ndarray]) -> dict[Value, np.ndarray]:
        return given | {b: 10 * given[Value(NODES["ra"], 0)]}

    advance(PARTS, store, 4, NODES["sum"], GOALS, produce)
    a = expected(Value(NODES["ra"], 0))
    np.testing.assert_allclose(store[GOALS[0]].read(0, N), 11 * a, rtol=1e-5)


@pytest.mark.parametrize("memory", [0, 2 * SIZE, 2**30])
def test_after_an_interruption_it_stands_where_it_was_noted(tmp_path: Path, memory: int) -> None:
    store = store_of_images(tmp_path, memory)
    advance(PARTS, store, 4, NODES["b"], GOALS)
    noted = store.note()
    store.sweep()
    advance(PARTS, store, 4, NODES["sum"], GOALS)  # not noted any more
    store.close()
    again = Store(tmp_path, N, memory)
    again.restore(noted)
    check(again, "ra", "b")
    advance(PARTS, again, 4, NODES["sum"], GOALS)
    check(again, "sum")
    again.note()
    again.sweep()
    again.close()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_is_too_short(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "1.f32", (3, 2, 2), in_memory=False)
    stack.write(0, np.ones((3, 2, 2), np.float32))
    stack.close()
    (tmp_path / "1.f32").write_bytes(b"\0" * 40)
    again = Stack(tmp_path / "1.f32", (3, 2, 2), in_memory=False)
    assert not again.read(0, 2).any()
    with pytest.raises(FileError, match=r"1\.f32: ends too early.*without --resume"):
        again.read(1, 3)
    (tmp_path / "1.f32").unlink()
    with pytest.raises(FileError, match=r"1\.f32: ends too early"):
        Stack(tmp_path / "1.f32", (3, 2, 2), in_memory=False).read(0, 1)
