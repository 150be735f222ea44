"""Every kind of source, the batches made of them, and the LMDBs that are built."""

from __future__ import annotations

import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import h5py
import image_files
import lmdb
import numpy as np
import pytest
from helpers import SHARED, message, needs_shared

from caffe_proto.data import Source, open_source
from caffe_proto.data.batches import Batches
from caffe_proto.data.build import ImageSet, datum, image_mean, new_folder, write_lmdb
from caffe_proto.data.folders import ImageFiles
from caffe_proto.data.pictures import encode, resize
from caffe_proto.data.transform import Transform
from caffe_proto.errors import Error, FileError, ShapeError, UsageError
from caffe_proto.preprocess import read_mean
from lra.cli import main

Capture = pytest.CaptureFixture[str]
IMAGES = image_files.pictures(3)
LABELS = np.array([4, 0, 7])


def check(source: Source, images: np.ndarray, labels: Any = LABELS) -> None:
    """The source gives these images as float32, by index, from the end and in order."""
    with source:
        assert len(source) == len(images) and source.labelled == (labels is not None)
        for i, sample in enumerate(source):
            assert sample.image.dtype == np.float32 and np.array_equal(sample.image, images[i])
            assert sample.label == (None if labels is None else labels[i])
        assert np.array_equal(source[-1].image, images[-1])
        with pytest.raises(IndexError):
            source[len(images)]


def refused(src: Path | str, says: str, kind: type[Error] = FileError, **options: Any) -> None:
    """Opening a source, or reading all of it, ends with one line that says this."""
    with pytest.raises(kind) as caught, open_source(src, **options) as source:
        list(source)
    assert says in str(caught.value) and "\n" not in str(caught.value)


# Image files


def test_class_folders(tmp_path: Path) -> None:
    for i, name in enumerate(("cat/b.PNG", "cat/c.png", "dog/a.bmp")):
        image_files.save(tmp_path / name, IMAGES[i])
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    source = open_source(tmp_path)
    assert [sample.name for sample in source] == ["cat/b.PNG", "cat/c.png", "dog/a.bmp"]
    assert source.order == "bgr"
    check(source, IMAGES, [0, 0, 1])


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for i, image in enumerate(IMAGES):
        image_files.save(tmp_path / "images" / f"{i}.png", image)
    check(open_source(tmp_path / "images"), IMAGES, None)
    check(open_source(tmp_path), IMAGES, None)  # nor has a folder of one class


def test_resized_and_gray(tmp_path: Path) -> None:
    image_files.save(tmp_path / "a.png", IMAGES[0])
    assert np.array_equal(open_source(tmp_path, resize=(4, 9))[0].image, resize(IMAGES[0], (4, 9)))
    assert open_source(tmp_path, color=False)[0].image.shape == (1, 6, 5)


def test_jpeg(tmp_path: Path) -> None:
    flat = np.full((3, 16, 16), 0, np.uint8) + np.array([10, 120, 240], np.uint8)[:, None, None]
    image_files.save(tmp_path / "a.jpg", flat, quality=100)
    assert np.abs(open_source(tmp_path)[0].image - flat).max() <= 2
    luma = 0.114 * 10 + 0.587 * 120 + 0.299 * 240
    assert np.abs(open_source(tmp_path, color=False)[0].image - luma).max() <= 2


