"""``kill -9`` under 32 concurrent sessions: no turn is lost, no retry samples again, and each group is posted once.

``ATROPOS_SESSION_KILLS`` sets the number of kills of a gateway (4; the bar is 50), ``ATROPOS_RUN_KILLS`` that of a
whole run with an environment of agents, which is resumed each time, and ``ATROPOS_RAY_KILLS`` that of the process that
has the gateway of a launch on Ray, after which the launcher starts the trainer again (0: they are left out).
"""

import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.runs import REPOSITORY, SMALL, LaunchRun
from support.serving import eventually
from support.sessions import trained_samples
from support.tiny_model import build_tiny_tokenizer
from transformers import AutoTokenizer

from atropos_verl.assets import demo_model_path
from atropos_verl.launch.probes import free_port
from atropos_verl.server.settings import ServerSettings
from atropos_verl.server.store import Store

logger = logging.getLogger(__name__)

KILLS = int(os.environ.get("ATROPOS_SESSION_KILLS", "4"))
RUN_KILLS = int(os.environ.get("ATROPOS_RUN_KILLS", "0"))
RAY_KILLS = int(os.environ.get("ATROPOS_RAY_KILLS", "0"))
SESSIONS, TURNS = 32, 6
WAIT = 60.0
"""Seconds within which a request must get through once the gateway is left alone."""


class Drill:
    """32 agents; ``asked`` are fields of their requests."""

    def __init__(self, url: str, tokenizer: Any, *, wait: float = WAIT, **asked: Any) -> None:
        self.tokenizer, self.wait, self.asked = tokenizer, wait, asked
        self.client = httpx.Client(base_url=url, timeout=20.0, headers={"authorization": "Bearer K"})
        self.stop = threading.Event()
        self.counts: Counter[str] = Counter()

    def persist(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        """Send until it is answered whole, whatever happens to the gateway."""
        deadline, pause = time.monotonic() + self.wait, 0.02
        while True:
            try:
                answer = self.client.request(method, path, json=body, headers=headers)
                if answer.status_code == 503 or ((body or {}).get("stream") and not answer.text.endswith("[DONE]\n\n")):
                    raise httpx.RemoteProtocolError("the run is ending")  # killed process by process: an SDK retries
                assert answer.status_code == 200, answer.text
                return answer
            except httpx.HTTPError:
                self.counts["retries"] += 1
                assert time.monotonic() < deadline, f"{method} {path} did not get through in {self.wait} s"
                time.sleep(pause)
                pause = min(1.5 * pause, 1.0)

    def agent(self, number: int) -> None:
        rng = random.Random(number)
        for count in itertools.count():
            if self.stop.is_set():
                return
            self.session(f"{number}-{count}", rng)

    def session(self, name: str, rng: random.Random) -> None:
        opened = self.persist("POST", "/sessions", {"group": "g"}, **{"idempotency-key": name}).json()
        key = {"authorization": f"Bearer {opened['api_key']}"}
        messages: list[dict[str, str]] = []
        for turn in range(TURNS):
            messages.append({"role": "user", "content": f"{name} {turn}"})
            stream = rng.random() < 0.5
            asked = {**self.asked, "messages": messages, "stream": stream}
            answer = self.persist("POST", "/v1/chat/completions", asked, **key)
            messages.append({"role": "assistant", "content": content_of(answer, stream)})
            self.counts["turns"] += 1
        reward = {"reward": rng.random(), "per_turn": [0.0] * TURNS}
        self.persist("POST", f"/sessions/{opened['id']}/reward", reward)
        rollout = self.persist("GET", f"/sessions/{opened['id']}/rollout").json()
        assert (rollout["state"], rollout["turns"], rollout["reward"]) == ("finished", TURNS, reward["reward"])
        [row] = rollout["rows"]
        samples = [ids for _, ids in trained_samples(rollout)]
        said = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in samples]
        assert said == [message["content"] for message in messages[1::2]]
        assert row["turns"] == [*range(TURNS)]
        self.counts["sessions"] += 1

    def start(self) -> None:
        pool = ThreadPoolExecutor(SESSIONS)
        self.agents = [pool.submit(self.agent, number) for number in range(SESSIONS)]

    def work(self, rng: random.Random) -> None:
        """Let the agents get some answers."""
        enough = self.counts["turns"] + 5
        eventually(lambda: self.counts["turns"] > enough or self.ended(), "it is at work", timeout=self.wait)
        assert not self.ended()
        time.sleep(rng.random() * 0.5)

    def ended(self) -> list[None]:
        """What agents returned. Raises what they raised."""
        return [agent.result() for agent in self.agents if agent.done()]

    def end(self) -> None:
        """Finish the sessions that are open, and check what came of all."""
        self.stop.set()
        wait(self.agents, timeout=2 * self.wait)
        assert len(self.ended()) == SESSIONS
        logger.info("%s", dict(self.counts))


