"""The house keeps its order: every module imports only modules that stand above it in this list."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

ORDER = (
    """
    caffe_proto.errors
    caffe_proto.files caffe_proto.peers caffe_proto.schema caffe_proto.text caffe_proto.wire
    lra.linalg lra.stats lra.nonlinear lra.decomposition lra.ranks lra.digits hrank.rank hrank.criteria
    lra.schemes.base lra.schemes.cross_filter lra.schemes.spatial
    lra.schemes.response lra.schemes.asymmetric3d lra.schemes lra.merging_algebra
    lra.filters lra.force lra.clipping lra.sparsify
    caffe_proto.blocks caffe_proto.weights caffe_proto.upgrade caffe_proto.net
    caffe_proto.recover caffe_proto.upgrade_weights
    caffe_proto.typed caffe_proto.model caffe_proto.solver caffe_proto.outputs
    caffe_proto.layers.emit caffe_proto.layers.channels caffe_proto.layers.spec
    caffe_proto.layers.conv caffe_proto.layers.dense caffe_proto.layers.ends caffe_proto.layers.norm
    caffe_proto.layers.pointwise caffe_proto.layers.pool caffe_proto.layers.shape caffe_proto.layers.softmax
    caffe_proto.layers.indexing caffe_proto.layers.reduce caffe_proto.layers.loss caffe_proto.layers.recurrent
    caffe_proto.layers.ssd caffe_proto.layers.detection caffe_proto.layers.variants
    caffe_proto.layers.planes caffe_proto.layers.channelwise
    caffe_proto.layers
    caffe_proto.preprocess caffe_proto.graph
    caffe_proto.shape_inference caffe_proto.offsets caffe_proto.costs caffe_proto.binding caffe_proto.rewrite caffe_proto.fold caffe_proto.plan
    caffe_proto.deploy caffe_proto.meaning caffe_proto.diff
    caffe_proto.fillers
    caffe_proto.torch_layers.base caffe_proto.torch_layers.conv caffe_proto.torch_layers.pool
    caffe_proto.torch_layers.pointwise caffe_proto.torch_layers.norm caffe_proto.torch_layers.shape
    caffe_proto.torch_layers.recurrent caffe_proto.torch_layers.loss caffe_proto.torch_layers
    caffe_proto.torch_net
    caffe_proto.onnx_export
    caffe_proto.runtime caffe_proto.quantize caffe_proto.kernels caffe_proto.why caffe_proto.latency caffe_proto.torch_time caffe_proto.segments caffe_proto.walk
    caffe_proto.data.pictures caffe_proto.data.base caffe_proto.data.folders caffe_proto.data.arrays
    caffe_proto.data.datums caffe_proto.data caffe_proto.data.transform caffe_proto.data.batches
    caffe_proto.data.build
    caffe_proto.evaluation
    caffe_proto.train_data caffe_proto.caffe_state caffe_proto.snapshots caffe_proto.train
    caffe_proto
    lra.plan lra.targets lra.styles lra.merging lra.train_layers lra.train_hooks lra.train_setup
    lra.following lra.walk lra.stage lra.responses lra.calibration lra.matching lra.polish_torch lra.polish lra.jobs lra.fitting lra.options lra.selection lra.auto
    lra.latency_table lra.latency_probe lra.latency lra.latency_plan
    lra.planner lra.applier lra.repair
    lra
    hrank.sites hrank.measure hrank.rank_files
    hrank.groups hrank.coupling hrank.plan hrank.applier hrank.counts hrank.rates hrank.timing
    lra.removal
    hrank.planner hrank.masking hrank.repair hrank.compare hrank.repairing hrank.tuning
    hrank
    caffe_proto.tables caffe_proto.console caffe_proto.completion caffe_proto.array_files caffe_proto.cli_train caffe_proto.cli_images caffe_proto.cli_data caffe_proto.cli_nets caffe_proto.cli_time caffe_proto.cli
    lra.demo lra.outputs hrank.outputs hrank.joint
    lra.report_given lra.report lra.report_plots lra.report_diagram lra.report_html lra.cli_report
    lra.cli_changing lra.cli_images lra.cli_options lra.cli_checks lra.cli_planning lra.cli_compare lra.cli_writing lra.cli_decompose
    hrank.cli_options hrank.cli_checks hrank.cli_timing hrank.cli_listing hrank.cli_writing hrank.cli_tuning hrank.cli_apply hrank.cli lra.train_report lra.cli_train lra.cli_welcome lra.cli lra.__main__
    """
).split()

# Packages that only these modules may import, wherever in the file: what the main job must not wait for.
CONFINED = {
    "onnxruntime": {
        "caffe_proto.runtime",
        "caffe_proto.latency",
        "caffe_proto.segments",
        "caffe_proto.quantize",
    },
    "onnx": {"caffe_proto.onnx_export", "caffe_proto.quantize"},
    "torch": {
        "caffe_proto.peers",
        "caffe_proto.torch_net",
        "caffe_proto.torch_time",
        "caffe_proto.torch_layers.base",
        "caffe_proto.torch_layers.conv",
        "caffe_proto.torch_layers.loss",
        "caffe_proto.torch_layers.norm",
        "caffe_proto.torch_layers.pointwise",
        "caffe_proto.torch_layers.pool",
        "caffe_proto.torch_layers.recurrent",
        "caffe_proto.torch_layers.shape",
        "caffe_proto.train",
        "lra.polish_torch",
        "lra.train_hooks",
    },
    "matplotlib": {"lra.report_plots", "lra.train_hooks"},
    "PIL": {"caffe_proto.data.pictures"},
    "lmdb": {"caffe_proto.data.datums", "caffe_proto.data.build"},
}


def modules() -> dict[str, Path]:
    """Every module of the packages by its dotted name."""
    found = {}
    for package in ("caffe_proto", "lra", "hrank"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules a file imports anywhere, functions and type checking included."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if inner in known else module


def test_every_module_is_in_the_order() -> None:
    assert sorted(ORDER) == sorted(modules())


def test_imports_point_down() -> None:
    known = modules()
    place = {name: i for i, name in enumerate(ORDER)}
    wrong = [
        f"{name} imports {other}"
        for name, path in known.items()
        for other in imported(name, path, known)
        if other in place and other != name and place[other] > place[name]
    ]
    # a package's __init__ offers what its modules do; the modules may use what it defines, lazily
    assert [line for line in wrong if not line.endswith((" imports caffe_proto", " imports lra"))] == []


def test_heavy_packages_are_confined() -> None:
    known = modules()
    for heavy, allowed in CONFINED.items():
        users = {
            name
            for name, path in known.items()
            if heavy in {one.split(".")[0] for one in imported(name, path, known)}
        }
        assert users <= allowed, heavy


def test_numerics_know_no_caffe() -> None:
    known = modules()
    numerics = [
        name
        for name in known
        if name.startswith("lra.schemes")
        or name
        in (
            "lra.linalg",
            "lra.stats",
            "lra.nonlinear",
            "lra.decomposition",
            "lra.ranks",
            "lra.merging_algebra",
        )
    ]
    for name in numerics:
        assert not any(one.startswith("caffe_proto") for one in imported(name, known[name], known)), name
