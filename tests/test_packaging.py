"""What a wheel and an sdist hold, that the same sources give the same bytes, and that the demo runs from a wheel."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DAY = 86_400


def tracked() -> list[str]:
    """The files of the checkout that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def built(source: Path, *, umask: int, mtime: int, reverse: bool = False) -> dict[str, Path]:
    """Wheel and sdist made in a copy of the checkout at ``source``, with the build tools that are installed."""
    for name in sorted(tracked(), reverse=reverse):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
        target.chmod((0o777 if os.access(ROOT / name, os.X_OK) else 0o666) & ~umask)
        os.utime(target, (mtime, mtime))
    commands = (["bdist_wheel"], ["sdist"])
    for command in commands:
        run = [sys.executable, "setup.py", "-q", *command, "-d", str(source / "made")]
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run(
            run,
            cwd=source,
            check=True,
            capture_output=True,
            umask=umask,
            env={**clean, "SOURCE_DATE_EPOCH": "1700000000"},
        )
    return {path.suffix: path for path in (source / "made").iterdir()}


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Path]]:
    """Two builds of the same sources: other folders, other umasks, files written in another order, years apart."""
    folder = tmp_path_factory.mktemp("builds")
    first = built(folder / "first", umask=0o022, mtime=1_600_000_000)
    second = built(
        folder / "elsewhere" / "second", umask=0o077, mtime=1_600_000_000 + 900 * DAY, reverse=True
    )
    return first, second


@pytest.fixture
def wheel(builds: tuple[dict[str, Path], ...]) -> Path:
    return builds[0][".whl"]


@pytest.mark.parametrize("kind", [".whl", ".gz"])
def test_the_same_sources_give_the_same_bytes(builds: tuple[dict[str, Path], ...], kind: str) -> None:
    first, second = (build[kind] for build in builds)
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


def test_the_time_is_that_of_the_sources(builds: tuple[dict[str, Path], ...]) -> None:
    with tarfile.open(builds[0][".gz"]) as archive:
        assert {entry.mtime for entry in archive} == {1_700_000_000}
        assert {entry.mode for entry in archive} == {0o644}
        assert {entry.uname for entry in archive} == {""}
    with zipfile.ZipFile(builds[0][".whl"]) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(2023, 11, 14, 22, 13, 20)}


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"caffe_proto", "lra", "hrank"}
    for wanted in (
        "caffe_proto/caffe.desc",
        "caffe_proto/caffe.proto",
        "lra/lenet/lenet.caffemodel",
        "lra/lenet/lenet.prototxt",
    ):
        assert wanted in names


def _metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_wheel_says_licence_pythons_and_extras(wheel: Path) -> None:
    said = _metadata(wheel)
    assert said["License-Expression"] == "BSD-2-Clause"
    assert said.get_all("License-File") == ["LICENSE"]
    assert said["Requires-Python"] == ">=3.11"
    assert set(said.get_all("Provides-Extra", [])) == {
        "train", "gpu", "report", "bench", "test", "docs", "dev",
    }  # fmt: skip
    needed = [one for one in said.get_all("Requires-Dist", []) if "extra ==" not in one]
    assert not any(one.startswith(("torch", "matplotlib")) for one in needed)


def test_sdist_holds_what_was_checked_in(builds: tuple[dict[str, Path], ...]) -> None:
    with tarfile.open(builds[0][".gz"]) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames()}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in held if name.startswith("caffe_lra.egg-info/")}
    assert set(tracked()) - held == {".gitignore"}
    assert held - set(tracked()) == made


def _pinned() -> Iterator[str]:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, version = line.split("==")
        assert version, line
        yield _plain(name)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def test_ci_installs_pinned_packages_alone(wheel: Path) -> None:
    pinned = set(_pinned())
    for one in _metadata(wheel).get_all("Requires-Dist", []):
        extra = one.partition("extra == ")[2].strip("'\"")
        if extra not in ("gpu", "bench"):
            name = one.split(";")[0].split("<")[0].split(">")[0].split("=")[0].strip()
            assert _plain(name) in pinned, f"{name} is not in constraints.txt"


def test_demo_runs_from_the_wheel_without_torch(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    barred = "sys.modules.update(dict.fromkeys(('torch', 'matplotlib')))"
    code = f"import sys; {barred}; sys.path.insert(0, {str(site)!r}); from lra.cli import main; import lra; assert lra.__file__.startswith({str(site)!r}); sys.exit(main(['demo', '--threads', '1']))"
    result = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "both nets agree on" in result.stdout
    assert (tmp_path / "caffe-lra-demo" / "lenet-fast.onnx").stat().st_size > 100_000


def test_citation_names_the_papers() -> None:
    yaml = pytest.importorskip("yaml")
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert said["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "version", "license"} <= set(said)
    papers = {paper["authors"][0]["family-names"]: paper for paper in said["references"]}
    assert {name: (paper["year"], paper["doi"]) for name, paper in papers.items()} == {
        "Wen": (2017, "10.48550/arXiv.1703.09746"),
        "Zhang": (2016, "10.1109/TPAMI.2015.2502579"),
        "Lin": (2020, "10.1109/CVPR42600.2020.00160"),
    }
    assert {one["value"] for paper in papers.values() for one in paper["identifiers"]} == {
        "arXiv:1703.09746",
        "arXiv:1505.06798",
        "arXiv:2002.10179",
    }


def test_one_version() -> None:
    """setup.py, the package, the citation and the change log name the same version and licence."""
    import caffe_proto

    version = caffe_proto.__version__
    assert f'version="{version}"' in (ROOT / "setup.py").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert (ROOT / "LICENSE").read_text().startswith("BSD 2-Clause License")
    assert "setuptools" in tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"][0]
