"""A launch on Ray whose trainer is killed: Ray goes with it, a new trainer resumes, and the run completes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from support.launches import LaunchRun

STEPS = 4
WORDS = (
    "backend=ray",
    f"trainer.total_training_steps={STEPS}",
    "trainer.save_freq=1",
    "data.train_batch_size=4",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
    "atropos.eval.before=false",
    "supervise.backoff=0.2",
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_trainer_on_ray_resumes_and_the_run_completes(tmp_path: Path) -> None:
    with LaunchRun(WORDS, run_dir=tmp_path / "run") as run:
        run.wait_for_trained(2, timeout=240.0)
        os.kill(run.pid_of("trainer"), signal.SIGKILL)
        assert run.wait(300.0) == 0, run.stdout + run.stderr
        run.assert_nothing_left()
        assert run.service("trainer")["restarts"] == 1
        assert [line["step"] for line in run.metrics()] == list(range(1, STEPS + 1))
        assert [line["policy_version"] for line in run.metrics()] == list(range(1, STEPS + 1))
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        score = summary["held_out_after"]
        assert f"held-out mean reward after training: demo {score:.3f}" in run.stdout
