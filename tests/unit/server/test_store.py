"""Leases, duplicates, registrations, shares and bounds of the store, on a clock that the test sets; and the mixes of
group sizes on which upstream's server stalls."""

from pathlib import Path
from typing import Any

import pytest
from support.trajectory_server import Clock, group_bytes, join, post, registration, take

from atropos_verl.errors import ConfigError
from atropos_verl.protocol.messages import TrainerRegistration
from atropos_verl.server import status
from atropos_verl.server import store as store_module
from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.store import RequestError, Store


def trainer(batch_size: int = 8, **fields: Any) -> TrainerRegistration:
    return TrainerRegistration(**registration(batch_size, **fields))


def store_with(batch_size: int = 8, **settings: Any) -> tuple[Store, Clock]:
    clock = Clock()
    store = Store(ServerSettings(**settings), now=clock)
    store.register(trainer(batch_size))
    assert store.next_batch(None) is None
    return store, clock


def seen(store: Store, env_id: int) -> dict[str, Any]:
    return status.env_status(store, store.environments[env_id])


def test_a_lease_that_ends_returns_the_batch_to_its_old_place_and_step() -> None:
    store, clock = store_with()
    for number in range(4):
        post(store, number)
    first = take(store, 10.0)
    clock.pass_(9.9)
    second = take(store, 10.0)
    assert [(batch.seqs, batch.step) for batch in (first, second)] == [([0, 1], 1), ([2, 3], 2)]
    assert status.status(store)["open_leases"] == 2
    clock.pass_(0.2)
    again = take(store, 10.0)
    assert (again.seqs, again.step, again.deliveries) == ([0, 1], 1, 2)
    assert again.lease_id != first.lease_id
    assert store.step == 2
    with pytest.raises(RequestError, match="handed out again"):
        store.ack(first.lease_id)
    assert [store.ack(again.lease_id) for _ in range(2)] == ["acked", "already"]
    store.release(second.lease_id)
    assert [store.ack(second.lease_id) for _ in range(2)] == ["late", "already"]
    assert (store.groups, store.held_bytes, store.queue.groups) == ({}, 0, 0)


def test_the_same_group_of_one_environment_within_the_window_is_stored_once() -> None:
    store, clock = store_with(dedupe_window=60.0)
    one, two = join(store), join(store)
    assert [post(store, 5, env_id=env_id)["duplicates"] for env_id in (one, one, two, None, None)] == [0, 1, 0, 0, 0]
    clock.pass_(60.1)
    assert post(store, 5, env_id=one) == {"duplicates": 0}
    assert (store.queue.groups, store.totals["duplicates"], store.environments[one].duplicates) == (5, 1, 1)


@pytest.mark.parametrize(
    ("bound", "value", "said"),
    [
        ("max_queue_groups", 2, "2 groups wait, max_queue_groups is 2"),
        ("max_queue_bytes", 2 * len(group_bytes(0)), f"{2 * len(group_bytes(0))} bytes are held"),
    ],
)
def test_the_queue_is_bounded_and_environments_are_told_to_pause_before(bound: str, value: int, said: str) -> None:
    store, _ = store_with(**{bound: value}, soft_limit=0.6)
    env_id = join(store)
    post(store, 0)
    assert seen(store, env_id)["unallocated_fraction"] == 1.0
    post(store, 1)
    assert (seen(store, env_id)["unallocated_fraction"], seen(store, env_id)["queue_size"]) == (0.0, 2)
    with pytest.raises(RequestError, match=said):
        post(store, 2)


def test_a_trainer_of_another_run_waits_until_the_first_has_gone() -> None:
    store, clock = store_with(trainer_timeout=60.0)
    other = trainer(16, wandb_group="other")
    with pytest.raises(RequestError, match="run 'project'/'group' is registered and was heard 0 s ago"):
        store.register(other)
    post(store, 0), post(store, 1)
    batch = take(store, 1000.0)
    clock.pass_(61.0)
    with pytest.raises(RequestError, match="is registered"):  # it holds a lease
        store.register(other)
    store.ack(batch.lease_id)
    assert store.register(other) == "new"
    assert store.registration == other


def test_the_same_run_registers_again_with_new_settings() -> None:
    """Upstream ignores every field of a second registration."""
    store, _ = store_with(8)
    for number in range(4):
        post(store, number)
    batch = take(store)
    store.release(batch.lease_id)
    assert store.register(trainer(12, starting_step=7)) == "resumed"
    assert store.step == 7
    bigger = take(store)
    assert (bigger.seqs, bigger.step) == ([0, 1, 2], 8)
    with pytest.raises(RequestError, match="lease"):
        store.ack(batch.lease_id)


