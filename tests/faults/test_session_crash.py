"""``kill -9`` of the gateway under 32 concurrent sessions: no turn is lost, and no retry samples again.

``ATROPOS_SESSION_KILLS`` sets the number of kills (4; the bar is 50).
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.serving import eventually
from support.sessions import trained_samples
from support.tiny_model import build_tiny_tokenizer

logger = logging.getLogger(__name__)

KILLS = int(os.environ.get("ATROPOS_SESSION_KILLS", "4"))
SESSIONS, TURNS = 32, 6
TOKENIZER = build_tiny_tokenizer()
WAIT = 60.0
"""Seconds within which a request must get through once the gateway is left alone."""


class Drill:
    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=20.0, headers={"authorization": "Bearer K"})
        self.stop = threading.Event()
        self.counts: Counter[str] = Counter()
        self.failures: list[BaseException] = []

    def persist(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        """Send until it is answered whole, whatever happens to the gateway."""
        deadline = time.monotonic() + WAIT
        while True:
            try:
                answer = self.client.request(method, path, json=body, headers=headers)
                assert answer.status_code == 200, answer.text
                return answer
            except httpx.HTTPError:
                self.counts["retries"] += 1
                assert time.monotonic() < deadline, f"{method} {path} did not get through in {WAIT} s"
                time.sleep(0.02)

    def agent(self, number: int) -> None:
        """Sessions one after the other, until the drill ends."""
        try:
            rng = random.Random(number)
            for count in range(10**6):
                if self.stop.is_set():
                    return
                self.session(f"{number}-{count}", rng)
        except BaseException as error:  # noqa: BLE001 - the thread's boundary
            self.failures.append(error)

    def session(self, name: str, rng: random.Random) -> None:
        opened = self.persist("POST", "/sessions", {"group": "g"}, **{"idempotency-key": name}).json()
        key = {"authorization": f"Bearer {opened['api_key']}"}
        messages: list[dict[str, str]] = []
        for turn in range(TURNS):
            messages.append({"role": "user", "content": f"{name} {turn}"})
            stream = rng.random() < 0.5
            answer = self.persist("POST", "/v1/chat/completions", {"messages": messages, "stream": stream}, **key)
            messages.append({"role": "assistant", "content": content_of(answer, stream)})
            self.counts["turns"] += 1
        reward = {"reward": rng.random(), "per_turn": [0.0] * TURNS}
        self.persist("POST", f"/sessions/{opened['id']}/reward", reward)
        rollout = self.persist("GET", f"/sessions/{opened['id']}/rollout").json()
        assert (rollout["state"], rollout["turns"], rollout["reward"]) == ("finished", TURNS, reward["reward"])
        [row] = rollout["rows"]
        said = [TOKENIZER.decode(ids) for _, ids in trained_samples(rollout)]
        assert said == [f"{message['content']}<|im_end|>" for message in messages[1::2]]
        assert row["turns"] == [*range(TURNS)]
        self.counts["sessions"] += 1


def content_of(answer: httpx.Response, stream: bool) -> str:
    if not stream:
        return str(answer.json()["choices"][0]["message"]["content"])
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    if lines[-1] != "[DONE]":
        raise httpx.RemoteProtocolError("the stream was cut")
    return "".join(json.loads(line)["choices"][0]["delta"]["content"] for line in lines[:-1])


@pytest.mark.timeout(1800)
def test_a_killed_gateway_loses_no_turn_and_samples_none_twice(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    paths = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    server = subprocess.Popen(
        [sys.executable, "-m", "support.session_server", str(tmp_path), str(port)],
        env={**os.environ, "PYTHONPATH": paths},
    )
    drill = Drill(f"http://127.0.0.1:{port}")
    threads = [threading.Thread(target=drill.agent, args=(number,)) for number in range(SESSIONS)]
    pid_file = tmp_path / "child"
    try:
        eventually(pid_file.exists, "the first process serves", timeout=WAIT)
        for thread in threads:
            thread.start()
        rng = random.Random(0)
        for _ in range(KILLS):
            enough = drill.counts["turns"] + 5
            eventually(lambda: drill.counts["turns"] > enough or drill.failures, "it is at work", timeout=WAIT)  # noqa: B023
            time.sleep(rng.random() * 0.5)
            os.kill(pid := int(pid_file.read_text()), signal.SIGKILL)
            eventually(lambda: int(pid_file.read_text()) != pid, "the next process serves", timeout=WAIT)
        drill.stop.set()
        for thread in threads:
            thread.join(2 * WAIT)
    finally:
        drill.stop.set()
        server.kill()
        server.wait()
        if pid_file.exists():
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
    assert not drill.failures, drill.failures
    assert drill.counts["sessions"] >= SESSIONS and drill.counts["retries"] > KILLS
    logger.info("%s", dict(drill.counts))
