"""Redirects: what is followed, for how long a target is good, who finds it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached.source import SourceError
from fscached.source.redirect import HOPS_LIMIT, Route, Routes, follow, signed_life_s

HOME = Route("https://registry/v2/x/blobs/y", "https://registry:443", 0, float("inf"))
WALL_S = 1_700_000_000.0  # 2023-11-14T22:13:20Z


@pytest.mark.parametrize(
    ("query", "life_s"),
    [
        ("X-Amz-Date=20231114T221320Z&X-Amz-Expires=1200&X-Amz-Signature=f", 1200),
        ("X-Goog-Date=20231114T221220Z&X-Goog-Expires=90", 30),
        ("Expires=1700000060&Signature=x", 60),
        ("se=2023-11-14T22%3A14%3A20Z&sig=x", 60),
        ("X-Amz-Date=20231114T221320Z&X-Amz-Expires=1200&Expires=1700000060", 60),
        ("X-Amz-Date=yesterday&X-Amz-Expires=1200", float("inf")),
        ("X-Amz-Date=20231114T221320Z", 0),
        ("Expires=never", float("inf")),
        ("", float("inf")),
    ],
)
def test_signatures_say_when_they_end(query: str, life_s: float) -> None:
    """The stores' own parameters are understood, the earliest end counts."""
    assert signed_life_s(f"https://store/x?{query}", WALL_S) == life_s


@given(st.text(alphabet="&=%0123456789TZ:-") | st.text())
def test_any_query(text: str) -> None:
    """No query raises."""
    for name in ("X-Amz-Date", "X-Amz-Expires", "Expires", "se"):
        signed_life_s(f"https://store/x?X-Amz-Date=20231114T221320Z&{name}={text}", WALL_S)


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("/a?b", "https://registry/a?b"),
        ("z", "https://registry/v2/x/blobs/z"),
        ("//store/z", "https://store/z"),
        ("https://store:444/z", "https://store:444/z"),
    ],
)
def test_locations(location: str, url: str) -> None:
    """Relative ones are the old address's."""
    assert follow(HOME, location, 300, 1000) == Route(url, follow(HOME, url, 0, 0).origin, 1, 1300)


def test_an_insecure_target() -> None:
    """From https nobody is led to http."""
    with pytest.raises(SourceError, match="https to http://store:80"):
        follow(HOME, "http://store/z?sig=hush", 300, 0)


def test_the_shortest_life_of_a_chain() -> None:
    """A route is no better than the hops that led to it, and hops are limited."""
    route = follow(HOME, "/1", 10, 0)
    for hop in range(2, HOPS_LIMIT + 1):
        route = follow(route, f"/{hop}", 300, 0)
        assert route.expires_at == 10
    with pytest.raises(SourceError, match="times"):
        follow(route, "/again", 300, 0)


@given(st.text())
def test_any_location(location: str) -> None:
    """No location raises anything but SourceError."""
    try:
        follow(HOME, location, 300, 0)
    except SourceError as error:
        assert len(str(error)) < 200


@pytest.mark.asyncio
async def test_one_goes_ahead() -> None:
    """The others wait for the scout, and one of them goes if it found nothing."""
    routes = Routes()
    assert await routes.lead("blob")
    others = [asyncio.create_task(routes.lead("blob")) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in others)
    routes.settle("blob")
    assert await asyncio.gather(*others) == [False] * 3
    assert routes.get("blob", 0) is None and await routes.lead("blob")


def test_a_newer_route_stays() -> None:
    """Forgetting a route that failed does not forget what replaced it."""
    routes, old, new = Routes(), HOME._replace(hops=1), HOME._replace(hops=2)
    routes.learn("blob", old)
    routes.learn("blob", new)
    routes.forget("blob", old)
    assert routes.get("blob", 0) is new
    routes.forget("blob", new)
    assert routes.get("blob", 0) is None


def test_a_route_ends() -> None:
    """An expired one is none."""
    routes = Routes()
    routes.learn("blob", HOME._replace(expires_at=5))
    assert routes.get("blob", 4.9) is not None and routes.get("blob", 5) is None
