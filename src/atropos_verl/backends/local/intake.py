"""What of a run faces the trajectory API: client, journal, registration. Imports no torch.

So a run can register before the policy is loaded. An environment of atroposlib may register only after the trainer,
and then sleeps for 5 s before it asks for a first completion (0.4.0, ``env_manager``): both pass while torch and verl
are imported. What it asks before the gateway answers waits in the gateway's socket, which listens from then on.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Self

from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.protocol.client import AtroposClient, make_client, register_trainer
from atropos_verl.protocol.journal import BatchJournal
from atropos_verl.protocol.leases import HeldBatch, LeasedBatches

__all__ = ["Intake"]

logger = logging.getLogger(__name__)


class Intake:
    """Client, journal and batches of one run; ``close`` when nobody fetches any more.

    Args:
        client: used instead of one made from the configuration.
    """

    def __init__(self, config: RunConfig, run_dir: Path, client: AtroposClient | None = None) -> None:
        if client is None and config.atropos.api_url is None:
            raise ConfigError("no trajectory API: set it, or run recipe/atropos/main_atropos.py", "atropos.api_url")
        self.config = config
        self.run_dir = run_dir
        self.client = client or make_client(config, str(config.atropos.api_url))
        self.journal = BatchJournal(run_dir / "journal")
        self.batches = LeasedBatches(self.client, self.journal)
        self._owed: list[HeldBatch] | None = None
        self._polled: list[HeldBatch] = []
        self.is_registered = False
        """``register`` has succeeded."""

    def resume(self, step: int) -> list[HeldBatch]:
        """Batches of an earlier process that a run at ``step`` trains on first. The second call gives the same.

        Raises:
            AtroposAPIError, CheckpointError: see ``LeasedBatches.resume``.
        """
        if self._owed is None:
            self._owed = self.batches.resume(step) if self.config.resume != "disable" else []
        return self._owed

    def register(self, step: int, batch_size: int) -> None:
        """Register the trainer, which is at ``step``, unless that is done. What is owed must be settled before.

        Raises:
            AtroposAPIError: see ``api.registration``.
        """
        if self.is_registered:
            return
        register_trainer(
            self.client,
            self.config,
            batch_size,
            starting_step=step,
            checkpoint_dir=self.run_dir / "checkpoints",
            first_poll=lambda: self.poll(step),
        )
        self.is_registered = True

    def poll(self, step: int) -> None:
        """One GET /batch: an upstream API lets environments register only after it. What it returns is kept."""
        held = self.batches.poll({"after_step": step})
        if held is not None:
            self._polled.append(held)

    def take_polled(self) -> list[HeldBatch]:
        """What ``poll`` has kept, once."""
        polled, self._polled = self._polled, []
        return polled

    def close(self) -> None:
        """Stop renewing leases, then close the connection. Idempotent."""
        self.batches.close()
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