def test_list_file(tmp_path: Path) -> None:
    path = image_files.listed(tmp_path, IMAGES)
    check(open_source(path), IMAGES, [2, 3, 4])
    check(open_source(path, root=str(tmp_path)), IMAGES, [2, 3, 4])
    path.write_text("/pics/a 0.png\t5\n\n\n")
    check(open_source(path, root=str(tmp_path)), IMAGES[:1], [5])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pics/a 0.png 1\npics/x.png\n", "list.txt:2: is no image path and label"),
        ("pics/a 0.png 1\n\npics/a 1.png 1\n", "list.txt:2: is empty"),
        ("pics/a 0.png -1\n", "list.txt:1: is no image path and label"),
        ("pics/a 0.png 1\npics/gone.png 1\n", 'list.txt:2: image "pics/gone.png": no such file'),
        ("pics/bad.png 1\n", 'list.txt:1: image "pics/bad.png": is no image that can be read'),
        (
            "pics/note.png 1\n",
            'list.txt:1: image "pics/note.png": is no image that can be read: of no known format',
        ),
        ("", "list.txt: is empty"),
    ],
)
def test_list_files_are_refused_by_line(tmp_path: Path, text: str, says: str) -> None:
    path = image_files.listed(tmp_path, IMAGES)
    whole = (tmp_path / "pics" / "a 0.png").read_bytes()
    (tmp_path / "pics" / "bad.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "pics" / "note.png").write_text("not a picture")
    path.write_text(text)
    refused(path, says)


def test_folders_that_are_no_data_set(tmp_path: Path) -> None:
    refused(tmp_path, "holds no images; give a folder of class folders")
    image_files.save(tmp_path / "a" / "x.png", IMAGES[0])
    (tmp_path / "b").mkdir()
    refused(tmp_path, f"{tmp_path / 'b'}: holds no images, and is a class")
    image_files.save(tmp_path / "x.png", IMAGES[0])
    refused(tmp_path, 'holds images beside the class folder "a"')


def test_what_is_no_source(tmp_path: Path) -> None:
    refused(tmp_path / "gone", "gone: no such file")
    refused(tmp_path / "*.bin", "no file has a name of that pattern")
    (tmp_path / "x").write_bytes(b"\x00\x01\x02 nothing known")
    refused(tmp_path / "x", "is no kind of images that is known")
    (tmp_path / "y.gz").write_bytes(b"\x1f\x8b broken")
    refused(tmp_path / "y.gz", "is no kind of images that is known")
    np.savez(tmp_path / "z.npz", x=IMAGES)
    refused(tmp_path / "z.npz", "a root goes with a list file", UsageError, root="x")


# Arrays


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=IMAGES.astype(np.float64) / 4, y=LABELS.astype(np.float32))
    check(open_source(path), IMAGES.astype(np.float32) / 4)
    np.savez_compressed(path, x=IMAGES[:, 0])
    check(open_source(path), IMAGES[:, :1], None)
    check(open_source(path, resize=(3, 3)), np.stack([resize(one, (3, 3)) for one in IMAGES[:, :1]]), None)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": IMAGES}, "has no array x; it has images"),
        ({"x": IMAGES[0, 0]}, "holds images of 1 axes"),
        ({"x": IMAGES[:0]}, "holds no images"),
        ({"x": IMAGES.astype(str)}, "numbers are needed"),
        ({"x": IMAGES, "y": LABELS[:2]}, "one an image is needed"),
        ({"x": IMAGES, "y": LABELS - 1}, "no whole numbers from 0 up"),
        ({"x": IMAGES, "y": LABELS + 0.5}, "no whole numbers from 0 up"),
    ],
)
def test_npz_refused(tmp_path: Path, arrays: dict[str, np.ndarray], says: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    refused(tmp_path / "a.npz", says)


def test_npz_truncated(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=IMAGES)
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    refused(tmp_path / "a.npz", "is no NumPy file")


@pytest.mark.parametrize(("zipped", "labels"), [("", ""), (".gz", ".gz"), (".gz", ""), ("", ".gz")])
def test_idx(tmp_path: Path, zipped: str, labels: str) -> None:
    path = image_files.idx(tmp_path / f"t10k-images-idx3-ubyte{zipped}", IMAGES[:, 0])
    check(open_source(path), IMAGES[:, :1], None)
    image_files.idx(tmp_path / f"t10k-labels-idx1-ubyte{labels}", LABELS.astype(np.uint8))
    check(open_source(path), IMAGES[:, :1])


def test_idx_refused(tmp_path: Path) -> None:
    path = image_files.idx(tmp_path / "x-images.idx3-ubyte", IMAGES[:, 0])
    labels = image_files.idx(tmp_path / "x-labels.idx1-ubyte", LABELS[:2].astype(np.uint8))
    refused(path, "has 2 labels")
    refused(labels, "is no idx file of bytes with 3 axes")
    refused(tmp_path, "name one of its files: x-images.idx3-ubyte, x-labels.idx1-ubyte")
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "holds 89 bytes for 3 x 6 x 5: it is truncated")


