"""Whole training runs against what the environment was told: staleness by an oracle, drift, deaths, bounds."""

import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support.runs import metrics_of
from support.serving import eventually, post
from support.trajectory_server import TrajectoryServer

from atropos_verl import AtroposTrainer
from atropos_verl.engine.runner import ModelRunner
from atropos_verl.engine.weights import WeightStore
from atropos_verl.errors import EngineStoppedError, WeightSyncError
from atropos_verl.launch.probes import free_port
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.messages import EnvRegistration
from atropos_verl.protocol.wire import encode_group
from atropos_verl.types import StepReport

GROUPS, GROUP_SIZE = 2, 4
STEPS = int(os.environ.get("ATROPOS_VERL_DRIFT_STEPS", "16"))
DEATHS = int(os.environ.get("ATROPOS_VERL_ENGINE_DEATHS", "3"))
"""50 take about a minute for each mode."""


@dataclass
class Told:
    """What an environment learns while it works."""

    versions: dict[tuple[int, ...], tuple[int, int]] = field(default_factory=dict)
    """Sequence as posted → versions of its first and last generated token, as the gateway's answer says: the oracle for
    what the trainer finds out by itself."""
    failures: list[BaseException] = field(default_factory=list)


@contextmanager
def environment(api_url: str, gateway_url: str, ahead: int, latency: float) -> Iterator[Told]:
    """Two threads of this process, over real HTTP; they send the logprobs of every other sequence. ``ahead``: groups
    that may wait at the API; ``latency``: seconds between a group's generation and its being posted."""
    found, stop = Told(), threading.Event()

    def group(gateway: httpx.Client, rng: random.Random) -> dict[str, Any]:
        prompt = [rng.randrange(1, 250) for _ in range(4)]
        asked = {"prompt": {"prompt_token_ids": prompt}, "n": GROUP_SIZE, "max_tokens": 6, "ignore_eos": True}
        told = post(gateway, "/generate", logprobs=0, **asked)
        tokens = [[*prompt, *completion] for completion in told["token_ids"]]
        for row, (first, last) in zip(tokens, told["policy_versions"], strict=True):
            found.versions[tuple(row)] = (first, last)
        logprobs = [[next(iter(place[0].values())) for place in row] for row in told["logprobs"]]
        return {
            "tokens": tokens,
            "masks": [[-100] * 4 + completion for completion in told["token_ids"]],
            "scores": [float(i % 2) for i in range(GROUP_SIZE)],
            "inference_logprobs": [[1.0] * 4 + row if i % 2 else None for i, row in enumerate(logprobs)],
        }

    def work(number: int) -> None:
        rng, gateway = random.Random(number), httpx.Client(base_url=gateway_url, timeout=60.0)
        hello = EnvRegistration(max_token_length=64, desired_name=f"mini{number}", weight=1.0, group_size=GROUP_SIZE)
        try:
            with AtroposClient(api_url, timeout=30.0) as api, gateway:
                while (env_id := api.register_env(hello)) is None and not stop.wait(0.05):
                    pass
                while not stop.is_set():
                    if api.status().queue_size >= ahead:
                        stop.wait(0.005)
                        continue
                    made = group(gateway, rng)
                    stop.wait(latency)
                    api.post_scored_data_list([encode_group(**made, env_id=env_id)])
        except BaseException as error:  # noqa: BLE001 - a thread's end: the test looks at it
            if not stop.is_set():
                found.failures.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(2)]
    try:
        for thread in threads:
            thread.start()
        yield found
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=30.0)


