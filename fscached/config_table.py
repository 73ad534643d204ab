"""One table of the configuration, and what keys of several tables have in common."""

from __future__ import annotations

from typing import Final

import msgspec

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

ABSOLUTE: Final = r"^/[^\x00-\x1f]*\Z"
ABSOLUTE_OR_EMPTY: Final = r"^(/[^\x00-\x1f]*)?\Z"


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One table of the file. Values are checked when it is read, not when it is made in code."""
