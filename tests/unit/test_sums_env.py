"""The environment of ``--config-name smollm2``: which sums are trained, which held out, and what an answer is worth."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.examples import load_example


@pytest.fixture(scope="module")
def env() -> Any:
    module = load_example("environments/sums.py")
    env = object.__new__(module.SumsEnv)
    env.config, _ = module.SumsEnv.config_init()
    asyncio.run(env.setup())
    return env


def test_a_pair_is_held_out_in_both_orders_and_never_trained(env: Any) -> None:
    trained = set(env.train_pairs)
    held_out = {tuple(map(int, task["metadata"]["expression"].split(" + "))) for task in env.eval_tasks}
    assert not trained & held_out
    assert len(trained) + len(held_out) == 144
    assert held_out == {(right, left) for left, right in held_out}
    assert len(held_out) == 27  # 15 pairs, three of them of one number twice
    tasks = [next(env.train_tasks) for _ in range(200)]
    assert {tuple(map(int, task["metadata"]["expression"].split(" + "))) for task in tasks} <= trained


def test_a_resumed_run_goes_on_behind_the_tasks_drawn_so_far(env: Any, tmp_path: Path) -> None:
    asyncio.run(env.setup())
    env.checkpoint_dir, env.wandb_prepend, env.curr_step, env.checkpoint_interval = str(tmp_path), "sums", 2, 5
    drawn = [asyncio.run(env.get_next_item()) for _ in range(7)]
    env.save_checkpoint(2)
    following = asyncio.run(env.get_next_item())
    asyncio.run(env.setup())
    env.load_checkpoint()
    assert env.tasks_drawn == len(drawn)
    assert asyncio.run(env.get_next_item()) == following


@pytest.mark.parametrize(
    ("answer", "reward"),
    [("12", 1.0), ("5 + 7 = 12.", 1.0), ("The answer is 12.0", 1.0), ("12, not 13", 0.0), ("-12", 0.0), ("", 0.0)],
)
def test_the_last_number_of_an_answer_counts(env: Any, answer: str, reward: float) -> None:
    assert env.score(answer, env._task(5, 7)) == reward
