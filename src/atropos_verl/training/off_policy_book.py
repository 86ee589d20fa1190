"""``OffPolicyBook``: what a trainer asks about the policy that wrote its batches, over a ledger.

One batch::

    matches = book.look_up_and_keep(groups, journal, entry)     # when it arrives
    applied = book.apply(groups, matches, policy_version)       # before build_samples; the version to be updated
    …
    book.consumed(matches)                                      # trained on, and the journal says so
    …
    matches = book.recall(groups, journal, entry)               # after a restart: fetched by the process before

Both backends use it; the ledger is the one that the gateway writes to.
"""

from __future__ import annotations

import io
import logging
import time
import zipfile
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from atropos_verl.config.schema import OffPolicyConfig
from atropos_verl.protocol.journal import BatchJournal, JournalEntry
from atropos_verl.protocol.schema import find_defect
from atropos_verl.provenance.attribution import SequenceQuery, look_up
from atropos_verl.provenance.ledger import Ledger
from atropos_verl.training.staleness import LookUpFigures, group_version, is_too_old, merge_matches
from atropos_verl.types import NOT_TRAINED, Difference, SampleSettings, ScoredGroup, SequenceMatch

__all__ = ["Applied", "BatchMatches", "OffPolicyBook", "decode_matches", "encode_matches"]

logger = logging.getLogger(__name__)

BatchMatches = list[list[SequenceMatch | None]]
"""[groups][sequences]; None where nothing was looked up."""

_BESIDE_BATCH = "ledger.npz"
_EXAMPLE_INTERVAL = 60.0
"""Seconds between two examples of one environment in the log."""
_CONTEXT_TOKENS = 12
_MAX_ID = 1 << 31


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """A batch of which the ledger's knowledge is part."""

    groups: list[ScoredGroup]
    """Those to train on; too old ones are left out."""
    kept: list[int]
    """Where each of them was among those given."""
    stale_groups: int
    """Left out because of ``off_policy.max_staleness``."""
    figures: dict[str, float | int | None]


