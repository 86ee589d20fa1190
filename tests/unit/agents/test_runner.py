"""The runner against a gateway's sessions and the real trajectory API."""

import argparse
import asyncio
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.fake_engine import FakeEngine
from support.tiny_model import build_tiny_tokenizer
from support.trajectory_server import TrajectoryServer, group_bytes, registration

from atropos_verl.agents import runner as module
from atropos_verl.agents.client import AgentSession, Client, Reward, SessionError
from atropos_verl.agents.runner import AgentError, Notes, Runner, encode_rollouts
from atropos_verl.cli import main
from atropos_verl.errors import AtroposTimeoutError, ConfigError, EngineStoppedError
from atropos_verl.gateway.app import create_app
from atropos_verl.gateway.sessions import SessionStore
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.messages import EnvRegistration
from atropos_verl.protocol.wire import decode_batch, decode_group
from atropos_verl.types import ScoredGroup

Patch = pytest.MonkeyPatch
TOKENIZER = build_tiny_tokenizer()


class Gateway:
    """A gateway before the fake engine, and a client of it without a network. ``ended``: states of sessions by id."""

    def __init__(self, directory: Path) -> None:
        self.ended: dict[str, str] = {}
        count = itertools.count()  # the API stores equal groups once
        self.engine = FakeEngine(lambda request, index: TOKENIZER.encode(f"{next(count)}<|im_end|>"))
        self.store = SessionStore(directory, on_end=lambda name, state, _: self.ended.update({name: state}))
        app = create_app(self.engine, TOKENIZER, model_name="tiny", sessions=self.store)
        self.client = Client("http://gateway", patience=0.5)
        self.client._http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")

    def solving(self, comes: Callable[[str], Any] = lambda task: 1.0, turns: int = 1) -> Any:
        """An agent that takes so many turns, none of which continues another; then it returns or raises ``comes``."""

        async def solve(task: str, session: AgentSession) -> Any:
            result = comes(task)
            self.engine.fail_with = result if isinstance(result, EngineStoppedError) else None
            for turn in range(turns):
                body = {"messages": [{"role": "user", "content": str(turn)}]}
                (await self.client._http.post(f"{session.base_url}/chat/completions", json=body)).raise_for_status()
            if isinstance(result, Exception):
                raise result
            return result

        return solve

    async def told(self, field: str) -> list[Any]:
        """What was said of the sessions that ended."""
        return [(await self.client.ask("GET", f"/sessions/{name}"))[field] for name in self.ended]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path)
    yield gateway
    gateway.store.close()


@pytest.fixture
def server() -> Iterator[TrajectoryServer]:
    with TrajectoryServer() as api:
        yield api


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: Patch) -> None:
    monkeypatch.setattr(module, "_STATUS_SECONDS", 0.02)
    monkeypatch.setattr(module, "_LONGEST_PAUSE", 0.0)


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "agent.jsonl")


def runner_of(gateway: Gateway, solve: Any, *words: str) -> Runner:
    async def given(task: Any, session: AgentSession) -> None:
        await module.give(session, await solve(task, session))

    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    options = parser.parse_args(["run", "--tasks", "unused", "--group-size", "2", *words])
    return Runner(gateway.client, given, ("a", "b", "c"), options)


def registered(server: TrajectoryServer, batch_size: int = 4) -> AtroposClient:
    """A trainer has registered and asked for a batch."""
    httpx.post(f"{server.url}/register", json=registration(batch_size))
    httpx.get(f"{server.url}/batch")
    return AtroposClient(server.url)


async def until(runner: Runner, api: AtroposClient, notes: Notes, groups: int) -> list[ScoredGroup]:
    """Serves until so many groups, in all, are noted as posted and wait at the API; these are taken."""
    task = asyncio.create_task(runner.serve(api, notes))
    while not task.done():
        waiting = (await asyncio.to_thread(api.status)).queue_size
        if min(waiting, notes.begun - len(notes.unfinished)) >= groups:
            break
        await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    found = await asyncio.to_thread(api.poll_batch)
    assert found is not None
    return decode_batch(found.body)


