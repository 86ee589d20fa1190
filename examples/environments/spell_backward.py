"""An Atropos environment that needs no download: spell a word backward, tasks and scores from reasoning-gym.

::

    ENV=examples/environments/spell_backward.py
    SERVER="--slurm false --openai.base_url http://127.0.0.1:9001/v1 --openai.tokenizer_name PATH"
    python $ENV serve    $SERVER --env.tokenizer_name PATH --env.rollout_server_url http://127.0.0.1:8000
    python $ENV evaluate $SERVER --env.tokenizer_name PATH --env.data_dir_to_save_evals evals/
    python $ENV process  $SERVER --env.tokenizer_name PATH --env.data_path_to_save_groups groups.jsonl

One item is one word; a group is ``group_size`` samples of the model's answer. Tokens, masks and logprobs come from
Atropos's ``ManagedServer``: the ids that the inference server sampled, never a re-tokenised text.

Reward: 1.0 for the right answer, else 0.0 (reasoning-gym's ``score_answer``, which also gives part of a point for
each letter in its place; ``--env.partial_credit true`` keeps that). Highest reward: 1.0.

Words are split by a hash of the word: one in 16 is held out for ``evaluate``, the others are trained on.
Errors: a ``ValueError`` at start for settings that leave no task; a failed generation is logged by Atropos, which
then goes on with the next word.
"""

import asyncio
import gc
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This process tokenises and talks HTTP; it never runs a model. Without torch, transformers still has its
    # tokenizers, and the start takes 3 s less on two cores.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    # What is imported stays: looking through it for garbage meanwhile is a fifth of the import's time.
    gc.disable()

import reasoning_gym
from atroposlib.envs.base import (
    APIServerConfig,
    BaseEnv,
    BaseEnvConfig,
    EvalHandlingEnum,
    ScoredDataGroup,
)
from pydantic import Field

logger = logging.getLogger(__name__)

HELD_OUT_SHARE = 16  # one word in 16
EVAL_START = 2**30  # task to start from: the held-out tasks are the same in every run, whatever its seed
# In an installed package the environments stand beside the model.
ASSETS = [Path(__file__).absolute().parents[1], Path(__file__).resolve().parents[2] / "src" / "atropos_verl" / "assets"]
DEMO_MODEL = ASSETS[(ASSETS[1] / "demo_model").is_dir()] / "demo_model"


def is_held_out(word: str) -> bool:
    """True for the words kept for evaluation: one in 16, by a hash, so that no list has to be shipped."""
    return hashlib.sha256(word.lower().encode()).digest()[0] % HELD_OUT_SHARE == 0


class SpellBackwardConfig(BaseEnvConfig):
    """Settings of this environment, besides those of every Atropos environment (``--env.NAME VALUE``)."""

    seed: int = Field(default=0, ge=0, description="Seed of the order of the training words.")
    min_word_len: int = Field(default=3, ge=1, description="Letters of the shortest word.")
    max_word_len: int = Field(default=5, ge=1, description="Letters of the longest word.")
    temperature: float = Field(default=1.0, gt=0, description="Sampling temperature, in training and evaluation.")
    max_answer_tokens: int = Field(default=8, ge=1, description="New tokens per answer at most.")
    partial_credit: bool = Field(default=False, description="Keep part of a point for letters in their place.")
    latency: float = Field(
        default=0.0, ge=0, description="Seconds that scoring a training group takes: stands for a slow tool or judge."
    )
    eval_words: int = Field(default=128, ge=1, description="Held-out words of one evaluation.")
    eval_samples: int = Field(default=4, ge=1, le=64, description="Answers sampled per held-out word.")


