"""The compiled schema of caffe.proto, in a descriptor pool of its own.

``caffe.desc`` is what protoc makes of ``caffe.proto`` (tools/build_schema.py rebuilds it). Classes are built
from it at first use, so no generated module is bound to a protobuf version, and an installed pycaffe, which
puts other messages of the same names into the default pool, does no harm. Importing this module imports no
protobuf.

Names are those of caffe.proto without the package: ``BlobProto``, ``ConvolutionParameter.Engine``, ``Phase``.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor
    from google.protobuf.descriptor_pool import DescriptorPool
    from google.protobuf.message import Message

__all__ = ["descriptor", "enum_values", "fork_of", "message_class"]

PACKAGE = "caffe"


@cache
def message_class(name: str) -> type[Message]:
    """Give the class of a message.

    Args:
        name: as in caffe.proto, e.g. ``BlobProto``.

    Raises:
        KeyError: there is no such message.
    """
    from google.protobuf import message_factory

    return message_factory.GetMessageClass(descriptor(name))


def descriptor(name: str) -> Descriptor:
    """Give the descriptor of a message: its fields with numbers, types and defaults.

    Raises:
        KeyError: there is no such message.
    """
    try:
        return _pool().FindMessageTypeByName(f"{PACKAGE}.{name}")
    except KeyError:
        raise KeyError(f"caffe.proto has no message {name!r}") from None


def enum_values(name: str) -> dict[str, int]:
    """Give the numbers of an enum by name, in the order of caffe.proto.

    Args:
        name: ``Phase``, or with the message it stands in, e.g. ``PoolingParameter.PoolMethod``.

    Raises:
        KeyError: there is no such enum.
    """
    try:
        enum = _pool().FindEnumTypeByName(f"{PACKAGE}.{name}")
    except KeyError:
        raise KeyError(f"caffe.proto has no enum {name!r}") from None
    return {value.name: value.number for value in enum.values}


def fork_of(message: str, field: str) -> str | None:
    """Tell which fork a field comes from, None for a field of BVLC Caffe.

    Args:
        message: name of the message.
        field: name of a field of it.

    Returns:
        A short name, as listed at the head of caffe.proto: ``wen``, ``ssd``.

    Raises:
        KeyError: there is no such message or field.
    """
    if field not in descriptor(message).fields_by_name:
        raise KeyError(f"caffe.proto has no field {field!r} in message {message!r}")
    return _forks().get((message, field))


def _serialized() -> bytes:
    return Path(__file__).with_name("caffe.desc").read_bytes()


@cache
def _pool() -> DescriptorPool:
    """The private pool; descriptor.proto goes in first, because caffe.proto extends its options."""
    from google.protobuf import descriptor_pb2
    from google.protobuf.descriptor_pool import DescriptorPool

    pool = DescriptorPool()
    pool.AddSerializedFile(descriptor_pb2.DESCRIPTOR.serialized_pb)
    for file in descriptor_pb2.FileDescriptorSet.FromString(_serialized()).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


@cache
def _forks() -> dict[tuple[str, str], str]:
    """(message, field) -> fork, from the options that caffe.proto puts on fields and messages."""
    from google.protobuf import message_factory

    pool = _pool()
    set_type = pool.FindMessageTypeByName("google.protobuf.FileDescriptorSet")
    # Read again by a class of the private pool: only there are the two options known.
    files: Any = message_factory.GetMessageClass(set_type).FromString(_serialized())
    on_field = pool.FindExtensionByName(f"{PACKAGE}.fork")
    on_message = pool.FindExtensionByName(f"{PACKAGE}.from_fork")

    forks: dict[tuple[str, str], str] = {}

    def collect(prefix: str, messages: Any) -> None:
        for message in messages:
            name = prefix + message.name
            default = message.options.Extensions[on_message]
            for field in message.field:
                if fork := field.options.Extensions[on_field] or default:
                    forks[name, field.name] = fork
            collect(f"{name}.", message.nested_type)

    for file in files.file:
        collect("", file.message_type)
    return forks
