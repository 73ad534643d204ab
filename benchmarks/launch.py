"""One container's start, timed from the guest's own clock. Standard library only, for guests have
nothing else. `launch.py PLAN`: JSON in, JSON out.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import TypedDict

RUNC = ["runc", "--root", "/run/bench/runc"]
NAME = "cold"
PAUSE_S = 0.01
PATIENCE_S = 300.0


class Plan(TypedDict):
    """`pull` and `mount` are commands, `bundle` is runc's, `url` is asked until it answers 200."""

    pull: Sequence[str]
    mount: Sequence[str]
    bundle: str
    url: str | None


class Launch(TypedDict):
    """Seconds from the beginning until the image is there (`pull`), until the container exists
    (`create`), to the first line its program prints (`ready`) and to the first 200 (`reply`);
    `output` is that line."""

    pull: float
    create: float
    ready: float
    reply: float | None
    output: str


def launch(plan: Plan) -> Launch:
    began = time.monotonic()
    reply = None
    _run(plan["pull"])
    pull = time.monotonic() - began
    _run(plan["mount"])
    reading, writing = os.pipe()
    making = [*RUNC, "create", "--bundle", plan["bundle"], NAME]
    subprocess.run(making, stdin=subprocess.DEVNULL, stdout=writing, check=True)
    os.close(writing)
    create = time.monotonic() - began
    _run([*RUNC, "start", NAME])
    with os.fdopen(reading, "rb") as printed:
        line = printed.readline()
        ready = time.monotonic() - began
        if plan["url"]:
            _await_reply(plan["url"])
            reply = time.monotonic() - began
            _run([*RUNC, "kill", NAME, "KILL"])
        printed.read()
    _await_end()
    output = line.decode(errors="replace").strip()
    return Launch(pull=pull, create=create, ready=ready, reply=reply, output=output)


def _run(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, check=False, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode != 0:
        raise SystemExit(f"{argv}: exit status {done.returncode}: {done.stderr!r}")


def _await_reply(url: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError),
            urllib.request.urlopen(url, timeout=PATIENCE_S) as answer,
        ):
            if answer.status == 200 and answer.read():
                return
        time.sleep(PAUSE_S)
    raise SystemExit(f"{url}: no answer")


def _await_end() -> None:
    """Delete the container once its process is gone: not timed."""
    deadline = time.monotonic() + PATIENCE_S
    delete = [*RUNC, "delete", NAME]
    while subprocess.run(delete, check=False, stderr=subprocess.DEVNULL).returncode != 0:
        if time.monotonic() > deadline:
            raise SystemExit("the container does not end")
        time.sleep(0.1)


if __name__ == "__main__":
    print(json.dumps(launch(json.loads(sys.argv[1]))))
