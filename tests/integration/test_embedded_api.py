"""The trajectory API that a run starts for itself: what it keeps, and from whom."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.trajectory_server import group_bytes, registration

from atropos_verl.config.schema import RunConfig
from atropos_verl.http_thread import environment_token
from atropos_verl.launch.train import TrainingServices
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.messages import EnvRegistration, TrainerRegistration
from atropos_verl.report.console import ProgressReporter


@contextmanager
def api(run_dir: Path, **settings: Any) -> Iterator[tuple[AtroposClient, tuple[str, str]]]:
    """A client of the API that a run in ``run_dir`` starts, with the token that the run made for it."""
    config = RunConfig.from_mapping({"run_dir": str(run_dir), **settings})
    services = TrainingServices(config, gateway_port=9)
    try:
        made = services.start_api(ProgressReporter(total_steps=1)).atropos
        assert httpx.get(f"{made.api_url}/status").status_code == 401, "nobody else gets in"
        with AtroposClient(str(made.api_url), token=made.token) as client:
            yield client, ("run", str(made.token))
    finally:
        services.stop()


def register(client: AtroposClient) -> None:
    client.register(TrainerRegistration(**registration()))
    client.poll_batch()


def test_a_resumed_run_finds_its_groups_and_not_its_dead_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATROPOS_API_TOKEN", "meant-for-another-api")
    hello = EnvRegistration(max_token_length=64, desired_name="env", group_size=4)
    with api(tmp_path) as (client, auth):
        register(client)
        assert client.register_env(hello) == 0
        client.post_scored_data_list([group_bytes(1, env_id=0)])
    with api(tmp_path) as (client, auth):
        assert client.status().queue_size == 1
        assert client.register_env(hello) == 1
        # As Atropos's client sends the password of a URL.
        asked = httpx.get(f"{client.api_url}/status-env", params={"env_id": 1}, auth=auth)
        theirs = ("run", environment_token(auth[1]))
        assert httpx.get(f"{client.api_url}/reset_data", auth=theirs).status_code == 403, "only the run itself resets"
        seen = asked.json()
        assert seen["env_weight"] == 1.0, "the one before took half of it"
    with api(tmp_path, resume="disable") as (client, auth):
        assert (client.status().queue_size, client.info().batch_size) == (0, -1)
