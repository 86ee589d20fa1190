"""verl's ``Tracking`` for a run: tensorboard, wandb and whatever else verl speaks, with their files in ``run_dir``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from atropos_verl.config.schema import RunConfig
from atropos_verl.types import StepReport

__all__ = ["make_tracker"]


def make_tracker(config: RunConfig, run_dir: Path) -> Callable[[StepReport], None] | None:
    """A function that sends a step's figures to ``trainer.logger``, or None when that list is empty."""
    if not config.trainer.logger:
        return None
    # verl's backends write below the working directory unless told otherwise.
    os.environ.setdefault("TENSORBOARD_DIR", str(run_dir / "tensorboard"))
    os.environ.setdefault("WANDB_DIR", str(run_dir))
    os.environ.setdefault("VERL_FILE_LOGGER_PATH", str(run_dir / "verl_tracking.jsonl"))
    from verl.utils.tracking import Tracking

    tracking = Tracking(
        project_name=config.trainer.project_name,
        experiment_name=config.trainer.experiment_name,
        default_backend=list(config.trainer.logger),
        config=config.model_dump(mode="json"),
    )

    def send(report: StepReport) -> None:
        figures = {"loss": report.loss, "policy_version": report.policy_version, **report.metrics}
        tracking.log(data={k: v for k, v in figures.items() if v is not None}, step=report.step)

    return send
