"""Staleness: puts the ledger's versions and logprobs into the groups of a batch, and leaves out old groups.

A batch is looked up (``recall``), then ``apply`` puts the matches in before ``build_samples``, then ``consumed`` says
that it was trained on. Tokens that are taken out of training are masked, groups that are too stale are left out, and
neither takes part in the statistics of the batch.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, get_args

import msgspec
import numpy as np

from atropos_verl.config.schema import OffPolicyConfig
from atropos_verl.protocol.journal import BatchJournal, JournalEntry
from atropos_verl.protocol.schema import find_defect, sampling_temperature, stated_temperature
from atropos_verl.provenance.attribution import SequenceQuery, explain, look_up
from atropos_verl.provenance.ledger import IDS, Ledger, trained_spans
from atropos_verl.provenance.repair import Repairer
from atropos_verl.provenance.throttle import StalenessThrottle
from atropos_verl.token_texts import TokenTexts
from atropos_verl.types import (
    MIN_LOGPROB,
    NO_LOGPROB,
    NOT_TRAINED,
    UNKNOWN_VERSION,
    FloatArray,
    IntArray,
    SampleSettings,
    ScoredGroup,
    SequenceMatch,
    TrainingSample,
)

logger = logging.getLogger(__name__)

BatchMatches = list[list[SequenceMatch | None]]
"""[groups][sequences]; None where nothing was looked up."""

LOGPROB_MISMATCH = 1e-3
"""Nats: an environment's logprob that is further from the ledger's is not the one it was sent."""
_OLDEST_BUCKET = 8
"""Staleness from here on is counted together."""
_BESIDE_BATCH = "ledger.msgpack"
_CONTEXT_TOKENS = 12
_SHOWN_CHARACTERS = 120
_ROLE_HEADER = re.compile(
    r"(?:^|[\n>\]#|\uff5c])\s*(?:system|user|human|assistant|tool|model|instruction)\s*(?:[\n:<|\uff5c]|$)|\[/?INST\]",
    re.IGNORECASE,
)
_UNMATCHED_KINDS = {
    "hold the header of a turn": "the mask covers turns that the policy did not write; train on its own turns only",
    "go on after the completion": "the mask covers what stands behind it; end the span where the completion ends",
    "are another text": "post the token ids that the gateway returned, and not text tokenised anew",
    "have a text that was written with different ids, so that nothing says which they were": "post the token ids that "
    "the gateway returned",
}
"""What unmatched tokens do → what to do."""
_JUMP = 0.1
_USUAL_BATCHES = 32
"""A rate of unmatched tokens that is so much, and twice, above that of the newest batches is a jump."""
_MAX_ID = 1 << 31


def make_throttle(
    config: OffPolicyConfig, ledger: Ledger, batch_size: int, batches_per_version: int = 1
) -> StalenessThrottle | None:
    """The throttle that ``off_policy.on_stale=wait`` asks for; None with ``drop``. ``batch_size`` is in sequences."""
    if config.max_staleness is None or config.on_stale == "drop":
        return None
    return StalenessThrottle(ledger, batch_size, config.max_staleness, batches_per_version=batches_per_version)


class Applied(NamedTuple):
    """The groups of a batch to train on, with the ledger's knowledge in them, and the index of each in the batch.

    ``stale_groups`` were left out because of ``off_policy.max_staleness``.
    """

    groups: list[ScoredGroup]
    kept: list[int]
    stale_groups: int
    figures: dict[str, float | int | None]


class BatchProvenance:
    """Looks the batches of one run up in the gateway's ledger; without one only what environments say is known.

    ``tokenizer`` is that of the policy; without one nothing is repaired. ``resumed_at`` is the policy version at which
    this process went on with a run; None: it began it.
    """

    def __init__(
        self,
        config: OffPolicyConfig,
        ledger: Ledger | None,
        settings: SampleSettings,
        tokenizer: Any = None,
    ) -> None:
        self.config = config
        self.ledger = ledger
        self.settings = settings
        self.resumed_at: int | None = None
        self.decode: Callable[..., str] = (lambda ids, **_: str(ids)) if tokenizer is None else tokenizer.decode
        self.text_of = None if tokenizer is None else text_decoder(tokenizer)
        """Token ids → text with special tokens, for the trace."""
        self._repairer = None
        if config.unmatched == "repair" and ledger is not None and tokenizer is not None:
            self._repairer = Repairer(ledger, TokenTexts(tokenizer))
        self._warned: set[tuple[int | None, str]] = set()
        self._usual: defaultdict[int | None, deque[float]] = defaultdict(lambda: deque(maxlen=_USUAL_BATCHES))
        """Rates of unmatched tokens by env_id, of the newest batches since the last jump."""

    def look_up(self, groups: Sequence[ScoredGroup]) -> BatchMatches:
        """Attributes every sequence of every sound group. Call it once per batch, as soon as it arrives."""
        if self.ledger is None:
            return [[None] * len(group) for group in groups]
        where = [
            (g, i)
            for g, group in enumerate(groups)
            if find_defect(group, self.settings.vocab_size) is None
            for i in range(len(group))
            if group.token_ids[i].max() < _MAX_ID
        ]
        queries = [_query(groups[g], g, i) for g, i in where]
        matches: BatchMatches = [[None] * len(group) for group in groups]
        for (g, i), match in zip(where, look_up(self.ledger, queries, self._repairer), strict=True):
            matches[g][i] = match
        return matches

    def recall(self, groups: Sequence[ScoredGroup], journal: BatchJournal, entry: JournalEntry) -> BatchMatches:
        """Reads what was kept beside a journalled batch; where nothing was, looks the batch up now and keeps that.

        Versions above ``resumed_at`` name weights that were lost: they become ``resumed_at``, for every later process
        as well (see ``SpanRecord.versions``). Raises ``CheckpointError`` when that cannot be written.
        """
        content = journal.attachment(entry, _BESIDE_BATCH)
        matches = None if content is None else decode_matches(content, groups)
        if matches is None:
            matches = self.look_up(groups)
            journal.attach(entry, _BESIDE_BATCH, encode_matches(matches))
            return matches
        known = set() if self.ledger is None else self.ledger.used_before(_records(matches))
        now = _as_of_now(matches, self.resumed_at, known)
        if now is not None:
            journal.attach(entry, _BESIDE_BATCH, encode_matches(now))
        return matches if now is None else now

    def consumed(self, matches: BatchMatches) -> None:
        """Tells the ledger that the journal holds the end of a batch: no process will look it up again."""
        if self.ledger is not None:
            self.ledger.consumed(_records(matches))

    def apply(self, groups: Sequence[ScoredGroup], matches: BatchMatches, policy_version: int) -> Applied:
        """Puts the matches into the groups, and leaves out groups too stale for a step that updates the weights of
        ``policy_version``."""
        figures = LookUpFigures()
        fresh: list[ScoredGroup] = []
        kept: list[int] = []
        bound = self.config.max_staleness
        for index, (group, found) in enumerate(zip(groups, matches, strict=True)):
            if any(match is not None for match in found):
                group = with_repaired_tokens(group, found)
                group, found = self._without_tails(group, found, figures)
                group = _merge_matches(group, found, figures, self.config.unmatched, self.settings.default_temperature)
            if bound is None or group.defect is not None or not is_stale(group_version(group), policy_version, bound):
                fresh.append(group)
                kept.append(index)
        if figures.temperature_mismatches:
            logger.warning(
                "%d sequences of this batch name another temperature than their environment asked for; "
                "the trainer computes with the one they name",
                figures.temperature_mismatches,
            )
        self._watch_rates(figures)
        stale = len(groups) - len(fresh)
        return Applied(fresh, kept, stale, {**figures.metrics(), "off_policy/dropped_stale_groups": stale})

    def _without_tails(
        self, group: ScoredGroup, matches: Sequence[SequenceMatch | None], figures: LookUpFigures
    ) -> tuple[ScoredGroup, list[SequenceMatch | None]]:
        """Takes what a chat template adds behind the policy's turns out of training, and warns of other unmatched
        tokens: once for each kind and environment."""
        masks, left = list(group.masks), list(matches)
        for i, match in enumerate(matches):
            if match is None or not match.unmatched_tokens:
                continue
            ids, tail, whole = group.token_ids[i], np.zeros(len(masks[i]), dtype=np.bool_), 0
            for start, stop in trained_spans(_query(group, 0, i).loss_mask):
                lost = [(start + a, start + b) for a, b in trained_spans(~match.found[start:stop])]
                if lost and start < lost[-1][0] and lost[-1][1] == stop and self._is_tail(ids[lost[-1][0] : stop]):
                    tail[slice(*lost.pop())] = True
                    whole += not lost
                is_ambiguous = 0 < match.ambiguous_texts == match.unmatched_spans
                for a, b in lost:
                    self._warn_of(group, i, a, b, follows=a > start and b == stop, is_ambiguous=is_ambiguous)
            count = int(tail.sum())
            figures.template_tail_tokens += count
            masks[i] = np.where(tail, NOT_TRAINED, masks[i])
            tokens, spans = match.unmatched_tokens - count, match.unmatched_spans - whole
            left[i] = replace(match, unmatched_tokens=tokens, unmatched_spans=spans)
        return replace(group, masks=tuple(masks)), left

    def _is_tail(self, ids: IntArray) -> bool:
        return not self.decode(ids.tolist(), skip_special_tokens=True).strip()

    def _warn_of(self, group: ScoredGroup, i: int, start: int, stop: int, *, follows: bool, is_ambiguous: bool) -> None:
        ids = group.token_ids[i]
        text = self.decode(ids[start:stop].tolist())
        header, longer, other, ambiguous = _UNMATCHED_KINDS
        kind = header if _ROLE_HEADER.search(text) else ambiguous if is_ambiguous else longer if follows else other
        if (group.env_id, kind) in self._warned or self.ledger is None:
            return
        self._warned.add((group.env_id, kind))
        handling = "not trained on" if self.config.unmatched == "drop" else "trained on without a policy version"
        logger.warning(
            "%s posts tokens that the policy did not generate; they %s. Group %s, sequence %d, tokens %d to %d: %r. "
            "%s. Such tokens are %s (off_policy.unmatched=%s): %s. docs/off-policy.md says more",
            "an environment" if group.env_id is None else f"environment {group.env_id}",
            kind,
            group.group_id,
            i,
            start,
            stop - 1,
            text[:_SHOWN_CHARACTERS],
            self._describe(ids, start, stop, is_text=_query(group, 0, i).is_text),
            handling,
            self.config.unmatched,
            _UNMATCHED_KINDS[kind],
        )

    def _describe(self, ids: IntArray, start: int, stop: int, *, is_text: bool) -> str:
        assert self.ledger is not None
        texts = None if self._repairer is None else self._repairer.texts
        if texts is None or not is_text or texts.text_if_whole(ids.astype(IDS)) is None:
            texts = None  # it is about the ids themselves
        difference = explain(self.ledger, ids, start, stop, texts)

        def named(token: int | None) -> str:
            return "nothing more" if token is None else f"{token} {self.decode([token])!r}"

        if difference.nothing_similar:
            return "Nothing similar is in the ledger: it was generated elsewhere, or so long ago that it was removed"
        at = difference.position
        before = self.decode(ids[max(0, at - _CONTEXT_TOKENS) : at].tolist())
        where = "in the prompt, " if difference.in_prompt else ""
        return (
            f"First difference {where}at token {at}, after {before!r}: written {named(difference.written)}, "
            f"posted {named(difference.posted)}"
        )

    def _watch_rates(self, figures: LookUpFigures) -> None:
        for env_id, tokens in figures.tokens.items():
            rate, usual = figures.unmatched_tokens[env_id] / max(tokens, 1), self._usual[env_id]
            before = sum(usual) / len(usual) if usual else rate
            if rate > max(before + _JUMP, 2 * before):
                logger.warning(
                    "%s: %.0f %% of the trained tokens of this batch were not generated by the policy, %.0f %% before",
                    "an environment" if env_id is None else f"environment {env_id}",
                    100 * rate,
                    100 * before,
                )
                usual.clear()
            usual.append(rate)


def text_decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Token ids → text, special tokens shown; by the tokenizer's fast half where it has one."""
    decode = getattr(tokenizer, "backend_tokenizer", tokenizer).decode
    return lambda ids: str(decode(ids, skip_special_tokens=False))


