"""Sessions: what an agent asks for is recorded, on disk before it is answered, and becomes the rows of a rollout.

A request goes on when its client leaves, and an equal one gets its completions (docs/internals.md)."""

import asyncio
import hashlib
import hmac
import logging
import math
import re
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
import xxhash

from atropos_verl.errors import ConfigError, StorageWriteError
from atropos_verl.gateway.chat import ChatTurn, Message
from atropos_verl.gateway.fields import ApiError, Sampling
from atropos_verl.gateway.lineages import Prompt, StoredTurn, Tree, hash_of, kept_turns, new_turn, training_rows
from atropos_verl.gateway.service import GatewayService, joined
from atropos_verl.storage import Change, Key, RecordStore
from atropos_verl.types import Generation, GenerationDelta, GenerationRequest

logger = logging.getLogger(__name__)

_KEY_PREFIX = "sess-"
_TURN_BITS = 20
"""``_MAX_TURNS`` and the completions of one more request fit."""
_MAX_OPEN = 4096
_MAX_ENDED = 10_000
"""Ended sessions that are kept, the newest ones."""
_MAX_TURNS = 10_000
_MAX_SESSION_BYTES = 256 << 20
"""Of the turns of one session, on disk."""
_MAX_ROW_TOKENS = 1 << 22
"""Of all rows of one rollout. A branch repeats what stands before it."""
_UNREAD_SECONDS = 60.0
"""For which sampling goes on after its client left, for the retry."""
_UNREADABLE = (msgspec.MsgspecError, ValueError, IndexError, RecursionError)
"""What decoding raises for a value of another version, or none."""
_MAX_KEY, _MAX_REASON = 256, 500
_RECEIVED = {1: True, 0: False, -1: None}
_FIELD = re.compile(r"field `(.*?)`|\$\.(\w+)")

_Rows = Sequence[tuple[Key, bytes]]
State = Literal["open", "finished", "aborted", "expired"]
_T = TypeVar("_T")


