"""AtroposShardingManager: the order of its calls, its exceptions, its canary."""

import inspect
from typing import Any
from unittest.mock import Mock

import pytest

from atropos_verl.errors import WeightSyncError
from atropos_verl.training.weight_sync import AtroposShardingManager, Canary, PausableGate, SyncableEngine, WeightSource

PARTS = (WeightSource, SyncableEngine, PausableGate)
ONE_BUFFER = [name for part in PARTS for name in vars(part) if not name.startswith("_")]
TWO_BUFFERS = [*ONE_BUFFER, "stage_weights_from_tensor", "swap_weights"]
ENTER = ["resume_memory_occupation", "named_tensors", "update_weights_from_tensor", "resume"]


def make_parts(names: list[str], **fails: Exception) -> Mock:
    """Engine, gate and source in one."""
    parts = Mock(spec_set=names, policy_version=3)
    for name, error in fails.items():
        getattr(parts, name).side_effect = error
    return parts


def calls(parts: Mock) -> list[str]:
    return [call[0] for call in parts.mock_calls]


def manager(parts: Mock, canary: Canary | None = None) -> AtroposShardingManager:
    return AtroposShardingManager(parts, parts, gate=parts, canary=canary)


def make_canary(engine: list[float], trainer: list[float], staged: Any = None, threshold: float = 0.1) -> Canary:
    return Canary(
        trainer_logprobs=lambda: trainer, engine_logprobs=lambda: engine, staged_logprobs=staged, threshold=threshold
    )


def versioned(named_tensors: Any, policy_version: int) -> int: ...


@pytest.mark.parametrize("takes_version", [False, True])
def test_every_enter_copies_the_newest_weights_before_the_gate_opens(takes_version: bool) -> None:
    parts = make_parts(ONE_BUFFER)
    if takes_version:
        parts.update_weights_from_tensor.__signature__ = inspect.signature(versioned)
    parts.update_weights_from_tensor.return_value = 4
    manages, update = manager(parts), parts.update_weights_from_tensor
    for parts.policy_version in (3, 4):
        parts.reset_mock()
        with manages:
            assert calls(parts) == ENTER
        assert calls(parts) == [*ENTER, "pause", "release_memory_occupation"]
        with_version = {"policy_version": parts.policy_version} if takes_version else {}
        update.assert_called_once_with(parts.named_tensors.return_value, **with_version)
        last = manages.last_sync
        assert (last.policy_version, last.bytes_copied, last.paused_seconds) == (parts.policy_version, 4, None)
        assert last.canary_max_abs_logprob_diff is None
    assert manages.syncs == 2


@pytest.mark.parametrize("name", ["pause", "release_memory_occupation"])
def test_a_failure_on_exit_is_raised_and_never_masks_the_exception_of_the_body(name: str) -> None:
    parts = make_parts(ONE_BUFFER, **{name: RuntimeError("leaving failed")})
    with pytest.raises(RuntimeError, match="leaving failed"), manager(parts):
        pass
    with pytest.raises(KeyError, match="body") as caught, manager(parts):
        raise KeyError("body")
    assert "leaving the rollout phase failed as well: RuntimeError('leaving failed')" in caught.value.__notes__[0]


@pytest.mark.parametrize("name", ["resume_memory_occupation", "update_weights_from_tensor"])
def test_entering_again_after_a_failure_works(name: str) -> None:
    parts = make_parts(ONE_BUFFER, **{name: RuntimeError("no memory")})
    manages = manager(parts)
    with pytest.raises(RuntimeError, match="no memory"), manages:
        pytest.fail("the body must not run")
    assert "resume" not in calls(parts)
    getattr(parts, name).side_effect = None
    with manages:
        assert calls(parts)[-1] == "resume"


def test_a_swap_copies_and_checks_while_the_gate_is_open() -> None:
    parts, staged = make_parts(TWO_BUFFERS), Mock(return_value=[-1.0])
    parts.stage_weights_from_tensor.return_value = 4
    with manager(parts, make_canary([-1.25], [-1.0], staged, threshold=0.3)) as manages:
        assert manages.last_sync.canary_max_abs_logprob_diff == 0.25
        parts.reset_mock()
        parts.policy_version = 4
        staged.side_effect = lambda: parts.pause.assert_not_called() or [-1.0]
        report = manages.swap()
        assert calls(parts) == ["named_tensors", "stage_weights_from_tensor", "pause", "swap_weights", "resume"]
        parts.stage_weights_from_tensor.assert_called_once_with(parts.named_tensors.return_value)
        parts.swap_weights.assert_called_once_with(policy_version=4)
    staged.assert_called_once_with()
    assert (report.policy_version, report.bytes_copied, report.canary_max_abs_logprob_diff) == (4, 4, 0.0)
    assert report is manages.last_sync and manages.syncs == 2
    assert 0.0 <= report.paused_seconds <= report.seconds


@pytest.mark.parametrize("name", ["stage_weights_from_tensor", "the canary", "pause", "swap_weights"])
def test_a_swap_that_fails_anywhere_leaves_the_gate_shut(name: str) -> None:
    parts, error, staged = make_parts(TWO_BUFFERS), RuntimeError("no memory"), [-1.0]
    with pytest.raises(LookupError), manager(parts, make_canary([-1.0], [-1.0], lambda: staged)) as manages:
        parts.reset_mock()
        if name == "the canary":
            staged, error = [-1.5], WeightSyncError("up to 0.5")
        else:
            getattr(parts, name).side_effect = error
        with pytest.raises(type(error), match=str(error)):
            manages.swap()
        assert calls(parts)[-1] == "pause" and "resume" not in calls(parts)
        assert ("swap_weights" in calls(parts)) == (name == "swap_weights")
        raise LookupError("the run ends")


def test_an_engine_with_one_buffer_cannot_swap() -> None:
    refused = pytest.raises(WeightSyncError, match="has no second buffer for weights")
    with manager(make_parts(ONE_BUFFER)) as manages, refused:
        manages.swap()


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ([-1.0, -2.5], r"up to 0.5 \(sync.canary_threshold=0.1\)"),
        ([float("nan"), -2.0], "up to inf"),
        ([-1.0], "engine 1"),
        ([], "engine 0"),
    ],
)
def test_the_gate_stays_shut_when_the_canary_fails(engine: list[float], message: str) -> None:
    parts = make_parts(ONE_BUFFER)
    with pytest.raises(WeightSyncError, match=message), manager(parts, make_canary(engine, [-1.0, -2.0])):
        pytest.fail("the body must not run")
    assert calls(parts) == ENTER[:-1]
