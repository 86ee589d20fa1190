"""Seeded requests over all routes of the API: no answer is a failure of the server, and its state stays consistent.

``ATROPOS_VERL_FUZZ=500000`` (``make fuzz``) sends so many, and looks at the memory.
"""

import os
import random
from typing import Any

import pytest
from support.malformed import good_group
from support.request_fuzz import FuzzedRoute, fuzzed
from support.trajectory_server import Clock, group, registration

from atropos_verl.server.app import TrajectoryApi
from atropos_verl.server.settings import ServerSettings

_HELLO = {"max_token_length": 64, "desired_name": "words", "weight": 1.0, "group_size": 4, "min_batch_allocation": 0.5}
_SAID = {"env_id": 0, "messages": [[{"role": "user", "content": "hej"}], []], "images": ["a"], "seed": 3}
_FULL = {**good_group(random.Random(0), group_size=2, vocab_size=150), **_SAID}
_GROUPS = [group(1, 4, env_id=0), group(2, 3), _FULL]
_BODIES = {
    "/register": [registration(8), registration(6, batch_fill="at_least", vocab_size=150, min_allocation_wait=1.0)],
    "/register-env": [_HELLO],
    "/disconnect-env": [{"env_id": 0}],
    "/status-env": [{"env_id": 0}, {"env_id": 1}],
    "/scored_data": _GROUPS,
    "/scored_data_list": [_GROUPS, _GROUPS[:1], []],
    "/batch/ack": [{"lease_id": "x"}],
    "/batch/renew": [{"lease_id": "x", "seconds": 5}],
    "/batch/release": [{"lease_id": "x"}],
}


def check_consistent(app: TrajectoryApi) -> None:
    store = app.store
    out = [seq for batch in store.outstanding.values() for seq in batch.seqs]
    back = [seq for batch in store.returned for seq in batch.seqs]
    waiting = [group.seq for members in store.queue.classes.values() for group in members]
    assert sorted(out + back + waiting) == sorted(store.groups)
    assert store.queue.groups == len(waiting) + len(back)
    assert store.queue.sequences == sum(store.groups[seq].size for seq in waiting + back)
    assert store.held_bytes == sum(len(group.raw + (group.packed or b"")) for group in store.groups.values())
    assert app.counters.bytes_held == 0


@pytest.mark.parametrize("token", [None, "T"])
async def test_no_request_makes_the_api_fail(token: str | None) -> None:
    count, clock = int(os.environ.get("ATROPOS_VERL_FUZZ", 1600)) // 2, Clock()
    bounds: dict[str, Any] = {"env_timeout": 50.0, "trainer_timeout": 5.0, "max_queue_groups": 300}
    app = TrajectoryApi(ServerSettings(token=token, allowed_hosts=("localhost", "127.0.0.1"), **bounds), now=clock)
    headers = {} if token is None else {"authorization": "Bearer T"}
    routes = [
        FuzzedRoute(method, path, _BODIES.get(path, ()), headers, ("", "?env_id=0") if path == "/status-env" else ("",))
        for method, path in map(str.split, app.handlers)
        if path != "/reset_data"
    ]
    often = [route for route in routes if "/scored_data" in route.path or route.path in ("/batch", "/register-env")]
    routes = [*5 * routes, *20 * often, FuzzedRoute("GET", "/reset_data", (), headers), FuzzedRoute("GET", "/nothing")]
    async for _ in fuzzed(app, 1 if token else 0, routes, count, lambda: check_consistent(app)):
        clock.pass_(0.05)
    assert app.store.totals["batches"] > count / 5000 and len(app.counters.requests) < 200