def look_up_counts(figures: Mapping[str, float | int | None]) -> dict[str, int]:
    """The counts among the figures of a look-up, by their names in ``RunTotals.count``."""
    names = ("looked_up_tokens", "unmatched_tokens", "template_tail_tokens", "spans", "repaired_spans")
    return {name: int(figures.get(f"data/{name}") or 0) for name in names}


def _records(matches: BatchMatches) -> list[int]:
    return [order for row in matches for match in row if match is not None for order in match.records]


def _as_of_now(matches: BatchMatches, newest: int | None, known: Set[int]) -> BatchMatches | None:
    """Lowers versions above ``newest`` and removes records that are not ``known``; None: there was nothing to do."""
    changed = False
    result: BatchMatches = []
    for row in matches:
        result.append([])
        for match in row:
            if match is not None:
                versions = match.versions if newest is None else np.minimum(match.versions, newest)
                records = tuple(order for order in match.records if order in known)
                changed |= records != match.records or not np.array_equal(versions, match.versions)
                match = replace(match, versions=versions, records=records)
            result[-1].append(match)
    return result if changed else None


def _query(group: ScoredGroup, g: int, i: int) -> SequenceQuery:
    mask = group.masks[i] != NOT_TRAINED
    mask[0] = False  # nothing predicts it, so it is never trained
    sent = None if group.inference_logprobs is None else group.inference_logprobs[i]
    others = (group.ref_logprobs, group.distill_token_ids, group.distill_logprobs)
    is_text = sent is None and all(rows is None for rows in others)
    values = {"is_text": is_text, "has_advantages": group.advantages is not None}
    return SequenceQuery(token_ids=group.token_ids[i], loss_mask=mask, logprobs=sent, group=g, **values)


