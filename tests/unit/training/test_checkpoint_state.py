"""Checkpoints: what is read back, what is found of damage, which are kept, which settings a resume names."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import CheckpointError, ConfigError
from atropos_verl.training import checkpoint_state
from atropos_verl.training.checkpoint_state import (
    RunState,
    changed_settings,
    find_checkpoint,
    find_damage,
    mark_best,
    new_checkpoint,
    saved_step,
)

TRACKER = "latest_checkpointed_iteration.txt"
SHARD = "actor/model_world_size_1_rank_0.pt"


def _save(root: Path, *steps: int, keep: int | None = None, content: str = "", **how: Any) -> RunState:
    for step in steps:
        state = RunState(step=step, policy_version=step + 1, held_out={"before": 0.5})
        state.moments.update(np.array([1.0, 3.0, 0.1]))
        state.totals.tokens_trained = 7
        with new_checkpoint(root, step, keep, **how) as directory:
            (directory / "actor").mkdir(exist_ok=True)
            (directory / SHARD).write_text(f"the weights of step {step} {content}")
            state.save(directory, RunConfig())
    return state


def _steps(root: Path) -> list[int]:
    return sorted(int(path.name.split("_")[2]) for path in root.glob("global_step_*"))


def _found(root: Path, resume: str = "auto") -> tuple[Path | None, list[str]]:
    told: list[str] = []
    checkpoint_state._checksum.cache_clear()  # a test writes twice within one tick of the file system's clock
    return find_checkpoint(root, resume, told.append), told


def _files(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("in_place", [False, True])
def test_what_was_saved_is_restored_to_the_last_bit(tmp_path: Path, in_place: bool) -> None:
    assert saved_step(tmp_path, "auto") == 0
    assert _found(tmp_path / "nothing") == (None, [])
    expected = _save(tmp_path, 4, in_place=in_place)
    found, directory = RunState(), find_checkpoint(tmp_path, "auto")
    found.restore(directory)
    assert found == expected
    assert saved_step(tmp_path, "auto") == saved_step(tmp_path, str(directory)) == 4
    assert saved_step(tmp_path, "disable") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"global_step_4", TRACKER}


def test_older_checkpoints_go_and_never_the_one_just_written(tmp_path: Path) -> None:
    _save(tmp_path, 2, 4, 10, keep=2)
    assert _steps(tmp_path) == [4, 10]
    for step, keep in ((1, None), (2, 0), (3, -1), (5, None), (6, None)):
        _save(tmp_path, step, keep=keep)
    assert _steps(tmp_path) == [1, 2, 3, 4, 5, 6, 10]
    # Rolled back to 2: 3 and 4 are written anew, and 5, 6 and 10 are of no past of theirs.
    _save(tmp_path, 3, keep=2, content="anew")
    assert _steps(tmp_path) == [2, 3]
    _save(tmp_path, 4, keep=2)
    assert _steps(tmp_path) == [3, 4]
    assert (tmp_path / "global_step_3" / SHARD).read_text().endswith("anew")
    assert _found(tmp_path) == (tmp_path / "global_step_4", [])
    _save(tmp_path, 4, keep=1)
    assert _steps(tmp_path) == [4]


def test_the_best_checkpoint_stays_and_so_does_the_one_that_is_evaluated(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2, keep=1)
    mark_best(tmp_path, 2)
    _save(tmp_path, 3, 4, 5, keep=1, spare=3)
    assert _steps(tmp_path) == [2, 3, 5]
    assert saved_step(tmp_path, str(tmp_path / "best")) == 2
    mark_best(tmp_path, 3)
    mark_best(tmp_path, 4)  # is gone
    assert (tmp_path / "best").resolve() == tmp_path / "global_step_3"
    _save(tmp_path, 6, keep=1)
    assert _steps(tmp_path) == [3, 6]
    assert find_checkpoint(tmp_path, "auto") == tmp_path / "global_step_6"


def _flip(path: Path, position: int = 3) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << position % 8
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        (SHARD, lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 21 bytes, but 22 were written"),
        (SHARD, _flip, "its checksum is not that of what was written"),
        (SHARD, Path.unlink, "No such file"),
        ("atropos.json", Path.unlink, "No such file"),
        ("manifest.json", lambda path: path.write_text("{"), "cannot be read"),
        ("manifest.json", lambda path: path.write_text('{"files": [1]}'), "cannot be read"),
        ("manifest.json", Path.unlink, "has no manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path: Path, name: str, damage: Callable[[Path], object], text: str
) -> None:
    _save(tmp_path, 2, 4, 6)
    newest = tmp_path / "global_step_6"
    damage(newest / name)
    found, [told] = _found(tmp_path)
    assert found == tmp_path / "global_step_4"
    assert text in told and str(newest) in told and told.endswith("; global_step_4 is used")
    if name == SHARD:
        with pytest.raises(CheckpointError, match=r"model_world_size_1_rank_0.pt .* Resume from another checkpoint"):
            _found(tmp_path, str(newest))
    for step in (2, 4):
        shutil.rmtree(tmp_path / f"global_step_{step}")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is complete"):
        _found(tmp_path)


def test_no_flipped_bit_of_any_file_goes_unnoticed(tmp_path: Path) -> None:
    """At every 23rd byte; ``ATROPOS_EVERY_BYTE=1``: at every one."""
    _save(tmp_path, 4, 6)
    for path, content in _files(tmp_path / "global_step_6").items():
        for position in range(0, len(content), 1 if os.environ.get("ATROPOS_EVERY_BYTE") else 23):
            _flip(path, position)
            found, told = _found(tmp_path)
            if path.name == "manifest.json" and find_damage(tmp_path / "global_step_6") is None:
                assert found == tmp_path / f"global_step_{6 if not told else 4}"  # its number: all files are whole
            else:
                assert (found, len(told)) == (tmp_path / "global_step_4", 1), (path, position)
            path.write_bytes(content)


def test_a_tracker_file_that_lies_changes_nothing(tmp_path: Path) -> None:
    _save(tmp_path, 6)
    for content in (b"\xff\x00", b"4", b"7"):
        (tmp_path / TRACKER).write_bytes(content)
        assert _found(tmp_path) == (tmp_path / "global_step_6", [])
    shutil.rmtree(tmp_path / "global_step_6")
    with pytest.raises(CheckpointError, match="none that it could name"):
        _found(tmp_path)


def test_after_a_rollback_the_one_before_is_of_the_same_past(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2, 3, 4, 3)
    assert _found(tmp_path)[0] == tmp_path / "global_step_3", "the newest, though a later step is there"
    _flip(tmp_path / "global_step_3" / SHARD)
    assert _found(tmp_path)[0] == tmp_path / "global_step_2"


def test_one_that_was_about_to_be_replaced_is_found_and_kept(tmp_path: Path) -> None:
    """A process that saves step 6 anew dies between the two renames: one of them has a name that nobody looks for."""
    _save(tmp_path, 4, 6)
    place = tmp_path / "unfinished" / "replaced" / "global_step_6"
    place.parent.mkdir(parents=True)
    (tmp_path / "global_step_6").rename(place)
    assert _found(tmp_path) == (place, [])
    _save(tmp_path, 7, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"global_step_6", "global_step_7", TRACKER}


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a checkpoint of this project \(no atropos.json\)"):
        find_checkpoint(tmp_path, str(tmp_path))
    with pytest.raises(CheckpointError, match=r"does not say which batches were trained"):
        RunState().restore(tmp_path)
    (tmp_path / "atropos.json").write_text('{"step": 1}')
    with pytest.raises(CheckpointError, match="policy_version"):
        RunState().restore(tmp_path)
    # One of an earlier version has no manifest: only who names it gets it.
    assert _found(tmp_path, str(tmp_path))[1] == [
        f"{tmp_path} has no manifest.json (earlier versions wrote none): it is used unchecked"
    ]


def test_one_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    _save(tmp_path, 4)
    before, said = _files(tmp_path), "unexpected pos 64 vs 0"  # as torch says it of a full disk
    for cause in (said, r"No space left on device \([\d.]+ MB are free there\)"):
        text = f"cannot write the checkpoint {tmp_path}/global_step_4: .*{cause}"
        with pytest.raises(CheckpointError, match=text), new_checkpoint(tmp_path, 4, 1) as directory:
            (directory / "half").write_text("of it")
            raise RuntimeError(said)
        assert _files(tmp_path) == before
        monkeypatch.setattr(checkpoint_state, "write_atomic", no_space)
    with pytest.raises(CheckpointError, match="No space left"):
        _save(tmp_path, 4, keep=1)
    assert _files(tmp_path) == before


OF_ONE_START = ("run_dir", "resume", "atropos.api_url", "atropos.token", "atropos.headers", "eval.commands_file")


def test_every_setting_that_has_changed_since_a_checkpoint_is_named_and_no_key_is_kept(tmp_path: Path) -> None:
    secrets = {"atropos": {"token": "s3cret", "headers": {"x": "s3cret"}}, "gateway": {"api_key": "s3cret"}}
    config = RunConfig.from_mapping(secrets)
    RunState(step=1).save(tmp_path, config)
    text = (tmp_path / "atropos.json").read_text()
    assert "s3cret" not in text
    saved = json.loads(text)
    assert changed_settings(saved, config) == changed_settings({}, config) == []
    leaves: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        leaves |= {f"{name}.{key}": own for key, own in value.items()} if isinstance(value, dict) else {name: value}
    for key, value in leaves.items():
        is_known = key in saved["settings"]
        assert is_known != (key in OF_ONE_START or key.startswith("gateway.")), key
        if is_known:
            effect = " (no effect: " if key in ("model.path", "eval.before") else ""
            [change] = changed_settings({"settings": {**saved["settings"], key: "another"}}, config)
            assert change.startswith(f'{key} "another" → {json.dumps(value)}{effect}')