class OffPolicyBook:
    """Look-ups of one run.

    Args:
        ledger: None: nothing is known but what environments say.
        decode: token ids → text, for examples in the log.

    ``resumed_at``: the policy version at which this process went on with a run; None: it began it.
    """

    def __init__(
        self,
        config: OffPolicyConfig,
        ledger: Ledger | None,
        settings: SampleSettings,
        decode: Callable[[list[int]], str] = str,
    ) -> None:
        self.config = config
        self.ledger = ledger
        self.settings = settings
        self.resumed_at: int | None = None
        self._decode = decode
        self._last_example: dict[int | None, float] = {}

    def look_up(self, groups: Sequence[ScoredGroup]) -> BatchMatches:
        """Who wrote what, for every sequence of every sound group. Call it once per batch, as soon as it is here."""
        if self.ledger is None:
            return [[None] * len(group) for group in groups]
        where: list[tuple[int, int]] = []
        queries: list[SequenceQuery] = []
        for g, group in enumerate(groups):
            if find_defect(group, self.settings.vocab_size) is None:
                for i in range(len(group)):
                    if group.token_ids[i].max() < _MAX_ID:
                        where.append((g, i))
                        queries.append(_query(group, g, i))
        matches: BatchMatches = [[None] * len(group) for group in groups]
        for (g, i), match in zip(where, look_up(self.ledger, queries), strict=True):
            matches[g][i] = match
            if match.difference is not None:
                self._show(groups[g], i, match, match.difference)
        return matches

    def look_up_and_keep(
        self, groups: Sequence[ScoredGroup], journal: BatchJournal, entry: JournalEntry
    ) -> BatchMatches:
        """``look_up``, and keep what was found beside the journalled batch.

        Raises:
            CheckpointError: it cannot be written.
        """
        matches = self.look_up(groups)
        journal.attach(entry, _BESIDE_BATCH, encode_matches(matches))
        return matches

    def recall(self, groups: Sequence[ScoredGroup], journal: BatchJournal, entry: JournalEntry) -> BatchMatches:
        """What was kept beside a journalled batch; where nothing was, what is known now.

        Versions above ``resumed_at`` name weights that were lost: they become ``resumed_at``, for every later process
        as well (see ``SpanRecord.versions``).

        Raises:
            CheckpointError: that cannot be written.
        """
        content = journal.attachment(entry, _BESIDE_BATCH)
        matches = None if content is None else decode_matches(content, groups)
        if matches is None:
            return self.look_up_and_keep(groups, journal, entry)
        known = set() if self.ledger is None else self.ledger.used_before(_records(matches))
        now = _as_of_now(matches, self.resumed_at, known)
        if now is not None:
            journal.attach(entry, _BESIDE_BATCH, encode_matches(now))
        return matches if now is None else now

    def consumed(self, matches: BatchMatches) -> None:
        """The batch was trained on, or given up, and the journal says so: no process will look it up again."""
        if self.ledger is not None:
            self.ledger.consumed(_records(matches))

    def apply(self, groups: Sequence[ScoredGroup], matches: BatchMatches, policy_version: int) -> Applied:
        """Put the matches into the groups, and leave out what is too old.

        Args:
            policy_version: of the weights that the step is about to update.
        """
        figures = LookUpFigures()
        fresh: list[ScoredGroup] = []
        kept: list[int] = []
        stale = 0
        for index, (group, found) in enumerate(zip(groups, matches, strict=True)):
            if any(match is not None for match in found):
                group = merge_matches(
                    group,
                    found,
                    figures,
                    unmatched=self.config.unmatched,
                    default_temperature=self.settings.default_temperature,
                )
            if self.is_stale(group, policy_version):
                stale += 1
            else:
                fresh.append(group)
                kept.append(index)
        if figures.temperature_mismatches:
            logger.warning(
                "%d sequences of this batch name another temperature than their environment asked the gateway for; "
                "the trainer computes with the one they name",
                figures.temperature_mismatches,
            )
        return Applied(
            groups=fresh,
            kept=kept,
            stale_groups=stale,
            figures={**figures.metrics(), "off_policy/dropped_stale_groups": stale},
        )

    def all_stale(self, groups: Sequence[ScoredGroup], matches: BatchMatches, policy_version: int) -> bool:
        """Whether a batch has groups, and ``apply`` would leave every one of them out."""
        if self.config.max_staleness is None or not groups:
            return False
        return not self.apply(groups, matches, policy_version).groups

    def is_stale(self, group: ScoredGroup, policy_version: int) -> bool:
        """Whether a group (with its matches merged) is older than ``off_policy.max_staleness``. Unknown is not old."""
        bound = self.config.max_staleness
        if bound is None or group.defect is not None:
            return False
        return is_too_old(group_version(group), policy_version, bound)

    def _show(self, group: ScoredGroup, i: int, match: SequenceMatch, difference: Difference) -> None:
        now = time.monotonic()
        if now - self._last_example.get(group.env_id, -_EXAMPLE_INTERVAL) < _EXAMPLE_INTERVAL:
            return
        self._last_example[group.env_id] = now
        name = "an environment" if group.env_id is None else f"environment {group.env_id}"
        handling = {"use": "trained on without a policy version", "drop": "not trained on"}[self.config.unmatched]
        logger.warning(
            "%s posts text that the policy did not write as posted: group %s, sequence %d, %d of %d trained spans. %s. "
            "Unmatched tokens are %s (off_policy.unmatched=%s); docs/off-policy.md says more",
            name,
            group.group_id,
            i,
            match.unmatched_spans,
            match.spans,
            self._describe(group.token_ids[i].tolist(), difference),
            handling,
            self.config.unmatched,
        )

    def _describe(self, tokens: list[int], difference: Difference) -> str:
        if difference.nothing_similar:
            return (
                "Nothing similar was generated here: it was written elsewhere, or so long ago that the ledger has "
                "forgotten it"
            )
        at = difference.position
        before = self._decode(tokens[max(0, at - _CONTEXT_TOKENS) : at])
        where = "in the prompt, " if difference.in_prompt else ""
        return (
            f"First difference {where}at token {at}, after {before!r}: written {self._token(difference.written)}, "
            f"posted {self._token(difference.posted)}"
        )

    def _token(self, token: int | None) -> str:
        return "nothing more" if token is None else f"{token} {self._decode([token])!r}"


