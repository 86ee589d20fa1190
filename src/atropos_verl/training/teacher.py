"""A teacher that the run holds itself (``distill.teacher``): a frozen model beside the policy, on the same tokens."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.types import FloatArray, IntArray, ScoredGroup

logger = logging.getLogger(__name__)

KEY = "distill.teacher"


class Teacher:
    """Gives groups without a teacher's values those of its own model, for each trained token."""

    def __init__(self, config: RunConfig, vocab_size: int | None) -> None:
        """Loads the model. Raises ``ConfigError`` when there is none, or its vocabulary does not hold the policy's."""
        import torch
        from transformers import AutoModelForCausalLM

        from atropos_verl.engine.runner import ModelRunner

        try:
            path = config.with_values(model={"path": config.distill.teacher}).resolve_model_path()
        except ConfigError as error:
            raise ConfigError(str(error).removeprefix("model.path: "), KEY) from None
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.model.compute_dtype]
        on_gpu = config.trainer.device != "cpu" and torch.cuda.is_available()
        trusted = config.model.trust_remote_code
        model = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, trust_remote_code=trusted)
        self._limit = config.max_token_len
        self._runner = ModelRunner(model.to("cuda" if on_gpu else "cpu"), max_context_len=self._limit)
        self._vocab_size = vocab_size or self._runner.vocab_size
        if self._runner.vocab_size < self._vocab_size:
            sizes = f"{self._runner.vocab_size} tokens, the policy's {self._vocab_size}"
            raise ConfigError(f"the vocabulary of {path} has {sizes}; a teacher needs the policy's tokenizer", KEY)
        self._top_k = min(config.distill.top_k, self._vocab_size)
        logger.info("the teacher is %s", path)

    def complete(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        """The groups, which must be sound; those that bring a teacher's values are left as they are."""
        return [group if group.distill_token_ids is not None else self._taught(group) for group in groups]

    def _taught(self, group: ScoredGroup) -> ScoredGroup:
        pairs = [self._values(ids, group.trained(i)) for i, ids in enumerate(group.token_ids)]
        ids, logprobs = zip(*pairs, strict=True)
        return replace(group, distill_token_ids=ids, distill_logprobs=logprobs)

    def _values(self, token_ids: IntArray, trained: np.ndarray) -> tuple[IntArray, FloatArray]:
        """[T, top_k + 1] ids and logprobs of the likeliest tokens and of the sequence's own; -1 and -inf elsewhere."""
        ids = np.full((len(token_ids), self._top_k + 1), -1, np.int64)
        logprobs = np.full(ids.shape, -np.inf)
        rows = self._runner.prompt_logprobs(token_ids[: self._limit].tolist(), self._top_k, 1.0)
        for t, row in enumerate(rows):
            if row is not None and trained[t]:
                named = [(token, value) for token, value in row.items() if token < self._vocab_size]
                ids[t, : len(named)], logprobs[t, : len(named)] = zip(*named, strict=True)
        return ids, logprobs