async def test_groups_are_posted_with_their_rows(gateway: Gateway, server: TrajectoryServer, notes: Notes) -> None:
    shares = ("--env.inference_weight", "2", "--env.min_batch_allocation", "0.5")
    runner = runner_of(gateway, gateway.solving(lambda task: 2.0, 2), *shares)
    groups = await until(runner, registered(server), notes, 2)
    [seen] = (await asyncio.to_thread(httpx.get, f"{server.url}/page-data")).json()["environments"]
    assert (seen["weight"], seen["min_batch_allocation"]) == (2.0, 0.5)
    assert [group.rollouts.tolist() for group in groups] == [[0, 0, 1, 1]] * 2
    assert [group.rollout_scores.tolist() for group in groups] == [[2.0, 2.0]] * 2
    assert len(set(await gateway.told("group"))) == 2 and len(gateway.ended) == 4
    assert set(await gateway.told("task")) < {"0", "1", "2"}
    assert not notes.unfinished


async def test_its_least_share_is_made_beside_others(gateway: Gateway, server: TrajectoryServer, notes: Notes) -> None:
    api = registered(server)
    other = EnvRegistration(max_token_length=32, group_size=2, desired_name="other", min_batch_allocation=0.25)
    other_id = await asyncio.to_thread(api.register_env, other)
    await asyncio.to_thread(api.post_scored_data_list, [group_bytes(n, 2, other_id) for n in range(6)])
    groups = await until(runner_of(gateway, gateway.solving(), "--env.min_batch_allocation", "0.5"), api, notes, 1)
    assert sorted(group.env_id for group in groups) == [0, 1], "no batch is made without its share"


async def test_an_api_without_features_gets_advantages_and_no_post_twice(
    gateway: Gateway, server: TrajectoryServer, notes: Notes, monkeypatch: Patch, caplog: Any
) -> None:
    monkeypatch.setattr("atropos_verl.server.app.FEATURES", ())
    api, rewards = registered(server), itertools.count()
    post = api.post_scored_data_list

    def unanswered(groups: Any, key: str | None) -> None:
        post(groups, key)
        raise AtroposTimeoutError("no answer")

    monkeypatch.setattr(api, "post_scored_data_list", unanswered)
    with caplog.at_level(logging.WARNING, logger="atropos_verl"), pytest.raises(AtroposTimeoutError):
        solve = gateway.solving(lambda task: float(next(rewards)), 2)
        await runner_of(gateway, solve, "--batches-ahead", "0").serve(api, notes)
    assert (api.status().queue_size, notes.begun, notes.unfinished) == (1, 1, {})
    found = api.poll_batch()
    assert found is not None
    [group] = decode_batch(found.body)
    assert group.rollout_ids is None and group.advantages is not None
    rows = [values[0] for values in group.advantages if values is not None]
    assert rows[0] == rows[1] == pytest.approx(-rows[2]) == pytest.approx(-rows[3])
    assert sum("drops rollout_ids" in message for message in caplog.messages) == 1


async def test_failures_are_replaced_and_those_of_the_network_tried_again(gateway: Gateway) -> None:
    tries = iter([EngineStoppedError("closed"), ValueError("a bug"), 1.0])
    runner = runner_of(gateway, gateway.solving(lambda task: next(tries)))
    assert await runner.rollout("group", 0, lambda _: None) is not None
    assert runner.failures == {"infrastructure": 1, "agent": 1}
    assert [*gateway.ended.values()] == ["aborted", "aborted", "finished"]


async def test_an_agent_that_never_succeeds_ends_it(gateway: Gateway, server: TrajectoryServer, notes: Notes) -> None:
    solve = gateway.solving(lambda task: ImportError("No module named 'openai'"), 0)
    with pytest.raises(AgentError, match=r"8 groups in a row, at last with ImportError: No module named 'openai'"):
        await runner_of(gateway, solve).serve(registered(server), notes)


