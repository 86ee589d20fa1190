"""Handlers of the paths: decode, call the store, answer. HTTP itself is in ``app.py``."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from atropos_verl.protocol.messages import AckRequest, EnvIdentifier, EnvRegistration, TrainerRegistration
from atropos_verl.protocol.schema import CheckedGroup, Refusal, check_group, split_list
from atropos_verl.protocol.wire import MEDIA_TYPE, pack_group
from atropos_verl.server.batcher import StoredGroup
from atropos_verl.server.bodies import (
    BatchResponse,
    Connection,
    Connections,
    choose_encoding,
    decoded,
    idempotency,
    json_parts,
    lease_seconds,
    packed_parts,
    read_body,
)
from atropos_verl.server.status import Counters, Glimpse, Metrics, env_status, environments, status
from atropos_verl.server.status_barrier import StatusBarrier
from atropos_verl.server.store import Environment, Store

__all__ = ["Handler", "Routes"]

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]

_PACKED_SHARE = 0.2
"""Bytes of packed groups kept ahead of need, over those received. (A packed group has about a third of its JSON.)"""
FEATURES = ("batch_fill", "idempotency", "leases", "packed")
"""Features beyond upstream's protocol; a client learns them at ``/register``."""
_JSON = "application/json"
_NOT_REGISTERED = {"status": "error", "message": "Trainer not registered. Call /register first.", "batch": []}
_SHOWN_TEXT = 400
_SHOWN_ROWS = 16
_EXAMPLE = "tokens masks scores advantages ref_logprobs generation_params inference_logprobs messages images"
_NO_EXAMPLE: dict[str, list[object]] = {name: [] for name in _EXAMPLE.split()}
"""Upstream's answer while nothing came."""


