"""The runner against the session routes of a stub and the real trajectory API."""

import argparse
import asyncio
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.stub_sessions import StubGateway
from support.trajectory_server import TrajectoryServer, registration

from atropos_verl.agents import runner as module
from atropos_verl.agents.client import AgentSession, Client, Reward, SessionError
from atropos_verl.agents.runner import (
    AgentError,
    Notes,
    Runner,
    add_arguments,
    encode_rollouts,
    is_infrastructure,
    of_command,
    read_tasks,
    task_order,
)
from atropos_verl.cli import main
from atropos_verl.errors import AtroposTimeoutError, ConfigError
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.messages import EnvRegistration
from atropos_verl.protocol.wire import decode_batch, decode_group, encode_group
from atropos_verl.types import ScoredGroup


@pytest.fixture
def gateway() -> StubGateway:
    return StubGateway()


@pytest.fixture
def server() -> Iterator[TrajectoryServer]:
    with TrajectoryServer() as api:
        yield api


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STATUS_SECONDS", 0.02)
    monkeypatch.setattr(module, "_LONGEST_PAUSE", 0.0)


def client_of(gateway: StubGateway) -> Client:
    client = Client("http://gateway", patience=0.5)
    client._http = httpx.AsyncClient(transport=httpx.ASGITransport(gateway.app), base_url="http://gateway")
    return client


async def ask(session: AgentSession, client: Client) -> int:
    """One turn, as an SDK would take it."""
    answer = await client._http.post(f"{session.base_url}/chat/completions", json={"messages": []})
    answer.raise_for_status()
    return int(answer.json()["choices"][0]["message"]["content"])


def asking(client: Client, turns: int = 1) -> Any:
    """An agent that takes so many turns; its reward is the last answer."""

    async def solve(task: str, session: AgentSession) -> float:
        return [float(await ask(session, client)) for _ in range(turns)][-1]

    return solve


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["run", "--tasks", "unused", *words])


def runner_of(client: Client, solve: Any, *words: str, tasks: Any = ("a", "b", "c")) -> Runner:
    async def given(task: Any, session: AgentSession) -> None:
        await module.give(session, await solve(task, session))

    return Runner(client, given, tasks, options("--group-size", "2", *words))


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


async def test_groups_are_posted_with_their_rows_and_no_more_than_the_queue_wants(
    gateway: StubGateway, server: TrajectoryServer, tmp_path: Path
) -> None:
    client, notes = client_of(gateway), Notes(tmp_path / "agent.jsonl")
    shares = ("--env.inference_weight", "2", "--env.min_batch_allocation", "0.5")
    groups = await until(runner_of(client, asking(client, 2), *shares), registered(server), notes, 2)
    [seen] = (await asyncio.to_thread(httpx.get, f"{server.url}/page-data")).json()["environments"]
    assert (seen["weight"], seen["min_batch_allocation"]) == (2.0, 0.5)
    assert [group.rollouts.tolist() for group in groups] == [[0, 0, 1, 1]] * 2
    assert [group.rollout_scores.tolist() for group in groups] == [[2.0, 2.0]] * 2
    assert len({session["group"] for session in gateway.sessions.values()}) == len(gateway.sessions) // 2 == 2
    assert {session["task"] for session in gateway.sessions.values()} <= {"0", "1", "2"}
    assert not notes.unfinished


async def test_its_least_share_is_made_although_others_have_filled_the_queue(
    gateway: StubGateway, server: TrajectoryServer, tmp_path: Path
) -> None:
    api, client = registered(server), client_of(gateway)
    other = EnvRegistration(max_token_length=32, group_size=2, desired_name="other", min_batch_allocation=0.25)
    other_id = await asyncio.to_thread(api.register_env, other)
    rows = [[1, 2], [1, 3]]
    posted = [encode_group(tokens=rows, masks=rows, scores=[float(n), 0.0], env_id=other_id) for n in range(6)]
    await asyncio.to_thread(api.post_scored_data_list, posted)
    runner = runner_of(client, asking(client), "--env.min_batch_allocation", "0.5")
    groups = await until(runner, api, Notes(tmp_path / "agent.jsonl"), 1)
    assert sorted(group.env_id for group in groups) == [0, 1], "no batch is made without its share"


