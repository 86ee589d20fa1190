"""Our trajectory API for tests: groups to post, a clock to set, and the server as a process that can be killed."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import psutil

from atropos_verl.http_thread import ServerThread
from atropos_verl.launch.probes import free_port, request_json
from atropos_verl.protocol.messages import EnvRegistration
from atropos_verl.protocol.schema import CheckedGroup, check_group
from atropos_verl.server.app import TrajectoryApi, check_bind, uvicorn_options
from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.store import Batch, Store
from support.serving import eventually


class Clock:
    """Seconds since the epoch, moved by the test."""

    time = 1_000_000.0

    def __call__(self) -> float:
        return self.time

    def pass_(self, seconds: float) -> None:
        self.time += seconds


def group(number: int, size: int = 4, env_id: int | None = None, **fields: Any) -> dict[str, Any]:
    """A good group of ``size`` sequences of 3 tokens; its first token id is ``number``, to tell it by."""
    tokens = [[number, 7, 100 + i] for i in range(size)]
    made = {"tokens": tokens, "masks": [[-100, *row[1:]] for row in tokens], "scores": [float(i) for i in range(size)]}
    return {**made, "env_id": env_id, **fields}


def group_bytes(number: int, size: int = 4, env_id: int | None = None, **fields: Any) -> bytes:
    return json.dumps(group(number, size, env_id, **fields)).encode()


def complete(checked: CheckedGroup) -> bytes:
    """The group's JSON with every key, as trainers get it."""
    return checked.raw[:-1] + checked.suffix if checked.suffix else checked.raw


def registration(batch_size: int = 8, **fields: Any) -> dict[str, Any]:
    names = {"wandb_group": "group", "wandb_project": "project", "checkpoint_dir": "/checkpoints"}
    steps = {"save_checkpoint_interval": 5, "starting_step": 0, "num_steps": 1000}
    return {**names, **steps, "batch_size": batch_size, "max_token_len": 64, **fields}


def post(store: Store, number: int, size: int = 4, env_id: int | None = None, key: str | None = None) -> dict[str, Any]:
    """Post ``group(number, …)`` to a store; returns the answer: how many duplicates it was."""
    checked = check_group(group_bytes(number, size, env_id), environments=len(store.environments))
    answer = store.accept([checked], lambda duplicates: b'{"duplicates": %d}' % duplicates, key, checked.digest)
    return dict(json.loads(answer))


def join(store: Store, **fields: Any) -> int:
    """Register an environment; returns its number."""
    environment = store.register_env(EnvRegistration(**{"max_token_length": 64, "group_size": 4, **fields}))
    assert environment is not None
    return environment.env_id


def take(store: Store, lease: float | None = 60.0) -> Batch:
    """The next batch, which there must be."""
    batch = store.next_batch(lease)
    assert batch is not None
    return batch


async def turns() -> None:
    """Turns of the event loop, no time: what could go on has gone on."""
    for _ in range(100):
        await asyncio.sleep(0)


class TrajectoryServer(ServerThread):
    """The API in a thread of this process."""

    def __init__(self, settings: ServerSettings | None = None, host: str = "127.0.0.1", port: int = 0) -> None:
        self.app = TrajectoryApi(check_bind(host, settings or ServerSettings()))
        options = uvicorn_options(self.app)
        super().__init__(self.app, service="trajectory API", advice="", host=host, port=port, **options)

    def stop(self, timeout: float = 10.0) -> None:
        super().stop(timeout)
        self.app.store.close()


class ServerProcess:
    """``atropos-verl serve-api`` as a subprocess on a port of its own, which survives restarts."""

    command: tuple[str, ...] = (sys.executable, "-m", "atropos_verl.cli", "serve-api")
    ready_path = "/health"
    prefix: tuple[str, ...] = ()
    """A program that runs the server, and its arguments."""

    def __init__(self, directory: Path, *options: str, port: int | None = None) -> None:
        self.directory = directory
        self.port = port or free_port()
        self.options = ("--port", str(self.port), *options)
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = directory / f"server_{self.port}.log"

    def start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self.log_path.open("ab") as log:
            command = [*self.prefix, *self.command, *self.options]
            self.process = subprocess.Popen(command, cwd=self.directory, env=environment, stdout=log, stderr=log)
        eventually(self._answers, "the server to answer", timeout=90.0)

    def _answers(self) -> bool:
        said = self.log_path.read_text(errors="replace")[-2000:]
        assert self.process.poll() is None, f"the server exited with {self.process.returncode}:\n{said}"
        return request_json(f"{self.url}{self.ready_path}") is not None

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        for child in psutil.Process(self.process.pid).children() if self.prefix else ():
            child.kill()
        self.process.kill()
        self.process.wait(timeout=10.0)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.terminate()
        return self.process.wait(timeout=15.0)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class UpstreamApi(ServerProcess):
    """The real trajectory API of atroposlib."""

    command = (sys.executable, "-m", "atroposlib.cli.run_api", "--host", "127.0.0.1")
    ready_path = "/status"
