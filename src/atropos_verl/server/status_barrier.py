"""Keeps ``/status-env`` true: what an environment learns of its queue fits what it knows of its own groups.

An environment's status requests and its posts wait for each other, until it has done with the answer before, for about
``PATIENCE`` seconds at most. Otherwise atroposlib counts a group twice and gives up another one (docs/internals.md).
"""

import asyncio
from collections.abc import Callable

from atropos_verl.server.bodies import Connection

PATIENCE = 0.25
"""Seconds. atroposlib takes a few milliseconds, more where its processor is busy."""
_STATUSES = 2
"""Unread answers of ``/status-env`` for one environment, which asks one after the other; with more a client floods."""
SETTLING = 0.02
"""Seconds from the end of a connection until the environment has acted on what it read there."""


class _Unread:
    """Answers of one kind that an environment has not done with yet, and a wait until there are none."""

    def __init__(self) -> None:
        self._answers: set[asyncio.Future[None]] = set()
        self._read_at = float("-inf")

    def add(self, connection: Connection) -> Callable[[], None]:
        """One more, on ``connection``. Returns what ends it, too; to end it again does nothing."""
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        self._answers.add(answer)

        def end() -> None:
            if not answer.done():
                answer.set_result(None)
                self._answers.remove(answer)
                self._read_at = loop.time()

        connection.when_done(lambda _: end())
        return end

    async def all_read(self, most: int | None = None) -> None:
        """With more than ``most`` nobody waits."""
        if most is not None and len(self._answers) > most:
            return
        if self._answers:
            await asyncio.wait(self._answers, timeout=PATIENCE)
        settling = self._read_at + SETTLING - asyncio.get_running_loop().time()
        if settling > 0:
            await asyncio.sleep(settling)


class StatusBarrier:
    """Belongs to the event loop. A connection of None (a server that does not tell of them) passes at once."""

    def __init__(self) -> None:
        self._posts: dict[int, _Unread] = {}
        self._statuses: dict[int, _Unread] = {}

    async def before_accept(self, env_id: int | None) -> None:
        """A group of this environment waits here before it is accepted."""
        if env_id in self._statuses:
            await self._statuses[env_id].all_read(_STATUSES)

    def accepted(self, env_id: int | None, connection: Connection | None) -> None:
        if env_id is not None and connection is not None and not connection.lost:
            end = self._posts.setdefault(env_id, _Unread()).add(connection)
            asyncio.get_running_loop().call_later(PATIENCE, end)

    async def before_status(self, env_id: int, connection: Connection | None) -> None:
        """Its question waits here; from now on its posts do, until it has the answer."""
        if connection is None or connection.lost:
            return
        end = self._statuses.setdefault(env_id, _Unread()).add(connection)
        if env_id in self._posts:
            await self._posts[env_id].all_read()
        asyncio.get_running_loop().call_later(PATIENCE, end)
