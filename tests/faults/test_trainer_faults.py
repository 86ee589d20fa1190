"""The trainer in this process, on batches that the test wrote, with and without overlap: interrupted, resumed, lied to.

Weights are compared bit by bit: what is trained does not depend on the mode, nor on when the run was interrupted.
"""

import json
import logging
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support.lab import GROUP_SIZE, Lab, assert_same, batches, saved
from support.malformed import good_group
from support.runs import checkpointed_step, journalled, metrics_of
from support.scripted_api import batch_of
from support.serving import eventually

from atropos_verl.errors import (
    AtroposConnectionError,
    AtroposTimeoutError,
    ServiceError,
    StorageInUseError,
    TrainingDivergedError,
    WeightSyncError,
)
from atropos_verl.types import StepReport

SYNC: dict[str, Any] = {}
OVERLAP: dict[str, Any] = {"mode": "overlap", "off_policy": {"importance": None}}
"""Importance weights would be on: the same training needs the same loss."""


def threads_of_the_trainer() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name in ("atropos-verl-prefetch", "atropos-verl-engine")]


def wait_for_batch(run_dir: Path, number: int) -> None:
    """Until the batch of step ``number`` is journalled: it was fetched ahead."""
    eventually(lambda: f"batch_{number:06}.json" in journalled(run_dir), f"batch {number} to be journalled")


