"""``Store``: registrations, environments, groups and batches of the trajectory API.

All of it is in memory. With a data directory every change is also handed to ``store.sqlite``, and an answer waits until
its change is stored (``synced``). When the disk refuses a change, memory is read from the file again: what was not
stored has not happened, and its senders get an error.
"""

import asyncio
import bisect
import itertools
import logging
import math
import sqlite3
import time
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from atropos_verl.errors import AtroposVerlError, ConfigError, StorageDamagedError, StorageError, StorageWriteError
from atropos_verl.http_thread import printable
from atropos_verl.protocol.messages import EnvRegistration, TrainerRegistration
from atropos_verl.protocol.schema import CheckedGroup, Refusal
from atropos_verl.server.batcher import BATCH_FILLS, GroupQueue, QueueView, StoredGroup, choose_batch
from atropos_verl.server.settings import ServerSettings
from atropos_verl.storage import Key, RecordStore

logger = logging.getLogger(__name__)

_GLIMPSES = 6
_SERIES_SECONDS = 120
_T = TypeVar("_T")

STORE_FILE = "store.sqlite"
ARRIVALS_FILE = "arrivals.jsonl"
"""``atropos-verl simulate --arrivals`` replays it. One line a batch; a group is [arrival, environment (null: unnamed),
sequences, tokens]. Times are seconds since the epoch::

    {"step": 3, "at": 1764034.2181, "groups": [[1764031.4092, 0, 8, 181], …]}
"""
_TABLES: dict[str, type[int] | type[str]] = {
    **dict.fromkeys(("environments", "groups", "bodies"), int),
    **dict.fromkeys(("state", "batches", "leases", "keys", "recent"), str),
}
_MAX_WEIGHT = 1e9
_MAX_ENVIRONMENTS = 10_000
_MAX_NAME = 200
_REMEMBERED_LEASES = 65_536
_REMEMBERED_KEYS = 100_000
_EARLIER_LEASES = 8
_ENDS = {
    "closed": "was acked",
    "superseded": "ended, and its batch was handed out again: discard your copy",
    "returned": "has ended",
}
_REFUSED_SECONDS, _MOST_REFUSED_SECONDS = 1.0, 16.0
"""After a refused write, further posts are refused for this long without a try; twice as long after each in a row."""


