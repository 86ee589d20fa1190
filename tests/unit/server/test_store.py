"""Leases, acks, duplicates, registrations and bounds of the store, on a clock that the test sets."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.trajectory_server import Clock, group_bytes, post, registration, take

from atropos_verl.errors import ConfigError
from atropos_verl.protocol.messages import EnvRegistration, TrainerRegistration
from atropos_verl.protocol.schema import Refusal, check_group
from atropos_verl.server import status
from atropos_verl.server import store as store_module
from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.store import RequestError, Store


def store_with(batch_size: int = 8, **settings: Any) -> tuple[Store, Clock]:
    clock = Clock()
    store = Store(ServerSettings(**settings), now=clock)
    store.register(TrainerRegistration(**registration(batch_size)))
    store.next_batch(None)
    return store, clock


def join(store: Store, **fields: Any) -> int:
    environment = store.register_env(EnvRegistration(**{"max_token_length": 64, "group_size": 4, **fields}))
    assert environment is not None
    return environment.env_id


def test_a_lease_that_ends_returns_the_batch_to_its_old_place_and_step() -> None:
    store, clock = store_with()
    for number in range(4):
        post(store, number)
    first = take(store, 10.0)
    assert (first.seqs, first.step) == ([0, 1], 1)
    clock.pass_(9.9)
    second = take(store, 10.0)
    assert (second.seqs, second.step) == ([2, 3], 2)
    clock.pass_(0.2)
    again = take(store, 10.0)
    assert (again.seqs, again.step, again.deliveries) == ([0, 1], 1, 2)
    assert again.lease_id != first.lease_id
    assert store.step == 2
    with pytest.raises(RequestError, match="handed out again"):
        store.ack(first.lease_id)
    assert store.ack(again.lease_id) == "acked"
    assert store.ack(again.lease_id) == "already"
    assert store.ack(second.lease_id) == "acked"
    assert store.groups == {}
    assert store.held_bytes == 0


def test_the_same_group_of_one_environment_within_the_window_is_stored_once() -> None:
    store, clock = store_with(dedupe_window=60.0)
    one, two = join(store), join(store)
    assert post(store, 5, env_id=one) == {"duplicates": 0}
    assert post(store, 5, env_id=one) == {"duplicates": 1}
    assert post(store, 5, env_id=two) == {"duplicates": 0}
    assert post(store, 5) == {"duplicates": 0}
    assert post(store, 5) == {"duplicates": 0}
    clock.pass_(60.1)
    assert post(store, 5, env_id=one) == {"duplicates": 0}
    assert store.queue.groups == 5
    assert store.totals["duplicates"] == 1
    assert store.environments[one].duplicates == 1


def test_the_queue_is_bounded_by_groups_and_by_bytes() -> None:
    store, _ = store_with(max_queue_groups=2)
    post(store, 0), post(store, 1)
    with pytest.raises(RequestError, match="2 groups wait, max_queue_groups is 2"):
        post(store, 2)
    size = len(check_group(group_bytes(0)).raw)
    store, _ = store_with(max_queue_bytes=2 * size)
    post(store, 0), post(store, 1)
    assert store.nearly_full()
    with pytest.raises(RequestError, match=f"{2 * size} bytes are held"):
        post(store, 2)


def test_a_trainer_of_another_run_waits_until_the_first_has_gone() -> None:
    store, clock = store_with(trainer_timeout=60.0)
    other = TrainerRegistration(**registration(16, wandb_group="other"))
    with pytest.raises(RequestError, match="run 'project'/'group' is registered and was heard 0 s ago"):
        store.register(other)
    post(store, 0), post(store, 1)
    batch = take(store, 1000.0)
    clock.pass_(61.0)
    with pytest.raises(RequestError, match="is registered"):  # it holds a lease
        store.register(other)
    store.ack(batch.lease_id)
    assert store.register(other) == "new"
    assert store.registration is not None and store.registration.batch_size == 16


def test_the_same_run_registers_again_with_new_settings() -> None:
    """Upstream ignores every field of a second registration."""
    store, _ = store_with(8)
    for number in range(4):
        post(store, number)
    batch = take(store, 100.0)
    store.release(batch.lease_id)
    assert store.register(TrainerRegistration(**registration(12, starting_step=7))) == "resumed"
    assert store.step == 7
    bigger = take(store, 100.0)
    assert (bigger.seqs, bigger.step) == ([0, 1, 2], 8)
    with pytest.raises(RequestError, match="lease"):
        store.ack(batch.lease_id)


def test_the_api_of_a_run_takes_its_trainer_also_from_a_moved_directory(tmp_path: Path) -> None:
    """Heard a moment ago, with a lease open, under another checkpoint directory; and environments keep their names."""
    store, _ = store_with(8, data_dir=tmp_path, second_trainer="replace")
    name = "words"
    assert store.environments[join(store, desired_name=name)].real_name == "words_0"
    store.close()
    clock = Clock()
    store = Store(ServerSettings(data_dir=tmp_path, second_trainer="replace"), now=clock)
    assert store.register(TrainerRegistration(**registration(8, checkpoint_dir="/moved"))) == "new"
    clock.pass_(1.0)
    # The one before is gone with its run; Atropos keeps an environment's checkpoints under this name.
    again = join(store, desired_name=name)
    assert (again, store.environments[again].real_name) == (1, "words_0")
    assert store.environments[join(store, desired_name=name)].real_name == "words_1", "the one before lives"
    store.close()


def test_a_second_trainer_shares_when_the_server_says_so() -> None:
    store, _ = store_with(8, second_trainer="share")
    assert store.register(TrainerRegistration(**registration(16, wandb_group="other"))) == "shared"
    assert store.registration is not None and store.registration.batch_size == 8
    with pytest.raises(Refusal, match="batch_fill = 'most' must be one of auto, exact, at_most, at_least"):
        store.register(TrainerRegistration(**registration(8, batch_fill="most")))


def test_an_environment_that_has_gone_blocks_nobody() -> None:
    store, clock = store_with(env_timeout=120.0)
    quiet, busy = join(store, min_batch_allocation=0.5), join(store)
    post(store, 0, env_id=busy), post(store, 1, env_id=busy)
    assert store.next_batch(10.0) is None
    weights = [status.env_status(store, environment)["env_weight"] for environment in store.environments]
    assert weights == [0.5, 0.5]
    clock.pass_(120.0)
    store.hear_env(busy)
    assert status.env_status(store, store.environments[busy])["env_weight"] == 1.0
    assert store.next_batch(10.0) is not None
    assert [e["state"] for e in status.environments(store)] == ["gone", "alive"]
    store.hear_env(quiet)
    assert status.env_status(store, store.environments[busy])["env_weight"] == 0.5


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_resumed_trainer_gets_no_part_of_a_batch_before_its_environments_could_come_back(comes_back: bool) -> None:
    store, clock = store_with(env_timeout=120.0)
    env_id = join(store)
    post(store, 0, env_id=env_id)
    store.disconnect_env(env_id)  # the run was interrupted
    clock.pass_(600.0)
    store.register(TrainerRegistration(**registration(8)))
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
    store.register(TrainerRegistration(**registration(8, min_allocation_wait=30.0)))
    slow, busy = join(store, min_batch_allocation=0.25), join(store)
    post(store, 0, env_id=busy), post(store, 1, env_id=busy)
    assert store.next_batch(10.0) is None
    clock.pass_(29.0)
    store.hear_env(slow), store.hear_env(busy)
    assert store.next_batch(10.0) is None
    post(store, 2, env_id=slow)
    with_share = take(store, 1000.0)
    assert with_share.seqs == [0, 2]
    post(store, 3, env_id=busy)
    assert store.next_batch(10.0) is None
    clock.pass_(30.0)
    store.hear_env(slow)
    without = take(store, 10.0)
    assert without.seqs == [1, 3]


def test_status_env_by_hand() -> None:
    store, _ = store_with(16)
    small = join(store, group_size=2, max_token_length=100, weight=1.0)
    large = join(store, group_size=4, max_token_length=100, weight=3.0, min_batch_allocation=0.25)
    for number in range(3):
        post(store, number, 2, env_id=small)
    for number in range(3):
        post(store, 10 + number, 4, env_id=large)
    assert status.env_status(store, store.environments[small]) == {
        "current_step": 0,
        # Own 6, and of the other's 12 (3 packs of 4) those beyond its minimum int(16 * 0.25) = 4: 14 // 2.
        "queue_size": 7,
        "unallocated_fraction": 0.75,
        "self_queue_size": 3,
        "max_group_size": 4,
        "env_weight": 0.25,
    }
    # Own 12, and the other's 6 count as 2 packs of 4: 20 // 4.
    assert status.env_status(store, store.environments[large])["queue_size"] == 5


def test_a_nearly_full_server_tells_environments_to_pause() -> None:
    store, _ = store_with(max_queue_groups=10, soft_limit=0.8)
    env_id = join(store)
    for number in range(7):
        post(store, number, env_id=env_id)
    assert status.env_status(store, store.environments[env_id])["unallocated_fraction"] == 1.0
    post(store, 7, env_id=env_id)
    told = status.env_status(store, store.environments[env_id])
    assert (told["unallocated_fraction"], told["queue_size"]) == (0.0, 8)


def test_reset_forgets_and_goes_on() -> None:
    store, _ = store_with()
    join(store)
    post(store, 0), post(store, 1)
    batch = take(store, 10.0)
    store.reset()
    assert status.status(store)["queue_size"] == 0
    assert (store.step, store.environments, store.registration) == (0, [], None)
    with pytest.raises(RequestError, match="was the server reset"):
        store.ack(batch.lease_id)
    assert store.register(TrainerRegistration(**registration(4))) == "new"
    post(store, 9)
    again = take(store, 10.0)
    assert json.loads(store.members(again)[0].raw)["tokens"][0][0] == 9


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
    assert store.environments[1].desired_name == "d" and len(store.environments) == 3
