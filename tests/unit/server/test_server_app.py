"""Every route over ASGI: status words, bounds, tokens, origins, encodings, figures."""

import asyncio
import contextlib
import gzip
import json
import logging
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from atroposlib.api.server import RegisterEnv
from support.trajectory_server import Clock, group, registration, turns

from atropos_verl.errors import StorageWriteError
from atropos_verl.http_thread import environment_token
from atropos_verl.protocol.schema import Refusal, SlowPathError
from atropos_verl.protocol.wire import MEDIA_TYPE, decode_batch
from atropos_verl.server import app as server_app
from atropos_verl.server import bodies, body_checker
from atropos_verl.server.app import FEATURES, TrajectoryApi
from atropos_verl.server.bodies import Connection
from atropos_verl.server.settings import ServerSettings
from atropos_verl.storage import RecordStore

HELLO = {"max_token_length": 64, "desired_name": "words", "weight": 1.0, "group_size": 4}


def client_of(app: TrajectoryApi, address: str = "127.0.0.1", port: int = 5) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, client=(address, port))  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


async def get(client: httpx.AsyncClient, path: str, **options: Any) -> Any:
    return (await client.get(path, **options)).json()


async def post(client: httpx.AsyncClient, path: str, body: Any) -> Any:
    return (await client.post(path, json=body)).json()


def routes_of(app: TrajectoryApi) -> list[tuple[str, str]]:
    return [(method, path) for method, path in map(str.split, app.handlers)]


@pytest.fixture
async def api() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(TrajectoryApi(ServerSettings(), now=Clock())) as client:
        yield client


async def started(client: httpx.AsyncClient, batch_size: int = 8, **fields: Any) -> int:
    """Register a trainer and an environment."""
    assert (await client.post("/register", json=registration(batch_size, **fields))).status_code == 200
    await client.get("/batch")
    answer = (await client.post("/register-env", json=HELLO)).json()
    assert answer["status"] == "success"
    return int(answer["env_id"])


async def test_a_request_for_a_batch_waits_for_it(api: httpx.AsyncClient) -> None:
    env_id = await started(api)
    waiting = asyncio.create_task(api.get("/batch", headers={"X-Atropos-Wait": "60"}))
    await turns()
    for tag in range(2):
        assert not waiting.done()
        await post(api, "/scored_data", group(tag, env_id=env_id))
    assert len((await waiting).json()["batch"]) == 2
    assert await get(api, "/batch", headers={"X-Atropos-Wait": "0.01"}) == {"batch": None}
    for wrong in ("-1", "nan", "61", "soon"):
        answer = await api.get("/batch", headers={"X-Atropos-Wait": wrong})
        assert answer.status_code == 422 and "X-Atropos-Wait" in answer.text


async def test_a_batch_that_the_disk_refuses_is_not_sent_whoever_hears_of_it_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, parts_of = asyncio.get_running_loop(), server_app.batch_parts
    app = TrajectoryApi(ServerSettings(data_dir=tmp_path), now=Clock())

    def slow(*words: Any, **options: Any) -> Any:
        with contextlib.suppress(StorageWriteError):  # as for another request meanwhile
            asyncio.run_coroutine_threadsafe(app.store.synced(), loop).result()
        return parts_of(*words, **options)

    async with client_of(app) as client:
        env_id = await started(client, 4)
        await post(client, "/scored_data", group(0, env_id=env_id))
        with monkeypatch.context() as disk:
            disk.setattr(server_app, "batch_parts", slow)
            disk.setattr(RecordStore, "_commit", lambda self, changes: StorageWriteError("no space"))
            assert (await client.get("/batch", headers={"X-Atropos-Lease": "60"})).status_code == 507
        assert not app.store.outstanding and len(app.store.groups) == 1
    app.store.close()


async def test_a_batch_is_not_given_to_one_who_went_while_waiting(api: httpx.AsyncClient) -> None:
    env_id = await started(api)
    waiting = asyncio.create_task(api.get("/batch", headers={"X-Atropos-Wait": "60", "X-Atropos-Lease": "60"}))
    await turns()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    for tag in range(2):
        await post(api, "/scored_data", group(tag, env_id=env_id))
    assert len((await get(api, "/batch"))["batch"]) == 2


