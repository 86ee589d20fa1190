"""Rollouts that the trainer samples itself: generate → score → submit, as an environment would over HTTP."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import AtroposProtocolError, ConfigError
from atropos_verl.protocol.client import AtroposClient
from atropos_verl.protocol.messages import EnvRegistration
from atropos_verl.protocol.wire import encode_group
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.training.extensions import scores_of
from atropos_verl.types import NO_LOGPROB, NOT_TRAINED, Generation, GenerationRequest

if TYPE_CHECKING:
    from atropos_verl.engine.embedded import TransformersEngine

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]
"""``(prompts, completions) -> scores``: three lists of equal length, one entry per sampled sequence."""


@dataclass
class SelfPlay:
    """The trainer as its own environment. At the first use it registers itself and, with that many sequences per batch,
    the trainer (``register_trainer``). ``ledger`` gets every completion, as the gateway's does."""

    config: RunConfig
    engine: TransformersEngine
    tokenizer: Any
    client: AtroposClient
    ledger: Ledger
    reward_fn: RewardFunction
    register_trainer: Callable[[int], None]
    _env_id: int | None = None
    _batch_size: int = 0

    def submit(self, prompts: Sequence[Any]) -> None:
        """Samples ``group_size`` completions of each prompt, scores them, and posts the groups. Raises ``ConfigError``
        without prompts, or when their number does not fill the registered batch size."""
        if len(prompts) == 0:
            raise ConfigError("rl_training_step was given no prompts")
        size = self.config.group_size
        texts, ids = zip(*(self._as_tokens(prompt) for prompt in prompts), strict=True)
        self._register(len(prompts) * size)
        longest, temperature = self.config.max_response_length, self.config.temperature
        requests = [
            GenerationRequest(prompt_token_ids=tuple(tokens), n=size, max_tokens=longest, temperature=temperature)
            for tokens in ids
        ]
        groups = self.engine.generate(requests)
        for request, group in zip(requests, groups, strict=True):
            self.ledger.record(request.prompt_token_ids, group, request.temperature)
        answers = [self.tokenizer.decode(g.token_ids, skip_special_tokens=True) for group in groups for g in group]
        name = getattr(self.reward_fn, "__qualname__", repr(self.reward_fn))
        scores = scores_of(name, self.reward_fn, [text for text in texts for _ in range(size)], answers)
        rows = scores.reshape(len(groups), size).tolist()
        bodies = [self._encode(*parts) for parts in zip(ids, groups, rows, strict=True)]
        # An upstream API would ignore the key, and take a repeated post twice.
        key = uuid.uuid4().hex if "idempotency" in self.client.features else None
        self.client.post_scored_data_list(bodies, idempotency_key=key)

    def _as_tokens(self, prompt: Any) -> tuple[str, list[int]]:
        if isinstance(prompt, str):
            return prompt, list(self.tokenizer.encode(prompt, add_special_tokens=False))
        tokens = [int(token) for token in prompt]
        return str(self.tokenizer.decode(tokens)), tokens

    def _encode(self, prompt: list[int], group: list[Generation], scores: list[float]) -> bytes:
        hidden = len(prompt)
        return encode_group(
            tokens=[[*prompt, *g.token_ids] for g in group],
            masks=[[NOT_TRAINED] * hidden + list(g.token_ids) for g in group],
            scores=scores,
            inference_logprobs=[[NO_LOGPROB] * hidden + list(g.logprobs) for g in group],
            generation_params={
                "temperature": self.config.temperature,
                "policy_version": min(g.policy_versions[0] for g in group),
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
        self.register_trainer(batch_size)
        longest, size = self.config.max_token_len, self.config.group_size
        env_id = self.client.register_env(
            EnvRegistration(max_token_length=longest, desired_name="trainer_rollouts", weight=1.0, group_size=size)
        )
        if env_id is None:
            raise AtroposProtocolError("the API did not accept the trainer's own environment", self.client.api_url)
        self._env_id, self._batch_size = env_id, batch_size
