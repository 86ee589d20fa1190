"""Which rollouts a run with a bound on staleness never trains on: ``on_stale=drop`` against ``wait``, simulated.

    python benchmarks/bench_survivors.py [--rollouts 20000]

The environment has two speeds: half of its groups have short answers that are scored at once; the others have answers
five times as long, which take 5 s to be scored; a step of the trainer takes 24 s. It bounds staleness. Engine,
environment and trainer are those of ``tools/simulate``, on its virtual clock; the throttle of ``wait``, the choice of
batches, the rule of what is stale, the trace and its survivorship report are the code of a run. For both sides it
prints what ``atropos-verl report --survivors`` shows, and the throughput.
"""

import argparse
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from simulate.generation import Group  # noqa: E402
from simulate.outcome import Outcome  # noqa: E402
from simulate.run import Run  # noqa: E402
from simulate.trainer import Trainer  # noqa: E402
from simulate.workload import Layout, Workload  # noqa: E402

from atropos_verl.provenance.ledger import Ledger  # noqa: E402
from atropos_verl.provenance.throttle import StalenessThrottle  # noqa: E402
from atropos_verl.report.run_report import show_survivors  # noqa: E402
from atropos_verl.report.trace_reader import TraceReader  # noqa: E402
from atropos_verl.training.samples import build_samples  # noqa: E402
from atropos_verl.training.staleness import Applied, is_stale  # noqa: E402
from atropos_verl.training.trace import TraceWriter  # noqa: E402
from atropos_verl.types import NOT_TRAINED, UNKNOWN_VERSION, ScoredGroup, SequenceMatch  # noqa: E402

SIZE, BATCH, BOUND, PROMPT = 8, 64, 2, 4
FAST, SLOW = (20.0, 0.0), (100.0, 5.0)
"""Mean tokens of an answer, and seconds of scoring a group."""
LAYOUT = Layout(
    overlap=True, gen_capacity=1e5, sequence_rate=20, slots=4096, train_rate=160, max_staleness=BOUND,
    max_batches_offpolicy=4,
)  # fmt: skip


class TwoSpeeds(Run):
    """A run that is noted in a trace. With ``throttle``, new groups wait as its gateway would let them."""

    def __init__(self, workload: Workload, run_dir: Path, *, waits: bool) -> None:
        super().__init__(workload, LAYOUT, seed=0, times=None)
        self.trainer = NotedTrainer(self, None)
        self.trace = TraceWriter(run_dir, 1 << 40)
        self.trace.begin(None)
        self.throttle = StalenessThrottle(Ledger(), BATCH, BOUND, clock=lambda: self.now) if waits else None
        if self.throttle is not None:
            self.throttle.active = True
        self.held: deque[Group] = deque()
        self.begun: dict[Group, tuple[int, float]] = {}
        """Group → number of its first record, when it began; of those that were not given up."""
        self.records = 0
        self.batches = 0
        finish, cancel = self.engine.finish_next, self.engine.cancel

        def finish_next() -> Group | None:
            if (group := finish()) is not None:
                first, version = self.begun[group][0], group.version
                self.generated(group, [(first + i, int(size), version) for i, size in enumerate(group.lengths)])
            return group

        self.engine.finish_next = finish_next  # type: ignore[method-assign]
        self.engine.cancel = lambda group: (cancel(group), self.left(group))[0]  # type: ignore[method-assign, func-returns-value]

    def begin(self, environment: int) -> Group:
        tokens, latency = SLOW if self._rng.random() < 0.5 else FAST
        lengths = [float(max(1, round(self._draw(tokens, 0.3)))) for _ in range(SIZE)]
        group = Group(environment, lengths, self._draw(latency, 0.2))
        self.held.append(group)
        self.admit()
        return group

    def admit(self) -> None:
        """Lets those begin that may, in the order they came."""
        while self.held and (self.held[0].cancelled or self.throttle is None or self.throttle._begin(SIZE)):
            group = self.held.popleft()
            if not group.cancelled:
                self.begun[group] = self.records, self.now
                self.records += SIZE
                self.engine.add(group)
        if self.held and not self.is_looking:
            self.is_looking = True
            self.at(0.1, self.look)

    is_looking = False

    def look(self) -> None:
        self.is_looking = False
        self.admit()

    def generated(self, group: Group, records: list[tuple[int, int, int]], reason: str | None = None) -> None:
        """Its requests ended."""
        began = self.begun[group][1]
        self.trace.request(records, group.environment, PROMPT, began, self.now - began, None, reason)
        if self.throttle is not None:
            self.throttle._generating -= SIZE
            self.throttle._finished.append((self.now, SIZE))

    def left(self, group: Group) -> None:
        if group in self.begun and group.unfinished:
            self.generated(group, [], "the client went away")

    def accept(self, group: Group) -> None:
        super().accept(group)
        if self.throttle is not None:
            self.throttle.queue_is(self.queue.sequences)

    def next_batch(self) -> list[Group] | None:
        batch = super().next_batch()
        if batch is not None and self.throttle is not None:
            self.throttle.batch_fetched()
            self.throttle.queue_is(self.queue.sequences)
        return batch

    def note(self, batch: list[Group], version: int) -> int:
        """What became of a batch. Returns how many of its groups are stale."""
        self.batches += 1
        kept = [i for i, group in enumerate(batch) if not is_stale(group.version, version, BOUND)]
        groups = [scored(group, self.begun[group][0]) for group in batch]
        matches = [
            [match(ids, self.begun[group][0] + i) for i, ids in enumerate(one.token_ids)]
            for group, one in zip(batch, groups, strict=True)
        ]
        places = [(self.batches, i) for i in range(len(batch))]
        report = build_samples([groups[i] for i in kept])
        self.trace.arrived(self.batches, groups)
        self.trace.collected(places, groups, matches, Applied([groups[i] for i in kept], kept, {}), report)
        self.trace.ended(places, self.batches)
        while self.trace._waiting > 4000:  # the virtual clock is faster than the disk
            time.sleep(0.01)
        return len(batch) - len(kept)