def with_repaired_tokens(group: ScoredGroup, matches: Sequence[SequenceMatch | None]) -> ScoredGroup:
    """The group with the ids that were sampled; each has the advantage of the posted token in which its text begins."""
    tokens, masks = list(group.token_ids), list(group.masks)
    advantages = None if group.advantages is None else list(group.advantages)
    for i, match in enumerate(matches):
        if match is None or match.repaired is None:
            continue
        repaired = match.repaired
        tokens[i] = repaired.token_ids
        masks[i] = np.where(repaired.loss_mask, repaired.token_ids, NOT_TRAINED)
        if advantages is not None and (row := advantages[i]) is not None:
            assert repaired.origin is not None
            advantages[i] = row[repaired.origin]
    rows = None if advantages is None else tuple(advantages)
    return replace(group, token_ids=tuple(tokens), masks=tuple(masks), advantages=rows)


@dataclass(slots=True)
class LookUpFigures:
    """Counts of one batch's look-up: trained spans and tokens by env_id.

    ``compared_tokens`` are matched ones whose logprob the environment sent as well, ``largest_difference`` is in nats.
    """

    spans: Counter[int | None] = field(default_factory=Counter)
    unmatched_spans: Counter[int | None] = field(default_factory=Counter)
    ambiguous_spans: int = 0
    repaired_spans: Counter[int | None] = field(default_factory=Counter)
    ambiguous_texts: int = 0
    tokens: Counter[int | None] = field(default_factory=Counter)
    unmatched_tokens: Counter[int | None] = field(default_factory=Counter)
    template_tail_tokens: int = 0
    dropped_tokens: int = 0
    compared_tokens: int = 0
    mismatched_tokens: int = 0
    largest_difference: float = 0.0
    temperature_mismatches: int = 0

    def metrics(self) -> dict[str, float | int | None]:
        """For ``metrics.jsonl``. A rate over nothing is None, also that of one environment."""
        spans, lost = self.spans.total(), self.unmatched_spans.total()
        tokens, lost_tokens = self.tokens.total(), self.unmatched_tokens.total()
        found: dict[str, float | int | None] = {
            "data/unmatched_span_rate": lost / spans if spans else None,
            "data/unmatched_token_rate": lost_tokens / tokens if tokens else None,
            "data/looked_up_tokens": tokens,
            "data/unmatched_tokens": lost_tokens,
            "data/template_tail_tokens": self.template_tail_tokens,
            "data/ambiguous_span_rate": self.ambiguous_spans / spans if spans else None,
            "data/spans": spans,
            "data/repaired_spans": self.repaired_spans.total(),
            "data/ambiguous_texts": self.ambiguous_texts,
            "data/logprob_mismatch": self.mismatched_tokens / self.compared_tokens if self.compared_tokens else None,
            "data/logprob_mismatch_max": self.largest_difference if self.compared_tokens else None,
            "data/temperature_mismatches": self.temperature_mismatches,
            "off_policy/dropped_unmatched_tokens": self.dropped_tokens,
        }
        for env_id, count in self.spans.items():
            if env_id is not None:
                found[f"env/{env_id}/unmatched_span_rate"] = self.unmatched_spans[env_id] / count if count else None
                found[f"env/{env_id}/repaired_span_rate"] = self.repaired_spans[env_id] / count if count else None
        return found