class Opening(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /sessions``."""

    group: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    task: str | None = None
    metadata: dict[str, Any] | None = None
    size: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    """Rollouts that the group is to have."""
    ttl: Annotated[float, msgspec.Meta(gt=0, le=7 * 24 * 3600)] = 3600.0
    """Seconds."""


class Outcome(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /sessions/ID/reward``."""

    reward: float
    per_turn: list[float] | None = None
    """[answered turns]"""
    info: dict[str, Any] | None = None
    finished: bool = True


class Abort(msgspec.Struct, forbid_unknown_fields=True):
    reason: str = ""


class SessionRecord(msgspec.Struct, kw_only=True):
    """What is known of a session beside its turns."""

    id: str
    secret: str
    opening: Opening
    created: float
    """Seconds since the epoch."""
    idempotency: tuple[str, int] | None = None
    """Key and digest of the request that opened it."""
    state: State = "open"
    outcome: Outcome | None = None
    reason: str | None = None
    """Of an abort."""
    turns: int = 0
    """Recorded completions; of an ended session."""

    @property
    def expires(self) -> float:
        """Seconds since the epoch."""
        return self.created + self.opening.ttl

    @property
    def api_key(self) -> str:
        return f"{_KEY_PREFIX}{self.id}-{self.secret}"


@dataclass(eq=False)
class Exchange:
    """A request and its answer. Equal requests share it until an answer has gone out."""

    id: str
    name: int
    """By which an equal request finds it; see ``Turn``."""
    digest: bytes
    key: str | None = None
    """Of idempotency."""
    turns: range = range(0)
    """Numbers of the recorded completions."""
    readers: int = 0
    """Connections that wait for the answer."""
    was_received: bool | None = None
    """An answer went out whole; False: the connection broke before. None: not known (yet)."""
    task: "asyncio.Task[list[list[Generation]]] | None" = None
    """Samples the completions, or reads them from the disk."""
    deltas: list[GenerationDelta] = field(default_factory=list)
    unread: asyncio.Timeout | None = None
    """While it is being sampled: when it ends because nobody waits."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def wait_for_readers(self) -> None:
        """Sampling goes on while there are some, and some time longer."""
        if self.unread is not None:
            self.unread.reschedule(None if self.readers else asyncio.get_running_loop().time() + _UNREAD_SECONDS)

    def add(self, deltas: Iterable[GenerationDelta]) -> None:
        self.deltas += deltas
        self.changed.set()
        self.changed = asyncio.Event()

    def end(self, task: "asyncio.Task[Any]") -> None:
        _ = task.cancelled() or task.exception()  # which may interest nobody any more
        self.changed.set()


@dataclass(eq=False)
class Session:
    """An open session; of an ended one only ``number`` and ``record`` are of use."""

    number: int
    record: SessionRecord
    tree: Tree = field(default_factory=Tree)
    stored_bytes: int = 0
    exchanges: dict[int, Exchange] = field(default_factory=dict)
    """By their names; those that are recorded and for which nobody waits are in the tree alone."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while turns are numbered and stored."""

    @property
    def base(self) -> int:
        """Key of its first turn."""
        return self.number << _TURN_BITS

    @property
    def last(self) -> int:
        """The largest key that a turn of it may have."""
        return self.base + (1 << _TURN_BITS) - 1

    @property
    def unrecorded(self) -> int:
        return sum(not exchange.turns for exchange in self.exchanges.values())

    def check_open(self) -> None:
        record = self.record
        if record.state != "open":
            why = f": {record.reason}" if record.reason else ""
            raise ApiError(410, f"session {record.id} is {record.state}{why}; open a new one", code="session_ended")

    def check_limits(self, turns: int, most: int, tokens: int = 0) -> None:
        """``tokens``: of rows that a request would add. Raises ``ApiError`` 403."""
        tokens += self.tree.row_tokens
        if turns > most or self.stored_bytes >= _MAX_SESSION_BYTES or tokens >= _MAX_ROW_TOKENS:
            text = f"{turns} completions with {self.stored_bytes} bytes and rows of {tokens} tokens"
            text += f"; a session has {_MAX_TURNS}, {_MAX_SESSION_BYTES} and {_MAX_ROW_TOKENS} at most"
            raise ApiError(403, f"session {self.record.id} had {text}; finish it", code="session_limit")

    def known(self, name: int, digest: bytes) -> Exchange | None:
        """The newest request of this name; it has another digest where it was another one."""
        if (exchange := self.exchanges.get(name)) is not None:
            return exchange
        turns = self.tree.turns
        if not len(numbers := np.flatnonzero(turns["name"] == name)):
            return None
        last = self.tree.turn(numbers[-1])
        first = np.flatnonzero(turns["request"] == last.request)[0]
        exchange = Exchange(last.request.decode(), name, digest if last.digest == hash_of(digest) else b"")
        exchange.turns, exchange.was_received = range(first, last.number + 1), _RECEIVED[last.received]
        return exchange

    def forget(self, exchange: Exchange) -> None:
        if self.exchanges.get(exchange.name) is exchange:
            del self.exchanges[exchange.name]

    def restore(self, rows: _Rows, answers: _Rows) -> tuple[list[StoredTurn], str | None]:
        """Become what the disk holds, up to the first damage, which is returned with what comes before it."""
        ends, turns, received = dict(answers), list[StoredTurn](), -1
        try:
            for index, (key, value) in enumerate(rows):
                if key != self.base + index:
                    return turns, f"turn {index} is missing"
                stored = _decoded(value)
                if not turns or turns[-1].request != stored.request:
                    received = -1 if key not in ends else int(ends[key] == b"1")
                self.tree.add(stored, received)
                turns.append(stored)
                self.stored_bytes += len(value)
        except _UNREADABLE as error:
            return turns, f"turn {len(turns)} is not one of this version: {error!r}"
        missing = self.record.turns - len(rows)
        return turns, f"{missing} turns are missing" if missing > 0 else None


class SessionStore:
    """All sessions of a run. Everything but ``SessionService.render`` runs in the gateway's event loop. ``on_end`` is
    told of every session that ends: its id, its state, and the reason of an abort. Raises ``StorageError``."""

    def __init__(
        self, directory: Path, on_end: Callable[[str, str, str | None], None] = lambda session, state, reason: None
    ) -> None:
        tables = dict.fromkeys(("sessions", "turns", "answers"), int)
        self.records = RecordStore(directory / "sessions.sqlite", tables, owner="gateway's sessions")
        self._sessions: dict[str, Session] = {}
        self._open: dict[str, Session] = {}
        self._ended: Counter[str] = Counter(finished=0, aborted=0, expired=0)
        self.counts: Counter[str] = Counter()
        self._on_end = on_end
        self._first_end = math.inf
        """When the next open session ends, or before."""
        self._waiting: dict[tuple[str, Key], Change] = {}
        """Changes of ``write_later`` that are not known to be on disk."""
        self._writing: asyncio.Task[None] | None = None
        self._next = 0
        self._creating = asyncio.Lock()
        try:
            for number, value in list(self.records.read("sessions")):
                self._next = int(number) + 1
                self._restore(int(number), value)
        except BaseException:
            self.records.close()
            raise

    def close(self) -> None:
        """Finish the writes that wait. Idempotent."""
        if not self.records.is_closed:
            self.records.write([*self._waiting.values()])
        self.records.close()

    def _restore(self, number: int, value: bytes) -> None:
        try:
            record = msgspec.msgpack.decode(value, type=SessionRecord)
        except _UNREADABLE as error:
            text = "session number %d in %s is not one of this version, and is left out: %r"
            logger.error(text, number, self.records.path, error)
            return
        session = Session(number, record)
        if record.state == "open":
            _, damage = session.restore(*(rows.result() for rows in self._rows(session)))
            if damage is not None:
                logger.error("session %s is damaged and is aborted: %s", record.id, damage)
                record.state, record.reason = "aborted", f"it is damaged: {damage}"
        self._add(session)

    def _add(self, session: Session) -> None:
        record = session.record
        self._sessions[record.id] = session
        if record.state == "open":
            self._open[record.id] = session
            self._first_end = min(self._first_end, record.expires)

    # -- opening, finding, ending ------------------------------------------------------------------------------------

    async def create(self, body: bytes, key: str | None) -> Session:
        """``POST /sessions``. Raises ``ApiError`` 400, 409, 429, 507."""
        self.expire()
        digest = hash_of(body)
        own_id = secrets.token_hex(12) if key is None else hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
        opening, secret = _read(body, Opening), secrets.token_urlsafe(24)
        async with self._creating:
            if (known := self._sessions.get(own_id)) is not None:
                if known.record.idempotency != (key, digest):
                    raise ApiError(409, "Idempotency-Key: another request had this key", code="idempotency_conflict")
                return known
            if len(self._open) >= _MAX_OPEN:
                text = f"{_MAX_OPEN} sessions are open; finish or abort some, or wait until their ttl ends"
                raise ApiError(429, text, code="too_many_sessions")
            record = SessionRecord(id=own_id, secret=secret, opening=opening, created=time.time())
            record.idempotency = None if key is None else (key, digest)
            session = Session(self._next, record)
            await self.write([self._row(session, record)])
            self._next += 1
            self._add(session)
        return session

    def find(self, session_id: str) -> Session:
        """Raises ``ApiError`` 404."""
        self.expire()
        session = self._sessions.get(session_id)
        if session is None:
            text = "no such session here; sessions are kept in the run directory of the gateway that opened them"
            raise ApiError(404, text, code="unknown_session")
        return session

    def of_key(self, key: str) -> Session | None:
        """The session that ``key`` opens. Raises ``ApiError`` 401 where it looks like a session's key and is none."""
        if not key.startswith(_KEY_PREFIX):
            return None
        session = self._sessions.get(key[len(_KEY_PREFIX) :].partition("-")[0])
        if session is None or not hmac.compare_digest(session.record.api_key.encode(), key.encode()):
            raise ApiError(401, "this is the key of no session here", code="invalid_api_key")
        return session

    async def reward(self, session: Session, body: bytes) -> dict[str, Any]:
        """``POST /sessions/ID/reward``. Raises ``ApiError`` 400, 409 (it has ended otherwise), 410, 507."""
        given = _read(body, Outcome)
        async with session.lock:
            record = msgspec.structs.replace(session.record, outcome=given)
            if record.state == "finished" and record != session.record:
                text = f"session {record.id} was finished with another reward or other details"
                raise ApiError(409, text, code="already_finished")
            if record.state != "finished":
                session.check_open()
                recorded, values = session.tree.turns, len(given.per_turn or ())
                turns = len(kept_turns(recorded["parent"].tolist(), recorded["received"].tolist()))
                if given.per_turn is not None and (values > turns or (given.finished and values != turns)):
                    raise ApiError(400, f"per_turn: {values} values for {turns} answered turns", param="per_turn")
                await self._store(session, record, "finished" if given.finished else "open")
        return summary_of(session)

    async def abort(self, session: Session, body: bytes) -> dict[str, Any]:
        """``POST /sessions/ID/abort``: no rollout comes of it. Raises ``ApiError`` 400, 409 (it is finished), 507."""
        given = _read(body, Abort)
        async with session.lock:
            if session.record.state == "finished":
                raise ApiError(409, f"session {session.record.id} is finished", code="already_finished")
            if session.record.state == "open":
                reason = given.reason[:_MAX_REASON] or None
                await self._store(session, msgspec.structs.replace(session.record, reason=reason), "aborted")
        return summary_of(session)

    def expire(self) -> None:
        """End the sessions that had no final reward until their time ended."""
        now = time.time()
        if now < self._first_end:
            return
        for session in [*self._open.values()]:
            record = session.record
            if record.expires <= now and not session.lock.locked():
                text = "session %s of group %r had no final reward within its ttl of %.0f s, and is ended"
                logger.warning(text, record.id, record.opening.group, record.opening.ttl)
                record = msgspec.structs.replace(record, state="expired", turns=session.tree.count)
                self.write_later([self._row(session, record)])
                self._close(session, record)
        self._first_end = min((one.record.expires for one in self._open.values()), default=math.inf)

    async def _store(self, session: Session, record: SessionRecord, state: State) -> None:
        """``session.lock`` is held. Raises ``ApiError`` 507."""
        record = msgspec.structs.replace(record, state=state, turns=session.tree.count)
        await self.write([self._row(session, record)], self.waiting_of(session))
        if state == "open":
            session.record = record
        else:
            self._close(session, record)

    def _close(self, session: Session, record: SessionRecord) -> None:
        session.record = record
        for exchange in session.exchanges.values():
            if exchange.task is not None:
                exchange.task.cancel()
        self._open.pop(record.id, None)
        self._ended[record.state] += 1
        self._on_end(record.id, record.state, record.reason)
        session.tree, session.exchanges = Tree(), {}
        ended = len(self._sessions) - len(self._open) - _MAX_ENDED
        if ended > 0:
            for old in [*islice((s for s in self._sessions.values() if s.record.state != "open"), ended)]:
                del self._sessions[old.record.id]
                keys = range(old.base, old.base + old.record.turns)
                gone: list[Change] = [(table, key, None) for key in keys for table in ("turns", "answers")]
                self.write_later([("sessions", old.number, None), *gone])

    # -- what is known of a session ----------------------------------------------------------------------------------

    async def describe(self, session: Session) -> dict[str, Any]:
        """``GET /sessions/ID``: its tree."""
        found, turns, _ = await self._restored(session)
        return _described(session if session.record.state == "open" else found, turns)

    async def rollout(self, session: Session) -> dict[str, Any]:
        """``GET /sessions/ID/rollout``. Raises ``ApiError`` 409 unless the session is finished."""
        if session.record.state != "finished":
            text = f"session {session.record.id} is {session.record.state}; only a finished one has a rollout"
            raise ApiError(409, text, code=f"session_{session.record.state}")
        found, turns, damage = await self._restored(session)
        if damage is not None:
            raise ApiError(500, f"session {session.record.id} is damaged: {damage}", code="storage")
        rows = await asyncio.to_thread(training_rows, turns, found.tree.turns["received"].tolist())
        return {**summary_of(session), "rows": rows}

    def figures(self) -> list[tuple[str, str, float]]:
        """For the metrics: name, text, value."""
        self.expire()
        return [
            ("sessions_open", "Open sessions.", len(self._open)),
            *((f"sessions_{state}_total", f"Sessions that ended {state}.", n) for state, n in self._ended.items()),
            ("session_turns_total", "Completions recorded in sessions.", self.counts["turns"]),
            ("session_lineages_total", "Lineages that these began.", self.counts["lineages"]),
            ("session_replays_total", "Requests that got the completions of an earlier one.", self.counts["replays"]),
        ]

    def _rows(self, session: Session) -> "list[Future[list[tuple[Key, bytes]]]]":
        return [self.records.fetch(table, session.base, session.last) for table in ("turns", "answers")]

    async def _restored(self, session: Session) -> tuple[Session, list[StoredTurn], str | None]:
        """What the disk holds of it; see ``Session.restore``."""
        rows = await asyncio.gather(*map(asyncio.wrap_future, self._rows(session)))
        found = Session(session.number, session.record)
        return found, *await asyncio.to_thread(found.restore, *rows)

    def _row(self, session: Session, record: SessionRecord) -> Change:
        return "sessions", session.number, msgspec.msgpack.encode(record)

    async def write(self, changes: Sequence[Change], waiting: Mapping[tuple[str, Key], Change] = {}) -> None:
        """Store those of ``waiting``, then ``changes``. (If each took all that wait, those that are stored at once
        would have the same ones.) Raises ``ApiError`` 507 when the disk refuses."""
        waiting = dict(waiting)
        try:
            await asyncio.wrap_future(self.records.write([*waiting.values(), *changes]))
        except StorageWriteError as error:
            if not self.records.is_closed:
                await asyncio.to_thread(self.records.recover)
            raise ApiError(507, f"the session cannot be stored: {error}", code="storage") from error
        for place, change in waiting.items():
            if self._waiting.get(place) is change:
                del self._waiting[place]

    def waiting_of(self, session: Session) -> dict[tuple[str, Key], Change]:
        """Its marks go with its next turn: one that is stored says what came of those before it."""
        keys = range(session.base, session.last + 1)
        return {place: change for place, change in self._waiting.items() if place[1] in keys}

    def write_later(self, changes: Sequence[Change]) -> None:
        """Store ``changes``, for which nobody waits, soon."""
        self._waiting |= {change[:2]: change for change in changes}
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_waiting())

    async def _write_waiting(self) -> None:
        try:
            while self._waiting:
                await self.write([], self._waiting)
        except ApiError as error:
            logger.error("%s; it is tried again with the next change of a session", error.message)

    # -- requests of agents ------------------------------------------------------------------------------------------

    def begin(
        self,
        service: GatewayService,
        session: Session,
        request: tuple[str, bytes | bytearray],
        headers: Mapping[str, str],
    ) -> "SessionService":
        """The service as one request (path, body) of the session sees it. Raises ``ApiError`` 403, 409, 410."""
        self.expire()
        session.check_open()
        path, body = request
        digest = xxhash.xxh3_128_digest(path.encode() + b"\n" + body)
        key = headers.get("idempotency-key", "").strip()[:_MAX_KEY] or None
        name = hash_of(key or digest)
        known = session.known(name, digest)
        if known is not None and known.digest != digest:
            raise ApiError(409, "Idempotency-Key: another request had this key", code="idempotency_conflict")
        is_retry = key is not None or headers.get("x-stainless-retry-count", "0").strip("0")
        # A request that is repeated after its answer asks for another sample.
        if known is None or (known.was_received and not is_retry):
            session.check_limits(session.tree.count + session.unrecorded, _MAX_TURNS - 1)
            known = Exchange(secrets.token_hex(12), name, digest, key)
        elif known.turns or known.task is not None:
            self.counts["replays"] += 1
        session.exchanges[name] = known
        known.readers += 1
        known.wait_for_readers()
        return SessionService(service, self, session, known)


