"""Staleness: puts the ledger's versions and logprobs into the groups of a batch, and leaves out old groups.

A batch is looked up (``recall``), then ``apply`` puts the matches in before ``build_samples``, then ``consumed`` says
that it was trained on. Tokens that are taken out of training are masked, groups that are too stale are left out, and
neither takes part in the statistics of the batch.
"""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from atropos_verl.config.schema import OffPolicyConfig
from atropos_verl.protocol.journal import BatchJournal, JournalEntry
from atropos_verl.protocol.schema import find_defect, sampling_temperature, stated_temperature
from atropos_verl.provenance.attribution import SequenceQuery, first_difference, look_up
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
_COUNTS = ("looked_up_tokens", "unmatched_tokens", "template_tail_tokens", "spans", "repaired_spans")
"""Of a batch, by their names in ``RunTotals.count``."""
_LARGEST = "largest_difference"
"""Of logprobs that were compared, in nats."""
_FIGURES = ("ambiguous_texts", "spans_with_values", "temperature_mismatches")
_SHOWN = 40
"""Characters or tokens of each text in a message."""
_MAX_ID = 1 << 31


def make_throttle(
    config: OffPolicyConfig, ledger: Ledger, batch_size: int, batches_per_version: int = 1
) -> StalenessThrottle | None:
    """The throttle that ``off_policy.on_stale=wait`` asks for; None with ``drop``. ``batch_size`` is in sequences."""
    if config.max_staleness is None or config.on_stale == "drop":
        return None
    return StalenessThrottle(ledger, batch_size, config.max_staleness, batches_per_version=batches_per_version)


class Applied(NamedTuple):
    """The groups of a batch to train on, with the ledger's knowledge in them, and the index of each in the batch."""

    groups: list[ScoredGroup]
    kept: list[int]
    figures: dict[str, float | int | None]