async def test_before_anybody_registered(api: httpx.AsyncClient) -> None:
    assert await get(api, "/") == {"message": "AtroposLib API"}
    assert await get(api, "/info") == {"batch_size": -1, "max_token_len": -1}
    assert await get(api, "/wandb_info") == {"group": None, "project": None}
    status = await get(api, "/status")
    assert (status["current_step"], status["queue_size"]) == (0, 0)
    batch = await get(api, "/batch")
    assert batch == {"status": "error", "message": "Trainer not registered. Call /register first.", "batch": []}
    latest = await get(api, "/latest_example")
    assert latest["tokens"] == [] and latest["images"] == []
    assert await post(api, "/register-env", HELLO) == {"status": "wait for trainer to start"}


async def test_an_early_group_does_not_brick_it(api: httpx.AsyncClient) -> None:
    assert await post(api, "/scored_data", group(1, 8)) == {"status": "received"}
    answer = await post(api, "/register", registration(8, starting_step=3))
    assert isinstance(answer["uuid"], int) and answer["uuid"] < 2**63
    assert await get(api, "/info") == {"batch_size": 8, "max_token_len": 64}
    (made,) = (await get(api, "/batch"))["batch"]
    assert made["tokens"] == group(1, 8)["tokens"]
    # Upstream's trainers read these keys, too.
    expected = "advantages ref_logprobs messages generation_params inference_logprobs overrides group_overrides images"
    assert all(made[name] is None for name in expected.split())
    assert (await get(api, "/status"))["current_step"] == 4


async def test_an_environment_registers_once_the_trainer_asked_for_a_batch(api: httpx.AsyncClient) -> None:
    await api.post("/register", json=registration(8, starting_step=2))
    assert (await post(api, "/register-env", HELLO))["status"] == "wait for trainer to start"
    assert await get(api, "/batch") == {"batch": None}
    assert await post(api, "/register-env", HELLO) == {
        "status": "success",
        "env_id": 0,
        "wandb_name": "words_0",
        "checkpoint_dir": "/checkpoints",
        "starting_step": 2,
        "checkpoint_interval": 5,
        "num_steps": 1000,
        "features": list(FEATURES),
    }
    second = await post(api, "/register-env", {**HELLO, "desired_name": None})
    assert (second["env_id"], second["wandb_name"]) == (1, "env_0")
    assert (await post(api, "/register-env", HELLO))["wandb_name"] == "words_1"
    assert await post(api, "/disconnect-env", {"env_id": 1}) == {"status": "success"}
    for env_id in (-1, 3):
        assert (await post(api, "/disconnect-env", {"env_id": env_id}))["status"] == "failure"


async def test_status_env(api: httpx.AsyncClient) -> None:
    env_id = await started(api)
    await api.post("/scored_data", json=group(1, 4, env_id=env_id))
    for answer in (
        await api.request("GET", "/status-env", json={"env_id": env_id}),
        await api.get("/status-env", params={"env_id": env_id}),
    ):
        assert (answer.json()["queue_size"], answer.json()["env_weight"]) == (1, 1.0)
    assert (await api.request("GET", "/status-env", json={"env_id": 9})).status_code == 422


async def test_lease_and_ack(api: httpx.AsyncClient) -> None:
    await started(api)
    await api.post("/scored_data", json=group(1, 8))
    answer = await api.get("/batch", headers={"X-Atropos-Lease": "60"})
    lease = answer.headers["x-atropos-lease-id"]
    assert (answer.headers["x-atropos-step"], answer.headers["x-atropos-delivery"]) == ("1", "1")
    assert (await get(api, "/status"))["open_leases"] == 1
    assert (await post(api, "/batch/renew", {"lease_id": lease, "seconds": 5}))["status"] == "success"
    assert (await post(api, "/batch/release", {"lease_id": lease}))["status"] == "success"
    assert (await post(api, "/batch/ack", {"lease_id": lease}))["ack"] == "late"
    assert (await post(api, "/batch/ack", {"lease_id": lease}))["ack"] == "already"
    unknown = await api.post("/batch/ack", json={"lease_id": "?"})
    assert unknown.status_code == 404 and "was the server reset" in unknown.json()["detail"]
    for seconds in ("0", "-1", "nan", "soon", "1e9"):
        assert (await api.get("/batch", headers={"X-Atropos-Lease": seconds})).status_code == 422