def content_of(answer: httpx.Response, stream: bool) -> str:
    if not stream:
        return str(answer.json()["choices"][0]["message"]["content"])
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    return "".join(json.loads(line)["choices"][0]["delta"]["content"] for line in lines[:-1])


@pytest.mark.timeout(1800)
def test_a_killed_gateway_loses_no_turn_and_samples_none_twice(tmp_path: Path) -> None:
    port, pid_file = free_port(), tmp_path / "child"
    path = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "support.sessions", str(tmp_path), str(port)]
    server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    drill = Drill(f"http://127.0.0.1:{port}", build_tiny_tokenizer())
    try:
        eventually(pid_file.exists, "the first process serves", timeout=WAIT)
        drill.start()
        rng = random.Random(0)
        for _ in range(KILLS):
            drill.work(rng)
            os.kill(pid := int(pid_file.read_text()), signal.SIGKILL)
            eventually(lambda: int(pid_file.read_text()) != pid, "the next process serves", timeout=WAIT)
        drill.end()
    finally:
        drill.stop.set()
        server.kill()
        server.wait()
        if pid_file.exists():
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
    assert drill.counts["sessions"] >= SESSIONS and drill.counts["retries"] > KILLS


def with_agents(directory: Path, words: Sequence[str], block: str) -> tuple[LaunchRun, Drill]:
    """A launch whose one environment are agents that spell, and agents of the drill at its gateway. ``block``: before
    the keys of the gateway."""
    port, tasks = free_port(), directory / "words.jsonl"
    tasks.write_text("\n".join(map(json.dumps, ("sun", "moon", "star", "sky", "tree", "rain", "wind"))))
    words = [*words, "data.max_prompt_length=900", "envs=[speller]", "supervise.backoff=0.2"]
    words += [f"{block}gateway.port={port}", f"{block}gateway.api_key=K", f"{block}journal.keep=100"]
    words += ["agents.speller.concurrency=32", "agents.speller.agent=speller:solve", f"agents.speller.tasks={tasks}"]
    path = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY / "examples" / "agents")])
    tokenizer = AutoTokenizer.from_pretrained(str(demo_model_path()))
    run = LaunchRun(words, run_dir=directory / "run", env={"PYTHONPATH": path})
    # A life answers a few of 32 requests, and a start may take minutes: one of them may have to wait for its turn.
    return run, Drill(f"http://127.0.0.1:{port}", tokenizer, wait=3600.0, max_tokens=8)


OF_TRAIN = (*SMALL, "steps=10000", "save_freq=1", "max_response_length=120")
ON_RAY = (
    "backend=ray",
    "trainer.total_training_steps=10000",
    "trainer.save_freq=1",
    "data.train_batch_size=4",
    "data.max_response_length=120",
    "actor_rollout_ref.rollout.n=4",
    "atropos.eval.before=false",
    "atropos.eval.after=false",
    # Groups that a kill has made old count as well.
    "atropos.off_policy.max_staleness=null",
    "supervise.healthy_after=1",
)


@pytest.mark.parametrize(
    ("kills", "words", "block"),
    [(RUN_KILLS, OF_TRAIN, ""), (RAY_KILLS, ON_RAY, "atropos.")],
    ids=["every process", "the task runner of Ray"],
)
@pytest.mark.timeout(7200)
def test_a_killed_run_loses_no_turn_and_posts_each_group_once(
    tmp_path: Path, kills: int, words: Sequence[str], block: str
) -> None:
    """The task runner has gateway and trainer, and its end is that of its Ray: replicas, workers and what is under way
    in them."""
    if not kills:
        pytest.skip("set ATROPOS_RUN_KILLS and ATROPOS_RAY_KILLS")
    run, drill = with_agents(tmp_path, words, block)
    drill.start()
    rng = random.Random(0)
    try:
        with run:
            for number in range(kills):
                drill.work(rng)
                if number % 5 == 4:
                    run.wait_for_more(1)
                if words is ON_RAY:
                    run.kill_actor("AtroposTaskRunner")
                else:
                    run.__exit__()  # kill -9 of all its processes
                    run.__enter__()
                logger.info("kill %d: %s, %d steps", number + 1, dict(drill.counts), run.trained())
            drill.end()
            run.wait_for_more(2)
            if words is ON_RAY:
                assert run.service("trainer")["restarts"] == kills
                assert run.service("speller")["restarts"] == run.service("trajectory_api")["restarts"] == 0
    finally:
        drill.stop.set()
    # Steps of four groups, each group of agents posted once.
    assert drill.counts["sessions"] >= SESSIONS
    assert [line["step"] for line in run.metrics()] == [*range(1, run.trained() + 1)]
    notes = [json.loads(line) for line in (run.run_dir / "agents" / "speller.jsonl").read_text().splitlines()]
    over = Counter(note["group"] for note in notes if "over" in note)
    with closing(Store(ServerSettings(data_dir=run.run_dir / "api"))) as store:
        assert store.totals["groups"] == len(set(store.keys)) >= run.trained() * 4
        assert set(over) <= set(store.keys) and set(over.values()) == {1}
