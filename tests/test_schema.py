"""caffe.proto, caffe.desc and the lookups on it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, text_format
from google.protobuf.descriptor import FieldDescriptor

from caffe_proto import schema

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT.parent / "shared" / "oracle" / "zoo"
PRIVATE = range(20000, 30000)

TYPES = {
    FieldDescriptor.TYPE_DOUBLE: "double",
    FieldDescriptor.TYPE_FLOAT: "float",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_BYTES: "bytes",
}

# Message, field, number, type, default (None: none is declared; an enum's default by name).
FACTS: list[tuple[str, str, int, str, Any]] = [
    ("BlobShape", "dim", 1, "int64", None),
    ("BlobProto", "num", 1, "int32", 0),
    ("BlobProto", "width", 4, "int32", 0),
    ("BlobProto", "data", 5, "float", None),
    ("BlobProto", "diff", 6, "float", None),
    ("BlobProto", "shape", 7, "BlobShape", None),
    ("BlobProto", "double_data", 8, "double", None),
    ("BlobProto", "double_diff", 9, "double", None),
    ("BlobProtoVector", "blobs", 1, "BlobProto", None),
    ("Datum", "channels", 1, "int32", None),
    ("Datum", "data", 4, "bytes", None),
    ("Datum", "label", 5, "int32", None),
    ("Datum", "float_data", 6, "float", None),
    ("Datum", "encoded", 7, "bool", False),
    ("FillerParameter", "type", 1, "string", "constant"),
    ("FillerParameter", "max", 4, "float", 1.0),
    ("FillerParameter", "sparse", 7, "int32", -1),
    ("FillerParameter", "variance_norm", 8, "FillerParameter.VarianceNorm", "FAN_IN"),
    ("NetParameter", "layers", 2, "V1LayerParameter", None),
    ("NetParameter", "input", 3, "string", None),
    ("NetParameter", "input_dim", 4, "int32", None),
    ("NetParameter", "input_shape", 8, "BlobShape", None),
    ("NetParameter", "layer", 100, "LayerParameter", None),
    ("NetState", "phase", 1, "Phase", "TEST"),
    ("NetStateRule", "phase", 1, "Phase", None),
    ("NetStateRule", "not_stage", 5, "string", None),
    ("ParamSpec", "share_mode", 2, "ParamSpec.DimCheckMode", None),
    ("ParamSpec", "lr_mult", 3, "float", 1.0),
    ("ParamSpec", "decay_mult", 4, "float", 1.0),
    ("ParamSpec", "force_mult", 6, "float", 0.0),
    ("LayerParameter", "loss_weight", 5, "float", None),
    ("LayerParameter", "param", 6, "ParamSpec", None),
    ("LayerParameter", "blobs", 7, "BlobProto", None),
    ("LayerParameter", "propagate_down", 11, "bool", None),
    ("LayerParameter", "convolution_param", 106, "ConvolutionParameter", None),
    ("LayerParameter", "batch_norm_param", 139, "BatchNormParameter", None),
    ("LayerParameter", "input_param", 143, "InputParameter", None),
    ("LayerParameter", "recurrent_param", 146, "RecurrentParameter", None),
    ("LayerParameter", "swish_param", 147, "SwishParameter", None),
    ("LayerParameter", "clip_param", 148, "ClipParameter", None),
    ("LayerParameter", "permute_param", 202, "PermuteParameter", None),
    ("LayerParameter", "roi_pooling_param", 8266711, "ROIPoolingParameter", None),
    ("SolverParameter", "net", 24, "string", None),
    ("SolverParameter", "solver_mode", 17, "SolverParameter.SolverMode", "GPU"),
    ("SolverParameter", "random_seed", 20, "int64", -1),
    ("SolverParameter", "solver_type", 30, "SolverParameter.SolverType", "SGD"),
    ("SolverParameter", "delta", 31, "float", 1e-8),
    ("SolverParameter", "clip_gradients", 35, "float", -1.0),
    ("SolverParameter", "snapshot_format", 37, "SolverParameter.SnapshotFormat", "BINARYPROTO"),
    ("SolverParameter", "rms_decay", 38, "float", 0.99),
    ("SolverParameter", "momentum2", 39, "float", 0.999),
    ("SolverParameter", "type", 40, "string", "SGD"),
    ("SolverParameter", "layer_wise_reduce", 41, "bool", True),
    ("SolverParameter", "weights", 42, "string", None),
    ("SolverParameter", "force_iter", 43, "int32", -1),
    ("SolverState", "history", 3, "BlobProto", None),
    ("ArgMaxParameter", "axis", 3, "int32", None),
    ("BatchNormParameter", "use_global_stats", 1, "bool", None),
    ("BatchNormParameter", "moving_average_fraction", 2, "float", 0.999),
    ("BatchNormParameter", "eps", 3, "float", 1e-5),
    ("ClipParameter", "max", 2, "float", None),
    ("ConcatParameter", "concat_dim", 1, "uint32", 1),
    ("ConcatParameter", "axis", 2, "int32", 1),
    ("ConvolutionParameter", "pad", 3, "uint32", None),
    ("ConvolutionParameter", "kernel_size", 4, "uint32", None),
    ("ConvolutionParameter", "group", 5, "uint32", 1),
    ("ConvolutionParameter", "stride", 6, "uint32", None),
    ("ConvolutionParameter", "pad_h", 9, "uint32", 0),
    ("ConvolutionParameter", "kernel_h", 11, "uint32", None),
    ("ConvolutionParameter", "stride_w", 14, "uint32", None),
    ("ConvolutionParameter", "engine", 15, "ConvolutionParameter.Engine", "DEFAULT"),
    ("ConvolutionParameter", "axis", 16, "int32", 1),
    ("ConvolutionParameter", "dilation", 18, "uint32", None),
    ("CropParameter", "axis", 1, "int32", 2),
    ("DataParameter", "backend", 8, "DataParameter.DB", "LEVELDB"),
    ("DropoutParameter", "dropout_ratio", 1, "float", 0.5),
    ("EltwiseParameter", "operation", 1, "EltwiseParameter.EltwiseOp", "SUM"),
    ("FlattenParameter", "end_axis", 2, "int32", -1),
    ("HingeLossParameter", "norm", 1, "HingeLossParameter.Norm", "L1"),
    ("InfogainLossParameter", "axis", 2, "int32", 1),
    ("InnerProductParameter", "transpose", 6, "bool", False),
    ("LossParameter", "normalization", 3, "LossParameter.NormalizationMode", "VALID"),
    ("LRNParameter", "local_size", 1, "uint32", 5),
    ("LRNParameter", "beta", 3, "float", 0.75),
    ("LRNParameter", "k", 5, "float", 1.0),
    ("MVNParameter", "eps", 3, "float", 1e-9),
    ("PoolingParameter", "kernel_size", 2, "uint32", None),
    ("PoolingParameter", "stride", 3, "uint32", 1),
    ("PoolingParameter", "pad", 4, "uint32", 0),
    ("PoolingParameter", "global_pooling", 12, "bool", False),
    ("PoolingParameter", "round_mode", 13, "PoolingParameter.RoundMode", "CEIL"),
    ("ReductionParameter", "operation", 1, "ReductionParameter.ReductionOp", "SUM"),
    ("ReshapeParameter", "num_axes", 3, "int32", -1),
    ("ScaleParameter", "bias_term", 4, "bool", False),
    ("SliceParameter", "slice_point", 2, "uint32", None),
    ("SliceParameter", "axis", 3, "int32", 1),
    ("TileParameter", "tiles", 2, "int32", None),
    ("V1LayerParameter", "layer", 1, "V0LayerParameter", None),
    ("V1LayerParameter", "type", 5, "V1LayerParameter.LayerType", None),
    ("V1LayerParameter", "blobs_lr", 7, "float", None),
    ("V1LayerParameter", "convolution_param", 10, "ConvolutionParameter", None),
    ("V1LayerParameter", "param", 1001, "string", None),
    ("V1LayerParameter", "blob_share_mode", 1002, "V1LayerParameter.DimCheckMode", None),
    ("V0LayerParameter", "kernelsize", 8, "uint32", None),
    ("V0LayerParameter", "k", 22, "float", 1.0),
    ("V0LayerParameter", "blobs", 50, "BlobProto", None),
    ("V0LayerParameter", "det_crop_mode", 59, "string", "warp"),
    ("V0LayerParameter", "hdf5_output_param", 1001, "HDF5OutputParameter", None),
]


def facts_of(message: str, field: str) -> tuple[int, str, Any]:
    found = schema.descriptor(message).fields_by_name[field]
    default: Any = found.default_value if found.has_default_value else None
    if found.enum_type is not None:
        kind = found.enum_type.full_name.removeprefix("caffe.")
        default = None if default is None else found.enum_type.values_by_number[default].name
    elif found.message_type is not None:
        kind = found.message_type.full_name.removeprefix("caffe.")
    else:
        kind = TYPES[found.type]
    return found.number, kind, default


def descriptor_set() -> descriptor_pb2.FileDescriptorSet:
    return descriptor_pb2.FileDescriptorSet.FromString((ROOT / "caffe_proto" / "caffe.desc").read_bytes())


def all_messages() -> dict[str, descriptor_pb2.DescriptorProto]:
    found: dict[str, descriptor_pb2.DescriptorProto] = {}

    def walk(prefix: str, messages: Any) -> None:
        for message in messages:
            found[prefix + message.name] = message
            walk(f"{prefix}{message.name}.", message.nested_type)

    for file in descriptor_set().file:
        walk("", file.message_type)
    return found


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_packaged_set_is_what_protoc_makes(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    output = tmp_path / "caffe.desc"
    run(f"from tools.build_schema import build; from pathlib import Path; build(Path({str(output)!r}))")
    assert descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes()) == descriptor_set()


@pytest.mark.parametrize(("message", "field", "number", "kind", "default"), FACTS)
def test_fact(message: str, field: str, number: int, kind: str, default: Any) -> None:
    found = facts_of(message, field)
    assert found[:2] == (number, kind)
    assert found[2] == (pytest.approx(default, rel=1e-6) if isinstance(default, float) else default)


def bvlc_lines() -> list[str]:
    """One line a field of BVLC Caffe, with everything about it, the enumerators of its enum too."""
    enums = {f".caffe.{e.name}": e for file in descriptor_set().file for e in file.enum_type}
    enums |= {f".caffe.{m}.{e.name}": e for m, proto in all_messages().items() for e in proto.enum_type}
    lines = []
    for name, message in all_messages().items():
        for field in message.field:
            if schema.fork_of(name, field.name) is None:
                values = enums[field.type_name].value if field.type_name in enums else []
                kept = [(v.name, v.number) for v in values if v.number not in PRIVATE and "MKL" not in v.name]
                facts = (field.number, field.label, field.type, field.type_name, field.options.packed)
                lines.append(f"{name}.{field.name} {facts} {field.default_value!r} {sorted(kept)}")
    return sorted(lines)


def test_nothing_of_bvlc_is_lost_or_changed() -> None:
    # Taken by this very function of BVLC's schema as another package ships it; it never needs an update.
    lines = bvlc_lines()
    assert len(lines) == 423
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == (
        "4ea737ffa40d3adbb079dee623108ef81ea9a059ab669d282de2af73be243505"
    )


def test_packed_fields() -> None:
    packed = {(m, f.name) for m, proto in all_messages().items() for f in proto.field if f.options.packed}
    blobs = {("BlobProto", name) for name in ("data", "diff", "double_data", "double_diff")}
    assert packed == blobs | {("BlobShape", "dim")}


def test_only_clip_bounds_are_required() -> None:
    required = descriptor_pb2.FieldDescriptorProto.LABEL_REQUIRED
    found = {(m, f.name) for m, proto in all_messages().items() for f in proto.field if f.label == required}
    assert found == {("ClipParameter", "min"), ("ClipParameter", "max")}


def test_v1_layer_types() -> None:
    types = schema.enum_values("V1LayerParameter.LayerType")
    bvlc = {name: number for name, number in types.items() if number not in PRIVATE}
    assert sorted(bvlc.values()) == list(range(40))
    picked = {"NONE": 0, "CONVOLUTION": 4, "INNER_PRODUCT": 14, "LRN": 15, "POOLING": 17, "SOFTMAX_LOSS": 21}
    picked |= {"ELTWISE": 25, "THRESHOLD": 31, "MVN": 34, "ABSVAL": 35, "DECONVOLUTION": 39}
    assert picked.items() <= bvlc.items()


def test_enums() -> None:
    assert schema.enum_values("Phase") == {"TRAIN": 0, "TEST": 1}
    assert schema.enum_values("HingeLossParameter.Norm") == {"L1": 1, "L2": 2}
    assert schema.enum_values("ReductionParameter.ReductionOp")["MEAN"] == 4
    assert schema.enum_values("EltwiseParameter.EltwiseOp") == {"PROD": 0, "SUM": 1, "MAX": 2}
    assert schema.enum_values("PoolingParameter.RoundMode") == {"CEIL": 0, "FLOOR": 1}


def test_numbers_and_names_do_not_clash() -> None:
    for name, message in all_messages().items():
        numbers = [field.number for field in message.field]
        names = [field.name for field in message.field]
        assert len(set(numbers)) == len(numbers), name
        assert len(set(names)) == len(names), name


def test_private_numbers_belong_to_forks() -> None:
    for name, message in all_messages().items():
        for field in message.field:
            if field.number in PRIVATE:
                assert schema.fork_of(name, field.name), f"{name}.{field.name}"


@pytest.mark.parametrize(
    ("message", "field", "fork"),
    [
        ("ParamSpec", "force_mult", "wen"),
        ("ParamSpec", "breadth_decay_mult", "scnn"),
        ("LayerParameter", "sparsify_param", "wen"),
        ("SparsifyParameter", "coef", "wen"),
        ("SolverParameter", "force_type", "wen"),
        ("PriorBoxParameter", "min_size", "ssd"),
        ("DetectNetGroundTruthParameter.ClassMapping", "src", "nvidia"),
        ("PoolingParameter", "ceil_mode", "pull"),
        ("ParamSpec", "lr_mult", None),
        ("PoolingParameter", "round_mode", None),
        ("LayerParameter", "clip_param", None),
    ],
)
def test_fork_of(message: str, field: str, fork: str | None) -> None:
    assert schema.fork_of(message, field) == fork


def test_fork_fields_stay_off_the_numbers_of_bvlc() -> None:
    layer, solver = schema.descriptor("LayerParameter"), schema.descriptor("SolverParameter")
    assert layer.fields_by_number[147].name == "swish_param"
    assert layer.fields_by_number[148].name == "clip_param"
    assert solver.fields_by_number[41].name == "layer_wise_reduce"
    assert schema.descriptor("PoolingParameter").fields_by_number[13].name == "round_mode"
    assert layer.fields_by_name["sparsify_param"].number in PRIVATE
    assert layer.fields_by_name["symmetric_rectify_param"].number in PRIVATE


def test_unknown_names_say_so() -> None:
    with pytest.raises(KeyError, match="no message 'Nonsense'"):
        schema.message_class("Nonsense")
    with pytest.raises(KeyError, match="no enum 'Nonsense'"):
        schema.enum_values("Nonsense")
    with pytest.raises(KeyError, match="no field 'nonsense' in message 'BlobProto'"):
        schema.fork_of("BlobProto", "nonsense")


def test_reads_bytes() -> None:
    # shape {dim: 2}, data: [1.0] packed, data: 2.0 unpacked
    raw = b"\x3a\x03\x0a\x01\x02" + b"\x2a\x04\x00\x00\x80\x3f" + b"\x2d\x00\x00\x00\x40"
    blob: Any = schema.message_class("BlobProto").FromString(raw)
    assert list(blob.shape.dim) == [2]
    assert list(blob.data) == [1.0, 2.0]


def test_reads_layer_bytes() -> None:
    # layer {name: "c" type: "Convolution" convolution_param {num_output: 5 kernel_h: 3 engine: CUDNN}}
    conv = b"\x08\x05\x58\x03\x78\x02"
    layer = b"\x0a\x01c" + b"\x12\x0bConvolution" + b"\xd2\x06" + bytes([len(conv)]) + conv
    net: Any = schema.message_class("NetParameter").FromString(b"\xa2\x06" + bytes([len(layer)]) + layer)
    param = net.layer[0].convolution_param
    assert (net.layer[0].name, net.layer[0].type) == ("c", "Convolution")
    assert (param.num_output, param.kernel_h, param.engine, param.group) == (5, 3, 2, 1)


def test_reads_text_of_forks() -> None:
    text = """layer { name: "a" param { force_mult: 2 } sparsify_param { coef: 0.5 }
                      pooling_param { ceil_mode: false pad_l: 1 } }"""
    net: Any = text_format.Parse(text, schema.message_class("NetParameter")())
    layer = net.layer[0]
    assert layer.param[0].force_mult == 2
    assert layer.sparsify_param.coef == 0.5
    assert (layer.pooling_param.ceil_mode, layer.pooling_param.pad_l) == (False, 1)


def test_import_is_lazy() -> None:
    assert run("import sys, caffe_proto.schema; print('google.protobuf' in sys.modules)").strip() == "False"


def test_lives_beside_another_schema_of_the_same_names() -> None:
    code = """
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package="caffe")
field = file.message_type.add(name="BlobProto").field.add(name="other", number=5, type=5, label=1)
pool = descriptor_pool.Default()
pool.AddSerializedFile(file.SerializeToString())
other = message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe.BlobProto"))
from caffe_proto import schema
ours = schema.message_class("BlobProto")
assert other(other=7).SerializeToString() == bytes([5 << 3, 7])
assert list(ours.FromString(ours(data=[1.5]).SerializeToString()).data) == [1.5]
assert schema.fork_of("ParamSpec", "force_mult") == "wen"
print(sorted(other.DESCRIPTOR.fields_by_name), "data" in ours.DESCRIPTOR.fields_by_name)
"""
    assert run(code).strip() == "['other'] True"


def test_reads_what_caffe_reads() -> None:
    if not ZOO.is_dir():
        pytest.skip("no shared/oracle/zoo beside this checkout")
    classes = {"net": "NetParameter", "solver": "SolverParameter"}
    failures = {}
    for name, entry in json.loads((ZOO / "zoo.json").read_text(encoding="utf-8")).items():
        if not entry["caffe_parses"]:
            continue
        # Some files carry other encodings in comments.
        text = (ZOO / name).read_text(encoding="utf-8", errors="replace")
        try:
            text_format.Parse(text, schema.message_class(classes[entry["kind"]])())
        except text_format.ParseError as error:
            failures[name] = str(error)
    assert failures == {}
