"""``ScoredGroup`` → ``TrainingSample``: validated, masked, weighed.

Nothing is dropped silently: a group that cannot be trained on is quarantined with its reason, an overlong sequence is
counted, a field nobody uses is refused by name.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError, DataError
from atropos_verl.http_thread import printable
from atropos_verl.protocol.schema import check_supported, find_defect, overridden, sampling_temperature, without_fields
from atropos_verl.training.advantages import (
    ESTIMATORS,
    NORMALIZATIONS,
    RunningMoments,
    SequenceAdvantage,
    finish_advantages,
    group_advantages,
)
from atropos_verl.training.extensions import load_advantage, load_filter
from atropos_verl.training.staleness import stated_version
from atropos_verl.types import (
    NO_LOGPROB,
    UNKNOWN_VERSION,
    FloatArray,
    IntArray,
    QuarantinedGroup,
    SampleReport,
    SampleSettings,
    ScoredGroup,
    TrainingSample,
)

logger = logging.getLogger(__name__)

_SHOWN_KEYS = 20
_KNOWN_OVERRIDES = frozenset({"set_advantage_to_zero", "sft", "temperature", "distill_weight", "policy_version"})
_KNOWN_GROUP_OVERRIDES = (_KNOWN_OVERRIDES - {"policy_version"}) | {"group_size", "teacher_top_k", "skip_teacher_top_k"}
"""The last two are what upstream's environments with a teacher tell themselves."""
_DEFAULTS = SampleSettings()
_CHOICES = {
    "estimator": ESTIMATORS,
    "normalization": NORMALIZATIONS,
    "overlong": ("drop", "truncate", "error"),
    "on_bad_group": ("quarantine", "error"),
}


def build_samples(
    groups: Iterable[ScoredGroup], settings: SampleSettings = _DEFAULTS, *, running: RunningMoments | None = None
) -> SampleReport:
    """Turns the groups of one global batch into samples, in the order of groups and sequences.

    Masks: ``-100`` is not trained, wherever it stands; position 0 never is, since nothing predicts it. Rollout
    logprobs: 1.0 becomes NaN, and a sequence without any value has None. Temperature: ``overrides[i]`` >
    ``generation_params`` > ``group_overrides`` > ``settings.default_temperature``; 0 (greedy) becomes 1, whose
    logprobs engines report for greedy tokens. Advantages: one per rollout, which all its rows get; 1 with the override
    ``sft``; times ``ScoredGroup.weights``; then ``training.advantages``, with the statistics of the run so far in
    ``running``. An overlong sequence counts in its group's baseline, and not in the batch's statistics.

    Raises ``ConfigError`` (settings), ``UnsupportedFieldError`` (a field that is neither used nor in
    ``settings.ignore_fields``), and ``DataError`` (``on_bad_group="error"``, ``overlong="error"``).
    """
    report, sequences = collect_samples(groups, settings)
    advantages = finish_advantages(sequences, settings.normalization, settings.clipping, running)
    return replace(report, samples=[replace(s, advantages=a) for s, a in zip(report.samples, advantages, strict=True)])


def collect_samples(
    groups: Iterable[ScoredGroup], settings: SampleSettings = _DEFAULTS
) -> tuple[SampleReport, list[SequenceAdvantage]]:
    """``build_samples`` up to what needs the whole global batch: its samples hold the advantages so far; and what
    ``finish_advantages`` needs, sample by sample."""
    _check_settings(settings)
    samples: list[TrainingSample] = []
    sequences: list[SequenceAdvantage] = []
    examined = [(g, find_defect(g, settings.vocab_size)) for g in without_fields(groups, settings.ignore_fields)]
    sound = [group for group, reason in examined if reason is None]
    quarantined = [QuarantinedGroup(group=group, reason=reason) for group, reason in examined if reason is not None]
    if quarantined and settings.on_bad_group == "error":
        raise DataError(quarantined[0].reason)
    check_supported(sound, settings.ignore_fields)
    kept = settings.keeps(sound) if settings.keeps is not None and sound else [True] * len(sound)
    used = [group for group, keep in zip(sound, kept, strict=True) if keep]
    filtered = [group for group, keep in zip(sound, kept, strict=True) if not keep]
    if filtered:
        logger.info("%d of %d groups are left out by data.filter_path", len(filtered), len(sound))
    if settings.teach is not None:
        used = settings.teach(used)
    unknown: Counter[str] = Counter()
    for group in used:
        _collect(group, settings, samples, sequences)
        for entry in group.overrides or ():
            unknown.update(f"overrides[].{printable(key)}" for key in entry if key not in _KNOWN_OVERRIDES)
        keys = group.group_overrides or ()
        unknown.update(f"group_overrides.{printable(key)}" for key in keys if key not in _KNOWN_GROUP_OVERRIDES)
    for key, count in sorted(unknown.most_common(_SHOWN_KEYS)):
        logger.warning("%s is not known to this trainer and has no effect (%d times in this batch)", key, count)
    dropped = sum(len(group) for group in used) - len(samples)
    if dropped:
        message = "%d sequences longer than %s tokens are left out of training (data.overlong=drop)"
        logger.warning(message, dropped, settings.max_token_len)
    report = SampleReport(
        samples=samples,
        quarantined=quarantined,
        filtered=filtered,
        dropped_overlong=dropped,
        truncated=sum(sample.truncated for sample in samples),
        used=used,
    )
    return report, sequences


