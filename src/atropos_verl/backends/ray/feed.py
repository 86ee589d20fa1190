"""``TrajectoryFeed``: batches of the batch source → TransferQueue, slot by slot, with verl's keys, fields and tags.

A slot is one batch of the API; where a batch holds nothing to train on, the next one as well. It is acked when a step
consumed it. Later the advantages of a step replace verl's. docs/internals.md ("Rows of TransferQueue") has the rest."""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import transfer_queue as tq
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from atropos_verl.errors import DataError
from atropos_verl.training.advantages import RunningMoments, SequenceAdvantage, finish_advantages
from atropos_verl.training.batch_source import BatchSource, RolloutData
from atropos_verl.training.samples import collect_samples, posted_columns
from atropos_verl.training.staleness import look_up_counts
from atropos_verl.types import (
    UNKNOWN_VERSION,
    FloatArray,
    QuarantinedGroup,
    SampleReport,
    SampleSettings,
    ScoredGroup,
    TrainingSample,
)

logger = logging.getLogger(__name__)

ADVANTAGES = "atropos_advantages"  # field: float64 [R], the advantages before normalising, from ``training.advantages``
PARTITION = "train"  # TransferQueue's, for training


@dataclass
class Slot:
    """One batch on its way through a step."""

    uid: str
    global_steps: int
    batches: list[RolloutData] = field(default_factory=list)
    """The last one is trained on; those before it held nothing to train on."""
    scores: list[tuple[int | None, float]] = field(default_factory=list)  # environment and score of every rollout
    counts: Counter[str] = field(default_factory=Counter)
    rows: dict[str, tuple[TrainingSample, tuple[int, int, int]]] = field(default_factory=dict)
    """Key of a row → its sample, and where it came from: batch, index of the group in it, position."""
    figures: dict[str, dict[tuple[int, int, int], FloatArray]] = field(default_factory=dict)
    """``advantages`` and ``trainer_logprobs`` (before the update) [T] of its rows, once its step has them."""
    off_policy: dict[str, float | int | None] = field(default_factory=dict)
    """Figures of the ledger's look-up."""
    wait_seconds: float = 0.0


class Row(NamedTuple):
    """One sequence as verl stores it."""

    key: str
    fields: dict[str, Any]
    tag: dict[str, Any]


class TransferQueueStore:
    """Writes slots to TransferQueue. ``tq.init`` must have been called in this process."""

    def running(self, uid: str) -> None:
        tq.kv_put(key=uid, partition_id=PARTITION, tag={"status": "running"})

    def put(self, uid: str, rows: Sequence[Row]) -> None:
        fields = list_of_dict_to_tensordict([row.fields for row in rows])
        tags = [row.tag for row in rows]
        tq.kv_batch_put(keys=[row.key for row in rows], fields=fields, tags=tags, partition_id=PARTITION)
        tq.kv_put(key=uid, partition_id=PARTITION, tag={"status": "finished"})


