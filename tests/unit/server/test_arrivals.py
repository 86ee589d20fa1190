"""The record of arrivals that the API keeps beside its log."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from support.trajectory_server import Clock, group_bytes, registration

from atropos_verl.protocol.schema import check_group
from atropos_verl.protocol.wire_model import EnvRegistration, Registration
from atropos_verl.server.batcher import ARRIVALS_FILE
from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.store import Store


def _store(directory: Path | None, clock: Clock) -> Store:
    return Store(ServerSettings(data_dir=directory), now=clock)


def _post(store: Store, number: int, env_id: int | None) -> None:
    checked = check_group(group_bytes(number, 4, env_id), environments=len(store.environments))
    store.accept([checked], lambda _: b"{}")


def test_each_batch_is_one_line_with_the_times_of_its_groups_also_across_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    store = _store(tmp_path, clock)
    store.register(Registration(**registration(8)))
    assert store.next_batch(60.0) is None
    assert not (tmp_path / ARRIVALS_FILE).exists()  # nothing was handed out
    store.register_env(EnvRegistration(max_token_length=64, desired_name="env", weight=1.0, group_size=4))
    for number, env_id in enumerate([0, None, 0, 0]):
        clock.pass_(0.25)
        _post(store, number, env_id)
    clock.pass_(1.0)
    first = store.next_batch(60.0)
    assert first is not None
    store.release(first.lease_id)
    assert store.next_batch(60.0) is not None  # the same batch again: it came only once
    store.close()
    again = _store(tmp_path, clock)
    clock.pass_(1.0)
    assert again.next_batch(60.0) is not None
    again.close()
    lines = [json.loads(line) for line in (tmp_path / ARRIVALS_FILE).read_text().splitlines()]
    assert lines == [
        {"step": 1, "at": 1_000_002.0, "groups": [[1_000_000.25, 0, 4, 12], [1_000_000.5, None, 4, 12]]},
        {"step": 2, "at": 1_000_003.0, "groups": [[1_000_000.75, 0, 4, 12], [1_000_001.0, 0, 4, 12]]},
    ]


def test_a_record_that_cannot_be_written_is_reported_once_and_stops_no_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = _store(tmp_path, Clock())
    (tmp_path / ARRIVALS_FILE).mkdir()
    store.register(Registration(**registration(4)))
    store.next_batch(60.0)
    for number in range(3):
        _post(store, number, None)
    with caplog.at_level(logging.WARNING):
        assert [store.next_batch(60.0) is None for _ in range(3)] == [False, False, False]
    store.close()
    assert [record.message.count(ARRIVALS_FILE) for record in caplog.records] == [1]


def test_a_server_in_memory_keeps_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = _store(None, Clock())
    store.register(Registration(**registration(4)))
    store.next_batch(None)
    _post(store, 1, None)
    assert store.next_batch(None) is not None
    assert list(tmp_path.iterdir()) == []
