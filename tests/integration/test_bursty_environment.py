"""A real atroposlib environment posts many groups at once to the real API: none is counted twice, none given up."""

import asyncio
import logging
import time
from typing import Any

import pytest
from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig
from support.trajectory_server import TrajectoryServer, registration

from atropos_verl.assets import demo_model_path
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.messages import TrainerRegistration

GROUP, BATCH, AHEAD = 8, 32, 2
"""Sequences of a group, groups of a batch, batches ahead."""
SCORING = 0.5
BURSTS = 9


class _BurstyEnv(BaseEnv):  # type: ignore[misc]  # atroposlib has no type information
    """Every group takes the same time, so those that begin together are posted together."""

    begun: int
    given_up: int

    @classmethod
    def config_init(cls) -> Any:
        raise NotImplementedError

    async def setup(self) -> None: ...
    async def evaluate(self, *args: Any, **kwargs: Any) -> None: ...
    async def wandb_log(self, wandb_metrics: Any = None) -> None: ...

    async def get_next_item(self) -> int:
        self.begun += 1
        return self.begun

    async def collect_trajectories(self, item: int) -> Any:
        try:
            await asyncio.sleep(SCORING + 0.008 * (item % BATCH))
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        rows = [[item % 500 + 1, *range(2, 130), i + 1] for i in range(GROUP)]
        return {"tokens": rows, "masks": rows, "scores": [float(i) for i in range(GROUP)]}, []


def _env(url: str) -> _BurstyEnv:
    logging.getLogger("atroposlib.envs.base").setLevel(logging.ERROR)
    config = BaseEnvConfig(
        group_size=GROUP,
        max_num_workers=256,
        max_batches_offpolicy=AHEAD,
        tokenizer_name=str(demo_model_path()),
        rollout_server_url=url,
        use_wandb=False,
        wandb_name="bursty",
        total_steps=10**9,
        steps_per_eval=-1,
    )
    env = _BurstyEnv(config, [APIServerConfig(server_type="openai", api_key="x", model_name="x")], testing=True)
    env.begun = env.given_up = 0
    return env


async def _busy(seconds: float) -> None:
    """Another thing that the environment's process does: its event loop comes late to whatever it waits for."""
    while True:
        await asyncio.sleep(0.004)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass


async def _run(url: str, client: AtroposClient) -> int:
    """Returns the number of groups that the environment gave up."""
    env = _env(url)
    manager = asyncio.create_task(env.env_manager())
    busy = asyncio.create_task(_busy(0.01))
    try:
        for _ in range(BURSTS):
            fetched = None
            while fetched is None:
                if manager.done():
                    manager.result()
                await asyncio.sleep(0.02)
                fetched = await asyncio.to_thread(client.poll_batch)
            client.ack(fetched.lease_id)
        given_up = env.given_up
    finally:
        busy.cancel()
        manager.cancel()
        for worker in env.workers:
            worker.cancel()
        await asyncio.gather(manager, busy, *env.workers, return_exceptions=True)
    return given_up


@pytest.mark.timeout(120)
def test_no_group_is_given_up_because_another_one_is_counted_twice() -> None:
    with TrajectoryServer() as server:
        client = AtroposClient(server.url, lease_seconds=60.0)
        client.register(TrainerRegistration(**registration(BATCH * GROUP, max_token_len=512)))
        client.poll_batch()  # environments may register
        given_up = asyncio.run(_run(server.url, client))
        client.close()
    # Without it, one in every second burst. Two are allowed: this machine may stop a process for longer than PATIENCE.
    assert given_up <= 2