async def test_idempotency_over_http(api: httpx.AsyncClient) -> None:
    env_id = await started(api)
    body = [group(1, 4, env_id=env_id), group(2, 4, env_id=env_id)]
    answers = [await api.post("/scored_data_list", json=body, headers={"Idempotency-Key": "a"}) for _ in range(3)]
    assert [answer.json() for answer in answers] == [{"status": "received", "groups_processed": 2}] * 3
    other = await api.post("/scored_data", json=body[0], headers={"Idempotency-Key": "a"})
    assert other.status_code == 422
    assert await post(api, "/scored_data", body[0]) == {"status": "received", "duplicate": True}
    assert (await get(api, "/status"))["queue_size"] == 2
    assert (await api.post("/scored_data", json=group(3), headers={"Idempotency-Key": "k" * 256})).status_code == 422


async def test_a_request_has_at_most_1000_groups(api: httpx.AsyncClient) -> None:
    await started(api)
    assert (await api.post("/scored_data_list", json=[group(n, 1) for n in range(1000)])).status_code == 200
    answer = await api.post("/scored_data_list", json=[group(n, 1) for n in range(1001)])
    assert answer.status_code == 422 and "send at most 1000 in one request" in answer.json()["message"]


async def test_a_list_is_taken_whole_or_not_at_all(api: httpx.AsyncClient) -> None:
    await started(api)
    bad = {**group(2), "scores": [1.0]}
    answer = await api.post("/scored_data_list", json=[group(1), bad])
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", 1, "scores"]
    assert answer.json()["group"] == 1
    assert (await get(api, "/status"))["queue_size"] == 0


async def test_the_registered_vocabulary_and_exact_batches_are_checked_at_the_door(api: httpx.AsyncClient) -> None:
    await started(api, 8, vocab_size=150, batch_fill="exact")
    good = await api.post("/scored_data", json=group(1, 8))
    assert good.status_code == 200
    bad = await post(api, "/scored_data", {**group(1, 1), "tokens": [[150, 7, 100]]})
    assert (bad["field"], bad["sequence"], bad["index"], bad["value"]) == ("tokens", 0, 0, 150)
    assert (await post(api, "/scored_data", group(1, 9)))["reason"] == "too_large"


async def test_the_packed_wire_is_negotiated(api: httpx.AsyncClient) -> None:
    await started(api)
    for number in (1, 2, 3):
        await api.post("/scored_data", json=group(number, 8))
    first = await api.get("/batch", headers={"Accept": f"{MEDIA_TYPE}, application/json"})
    assert first.headers["content-type"] == MEDIA_TYPE
    assert decode_batch(first.content)[0].token_ids[0].tolist() == [1, 7, 100]
    second = await api.get("/batch", headers={"Accept": "*/*"})
    assert second.headers["content-type"] == "application/json"
    assert second.json()["batch"][0]["tokens"][0] == [2, 7, 100]
    await api.post("/scored_data", json=group(4, 8))  # packed as it comes, now that somebody takes it
    await api.get("/batch")
    third = await api.get("/batch", headers={"Accept": MEDIA_TYPE})
    assert decode_batch(third.content)[0].token_ids[0].tolist() == [4, 7, 100]


async def test_a_batch_whose_client_has_gone_before_the_answer_comes_back() -> None:
    app = TrajectoryApi(ServerSettings(), now=Clock())
    async with client_of(app) as api:
        await started(api)
        await api.post("/scored_data", json=group(1, 8))

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        pass

    await app({"type": "http", "method": "GET", "path": "/batch", "headers": []}, receive, send)
    assert len(app.store.returned) == 1 and not app.store.outstanding


