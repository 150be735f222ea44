"""What the accuracy benchmarks do besides measuring: which images are used, rows kept, tables printed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import accuracy, energy
from benchmarks.accuracy import ORIGINAL, Row
from benchmarks.energy import Point
from benchmarks.real_nets import split
from caffe_proto.errors import FileError, UsageError
from caffe_proto.evaluation import Share

ROWS = [
    Row("net", 20, ORIGINAL, "", 1.0, top1=Share(9, 10)),
    Row("net", 20, "spatial", "exact", 2.0, Share(8, 10), Share(95, 100), 2.01, 3.0),
    Row("net", 20, "spatial", "uniform", 2.0, Share(7, 10), Share(90, 100), 2.2, 5.0),
    Row("net", 20, "pca", "exact", 4.0, refused="cannot be reached"),
]
POINT = Point(20, 100, "a", 0.9, 2, 4, 0.9, 0.8, 0.1, 0.25, 0.01)


def test_images_to_calibrate_on_are_none_of_those_compared() -> None:
    few, others = split(50, 10, 4, 30)
    many, same = split(50, 10, 10, 30)
    assert many[:4] == few
    assert same == others
    assert len({*many, *others}) == 40
    assert {*many, *others} < set(range(50))


@pytest.mark.parametrize(("calibration", "others"), [(0, 5), (11, 5), (5, 0), (5, 41)])
def test_more_images_than_there_are(calibration: int, others: int) -> None:
    with pytest.raises(UsageError, match="are there"):
        split(50, 10, calibration, others)


def test_rows_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    assert accuracy.read(path) == []
    for row in ROWS:
        accuracy.write(path, row)
    assert accuracy.read(path) == ROWS
    path.write_text(path.read_text()[:-5])
    with pytest.raises(FileError, match="no row") as caught:
        accuracy.read(path)
    assert caught.value.line == 4


def test_every_recipe_is_asked_for_with_the_selections_it_has() -> None:
    rows = list(accuracy.wanted("net", 20, ["spatial", "auto"], ["uniform", "exact"], [2.0, 3.0]))
    assert [(row.recipe, row.selection, row.speedup) for row in rows] == [
        (ORIGINAL, "", 1.0),
        ("spatial", "uniform", 2.0),
        ("spatial", "exact", 2.0),
        ("auto", "exact", 2.0),
        ("spatial", "uniform", 3.0),
        ("spatial", "exact", 3.0),
        ("auto", "exact", 3.0),
    ]


def test_table_of_recipes() -> None:
    other = replace(ROWS[1], net="other", selection="paper")
    assert accuracy.tables([*ROWS, other]).splitlines() == [
        "net, 20 images, original 0.900; top-1 on 10 (standard errors up to 0.145), agreement on 100 (up to 0.030)",
        "",
        "| recipe | 2x exact | 2x uniform | 4x exact | s |",
        "|---|---|---|---|---|",
        "| pca |  |  | refused |  |",
        "| spatial | 0.800/0.950 | 0.700/0.900 (2.20x) |  | 4 |",
        "",
        "other, 20 images; top-1 on 10 (standard errors up to 0.126), agreement on 100 (up to 0.022)",
        "",
        "| recipe | 2x paper | s |",
        "|---|---|---|",
        "| spatial | 0.800/0.950 | 3 |",
    ]


def test_points_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    points = [POINT, replace(POINT, layer="b, c", energy=0.999)]
    for point in points:
        energy.write(path, point)
    assert energy.read(path) == points
    path.write_text("layer,energy\na,0.9\n")
    with pytest.raises(FileError, match="other columns"):
        energy.read(path)


def test_table_of_energies() -> None:
    changed = {("a", 0.9): 0.1, ("a", 0.8): 0.4, ("b", 0.8): 0.3, ("b", 0.9): 0.2, ("c", 0.8): 0.1}
    points = [replace(POINT, layer=layer, energy=kept, changed=x) for (layer, kept), x in changed.items()]
    assert energy.table(points).splitlines() == [
        "| layer | 0.8 | 0.9 |",
        "|---|---|---|",
        "| a | 0.4000 | 0.1000 |",
        "| b | 0.3000 | 0.2000 |",
        "| c | 0.1000 |  |",
        "| mean of the first 1 | 0.4000 | 0.1000 |",
        "| mean of the last 1 | 0.1000 |  |",
    ]
