"""Sessions over real HTTP: what is recorded, what a retry gets, what survives a restart, and who may call."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import openai
import pytest
from support.serving import eventually, raw_post
from support.sessions import OracleEngine, check_rollout, open_session, rollout_of, session_gateway
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.engine.protocol import PinnedEngine
from atropos_verl.errors import StorageInUseError, StorageWriteError
from atropos_verl.gateway.lineages import StoredTurn, training_rows
from atropos_verl.gateway.sessions import SessionStore
from atropos_verl.http_thread import EVALUATION_GROUP
from atropos_verl.storage import RecordStore
from atropos_verl.types import GenerationRequest

TOKENIZER = build_tiny_tokenizer()
ASK: Any = {"model": "m", "messages": [{"role": "user", "content": "question"}]}
CHAT = "/v1/chat/completions"
COUNT = itertools.count()


def numbered(request: GenerationRequest, index: int) -> list[int]:
    """Another text at each call."""
    return list(TOKENIZER.encode(f"answer {next(COUNT)}<|im_end|>", add_special_tokens=False))


@pytest.fixture
def engine() -> OracleEngine:
    return OracleEngine(numbered)


@pytest.fixture
def client(tmp_path: Path, engine: OracleEngine) -> Iterator[httpx.Client]:
    with session_gateway(tmp_path, engine, TOKENIZER) as client:
        yield client


def sdk(session: dict[str, Any], **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=session["base_url"], api_key=session["api_key"], max_retries=0, **options)


def chat(client: httpx.Client, session: dict[str, Any], *, headers: dict[str, str] | None = None, **body: Any) -> Any:
    key = {"authorization": f"Bearer {session['api_key']}"}
    return client.post(CHAT, json={**ASK, **body}, headers={**key, **(headers or {})})


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def tree_of(client: httpx.Client, session: dict[str, Any]) -> Any:
    return client.get(f"/sessions/{session['id']}").json()


def test_completions_of_raw_prompts_continue_by_their_tokens(client: httpx.Client, engine: OracleEngine) -> None:
    session = open_session(client)
    agent, prompt = sdk(session), "once "
    for _ in range(3):
        prompt += agent.completions.create(model="m", prompt=prompt, max_tokens=40).choices[0].text + "<|im_end|>, "
    agent.completions.create(model="m", prompt=["once ", "other"], max_tokens=40)
    assert [turn["parent"] for turn in tree_of(client, session)["tree"]] == [None, 0, 1, None, None]
    check_rollout(rollout_of(client, session), engine.samples)


def test_the_responses_api_continues_by_the_id_of_an_answer(client: httpx.Client, engine: OracleEngine) -> None:
    session, other = open_session(client), open_session(client)
    agent = sdk(session)
    first = agent.responses.create(model="m", input="question", instructions="be good")
    second = agent.responses.create(model="m", input="and?", previous_response_id=first.id, instructions="be good")
    assert [turn["parent"] for turn in tree_of(client, session)["tree"]] == [None, 0] and second.output_text
    with pytest.raises(openai.BadRequestError, match="not known"):
        sdk(other).responses.create(model="m", input="and?", previous_response_id=first.id)
    check_rollout(rollout_of(client, session), engine.samples)


def test_large_numbers_in_unknown_fields_of_messages(client: httpx.Client, engine: OracleEngine) -> None:
    session = open_session(client)
    text_of(chat(client, session, messages=[{"role": "user", "content": "a", "x": 10**30}]))
    check_rollout(rollout_of(client, session), engine.samples)


# -- retries ---------------------------------------------------------------------------------------------------------


def in_flight(client: httpx.Client, count: int) -> None:
    eventually(lambda: f"_in_flight {count}.0" in client.get("/metrics").text, f"{count} requests in flight")


@contextmanager
def unanswered(client: httpx.Client, engine: OracleEngine, session: dict[str, Any], **body: Any) -> Iterator[None]:
    """A request whose client leaves at the end of the block; it is being sampled before."""
    engine.pause()
    begun = len(engine.started)
    key = f"Bearer {session['api_key']}"
    with raw_post(client, CHAT, {**ASK, **body}, authorization=key):
        eventually(lambda: len(engine.started) > begun, "it is being sampled")
        yield
    in_flight(client, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_an_equal_request_while_the_first_is_unanswered_joins_it(
    client: httpx.Client, engine: OracleEngine, stream: bool
) -> None:
    session = open_session(client)
    engine.pause()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(chat, client, session, stream=stream) for _ in range(4)]
        in_flight(client, 4)
        eventually(lambda: len(engine.started) == 1, "it is being sampled")
        assert tree_of(client, session)["in_flight"] == 1
        engine.resume()
    assert len({re.sub(rb'"created":\d+', b"", answer.result().content) for answer in answers}) == 1
    assert len(engine.samples) == 1
    check_rollout(rollout_of(client, session), engine.samples)


@pytest.mark.parametrize("stream", [False, True])
def test_a_retry_after_a_broken_connection_gets_the_same_answer(
    client: httpx.Client, engine: OracleEngine, stream: bool
) -> None:
    session = open_session(client)
    with unanswered(client, engine, session, stream=stream):
        pass
    engine.resume()
    eventually(lambda: tree_of(client, session)["turns"] == 1, "it goes on without its client, and is recorded")
    assert [t["received"] for t in tree_of(client, session)["tree"]] == [False]
    answer = chat(client, session, stream=stream)
    assert answer.status_code == 200 and len(engine.samples) == 1
    assert [t["received"] for t in tree_of(client, session)["tree"]] == [True]
    assert chat(client, session, stream=stream).content != answer.content and len(engine.samples) == 2
    check_rollout(rollout_of(client, session), engine.samples)


def test_an_answer_whose_client_leaves_while_it_is_stored_is_not_trained(
    client: httpx.Client, engine: OracleEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, commit, stored = open_session(client), RecordStore._commit, threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(RecordStore, "_commit", lambda *given: stored.wait(30.0) and commit(*given))
        with unanswered(client, engine, session):
            engine.resume()
            eventually(lambda: len(engine.samples) == 1, "it is sampled")
        stored.set()
        eventually(lambda: tree_of(client, session)["turns"] == 1, "it is recorded")
    text_of(chat(client, session, messages=[{"role": "user", "content": "another question"}]))
    rollout = rollout_of(client, session)
    assert [row["turns"] for row in rollout["rows"]] == [[0]]
    check_rollout(rollout, engine.samples[1:])


def test_sampling_ends_some_time_after_its_client_left(
    client: httpx.Client, engine: OracleEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(client)
    with unanswered(client, engine, session):
        pass
    assert len(engine.active) == 1, "for 60 s"
    monkeypatch.setattr("atropos_verl.gateway.sessions._UNREAD_SECONDS", 0.0)
    for stream in (False, True):
        with unanswered(client, engine, session, max_tokens=9, stream=stream):
            assert len(engine.active) == 2
        eventually(lambda: len(engine.active) == 1, "nobody waits for the second")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(chat, client, session)
        in_flight(client, 1)
        engine.resume()
        assert text_of(answer.result()) and len(engine.samples) == 1
    check_rollout(rollout_of(client, session), engine.samples)


def test_a_mark_that_the_disk_refused_is_written_with_the_next_change(
    tmp_path: Path, engine: OracleEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit = RecordStore._commit

    def refusing(self: RecordStore, changes: Any) -> Any:
        only_marks = all(change[0] == "answers" for change in changes)
        return StorageWriteError("the disk is full") if only_marks else commit(self, changes)

    with session_gateway(tmp_path, engine, TOKENIZER) as client:
        session = open_session(client)
        with unanswered(client, engine, session):
            pass
        with monkeypatch.context() as patch:
            patch.setattr(RecordStore, "_commit", refusing)
            engine.resume()
            eventually(lambda: "tried again with the next change" in caplog.text, "the mark is refused")
        open_session(client)
    with session_gateway(tmp_path, engine, TOKENIZER) as client:
        assert [turn["received"] for turn in tree_of(client, session)["tree"]] == [False]
        text_of(chat(client, session))
        assert len(engine.samples) == 1, "what no one saw before a restart is given to the retry"
        check_rollout(rollout_of(client, session), engine.samples)


def test_the_turns_of_a_session_stay_in_its_keys(
    client: httpx.Client, engine: OracleEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atropos_verl.gateway.sessions._TURN_BITS", 2)
    own, other = open_session(client), open_session(client)
    text_of(chat(client, other))
    assert code_of(chat(client, own, n=5)) == (403, "session_limit")
    assert chat(client, own, n=4).status_code == 200
    check_rollout(rollout_of(client, own), engine.samples[-4:])
    check_rollout(rollout_of(client, other), engine.samples[:1])


def test_an_idempotency_key_gives_the_same_answer_again(client: httpx.Client, engine: OracleEngine) -> None:
    session = open_session(client)
    agent = sdk(session)
    answers = []
    for key in ("a", "a", "b"):
        chunks = [*agent.chat.completions.create(**ASK, stream=True, extra_headers={"Idempotency-Key": key})]
        answers.append((chunks[0].id, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)))
    assert answers[0] == answers[1] != answers[2] and len(engine.samples) == 2
    conflict = chat(client, session, headers={"idempotency-key": "a"}, max_tokens=3)
    assert (conflict.status_code, conflict.json()["error"]["code"]) == (409, "idempotency_conflict")
    check_rollout(rollout_of(client, session), engine.samples)


def test_what_an_sdk_calls_a_retry_is_one(client: httpx.Client, engine: OracleEngine) -> None:
    session = open_session(client)
    first = text_of(chat(client, session, headers={"x-stainless-retry-count": "0"}))
    assert text_of(chat(client, session, headers={"x-stainless-retry-count": "1"})) == first
    assert text_of(chat(client, session, headers={"x-stainless-retry-count": "0"})) != first


def test_a_refused_or_failed_request_leaves_nothing(client: httpx.Client, engine: OracleEngine) -> None:
    session = open_session(client)
    assert chat(client, session, temperature="hot").status_code == 400
    engine.fail_with = RuntimeError("boom")
    assert chat(client, session).status_code == 500
    assert chat(client, session, stream=True).text.count("internal_server_error") == 1
    engine.fail_with = None
    assert (tree_of(client, session)["requests"], tree_of(client, session)["turns"]) == (0, 0)
    text_of(chat(client, session))
    check_rollout(rollout_of(client, session), engine.samples)


def test_sessions_that_cannot_be_stored_are_not_opened_for_a_retry(
    client: httpx.Client, engine: OracleEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(RecordStore, "_commit", lambda *_: StorageWriteError("the disk is full"))
        key = {"idempotency-key": "k"}
        answers = [pool.submit(client.post, "/sessions", json={"group": "g"}, headers=key) for _ in range(2)]
        assert [answer.result().status_code for answer in answers] == [507, 507]


def test_a_disk_that_refuses_loses_nothing(
    client: httpx.Client, engine: OracleEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(client)
    with monkeypatch.context() as patch:
        patch.setattr(RecordStore, "_commit", lambda *_: StorageWriteError("the disk is full"))
        for stream in (False, True):
            answer = chat(client, session, stream=stream)
            assert answer.status_code == (200 if stream else 507) and "the disk is full" in answer.text
            assert "[DONE]" not in answer.text
        assert client.post("/sessions", json={"group": "g"}).status_code == 507
        assert reward(client, session, reward=1.0).status_code == 507
    assert (tree_of(client, session)["turns"], tree_of(client, session)["state"]) == (0, "open")
    engine.samples.clear()
    text_of(chat(client, session))
    check_rollout(rollout_of(client, session), engine.samples)


# -- restarts --------------------------------------------------------------------------------------------------------


def test_a_restarted_gateway_knows_its_sessions(tmp_path: Path, engine: OracleEngine) -> None:
    with session_gateway(tmp_path, engine, TOKENIZER) as client:
        session, ended = open_session(client), open_session(client)
        before = text_of(chat(client, ended))
        rollout = rollout_of(client, ended)
        first = text_of(chat(client, session))
        keyed = chat(client, session, headers={"idempotency-key": "a"}).json()
        tree = tree_of(client, session)["tree"]
    with session_gateway(tmp_path, engine, TOKENIZER) as client:
        assert client.get(f"/sessions/{ended['id']}/rollout").json() == rollout and before
        assert tree_of(client, session)["tree"] == tree
        again = chat(client, session, headers={"idempotency-key": "a"}).json()
        assert (again["id"], again["choices"]) == (keyed["id"], keyed["choices"])
        follow = [*ASK["messages"], {"role": "assistant", "content": first}, {"role": "user", "content": "more"}]
        text_of(chat(client, session, messages=follow))
        assert [t["parent"] for t in tree_of(client, session)["tree"]] == [None, None, 0]
        check_rollout(rollout_of(client, session), engine.samples[1:])


@pytest.mark.parametrize("value", [b"\xc1", msgspec.msgpack.encode({"id": "a"}), b"\xa1\xff", b"\x91" * 9000, None])
def test_a_record_that_cannot_be_read_is_left_out_and_the_others_are_kept(
    tmp_path: Path, engine: OracleEngine, caplog: pytest.LogCaptureFixture, value: bytes | None
) -> None:
    with session_gateway(tmp_path, engine, TOKENIZER) as client:
        other, broken, lost = open_session(client), open_session(client), open_session(client)
        for one in (other, broken, broken, lost):
            text_of(chat(client, one))
    records = RecordStore(tmp_path / "sessions.sqlite", dict.fromkeys(("sessions", "turns", "answers"), int), owner="t")
    records.write([("turns", 1 << 20, value), ("sessions", 2, value or b"")]).result()
    records.close()
    with session_gateway(tmp_path, engine, TOKENIZER) as client:
        assert "session number 2" in caplog.text
        assert code_of(client.get(f"/sessions/{lost['id']}")) == (404, "unknown_session")
        tree = tree_of(client, broken)
        assert tree["state"] == "aborted" and ("turn 0 is missing" in tree["reason"]) == (value is None)
        assert len(rollout_of(client, other)["rows"]) == 1
        new = open_session(client)
        text_of(chat(client, new))
        assert tree_of(client, new)["turns"] == 1, "its number is new"


# -- rewards and ends ------------------------------------------------------------------------------------------------


def reward(client: httpx.Client, session: dict[str, Any], **body: Any) -> httpx.Response:
    return client.post(f"/sessions/{session['id']}/reward", json=body)


def code_of(response: httpx.Response) -> tuple[int, str | None]:
    return response.status_code, response.json()["error"]["code"] or response.json()["error"]["param"]


def test_a_reward_is_set_once(client: httpx.Client, engine: OracleEngine) -> None:
    session = open_session(client)
    for _ in range(2):
        text_of(chat(client, session))
    assert code_of(client.get(f"/sessions/{session['id']}/rollout")) == (409, "session_open")
    assert reward(client, session, reward=0.1, finished=False).json()["state"] == "open"
    for body, field in (
        ({}, "reward"),
        ({"reward": "1"}, "reward"),
        ({"reward": 1, "per_turn": [1]}, "per_turn"),
        ({"reward": 1, "per_turn": [1, True]}, "per_turn"),
        ({"reward": 1, "info": [1]}, "info"),
        ({"reward": 1, "info": {"a": 10**30}}, None),
        ({"reward": 1, "x": 1}, "x"),
    ):
        assert code_of(reward(client, session, **body)) == (400, field)
    final = {"reward": 1.0, "per_turn": [0.5, -1], "info": {"why": "because"}}
    first = reward(client, session, **final).json()
    assert (first["state"], first["reward"], first["per_turn"], first["turns"]) == ("finished", 1.0, [0.5, -1.0], 2)
    assert reward(client, session, **final).json() == first
    assert code_of(reward(client, session, reward=0.0)) == (409, "already_finished")
    assert code_of(client.post(f"/sessions/{session['id']}/abort")) == (409, "already_finished")
    assert code_of(chat(client, session)) == (410, "session_ended")
    rollout = client.get(f"/sessions/{session['id']}/rollout").json()
    assert (rollout["per_turn"], rollout["info"]) == ([0.5, -1.0], {"why": "because"})
    assert tree_of(client, session)["tree"][1]["turn"] == 1


def test_an_abort_ends_what_is_being_sampled(client: httpx.Client, engine: OracleEngine) -> None:
    session = open_session(client)
    engine.pause()
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(chat, client, session, stream=stream) for stream in (False, True)]
        eventually(lambda: len(engine.active) == 2, "both run")
        for _ in range(2):
            answer = client.post(f"/sessions/{session['id']}/abort", json={"reason": "it was stuck"})
            assert (answer.json()["state"], answer.json()["reason"]) == ("aborted", "it was stuck")
        assert all("it was stuck" in answer.result().text for answer in answers)
    eventually(lambda: not engine.active, "the slots to be free")
    engine.resume()
    assert code_of(client.get(f"/sessions/{session['id']}/rollout")) == (409, "session_aborted")
    for body, reason in (({"reason": ""}, None), ({"reason": "x" * 9000}, "x" * 500)):
        other = open_session(client)
        assert client.post(f"/sessions/{other['id']}/abort", json=body).json()["reason"] == reason
    assert code_of(reward(client, session, reward=1.0)) == (410, "session_ended")


def test_a_session_without_a_reward_ends_at_its_ttl_and_is_counted(client: httpx.Client, engine: OracleEngine) -> None:
    session, other = open_session(client, ttl=0.2), open_session(client)
    text_of(chat(client, other))
    eventually(lambda: tree_of(client, session)["state"] == "expired", "its ttl ends")
    assert code_of(chat(client, session)) == (410, "session_ended")
    figures = client.get("/metrics").text
    assert "atropos_verl_gateway_sessions_expired_total 1.0" in figures
    assert "atropos_verl_gateway_sessions_open 1.0" in figures and "session_turns_total 1.0" in figures


# -- who may do what -------------------------------------------------------------------------------------------------


def test_a_session_is_opened_once_per_idempotency_key(client: httpx.Client) -> None:
    body, key = {"group": "g", "size": 8, "task": "t", "metadata": {"a": 1}}, {"idempotency-key": "k"}
    first, again = (client.post("/sessions", json=body, headers=key).json() for _ in range(2))
    assert first == again and first.items() >= body.items()
    assert code_of(client.post("/sessions", json={"group": "h"}, headers=key)) == (409, "idempotency_conflict")


def test_a_bad_session_is_refused_by_its_field(client: httpx.Client) -> None:
    for body, field in (
        ({}, "group"),
        ({"group": ""}, "group"),
        ({"group": "g" * 300}, "group"),
        ({"group": 5}, "group"),
        ({"group": "g", "ttl": 0}, "ttl"),
        ({"group": "g", "ttl": 10**9}, "ttl"),
        ({"group": "g", "metadata": [1]}, "metadata"),
        ({"group": "g", "metadata": {"a": 10**30}}, None),
        ({"group": "g", "task": 5}, "task"),
        ({"group": "g", "size": 0}, "size"),
        ({"group": "g", "other": 0}, "other"),
    ):
        assert code_of(client.post("/sessions", json=body)) == (400, field), body
    for content in (b"[1]", b"{", b'{"gro\xb4up": "g"}'):
        assert client.post("/sessions", content=content).status_code == 400, content


def test_limits(client: httpx.Client, engine: OracleEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_MAX_OPEN", 2), ("_MAX_TURNS", 3), ("_MAX_ENDED", 1)):
        monkeypatch.setattr(f"atropos_verl.gateway.sessions.{name}", value)
    large = client.post("/sessions", json={"group": "g", "metadata": {"a": "x" * 40_000}})
    assert large.status_code == 413
    first, second = open_session(client), open_session(client)
    assert code_of(client.post("/sessions", json={"group": "g"})) == (429, "too_many_sessions")
    for _ in range(3):
        text_of(chat(client, first))
    assert code_of(chat(client, first)) == (403, "session_limit")
    assert len(rollout_of(client, first)["rows"]) == 3
    rollout_of(client, second)
    assert client.get(f"/sessions/{first['id']}").status_code == 404, "the oldest ended one is forgotten"


def test_what_breaks_in_a_route_of_sessions_is_told_as_json(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atropos_verl.gateway.app.summary_of", lambda session: 1 / 0)
    answer = client.post("/sessions", json={"group": "g"})
    assert answer.status_code == 500 and "ZeroDivisionError" in answer.json()["error"]["message"]


def test_the_rows_of_a_rollout_are_bounded(
    client: httpx.Client, engine: OracleEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(client)
    text_of(chat(client, session))
    [turn] = tree_of(client, session)["tree"]
    prompt, row = turn["prompt_tokens"], turn["prompt_tokens"] + turn["completion_tokens"]
    monkeypatch.setattr("atropos_verl.gateway.sessions._MAX_ROW_TOKENS", row + 2 * prompt)
    assert code_of(chat(client, session, n=2)) == (403, "session_limit")
    assert len(engine.samples) == 1, "refused before it is sampled"
    text_of(chat(client, session))
    assert code_of(chat(client, session)) == (403, "session_limit")
    assert len(engine.samples) == 2, "refused before it is sampled"
    check_rollout(rollout_of(client, session), engine.samples)


def test_a_session_key_opens_its_own_session_only(client: httpx.Client, engine: OracleEngine) -> None:
    own, other = open_session(client), open_session(client)
    key = {"authorization": f"Bearer {own['api_key']}"}

    def status(method: str, path: str, headers: dict[str, str] = key, **body: Any) -> int:
        json = {"json": body} if method == "POST" else {}
        return client.request(method, path, headers=headers, **json).status_code

    for path in (CHAT, f"/s/{own['id']}{CHAT}"):
        assert status("POST", path, **ASK) == 200
        assert status("POST", path, {"authorization": "", "x-api-key": own["api_key"]}, **ASK) == 200
    assert status("GET", "/v1/models") == status("GET", f"/s/{own['id']}/v1/models") == 200
    assert status("GET", f"/sessions/{own['id']}") == 200
    assert status("POST", f"/s/{other['id']}{CHAT}", **ASK) == 403
    for method, path in (
        ("GET", f"/sessions/{other['id']}"),
        ("GET", f"/sessions/{own['id']}x"),
        ("POST", f"/sessions/{other['id']}/reward"),
        ("POST", "/sessions"),
        ("POST", "/generate"),
        ("GET", "/metrics"),
    ):
        assert status(method, path) == 403, path
    assert status("POST", f"/s/{own['id']}/generate", **ASK) == 404
    for wrong in (own["api_key"] + "x", own["api_key"][:-1], f"sess-{own['id']}-", "sess-", "sess--", "x"):
        assert status("POST", CHAT, {"authorization": f"Bearer {wrong}"}, **ASK) == 401, wrong
        assert status("POST", f"/s/{own['id']}{CHAT}", {"authorization": f"Bearer {wrong}"}, **ASK) == 401
    turns = len(tree_of(client, own)["tree"])
    assert status("POST", CHAT, {}, **ASK) == 200, "the gateway's key, without a session"
    assert status("POST", f"/s/{own['id']}{CHAT}", {}, **ASK) == 200, "the gateway's key, in a session"
    assert len(tree_of(client, own)["tree"]) == turns + 1


def test_without_a_gateway_key_the_address_is_enough(tmp_path: Path, engine: OracleEngine) -> None:
    with session_gateway(tmp_path, engine, TOKENIZER, key=None) as client:
        client.headers["authorization"] = "Bearer anything"
        own, other = open_session(client), open_session(client)
        assert client.post(f"/s/{own['id']}{CHAT}", json=ASK).status_code == 200
        assert len(tree_of(client, own)["tree"]) == 1
        key = {"authorization": f"Bearer {other['api_key']}"}
        assert client.post(f"/s/{own['id']}{CHAT}", json=ASK, headers=key).status_code == 403
        with pytest.raises(StorageInUseError, match="gateway's sessions"):
            SessionStore(tmp_path)


@pytest.mark.parametrize("addressed", ["by its url", "by its key"])
def test_a_session_of_an_evaluation_waits_for_the_pinned_version(
    tmp_path: Path, engine: OracleEngine, addressed: str
) -> None:
    pinned = PinnedEngine(engine)
    with session_gateway(tmp_path, engine, TOKENIZER, evaluated=pinned) as client:
        session = open_session(client, group=f"{EVALUATION_GROUP}1")
        url = CHAT if addressed == "by its key" else f"/s/{session['id']}{CHAT}"
        answers: list[str] = []
        key = {"authorization": f"Bearer {session['api_key']}"}
        asking = threading.Thread(target=lambda: answers.append(text_of(client.post(url, json=ASK, headers=key))))
        asking.start()
        eventually(lambda: pinned.gate.waiting == 1, "the request to arrive")
        assert not engine.requests
        pinned.pin()
        asking.join(10.0)
        assert answers and answers[0].startswith("answer")
        assert text_of(chat(client, open_session(client))).startswith("answer"), "others do not wait"


def test_of_a_constrained_turn_the_tokens_are_trained_that_were_chosen_among_several() -> None:
    logprobs = np.array([0.0, -0.5, 0.0, -2.0], np.float32).tobytes()
    ids = [np.array(row, np.int32).tobytes() for row in ([5, 6], [7, 8, 9, 2])]
    made = {"parent": None, "request": "r", "digest": b"", "idempotency_key": None, "prompt": ids[0], "sampled": ids[1]}
    made |= {"logprobs": logprobs, "runs": ((3, 4),), "finish_reason": "stop", "has_end": True, "constrained": True}
    made |= {"key": 0, "messages": 0, "characters": 0, "text_hash": 0, "reason": None, "said": ()}
    for constrained, masks, kept in (
        (True, [-100, -100, -100, 8, -100, 2], [1.0] * 6),
        (False, [-100, -100, 7, 8, 9, 2], [1.0, 1.0, 0.0, -0.5, 0.0, -2.0]),
    ):
        (row,) = training_rows([StoredTurn(**{**made, "constrained": constrained})], [1])
        assert (row["masks"], row["logprobs"], row["spans"]) == (masks, kept, [[2, 6]])
