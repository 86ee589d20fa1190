"""Plays every task with recorded completions, by the adapter and by the ecosystem's own runner; prints the rewards.

``python compare.py verifiers:TASKSET | openenv:URL SETTING …`` in an interpreter that has the package.
"""

import asyncio
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

from atropos_verl.environments.serve import adapter_of, settings_of


class Recorded(BaseHTTPRequestHandler):
    """The completion of a conversation depends on its text alone."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        said = json.dumps([(message["role"], message["content"]) for message in body["messages"]])
        digest = hashlib.sha256(said.encode()).hexdigest()
        text = "".join("aeioustrnmlw "[int(digit, 16) % 13] for digit in digest[: int(digest[:2], 16) % 40 + 1])
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        answer = {"id": "x", "object": "chat.completion", "created": 1, "model": "policy", "choices": [choice]}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


async def adapted(named: str, words: list[str], base: str) -> list[float]:
    open_environment, target = adapter_of(named)
    async with open_environment(target, settings_of(words)) as environment:
        sessions = [SimpleNamespace(id=f"s{n}", base_url=base, api_key="K") for n in range(len(environment.tasks))]
        return [(await environment.play(task, s)).value for task, s in zip(environment.tasks, sessions, strict=True)]


def vf_eval(target: str, words: list[str], base: str) -> list[float]:
    with tempfile.TemporaryDirectory() as directory:
        command = [Path(sys.executable).parent / "vf-eval", target, "--rich", "None", "--output-dir", directory]
        command += ["--client.base-url", base, "--client.api-key-var", "NONE", "--model", "policy", "-r", "1"]
        for word in words:
            name, _, value = word.partition("=")
            command += [f"--env.{name}", value]
        done = subprocess.run(command, capture_output=True, text=True)
        found = list(Path(directory).rglob("traces.jsonl"))
        assert found, done.stdout[-3000:] + done.stderr[-3000:]
        episodes = [json.loads(line) for path in found for line in path.read_text().splitlines()]
    by_task = sorted((episode["task"]["data"]["idx"], episode["traces"][0]["rewards"]) for episode in episodes)
    return [sum(reward["score"] * reward["weight"] for reward in rewards.values()) for _, rewards in by_task]


def stepped(url: str, base: str) -> list[float]:
    """The guessing environment by hand, with OpenEnv's synchronous client."""
    import httpx
    from openenv import GenericEnvClient

    schema, totals = httpx.get(f"{url}/schema").json()["action"], []
    for seed in range(8):
        with GenericEnvClient(base_url=url).sync() as client:
            result, total = client.reset(seed=seed), 0.0
            first = json.dumps({"observation": result.observation, "action_schema": schema}, ensure_ascii=False)
            messages = [{"role": "user", "content": first}]
            while not result.done:
                said = httpx.post(f"{base}/chat/completions", json={"messages": messages}).json()
                message = said["choices"][0]["message"]
                result = client.step({"letter": message["content"].strip()})
                total += result.reward
                seen = json.dumps({"observation": result.observation}, ensure_ascii=False)
                messages += [message, {"role": "user", "content": seen}]
        totals.append(total)
    return totals


if __name__ == "__main__":
    named, words = sys.argv[1], sys.argv[2:]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Recorded)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}/v1"
    prefix, _, target = named.partition(":")
    native = vf_eval(target, words, base) if prefix == "verifiers" else stepped(target, base)
    sys.stdout.write(json.dumps({"adapter": asyncio.run(adapted(named, words, base)), "native": native}) + "\n")
