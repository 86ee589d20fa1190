"""The simulator against cases that can be computed by hand, and its command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from simulate.outcome import Outcome
from simulate.recording import read_recording
from simulate.run import simulate
from simulate.workload import Layout, Workload

from atropos_verl.cli import main
from atropos_verl.errors import ConfigError

# Two groups of 4 a batch; every sequence has 100 tokens and nothing is random or polled.
EXACT = Workload(
    environments=2,
    workers=1,
    group_size=4,
    batch_size=8,
    steps=50,
    mean_tokens=100,
    token_spread=0.0,
    environment_period=0.0,
    poll_delay=1e-3,
    sync_seconds=1.0,
)
# 8 sequences at 20 tokens/s each: 5 s of generation a batch. 800 tokens at 200 tokens/s: 4 s of training.
TURNS = Layout(overlap=False, gen_capacity=160.0, sequence_rate=20.0, slots=8, train_rate=200.0)
BOTH = replace(TURNS, overlap=True, max_batches_offpolicy=2)


def test_taking_turns_costs_the_sum_of_generation_training_and_sync() -> None:
    found = simulate(EXACT, TURNS)
    assert found.step_seconds == pytest.approx(5 + 4 + 1, rel=0.01)
    assert found.trainer_idle_share == pytest.approx(0.5, abs=0.01)
    assert found.generation_idle_share == pytest.approx(0.5, abs=0.02)
    assert found.groups_per_second == pytest.approx(0.2, rel=0.02)
    assert set(found.staleness) == {0}


def test_overlap_costs_the_longer_of_both() -> None:
    balanced = simulate(EXACT, BOTH)  # generation 5 s, training and sync 5 s
    assert balanced.step_seconds == pytest.approx(5, rel=0.05)
    assert balanced.trainer_idle_share < 0.05
    slow_trainer = simulate(EXACT, replace(BOTH, train_rate=100.0))  # 8 + 1 s against 5 s
    assert slow_trainer.step_seconds == pytest.approx(9, rel=0.03)
    assert slow_trainer.generation_idle_share > 0.2  # environments stop when two batches wait
    slow_generation = simulate(EXACT, replace(BOTH, sequence_rate=10.0))  # 10 s against 5 s
    assert slow_generation.step_seconds == pytest.approx(10, rel=0.05)
    assert slow_generation.trainer_idle_share == pytest.approx(0.5, abs=0.03)


def test_a_group_is_as_stale_as_the_weights_of_its_first_token() -> None:
    assert simulate(EXACT, TURNS).staleness_mean == 0.0
    # Batches wait in the queue and in the prefetch while a slow trainer trains: all but the first are behind.
    found = simulate(EXACT, replace(BOTH, train_rate=50.0))
    assert found.staleness[0] <= 2 * EXACT.batch_size // EXACT.group_size
    assert max(found.staleness) >= 2
    bounded = simulate(EXACT, replace(BOTH, train_rate=50.0, max_staleness=1))
    assert max(bounded.staleness) == 1
    assert bounded.dropped_stale_groups > 0
    assert bounded.steps == EXACT.steps


def test_sequences_share_the_engine_and_wait_for_a_slot() -> None:
    # Half the slots: two waves of 5 s. Half the capacity: each of 8 has 10 tokens/s instead of 20.
    for changed in ({"slots": 4}, {"gen_capacity": 80.0}):
        found = simulate(EXACT, replace(TURNS, **changed))
        assert found.step_seconds == pytest.approx(10 + 4 + 1, rel=0.01), changed


def test_latency_goes_on_while_the_gate_is_shut_and_delays_what_is_posted() -> None:
    found = simulate(replace(EXACT, latency=3.0), TURNS)
    assert found.step_seconds == pytest.approx(5 + 3 + 4 + 1, rel=0.01)


def test_the_first_steps_can_be_left_out() -> None:
    whole, late = simulate(EXACT, BOTH), simulate(EXACT, BOTH, skip=10)
    assert (whole.steps, late.steps) == (50, 40)
    assert late.seconds == pytest.approx(whole.seconds - simulate(replace(EXACT, steps=10), BOTH).seconds, rel=0.01)
    assert set(whole.staleness) > set(late.staleness)  # the first batches are fresher than any later one


def test_a_group_that_is_counted_twice_costs_sync_a_whole_latency() -> None:
    # One environment makes the 32 groups of a batch at once and posts one every 10.7 ms, for 0.342 s; a group counts
    # twice for 1 ms, and looks are 0.1 s apart: of 3.42 looks at a batch, each sees one with probability 1 / 10.7. If
    # any does, another group is given up, and comes 10 s late (5 of generation).
    workload = replace(
        EXACT,
        environments=1,
        workers=32,
        batch_size=128,
        steps=200,
        latency=5.0,
        latency_spread=0.002,  # else posts and looks would keep step
        environment_period=0.1,
        post_seconds=0.0107,
        answer_seconds=0.001,
        poll_delay=0.04,
        poll_attempts=1,
    )
    layout = replace(TURNS, gen_capacity=1e9, slots=10**6, train_rate=1e9)
    exact = simulate(replace(workload, answer_seconds=0.0), layout)
    assert exact.cancelled_groups == 0
    assert exact.step_seconds == pytest.approx(5 + 5 + 32 * 0.0107 + 1, abs=0.1)
    found = simulate(workload, layout)
    expected = 1 - (1 - 1 / 10.7) ** (32 * 10.7 / 100)
    assert found.cancelled_groups / found.steps == pytest.approx(expected, abs=0.08)
    assert (found.step_seconds - exact.step_seconds) / (5 + 5) == pytest.approx(expected, abs=0.08)


def test_the_polls_begin_anew_when_the_longest_wait_is_over() -> None:
    # A batch every 100 s; polls after 1, 2.5, 4.75 s …, and from 12 s on again: 12, 13, 14.5, 16.75, 20.125, 24, …
    slow = replace(EXACT, steps=4, sync_seconds=0.0, poll_delay=1.0, poll_attempts=8, poll_seconds=12.0)
    found = simulate(replace(slow, latency=9.9), replace(TURNS, train_rate=1e9))
    assert found.step_seconds == pytest.approx(16.75, abs=0.01)  # 5 + 9.9 s, seen at the next poll


def test_equal_seeds_give_equal_figures_and_others_do_not() -> None:
    workload = replace(EXACT, steps=8, token_spread=0.7, environments=9, batch_size=24, latency=1.0, latency_spread=0.5)
    assert simulate(workload, BOTH, seed=3) == simulate(workload, BOTH, seed=3)
    assert simulate(workload, BOTH, seed=3) != simulate(workload, BOTH, seed=4)


def test_a_batch_that_can_never_fill_is_an_error_not_an_endless_loop() -> None:
    with pytest.raises(RuntimeError, match="step 1 never comes: 0 sequences wait"):
        simulate(replace(EXACT, workers=0), replace(TURNS, max_batches_offpolicy=0))


def test_the_command_compares_both_modes_at_the_scale_of_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--environments", "1000", "--batch-size", "4096", "--steps", "6", "--latency", "60", "--json"]
    assert main(["simulate", *words]) == 0
    sync, overlap = (
        Outcome(**{name: value for name, value in run.items() if name in Outcome.__dataclass_fields__})
        for run in json.loads(capsys.readouterr().out)["runs"]
    )
    assert (sync.mode, overlap.mode) == ("sync", "overlap")
    assert overlap.groups_per_second > sync.groups_per_second
    assert overlap.trainer_idle_share < sync.trainer_idle_share
    assert main(["simulate", "--steps", "5"]) == 0
    assert "overlap trains" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--batch-size", "12"], "--batch-size"),
        (["--gpus", "4", "--train-gpus", "4"], "--train-gpus"),
        (["--steps", "0"], "--steps"),
        (["--steps", "5", "--skip", "5"], "--steps"),
        (["--generation-from", "/nowhere"], "--generation-from"),
        (["--replay", "/nowhere"], "--replay"),
    ],
)
def test_what_cannot_be_simulated_is_refused_by_name(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *words]) == 2
    assert named in capsys.readouterr().err


def test_a_recording_that_is_too_short_says_how_many_steps_are_needed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "timing/step": 2.0}\n')
    with pytest.raises(ConfigError, match="holds 1 steps; at least 6"):
        read_recording(tmp_path)