async def test_an_api_that_drops_rollouts_gets_advantages_and_a_warning(
    gateway: StubGateway,
    server: TrajectoryServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("atropos_verl.server.app.FEATURES", ())
    client, rewards = client_of(gateway), iter(range(100))

    async def solve(task: str, session: AgentSession) -> float:
        await ask(session, client)
        await ask(session, client)
        return float(next(rewards))

    with caplog.at_level(logging.WARNING, logger="atropos_verl"):
        groups = await until(runner_of(client, solve), registered(server, 8), Notes(tmp_path / "agent.jsonl"), 2)
    for group in groups:
        assert group.rollout_ids is None
        assert group.advantages is not None
        rows = [values[0] for values in group.advantages if values is not None]
        assert rows[0] == rows[1] == pytest.approx(-rows[2]) == pytest.approx(-rows[3])
        assert abs(rows[0]) == pytest.approx(0.5 / (0.5**0.5 + 1e-6))
    assert sum("drops rollout_ids" in record.getMessage() for record in caplog.records) == 1


async def test_where_an_api_knows_no_keys_a_group_whose_post_may_have_arrived_is_not_posted_again(
    gateway: StubGateway, server: TrajectoryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atropos_verl.server.app.FEATURES", ())
    client, api, path = client_of(gateway), registered(server, 2), tmp_path / "agent.jsonl"
    post = api.post_scored_data_list

    def unanswered(groups: Any, key: str | None) -> None:
        post(groups, key)
        raise AtroposTimeoutError("no answer")

    monkeypatch.setattr(api, "post_scored_data_list", unanswered)
    with pytest.raises(AtroposTimeoutError):
        await runner_of(client, asking(client)).serve(api, Notes(path))
    assert (api.status().queue_size, Notes(path).begun, Notes(path).unfinished) == (1, 1, {})


async def test_a_failed_rollout_is_replaced_and_failures_of_the_network_are_tried_again(gateway: StubGateway) -> None:
    client, tries = client_of(gateway), iter([ValueError("a bug"), None, None])

    async def solve(task: str, session: AgentSession) -> float:
        number = await ask(session, client)
        if (error := next(tries)) is not None:
            raise error
        return float(number)

    gateway.answers = [503, 200]
    runner = runner_of(client, solve)
    found = await runner.rollout("group", 0, lambda _: None)
    assert found is not None
    assert runner.failures == {"infrastructure": 1, "agent": 1}
    assert [session["state"] for session in gateway.sessions.values()] == ["aborted", "aborted", "finished"]


async def test_an_agent_that_never_succeeds_ends_the_runner_with_its_error(
    gateway: StubGateway, server: TrajectoryServer, tmp_path: Path
) -> None:
    async def solve(task: str, session: AgentSession) -> float:
        raise ImportError("No module named 'openai'")

    runner = runner_of(client_of(gateway), solve)
    with pytest.raises(AgentError, match=r"8 groups in a row, at last with ImportError: No module named 'openai'"):
        await runner.serve(registered(server), Notes(tmp_path / "agent.jsonl"))


async def test_what_is_no_reward_is_refused(gateway: StubGateway) -> None:
    async with client_of(gateway) as client, client.session("group") as session:
        for result in ("yes", None, float("nan")):
            with pytest.raises(AgentError, match="return a finite number, a Reward, or call"):
                await module.give(session, result)


async def test_silent_agents_are_ended_and_count_as_failures(gateway: StubGateway) -> None:
    async def solve(task: str, session: AgentSession) -> float:
        await asyncio.Event().wait()
        return 0.0

    runner = runner_of(client_of(gateway), solve, "--timeout", "0.01")
    assert await runner.rollout("group", 0) is None
    assert runner.failures == {"agent": 3}
    assert {session["state"] for session in gateway.sessions.values()} == {"aborted"}
    assert [session["metadata"] for session in gateway.sessions.values()] == [{"eval": True}] * 3


async def test_a_runner_that_is_started_again_posts_what_was_finished_and_samples_the_rest(
    gateway: StubGateway, server: TrajectoryServer, tmp_path: Path
) -> None:
    client, path = client_of(gateway), tmp_path / "agent.jsonl"
    # The process died with one rollout finished and one open, after it had posted another group, and before it posted
    # one in which a rollout was replaced that had its reward.
    for _ in range(7):
        async with client.session("x") as session:
            await ask(session, client)
            if session.id != "s1":
                await session.reward(5.0)
    notes = Notes(path)
    for group, task, sessions in (("one", 1, ("s0", "s1")), ("two", 2, ("s2", "s3")), ("three", 0, ("s4", "s5", "s6"))):
        notes.add(group=group, task=task)
        for name in sessions:
            notes.add(group=group, session=name)
    with path.open("a") as file:
        file.write('{"group": "tw')
    api = registered(server, 6)
    two = encode_rollouts(
        [await client.ask("GET", f"/sessions/{name}/rollout") for name in ("s2", "s3")], 0, holds_rollouts=True
    )
    api.register_env(EnvRegistration(max_token_length=9, group_size=2, desired_name="old"))
    api.post_scored_data_list([two], "two")
    again = Notes(path)
    sessions = [group.sessions for group in again.unfinished.values()]
    assert (again.begun, sessions) == (3, [["s0", "s1"], ["s2", "s3"], ["s4", "s5", "s6"]])
    groups = await until(runner_of(client, asking(client)), api, again, 3)
    assert sorted(group.scores.tolist() for group in groups) == [[5.0, 1.0], [5.0, 5.0], [5.0, 5.0]]
    assert gateway.sessions["s1"]["state"] == "aborted"
    assert not Notes(path).unfinished


def test_rewards_of_turns_and_an_api_without_rollouts() -> None:
    row = {
        "masks": [-100, 7, -100, 8],
        "logprobs": [1.0, -1.0, 1.0, -1.0],
        "token_ids": [5, 7, 6, 8],
        "spans": [[1, 2], [3, 4]],
    }
    whole = {"reward": 1.0, "per_turn": [1.0, 0.0], "rows": [{**row, "turns": [0, 1]}]}
    other = {**whole, "reward": 0.0, "per_turn": [0.0, 0.0]}
    group = decode_group(encode_rollouts([whole, other], 0, holds_rollouts=True))
    assert group.advantages is not None
    a = 0.5 / (0.5**0.5 + 1e-6)
    assert [[round(float(v), 4) for v in values[[1, 3]]] for values in group.advantages] == [  # type: ignore[index]
        [round(a + 1.0, 4), round(a - 0.5, 4)],
        [round(-a - 1.0, 4), round(-a - 0.5, 4)],
    ]
    split = {"reward": 1.0, "rows": [{**row, "turns": [0, 1]}] * 2}
    assert decode_group(encode_rollouts([split, {**split, "reward": 0.0}], 0, holds_rollouts=True)).advantages is None
    dropped = decode_group(encode_rollouts([split, {**split, "reward": 0.0}], 0, holds_rollouts=False))
    assert dropped.rollout_ids is None
    assert dropped.advantages is not None
    assert [values[1] for values in dropped.advantages if values is not None] == pytest.approx([a, a, -a, -a])


async def test_a_command_finds_its_session_and_is_scored_by_its_exit_code_or_a_function(gateway: StubGateway) -> None:
    program = "import json,os,sys; t=json.load(sys.stdin); print(os.environ['OPENAI_BASE_URL']); sys.exit(t)"
    command = f'{sys.executable} -c "{program}"'
    async with client_of(gateway) as client:
        for task, scorer, expected in (
            (0, None, 1.0),
            (3, None, 0.0),
            (0, f"{__name__}:length", len("http://gateway/s/s2/v1")),
        ):
            async with client.session("group") as session:
                await of_command(command, scorer)(task, session)
            assert gateway.sessions[session.id]["reward"] == expected
        async with client.session("group") as session:
            with pytest.raises(AgentError, match="was killed by signal 9"):
                await of_command(f"{sys.executable} -c 'import os; os.kill(os.getpid(), 9)'", None)(0, session)


def length(task: int, output: str) -> int:
    return len(output.strip())


async def test_evaluation_is_a_mean_in_which_failures_are_zero(gateway: StubGateway) -> None:
    client = client_of(gateway)

    async def solve(task: str, session: AgentSession) -> Reward:
        await ask(session, client)
        if task == "c":
            raise ValueError(task)
        return Reward(3.0)

    assert await runner_of(client, solve).evaluate() == {"eval/mean_reward": 2.0, "eval/failed": 1.0}


def test_tasks_come_in_another_order_each_epoch_and_go_on_where_they_were(tmp_path: Path) -> None:
    order = task_order(5, 0)
    epochs = [[next(order) for _ in range(5)] for _ in range(3)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = task_order(5, 7)
    assert [next(again) for _ in range(8)] == [*epochs[1][2:], *epochs[2]]
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n\n"b"\n')
    assert read_tasks(tmp_path / "t.jsonl") == [{"a": 1}, "b"]
    (tmp_path / "t.jsonl").write_text('1\n{"a"\n')
    with pytest.raises(ConfigError, match=r"t.jsonl, line 2: not JSON .*: '\{\"a\"'$"):
        read_tasks(tmp_path / "t.jsonl")


@pytest.mark.parametrize(("given", "missing"), [("api-url", "gateway-url"), ("gateway-url", "api-url")])
@pytest.mark.parametrize("verb", ["agents run --command true --tasks {tasks}", "environments serve verifiers:x"])
def test_no_address_is_guessed(
    verb: str, given: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "t.jsonl").write_text("1\n")
    variable = f"ATROPOS_{missing.upper().replace('-', '_')}"
    monkeypatch.delenv(variable, raising=False)
    assert main([*verb.format(tasks=tmp_path / "t.jsonl").split(), f"--{given}", "http://127.0.0.1:1"]) == 2
    assert capsys.readouterr().err == f"CONFIGURATION ERROR: --{missing}: set it, or {variable}\n"


def test_which_failures_say_nothing_of_the_agent() -> None:
    named = type("APIConnectionError", (Exception,), {})()
    for error in (httpx.ReadTimeout("x"), ConnectionResetError(), named, SessionError("x", 503)):
        wrapped = RuntimeError("wrapped")
        wrapped.__cause__ = error
        assert is_infrastructure(error) and is_infrastructure(wrapped)
    for other in (ValueError(), TimeoutError(), SessionError("x", 409), KeyError("status")):
        assert not is_infrastructure(other)


async def test_a_gateway_that_stays_away_says_nothing_of_the_agent() -> None:
    async with Client("http://127.0.0.1:9", patience=0.0) as client:
        with pytest.raises(SessionError, match="POST") as failure:
            await client.ask("POST", "/sessions")
    assert is_infrastructure(failure.value)