class SessionService(GatewayService):
    """The service as one request of a session sees it: prompts continue what was sampled, completions are recorded."""

    def __init__(self, service: GatewayService, store: SessionStore, session: Session, exchange: Exchange) -> None:
        vars(self).update(vars(service))
        self._store, self._session, self._exchange = store, session, exchange
        self.session_id = session.record.id
        self._prompt: Prompt | None = None
        self._ids = 0

    def ended(self, *, was_received: bool) -> None:
        """The connection that waited for the answer is done; ``was_received``: the whole answer was sent."""
        session, exchange = self._session, self._exchange
        exchange.readers -= 1
        if session.record.state != "open":
            return
        if was_received or (exchange.was_received is not True and not exchange.readers):
            self._mark(was_received=was_received)
        if not exchange.readers and (exchange.turns or exchange.task is None):
            session.forget(exchange)
        exchange.wait_for_readers()

    def _mark(self, *, was_received: bool) -> None:
        exchange = self._exchange
        if exchange.turns and exchange.was_received is not was_received:
            exchange.was_received = was_received
            self._session.tree.turns["received"][exchange.turns.start : exchange.turns.stop] = was_received
            key = self._session.base + exchange.turns[0]
            self._store.write_later([("answers", key, b"%d" % was_received)])

    def new_id(self, prefix: str) -> str:
        """The same ones for a request that is repeated."""
        self._ids += 1
        return f"{prefix}{self._exchange.id}" + (f"-{self._ids}" if self._ids > 1 else "")

    def messages_of(self, answer_id: str) -> list[Message] | None:
        """The conversation that ended with the answer of this id, or None."""
        request, tree = answer_id.rpartition("_")[2].partition("-")[0], self._session.tree
        numbers = np.flatnonzero(tree.turns["request"] == request.encode())
        if not len(numbers):
            return None
        messages: list[Message] = []
        for turn in tree.path(numbers[0]):
            [(_, value)] = self._fetch(turn.number, turn.number).result()
            messages += _decoded(value).said
        return messages

    def remember(self, answer_id: str, messages: tuple[Message, ...]) -> None:
        """The conversation is on disk."""

    def render(self, turn: ChatTurn) -> tuple[int, ...]:
        """See ``Tree.render``; of a request that was answered before, the prompt it had."""
        tree = self._session.tree
        if self._exchange.turns:
            first = tree.turn(self._exchange.turns[0])
            return tree.ids(first.number)[: first.length - first.sampled]
        self._prompt = tree.render(self.codec, turn)
        return self._prompt.ids

    def requests(self, sampling: Sampling, prompts: Sequence[tuple[int, ...]], **named: Any) -> list[GenerationRequest]:
        """See ``GatewayService.requests``. Raises ``ApiError`` 403 too."""
        made = super().requests(sampling, prompts, **named)
        if not self._exchange.turns:
            self._session.check_limits(0, 0, sum(len(prompt) * sampling.template.n for prompt in prompts))
        return made

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Generation]]:
        """See ``GatewayService.generate``. Cancelling leaves the completions to an equal request."""
        return await asyncio.shield(self._task(requests, streamed=False))

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """See ``GatewayService.stream``. Closing leaves the completions to an equal request."""
        exchange, task = self._exchange, self._task([request], streamed=True)
        for sent in count():
            while sent == len(exchange.deltas):
                if task.done():
                    task.result()
                    return
                await exchange.changed.wait()
            yield exchange.deltas[sent]

    def _task(self, requests: Sequence[GenerationRequest], *, streamed: bool) -> "asyncio.Task[list[list[Generation]]]":
        """Gives the completions: an equal request's, or new ones."""
        exchange = self._exchange
        if exchange.task is None:
            exchange.task = asyncio.create_task(self._sample(requests, streamed=streamed))
            exchange.task.add_done_callback(exchange.end)
        return exchange.task

    async def _sample(self, requests: Sequence[GenerationRequest], *, streamed: bool) -> list[list[Generation]]:
        session, exchange = self._session, self._exchange
        try:
            if exchange.turns:
                stored = await asyncio.wrap_future(self._fetch(exchange.turns[0], exchange.turns[-1]))
                made = (_decoded(value).generation() for _, value in stored)
                results = [[*islice(made, request.n)] for request in requests]
                last = [
                    GenerationDelta(index=k, token_ids=g.token_ids, logprobs=g.logprobs, finish_reason=g.finish_reason)
                    for k, g in enumerate(results[0])
                ]
            else:
                async with asyncio.timeout(None) as exchange.unread:
                    exchange.wait_for_readers()
                    seen: list[list[GenerationDelta]] = [[] for _ in range(requests[0].n if streamed else 0)]
                    if streamed:  # the last deltas are sent once they are stored
                        async with aclosing(super().stream(requests[0])) as deltas:
                            async for delta in deltas:
                                seen[delta.index].append(delta)
                                exchange.add([delta] if delta.finish_reason is None else [])
                    results = [joined(seen)] if streamed else await super().generate(requests)
                    last = [row[-1] for row in seen]
                exchange.unread = None
                async with session.lock:
                    await self._record_turns(zip(requests, results, strict=True))
            exchange.add(last)
            if not exchange.readers:
                session.forget(exchange)
                self._mark(was_received=bool(exchange.was_received))
            return results
        except BaseException:
            session.forget(exchange)
            exchange.unread = None
            session.check_open()  # if its end is why, this is what those are told who wait
            raise

    def _fetch(self, first: int, last: int) -> "Future[list[tuple[Key, bytes]]]":
        return self._store.records.fetch("turns", self._session.base + first, self._session.base + last)

    async def _record_turns(self, answers: Iterable[tuple[GenerationRequest, list[Generation]]]) -> None:
        """``session.lock`` is held. Raises ``ApiError`` 403, 410, 507."""
        session, exchange = self._session, self._exchange
        session.check_open()
        turns = [self._stored_turn(request, *place) for request, made in answers for place in enumerate(made)]
        first, values = session.tree.count, [_encoded(turn) for turn in turns]
        session.check_limits(first + len(turns), 1 << _TURN_BITS)
        changes = [("turns", session.base + n, value) for n, value in enumerate(values, first)]
        await self._store.write(changes, self._store.waiting_of(session))
        lineages = session.tree.lineages
        for turn in turns:
            session.tree.add(turn)
        session.stored_bytes += sum(map(len, values))
        self._store.counts.update(turns=len(turns), lineages=session.tree.lineages - lineages)
        exchange.turns = range(first, first + len(turns))

    def _stored_turn(self, request: GenerationRequest, index: int, generation: Generation) -> StoredTurn:
        exchange, prompt = self._exchange, self._prompt or self._session.tree.place(request.prompt_token_ids)
        answer = None if prompt.turn is None else self.reader(prompt.turn, request, generation, index).message
        asked = {"request": exchange.id, "digest": exchange.digest, "idempotency_key": exchange.key}
        return new_turn(self.codec, prompt, request, generation, answer, **asked)


