"""AtroposShardingManager: the order of its calls, its exceptions, its canary."""

from collections.abc import Iterable
from functools import partialmethod
from typing import Any

import pytest
import torch

from atropos_verl.errors import WeightSyncError
from atropos_verl.training.weight_sync import AtroposShardingManager, Canary


class _Recorder:
    """Engine, gate and source in one, writing down what is called."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.policy_version = 3
        self.weights: dict[str, float] = {}
        self.fail_on = ""

    def _note(self, name: str) -> None:
        self.calls.append(name)
        if self.fail_on == name:
            raise RuntimeError(f"{name} failed")

    def named_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        yield "w", torch.tensor(float(self.policy_version))

    def update_weights_from_tensor(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        self._note("update")
        self.weights = {name: float(tensor) for name, tensor in named_tensors}
        return 4 * len(self.weights)

    resume_memory_occupation = partialmethod(_note, "resume_memory")
    release_memory_occupation = partialmethod(_note, "release_memory")
    resume = partialmethod(_note, "open")

    def pause(self, timeout: float) -> None:
        self._note("pause")


class _VersionedRecorder(_Recorder):
    version = -1

    def update_weights_from_tensor(  # type: ignore[override]
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int
    ) -> int:
        self.version = policy_version
        return super().update_weights_from_tensor(named_tensors)


def _manager(parts: _Recorder, canary: Canary | None = None) -> AtroposShardingManager:
    return AtroposShardingManager(parts, parts, gate=parts, canary=canary)


def _canary(engine: list[float], trainer: list[float], staged: Any = None, threshold: float = 0.1) -> Canary:
    return Canary(
        trainer_logprobs=lambda: trainer, engine_logprobs=lambda: engine, staged_logprobs=staged, threshold=threshold
    )


@pytest.mark.parametrize("parts", [_Recorder(), _VersionedRecorder()], ids=["plain", "takes a version"])
def test_every_enter_copies_the_newest_weights_before_the_gate_opens(parts: _Recorder) -> None:
    manager = _manager(parts)
    for version in (3, 4):
        parts.policy_version = version
        parts.calls.clear()
        with manager:
            parts.calls.append("body")
            assert parts.weights == {"w": float(version)}
        assert parts.calls == ["resume_memory", "update", "open", "body", "pause", "release_memory"]
        assert (manager.last_sync.policy_version, manager.last_sync.bytes_copied) == (version, 4)
        assert manager.last_sync.canary_max_abs_logprob_diff is None
        assert getattr(parts, "version", version) == version
    assert manager.syncs == 2


@pytest.mark.parametrize("fail_on", ["pause", "release_memory"])
def test_a_failure_on_exit_is_raised_and_never_masks_the_exception_of_the_body(fail_on: str) -> None:
    parts = _Recorder()
    parts.fail_on = fail_on
    with pytest.raises(RuntimeError, match=f"{fail_on} failed"), _manager(parts):
        pass
    with pytest.raises(KeyError, match="body") as caught, _manager(parts):
        raise KeyError("body")
    assert f"leaving the rollout phase failed as well: RuntimeError('{fail_on} failed')" in caught.value.__notes__[0]


@pytest.mark.parametrize("stage", ["resume_memory", "update"])
def test_entering_again_after_a_failure_works(stage: str) -> None:
    parts = _Recorder()
    parts.fail_on = stage
    manager = _manager(parts)
    with pytest.raises(RuntimeError, match=f"{stage} failed"), manager:
        pytest.fail("the body must not run")
    assert "open" not in parts.calls
    parts.fail_on = ""
    with manager:
        assert parts.calls[-1] == "open"


class _TwoBuffers(_Recorder):
    """With a second buffer of weights."""

    staged: dict[str, float]

    def stage_weights_from_tensor(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        self._note("stage")
        self.staged = {name: float(tensor) for name, tensor in named_tensors}
        return 4 * len(self.staged)

    def swap_weights(self, policy_version: int) -> None:
        self._note(f"swap {policy_version}")
        self.weights = self.staged


def test_a_swap_copies_and_checks_while_the_gate_is_open() -> None:
    parts = _TwoBuffers()

    def staged() -> list[float]:
        parts.calls.append("canary of the staged weights")
        return [-1.0]

    with _manager(parts, _canary([-1.25], [-1.0], staged, threshold=0.3)) as manager:
        assert manager.last_sync.canary_max_abs_logprob_diff == 0.25
        parts.calls.clear()
        parts.policy_version = 4
        report = manager.swap()
        assert parts.calls == ["stage", "canary of the staged weights", "pause", "swap 4", "open"]
        assert parts.weights == {"w": 4.0}
    assert (report.policy_version, report.bytes_copied, report.canary_max_abs_logprob_diff) == (4, 4, 0.0)
    assert report is manager.last_sync
    assert 0.0 <= report.paused_seconds <= report.seconds
    assert manager.syncs == 2


def test_weights_that_the_canary_refuses_are_never_served() -> None:
    parts = _TwoBuffers()
    with _manager(parts, _canary([-1.0], [-1.0], lambda: [-1.5])) as manager:
        parts.calls.clear()
        parts.policy_version = 4
        with pytest.raises(WeightSyncError, match=r"up to 0.5"):
            manager.swap()
        assert parts.calls == ["stage", "pause"], "shut, and the old weights still in place"
        assert parts.weights == {"w": 3.0}


@pytest.mark.parametrize("stage", ["stage", "pause", "swap 3"])
def test_a_swap_that_fails_anywhere_leaves_the_gate_shut(stage: str) -> None:
    parts = _TwoBuffers()
    with pytest.raises(RuntimeError), _manager(parts) as manager:
        parts.calls.clear()
        parts.fail_on = stage
        with pytest.raises(RuntimeError, match=f"{stage} failed"):
            manager.swap()
        assert parts.calls[-1] == "pause"
        assert "open" not in parts.calls
        raise RuntimeError("the run ends")


def test_an_engine_with_one_buffer_cannot_swap() -> None:
    parts = _Recorder()
    with _manager(parts) as manager, pytest.raises(WeightSyncError, match="has no second buffer for weights"):
        manager.swap()


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
    parts = _Recorder()
    with pytest.raises(WeightSyncError, match=message), _manager(parts, _canary(engine, [-1.0, -2.0])):
        pytest.fail("the body must not run")
    assert parts.calls == ["resume_memory", "update"]