@pytest.fixture(autouse=True)
def _sigterm_interrupts() -> Iterator[None]:
    """As in the training command."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("normalization", ["global", "batch"])
def test_the_same_batches_give_the_same_weights_in_both_modes(lab: Lab, tmp_path: Path, normalization: str) -> None:
    bodies = batches(6, seed=0)
    settings = {"advantage_normalization": normalization}
    expected = lab.run("sync", bodies, 6, **settings)
    assert_same(lab.run("overlap", bodies, 6, **settings, **OVERLAP), expected)
    assert threads_of_the_trainer() == []
    for mode in ("sync", "overlap"):
        lines = metrics_of(tmp_path / mode)
        assert [line["policy_version"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert all(0.0 <= line["perf/idle_share"] <= 1.0 for line in lines)
        # A swap pauses; a sync into a released engine has nothing to pause.
        assert all((line["sync/paused_seconds"] is None) == (mode == "sync") for line in lines)
        assert max(line["sync/canary_max_abs_logprob_diff"] for line in lines) < 1e-4


def test_the_gate_stays_open_while_the_trainer_trains_and_the_next_batch_comes_meanwhile(lab: Lab) -> None:
    seen: list[tuple[bool, bool]] = []
    with lab.trainer("open", batches(3, seed=1), 3, **OVERLAP) as trainer:
        train = trainer.worker.train

        def watched(samples: Any) -> Any:
            if trainer.step < 2:
                wait_for_batch(trainer.run_dir, trainer.step + 2)
            seen.append((trainer.gate.is_open, trainer.engine.weights_ready))
            return train(samples)

        trainer.worker.train = watched  # type: ignore[method-assign]
        trainer.fit()
        assert trainer.engine.policy_version == 3
        assert trainer.sharding_manager.syncs == 4
    assert seen == [(True, True)] * 3


def test_ten_steps_resume_ten_steps_is_twenty_steps(lab: Lab, tmp_path: Path) -> None:
    bodies = batches(20, seed=0)
    at_once = lab.run("at_once", bodies, 20)
    assert at_once["step"] == at_once["policy_version"] == 20
    # Each trained token of the 20 batches was seen once by the running statistics.
    groups = [group for body in bodies for group in json.loads(body)["batch"]]
    trained = sum(entry != -100 for group in groups for row in group["masks"] for entry in row)
    assert at_once["moments"]["count"] == at_once["tokens_trained"] == trained

    first = lab.run("parts", bodies[:10], 10)
    assert first["policy_version"] == 10
    assert not all(torch.equal(first["weights"][name], t) for name, t in at_once["weights"].items())
    assert_same(lab.run("parts", bodies[10:], 20), at_once)

    actor = tmp_path / "parts" / "checkpoints" / "global_step_20" / "actor"
    optimiser = torch.load(actor / "optim_world_size_1_rank_0.pt", weights_only=False)
    assert {int(state["step"]) for state in optimiser["state"].values()} == {20}
    lines = metrics_of(tmp_path / "parts")
    assert [(line["step"], line["policy_version"]) for line in lines] == [(n, n) for n in range(1, 21)]


@pytest.mark.parametrize("mode", [SYNC, OVERLAP], ids=["sync", "overlap"])
def test_batches_that_no_checkpoint_covers_are_trained_first(lab: Lab, tmp_path: Path, mode: dict[str, Any]) -> None:
    """As after kill -9: step 3 is done and saved nowhere, batch 4 is fetched, the checkpoint is of step 1."""
    bodies = batches(4, seed=1)
    expected = lab.run("at_once", bodies, 4)
    with lab.trainer("killed", bodies, 4, **mode) as trainer:
        for step in range(3):
            trainer.train_on(trainer.source.fetch())
            if step == 0:
                trainer.save_checkpoint()
        trainer.source.fetch()
    assert journalled(tmp_path / "killed") == [f"batch_00000{n}.json" for n in (2, 3, 4)]
    # The API has nothing any more: the journal alone carries the run to its end.
    assert_same(lab.run("killed", [], 4, **mode), expected)
    assert journalled(tmp_path / "killed") == []


def hit_update(trainer: Any, number: int, hit: Callable[[], None]) -> None:
    """Call ``hit`` in the middle of update ``number``: the weights have changed, nobody has counted the step yet."""
    train, calls = trainer.worker.train, iter(range(1, 100))

    def watched(samples: Any) -> Any:
        output = train(samples)
        if next(calls) == number:
            hit()
        return output

    trainer.worker.train = watched


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_the_middle_of_an_update_leaves_a_whole_step(lab: Lab, tmp_path: Path, signum: int) -> None:
    bodies = batches(4, seed=2)
    expected = lab.run("at_once", bodies, 4)
    with lab.trainer("hit", bodies, 4) as trainer:
        hit_update(trainer, 2, lambda: os.kill(os.getpid(), signum))
        with pytest.raises(KeyboardInterrupt) as caught:
            trainer.fit()
    directory = tmp_path / "hit"
    assert "steps up to 2 are saved in" in "".join(caught.value.__notes__)
    assert (saved(directory)["step"], saved(directory)["policy_version"]) == (2, 2)
    assert [line["step"] for line in metrics_of(directory)] == [1, 2]
    assert_same(lab.run("hit", bodies[2:], 4), expected)


def test_two_trainers_never_write_into_one_run_directory(lab: Lab) -> None:
    bodies = batches(1, seed=2)
    with lab.trainer("one", bodies, 1) as trainer:
        with pytest.raises(
            StorageInUseError, match=rf"{trainer.run_dir} is in use by a training run, pid {os.getpid()} "
        ):
            lab.run("one", bodies, 1)
        assert trainer.fit()["steps"] == 1
    assert lab.run("one", [], 1)["step"] == 1, "the first is done"


def test_a_signal_that_is_ignored_stays_ignored(lab: Lab) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with lab.trainer("nohup", batches(2, seed=2), 2) as trainer:
        hit_update(trainer, 1, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert trainer.fit()["steps"] == 2


def test_a_damaged_checkpoint_costs_nothing_but_the_steps_since_the_one_before(
    lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bodies = batches(7, seed=9)
    expected = lab.run("at_once", bodies, 7)
    lab.run("damaged", bodies[:6], 6, save_freq=2)
    shard = tmp_path / "damaged" / "checkpoints" / "global_step_6" / "actor" / "model_world_size_1_rank_0.pt"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    with caplog.at_level(logging.INFO, logger="atropos_verl"):
        # Batches 5 and 6 are still in the journal.
        assert_same(lab.run("damaged", bodies[6:], 7, save_freq=2), expected)
    assert f"{shard} is damaged: its checksum is not that of what was written; global_step_4 is used" in caplog.messages
    assert [line["step"] for line in metrics_of(tmp_path / "damaged")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_signal_between_steps_keeps_the_batch_that_was_fetched_ahead(lab: Lab, tmp_path: Path) -> None:
    bodies = batches(5, seed=2)
    expected = lab.run("at_once", bodies, 5)
    directory = tmp_path / "hit"

    def hit(report: StepReport) -> None:
        if report.step == 2:
            wait_for_batch(directory, 3)
            os.kill(os.getpid(), signal.SIGTERM)

    with lab.trainer("hit", bodies, 5, **OVERLAP) as trainer, pytest.raises(KeyboardInterrupt) as caught:
        trainer.fit(on_step=hit)
    assert threads_of_the_trainer() == []
    assert "steps up to 2 are saved in" in "".join(caught.value.__notes__)
    assert saved(directory)["step"] == 2
    assert journalled(directory) == ["batch_000003.json"]
    assert_same(lab.run("hit", bodies[3:], 5, **OVERLAP), expected)
    assert journalled(directory) == []


def test_an_update_that_breaks_off_is_not_saved(lab: Lab, tmp_path: Path) -> None:
    def out_of_memory() -> None:
        raise MemoryError("no more")

    bodies = batches(4, seed=3)
    expected = lab.run("at_once", bodies, 4)
    with lab.trainer("broken", bodies, 4, save_freq=2) as trainer:
        hit_update(trainer, 4, out_of_memory)
        with pytest.raises(MemoryError) as caught:
            trainer.fit()
    # Step 3 is whole, but it exists only in weights that step 4 has already changed.
    assert checkpointed_step(tmp_path / "broken") == 2
    assert "in the middle of an optimiser step" in "".join(caught.value.__notes__)
    assert_same(lab.run("broken", [], 4, save_freq=2), expected)


def test_a_service_that_dies_during_a_step_ends_the_run_after_it(lab: Lab, tmp_path: Path) -> None:
    dead = threading.Event()

    def check() -> None:
        if dead.is_set():
            raise ServiceError("environment died", "environment", -9, "")

    with lab.trainer("widow", batches(4, seed=4), 4, **OVERLAP) as trainer:

        def die() -> None:
            wait_for_batch(trainer.run_dir, 3)
            dead.set()
            eventually(
                lambda: "atropos-verl-prefetch" not in threads_of_the_trainer(),
                "the prefetching thread to notice while the trainer trains",
            )

        hit_update(trainer, 2, die)
        with pytest.raises(ServiceError, match="environment died") as caught:
            trainer.fit(check_services=check)
    assert "steps up to 2 are saved in" in "".join(caught.value.__notes__)
    assert journalled(tmp_path / "widow") == ["batch_000003.json"]


@pytest.mark.parametrize("fault", ["old weights", "no weights", "old weights staged"])
def test_a_skipped_weight_sync_stops_the_run(lab: Lab, tmp_path: Path, fault: str) -> None:
    """The engine is given the weights of the first sync again and again, or says that it took some."""
    first: list[tuple[str, torch.Tensor]] = []
    overlapped = fault == "old weights staged"
    with lab.trainer("stale", batches(3, seed=4), 3, **(OVERLAP if overlapped else SYNC)) as trainer:
        method = "stage_weights_from_tensor" if overlapped else "update_weights_from_tensor"
        update = getattr(trainer.engine, method)

        def stale(named_tensors: Any, **version: int) -> Any:
            new = [(name, tensor.clone()) for name, tensor in named_tensors]
            if not first:
                first.extend(new)
            elif fault == "no weights":
                return 0
            return update(first, **version)

        setattr(trainer.engine, method, stale)
        with pytest.raises(WeightSyncError):
            trainer.fit()
        # It must not go on with rollouts of another policy. The first sync of an overlapped run stages nothing.
        assert trainer.step == (2 if overlapped else 1)
        assert trainer.engine.policy_version <= 1
        assert not trainer.gate.is_open, "nobody may be served by the wrong weights"
        # The last step was taken, though nobody was served its weights.
        *_, last = lines = metrics_of(tmp_path / "stale")
        assert [line["step"] for line in lines] == list(range(1, trainer.step + 1))
        assert (last["data/groups"], last["sync/seconds"]) == (trainer.totals.groups_used // trainer.step, None)
    assert checkpointed_step(tmp_path / "stale") == 0


@pytest.mark.parametrize("mode", [SYNC, OVERLAP])
def test_groups_without_a_trained_token_end_nothing_and_are_counted(
    lab: Lab, tmp_path: Path, mode: dict[str, Any]
) -> None:
    """An environment's whole share of a batch, then a whole batch: also in the run that goes on after it."""
    rng = random.Random(4)

    def made(env_id: int, *, masked: bool) -> Any:
        group = {**good_group(rng, group_size=GROUP_SIZE), "env_id": env_id}
        return {**group, "masks": [[-100] * len(row) for row in group["tokens"]]} if masked else group

    half, nothing = ([made(0, masked=empty), made(1, masked=True)] for empty in (False, True))
    bodies = [batch_of(half), batch_of(nothing), batch_of([made(0, masked=False), made(1, masked=False)])]
    settings = {"advantage_normalization": "batch", "save_freq": 1, **mode}
    lab.run("empty", bodies[:2], 2, **settings)
    state = lab.run("empty", bodies[2:], 3, **settings)
    assert (state["step"], state["policy_version"]) == (3, 2)
    lines = metrics_of(tmp_path / "empty")
    assert [line["data/trained_tokens"] > 0 for line in lines] == [True, False, True]
    assert [line["env/1/unmatched_span_rate"] for line in lines] == [None, None, 1.0]
    assert [line["loss"] == 0.0 for line in lines] == [False, True, False]
    totals = saved(tmp_path / "empty")["totals"]
    assert (totals["steps_without_data"], journalled(tmp_path / "empty")) == (1, [])