SMALL = image_files.pictures(4, 32, 32)
SMALL_LABELS = np.array([3, 9, 0, 1])


def test_cifar_binaries(tmp_path: Path) -> None:
    path = image_files.cifar(tmp_path / "test_batch.bin", SMALL, SMALL_LABELS)
    check(open_source(path), SMALL, SMALL_LABELS)
    assert open_source(path).order == "rgb"
    path = image_files.cifar(tmp_path / "c100.bin", SMALL, SMALL_LABELS, SMALL_LABELS * 11)
    check(open_source(path), SMALL, SMALL_LABELS * 11)


def test_cifar_folder_and_pattern(tmp_path: Path) -> None:
    for i in (0, 1):
        image_files.cifar(tmp_path / f"data_batch_{i + 1}.bin", SMALL[2 * i :][:2], SMALL_LABELS[2 * i :][:2])
    check(open_source(tmp_path), SMALL, SMALL_LABELS)
    image_files.cifar(tmp_path / "test_batch.bin", SMALL[:1], SMALL_LABELS[:1])
    refused(tmp_path, "batches for training and for testing")
    source = open_source(tmp_path / "data_batch_*")
    check(source, SMALL, SMALL_LABELS)
    assert source.place(3) == (str(tmp_path / "data_batch_2.bin"), None)
    (tmp_path / "data_batch_3").write_text("nothing")
    refused(tmp_path / "data_batch_*", "is neither HDF5 nor .npz nor a batch of CIFAR")


@pytest.mark.parametrize("keys", [("data", "labels"), ("data", "fine_labels")])
def test_cifar_python_batches(tmp_path: Path, keys: tuple[str, str]) -> None:
    flat = {keys[0].encode(): SMALL.reshape(4, -1), keys[1].encode(): SMALL_LABELS.tolist()}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(flat, protocol=2))
    check(open_source(tmp_path / "data_batch_1"), SMALL, SMALL_LABELS)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil()}, protocol=2))
    refused(tmp_path / "data_batch_1", "is no python batch of CIFAR: it asks for posix.mkdir")
    assert not (tmp_path / "made").exists()


