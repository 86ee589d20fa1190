"""verl's contract with the agent-loop manager: slots to the feed, validation prompts to verl's own manager."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest
from verl.utils import tensordict_utils as tu

from atropos_verl.backends.ray.trainer import AtroposAgentLoopManager


@pytest.mark.parametrize("extra", [{}, {"validate": True}])
@pytest.mark.parametrize("wrap", [True, False])
def test_slots_of_training_go_to_the_feed_and_prompts_of_validation_to_verls_manager(
    extra: dict[str, Any], wrap: bool
) -> None:
    feed, validation = Mock(), Mock()
    manager = AtroposAgentLoopManager(SimpleNamespace(), feed, llm_client=None)
    manager._validation = validation
    uids = {"uid": np.array(["a", "b"], dtype=object)}
    prompts = tu.get_tensordict(uids, {"global_steps": 7, **({} if wrap else extra)})
    for name, value in (extra if wrap else {}).items():
        tu.assign_non_tensor_data(prompts, name, value)  # as verl's trainer does
    manager.generate_sequences(prompts)
    assert feed.request.mock_calls == ([] if extra else [call("a", 7), call("b", 7)])
    assert validation.generate_sequences.mock_calls == ([call(prompts)] if extra else [])
