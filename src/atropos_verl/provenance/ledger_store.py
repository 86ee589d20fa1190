"""``LedgerStore`` keeps the ledger's records on disk, for the process that resumes the run.

``run_dir/ledger/ledger.sqlite`` is a ``RecordStore``. It holds what the ledger holds in memory: a record that the
ledger forgets is deleted here, too.

======= ===== ==================================================================
table   key   value
======= ===== ==================================================================
prompts hash  token ids of a prompt
spans   order one completion: ids, logprobs, version runs
uses    order number of trained sequences that hold the completion
state   0     the newest order; when the run was resumed
======= ===== ==================================================================

Half a ledger is worse than none: of two alike completions it might know only the wrong one. So a store that has lost
rows (it and its copy are damaged), or that cannot be written any more, is given up as a whole.
"""

import contextlib
import logging
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from atropos_verl.errors import StorageDamagedError, StorageError, StorageInUseError
from atropos_verl.storage import Change, RecordStore

logger = logging.getLogger(__name__)

_EARLIER = "segment-*.log"
"""Files of version 0.1.0. They cannot be read here, and are kept in ``earlier/``."""
_TABLES = dict.fromkeys(("prompts", "spans", "uses", "state"), int)


class StoredSpan(msgspec.Struct, array_like=True, frozen=True):
    """One completion, as ``SpanRecord`` describes it; the key is its order."""

    key: int
    request: int
    prompt: int
    ids: bytes
    logprobs: bytes
    runs: tuple[tuple[int, int], ...]
    temperature: float
    end_key: int


class StoredState(msgspec.Struct, array_like=True, frozen=True):
    """The newest order, and the processes that resumed the run."""

    key: int = 0
    orders: int = 0
    resumes: tuple[tuple[int, int], ...] = ()
    """(policy version it went on at, newest order before it), oldest first."""


Row = tuple[str, int, Any]
"""Table, key, and a value that holds the key as well: a tuple, or one of the structures above."""
T = TypeVar("T")


class Contents(msgspec.Struct):
    """The rows of a store when it was opened."""

    prompts: dict[int, bytes] = {}
    """Hash → token ids that completions came after."""
    spans: list[StoredSpan] = []
    uses: dict[int, int] = {}
    """Order of a completion → trained sequences that hold it."""
    state: StoredState = StoredState()


class LedgerStore:
    """Made by ``open``. Writes go to the thread of the ``RecordStore``."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._failed = False
        self.close = store.close
        """Finish the writes that wait. Idempotent."""

    @classmethod
    def open(cls, directory: Path, *, keep: bool) -> tuple[Self | None, Contents]:
        """The store of a run, or None with a warning when the directory cannot be used; and what earlier processes left
        there: nothing where any of it is damaged (a warning names the file), or without ``keep`` (it is removed)."""
        try:
            if keep:
                try:
                    store, found = _read_store(directory)
                    return cls(store), found
                except StorageInUseError:
                    raise
                except StorageDamagedError as error:
                    text = "The ledger begins empty: policy versions of tokens generated before this start are unknown"
                    logger.warning("%s. %s", error, text)
            return cls(_empty_store(directory)), Contents()
        except (StorageError, OSError) as error:
            logger.warning("the ledger will not survive a restart of this run: %s", error)
            return None, Contents()

    def write(self, rows: Sequence[Row], deleted: Sequence[tuple[str, int]] = ()) -> Future[None] | None:
        """Delete and then store rows, all or none. The future is done when that is so, and never raises.

        None: an earlier write has failed, and nothing is stored any more.
        """
        if self._failed:
            return None
        changes: list[Change] = [(table, _signed(key), None) for table, key in deleted]
        changes += [(table, _signed(key), msgspec.msgpack.encode(value)) for table, key, value in rows]
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # a client that goes away while it waits does not cancel it

        def written(future: Future[None]) -> None:
            """Called by the store's thread."""
            error = future.exception()
            # The files of a store that is closed may be another process's by now.
            if error is not None and not self._failed and not self._store.is_closed:
                self._failed = True
                directory = self._store.path.parent
                text = "%s: %s. After a restart the policy versions of tokens generated up to then are unknown"
                logger.warning(text, directory, error)
                with contextlib.suppress(OSError):
                    _remove(directory)  # the open connection goes on with files that have no name
            done.set_result(None)

        self._store.write(changes).add_done_callback(written)
        return done


def _open_store(directory: Path) -> RecordStore:
    return RecordStore(directory / "ledger.sqlite", _TABLES, owner="ledger")


def _empty_store(directory: Path) -> RecordStore:
    """Remove what is there, unless another process uses it: ``StorageInUseError``."""
    try:
        _open_store(directory).close()
    except StorageInUseError:
        raise
    except StorageDamagedError:
        pass  # which is what it is removed for
    _remove(directory)
    for file in directory.glob(_EARLIER):
        (directory / "earlier").mkdir(exist_ok=True)
        file.replace(directory / "earlier" / file.name)
    return _open_store(directory)


def _remove(directory: Path) -> None:
    for file in directory.glob("ledger*.sqlite*"):
        file.unlink(missing_ok=True)


def _signed(key: int) -> int:
    """A 64-bit hash as the signed integer that SQLite can hold."""
    return key - (1 << 64) if key >= 1 << 63 else key


def _read_store(directory: Path) -> tuple[RecordStore, Contents]:
    """Raises ``StorageDamagedError`` when a row is damaged or missing, ``StorageInUseError``."""
    store = _open_store(directory)
    try:
        if any(directory.glob(_EARLIER)):
            kept = f"in files {_EARLIER}, which are kept in {directory / 'earlier'}"
            raise StorageDamagedError(f"{directory} holds the ledger of an earlier version, {kept}")
        found = Contents(
            prompts=dict(_rows(store, "prompts", tuple[int, bytes])),
            spans=_rows(store, "spans", StoredSpan),
            uses=dict(_rows(store, "uses", tuple[int, int])),
            state=(_rows(store, "state", StoredState) or [StoredState()])[0],
        )
        if store.lost_rows or any(span.prompt not in found.prompts for span in found.spans):
            raise StorageDamagedError(f"{store.path} and its copy are damaged: rows are missing")
    except BaseException:
        store.close()
        raise
    return store, found


def _rows(store: RecordStore, table: str, kind: type[T]) -> list[T]:
    decoder = msgspec.msgpack.Decoder(kind)
    rows = []
    for _, value in store.read(table):
        try:
            rows.append(decoder.decode(value))
        except msgspec.MsgspecError as error:
            raise StorageDamagedError(f"{store.path} holds a row that is not one of a ledger ({error})") from error
    return rows