class NotedTrainer(Trainer):
    stale = 0

    def _take(self) -> None:
        run: Any = self.world
        if self._waiting_since is not None and self._ready:
            batch = self._ready[-1]
            self.stale = run.note(batch, self.version)
            if self.stale == len(batch):
                self._done()
        super()._take()

    def _synced(self, other: float) -> None:
        super()._synced(other)
        self._done()

    def _done(self) -> None:
        run: Any = self.world
        if run.throttle is not None:
            run.throttle.batch_done(self.stale)


def scored(group: Group, name: int) -> ScoredGroup:
    ids = tuple(np.full(PROMPT + int(length), 5) for length in group.lengths)
    masks = tuple(np.where(np.arange(len(row)) < PROMPT, NOT_TRAINED, row) for row in ids)
    scores = np.arange(SIZE, dtype=float)
    versions = tuple(np.where(mask == NOT_TRAINED, UNKNOWN_VERSION, group.version) for mask in masks)
    about: dict[str, Any] = {"env_id": group.environment, "group_id": str(name), "token_versions": versions}
    return ScoredGroup(token_ids=ids, masks=masks, scores=scores, **about)


def match(ids: np.ndarray[Any, Any], record: int) -> SequenceMatch:
    size, found = len(ids), np.arange(len(ids)) >= PROMPT
    return SequenceMatch(found=found, versions=np.zeros(size, int), logprobs=np.zeros(size), records=(record,))


def simulated(run_dir: Path, rollouts: int, *, waits: bool) -> tuple[Outcome, dict[str, Any]]:
    workload = Workload(
        environments=1, workers=64, group_size=SIZE, batch_size=BATCH, steps=rollouts // BATCH + 1, sync_seconds=0.1,
        poll_delay=0.02,
    )  # fmt: skip
    run = TwoSpeeds(workload, run_dir, waits=waits)
    run.run()
    run.trace.close()
    reader = TraceReader(run_dir)
    show_survivors(reader, Console(width=120))
    return run.trainer.outcome(3), reader.survivors()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=20_000)
    options = parser.parse_args()
    speeds = {}
    with tempfile.TemporaryDirectory() as name:
        for side in ("drop", "wait"):
            (run_dir := Path(name) / side).mkdir()
            outcome, found = simulated(run_dir, options.rollouts, waits=side == "wait")
            speeds[side] = outcome.trained_tokens_per_second
            print(
                f"on_stale={side}: {found['begun']:,} rollouts begun, {found['trained']:,} trained; distance of "
                f"lengths {found['by']['length']['distance']:.3f}; {outcome.trained_tokens_per_second:.0f} tokens and "
                f"{outcome.groups_per_second:.2f} groups trained per second; trainer idle "
                f"{outcome.trainer_idle_share:.1%}\n",
                flush=True,
            )
    print(f"throughput of wait over drop, in trained tokens: {speeds['wait'] / speeds['drop']:.3f}")


if __name__ == "__main__":
    main()
