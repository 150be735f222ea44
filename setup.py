"""Packaging of caffe-lra. The demo's net lives in models/lenet; the build copies it into the package."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
DEMO_FILES = ("lenet.prototxt", "lenet.caffemodel")


class BuildWithDemo(build_py):
    """build_py, and the demo's net beside the module that shows it."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "lra" / "lenet"
            target.mkdir(parents=True, exist_ok=True)
            for name in DEMO_FILES:
                shutil.copyfile(ROOT / "models" / "lenet" / name, target / name)


setup(
    name="caffe-lra",
    version="0.1.0",
    description="Makes legacy Caffe networks fast again: low-rank decomposition, pruning, ONNX export, timing.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["caffe_proto", "caffe_proto.*", "lra", "lra.*", "hrank", "hrank.*"]),
    package_data={"caffe_proto": ["caffe.proto", "caffe.desc"], "lra": ["lenet/*"]},
    cmdclass={"build_py": BuildWithDemo},
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
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6",
            "ruff>=0.14",
            "mypy>=1.18",
            "types-protobuf",
            "grpcio-tools>=1.62",
        ],
    },
    entry_points={"console_scripts": ["caffe-lra = lra.cli:main"]},
)
