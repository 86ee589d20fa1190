"""Rollouts that the trainer samples itself: generate → score → submit, as an environment would over HTTP."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from atropos_verl.errors import AtroposProtocolError, ConfigError
from atropos_verl.protocol.client import EnvRegistration
from atropos_verl.protocol.wire import encode_group
from atropos_verl.types import Generation, GenerationRequest

if TYPE_CHECKING:
    from atropos_verl.backends.local.trainer import AtroposTrainer

__all__ = ["RewardFunction", "SelfPlay"]

logger = logging.getLogger(__name__)

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]
"""``(prompts, completions) -> scores``: three lists of equal length, one entry per sampled sequence."""


class SelfPlay:
    """The trainer as its own environment. Registers trainer and environment at the API on first use."""

    def __init__(self, trainer: AtroposTrainer, reward_fn: RewardFunction) -> None:
        self.trainer = trainer
        self.reward_fn = reward_fn
        self._env_id: int | None = None
        self._batch_size = 0

    def submit(self, prompts: Sequence[Any]) -> int:
        """Sample ``group_size`` completions of each prompt, score them, post the groups. Returns the groups posted.

        Raises:
            ConfigError: no prompts, or their number does not fill the registered batch size.
        """
        if len(prompts) == 0:
            raise ConfigError("rl_training_step was given no prompts")
        trainer, config = self.trainer, self.trainer.config
        texts, ids = zip(*(self._as_tokens(prompt) for prompt in prompts), strict=True)
        self._register(len(prompts) * config.group_size)
        requests = [
            GenerationRequest(
                prompt_token_ids=tuple(tokens),
                n=config.group_size,
                max_tokens=config.max_response_length,
                temperature=config.temperature,
            )
            for tokens in ids
        ]
        generations = trainer.engine.generate(requests)
        for request, made in zip(requests, generations, strict=True):
            trainer.stack.ledger.record(request.prompt_token_ids, made, request.temperature)
        decode = trainer.tokenizer.decode
        answers = [[decode(g.token_ids, skip_special_tokens=True) for g in group] for group in generations]
        flat_prompts = [text for text in texts for _ in range(config.group_size)]
        scores = [float(s) for s in self.reward_fn(flat_prompts, [a for group in answers for a in group])]
        if len(scores) != len(flat_prompts):
            raise ConfigError(f"reward_fn returned {len(scores)} scores for {len(flat_prompts)} completions")
        size = config.group_size
        bodies = [
            self._encode(tokens, group, scores[i * size : (i + 1) * size])
            for i, (tokens, group) in enumerate(zip(ids, generations, strict=True))
        ]
        # An upstream API would ignore the key, and take a repeated post twice.
        key = uuid.uuid4().hex if "idempotency" in trainer.client.features else None
        trainer.client.post_scored_data_list(bodies, idempotency_key=key)
        return len(bodies)

    def _as_tokens(self, prompt: Any) -> tuple[str, list[int]]:
        if isinstance(prompt, str):
            return prompt, list(self.trainer.tokenizer.encode(prompt, add_special_tokens=False))
        tokens = [int(token) for token in prompt]
        return str(self.trainer.tokenizer.decode(tokens)), tokens

    def _encode(self, prompt: list[int], group: list[Generation], scores: list[float]) -> bytes:
        hidden = len(prompt)
        return encode_group(
            tokens=[[*prompt, *g.token_ids] for g in group],
            masks=[[-100] * hidden + list(g.token_ids) for g in group],
            scores=scores,
            inference_logprobs=[[1.0] * hidden + list(g.logprobs) for g in group],
            generation_params={
                "temperature": self.trainer.config.temperature,
                "policy_version": min(g.policy_version_first for g in group),
            },
            env_id=self._env_id,
        )

    def _register(self, batch_size: int) -> None:
        if self._env_id is not None:
            if batch_size % self._batch_size:
                raise ConfigError(
                    f"{batch_size} sequences per step, but the API was registered with batch_size {self._batch_size}; "
                    "give a multiple, or it never delivers the rest"
                )
            return
        trainer, config = self.trainer, self.trainer.config
        register_trainer(trainer, batch_size)
        answer = trainer.client.register_env(
            EnvRegistration(
                max_token_length=config.max_token_len,
                desired_name="trainer_rollouts",
                weight=1.0,
                group_size=config.group_size,
            )
        )
        if answer.env_id is None:
            raise AtroposProtocolError("the API did not accept the trainer's own environment", trainer.client.api_url)
        self._env_id, self._batch_size = answer.env_id, batch_size


def register_trainer(trainer: AtroposTrainer, batch_size: int) -> None:
    """Register at the API with the trainer's values (see ``api.registration``), unless that is done.

    Raises:
        AtroposProtocolError: the API keeps the values of an earlier registration.
    """
    trainer.intake.register(trainer.step, batch_size)
    trainer.take_polled()
