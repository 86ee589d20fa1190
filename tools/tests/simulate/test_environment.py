"""The model of an environment against atroposlib's own class: both on one virtual clock, compared by values."""

import asyncio
import heapq
import itertools
import logging
import selectors
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig
from simulate.environment import Environment
from simulate.generation import Group

from atropos_verl.assets import demo_model_path

GROUP, SLEEP, START = 8, 0.1, 5.0
"""Sequences of a group; seconds between two looks, and before the first, in atroposlib."""


@dataclass(frozen=True)
class Script:
    """The events of an environment. Seconds; none are multiples of a look's, so that no two events coincide."""

    workers: int
    full: int
    batch: int
    """Groups that are taken at a time."""
    seconds: list[float]
    """Of generation and scoring of the groups, in the order in which they are begun; from the first again."""
    takes: list[float]
    """Times at which a batch is taken, if there is one."""
    end: float
    answer: float = 0.0
    """From a group's arrival in the queue until its environment has the answer."""


@dataclass
class Seen:
    begun: list[float] = field(default_factory=list)
    given_up: list[tuple[float, int]] = field(default_factory=list)
    """Time and number of the group, in the order in which they were begun."""
    arrived: list[tuple[float, int]] = field(default_factory=list)


class _Clock(selectors.SelectSelector):
    """Nobody waits: the time that would be waited for has passed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.now += timeout or 0.0
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.clock = _Clock()
        super().__init__(self.clock)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self.clock.now


class _RealEnv(BaseEnv):  # type: ignore[misc]  # atroposlib has no type information
    """Only what would leave this process is replaced: status and posts, generation and scoring."""

    script: Script
    seen: Seen
    queue: list[int]

    @classmethod
    def config_init(cls) -> Any:
        raise NotImplementedError

    async def setup(self) -> None: ...
    async def setup_wandb(self) -> None: ...
    async def register_env(self) -> None: ...
    async def get_server_info(self) -> None: ...
    async def evaluate(self, *args: Any, **kwargs: Any) -> None: ...
    async def wandb_log(self, wandb_metrics: Any = None) -> None: ...
    async def add_rollouts_for_wandb(self, *args: Any, **kwargs: Any) -> None: ...

    async def get_next_item(self) -> int:
        return 0

    async def get_status(self) -> None:
        queued = len(self.queue)
        self.status_dict = {"current_step": 0, "queue_size": queued, "self_queue_size": queued, "max_group_size": GROUP}

    async def collect_trajectories(self, item: int) -> Any:
        number = len(self.seen.begun)
        self.seen.begun.append(asyncio.get_running_loop().time())
        try:
            await asyncio.sleep(self.script.seconds[number % len(self.script.seconds)])
        except asyncio.CancelledError:
            self.seen.given_up.append((asyncio.get_running_loop().time(), number))
            raise
        rows = [[number]] * GROUP
        return {"tokens": rows, "masks": rows, "scores": [float(i) for i in range(GROUP)]}, []

    async def _send_scored_data_to_api(self, scored_data: Any) -> None:
        number = scored_data["tokens"][0][0]
        self.queue.append(number)
        self.seen.arrived.append((asyncio.get_running_loop().time(), number))
        await asyncio.sleep(self.script.answer)


def real(script: Script) -> Seen:
    async def main() -> Seen:
        config = BaseEnvConfig(
            group_size=GROUP,
            max_num_workers=script.workers,
            batch_size=script.batch * GROUP,
            max_batches_offpolicy=script.full // script.batch,
            tokenizer_name=str(demo_model_path()),
            use_wandb=False,
            total_steps=10**9,
            steps_per_eval=-1,
        )
        env = _RealEnv(config, [APIServerConfig(server_type="openai", api_key="x", model_name="x")], testing=True)
        env.script, env.seen, env.queue, env.max_token_len = script, Seen(), [], 10**6
        manager = asyncio.create_task(env.env_manager())
        passed = 0.0
        for take in script.takes:
            await asyncio.sleep(START + take - passed)
            passed = START + take
            if len(env.queue) >= script.batch:
                del env.queue[: script.batch]
        await asyncio.sleep(START + script.end - passed)
        manager.cancel()
        for worker in env.workers:
            worker.cancel()
        seen: Seen = env.seen
        env.seen = Seen()  # what the end of the test gives up does not count
        await asyncio.gather(manager, *env.workers, return_exceptions=True)
        return seen

    logging.getLogger("atroposlib.envs.base").setLevel(logging.ERROR)
    loop = _Loop()
    try:
        found = loop.run_until_complete(main())
    finally:
        loop.close()
    return Seen(
        [when - START for when in found.begun],
        [(when - START, number) for when, number in found.given_up],
        [(when - START, number) for when, number in found.arrived],
    )


class _World:
    def __init__(self, script: Script) -> None:
        self.script, self.now, self.seen = script, 0.0, Seen()
        self.queue: list[int] = []
        self.numbers: dict[Group, int] = {}
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.environment = Environment(
            self,
            0,
            workers=script.workers,
            full=script.full,
            period=SLEEP,
            phase=0.0,
            post_seconds=0.0,
            answer_seconds=script.answer,
        )

    def at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + delay, next(self.order), action))

    def queued(self) -> int:
        return len(self.queue)

    def begin(self, environment: int) -> Group:
        number = len(self.seen.begun)
        self.seen.begun.append(self.now)
        group = Group(environment, [1.0], self.script.seconds[number % len(self.script.seconds)])
        self.numbers[group] = number
        self.at(0.0, lambda: self.environment.generated(group))
        return group

    def give_up(self, group: Group) -> None:
        group.cancelled = True
        if not group.accepted:
            self.seen.given_up.append((self.now, self.numbers[group]))

    def accept(self, group: Group) -> None:
        group.accepted = True
        self.queue.append(self.numbers[group])
        self.seen.arrived.append((self.now, self.numbers[group]))

    def run(self) -> None:
        while self.events and self.events[0][0] < self.script.end:
            self.now, _, action = heapq.heappop(self.events)
            action()

    def take(self) -> None:
        if len(self.queue) >= self.script.batch:
            del self.queue[: self.script.batch]
            self.environment.wake()


def modelled(script: Script) -> Seen:
    world = _World(script)
    for take in script.takes:
        world.at(take, world.take)
    world.at(0.0, world.environment._look)  # atroposlib's first look is at its beginning
    world.environment._look_is_due = True
    world.run()
    return world.seen


def _varied(count: int, low: float, high: float, seed: int) -> list[float]:
    state, found = seed, []
    for _ in range(count):  # a linear congruential generator: equal everywhere, whatever numpy's version
        state = (1103515245 * state + 12345) % 2**31
        found.append(low + (high - low) * state / 2**31)
    return found


def _at(first: float, step: float, count: int) -> list[float]:
    return [first + step * i for i in range(count)]


SCRIPTS = {
    "fewer workers than may be": Script(4, 16, 8, _varied(97, 0.3, 1.1, 1), _at(0.777, 1.013, 20), 20),
    "a whole batch at once, taken when it is there": Script(
        64, 8, 8, _varied(97, 1.03, 1.31, 2), _at(1.4317, 1.6173, 12), 20
    ),
    "two batches ahead, and a slow trainer": Script(64, 16, 8, _varied(97, 1.03, 2.31, 3), _at(2.017, 4.217, 8), 34),
    "the queue fills and drains": Script(12, 8, 4, _varied(97, 0.13, 3.31, 4), _at(0.517, 1.717, 20), 34),
    "counted twice": Script(64, 16, 8, _varied(97, 1.03, 1.93, 5), _at(1.017, 2.617, 12), 34, answer=0.037),
    "counted twice for long": Script(64, 16, 8, _varied(97, 1.03, 1.93, 6), _at(1.017, 2.617, 12), 34, answer=0.083),
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=[name.replace(" ", "-") for name in SCRIPTS])
def test_it_begins_gives_up_and_posts_what_atroposlib_does(script: Script) -> None:
    expected, found = real(script), modelled(script)
    assert found.begun == pytest.approx(expected.begun, abs=1e-6)
    assert [number for _, number in found.given_up] == [number for _, number in expected.given_up]
    assert [when for when, _ in found.given_up] == pytest.approx([when for when, _ in expected.given_up], abs=1e-6)
    assert [number for _, number in found.arrived] == [number for _, number in expected.arrived]
    assert [when for when, _ in found.arrived] == pytest.approx([when for when, _ in expected.arrived], abs=1e-6)
    assert len(expected.arrived) >= 80
    # Without a delay between arrival and answer nothing is counted twice, and nothing given up.
    assert bool(expected.given_up) == (script.answer > 0)


def test_an_environment_posts_one_group_at_a_time() -> None:
    script = Script(4, 8, 4, [1.0], [], 1.95)
    world = _World(script)
    world.environment._post_seconds = 0.2
    world.environment.wake()
    world.run()
    assert [when - world.seen.begun[0] for when, _ in world.seen.arrived] == pytest.approx([1.2, 1.4, 1.6, 1.8])
