"""What is known about the policy that wrote a batch, put into its groups; and how old that policy is.

Everything here happens before ``build_samples``: tokens that are taken out of training are masked, groups that are too
old are left out, and neither takes part in the statistics of the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from atropos_verl.protocol.schema import sampling_temperature, stated_temperature
from atropos_verl.types import (
    MIN_LOGPROB,
    NO_LOGPROB,
    NOT_TRAINED,
    UNKNOWN_VERSION,
    FloatArray,
    ScoredGroup,
    SequenceMatch,
    TrainingSample,
)

__all__ = [
    "LOGPROB_MISMATCH",
    "LookUpFigures",
    "group_version",
    "is_too_old",
    "merge_matches",
    "staleness_metrics",
    "versions_behind",
]

LOGPROB_MISMATCH = 1e-3
"""Nats: an environment's logprob that is further from the ledger's is not the one it was sent."""
_OLDEST_BUCKET = 8
"""Staleness from here on is counted together."""


@dataclass(slots=True)
class LookUpFigures:
    """Counts of one batch's look-up."""

    spans: Counter[int | None] = field(default_factory=Counter)
    """env_id → trained spans."""
    unmatched_spans: Counter[int | None] = field(default_factory=Counter)
    tokens: int = 0
    """Trained."""
    unmatched_tokens: int = 0
    dropped_tokens: int = 0
    """Of these, taken out of training."""
    ambiguous_spans: int = 0
    compared_tokens: int = 0
    """Matched tokens whose logprob the environment sent as well."""
    mismatched_tokens: int = 0
    largest_difference: float = 0.0
    """Nats."""
    temperature_mismatches: int = 0
    """Sequences whose environment names another temperature than it asked the gateway for."""

    def metrics(self) -> dict[str, float | int | None]:
        """For ``metrics.jsonl``. Rates are None where nothing was looked up."""
        spans, lost = self.spans.total(), self.unmatched_spans.total()
        found: dict[str, float | int | None] = {
            "data/unmatched_span_rate": lost / spans if spans else None,
            "data/unmatched_token_rate": self.unmatched_tokens / self.tokens if self.tokens else None,
            "data/ambiguous_span_rate": self.ambiguous_spans / spans if spans else None,
            "data/logprob_mismatch": self.mismatched_tokens / self.compared_tokens if self.compared_tokens else None,
            "data/logprob_mismatch_max": self.largest_difference if self.compared_tokens else None,
            "data/temperature_mismatches": self.temperature_mismatches,
            "off_policy/dropped_unmatched_tokens": self.dropped_tokens,
        }
        for env_id, count in self.spans.items():
            if env_id is not None:
                found[f"env/{env_id}/unmatched_span_rate"] = self.unmatched_spans[env_id] / count
        return found


def merge_matches(
    group: ScoredGroup,
    matches: Sequence[SequenceMatch | None],
    figures: LookUpFigures,
    *,
    unmatched: str = "use",
    default_temperature: float = 1.0,
) -> ScoredGroup:
    """``group`` with what the ledger knows: token versions, logprobs, temperature.

    The ledger's logprobs win over the environment's; both are compared. The ledger's temperature fills in where the
    environment names none. Tokens that were not found keep what the environment sent, or, with ``unmatched="drop"``,
    are not trained on.

    Args:
        group: one without a defect.
        matches: [G]; None where the sequence was not looked up.
        figures: counts are added.
    """
    masks, logprobs, overrides = list(group.masks), _rows(group.inference_logprobs, group), _overrides(group)
    for i, match in enumerate(matches):
        if match is None:
            continue
        trained = masks[i] != NOT_TRAINED
        trained[:1] = False
        lost = trained & ~match.found
        _count(figures, group.env_id, match, int(trained.sum()))
        if unmatched == "drop" and lost.any():
            masks[i] = np.where(lost, NOT_TRAINED, masks[i])
            figures.dropped_tokens += int(lost.sum())
        logprobs[i] = _merged_logprobs(logprobs[i], match, figures)
        if match.temperature is not None:
            if stated_temperature(group, i) is None:
                overrides[i] = {**overrides[i], "temperature": match.temperature}
            elif abs(sampling_temperature(group, i, default_temperature) - match.temperature) > 1e-6:
                figures.temperature_mismatches += 1
    return replace(
        group,
        masks=tuple(masks),
        inference_logprobs=tuple(logprobs) if any(row is not None for row in logprobs) else None,
        overrides=tuple(overrides) if any(overrides) else group.overrides,
        token_versions=tuple(None if match is None else match.versions for match in matches),
    )


def _count(figures: LookUpFigures, env_id: int | None, match: SequenceMatch, tokens: int) -> None:
    figures.spans[env_id] += match.spans
    figures.unmatched_spans[env_id] += match.unmatched_spans
    figures.tokens += tokens
    figures.unmatched_tokens += match.unmatched_tokens
    figures.ambiguous_spans += match.ambiguous_spans