class BatchProvenance:
    """Looks the batches of one run up in the gateway's ledger; without one only what environments say is known. Without
    the policy's ``tokenizer`` nothing is repaired. ``resumed_at`` is the policy version at which this process went on
    with a run; None: it began it."""

    def __init__(
        self, config: OffPolicyConfig, ledger: Ledger | None, settings: SampleSettings, tokenizer: Any = None
    ) -> None:
        self.config = config
        self.ledger = ledger
        self.settings = settings
        self.resumed_at: int | None = None
        self.decode: Callable[..., str] = (lambda ids, **_: str(ids)) if tokenizer is None else tokenizer.decode
        self._repairer = None
        if config.unmatched == "repair" and ledger is not None and tokenizer is not None:
            self._repairer = Repairer(ledger, TokenTexts(tokenizer))
        self._warned = set[int | None]()

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
        as well (see ``SpanRecord.versions``). Raises ``CheckpointError`` when that cannot be written."""
        content = journal.attachment(entry, _BESIDE_BATCH)
        matches = None if content is None else decode_matches(content, groups)
        if matches is None:
            matches = self.look_up(groups)
        else:
            known = set() if self.ledger is None else self.ledger.used(_records(matches))
            matches = [[match and _as_of_now(match, self.resumed_at, known) for match in row] for row in matches]
        if (encoded := encode_matches(matches)) != content:
            journal.attach(entry, _BESIDE_BATCH, encoded)
        return matches

    def consumed(self, matches: BatchMatches) -> None:
        """Tells the ledger that the journal holds the end of a batch: no process will look it up again."""
        if self.ledger is not None:
            self.ledger.consumed(_records(matches))

    def apply(self, groups: Sequence[ScoredGroup], matches: BatchMatches, policy_version: int) -> Applied:
        """Puts the matches into the groups, and leaves out groups too stale for a step that updates the weights of
        ``policy_version``."""
        counts: Counter[str] = Counter()
        fresh: list[ScoredGroup] = []
        kept: list[int] = []
        bound = self.config.max_staleness
        for index, (group, found) in enumerate(zip(groups, matches, strict=True)):
            if any(match is not None for match in found):
                group = with_repaired_tokens(group, found)
                group = self._merge(group, found, counts)
            if bound is None or group.defect or not is_stale(group_version(group), policy_version, bound):
                fresh.append(group)
                kept.append(index)
        if mismatches := counts["temperature_mismatches"]:
            logger.warning(
                "%d sequences of this batch name another temperature than their environment asked for; "
                "the trainer computes with the one they name",
                mismatches,
            )
        return Applied(fresh, kept, {**_figures(counts), "off_policy/dropped_stale_groups": len(groups) - len(fresh)})

    def _merge(self, group: ScoredGroup, matches: Sequence[SequenceMatch | None], counts: Counter[str]) -> ScoredGroup:
        """Puts the ledger's token versions, logprobs and temperature into a sound ``group``, and counts. The ledger's
        logprobs win over the environment's; both are compared. The ledger's temperature fills in where the environment
        names none. What a chat template adds behind the policy's turns is not trained on. Other tokens that were not
        found keep what the environment sent, or, with ``off_policy.unmatched=drop``, are not trained on."""
        masks = list(group.masks)
        logprobs: list[FloatArray | None] = list(group.inference_logprobs or [None] * len(group))
        overrides = list(group.overrides or [{} for _ in range(len(group))])
        for i, match in enumerate(matches):
            if match is None:
                continue
            trained, tail = group.trained(i), self._template_tail(group, i, match)
            lost = trained & ~match.found & ~tail
            dropped = lost & (self.config.unmatched == "drop")
            masks[i] = np.where(tail | dropped, NOT_TRAINED, masks[i])
            spans = {
                "spans": match.spans,
                "unmatched_spans": sum(bool(lost[start:stop].any()) for start, stop in trained_spans(trained)),
                "repaired_spans": match.repaired_spans,
            }
            counts.update(
                spans,
                looked_up_tokens=int(trained.sum() - tail.sum()),
                unmatched_tokens=int(lost.sum()),
                template_tail_tokens=int(tail.sum()),
                dropped_tokens=int(dropped.sum()),
                ambiguous_spans=match.ambiguous_spans,
                ambiguous_texts=match.ambiguous_texts,
                spans_with_values=spans["unmatched_spans"] * _has_values(group, i),
            )
            if group.env_id is not None:
                counts.update({f"env/{group.env_id}/{name}": count for name, count in spans.items()})
            logprobs[i] = _merged_logprobs(logprobs[i], match, counts)
            if match.temperature is not None:
                if stated_temperature(group, i) is None:
                    overrides[i] = {**overrides[i], "temperature": match.temperature}
                elif abs(sampling_temperature(group, i, 1.0) - match.temperature) > 1e-6:
                    counts["temperature_mismatches"] += 1
        return replace(
            group,
            masks=tuple(masks),
            inference_logprobs=tuple(logprobs) if any(row is not None for row in logprobs) else None,
            overrides=tuple(overrides) if any(overrides) else group.overrides,
            token_versions=tuple(None if match is None else match.versions for match in matches),
        )

    def _template_tail(self, group: ScoredGroup, i: int, match: SequenceMatch) -> NDArray[np.bool_]:
        """[T] what a chat template adds behind the policy's turns. Warns of other unmatched tokens."""
        ids, tail = group.token_ids[i], np.zeros(len(group.token_ids[i]), dtype=np.bool_)
        for start, stop in trained_spans(group.trained(i)) if match.unmatched_tokens else ():
            lost = [(start + a, start + b) for a, b in trained_spans(~match.found[start:stop])]
            is_behind = bool(lost) and start < lost[-1][0] and lost[-1][1] == stop
            if is_behind and not self.decode(ids[lost[-1][0] : stop].tolist(), skip_special_tokens=True).strip():
                tail[slice(*lost.pop())] = True
            if lost:
                self._warn_of(group, i, *lost[0], is_ambiguous=0 < match.ambiguous_texts == match.unmatched_spans)
        return tail

    def _warn_of(self, group: ScoredGroup, i: int, start: int, stop: int, *, is_ambiguous: bool) -> None:
        """Of unmatched tokens ``[start, stop)``, once for each environment."""
        if group.env_id in self._warned or self.ledger is None:
            return
        self._warned.add(group.env_id)
        ids = group.token_ids[i]
        why = self._describe(ids, stop, is_text=_query(group, 0, i).is_text)
        if is_ambiguous:
            why = "Their text was written with different ids, so that nothing says which they were"
        elif self._repairer is not None and _has_values(group, i):
            why += ". Its ref_logprobs or distill_* are of just these ids, so it is not repaired (docs/distillation.md)"
        logger.warning(
            "%s posts tokens that the policy did not generate. Group %s, sequence %d, tokens %d to %d: %r. %s. Such "
            "tokens are %s (off_policy.unmatched=%s). Post the token ids that the gateway returned, and train on the "
            "policy's own turns only; docs/off-policy.md says more",
            "an environment" if group.env_id is None else f"environment {group.env_id}",
            group.group_id,
            i,
            start,
            stop - 1,
            self.decode(ids[start : min(stop, start + _SHOWN)].tolist()),
            why,
            "not trained on" if self.config.unmatched == "drop" else "trained on without a policy version",
            self.config.unmatched,
        )

    def _describe(self, ids: IntArray, stop: int, *, is_text: bool) -> str:
        """Where tokens before ``stop`` differ from what is in the ledger: in their text where that is all there is."""
        assert self.ledger is not None
        texts = self._repairer.texts if self._repairer is not None and is_text else None
        as_text = texts is not None and texts.read(ids.astype(IDS))[0] is not None
        read = (lambda row: texts.text(row).decode()) if texts is not None and as_text else (lambda row: row.tolist())
        at, posted, written = first_difference(self.ledger, ids[:stop], read)
        if not at:
            return "Nothing similar is in the ledger: it was generated elsewhere, or so long ago that it was removed"
        parts = posted[max(0, at - _SHOWN) : at], written[at : at + _SHOWN], posted[at : at + _SHOWN]
        shown = [repr(part) if isinstance(part, str) else f"{part} {self.decode(part)!r}" for part in parts]
        return f"After {shown[0]} the policy wrote {shown[1]}, and {shown[2]} was posted"