def _records(matches: BatchMatches) -> list[int]:
    return [order for row in matches for match in row if match is not None for order in match.records]


def _as_of_now(matches: BatchMatches, newest: int | None, known: Set[int]) -> BatchMatches | None:
    """``matches`` with no version above ``newest`` and no record but the ``known`` ones; None when they have none."""
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
    return SequenceQuery(token_ids=group.token_ids[i], loss_mask=mask, logprobs=sent, group=g, env_id=group.env_id)


# ---------------------------------------------------------------------- beside the journal


def encode_matches(matches: BatchMatches) -> bytes:
    """As a file (numpy's npz) that ``decode_matches`` reads. Differences are not kept."""
    flat = [match for group in matches for match in group]
    found = [match for match in flat if match is not None]
    columns: dict[str, Any] = {
        "groups": np.array([len(group) for group in matches], dtype=np.int64),
        "tokens": np.array([-1 if m is None else len(m.found) for m in flat], dtype=np.int64),
        "temperature": np.array([np.nan if m.temperature is None else m.temperature for m in found]),
        "counts": np.array(
            [[m.spans, m.unmatched_spans, m.unmatched_tokens, m.ambiguous_spans] for m in found], dtype=np.int64
        ).reshape(-1, 4),
        "holds": np.array([len(m.records) for m in found], dtype=np.int64),
        "records": np.array([order for m in found for order in m.records], dtype=np.int64),
        "found": np.concatenate([np.zeros(0, dtype=np.bool_), *(m.found for m in found)]),
        "versions": np.concatenate([np.zeros(0, dtype=np.int64), *(m.versions for m in found)]),
        "logprobs": np.concatenate([np.zeros(0), *(m.logprobs for m in found)]).astype(np.float32),
    }
    file = io.BytesIO()
    np.savez_compressed(file, **columns)
    return file.getvalue()


def decode_matches(content: bytes, groups: Sequence[ScoredGroup]) -> BatchMatches | None:
    """What ``encode_matches`` wrote for these groups; None when it cannot be that (a torn file, other groups)."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
        return _decode_columns(columns, groups)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("what the ledger knew about a journalled batch cannot be read: %s", error)
        return None


def _decode_columns(columns: dict[str, Any], groups: Sequence[ScoredGroup]) -> BatchMatches:
    if columns["groups"].tolist() != [len(group) for group in groups]:
        raise ValueError("it belongs to another batch")
    lengths = columns["tokens"].tolist()
    ends = np.cumsum([max(length, 0) for length in lengths])
    if "holds" not in columns:  # of a release before these were kept
        columns |= {"holds": np.zeros(len(columns["counts"]), dtype=np.int64), "records": np.zeros(0, dtype=np.int64)}
    columns["last"] = np.cumsum(columns["holds"])
    matches: BatchMatches = []
    position = number = 0
    for group in groups:
        row: list[SequenceMatch | None] = []
        for ids in group.token_ids:
            length = lengths[position]
            if length < 0:
                row.append(None)
            elif length != len(ids):
                raise ValueError("it belongs to another batch")
            else:
                part = slice(ends[position] - length, ends[position])
                row.append(_decode_match(columns, number, part))
                number += 1
            position += 1
        matches.append(row)
    return matches


def _decode_match(columns: dict[str, Any], number: int, part: slice) -> SequenceMatch:
    spans, unmatched_spans, unmatched_tokens, ambiguous = columns["counts"][number].tolist()
    temperature = float(columns["temperature"][number])
    last = columns["last"][number]
    return SequenceMatch(
        found=columns["found"][part],
        versions=columns["versions"][part],
        logprobs=columns["logprobs"][part].astype(np.float64),
        temperature=None if np.isnan(temperature) else temperature,
        spans=spans,
        unmatched_spans=unmatched_spans,
        unmatched_tokens=unmatched_tokens,
        ambiguous_spans=ambiguous,
        records=tuple(columns["records"][last - columns["holds"][number] : last].tolist()),
    )
