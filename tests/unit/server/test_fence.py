"""Who waits for whom between ``/status-env`` and the posts of one environment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from atropos_verl.server.delivery import Connection
from atropos_verl.server.status_barrier import PATIENCE, SETTLING, StatusBarrier


async def _waits(action: Awaitable[None]) -> asyncio.Task[None]:
    task = asyncio.ensure_future(action)
    for _ in range(5):
        await asyncio.sleep(0)
    return task


def test_a_status_waits_until_the_answers_to_posts_were_read_and_holds_further_posts_back() -> None:
    async def scenario() -> None:
        fence, posts, asking = StatusBarrier(), [Connection(), Connection()], Connection()
        for connection in posts:
            await fence.before_accept(0)  # nobody has asked: at once
            fence.accepted(0, connection)
        status = await _waits(fence.before_status(0, asking))
        further = await _waits(fence.before_accept(0))
        posts[0].done()
        await asyncio.sleep(2 * SETTLING)
        assert not status.done()
        posts[1].done()
        await asyncio.sleep(2 * SETTLING)
        assert status.done()  # it is answered now
        assert not further.done()
        await fence.before_accept(1)  # another environment
        asking.done()  # the answer was read
        await asyncio.sleep(2 * SETTLING)
        assert further.done()
        await fence.before_accept(0)

    asyncio.run(scenario())


def test_what_waited_goes_on_a_moment_after_the_connection_ended() -> None:
    async def scenario() -> list[float]:
        loop, fence, waited = asyncio.get_running_loop(), StatusBarrier(), []
        post, asking = Connection(), Connection()
        fence.accepted(0, post)
        post.done()
        begin = loop.time()
        await fence.before_status(0, asking)  # atroposlib may still count the group of this post
        waited.append(loop.time() - begin)
        asking.done()
        begin = loop.time()
        await fence.before_accept(0)  # and may not have used the figures yet
        waited.append(loop.time() - begin)
        await asyncio.sleep(2 * SETTLING)
        begin = loop.time()
        await fence.before_accept(0)
        waited.append(begin - loop.time() + SETTLING)
        return waited

    assert all(seconds >= 0.5 * SETTLING for seconds in asyncio.run(scenario()))


def test_nobody_waits_for_long_for_a_client_that_keeps_its_connection() -> None:
    async def scenario() -> tuple[float, float]:
        loop, fence = asyncio.get_running_loop(), StatusBarrier()
        begin = loop.time()
        fence.accepted(0, Connection())
        await fence.before_status(0, Connection())
        answered = loop.time()
        await fence.before_accept(0)
        accepted = loop.time()
        await fence.before_accept(0)
        await fence.before_status(0, None)
        return answered - begin, accepted - answered

    for waited in asyncio.run(scenario()):
        assert 0.5 * PATIENCE < waited < 20 * PATIENCE


def test_a_connection_that_is_lost_or_unknown_is_waited_for_by_nobody() -> None:
    async def scenario() -> None:
        fence, lost = StatusBarrier(), Connection()
        lost.lost = True
        fence.accepted(0, lost)
        fence.accepted(0, None)
        fence.accepted(None, Connection())
        await asyncio.wait_for(fence.before_status(0, lost), PATIENCE / 2)
        await asyncio.wait_for(fence.before_accept(0), PATIENCE / 2)
        await asyncio.wait_for(fence.before_accept(None), PATIENCE / 2)

    asyncio.run(scenario())
