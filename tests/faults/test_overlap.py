"""mode=overlap: the same training as mode=sync on the same batches, interrupted or not; nothing lost, nothing twice."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.lab import GROUP_SIZE, GROUPS, Lab, assert_same, saved
from support.runs import SMALL, TrainingRun, checkpointed_step, metrics_of
from support.scripted_api import random_batches
from support.serving import eventually
from support.tiny_model import build_tiny_model

from atropos_verl.errors import ServiceError, WeightSyncError
from atropos_verl.types import StepReport

OVERLAP: dict[str, Any] = {
    "mode": "overlap",
    # Importance weights would be on: the same training needs the same loss.
    "off_policy": {"importance": None},
    "inference": {"num_threads": 1},
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def lab(model_path: Path, tmp_path: Path) -> Lab:
    return Lab(model_path, tmp_path)


@pytest.fixture
def sigterm_interrupts() -> Iterator[None]:
    """As in the training command."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


def _journalled(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "journal").glob("batch_0?????.json"))


def _nothing_of_ours_runs() -> bool:
    return not [t for t in threading.enumerate() if t.name in ("atropos-verl-prefetch", "atropos-verl-engine")]


@pytest.mark.parametrize("normalization", ["global", "batch"])
def test_the_same_batches_give_the_same_weights_as_in_sync_mode(lab: Lab, tmp_path: Path, normalization: str) -> None:
    bodies = random_batches(6, groups=GROUPS, group_size=GROUP_SIZE)
    settings = {"advantage_normalization": normalization}
    expected = lab.run("sync", bodies, 6, **settings)
    found = lab.run("overlap", bodies, 6, **settings, **OVERLAP)
    assert_same(found, expected)
    assert _nothing_of_ours_runs()
    for mode in ("sync", "overlap"):
        lines = metrics_of(tmp_path / mode)
        assert [line["policy_version"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert all(0.0 <= line["perf/idle_share"] <= 1.0 for line in lines)
        # A swap pauses; a sync into a released engine has nothing to pause.
        assert all((line["sync/paused_seconds"] is None) == (mode == "sync") for line in lines)
        assert max(line["sync/canary_max_abs_logprob_diff"] for line in lines) < 1e-4


def test_the_gate_stays_open_while_the_trainer_trains_and_the_next_batch_comes_meanwhile(lab: Lab) -> None:
    bodies = random_batches(3, groups=GROUPS, group_size=GROUP_SIZE, seed=1)
    seen: list[tuple[bool, bool]] = []
    with lab.trainer("open", bodies, 3, **OVERLAP) as trainer:
        worker = trainer.stack.worker
        train = worker.train

        def watched(samples: Any) -> Any:
            if trainer.step < 2:
                name = f"batch_00000{trainer.step + 2}.json"
                eventually(lambda: name in _journalled(trainer.run_dir), "the next batch to be journalled")
            seen.append((trainer.stack.gate.is_open, trainer.engine.weights_ready))
            return train(samples)

        worker.train = watched  # type: ignore[method-assign]
        trainer.fit()
        assert trainer.engine.policy_version == 3
        assert trainer.sharding_manager.syncs == 4
    assert seen == [(True, True)] * 3


@pytest.mark.usefixtures("sigterm_interrupts")
def test_a_signal_saves_the_step_and_keeps_the_batch_that_was_ahead(lab: Lab, tmp_path: Path) -> None:
    bodies = random_batches(5, groups=GROUPS, group_size=GROUP_SIZE, seed=2)
    expected = lab.run("at_once", bodies, 5)
    directory = tmp_path / "hit"

    def hit(report: StepReport) -> None:
        if report.step == 2:
            eventually(lambda: "batch_000003.json" in _journalled(directory), "the batch ahead")
            os.kill(os.getpid(), signal.SIGTERM)

    with lab.trainer("hit", bodies, 5, **OVERLAP) as trainer, pytest.raises(KeyboardInterrupt) as caught:
        trainer.fit(on_step=hit)
    assert _nothing_of_ours_runs()
    assert "steps up to 2 are saved in" in "".join(caught.value.__notes__)
    assert saved(directory)["step"] == 2
    assert _journalled(directory) == ["batch_000003.json"]
    assert_same(lab.run("hit", bodies[3:], 5, **OVERLAP), expected)
    assert _journalled(directory) == []


def test_a_killed_run_trains_on_every_batch_once_after_it_resumes(lab: Lab, tmp_path: Path) -> None:
    """As after kill -9: step 3 is done and saved nowhere, batch 4 is ahead, the checkpoint is of step 1."""
    bodies = random_batches(5, groups=GROUPS, group_size=GROUP_SIZE, seed=3)
    expected = lab.run("at_once", bodies, 5)
    with lab.trainer("killed", bodies, 5, **OVERLAP) as trainer:
        for step in range(3):
            trainer.train_on(trainer.source.fetch())
            if step == 0:
                trainer.save_checkpoint()
        trainer._prepare(trainer.source.fetch())
    assert _journalled(tmp_path / "killed") == [f"batch_00000{n}.json" for n in (2, 3, 4)]
    assert_same(lab.run("killed", bodies[4:], 5, **OVERLAP), expected)


def test_a_service_that_dies_during_a_step_ends_the_run_after_it(lab: Lab, tmp_path: Path) -> None:
    bodies = random_batches(4, groups=GROUPS, group_size=GROUP_SIZE, seed=4)
    dead = threading.Event()

    def check() -> None:
        if dead.is_set():
            raise ServiceError("environment died", "environment", -9, "")

    with lab.trainer("widow", bodies, 4, **OVERLAP) as trainer:
        train = trainer.stack.worker.train

        def long_step(samples: Any) -> Any:
            if trainer.step == 1:
                eventually(lambda: "batch_000003.json" in _journalled(trainer.run_dir), "the batch ahead")
                dead.set()
                eventually(
                    lambda: not [t for t in threading.enumerate() if t.name == "atropos-verl-prefetch"],
                    "the prefetching thread to notice while the trainer trains",
                    timeout=10.0,
                )
            return train(samples)

        trainer.stack.worker.train = long_step  # type: ignore[method-assign]
        with pytest.raises(ServiceError, match="environment died") as caught:
            trainer.fit(check_services=check)
    assert "steps up to 2 are saved in" in "".join(caught.value.__notes__)
    assert _journalled(tmp_path / "widow") == ["batch_000003.json"]


def test_wrong_weights_are_caught_before_they_serve(lab: Lab) -> None:
    bodies = random_batches(3, groups=GROUPS, group_size=GROUP_SIZE, seed=5)
    with lab.trainer("stale", bodies, 3, **OVERLAP) as trainer:
        stage, first = trainer.engine.stage_weights_from_tensor, []

        def stale(named_tensors: Any) -> Any:
            new = [(name, tensor.clone()) for name, tensor in named_tensors]
            first.append(new)
            return stage(first[0])

        trainer.engine.stage_weights_from_tensor = stale
        with pytest.raises(WeightSyncError, match="does not hold the trained weights"):
            trainer.fit()
        assert trainer.step == 2
        assert trainer.engine.policy_version == 1
        assert not trainer.stack.gate.is_open


def test_a_real_run_is_killed_resumed_and_told_to_stop(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = ["mode=overlap", "steps=1000", "save_freq=5", *SMALL]
    with TrainingRun(words, run_dir=run_dir) as run:
        run.wait_for_step(7)
        run.interrupt(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        run.assert_nothing_left()
    saved_at = checkpointed_step(run_dir)
    assert saved_at >= 5
    with TrainingRun(words, run_dir=run_dir) as run:
        run.wait_for_output("batches fetched before the interruption are trained first")
        run.wait_for_step(saved_at + 4)
        run.interrupt_group(signal.SIGINT)
        assert run.wait() == 130
        run.assert_nothing_left()
        assert "are saved in" in run.stderr
    lines = metrics_of(run_dir)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert [line["policy_version"] for line in lines] == [line["step"] for line in lines]
    assert checkpointed_step(run_dir) == len(lines) >= saved_at + 4
    # Batches that are on disk and not trained on: what the trainer had taken ahead, never more.
    assert len(_journalled(run_dir)) <= 2
