"""`fscached.transport` against the kernels it is for: what unit tests have to take on trust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness.guest import Guest

pytestmark = pytest.mark.cachefiles

SCENARIOS = Path(__file__).with_name("transport_scenarios.py")
CHUNK_BYTES = 1 << 20
NAMES = (
    *("life", "before copen", "prefix", "suffix", "never", "killed reader", "full disk"),
    *("machine", "inheritance", "mounts", "takeover", "culling"),
)

Seen = dict[str, Any]


@pytest.fixture(scope="module")
def seen(guest: Guest) -> Seen:
    """The result of every scenario, by name."""
    guest.put("/run/transport_scenarios.py", SCENARIOS.read_bytes())
    program = ["/usr/bin/python3", "/run/transport_scenarios.py", *NAMES]
    found: Seen = json.loads(guest.run(program, timeout_s=400).stdout)
    return found


def test_a_mounts_life(seen: Seen) -> None:
    """OPEN, READs within chunks, CLOSE; the second time nothing is asked of what is resident."""
    it = seen["life"]
    assert it["right"] == [True, True]
    assert it["opened"] and it["closed"]
    assert it["again"] == []
    assert it["resident"] == [[0, it["size"]]]
    assert it["restore"] is True
    assert set(it["counts"].values()) == {0}
    for start, end in it["wants"]:
        assert 0 < end - start <= 128 * 1024
        assert start // CHUNK_BYTES == (end - 1) // CHUNK_BYTES


def test_nothing_answers_before_copen(seen: Seen) -> None:
    """Seeking and writing are NotReady until the OPEN is answered."""
    it = seen["before copen"]
    assert it["said"] and set(it["said"]) == {it["expected"]}


def test_a_prefix_is_progress(seen: Seen) -> None:
    """The kernel asks for the rest and the reader gets right bytes."""
    it = seen["prefix"]
    assert it["right"]
    assert it["wants"][1] == [it["wants"][0][0] + 4096, it["wants"][0][1]]


def test_a_suffix_is_not(seen: Seen) -> None:
    """The kernel asks for the first page once more, which is answered."""
    it = seen["suffix"]
    assert it["right"]
    assert it["wants"][1] == [it["wants"][0][0], it["wants"][0][0] + 4096]


def test_no_bytes_are_an_error_and_no_end(seen: Seen) -> None:
    """The reader gets EIO after two READs; the next reader is served."""
    it = seen["never"]
    assert "Errno 5" in it["said"]
    assert len(it["wants"]) == 2
    assert it["right"]


def test_a_killed_reader_is_counted(seen: Seen) -> None:
    """Its READ's answer is EINVAL, and the next reader is served."""
    it = seen["killed reader"]
    assert it["gone"] >= 1
    assert it["right"]


def test_a_full_disk(seen: Seen) -> None:
    """ENOBUFS is OutOfSpace, the reader gets EIO, the survey says so; space heals it."""
    it = seen["full disk"]
    assert "Errno 5" in it["said"]
    assert it["errors"] == ["ENOBUFS"]
    assert "free-space" in it["low"]
    assert it["right"]


def test_the_survey_of_a_good_machine(seen: Seen) -> None:
    """Nothing is missing; while the device is held, its holder is named."""
    it = seen["machine"]
    assert it["free"] == []
    assert "busy: held by pid" in it["second"]
    assert "the device" in it["second"] and "an object" in it["second"]


def test_children_inherit_nothing(seen: Seen) -> None:
    """Neither the device nor an object survives exec."""
    assert "cachefiles" not in seen["inheritance"]["open"]


def test_mounts_and_what_they_say(seen: Seen) -> None:
    """One superblock per fsid, bind mounts of it, and a remedy for each refusal."""
    said = seen["mounts"]
    assert "bind-mount" in said["again"]
    assert said["table"] == [["image", "domain", "/mnt"], ["image", "domain", "/tmp/other"]]
    assert "unmount lazily" in said["busy"]
    assert said["unknown"].startswith("MountError")
    assert "create the directory" in said["missing"]
    assert said["left"] == 0
    assert said["nobody"].startswith("MountError")
    assert "nothing is mounted" in said["not mounted"]


def test_cache_files_are_found_and_culled(seen: Seen) -> None:
    """A new file has no name, a linked one has the computed one; in use it stays, and reads of it
    go on; later it goes, its volume's directories too, and the next mount begins anew."""
    it = seen["culling"]
    assert it["new"] == []
    assert it["listed"] == it["computed"] and len(it["listed"]) == 2
    assert it["in use"] == [False, False]
    assert it["still right"]
    assert not it["spoiled"] and it["asked again"]
    assert it["left"] == [] and it["again"] == [True, True]
    assert it["volumes"] == [] and it["graves"] == []
    assert it["cold again"]
    assert it["cwd"] == it["cwd after"]


def test_a_successor_answers_what_was_pending(seen: Seen) -> None:
    """The reader of a daemon killed in the middle of a READ gets its bytes from the next one."""
    it = seen["takeover"]
    assert it["same"]
    assert it["opened"]
