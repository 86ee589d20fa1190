"""One group's way from POST to the optimiser, traced: the files of the package that run because of it.

Real parts in one process: the durable trajectory API, the gateway that wrote the group, the trainer in ``fit``.
What counts: each file of ``src/atropos_verl`` in which a function is called, in any thread, from the moment before the
group is sent to the moment after the optimiser's step. Threads that do other work meanwhile count too, because
nothing tells their calls apart. What does not count:

- start-up, the generation of the group (a completion's way is another one), and what comes after the step (weight
  sync, ack, report)
- the threads of the engine and the gateway, and the trainer's look at the engine's health while it waits: they do not
  see the group

The run is overlapped, so that the engine is not stopped for the step. The group is sent as an environment sends it,
without our client, and only after the trainer has begun to wait for it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import pytest
from support.trajectory_server import TrajectoryServer

import atropos_verl
from atropos_verl import AtroposTrainer
from atropos_verl.assets import demo_model_path
from atropos_verl.server.settings import ServerSettings

MOST_FILES = 28  # one of them notes what becomes of the group (training/trace.py)
POLLED = {"server/status.py", "engine/embedded.py"}  # looked at from time to time, whatever the group does
OTHER_THREADS = ("atropos-verl-engine", "inference-gateway")
GROUP_SIZE = 4
ROOT = Path(atropos_verl.__file__).parent


class Tracer:
    """Notes the package's files in which a function is called while ``recording``, in every thread started after it."""

    def __init__(self) -> None:
        self.recording = False
        self._paths: set[str] = set()

    def __enter__(self) -> Tracer:
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]

    def _on_event(self, frame: FrameType, event: str, argument: Any) -> None:
        if self.recording and event == "call" and threading.current_thread().name not in OTHER_THREADS:
            self._paths.add(frame.f_code.co_filename)

    @property
    def files(self) -> list[str]:
        inside = (Path(path) for path in self._paths)
        return sorted(str(path.relative_to(ROOT)) for path in inside if path.is_relative_to(ROOT))


@pytest.fixture
def tracer() -> Iterator[Tracer]:
    with Tracer() as tracer:
        yield tracer


def test_the_files_of_one_groups_way_from_post_to_the_optimiser(tracer: Tracer, tmp_path: Path) -> None:
    trainer_waits = threading.Event()
    failures: list[BaseException] = []
    with TrajectoryServer(ServerSettings(data_dir=tmp_path / "api")) as api:
        api_url = api.url
        settings = {
            "model": {"path": str(demo_model_path())},
            "run_dir": str(tmp_path / "run"),
            "steps": 1,
            "mode": "overlap",
            "batch_size": GROUP_SIZE,
            "group_size": GROUP_SIZE,
            "save_freq": -1,
            "max_response_length": 8,
            "inference": {"num_threads": 1},
            "atropos": {"api_url": api_url, "rollout_timeout": 60},
        }
        with AtroposTrainer.from_config(settings) as trainer:
            trainer.resume_from_checkpoint()

            def environment() -> None:
                try:
                    with httpx.Client(timeout=30.0) as http:
                        assert trainer_waits.wait(60.0)
                        hello = {"desired_name": "one", "max_token_length": 64, "weight": 1.0, "group_size": GROUP_SIZE}
                        env_id = http.post(f"{api_url}/register-env", json=hello).json()["env_id"]
                        group = {**_generated(http, trainer.gateway_url), "env_id": env_id}
                        tracer.recording = True
                        assert http.post(f"{api_url}/scored_data", json=group).status_code == 200
                except BaseException as error:  # noqa: BLE001 - a thread's end: the test raises it
                    failures.append(error)

            def check_services() -> None:
                """Called by ``fit`` while it waits for a batch."""
                trainer_waits.set()
                if failures:
                    raise failures[0]

            train = trainer.worker.train

            def train_and_stop(samples: Any) -> Any:
                output = train(samples)
                tracer.recording = False
                return output

            trainer.worker.train = train_and_stop  # type: ignore[method-assign]
            trainer.engine.check_alive = lambda: None  # type: ignore[method-assign]
            thread = threading.Thread(target=environment)
            thread.start()
            trainer.fit(check_services=check_services)
            thread.join()
            assert (trainer.step, trainer.state.totals.groups_used) == (1, 1)
            assert trainer.state.totals.tokens_trained > 0
    files = [file for file in tracer.files if file not in POLLED]
    expected = ("server/app.py", "protocol/journal.py", "provenance/attribution.py", "training/samples.py")
    assert set(expected) < set(files), "the group did not go its whole way"
    assert len(files) <= MOST_FILES, f"{len(files)} files:\n" + "\n".join(files)


def _generated(http: httpx.Client, gateway_url: str) -> dict[str, Any]:
    """A group whose tokens the policy wrote, so that its provenance is found."""
    prompt = [64, 65, 66]
    body = {"prompt": {"prompt_token_ids": prompt}, "n": GROUP_SIZE, "max_tokens": 4, "ignore_eos": True, "logprobs": 0}
    answer = http.post(f"{gateway_url}/generate", json=body)
    assert answer.status_code == 200, answer.text
    completions = answer.json()["token_ids"]
    return {
        "tokens": [[*prompt, *completion] for completion in completions],
        "masks": [[-100] * len(prompt) + completion for completion in completions],
        "scores": [float(i % 2) for i in range(GROUP_SIZE)],
    }
