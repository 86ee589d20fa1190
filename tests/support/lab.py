"""A trainer in this process on batches that the test wrote: two paths to one step can be compared bit by bit."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from atropos_verl import AtroposTrainer
from support.runs import checkpointed_step
from support.scripted_api import random_batches, scripted_api

GROUPS, GROUP_SIZE = 2, 4
BATCH_SIZE = GROUPS * GROUP_SIZE
MAX_TOKEN_LEN = 16


class Lab:
    """Makes trainers on scripted batches that differ only in where they run and what is asked of them."""

    def __init__(self, model_path: Path, root: Path) -> None:
        self.model_path = model_path
        self.root = root

    @contextmanager
    def trainer(self, name: str, bodies: list[bytes], steps: int, **settings: Any) -> Iterator[AtroposTrainer]:
        """A trainer in ``root/name``, resumed from what is there, against an API that serves ``bodies``."""
        with scripted_api(bodies, batch_size=BATCH_SIZE, max_token_len=MAX_TOKEN_LEN) as self.api:
            values: dict[str, Any] = {
                "model": {"path": str(self.model_path)},
                "run_dir": str(self.root / name),
                "steps": steps,
                "batch_size": BATCH_SIZE,
                "group_size": GROUP_SIZE,
                "advantage_normalization": "global",
                "save_freq": 5,
                "batch_retry_delay": 0.01,
                "optim": {"lr": 1e-2},
                "data": {"max_token_len": MAX_TOKEN_LEN},
                "max_response_length": 8,
                "inference": {"num_threads": 1},
                **settings,
                "atropos": {"api_url": self.api.url, "timeout": 20, "rollout_timeout": 20},
            }
            with AtroposTrainer.from_config(values) as trainer:
                trainer.resume_from_checkpoint()
                yield trainer

    def run(self, name: str, bodies: list[bytes], steps: int, **settings: Any) -> dict[str, Any]:
        """Train to ``steps`` and return everything that must be the same after another path to the same step."""
        with self.trainer(name, bodies, steps, **settings) as trainer:
            trainer.fit()
            return state_of(trainer)


def batches(count: int, seed: int) -> list[bytes]:
    """``count`` batches of good groups, as many as a step of the lab takes."""
    return random_batches(count, groups=GROUPS, group_size=GROUP_SIZE, seed=seed)


def state_of(trainer: AtroposTrainer) -> dict[str, Any]:
    return {
        "step": trainer.step,
        "policy_version": trainer.policy_version,
        "moments": trainer.moments.state_dict(),
        "tokens_trained": trainer.totals.tokens_trained,
        "weights": {name: tensor.clone() for name, tensor in trainer.worker.named_tensors()},
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found | {"weights": ...} == expected | {"weights": ...}
    assert found["weights"].keys() == expected["weights"].keys()
    for name, tensor in expected["weights"].items():
        assert torch.equal(found["weights"][name], tensor), f"{name} differs"


def saved(directory: Path) -> dict[str, Any]:
    newest = directory / "checkpoints" / f"global_step_{checkpointed_step(directory)}"
    return dict(json.loads((newest / "atropos.json").read_text()))