def _merge_matches(
    group: ScoredGroup,
    matches: Sequence[SequenceMatch | None],
    figures: LookUpFigures,
    unmatched: str,
    default_temperature: float,
) -> ScoredGroup:
    """Puts the ledger's token versions, logprobs and temperature into a sound ``group``; counts into ``figures``.

    The ledger's logprobs win over the environment's; both are compared. The ledger's temperature fills in where the
    environment names none. Tokens that were not found keep what the environment sent, or, with ``unmatched="drop"``,
    are not trained on.
    """
    size = len(group)
    masks = list(group.masks)
    logprobs: list[FloatArray | None] = list(group.inference_logprobs or [None] * size)
    overrides = list(group.overrides or [{} for _ in range(size)])
    for i, match in enumerate(matches):
        if match is None:
            continue
        trained = masks[i] != NOT_TRAINED
        trained[:1] = False
        lost = trained & ~match.found
        figures.spans[group.env_id] += match.spans
        figures.unmatched_spans[group.env_id] += match.unmatched_spans
        figures.tokens[group.env_id] += int(trained.sum())
        figures.unmatched_tokens[group.env_id] += match.unmatched_tokens
        figures.ambiguous_spans += match.ambiguous_spans
        figures.repaired_spans[group.env_id] += match.repaired_spans
        figures.ambiguous_texts += match.ambiguous_texts
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