async def test_full_means_429_with_retry_after() -> None:
    async with client_of(TrajectoryApi(ServerSettings(max_queue_groups=1))) as api:
        await started(api)
        await api.post("/scored_data", json=group(1))
        answer = await api.post("/scored_data", json=group(2))
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert "max_queue_groups is 1" in answer.json()["detail"]
        assert 'atropos_refused_total{reason="queue_full"} 1.0' in (await api.get("/metrics")).text


async def test_compressed_bodies(api: httpx.AsyncClient) -> None:
    raw = json.dumps(group(1, 8)).encode()
    half = len(raw) // 2
    two_members = gzip.compress(raw[:half]) + gzip.compress(raw[half:])
    for body, encoding in ((gzip.compress(raw), "gzip"), (zlib.compress(raw), "deflate")):
        answer = await api.post("/scored_data", content=body, headers={"Content-Encoding": encoding})
        assert answer.status_code == 200
    for body, said in (
        (b"not gzip", "payload"),
        (gzip.compress(raw)[:-9], "cut off"),
        (two_members, "follows"),
        (b"", ""),
    ):
        answer = await api.post("/scored_data", content=body, headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 400 and said in answer.json()["detail"]
    assert (await api.post("/scored_data", content=raw, headers={"Content-Encoding": "br"})).status_code == 415
    assert (await get(api, "/status"))["queue_size"] == 2


async def test_bodies_are_bounded_before_and_after_inflating() -> None:
    limits = ServerSettings(max_body_bytes=20_000, max_inflated_bytes=100_000)
    async with client_of(TrajectoryApi(limits)) as api:
        too_long = await api.post("/scored_data", content=b" " * 20_001)
        assert too_long.status_code == 413 and "max_body_bytes" in too_long.json()["detail"]

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(30):
                yield b" " * 1000

        assert (await api.post("/scored_data", content=pieces())).status_code == 413
        bomb = gzip.compress(b" " * 10_000_000)
        assert len(bomb) < 20_000
        answer = await api.post("/scored_data", content=bomb, headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 413 and "max_inflated_bytes" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("address", "accept", "policy", "encoding"),
    [
        ("10.0.0.1", "gzip, deflate", "auto", "gzip"),
        ("10.0.0.1", "gzip;q=0, identity", "auto", None),
        ("127.0.0.1", "gzip, deflate", "auto", None),
        ("127.0.0.1", "gzip, deflate", "always", "gzip"),
        ("10.0.0.1", "gzip", "never", None),
        ("127.0.0.1", "zstd", "always", None),
    ],
)
async def test_answers_are_compressed_where_it_pays(
    address: str, accept: str, policy: str, encoding: str | None
) -> None:
    async with client_of(TrajectoryApi(ServerSettings(compression=policy)), address) as api:
        api.headers["Accept-Encoding"] = accept
        await started(api)
        await api.post("/scored_data", json=group(1, 200))
        answer = await api.get("/batch")
        assert answer.headers.get("content-encoding") == encoding
        assert answer.json()["batch"][0]["tokens"] == group(1, 200)["tokens"]
        assert "content-encoding" not in (await api.get("/info")).headers


async def test_a_token_is_demanded_on_every_data_route() -> None:
    app = TrajectoryApi(ServerSettings(token="secret"))
    async with client_of(app) as api:
        assert (await api.get("/")).status_code == 200
        assert await get(api, "/health") == {"status": "ok"}
        for method, path in routes_of(app):
            if path not in ("/", "/health"):
                answer = await api.request(method, path, json={})
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
        for wrong in ("Bearer secre", "Bearer \u00fc"):
            sent = {"Authorization": wrong.encode("utf-8")}
            assert (await api.get("/status", headers=sent)).status_code == 401
        assert (await api.get("/status", headers={"Authorization": "Bearer secret"})).status_code == 200
        # Atropos's own client can send a token only as the password in the URL.
        assert (await api.get("/status", auth=("atropos", "secret"))).status_code == 200


async def test_allowed_origins_and_hosts() -> None:
    async with client_of(TrajectoryApi(ServerSettings(cors_origins=("http://a.example",)))) as api:
        answer = await api.get("/status", headers={"Origin": "http://a.example"})
        assert answer.headers["access-control-allow-origin"] == "http://a.example"
        asked = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
        assert (await api.options("/scored_data", headers=asked)).status_code == 200
        assert (await api.get("/status", headers={"Origin": "http://b.example"})).status_code == 403
    async with client_of(TrajectoryApi(ServerSettings(allowed_hosts=("localhost",)))) as api:
        answers = [await api.get("/", headers={"Host": host}) for host in ("localhost:1", "evil.example")]
        assert [answer.status_code for answer in answers] == [200, 403]


async def test_unknown_paths_and_methods_and_the_destructive_get_that_can_be_switched_off() -> None:
    async with client_of(TrajectoryApi(ServerSettings(allow_get_reset=False))) as api:
        answers = [await api.get("/reset_data"), await api.delete("/batch")]
        assert [(answer.status_code, answer.headers["allow"]) for answer in answers] == [(405, "POST"), (405, "GET")]
        assert (await api.post("/reset_data")).status_code == 200
        assert (await api.get("/nothing")).status_code == 404


async def test_metrics_by_value(api: httpx.AsyncClient) -> None:
    env_id = await started(api)
    await api.post("/scored_data", json=group(1, 4, env_id=env_id))
    await api.post("/scored_data", json=group(1, 4, env_id=env_id))
    await api.post("/scored_data", json={**group(1, 4, env_id=env_id), "scores": []})
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
        'atropos_env_refused_total{env_id="0",name="words_0"} 1.0',
        'atropos_env_duplicates_total{env_id="0",name="words_0"} 1.0',
        'atropos_requests_total{path="/scored_data",status="422"} 1.0',
        "# TYPE atropos_batches_total counter",
    ]
    assert [line for line in expected if line not in lines] == []


