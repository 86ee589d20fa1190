"""verl's contract with the agent-loop manager: slots to the feed, validation prompts to verl's own manager."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from verl.utils import tensordict_utils as tu

from atropos_verl.backends.ray.trainer import AtroposAgentLoopManager


class Recorder:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def request(self, uid: str, step: int) -> None:
        self.calls.append((uid, step))

    def generate_sequences(self, prompts: Any) -> None:
        self.calls.append(list(prompts["uid"]))


def prompts(**extra: Any) -> Any:
    return tu.get_tensordict({"uid": np.array(["a", "b"], dtype=object)}, {"global_steps": 7, **extra})


def manager() -> tuple[AtroposAgentLoopManager, Recorder, Recorder]:
    feed, validation = Recorder(), Recorder()
    made = AtroposAgentLoopManager(SimpleNamespace(), feed, llm_client=None)  # type: ignore[arg-type]
    made._validation = validation
    return made, feed, validation


def test_slots_of_training_go_to_the_feed() -> None:
    made, feed, validation = manager()
    made.generate_sequences(prompts())
    assert feed.calls == [("a", 7), ("b", 7)]
    assert validation.calls == []


@pytest.mark.parametrize("wrap", [True, False])
def test_prompts_of_validation_go_to_verls_manager(wrap: bool) -> None:
    made, feed, validation = manager()
    batch = prompts()
    if wrap:
        tu.assign_non_tensor_data(batch, "validate", True)  # as verl's trainer does
    else:
        batch = prompts(validate=True)
    made.generate_sequences(batch)
    assert validation.calls == [["a", "b"]]
    assert feed.calls == []
