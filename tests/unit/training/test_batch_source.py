"""The batch source: registration, the order of what is taken, retries, prefetch, and what goes back at the end."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
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
from atropos_verl.protocol.schema import validated
from atropos_verl.protocol.wire import decode_batch
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.provenance.throttle import StalenessThrottle
from atropos_verl.training.batch_source import BatchSource, RolloutData
from atropos_verl.training.staleness import BatchProvenance
from atropos_verl.training.step import RunTotals
from atropos_verl.types import SampleReport, SampleSettings

LOST = http_faults.answer({"detail": "NaN"}, status=500)
GONE = http_faults.close_before_answer()
BODY, OTHER, THIRD = random_batches(3, groups=2, group_size=4)
COMES = http_faults.answer(BODY)


def config_of(url: str | None, **settings: Any) -> RunConfig:
    values = {"batch_size": 8, "group_size": 4, "data": {"max_token_len": 16}, "max_response_length": 8}
    quick = {"batch_retry_delay": 0.01, "batch_max_wait_time": 0.1}
    atropos = {"api_url": url, **settings.pop("atropos", {})}
    return RunConfig.from_mapping({**values, **quick, "atropos": atropos, **settings})


@contextmanager
def source_of(
    directory: Path, *bodies: bytes, batch_size: int = 8, **settings: Any
) -> Iterator[tuple[BatchSource, FaultServer]]:
    """Of an API that delivers ``bodies``."""
    with (
        scripted_api(bodies, batch_size=batch_size, max_token_len=16) as api,
        closing(BatchSource(config_of(api.url, **settings), directory)) as source,
    ):
        yield source, api


def attached(source: BatchSource, max_staleness: int | None = None) -> tuple[RunTotals, StalenessThrottle]:
    totals, throttle = RunTotals(), StalenessThrottle(Ledger(), 8, 1)
    config = source.config.off_policy.model_copy(update={"max_staleness": max_staleness})
    source.attach(BatchProvenance(config, None, SampleSettings(vocab_size=256)), throttle, totals)
    return totals, throttle


def ids(data: RolloutData | bytes) -> list[str]:
    groups = decode_batch(data) if isinstance(data, bytes) else data.groups
    return [group.group_id for group in groups]


def test_what_cannot_be_attached_to_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"atropos\.api_url"):
        BatchSource(config_of(None), tmp_path)
    with source_of(tmp_path, batch_size=64) as (source, _):
        with pytest.raises(AtroposProtocolError, match=r"keeps an earlier registration .batch_size 64"):
            source.register(0, 8)
        assert not source.is_registered


def test_it_registers_once_and_a_batch_of_the_first_poll_comes_first_also_after_a_restart(tmp_path: Path) -> None:
    with source_of(tmp_path) as (source, api):
        api.script("/batch", COMES, http_faults.answer(OTHER))
        for _ in range(2):
            source.register(3, 8)
        sent = api.last("/register").json()
        assert source.is_registered and api.count("/register") == 1
        assert (sent["starting_step"], sent["batch_size"]) == (3, 8)
        assert sent["max_token_len"] == 17  # of atroposlib, exclusive
        assert [path.name for path in (tmp_path / "journal").glob("batch_??????.json")] == ["batch_000001.json"]
        _, throttle = attached(source)
        assert throttle.expected_staleness == 1
        assert [ids(source.fetch()) for _ in range(2)] == [ids(BODY), ids(OTHER)]
    with source_of(tmp_path) as (later, api):
        assert later.resume(3) == later.resume(3) == 2
        attached(later)
        assert [ids(later.fetch()) for _ in range(2)] == [ids(BODY), ids(OTHER)]
        assert api.count("/batch") == 0
    with source_of(tmp_path, resume="disable") as (fresh, _):
        assert fresh.resume(3) == 0


def test_a_journalled_batch_that_is_none_is_quarantined_and_does_not_end_the_resumed_run(tmp_path: Path) -> None:
    with source_of(tmp_path) as (source, _):
        for body in (b'{"batch": 7}', BODY):
            source.journal.record(body)
        _, throttle = attached(source)
        assert source.resume(3) == throttle.expected_staleness == 2
        assert ids(source.fetch()) == ids(BODY)
        assert throttle.expected_staleness == 1
        assert [entry.sequence for entry in source.journal.pending(3)] == [2]
    assert [path.name for path in (tmp_path / "quarantine").iterdir()] == ["batch_000001.json"]


@pytest.mark.parametrize(
    ("answers", "leased", "error", "lost", "asked"),
    [
        pytest.param([LOST, LOST, COMES], False, None, 2, 3, id="it loses two batches"),
        pytest.param([LOST], False, AtroposHTTPStatusError, 5, 6, id="it loses every batch"),
        pytest.param([GONE] * 3 + [COMES], True, None, 0, 4, id="it restarts, and keeps what it leases"),
        pytest.param([GONE] * 3 + [COMES], False, AtroposConnectionError, 0, 1, id="it restarts, and forgets"),
    ],
)
def test_which_faults_of_the_api_are_outlasted(
    tmp_path: Path, answers: list[Any], leased: bool, error: Any, lost: int, asked: int
) -> None:
    notes: list[str] = []
    with source_of(tmp_path, batch_retry_attempts=1) as (source, api):
        api.script("/batch", *answers)
        totals, _ = attached(source)
        source.note, source.client.leased = notes.append, leased
        with pytest.raises(error) if error else nullcontext():
            assert ids(source.next()) == ids(BODY)
        assert api.count("/batch") == asked
    assert totals.batches_lost_at_api == lost == sum("the API lost a batch" in note for note in notes)


@pytest.mark.parametrize(
    ("starts_environment", "has_delivered", "limit"),
    [(True, False, "startup"), (False, False, "rollout"), (True, True, "rollout")],
)
def test_the_first_batch_has_the_time_of_an_environment_that_starts(
    tmp_path: Path, starts_environment: bool, has_delivered: bool, limit: str
) -> None:
    """``limit`` is short, the other long."""
    patience = {"startup": 600.0, "rollout": 600.0, limit: 0.01}
    settings = {"atropos": {"rollout_timeout": patience["rollout"]}, "env": {"startup_timeout": patience["startup"]}}
    with source_of(tmp_path, *[BODY] * has_delivered, **settings) as (source, _):
        if not has_delivered:  # of before a restart: nothing of the environment's
            source.journal.record(BODY)
            source.resume(0)
        attached(source)
        source.start(None, starts_environment=starts_environment)
        assert ids(source.take(more=True)) == ids(BODY)
        source.stop(give_back=False)
        source.start(None, starts_environment=starts_environment)  # training begins again
        with pytest.raises(AtroposTimeoutError):
            source.take(more=True)


def test_a_batch_of_nothing_but_stale_groups_is_over_without_a_step(tmp_path: Path) -> None:
    apply = patch.object(BatchProvenance, "apply", autospec=True, side_effect=BatchProvenance.apply)
    with source_of(tmp_path) as (source, _), apply as looks:
        source.journal.record(BODY)
        source.resume(2)
        totals, throttle = attached(source, max_staleness=0)
        data = source.fetch()
        for version, expected in ((5, 1), (4, 3)):  # what was found for the version of the step is not looked for again
            assert not source.discard_if_stale(data, version), "unknown versions are not old"
            report = source.collect(data, 5, lambda groups: SampleReport(used=groups))
            assert looks.call_count == expected
        assert data.report is report and [group.group_id for group in report.used] == ids(data)
        assert data.off_policy["off_policy/dropped_stale_groups"] == 0
        for group in data.groups:
            group.generation_params["policy_version"] = 4  # type: ignore[index]
        assert source.discard_if_stale(data, 5)
        assert (totals.batches_stale, throttle.expected_staleness) == (1, 0)
        assert source.journal.pending(2) == []


def test_a_batch_ahead_is_prepared_in_a_thread_and_goes_back_at_the_end(tmp_path: Path) -> None:
    prepared: list[list[str]] = []

    def prepare(data: RolloutData) -> None:
        assert threading.current_thread() is not threading.main_thread()
        prepared.append(ids(data))

    with source_of(tmp_path, BODY, OTHER, THIRD) as (source, _):
        source.register(0, 8)
        _, throttle = attached(source)
        source.start(None, prepare=prepare)
        first = source.take(more=True)
        assert first.timings["prefetch"] >= first.timings["decode"]
        eventually(lambda: len(prepared) == 2, "the second batch, while the first one trains")
        assert throttle.active
        source.stop(give_back=False)
        assert not throttle.active and len(prepared) == 2
        source.start(None)
        second = source.take(more=True)
        assert (ids(first), ids(second)) == (ids(BODY), ids(OTHER)), "what was ahead is the next one"
        source.trained(second, 1)
        source.done()
        source.stop(give_back=True)
        assert throttle.expected_staleness == 1, "the first batch is not done"


def test_an_error_of_the_fetching_thread_is_raised_where_the_batch_is_taken(tmp_path: Path) -> None:
    with source_of(tmp_path) as (source, _), patch.object(source, "next", side_effect=ConnectionError("it is gone")):
        source.start(None, prepare=lambda data: None)
        for _ in range(2):
            with pytest.raises(ConnectionError, match="it is gone"):
                source.take(more=True)
        source.stop(give_back=False)


@pytest.mark.parametrize("comes", [True, False])
def test_the_end_of_training_ends_a_wait_and_keeps_what_came(tmp_path: Path, comes: bool) -> None:
    asked, answered, batches = threading.Event(), threading.Event(), [RolloutData([]), RolloutData([])]
    left = batches[0]

    def under_way(check: Callable[[], None]) -> RolloutData:
        if len(batches) == 1:
            asked.set()
            while not answered.wait(0.01):
                if not comes:  # else the API has sent it; stopping now would lose it
                    check()
        return batches.pop()

    with source_of(tmp_path) as (source, _), patch.object(source, "next", under_way):
        source.start(None, prepare=lambda data: None)
        source.take(more=True)
        assert asked.wait(10.0)
        if comes:
            threading.Timer(0.01, answered.set).start()
        source.stop(give_back=False)
        assert list(source._early) == ([left] if comes else [])


def test_a_group_that_is_in_a_batch_twice_has_rollouts_of_its_own() -> None:
    [group, _] = decode_batch(BODY)
    assert [same.group_id for same in validated([group, group], None)] == [group.group_id, f"{group.group_id}-2"]
