"""Where the daemon writes: its runtime, state and cache directories, and nowhere else."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fscached.transport.mount import mount_points
from tests.native.conftest import Node, image_of, noise
from tests.native.origin import Origin

READ_ONLY = """
set -eu
for directory in "$@"; do mount --bind "$directory" "$directory"; done
tac /proc/self/mountinfo | cut -d' ' -f5 | sort -ru | while read -r point; do
    case " $* " in *" $point "*) continue ;; esac
    case $point in /proc* | /sys* | /dev*) continue ;; esac
    mount -o remount,bind,ro "$point"
done
! touch /written 2>/dev/null
! touch "$OUTSIDE/written" 2>/dev/null
exec setpriv --inh-caps -all --bounding-set -all,+sys_admin \
    "$PYTHON" -B -m fscached run --unsafe-no-supervisor --config "$CONFIG"
"""


def test_a_read_only_root_is_enough(
    node: Node, registry: Origin, monkeypatch, tmp_path: Path
) -> None:
    """A whole life of the daemon, in a namespace where nothing else can be written and with the one
    capability that its unit leaves it: mount, read, prefetch, trace, budget, verification."""
    directories = [node.root / name for name in ("run", "state", "cache")]
    for directory in directories:
        directory.mkdir(mode=0o700)
    node.configure(prefetch={"enabled": True}, cache={"budget_bytes": 1 << 20})
    for name, value in {
        "OUTSIDE": tmp_path,
        "PYTHON": sys.executable,
        "CONFIG": node.config,
    }.items():
        monkeypatch.setenv(name, str(value))
    node.start_as(["unshare", "-m", "sh", "-c", READ_ONLY, "sh", *map(str, directories)])
    pid = node.wait()["pid"]
    writable = {
        point.target
        for point in mount_points(Path(f"/proc/{pid}/mountinfo"))
        if not point.target.startswith(("/proc", "/sys", "/dev"))
        and not is_read_only(pid, point.target)
    }
    assert writable == set(map(str, directories))
    files = noise(70, 2, 700_000)
    target = node.mount(registry.add("app", image_of(files)))
    assert {path.name: path.read_bytes() for path in target.iterdir()} == files
    node.fscached("prefetch", "--wait", target)
    node.fscached("cache", "verify", "--repair")
    node.fscached("umount", target)
    node.fscached("cache", "gc", "--all")
    status = node.wait()
    assert status["cache"]["culled_files"] == 1 and status["totals"]["reads_failed"] == 0
    assert "Read-only file system" not in node.log.read_text()


def is_read_only(pid: int, target: str) -> bool:
    flags = os.statvfs(f"/proc/{pid}/root{target}").f_flag
    return bool(flags & os.ST_RDONLY)