def test_hdf5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, part in (("a.h5", slice(0, 2)), ("b.h5", slice(2, 3))):
        with h5py.File(tmp_path / name, "w") as file:
            file["data"] = IMAGES[part].astype(np.float32)
            file["label"] = LABELS[part].astype(np.float32)[:, None]
    check(open_source(tmp_path / "a.h5"), IMAGES[:2])
    (tmp_path / "list.txt").write_text("a.h5\nb.h5\n")
    check(open_source(tmp_path / "list.txt"), IMAGES)
    (tmp_path / "list.txt").write_text("a.h5\nc.h5\n")
    refused(tmp_path / "list.txt", 'list.txt:2: no such file "c.h5"')
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = IMAGES
    refused(tmp_path / "a.h5", 'has no dataset "data" of images (N, C, H, W); it has images')
    (tmp_path / "a.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:100])
    refused(tmp_path / "a.h5", "is no HDF5 file that can be read")


# LMDB


def _lmdb(path: Path, *datums: bytes) -> Path:
    path.mkdir()
    write_lmdb(path, ((f"{i:08}", one) for i, one in enumerate(datums)))
    return path


def _datum(**fields: Any) -> bytes:
    made = message("Datum", b"")
    for name, value in fields.items():
        getattr(made, name).extend(value) if name == "float_data" else setattr(made, name, value)
    return bytes(made.SerializeToString())


def test_lmdb_of_raw_encoded_and_float_images(tmp_path: Path) -> None:
    floats = IMAGES[2].astype(np.float32) / 8
    path = _lmdb(
        tmp_path / "db",
        datum(IMAGES[0], 4),
        _datum(data=encode(IMAGES[1], "png"), label=0, encoded=True),
        _datum(channels=3, height=6, width=5, float_data=floats.ravel().tolist(), label=7),
    )
    check(open_source(path), np.stack([IMAGES[0], IMAGES[1], floats]))
    check(open_source(path / "data.mdb"), np.stack([IMAGES[0], IMAGES[1], floats]))
    with open_source(path, color=False) as source:
        assert [sample.image.shape[0] for sample in source] == [3, 1, 3]


def test_lmdb_keeps_gray_images_gray_unless_forced(tmp_path: Path) -> None:
    path = _lmdb(tmp_path / "db", _datum(data=encode(IMAGES[0][:1], "png"), encoded=True))
    check(open_source(path), IMAGES[:1, :1], None)
    check(open_source(path, color=True), IMAGES[:1, :1].repeat(3, 1), None)


def test_lmdb_refused(tmp_path: Path) -> None:
    refused(_lmdb(tmp_path / "none"), "is an empty LMDB")
    refused(
        _lmdb(tmp_path / "short", _datum(channels=3, height=6, width=5, data=b"x")),
        "holds 1 numbers for 3 x 6 x 5",
    )
    refused(_lmdb(tmp_path / "bad", b"\xff\xff"), 'record "00000000" is no Datum')
    refused(_lmdb(tmp_path / "code", _datum(data=b"x", encoded=True)), 'record "00000000" is no image')
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "data.mdb").write_bytes(b"\0" * 16 + b"\xde\xc0\xef\xbe" + b"\0" * 100)
    refused(tmp_path / "torn", "is no LMDB that can be read")


# Batches


class Counting(Source):
    """Images numbered by their pixels; counts those that were read and not yet asked for."""

    def __init__(self, n: int, bad: frozenset[int] = frozenset()) -> None:
        super().__init__("counting")
        self.n, self.bad = n, bad
        self.reads = 0
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return self.n

    @property
    def labelled(self) -> bool:
        return True

    def read(self, index: int) -> Any:
        from caffe_proto.data import Sample

        with self.lock:
            self.reads += 1
        if index in self.bad:
            raise FileError(f"image {index} is broken")
        return Sample(str(index), np.full((1, 2, 2), index, np.uint8), index)


def test_batches_come_in_order_and_memory_is_bounded() -> None:
    source = Counting(100)
    batches = Batches(source, size=8, workers=3)
    assert (len(batches), batches.n_images) == (13, 100)
    taken = 0
    for batch in batches:
        taken += len(batch.images)
        assert source.reads <= taken + 2 * 8
        assert batch.images[:, 0, 0, 0].tolist() == [float(name) for name in batch.names]
        assert batch.labels is not None and batch.labels.tolist() == [int(name) for name in batch.names]
    assert taken == 100
    sizes = [len(batch.images) for batch in batches]
    assert sizes == [8] * 12 + [4]


def test_a_reader_that_stops_early_leaves_no_thread() -> None:
    before = threading.active_count()
    for _ in Batches(Counting(100), size=4, workers=2):
        break
    assert threading.active_count() == before


def test_subset_is_seeded_sorted_and_without_doubles() -> None:
    def names(seed: int, n: int = 10) -> list[str]:
        return [
            name for batch in Batches(Counting(50), size=4, n_images=n, seed=seed) for name in batch.names
        ]

    assert names(1) == names(1) != names(2)
    assert len(set(names(1))) == 10 and names(1) == sorted(names(1), key=int)
    assert names(1, 99) == [str(i) for i in range(50)]


def test_training_is_random_by_seed_and_index_whatever_the_threads() -> None:
    class Wide(Counting):
        def read(self, index: int) -> Any:
            return super().read(index)._replace(image=IMAGES[index % 3])

    def made(seed: int, workers: int) -> np.ndarray:
        transform = Transform(crop=(3, 3), mirror=True, train=True)
        return np.concatenate([b.images for b in Batches(Wide(20), transform, 6, seed=seed, workers=workers)])

    assert np.array_equal(made(-1, 1), made(-1, 4))
    assert not np.array_equal(made(1, 1), made(2, 1))


