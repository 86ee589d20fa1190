"""An honest client of the trajectory API beside one that floods it: how long the honest one waits.

Each kind of flood comes from two processes that send as fast as they are answered, for ``--seconds`` each. The honest
client asks ``/status-env`` and posts a small group every 20 ms. Bar: its p99 is at most 100 ms. Run it on an idle
machine with at least two cores:

    python benchmarks/bench_flood.py            # --seconds 15
"""

import argparse
import gzip
import http.client
import json
import multiprocessing
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

_BAR = 0.1
_LARGE = {"tokens": [list(range(100_000, 104_096))] * 128, "masks": [list(range(100_000, 104_096))] * 128}
_SMALL = {"tokens": [[1, 2, 3]] * 4, "masks": [[1, 2, 3]] * 4, "scores": [0.0, 1.0, 2.0, 3.0], "env_id": 0}
_REGISTRATION = {
    "wandb_group": "bench",
    "wandb_project": "bench",
    "batch_size": 64,
    "max_token_len": 4097,
    "checkpoint_dir": "",
    "save_checkpoint_interval": 1,
    "starting_step": 0,
    "num_steps": 1,
}
_HELLO = {"max_token_length": 4096, "desired_name": "bench", "weight": 1.0, "group_size": 4}


def floods() -> dict[str, tuple[str, str, bytes, dict[str, str]]]:
    """Name → method, path, body and headers of its requests."""
    logprobs = [[-0.123456789012345] * 4096] * 128
    large = {**_LARGE, "scores": [1.0] * 128, "inference_logprobs": logprobs}
    kinds: dict[str, tuple[str, str, Any, dict[str, str]]] = {
        "nothing": ("GET", "/health", b"", {}),
        "27 MB with an unknown field": ("POST", "/scored_data", {**large, "seed": 1}, {}),
        "27 MB with a wrong type": ("POST", "/scored_data", {**large, "scores": [True, "a"] + [1.0] * 126}, {}),
        "1 MB with a wrong type": ("POST", "/scored_data", {"scores": ["a"], "x": [1] * 300_000}, {}),
        "60 KB with a wrong type": ("POST", "/scored_data", {"scores": ["a"], "x": [1] * 20_000}, {}),
        "4 MB of gzip members": ("POST", "/scored_data", gzip.compress(b"") * 200_000, {"Content-Encoding": "gzip"}),
        "a gzip bomb": ("POST", "/scored_data", gzip.compress(b" " * 300_000_000, 1), {"Content-Encoding": "gzip"}),
        "a deep body": ("POST", "/register", b"[" * 1_000_000, {}),
        "many small groups": ("POST", "/scored_data", {**_SMALL, "env_id": None}, {}),
    }
    return {
        name: (method, path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)
        for name, (method, path, body, headers) in kinds.items()
    }


def ask(port: int, method: str, path: str, body: bytes, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120.0)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def flood(port: int, kind: str, seconds: float) -> None:
    request, end = floods()[kind], time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            ask(port, *request)
        except (OSError, http.client.HTTPException):
            time.sleep(0.01)


def waits(port: int, seconds: float) -> list[float]:
    """Seconds that each honest request took."""
    found, end, number = [], time.monotonic() + seconds, 0
    while time.monotonic() < end:
        number += 1
        small = json.dumps({**_SMALL, "scores": [number, 1, 2, 3]}).encode()
        for method, path, body in (("GET", "/status-env", b'{"env_id": 0}'), ("POST", "/scored_data", small)):
            begin = time.monotonic()
            status = ask(port, method, path, body, {})
            found.append(time.monotonic() - begin)
            assert status in (200, 429), status
        time.sleep(0.02)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0)
    seconds = parser.parse_args().seconds
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "atropos_verl.cli", "serve-api", "--port", str(port), "--max-queue-groups", "2000"]
    worst = 0.0
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            while server.poll() is None:
                try:
                    ask(port, "GET", "/health", b"", {})
                    break
                except OSError:
                    time.sleep(0.1)
            print(f"{'flood':<30}{'requests':>9}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}")
            for kind in floods():
                ask(port, "GET", "/reset_data", b"", {})
                ask(port, "POST", "/register", json.dumps(_REGISTRATION).encode(), {})
                ask(port, "GET", "/batch", b"", {})
                ask(port, "POST", "/register-env", json.dumps(_HELLO).encode(), {})
                context = multiprocessing.get_context("spawn")
                flooders = [context.Process(target=flood, args=(port, kind, seconds + 3.0)) for _ in range(2)]
                for process in flooders:
                    process.start()
                time.sleep(3.0)
                found = sorted(waits(port, seconds))
                p99 = found[int(0.99 * (len(found) - 1))]
                worst = max(worst, p99)
                figures = (1e3 * statistics.median(found), 1e3 * p99, 1e3 * found[-1])
                print(f"{kind:<30}{len(found):>9}" + "".join(f"{figure:>9.1f}" for figure in figures), flush=True)
                for process in flooders:
                    process.join()
        finally:
            server.terminate()
    print(f"worst p99 {1e3 * worst:.0f} ms, bar {1e3 * _BAR:.0f} ms")
    return int(worst > _BAR)


if __name__ == "__main__":
    raise SystemExit(main())