def _collect(
    group: ScoredGroup, settings: SampleSettings, samples: list[TrainingSample], sequences: list[SequenceAdvantage]
) -> None:
    rows: Sequence[FloatArray]
    if settings.advantage is not None:
        rows = settings.advantage(group)
    else:
        by_std = settings.norm_adv_by_std_in_grpo
        baseline = group_advantages(group.rollout_scores, settings.estimator, norm_by_std=by_std)[group.rollouts]
        rows = [np.full(len(tokens), value) for tokens, value in zip(group.token_ids, baseline, strict=True)]
    limit = settings.max_token_len
    for i, tokens in enumerate(group.token_ids):
        is_overlong = limit is not None and len(tokens) > limit
        if is_overlong and settings.overlong == "drop":
            continue
        if is_overlong and settings.overlong == "error":
            raise DataError(
                f"tokens[{i}] of group {group.group_id}: {len(tokens)} tokens, more than max_token_len = {limit}; "
                "raise data.max_token_len, lower the environment's limit, or set data.overlong to drop or truncate"
            )
        own = None if group.advantages is None else group.advantages[i]
        zero, sft = (overridden(group, i, name, False) for name in ("set_advantage_to_zero", "sft"))
        if own is None and sft:
            own = np.ones(len(tokens))
        values = (rows[i] if own is None else own)[:limit]
        weight = 1.0 if group.weights is None else float(group.weights[i])
        sample = replace(_sample(group, i, values, weight, settings), truncated=is_overlong)
        samples.append(sample)
        zero |= settings.distill_alone and sample.teacher is not None
        sequences.append(SequenceAdvantage(values, sample.loss_mask, zero, own is not None, sft, weight))


def _sample(
    group: ScoredGroup, i: int, advantages: FloatArray, weight: float, settings: SampleSettings
) -> TrainingSample:
    """Sequence ``i``, as long as its ``advantages``. ``weight``: factor of its loss."""
    end = len(advantages)
    loss_mask = group.trained(i)[:end]
    rollout_logprobs = None
    sent = None if group.inference_logprobs is None else group.inference_logprobs[i]
    if sent is not None and (sent[:end] != NO_LOGPROB).any():
        rollout_logprobs = np.where(sent[:end] != NO_LOGPROB, np.minimum(sent[:end], 0.0), np.nan)
    versions = None if group.token_versions is None else group.token_versions[i]
    versions = None if versions is None else versions[:end]
    trained = np.zeros(0) if versions is None else versions[loss_mask & (versions != UNKNOWN_VERSION)]
    return TrainingSample(
        token_ids=group.token_ids[i][:end],
        loss_mask=loss_mask,
        advantages=np.where(loss_mask, advantages, 0.0),
        rollout_logprobs=rollout_logprobs,
        reference=_reference(group, i, loss_mask, weight * settings.ref_weight),
        teacher=_teacher(group, i, loss_mask, weight * overridden(group, i, "distill_weight", settings.distill_weight)),
        temperature=sampling_temperature(group, i, settings.default_temperature),
        score=float(group.scores[i]),
        group_id=group.group_id,
        sequence_index=i,
        rollout_id=int(group.rollouts[i]),
        env_id=group.env_id,
        policy_version=int(trained.min()) if trained.size else stated_version(group, i),
        token_versions=versions,
    )


