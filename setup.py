"""Packaging of caffe-lra. The demo's net lives in models/lenet; the build copies it into the package.

The same sources give the same bytes: files in order, with modes of 0644 or 0755, owned by nobody, and with the time
in SOURCE_DATE_EPOCH, or the first one that a zip file can hold.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
DEMO_FILES = ("lenet.prototxt", "lenet.caffemodel")
EPOCH = int(os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800"))  # 1980-01-01


def plain_mode(mode: int) -> int:
    """A file's mode without what the builder's umask made of it."""
    return 0o755 if mode & 0o100 else 0o644


class BuildWithDemo(build_py):
    """build_py, and the demo's net beside the module that shows it."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "lra" / "lenet"
            target.mkdir(parents=True, exist_ok=True)
            for name in DEMO_FILES:
                shutil.copyfile(ROOT / "models" / "lenet" / name, target / name)


class PlainWheel(bdist_wheel):
    """bdist_wheel, with plain modes. It takes the time from SOURCE_DATE_EPOCH itself."""

    def write_wheelfile(self, wheelfile_base: str, *args: Any, **kwargs: Any) -> None:
        """The last file that is written before all are packed."""
        super().write_wheelfile(wheelfile_base, *args, **kwargs)
        for path in Path(wheelfile_base).parent.rglob("*"):
            if path.is_file():
                path.chmod(plain_mode(path.stat().st_mode))


class PlainSource(sdist):
    """sdist, whose archive says nothing of who made it, where and when."""

    def make_archive(self, base_name: str, format: str, *args: Any, base_dir: str, **kwargs: Any) -> str:
        """The files of ``base_dir`` as base_name.tar.gz."""
        if format != "gztar":
            raise SystemExit(f"sdist writes gztar alone, not {format}")
        made = Path(f"{base_name}.tar.gz")
        made.parent.mkdir(parents=True, exist_ok=True)
        with (
            made.open("wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=EPOCH) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for path in sorted(Path(base_dir).rglob("*")):
                if path.is_file():
                    entry = tarfile.TarInfo(path.as_posix())
                    entry.size, entry.mtime = path.stat().st_size, EPOCH
                    entry.mode = plain_mode(path.stat().st_mode)
                    with path.open("rb") as content:
                        archive.addfile(entry, content)
        return str(made)


TEST = [
    "pytest>=8",
    "pytest-xdist>=3.5",
    "hypothesis>=6",
    "ruff>=0.14",
    "mypy>=1.18",
    "types-protobuf",
    "grpcio-tools>=1.62",
    "setuptools>=77",
]
DOCS = ["sphinx>=8.1", "myst-parser>=4", "furo>=2024.8.6"]

setup(
    name="caffe-lra",
    version="0.1.0",
    description="Makes legacy Caffe networks fast again: low-rank decomposition, pruning, ONNX export, timing.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The caffe-lra authors",
    license_expression="BSD-2-Clause",
    license_files=["LICENSE"],
    keywords=["caffe", "low-rank", "pruning", "compression", "onnx"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["caffe_proto", "caffe_proto.*", "lra", "lra.*", "hrank", "hrank.*"]),
    package_data={"caffe_proto": ["caffe.proto", "caffe.desc"], "lra": ["lenet/*"]},
    cmdclass={"build_py": BuildWithDemo, "bdist_wheel": PlainWheel, "sdist": PlainSource},
    install_requires=[
        "numpy>=1.26",
        "scipy>=1.11",
        "protobuf>=4.25.8",
        "onnx>=1.15",
        "onnxruntime>=1.17.3",
        "h5py>=3.10",
        "click>=8.1",
        "rich>=13",
        "pillow>=10",
        "lmdb>=1.4",
    ],
    extras_require={
        "train": ["torch>=2.1"],
        "gpu": ["onnxruntime-gpu>=1.17.3"],  # and then without onnxruntime, see README.md
        "report": ["matplotlib>=3.8"],
        "bench": ["opencv-python-headless<5", "matplotlib>=3.8", "torch-pruning>=1.5"],
        "test": TEST,
        "docs": DOCS,
        "dev": [*TEST, *DOCS],
    },
    entry_points={"console_scripts": ["caffe-lra = lra.cli:main"]},
)
