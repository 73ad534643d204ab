"""An image once more, with another bootstrap and the same blobs.

Facts as for `rafs_v6.oci`. Layers, configuration and annotations stay as they are, except where
they name the bootstrap: its layer, that layer's diff id, and a signature of it, which is dropped.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Collection

import msgspec

from rafs_v6 import ImageError
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.convert import Converted
from rafs_v6.oci import (
    BOOTSTRAP_ANNOTATION,
    BOOTSTRAP_NAMES,
    CONFIG,
    MANIFEST,
    RAFS_IMAGE,
    RAFS_OS_FEATURE,
    TAR_GZIP,
    Descriptor,
    Layout,
    StoredImage,
    platform_of,
)

SIGNATURE_ANNOTATION = "containerd.io/snapshot/nydus-signature"
MAX_LAYER_BYTES = 2 << 30
"""Of a bootstrap's layer, uncompressed: the bootstrap, and blob metas that lie beside it."""

_BROKEN = (tarfile.TarError, EOFError, OSError, ValueError)


def bootstrap_descriptor(image: StoredImage) -> Descriptor:
    """The layer that the bootstrap is in. Raises ImageError for an image of another kind."""
    for layer in image.manifest.layers:
        if BOOTSTRAP_ANNOTATION in layer.annotations:
            return layer
    raise ImageError("the image is none in RAFS v6: convert it with `fscached image convert`")


def revise(
    image: StoredImage,
    layer: bytes,
    bootstrap: bytes,
    target: Layout,
    added: Descriptor | None = None,
) -> Converted:
    """Store the image with another bootstrap in `target`: all its parts but the blobs.

    `layer` is the content of its `bootstrap_descriptor`; `added` is a blob that is new, and then
    those that the bootstrap does not name any more are dropped. The image is not yet named in the
    layout's index. Raises ImageError and OSError.
    """
    platform = msgspec.structs.replace(platform_of(image.config), os_features=(RAFS_OS_FEATURE,))
    old = bootstrap_descriptor(image)
    revised = Bootstrap(bootstrap)
    packed, diff_id = _repacked(layer, bootstrap)
    annotations = {k: v for k, v in old.annotations.items() if k != SIGNATURE_ANNOTATION}
    media_type = old.media_type if old.media_type.endswith("gzip") else TAR_GZIP
    new = target.add(packed, media_type, annotations)
    ids = {blob.blob_id for blob in revised.blobs}
    pairs: list[tuple[Descriptor, object]] = []
    for each, known_id in zip(image.manifest.layers, _diff_ids(image), strict=True):
        if each is old:
            pairs += [(added, added.digest)] if added else []
            pairs.append((new, diff_id))
        elif not added or each.digest.removeprefix("sha256:") in ids:
            pairs.append((each, known_id))
    config = {
        **image.config,
        "rootfs": {"type": "layers", "diff_ids": [known_id for _, known_id in pairs]},
    }
    if added:
        config["history"] = _history(image, {each.digest for each, _ in pairs})
    config_type = image.manifest.config.media_type or CONFIG
    manifest = msgspec.structs.replace(
        image.manifest,
        layers=tuple(each for each, _ in pairs),
        config=target.add(msgspec.json.encode(config, order="sorted"), config_type),
    )
    stored = target.add(msgspec.json.encode(manifest), manifest.media_type or MANIFEST)
    listed = msgspec.structs.replace(stored, platform=platform, artifact_type=RAFS_IMAGE)
    entries = len(revised.prefetch_nids())
    return Converted(listed, manifest, len(bootstrap), revised.blobs, entries)


def _history(image: StoredImage, kept: Collection[str]) -> list[dict[str, object]]:
    """One entry per layer: a blob before the bootstrap's is new, and of those that are gone only
    the entry is left."""
    found = image.config.get("history")
    steps = [dict(step) for step in found or () if isinstance(step, dict)]
    layers = [step for step in steps if not step.get("empty_layer")]
    new: dict[str, object] = {"created_by": "fscached image optimize", "comment": "hot chunks"}
    if len(layers) != len(image.manifest.layers):
        unknown: dict[str, object] = {"created_by": "unknown"}
        return [*[unknown] * (len(kept) - 2), new, unknown]
    position = len(steps)
    for step, layer in zip(layers, image.manifest.layers, strict=True):
        if BOOTSTRAP_ANNOTATION in layer.annotations:
            position = next(n for n, each in enumerate(steps) if each is step)
        elif layer.digest not in kept:
            step["empty_layer"] = True
    return [*steps[:position], new, *steps[position:]]


def _diff_ids(image: StoredImage) -> list[object]:
    rootfs = image.config.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or len(diff_ids) != len(image.manifest.layers):
        raise ImageError("the image's configuration has not one diff id for each layer")
    return diff_ids


def _repacked(layer: bytes, bootstrap: bytes) -> tuple[bytes, str]:
    """A bootstrap's layer with another bootstrap in it, and its diff id."""
    content = io.BytesIO()
    try:
        with (
            tarfile.open(fileobj=io.BytesIO(layer), mode="r:*") as source,
            tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as target,
        ):
            _copy(source, target, bootstrap)
    except ImageError:
        raise
    except _BROKEN as error:
        raise ImageError(f"the bootstrap's layer is no tar archive: {error}") from error
    plain = content.getvalue()
    return gzip.compress(plain, mtime=0), f"sha256:{hashlib.sha256(plain).hexdigest()}"


def _copy(source: tarfile.TarFile, target: tarfile.TarFile, bootstrap: bytes) -> None:
    room, found = MAX_LAYER_BYTES, False
    for member in source:
        room -= member.size
        if room < 0 or member.size < 0:
            raise ImageError(f"the bootstrap's layer has more than {MAX_LAYER_BYTES} bytes")
        if member.isreg() and member.name.removeprefix("./") in BOOTSTRAP_NAMES:
            found, member.size = True, len(bootstrap)
            target.addfile(member, io.BytesIO(bootstrap))
        else:
            target.addfile(member, source.extractfile(member) if member.isreg() else None)
    if not found:
        raise ImageError(
            f"the bootstrap's layer holds none of {', '.join(sorted(BOOTSTRAP_NAMES))}"
        )