class TrajectoryFeed:
    """Fills slots in the order in which they were asked for. ``needs_logprobs``: rollout correction is on, so a group
    without ``inference_logprobs`` cannot be trained on."""

    def __init__(
        self,
        source: BatchSource,
        store: TransferQueueStore,
        settings: SampleSettings,
        *,
        served_version: Callable[[], int],
        needs_logprobs: bool = False,
    ) -> None:
        self.source, self.store, self.settings = source, store, settings
        self.served_version, self.needs_logprobs = served_version, needs_logprobs
        self.temperature = source.config.temperature
        """verl computes logprobs of a step at one temperature: ``rollout.temperature``."""
        self.failure: BaseException | None = None
        self.slots: dict[str, Slot] = {}
        self._lock = threading.Lock()  # of ``slots``
        self._wanted: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trajectory-feed", daemon=True)
        self.start = self._thread.start

    def request(self, uid: str, global_steps: int) -> None:
        """Asks for a slot to be filled; returns at once."""
        self._wanted.put(Slot(uid, global_steps))

    def check(self) -> None:
        """Raises what ended the feed."""
        if self.failure is not None:
            raise self.failure

    def trained(self, uids: Sequence[str], step: int) -> list[Slot]:
        """Durably notes that ``step`` consumed these slots. Returns them; ``acknowledge`` follows the weight sync."""
        # No longer among those that go back to the API when this ends, whether or not their ack gets through.
        with self._lock:
            done = [self.slots.pop(uid) for uid in uids]
        for slot in done:
            for data in slot.batches:
                self.source.trained(data, step, **slot.figures)
        return done

    def acknowledge(self, slots: Sequence[Slot], covered_step: int = 0) -> None:
        """Lets the API forget these batches, and the journal those of steps up to ``covered_step``, a checkpoint's."""
        for slot in slots:
            self.source.done(slot.counts["stale"])
            for data in slot.batches:
                self.source.ack(data)
        self.source.journal.discard_through(covered_step)

    def figures_of(self, keys: Sequence[str], figures: Mapping[str, Sequence[FloatArray]]) -> None:
        """What a step computed for rows, from the first trained token on: ``advantages``, ``trainer_logprobs``."""
        with self._lock:
            for name, values in figures.items():
                for key, row in zip(keys, values, strict=True):
                    slot = self.slots.get(key.split("_")[0])
                    if slot is not None and key in slot.rows:
                        sample, place = slot.rows[key]
                        whole = np.zeros(len(sample))
                        whole[len(sample) - len(row) :] = row
                        slot.figures.setdefault(name, {})[place] = whole

    def evicted(self, uids: set[str]) -> None:
        """Settles slots that verl dropped as too stale: nobody will train on them, and the API need not keep them."""
        reason = "trainer.v1.sampler.max_off_policy_threshold"
        with self._lock:
            slots = [self.slots.pop(uid) for uid in uids if uid in self.slots]
        for slot in slots:
            logger.warning("%d sequences are left out: too stale (%s)", slot.counts["sequences"], reason)
            for data in slot.batches:
                self.source.trained(data, slot.global_steps, state="stale", reason=reason)
        self.acknowledge(slots)

    def stop(self, timeout: float = 30.0) -> None:
        """Ends the thread; untrained batches go back to an API that can take them. Idempotent."""
        self._stopping.set()
        self._wanted.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                slot = self._wanted.get()
                if slot is not None and not self._stopping.is_set():
                    self._fill(slot)
        except CancelledError:  # stopped while it waited
            pass
        except BaseException as error:
            self.failure = error
            logger.exception("the trajectory feed has ended")
            return
        with self._lock:
            back = [data.entry for slot in self.slots.values() for data in slot.batches]
            self.slots.clear()
        for entry in back:
            if entry is not None and entry.step is None:
                self.source.batches.release(entry)
        self.source.give_back()

    def _while_waiting(self) -> None:
        if self._stopping.is_set():
            raise CancelledError  # which no retry catches

    def _fill(self, slot: Slot) -> None:
        self.store.running(slot.uid)
        started = time.monotonic()
        with self._lock:
            self.slots[slot.uid] = slot
        rows: list[Row] = []
        while not rows:  # verl has no step without rows
            if slot.batches:
                self.source.done()  # several batches make one slot, which the throttle counts as one
            data = self.source.next(self._while_waiting)
            with self._lock:
                slot.batches.append(data)
            rows = self._collect(data, slot)
        slot.wait_seconds = time.monotonic() - started
        self.store.put(slot.uid, rows)

    def _collect(self, data: RolloutData, slot: Slot) -> list[Row]:
        """Makes rows of a batch's groups; what cannot be trained on is counted, and named where it is bad."""
        served, advantages = self.served_version(), list[SequenceAdvantage]()
        report = self.source.collect(data, served, partial(self._samples, advantages))
        slot.scores += report.scores
        slot.off_policy |= data.off_policy
        sizes = {group.group_id: len(group.rollout_scores) for group in report.used}
        known: dict[str, Any] = {"served": served, "global_steps": slot.global_steps, "group_sizes": sizes}
        rows = make_rows(slot.uid, report.samples, advantages, **known)
        index = {group.group_id: place for place, group in zip(data.places, data.groups, strict=True)}
        placed = [(s, (*index[s.group_id], s.sequence_index)) for s in report.samples if s.loss_mask.any()]
        slot.rows |= {row.key: of_row for row, of_row in zip(rows, placed, strict=True)}
        if not rows:
            logger.warning("a batch has no token to train on; the next one takes its place")
        slot.counts.update(look_up_counts(data.off_policy) | report.counts | {"sequences": len(rows)})
        slot.counts["untrained"] += len(report.samples) - len(rows)
        return rows

    def _samples(self, advantages: list[SequenceAdvantage], groups: Sequence[ScoredGroup]) -> SampleReport:
        """Adds to ``advantages``, sample by sample. Groups that verl cannot compute are quarantined as well."""
        report, found = collect_samples(groups, self.settings)
        reasons = {s.group_id: reason for s in report.samples if (reason := self._refuses(s)) is not None}
        if reasons and self.settings.on_bad_group == "error":
            raise DataError(next(iter(reasons.values())))
        advantages += [a for s, a in zip(report.samples, found, strict=True) if s.group_id not in reasons]
        refused = [group for group in report.used if group.group_id in reasons]
        return replace(
            report,
            samples=[sample for sample in report.samples if sample.group_id not in reasons],
            quarantined=report.quarantined + [QuarantinedGroup(group=g, reason=reasons[g.group_id]) for g in refused],
            used=[group for group in report.used if group.group_id not in reasons],
        )

    def _refuses(self, sample: TrainingSample) -> str | None:
        if sample.temperature != self.temperature:
            return (
                f"group {sample.group_id} was sampled at temperature {sample.temperature:g}, but verl computes "
                f"logprobs at actor_rollout_ref.rollout.temperature={self.temperature:g}; make them equal"
            )
        if self.needs_logprobs and not has_rollout_logprobs(sample):
            return (
                f"group {sample.group_id} has no inference_logprobs for every trained token, which "
                "algorithm.rollout_correction needs; switch it off, or have the environment send them"
            )
        return None


