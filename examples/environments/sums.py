"""An Atropos environment for a real language model: sums of two numbers from 1 to 12, asked in chat form.

Questions are worded and answers scored as in reasoning-gym's ``chain_sum``; the last number of an answer counts.
Reward: 1.0 where it is the sum, else 0.0. Unordered pairs are split by a hash: one in five is held out for
``evaluate``, in both orders, and never trained. The commands are those of ``spell_backward.py``.
"""

import hashlib
import itertools
import logging
import random
import re
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # tokenises only; see spell_backward.py

sys.path.insert(0, str(Path(__file__).resolve().parent))  # its sibling, wherever this is started from

import reasoning_gym
from atroposlib.envs.base import APIServerConfig
from pydantic import Field
from spell_backward import SpellBackwardConfig, SpellBackwardEnv

LARGEST = 12
HELD_OUT_SHARE = 5  # one pair in 5


def is_held_out(left: int, right: int) -> bool:
    """True for pairs kept for evaluation; the order of the two does not count."""
    pair = f"{min(left, right)}+{max(left, right)}"
    return hashlib.sha256(pair.encode()).digest()[0] % HELD_OUT_SHARE == 0


class SumsConfig(SpellBackwardConfig):
    """Settings of this environment (those about words have no effect)."""

    max_answer_tokens: int = Field(default=16, ge=1, description="New tokens per answer at most.")
    eval_samples: int = Field(default=8, ge=1, le=64, description="Answers sampled per held-out sum.")


class SumsEnv(SpellBackwardEnv):
    """Add two numbers."""

    name = "sums"
    env_config_cls = SumsConfig

    @classmethod
    def config_init(cls) -> tuple[SumsConfig, list[APIServerConfig]]:
        """The settings of ``spell_backward.py``, with room for a chat template."""
        config, servers = super().config_init()
        values = {"wandb_name": cls.name, "max_token_length": 128}
        return SumsConfig(**config.model_dump(exclude_unset=True) | values), servers

    async def setup(self) -> None:
        """Make the tasks."""
        self.dataset = reasoning_gym.create_dataset("chain_sum")
        pairs = [(left, right) for left in range(1, LARGEST + 1) for right in range(1, LARGEST + 1)]
        self.eval_tasks = [self._task(*pair) for pair in pairs if is_held_out(*pair)]
        self.train_pairs = [pair for pair in pairs if not is_held_out(*pair)]
        draw = random.Random(self.config.seed)
        rounds = (draw.sample(self.train_pairs, len(self.train_pairs)) for _ in itertools.count())
        self.train_tasks = (self._task(*pair) for pair in itertools.chain.from_iterable(rounds))
        self.tasks_drawn = self._saved_step = 0

    @staticmethod
    def _task(left: int, right: int) -> dict[str, Any]:
        question = f"State the final answer to the following arithmetic problem: {left} + {right} ="
        return {"question": question, "answer": str(left + right), "metadata": {"expression": f"{left} + {right}"}}

    def score(self, answer: str, task: dict[str, Any]) -> float:
        """1.0 where the last number of ``answer`` is the sum, else 0.0."""
        numbers = re.findall(r"-?\d+(?:\.\d+)?", answer)
        return float(bool(numbers) and self.dataset.score_answer(numbers[-1], task) == 1.0)


if __name__ == "__main__":
    logging.getLogger("atroposlib.envs.base").setLevel(logging.WARNING)
    SumsEnv.cli()
