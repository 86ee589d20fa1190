"""Sample rollouts go to the trackers that can show some."""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from support.traced_run import write_run

from atropos_verl.report.trace_reader import TraceReader
from atropos_verl.report.trackers import send_rollouts


def test_rollouts_of_a_step_are_a_table_in_wandb_and_conversations_in_trackio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = TraceReader(write_run(tmp_path / "run", steps=3))
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Trace=lambda **about: about))
    tracking = Mock(logger={"wandb": SimpleNamespace(Table=lambda **about: about), "trackio": Mock(), "file": Mock()})
    for step in range(1, 5):
        send_rollouts(tracking, reader, step)
    wandb, trackio = (call.kwargs for call in tracking.log.call_args_list)
    assert (wandb["step"], wandb["backend"], trackio["backend"]) == (2, ["wandb"], ["trackio"])
    table = wandb["data"]["rollouts"]
    assert table["columns"][-2:] == ["prompt", "answer"]
    ids = [1 << 32 | 1, 1 << 32]
    assert table["data"] == [
        [1, ids[0], 0, 0.0, 4, "ab", "a<|im_end|>"],
        [1, ids[1], 0, 1.0, 4, "ab", "c<|im_end|>"],
    ]
    assert [turn["content"] for turn in trackio["data"]["rollouts"][0]["messages"]] == ["ab", "a<|im_end|>"]
    tracking.logger = {"tensorboard": Mock()}
    send_rollouts(tracking, reader, 2)
    assert tracking.log.call_count == 2
