"""What decoding JSON from elsewhere may raise."""

from __future__ import annotations

from typing import Final

import msgspec

MALFORMED: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""The last for what is nested deeper than the decoder descends."""