def test_bad_images_are_an_error_or_left_out_and_named() -> None:
    source = Counting(10, frozenset({2, 7}))
    with pytest.raises(FileError, match="counting: image 2 is broken"):
        list(Batches(source, size=4))
    batches = Batches(source, size=4, skip_bad=True)
    assert [batch.names for batch in batches] == [tuple("0134"), tuple("5689")]
    assert [str(error) for error in batches.skipped] == [f"counting: image {i} is broken" for i in (2, 7)]


def test_images_of_other_sizes_are_refused_by_name(tmp_path: Path) -> None:
    path = image_files.listed(tmp_path, IMAGES)
    image_files.save(tmp_path / "pics" / "a 1.png", image_files.pictures(1, 9, 9)[0])
    with pytest.raises(ShapeError, match=r'list.txt:2: image "pics/a 1.png" is 3 x 9 x 9 where 3 x 6 x 5'):
        list(Batches(open_source(path)))
    with pytest.raises(
        ShapeError, match=r'list.txt:1: image "pics/a 0.png" is 3 x 6 x 5, smaller than the crop 9 x 9'
    ):
        list(Batches(open_source(path), Transform(crop=(9, 9))))
    with pytest.raises(ShapeError, match="where 1 x 6 x 5 is wanted"):
        list(Batches(open_source(path), shape=(1, 6, 5)))


# Building


def records(path: Path) -> dict[bytes, bytes]:
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as reading:
        return dict(reading.cursor())


def ok(capsys: Capture, *arguments: str) -> Any:
    capsys.readouterr()
    code = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return json.loads(out)


def fails(capsys: Capture, folder: Path, *arguments: str) -> str:
    """The one line of a refusal; nothing may be left in the folder."""
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 2
    assert sorted(folder.rglob("*")) == before
    return capsys.readouterr().err


def test_build_mnist(tmp_path: Path, capsys: Capture) -> None:
    images = image_files.idx(tmp_path / "i.gz", IMAGES[:, 0])
    labels = image_files.idx(tmp_path / "l", LABELS.astype(np.uint8))
    out = tmp_path / "db"
    made = ok(capsys, "data", "mnist", str(images), str(labels), "-o", str(out))
    assert made["records"] == {str(out): 3}
    stored = records(out)
    assert list(stored) == [b"00000000", b"00000001", b"00000002"]
    head = bytes([0x08, 1, 0x10, 6, 0x18, 5, 0x22, 30])
    assert stored[b"00000002"] == head + IMAGES[2, 0].tobytes() + bytes([0x28, 7])
    check(open_source(out), IMAGES[:, :1])
    assert "exists already" in fails(
        capsys, tmp_path, "data", "mnist", str(images), str(labels), "-o", str(out)
    )
    short = image_files.idx(tmp_path / "s", LABELS[:2].astype(np.uint8))
    new = str(tmp_path / "new")
    assert "has 2 labels" in fails(capsys, tmp_path, "data", "mnist", str(images), str(short), "-o", new)
    gone = str(tmp_path / "gone" / "db")
    assert "cannot be written" in fails(
        capsys, tmp_path, "data", "mnist", str(images), str(labels), "-o", gone
    )