def test_the_api_of_a_run_takes_its_trainer_also_from_a_moved_directory(tmp_path: Path) -> None:
    """Heard a moment ago, under another checkpoint directory; and environments keep their names."""
    store, clock = store_with(8, data_dir=tmp_path, second_trainer="replace")
    assert store.environments[join(store, desired_name="words")].real_name == "words_0"
    store.close()
    store = Store(store.settings, now=clock)
    assert store.register(trainer(checkpoint_dir="/moved")) == "new"
    clock.pass_(1.0)
    # The one before is gone with its run; Atropos keeps an environment's checkpoints under this name. The second lives.
    numbers = [join(store, desired_name="words") for _ in range(2)]
    assert [(number, store.environments[number].real_name) for number in numbers] == [(1, "words_0"), (2, "words_1")]
    store.close()


def test_reset_forgets_and_goes_on() -> None:
    store, _ = store_with()
    join(store)
    post(store, 0), post(store, 1)
    batch = take(store)
    store.reset()
    assert (store.step, store.environments, store.registration, store.groups) == (0, [], None, {})
    with pytest.raises(RequestError, match="was the server reset"):
        store.ack(batch.lease_id)
    assert store.register(trainer(4, wandb_group="other")) == "new"
    post(store, 9)
    assert (take(store).step, store.queue.groups) == (1, 0)


def test_a_second_trainer_shares_when_the_server_says_so() -> None:
    store, _ = store_with(8, second_trainer="share")
    assert store.register(trainer(16, wandb_group="other")) == "shared"
    assert store.registration == trainer(8)


def test_an_environment_that_has_gone_blocks_nobody() -> None:
    store, clock = store_with(env_timeout=120.0)
    quiet, busy = join(store, min_batch_allocation=0.5), join(store)
    post(store, 0, env_id=busy), post(store, 1, env_id=busy)
    assert store.next_batch(10.0) is None
    assert [seen(store, env_id)["env_weight"] for env_id in (quiet, busy)] == [0.5, 0.5]
    clock.pass_(120.0)
    store.hear_env(busy)
    assert seen(store, busy)["env_weight"] == 1.0
    take(store)
    assert [row["state"] for row in status.environments(store)] == ["gone", "alive"]
    store.hear_env(quiet)
    assert seen(store, busy)["env_weight"] == 0.5


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_resumed_trainer_gets_no_part_of_a_batch_before_its_environments_could_come_back(comes_back: bool) -> None:
    store, clock = store_with(env_timeout=120.0)
    env_id = join(store)
    post(store, 0, env_id=env_id)
    store.disconnect_env(env_id)  # the run was interrupted
    clock.pass_(600.0)
    store.register(trainer())
    for _ in range(2):
        assert store.next_batch(10.0) is None, "an environment registers after this question, not before"
        clock.pass_(59.0)
    if comes_back:
        post(store, 1, env_id=join(store))
        assert take(store).seqs == [0, 1]
        return
    clock.pass_(2.0)
    assert take(store).seqs == [0]
    # One that came and went tells that there is nobody else to wait for.
    env_id = join(store)
    post(store, 1, env_id=env_id)
    store.disconnect_env(env_id)
    clock.pass_(5.0)
    assert take(store).seqs == [1]


def test_a_minimum_share_is_waited_for_and_then_waived() -> None:
    store, clock = store_with()
    store.register(trainer(min_allocation_wait=30.0))
    slow, busy = join(store, min_batch_allocation=0.25), join(store)
    post(store, 0, env_id=busy), post(store, 1, env_id=busy)
    assert store.next_batch(10.0) is None
    clock.pass_(29.0)
    store.hear_env(slow), store.hear_env(busy)
    assert store.next_batch(10.0) is None
    post(store, 2, env_id=slow)
    assert take(store, 1000.0).seqs == [0, 2]
    post(store, 3, env_id=busy)
    assert store.next_batch(10.0) is None
    clock.pass_(30.0)
    store.hear_env(slow)
    assert take(store).seqs == [1, 3]


