"""The idle share of a run."""

from __future__ import annotations

from atropos_verl.backends.local.rollout_data import IdleShare
from atropos_verl.types import StepReport


def test_the_idle_share_weighs_steps_by_their_length_and_leaves_the_first_out() -> None:
    idle = IdleShare()
    assert idle.value is None
    for step, (waited, total) in enumerate([(50.0, 51.0), (1.0, 2.0), (0.0, 6.0)], start=1):
        metrics: dict[str, float | int | None] = {"timing/rollout": waited, "timing/step": total}
        idle.add(StepReport(step=step, policy_version=step, loss=0.0, metrics=metrics))
    assert idle.value == 1.0 / 8.0
