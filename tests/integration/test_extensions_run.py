"""A user's four functions in whole steps of the local backend: what they return is what is trained."""

from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from support import plugged_into_verl
from support.lab import GROUP_SIZE, GROUPS, Lab, state_of
from support.runs import metrics_of
from support.scripted_api import batch_of
from support.trajectory_server import TrajectoryServer, group

from atropos_verl import AtroposTrainer
from atropos_verl.errors import ConfigError
from atropos_verl.report.trace_reader import TraceReader


def every_other(groups: Any) -> Any:
    """The first of each batch."""
    return [i % 2 == 0 for i in range(len(groups))]


def test_what_the_functions_return_is_trained(lab: Lab) -> None:
    # Without advantages of the environment, which would replace those of the function.
    groups = [group(number, GROUP_SIZE, scores=[5.0, 7.0] * (GROUP_SIZE // 2)) for number in range(2 * GROUPS)]
    settings = {
        "loss": {"path": "support.plugged_into_verl:constant_loss"},
        "algorithm": {"advantage_path": "support.plugged_into_verl:two_or_minus_two"},
        "data": {"max_token_len": 16, "filter_path": f"{__name__}:every_other"},
        "reward": {"path": "support.plugged_into_verl:numbered"},
        "advantage_normalization": "none",
        "sync": {"canary": False},
    }
    with lab.trainer("run", [batch_of(groups[:GROUPS]), batch_of(groups[GROUPS:])], 2, **settings) as trainer:
        before = state_of(trainer)["weights"]
        summary = trainer.fit()
        after = state_of(trainer)["weights"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    for line in metrics_of(lab.root / "run"):
        assert (line["loss"], line["actor/grad_norm"], line["advantage/mean_abs"]) == (2.5, 0.0, 2.0)
        assert line["data/filtered"] == GROUPS // 2
        assert line["reward/mean"] == sum(range(GROUP_SIZE)) / GROUP_SIZE
    assert (summary["groups_used"], summary["groups_filtered"]) == (GROUPS, GROUPS)


def test_rl_training_step_asks_the_function_once_for_each_completion(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = create_autospec(plugged_into_verl.numbered, side_effect=plugged_into_verl.numbered)
    monkeypatch.setattr(plugged_into_verl, "numbered", asked)
    with TrajectoryServer() as server:
        config = {
            "atropos": {"api_url": server.url},
            "model": {"path": str(model_path)},
            "run_dir": str(tmp_path / "run"),
            "group_size": 4,
            "max_response_length": 4,
            "sync": {"canary": False},
        }
        theirs = {**config, "reward": {"path": "support.plugged_into_verl:numbered"}}
        with pytest.raises(ConfigError, match="reward_fn was given as well"):
            AtroposTrainer.from_config(theirs, reward_fn=asked)
        for wrong in (lambda prompts, completions: None, lambda prompts, completions: ["good"] * len(completions)):
            said = r"reward_fn: .*<lambda> returned (NoneType None, not a list of 4 scores|str 'good' as score 0)"
            with AtroposTrainer.from_config(config, reward_fn=wrong) as trainer, pytest.raises(ConfigError, match=said):
                trainer.rl_training_step(["ab"])
        with AtroposTrainer.from_config(theirs) as trainer:
            report = trainer.rl_training_step(["ab", "cd"])
    assert [len(call.args[1]) for call in asked.call_args_list] == [8]
    assert report.metrics["reward/mean"] == 3.5
    reader = TraceReader(tmp_path / "run")
    items = [item for one in reader.rollouts() for item in reader.sequence(one["id"])["items"] if item["trained"]]
    assert items and all(abs(item["mismatch"]) < 1e-3 for item in items)  # the engine's model is the trainer's