def test_status_env_by_hand() -> None:
    store, _ = store_with(16)
    small = join(store, group_size=2, max_token_length=100, weight=1.0)
    large = join(store, group_size=4, max_token_length=100, weight=3.0, min_batch_allocation=0.25)
    for number in range(3):
        post(store, number, 2, env_id=small)
        post(store, 10 + number, 4, env_id=large)
    assert seen(store, small) == {
        "current_step": 0,
        # Own 6, and of the other's 12 (3 packs of 4) those beyond its minimum int(16 * 0.25) = 4: 14 // 2.
        "queue_size": 7,
        "unallocated_fraction": 0.75,
        "self_queue_size": 3,
        "max_group_size": 4,
        "env_weight": 0.25,
    }
    # Own 12, and the other's 6 count as 2 packs of 4: 20 // 4.
    assert seen(store, large)["queue_size"] == 5


def test_the_number_of_an_environment_that_is_gone_is_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_MAX_ENVIRONMENTS", 3)
    store, clock = store_with()
    for name in "abc":
        join(store, desired_name=name)
        clock.pass_(1.0)
    with pytest.raises(RequestError, match="3 environments are connected or have groups here"):
        join(store)
    post(store, 0, env_id=0)
    for number in (0, 1, 2):
        store.disconnect_env(number)
    assert join(store, desired_name="d") == 1  # a group of number 0 is here
    assert [environment.desired_name for environment in store.environments] == ["a", "d", "c"]


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("dedupe_window", -1.0, "of at least 0"),
        ("max_queue_groups", 0, "above 0"),
        ("env_timeout", 0.0, "above 0"),
        ("soft_limit", 1.5, "at most 1"),
        ("second_trainer", "maybe", "one of refuse, share"),
        ("compression", "best", "one of auto, always, never"),
        ("token", "", "printable ASCII"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(field: str, value: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: .*{why}"):
        ServerSettings(**{field: value})


N = 400
# Sizes of the groups, of a batch and of the group that was announced; batches while the environment lives (less than a
# batch is handed out when it has gone), and the sequences that those have.
MIXES: dict[str, tuple[list[int], int, int, int, set[int]]] = {
    "groups of 3, batch 8": ([3] * N, 8, 3, 200, {6}),
    "groups of 3, batch 12": ([3] * N, 12, 3, 100, {12}),
    "groups of 6, batch 16": ([6] * N, 16, 6, 200, {12}),
    "8 and 12, batch 24": ([8, 12] * N, 24, 8, 166, {24}),
    "4 and 6, batch 12": ([4, 6] * N, 12, 4, 166, {12}),
    "4 and 8, batch 16": ([4, 8] * N, 16, 4, 150, {16}),
    "one 6, then 4s, batch 8": ([6] + [4] * N, 8, 4, 200, {6, 8}),
    "one 16, then 4s, batch 8": ([16] + [4] * N, 8, 4, 200, {8, 16}),
    "groups of 4, batch 10": ([4] * N, 10, 4, 200, {8}),
    "declares 4, sends 3": ([3] * N, 8, 4, 200, {6}),
    "declares 4, sends 3, 1, 3, 1": ([3, 1] * N, 8, 4, 100, {8}),
    "declares 4, sends 8": ([8] * N, 8, 4, 400, {8}),
    "groups of 4 behind one GET": ([4] * N, 8, 4, 200, {8}),
}


@pytest.mark.parametrize("pattern", ["all at once", "one by one"])
@pytest.mark.parametrize("name", MIXES)
def test_every_group_of_a_mix_is_handed_out_exactly_once(name: str, pattern: str) -> None:
    """The oldest first, and in the number of batches that the sizes allow."""
    sizes, batch_size, declared, full_batches, batch_sequences = MIXES[name]
    store, clock = store_with(batch_size, max_queue_groups=N)
    join(store, group_size=declared)
    got: list[list[int]] = []

    def take_all() -> None:
        while (batch := store.next_batch(60.0)) is not None:
            got.append(list(batch.seqs))
            assert store.ack(batch.lease_id) == "acked"

    for number in range(N):
        post(store, number, sizes[number], env_id=0)
        clock.pass_(0.01)
        store.hear_env(0)
        if pattern == "one by one":
            take_all()
    take_all()
    assert {sum(sizes[seq] for seq in seqs) for seqs in got} <= batch_sequences
    assert full_batches - 1 <= len(got) <= full_batches
    clock.pass_(1000.0)  # the environment has gone
    take_all()
    assert sorted(seq for batch in got for seq in batch) == list(range(N))
    assert (store.queue.groups, store.step) == (0, len(got))
