"""The trainer in this process, on batches that the test wrote, with and without overlap: interrupted, resumed, lied to.

Weights are compared bit by bit: what is trained does not depend on the mode, nor on when the run was interrupted.
"""

import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.lab import GROUP_SIZE, Lab, assert_same, batches, saved
from support.malformed import good_group
from support.runs import checkpointed_step, journalled, metrics_of
from support.scripted_api import batch_of
from support.serving import eventually

from atropos_verl import errors
from atropos_verl.types import StepReport

SYNC: dict[str, Any] = {}
OVERLAP: dict[str, Any] = {"mode": "overlap", "off_policy": {"importance": None}}
"""Importance weights would be on: the same training needs the same loss."""
BOTH_MODES = pytest.mark.parametrize("mode", [SYNC, OVERLAP], ids=["sync", "overlap"])


def threads_of_the_trainer() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name in ("atropos-verl-prefetch", "atropos-verl-engine")]


def batch_file(number: int) -> str:
    return f"batch_{number:06}.json"


def wait_for_batch(run_dir: Path, number: int) -> None:
    """Until the batch of step ``number`` is journalled: it was fetched ahead."""
    eventually(lambda: batch_file(number) in journalled(run_dir), f"batch {number} to be journalled")


def hit_update(trainer: Any, number: int, hit: Callable[[], None]) -> None:
    """Call ``hit`` in the middle of update ``number``: the weights have changed, nobody has counted the step yet."""
    train, calls = trainer.worker.train, iter(range(1, 100))

    def watched(samples: Any) -> Any:
        output = train(samples)
        if next(calls) == number:
            hit()
        return output

    trainer.worker.train = watched


def notes_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    return "".join(error.value.__notes__)