async def test_silent_agents_are_ended_and_count_as_failures(gateway: Gateway) -> None:
    async def solve(task: str, session: AgentSession) -> None:
        await asyncio.Event().wait()

    runner = runner_of(gateway, solve, "--timeout", "0.01")
    assert await runner.rollout("group", 0) is None
    assert runner.failures == {"agent": 3}
    assert [*gateway.ended.values()] == ["aborted"] * 3
    assert await gateway.told("metadata") == [{"eval": True}] * 3


async def test_a_runner_goes_on_where_one_died(gateway: Gateway, server: TrajectoryServer, tmp_path: Path) -> None:
    # The process died with one rollout finished and one open, after it had posted another group, and before it posted
    # one in which a rollout was replaced that had its reward.
    notes, rollouts = Notes(tmp_path / "agent.jsonl"), {}
    for group, task, states in (("one", 1, "fo"), ("two", 2, "ff"), ("three", 0, "fff")):
        notes.add(group=group, task=task)
        for state in states:
            async with gateway.client.session("x") as session:
                notes.add(group=group, session=session.id)
                await gateway.solving()("a", session)
                if state == "f":
                    await session.reward(5.0)
                    rollouts[session.id] = await session.rollout()
                else:
                    opened = session.id
    with (tmp_path / "agent.jsonl").open("a") as file:
        file.write('{"group": "tw')
    api = registered(server, 6)
    api.register_env(EnvRegistration(max_token_length=9, group_size=2, desired_name="old"))
    posted = encode_rollouts([*rollouts.values()][1:3], 0, holds_rollouts=True)
    api.post_scored_data_list([posted], "two")
    again = Notes(tmp_path / "agent.jsonl")
    assert (again.begun, again.unfinished) == (3, notes.unfinished)
    groups = await until(runner_of(gateway, gateway.solving()), api, again, 3)
    assert sorted(group.scores.tolist() for group in groups) == [[5.0, 1.0], [5.0, 5.0], [5.0, 5.0]]
    assert gateway.ended[opened] == "aborted"
    assert not Notes(tmp_path / "agent.jsonl").unfinished


def test_rewards_of_turns_and_an_api_without_rollouts() -> None:
    row = {"token_ids": [5, 7, 6, 8], "masks": [-100, 7, -100, 8], "logprobs": [1.0, -1.0, 1.0, -1.0]}
    row |= {"spans": [[1, 2], [3, 4]], "turns": [0, 1]}
    a = 0.5 / (0.5**0.5 + 1e-6)

    def advantages(rewards: dict[str, Any], other: dict[str, Any], rows: int, *, holds: bool) -> Any:
        rollouts = [{**one, "rows": [row] * rows} for one in (rewards, other)]
        found = decode_group(encode_rollouts(rollouts, 0, holds_rollouts=holds))
        assert holds or found.rollout_ids is None
        return None if found.advantages is None else [values[[1, 3]].tolist() for values in found.advantages]  # type: ignore[index]

    by_turn = advantages(
        {"reward": 1.0, "per_turn": [1.0, 0.0]}, {"reward": 0.0, "per_turn": [0.0, 0.0]}, 1, holds=True
    )
    assert by_turn == [pytest.approx(values, abs=1e-4) for values in ([a + 1.0, a - 0.5], [-a - 1.0, -a - 0.5])]
    assert advantages({"reward": 1.0}, {"reward": 0.0}, 2, holds=True) is None
    dropped = advantages({"reward": 1.0}, {"reward": 0.0}, 2, holds=False)
    assert dropped == [pytest.approx([value, value]) for value in (a, a, -a, -a)]


async def test_a_command_is_scored_by_its_exit_code_or_a_function(gateway: Gateway) -> None:
    program = "import json,os,sys; t=json.load(sys.stdin); print(os.environ['OPENAI_BASE_URL']); sys.exit(t)"
    command = f'{sys.executable} -c "{program}"'
    for task, scorer in ((0, None), (3, None), (0, f"{__name__}:length")):
        async with gateway.client.session("group") as session:
            await module.of_command(command, scorer)(task, session)
    assert await gateway.told("reward") == [1.0, 0.0, len(session.base_url)]
    async with gateway.client.session("group") as session:
        killed = module.of_command(f"{sys.executable} -c 'import os; os.kill(os.getpid(), 9)'", None)
        with pytest.raises(AgentError, match="was killed by signal 9"):
            await killed(0, session)
        for result in ("yes", None, float("nan")):
            with pytest.raises(AgentError, match="return a finite number, a Reward, or call"):
                await module.give(session, result)


