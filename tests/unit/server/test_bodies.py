"""``/status-env`` and the posts of one environment wait for each other."""

import asyncio
from collections.abc import Awaitable

import pytest
from support.trajectory_server import turns

from atropos_verl.server import bodies
from atropos_verl.server.bodies import Connection, StatusBarrier

LONG = 1000.0
"""Seconds: a test that waited for them would not end."""


async def waiting(action: Awaitable[None]) -> asyncio.Task[None]:
    task = asyncio.ensure_future(action)
    await turns()
    return task


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "PATIENCE", LONG)
    monkeypatch.setattr(bodies, "SETTLING", 0.0)


async def test_a_status_waits_until_the_answers_to_posts_were_read_and_holds_further_posts_back() -> None:
    barrier, posts, asking = StatusBarrier(), [Connection(), Connection()], Connection()
    for connection in posts:
        await barrier.before_accept(0)  # nobody has asked: at once
        barrier.accepted(0, connection)
    status = await waiting(barrier.before_status(0, asking))
    further = await waiting(barrier.before_accept(0))
    posts[0].done()
    await turns()
    assert not status.done()
    posts[1].done()
    await status  # it is answered now
    assert not further.done()
    await barrier.before_accept(1)  # another environment
    asking.done()  # the answer was read
    await further
    await barrier.before_accept(0)


async def test_what_waited_goes_on_a_moment_after_the_connection_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "SETTLING", LONG)
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    barrier, post, asking = StatusBarrier(), Connection(), Connection()
    barrier.accepted(0, post)
    post.done()
    await barrier.before_status(0, asking)  # atroposlib may still count the group of this post
    asking.done()
    await barrier.before_accept(0)  # and may not have used the figures yet
    assert len(slept) == 2 and all(0 < seconds <= LONG for seconds in slept)


async def test_nobody_waits_for_ever_for_a_client_that_keeps_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "PATIENCE", 0.01)
    barrier = StatusBarrier()
    barrier.accepted(0, Connection())
    await barrier.before_status(0, Connection())
    await barrier.before_accept(0)
    await barrier.before_status(0, None)


async def test_a_flood_of_status_requests_that_nobody_reads_holds_no_post_back() -> None:
    barrier = StatusBarrier()
    for _ in range(3):
        await barrier.before_status(0, Connection())
    await barrier.before_accept(0)


async def test_a_connection_that_is_lost_or_unknown_is_waited_for_by_nobody() -> None:
    barrier, lost = StatusBarrier(), Connection()
    lost.lost = True
    barrier.accepted(0, lost)
    barrier.accepted(0, None)
    barrier.accepted(None, Connection())
    await barrier.before_status(0, lost)
    await barrier.before_accept(0)
    await barrier.before_accept(None)
