"""``LedgerStore`` keeps the ledger's records on disk, for the process that resumes the run.

``run_dir/ledger/ledger.sqlite`` is a ``RecordStore``. It holds what the ledger holds in memory: a record that the
ledger forgets is deleted here, too.

Half a ledger is worse than none: of two alike completions it might know only the wrong one. So a store that has lost
rows (it and its copy are damaged), or that cannot be written any more, is given up as a whole.
"""

import contextlib
import logging
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

import msgspec

from atropos_verl.errors import StorageDamagedError, StorageError, StorageInUseError
from atropos_verl.storage import RecordStore

logger = logging.getLogger(__name__)

Runs = tuple[tuple[int, int], ...]
"""(policy version, tokens it wrote), in order."""
Row = tuple[str, int, tuple[Any, ...] | None]
"""Table, key, and a value that begins with the key; None deletes."""


class Contents(msgspec.Struct):
    """The rows of a store when it was opened, by table. The first entry of each is its key."""

    prompts: list[tuple[int, bytes]] = []  # hash, token ids
    spans: list[tuple[int, int, int, bytes, bytes, Runs, float, int]] = []
    """Order, request, hash of the prompt, ids, logprobs, runs, temperature, hash of the end, as in ``SpanRecord``."""
    uses: list[tuple[int, int]] = []  # order, trained sequences that hold it
    state: list[tuple[int, int, Runs]] = []
    """0, the newest order, and (policy version, newest order before it) of each process that resumed the run."""


_TABLES = Contents.__struct_fields__


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
            try:
                store = _open_store(directory)
                if keep:
                    return cls(store), _read(store)
                store.close()
            except StorageInUseError:
                raise
            except StorageDamagedError as error:
                if keep:
                    text = "The ledger begins empty: policy versions of tokens generated before this start are unknown"
                    logger.warning("%s. %s", error, text)
            _remove(directory)
            return cls(_open_store(directory)), Contents()
        except (StorageError, OSError) as error:
            logger.warning("the ledger will not survive a restart of this run: %s", error)
            return None, Contents()

    def write(self, rows: Iterable[Row]) -> Future[None] | None:
        """Store and delete rows in this order, all or none. The future is done when that is so, and never raises.

        None: an earlier write has failed, and nothing is stored any more.
        """
        if self._failed:
            return None
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

        encode = msgspec.msgpack.encode
        changes = [(table, _signed(key), None if value is None else encode(value)) for table, key, value in rows]
        self._store.write(changes).add_done_callback(written)
        return done


def _open_store(directory: Path) -> RecordStore:
    return RecordStore(directory / "ledger.sqlite", dict.fromkeys(_TABLES, int), owner="ledger")


def _remove(directory: Path) -> None:
    for file in directory.glob("ledger*.sqlite*"):
        file.unlink(missing_ok=True)


def _signed(key: int) -> int:
    """A 64-bit hash as the signed integer that SQLite can hold."""
    return key - (1 << 64) if key >= 1 << 63 else key


def _read(store: RecordStore) -> Contents:
    """Closes the store, and raises ``StorageDamagedError``, when a row is damaged or missing."""
    try:
        tables = {name: [msgspec.msgpack.decode(value) for _, value in store.read(name)] for name in _TABLES}
        found = msgspec.convert(tables, Contents)
        prompts = dict(found.prompts)
        if store.lost_rows or any(span[2] not in prompts for span in found.spans):
            raise StorageDamagedError(f"{store.path} and its copy are damaged: rows are missing")
        return found
    except msgspec.MsgspecError as error:
        store.close()
        raise StorageDamagedError(f"{store.path} holds a row that is not one of a ledger ({error})") from error
    except StorageDamagedError:
        store.close()
        raise