class Routes:
    """The handlers, with what they share."""

    def __init__(self, store: Store, counters: Counters, connections: Connections) -> None:
        self._store = store
        self._counters = counters
        self._connections = connections
        self._metrics = Metrics(store, counters)
        self._barrier = StatusBarrier()

    def table(self) -> list[tuple[str, str, Handler]]:
        """(method, path, handler)."""
        get, post = "GET", "POST"
        rows: list[tuple[str, str, Handler]] = [
            (get, "/", self.root),
            (get, "/health", self.health),
            (post, "/register", self.register),
            (post, "/register-env", self.register_env),
            (post, "/disconnect-env", self.disconnect_env),
            (get, "/wandb_info", self.wandb_info),
            (get, "/info", self.info),
            (post, "/scored_data", self.scored_data),
            (post, "/scored_data_list", self.scored_data_list),
            (get, "/status", self.status),
            (get, "/status-env", self.status_env),
            (get, "/latest_example", self.latest_example),
            (post, "/reset_data", self.reset_data),
            (get, "/batch", self.batch),
            (post, "/batch/ack", self.ack),
            (post, "/batch/renew", self.renew),
            (post, "/batch/release", self.release),
            (get, "/metrics", self.metrics),
            (get, "/page-data", self.page_data),
        ]
        if self._store.settings.allow_get_reset:
            rows.append((get, "/reset_data", self.reset_data))
        return rows

    def _connection(self, request: Request) -> Connection | None:
        return self._connections.get(request.scope.get("client"))

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self._store.settings)

    # --- trainer and environments ------------------------------------------------------------------------------------

    async def register(self, request: Request) -> Response:
        kind = self._store.register(decoded(await self._body(request), TrainerRegistration))
        await self._store.synced()
        current = self._store.registration
        assert current is not None
        return _json(
            {
                # Upstream gives 128 bits; 63 are read by every JSON parser.
                "uuid": uuid.uuid4().int >> 65,
                "registration": kind,
                "batch_size": current.batch_size,
                "max_token_len": current.max_token_len,
                "current_step": self._store.step,
                "features": FEATURES,
            }
        )

    async def register_env(self, request: Request) -> Response:
        environment = self._store.register_env(decoded(await self._body(request), EnvRegistration))
        if environment is None:
            return _json({"status": "wait for trainer to start"})
        registration = self._store.registration
        assert registration is not None
        await self._store.synced()
        return _json(
            {
                "status": "success",
                "env_id": environment.env_id,
                "wandb_name": environment.real_name,
                "checkpoint_dir": registration.checkpoint_dir,
                "starting_step": self._store.step,
                "checkpoint_interval": registration.save_checkpoint_interval,
                "num_steps": registration.num_steps,
            }
        )

    async def disconnect_env(self, request: Request) -> Response:
        env_id = decoded(await self._body(request), EnvIdentifier).env_id
        if not self._store.disconnect_env(env_id):
            return _json({"status": "failure", "error": f"env_id {env_id} is not a registered environment"})
        await self._store.synced()
        return _json({"status": "success"})

    async def wandb_info(self, request: Request) -> Response:
        registration = self._store.registration
        group = None if registration is None else registration.wandb_group
        return _json({"group": group, "project": None if registration is None else registration.wandb_project})

    async def info(self, request: Request) -> Response:
        registration = self._store.registration
        if registration is None:
            return _json({"batch_size": -1, "max_token_len": -1})
        return _json({"batch_size": registration.batch_size, "max_token_len": registration.max_token_len})

    async def reset_data(self, request: Request) -> Response:
        self._store.reset()
        await self._store.synced()
        return Response("Reset successful", media_type="text/plain")

    # --- groups ------------------------------------------------------------------------------------------------------

    async def scored_data(self, request: Request) -> Response:
        return await self._take(request, lambda body: [self._checked(body)], self._single_reply)

    async def scored_data_list(self, request: Request) -> Response:
        def split(body: bytes) -> list[CheckedGroup]:
            return [self._checked(raw, index) for index, raw in enumerate(split_list(body))]

        return await self._take(request, split, self._list_reply)

    async def _take(
        self,
        request: Request,
        check: Callable[[bytes], list[CheckedGroup]],
        reply: Callable[[Sequence[CheckedGroup], int], bytes],
    ) -> Response:
        body = await self._body(request)
        key, digest = idempotency(request, body)
        answer = self._store.replied(key, digest)
        if answer is None:
            groups = check(body)
            env_id = groups[0].env_id if groups else None
            await self._barrier.before_accept(env_id)
            for group in groups:
                if group.env_id is not None:
                    self._known_env(group.env_id)  # a reset meanwhile has made it unknown
            answer = self._accept(groups, key, digest, reply)
            self._barrier.accepted(env_id, self._connection(request))
            groups.clear()  # freed after the answer, not with this frame
        await self._store.synced()
        return Response(answer, media_type=_JSON)

    def _known_env(self, env_id: int) -> Environment:
        environment = self._store.environment(env_id)
        if environment is None:
            text = f"env_id = {env_id} is not a registered environment; POST /register-env first"
            raise Refusal("unknown_env", text, "env_id", value=env_id)
        return environment

    def _checked(self, raw: bytes, index: int | None = None) -> CheckedGroup:
        store = self._store
        vocab_size = None if store.registration is None else store.registration.vocab_size
        try:
            return check_group(
                raw, vocab_size=vocab_size, environments=len(store.environments), strict=store.settings.strict
            )
        except Refusal as refusal:
            refusal.group = index
            environment = store.environment(refusal.env_id)
            if environment is not None:
                environment.refused += 1
            raise

    def _accept(
        self,
        groups: Sequence[CheckedGroup],
        key: str | None,
        digest: bytes,
        reply: Callable[[Sequence[CheckedGroup], int], bytes],
    ) -> bytes:
        store = self._store
        self._refuse_too_large(groups)
        first = store.next_seq
        answer = store.accept(groups, lambda duplicates: reply(groups, duplicates), key, digest)
        for group in groups:
            store.hear_env(group.env_id)
        by_digest = {group.digest: group for group in groups}
        for seq in range(first, store.next_seq):
            stored = store.groups[seq]
            checked = by_digest[stored.digest]
            # After the answer, which its sender need not wait for: packing, and freeing some 50,000 numbers.
            asyncio.get_running_loop().call_soon(self._answered, stored, checked)
            self._counters.bytes_in += len(checked.raw)
            self._counters.happened(store.now(), groups=1, tokens=checked.tokens)
            self._counters.glimpses.append(_glimpse(checked, store.now()))
        return answer

    def _answered(self, stored: StoredGroup, checked: CheckedGroup) -> None:
        """Pack ahead of need while that takes little beside what was received. Holds the last reference to the
        decoded group."""
        store = self._store
        room = _PACKED_SHARE * (store.held_bytes - store.packed_bytes) - store.packed_bytes
        wanted = store.wants_packed and room > 0
        if wanted and store.groups.get(stored.seq) is stored and stored.packed is None:
            store.keep_packed(stored, pack_group(checked))

    def _refuse_too_large(self, groups: Sequence[CheckedGroup]) -> None:
        """Under ``exact`` a group above the batch size could never be handed out."""
        registration = self._store.registration
        if registration is None or registration.batch_fill != "exact":
            return
        for index, group in enumerate(groups):
            if group.size > registration.batch_size:
                text = f"tokens has {group.size} sequences, but a batch has {registration.batch_size} and batch_fill is"
                refusal = Refusal("too_large", f"{text} 'exact'", "tokens", value=group.size)
                refusal.group = index if len(groups) > 1 else None
                raise refusal

    def _single_reply(self, groups: Sequence[CheckedGroup], duplicates: int) -> bytes:
        fields: dict[str, Any] = {"status": "received"}
        buffered = self._odd_sequences(groups[0], duplicates == 0)
        if buffered is not None:
            fields = {"status": "buffered", "buffer_size": buffered}
        if duplicates:
            fields["duplicate"] = True
        return msgspec.json.encode(fields)

    def _list_reply(self, groups: Sequence[CheckedGroup], duplicates: int) -> bytes:
        fields: dict[str, Any] = {"status": "received", "groups_processed": len(groups)}
        buffered = [size for group in groups if (size := self._odd_sequences(group, True)) is not None]
        if buffered:
            fields.update(buffered=len(buffered), last_buffer_size=buffered[-1])
        if duplicates:
            fields["duplicates"] = duplicates
        return msgspec.json.encode(fields)

    def _odd_sequences(self, group: CheckedGroup, is_new: bool) -> int | None:
        """Upstream's ``buffer_size``: sequences of this environment that wait in groups of another size than it
        registered with. Here such groups wait like all others. None: the group has the usual size."""
        environment = self._store.environment(group.env_id)
        if environment is None or group.size == environment.group_size:
            return None
        waiting = sum(
            size * len(members)
            for (env_id, size), members in self._store.queue.classes.items()
            if env_id == group.env_id and size != environment.group_size
        )
        return waiting + (group.size if is_new else 0)

    async def latest_example(self, request: Request) -> Response:
        latest = self._store.latest
        if latest is None:
            return _json(_NO_EXAMPLE)
        return Response(b"".join(latest.json_parts()), media_type=_JSON)

    # --- batches -----------------------------------------------------------------------------------------------------

    async def batch(self, request: Request) -> Response:
        store = self._store
        lease = request.headers.get("x-atropos-lease")
        seconds = None if lease is None else lease_seconds(lease, store.settings.max_lease, "X-Atropos-Lease")
        wants_packed = MEDIA_TYPE in request.headers.get("accept", "")
        if store.registration is None:
            return _json(_NOT_REGISTERED)
        store.hear_trainer()
        store.wants_packed = store.wants_packed or wants_packed
        batch = store.next_batch(seconds)
        await store.synced()
        if batch is None:
            return _json({"batch": None})
        members = store.members(batch)
        tokens = sum(group.tokens for group in members)
        self._counters.happened(store.now(), batches=1)
        logger.info(
            "batch of step %d: %d groups, %d sequences, %d tokens%s",
            batch.step,
            len(members),
            sum(group.size for group in members),
            tokens,
            "" if batch.deliveries == 1 else f" (delivery number {batch.deliveries})",
            extra={
                "event": "batch",
                "step": batch.step,
                "groups": len(members),
                "tokens": tokens,
                "lease": batch.lease_id,
            },
        )
        parts = packed_parts(members) if wants_packed else json_parts(members)
        return BatchResponse(
            batch,
            parts,
            MEDIA_TYPE if wants_packed else _JSON,
            store=store,
            counters=self._counters,
            connection=self._connection(request),
            encoding=choose_encoding(store.settings.compression, request, sum(map(len, parts))),
        )

    async def ack(self, request: Request) -> Response:
        lease_id = decoded(await self._body(request), AckRequest).lease_id
        outcome = self._store.ack(lease_id)
        self._store.hear_trainer()
        await self._store.synced()
        return _json({"status": "success", "ack": outcome, "lease_id": lease_id})

    async def renew(self, request: Request) -> Response:
        asked = decoded(await self._body(request), AckRequest)
        seconds = lease_seconds(asked.seconds, self._store.settings.max_lease, "seconds")
        deadline = self._store.renew(asked.lease_id, seconds)
        self._store.hear_trainer()
        await self._store.synced()
        return _json({"status": "success", "lease_id": asked.lease_id, "deadline": deadline})

    async def release(self, request: Request) -> Response:
        lease_id = decoded(await self._body(request), AckRequest).lease_id
        self._store.release(lease_id)
        await self._store.synced()
        return _json({"status": "success", "lease_id": lease_id})

    # --- figures -----------------------------------------------------------------------------------------------------

    async def root(self, request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return Response(_page(), media_type="text/html")
        return _json({"message": "AtroposLib API"})

    async def health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def status(self, request: Request) -> Response:
        self._store.expire()
        return _json(status(self._store))

    async def status_env(self, request: Request) -> Response:
        body = await self._body(request)
        asked = request.query_params.get("env_id", "")
        env_id = int(asked) if not body and asked.lstrip("-").isdigit() else decoded(body, EnvIdentifier).env_id
        self._known_env(env_id)
        self._store.hear_env(env_id)
        await self._barrier.before_status(env_id, self._connection(request))
        self._store.expire()
        return _json(env_status(self._store, self._known_env(env_id)))

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page_data(self, request: Request) -> Response:
        store, now = self._store, self._store.now()
        store.expire()
        return _json(
            {
                "status": status(store),
                "environments": environments(store),
                "per_second": self._counters.per_second(now),
                "series": [[row[0] - int(now), *row[1:]] for row in self._counters.series],
                "latest": list(self._counters.glimpses),
                "now": now,
                "registration": store.registration,
                "refused": dict(self._counters.refused),
            }
        )


def _json(fields: Any) -> Response:
    return Response(msgspec.json.encode(fields), media_type=_JSON)


@cache
def _page() -> bytes:
    """The live page: one file of HTML, without anything from the internet."""
    return Path(__file__).with_name("page.html").read_bytes()


def _glimpse(group: CheckedGroup, now: float) -> Glimpse:
    text = f"token ids {group.fields.tokens[0][:24]}"
    messages = group.fields.messages
    if isinstance(messages, list) and messages and isinstance(messages[0], list) and messages[0]:
        last = messages[0][-1]
        content = last.get("content")
        said = content if isinstance(content, str) else json.dumps(content)
        text = f"{last.get('role')}: {said}"
    lengths = [len(row) for row in group.fields.tokens[:_SHOWN_ROWS]]
    return Glimpse(now, group.env_id, group.fields.scores[:_SHOWN_ROWS], lengths, text[:_SHOWN_TEXT])