def _merged_logprobs(sent: FloatArray | None, match: SequenceMatch, figures: LookUpFigures) -> FloatArray | None:
    known = ~np.isnan(match.logprobs)
    own = np.maximum(match.logprobs, MIN_LOGPROB)
    if sent is None:
        return np.where(known, own, NO_LOGPROB) if known.any() else None
    both = known & (sent != NO_LOGPROB) & (own != NO_LOGPROB)  # of constrained tokens the ledger has none
    if both.any():
        difference = np.abs(own[both] - sent[both])
        figures.compared_tokens += int(both.sum())
        figures.mismatched_tokens += int((difference > LOGPROB_MISMATCH).sum())
        figures.largest_difference = max(figures.largest_difference, float(difference.max()))
    return np.where(known, own, sent)


def versions_behind(version: int, policy_version: int) -> int:
    """Optimiser steps between the weights that wrote a group and those that it updates."""
    return max(policy_version - version, 0)  # a version above it is of steps that were lost and are taken again


def is_stale(version: int | None, policy_version: int, bound: int | None) -> bool:
    """True when ``version`` is beyond ``off_policy.max_staleness`` (``bound``). An unknown version is not old."""
    return bound is not None and version is not None and versions_behind(version, policy_version) > bound


def group_version(group: ScoredGroup) -> int | None:
    """The oldest policy version that wrote a trained token of the group; None: unknown.

    A sequence without known ``token_versions`` counts with the version that its environment states.
    """
    found = []
    for i in range(len(group)):
        row = None if group.token_versions is None else group.token_versions[i]
        known = np.zeros(0) if row is None else row[row != UNKNOWN_VERSION]
        found.append(int(known.min()) if known.size else stated_version(group, i))
    return min((version for version in found if version is not None), default=None)


