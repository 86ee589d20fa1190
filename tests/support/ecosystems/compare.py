"""Plays every task with recorded completions, by the adapter and by the ecosystem's own runner; prints the rewards.

``python compare.py verifiers:TASKSET | openenv:URL | nemo-gym:CONFIG | harbor:DIRECTORY SETTING …`` in an interpreter
that has the package.
"""

import asyncio
import hashlib
import json
import os
import signal
import socket
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
        chat = self.path.endswith("/chat/completions")
        said = [(m["role"], m["content"]) for m in body["messages"]] if chat else body["input"]
        digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        text = "".join("aeioustrnmlw "[int(digit, 16) % 13] for digit in digest[: int(digest[:2], 16) % 40 + 1])
        answer = {"id": "x", "object": "chat.completion" if chat else "response", "model": "policy"}
        if chat:
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            answer |= {"created": 1, "choices": [choice]}
        else:
            content = [{"type": "output_text", "text": text, "annotations": []}]
            item = {"type": "message", "role": "assistant", "content": content}
            if body.get("tools") and digest[2] < "8":
                item = {"type": "function_call", "call_id": "c", "name": body["tools"][0]["name"], "arguments": "{}"}
            answer |= {"created_at": 1, "output": [{"id": digest, "status": "completed", **item}]}
            answer |= {"parallel_tool_calls": False, "tool_choice": "auto", "tools": []}
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
        variables = {"OPENAI_BASE_URL": base, "OPENAI_API_KEY": "K"}
        sessions = [
            SimpleNamespace(id=f"s{n}", base_url=base, api_key="K", variables=variables)
            for n in range(len(environment.tasks))
        ]
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


def gym_eval(config: str, words: list[str], base: str) -> list[float]:
    """``gym env start`` with the recorded completions as the policy, and ``gym eval run``."""
    gym, tasks = Path(sys.executable).parent / "gym", settings_of(words)["tasks"]
    model = "responses_api_models/openai_model/configs/openai_model.yaml"
    policy = [f"++policy_base_url={base}", "++policy_api_key=k", "++policy_model_name=policy"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        head = ["++head_server.host=127.0.0.1", f"++head_server.port={free.getsockname()[1]}"]
    own = [f"++{word}" for word in words if word != f"tasks={tasks}"]
    started = [gym, "env", "start", "--config", config, "--config", model, *policy, *head, *own]
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "rollouts.jsonl"
        run = [gym, "eval", "run", "--no-serve", "--agent", "words_agent", "--input", tasks, "--output", output, *head]
        with subprocess.Popen(started, stdout=subprocess.PIPE, text=True) as server:
            try:
                for line in server.stdout:
                    if "servers ready!" in line:
                        break
                threading.Thread(target=server.stdout.read, daemon=True).start()
                subprocess.run(run, check=True, stdout=sys.stderr)
            finally:
                server.send_signal(signal.SIGINT)
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    return [row["reward"] for row in sorted(rows, key=lambda row: row["_ng_task_index"])]


def harbor_run(path: str, words: list[str], base: str) -> list[float]:
    """``harbor run`` of a job; the reward is the sum with the weights of the settings."""
    settings = settings_of(words)
    weights = settings.pop("rewards")
    agent = settings.pop("agent") | {"model_name": "openai/policy"}
    agent["env"] = {"OPENAI_BASE_URL": base, "OPENAI_API_KEY": "recorded-key"}  # Harbor blackens it in its files
    with tempfile.TemporaryDirectory() as directory:
        job = {"jobs_dir": directory, "job_name": "job", "datasets": [{"path": path}], "agents": [agent], **settings}
        file = Path(directory) / "job.json"
        file.write_text(json.dumps(job))
        command = [Path(sys.executable).parent / "harbor", "run", "-c", file, "-y"]
        subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "HARBOR_TELEMETRY": "0"})
        found = [json.loads(result.read_text()) for result in Path(directory).glob("job/*/result.json")]
    trials = sorted(found, key=lambda trial: trial["task_name"])
    rewards = [trial["verifier_result"]["rewards"] for trial in trials]
    return [sum(reward[name] * weight for name, weight in weights.items()) for reward in rewards]


NATIVE = {"verifiers": vf_eval, "openenv": lambda url, _, base: stepped(url, base), "nemo-gym": gym_eval}
NATIVE |= {"harbor": harbor_run}

if __name__ == "__main__":
    named, words = sys.argv[1], sys.argv[2:]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Recorded)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}/v1"
    prefix, _, target = named.partition(":")
    native = NATIVE[prefix](target, words, base)
    sys.stdout.write(json.dumps({"adapter": asyncio.run(adapted(named, words, base)), "native": native}) + "\n")
