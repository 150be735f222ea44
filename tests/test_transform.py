"""From a picture to a net's input: against plain loops, and against what OpenCV gives."""

from __future__ import annotations

from pathlib import Path

import image_files
import numpy as np
import pytest

from caffe_proto import net
from caffe_proto.data.build import mean_bytes
from caffe_proto.data.pictures import decode, encode, load, resize
from caffe_proto.data.transform import Settings, Transform, for_net
from caffe_proto.errors import Error, FileError, NetError, ShapeError, UnsupportedError, UsageError

IMAGE = image_files.pictures(1, 9, 7)[0].astype(np.float32)


def plain(
    image: np.ndarray, top: int, left: int, crop: int, mirror: bool, mean: np.ndarray, scale: float
) -> np.ndarray:
    """The DataTransformer as it is defined: element by element, a mean (C, H, W) read where the image is."""
    made = np.zeros((len(image), crop, crop), np.float32)
    for c in range(len(image)):
        for h in range(crop):
            for w in range(crop):
                value = np.float32(image[c, top + h, left + w]) - np.float32(mean[c, top + h, left + w])
                made[c, h, crop - 1 - w if mirror else w] = value * np.float32(scale)
    return made


def test_centre_crop_mean_image_scale() -> None:
    mean = image_files.pictures(1, 9, 7, seed=1)[0].astype(np.float32)
    transform = Transform(crop=(4, 4), mirror=True, mean=mean, scale=0.5)
    assert np.array_equal(transform(IMAGE), plain(IMAGE, 2, 1, 4, False, mean, 0.5))


def test_training_crops_and_mirrors_at_random() -> None:
    mean = image_files.pictures(1, 9, 7, seed=1)[0].astype(np.float32)
    transform = Transform(crop=(4, 4), mirror=True, mean=mean, train=True)
    wanted = {
        plain(IMAGE, top, left, 4, mirror, mean, 1).tobytes(): (top, left, mirror)
        for top in range(6)
        for left in range(4)
        for mirror in (False, True)
    }
    random = np.random.default_rng(0)
    made = [transform(IMAGE, random=random).tobytes() for _ in range(600)]
    assert {wanted[one] for one in made} == set(wanted.values())


@pytest.mark.parametrize("values", [[10.0], [10.0, 20.0, 30.0]])
def test_mean_values(values: list[float]) -> None:
    mean = np.array(values, np.float32)
    assert np.array_equal(Transform(mean=mean)(IMAGE), IMAGE - mean.reshape(-1, 1, 1))


def test_channels_are_swapped_before_the_mean() -> None:
    mean = np.array([1.0, 2.0, 3.0], np.float32)
    made = Transform(mean=mean, order="rgb")(IMAGE, "bgr")
    assert np.array_equal(made, IMAGE[::-1] - mean.reshape(3, 1, 1))
    assert np.array_equal(Transform(order="bgr")(IMAGE, "bgr"), IMAGE)
    assert np.array_equal(Transform(order="rgb")(IMAGE[:1], "bgr"), IMAGE[:1])


def test_a_mean_larger_than_a_ready_image_is_cropped_at_its_centre() -> None:
    mean = image_files.pictures(1, 11, 9)[0].astype(np.float32)
    assert np.array_equal(Transform(mean=mean)(IMAGE), IMAGE - mean[:, 1:10, 1:8])


