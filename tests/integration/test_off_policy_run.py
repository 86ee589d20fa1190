"""Whole training runs against what the environment was told: staleness by an oracle, drift at lr = 0, bounds, edits."""

import logging
import math
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import pytest
from support.runs import metrics_of
from support.serving import eventually
from support.trajectory_server import TrajectoryServer, free_port

from atropos_verl import AtroposTrainer
from atropos_verl.engine.runner import ModelRunner
from atropos_verl.engine.weights import WeightStore
from atropos_verl.errors import EngineStoppedError, WeightSyncError
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.messages import EnvRegistration
from atropos_verl.protocol.wire import encode_group
from atropos_verl.types import StepReport

GROUPS, GROUP_SIZE = 2, 4
STEPS = int(os.environ.get("ATROPOS_VERL_DRIFT_STEPS", "16"))
DEATHS = int(os.environ.get("ATROPOS_VERL_ENGINE_DEATHS", "3"))
"""50 take about a minute for each mode."""


@dataclass
class MiniEnvironment:
    """An environment in two threads of this process, over real HTTP. What the gateway tells it about each sequence is
    the oracle for what the trainer finds out by itself."""

    api_url: str
    gateway_url: str
    latency: float = 0.0
    """Seconds between a group's generation and its being posted."""
    ahead: int = 4
    """Groups that may wait at the API."""
    edit: Callable[[list[int]], list[int]] = list
    """What it does to a completion's ids before it posts them."""
    logprobs: bool = False
    """Whether it sends those that it was sent."""

    def __post_init__(self) -> None:
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
            with AtroposClient(self.api_url, timeout=30.0) as api, httpx.Client(timeout=60.0) as gateway:
                wish = EnvRegistration(
                    max_token_length=64, desired_name=f"mini{number}", weight=1.0, group_size=GROUP_SIZE
                )
                while (env_id := api.register_env(wish)) is None and not self._stop.wait(0.05):
                    pass
                rng = random.Random(number)
                while not self._stop.is_set():
                    if api.status().queue_size >= self.ahead:
                        self._stop.wait(0.005)
                        continue
                    group = self._group(gateway, rng)
                    self._stop.wait(self.latency)
                    api.post_scored_data_list([encode_group(**group, env_id=env_id)])
        except BaseException as error:  # noqa: BLE001 - a thread's end: the test looks at it
            if not self._stop.is_set():
                self.failures.append(error)

    def _group(self, gateway: httpx.Client, rng: random.Random) -> dict[str, Any]:
        prompt = [rng.randrange(1, 250) for _ in range(4)]
        body = {"prompt": {"prompt_token_ids": prompt}, "n": GROUP_SIZE, "max_tokens": 6}
        answer = gateway.post(f"{self.gateway_url}/generate", json={**body, "logprobs": 0, "ignore_eos": True})
        assert answer.status_code == 200, answer.text
        told = answer.json()
        completions = [self.edit(ids) for ids in told["token_ids"]]
        tokens = [[*prompt, *completion] for completion in completions]
        with self._lock:
            for row, (first, last) in zip(tokens, told["policy_versions"], strict=True):
                self.versions[tuple(row)] = (first, last)
        group: dict[str, Any] = {
            "tokens": tokens,
            "masks": [[-100] * 4 + completion for completion in completions],
            "scores": [float(i % 2) for i in range(GROUP_SIZE)],
        }
        if self.logprobs:
            values = [[next(iter(p[0].values())) for p in row] for row in told["logprobs"]]
            group["inference_logprobs"] = [[1.0] * 4 + row for row in values]
        return group


@contextmanager
def running(
    model_path: Path, tmp_path: Path, *, steps: int, environment: dict[str, Any] | None = None, **settings: Any
) -> Iterator[tuple[AtroposTrainer, MiniEnvironment]]:
    """A trainer of the real parts, and an environment that works as soon as the trainer has registered."""
    with ExitStack() as stack:
        given = settings.pop("atropos", {})
        if "api_url" not in given:
            given["api_url"] = stack.enter_context(TrajectoryServer()).url
        values: dict[str, Any] = {
            "model": {"path": str(model_path)},
            "run_dir": str(tmp_path / "run"),
            "steps": steps,
            "batch_size": GROUPS * GROUP_SIZE,
            "group_size": GROUP_SIZE,
            "save_freq": -1,
            "optim": {"lr": 1e-3},
            "data": {"max_token_len": 32},
            "max_response_length": 8,
            "inference": {"num_threads": 1},
            "atropos": {"timeout": 20, "rollout_timeout": 60, **given},
            **settings,
        }
        with (
            AtroposTrainer.from_config(values) as trainer,
            MiniEnvironment(given["api_url"], trainer.gateway_url, **(environment or {})) as env,
        ):
            yield trainer, env


