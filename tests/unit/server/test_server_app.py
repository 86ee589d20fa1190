"""Every route over ASGI: status words, bounds, tokens, origins, encodings, figures."""

import asyncio
import contextlib
import gzip
import json
import logging
import zlib
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest
from atroposlib.api.server import RegisterEnv
from starlette.requests import Request
from support.trajectory_server import Clock, group, registration, turns

from atropos_verl.errors import StorageWriteError
from atropos_verl.http_thread import environment_token
from atropos_verl.protocol.schema import Refusal, SlowPathError
from atropos_verl.protocol.wire import MEDIA_TYPE, decode_batch
from atropos_verl.server import app as server_app
from atropos_verl.server import bodies, body_checker
from atropos_verl.server.app import FEATURES, TrajectoryApi
from atropos_verl.server.bodies import Connection, StatusBarrier
from atropos_verl.server.settings import ServerSettings
from atropos_verl.storage import RecordStore

Patch = pytest.MonkeyPatch
HELLO = {"max_token_length": 64, "desired_name": "words", "weight": 1.0, "group_size": 4}
RAW = json.dumps(group(1, 8)).encode()
PACKED = {"Accept": MEDIA_TYPE}
A_MINUTE = {"X-Atropos-Wait": "60"}


class Api(httpx.AsyncClient):
    """A client of an API of its own, or of ``app``."""

    def __init__(self, app: TrajectoryApi | None = None, port: int = 5, **settings: Any) -> None:
        self.app = app or TrajectoryApi(ServerSettings(**settings), now=Clock())
        transport = httpx.ASGITransport(app=self.app, client=("127.0.0.1", port))  # type: ignore[arg-type]
        super().__init__(transport=transport, base_url="http://localhost")

    async def __aexit__(self, *how: Any) -> None:
        await super().__aexit__(*how)
        self.app.checker.close()
        self.app.store.close()

    async def start(self, batch_size: int = 8, **fields: Any) -> None:
        """Register a trainer and environment 0."""
        await self.tell("/register", registration(batch_size, **fields))
        assert await self.ask("/batch") == {"batch": None}
        assert (await self.tell("/register-env", HELLO))["env_id"] == 0

    async def ask(self, path: str, **headers: str) -> Any:
        return (await self.get(path, headers=headers)).json()

    async def tell(self, path: str, body: Any) -> Any:
        return (await self.post(path, json=body)).json()

    async def give(self, *groups: Any) -> None:
        for made in groups:
            assert (await self.post("/scored_data", json=made)).status_code == 200