def _merged_logprobs(sent: FloatArray | None, match: SequenceMatch, figures: LookUpFigures) -> FloatArray | None:
    known = ~np.isnan(match.logprobs)
    own = np.maximum(match.logprobs, MIN_LOGPROB)
    if sent is None:
        return np.where(known, own, NO_LOGPROB) if known.any() else None
    both = known & (sent != NO_LOGPROB)
    if both.any():
        difference = np.abs(own[both] - sent[both])
        figures.compared_tokens += int(both.sum())
        figures.mismatched_tokens += int((difference > LOGPROB_MISMATCH).sum())
        figures.largest_difference = max(figures.largest_difference, float(difference.max()))
    return np.where(known, own, sent)


def _rows(rows: Sequence[FloatArray | None] | None, group: ScoredGroup) -> list[FloatArray | None]:
    return [None] * len(group) if rows is None else list(rows)


def _overrides(group: ScoredGroup) -> list[dict[str, Any]]:
    return [{} for _ in range(len(group))] if group.overrides is None else list(group.overrides)


# ---------------------------------------------------------------------- staleness


def versions_behind(version: int, policy_version: int) -> int:
    """Optimiser steps between the weights that wrote a group and those that it updates.

    A version above ``policy_version`` (of steps that were lost with a process and are taken again) counts as 0.
    """
    return max(policy_version - version, 0)


def is_too_old(version: int | None, policy_version: int, bound: int | None) -> bool:
    """Whether a group of ``version`` is beyond ``off_policy.max_staleness`` (``bound``). Unknown is not old."""
    return bound is not None and version is not None and versions_behind(version, policy_version) > bound


def group_version(group: ScoredGroup) -> int | None:
    """Oldest policy version that wrote a trained token of the group; None: nobody knows.

    From ``token_versions``; a sequence of which nothing is known counts with the version that its environment states.
    """
    found: list[int] = []
    for i in range(len(group)):
        row = None if group.token_versions is None else group.token_versions[i]
        known = np.zeros(0) if row is None else row[row != UNKNOWN_VERSION]
        stated = _stated_version(group, i)
        if known.size:
            found.append(int(known.min()))
        elif stated is not None:
            found.append(stated)
    return min(found) if found else None


def _stated_version(group: ScoredGroup, i: int) -> int | None:
    own: Mapping[str, Any] = {}
    if group.overrides is not None and i < len(group.overrides):
        own = group.overrides[i]
    for source in (own, group.generation_params or {}):
        version = source.get("policy_version")
        if isinstance(version, int) and not isinstance(version, bool):
            return version
    return None


def staleness_metrics(samples: Sequence[TrainingSample], policy_version: int) -> dict[str, float | int | None]:
    """How many optimiser steps older the policy that wrote a batch is than the one that is updated with it.

    A group is as stale as its oldest trained token. Versions above ``policy_version`` (of steps that were lost with a
    process and are taken again) count as 0.

    Args:
        policy_version: before the update.

    Returns:
        ``off_policy/staleness_mean`` and ``_max`` over groups (None where no version is known),
        ``off_policy/groups_of_unknown_version``, and the histograms ``off_policy/groups_at_staleness/N`` and
        ``off_policy/tokens_at_staleness/N``, N up to 8, which stands for 8 and more.
    """
    oldest: dict[str, int | None] = {}
    tokens: Counter[int] = Counter()
    unknown_tokens = 0
    for sample in samples:
        version, before = sample.policy_version, oldest.get(sample.group_id)
        oldest[sample.group_id] = version if before is None else before if version is None else min(before, version)
        if sample.token_versions is None:
            unknown_tokens += int(sample.loss_mask.sum())
            continue
        trained = sample.token_versions[sample.loss_mask]
        known = trained[trained != UNKNOWN_VERSION]
        unknown_tokens += int(trained.size - known.size)
        ages, counts = np.unique(_age(policy_version - known), return_counts=True)
        tokens.update(dict(zip(ages.tolist(), counts.tolist(), strict=True)))
    exact = [versions_behind(version, policy_version) for version in oldest.values() if version is not None]
    groups = Counter(min(age, _OLDEST_BUCKET) for age in exact)
    metrics: dict[str, float | int | None] = {
        "off_policy/staleness_mean": sum(exact) / len(exact) if exact else None,
        "off_policy/staleness_max": max(exact) if exact else None,
        "off_policy/groups_of_unknown_version": len(oldest) - len(exact),
        "off_policy/tokens_of_unknown_version": unknown_tokens,
    }
    metrics |= {f"off_policy/groups_at_staleness/{age}": count for age, count in sorted(groups.items())}
    metrics |= {f"off_policy/tokens_at_staleness/{age}": count for age, count in sorted(tokens.items())}
    return metrics


def _age(ages: Any) -> Any:
    return np.clip(ages, 0, _OLDEST_BUCKET)
