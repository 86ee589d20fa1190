"""The pipeline's types, in the order data meets them.

Shape legend: ``G`` sequences in a group, ``T`` tokens of one sequence (``T_g`` where sequences differ),
``B`` sequences of a batch, ``L`` padded length. Arrays are numpy until the policy worker makes tensors.

::

    GET /batch bytes → ScoredGroup → SequenceMatch → TrainingSample → LossOutput → StepReport
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

UNKNOWN_VERSION = -2
"""The policy version of a token is not known. (-1 is a version: the weights an engine starts with.)"""
NOT_TRAINED = -100
"""Mask entry of a token that is not trained."""
NO_LOGPROB = 1.0
"""Wire value of a token without a logprob."""
MIN_LOGPROB = -9999.0
"""Stands for -inf, which JSON cannot hold; vLLM sends this value for it."""
GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy decoding (vLLM's bound): dividing logits by less would overflow float32."""

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """The language that a completion is sampled from (constrained decoding)."""

    grammar: str  # in llguidance's form of Lark
    json_schema: str | None = None  # that the grammar stands for: for engines that do not know Lark
    param: str = "response_format"  # field of the client's request that asks for it, for messages


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt and how to sample from it. The engine checks it, and raises ``GenerationRequestError``."""

    prompt_token_ids: tuple[int, ...]
    n: int = 1  # completions of the same prompt; each is sampled independently
    max_tokens: int | None = None  # new ones at most; None: as many as the engine's context still holds
    temperature: float = 1.0  # 0 = greedy; logprobs are then those of temperature 1
    top_p: float = 1.0
    top_k: int = -1  # -1 or 0: off
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    """The tokens that spell one are kept in ``token_ids`` (token-exact); finish is "stop"."""
    stop_token_ids: tuple[int, ...] = ()  # besides the model's end-of-sequence ids; part of ``token_ids``
    ignore_eos: bool = False
    seed: int | None = None
    """With a seed, the same request gives the same tokens whatever else the engine is running."""
    prompt_logprobs: int | None = None  # k best alternatives, and the token itself, at each prompt position
    top_logprobs: int = 0  # k best alternatives at each position of the completion
    constraint: Constraint | None = None
    """Tokens that leave its language are masked. The end-of-sequence ids are in it where it may end."""
    request_id: str = ""
    place: int = field(default=0, compare=False)
    asked: int = field(default=0, compare=False)
    """Engines take turns between clients. One client request is several of these when it has several prompts: the
    sequences that it asks for before these, and in all (0: only these)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One completion."""

    token_ids: tuple[int, ...]  # new tokens only, the stop token included
    logprobs: tuple[float, ...]
    """Of each token under the sampling temperature, over the full vocabulary (before top-p/top-k/min-p); under a
    constraint, over the tokens that it allows."""
    finish_reason: FinishReason
    policy_version_runs: tuple[tuple[int, int], ...]  # (policy version, tokens that it sampled), in order
    prompt_logprobs: tuple[dict[int, float] | None, ...] | None = None
    """[P] {token id: logprob}; position 0 is None (nothing predicts it)."""
    top_logprobs: tuple[dict[int, float], ...] = ()  # the same of each new token, best first

    @property
    def policy_versions(self) -> tuple[int, int]:
        """Those that sampled the first and the last token; they differ when weights were swapped in between."""
        runs = self.policy_version_runs or ((UNKNOWN_VERSION, 0),)
        return runs[0][0], runs[-1][0]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDelta:
    """New tokens of one completion while it is being generated (streaming)."""

    index: int  # of the completion among the n
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason | None = None
    policy_version: int | None = None  # None: the engine does not say
    top_logprobs: tuple[dict[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """G scored sequences of one prompt, as an environment posted them. Decoded, not yet validated; bytes that cannot be
    decoded give a group with a ``defect`` and empty arrays. Example: two answers to one question, prompt ``[5, 6]``::

        token_ids = ([5, 6, 7], [5, 6, 8, 2]); masks = ([-100, -100, 7], [-100, -100, 8, 2]); scores = [1., 0.]
    """

    token_ids: tuple[IntArray, ...]  # [G][T_g]
    masks: tuple[IntArray, ...]  # [G][T_g]; -100 = not trained, otherwise equal to the token id
    scores: FloatArray  # [G] raw
    rollout_ids: IntArray | None = None
    """[G] 0, 1, … in order of first appearance: sequences of one id are rows of one rollout, and have one score. None:
    each sequence is a rollout."""
    weights: FloatArray | None = None  # [G] at least 0; factor of each sequence's loss. None: 1
    advantages: tuple[FloatArray | None, ...] | None = None
    """[G][T_g] token-level overrides of the group baseline; None (whole or per sequence) = absent."""
    inference_logprobs: tuple[FloatArray | None, ...] | None = None
    """[G][T_g] logprob of each token under the policy that sampled it; 1.0 on the wire means "no value"."""
    ref_logprobs: tuple[FloatArray | None, ...] | None = None
    """[G][T_g] logprob of each token under a reference policy; 1.0 = no value."""
    token_versions: tuple[IntArray | None, ...] | None = None
    """[G][T_g] that wrote each token, ``UNKNOWN_VERSION`` where not known; from our ledger, not the wire."""
    overrides: tuple[dict[str, Any], ...] | None = None  # [G]
    group_overrides: dict[str, Any] | None = None
    generation_params: dict[str, Any] | None = None
    messages: Any | None = None
    images: Any | None = None
    distill_token_ids: tuple[IntArray | None, ...] | None = None
    """[G][T_g, K] what a teacher names for token t, given those before it; shorter rows end in -1. Row 0 is empty."""
    distill_logprobs: tuple[FloatArray | None, ...] | None = None
    """[G][T_g, K] their logprobs under the teacher at temperature 1; shorter rows end in -inf."""
    env_id: int | None = None
    group_id: str = ""  # content hash of the raw JSON, so a replay has the same id
    unknown_fields: tuple[str, ...] = ()
    defect: str | None = None  # names field, sequence, index and value of what is wrong
    validated: bool = False  # ``defect`` is the outcome of all checks
    raw: bytes = b""  # its own JSON, for quarantine; empty when it came packed

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def rollouts(self) -> IntArray:
        """[G] ``rollout_ids``, filled in."""
        return np.arange(len(self)) if self.rollout_ids is None else self.rollout_ids

    @property
    def rollout_scores(self) -> FloatArray:
        """[R] raw scores, one of each rollout."""
        return self.scores[np.unique(self.rollouts, return_index=True)[1]]

    def trained(self, i: int) -> NDArray[np.bool_]:
        """[T_i] True = the policy wrote this token of sequence ``i`` and it is trained. Nothing predicts the first."""
        trained: NDArray[np.bool_] = self.masks[i] != NOT_TRAINED
        trained[:1] = False
        return trained


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairedTokens:
    """A sequence whose text was tokenised anew, with the ids that were sampled. Its length may be another one."""

    token_ids: IntArray  # [T]
    loss_mask: NDArray[np.bool_]  # [T]; True = trained
    origin: IntArray | None
    """[T] index of the posted token in which its text begins; None where no value of a posted token is to follow it."""
    posted: int  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceMatch:
    """The gateway's ledger on one sequence.

    Example: prompt ``[5, 6]``, the policy wrote 8 at version 3, the environment appended 2 and trains on both::

        found = [0, 0, 1, 0]; versions = [-2, -2, 3, -2]; logprobs = [nan, nan, -.5, nan]; unmatched_spans = 1
    """

    found: NDArray[np.bool_]  # [T] trained tokens that a record holds
    versions: IntArray
    """[T] policy version that wrote the token; ``UNKNOWN_VERSION`` where not known and where not trained."""
    logprobs: FloatArray
    """[T] logprob under that policy at ``temperature``; NaN where not known and where not trained."""
    temperature: float | None = None
    """Temperature of all its spans; None: none was found, or they differ."""
    spans: int = 0  # trained ones
    unmatched_spans: int = 0  # trained spans with a token that nobody generated after these ids
    unmatched_tokens: int = 0
    ambiguous_spans: int = 0
    """Found, but in several records with different versions, and nothing tells which it is: the version is unknown."""
    records: tuple[int, ...] = ()
    """Numbers of the ledger's records that the sequence is known to hold."""
    repaired: RepairedTokens | None = None
    """The tokens that all of this is about, where they are not those that were posted."""
    repaired_spans: int = 0
    ambiguous_texts: int = 0
    """Unmatched spans whose text was found with different ids: which of them were sampled is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSample:
    """One sequence, validated, with its advantages.

    Example: prompt ``[5, 6]``, answer ``[8, 2]``, token-level advantage 0.5::

        token_ids = [5, 6, 8, 2]; loss_mask = [0, 0, 1, 1]; advantages = [0, 0, .5, .5]
    """

    token_ids: IntArray  # [T]
    loss_mask: NDArray[np.bool_]  # [T]; True = trained; never at position 0, which nothing predicts
    advantages: FloatArray  # [T]; 0 where loss_mask is False
    rollout_logprobs: FloatArray | None = None  # [T]; NaN where there is no value; None: nowhere
    reference: FloatArray | None = None
    """[R, 3] index of a trained token in the sequence, its logprob under the reference policy, factor of the KL to that
    in the loss."""
    teacher: FloatArray | None = None
    """[E, 4] index of a trained token, an id that a teacher names for it, that id's logprob under the teacher, factor
    of the KL in the loss; one row per id, those of a token together."""
    temperature: float = 1.0
    score: float = 0.0
    group_id: str = ""
    sequence_index: int = 0  # in its group
    rollout_id: int = 0  # of its group's ``rollouts``
    env_id: int | None = None
    policy_version: int | None = None
    """Oldest version that wrote a trained token; where the ledger knows none, what the environment says."""
    token_versions: IntArray | None = None  # [T] as ``ScoredGroup.token_versions``
    truncated: bool = False

    def __len__(self) -> int:
        return int(self.token_ids.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantinedGroup:
    """A group that never reached a tensor, and why."""

    group: ScoredGroup
    reason: str  # names field, sequence, index and value


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSettings:
    """Settings by which groups become samples."""

    vocab_size: int | None = None  # ids outside [0, vocab_size) quarantine the group; None: only negative ones do
    max_token_len: int | None = None  # longest sequence that is trained, inclusive; None: no bound
    estimator: str = "grpo"  # grpo, rloo or plain (the raw score)
    normalization: str = "none"  # none, batch or global
    clipping: tuple[float, float] | None = None
    overlong: str = "drop"  # drop, truncate or error
    on_bad_group: str = "quarantine"  # quarantine or error
    default_temperature: float = 1.0
    norm_adv_by_std_in_grpo: bool = True  # verl's name
    ignore_fields: tuple[str, ...] = ()  # of ScoredData, which are not used and not refused
    ref_weight: float = 0.0  # factor of the KL to posted ``ref_logprobs``
    distill_weight: float = 1.0  # factor of the KL to a teacher, where the environment names none
    teach: Callable[[Sequence[ScoredGroup]], list[ScoredGroup]] | None = None
    """Gives groups a teacher's values that bring none (``distill.teacher``)."""
    distill_alone: bool = False  # advantages of sequences with a teacher's values are 0
    advantage: Callable[[ScoredGroup], list[FloatArray]] | None = None
    """The user's function in the place of the estimator (``algorithm.advantage_path``): float64 [T] per sequence."""
    keeps: Callable[[Sequence[ScoredGroup]], list[bool]] | None = None
    """The user's function that says which groups are trained on (``data.filter_path``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleReport:
    """The samples of a batch of groups, and the groups and sequences that were left out."""

    samples: list[TrainingSample] = field(default_factory=list)
    quarantined: list[QuarantinedGroup] = field(default_factory=list)
    filtered: list[ScoredGroup] = field(default_factory=list)  # sound groups that ``keeps`` left out
    dropped_overlong: int = 0  # sequences longer than ``max_token_len`` that were left out
    truncated: int = 0
    used: list[ScoredGroup] = field(default_factory=list)
    """The groups of the samples, and of those that were dropped as overlong."""

    @property
    def scores(self) -> list[tuple[int | None, float]]:
        """Environment and raw score of every rollout of every used group, overlong ones included."""
        return [(group.env_id, float(score)) for group in self.used for score in group.rollout_scores]

    @property
    def counts(self) -> dict[str, int]:
        """``data/NAME`` of a step on these samples."""
        return {
            "groups": len(self.used),
            "quarantined": len(self.quarantined),
            "filtered": len(self.filtered),
            "dropped_overlong": self.dropped_overlong,
            "truncated": self.truncated,
            "sequences": len(self.samples),
            "rollouts": len({(sample.group_id, sample.rollout_id) for sample in self.samples}),
            "trained_tokens": sum(int(sample.loss_mask.sum()) for sample in self.samples),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """``loss`` [] with a graph, and detached scalars for the log."""

    loss: torch.Tensor
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One line of ``metrics.jsonl``; ``metrics`` holds the slash-named figures (``reward/mean``, ``timing/train``)."""

    step: int
    policy_version: int
    loss: float
    metrics: dict[str, float | int | None] = field(default_factory=dict)
