"""The trajectory-API client that a run's settings ask for. Imports no torch, so a dead API is reported at once."""

from __future__ import annotations

from atropos_verl.config.schema import RunConfig
from atropos_verl.protocol.client import AtroposClient

__all__ = ["make_client"]


def make_client(config: RunConfig, api_url: str) -> AtroposClient:
    """The client that a run's settings ask for, for the API at ``api_url``."""
    atropos = config.atropos
    return AtroposClient(
        api_url,
        timeout=atropos.timeout,
        token=atropos.token,
        headers=atropos.headers,
        verify=atropos.ca_file or True,
        retry_attempts=config.batch_retry_attempts,
        retry_delay=config.batch_retry_delay,
        max_wait_time=config.batch_max_wait_time,
        lease_seconds=atropos.lease_seconds,
    )