class RequestError(AtroposVerlError):
    """What was asked cannot be done. ``status``: the HTTP code, 404 for a lease that there never was, 409 where the
    request contradicts what has happened meanwhile, 429 where there is no room; ``reason``: a short code for the
    counters of what is refused, empty where nothing was sent to be kept."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class Environment(msgspec.Struct, kw_only=True):
    env_id: int
    real_name: str
    desired_name: str
    max_context_len: int
    weight: float
    group_size: int
    min_batch_allocation: float | None
    connected: bool = True
    heard_at: float = 0.0
    """Seconds since the epoch; not in the log: after a restart every environment counts as just heard."""
    groups: int = 0
    sequences: int = 0
    duplicates: int = 0
    refused: int = 0

    def __post_init__(self) -> None:
        """Also for what an earlier version stored: every figure is of use, and every name is safe to log."""
        self.real_name, self.desired_name = printable(self.real_name), printable(self.desired_name)
        self.max_context_len, self.group_size = max(0, self.max_context_len), max(1, self.group_size)
        self.weight = min(max(0.0, self.weight), _MAX_WEIGHT)
        if self.min_batch_allocation is not None:
            self.min_batch_allocation = min(max(0.0, self.min_batch_allocation), 1.0)


@dataclass(slots=True)
class Batch:
    """Groups handed out together, until they are acked, confirmed or returned."""

    lease_id: str
    step: int
    seqs: list[int]
    deadline: float | None  # seconds since the epoch; None: without a lease, until the response has arrived
    deliveries: int = 1
    earlier: list[str] = field(default_factory=list)
    """The latest leases under which it was out before, told to whoever gets it: one of them may have been its own."""
    seconds: float | None = None


class _State(msgspec.Struct, kw_only=True):
    """The one row of the table ``state``."""

    next_seq: int = 0
    step: int = 0
    started: bool = False
    registration: TrainerRegistration | None = None
    totals: dict[str, int] = {}
    environments: int = 0


@dataclass(slots=True)
class Counters:
    """Since this process started."""

    started_at: float
    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)  # by reason
    bytes_held: int = 0  # of requests that are not answered yet
    bytes_in: int = 0  # inflated, of accepted posts
    bytes_out: int = 0
    glimpses: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_GLIMPSES))
    series: deque[tuple[int, int, int, int]] = field(default_factory=lambda: deque(maxlen=_SERIES_SECONDS))
    """(second, groups, tokens, batches) of each second in which anything happened."""

    def happened(self, now: float, *, groups: int = 0, tokens: int = 0, batches: int = 0) -> None:
        second, before = int(now), (0, 0, 0)
        if self.series and self.series[-1][0] == second:
            before = self.series.pop()[1:]
        self.series.append((second, groups + before[0], tokens + before[1], batches + before[2]))


class Store:
    """Belongs to the event loop. ``now``: seconds since the epoch, for tests."""

    def __init__(self, settings: ServerSettings, now: Callable[[], float] | None = None) -> None:
        """Open the data directory, if there is one, and go on where the last process ended. Raises ``ConfigError``
        where 0.1.0 wrote it, ``StorageError`` where it cannot be used."""
        self.settings = settings
        begun = time.time() - time.monotonic()  # a clock that is never set: leases last as long as they say
        self.now = now or (lambda: begun + time.monotonic())
        self.wants_packed = False  # the trainer takes the packed wire: groups are packed when they come
        self.trainer_heard = self._registered_at = self._refused_seconds = 0.0
        self._opened_at = -math.inf
        self._minimum_missed: float | None = None
        self._changes: dict[tuple[str, Key], bytes | None] = {}
        self._written: Future[None] | None = None
        self._refused: tuple[float, StorageWriteError] | None = None
        self._unreadable: StorageWriteError | None = None
        self._settled: dict[str, str | None] = {}
        """Lease ids of ended deliveries, and why the batch comes back (None: it arrived), until that is stored."""
        self._records: RecordStore | None = None
        self._arrivals: Path | None = None  # None: they are not recorded (any more)
        self._numbers = itertools.count(1)
        """Rows of leases, keys and batches are read again in the order of their numbers."""
        self.totals: Counter[str] = Counter()
        """Since the data directory was made: groups, sequences, tokens, duplicates, batches, acks, returns."""
        self.next_seq = 0
        """Number of the next group. It never starts again, so a number means one group."""
        self._clear()
        directory = settings.data_dir
        if directory is None:
            return
        if any(directory.glob("segment-*.log")):
            advice = "finish the run with it, or delete the directory and lose the groups that wait in it"
            raise ConfigError(f"{directory} is of version 0.1.0 (segment-*.log): {advice}", "data_dir")
        self._arrivals = directory / ARRIVALS_FILE
        self._records = RecordStore(
            directory / STORE_FILE, _TABLES, owner="trajectory API", fsync=settings.fsync, large="bodies"
        )
        try:
            self._load(self._records, None)
        except BaseException:
            self._records.close()
            raise
        self._after_restart()

    def _clear(self) -> None:
        self.step = 0
        self.started = False
        self.registration: TrainerRegistration | None = None
        self.environments: list[Environment] = []
        self.groups: dict[int, StoredGroup] = {}
        """Every group that is not acked: waiting, handed out, returned."""
        self.queue = GroupQueue()
        self.outstanding: dict[str, Batch] = {}
        self.returned: list[Batch] = []  # came back: the next to be handed out, the lowest step first
        self.leases: OrderedDict[str, str] = OrderedDict()
        """Ended leases → ``closed`` (acked or delivered) or ``superseded`` (handed out again under another lease)."""
        self.keys: OrderedDict[str, tuple[bytes, bytes]] = OrderedDict()
        """Idempotency-Key → (digest of the request, reply)."""
        self.recent: OrderedDict[str, float] = OrderedDict()
        """Environment and digest → when the group came."""
        self.held_bytes = self.held_tokens = self.packed_bytes = 0
        """``packed_bytes``: those of ``held_bytes`` that are binary forms."""
        self.latest: StoredGroup | None = None

    # --- the file ----------------------------------------------------------------------------------------------------

    @property
    def disk_bytes(self) -> int:
        return 0 if self._records is None else self._records.size

    async def synced(self) -> None:
        """Return when every change so far is stored. Raises ``StorageWriteError`` when the disk refused one: none of
        those that were not stored has happened."""
        if self._written is not None:
            try:
                await asyncio.wrap_future(self._written)
            except StorageWriteError as error:
                self._undo(error)
                raise
            self._refused_seconds = 0.0

    def close(self) -> None:
        if self._records is not None:
            self._records.close()

    def _save(self, table: str, key: Key, value: Any) -> None:
        """Note a row for the next ``_commit``. None deletes it."""
        if self._records is not None:
            encoded = value if value is None or isinstance(value, bytes) else msgspec.json.encode(value)
            self._changes[table, key] = encoded

    def _save_group(self, group: StoredGroup) -> None:
        self._save("groups", group.seq, replace(group, raw=b"", packed=None))

    def _save_batch(self, batch: Batch, *, out: bool) -> None:
        self._save("batches", batch.lease_id, (next(self._numbers), batch, out))

    def _commit(self) -> None:
        if self._records is None:
            return
        if self._unreadable is not None:
            self._written = Future()
            self._written.set_exception(self._unreadable)
            return
        same = {name: getattr(self, name) for name in ("next_seq", "step", "started", "registration", "totals")}
        self._save("state", "state", _State(**same, environments=len(self.environments)))
        changes, self._changes = self._changes, {}
        self._written = self._records.write([(table, key, value) for (table, key), value in changes.items()])

    def _undo(self, error: StorageWriteError) -> None:
        """Memory becomes what the file holds. All writes that one refusal made fail raise the same error: the first of
        their callers to hear of it does this."""
        if self._records is None or (self._refused is not None and self._refused[1] is error):
            return
        self._refused, self._written = (self.now(), error), None
        self._refused_seconds = min(max(_REFUSED_SECONDS, 2 * self._refused_seconds), _MOST_REFUSED_SECONDS)
        self._records.recover()
        heard = [environment.heard_at for environment in self.environments]
        try:
            self._load(self._records, self.groups)
        except (StorageError, OSError, sqlite3.Error) as failure:
            # Memory is not what the file holds: nothing more is stored, so that nobody is told otherwise.
            text = f"{error}; and what is stored cannot be read again ({failure}): restart the server"
            self._unreadable = StorageWriteError(text)
            self._refused = (self.now(), self._unreadable)
            logger.error("%s", text)
            return
        for environment, at in zip(self.environments, heard, strict=False):
            environment.heard_at = at
        logger.error("%s", error)

    def _load(self, records: RecordStore, known: Mapping[int, StoredGroup] | None) -> None:
        """Become what ``records`` holds, or raise and stay as it is. ``known``: groups whose bodies are not read."""
        rows = {table: dict(records.read(table)) for table in _TABLES if table != "bodies"}
        try:
            state = msgspec.json.decode(rows["state"].get("state", b"{}"), type=_State)
            environments = [msgspec.json.decode(value, type=Environment) for value in rows["environments"].values()]
            groups = [msgspec.json.decode(value, type=StoredGroup) for value in rows["groups"].values()]
            batches = _in_order(rows["batches"], tuple[int, Batch, bool])
            leases, keys = _in_order(rows["leases"], tuple[int, str]), _in_order(rows["keys"], tuple[int, bytes, bytes])
            recent = _in_order(rows["recent"], tuple[float])
        except msgspec.DecodeError as error:
            text = f"{records.path} holds a row that this version cannot read: {error}; use the version that wrote it"
            raise StorageDamagedError(f"{text}, or move the file away to start anew") from error
        if (groups and not rows["state"]) or len(environments) != state.environments:
            text = f"{records.path} lacks rows without which it cannot be used (table 'state' or 'environments')"
            raise StorageDamagedError(f"{text}; restore it from a backup, or move it away to start anew")
        lost = {group.seq: group for group in groups}
        bodies: Iterable[tuple[Key, bytes | None]] = records.read("bodies")
        if known is not None:
            bodies = [(seq, known[seq].raw if seq in known else records.get("bodies", seq)) for seq in lost]
        self._clear()
        self._changes.clear()
        self.environments, self.registration, self.totals = environments, state.registration, Counter(state.totals)
        self.next_seq, self.step, self.started = state.next_seq, state.step, state.started
        self.leases = OrderedDict((key, how) for key, (_, how) in leases)
        self.keys = OrderedDict((key, (digest, reply)) for key, (_, digest, reply) in keys)
        self.recent = OrderedDict((key, at) for key, (at,) in recent)
        newest = [numbered[-1][1][0] for numbered in (batches, leases, keys) if numbered]
        self._numbers = itertools.count(1 + max(newest, default=0))
        for key, raw in bodies:
            group = lost.pop(int(key), None)
            if group is None or raw is None:
                self._save("bodies", key, None)
                continue
            group.raw = raw
            self.groups[group.seq] = self.latest = group
            self._count_held(group, 1)
        for seq, group in lost.items():
            logger.error("group %d is lost: its body is damaged or missing", seq)
            mark = f"{group.env_id} {group.digest.hex()}"
            self.recent.pop(mark, None)  # it may be sent again
            for table, key in (("groups", seq), ("bodies", seq), ("recent", mark)):
                self._save(table, key, None)
        for _, (_, batch, out) in batches:
            batch.seqs = [seq for seq in batch.seqs if seq in self.groups]
            if not batch.seqs:  # all of it was damaged
                self._save("batches", batch.lease_id, None)
            elif out:
                self.outstanding[batch.lease_id] = batch
            else:
                bisect.insort(self.returned, batch, key=lambda other: other.step)
        away = {seq for batch in (*self.outstanding.values(), *self.returned) for seq in batch.seqs}
        for group in self.groups.values():
            if group.seq not in away:
                self.queue.add(group)
        for batch in self.returned:
            self.queue.count(self.members(batch), 1)

    def _after_restart(self) -> None:
        """Environments count as just heard, batches whose responses may not be finished come back, and nothing is of
        the future: the machine's time may have been set back meanwhile."""
        now = self.now()
        for group in self.groups.values():
            group.arrived = min(group.arrived, now)
        self.queue.last_arrival = min(self.queue.last_arrival, now)
        self.recent = OrderedDict((mark, min(at, now)) for mark, at in self.recent.items())
        self.trainer_heard = self.now() if self.registration is not None else 0.0
        self._opened_at = now
        for environment in self.environments:
            environment.heard_at = self._opened_at
        for batch in list(self.outstanding.values()):
            if batch.deadline is None:
                self.settle(batch.lease_id, "the server was restarted")
            else:
                batch.deadline = min(batch.deadline, now + (batch.seconds or 0.0))
        if self._changes:  # what is damaged is told once
            self._commit()
        if self.registration is not None or self.groups:
            waiting, away = self.queue.groups, len(self.outstanding)
            logger.info("resumed at step %d: %d groups waiting, %d leases open", self.step, waiting, away)

    # --- trainer and environments ------------------------------------------------------------------------------------

    def register(self, registration: TrainerRegistration) -> str:
        """Register a trainer. Returns ``new``, ``resumed`` (the same run again: its new settings hold) or ``shared``.
        Raises ``Refusal`` (unknown setting) or ``RequestError`` 409 (another run's trainer is active, not shared)."""
        if registration.batch_fill not in BATCH_FILLS:
            message = f"batch_fill = {registration.batch_fill!r} must be one of {', '.join(BATCH_FILLS)}"
            raise Refusal("value", message, "batch_fill", value=registration.batch_fill)
        current = self.registration
        silent = self.now() - self.trainer_heard
        leased = any(batch.deadline is not None for batch in self.outstanding.values())
        if current is not None and (leased or silent < self.settings.trainer_timeout):
            if self.settings.second_trainer == "share":
                self.trainer_heard = self.now()
                return "shared"
            if self.settings.second_trainer == "refuse" and registration.run != current.run:
                raise RequestError(
                    409,
                    "",
                    f"the trainer of run {current.wandb_project!r}/{current.wandb_group!r} is registered and was heard "
                    f"{silent:.0f} s ago; wait until it is silent for {self.settings.trainer_timeout:g} s and its "
                    "leases have ended, reset the server (/reset_data), or start it with --second-trainer share",
                )
        kind = "resumed" if current is not None and registration.run == current.run else "new"
        self.registration = registration
        self.step = registration.starting_step
        if current is not None:
            # Batches that were formed for other settings fall apart into their groups, each to its old place.
            for batch in self.returned:
                members = self.members(batch)
                self.queue.count(members, -1)
                self.queue.restore(members)
                self._end_lease(batch.lease_id, "superseded")
            self.returned = []
        self._commit()
        self.trainer_heard = self._registered_at = self.now()
        logger.info("trainer registered (%s): %d sequences per batch", kind, registration.batch_size)
        return kind

    def register_env(self, request: EnvRegistration) -> Environment | None:
        """Register an environment; None while no trainer has asked for a batch."""
        if not self.started or self.registration is None:
            return None
        env_id = self._free_env_id()
        name = printable(request.desired_name or "env")[:_MAX_NAME]
        # An environment that starts again gets its name again, under which Atropos keeps its checkpoints.
        taken = {other.real_name for other in self.alive() if other.heard_at > self._opened_at}
        environment = Environment(
            env_id=env_id,
            real_name=next(real for n in itertools.count() if (real := f"{name}_{n}") not in taken),
            desired_name=name,
            max_context_len=request.max_token_length,
            weight=1.0 if request.weight is None else request.weight,
            group_size=request.group_size,
            min_batch_allocation=request.min_batch_allocation,
            heard_at=self.now(),
        )
        self.environments[env_id : env_id + 1] = [environment]
        self._save("environments", environment.env_id, environment)
        self._commit()
        logger.info("environment %d registered: %s", environment.env_id, environment.real_name)
        return environment

    def _free_env_id(self) -> int:
        """The next number; after ``_MAX_ENVIRONMENTS`` that of one that is gone, of which no group is left."""
        if len(self.environments) < _MAX_ENVIRONMENTS:
            return len(self.environments)
        taken = {other.env_id for other in self.alive()} | {group.env_id for group in self.groups.values()}
        gone = [other for other in self.environments if other.env_id not in taken]
        if not gone:
            text = f"{_MAX_ENVIRONMENTS} environments are connected or have groups here; end some of them"
            raise RequestError(429, "queue_full", text)
        return min(gone, key=lambda other: other.heard_at).env_id

    def disconnect_env(self, env_id: int) -> bool:
        environment = self.environment(env_id)
        if environment is not None and environment.connected:
            environment.connected = False
            self._save("environments", env_id, environment)
            self._commit()
            logger.info("environment %d disconnected", env_id)
        return environment is not None

    def environment(self, env_id: int | None) -> Environment | None:
        """None when none has this number."""
        return None if env_id is None or not 0 <= env_id < len(self.environments) else self.environments[env_id]

    def hear_trainer(self) -> None:
        self.trainer_heard = self.now()

    def hear_env(self, env_id: int | None) -> None:
        if (environment := self.environment(env_id)) is not None:
            environment.heard_at = self.now()

    def alive(self) -> list[Environment]:
        """Environments that are connected and were heard of lately."""
        since = self.now() - self.settings.env_timeout
        return [other for other in self.environments if other.connected and other.heard_at > since]

    def reset(self) -> None:
        """Forget registrations, environments, groups, batches and keys."""
        rows: dict[str, Iterable[Key]] = {name: getattr(self, name) for name in ("groups", "leases", "keys", "recent")}
        rows |= {"bodies": self.groups, "environments": range(len(self.environments))}
        rows |= {"batches": [*self.outstanding, *(batch.lease_id for batch in self.returned)]}
        for table, keys in rows.items():
            for key in keys:
                self._save(table, key, None)
        self._clear()
        self._commit()
        self.trainer_heard = 0.0
        self.wants_packed = False
        logger.warning("reset: everything was forgotten")

    # --- groups ------------------------------------------------------------------------------------------------------

    def accept(
        self, groups: Sequence[CheckedGroup], reply: Callable[[int], bytes], key: str | None = None, digest: bytes = b""
    ) -> bytes:
        """Take the groups of one POST, all or none. Returns the answer, which ``reply`` makes of the number of
        duplicates. ``key``: Idempotency-Key; ``digest``: that of its request. Raises ``Refusal`` (the key was used for
        another request), ``RequestError`` 429, or ``StorageWriteError`` (the disk refused a write a moment ago)."""
        known = self.replied(key, digest)
        if known is not None:
            return known
        if self._refused is not None and self.now() - self._refused[0] < self._refused_seconds:
            raise self._refused[1]
        fresh = [group for group in groups if not self._is_duplicate(group)]
        waiting, held, bounds = self.queue.groups, self.held_bytes, self.settings
        full = ""
        if fresh and waiting + len(fresh) > bounds.max_queue_groups:
            full = f"{waiting} groups wait, max_queue_groups is {bounds.max_queue_groups}"
        elif fresh and held + sum(len(group.raw) for group in fresh) > bounds.max_queue_bytes:
            full = f"{held} bytes are held, max_queue_bytes is {bounds.max_queue_bytes}"
        if full:
            raise RequestError(429, "queue_full", f"the queue is full: {full}")
        duplicates = len(groups) - len(fresh)
        answer = reply(duplicates)
        for group in fresh:
            self._add(group)
        for env_id in {group.env_id for group in groups}:
            if (environment := self.environment(env_id)) is not None:
                self._save("environments", environment.env_id, environment)
        self.totals["duplicates"] += duplicates
        if key is not None:
            self.keys[key] = (digest, answer)
            self._save("keys", key, (next(self._numbers), digest, answer))
            self._forget_oldest("keys", self.keys, _REMEMBERED_KEYS)
        self._commit()
        return answer

    def _add(self, checked: CheckedGroup) -> None:
        now, seq = self.now(), self.next_seq
        group = StoredGroup(
            seq, checked.env_id, checked.size, checked.tokens, now, checked.digest, checked.raw, checked.suffix
        )
        self.next_seq = seq + 1
        self.groups[seq] = self.latest = group
        self.queue.add(group)
        self._count_held(group, 1)
        self._save("bodies", seq, group.raw)
        self._save_group(group)
        if (environment := self.environment(group.env_id)) is not None:
            environment.groups += 1
            environment.sequences += group.size
        if group.env_id is not None:
            mark = f"{group.env_id} {group.digest.hex()}"
            self.recent[mark] = now
            self.recent.move_to_end(mark)
            self._save("recent", mark, (now,))
        self.totals.update(groups=1, sequences=group.size, tokens=group.tokens)

    def replied(self, key: str | None, digest: bytes) -> bytes | None:
        """The answer that was given to this request before, else None. Raises as ``accept`` (``Refusal``)."""
        known = self.keys.get(key) if key is not None else None
        if known is not None and known[0] != digest:
            raise Refusal("idempotency", f"Idempotency-Key {key!r} was used for another body", value=key)
        return None if known is None else known[1]

    def _is_duplicate(self, group: CheckedGroup) -> bool:
        window, now = self.settings.dedupe_window, self.now()
        while self.recent and now - next(iter(self.recent.values())) > window:
            self._save("recent", self.recent.popitem(last=False)[0], None)
        environment = self.environment(group.env_id)
        if window == 0 or environment is None or f"{group.env_id} {group.digest.hex()}" not in self.recent:
            return False
        environment.duplicates += 1
        logger.info("environment %d sent a group again: stored once", environment.env_id)
        return True

    def nearly_full(self) -> bool:
        """Beyond the soft limit: environments are told to pause."""
        bounds = self.settings
        full = max(self.queue.groups / bounds.max_queue_groups, self.held_bytes / bounds.max_queue_bytes)
        return full >= bounds.soft_limit

    def keep_packed(self, group: StoredGroup, packed: bytes) -> None:
        self._count_held(group, -1)
        group.packed = packed
        self._count_held(group, 1)

    def members(self, batch: Batch) -> list[StoredGroup]:
        return [self.groups[seq] for seq in batch.seqs]

    def _count_held(self, group: StoredGroup, sign: int) -> None:
        packed = len(group.packed or b"")
        self.held_bytes += sign * (len(group.raw) + packed)
        self.packed_bytes += sign * packed
        self.held_tokens += sign * group.tokens

    # --- batches: at most one holder of each, at any time ------------------------------------------------------------

    def next_batch(self, lease_seconds: float | None) -> Batch | None:
        """Hand out the next batch, or None. The step advances, but for a batch that came back. Without a lease
        (``lease_seconds`` None) it is out until ``settle``."""
        now = self.now()
        if not self.started:
            self.started = True
            self._commit()
        self.expire()
        if self.returned:
            old = self.returned.pop(0)
            self.queue.count(self.members(old), -1)
            self._end_lease(old.lease_id, "superseded")
            earlier = [*old.earlier, old.lease_id][-_EARLIER_LEASES:]
            batch = replace(old, deliveries=old.deliveries + 1, earlier=earlier)
        elif (chosen := self._choose()) is not None:
            self.step += 1
            batch = Batch("", self.step, [group.seq for group in chosen], None)
            for group in self.queue.take(chosen):
                self._save_group(group)
            self.totals["batches"] += 1
            self._record_arrivals(batch.step, now, chosen)
        else:
            return None
        batch.lease_id, batch.seconds = uuid.uuid4().hex, lease_seconds
        batch.deadline = None if lease_seconds is None else now + lease_seconds
        self.outstanding[batch.lease_id] = batch
        self._save_batch(batch, out=True)
        self._commit()
        return batch

    def _record_arrivals(self, step: int, now: float, groups: Iterable[StoredGroup]) -> None:
        """A disk that refuses is reported once, and no batch fails for it."""
        if self._arrivals is None:
            return
        rows = [[round(group.arrived, 4), group.env_id, group.size, group.tokens] for group in groups]
        try:
            with self._arrivals.open("ab") as file:
                file.write(msgspec.json.encode({"step": step, "at": round(now, 4), "groups": rows}) + b"\n")
        except OSError as error:
            text = "cannot write %s: %s; arrivals are not recorded any more"
            logger.warning(text, self._arrivals, error.strerror)
            self._arrivals = None

    def ack(self, lease_id: str) -> str:
        """The batch was trained on. Returns ``acked``, ``already`` (a repeated ack) or ``late`` (after the lease
        ended, but before anybody else got the batch). Raises as ``release``."""
        self.expire()
        if self.leases.get(lease_id) == "closed":
            return "already"
        late = next((batch for batch in self.returned if batch.lease_id == lease_id), None)
        if late is None:
            self._drop(self._held(lease_id))
            return "acked"
        self.returned.remove(late)
        self.queue.count(self.members(late), -1)
        self._drop(late)
        logger.warning("lease %s was acked after it had ended; nobody else had it, so it counts", lease_id)
        return "late"

    def renew(self, lease_id: str, seconds: float) -> float:
        """Lease ends ``seconds`` from now. Returns its deadline in seconds since the epoch. Raises as ``release``."""
        batch = self._held(lease_id)
        batch.deadline, batch.seconds = self.now() + seconds, seconds
        self._save_batch(batch, out=True)
        self._commit()
        return batch.deadline

    def release(self, lease_id: str) -> None:
        """The holder does not want the batch: it is the next to be handed out. Raises ``RequestError`` 409 (the lease
        has ended, or somebody else has the batch) or 404."""
        self._take_back(self._held(lease_id), "released")

    def settle(self, lease_id: str, lost: str | None = None) -> None:
        """The response with a batch arrived, and without a lease it is done with; or why it did not: the batch comes
        back. Nobody waits for this to be stored, so what a disk refuses is tried again by ``expire``."""
        self._settled[lease_id] = lost
        batch = self.outstanding.get(lease_id)
        if batch is not None and lost is not None:
            self._take_back(batch, lost)
        elif batch is not None:
            self._drop(batch)

    def _take_back(self, batch: Batch, reason: str) -> None:
        del self.outstanding[batch.lease_id]
        bisect.insort(self.returned, batch, key=lambda other: other.step)
        self.queue.count(self.members(batch), 1)
        self.totals["returns"] += 1
        self._save_batch(batch, out=False)
        self._commit()
        logger.warning("batch of step %d returned to the queue: %s", batch.step, reason)

    def expire(self) -> None:
        now = self.now()
        for lease_id, lost in list(self._settled.items()):
            if lease_id in self.outstanding:
                self.settle(lease_id, lost)
            elif self._written is None or (self._written.done() and self._written.exception() is None):
                del self._settled[lease_id]
        for batch in list(self.outstanding.values()):
            if batch.deadline is not None and batch.deadline <= now:
                self._take_back(batch, "its lease ended without an ack")

    def _drop(self, batch: Batch) -> None:
        self.outstanding.pop(batch.lease_id, None)
        for group in self.members(batch):
            del self.groups[group.seq]
            self._count_held(group, -1)
            self._save("groups", group.seq, None)
            self._save("bodies", group.seq, None)
        self.totals["acks"] += 1
        self._end_lease(batch.lease_id, "closed")
        self._commit()

    def _end_lease(self, lease_id: str, how: str) -> None:
        self._save("batches", lease_id, None)
        self.leases[lease_id] = how
        self._save("leases", lease_id, (next(self._numbers), how))
        self._forget_oldest("leases", self.leases, _REMEMBERED_LEASES)

    def _forget_oldest(self, table: str, entries: OrderedDict[str, Any], limit: int) -> None:
        while len(entries) > limit:
            self._save(table, entries.popitem(last=False)[0], None)

    def _held(self, lease_id: str) -> Batch:
        """The batch that is out under this lease. Raises as ``release``."""
        self.expire()
        if lease_id in self.outstanding:
            return self.outstanding[lease_id]
        is_back = any(batch.lease_id == lease_id for batch in self.returned)
        how = "returned" if is_back else self.leases.get(lease_id)
        if how is None:
            raise RequestError(404, "", f"no lease {lease_id!r}; was the server reset?")
        raise RequestError(409, "", f"lease {lease_id} {_ENDS[how]}")

    # --- which groups ------------------------------------------------------------------------------------------------

    def _choose(self) -> Sequence[StoredGroup] | None:
        trainer, now = self.registration, self.now()
        if trainer is None:
            return None
        view = self._view(trainer.batch_size)
        chosen = choose_batch(view, trainer, now)
        if chosen is not None or not view.minimums:
            self._minimum_missed = None
            return chosen
        without = choose_batch(replace(view, minimums={}), trainer, now)
        if without is None:
            return None
        self._minimum_missed = now if self._minimum_missed is None else self._minimum_missed
        waited = now - self._minimum_missed
        if waited < trainer.min_allocation_wait:
            return None
        logger.warning("a batch is made without the share of environments %s (%.0f s)", sorted(view.minimums), waited)
        return without

    def _view(self, batch_size: int) -> QueueView:
        now, queue, alive, timeout = self.now(), self.queue, self.alive(), self.settings.env_timeout
        sizes: set[int] = set()
        for environment in alive:
            sizes |= queue.sizes_of(environment.env_id) or {environment.group_size}
        if now - queue.last_arrival < timeout:
            sizes |= queue.sizes_of(None)
        if sizes:
            sizes |= {size for _, size in queue.classes}
        minimums = {other.env_id: int(batch_size * (other.min_batch_allocation or 0)) for other in alive}
        # Those of an interrupted run have disconnected, and new ones cannot register before the trainer has asked for a
        # batch: they are expected for a while.
        last_heard = max((environment.heard_at for environment in self.environments), default=now)
        expected = last_heard <= self._registered_at and now - self._registered_at < timeout
        return QueueView(
            classes=queue.classes,
            total=queue.in_classes,
            last_arrival=queue.last_arrival,
            sizes_seen=frozenset(sizes),
            minimums={env_id: minimum for env_id, minimum in minimums.items() if minimum > 0},
            anyone_sending=bool(alive) or (bool(self.environments) and expected),
        )


def _in_order(rows: Mapping[Key, bytes], kind: type[_T]) -> list[tuple[str, _T]]:
    """(key, row) of each, in the order of the numbers that the rows begin with."""
    decoder = msgspec.json.Decoder(kind)
    found: list[Any] = [(str(key), decoder.decode(value)) for key, value in rows.items()]
    return sorted(found, key=lambda entry: entry[1][0])