def test_a_run_that_diverges_stops_and_does_not_save_what_is_ruined(lab: Lab, tmp_path: Path) -> None:
    ruinous = {"optim": {"lr": 1e30}, "sync": {"canary": False}}
    with pytest.raises(TrainingDivergedError, match=r"Lower optim\.lr"):
        lab.run("diverged", batches(4, seed=6), 4, **ruinous)
    assert checkpointed_step(tmp_path / "diverged") == 0


@pytest.mark.parametrize(
    ("leaves", "error", "message"),
    [
        (False, AtroposTimeoutError, "no batch from Atropos API"),
        (True, AtroposConnectionError, "Cannot connect to Atropos API at"),
    ],
    ids=["it has no batches", "it goes away"],
)
def test_an_api_that_fails_ends_the_run_and_saves_it(lab: Lab, leaves: bool, error: Any, message: str) -> None:
    bodies = batches(4, seed=8)

    def after_step_2(report: StepReport) -> None:
        if report.step == 2 and leaves:
            lab.api.__exit__()
        elif report.step == 2:  # not before: a busy machine needs its time
            trainer.source.config = trainer.config.with_values(atropos={"rollout_timeout": 0.3})

    available = bodies if leaves else bodies[:2]
    with lab.trainer("alone", available, 4) as trainer, pytest.raises(error, match=message) as caught:
        trainer.fit(on_step=after_step_2)
    assert "steps up to 2 are saved in" in "".join(caught.value.__notes__)
    assert_same(lab.run("alone", bodies[2:], 4), lab.run("at_once", bodies, 4))
