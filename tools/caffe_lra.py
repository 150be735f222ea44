"""Run ``caffe-lra`` from a checkout: ``python tools/caffe_lra.py info NET``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lra.cli import main

if __name__ == "__main__":
    sys.exit(main())
