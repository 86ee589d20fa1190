"""The processes a run starts when no API is given: trajectory API, environment, evaluations."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ServiceError
from atropos_verl.launch.plan import api_data_dir, api_spec, env_spec, evaluate_spec
from atropos_verl.launch.process import ManagedProcess, ProcessSet
from atropos_verl.launch.readiness import free_port, http_probe, wait_until_ready
from atropos_verl.protocol.client import AtroposClient

__all__ = ["LocalServices"]

logger = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_API_STARTUP_SECONDS = 60.0


class LocalServices:
    """Starts, watches and ends the run's child processes. ``stop()`` is safe at any time and more than once.

    Args:
        gateway_port: of the trainer's gateway; None: ``gateway.port``, or a free one.
    """

    def __init__(self, config: RunConfig, run_dir: Path, model_path: Path, gateway_port: int | None = None) -> None:
        self.config = config
        self.run_dir = run_dir
        self.model_path = model_path
        self.processes = ProcessSet()
        self.gateway_port = gateway_port or config.gateway.port or free_port(_HOST)
        self.gateway_url = config.gateway.advertise_url or f"http://{_HOST}:{self.gateway_port}"
        self.api_url = ""
        self._evaluations: dict[str, tuple[ManagedProcess, Path]] = {}

    def start_api(self) -> str:
        """Start the trajectory API and wait until it answers. Returns its URL."""
        port = free_port(_HOST)
        self.api_url = f"http://{_HOST}:{port}"
        data_dir = api_data_dir(self.run_dir)
        if self.config.resume == "disable" and data_dir.is_dir():
            logger.info("resume=disable: what an earlier API left in %s is removed", data_dir)
            shutil.rmtree(data_dir)
        process = self.processes.start(api_spec(self.run_dir, _HOST, port, self.config.atropos.server))
        wait_until_ready(
            lambda: http_probe(f"{self.api_url}/status", timeout=1.0),
            name="trajectory_api",
            timeout=_API_STARTUP_SECONDS,
            process=process,
        )
        self._forget_dead_environments()
        return self.api_url

    def _forget_dead_environments(self) -> None:
        """Those that a resumed API remembers ended with the run before; until they are missed, the new one would be
        given a share beside them."""
        with AtroposClient(self.api_url) as client:
            for env_id in range(client.status().environments):
                client.disconnect_env(env_id)

    def start_environment(self) -> None:
        """Start the environment; it waits by itself for gateway and trainer."""
        spec = env_spec(self.config, self.run_dir, self.model_path, api_url=self.api_url, gateway_url=self.gateway_url)
        self.processes.start(spec)

    def start_evaluation(self, label: str) -> None:
        """Start ``ENV evaluate`` in the background; ``finish_evaluation`` collects it."""
        spec, result = evaluate_spec(
            self.config, self.run_dir, self.model_path, gateway_url=self.gateway_url, label=label
        )
        process = ManagedProcess(spec)
        process.start()
        self._evaluations[label] = (process, result)

    def finish_evaluation(self, label: str) -> dict[str, Any]:
        """Wait for an evaluation and read its metrics.

        Raises:
            ServiceError: it failed, or took longer than ``eval.timeout`` seconds.
        """
        process, result = self._evaluations.pop(label)
        deadline = time.monotonic() + self.config.eval.timeout
        try:
            while True:
                # First the others: what killed an evaluation killed the environment as well, and that is the news.
                self.processes.check_all()
                if not process.is_running():
                    break
                if time.monotonic() > deadline:
                    raise ServiceError(
                        f"{process.spec.name} took longer than eval.timeout={self.config.eval.timeout:g} s",
                        process.spec.name,
                        None,
                        process.log_tail(),
                    )
                time.sleep(0.05)
            if process.returncode != 0 or not result.is_file():
                raise ServiceError(
                    f"{process.spec.name} ended with code {process.returncode} and wrote no {result}; "
                    "switch it off with eval.before=false eval.after=false",
                    process.spec.name,
                    process.returncode,
                    process.log_tail(),
                )
        finally:
            process.stop()
        metrics: dict[str, Any] = json.loads(result.read_text())["results"]["all"]
        return metrics

    def has_evaluation(self, label: str) -> bool:
        """True between ``start_evaluation`` and ``finish_evaluation``."""
        return label in self._evaluations

    def check(self) -> None:
        """Raise ``ServiceError`` if a process of the run has died."""
        self.processes.check_all()

    def stop(self) -> None:
        """End every process of the run and reap it."""
        for process, _ in self._evaluations.values():
            process.stop()
        self._evaluations.clear()
        self.processes.stop_all()
