"""Our state beside verl's checkpoints: what is read back, what is refused, and which checkpoints are kept."""

from pathlib import Path

import numpy as np
import pytest

from atropos_verl.errors import CheckpointError, ConfigError
from atropos_verl.training.checkpoint_state import RunState, find_checkpoint, finish_checkpoint, saved_step


def _saved(root: Path, step: int, keep: int | None = None) -> RunState:
    state = RunState(step=step, policy_version=step + 1, held_out={"before": 0.5})
    state.moments.update(np.array([1.0, 3.0, 0.1]))
    state.totals.tokens_trained = 7
    directory = root / "checkpoints" / f"global_step_{step}"
    state.save(directory, model_path="/models/mine")
    finish_checkpoint(directory, step, keep)
    return state


def test_what_was_saved_is_restored_to_the_last_bit(tmp_path: Path) -> None:
    assert saved_step(tmp_path, "auto") == 0
    expected = _saved(tmp_path, 4)
    found, directory = RunState(), find_checkpoint(tmp_path, "auto")
    found.restore(directory)
    assert found == expected
    assert saved_step(tmp_path, "auto") == saved_step(tmp_path, str(directory)) == 4
    assert saved_step(tmp_path, "disable") == 0


def test_older_checkpoints_beyond_those_to_keep_are_removed(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        _saved(tmp_path, step, keep=2)
    root = tmp_path / "checkpoints"
    assert sorted(path.name for path in root.glob("global_step_*")) == ["global_step_10", "global_step_4"]
    assert find_checkpoint(tmp_path, "auto") == root / "global_step_10"


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a checkpoint of this project \(no atropos.json\)"):
        find_checkpoint(tmp_path, str(tmp_path))
    with pytest.raises(CheckpointError, match=r"does not say which batches were trained"):
        RunState().restore(tmp_path)
    (tmp_path / "atropos.json").write_text('{"step": 1}')
    with pytest.raises(CheckpointError, match="policy_version"):
        RunState().restore(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(CheckpointError, match="global_step_7, which does not exist"):
        find_checkpoint(tmp_path, "auto")


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*file"):
        RunState().save(tmp_path / "file" / "global_step_1")