def _decoded(value: bytes) -> StoredTurn:
    return msgspec.msgpack.decode(value, type=StoredTurn)


def _encoded(turn: StoredTurn) -> bytes:
    try:
        return msgspec.msgpack.encode(turn)
    except OverflowError:  # a number of more than 64 bits in a field that the template may know
        said = tuple(msgspec.structs.replace(message, extra={}) for message in turn.said)
        return msgspec.msgpack.encode(msgspec.structs.replace(turn, said=said))


def _read(body: bytes, kind: type[_T]) -> _T:
    """A body of one of the routes of sessions. Raises ``ApiError`` 400 naming the field."""
    try:
        made = msgspec.json.decode(body, type=kind)
        msgspec.msgpack.encode(made)
        return made
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        found = _FIELD.search(str(error))
        raise ApiError(400, f"the body: {error}", param=found and (found[1] or found[2])) from error


def summary_of(session: Session) -> dict[str, Any]:
    record = session.record
    about = {name: getattr(record, name) for name in ("id", "state", "created", "expires", "reason")}
    outcome = {name: getattr(record.outcome, name, None) for name in ("reward", "per_turn", "info")}
    turns = session.tree.count or record.turns
    return {**about, **msgspec.structs.asdict(record.opening), **outcome, "turns": turns}