def make_rows(
    slot: str,
    samples: Sequence[TrainingSample],
    advantages: Sequence[SequenceAdvantage],
    *,
    served: int,
    global_steps: int,
    group_sizes: dict[str, int],
) -> list[Row]:
    """The rows of a batch, for the slot of this uid (without an underscore). Sequences without a trained token are left
    out. ``served``: the policy version that is served now, for sequences of unknown version, as verl needs a number.
    ``group_sizes``: rollouts that each group was scored with, overlong ones included, by group id."""
    rows: list[Row] = []
    numbers: dict[tuple[str, int], int] = {}
    seen: Counter[int] = Counter()
    for sample, advantage in zip(samples, advantages, strict=True):
        number = numbers.setdefault((sample.group_id, sample.rollout_id), len(numbers))
        if sample.loss_mask.any():
            # verl's name for it: the rows of a session, of which its GRPO counts the last.
            fields, tag = _row(sample, advantage, served)
            tag |= {"global_steps": global_steps, "group_size": group_sizes[sample.group_id]}
            rows.append(Row(f"{slot}_{number}_{seen[number]}", fields, tag))
            seen[number] += 1
    return rows


def _row(sample: TrainingSample, advantage: SequenceAdvantage, served: int) -> tuple[dict[str, Any], dict[str, Any]]:
    # Oldest and newest version that wrote a trained token.
    versions = sample.token_versions
    known = np.zeros(0) if versions is None else versions[sample.loss_mask & (versions != UNKNOWN_VERSION)]
    stated = served if sample.policy_version is None else sample.policy_version
    oldest, newest = (int(known.min()), int(known.max())) if known.size else (stated, stated)
    start, length = int(np.argmax(sample.loss_mask)), len(sample)  # above 0: position 0 is never trained
    token_ids = torch.from_numpy(np.ascontiguousarray(sample.token_ids, dtype=np.int64))
    mask = torch.from_numpy(sample.loss_mask.astype(np.int64))
    # 0 where there is no value: such rows are tagged.
    sent = np.zeros(length) if sample.rollout_logprobs is None else np.nan_to_num(sample.rollout_logprobs, nan=0.0)
    rewards = torch.zeros(length - start, dtype=torch.float32)
    rewards[-1] = sample.score
    turns = int(np.count_nonzero(np.diff(sample.loss_mask.astype(np.int8)) == 1))
    fields = {
        "uid": sample.group_id,
        "prompts": token_ids[:start],
        "responses": token_ids[start:],
        "response_mask": mask[start:],
        # Over the whole sequence: only its sum is read by verl's engines, and ours looks up positions in it.
        "loss_mask": mask,
        "input_ids": token_ids,
        "position_ids": torch.arange(length),
        "rollout_log_probs": torch.from_numpy(sent[start:].astype(np.float32)),
        "rm_scores": rewards,
        ADVANTAGES: torch.from_numpy(np.array(advantage.values[start:length], dtype=np.float64)),
        **{name: torch.from_numpy(entries) for name, [entries] in posted_columns([sample], always=True).items()},
        "num_turns": 2 * turns,
        "extra_fields": {},
        "multi_modal_inputs": {},
    }
    tag = {
        "status": "success",
        "prompt_len": start,
        "response_len": length - start,
        "seq_len": length,
        "min_global_steps": oldest,
        "max_global_steps": newest,
        "versions_known": known.size == int(sample.loss_mask.sum()),
        "advantage_to_zero": advantage.zero,
        "advantage_replaced": advantage.replaced,
        "advantage_fixed": advantage.fixed,
        "weight": advantage.weight,
        "rollout_log_probs": has_rollout_logprobs(sample),
    }
    return fields, tag


