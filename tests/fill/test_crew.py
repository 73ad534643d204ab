"""Worker threads that give their outcome to the event loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from fscached.fill.crew import Crew
from fscached.fill.memory import Pool

pytestmark = pytest.mark.asyncio


async def test_a_task_runs_in_a_worker_and_its_outcome_in_the_loop():
    """What it returns, or what it raises."""
    crew = Crew(1, Pool(1))
    here = threading.get_ident()
    assert await crew.run(threading.get_ident) != here
    with pytest.raises(ZeroDivisionError):
        await crew.run(lambda: 1 // 0)
    crew.close()


async def test_tasks_are_taken_in_order():
    """One worker: first come, first served."""
    crew = Crew(1, Pool(1))
    order: list[int] = []
    done = asyncio.Event()
    for number in range(50):
        crew.start(lambda number=number: number, order.append)
    crew.start(lambda: None, lambda _: done.set())
    await done.wait()
    assert order == list(range(50))
    crew.close()


async def test_after_the_end_tasks_fail_instead_of_hanging():
    """A flight that ends with the daemon does not wait for workers that are gone."""
    crew = Crew(2, Pool(1))
    crew.close()
    with pytest.raises(OSError, match="ending"):
        await crew.run(lambda: None)


async def test_what_was_begun_before_the_end_is_finished():
    """Closing lets workers go after their tasks, not before."""
    crew = Crew(1, Pool(1))
    pending = asyncio.ensure_future(crew.run(lambda: "done"))
    await asyncio.sleep(0)
    crew.close()
    assert await pending == "done"


async def test_urgent_tasks_overtake_the_others():
    """A reader does not wait for what nobody waits for."""
    crew = Crew(1, Pool(1))
    order: list[str] = []
    begun, go_on = threading.Event(), threading.Event()
    done = asyncio.Event()

    def hold() -> str:
        begun.set()
        go_on.wait()
        return "held"

    crew.start(hold, order.append)
    begun.wait()
    for name in ("later 1", "later 2"):
        crew.start(lambda name=name: name, order.append, urgent=False)
    assert crew.behind
    crew.start(lambda: "urgent", order.append)
    crew.start(lambda: None, lambda _: done.set(), urgent=False)
    go_on.set()
    await done.wait()
    assert order == ["held", "urgent", "later 1", "later 2"]
    crew.close()
