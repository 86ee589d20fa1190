"""The throttle by hand: batches of 8 sequences begin or wait."""

import asyncio

import pytest
from support.engines import request
from support.ledgers import holding, wrote
from support.trajectory_server import turns

from atropos_verl.provenance.ledger import Ledger
from atropos_verl.provenance.throttle import StalenessThrottle


def throttle(bound: int, ledger: Ledger | None = None, now: list[float] | None = None) -> StalenessThrottle:
    """``now``: its last entry is the time."""
    made = StalenessThrottle(ledger or Ledger(), 8, bound, clock=lambda: (now or [0.0])[-1])
    made.active = True
    return made


async def ask(limit: StalenessThrottle, *prompts: tuple[int, ...], max_tokens: int = 16) -> None:
    """Begin four sequences of each prompt when there is room, and end at once."""
    async with limit.admitted([request(prompt, n=4, max_tokens=max_tokens) for prompt in prompts or ((1, 2),)]):
        pass


async def begins(limit: StalenessThrottle, *prompts: tuple[int, ...], max_tokens: int = 16) -> bool:
    """True when this may begin at once; it then ends at once."""
    asking = asyncio.create_task(ask(limit, *prompts, max_tokens=max_tokens))
    await turns()
    begun = asking.done()
    asking.cancel()
    return begun


async def test_one_batch_and_no_more_may_be_under_way_with_bound_zero() -> None:
    limit = throttle(0)
    assert await begins(limit) and await begins(limit)  # 8 sequences were generated and are expected in the queue
    assert limit.expected_staleness == 1 and not await begins(limit)
    limit.queue_is(8)  # they are there
    assert not await begins(limit)
    limit.batch_fetched()
    assert limit.expected_staleness == 1 and not await begins(limit)  # what begins now is trained on after that batch
    limit.batch_done()
    assert limit.expected_staleness == 0 and await begins(limit)
    limit.queue_is(80)
    assert not await begins(limit)
    limit.active = False  # an evaluation after the last step
    assert await begins(limit)


async def test_a_bound_of_two_lets_two_more_batches_begin() -> None:
    limit = throttle(2)
    assert [await begins(limit) for _ in range(7)] == [True] * 6 + [False]


async def test_while_groups_are_left_out_as_stale_fewer_sequences_are_under_way() -> None:
    limit = throttle(2)
    limit.queue_is(23)
    assert limit.expected_staleness == 2  # 23 // 8
    limit.batch_done(stale=1)  # slow groups were overtaken: two sequences fewer, a quarter of a batch
    assert limit.expected_staleness == 3 and not await begins(limit)
    for _ in range(12):  # and with every batch without, 0.16 more
        limit.batch_done()
    assert limit.expected_staleness == 2 and await begins(limit)
    for _ in range(100):
        limit.batch_done(stale=1)
    limit.queue_is(0)
    assert await begins(limit)  # one batch may always be under way


async def test_what_the_environment_dropped_is_not_waited_for_longer_than_usual() -> None:
    now = [0.0]
    limit = throttle(0, now=now)
    assert await begins(limit)
    now.append(1.0)
    limit.queue_is(4)  # the first group took one second to be scored
    assert await begins(limit)
    now.append(2.9)
    assert not await begins(limit)
    now.append(3.1)  # twice as long as the first one
    assert await begins(limit)


async def test_prompts_of_one_request_are_counted_together() -> None:
    limit = throttle(0)
    assert await begins(limit, (1,), (2,), (3,))  # 12 at once: one that waited for itself would wait for ever
    assert not await begins(limit)


async def test_next_turns_and_health_checks_are_not_held() -> None:
    limit = throttle(0, holding((1, 2), wrote([3])))
    limit.batch_fetched()
    assert not await begins(limit, (1, 2)) and not await begins(limit, (1, 2, 4))
    assert await begins(limit, (1, 2, 3)) and await begins(limit, (1, 2, 3, 70, 71))
    assert await begins(limit, (9,), max_tokens=1)
    assert limit.held == 2


async def test_whoever_waits_goes_on_when_there_is_room_and_leaves_nothing_when_cancelled() -> None:
    limit = throttle(0)
    limit.batch_fetched()
    waiting, leaving = (asyncio.create_task(ask(limit)) for _ in range(2))
    await turns()
    assert not waiting.done() and not leaving.done()
    leaving.cancel()
    limit.batch_done()
    await asyncio.wait_for(waiting, timeout=30.0)
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert await begins(limit)