class SpellBackwardEnv(BaseEnv):  # type: ignore[misc]  # atroposlib has no type information
    """Spell words backward. ``score_answer`` of reasoning-gym decides."""

    name = "spell_backward"
    env_config_cls = SpellBackwardConfig

    @classmethod
    def config_init(cls) -> tuple[SpellBackwardConfig, list[APIServerConfig]]:
        """Defaults that run the shipped demo model. The server is a list on purpose: Atropos ignores
        ``--openai.base_url`` and asks ports 9004-9007 when it is given a bare config."""
        tokenizer = str(DEMO_MODEL)
        config = SpellBackwardConfig(
            group_size=8,
            max_token_length=64,
            max_batches_offpolicy=1,
            tokenizer_name=tokenizer,
            use_wandb=False,
            wandb_name=cls.name,  # sent when registering; Atropos's API answers 422 to the default, null
            total_steps=60,
            # Groups of equal scores teach nothing, but leaving them out would make the mean reward a lie.
            ensure_scores_are_not_same=False,
            steps_per_eval=-1,
            eval_handling=EvalHandlingEnum.NONE,
            num_rollouts_to_keep=1,
            include_messages=False,
        )
        server = APIServerConfig(
            model_name="demo",
            base_url="http://127.0.0.1:9001/v1",
            api_key="x",
            tokenizer_name=tokenizer,
            server_type="vllm",
            num_requests_for_eval=512,
        )
        return config, [server]

    async def setup(self) -> None:
        """Open the task source. Raises ``ValueError`` when a split has no word."""
        low, high = self.config.min_word_len, self.config.max_word_len
        if low > high:
            raise ValueError(f"--env.min_word_len {low} is above --env.max_word_len {high}; swap them")
        if self.config.max_answer_tokens >= self.config.max_token_length:
            raise ValueError(
                f"--env.max_answer_tokens {self.config.max_answer_tokens} leaves no room for a prompt within "
                f"--env.max_token_length {self.config.max_token_length}"
            )
        self.dataset = reasoning_gym.create_dataset(
            "spell_backward",
            min_word_len=low,
            max_word_len=high,
            seed=0,
            size=2**31 - 1,  # virtual: tasks are made on demand
        )
        if not self.dataset.words:
            raise ValueError(f"no word of {low}-{high} letters; widen --env.min_word_len and --env.max_word_len")
        # reasoning-gym draws task i of seed s with s + i, so neighbouring seeds would share nearly all their tasks;
        # a start far away gives each run its own order.
        start = self.config.seed * 1_000_003 % 2**30
        next(self._tasks(start, held_out=False))  # raises now, not in the middle of the run
        self.train_tasks = self._tasks(start, held_out=False)
        self.tasks_drawn = self._saved_step = 0
        self.eval_tasks = self._distinct(self._tasks(EVAL_START, held_out=True), self.config.eval_words)
        logger.info("%d held-out words for evaluation", len(self.eval_tasks))

    def _tasks(self, index: int, *, held_out: bool) -> Iterator[dict[str, Any]]:
        """Endless reasoning-gym tasks of one split from task ``index`` on: ``{"question", "answer", "metadata"}``.

        Names are left out: the score ignores case, so their capital would only blur what is asked.
        Raises ``ValueError`` after 100,000 tasks in a row of the other split.
        """
        misses = 0
        while misses < 100_000:
            task: dict[str, Any] = self.dataset[index]
            index += 1
            word = task["metadata"]["word"]
            if word.islower() and word.isalpha() and is_held_out(word) == held_out:
                misses = 0
                yield task
            else:
                misses += 1
        raise ValueError(
            f"no {'held-out' if held_out else 'training'} word of {self.config.min_word_len}-"
            f"{self.config.max_word_len} letters; widen --env.min_word_len and --env.max_word_len"
        )

    @staticmethod
    def _distinct(tasks: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        """The first ``count`` different words, each once; fewer when 20 x ``count`` tasks hold no more."""
        found: dict[str, dict[str, Any]] = {}
        for _, task in zip(range(20 * count), tasks, strict=False):
            found.setdefault(task["metadata"]["word"], task)
            if len(found) == count:
                break
        return list(found.values())

    async def get_next_item(self) -> dict[str, Any]:
        """The next training task; the order depends on ``--env.seed`` only."""
        step = getattr(self, "status_dict", {}).get("current_step", 0)
        if self.wandb_prepend and step > self._saved_step:
            self.save_checkpoint(step)
        self.tasks_drawn += 1
        return next(self.train_tasks)

    def save_checkpoint(self, step: int, data: dict[str, Any] | None = None) -> None:
        """Keeps the position among the tasks. Atropos calls it every ``save_freq`` steps of the trainer, we after each:
        an interrupted run is saved at any step. What those in between wrote is removed by the next.
        """
        super().save_checkpoint(step, {"tasks_drawn": self.tasks_drawn, **(data or {})})
        before, self._saved_step = self._saved_step, step
        if before != step and (self.checkpoint_interval <= 0 or before % self.checkpoint_interval):
            self._position_file(before).unlink(missing_ok=True)

    def load_checkpoint(self) -> None:
        """Goes on behind the tasks drawn so far. Atropos calls it when the trainer has resumed at ``curr_step``."""
        for step in range(self.curr_step, 0, -1):
            if (file := self._position_file(step)).is_file():
                drawn = int(json.loads(file.read_text())["tasks_drawn"])
                logger.info("going on with task %d, as of step %d", drawn, step)
                for _ in range(drawn - self.tasks_drawn):
                    next(self.train_tasks)
                self.tasks_drawn, self._saved_step = max(drawn, self.tasks_drawn), self.curr_step
                return

    def _position_file(self, step: int) -> Path:
        return Path(self.checkpoint_dir, "env_checkpoints", self.wandb_prepend, f"step-{step}.json")

    def score(self, answer: str, task: dict[str, Any]) -> float:
        """Reward in [0, 1]: 1.0 for the right answer; else 0.0, or reasoning-gym's share of letters in place."""
        value = float(self.dataset.score_answer(answer.strip(), task))
        return value if self.config.partial_credit or value == 1.0 else 0.0

    async def _sample(self, task: dict[str, Any], n: int, split: str) -> list[tuple[Any, str]]:
        """``n`` answers: ``(node, text)``; a node holds tokens, masked_tokens and logprobs, each [T]."""
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            completion = await managed.chat_completion(
                messages=[{"role": "user", "content": task["question"]}],
                n=n,
                max_tokens=self.config.max_answer_tokens,
                temperature=self.config.temperature,
                split=split,
            )
            nodes = managed.get_state()["nodes"]
        texts = [choice.message.content or "" for choice in completion.choices]
        return list(zip(nodes, texts, strict=True))

    async def collect_trajectories(self, item: dict[str, Any]) -> tuple[ScoredDataGroup, list[Any]]:
        """One group: ``group_size`` answers to one question, token-exact, with the sampling logprobs."""
        answers = await self._sample(item, self.config.group_size, "train")
        await asyncio.sleep(self.config.latency)
        group = ScoredDataGroup(
            tokens=[node.tokens for node, _ in answers],
            masks=[node.masked_tokens for node, _ in answers],
            scores=[self.score(text, item) for _, text in answers],
            inference_logprobs=[node.logprobs for node, _ in answers],
            generation_params={"temperature": self.config.temperature},
        )
        return group, []

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean reward on the held-out words, all requests at once, sampled as in training.

        Writes ``metrics.json`` and ``samples.jsonl`` into ``--env.data_dir_to_save_evals`` where that is set.
        """
        start = time.time()
        n = self.config.eval_samples
        results = await asyncio.gather(*(self._sample(task, n, "eval") for task in self.eval_tasks))
        samples = [
            {"question": task["question"], "expected": task["answer"], "answer": text, "score": self.score(text, task)}
            for task, answers in zip(self.eval_tasks, results, strict=True)
            for _, text in answers
        ]
        scores = [float(sample["score"]) for sample in samples]
        metrics = {
            "eval/mean_reward": sum(scores) / len(scores),
            "eval/exact_match": sum(score == 1.0 for score in scores) / len(scores),
            "eval/words": float(len(self.eval_tasks)),
            "eval/sequences": float(len(scores)),
        }
        await self.evaluate_log(
            metrics,
            task_name=self.name,
            start_time=start,
            end_time=time.time(),
            generation_parameters={
                "temperature": self.config.temperature,
                "max_new_tokens": self.config.max_answer_tokens,
                "n": n,
            },
            samples=samples,
            verbose=False,
        )
        print(f"held-out mean reward {metrics['eval/mean_reward']:.4f} over {len(scores)} sequences", flush=True)
        return metrics


if __name__ == "__main__":
    # Its main loop logs its status ten times a second, which would hide everything else in the log.
    logging.getLogger("atroposlib.envs.base").setLevel(logging.WARNING)
    gc.freeze()
    gc.enable()
    SpellBackwardEnv.cli()
