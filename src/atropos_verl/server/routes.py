"""What each path does: decode, call the store, answer. HTTP itself is in ``app.py``, batches in ``hand_out.py``."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from atropos_verl.protocol.packed import pack_group
from atropos_verl.protocol.schema import CheckedGroup, Refusal, check_group, split_list
from atropos_verl.protocol.wire_model import (
    AckRequest,
    EnvIdentifier,
    Environment,
    EnvRegistration,
    Registration,
    StoredGroup,
)
from atropos_verl.server import metrics, status
from atropos_verl.server.answers import Answer, json_answer
from atropos_verl.server.page import page
from atropos_verl.server.request import Request, decoded, idempotency, lease_seconds
from atropos_verl.server.status_barrier import StatusFence
from atropos_verl.server.store import Store

__all__ = ["Routes"]

_PACKED_SHARE = 0.2
"""Bytes of packed groups kept ahead of need, over those received. (A packed group has about a third of its JSON.)"""
FEATURES = ("batch_fill", "idempotency", "leases", "packed")
"""What a client may use beyond upstream's protocol; told at ``/register``."""
_SHOWN_TEXT = 400
_LATEST_EXAMPLE: dict[str, list[object]] = {
    name: []
    for name in (
        "tokens",
        "masks",
        "scores",
        "advantages",
        "ref_logprobs",
        "generation_params",
        "inference_logprobs",
        "messages",
        "images",
    )
}
"""Upstream's answer while nothing came."""


