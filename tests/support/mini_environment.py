"""A small environment in threads of this process, over real HTTP: asks the gateway, posts to the trajectory API.

It keeps what the gateway told it about each sequence, which is the oracle for what the trainer finds out by itself.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any, Self

import httpx

from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.messages import EnvRegistration
from atropos_verl.protocol.wire import encode_group


class MiniEnvironment:
    """Works until it is left (``with``). Waits for a trainer to register first.

    Args:
        latency: seconds between a group's generation and its being posted.
        ahead: groups that may wait at the API.
        edit: what it does to a completion's ids before it posts them; None: nothing.
        logprobs: whether it sends those that it was sent.
    """

    def __init__(
        self,
        api_url: str,
        gateway_url: str,
        *,
        group_size: int = 4,
        latency: float = 0.0,
        ahead: int = 4,
        edit: Callable[[list[int]], list[int]] | None = None,
        logprobs: bool = False,
    ) -> None:
        self._api_url, self._gateway_url = api_url, gateway_url
        self._group_size, self._latency, self._ahead = group_size, latency, ahead
        self._edit, self._logprobs = edit, logprobs
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(n,), daemon=True) for n in range(2)]
        self._lock = threading.Lock()
        self.versions: dict[tuple[int, ...], tuple[int, int]] = {}
        """Sequence as posted → versions of its first and last generated token, as the gateway's answer says."""
        self.failures: list[BaseException] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=30.0)

    def _work(self, number: int) -> None:
        try:
            with AtroposClient(self._api_url, timeout=30.0) as api, httpx.Client(timeout=60.0) as gateway:
                wish = EnvRegistration(
                    max_token_length=64, desired_name=f"mini{number}", weight=1.0, group_size=self._group_size
                )
                while (env_id := api.register_env(wish)) is None and not self._stop.wait(0.05):
                    pass
                rng = random.Random(number)
                while not self._stop.is_set():
                    if api.status().queue_size >= self._ahead:
                        self._stop.wait(0.005)
                        continue
                    group = self._group(gateway, rng)
                    self._stop.wait(self._latency)
                    api.post_scored_data_list([encode_group(**group, env_id=env_id)])
        except BaseException as error:  # noqa: BLE001 - a thread's end: the test looks at it
            if not self._stop.is_set():
                self.failures.append(error)

    def _group(self, gateway: httpx.Client, rng: random.Random) -> dict[str, Any]:
        prompt = [rng.randrange(1, 250) for _ in range(4)]
        body = {"prompt": {"prompt_token_ids": prompt}, "n": self._group_size, "max_tokens": 6}
        answer = gateway.post(f"{self._gateway_url}/generate", json={**body, "logprobs": 0, "ignore_eos": True})
        assert answer.status_code == 200, answer.text
        told = answer.json()
        completions = [list(ids) if self._edit is None else self._edit(list(ids)) for ids in told["token_ids"]]
        tokens = [[*prompt, *completion] for completion in completions]
        with self._lock:
            for row, (first, last) in zip(tokens, told["policy_versions"], strict=True):
                self.versions[tuple(row)] = (first, last)
        group: dict[str, Any] = {
            "tokens": tokens,
            "masks": [[-100] * 4 + completion for completion in completions],
            "scores": [float(i % 2) for i in range(self._group_size)],
        }
        if self._logprobs:
            values = [[next(iter(p[0].values())) for p in row] for row in told["logprobs"]]
            group["inference_logprobs"] = [[1.0] * 4 + row for row in values]
        return group