def fit(trainer: AtroposTrainer, env: MiniEnvironment) -> list[dict[str, Any]]:
    """Train to the end; for each step the staleness of its groups as the environment was told, beside its metrics."""
    told: list[list[int]] = []
    train_on = trainer.train_on

    def watched(data: Any, started: float | None = None) -> StepReport:
        version = trainer.policy_version
        oldest = [min(env.versions[tuple(ids.tolist())][0] for ids in group.token_ids) for group in data.groups]
        told.append([version - first for first in oldest])
        return train_on(data, started)

    trainer.train_on = watched  # type: ignore[method-assign]
    trainer.fit()
    assert not env.failures
    lines = metrics_of(trainer.run_dir)[-len(told) :]
    assert lines[-1]["step"] == trainer.step and len(lines) == len(told)
    return [{**line, "told": ages} for line, ages in zip(lines, told, strict=True)]


def test_drift_of_an_overlapped_run_at_learning_rate_zero(model_path: Path, tmp_path: Path) -> None:
    """Weights never change: a ratio that is not 1 is a token with another's logprob. Ages are as the gateway said."""
    settings = {"mode": "overlap", "optim": {"lr": 0.0}}
    with running(model_path, tmp_path, steps=STEPS, environment={"ahead": 6}, **settings) as (t, env):
        lines = fit(t, env)
    assert [line["policy_version"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line["data/unmatched_span_rate"] == 0.0
        assert line["off_policy/known_logprob_share"] == 1.0
        assert line["off_policy/log_ratio_max_abs"] < 2e-5  # float32 noise of two implementations
        assert line["off_policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
        assert line["off_policy/effective_sample_size"] == pytest.approx(1.0, abs=1e-5)
        assert line["off_policy/staleness_mean"] == pytest.approx(np.mean(line["told"]))
        assert line["off_policy/staleness_max"] == max(line["told"])
        counts = {age: line["told"].count(age) for age in set(line["told"])}
        assert counts == {age: line[f"off_policy/groups_at_staleness/{age}"] for age in counts}
    ages = [age for line in lines for age in line["told"]]
    assert min(ages) >= 0 and max(ages) >= 1 and len(set(ages)) > 1  # it was overlapped indeed


def test_an_environment_that_edits_is_reported_and_trained_without_versions(
    model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environment = {"edit": lambda ids: [*ids[:2], (ids[2] + 1) % 250, *ids[3:]]}
    with (
        caplog.at_level(logging.WARNING, logger="atropos_verl.training.staleness"),
        running(model_path, tmp_path, steps=2, environment=environment) as (trainer, env),
    ):
        lines = fit(trainer, env)
    for line in lines:
        assert line["data/unmatched_span_rate"] == 1.0
        assert line["off_policy/staleness_mean"] is None
        assert line["off_policy/groups_of_unknown_version"] == GROUPS
        assert "off_policy/ratio_mean" not in line or math.isnan(line["off_policy/ratio_mean"])
    messages = [r.getMessage() for r in caplog.records if r.name == "atropos_verl.training.staleness"]
    assert 1 <= len(messages) <= 2  # one per environment (two threads register one each), and no more
    assert "the policy wrote" in messages[0]


class Deaths:
    """``DEATHS`` in all: every seventh forward of the engine, and every weight update half-way, at first.

    Every third one in a forward has damaged the weights: a new model needs those of the trainer.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forwards = self.updates = 0
        self.in_updates = DEATHS // 3
        self.in_steps = DEATHS - self.in_updates
        self._forward, self._target = ModelRunner._forward, WeightStore._target
        monkeypatch.setattr(ModelRunner, "_forward", lambda *arguments: self._step(*arguments))
        monkeypatch.setattr(WeightStore, "_target", lambda *arguments: self._tensor(*arguments))

    def _step(self, *arguments: Any) -> Any:
        self.forwards += 1
        if self.forwards % 7 == 0 and self.forwards <= 7 * self.in_steps:
            kind = self.forwards // 7 % 3
            if kind == 1:
                arguments[0].model.lm_head.weight.data[:, 0] += 1.0
            raise (MemoryError("no room"), RuntimeError("a kernel failed"), SystemExit(1))[kind]
        return self._forward(*arguments)

    def _tensor(self, store: Any, name: str, *arguments: Any) -> Any:
        if name == "model.layers.0.mlp.gate_proj.weight":
            self.updates += 1
            if self.updates % 2 and self.updates < 2 * self.in_updates:  # the second time it succeeds
                raise MemoryError("no room for the new weights")
        return self._target(store, name, *arguments)


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("sync", {"optim": {"lr": 1e-3}, "off_policy": {"max_staleness": 0}}),
        ("overlap", {"optim": {"lr": 0.0}}),
    ],
)
def test_deaths_of_the_engine_cost_no_request_and_no_step(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, settings: dict[str, Any]
) -> None:
    """A trained token's logprob is that of the trainer's own forward: of the newest weights, or of weights that never
    change."""
    with running(model_path, tmp_path, steps=max(4, DEATHS // 2), mode=mode, **settings) as (trainer, env):
        deaths = Deaths(monkeypatch)
        lines = fit(trainer, env)
        assert deaths.forwards >= 7 * deaths.in_steps and deaths.updates >= 2 * deaths.in_updates
        stats = trainer.engine.stats()
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "every step has its line"
    assert lines[-1]["engine/rebuilds"] == stats.rebuilds > 0
    for line in lines:
        assert line["data/unmatched_span_rate"] == line["data/ambiguous_span_rate"] == 0.0
        assert line["off_policy/known_logprob_share"] == 1.0
        assert line["off_policy/log_ratio_max_abs"] < 2e-5
        assert line["sync/canary_max_abs_logprob_diff"] < 1e-4


def test_an_engine_that_dies_at_every_step_ends_the_run_with_the_reason(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(ModelRunner, "decode", die)
    with running(model_path, tmp_path, steps=2, mode="overlap") as (trainer, env):
        with pytest.raises(EngineStoppedError, match="gave up after 10 failed steps: RuntimeError: device lost"):
            trainer.fit()
        eventually(lambda: bool(env.failures), "the environment to be told")
    assert "503" in str(env.failures[0]) or "has stopped" in str(env.failures[0])


@pytest.mark.parametrize(("on_stale", "bound"), [("drop", 0), ("wait", 1)])
def test_a_bound_holds_and_the_run_makes_progress(model_path: Path, tmp_path: Path, on_stale: str, bound: int) -> None:
    """Old groups are dropped; a batch of nothing else is no step. Waiting holds prompts back."""
    settings = {"mode": "overlap", "off_policy": {"max_staleness": bound, "on_stale": on_stale}}
    environment = {"ahead": 8, "latency": 0.02 if on_stale == "wait" else 0.0}
    with running(model_path, tmp_path, steps=12, environment=environment, **settings) as (trainer, env):
        lines = fit(trainer, env)
        given_up, throttle = trainer.totals.batches_stale, trainer.throttle
    assert [line["policy_version"] for line in lines] == list(range(1, 13))
    for line in lines:
        assert line["off_policy/staleness_max"] <= bound
        assert line["off_policy/dropped_stale_groups"] == sum(age > bound for age in line["told"])
        assert line["data/groups"] == sum(age <= bound for age in line["told"]) >= 1
    dropped = sum(line["off_policy/dropped_stale_groups"] for line in lines) + GROUPS * given_up
    if on_stale == "wait":
        assert throttle is not None and throttle.held > 0
    else:
        assert dropped > 0


def test_a_restarted_run_knows_who_wrote_what_was_queued(model_path: Path, tmp_path: Path) -> None:
    """The trainer dies at step 5 with a checkpoint of step 3, while groups of its versions wait in the queue."""
    with TrajectoryServer() as api:
        settings = {
            "mode": "overlap",
            "save_freq": 3,
            "optim": {"lr": 1e-2},
            "gateway": {"port": free_port()},
            "atropos": {"api_url": api.url},
        }
        environment = {"logprobs": True, "ahead": 8}

        def die(report: StepReport) -> None:
            if report.step == 5:
                eventually(lambda: trainer.client.status().queue_size >= 6, "groups to wait")
                raise WeightSyncError("as after kill -9: nothing is saved")

        with running(model_path, tmp_path, steps=12, environment=environment, **settings) as (trainer, env):
            trainer.resume_from_checkpoint()
            with pytest.raises(WeightSyncError):
                trainer.fit(on_step=die)
        dead = dict(env.versions)  # now that the environment is done: its last group came after the trainer's end
        with running(model_path, tmp_path, steps=12, environment=environment, **settings) as (trainer, env):
            trainer.resume_from_checkpoint()
            assert trainer.step == 3
            env.versions.update({row: (min(first, 3), min(last, 3)) for row, (first, last) in dead.items()})
            lines = fit(trainer, env)
    assert [line["step"] for line in lines] == list(range(4, 13))
    for line in lines:
        assert line["data/unmatched_span_rate"] == line["data/ambiguous_span_rate"] == 0.0
        assert line["data/logprob_mismatch"] == 0.0 and line["data/logprob_mismatch_max"] < 1e-5
        assert line["off_policy/known_logprob_share"] == 1.0
        assert line["off_policy/staleness_mean"] == pytest.approx(np.mean(line["told"]))
        assert min(line["told"]) >= 0
    assert any(first > 3 for first, _ in dead.values())
    stale = [line for line in lines if line["off_policy/staleness_max"] > 0]
    assert stale and all(line["off_policy/log_ratio_max_abs"] > 1e-3 for line in stale), "weights change: drift is seen"
    assert all(line["off_policy/kl_k3"] > 0 for line in stale)
