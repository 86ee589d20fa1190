"""Which sequences run together: the next prefill from the queue, and the batch that is decoded. Used by one thread."""

import heapq
from collections.abc import Container, Sequence

import numpy as np
import torch

from atropos_verl.engine.requests import EngineStats, RunningSequence
from atropos_verl.engine.runner import ModelRunner
from atropos_verl.engine.sampling import SamplingRows, effective_temperature, sample
from atropos_verl.errors import EngineError


def take_prefill(waiting: list[RunningSequence], slots: int, max_tokens: int, max_logits: int) -> list[RunningSequence]:
    """Take the sequences of one prefill from the queue, a heap. A context that is in it already costs nothing.

    Args:
        slots: sequences at most.
        max_tokens: distinct contexts times the longest of them, at most; a longer context goes alone.
        max_logits: distinct contexts times distinct lengths (the positions for which a padded prefill computes
            logits), at most.
    """
    taken: list[RunningSequence] = []
    contexts: set[tuple[int, ...]] = set()
    lengths: set[int] = set()
    while waiting and len(taken) < slots:
        if (context := waiting[0].context()) not in contexts:
            rows, grown = len(contexts) + 1, lengths | {len(context)}
            if rows > 1 and (rows * max(grown) > max_tokens or rows * len(grown) > max_logits):
                break
            contexts.add(context)
            lengths = grown
        taken.append(heapq.heappop(waiting))
    return taken


class ContinuousBatch:
    """The sequences that hold a KV slot, decoded together. It counts its tokens in ``counts``.

    Invariant between steps: slot ``r`` belongs to ``running[r]`` and its cache holds all tokens of that sequence but
    the last one, which the next decode step feeds in.
    """

    def __init__(self, runner: ModelRunner, max_running: int, counts: EngineStats) -> None:
        self._runner = runner
        self.room = max_running
        """Sequences that may run together now."""
        self._counts = counts
        self._rows: SamplingRows | None = None  # of `running`; None after rows joined or left
        self.running: list[RunningSequence] = []
        self.participants: list[RunningSequence] = []
        """Sequences of the forward pass under way: those that a failure is to be blamed on."""

    @property
    def free_slots(self) -> int:
        return max(0, self.room - len(self.running))

    def prefill(self, newcomers: Sequence[RunningSequence], policy_version: int) -> list[RunningSequence]:
        """Compute the contexts of ``newcomers`` into free slots and sample one token each; returns those that ended.

        Sequences with the same context (the n completions of a prompt, in one request or several) are computed once.
        """
        self.participants = list(newcomers)
        for ticket in {sequence.ticket for sequence in newcomers}:
            if (best := ticket.request.prompt_logprobs) is not None and ticket.prompt_logprobs is None:
                temperature = effective_temperature(ticket.request.temperature)
                ticket.prompt_logprobs = self._runner.prompt_logprobs(
                    ticket.request.prompt_token_ids, best, temperature
                )
        prompts: dict[tuple[int, ...], int] = {}
        picks = [prompts.setdefault(sequence.context(), len(prompts)) for sequence in newcomers]
        # The first sequence of each distinct context takes the slot it is computed in; the others get copies behind.
        # (Contexts are numbered as they appear, so a row is the first of its own when its number is new.)
        firsts = [picks.index(number) for number in range(len(prompts))]
        order = firsts + sorted(set(range(len(newcomers))) - set(firsts))
        base = len(self.running)
        logits = self._runner.prefill(list(prompts), base, len(newcomers))
        if len(newcomers) > len(prompts):
            self._runner.cache.copy_rows(
                [base + picks[row] for row in order[len(prompts) :]],
                list(range(base + len(prompts), base + len(newcomers))),
                max(map(len, prompts)),
            )
            logits = logits[torch.tensor([picks[row] for row in order], device=logits.device)]
        self._counts.prompt_tokens += sum(map(len, prompts))
        fresh = [newcomers[row] for row in order]
        self.running = self.running + fresh
        self._rows = None
        return self._sample_and_push(fresh, logits, self._build_rows(fresh), policy_version)

    def decode(self, policy_version: int) -> list[RunningSequence]:
        """One more token for every running sequence; returns those that ended."""
        running = self.participants = self.running
        logits = self._runner.decode(
            [sequence.tokens[-1] for sequence in running], [sequence.context_len - 1 for sequence in running]
        )
        if self._rows is None:
            self._rows = self._build_rows(running)
        return self._sample_and_push(running, logits, self._rows, policy_version)

    def evict(self) -> list[RunningSequence]:
        """Empty every slot; the sequences keep their tokens. Returns them."""
        evicted, self.running, self._rows = self.running, [], None
        return evicted

    def remove(self, gone: Container[RunningSequence]) -> None:
        """Take these out, and close the gaps: the last sequences move into their slots."""
        self._rows = None
        alive = [slot for slot, sequence in enumerate(self.running) if sequence not in gone]
        keep = len(alive)
        holes = sorted(set(range(keep)) - set(alive))
        movers = [slot for slot in alive if slot >= keep]
        if movers:
            longest = max(self.running[slot].context_len for slot in movers)
            self._runner.cache.copy_rows(movers, holes, longest - 1)
        kept = self.running[:keep]
        for hole, mover in zip(holes, movers, strict=True):
            kept[hole] = self.running[mover]
        self.running = kept

    def _build_rows(self, sequences: Sequence[RunningSequence]) -> SamplingRows:
        return SamplingRows.build(
            [sequence.ticket.request for sequence in sequences],
            [sequence.key for sequence in sequences],
            self._runner.vocab_size,
            self._runner.device,
        )

    def _sample_and_push(
        self, sequences: Sequence[RunningSequence], logits: torch.Tensor, rows: SamplingRows, policy_version: int
    ) -> list[RunningSequence]:
        positions = np.array([len(sequence.tokens) for sequence in sequences], dtype=np.uint64)
        with torch.inference_mode():
            tokens, logprobs = sample(logits, rows, positions)
            # One transfer per step; float64 holds every token id and every float32 logprob exactly.
            token_list, logprob_list = torch.stack((tokens.double(), logprobs.double())).tolist()
        done: list[RunningSequence] = []
        for sequence, token, logprob in zip(sequences, token_list, logprob_list, strict=True):
            if logprob != logprob:
                raise EngineError(
                    f"logits are not finite: the weights of policy version {policy_version} hold NaN or infinity"
                )
            if sequence.push(int(token), logprob, policy_version):
                done.append(sequence)
        self._counts.generated_tokens += len(sequences)
        if done:
            self.remove(done)
        self.participants = []
        return done
