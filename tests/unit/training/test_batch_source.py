"""The batch source: registration, the order of what is taken, retries, prefetch, and what goes back at the end."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from support import http_faults
from support.http_faults import FaultServer
from support.scripted_api import random_batches, scripted_api
from support.serving import eventually

from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import (
    AtroposConnectionError,
    AtroposHTTPStatusError,
    AtroposProtocolError,
    AtroposTimeoutError,
    ConfigError,
)
from atropos_verl.protocol.wire import decode_batch
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.provenance.throttle import StalenessThrottle
from atropos_verl.training.batch_source import BatchSource, RolloutData
from atropos_verl.training.staleness import BatchProvenance
from atropos_verl.training.step import RunTotals
from atropos_verl.types import SampleReport, SampleSettings

_MAX_TOKEN_LEN = 16
NOWHERE = "http://127.0.0.1:9"
"""Nobody answers there."""


def _config(url: str | None, **settings: object) -> RunConfig:
    values = {"batch_size": 8, "group_size": 4, "data": {"max_token_len": _MAX_TOKEN_LEN}, "max_response_length": 8}
    quick = {"batch_retry_delay": 0.01, "batch_max_wait_time": 0.1}
    return RunConfig.from_mapping({**values, **quick, "atropos": {"api_url": url}, **settings})


@contextmanager
def api_of(bodies: list[bytes], batch_size: int = 8) -> Iterator[FaultServer]:
    with scripted_api(bodies, batch_size=batch_size, max_token_len=_MAX_TOKEN_LEN) as api:
        yield api


def attached(source: BatchSource, max_staleness: int | None = None) -> tuple[RunTotals, StalenessThrottle]:
    totals, throttle = RunTotals(), StalenessThrottle(Ledger(), 8, 1)
    config = source.config.off_policy.model_copy(update={"max_staleness": max_staleness})
    source.attach(BatchProvenance(config, None, SampleSettings(vocab_size=256)), throttle, totals)
    return totals, throttle


def ids(data: RolloutData | bytes) -> list[str]:
    groups = decode_batch(data) if isinstance(data, bytes) else data.groups
    return [group.group_id for group in groups]


@contextmanager
def source_of(api: FaultServer | str, directory: Path, **settings: object) -> Iterator[BatchSource]:
    url = api if isinstance(api, str) else api.url
    with closing(BatchSource(_config(url, **settings), directory)) as source:
        yield source


LOST = http_faults.answer({"detail": "NaN"}, status=500)
[BODY] = random_batches(1, groups=2, group_size=4)


def test_it_registers_once_with_the_step_it_goes_on_from(tmp_path: Path) -> None:
    with api_of([]) as api, source_of(api, tmp_path) as source:
        for _ in range(2):
            source.register(3, 8)
        assert source.is_registered
        sent = api.last("/register").json()
        assert api.count("/register") == 1
        assert (sent["starting_step"], sent["batch_size"]) == (3, 8)
        assert sent["max_token_len"] == _MAX_TOKEN_LEN + 1  # of atroposlib, exclusive


def test_a_batch_of_the_first_poll_is_journalled_and_comes_first_also_after_a_restart(tmp_path: Path) -> None:
    first, second = random_batches(2, groups=2, group_size=4)
    with api_of([]) as api, source_of(api, tmp_path) as source:
        api.script("/batch", http_faults.answer(first), http_faults.answer(second))
        source.register(0, 8)
        assert [path.name for path in (tmp_path / "journal").glob("batch_??????.json")] == ["batch_000001.json"]
        _, throttle = attached(source)
        assert throttle.expected_staleness == 1
        assert ids(source.fetch()) == ids(first)
        assert ids(source.fetch()) == ids(second)
    with source_of(NOWHERE, tmp_path) as later:  # the API is not asked: an upstream one lends nothing
        assert later.resume(0) == later.resume(0) == 2
        attached(later)
        assert [ids(later.fetch()) for _ in range(2)] == [ids(first), ids(second)]
    with source_of(NOWHERE, tmp_path, resume="disable") as fresh:
        assert fresh.resume(0) == 0


def test_a_journalled_batch_that_is_none_is_quarantined_and_does_not_end_the_resumed_run(tmp_path: Path) -> None:
    with source_of(NOWHERE, tmp_path) as source:
        source.journal.record(b'{"batch": 7}')
        source.journal.record(BODY)
        _, throttle = attached(source)
        assert source.resume(3) == 2
        assert throttle.expected_staleness == 2
        assert ids(source.fetch()) == ids(BODY)
        assert throttle.expected_staleness == 1
        assert [entry.sequence for entry in source.journal.pending(3)] == [2]
    assert [path.name for path in (tmp_path / "quarantine").iterdir()] == ["batch_000001.json"]


def test_an_api_that_keeps_other_values_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with api_of([], batch_size=64) as api, source_of(api, tmp_path) as source:
        with pytest.raises(AtroposProtocolError, match=r"keeps an earlier registration .batch_size 64"):
            source.register(0, 8)
        assert not source.is_registered


def test_without_an_api_the_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"atropos\.api_url"):
        BatchSource(_config(None), tmp_path)


def test_lost_batches_are_counted_and_the_next_one_is_taken(tmp_path: Path) -> None:
    with api_of([]) as api, source_of(api, tmp_path) as source:
        api.script("/batch", LOST, LOST, http_faults.answer(BODY))
        totals, _ = attached(source)
        notes: list[str] = []
        source.note = notes.append
        assert ids(source.next()) == ids(BODY)
        assert totals.batches_lost_at_api == 2 == sum("the API lost a batch" in note for note in notes)


def test_an_api_that_loses_every_batch_is_given_up(tmp_path: Path) -> None:
    with api_of([]) as api, source_of(api, tmp_path) as source:
        api.script("/batch", LOST)
        totals, _ = attached(source)
        with pytest.raises(AtroposHTTPStatusError):
            source.next()
        assert totals.batches_lost_at_api == 5


@pytest.mark.parametrize("leased", [True, False])
def test_an_api_that_restarts_is_awaited_where_it_keeps_what_it_leases(tmp_path: Path, leased: bool) -> None:
    gone = http_faults.close_before_answer()
    with api_of([]) as api, source_of(api, tmp_path, batch_retry_attempts=1) as source:
        api.script("/batch", gone, gone, gone, http_faults.answer(BODY))
        attached(source)
        source.client.leased = leased
        if leased:
            assert ids(source.next()) == ids(BODY)
        else:
            with pytest.raises(AtroposConnectionError):
                source.next()
        assert api.count("/batch") == (4 if leased else 1)


@contextmanager
def patient_source(api: FaultServer, directory: Path, limit: str) -> Iterator[BatchSource]:
    """Its ``limit`` is short, the other long."""
    patience: dict[str, Any] = {"startup_timeout": 600.0, "rollout_timeout": 600.0, limit: 0.01}
    atropos = {"api_url": api.url, "rollout_timeout": patience["rollout_timeout"]}
    config = _config(None, atropos=atropos, env={"startup_timeout": patience["startup_timeout"]})
    with closing(BatchSource(config, directory)) as source:
        yield source


@pytest.mark.parametrize(("starts_environment", "limit"), [(True, "startup_timeout"), (False, "rollout_timeout")])
def test_the_first_batch_has_the_time_of_an_environment_that_starts(
    tmp_path: Path, starts_environment: bool, limit: str
) -> None:
    with api_of([]) as api, patient_source(api, tmp_path, limit) as source:
        source.journal.record(BODY)
        source.resume(0)
        attached(source)
        source.start(None, starts_environment=starts_environment)
        assert ids(source.take(more=True)) == ids(BODY), "of before a restart: nothing of the environment's"
        with pytest.raises(AtroposTimeoutError):
            source.take(more=True)
        source.stop(give_back=False)


def test_an_environment_that_delivered_is_not_starting_when_training_begins_again(tmp_path: Path) -> None:
    with api_of([BODY]) as api, patient_source(api, tmp_path, "rollout_timeout") as source:
        attached(source)
        source.start(None, starts_environment=True)
        assert ids(source.take(more=True)) == ids(BODY)
        source.stop(give_back=False)
        source.start(None, starts_environment=True)
        with pytest.raises(AtroposTimeoutError):
            source.take(more=True)
        source.stop(give_back=False)


def test_a_batch_of_nothing_but_stale_groups_is_over_without_a_step(tmp_path: Path) -> None:
    with source_of(NOWHERE, tmp_path) as source:
        source.journal.record(BODY)
        source.resume(2)
        totals, throttle = attached(source, max_staleness=0)
        data = source.fetch()
        assert not source.discard_if_stale(data, 5), "unknown versions are not old"
        assert data.applied is not None and data.applied[0] == 5, "the step that follows does not count it again"
        for group in data.groups:
            group.generation_params["policy_version"] = 4  # type: ignore[index]
        assert source.discard_if_stale(data, 5)
        assert (totals.batches_stale, throttle.expected_staleness) == (1, 0)
        assert source.journal.pending(2) == []


def test_a_batch_ahead_is_prepared_in_a_thread_and_goes_back_at_the_end(tmp_path: Path) -> None:
    bodies = random_batches(3, groups=2, group_size=4)
    prepared: list[list[str]] = []

    def prepare(data: RolloutData) -> None:
        assert threading.current_thread() is not threading.main_thread()
        prepared.append(ids(data))

    with api_of(bodies) as api, source_of(api, tmp_path) as source:
        source.register(0, 8)
        _, throttle = attached(source)
        source.start(None, prepare=prepare)
        first = source.take(more=True)
        assert ids(first) == ids(bodies[0])
        assert first.timings["prefetch"] >= first.timings["decode"]
        eventually(lambda: len(prepared) == 2, "the second batch, while the first one trains")
        assert throttle.active
        source.stop(give_back=False)
        assert not throttle.active and len(prepared) == 2
        source.start(None)
        second = source.take(more=True)
        assert (ids(first), ids(second)) == (ids(bodies[0]), ids(bodies[1])), "what was ahead is the next one"
        source.trained(second, 1)
        source.done()
        source.stop(give_back=True)
        assert throttle.expected_staleness == 1, "the first batch is not done"


@pytest.mark.parametrize(("version", "looks"), [(3, 1), (2, 2)])
def test_what_was_found_for_this_version_is_used_for_its_samples(version: int, looks: int, tmp_path: Path) -> None:
    with api_of([BODY]) as api, source_of(api, tmp_path) as source:
        source.register(0, 8)
        attached(source, max_staleness=9)
        data = source.fetch()
        with patch.object(BatchProvenance, "apply", autospec=True, side_effect=BatchProvenance.apply) as apply:
            assert not source.discard_if_stale(data, version)
            report = source.collect(data, 3, lambda groups: SampleReport(used=groups))
        assert apply.call_count == looks
        assert data.report is report and [group.group_id for group in report.used] == ids(data)
        assert data.off_policy["off_policy/dropped_stale_groups"] == 0


def test_an_error_of_the_fetching_thread_is_raised_where_the_batch_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(check: Callable[[], None]) -> RolloutData:
        raise ConnectionError("batch is gone")

    with source_of(NOWHERE, tmp_path) as source:
        monkeypatch.setattr(source, "next", broken)
        source.start(None, prepare=lambda data: None)
        for _ in range(2):
            with pytest.raises(ConnectionError, match="batch is gone"):
                source.take(more=True)
        source.stop(give_back=False)


def test_a_service_that_dies_while_a_batch_lies_ready_ends_the_run_and_the_batch_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, batch = threading.Event(), RolloutData([])

    def check() -> None:
        if dead.is_set():
            raise ChildProcessError("environment died")

    with source_of(NOWHERE, tmp_path) as source:
        monkeypatch.setattr(source, "next", lambda check: batch)
        source.start(check, prepare=lambda data: None)
        assert source.take(more=True) is batch
        dead.set()
        with pytest.raises(ChildProcessError, match="environment died"):
            source.take(more=True)
        source.stop(give_back=False)
        assert source.fetch() is batch


@pytest.mark.parametrize("comes", [True, False])
def test_the_end_of_training_ends_a_wait_and_keeps_what_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    asked, answered, batches = threading.Event(), threading.Event(), [RolloutData([]), RolloutData([])]

    def under_way(check: Callable[[], None]) -> RolloutData:
        if len(batches) == 1:
            asked.set()
            while not answered.wait(0.01):
                if not comes:  # else the API has sent it; stopping now would lose it
                    check()
        return batches.pop()

    with source_of(NOWHERE, tmp_path) as source:
        monkeypatch.setattr(source, "next", under_way)
        source.start(None, prepare=lambda data: None)
        source.take(more=True)
        assert asked.wait(10.0)
        left = batches[0]
        if comes:
            threading.Timer(0.01, answered.set).start()
        source.stop(give_back=False)
        assert list(source._early) == ([left] if comes else [])


def test_a_group_that_is_in_a_batch_twice_has_rollouts_of_its_own(tmp_path: Path) -> None:
    group = random_batches(1, groups=1, group_size=4)[0]
    twice = json.loads(group)
    twice["batch"] *= 2
    with source_of(NOWHERE, tmp_path) as source:
        source.journal.record(json.dumps(twice).encode())
        source.resume(2)
        attached(source)
        first, second = ids(source.fetch())
    assert second == f"{first}-2"