async def test_the_page_and_its_data(api: httpx.AsyncClient) -> None:
    html = await api.get("/", headers={"Accept": "text/html,application/xhtml+xml"})
    assert html.headers["content-type"].startswith("text/html")
    assert "http://" not in html.text.replace("http://www.w3.org/2000/svg", "") and "https://" not in html.text
    env_id = await started(api)
    said = [[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "<b>4</b>"}]] * 4
    await api.post("/scored_data", json=group(1, 4, env_id=env_id, messages=said))
    data = await get(api, "/page-data")
    assert data["status"]["queue_size"] == 1
    assert data["environments"][0]["state"] == "alive"
    assert data["latest"][0]["text"] == "assistant: <b>4</b>"
    assert data["latest"][0]["scores"] == [0.0, 1.0, 2.0, 3.0]
    assert data["series"] == [[0, 1, 12, 0]]


@pytest.mark.parametrize(
    ("path", "changes", "field"),
    [
        ("/register", {"batch_size": 2**17}, "batch_size"),
        ("/register", {"batch_size": 0}, "batch_size"),
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
    ],
)
async def test_every_number_is_bounded_at_the_door(api: httpx.AsyncClient, path: str, changes: Any, field: str) -> None:
    good = {"/register": registration(8), "/register-env": HELLO, "/batch/renew": {"lease_id": "x"}}.get(path, {})
    answer = await api.post(path, json={**good, **changes})
    assert answer.status_code == 422 and answer.json()["field"] == field, answer.text


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
async def test_what_upstream_takes_of_an_environment_is_taken_and_batches_go_on(
    api: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    RegisterEnv.model_validate({**HELLO, **fields})
    await started(api)
    assert (await post(api, "/register-env", {**HELLO, **fields}))["status"] == "success"
    await api.post("/scored_data", json=group(1, 4, 1)), await api.post("/scored_data", json=group(2, 4, 1))
    for env_id in (0, 1):
        seen = await api.request("GET", "/status-env", json={"env_id": env_id})
        assert seen.status_code == 200 and 0.01 <= seen.json()["env_weight"] <= 1.0
    assert len((await get(api, "/batch"))["batch"]) == 2


async def test_control_characters_of_names_reach_neither_log_nor_terminal(
    api: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    evil = "a\n2026 ERROR \x1b[2J\u202e\x9b"
    with caplog.at_level(logging.INFO):
        await started(api)
        answer = await post(api, "/register-env", {**HELLO, "desired_name": evil + "n" * 9999})
        await api.post("/register", json=registration(8, wandb_group=evil))
        await api.post("/register", json=registration(8, batch_fill=evil))
        await api.post("/batch/ack", json={"lease_id": evil})
        await api.post("/scored_data", json=group(1, 4, 0, **{evil: 1}))
        await api.post("/scored_data", json={**group(1), "scores": [evil]})
        await api.post("/scored_data", json=group(1), headers={"Content-Encoding": "\x1b"})
        await api.get("/batch", headers={"X-Atropos-Lease": "\x1b"})
    assert answer["wandb_name"] == "a?2026 ERROR ?[2J??" + "n" * 181 + "_0"
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert "environment 1 registered: a?2026" in caplog.text and "which is no field of ScoredData" in caplog.text


async def test_every_refusal_is_charged_to_its_environment(api: httpx.AsyncClient) -> None:
    await started(api)
    good = json.dumps(group(1, 4, env_id=0))
    bodies = [
        json.dumps({**group(1, 4, env_id=0), "scores": ["a"] * 4}),
        json.dumps({**group(1, 4, env_id=0), "overrides": "x"}),
        good.replace("[1, 7, 100]", "[NaN, 7, 100]", 1),
        good[:-1] + ',"x":"\ud800',
        "[" + good + "]",
        good[:-1],
    ]
    for body in bodies:
        assert (await api.post("/scored_data", content=body.encode("utf-8", "replace"))).status_code == 422
    lines = (await api.get("/metrics")).text.splitlines()
    assert f'atropos_env_refused_total{{env_id="0",name="words_0"}} {len(bodies)}.0' in lines


async def test_unknown_fields_are_said_once_each(api: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    await started(api)
    for number in range(3):
        assert (await api.post("/scored_data", json=group(number, 4, 0, seed=number, note="x"))).status_code == 200
    said = [record.getMessage() for record in caplog.records if "no field" in record.getMessage()]
    assert said == [
        f'environment 0 sends "{name}", which is no field of ScoredData: it is not used' for name in ("note", "seed")
    ]


async def test_requests_together_hold_a_bounded_number_of_bytes() -> None:
    app = TrajectoryApi(ServerSettings(max_bytes_at_once=1000))
    async with client_of(app) as api:
        answer = await api.post("/scored_data", content=b" " * 1001)
        assert answer.status_code == 503 and "max_bytes_at_once" in answer.json()["detail"]
        assert app.counters.bytes_held == 0
        assert (await api.post("/scored_data", json=group(1))).status_code == 200
        assert app.counters.bytes_held == 0
        long = await api.post("/register-env", content=b" " * (2**20 + 1))
        assert long.status_code == 413


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain", "Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost"}, 200),
    ],
)
async def test_no_page_of_another_site_takes_or_changes_anything(
    api: httpx.AsyncClient, headers: dict[str, str], status: int
) -> None:
    await started(api)
    await api.post("/scored_data", json=group(1, 8))
    before = (await api.get("/status")).text
    for method, path in (
        ("POST", "/scored_data"),
        ("GET", "/latest_example"),
        ("GET", "/batch"),
        ("GET", "/reset_data"),
    ):
        answer = await api.request(method, path, json=group(2, 8), headers=headers)
        assert answer.status_code == status, path
        assert status == 200 or "is not allowed" in answer.json()["detail"]
    assert ((await api.get("/status")).text == before) is (status == 403)


async def test_an_environments_token_allows_everything_but_to_forget() -> None:
    async with client_of(TrajectoryApi(ServerSettings(token="T"))) as api:
        theirs = ("run", environment_token("T"))
        assert (await api.get("/status", auth=theirs)).status_code == 200
        for method in ("GET", "POST"):
            answer = await api.request(method, "/reset_data", auth=theirs)
            assert answer.status_code == 403 and "the run's own one does" in answer.json()["detail"]
            assert (await api.request(method, "/reset_data", auth=("run", "T"))).status_code == 200


async def test_a_large_or_slow_body_is_checked_in_another_process_with_the_same_outcome(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bodies = [
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
        app = TrajectoryApi(ServerSettings(), now=Clock())
        async with client_of(app) as api:
            await started(api, 8)
            await api.get("/batch", headers={"Accept": MEDIA_TYPE})  # packed ahead from now on
            answers = [await api.post("/scored_data", json=body) for body in bodies]
            answers.append(await api.post("/scored_data_list", json=bodies[:3]))
            answers.append(await api.get("/latest_example"))
            page = await get(api, "/page-data")
            await turns()  # what is packed ahead is packed
            packed = await api.get("/batch", headers={"Accept": MEDIA_TYPE})
        assert [answer.status_code for answer in answers] == [200, 200, 422, 422, 422, 422, 200]
        shown = {name: page[name] for name in ("latest", "environments", "refused")}
        seen.append(([answer.json() for answer in answers], shown, packed.content))
        app.checker.close()
    assert seen[0] == seen[1]


async def test_a_checker_that_was_killed_is_started_again_and_one_that_dies_of_every_body_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(body_checker, "LARGE", 0)
    app = TrajectoryApi(ServerSettings())
    async with client_of(app) as api:
        assert (await api.post("/scored_data", json=group(1))).status_code == 200
        assert app.checker.process is not None
        app.checker.process.kill()
        app.checker.process.wait()
        assert (await api.post("/scored_data", json=group(2))).status_code == 200
        monkeypatch.setattr(body_checker, "_TRIES", 0)
        answer = await api.post("/scored_data", json=group(3))
        assert answer.status_code == 503 and "checks large bodies was killed" in answer.json()["detail"]
        assert answer.headers["retry-after"] == "1"
    app.checker.close()


async def test_a_checker_has_a_bound_on_memory_and_on_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_checker, "LARGE", 0)
    monkeypatch.setattr(body_checker, "_MEMORY_BYTES", 64 << 20)
    app = TrajectoryApi(ServerSettings())
    async with client_of(app) as api:
        answer = await api.post("/scored_data", json=group(1, images=["a"] * 3_000_000))
        assert answer.status_code == 422 and "bytes of memory: send it" in answer.json()["message"]
        assert app.checker.process is not None
        first = app.checker.process.pid
        assert (await api.post("/scored_data", json=group(2))).status_code == 200
        assert app.checker.process.pid != first
        first = app.checker.process.pid
        with monkeypatch.context() as patch:
            patch.setattr(body_checker, "_SECONDS", 0.0)
            answer = await api.post("/scored_data", content=json.dumps(group(3, images=["a"] * 1_000_000)))
        assert answer.status_code == 422 and "takes longer than 0 s" in answer.json()["message"]
        assert (await api.post("/scored_data", json=group(3))).status_code == 200
        assert app.checker.process.pid != first
    app.checker.close()


RULES = body_checker.Rules(vocab_size=None, environments=0, strict=False, largest=None, packs=False)


async def test_a_check_that_is_cancelled_at_the_end_starts_no_further_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_checker, "LARGE", 0)
    checker = body_checker.BodyChecker()
    asking = asyncio.create_task(checker.check(json.dumps(group(1)).encode(), False, RULES))
    while checker.process is None:  # noqa: ASYNC110 - set in another thread
        await asyncio.sleep(0.001)
    first = checker.process
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    checker.close()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert checker.process is first and first.poll() is not None


@pytest.mark.parametrize("part", ["[]", "{}", '"a"', "null"])
def test_a_body_of_many_parts_is_left_to_the_checker_and_one_of_too_many_refused(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps(group(1)).encode()[:-1] + f',"images":[{",".join([part] * 20_000)}]}}'.encode()
    with pytest.raises(SlowPathError):
        body_checker.check_body(body, False, RULES, quick=True)
    assert len(body_checker.check_body(body, False, RULES)) == 1
    monkeypatch.setattr(body_checker, "_MAX_BRACKETS", 10_000)
    if part in ("[]", "{}"):
        with pytest.raises(Refusal, match="send at most 10000 in one request"):
            body_checker.check_body(body, False, RULES)


async def test_a_group_that_was_checked_apart_before_packed_batches_were_asked_for_is_packed_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(body_checker, "LARGE", 0)
    app, failures = TrajectoryApi(ServerSettings()), list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    check = app.checker.check

    async def late(*question: Any) -> Any:
        examined = await check(*question)
        app.store.wants_packed = True  # as by a GET /batch meanwhile
        return examined

    monkeypatch.setattr(app.checker, "check", late)
    async with client_of(app) as api:
        await started(api, 4)
        await api.post("/scored_data", json=group(1))
        await turns()
        assert len(decode_batch((await api.get("/batch", headers={"Accept": MEDIA_TYPE})).content)) == 1
    app.checker.close()
    assert failures == []


async def test_inflated_bytes_are_counted_while_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    held, hold = [], bodies._hold
    monkeypatch.setattr(bodies, "_hold", lambda *words: (held.append(words[1]), hold(*words)))
    app = TrajectoryApi(ServerSettings(max_bytes_at_once=1_000_000))
    async with client_of(app) as api:
        bomb = gzip.compress(b" " * 50_000_000)
        answer = await api.post("/scored_data", content=bomb, headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 503 and "max_bytes_at_once" in answer.json()["detail"]
        assert sum(held) < 10_000_000 and app.counters.bytes_held == 0
        monkeypatch.setattr(bodies, "_INFLATED_AT_ONCE", 1)
        raw = gzip.compress(json.dumps(group(1)).encode())
        assert (await api.post("/scored_data", content=raw, headers={"Content-Encoding": "gzip"})).status_code == 200


async def test_refusals_do_not_fill_the_log(api: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    await started(api)
    for number in range(10):
        answer = await api.get("/batch", headers={"X-Atropos-Lease": f"{number}" + "x" * 15_000})
        assert answer.status_code == 422 and len(answer.text) < 1000
        sent = {"Content-Encoding": f"{number}" + "x" * 15_000}
        assert (await api.post("/scored_data", content=b"x", headers=sent)).status_code == 415
        await api.post("/scored_data", json={**group(1, env_id=number), "scores": []})
    said = [record.getMessage() for record in caplog.records if " refused: " in record.getMessage()]
    # That of environment 0, and that of all who are none.
    assert [line.partition(" ")[0] for line in said] == ["/batch", "/scored_data", "/scored_data", "/scored_data"]
    assert max(map(len, said)) < 300


async def test_only_so_many_requests_wait_for_a_batch(api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_app, "_MAX_WAITING", 2)
    await started(api)
    waiting = [asyncio.create_task(api.get("/batch", headers={"X-Atropos-Wait": "60"})) for _ in range(2)]
    await turns()
    assert await get(api, "/batch", headers={"X-Atropos-Wait": "60"}) == {"batch": None}
    assert not any(task.done() for task in waiting)
    for tag in range(4):
        await post(api, "/scored_data", group(tag))
    assert [len((await task).json()["batch"]) for task in waiting] == [2, 2]


async def test_a_reset_while_a_status_and_a_post_wait_for_each_other_refuses_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bodies, "PATIENCE", 1000.0)
    app = TrajectoryApi(ServerSettings(), now=Clock())
    posting, asking, _ = (app.connections.setdefault(("127.0.0.1", port), Connection()) for port in (11, 12, 13))
    async with client_of(app, port=11) as first, client_of(app, port=12) as ask, client_of(app, port=13) as late:
        env_id = await started(first)
        assert (await first.post("/scored_data", json=group(1, 4, env_id))).status_code == 200
        # Its answer was not read yet (its connection is idle), so the status waits, and further posts wait for that.
        status = asyncio.create_task(ask.request("GET", "/status-env", json={"env_id": env_id}))
        await turns()
        further = asyncio.create_task(late.post("/scored_data", json=group(2, 4, env_id)))
        await turns()
        assert not status.done() and not further.done()
        async with client_of(app) as other:
            assert (await other.get("/reset_data")).status_code == 200
        posting.end(None)
        answers = [await status]
        asking.end(None)
        answers.append(await further)
        assert [answer.status_code for answer in answers] == [422, 422]
        assert all("POST /register-env first" in answer.text for answer in answers)
        async with client_of(app) as other:
            assert (await other.get("/status")).json()["queue_size"] == 0