def look_up_counts(figures: Mapping[str, float | int | None]) -> dict[str, int]:
    """The counts among the figures of a look-up, by their names in ``RunTotals.count``."""
    stale = int(figures.get("off_policy/dropped_stale_groups") or 0)
    return {"stale": stale, **{name: int(figures.get(f"data/{name}") or 0) for name in _COUNTS}}


def _records(matches: BatchMatches) -> list[int]:
    return [order for row in matches for match in row if match is not None for order in match.records]


def _as_of_now(match: SequenceMatch, newest: int | None, known: Set[int]) -> SequenceMatch:
    """With versions of at most ``newest``, and the records that are ``known``."""
    versions = match.versions if newest is None else np.minimum(match.versions, newest)
    return replace(match, versions=versions, records=tuple(order for order in match.records if order in known))


def _query(group: ScoredGroup, g: int, i: int) -> SequenceQuery:
    sent = None if group.inference_logprobs is None else group.inference_logprobs[i]
    return SequenceQuery(
        token_ids=group.token_ids[i],
        loss_mask=group.trained(i),
        logprobs=sent,
        group=g,
        is_text=sent is None and not _has_values(group, i),
        has_advantages=group.advantages is not None,
    )


def _has_values(group: ScoredGroup, i: int) -> bool:
    """A teacher or a reference policy was asked about just these ids of sequence ``i``."""
    return any(rows is not None and rows[i] is not None for rows in (group.ref_logprobs, group.distill_token_ids))


def with_repaired_tokens(group: ScoredGroup, matches: Sequence[SequenceMatch | None]) -> ScoredGroup:
    """The group with the ids that were sampled; each has the advantage of the posted token in which its text begins."""
    tokens, masks, advantages = list(group.token_ids), list(group.masks), list(group.advantages or ())
    for i, match in enumerate(matches):
        if match is None or (repaired := match.repaired) is None:
            continue
        tokens[i] = repaired.token_ids
        masks[i] = np.where(repaired.loss_mask, repaired.token_ids, NOT_TRAINED)
        if advantages and (row := advantages[i]) is not None:
            assert repaired.origin is not None
            advantages[i] = row[repaired.origin]
    return replace(group, token_ids=tuple(tokens), masks=tuple(masks), advantages=tuple(advantages) or None)


