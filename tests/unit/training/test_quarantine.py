"""Quarantine files: written, looked at as plain JSON, read back byte for byte."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from atropos_verl.errors import DataError
from atropos_verl.protocol.wire import decode_group
from atropos_verl.training.quarantine import QuarantineStore, parse_quarantine_file
from atropos_verl.types import QuarantinedGroup, ScoredGroup


def put(directory: Path, group: bytes | ScoredGroup, reason: str = "scores: missing", **settings: Any) -> Any:
    group = decode_group(group) if isinstance(group, bytes) else group
    return QuarantineStore(directory, **settings).put(QuarantinedGroup(group=group, reason=reason))


def test_a_group_is_kept_as_it_came(tmp_path: Path) -> None:
    raw = b'{"tokens": [[5, 6]],  "masks": [[-100, 7]], "scores": [1e0], "env_id": 3}'
    reason = "masks[0][1] = 7: must be -100 or the token id 6"
    path = put(tmp_path / "quarantine", raw, reason)
    group_id = xxhash.xxh3_128_hexdigest(raw)[:16]
    assert path == tmp_path / "quarantine" / f"{group_id}.json"
    group = {"tokens": [[5, 6]], "masks": [[-100, 7]], "scores": [1.0], "env_id": 3}
    assert json.loads(path.read_text()) == {"reason": reason, "group_id": group_id, "env_id": 3, "group": group}
    # Two spaces and 1e0 included: the id is a hash of these.
    assert parse_quarantine_file(path.read_bytes()) == (reason, raw)
    assert put(tmp_path / "quarantine", raw, "again") == path
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("raw", "key", "stored"),
    [
        (b'{"tokens": [[5]], "scores": [NaN]}', "raw", '{"tokens": [[5]], "scores": [NaN]}'),
        (b"\xff\xfe{}", "raw_base64", base64.b64encode(b"\xff\xfe{}").decode()),
        (b"[" * 5000, "raw", "[" * 5000),
        (b'"just text"', "group", "just text"),
    ],
)
def test_what_is_not_json_is_kept_too(tmp_path: Path, raw: bytes, key: str, stored: str) -> None:
    path = put(tmp_path, raw)
    content = json.loads(path.read_text())
    assert content[key] == stored
    assert set(content) == {"reason", "group_id", "env_id", key}
    assert parse_quarantine_file(path.read_bytes())[1] == raw


def test_a_reason_that_quotes_a_lone_surrogate_can_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = put(tmp_path, b"{}", "overrides[0].temperature = '\ud800': must be a number")
    escaped = r"overrides[0].temperature = '\ud800': must be a number"
    # A comparison that fails with a lone surrogate in its text ends a parallel test run.
    for written in (json.loads(path.read_text())["reason"], caplog.messages[0]):
        assert escaped.encode() in written.encode("utf-8", "surrogatepass")


def test_the_oldest_go_beyond_the_bound_and_never_the_one_just_written(tmp_path: Path) -> None:
    store = QuarantineStore(tmp_path, bound=4000)
    for number in range(60):
        raw = b'{"tokens": [[%d]], "padding": "%s"}' % (number, b"x" * 400)
        newest = store.put(QuarantinedGroup(group=decode_group(raw), reason="scores: missing"))
        os.utime(newest, ns=(number, number))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4000 * 17 / 16
    times = sorted(path.stat().st_mtime_ns for path in tmp_path.iterdir())
    assert times == list(range(60 - len(times), 60))
    assert [put(tmp_path, b'{"tokens": [[1]]}', bound=10)] == list(tmp_path.iterdir())  # larger than the bound


def test_a_group_that_never_was_bytes_is_written_from_its_arrays(tmp_path: Path) -> None:
    group = ScoredGroup(
        token_ids=(np.array([5, 6]),),
        masks=(np.array([-100, 6]),),
        scores=np.array([np.nan]),
        advantages=(None,),
        overrides=({"temperature": 2},),
        group_id="../../etc/passwd",
    )
    path = put(tmp_path, group)
    assert path == tmp_path / "______etc_passwd.json"
    assert json.loads(path.read_text())["raw"] == (
        '{"tokens": [[5, 6]], "masks": [[-100, 6]], "scores": [NaN], "advantages": [null], '
        '"overrides": [{"temperature": 2}]}'
    )


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{", "not a quarantine file: Input data was truncated"),
        (b'{"reason": "x"}', "missing required field `group_id`"),
        (b'{"reason": "x", "group_id": "y"}', "it has none of group, raw, raw_base64"),
        (b'{"reason": "x", "group_id": "y", "raw_base64": "!"}', "Invalid base64 encoded string - at `\\$.raw_base64`"),
    ],
)
def test_what_is_no_quarantine_file_is_refused(content: bytes, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        parse_quarantine_file(content)


def test_a_disk_that_takes_no_group_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "quarantine").write_text("where the directory would be")
    assert put(tmp_path / "quarantine", b"{}", "no tokens") is None
    assert "group quarantined: no tokens (and it is not kept: " in caplog.text
