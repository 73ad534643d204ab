"""Which transport a daemon gets, and when it gets none."""

from __future__ import annotations

import pytest

from fscached.config import Config, Kernel
from fscached.failure import Missing
from fscached.transport import mount, opening


def test_no_fanotify_where_nothing_can_be_unmounted_for_everybody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused before anything is opened; the error names the unit that will do."""
    monkeypatch.setattr(mount, "is_apart", lambda: True)
    with pytest.raises(Missing, match=r"start fscached\.service instead"):
        opening.anew(Config(kernel=Kernel(transport="fanotify")))
