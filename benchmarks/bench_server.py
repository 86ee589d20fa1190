"""Our trajectory API beside atroposlib's, both as processes, measured in turns by the same client.

Work: 256 sequences of 4096 tokens in 64 groups of 4 (token ids, masks, logprobs as an inference engine gives them):
about 35 MB of JSON. Run it on an idle machine:

    python benchmarks/bench_server.py            # --rounds 3 --tokens 4096 --sequences 256

Figures are medians; throughput is in tokens per second. ``ratio`` is ours over upstream's.
"""

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from atropos_verl.protocol.wire import MEDIA_TYPE, decode_batch

GROUP_SIZE = 4
READY_TIMEOUT = 90.0
REQUEST_TIMEOUT = 300.0
PAGE = os.sysconf("SC_PAGE_SIZE")


class Api:
    """A server process and the calls that are timed."""

    def __init__(self, name: str, port: int, process: subprocess.Popen[bytes]) -> None:
        self.name, self.port, self.process = name, port, process

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_TIMEOUT)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {"Content-Type": "application/json", **named})
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{self.name}: {method} {path}: HTTP {answer.status}: {content[:300]!r}")
            return content
        finally:
            connection.close()

    def register(self, batch_size: int, max_token_len: int) -> None:
        self.call("GET", "/reset_data")
        fields = {
            "wandb_group": "bench",
            "wandb_project": "bench",
            "batch_size": batch_size,
            "max_token_len": max_token_len + 1,
            "checkpoint_dir": "/tmp",
            "save_checkpoint_interval": 0,
            "starting_step": 0,
            "num_steps": 10**6,
        }
        self.call("POST", "/register", json.dumps(fields).encode())

    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * PAGE


@contextmanager
def running(name: str, command: list[str]) -> Iterator[Api]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    api = Api(name, port, process)
    try:
        deadline = time.monotonic() + READY_TIMEOUT
        while True:
            try:
                api.call("GET", "/status")
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise RuntimeError(f"{name} did not start within {READY_TIMEOUT} s") from None
                time.sleep(0.05)
        yield api
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=15)