def test_build_cifar(tmp_path: Path, capsys: Capture) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i in (0, 1):
        image_files.cifar(folder / f"data_batch_{i + 1}.bin", SMALL[2 * i :][:2], SMALL_LABELS[2 * i :][:2])
    image_files.cifar(folder / "test_batch.bin", SMALL[:1], SMALL_LABELS[:1])
    made = ok(capsys, "data", "cifar10", str(folder), "-o", str(out))
    assert made["records"] == {"cifar10_train_lmdb": 4, "cifar10_test_lmdb": 1}
    stored = records(out / "cifar10_train_lmdb")
    assert list(stored) == [b"00000", b"00001", b"00002", b"00003"]
    head = bytes([0x08, 3, 0x10, 32, 0x18, 32, 0x22, 0x80, 0x18])
    assert stored[b"00001"] == head + SMALL[1].tobytes() + bytes([0x28, 9])
    check(open_source(out / "cifar10_test_lmdb"), SMALL[:1], SMALL_LABELS[:1])
    mean = read_mean(str(out / "mean.binaryproto"))
    assert np.array_equal(mean, SMALL.astype(np.float32).sum(0) / np.float32(4))
    (tmp_path / "empty").mkdir()
    new = str(tmp_path / "new")
    assert "no batches of CIFAR-10" in fails(
        capsys, tmp_path, "data", "cifar10", str(tmp_path / "empty"), "-o", new
    )
    assert "no such folder" in fails(capsys, tmp_path, "data", "cifar10", str(tmp_path / "gone"), "-o", new)


def test_build_images(tmp_path: Path, capsys: Capture) -> None:
    path, out = image_files.listed(tmp_path, IMAGES), tmp_path / "db"
    ok(capsys, "data", "images", str(path), "-o", str(out))
    stored = records(out)
    assert list(stored) == [f"{i:08}_pics/a {i}.png".encode() for i in range(3)]
    head = bytes([0x08, 3, 0x10, 6, 0x18, 5, 0x22, 90])
    assert stored[b"00000001_pics/a 1.png"] == head + IMAGES[1].tobytes() + bytes([0x28, 3, 0x38, 0])
    check(open_source(out), IMAGES, [2, 3, 4])


def test_build_images_shuffled_resized_gray(tmp_path: Path, capsys: Capture) -> None:
    path = image_files.listed(tmp_path, image_files.pictures(20))
    names = []
    for run in ("a", "b"):
        out = tmp_path / run
        ok(
            capsys,
            "data",
            "images",
            str(path),
            "-o",
            str(out),
            "--shuffle",
            "--seed",
            "3",
            "--resize",
            "8x4",
            "--gray",
        )
        names.append(list(records(out)))
    assert names[0] == names[1]
    assert [name[:9] for name in names[0]] == [f"{i:08}_".encode() for i in range(20)]
    assert [name[9:] for name in names[0]] != [f"pics/a {i}.png".encode() for i in range(20)]
    with open_source(tmp_path / "a") as made, open_source(path, resize=(8, 4), color=False) as source:
        wanted = {sample.name: sample for sample in source}
        for sample in made:
            assert np.array_equal(sample.image, wanted[sample.name[9:]].image)
            assert sample.label == wanted[sample.name[9:]].label


def test_build_images_encoded(tmp_path: Path, capsys: Capture) -> None:
    path = image_files.listed(tmp_path, IMAGES)
    ok(capsys, "data", "images", str(path), "-o", str(tmp_path / "as"), "--encoded")
    file = (tmp_path / "pics" / "a 1.png").read_bytes()
    stored = message("Datum", records(tmp_path / "as")[b"00000001_pics/a 1.png"])
    assert (stored.data, stored.label, stored.encoded) == (file, 3, True)
    assert not any(stored.HasField(name) for name in ("channels", "height", "width"))
    ok(capsys, "data", "images", str(path), "-o", str(tmp_path / "small"), "--encoded", "--resize", "3")
    check(open_source(tmp_path / "small"), np.stack([resize(one, (3, 3)) for one in IMAGES]), [2, 3, 4])
    ok(capsys, "data", "images", str(path), "-o", str(tmp_path / "jpg"), "--encode-type", "JPEG")
    assert all(b"JFIF" in one for one in records(tmp_path / "jpg").values())


