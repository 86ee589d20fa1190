"""The thirteen mixes of group sizes on which upstream's server stalls or runs dry, 400 groups each: every group is
handed out, exactly once, the oldest first, and in the number of batches that the sizes allow."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from support.trajectory_server import Clock, post, registration

from atropos_verl.protocol.messages import EnvRegistration, TrainerRegistration
from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.store import Store

GROUPS = 400


@dataclass(frozen=True)
class Case:
    size: Callable[[int], int]
    """Group number → sequences."""
    batch_size: int
    declared: int
    full_batches: int
    """Batches that are handed out while the environment lives; the rest (less than a batch) when it has gone."""
    batch_sequences: set[int]
    """Sizes that those batches have."""


CASES = {
    "groups of 3, batch 8": Case(lambda i: 3, 8, 3, 200, {6}),
    "groups of 3, batch 12": Case(lambda i: 3, 12, 3, 100, {12}),
    "groups of 6, batch 16": Case(lambda i: 6, 16, 6, 200, {12}),
    "8 and 12, batch 24": Case(lambda i: (8, 12)[i % 2], 24, 8, 166, {24}),
    "4 and 6, batch 12": Case(lambda i: (4, 6)[i % 2], 12, 4, 166, {12}),
    "4 and 8, batch 16": Case(lambda i: (4, 8)[i % 2], 16, 4, 150, {16}),
    "one 6, then 4s, batch 8": Case(lambda i: 6 if i == 0 else 4, 8, 4, 200, {6, 8}),
    "one 16, then 4s, batch 8": Case(lambda i: 16 if i == 0 else 4, 8, 4, 200, {8, 16}),
    "groups of 4, batch 10": Case(lambda i: 4, 10, 4, 200, {8}),
    "declares 4, sends 3": Case(lambda i: 3, 8, 4, 200, {6}),
    "declares 4, sends 3, 1, 3, 1": Case(lambda i: (3, 1)[i % 2], 8, 4, 100, {8}),
    "declares 4, sends 8": Case(lambda i: 8, 8, 4, 400, {8}),
    "groups of 4 behind one GET": Case(lambda i: 4, 8, 4, 200, {8}),
}


@pytest.mark.parametrize("pattern", ["all at once", "one by one"])
@pytest.mark.parametrize("name", CASES)
def test_every_group_is_handed_out_exactly_once(name: str, pattern: str) -> None:
    case, clock = CASES[name], Clock()
    store = Store(ServerSettings(max_queue_groups=GROUPS), now=clock)
    store.register(TrainerRegistration(**registration(case.batch_size)))
    assert store.next_batch(60.0) is None
    environment = EnvRegistration(max_token_length=64, group_size=case.declared, desired_name="mix")
    assert store.register_env(environment) is not None
    got: list[list[int]] = []

    def take_all() -> None:
        while (batch := store.next_batch(60.0)) is not None:
            got.append(list(batch.seqs))
            assert store.ack(batch.lease_id) == "acked"

    for number in range(GROUPS):
        post(store, number, case.size(number), env_id=0)
        clock.pass_(0.01)
        store.hear_env(0)
        if pattern == "one by one":
            take_all()
    take_all()
    assert {sum(map(case.size, seqs)) for seqs in got} <= case.batch_sequences
    assert case.full_batches - 1 <= len(got) <= case.full_batches
    clock.pass_(1000.0)  # the environment has gone
    take_all()
    handed = [seq for batch in got for seq in batch]
    assert sorted(handed) == list(range(GROUPS))
    assert store.queue.groups == 0
    assert store.step == len(got)
