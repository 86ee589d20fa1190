"""Which sequences run together: the next prefill from the queue, and the batch that is decoded. Used by one thread."""

import heapq
from collections.abc import Callable, Sequence

import numpy as np
import torch

from atropos_verl.engine.kv_cache import BLOCK, WORTH_STORING
from atropos_verl.engine.requests import EngineStats, RunningSequence
from atropos_verl.engine.runner import ModelRunner
from atropos_verl.engine.sampling import SamplingRows, effective_temperature, masked, sample
from atropos_verl.errors import EngineError


def take_prefill(
    waiting: list[RunningSequence],
    slots: int,
    max_tokens: int,
    max_logits: int,
    find: Callable[[tuple[int, ...]], Sequence[int]],
) -> list[RunningSequence]:
    """Take the sequences of one prefill, ``slots`` at most, from the queue, a heap. A context that is in it already
    costs nothing. One that has a prefix in common with another, and it is not stored yet, waits for that: one step.

    Bounds of what a padded prefill computes: ``max_tokens`` of distinct contexts times the longest (a longer one goes
    alone), ``max_logits`` of contexts times distinct lengths. ``find``: the blocks that hold a context's beginning."""
    taken, later = list[RunningSequence](), list[RunningSequence]()
    contexts, beginnings, lengths = set[tuple[int, ...]](), set[tuple[int, ...]](), set[int]()
    while waiting and len(taken) + len(later) < slots:
        if (context := waiting[0].context()) not in contexts:
            known = len(find(context)) * BLOCK
            # Up to where a common prefix is worth it: two that agree there are stored up to the same token.
            if (beginning := context[: known + WORTH_STORING]) in beginnings:
                later.append(heapq.heappop(waiting))
                continue
            rows, grown = len(contexts) + 1, lengths | {len(context) - known}
            if rows > 1 and (rows * max(grown) > max_tokens or rows * len(grown) > max_logits):
                break
            contexts.add(context)
            beginnings.add(beginning)
            lengths = grown
        taken.append(heapq.heappop(waiting))
    for sequence in later:
        heapq.heappush(waiting, sequence)
    return taken


