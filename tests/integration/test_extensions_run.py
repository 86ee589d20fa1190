"""A user's four functions in whole steps of the local backend: what they return is what is trained."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.lab import GROUP_SIZE, GROUPS, Lab, state_of
from support.runs import metrics_of
from support.scripted_api import batch_of
from support.trajectory_server import ServerProcess, group

from atropos_verl.errors import ConfigError
from atropos_verl.report.trace_reader import TraceReader

ME = __name__
PLAIN = {"advantage_normalization": "none", "sync": {"canary": False}}
seen: list[int] = []


def constant(logprobs: Any, *_: Any, **__: Any) -> Any:
    return logprobs.new_tensor(2.5), {}


def zero(scores: Any, group: Any) -> Any:
    return np.zeros(len(scores))


def every_other(groups: Any) -> Any:
    """The first of each batch."""
    return [i % 2 == 0 for i in range(len(groups))]


def numbered(prompts: list[str], completions: list[str]) -> list[float]:
    """0, 1, 2, …: no environment's scores."""
    seen.append(len(completions))
    return [float(i) for i in range(len(completions))]


def batches(count: int) -> list[bytes]:
    """Without advantages of the environment, which would replace those of a function; scores of 5 and 7."""
    scores = [5.0, 7.0] * (GROUP_SIZE // 2)
    return [batch_of([group(2 * n + i, GROUP_SIZE, scores=scores) for i in range(GROUPS)]) for n in range(count)]


@pytest.mark.parametrize(
    ("settings", "loss", "moves"),
    [
        ({"loss": {"path": f"{ME}:constant"}}, 2.5, False),
        ({"algorithm": {"advantage_path": f"{ME}:zero"}}, 0.0, False),
        ({}, None, True),
    ],
    ids=["a constant loss", "advantages of 0", "ours"],
)
def test_what_a_function_returns_is_trained(lab: Lab, settings: Any, loss: float | None, moves: bool) -> None:
    with lab.trainer("run", batches(1), 1, **PLAIN, **settings) as trainer:
        before = state_of(trainer)["weights"]
        trainer.fit()
        after = state_of(trainer)["weights"]
    assert any(not torch.equal(before[name], after[name]) for name in before) == moves
    [line] = metrics_of(lab.root / "run")
    assert moves or (line["loss"], line["actor/grad_norm"]) == (loss, 0.0)


def test_groups_that_are_left_out_are_counted_and_the_users_scores_replace_the_environments(lab: Lab) -> None:
    settings = {"data": {"max_token_len": 16, "filter_path": f"{ME}:every_other"}, "reward": {"path": f"{ME}:numbered"}}
    with lab.trainer("run", batches(2), 2, **settings) as trainer:
        summary = trainer.fit()
    for line in metrics_of(lab.root / "run"):
        assert line["data/filtered"] == GROUPS // 2
        assert line["reward/mean"] == sum(range(GROUP_SIZE)) / GROUP_SIZE
    assert (summary["groups_used"], summary["groups_filtered"]) == (GROUPS, GROUPS)


def test_rl_training_step_asks_the_function_once_for_each_completion(model_path: Path, tmp_path: Path) -> None:
    from atropos_verl import AtroposTrainer

    seen.clear()
    with ServerProcess(tmp_path) as server:
        config = {
            "atropos": {"api_url": server.url},
            "model": {"path": str(model_path)},
            "run_dir": str(tmp_path / "run"),
            "group_size": 4,
            "max_response_length": 4,
            "reward": {"path": f"{ME}:numbered"},
            **PLAIN,
        }
        with pytest.raises(ConfigError, match="reward_fn was given as well"):
            AtroposTrainer.from_config(config, reward_fn=numbered)
        own = {key: value for key, value in config.items() if key != "reward"}
        for wrong in (lambda prompts, completions: None, lambda prompts, completions: ["good"] * len(completions)):
            said = r"reward_fn: .*<lambda> returned (NoneType None, not a list of 4 scores|str 'good' as score 0)"
            with AtroposTrainer.from_config(own, reward_fn=wrong) as trainer, pytest.raises(ConfigError, match=said):
                trainer.rl_training_step(["ab"])
        with AtroposTrainer.from_config(config) as trainer:
            report = trainer.rl_training_step(["ab", "cd"])
    assert seen == [8]
    assert report.metrics["reward/mean"] == 3.5
    reader = TraceReader(tmp_path / "run")
    items = [item for one in reader.rollouts() for item in reader.sequence(one["id"])["items"] if item["trained"]]
    assert items and all(abs(item["mismatch"]) < 1e-3 for item in items)  # the engine's model is the trainer's