def make_groups(sequences: int, tokens: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    groups = []
    prompt = tokens // 8
    for _ in range(sequences // GROUP_SIZE):
        ids = rng.integers(0, 150_000, (GROUP_SIZE, tokens))
        masks = ids.copy()
        masks[:, :prompt] = -100
        logprobs = -rng.exponential(0.5, (GROUP_SIZE, tokens)).astype(np.float32).astype(np.float64)
        logprobs[:, :prompt] = 1.0
        fields = {
            "tokens": ids.tolist(),
            "masks": masks.tolist(),
            "scores": rng.random(GROUP_SIZE).tolist(),
            "inference_logprobs": logprobs.tolist(),
            "overrides": None,
            "group_overrides": None,
        }
        groups.append(json.dumps(fields).encode())
    return groups


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def as_upstreams_trainers_do(body: bytes) -> list[Any]:
    """``json.loads`` and one array per sequence: what a trainer written for upstream's server does."""
    return [
        [np.array(row) for name in ("tokens", "masks", "inference_logprobs") for row in group[name]]
        for group in json.loads(body)["batch"]
    ]


# --- what is measured ------------------------------------------------------------------------------------------------


def post_and_fetch(apis: dict[str, Api], groups: list[bytes], rounds: int, tokens: int) -> dict[str, Any]:
    """Per server, median seconds of: posting all groups, ``GET /batch`` to the last byte, and decoding to arrays.

    Groups are posted to all servers in turn, one at a time, so that whatever else the machine does hits all alike.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in apis}

    def note(name: str, what: str, value: float) -> None:
        found[name].setdefault(what, []).append(value)

    for _ in range(rounds):
        for wire in ("identity", "gzip", "packed"):
            asked = {name: api for name, api in apis.items() if wire != "packed" or name != "upstream"}
            headers = {"Accept": MEDIA_TYPE} if wire == "packed" else {"Accept_Encoding": wire}
            for api in asked.values():
                api.register(len(groups) * GROUP_SIZE, tokens)
                api.call("GET", "/batch", **headers)  # the trainer's first poll tells what it takes
            spent: dict[str, list[float]] = {name: [] for name in asked}
            for group in groups:
                for name, api in asked.items():
                    spent[name].append(seconds(partial(api.call, "POST", "/scored_data", group)))
            for name, api in asked.items():
                # The median POST, so that what interrupts a few of them does not decide.
                each = statistics.median(spent[name]) * len(groups)
                note(name, "post_packed" if wire == "packed" else "post_json", each)
                started = time.perf_counter()
                body = api.call("GET", "/batch", **headers)
                note(name, f"get_{wire}", time.perf_counter() - started)
                if wire != "gzip":
                    decode = as_upstreams_trainers_do if name == "upstream" else decode_batch
                    note(name, f"decode_{wire}", seconds(partial(decode, body)))
    return {name: {what: statistics.median(values) for what, values in own.items()} for name, own in found.items()}


def post_all(api: Api, groups: list[bytes]) -> None:
    for group in groups:
        api.call("POST", "/scored_data", group)


def flatness(api: Api, queue_sizes: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Milliseconds of ``/status-env``, and of draining one batch, with so many groups queued."""
    small = {"tokens": [[1, 2]] * GROUP_SIZE, "masks": [[1, 2]] * GROUP_SIZE, "scores": [0.0] * GROUP_SIZE}
    result = {}
    for size in queue_sizes:
        api.register(32, 64)
        api.call("GET", "/batch")
        hello = {"max_token_length": 64, "desired_name": "b", "weight": 1.0, "group_size": GROUP_SIZE}
        api.call("POST", "/register-env", json.dumps(hello).encode())
        many = b"[" + b",".join([json.dumps(small).encode()] * 1000) + b"]"
        for _ in range(size // 1000):
            api.call("POST", "/scored_data_list", many)
        for _ in range(size % 1000):
            api.call("POST", "/scored_data", json.dumps(small).encode())
        ask = json.dumps({"env_id": 0}).encode()
        status = statistics.median(seconds(partial(api.call, "GET", "/status-env", ask)) for _ in range(20))
        drain = [seconds(partial(api.call, "GET", "/batch")) for _ in range(10)]
        result[str(size)] = {
            "status_env_ms": round(status * 1e3, 2),
            "first_batch_ms": round(drain[0] * 1e3, 2),
            "next_batches_ms": round(statistics.median(drain[1:]) * 1e3, 2),
        }
    return result


def memory_per_byte(name: str, command: list[str], groups: list[bytes], times: int, packed: bool) -> float:
    """Growth of a fresh server's resident memory over the bytes received (JSON, not compressed)."""
    with running(name, command) as api:
        api.register(len(groups) * GROUP_SIZE * times * 2, 4096)
        api.call("GET", "/batch", Accept=MEDIA_TYPE if packed else "application/json")
        post_all(api, groups[:4])
        before = api.memory()
        for _ in range(times):
            post_all(api, groups)
        return round((api.memory() - before) / (times * sum(map(len, groups))), 2)


def report(figures: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Throughputs in tokens per second, and ratios over upstream."""

    def rate(name: str, *parts: str) -> float:
        return tokens / sum(figures[name][part] for part in parts)

    upstream_decoded = rate("upstream", "get_identity", "decode_identity")
    rows: dict[str, tuple[float, float]] = {
        "GET /batch, identity": (rate("ours", "get_identity"), rate("upstream", "get_identity")),
        "GET /batch, gzip asked for": (rate("ours", "get_gzip"), rate("upstream", "get_gzip")),
        "GET /batch, gzip sent": (rate("ours_gzip", "get_gzip"), rate("upstream", "get_gzip")),
        "to arrays, JSON": (rate("ours", "get_identity", "decode_identity"), upstream_decoded),
        "to arrays, packed": (rate("ours", "get_packed", "decode_packed"), upstream_decoded),
        "POST, memory": (rate("ours", "post_json"), rate("upstream", "post_json")),
        "POST, memory, packed kept": (rate("ours", "post_packed"), rate("upstream", "post_json")),
        "POST, durable": (rate("ours_durable", "post_json"), rate("upstream", "post_json")),
        "POST, durable with fsync": (rate("ours_fsync", "post_json"), rate("upstream", "post_json")),
    }
    return {
        what: {"ours": round(ours), "upstream": round(theirs), "ratio": round(ours / theirs, 1)}
        for what, (ours, theirs) in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--queue-sizes", type=int, nargs="*", default=[100, 10_000, 100_000])
    parser.add_argument("--upstream-queue-sizes", type=int, nargs="*", default=[100, 10_000])
    options = parser.parse_args()
    groups = make_groups(options.sequences, options.tokens)
    total = options.sequences * options.tokens
    ours = [sys.executable, "-m", "atropos_verl.cli", "serve-api"]
    upstream = [sys.executable, "-m", "atroposlib.cli.run_api"]
    with ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        start = lambda name, command: stack.enter_context(running(name, command))  # noqa: E731
        apis = {
            "upstream": start("upstream", upstream),
            "ours": start("ours", ours),
            "ours_durable": start("ours_durable", [*ours, "--data-dir", str(data / "a")]),
            "ours_fsync": start("ours_fsync", [*ours, "--data-dir", str(data / "b"), "--fsync"]),
            "ours_gzip": start("ours_gzip", [*ours, "--compression", "always"]),
        }
        figures = post_and_fetch(apis, groups, options.rounds, options.tokens)
        result = {
            "work": f"{options.sequences} sequences x {options.tokens} tokens, {sum(map(len, groups)) / 1e6:.1f} MB",
            "rounds": options.rounds,
            "tokens_per_second": report(figures, total),
            "seconds": {n: {w: round(v, 4) for w, v in own.items()} for n, own in figures.items()},
            "flat": {
                "ours": flatness(apis["ours"], tuple(options.queue_sizes)),
                "upstream": flatness(apis["upstream"], tuple(options.upstream_queue_sizes)),
            },
        }
    result["memory_over_received_bytes"] = {
        "ours, JSON": memory_per_byte("ours", ours, groups, 8, packed=False),
        "ours, packed kept": memory_per_byte("ours", ours, groups, 8, packed=True),
        "upstream": memory_per_byte("upstream", upstream, groups, 4, packed=False),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
