"""Registering a trainer at a trajectory API: real values, started, and checked that they were taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import AtroposProtocolError
from atropos_verl.protocol.client import AtroposClient, TrainerRegistration

__all__ = ["register_trainer"]


def register_trainer(
    client: AtroposClient,
    config: RunConfig,
    batch_size: int,
    *,
    starting_step: int,
    checkpoint_dir: Path,
    first_poll: Callable[[], None],
) -> None:
    """Register at the API with real values, start it (``first_poll``: one GET /batch), and check that it took them.

    Raises:
        AtroposProtocolError: the API keeps the values of an earlier registration.
    """
    client.check()
    if config.atropos.reset:
        client.reset_data()
    client.register(
        TrainerRegistration.with_inclusive_max_token_len(
            config.max_token_len,
            wandb_group=config.trainer.experiment_name,
            wandb_project=config.trainer.project_name,
            batch_size=batch_size,
            checkpoint_dir=str(checkpoint_dir),
            save_checkpoint_interval=config.save_freq,
            starting_step=starting_step,
            num_steps=config.steps,
        )
    )
    first_poll()
    info = client.info()
    if (info.batch_size, info.max_token_len) != (batch_size, config.max_token_len + 1):
        raise AtroposProtocolError(
            f"the API keeps an earlier registration (batch_size {info.batch_size}, max_token_len "
            f"{info.max_token_len}) and ignores ours (batch_size {batch_size}, max_token_len "
            f"{config.max_token_len + 1}); restart it, or set atropos.reset=true to clear it",
            client.api_url,
        )
