"""Containers in a guest, from image to first reply: what each step took."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from environments.guest import PROGRAMS
from environments.programs import HERE
from harness.guest import Guest
from launch import Launch, Plan

BUNDLE = "/run/bench/bundle"
ROOTFS = f"{BUNDLE}/rootfs"
PATIENCE_S = 900.0


class Program(NamedTuple):
    """What a container runs. It is ready when it has printed its first line, which begins with
    `says`; one that serves `url` has replied at the first 200."""

    argv: tuple[str, ...]
    says: str
    url: str | None = None


class Launched(NamedTuple):
    """Seconds from the beginning to the end of each step."""

    pull: float
    create: float
    ready: float
    reply: float | None


class Launcher:
    """Runs containers with runc, in the guest's own network."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        guest.put(f"{PROGRAMS}/launch.py", (HERE / "launch.py").read_bytes())
        guest.run(
            "mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup; "
            f"mkdir -p {ROOTFS}; runc spec --bundle {BUNDLE}"
        )
        self._spec: dict[str, Any] = json.loads(guest.get(f"{BUNDLE}/config.json"))

    def launch(self, program: Program, pull: Sequence[str], mount: Sequence[str]) -> Launched:
        """Run two commands, the second of which has the container's root file system at `ROOTFS`,
        create the container and start it.

        Raises CommandFailed; SystemExit when it prints something else.
        """
        self._configure(program)
        plan = Plan(pull=pull, mount=mount, bundle=BUNDLE, url=program.url)
        words = ["python3", f"{PROGRAMS}/launch.py", json.dumps(plan)]
        found: Launch = json.loads(self._guest.run(words, timeout_s=PATIENCE_S).stdout)
        if not found["output"].startswith(program.says):
            raise SystemExit(f"{program.argv} printed {found['output']!r}, not {program.says!r}")
        return Launched(found["pull"], found["create"], found["ready"], found["reply"])

    def _configure(self, program: Program) -> None:
        spec = self._spec
        spec["process"]["terminal"] = False
        spec["process"]["args"] = list(program.argv)
        spec["root"]["readonly"] = False
        spaces = spec["linux"]["namespaces"]
        spec["linux"]["namespaces"] = [each for each in spaces if each["type"] != "network"]
        self._guest.put(f"{BUNDLE}/config.json", json.dumps(spec).encode())
