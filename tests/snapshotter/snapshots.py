"""containerd's side of a snapshotter: the calls of its snapshots API that a pull and a run make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE: Final = "containerd.services.snapshots.v1"
NAMESPACE: Final = "k8s.io"
TIMEOUT_S: Final = 30.0

# Field numbers of api/services/snapshots/v1/snapshots.proto; `labels` is a map.
_FIELDS: Final = {
    "PrepareSnapshotRequest": {"snapshotter": 1, "key": 2, "parent": 3, "labels": 4},
    "CommitSnapshotRequest": {"snapshotter": 1, "name": 2, "key": 3, "labels": 4},
    "RemoveSnapshotRequest": {"snapshotter": 1, "key": 2},
    "StatSnapshotRequest": {"snapshotter": 1, "key": 2},
}
_METHODS: Final = {
    "Prepare": "PrepareSnapshotRequest",
    "Commit": "CommitSnapshotRequest",
    "Remove": "RemoveSnapshotRequest",
    "Stat": "StatSnapshotRequest",
}


def _pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(
        name="snapshots.proto", package=PACKAGE, syntax="proto3"
    )
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number in fields.items():
            if field == "labels":
                pair = message.nested_type.add(name="LabelsEntry")
                pair.options.map_entry = True
                for place, part in enumerate(("key", "value"), 1):
                    pair.field.add(name=part, number=place, type=kinds.TYPE_STRING, label=1)
                message.field.add(
                    name=field,
                    number=number,
                    type=kinds.TYPE_MESSAGE,
                    label=kinds.LABEL_REPEATED,
                    type_name=f".{PACKAGE}.{name}.LabelsEntry",
                )
            else:
                message.field.add(name=field, number=number, type=kinds.TYPE_STRING, label=1)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


class Snapshots:
    """A client. Every call raises grpc.RpcError, whose code and details say what went wrong."""

    def __init__(self, socket_path: str) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket_path}")
        self._pool = _pool()

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> None:
        """An active snapshot on top of `parent`."""
        self._call("Prepare", key=key, parent=parent, labels=labels)

    def commit(self, name: str, key: str, labels: Mapping[str, str]) -> None:
        """An active snapshot becomes a committed one."""
        self._call("Commit", name=name, key=key, labels=labels)

    def remove(self, key: str) -> None:
        """Remove a snapshot."""
        self._call("Remove", key=key)

    def stat(self, key: str) -> None:
        """Whether it is there: NOT_FOUND when not."""
        self._call("Stat", key=key)

    def _call(self, method: str, **fields: Any) -> None:
        name = f"{PACKAGE}.{_METHODS[method]}"
        kind = message_factory.GetMessageClass(self._pool.FindMessageTypeByName(name))
        call = self._channel.unary_unary(
            f"/{PACKAGE}.Snapshots/{method}", kind.SerializeToString, lambda reply: reply
        )
        metadata = (("containerd-namespace", NAMESPACE),)
        request = kind(snapshotter="nydus", **fields)
        call(request, timeout=TIMEOUT_S, metadata=metadata, wait_for_ready=True)
