"""Layers become one tree: what an upper layer adds, replaces and hides.

Both ways of hiding are understood in every layer, as an overlay mount of the result would take
them: names of the OCI image specification (layer.md, "Whiteouts": `.wh.NAME` and
`.wh..wh..opq`), and those of the kernel's overlayfs (Documentation/filesystems/overlayfs.rst: a
character device 0/0 and the xattr `trusted.overlay.opaque`).
"""

from __future__ import annotations

import dataclasses
import stat

from rafs_v6 import ImageError
from rafs_v6.tree import Node

WHITEOUT_PREFIX = b".wh."
OPAQUE_NAME = b".wh..wh..opq"
OPAQUE_XATTR = b"trusted.overlay.opaque"
_ELSEWHERE_XATTRS = frozenset({b"trusted.overlay.redirect", b"trusted.overlay.metacopy"})


def is_whiteout(name: bytes, node: Node) -> bool:
    """Whether an entry of a layer only hides something (or is other bookkeeping of AUFS)."""
    return name.startswith(WHITEOUT_PREFIX) or _is_overlay_whiteout(node)


def hides(directory: Node, name: bytes) -> bool:
    """Whether a layer's directory hides what the layers below have under a name."""
    node = directory.children.get(name)
    return (
        WHITEOUT_PREFIX + name in directory.children
        or OPAQUE_NAME in directory.children
        or directory.xattrs.get(OPAQUE_XATTR) == b"y"
        or (node is not None and _is_overlay_whiteout(node))
    )


def merge(lower: Node | None, upper: Node) -> Node:
    """The tree of a layer on top of a merged tree (None below the lowest layer).

    Both trees stay as they are. An upper directory keeps its own owner, mode, time and xattrs,
    the root's too. Raises ImageError for an overlayfs layer whose content is in another place.
    """
    root = _empty(upper)
    todo = [(root, lower, upper)]
    while todo:
        merged, below, above = todo.pop()
        if below is not None:
            merged.children = {
                name: node for name, node in below.children.items() if not hides(above, name)
            }
        for name, node in above.children.items():
            _refuse_elsewhere(name, node)
            if is_whiteout(name, node):
                continue
            under = merged.children.get(name)
            merged.children[name] = node
            if node.is_directory:
                merged.children[name] = directory = _empty(node)
                todo.append((directory, under if under and under.is_directory else None, node))
    return root


def _is_overlay_whiteout(node: Node) -> bool:
    return stat.S_ISCHR(node.mode) and node.device == (0, 0)


def _empty(directory: Node) -> Node:
    xattrs = {name: value for name, value in directory.xattrs.items() if name != OPAQUE_XATTR}
    return dataclasses.replace(directory, xattrs=xattrs, children={})


def _refuse_elsewhere(name: bytes, node: Node) -> None:
    for xattr in _ELSEWHERE_XATTRS & node.xattrs.keys():
        raise ImageError(
            f"{name!r} has the xattr {xattr.decode()}: its content is in another layer; make the "
            "layer with the overlayfs options redirect_dir=off and metacopy=off"
        )