@pytest.fixture(autouse=True)
def _sigterm_interrupts() -> Iterator[None]:
    """As in the training command."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("normalization", ["global", "batch"])
def test_the_same_batches_give_the_same_weights_in_both_modes(lab: Lab, tmp_path: Path, normalization: str) -> None:
    bodies, settings = batches(6, seed=0), {"advantage_normalization": normalization}
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


def test_the_gate_stays_open_and_the_next_batch_comes_during_a_step(lab: Lab) -> None:
    seen: list[tuple[bool, bool]] = []
    with lab.trainer("open", batches(3, seed=1), 3, **OVERLAP) as trainer:

        def look() -> None:
            if trainer.step < 2:
                wait_for_batch(trainer.run_dir, trainer.step + 2)
            seen.append((trainer.gate.is_open, trainer.engine.weights_ready))

        for step in (1, 2, 3):
            hit_update(trainer, step, look)
        trainer.fit()
        assert (trainer.engine.policy_version, trainer.sharding_manager.syncs) == (3, 4)
    assert seen == [(True, True)] * 3


def test_ten_steps_resume_ten_steps_is_twenty_steps(lab: Lab, tmp_path: Path) -> None:
    bodies = batches(20, seed=0)
    at_once = lab.run("at_once", bodies, 20)
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


@BOTH_MODES
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
    assert journalled(tmp_path / "killed") == [batch_file(n) for n in (2, 3, 4)]
    # The API has nothing any more: the journal alone carries the run to its end.
    assert_same(lab.run("killed", [], 4, **mode), expected)
    assert journalled(tmp_path / "killed") == []


@pytest.mark.parametrize(
    ("signum", "mode"),
    [(signal.SIGTERM, SYNC), (signal.SIGINT, SYNC), (signal.SIGHUP, SYNC), (signal.SIGTERM, OVERLAP)],
)
def test_a_signal_leaves_a_whole_step(lab: Lab, tmp_path: Path, signum: int, mode: dict[str, Any]) -> None:
    """In the middle of an update; with overlap between two steps."""
    bodies, directory = batches(4, seed=2), tmp_path / "hit"
    ahead = [batch_file(3)] if mode else []

    def hit() -> None:
        if ahead:
            wait_for_batch(directory, 3)
        os.kill(os.getpid(), signum)

    with lab.trainer("hit", bodies, 4, **mode) as trainer, pytest.raises(KeyboardInterrupt) as caught:
        if not ahead:
            hit_update(trainer, 2, hit)
        trainer.fit(on_step=lambda report: hit() if ahead and report.step == 2 else None)
    assert threads_of_the_trainer() == []
    assert "steps up to 2 are saved in" in notes_of(caught)
    assert (saved(directory)["step"], saved(directory)["policy_version"]) == (2, 2)
    assert [line["step"] for line in metrics_of(directory)] == [1, 2]
    assert journalled(directory) == ahead
    assert_same(lab.run("hit", bodies[2 + len(ahead) :], 4, **mode), lab.run("at_once", bodies, 4))
    assert journalled(directory) == []


def test_two_trainers_never_write_into_one_run_directory(lab: Lab) -> None:
    bodies = batches(1, seed=2)
    with lab.trainer("one", bodies, 1) as trainer:
        said = rf"{trainer.run_dir} is in use by a training run, pid {os.getpid()} "
        with pytest.raises(errors.StorageInUseError, match=said):
            lab.run("one", bodies, 1)
        assert trainer.fit()["steps"] == 1
    assert lab.run("one", [], 1)["step"] == 1, "the first is done"


def test_a_signal_that_is_ignored_stays_ignored(lab: Lab) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with lab.trainer("nohup", batches(2, seed=2), 2) as trainer:
        hit_update(trainer, 1, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert trainer.fit()["steps"] == 2


def test_an_update_that_breaks_off_is_not_saved(lab: Lab, tmp_path: Path) -> None:
    def out_of_memory() -> None:
        raise MemoryError("no more")

    bodies = batches(4, seed=3)
    with lab.trainer("broken", bodies, 4, save_freq=2) as trainer:
        hit_update(trainer, 4, out_of_memory)
        with pytest.raises(MemoryError) as caught:
            trainer.fit()
    # Step 3 is whole, but it exists only in weights that step 4 has already changed.
    assert checkpointed_step(tmp_path / "broken") == 2
    assert "in the middle of an optimiser step" in notes_of(caught)
    assert_same(lab.run("broken", [], 4, save_freq=2), lab.run("at_once", bodies, 4))


def test_a_service_that_dies_during_a_step_ends_the_run_after_it(lab: Lab, tmp_path: Path) -> None:
    dead = threading.Event()

    def check() -> None:
        if dead.is_set():
            raise errors.ServiceError("environment died", "environment", -9, "")

    def die() -> None:
        wait_for_batch(tmp_path / "widow", 3)
        dead.set()
        eventually(lambda: "atropos-verl-prefetch" not in threads_of_the_trainer(), "the prefetching thread to notice")

    with lab.trainer("widow", batches(4, seed=4), 4, **OVERLAP) as trainer:
        hit_update(trainer, 2, die)
        with pytest.raises(errors.ServiceError, match="environment died") as caught:
            trainer.fit(check_services=check)
    assert "steps up to 2 are saved in" in notes_of(caught)
    assert journalled(tmp_path / "widow") == [batch_file(3)]


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
            if first and fault == "no weights":
                return 0
            first[:] = first or new
            return update(first, **version)

        setattr(trainer.engine, method, stale)
        with pytest.raises(errors.WeightSyncError):
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


@BOTH_MODES
def test_groups_without_a_trained_token_end_nothing(lab: Lab, tmp_path: Path, mode: dict[str, Any]) -> None:
    """An environment's whole share of a batch, then a whole batch: also in the run that goes on after it."""
    rng = random.Random(4)

    def batch(*masked: bool) -> bytes:
        groups = [{**good_group(rng, group_size=GROUP_SIZE), "env_id": env_id} for env_id in range(2)]
        for group, empty in zip(groups, masked, strict=True):
            group["masks"] = [[-100] * len(row) for row in group["tokens"]] if empty else group["masks"]
        return batch_of(groups)

    bodies = [batch(False, True), batch(True, True), batch(False, False)]
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
    with pytest.raises(errors.TrainingDivergedError, match=r"Lower optim\.lr"):
        lab.run("diverged", batches(4, seed=6), 4, **ruinous)
    assert checkpointed_step(tmp_path / "diverged") == 0


@pytest.mark.parametrize(
    ("leaves", "error", "message"),
    [
        (False, errors.AtroposTimeoutError, "no batch from Atropos API"),
        (True, errors.AtroposConnectionError, "Cannot connect to Atropos API at"),
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
    assert "steps up to 2 are saved in" in notes_of(caught)
    assert_same(lab.run("alone", bodies[2:], 4), lab.run("at_once", bodies, 4))