def length(task: int, output: str) -> int:
    return len(output.strip())


async def test_evaluation_is_a_mean_in_which_failures_are_zero(gateway: Gateway) -> None:
    solve = gateway.solving(lambda task: ValueError(task) if task == "c" else Reward(3.0))
    assert await runner_of(gateway, solve).evaluate() == {"eval/mean_reward": 2.0, "eval/failed": 1.0}
    with pytest.raises(AgentError, match=r"the agent failed in every task, at last with ValueError: [abc]"):
        await runner_of(gateway, gateway.solving(lambda task: ValueError(task))).evaluate()


@pytest.mark.parametrize("by_hand", [True, False])
async def test_weights_kept_for_evaluation_answer_what_the_run_started(gateway: Gateway, by_hand: bool) -> None:
    """Symptom: an evaluation by hand waited for them, which are there while the run evaluates, until its timeout."""
    runner = runner_of(gateway, gateway.solving(), *([] if by_hand else ["--config", "launch/agent.yaml"]))
    await runner.evaluate()
    assert {group.startswith(module.EVALUATION_GROUP) for group in await gateway.told("group")} == {not by_hand}


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (httpx.Response(401, text="who is there?"), "http://gateway/sessions: 401 who is there"),
        (httpx.Response(501, html="<p>no\n POST</p>"), "http://gateway/sessions: 501 <p>no POST</p>"),
        (httpx.Response(200, html="<p>another site</p>"), "http://gateway/sessions: 200 <p>another"),
        (httpx.ConnectError("refused"), "http://gateway/sessions: ConnectError refused"),
    ],
)
async def test_a_gateway_that_opens_no_session_ends_runner_and_evaluation(
    gateway: Gateway, notes: Notes, server: TrajectoryServer, answer: Any, told: str
) -> None:
    """Symptom: eval/mean_reward 0.0 and exit code 0 where no gateway was."""

    def handler(_: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    gateway.client._http = httpx.AsyncClient(transport=httpx.MockTransport(handler), base_url="http://gateway")
    runner = runner_of(gateway, gateway.solving())
    for work in (runner.evaluate(), runner.serve(registered(server), notes)):
        with pytest.raises(SessionError, match=told):
            await work


async def test_a_gateway_that_is_gone_is_waited_for_once(gateway: Gateway, monkeypatch: Patch) -> None:
    """Symptom: each session that was to be aborted waited for it again, for three minutes."""
    clock, pauses = itertools.count(), list[float]()

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("atropos_verl.agents.client.asyncio.sleep", pause)
    monkeypatch.setattr("atropos_verl.agents.client.time.monotonic", lambda: float(next(clock)))
    async with Client("http://127.0.0.1:9", patience=60.0) as client:
        for waits in (True, False):
            pauses.clear()
            with pytest.raises(SessionError, match="ConnectError"):
                await client.ask("POST", "/sessions/x/abort")
            assert bool(pauses) is waits
        http, client._http = client._http, gateway.client._http
        await client.ask("POST", "/sessions", {"group": "g"})
        client._http = http
        with pytest.raises(SessionError, match="ConnectError"):
            await client.ask("POST", "/sessions/x/abort")
        assert pauses, "it had been there again"


async def test_an_evaluation_that_servers_ended_is_no_figure(gateway: Gateway) -> None:
    runner = runner_of(gateway, gateway.solving(lambda task: EngineStoppedError("closed")))
    with pytest.raises(AgentError, match=r"task \d could not be evaluated: HTTPStatusError: .*503"):
        await runner.evaluate()


def test_tasks_come_in_another_order_each_epoch_and_go_on_where_they_were(tmp_path: Path) -> None:
    order = module.task_order(5, 0)
    epochs = [[next(order) for _ in range(5)] for _ in range(3)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs) and epochs[0] != epochs[1]
    again = module.task_order(5, 7)
    assert [next(again) for _ in range(8)] == [*epochs[1][2:], *epochs[2]]
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1}\n\n"b"\n')
    assert module.read_tasks(path) == [{"a": 1}, "b"]
    path.write_text('1\n{"a"\n')
    with pytest.raises(ConfigError, match=r"t.jsonl, line 2: not JSON .*: '\{\"a\"'$"):
        module.read_tasks(path)


