"""Refused groups are kept in one JSON file each, with the reason and the group exactly as it came."""

import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from atropos_verl.errors import DataError
from atropos_verl.storage import write_atomic
from atropos_verl.types import QuarantinedGroup, ScoredGroup

logger = logging.getLogger(__name__)


class _File(msgspec.Struct, kw_only=True):
    """The content of a file, with the group under one name: ``group`` its JSON, byte for byte; ``raw`` text that is
    not JSON (NaN, cut short); ``raw_base64`` not even text."""

    reason: str
    group_id: str
    env_id: int | None = None
    group: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    raw: str | msgspec.UnsetType = msgspec.UNSET
    raw_base64: bytes | msgspec.UnsetType = msgspec.UNSET


@dataclass
class QuarantineStore:
    """Writes refused groups to a directory, which it makes at the first one. Beyond ``bound`` bytes the oldest go. The
    name is the group's id, a hash of its content: the same group refused again, or replayed, is one file."""

    directory: Path
    bound: int = 1 << 30
    _unseen: float = math.inf  # bytes written since the directory was measured

    def put(self, refused: QuarantinedGroup) -> Path | None:
        """Writes ``DIRECTORY/GROUP_ID.json``, atomically, and says so in the log. None: the disk refuses it, which the
        log says too, and the run goes on."""
        group, raw = refused.group, refused.group.raw or _encode(refused.group)
        group_id = re.sub(r"[^A-Za-z0-9_-]", "_", group.group_id)
        # A reason may quote lone surrogates of the group, which neither JSON nor the log can carry.
        reason = refused.reason.encode("utf-8", "backslashreplace").decode()
        content = _File(reason=reason, group_id=group_id, env_id=group.env_id)
        try:
            msgspec.json.decode(raw)
            content.group = msgspec.Raw(raw)
        except (msgspec.DecodeError, RecursionError):
            try:
                content.raw = raw.decode()
            except UnicodeDecodeError:
                content.raw_base64 = raw
        path = self.directory / f"{group_id}.json"
        # Not durable: a hostile environment can fill thousands of these a minute, and a lost one does no harm.
        encoded = msgspec.json.encode(content) + b"\n"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomic(path, encoded)
            self._unseen += len(encoded)
            if self._unseen > self.bound / 16:
                self._remove_oldest(path)
        except OSError as error:
            logger.warning("group quarantined: %s (and it is not kept: %s)", reason, error)
            return None
        logger.warning("group quarantined: %s (%s)", reason, path)
        return path

    def _remove_oldest(self, newest: Path) -> None:
        self._unseen = 0
        files = [(path, path.stat()) for path in self.directory.glob("*.json")]
        total = sum(status.st_size for _, status in files)
        for path, status in sorted(files, key=lambda file: file[1].st_mtime_ns):
            if total > self.bound and path != newest:
                path.unlink(missing_ok=True)
                total -= status.st_size


def parse_quarantine_file(content: bytes) -> tuple[str, bytes]:
    """Returns the reason, and the group as it came. Raises ``DataError`` when it is no quarantine file."""
    try:
        file = msgspec.json.decode(content, type=_File)
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"not a quarantine file: {error}") from error
    for found in (file.group, file.raw, file.raw_base64):
        if not isinstance(found, msgspec.UnsetType):
            return file.reason, found.encode() if isinstance(found, str) else bytes(found)
    raise DataError("not a quarantine file: it has none of group, raw, raw_base64")


def _encode(group: ScoredGroup) -> bytes:
    """JSON of a group that came packed. Bad values are kept: NaN stays NaN."""
    names = (
        "masks scores advantages inference_logprobs ref_logprobs overrides group_overrides generation_params "
        "messages env_id"
    )
    fields = {"tokens": group.token_ids, **{name: getattr(group, name) for name in names.split()}}
    present = {name: value for name, value in fields.items() if value is not None}
    return json.dumps(present, default=lambda of: of.tolist() if hasattr(of, "tolist") else repr(of)).encode()