def _described(session: Session, turns: Sequence[StoredTurn]) -> dict[str, Any]:
    """The tree of a session that holds its turns."""
    tree = session.tree
    described = [
        {
            "turn": turn.number,
            "request": stored.request,
            "parent": stored.parent,
            "lineage": turn.lineage,
            "prompt_tokens": turn.length - turn.sampled,
            "completion_tokens": turn.sampled,
            "versions": [stored.runs[at][0] for at in (0, -1) if stored.runs],
            "finish_reason": stored.finish_reason,
            "received": _RECEIVED[turn.received],
            "reason": stored.reason,
        }
        for turn, stored in zip(map(tree.turn, range(tree.count)), turns, strict=False)
    ]
    requests = len(np.unique(tree.turns["request"])) + session.unrecorded
    figures = {"lineages": tree.lineages, "tokens": tree.tokens, "requests": requests}
    return {**summary_of(session), **figures, "in_flight": session.unrecorded, "tree": described}


def stored_session(directory: Path, session_id: str) -> dict[str, Any] | None:
    """``SessionStore.describe`` beside the process that writes; None: there is none. Raises ``ConfigError``."""
    path = directory / "sessions.sqlite"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            for number, value in db.execute("SELECT key, value FROM sessions"):
                record = msgspec.msgpack.decode(value, type=SessionRecord)
                if record.id == session_id:
                    found = Session(number, record)
                    keys = f"BETWEEN {found.base} AND {found.last} ORDER BY key"
                    tables = (f"SELECT key, value FROM {table} WHERE key {keys}" for table in ("turns", "answers"))
                    turns, _ = found.restore(*(db.execute(text).fetchall() for text in tables))
                    return _described(found, turns)
    except (sqlite3.Error, msgspec.MsgspecError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return None