class Routes:
    """Handlers by (method, path); ``GET /batch`` is not among them."""

    def __init__(self, store: Store, counters: metrics.Counters) -> None:
        self._store = store
        self._counters = counters
        self._fence = StatusFence()
        get, post = "GET", "POST"
        self.table: dict[tuple[str, str], Callable[[Request], Awaitable[Answer]]] = {
            (get, "/"): self.root,
            (get, "/health"): self.health,
            (post, "/register"): self.register,
            (post, "/register-env"): self.register_env,
            (post, "/disconnect-env"): self.disconnect_env,
            (get, "/wandb_info"): self.wandb_info,
            (get, "/info"): self.info,
            (post, "/scored_data"): self.scored_data,
            (post, "/scored_data_list"): self.scored_data_list,
            (get, "/status"): self.status,
            (get, "/status-env"): self.status_env,
            (get, "/latest_example"): self.latest_example,
            (post, "/reset_data"): self.reset_data,
            (post, "/batch/ack"): self.ack,
            (post, "/batch/renew"): self.renew,
            (post, "/batch/release"): self.release,
            (get, "/metrics"): self.metrics,
            (get, "/page-data"): self.page_data,
        }
        if store.settings.allow_get_reset:
            self.table[get, "/reset_data"] = self.reset_data

    # --- who is there ------------------------------------------------------------------------------------------------

    async def register(self, request: Request) -> Answer:
        registration = decoded(await request.body(), Registration)
        kind = self._store.register(registration)
        await self._store.persistence.synced()
        current = self._store.state.registration
        assert current is not None
        return json_answer(
            {
                # Upstream gives 128 bits; 63 are read by every JSON parser.
                "uuid": uuid.uuid4().int >> 65,
                "registration": kind,
                "batch_size": current.batch_size,
                "max_token_len": current.max_token_len,
                "current_step": self._store.state.step,
                "features": FEATURES,
            }
        )

    async def register_env(self, request: Request) -> Answer:
        environment = self._store.register_env(decoded(await request.body(), EnvRegistration))
        if environment is None:
            return json_answer({"status": "wait for trainer to start"})
        await self._store.persistence.synced()
        registration = self._store.state.registration
        assert registration is not None
        return json_answer(
            {
                "status": "success",
                "env_id": environment.env_id,
                "wandb_name": environment.real_name,
                "checkpoint_dir": registration.checkpoint_dir,
                "starting_step": self._store.state.step,
                "checkpoint_interval": registration.save_checkpoint_interval,
                "num_steps": registration.num_steps,
            }
        )

    async def disconnect_env(self, request: Request) -> Answer:
        env_id = decoded(await request.body(), EnvIdentifier).env_id
        if not self._store.disconnect_env(env_id):
            return json_answer({"status": "failure", "error": f"env_id {env_id} is not a registered environment"})
        await self._store.persistence.synced()
        return json_answer({"status": "success"})

    async def wandb_info(self, request: Request) -> Answer:
        registration = self._store.state.registration
        group = None if registration is None else registration.wandb_group
        return json_answer({"group": group, "project": None if registration is None else registration.wandb_project})

    async def info(self, request: Request) -> Answer:
        registration = self._store.state.registration
        if registration is None:
            return json_answer({"batch_size": -1, "max_token_len": -1})
        return json_answer({"batch_size": registration.batch_size, "max_token_len": registration.max_token_len})

    async def reset_data(self, request: Request) -> Answer:
        self._store.reset()
        await self._store.persistence.synced()
        return Answer(200, b"Reset successful", "text/plain; charset=utf-8")

    # --- groups ------------------------------------------------------------------------------------------------------

    async def scored_data(self, request: Request) -> Answer:
        body = await request.body()
        key, digest = idempotency(request, body)
        known = self._store.replied(key, digest)
        if known is None:
            groups = [self._checked(body)]
            env_id = await self._hold_back(groups)
            known = self._accept(groups, key, digest, self._single_reply)
            groups.clear()  # freed after the answer, not with this frame
            self._fence.accepted(env_id, request.connection)
        await self._store.persistence.synced()
        return Answer(200, known)

    async def scored_data_list(self, request: Request) -> Answer:
        body = await request.body()
        key, digest = idempotency(request, body)
        known = self._store.replied(key, digest)
        if known is None:
            groups = [self._checked(raw, index) for index, raw in enumerate(split_list(body))]
            env_id = await self._hold_back(groups)
            known = self._accept(groups, key, digest, self._list_reply)
            self._fence.accepted(env_id, request.connection)
        await self._store.persistence.synced()
        return Answer(200, known)

    async def _hold_back(self, groups: list[CheckedGroup]) -> int | None:
        """See ``StatusFence``; returns the environment that posts. Refuses what a reset meanwhile made unknown."""
        env_id = groups[0].env_id if groups else None
        await self._fence.before_accept(env_id)
        for group in groups:
            if group.env_id is not None:
                self._known_env(group.env_id)
        return env_id

    def _known_env(self, env_id: int) -> Environment:
        known = self._store.state.environments
        if not 0 <= env_id < len(known):
            text = f"env_id = {env_id} is not a registered environment; POST /register-env first"
            raise Refusal("unknown_env", text, "env_id", value=env_id)
        return known[env_id]

    def _checked(self, raw: bytes, index: int | None = None) -> CheckedGroup:
        state = self._store.state
        vocab_size = None if state.registration is None else state.registration.vocab_size
        try:
            return check_group(
                raw, vocab_size=vocab_size, environments=len(state.environments), strict=self._store.settings.strict
            )
        except Refusal as refusal:
            refusal.group = index
            if refusal.env_id is not None and 0 <= refusal.env_id < len(state.environments):
                state.environments[refusal.env_id].refused += 1
            raise

    def _accept(
        self,
        groups: list[CheckedGroup],
        key: str | None,
        digest: bytes,
        reply: Callable[[list[CheckedGroup], int], bytes],
    ) -> bytes:
        store, state = self._store, self._store.state
        self._refuse_too_large(groups)
        first = state.next_seq
        answer = store.accept(groups, lambda duplicates: reply(groups, duplicates), key, digest)
        for group in groups:
            store.hear_env(group.env_id)
        by_digest = {group.digest: group for group in groups}
        for seq in range(first, state.next_seq):
            stored = state.groups[seq]
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
        state = self._store.state
        room = _PACKED_SHARE * (state.held_bytes - state.packed_bytes) - state.packed_bytes
        wanted = self._store.wants_packed and room > 0
        if wanted and state.groups.get(stored.seq) is stored and stored.packed is None:
            state.keep_packed(stored, pack_group(checked))

    def _refuse_too_large(self, groups: list[CheckedGroup]) -> None:
        """Under ``exact`` a group above the batch size could never be handed out."""
        registration = self._store.state.registration
        if registration is None or registration.batch_fill != "exact":
            return
        for index, group in enumerate(groups):
            if group.size > registration.batch_size:
                refusal = Refusal(
                    "too_large",
                    f"tokens has {group.size} sequences, but a batch has {registration.batch_size} and batch_fill is "
                    "'exact'",
                    "tokens",
                    value=group.size,
                )
                refusal.group = index if len(groups) > 1 else None
                raise refusal

    def _single_reply(self, groups: list[CheckedGroup], duplicates: int) -> bytes:
        fields: dict[str, Any] = {"status": "received"}
        buffered = self._odd_sequences(groups[0], duplicates == 0)
        if buffered is not None:
            fields = {"status": "buffered", "buffer_size": buffered}
        if duplicates:
            fields["duplicate"] = True
        return msgspec.json.encode(fields)

    def _list_reply(self, groups: list[CheckedGroup], duplicates: int) -> bytes:
        fields: dict[str, Any] = {"status": "received", "groups_processed": len(groups)}
        buffered = [size for group in groups if (size := self._odd_sequences(group, True)) is not None]
        if buffered:
            fields.update(buffered=len(buffered), last_buffer_size=buffered[-1])
        if duplicates:
            fields["duplicates"] = duplicates
        return msgspec.json.encode(fields)

    def _odd_sequences(self, group: CheckedGroup, is_new: bool) -> int | None:
        """Upstream's ``buffer_size``: sequences of this environment that wait in groups of another size than it
        registered with. Here such groups lie in the queue like all others. None: the group has the usual size."""
        state = self._store.state
        if group.env_id is None or group.size == state.environments[group.env_id].group_size:
            return None
        usual = state.environments[group.env_id].group_size
        waiting = sum(
            size * len(members)
            for (env_id, size), members in state.queue.classes.items()
            if env_id == group.env_id and size != usual
        )
        return waiting + (group.size if is_new else 0)

    async def latest_example(self, request: Request) -> Answer:
        latest = self._store.state.latest
        return json_answer(_LATEST_EXAMPLE) if latest is None else Answer(200, b"".join(latest.json_parts()))

    # --- batches that are out ----------------------------------------------------------------------------------------

    async def ack(self, request: Request) -> Answer:
        lease_id = decoded(await request.body(), AckRequest).lease_id
        outcome = self._store.batches.ack(lease_id)
        self._store.hear_trainer()
        await self._store.persistence.synced()
        return json_answer({"status": "success", "ack": outcome, "lease_id": lease_id})

    async def renew(self, request: Request) -> Answer:
        asked = decoded(await request.body(), AckRequest)
        seconds = lease_seconds(asked.seconds, self._store.settings.max_lease, "seconds")
        deadline = self._store.batches.renew(asked.lease_id, seconds)
        self._store.hear_trainer()
        await self._store.persistence.synced()
        return json_answer({"status": "success", "lease_id": asked.lease_id, "deadline": deadline})

    async def release(self, request: Request) -> Answer:
        lease_id = decoded(await request.body(), AckRequest).lease_id
        self._store.batches.release(lease_id)
        await self._store.persistence.synced()
        return json_answer({"status": "success", "lease_id": lease_id})

    # --- figures -----------------------------------------------------------------------------------------------------

    async def root(self, request: Request) -> Answer:
        if "text/html" in (request.header("accept") or ""):
            return Answer(200, page(), "text/html; charset=utf-8")
        return json_answer({"message": "AtroposLib API"})

    async def health(self, request: Request) -> Answer:
        return json_answer({"status": "ok"})

    async def status(self, request: Request) -> Answer:
        self._store.batches.expire()
        return json_answer(status.status(self._store))

    async def status_env(self, request: Request) -> Answer:
        body = await request.body()
        if not body and request.query.get("env_id", "").lstrip("-").isdigit():
            env_id = int(request.query["env_id"])
        else:
            env_id = decoded(body, EnvIdentifier).env_id
        self._known_env(env_id)
        self._store.hear_env(env_id)
        await self._fence.before_status(env_id, request.connection)
        self._store.batches.expire()
        return json_answer(status.env_status(self._store, self._known_env(env_id)))

    async def metrics(self, request: Request) -> Answer:
        text = metrics.render(self._store, self._counters)
        return Answer(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    async def page_data(self, request: Request) -> Answer:
        store, now = self._store, self._store.now()
        self._store.batches.expire()
        registration = store.state.registration
        return json_answer(
            {
                "status": status.status(store),
                "environments": status.environments(store),
                "per_second": self._counters.per_second(now),
                "series": [[row[0] - int(now), *row[1:]] for row in self._counters.series],
                "latest": list(self._counters.glimpses),
                "now": now,
                "registration": None if registration is None else msgspec.to_builtins(registration),
                "refused": dict(self._counters.refused),
            }
        )


def _glimpse(group: CheckedGroup, now: float) -> metrics.Glimpse:
    text = f"token ids {group.fields.tokens[0][:24]}"
    messages = group.fields.messages
    if isinstance(messages, list) and messages and isinstance(messages[0], list) and messages[0]:
        last = messages[0][-1]
        content = last.get("content")
        said = content if isinstance(content, str) else json.dumps(content)
        text = f"{last.get('role')}: {said}"
    return metrics.Glimpse(
        now, group.env_id, group.fields.scores[:16], [len(row) for row in group.fields.tokens[:16]], text[:_SHOWN_TEXT]
    )
