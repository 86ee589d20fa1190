"""Sessions over real HTTP: what is recorded, what a retry gets, what survives a restart, and who may call."""

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
from support.sdks import OPENAI
from support.serving import eventually, raw_post
from support.sessions import OracleEngine, check_rollout, open_session, rollout_of, session_gateway
from support.tiny_model import build_tiny_tokenizer

from atropos_verl.engine.protocol import PinnedEngine
from atropos_verl.errors import StorageInUseError, StorageWriteError
from atropos_verl.gateway.lineages import StoredTurn, training_rows
from atropos_verl.gateway.sessions import SessionStore
from atropos_verl.http_thread import EVALUATION_GROUP
from atropos_verl.storage import RecordStore

Patch = pytest.MonkeyPatch
TOKENIZER = build_tiny_tokenizer()
ASK: Any = {"model": "m", "messages": [{"role": "user", "content": "question"}]}
CHAT = "/v1/chat/completions"


class Opened:
    """A session, and what is asked in it."""

    def __init__(self, client: httpx.Client, **body: Any) -> None:
        self.client, self.known = client, open_session(client, **body)
        self.path, self.url = f"/sessions/{self.known['id']}", f"/s/{self.known['id']}{CHAT}"
        self.key = {"authorization": f"Bearer {self.known['api_key']}"}
        self.sdk = OPENAI.with_options(base_url=self.known["base_url"], api_key=self.known["api_key"])

    def chat(self, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        return self.client.post(CHAT, json={**ASK, **body}, headers={**self.key, **(headers or {})})

    def say(self, **body: Any) -> str:
        answer = self.chat(**body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    def post(self, what: str, **body: Any) -> httpx.Response:
        return self.client.post(f"{self.path}/{what}", json=body)

    def seen(self, field: str = "tree") -> Any:
        return self.client.get(self.path).json()[field]

    def of_turns(self, field: str) -> list[Any]:
        return [turn[field] for turn in self.seen()]

    def check(self, samples: Any) -> dict[str, Any]:
        """Ends it; the rollout has these samples, each once."""
        rollout = rollout_of(self.client, self.known)
        check_rollout(rollout, samples)
        return rollout


@pytest.fixture
def engine() -> OracleEngine:
    """Another text at each call."""
    count = itertools.count()
    return OracleEngine(lambda request, index: TOKENIZER.encode(f"answer {next(count)}<|im_end|>"))


@pytest.fixture
def client(tmp_path: Path, engine: OracleEngine) -> Iterator[httpx.Client]:
    with session_gateway(tmp_path, engine, TOKENIZER) as client:
        yield client


@pytest.fixture
def session(client: httpx.Client) -> Opened:
    return Opened(client)


def refusal(response: httpx.Response) -> tuple[int, str | None]:
    return response.status_code, response.json()["error"]["code"] or response.json()["error"]["param"]


def full_disk(*_: Any) -> StorageWriteError:
    return StorageWriteError("the disk is full")


def test_completions_of_raw_prompts_continue_by_their_tokens(session: Opened, engine: OracleEngine) -> None:
    prompt, create = "once ", session.sdk.completions.create
    for _ in range(3):
        prompt += create(model="m", prompt=prompt, max_tokens=40).choices[0].text + "<|im_end|>, "
    create(model="m", prompt=["once ", "other"], max_tokens=40)
    assert session.of_turns("parent") == [None, 0, 1, None, None]
    session.check(engine.samples)


def test_the_responses_api_continues_by_the_id_of_an_answer(session: Opened, engine: OracleEngine) -> None:
    asked = {"model": "m", "input": "question", "instructions": "be good"}
    first = session.sdk.responses.create(**asked)
    assert session.sdk.responses.create(**asked, previous_response_id=first.id).output_text
    assert session.of_turns("parent") == [None, 0]
    with pytest.raises(openai.BadRequestError, match="not known"):
        Opened(session.client).sdk.responses.create(**asked, previous_response_id=first.id)
    session.check(engine.samples)


def in_flight(client: httpx.Client, count: int) -> None:
    eventually(lambda: f"_in_flight {count}.0" in client.get("/metrics").text, f"{count} requests in flight")


@contextmanager
def unanswered(session: Opened, engine: OracleEngine, **body: Any) -> Iterator[None]:
    """A request whose client leaves at the end of the block; it is being sampled before."""
    engine.pause()
    begun = len(engine.started)
    with raw_post(session.client, CHAT, {**ASK, **body}, **session.key):
        eventually(lambda: len(engine.started) > begun, "it is being sampled")
        yield
    in_flight(session.client, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_equal_requests_share_an_answer_until_one_of_their_clients_has_it(
    session: Opened, engine: OracleEngine, stream: bool
) -> None:
    engine.pause()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(session.chat, stream=stream) for _ in range(4)]
        in_flight(session.client, 4)
        eventually(lambda: len(engine.started) == 1, "it is being sampled")
        assert session.seen("in_flight") == 1
        engine.resume()
    assert len({re.sub(rb'"created":\d+', b"", answer.result().content) for answer in answers}) == 1
    with unanswered(session, engine, stream=stream):
        pass
    engine.resume()
    eventually(lambda: session.of_turns("received") == [True, False], "it goes on without its client, and is recorded")
    retried = session.chat(stream=stream)
    assert retried.status_code == 200 and session.of_turns("received") == [True, True]
    assert session.chat(stream=stream).content != retried.content and len(engine.samples) == 3
    session.check(engine.samples)


def test_an_answer_whose_client_leaves_while_it_is_stored_is_not_trained(
    session: Opened, engine: OracleEngine, monkeypatch: Patch
) -> None:
    commit, stored = RecordStore._commit, threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(RecordStore, "_commit", lambda *given: stored.wait(30.0) and commit(*given))
        with unanswered(session, engine):
            engine.resume()
            eventually(lambda: len(engine.samples) == 1, "it is sampled")
        stored.set()
        eventually(lambda: session.seen("turns") == 1, "it is recorded")
    session.say(messages=[{"role": "user", "content": "another question"}])
    assert [row["turns"] for row in session.check(engine.samples[1:])["rows"]] == [[0]]


def test_sampling_ends_some_time_after_its_client_left(
    session: Opened, engine: OracleEngine, monkeypatch: Patch
) -> None:
    with unanswered(session, engine):
        pass
    assert len(engine.active) == 1, "for 60 s"
    monkeypatch.setattr("atropos_verl.gateway.sessions._UNREAD_SECONDS", 0.0)
    for stream in (False, True):
        with unanswered(session, engine, max_tokens=9, stream=stream):
            assert len(engine.active) == 2
        eventually(lambda: len(engine.active) == 1, "nobody waits for the second")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(session.say)
        in_flight(session.client, 1)
        engine.resume()
        assert answer.result() and len(engine.samples) == 1
    session.check(engine.samples)


def test_a_mark_that_the_disk_refused_is_written_with_the_next_change(
    tmp_path: Path, engine: OracleEngine, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    commit = RecordStore._commit

    def refusing(self: RecordStore, changes: Any) -> Any:
        return full_disk() if all(change[0] == "answers" for change in changes) else commit(self, changes)

    with session_gateway(tmp_path, engine, TOKENIZER) as client:
        session = Opened(client)
        with unanswered(session, engine):
            pass
        with monkeypatch.context() as patch:
            patch.setattr(RecordStore, "_commit", refusing)
            engine.resume()
            eventually(lambda: "tried again with the next change" in caplog.text, "the mark is refused")
        open_session(client)
    with session_gateway(tmp_path, engine, TOKENIZER) as session.client:
        assert session.of_turns("received") == [False]
        session.say()
        assert len(engine.samples) == 1, "what no one saw before a restart is given to the retry"
        session.check(engine.samples)


def test_what_is_called_a_retry_gets_the_same_answer_again(session: Opened, engine: OracleEngine) -> None:
    for name, values in (("idempotency-key", "aab"), ("x-stainless-retry-count", "010")):
        first, again, new = (session.say(headers={name: value}) for value in values)
        assert first == again != new
    assert refusal(session.chat({"idempotency-key": "a"}, max_tokens=3)) == (409, "idempotency_conflict")
    assert len(engine.samples) == 4
    session.check(engine.samples)


def test_what_is_refused_or_fails_or_cannot_be_stored_leaves_nothing(
    session: Opened, engine: OracleEngine, monkeypatch: Patch
) -> None:
    assert session.chat(temperature="hot").status_code == 400
    engine.fail_with = RuntimeError("boom")
    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        for status, text in ((500, "internal_server_error"), (507, "the disk is full")):
            answers = [session.chat(stream=stream) for stream in (False, True)]
            assert answers[0].status_code == status
            assert all(answer.text.count(text) == 1 and "[DONE]" not in answer.text for answer in answers)
            engine.fail_with = None
            patch.setattr(RecordStore, "_commit", full_disk)
        assert session.post("reward", reward=1.0).status_code == 507
        opening: Any = {"json": {"group": "g"}, "headers": {"idempotency-key": "k"}}
        opened = [pool.submit(session.client.post, "/sessions", **opening) for _ in range(2)]
        assert [answer.result().status_code for answer in opened] == [507, 507]
    assert [session.seen(field) for field in ("requests", "turns", "state")] == [0, 0, "open"]
    engine.samples.clear()
    session.say()
    session.check(engine.samples)


def test_a_restarted_gateway_knows_its_sessions(tmp_path: Path, engine: OracleEngine) -> None:
    body, key = {"group": "g", "size": 8, "task": "t", "metadata": {"a": 1}}, {"idempotency-key": "k"}
    with session_gateway(tmp_path, engine, TOKENIZER) as client:
        session, ended = Opened(client), Opened(client)
        opened = client.post("/sessions", json=body, headers=key).json()
        ended.say()
        rollout = ended.check(engine.samples)
        keyed = session.chat(key).json()
        tree = session.seen()
    with session_gateway(tmp_path, engine, TOKENIZER) as client:
        session.client = client
        assert client.get(f"{ended.path}/rollout").json() == rollout
        known = client.post("/sessions", json=body, headers=key).json()
        assert known["api_key"] == opened["api_key"] and opened.items() >= body.items()
        assert refusal(client.post("/sessions", json={"group": "h"}, headers=key)) == (409, "idempotency_conflict")
        assert session.seen() == tree
        again = session.chat(key).json()
        assert (again["id"], again["choices"]) == (keyed["id"], keyed["choices"])
        session.say(messages=[*ASK["messages"], keyed["choices"][0]["message"], *ASK["messages"]])
        assert session.of_turns("parent") == [None, 0]
        session.check(engine.samples[1:])


@pytest.mark.parametrize("value", [b"\xc1", msgspec.msgpack.encode({"id": "a"}), b"\xa1\xff", b"\x91" * 9000, None])
def test_a_record_that_cannot_be_read_is_left_out_and_the_others_are_kept(
    tmp_path: Path, engine: OracleEngine, caplog: pytest.LogCaptureFixture, value: bytes | None
) -> None:
    with session_gateway(tmp_path, engine, TOKENIZER) as client:
        other, broken, lost = Opened(client), Opened(client), Opened(client)
        for one in (other, broken, broken, lost):
            one.say()
    records = RecordStore(tmp_path / "sessions.sqlite", dict.fromkeys(("sessions", "turns", "answers"), int), owner="t")
    records.write([("turns", 1 << 20, value), ("sessions", 2, value or b"")]).result()
    records.close()
    with session_gateway(tmp_path, engine, TOKENIZER) as client:
        other.client = broken.client = client
        assert "session number 2" in caplog.text
        assert refusal(client.get(lost.path)) == (404, "unknown_session")
        assert broken.seen("state") == "aborted"
        assert ("turn 0 is missing" in broken.seen("reason")) == (value is None)
        assert len(rollout_of(client, other.known)["rows"]) == 1
        new = Opened(client)
        new.say()
        assert new.seen("turns") == 1, "its number is new"


def test_a_reward_is_set_once(session: Opened) -> None:
    for _ in range(2):
        session.say()
    rollout = f"{session.path}/rollout"
    assert refusal(session.client.get(rollout)) == (409, "session_open")
    assert session.post("reward", reward=0.1, finished=False).json()["state"] == "open"
    final = {"reward": 1.0, "per_turn": [0.5, -1], "info": {"why": "because"}}
    first = session.post("reward", **final).json()
    assert (first["state"], first["turns"], first["per_turn"]) == ("finished", 2, [0.5, -1.0])
    assert session.post("reward", **final).json() == first
    assert refusal(session.post("reward", reward=0.0)) == (409, "already_finished")
    assert refusal(session.post("abort")) == (409, "already_finished")
    assert refusal(session.chat()) == (410, "session_ended")
    assert session.client.get(rollout).json().items() >= {**final, "turns": 2}.items()
    assert session.of_turns("turn") == [0, 1]


def test_an_abort_ends_what_is_being_sampled(session: Opened, engine: OracleEngine) -> None:
    engine.pause()
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(session.chat, stream=stream) for stream in (False, True)]
        eventually(lambda: len(engine.active) == 2, "both run")
        for _ in range(2):
            answer = session.post("abort", reason="it was stuck").json()
            assert (answer["state"], answer["reason"]) == ("aborted", "it was stuck")
        assert all("it was stuck" in answer.result().text for answer in answers)
    eventually(lambda: not engine.active, "the slots to be free")
    assert refusal(session.client.get(f"{session.path}/rollout")) == (409, "session_aborted")
    assert refusal(session.post("reward", reward=1.0)) == (410, "session_ended")
    for given, reason in (("", None), ("x" * 9000, "x" * 500)):
        assert Opened(session.client).post("abort", reason=given).json()["reason"] == reason


def test_a_session_without_a_reward_ends_at_its_ttl_and_is_counted(client: httpx.Client) -> None:
    session, other = Opened(client, ttl=0.2), Opened(client)
    other.say()
    eventually(lambda: session.seen("state") == "expired", "its ttl ends")
    assert refusal(session.chat()) == (410, "session_ended")
    figures = client.get("/metrics").text
    assert "atropos_verl_gateway_sessions_expired_total 1.0" in figures
    assert "atropos_verl_gateway_sessions_open 1.0" in figures and "session_turns_total 1.0" in figures


def test_bad_bodies_are_refused_by_their_field(session: Opened, monkeypatch: Patch) -> None:
    post = session.client.post
    refused: dict[str, Any] = {"group": [None, "", "g" * 300, 5], "ttl": [0, 10**9], "metadata": [[1]], "task": [5]}
    refused |= {"size": [0], "other": [0]}
    rewards: dict[str, Any] = {"reward": [None, "1"], "per_turn": [[1], [1, True]], "info": [[1]], "x": [1]}
    for path, good, fields in (
        ("/sessions", {"group": "g"}, refused),
        (f"{session.path}/reward", {"reward": 1}, rewards),
    ):
        for field, values in fields.items():
            for value in values:
                assert refusal(post(path, json={**good, field: value})) == (400, field), value
        for content in (b"[1]", b"{", b'{"gro\xb4up": "g"}', b'{"group": "g", "metadata": {"a": 1%s}}' % (b"0" * 30)):
            assert post(path, content=content).status_code == 400, content
        assert refusal(post(path, json={})) == (400, next(iter(good)))
        assert post(path, json={**good, "info": "x" * 40_000}).status_code == 413
    monkeypatch.setattr("atropos_verl.gateway.app.summary_of", lambda session: 1 / 0)
    answer = post("/sessions", json={"group": "g"})
    assert answer.status_code == 500 and "ZeroDivisionError" in answer.json()["error"]["message"]


def test_the_numbers_of_sessions_and_turns_are_bounded(
    session: Opened, engine: OracleEngine, monkeypatch: Patch
) -> None:
    for name, value in (("_MAX_OPEN", 2), ("_MAX_TURNS", 3), ("_MAX_ENDED", 1), ("_TURN_BITS", 2)):
        monkeypatch.setattr(f"atropos_verl.gateway.sessions.{name}", value)
    client, other = session.client, Opened(session.client)
    assert refusal(client.post("/sessions", json={"group": "g"})) == (429, "too_many_sessions")
    for _ in range(3):
        session.say()
    assert refusal(session.chat()) == (403, "session_limit")
    assert refusal(other.chat(n=5)) == (403, "session_limit"), "its keys are those of the next session"
    other.say(n=4)
    session.check(engine.samples[:3])
    other.check(engine.samples[-4:])
    assert client.get(session.path).status_code == 404, "the oldest ended one is forgotten"


def test_the_rows_of_a_rollout_are_bounded(session: Opened, engine: OracleEngine, monkeypatch: Patch) -> None:
    session.say()
    [turn] = session.seen()
    most = 3 * turn["prompt_tokens"] + turn["completion_tokens"]
    monkeypatch.setattr("atropos_verl.gateway.sessions._MAX_ROW_TOKENS", most)
    assert refusal(session.chat(n=2)) == (403, "session_limit")
    assert len(engine.samples) == 1, "refused before it is sampled"
    session.say()
    assert refusal(session.chat()) == (403, "session_limit")
    assert len(engine.samples) == 2, "refused before it is sampled"
    session.check(engine.samples)


def test_a_session_key_opens_its_own_session_only(session: Opened) -> None:
    client, other, key = session.client, Opened(session.client), session.known["api_key"]

    def status(method: str, path: str, headers: dict[str, str] = session.key) -> int:
        return client.request(method, path, headers=headers, json=ASK).status_code

    for path in (CHAT, session.url):
        assert status("POST", path) == 200
        assert status("POST", path, {"authorization": "", "x-api-key": key}) == 200
        for wrong in (key + "x", key[:-1], f"sess-{session.known['id']}-", "sess-", "sess--", "x"):
            assert status("POST", path, {"authorization": f"Bearer {wrong}"}) == 401, wrong
    for path in ("/v1/models", session.url.replace(CHAT, "/v1/models"), session.path):
        assert status("GET", path) == 200
    for path in (other.url, f"{other.path}/reward", "/sessions", "/generate"):
        assert status("POST", path) == 403, path
    for path in (other.path, f"{session.path}x", "/metrics"):
        assert status("GET", path) == 403, path
    assert status("POST", session.url.replace(CHAT, "/generate")) == 404
    turns = session.seen("turns")
    assert status("POST", CHAT, {}) == 200, "the gateway's key, without a session"
    assert status("POST", session.url, {}) == 200, "the gateway's key, in a session"
    assert session.seen("turns") == turns + 1


def test_without_a_gateway_key_the_address_is_enough(tmp_path: Path, engine: OracleEngine) -> None:
    with session_gateway(tmp_path, engine, TOKENIZER, key=None) as client:
        client.headers["authorization"] = "Bearer anything"
        own, other = Opened(client), Opened(client)
        assert client.post(own.url, json=ASK).status_code == 200
        assert own.seen("turns") == 1
        assert client.post(own.url, json=ASK, headers=other.key).status_code == 403
        with pytest.raises(StorageInUseError, match="gateway's sessions"):
            SessionStore(tmp_path)


def test_a_session_of_an_evaluation_waits_for_the_pinned_version(tmp_path: Path, engine: OracleEngine) -> None:
    pinned = PinnedEngine(engine)
    with session_gateway(tmp_path, engine, TOKENIZER, evaluated=pinned) as client, ThreadPoolExecutor(2) as pool:
        session = Opened(client, group=f"{EVALUATION_GROUP}1")
        by_key = pool.submit(session.chat)
        by_url = pool.submit(client.post, session.url, json={**ASK, "seed": 1})
        eventually(lambda: pinned.gate.waiting == 2, "the requests to arrive")
        assert not engine.requests
        pinned.pin()
        assert [answer.result(10.0).status_code for answer in (by_key, by_url)] == [200, 200]
        assert Opened(client).say().startswith("answer"), "others do not wait"


def test_of_a_constrained_turn_the_tokens_are_trained_that_were_chosen_among_several() -> None:
    empty = dict.fromkeys(StoredTurn.__struct_fields__, 0) | {"parent": None, "request": "r", "digest": b"d"}
    made = empty | {"prompt": np.array([5, 6], "<i4").tobytes(), "sampled": np.array([7, 8, 9, 2], "<i4").tobytes()}
    made |= {"logprobs": np.array([0.0, -0.5, 0.0, -2.0], "<f4").tobytes(), "runs": ((3, 4),)}
    for constrained, masks, logprobs in (
        (True, [-100, -100, -100, 8, -100, 2], [1.0] * 6),
        (False, [-100, -100, 7, 8, 9, 2], [1.0, 1.0, 0.0, -0.5, 0.0, -2.0]),
    ):
        (row,) = training_rows([StoredTurn(**made | {"constrained": constrained})], [1])
        assert (row["masks"], row["logprobs"], row["spans"]) == (masks, logprobs, [[2, 6]])
