"""What the trainer would see in groups: samples, advantages, refusals, as plain JSON-able structures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from atropos_verl.errors import ConfigError, UnsupportedFieldError
from atropos_verl.report.sources import FoundGroup
from atropos_verl.training.samples import build_samples
from atropos_verl.types import FloatArray, SampleSettings, ScoredGroup, TrainingSample

__all__ = [
    "Decoder",
    "GroupView",
    "Inspection",
    "Piece",
    "SequenceView",
    "Spread",
    "TokenView",
    "inspect_groups",
    "load_decoder",
]


@dataclass(frozen=True, slots=True)
class Spread:
    """Of ``count`` values."""

    mean: float
    min: float
    max: float
    count: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens that are all trained or all not. ``text``: decoded, or the ids without a tokenizer."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class TokenView:
    position: int
    id: int
    text: str
    trained: bool
    advantage: float | None
    logprob: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceView:
    """One sequence. Advantages and logprobs are over its trained tokens; None where there are none."""

    index: int
    length: int
    trained_tokens: int
    score: float | None
    advantage: Spread | None = None
    logprob: Spread | None = None
    temperature: float | None = None
    policy_version: int | None = None
    staleness: int | None = None
    """Versions between the policy that sampled it and the current one."""
    truncated: bool = False
    excluded: str | None = None
    """Why this sequence of a used group is not trained."""
    pieces: list[Piece]
    tokens: list[TokenView] | None = None
    """None unless asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    origin: str
    group_id: str
    env_id: int | None
    refused: str | None
    """Why the trainer, with these settings, would not train on it."""
    stops_run: bool
    """It would not be quarantined: the run would end with this error."""
    recorded_reason: str | None
    sequences: list[SequenceView] | None
    """None: beyond the groups that were asked for in detail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    groups: list[GroupView]
    sequences: int
    """That would be trained."""
    trained_tokens: int
    mean_score: float | None
    """Of every sequence of the groups that are used."""
    refused: int
    dropped_overlong: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Decoder(Protocol):
    """Token ids → text."""

    vocab_size: int

    def decode(self, ids: Sequence[int]) -> str: ...


class _FileDecoder:
    """A ``tokenizer.json``, read without transformers."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer  # type: ignore[import-untyped]

        self._tokenizer = Tokenizer.from_file(str(path))
        self.vocab_size: int = self._tokenizer.get_vocab_size()

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


class _HuggingFaceDecoder:
    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(name)
        self.vocab_size = len(self._tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)