def stated_version(group: ScoredGroup, i: int) -> int | None:
    """The policy version that the environment names for sequence ``i``, if it is an integer."""
    own = group.overrides[i] if group.overrides is not None and i < len(group.overrides) else {}
    for source in (own, group.generation_params or {}):
        version = source.get("policy_version")
        if isinstance(version, int) and not isinstance(version, bool):
            return version
    return None


def staleness_metrics(samples: Sequence[TrainingSample], policy_version: int) -> dict[str, float | int | None]:
    """Counts how many optimiser steps the policy that wrote a batch is behind the one that the batch updates.

    A group is as stale as its oldest trained token. ``policy_version`` is that before the update. In the histograms
    ``off_policy/{groups,tokens}_at_staleness/N`` 8 stands for 8 and more.
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
        staleness, counts = np.unique(np.clip(policy_version - known, 0, _OLDEST_BUCKET), return_counts=True)
        tokens.update(dict(zip(staleness.tolist(), counts.tolist(), strict=True)))
    exact = [versions_behind(version, policy_version) for version in oldest.values() if version is not None]
    groups = Counter(min(bucket, _OLDEST_BUCKET) for bucket in exact)
    metrics: dict[str, float | int | None] = {
        "off_policy/staleness_mean": sum(exact) / len(exact) if exact else None,
        "off_policy/staleness_max": max(exact) if exact else None,
        "off_policy/groups_of_unknown_version": len(oldest) - len(exact),
        "off_policy/tokens_of_unknown_version": unknown_tokens,
    }
    metrics |= {f"off_policy/groups_at_staleness/{bucket}": count for bucket, count in sorted(groups.items())}
    metrics |= {f"off_policy/tokens_at_staleness/{bucket}": count for bucket, count in sorted(tokens.items())}
    return metrics


def encode_matches(matches: BatchMatches) -> bytes:
    """Writes a file that ``decode_matches`` reads. Logprobs are in float32."""
    return zlib.compress(msgspec.msgpack.encode(matches, enc_hook=_array_bytes))


def _array_bytes(array: FloatArray | IntArray) -> bytes:
    return array.astype(np.float32 if array.dtype == np.float64 else array.dtype).tobytes()


def _array_of(kind: Any, content: bytes) -> FloatArray | IntArray:
    dtype = get_args(get_args(kind)[1])[0]
    kept = np.float32 if dtype == np.float64 else dtype
    return np.frombuffer(content, kept).astype(dtype)


def decode_matches(content: bytes, groups: Sequence[ScoredGroup]) -> BatchMatches | None:
    """Reads what ``encode_matches`` wrote for these groups; None when it is not that (a torn file, other groups)."""
    try:
        matches = msgspec.msgpack.decode(zlib.decompress(content), type=BatchMatches, dec_hook=_array_of)
        for row, group in zip(matches, groups, strict=True):
            for match, ids in zip(row, group.token_ids, strict=True):
                if match is not None and len(ids) != (match.repaired.posted if match.repaired else len(match.found)):
                    raise ValueError("it belongs to another batch")
        return matches
    except (zlib.error, msgspec.MsgspecError, ValueError) as error:
        logger.warning("what the ledger knew about a journalled batch cannot be read: %s", error)
        return None