class ContinuousBatch:
    """The sequences that hold a KV slot, decoded together. It counts its tokens in ``counts``. Between steps slot ``r``
    holds all tokens of ``running[r]`` but the last one, which the next decode step feeds in."""

    def __init__(self, runner: ModelRunner, max_running: int, counts: EngineStats) -> None:
        self._runner, self._counts = runner, counts
        self.room = max_running  # sequences that may run together now
        self._rows: SamplingRows | None = None  # of `running`; None after rows joined or left
        self.running: list[RunningSequence] = []
        self.participants: list[RunningSequence] = []
        """Sequences of the forward pass under way: those that a failure is to be blamed on."""

    @property
    def free_slots(self) -> int:
        return max(0, self.room - len(self.running))

    def prefill(self, newcomers: Sequence[RunningSequence], policy_version: int) -> list[RunningSequence]:
        """Compute the contexts of ``newcomers`` into free slots and sample one token each; returns those that ended. Of
        the same contexts one is computed, and of a context whose beginning is stored only the rest."""
        self.participants = list(newcomers)
        for ticket in {sequence.ticket for sequence in newcomers}:
            if (best := ticket.request.prompt_logprobs) is not None and ticket.prompt_logprobs is None:
                temperature = effective_temperature(ticket.request.temperature)
                prompt = ticket.request.prompt_token_ids
                ticket.prompt_logprobs = self._runner.prompt_logprobs(prompt, best, temperature)
        prompts: dict[tuple[int, ...], int] = {}
        picks = [prompts.setdefault(sequence.context(), len(prompts)) for sequence in newcomers]
        # The first sequence of each distinct context takes the slot it is computed in; the others get copies behind.
        firsts = [picks.index(number) for number in range(len(prompts))]
        order = firsts + sorted(set(range(len(newcomers))) - set(firsts))
        base, cache = len(self.running), self._runner.cache
        found = [cache.prefixes.find(prompt) for prompt in prompts]
        logits = self._runner.prefill(list(prompts), base, len(newcomers), found)
        cache.store([(base + row, prompt) for row, prompt in enumerate(prompts)])
        if len(newcomers) > len(prompts):
            sources = [base + picks[row] for row in order[len(prompts) :]]
            cache.copy_rows(sources, range(base + len(prompts), base + len(newcomers)), max(map(len, prompts)))
            logits = logits[torch.tensor([picks[row] for row in order], device=logits.device)]
        reused = sum(map(len, found)) * BLOCK
        self._counts.prompt_tokens += sum(map(len, prompts)) - reused
        self._counts.reused_tokens += reused
        fresh = [newcomers[row] for row in order]
        self.running, self._rows = self.running + fresh, None
        return self._sample_and_push(fresh, logits, self._build_rows(fresh), policy_version)

    def decode(self, policy_version: int) -> list[RunningSequence]:
        """One more token for every running sequence; returns those that ended."""
        running = self.participants = self.running
        logits = self._runner.decode([one.tokens[-1] for one in running], [one.context_len - 1 for one in running])
        if self._rows is None:
            self._rows = self._build_rows(running)
        return self._sample_and_push(running, logits, self._rows, policy_version)

    def evict(self) -> list[RunningSequence]:
        """Empty every slot; the sequences keep their tokens. Returns them."""
        evicted, self.running, self._rows = self.running, [], None
        return evicted

    def remove(self, gone: Sequence[RunningSequence]) -> None:
        """Take these out, and close the gaps: the last sequences move into their slots. What they hold is stored."""
        if not gone:  # before the first forward there is nothing to store from
            return
        cache, running, self._rows = self._runner.cache, self.running, None
        if not cache.skips_ended():
            cache.store([(slot, one.context()[:-1]) for slot, one in enumerate(running) if one in gone])
        alive = [slot for slot, sequence in enumerate(running) if sequence not in gone]
        kept = running[: len(alive)]
        holes = sorted(set(range(len(kept))) - set(alive))
        if movers := alive[len(alive) - len(holes) :]:
            cache.copy_rows(movers, holes, max(running[slot].context_len for slot in movers) - 1)
        for hole, mover in zip(holes, movers, strict=True):
            kept[hole] = running[mover]
        self.running = kept

    def _build_rows(self, sequences: Sequence[RunningSequence]) -> SamplingRows:
        requests, keys = [one.ticket.request for one in sequences], [one.key for one in sequences]
        return SamplingRows.build(requests, keys, self._runner.vocab_size, self._runner.device)

    def _sample_and_push(
        self, sequences: Sequence[RunningSequence], logits: torch.Tensor, rows: SamplingRows, policy_version: int
    ) -> list[RunningSequence]:
        positions = np.array([len(sequence.tokens) for sequence in sequences], dtype=np.uint64)
        with torch.inference_mode():
            logits = masked(logits, [sequence.matcher for sequence in sequences])
            tokens, logprobs, best = sample(logits, rows, positions)
            # One transfer per step; float64 holds every token id and every float32 logprob exactly.
            token_list, logprob_list = torch.stack((tokens.double(), logprobs.double())).tolist()
            pairs = zip(*(part.tolist() for part in best), strict=True)
            alternatives = [dict(zip(ids, values, strict=True)) for values, ids in pairs]
        done: list[RunningSequence] = []
        for sequence, token, logprob, others in zip(sequences, token_list, logprob_list, alternatives, strict=True):
            if logprob != logprob:
                raise EngineError(f"the weights of policy version {policy_version} hold NaN or infinity")
            if sequence.push(int(token), logprob, policy_version, others):
                done.append(sequence)
        self._counts.generated_tokens += len(sequences)
        self.remove(done)
        self.participants = []
        return done