@contextmanager
def running(
    model_path: Path, tmp_path: Path, *, ahead: int = 4, latency: float = 0.0, api_url: str = "", **settings: Any
) -> Iterator[tuple[AtroposTrainer, Told]]:
    """A trainer of the real parts, and an environment that works as soon as the trainer has registered."""
    with ExitStack() as stack:
        url = api_url or stack.enter_context(TrajectoryServer()).url
        values: dict[str, Any] = {
            "model": {"path": str(model_path)},
            "run_dir": str(tmp_path / "run"),
            "batch_size": GROUPS * GROUP_SIZE,
            "group_size": GROUP_SIZE,
            "save_freq": -1,
            "optim": {"lr": 1e-3},
            "data": {"max_token_len": 32},
            "max_response_length": 8,
            "inference": {"num_threads": 1},
            "atropos": {"api_url": url, "timeout": 20, "rollout_timeout": 60},
            **settings,
        }
        trainer = stack.enter_context(AtroposTrainer.from_config(values))
        yield trainer, stack.enter_context(environment(url, trainer.gateway_url, ahead, latency))


def fit(trainer: AtroposTrainer, env: Told) -> list[dict[str, Any]]:
    """Train to the end; for each step the staleness of its groups as the environment was told, beside its metrics."""
    told: list[list[int]] = []
    train_on = trainer.train_on

    def watched(data: Any, started: float | None = None) -> StepReport:
        oldest = [min(env.versions[tuple(ids.tolist())][0] for ids in group.token_ids) for group in data.groups]
        told.append([trainer.policy_version - first for first in oldest])
        return train_on(data, started)

    trainer.train_on = watched  # type: ignore[method-assign]
    trainer.fit()
    assert not env.failures
    lines = metrics_of(trainer.run_dir)[-len(told) :]
    assert [line["step"] for line in lines] == [*range(trainer.step - len(told) + 1, trainer.step + 1)]
    for line, ages in zip(lines, told, strict=True):
        line["told"] = ages
        assert min(ages) >= 0
        assert line["data/unmatched_span_rate"] == line["data/ambiguous_span_rate"] == 0.0
        assert line["off_policy/known_logprob_share"] == 1.0
    return lines


