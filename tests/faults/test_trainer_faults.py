"""The trainer in this process, on batches that the test wrote: interrupted, resumed, lied to. Compared bit by bit."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support.lab import GROUP_SIZE, GROUPS, Lab, assert_same, saved
from support.malformed import good_group
from support.runs import checkpointed_step, metrics_of
from support.scripted_api import batch_of, random_batches
from support.tiny_model import build_tiny_model

from atropos_verl.errors import AtroposConnectionError, AtroposTimeoutError, TrainingDivergedError, WeightSyncError
from atropos_verl.types import StepReport


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def lab(model_path: Path, tmp_path: Path) -> Lab:
    return Lab(model_path, tmp_path)


# ---------------------------------------------------------------------- resume


def test_ten_steps_resume_ten_steps_is_twenty_steps(lab: Lab, tmp_path: Path) -> None:
    bodies = random_batches(20, groups=GROUPS, group_size=GROUP_SIZE)
    at_once = lab.run("at_once", bodies, 20)
    assert at_once["step"] == at_once["policy_version"] == 20
    # Each trained token of the 20 batches was seen once by the running statistics.
    trained = sum(
        sum(entry != -100 for row in group["masks"] for entry in row)
        for body in bodies
        for group in json.loads(body)["batch"]
    )
    assert at_once["moments"]["count"] == at_once["tokens_trained"] == trained

    first = lab.run("parts", bodies[:10], 10)
    assert first["policy_version"] == 10
    assert not all(torch.equal(first["weights"][name], t) for name, t in at_once["weights"].items())
    assert_same(lab.run("parts", bodies[10:], 20), at_once)

    actor = tmp_path / "parts" / "checkpoints" / "global_step_20" / "actor"
    optimiser = torch.load(actor / "optim_world_size_1_rank_0.pt", weights_only=False)
    assert {int(state["step"]) for state in optimiser["state"].values()} == {20}
    assert [line["step"] for line in metrics_of(tmp_path / "parts")] == list(range(1, 21))
    assert [line["policy_version"] for line in metrics_of(tmp_path / "parts")] == list(range(1, 21))


def test_batches_that_no_checkpoint_covers_are_trained_first(lab: Lab, tmp_path: Path) -> None:
    bodies = random_batches(4, groups=GROUPS, group_size=GROUP_SIZE, seed=1)
    expected = lab.run("at_once", bodies, 4)
    with lab.trainer("crashed", bodies, 4) as trainer:  # gone after step 3 and the fetch of batch 4, saved at step 1
        for step in range(3):
            trainer.train_on(trainer.source.fetch())
            if step == 0:
                trainer.save_checkpoint()
        trainer.source.fetch()
    journal = sorted(p.name for p in (tmp_path / "crashed" / "journal").glob("batch_0?????.json"))
    assert journal == ["batch_000002.json", "batch_000003.json", "batch_000004.json"]
    # The API has nothing any more: the journal alone carries the run to its end.
    assert_same(lab.run("crashed", [], 4), expected)
    assert list((tmp_path / "crashed" / "journal").glob("batch_*.json")) == []


# ---------------------------------------------------------------------- interrupted in the middle of an update


class _Interrupting:
    """A policy worker that is hit by a signal in the middle of update ``at``."""

    def __init__(self, worker: Any, at: int, hit: Callable[[], None]) -> None:
        self._worker = worker
        self._left = at
        self._hit = hit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    def train(self, samples: Any) -> Any:
        self._left -= 1
        output = self._worker.train(samples)
        if self._left == 0:  # the weights have changed; nobody has counted the step yet
            self._hit()
        return output


def _raise_interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def sigterm_interrupts() -> Iterator[None]:
    """As in the training command."""
    before = signal.signal(signal.SIGTERM, _raise_interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("sigterm_interrupts")
def test_a_signal_in_the_middle_of_an_update_leaves_a_whole_step(lab: Lab, tmp_path: Path, signum: int) -> None:
    bodies = random_batches(4, groups=GROUPS, group_size=GROUP_SIZE, seed=2)
    expected = lab.run("at_once", bodies, 4)
    with lab.trainer("hit", bodies, 4) as trainer:
        trainer.stack.worker = _Interrupting(trainer.stack.worker, 2, lambda: os.kill(os.getpid(), signum))
        with pytest.raises(KeyboardInterrupt) as caught:
            trainer.fit()
    directory = tmp_path / "hit"
    assert "steps up to 2 are saved in" in "".join(caught.value.__notes__)
    assert (saved(directory)["step"], saved(directory)["policy_version"]) == (2, 2)
    assert [line["step"] for line in metrics_of(directory)] == [1, 2]
    assert_same(lab.run("hit", bodies[2:], 4), expected)


@pytest.mark.usefixtures("sigterm_interrupts")
def test_an_update_that_breaks_off_is_not_saved(lab: Lab, tmp_path: Path) -> None:
    def out_of_memory() -> None:
        raise MemoryError("no more")

    bodies = random_batches(4, groups=GROUPS, group_size=GROUP_SIZE, seed=3)
    expected = lab.run("at_once", bodies, 4)
    with lab.trainer("broken", bodies, 4, save_freq=2) as trainer:
        trainer.stack.worker = _Interrupting(trainer.stack.worker, 4, out_of_memory)
        with pytest.raises(MemoryError) as caught:
            trainer.fit()
    # Step 3 is whole, but it exists only in weights that step 4 has already changed.
    assert checkpointed_step(tmp_path / "broken") == 2
    assert "in the middle of an optimiser step" in "".join(caught.value.__notes__)
    assert_same(lab.run("broken", [], 4, save_freq=2), expected)


# ---------------------------------------------------------------------- wrong weights, wrong data


class _Stale:
    """An engine that is given the weights of the first sync again and again, as when a sync is skipped."""

    def __init__(self, engine: Any, *, drop: bool) -> None:
        self._engine = engine
        self._first: list[tuple[str, torch.Tensor]] = []
        self._drop = drop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def update_weights_from_tensor(self, named_tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> Any:
        new = [(name, tensor.clone()) for name, tensor in named_tensors]
        if not self._first:
            self._first = new
        elif self._drop:
            return 0
        return self._engine.update_weights_from_tensor(self._first, policy_version=policy_version)


@pytest.mark.parametrize("drop", [False, True], ids=["old weights", "no weights"])
def test_a_skipped_weight_sync_stops_the_run(lab: Lab, tmp_path: Path, drop: bool) -> None:
    bodies = random_batches(3, groups=GROUPS, group_size=GROUP_SIZE, seed=4)
    with lab.trainer("stale", bodies, 3) as trainer:
        trainer.stack.sharding_manager.engine = _Stale(trainer.stack.engine, drop=drop)
        with pytest.raises(WeightSyncError):
            trainer.fit()
        assert trainer.step == 1, "it must not go on with rollouts of another policy"
        assert not trainer.stack.gate.is_open, "nobody may be served by the wrong weights"
    assert checkpointed_step(tmp_path / "stale") == 0


def test_literal_nans_in_a_batch_are_quarantined_and_the_rest_is_trained(lab: Lab, tmp_path: Path) -> None:
    rng = random.Random(5)
    poisoned = good_group(rng, group_size=GROUP_SIZE)
    poisoned["scores"][1] = float("nan")
    hot = good_group(rng, group_size=GROUP_SIZE)
    hot["advantages"][2][0] = float("inf")
    good = good_group(rng, group_size=GROUP_SIZE)
    bodies = [batch_of([poisoned, good]), batch_of([good, hot])]
    assert b"NaN" in bodies[0]
    assert b"Infinity" in bodies[1]
    state = lab.run("nan", bodies, 2)
    assert state["policy_version"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in state["weights"].values())
    trained = sum(entry != -100 for row in good["masks"] for entry in row)
    assert state["tokens_trained"] == 2 * trained
    assert [line["data/quarantined"] for line in metrics_of(tmp_path / "nan")] == [1, 1]
    reasons = [json.loads(p.read_text())["reason"] for p in sorted((tmp_path / "nan" / "quarantine").glob("*.json"))]
    assert sorted(reasons) == [
        "advantages[2][0] = inf: must be finite",
        "scores[1] = nan: must be finite",
    ]


def test_a_run_that_diverges_stops_and_does_not_save_what_is_ruined(lab: Lab, tmp_path: Path) -> None:
    bodies = random_batches(4, groups=GROUPS, group_size=GROUP_SIZE, seed=6)
    ruinous = {"optim": {"lr": 1e30}, "sync": {"canary": False}}
    with (
        lab.trainer("diverged", bodies, 4, **ruinous) as trainer,
        pytest.raises(TrainingDivergedError, match=r"Lower optim\.lr"),
    ):
        trainer.fit()
    assert checkpointed_step(tmp_path / "diverged") == 0


def test_an_api_without_batches_ends_the_run_and_saves_it(lab: Lab, tmp_path: Path) -> None:
    bodies = random_batches(2, groups=GROUPS, group_size=GROUP_SIZE, seed=7)
    patience = {"atropos": {"rollout_timeout": 0.5}, "batch_max_wait_time": 0.2}
    with (
        lab.trainer("starved", bodies, 9, **patience) as trainer,
        pytest.raises(AtroposTimeoutError, match="no batch from Atropos API") as caught,
    ):
        trainer.fit()
    assert "steps up to 2 are saved in" in "".join(caught.value.__notes__)
    assert saved(tmp_path / "starved")["step"] == 2


def test_an_environment_of_ours_that_sends_nothing_is_given_up_after_its_startup_timeout(lab: Lab) -> None:
    patience = {"env": {"startup_timeout": 0.5}, "batch_max_wait_time": 0.2}  # rollout_timeout stays at 600 s
    with lab.trainer("silent", [], 9, **patience) as trainer, pytest.raises(AtroposTimeoutError):
        trainer.fit(check_services=lambda: None)
    assert trainer.step == 0


def test_an_api_that_goes_away_ends_the_run_and_saves_it(lab: Lab, tmp_path: Path) -> None:
    bodies = random_batches(4, groups=GROUPS, group_size=GROUP_SIZE, seed=8)

    def leave_after_step_2(report: StepReport) -> None:
        if report.step == 2:
            lab.api.__exit__()

    with (
        lab.trainer("alone", bodies, 4, atropos={"timeout": 0.5}) as trainer,
        pytest.raises(AtroposConnectionError, match="Cannot connect to Atropos API at") as caught,
    ):
        trainer.fit(on_step=leave_after_step_2)
    assert "steps up to 2 are saved in" in "".join(caught.value.__notes__)
    assert_same(lab.run("alone", bodies[2:], 4), lab.run("at_once", bodies, 4))