@pytest.mark.parametrize(("given", "missing"), [("api-url", "gateway-url"), ("gateway-url", "api-url")])
@pytest.mark.parametrize("verb", ["agents run --command true --tasks {tasks}", "environments serve verifiers:x"])
def test_no_address_is_guessed(
    verb: str, given: str, missing: str, tmp_path: Path, monkeypatch: Patch, capsys: Any
) -> None:
    (tmp_path / "t.jsonl").write_text("1\n")
    variable = f"ATROPOS_{missing.upper().replace('-', '_')}"
    monkeypatch.delenv(variable, raising=False)
    assert main([*verb.format(tasks=tmp_path / "t.jsonl").split(), f"--{given}", "http://127.0.0.1:1"]) == 2
    assert capsys.readouterr().err == f"CONFIGURATION ERROR: --{missing}: set it, or {variable}\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--tsks {tasks} operator:add", "error: unrecognized arguments: --tsks "),
        ("--task {tasks} operator:add", "error: unrecognized arguments: --task "),
        ("operator:add", "CONFIGURATION ERROR: --tasks: cannot read tasks.jsonl: "),
        ("--tasks {tasks} no_such:solve", "CONFIGURATION ERROR: agent: "),
        ("--tasks {tasks} --command 'x", 'CONFIGURATION ERROR: --command: "\'x": No closing quotation'),
        ("--tasks {tasks} --command nosuchprogram", "CONFIGURATION ERROR: --command: 'nosuchprogram' names no"),
        ("--tasks {tasks} --command ./t.jsonl", "CONFIGURATION ERROR: --command: './t.jsonl' names no"),
        (
            "--tasks {tasks} --command true operator:add",
            "CONFIGURATION ERROR: name the agent: MODULE:FUNCTION or",
        ),
        ("--tasks {tasks} --name ../x operator:add", "CONFIGURATION ERROR: --name: '../x' must be the name of a file"),
        ("--tasks {tasks} --scorer a:b operator:add", "CONFIGURATION ERROR: --scorer: it scores the output of a"),
        (
            "--tasks {tasks} operator:add --gateway-url localhost:8001",
            "CONFIGURATION ERROR: --gateway-url: 'localhost:8001' is",
        ),
    ],
)
def test_what_is_wrong_with_the_words_is_said_before_anything_is_asked(
    words: str, told: str, tmp_path: Path, monkeypatch: Patch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.jsonl").write_text("1\n")
    monkeypatch.setattr(module, "AtroposClient", lambda *_, **__: pytest.fail("the API was asked"))
    addresses = ["--gateway-url", "http://127.0.0.1:1", "--api-url", "http://127.0.0.1:1"]
    with pytest.raises(SystemExit, match="2"):
        raise SystemExit(main(["agents", "run", *addresses, *words.format(tasks="t.jsonl").split()]))
    assert told in capsys.readouterr().err


async def test_which_failures_say_nothing_of_the_agent() -> None:
    named = type("APIConnectionError", (Exception,), {})()
    for error in (httpx.ReadTimeout("x"), ConnectionResetError(), named, SessionError("x", 503)):
        wrapped = RuntimeError("wrapped")
        wrapped.__cause__ = error
        assert module.is_infrastructure(error) and module.is_infrastructure(wrapped)
    for other in (ValueError(), TimeoutError(), SessionError("x", 409), KeyError("status")):
        assert not module.is_infrastructure(other)
    async with Client("http://127.0.0.1:9", patience=0.0) as client:
        with pytest.raises(SessionError, match="POST") as failure:
            await client.ask("POST", "/sessions")
    assert module.is_infrastructure(failure.value)