def deaths(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Kills the engine ``DEATHS`` times: at first in every seventh forward, and half-way in every weight update. Every
    third one in a forward has damaged the weights: a new model needs those of the trainer."""
    calls: Counter[str] = Counter()
    forward, target, in_updates = ModelRunner._forward, WeightStore._target, DEATHS // 3

    def step(runner: Any, *arguments: Any) -> Any:
        calls["forwards"] += 1
        number, rest = divmod(calls["forwards"], 7)
        if rest == 0 and number <= DEATHS - in_updates:
            if number % 3 == 1:
                runner.model.lm_head.weight.data[:, 0] += 1.0
            raise (MemoryError("no room"), RuntimeError("a kernel failed"), SystemExit(1))[number % 3]
        return forward(runner, *arguments)

    def tensor(store: Any, name: str, *arguments: Any) -> Any:
        if name == "model.layers.0.mlp.gate_proj.weight":
            calls["updates"] += 1
            if calls["updates"] % 2 and calls["updates"] < 2 * in_updates:  # the second time it succeeds
                raise MemoryError("no room for the new weights")
        return target(store, name, *arguments)

    monkeypatch.setattr(ModelRunner, "_forward", step)
    monkeypatch.setattr(WeightStore, "_target", tensor)
    return calls


@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        (max(4, DEATHS // 2), {"mode": "sync", "off_policy": {"max_staleness": 0}}),
        (max(STEPS, DEATHS // 2), {"mode": "overlap", "optim": {"lr": 0.0}, "ahead": 6}),
    ],
    ids=["sync", "overlap"],
)
def test_deaths_of_the_engine_cost_no_request_and_no_step_and_every_age_is_as_the_gateway_said(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, settings: dict[str, Any]
) -> None:
    """A trained token's logprob is that of the trainer's own forward: of the newest weights, or of weights that never
    change, where a ratio that is not 1 is a token with another's logprob."""
    with running(model_path, tmp_path, steps=steps, **settings) as (trainer, env):
        calls = deaths(monkeypatch)
        lines = fit(trainer, env)
        assert calls["forwards"] >= 7 * (DEATHS - DEATHS // 3) and calls["updates"] >= 2 * (DEATHS // 3)
        rebuilds = trainer.engine.stats().rebuilds
    assert lines[-1]["engine/rebuilds"] == rebuilds > 0
    assert [line["policy_version"] for line in lines] == list(range(1, steps + 1))
    for line in lines:
        assert line["off_policy/log_ratio_max_abs"] < 2e-5  # float32 noise of two implementations
        assert line["off_policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
        assert line["sync/canary_max_abs_logprob_diff"] < 1e-4
    if settings["mode"] == "sync":
        return
    for line in lines:
        assert line["off_policy/effective_sample_size"] == pytest.approx(1.0, abs=1e-5)
        assert line["off_policy/staleness_mean"] == pytest.approx(np.mean(line["told"]))
        assert line["off_policy/staleness_max"] == max(line["told"])
        counts = {age: line["told"].count(age) for age in set(line["told"])}
        assert counts == {age: line[f"off_policy/groups_at_staleness/{age}"] for age in counts}
    assert len({age for line in lines for age in line["told"]}) > 1  # it was overlapped indeed


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


@pytest.mark.parametrize(("on_stale", "bound", "latency"), [("drop", 0, 0.0), ("wait", 1, 0.02)])
def test_a_bound_holds_and_the_run_makes_progress(
    model_path: Path, tmp_path: Path, on_stale: str, bound: int, latency: float
) -> None:
    """Old groups are dropped; a batch of nothing else is no step. Waiting holds prompts back."""
    settings = {"steps": 12, "mode": "overlap", "off_policy": {"max_staleness": bound, "on_stale": on_stale}}
    with running(model_path, tmp_path, ahead=8, latency=latency, **settings) as (trainer, env):
        lines = fit(trainer, env)
        given_up, throttle = trainer.totals.batches_stale, trainer.throttle
    assert [line["policy_version"] for line in lines] == list(range(1, 13))
    for line in lines:
        assert line["off_policy/staleness_max"] <= bound
        assert line["off_policy/dropped_stale_groups"] == sum(age > bound for age in line["told"])
        assert line["data/groups"] == sum(age <= bound for age in line["told"]) >= 1
    if on_stale == "wait":
        assert throttle is not None and throttle.held > 0
    else:
        assert sum(line["off_policy/dropped_stale_groups"] for line in lines) + GROUPS * given_up > 0


def test_a_restarted_run_knows_who_wrote_what_was_queued(model_path: Path, tmp_path: Path) -> None:
    """The trainer dies at step 5 with a checkpoint of step 3, while groups of its versions wait in the queue."""

    def die(report: StepReport) -> None:
        if report.step == 5:
            eventually(lambda: trainer.client.status().queue_size >= 6, "groups to wait")
            raise WeightSyncError("as after kill -9: nothing is saved")

    settings = {"steps": 12, "mode": "overlap", "save_freq": 3, "optim": {"lr": 1e-2}, "gateway": {"port": free_port()}}
    with TrajectoryServer() as api:
        settings |= {"api_url": api.url, "ahead": 8}
        with running(model_path, tmp_path, **settings) as (trainer, env):
            trainer.resume_from_checkpoint()
            with pytest.raises(WeightSyncError):
                trainer.fit(on_step=die)
        dead = dict(env.versions)  # now that the environment is done: its last group came after the trainer's end
        with running(model_path, tmp_path, **settings) as (trainer, env):
            trainer.resume_from_checkpoint()
            assert trainer.step == 3
            env.versions.update({row: (min(first, 3), min(last, 3)) for row, (first, last) in dead.items()})
            lines = fit(trainer, env)
    assert [line["step"] for line in lines] == list(range(4, 13))
    for line in lines:
        assert line["data/logprob_mismatch"] == 0.0 and line["data/logprob_mismatch_max"] < 1e-5
        assert line["off_policy/staleness_mean"] == pytest.approx(np.mean(line["told"]))
    assert any(first > 3 for first, _ in dead.values())
    stale = [line for line in lines if line["off_policy/staleness_max"] > 0]
    assert stale and all(line["off_policy/log_ratio_max_abs"] > 1e-3 for line in stale), "weights change: drift is seen"
    assert all(line["off_policy/kl_k3"] > 0 for line in stale)