def posted_columns(samples: Sequence[TrainingSample], *, always: bool = False) -> dict[str, list[FloatArray]]:
    """The columns ``teacher`` and ``reference`` of a batch for verl's engine, where they hold something, or ``always``:
    [E_b, n] of each sample, at least one row (about token 0, which is never trained)."""
    found = {}
    for name, width in (("teacher", 4), ("reference", 3)):
        rows = [getattr(sample, name) for sample in samples]
        if always or any(row is not None for row in rows):
            found[name] = [np.zeros((1, width)) if row is None else row for row in rows]
    return found


def _reference(group: ScoredGroup, i: int, loss_mask: NDArray[np.bool_], weight: float) -> FloatArray | None:
    """``TrainingSample.reference``; None without an entry."""
    if group.ref_logprobs is None or (sent := group.ref_logprobs[i]) is None:
        return None
    at = np.flatnonzero(loss_mask & (sent[: len(loss_mask)] != NO_LOGPROB))
    return np.column_stack([at, np.minimum(sent[at], 0.0), np.full(len(at), weight)]) if at.size else None


def _teacher(group: ScoredGroup, i: int, loss_mask: NDArray[np.bool_], weight: float) -> FloatArray | None:
    """``TrainingSample.teacher``; None without an entry."""
    if group.distill_token_ids is None or (ids := group.distill_token_ids[i]) is None:
        return None
    assert group.distill_logprobs is not None
    logprobs = group.distill_logprobs[i]
    assert logprobs is not None
    at, k = np.nonzero((ids[: len(loss_mask)] >= 0) & loss_mask[:, None])
    return np.column_stack([at, ids[at, k], logprobs[at, k], np.full(len(at), weight)]) if at.size else None


def _check_settings(settings: SampleSettings) -> None:
    for key, allowed in _CHOICES.items():
        if getattr(settings, key) not in allowed:
            raise ConfigError(f"{getattr(settings, key)!r} is none of {', '.join(allowed)}", key)
    if settings.clipping is not None and not settings.clipping[0] <= settings.clipping[1]:  # False for NaN too
        raise ConfigError(f"{list(settings.clipping)} is not a range", "clipping")


def sample_settings(config: RunConfig, vocab_size: int | None) -> SampleSettings:
    """Takes from a run's configuration the settings by which groups become samples."""
    return SampleSettings(
        vocab_size=vocab_size,
        max_token_len=config.max_token_len,
        estimator=config.algorithm.adv_estimator,
        normalization=config.advantage_normalization,
        clipping=config.advantage_clipping,
        overlong=config.data.overlong,
        on_bad_group=config.data.on_bad_group,
        default_temperature=config.data.default_temperature,
        norm_adv_by_std_in_grpo=config.algorithm.norm_adv_by_std_in_grpo,
        ignore_fields=config.data.ignore_fields,
        ref_weight=config.loss.ref_weight,
        distill_weight=config.distill.weight,
        distill_alone=config.distill.alone,
        teach=None if config.distill.teacher is None else Teacher(config, vocab_size).complete,
        advantage=None if config.algorithm.advantage_path is None else load_advantage(config.algorithm.advantage_path),
        keeps=None if config.data.filter_path is None else load_filter(config.data.filter_path),
    )


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
            raise ConfigError(str(error).removeprefix("model.path: "), "distill.teacher") from None
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.model.compute_dtype]
        on_gpu = config.trainer.device != "cpu" and torch.cuda.is_available()
        trusted = config.model.trust_remote_code
        model = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, trust_remote_code=trusted)
        self._limit = config.max_token_len
        self._runner = ModelRunner(model.to("cuda" if on_gpu else "cpu"), max_context_len=self._limit)
        self._vocab_size = vocab_size or self._runner.vocab_size
        if self._runner.vocab_size < self._vocab_size:
            sizes = f"{self._runner.vocab_size} tokens, the policy's {self._vocab_size}"
            raise ConfigError(
                f"the vocabulary of {path} has {sizes}; a teacher needs the policy's tokenizer", "distill.teacher"
            )
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
