"""Which transport a daemon gets, and when it gets none."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from cdefs import fanotify as abi
from fscached.config import Cache, Config, Kernel
from fscached.failure import Missing
from fscached.transport import mount, opening


def test_no_fanotify_where_nothing_can_be_unmounted_for_everybody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused before anything is opened; the error names the unit that will do."""
    monkeypatch.setattr(mount, "is_apart", lambda: True)
    with pytest.raises(Missing, match=r"start fscached\.service instead"):
        opening.anew(Config(kernel=Kernel(transport="fanotify")))


@pytest.mark.parametrize("code", [errno.EPERM, errno.EINVAL])
def test_no_fanotify_without_an_unlimited_queue(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    """A kernel that refuses it is not asked for a group whose full queue lets readers see zeros:
    the daemon ends with one line and the status of what is missing."""
    asked = []

    def refuse(flags: int, _: int) -> int:
        asked.append(flags)
        abi.ffi.errno = code
        return -1

    flags = {name: value for name, value in vars(abi.lib).items() if name.startswith("FAN_")}
    monkeypatch.setattr(abi, "lib", SimpleNamespace(sys_fanotify_init=refuse, **flags))
    monkeypatch.setattr(mount, "is_apart", lambda: False)
    config = Config(kernel=Kernel(transport="fanotify"), cache=Cache(directory=str(tmp_path)))
    with pytest.raises(Missing, match=r"fanotify_init: .*`fscached doctor` says") as caught:
        opening.anew(config)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    assert [bool(flags & abi.lib.FAN_UNLIMITED_QUEUE) for flags in asked] == [True]