def has_rollout_logprobs(sample: TrainingSample) -> bool:
    """True when every trained token carries the logprob it was sampled with."""
    return sample.rollout_logprobs is not None and not np.isnan(sample.rollout_logprobs[sample.loss_mask]).any()


def finish_batch(
    values: Any,
    keys: Sequence[str],
    tags: Sequence[dict[str, Any]],
    *,
    from_data: bool,
    normalization: str,
    clipping: tuple[float, float] | None,
    running: RunningMoments,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Final advantages of a step, nested [B, R_b] float32, 0 where the mask is and in rows of padding; and figures.

    ``values``: nested fields ``response_mask``, ``advantages`` (verl's), ``atropos_advantages``, of rows with these
    keys and tags. ``from_data``: the baseline is that of ``training.group_advantages``; otherwise verl's, unless the
    environment sent token-level advantages. (verl gives a group of one its raw score; here it gets 0.) ``running``:
    statistics of the run for ``global``; merged with this batch."""
    masks, verls, ours = (list(values[name].unbind()) for name in ("response_mask", "advantages", ADVANTAGES))

    def position(i: int) -> tuple[str, int, int]:
        slot, rollout, row = keys[i].rsplit("_", 2)
        return slot, int(rollout), int(row)

    # verl sorts rows by length; the order of the batch makes sums, and so advantages, those of the local backend.
    order = sorted((i for i, tag in enumerate(tags) if not tag.get("is_padding")), key=position)
    sequences = []
    for i in order:
        tag, mask = tags[i], masks[i].bool().numpy()
        base = (ours[i] if from_data or tag["advantage_replaced"] else verls[i]).numpy().astype(np.float64)
        if not from_data and not tag["advantage_replaced"] and tag["group_size"] < 2:
            base = np.zeros_like(base)
        zero, replaced, fixed = (bool(tag[f"advantage_{name}"]) for name in ("to_zero", "replaced", "fixed"))
        sequences.append(SequenceAdvantage(base, mask, zero, replaced, fixed, tag.get("weight", 1.0)))
    finished = finish_advantages(sequences, normalization, clipping, running)
    rows = [torch.zeros(mask.numel()) for mask in masks]
    for i, row in zip(order, finished, strict=True):
        rows[i] = torch.from_numpy(row.astype(np.float32))  # 0 already where the mask is
    trained = [np.abs(row[s.loss_mask]) for s, row in zip(sequences, finished, strict=True)]
    joined = np.concatenate([np.zeros(0), *trained])
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged), {
        "advantage/mean_abs": float(joined.mean()) if joined.size else 0.0,
        "advantage/replaced_sequences": float(sum(s.replaced for s in sequences)),
        "advantage/zeroed_sequences": float(sum(s.zero for s in sequences)),
    }
