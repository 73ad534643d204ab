"""A slow READ has one line, and the line says where its time went."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached.fill.stages import Stamps, spent
from rafs_v6.layout import Compressor
from tests.fill.conftest import KEY, settled, until
from tests.fill.test_objects import opened

CHUNK = 65_536
SECONDS = st.floats(0, 1000)


@given(SECONDS, SECONDS, SECONDS, SECONDS, SECONDS, SECONDS, st.floats(0, 10))
def test_the_stages_are_all_of_it(came, queue, source, worker, decode, answer, write) -> None:
    """Whenever the READ came: before its fetch was sent, or while that was at any stage."""
    asked = 500.0 + queue
    stamps = Stamps(
        asked,
        asked + source,
        asked + source + worker,
        asked + source + worker + decode + write,
        write,
    )
    now = max(came, stamps.ended_s + answer)
    found = spent(came, now, stamps)
    assert sum(found.values()) == pytest.approx(now - came, abs=1e-6)
    assert all(seconds >= 0 for seconds in found.values())
    if came >= stamps.arrived_s:
        assert found["queue"] == found["source"] == 0


def test_a_reader_pays_for_what_it_has_waited_for() -> None:
    """One that joins a fetch in flight did not wait for its beginning."""
    stamps = Stamps(asked_s=10.0, arrived_s=13.0, began_s=13.5, ended_s=14.5, write_s=0.25)
    assert spent(9.0, 15.0, stamps) == {
        "queue": 1.0, "source": 3.0, "worker": 0.5, "decode": 0.75, "write": 0.25, "answer": 0.5
    }  # fmt: skip
    assert spent(12.0, 15.0, stamps)["queue"] == 0
    assert spent(12.0, 15.0, stamps)["source"] == 1.0


def slow_lines(caplog: pytest.LogCaptureFixture) -> list:
    return [record for record in caplog.records if record.msg.startswith("a slow read")]


@pytest.mark.asyncio
async def test_a_slow_source_is_named(scene, caplog) -> None:
    """Where the time went, of which bytes, and who is to blame; a fast READ has no line."""
    async with opened(scene([CHUNK] * 4, Compressor.NONE, slow_read_s=0.05)) as here:
        here.source.gate.clear()
        reading = asyncio.create_task(here.kernel.read(KEY, 2 * CHUNK, 3 * CHUNK))
        await until(lambda: here.source.asked)
        await asyncio.sleep(0.06)
        here.source.gate.set()
        await reading
        await settled(here.objects)
        [line] = slow_lines(caplog)
        assert (line.offset, line.bytes, line.source) == (2 * CHUNK, CHUNK, "memory")
        assert float(line.source_s) >= 0.05 and float(line.seconds) >= float(line.source_s)
        assert float(line.queue_s) + float(line.decode_s) + float(line.write_s) < 0.05
        await here.kernel.read(KEY, 2 * CHUNK, 3 * CHUNK)
        assert len(slow_lines(caplog)) == 1 and here.objects.tallies[KEY].slow_reads == 1


@pytest.mark.asyncio
async def test_a_stuck_disk_is_named(scene, caplog) -> None:
    """Bytes that have come and are not written."""
    async with opened(scene([CHUNK] * 4, Compressor.NONE, slow_read_s=0.05)) as here:
        await here.kernel.read(KEY, 0, CHUNK)
        await settled(here.objects)
        here.kernel.cache_files[KEY].resident.clear()
        here.replace_daemon()
        here.kernel.freeze()
        reading = asyncio.create_task(here.kernel.read(KEY, 0, CHUNK))
        await until(lambda: len(here.source.asked) == 2)
        await asyncio.sleep(0.06)
        here.kernel.thaw()
        await reading
        await settled(here.objects)
        assert max(float(line.write_s) for line in slow_lines(caplog)) >= 0.05


@pytest.mark.asyncio
async def test_a_read_that_fails_late_is_slow_too(scene, caplog) -> None:
    """It has been answered, and not by bytes."""
    times = {"deadline_s": 0.06, "refusal_s": 1, "slow_read_s": 0.05}
    async with opened(scene([CHUNK] * 4, Compressor.NONE, **times)) as here:
        here.source.gate.clear()
        with pytest.raises(OSError, match="Errno 5"):
            await here.kernel.read(KEY, 0, CHUNK)
        lines = slow_lines(caplog)
        assert lines and lines[0].msg == "a slow read failed"
        here.source.gate.set()