def test_build_images_refused_or_skipped(tmp_path: Path, capsys: Capture) -> None:
    path, new = image_files.listed(tmp_path, IMAGES), str(tmp_path / "new")
    image_files.save(tmp_path / "pics" / "a 1.png", image_files.pictures(1, 9, 9)[0])
    (tmp_path / "pics" / "a 2.png").write_bytes(b"broken")
    command = ("data", "images", str(path), "-o", new)
    assert 'list.txt:3: image "pics/a 2.png": is no image' in fails(capsys, tmp_path, *command)
    line = fails(capsys, tmp_path, *command, "--check-size", "--skip-bad")
    assert 'list.txt:2: image "pics/a 1.png" has 243 bytes, "pics/a 0.png" 90' in line
    assert 'no image encoding "tga"' in fails(
        capsys, tmp_path, *command, "--encode-type", "tga", "--skip-bad"
    )
    made = ok(capsys, *command, "--skip-bad")
    assert made["records"] == {new: 2}
    assert len(made["skipped"]) == 1 and made["skipped"][0].startswith(f'{path}:3: image "pics/a 2.png"')
    assert main([*command[:-1], str(tmp_path / "again"), "--skip-bad"]) == 0
    assert "left out 1 images that cannot be read:" in capsys.readouterr().out
    np.savez(tmp_path / "a.npz", x=IMAGES)
    assert "is no list of images" in fails(
        capsys, tmp_path, "data", "images", str(tmp_path / "a.npz"), "-o", new
    )
    (tmp_path / "pics" / "a 1.png").rename(tmp_path / "pics" / "bare")
    path.write_text("pics/bare 1\n")
    command = (*command[:-1], str(tmp_path / "bare"))
    assert "has no extension" in fails(capsys, tmp_path, *command, "--encoded")


def test_mean(tmp_path: Path, capsys: Capture) -> None:
    path, out = image_files.listed(tmp_path, IMAGES), tmp_path / "mean.binaryproto"
    ok(capsys, "data", "images", str(path), "-o", str(tmp_path / "db"))
    assert ok(capsys, "data", "mean", str(tmp_path / "db"), "-o", str(out))["shape"] == [3, 6, 5]
    assert np.array_equal(read_mean(str(out)), IMAGES.astype(np.float32).sum(0) / np.float32(3))
    assert main(["data", "mean", str(path), "-o", str(out)]) == 0
    assert "mean of channel 2" in capsys.readouterr().out
    image_files.save(tmp_path / "pics" / "a 1.png", image_files.pictures(1, 9, 9)[0])
    assert "others are" in fails(capsys, tmp_path, "data", "mean", str(path), "-o", str(tmp_path / "x"))


def test_the_map_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caffe_proto.data.build._FIRST_MAP", 1 << 15)
    big = image_files.pictures(40, 40, 40)
    path = _lmdb(tmp_path / "db", *(datum(image, 1) for image in big))
    check(open_source(path), big, [1] * 40)


def test_nothing_is_left_of_a_folder_that_failed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_folder(tmp_path / "x") as folder:
        (folder / "part").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_threads_build_in_order(tmp_path: Path) -> None:
    path = image_files.listed(tmp_path, image_files.pictures(80))
    source = open_source(path)
    assert isinstance(source, ImageFiles)
    steps: list[int] = []
    assert ImageSet().build(source, tmp_path / "db", lambda: steps.append(1)) == len(steps) == 80
    with open_source(tmp_path / "db") as made:
        assert [sample.label for sample in made] == list(range(2, 82))


# The real sets


@needs_shared
def test_real_sets() -> None:
    data = SHARED / "data"
    with open_source(data / "mnist" / "t10k-images-idx3-ubyte.gz") as digits:
        assert len(digits) == 10_000 and digits[0].label == 7
    with open_source(data / "cifar10" / "data_batch_*.bin") as source:
        assert len(source) == 30_000
    with open_source(data / "cifar10" / "test_batch_first1000.bin") as source:
        mean = read_mean(str(data / "cifar10" / "mean.binaryproto"))
        assert [source[0].label, source[1].label] == [3, 8]
        assert np.abs(image_mean(source) - mean).max() < 12
    with open_source(data / "imagenet500" / "list.txt", resize=(256, 256)) as source:
        assert len(source) == 500 and source[499].label == 998 and source[0].image.shape == (3, 256, 256)
