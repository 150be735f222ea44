"""--compare: one input through both nets, and how far their outputs are apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .cli_options import Options

if TYPE_CHECKING:
    import numpy as np

    from caffe_proto.model import Model

    Reference = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def reference(o: Options, model: Model) -> Reference:
    """What to feed, given or random, and what the net makes of it."""
    from caffe_proto import runtime
    from caffe_proto.array_files import feeds as read_feeds
    from caffe_proto.onnx_export import Request

    request = Request(input_shapes=o.input_shapes)
    with runtime.session(model, threads=o.threads, input_shapes=o.input_shapes) as opened:
        if o.compare == "random":
            feeds = runtime.random_feeds(model, request, o.seed)
        else:
            feeds = read_feeds([str(o.compare)], opened.input_names)
        return feeds, opened.run(feeds)


def apart(o: Options, written: Model, compared: Reference) -> dict[str, float]:
    """Relative difference of every output, ||b - a|| / ||a||."""
    import numpy as np

    from caffe_proto import runtime

    feeds, results = compared
    with runtime.session(written, threads=o.threads, input_shapes=o.input_shapes) as opened:
        found = opened.run(feeds)
    norms = {
        name: (np.linalg.norm(found[name] - array), np.linalg.norm(array)) for name, array in results.items()
    }
    return {
        name: float(difference / norm) if norm else float(difference)
        for name, (difference, norm) in norms.items()
    }