def load_decoder(name: str) -> Decoder:
    """A tokenizer: a directory or ``tokenizer.json`` on disk, or a name that transformers can find.

    Raises:
        ConfigError: there is none.
    """
    path = Path(name).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.is_file():
            return _FileDecoder(file)
        return _HuggingFaceDecoder(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer at {name}: {str(error).splitlines()[0]}", "--tokenizer") from error
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers package raises a bare Exception for a file it cannot read
            raise
        raise ConfigError(f"{file} is not a tokenizer file: {error}", "--tokenizer") from error


def inspect_groups(
    found: Sequence[FoundGroup],
    settings: SampleSettings,
    *,
    decoder: Decoder | None = None,
    policy_version: int | None = None,
    detailed: int | None = None,
    with_tokens: bool = False,
) -> Inspection:
    """Do what the trainer does with one global batch, and keep what it would throw away.

    Args:
        decoder: for text; without it, or for ids that it does not know, pieces are the ids.
        policy_version: the current one, for staleness.
        detailed: how many groups to describe with their sequences, from the first; None: all.
        with_tokens: describe every token.

    Raises:
        ConfigError: a setting is unknown or out of range.
    """
    # Nothing may end the inspection: what would end a run is shown.
    overlong = "drop" if settings.overlong == "error" else settings.overlong
    settings = replace(settings, on_bad_group="quarantine", overlong=overlong)
    refusals = [_refusal(item.group, settings) for item in found]
    used = [item.group for item, refusal in zip(found, refusals, strict=True) if refusal is None]
    report = build_samples(used, settings)
    samples = iter(report.samples)
    describe = _Describer(settings, decoder, policy_version, with_tokens)
    views = []
    for number, (item, refusal) in enumerate(zip(found, refusals, strict=True)):
        own: dict[int, TrainingSample] = {}
        if refusal is None:
            # Samples come in the order of groups and sequences, those left out missing.
            own = {i: next(samples) for i in range(len(item.group)) if not _is_overlong(item.group, i, settings)}
        views.append(describe.group(item, refusal, own, with_sequences=detailed is None or number < detailed))
    return Inspection(
        groups=views,
        sequences=len(report.samples),
        trained_tokens=sum(int(sample.loss_mask.sum()) for sample in report.samples),
        mean_score=float(report.scores.mean()) if report.scores.size else None,
        refused=sum(refusal is not None for refusal in refusals),
        dropped_overlong=report.dropped_overlong,
    )


def _refusal(group: ScoredGroup, settings: SampleSettings) -> tuple[str, bool] | None:
    """(reason, whether it stops the run), or None."""
    try:
        report = build_samples([group], settings)
    except UnsupportedFieldError as error:
        return str(error), True
    return (report.quarantined[0].reason, False) if report.quarantined else None


def _is_overlong(group: ScoredGroup, i: int, settings: SampleSettings) -> bool:
    limit = settings.max_token_len
    return settings.overlong == "drop" and limit is not None and group.token_ids[i].shape[0] > limit


@dataclass(frozen=True, slots=True)
class _Describer:
    settings: SampleSettings
    decoder: Decoder | None
    policy_version: int | None
    with_tokens: bool

    def group(
        self,
        item: FoundGroup,
        refusal: tuple[str, bool] | None,
        samples: dict[int, TrainingSample],
        *,
        with_sequences: bool,
    ) -> GroupView:
        sequences = []
        for i in range(len(item.group)) if with_sequences else ():
            excluded = None
            if refusal is None and i not in samples:
                length = item.group.token_ids[i].shape[0]
                excluded = f"{length} tokens, more than max_token_len = {self.settings.max_token_len}"
            sequences.append(self._sample(samples[i]) if i in samples else self._raw(item.group, i, excluded))
        return GroupView(
            origin=item.origin,
            group_id=item.group.group_id,
            env_id=item.group.env_id,
            refused=None if refusal is None else refusal[0],
            stops_run=refusal is not None and refusal[1],
            recorded_reason=item.recorded_reason,
            sequences=sequences if with_sequences else None,
        )

    def _sample(self, sample: TrainingSample) -> SequenceView:
        trained = sample.loss_mask
        logprobs = sample.rollout_logprobs
        known = None if logprobs is None else logprobs[trained & ~np.isnan(logprobs)]
        version = sample.policy_version
        ids = sample.token_ids.tolist()
        return SequenceView(
            index=sample.sequence_index,
            length=len(sample),
            trained_tokens=int(trained.sum()),
            score=sample.score,
            advantage=_spread(sample.advantages[trained]),
            logprob=None if known is None else _spread(known),
            temperature=sample.temperature,
            policy_version=version,
            staleness=None if version is None or self.policy_version is None else self.policy_version - version,
            truncated=sample.truncated,
            pieces=_pieces(ids, trained.tolist(), self.decoder),
            tokens=self._tokens(ids, trained.tolist(), sample.advantages, logprobs),
        )

    def _raw(self, group: ScoredGroup, i: int, excluded: str | None) -> SequenceView:
        """A sequence that is not trained, as far as it can be shown: its arrays need not fit each other."""
        ids = group.token_ids[i].tolist()
        masks = group.masks[i].tolist() if i < len(group.masks) else []
        marked = [position > 0 and position < len(masks) and masks[position] != -100 for position in range(len(ids))]
        score = float(group.scores[i]) if i < group.scores.shape[0] else math.nan
        return SequenceView(
            index=i,
            length=len(ids),
            trained_tokens=sum(marked),
            score=score if math.isfinite(score) else None,
            excluded=excluded,
            pieces=_pieces(ids, marked, self.decoder),
            tokens=self._tokens(ids, marked, None, None),
        )

    def _tokens(
        self, ids: list[int], trained: list[bool], advantages: FloatArray | None, logprobs: FloatArray | None
    ) -> list[TokenView] | None:
        if not self.with_tokens:
            return None
        views = []
        for position, (token, is_trained) in enumerate(zip(ids, trained, strict=True)):
            logprob = None if logprobs is None or np.isnan(logprobs[position]) else float(logprobs[position])
            advantage = float(advantages[position]) if advantages is not None and is_trained else None
            known = self.decoder is not None and 0 <= token < self.decoder.vocab_size
            text = self.decoder.decode([token]) if self.decoder is not None and known else ""
            views.append(TokenView(position, token, text, is_trained, advantage, logprob))
        return views


def _spread(values: FloatArray) -> Spread | None:
    if not values.size:
        return None
    return Spread(float(values.mean()), float(values.min()), float(values.max()), int(values.size))


def _pieces(ids: list[int], trained: list[bool], decoder: Decoder | None) -> list[Piece]:
    edges = [i for i in range(len(ids)) if i == 0 or trained[i] != trained[i - 1]] + [len(ids)]
    return [Piece(_text(ids, start, end, decoder), trained[start]) for start, end in itertools.pairwise(edges)]


def _text(ids: list[int], start: int, end: int, decoder: Decoder | None) -> str:
    """Text of ``ids[start:end]`` in its context, since many tokenizers decode a leading space only after something."""
    if decoder is None or not all(0 <= token < decoder.vocab_size for token in ids[:end]):
        return " ".join(str(token) for token in ids[start:end])
    before = decoder.decode(ids[:start]) if start else ""
    text = decoder.decode(ids[:end])
    return text[len(before) :] if text.startswith(before) else decoder.decode(ids[start:end])
