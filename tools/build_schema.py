"""Compile caffe_proto/caffe.proto into caffe_proto/caffe.desc. Needs grpcio-tools."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "caffe_proto"


def build(output: Path) -> None:
    """Write the descriptor set of caffe.proto, without source positions.

    Raises:
        subprocess.CalledProcessError: protoc refused the file; its words are on stderr.
    """
    options = [f"-I{FOLDER}", f"--descriptor_set_out={output}", "caffe.proto"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *options], check=True)


if __name__ == "__main__":
    build(FOLDER / "caffe.desc")