def _figures(counts: Mapping[str, float]) -> dict[str, float | int | None]:
    """Counts of one batch's look-up (of one environment by ``env/N/NAME``) for ``metrics.jsonl``. A rate over nothing
    is None."""

    def rate(name: str, of: str) -> float | None:
        return counts[name] / counts[of] if counts[of] else None

    found: dict[str, float | int | None] = {
        **{f"data/{name}": counts[name] for name in (*_COUNTS, *_FIGURES)},
        "data/unmatched_span_rate": rate("unmatched_spans", "spans"),
        "data/unmatched_token_rate": rate("unmatched_tokens", "looked_up_tokens"),
        "data/ambiguous_span_rate": rate("ambiguous_spans", "spans"),
        "data/logprob_mismatch": rate("mismatched_logprobs", "compared_logprobs"),
        "data/logprob_mismatch_max": counts[_LARGEST] if counts["compared_logprobs"] else None,
        "off_policy/dropped_unmatched_tokens": counts["dropped_tokens"],
    }
    for spans in [name for name in counts if name.endswith("/spans")]:
        env = spans.removesuffix("spans")
        found |= {f"{env}{name}_rate": rate(f"{env}{name}s", spans) for name in ("unmatched_span", "repaired_span")}
    return found


def _merged_logprobs(sent: FloatArray | None, match: SequenceMatch, counts: Counter[str]) -> FloatArray | None:
    known = ~np.isnan(match.logprobs)
    own = np.maximum(match.logprobs, MIN_LOGPROB)
    if sent is None:
        return np.where(known, own, NO_LOGPROB) if known.any() else None
    both = known & (sent != NO_LOGPROB) & (own != NO_LOGPROB)  # of constrained tokens the ledger has none
    if both.any():
        difference = np.abs(own[both] - sent[both])
        counts["compared_logprobs"] += int(both.sum())
        counts["mismatched_logprobs"] += int((difference > LOGPROB_MISMATCH).sum())
        counts[_LARGEST] = max(counts[_LARGEST], float(difference.max()))  # type: ignore[assignment]
    return np.where(known, own, sent)


def versions_behind(version: int, policy_version: int) -> int:
    """Optimiser steps between the weights that wrote a group and those that it updates."""
    return max(policy_version - version, 0)  # a version above it is of steps that were lost and are taken again


def is_stale(version: int | None, policy_version: int, bound: int | None) -> bool:
    """True when ``version`` is beyond ``off_policy.max_staleness`` (``bound``). An unknown version is not old."""
    return bound is not None and version is not None and versions_behind(version, policy_version) > bound


def group_version(group: ScoredGroup) -> int | None:
    """The oldest policy version that wrote a trained token of the group; None: unknown. A sequence without known
    ``token_versions`` counts with the version that its environment states."""
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
    """How many optimiser steps the policy that wrote a batch is behind that of ``policy_version``, before the update. A
    group is as stale as its oldest trained token. In the histograms 8 stands for 8 and more."""
    oldest: dict[str, int | None] = {}
    written: Counter[int] = Counter()
    for sample in samples:
        both = (sample.policy_version, oldest.get(sample.group_id))
        oldest[sample.group_id] = min((version for version in both if version is not None), default=None)
        versions = sample.token_versions
        own = np.full(len(sample), UNKNOWN_VERSION) if versions is None else versions
        for version, count in zip(*np.unique(own[sample.loss_mask], return_counts=True), strict=True):
            written[int(version)] += int(count)
    unknown_tokens = written.pop(UNKNOWN_VERSION, 0)
    tokens: Counter[int] = Counter()
    for version, count in written.items():
        tokens[min(versions_behind(version, policy_version), _OLDEST_BUCKET)] += count
    exact = [versions_behind(version, policy_version) for version in oldest.values() if version is not None]
    groups = Counter(min(bucket, _OLDEST_BUCKET) for bucket in exact)
    metrics: dict[str, float | int | None] = {
        "off_policy/staleness_mean": sum(exact) / len(exact) if exact else None,
        "off_policy/staleness_max": max(exact, default=None),
        "off_policy/groups_of_unknown_version": len(oldest) - len(exact),
        "off_policy/tokens_of_unknown_version": unknown_tokens,
    }
    metrics |= {f"off_policy/groups_at_staleness/{bucket}": count for bucket, count in sorted(groups.items())}
    metrics |= {f"off_policy/tokens_at_staleness/{bucket}": count for bucket, count in sorted(tokens.items())}
    return metrics


def encode_matches(matches: BatchMatches) -> bytes:
    """Writes a file that ``decode_matches`` reads. Logprobs are in float32."""

    def as_bytes(array: FloatArray | IntArray) -> bytes:
        return array.astype(np.float32 if array.dtype == np.float64 else array.dtype).tobytes()

    return zlib.compress(msgspec.msgpack.encode(matches, enc_hook=as_bytes))


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
