"""``python -m lra``: the same program as ``caffe-lra``."""

import sys

from .cli import main

sys.exit(main())