async def begun(action: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    task = asyncio.create_task(action)
    await turns()
    return task


@pytest.fixture
async def fresh() -> AsyncIterator[Api]:
    async with Api() as api:
        yield api


@pytest.fixture
async def api(fresh: Api) -> Api:
    await fresh.start()
    return fresh


async def test_before_anybody_registered_and_an_early_group_does_not_brick_it(fresh: Api) -> None:
    assert await fresh.ask("/") == {"message": "AtroposLib API"}
    assert await fresh.ask("/health") == {"status": "ok"}
    assert await fresh.ask("/info") == {"batch_size": -1, "max_token_len": -1}
    assert await fresh.ask("/wandb_info") == {"group": None, "project": None}
    status = await fresh.ask("/status")
    assert (status["current_step"], status["queue_size"]) == (0, 0)
    message = "Trainer not registered. Call /register first."
    assert await fresh.ask("/batch") == {"status": "error", "message": message, "batch": []}
    names = "tokens masks scores advantages ref_logprobs generation_params inference_logprobs messages images"
    assert await fresh.ask("/latest_example") == {name: [] for name in names.split()}
    assert await fresh.tell("/register-env", HELLO) == {"status": "wait for trainer to start"}
    assert await fresh.tell("/scored_data", group(1, 8)) == {"status": "received"}
    answer = await fresh.tell("/register", registration(8, starting_step=3))
    assert isinstance(answer["uuid"], int) and answer["uuid"] < 2**63
    assert await fresh.ask("/info") == {"batch_size": 8, "max_token_len": 64}
    batch = await fresh.get("/batch")
    assert (batch.headers["x-atropos-step"], batch.headers["x-atropos-delivery"]) == ("4", "1")
    # Upstream's trainers read the keys of what is absent, too.
    [made], absent = batch.json()["batch"], {*names.split()[3:], "overrides", "group_overrides"}
    assert {name: made[name] for name in absent} == dict.fromkeys(absent)
    assert made["tokens"] == group(1, 8)["tokens"]
    assert (await fresh.ask("/status"))["current_step"] == 4


async def test_an_environment_registers_once_the_trainer_asked_for_a_batch(fresh: Api) -> None:
    await fresh.tell("/register", registration(8, starting_step=2))
    assert await fresh.tell("/register-env", HELLO) == {"status": "wait for trainer to start"}
    assert await fresh.ask("/batch") == {"batch": None}
    assert await fresh.tell("/register-env", HELLO) == {
        "status": "success",
        "env_id": 0,
        "wandb_name": "words_0",
        "checkpoint_dir": "/checkpoints",
        "starting_step": 2,
        "checkpoint_interval": 5,
        "num_steps": 1000,
        "features": list(FEATURES),
    }
    second = await fresh.tell("/register-env", {**HELLO, "desired_name": None})
    assert (second["env_id"], second["wandb_name"]) == (1, "env_0")
    assert (await fresh.tell("/register-env", HELLO))["wandb_name"] == "words_1"
    said = [await fresh.tell("/disconnect-env", {"env_id": env_id}) for env_id in (1, -1, 3)]
    assert [answer["status"] for answer in said] == ["success", "failure", "failure"]


@pytest.mark.parametrize(
    "fields",
    [
        {"weight": -1},
        {"weight": True, "group_size": "4", "max_token_length": 64.0},
        {"weight": "0.5", "min_batch_allocation": True},
        {"group_size": 0, "max_token_length": -5},
        {"group_size": -3, "weight": 0},
        {"min_batch_allocation": -0.5},
        {"min_batch_allocation": 1.5, "weight": 1e9},
    ],
)
async def test_what_upstream_takes_of_an_environment_is_taken(api: Api, fields: dict[str, Any]) -> None:
    RegisterEnv.model_validate({**HELLO, **fields})
    assert (await api.tell("/register-env", {**HELLO, **fields}))["status"] == "success"
    await api.give(group(1, 4, 1), group(2, 4, 1))
    for env_id in (0, 1):
        seen = await api.get("/status-env", params={"env_id": env_id})
        assert seen.status_code == 200 and 0.01 <= seen.json()["env_weight"] <= 1.0
    assert len((await api.ask("/batch"))["batch"]) == 2


GOOD = {"/register": registration(8), "/register-env": HELLO, "/batch/renew": {"lease_id": "x"}}


@pytest.mark.parametrize(
    ("path", "changes", "field"),
    [
        ("/register", {"batch_size": 2**17}, "batch_size"),
        ("/register", {"batch_size": 0}, "batch_size"),
        ("/register", {"batch_fill": "most"}, "batch_fill"),
        ("/register", {"max_token_len": 10**30}, "max_token_len"),
        ("/register", {"starting_step": -(2**63) - 1}, "starting_step"),
        ("/register", {"num_steps": 2**63}, "num_steps"),
        ("/register", {"vocab_size": 2**40}, "vocab_size"),
        ("/register", {"batch_fill_wait": "inf"}, "batch_fill_wait"),
        ("/register", {"batch_tail_wait": "nan"}, "batch_tail_wait"),
        ("/register-env", {"min_batch_allocation": "nan"}, "min_batch_allocation"),
        ("/register-env", {"weight": -1e308}, "weight"),
        ("/register-env", {"group_size": 10**30}, "group_size"),
        ("/disconnect-env", {"env_id": 10**30}, "env_id"),
        ("/batch/renew", {"seconds": 1e308}, "seconds"),
        *(("/batch", {"X-Atropos-Lease": wrong}, "X-Atropos-Lease") for wrong in ("0", "-1", "nan", "soon", "1e9")),
        *(("/batch", {"X-Atropos-Wait": wrong}, "X-Atropos-Wait") for wrong in ("-1", "nan", "soon", "61")),
    ],
)
async def test_every_number_is_bounded_at_the_door(api: Api, path: str, changes: Any, field: str) -> None:
    if path == "/batch":
        answer = await api.get(path, headers=changes)
    else:
        answer = await api.post(path, json={**GOOD.get(path, {}), **changes})
    assert answer.status_code == 422 and answer.json()["field"] == field, answer.text


async def test_idempotency_over_http(api: Api) -> None:
    body, key = [group(1, 4, 0), group(2, 4, 0)], {"Idempotency-Key": "a"}
    answers = [await api.post("/scored_data_list", json=body, headers=key) for _ in range(3)]
    assert [answer.json() for answer in answers] == [{"status": "received", "groups_processed": 2}] * 3
    assert (await api.post("/scored_data", json=body[0], headers=key)).status_code == 422
    assert await api.tell("/scored_data", body[0]) == {"status": "received", "duplicate": True}
    assert (await api.ask("/status"))["queue_size"] == 2
    long = {"Idempotency-Key": "k" * 256}
    assert (await api.post("/scored_data", json=group(3), headers=long)).status_code == 422


async def test_a_list_is_taken_whole_or_not_at_all_and_has_at_most_1000_groups(api: Api) -> None:
    answer = await api.tell("/scored_data_list", [group(1), {**group(2), "scores": [1.0]}])
    assert (answer["detail"][0]["loc"], answer["group"]) == (["body", 1, "scores"], 1)
    groups = [group(number, 1) for number in range(1001)]
    assert "send at most 1000 in one request" in (await api.tell("/scored_data_list", groups))["message"]
    assert (await api.ask("/status"))["queue_size"] == 0
    assert (await api.tell("/scored_data_list", groups[1:]))["groups_processed"] == 1000


async def test_the_registered_vocabulary_and_exact_batches_are_checked_at_the_door(fresh: Api) -> None:
    await fresh.start(8, vocab_size=109, batch_fill="exact")
    await fresh.give(group(108, 8))
    bad = await fresh.tell("/scored_data", {**group(1, 1), "tokens": [[109, 7, 100]]})
    assert (bad["field"], bad["sequence"], bad["index"], bad["value"]) == ("tokens", 0, 0, 109)
    assert (await fresh.tell("/scored_data", group(1, 9)))["reason"] == "too_large"


@pytest.mark.parametrize(
    ("bounds", "body", "encoding", "status", "said"),
    [
        ({}, b"not gzip", "gzip", 400, "payload"),
        ({}, gzip.compress(RAW)[:-9], "gzip", 400, "cut off"),
        ({}, gzip.compress(RAW[:9]) + gzip.compress(RAW[9:]), "gzip", 400, "follows"),
        ({}, b"", "gzip", 400, ""),
        ({}, RAW, "br", 415, "content-encoding 'br' is not supported; send gzip, or none"),
        ({"max_body_bytes": len(RAW) - 1}, RAW, "", 413, "max_body_bytes"),
        ({"max_inflated_bytes": len(RAW) - 1}, gzip.compress(RAW), "gzip", 413, "max_inflated_bytes"),
        ({"max_bytes_at_once": len(RAW) - 1}, RAW, "", 503, "max_bytes_at_once"),
        ({"max_queue_groups": 1}, b"[" + RAW + b"," + RAW + b"]", "", 429, "max_queue_groups is 1"),
    ],
)
@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_that_is_not_taken(
    bounds: Any, body: bytes, encoding: str, status: int, said: str, announced: bool
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 10):
            yield body[start : start + 10]

    async with Api(**bounds) as api:
        content, headers = body if announced else pieces(), {"Content-Encoding": encoding}
        path = "/scored_data_list" if status == 429 else "/scored_data"
        answer = await api.post(path, content=content, headers=headers)
        assert answer.status_code == status and said in answer.json()["detail"]
        assert answer.headers.get("retry-after") == ("1" if status in (429, 503) else None)
        assert answer.headers.get("connection") == (None if status == 429 else "close")
        assert (api.app.counters.bytes_held, api.app.store.groups) == (0, {})


async def test_a_body_without_groups_is_never_long(fresh: Api) -> None:
    assert (await fresh.post("/register-env", content=b" " * (2**20 + 1))).status_code == 413


async def test_compressed_bodies_are_counted_while_they_are_inflated(monkeypatch: Patch) -> None:
    held, hold = [], bodies._hold
    monkeypatch.setattr(bodies, "_hold", lambda *words: (held.append(words[1]), hold(*words)))
    async with Api(max_bytes_at_once=1_000_000) as api:
        bomb = gzip.compress(b" " * 50_000_000)
        answer = await api.post("/scored_data", content=bomb, headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 503 and "max_bytes_at_once" in answer.json()["detail"]
        assert sum(held) < 10_000_000 and api.app.counters.bytes_held == 0
        monkeypatch.setattr(bodies, "_INFLATED_AT_ONCE", 1)
        for encoding, body in (("x-gzip", gzip.compress(RAW)), ("deflate", zlib.compress(RAW))):
            await api.post("/scored_data", content=body, headers={"Content-Encoding": encoding})
        assert [group.raw for group in api.app.store.groups.values()] == [RAW] * 2


async def test_only_so_many_requests_wait_for_a_batch(api: Api, monkeypatch: Patch) -> None:
    monkeypatch.setattr(server_app, "_MAX_WAITING", 2)
    waiting = [await begun(api.get("/batch", headers=A_MINUTE)) for _ in range(2)]
    assert await api.ask("/batch", **A_MINUTE) == {"batch": None}
    await api.give(group(0))
    await turns()
    assert not any(task.done() for task in waiting)
    await api.give(group(1), group(2), group(3))
    assert [len((await task).json()["batch"]) for task in waiting] == [2, 2]
    assert await api.ask("/batch", **{"X-Atropos-Wait": "0.01"}) == {"batch": None}


async def test_a_batch_is_not_given_to_one_who_went_while_waiting(api: Api) -> None:
    waiting = await begun(api.get("/batch", headers={**A_MINUTE, "X-Atropos-Lease": "60"}))
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await api.give(group(1), group(2))
    assert len((await api.ask("/batch"))["batch"]) == 2


async def test_a_batch_whose_client_has_gone_before_the_answer_comes_back(api: Api) -> None:
    await api.give(group(1, 8))
    gone = AsyncMock(return_value={"type": "http.disconnect"})
    await api.app({"type": "http", "method": "GET", "path": "/batch", "headers": []}, gone, AsyncMock())
    assert len(api.app.store.returned) == 1 and not api.app.store.outstanding


async def test_a_batch_that_the_disk_refuses_is_not_sent(tmp_path: Path, monkeypatch: Patch) -> None:
    loop, parts_of = asyncio.get_running_loop(), server_app.batch_parts

    def slow(*words: Any, **options: Any) -> Any:
        with contextlib.suppress(StorageWriteError):  # as for another request meanwhile
            asyncio.run_coroutine_threadsafe(store.synced(), loop).result()
        return parts_of(*words, **options)

    async with Api(data_dir=tmp_path) as api:
        store = api.app.store
        await api.start(4)
        await api.give(group(0, 4, 0))
        with monkeypatch.context() as disk:
            disk.setattr(server_app, "batch_parts", slow)
            disk.setattr(RecordStore, "_commit", lambda self, changes: StorageWriteError("no space"))
            assert (await api.get("/batch", headers={"X-Atropos-Lease": "60"})).status_code == 507
        assert not store.outstanding and len(store.groups) == 1


@pytest.mark.parametrize(
    ("address", "accept", "policy", "length", "expected"),
    [
        ("10.0.0.1", "gzip, deflate", "auto", 1000, True),
        ("10.0.0.1", "gzip, deflate", "auto", 999, False),
        ("10.0.0.1", "gzip;q=0.0, identity", "auto", 1000, False),
        ("127.0.0.1", "gzip, deflate", "auto", 1000, False),
        ("127.0.0.1", "deflate, x-gzip ; q=0.5", "always", 1000, True),
        ("10.0.0.1", "gzip", "never", 1000, False),
        ("127.0.0.1", "zstd", "always", 1000, False),
    ],
)
def test_answers_are_compressed_where_it_pays(
    address: str, accept: str, policy: str, length: int, expected: bool
) -> None:
    headers = [(b"accept-encoding", accept.encode())]
    request = Request({"type": "http", "client": (address, 5), "headers": headers})
    assert bodies.is_compressed(policy, request, length) is expected


@pytest.fixture
def patient(monkeypatch: Patch) -> None:
    """Who waited for these seconds would not end."""
    monkeypatch.setattr(bodies, "PATIENCE", 1000.0)
    monkeypatch.setattr(bodies, "SETTLING", 0.0)


@pytest.mark.usefixtures("patient")
async def test_a_status_waits_until_the_answers_to_posts_were_read_and_holds_further_posts_back() -> None:
    barrier, posts, asking = StatusBarrier(), [Connection(), Connection()], Connection()
    for connection in posts:
        await barrier.before_accept(0)  # nobody has asked: at once
        barrier.accepted(0, connection)
    status = await begun(barrier.before_status(0, asking))
    further = await begun(barrier.before_accept(0))
    posts[0].done()
    await turns()
    assert not status.done()
    posts[1].done()
    await status  # it is answered now
    assert not further.done()
    await barrier.before_accept(1)  # another environment
    asking.done()  # the answer was read
    await further
    await barrier.before_accept(0)


@pytest.mark.usefixtures("patient")
async def test_what_waited_goes_on_a_moment_after_the_connection_ended(monkeypatch: Patch) -> None:
    monkeypatch.setattr(bodies, "SETTLING", 1000.0)
    sleep = AsyncMock()
    monkeypatch.setattr(asyncio, "sleep", sleep)
    barrier, post, asking = StatusBarrier(), Connection(), Connection()
    barrier.accepted(0, post)
    post.done()
    await barrier.before_status(0, asking)  # atroposlib may still count the group of this post
    asking.done()
    await barrier.before_accept(0)  # and may not have used the figures yet
    assert [0 < call.args[0] <= 1000.0 for call in sleep.await_args_list] == [True, True]


@pytest.mark.usefixtures("patient")
async def test_who_is_lost_unknown_or_reads_nothing_is_not_waited_for(monkeypatch: Patch) -> None:
    barrier, lost = StatusBarrier(), Connection()
    lost.lost = True
    for env_id, connection in ((0, lost), (0, None), (None, Connection())):
        barrier.accepted(env_id, connection)
        await barrier.before_accept(env_id)
    for asking in (lost, None, *(Connection() for _ in range(3))):
        await barrier.before_status(0, asking)
    await barrier.before_accept(0)  # more questions than one environment asks
    monkeypatch.setattr(bodies, "PATIENCE", 0.01)  # a client that keeps its connection
    barrier.accepted(1, Connection())
    await barrier.before_status(1, Connection())
    await barrier.before_accept(1)


@pytest.mark.usefixtures("patient")
async def test_a_reset_while_a_status_and_a_post_wait_for_each_other_refuses_both(api: Api) -> None:
    posting, asking, _ = (api.app.connections.setdefault(("127.0.0.1", port), Connection()) for port in (11, 12, 13))
    first, ask, late = (Api(api.app, port=port) for port in (11, 12, 13))
    await first.give(group(1, 4, 0))
    # Its answer was not read yet (its connection is idle), so the status waits, and further posts wait for that.
    status = await begun(ask.request("GET", "/status-env", json={"env_id": 0}))
    further = await begun(late.post("/scored_data", json=group(2, 4, 0)))
    assert not status.done() and not further.done()
    assert (await api.get("/reset_data")).status_code == 200
    for connection, waiting in ((posting, status), (asking, further)):
        connection.end(None)
        answer = await waiting
        assert answer.status_code == 422 and "POST /register-env first" in answer.text
    assert (await api.ask("/status"))["queue_size"] == 0


async def test_who_may_call() -> None:
    async with Api(token="T", allowed_hosts=("localhost",), cors_origins=("http://a.example",)) as api:
        for method, path in map(str.split, api.app.handlers):
            is_open = path in ("/", "/health")
            answer = await api.request(method, path, json={})
            assert answer.status_code == (200 if is_open else 401), path
            assert answer.headers.get("www-authenticate") == (None if is_open else "Bearer")
            foreign = await api.request(method, path, json={}, headers={"Origin": "http://b.example"}, auth=("", "T"))
            assert foreign.status_code == (200 if is_open else 403)
            assert (await api.request(method, path, headers={"Host": "evil.example"})).status_code == 403
            theirs = await api.request(method, path, json={}, auth=("run", environment_token("T")))
            assert theirs.status_code in ((403,) if path == "/reset_data" else (200, 404, 422))
            assert ("an environment's token does not allow" in theirs.text) is (path == "/reset_data")
            assert (await api.request(method, path, json={}, auth=("run", "T"))).status_code in (200, 404, 422)
        sent = {"Origin": "http://a.example", "Authorization": "Bearer T", "Access-Control-Request-Method": "POST"}
        answer = await api.get("/status", headers=sent)
        assert answer.headers["access-control-allow-origin"] == "http://a.example"
        assert (await api.options("/scored_data", headers=sent)).status_code == 200
        assert api.app.counters.refused.keys() >= {"forbidden", "unauthorized"}


async def test_unknown_paths_and_methods_and_the_destructive_get_that_can_be_switched_off() -> None:
    async with Api(allow_get_reset=False) as api:
        answers = [await api.get("/reset_data"), await api.delete("/batch")]
        assert [(answer.status_code, answer.headers["allow"]) for answer in answers] == [(405, "POST"), (405, "GET")]
        assert (await api.post("/reset_data")).status_code == 200
        assert (await api.get("/nothing")).status_code == 404


async def test_metrics_by_value_and_every_refusal_is_charged_to_its_environment(api: Api) -> None:
    good = json.dumps(group(1, 4, 0))
    await api.give(group(1, 4, 0), group(1, 4, 0))
    for body in (
        json.dumps({**group(1, 4, 0), "scores": []}),
        json.dumps({**group(1, 4, 0), "scores": ["a"] * 4}),
        json.dumps({**group(1, 4, 0), "overrides": "x"}),
        good.replace("[1, 7, 100]", "[NaN, 7, 100]", 1),
        good[:-1] + ',"x":"\ud800',
        "[" + good + "]",
        good[:-1],
    ):
        assert (await api.post("/scored_data", content=body.encode("utf-8", "replace"))).status_code == 422
    lines = (await api.get("/metrics")).text.splitlines()
    expected = [
        "atropos_queue_groups 1.0",
        "atropos_queue_sequences 4.0",
        "atropos_held_tokens 12.0",
        "atropos_groups_total 1.0",
        "atropos_duplicates_total 1.0",
        "atropos_environments_alive 1.0",
        'atropos_refused_total{reason="length"} 1.0',
        'atropos_env_groups_total{env_id="0",name="words_0"} 1.0',
        'atropos_env_refused_total{env_id="0",name="words_0"} 7.0',
        'atropos_env_duplicates_total{env_id="0",name="words_0"} 1.0',
        'atropos_requests_total{path="/scored_data",status="422"} 7.0',
        "# TYPE atropos_batches_total counter",
    ]
    assert [line for line in expected if line not in lines] == []


async def test_the_page_and_its_data(api: Api) -> None:
    html = await api.get("/", headers={"Accept": "text/html,application/xhtml+xml"})
    assert html.headers["content-type"].startswith("text/html")
    assert "http://" not in html.text.replace("http://www.w3.org/2000/svg", "") and "https://" not in html.text
    said = [[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "<b>4</b>"}]] * 4
    await api.give(group(1, 4, 0, messages=said))
    data = await api.ask("/page-data")
    assert (data["status"]["queue_size"], data["environments"][0]["state"]) == (1, "alive")
    [latest] = data["latest"]
    assert (latest["text"], latest["scores"]) == ("assistant: <b>4</b>", [0.0, 1.0, 2.0, 3.0])
    assert data["series"] == [[0, 1, 12, 0]]


async def test_control_characters_of_names_are_not_logged(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    evil = "a\n2026 ERROR \x1b[2J\u202e\x9b"
    caplog.set_level(logging.INFO)
    answer = await api.tell("/register-env", {**HELLO, "desired_name": evil + "n" * 9999})
    await api.tell("/register", registration(8, wandb_group=evil))
    await api.tell("/register", registration(8, batch_fill=evil))
    await api.tell("/batch/ack", {"lease_id": evil})
    await api.give(group(1, 4, 0, **{evil: 1}))
    await api.tell("/scored_data", {**group(1), "scores": [evil]})
    await api.post("/scored_data", json=group(1), headers={"Content-Encoding": "\x1b"})
    await api.ask("/batch", **{"X-Atropos-Lease": "\x1b"})
    assert answer["wandb_name"] == "a?2026 ERROR ?[2J??" + "n" * 181 + "_0"
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert "environment 1 registered: a?2026" in caplog.text and "which is no field of ScoredData" in caplog.text


async def test_refusals_and_unknown_fields_do_not_fill_the_log(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(10):
        long = f"{number}" + "x" * 15_000
        answer = await api.get("/batch", headers={"X-Atropos-Lease": long})
        assert answer.status_code == 422 and len(answer.text) < 1000
        await api.post("/scored_data", content=b"x", headers={"Content-Encoding": long})
        await api.tell("/scored_data", {**group(1, env_id=number), "scores": []})
        await api.give(group(number, 4, 0, seed=number, note="x"))
    said = [message for record in caplog.records if " refused: " in (message := record.getMessage())]
    # That of environment 0, and that of all who are none.
    assert [line.partition(" ")[0] for line in said] == ["/batch", "/scored_data", "/scored_data", "/scored_data"]
    assert max(map(len, said)) < 300
    unknown = [message for record in caplog.records if "no field" in (message := record.getMessage())]
    about = ", which is no field of ScoredData: it is not used"
    assert unknown == [f'environment 0 sends "{name}"{about}' for name in ("note", "seed")]


@pytest.fixture
def apart(monkeypatch: Patch) -> None:
    """Every body is checked in another process."""
    monkeypatch.setattr(body_checker, "LARGE", 0)
    monkeypatch.setattr(body_checker, "SLOW", 0)


async def test_a_large_body_is_checked_apart_with_the_same_outcome(monkeypatch: Patch) -> None:
    sent = [
        group(1, 4, 0, messages=[[{"role": "user", "content": "hej"}]] * 4, seed=1),
        {**group(2, 4, 0), "scores": [True, "2", 3, 4]},
        {**group(3, 4, 0), "scores": ["a"] * 4},
        {**group(4, 4, 0), "overrides": [{"a": [1] * 5000}, 0, {}, {}]},
        {**group(5, 4, 0), "tokens": [[1, 2]] * 4},
    ]
    seen: list[Any] = []
    for limit in (2**20, 0):
        monkeypatch.setattr(body_checker, "LARGE", limit)
        monkeypatch.setattr(body_checker, "SLOW", limit)
        async with Api() as api:
            await api.start()
            await api.get("/batch", headers=PACKED)  # packed ahead from now on
            answers = [await api.post("/scored_data", json=body) for body in sent]
            answers.append(await api.post("/scored_data_list", json=sent[:3]))
            answers.append(await api.get("/latest_example"))
            page = await api.ask("/page-data")
            await turns()  # what is packed ahead is packed
            packed = await api.get("/batch", headers=PACKED)
        assert [answer.status_code for answer in answers] == [200, 200, 422, 422, 422, 422, 200]
        shown = {name: page[name] for name in ("latest", "environments", "refused")}
        seen.append(([answer.json() for answer in answers], shown, packed.content))
    assert seen[0] == seen[1]


@pytest.mark.usefixtures("apart")
async def test_a_checker_that_was_killed_is_started_again(fresh: Api, monkeypatch: Patch) -> None:
    await fresh.give(group(1))
    assert fresh.app.checker.process is not None
    fresh.app.checker.process.kill()
    fresh.app.checker.process.wait()
    await fresh.give(group(2))
    monkeypatch.setattr(body_checker, "_TRIES", 0)
    answer = await fresh.post("/scored_data", json=group(3))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "checks large bodies was killed" in answer.json()["detail"]


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize(
    ("bound", "value", "said"),
    [("_MEMORY_BYTES", 64 << 20, "bytes of memory: send it"), ("_SECONDS", 0.0, "takes longer than 0 s")],
)
async def test_a_checker_has_a_bound_on_memory_and_on_time(
    fresh: Api, monkeypatch: Patch, bound: str, value: Any, said: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(body_checker, bound, value)
        answer = await fresh.post("/scored_data", json=group(1, images=["a"] * 3_000_000))
    assert answer.status_code == 422 and said in answer.json()["message"]
    process = fresh.app.checker.process
    await fresh.give(group(2))
    assert process is not None and process is not fresh.app.checker.process


RULES = body_checker.Rules(vocab_size=None, environments=0, strict=False, largest=None, packs=False)


@pytest.mark.usefixtures("apart")
async def test_a_check_that_is_cancelled_at_the_end_starts_no_further_process() -> None:
    checker = body_checker.BodyChecker()
    asking = asyncio.create_task(checker.check(RAW, False, RULES))
    while checker.process is None:  # noqa: ASYNC110 - set in another thread
        await asyncio.sleep(0.001)
    first = checker.process
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    checker.close()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert checker.process is first and first.poll() is not None


@pytest.mark.parametrize("part", ["[]", "{}", '"a"', "null"])
def test_a_body_of_many_parts_is_left_to_the_checker(part: str, monkeypatch: Patch) -> None:
    body = RAW[:-1] + f',"images":[{",".join([part] * 20_000)}]}}'.encode()
    with pytest.raises(SlowPathError):
        body_checker.check_body(body, False, RULES, quick=True)
    assert len(body_checker.check_body(body, False, RULES)) == 1
    monkeypatch.setattr(body_checker, "_MAX_BRACKETS", 10_000)
    if part in ("[]", "{}"):
        with pytest.raises(Refusal, match="send at most 10000 in one request"):
            body_checker.check_body(body, False, RULES)


@pytest.mark.usefixtures("apart")
async def test_a_group_checked_before_packed_batches_were_wanted(fresh: Api, monkeypatch: Patch) -> None:
    failures = list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    monkeypatch.setattr(server_app, "Rules", lambda **fields: body_checker.Rules(**{**fields, "packs": False}))
    await fresh.start(4)
    await fresh.get("/batch", headers=PACKED)  # after the check of the group had begun
    await fresh.give(group(1))
    await turns()
    assert len(decode_batch((await fresh.get("/batch", headers=PACKED)).content)) == 1
    assert failures == []