@pytest.mark.parametrize(
    ("transform", "kind", "says"),
    [
        (Transform(crop=(10, 4)), ShapeError, "is 3 x 9 x 7, smaller than the crop 10 x 4"),
        (
            Transform(crop=(4, 4), mean=np.zeros((3, 8, 8), np.float32)),
            ShapeError,
            "the mean image 3 x 8 x 8",
        ),
        (Transform(mean=np.zeros((3, 4, 4), np.float32)), UsageError, "smaller than the input"),
        (Transform(mean=np.zeros(2, np.float32)), UsageError, "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused(transform: Transform, kind: type[Error], says: str) -> None:
    with pytest.raises(kind, match=says):
        transform(IMAGE)


# What a net says


def _net(transform: str, more: str = "", phase: str = "TEST", path: Path | None = None) -> net.Net:
    text = f'layer {{ name: "d" type: "Data" top: "data" transform_param {{ {transform} }} {more} }}'
    return net.parse(text, path, net.NetState(phase))


def test_the_net_says_it(tmp_path: Path) -> None:
    mean = image_files.pictures(1)[0].astype(np.float32)
    (tmp_path / "mean.binaryproto").write_bytes(mean_bytes(mean))
    text = 'crop_size: 4 mirror: true scale: 0.25 force_gray: true mean_file: "mean.binaryproto"'
    made = for_net(_net(text, phase="TRAIN", path=tmp_path / "net.prototxt"))
    assert (made.crop, made.mirror, made.scale, made.color, made.train) == ((4, 4), True, 0.25, False, True)
    assert made.mean is not None and np.array_equal(made.mean, mean)


def test_options_go_over_the_net() -> None:
    said = _net('crop_size: 4 scale: 0.25 mean_file: "nowhere"')
    made = for_net(said, Settings("1,2,3", 2.0, (5, 6), (8, 9), "rgb"), (1, 3, 7, 7))
    assert (made.crop, made.scale, made.resize, made.order) == ((5, 6), 2.0, (8, 9), "rgb")
    assert made.mean is not None and made.mean.tolist() == [1, 2, 3]


def test_the_input_says_crop_and_gray_where_nothing_else_does() -> None:
    bare = net.parse('layer { name: "x" type: "ReLU" }')
    made = for_net(bare, None, (1, 1, 28, 20))
    assert (made.crop, made.color, made.mean, made.scale) == ((28, 20), False, None, 1.0)
    assert for_net(bare).crop is None


def test_image_data_resizes() -> None:
    text = "new_height: 256 new_width: 300 is_color: false"
    made = for_net(net.parse(f'layer {{ name: "d" type: "ImageData" image_data_param {{ {text} }} }}'))
    assert (made.resize, made.color) == ((256, 300), False)


def test_old_nets_say_it_in_their_data_block() -> None:
    text = 'layers { name: "d" type: DATA data_param { scale: 0.5 crop_size: 3 mirror: true } }'
    made = for_net(net.parse(text))
    assert (made.scale, made.crop, made.mirror) == (0.5, (3, 3), True)


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ('mean_file: "a" mean_value: 1', NetError, "both mean_file and mean_value"),
        ("force_color: true force_gray: true", NetError, "both force_color and force_gray"),
        ("crop_h: 3", UnsupportedError, "field of the ssd fork"),
        ("scale: 1 scale: 2", NetError, "given twice"),
        (
            'mean_file: "gone.binaryproto"',
            FileError,
            'net.prototxt:1: there is no mean file "gone.binaryproto"; put it there, beside the net or where you are',
        ),
    ],
)
def test_what_caffe_refuses(text: str, kind: type[Error], says: str) -> None:
    with pytest.raises(kind, match=says):
        for_net(_net(text, path=Path("net.prototxt")))


def test_one_of_new_height_and_new_width_is_refused() -> None:
    with pytest.raises(NetError, match="go together"):
        for_net(net.parse('layer { name: "d" type: "ImageData" image_data_param { new_height: 2 } }'))


# Resizing and decoding: the numbers are what OpenCV 4.14 and 5.0 give

ODD = ((np.arange(15) * 37 + 11) % 256).astype(np.uint8).reshape(1, 5, 3)
COLOURED = ((np.arange(36) * 53 + 7) % 256).astype(np.uint8).reshape(3, 4, 3).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((4, 4), [[25, 48, 76, 99], [164, 127, 118, 142], [142, 105, 97, 120], [185, 208, 152, 35]]),
        ((7, 2), [[20, 76], [83, 139], [145, 145], [178, 42], [120, 121], [145, 118], [208, 72]]),
        ((2, 8), [[94, 96, 110, 124, 138, 152, 166, 168], [116, 118, 132, 146, 147, 137, 127, 126]]),
    ],
)
def test_resize_is_that_of_opencv(size: tuple[int, int], wanted: list[list[int]]) -> None:
    made = resize(ODD, size)
    assert made.dtype == np.uint8 and made[0].tolist() == wanted
    assert np.abs(resize(ODD.astype(np.float32), size)[0] - np.array(wanted)).max() < 1


def test_resize_of_floats_is_bilinear() -> None:
    image = np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32)
    made = resize(image, (9, 4))
    for h in range(9):
        for w in range(4):
            y, x = (np.clip([(h + 0.5) * 6 / 9 - 0.5, (w + 0.5) * 2 - 0.5], 0, [5, 7])).tolist()
            t, left = min(int(y), 4), min(int(x), 6)
            cell = image[:, t : t + 2, left : left + 2].astype(np.float64)
            rows = cell[:, 0] * (1 - y + t) + cell[:, 1] * (y - t)
            assert made[:, h, w] == pytest.approx(
                rows[:, 0] * (1 - x + left) + rows[:, 1] * (x - left), abs=1e-5
            )
    assert resize(image, (6, 8)) is image


@pytest.mark.parametrize(
    ("suffix", "wanted"),
    [
        ("png", [[69, 152, 131, 63], [193, 96, 179, 158], [90, 144, 123, 55]]),
        ("bmp", [[70, 152, 132, 64], [194, 97, 179, 159], [91, 144, 124, 56]]),
    ],
)
def test_gray_is_that_of_opencv(suffix: str, wanted: list[list[int]]) -> None:
    data = encode(COLOURED, suffix)
    assert decode(data, False)[0].tolist() == wanted
    assert np.array_equal(decode(data), COLOURED)


def test_decoding_drops_alpha_and_keeps_the_upper_bits(tmp_path: Path) -> None:
    from PIL import Image

    rgb = np.ascontiguousarray(COLOURED[::-1].transpose(1, 2, 0))
    Image.fromarray(np.dstack([rgb, rgb[:, :, 0]])).save(tmp_path / "alpha.png")
    assert np.array_equal(load(tmp_path / "alpha.png"), COLOURED)
    deep = (np.arange(12).reshape(3, 4) * 5003).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(load(tmp_path / "deep.png", False), (deep >> 8)[None])
    assert load(tmp_path / "deep.png").shape == (3, 3, 4)


def test_orientation_is_applied_unless_the_image_is_wanted_as_it_is(tmp_path: Path) -> None:
    from PIL import Image

    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise by a quarter
    rgb = np.ascontiguousarray(COLOURED[::-1].transpose(1, 2, 0))
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=turned)
    assert np.array_equal(load(tmp_path / "turned.png"), np.rot90(COLOURED, -1, (1, 2)))
    assert np.array_equal(load(tmp_path / "turned.png", None), COLOURED)


def test_as_it_is_keeps_gray_gray() -> None:
    assert decode(encode(ODD, "png"), None).shape == ODD.shape
    assert decode(encode(ODD, "png"), True).shape == (3, 5, 3)
    assert decode(encode(COLOURED, "jpg"), None).shape == COLOURED.shape


def test_no_such_encoding() -> None:
    with pytest.raises(UsageError, match='no image encoding "xyz"'):
        encode(ODD, "xyz")
