"""One group's way from POST to the optimiser, traced: the files of the package that run because of it.

Real parts in one process: the durable trajectory API, the gateway that wrote the group, the trainer in ``fit``. Counted
is each file of ``src/atropos_verl`` in which a function is called, in any thread, from the moment before the group is
sent to the moment after the optimiser's step; not start-up, the generation of the group, and what comes after the step.
The run is overlapped, so that the engine is not stopped for the step; threads of engine and gateway do not see the
group. It is sent without our client, and only after the trainer has begun to wait for it.
"""

import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from support.serving import post
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


def test_the_files_of_one_groups_way_from_post_to_the_optimiser(tmp_path: Path) -> None:
    called: set[str] = set()
    is_sent, waits = threading.Event(), threading.Event()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if is_sent.is_set() and event == "call" and threading.current_thread().name not in OTHER_THREADS:
            called.add(frame.f_code.co_filename)

    def send() -> None:
        assert waits.wait(60.0)
        prompt = [64, 65, 66]
        with httpx.Client(base_url=trainer.gateway_url, timeout=30.0) as gateway:
            asked = {"prompt": {"prompt_token_ids": prompt}, "n": GROUP_SIZE, "max_tokens": 4, "ignore_eos": True}
            completions = post(gateway, "/generate", logprobs=0, **asked)["token_ids"]
        group = {
            "tokens": [[*prompt, *completion] for completion in completions],
            "masks": [[-100] * len(prompt) + completion for completion in completions],
            "scores": [float(i % 2) for i in range(GROUP_SIZE)],
        }
        with httpx.Client(base_url=api.url, timeout=30.0) as http:
            hello = {"desired_name": "one", "max_token_length": 64, "weight": 1.0, "group_size": GROUP_SIZE}
            env_id = post(http, "/register-env", **hello)["env_id"]
            is_sent.set()
            post(http, "/scored_data", **group, env_id=env_id)

    def train_and_stop(samples: Any) -> Any:
        output = train(samples)
        is_sent.clear()
        return output

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        with TrajectoryServer(ServerSettings(data_dir=tmp_path / "api")) as api:
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
                "atropos": {"api_url": api.url, "rollout_timeout": 60},
            }
            with AtroposTrainer.from_config(settings) as trainer:
                train, trainer.worker.train = trainer.worker.train, train_and_stop  # type: ignore[method-assign]
                trainer.engine.check_alive = lambda: None  # type: ignore[method-assign]
                threading.Thread(target=send, daemon=True).start()
                trainer.fit(check_services=waits.set)  # called while it waits for a batch
                assert (trainer.step, trainer.totals.groups_used) == (1, 1) and trainer.totals.tokens_trained > 0
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    inside = (Path(path) for path in called)
    files = {str(path.relative_to(ROOT)) for path in inside if path.is_relative_to(ROOT)} - POLLED
    expected = {"server/app.py", "protocol/journal.py", "provenance/attribution.py", "training/samples.py"}
    assert expected < files, "the group did not go its whole way"
    assert len(files) <= MOST_FILES, f"{len(files)} files:\n" + "\n".join(sorted(files))
