"""What the ledger holds: completions, the prompts they came after, and what a look-up finds."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["IDS", "OVERHEAD_BYTES", "Piece", "Prompt", "Resume", "Runs", "SpanRecord", "note_branches"]

IDS = np.dtype("<i4")
ID_BYTES = IDS.itemsize
OVERHEAD_BYTES = 700
"""Python objects of one record beside its arrays, measured with tracemalloc (about 650 bytes)."""
Runs: TypeAlias = tuple[tuple[int, int], ...]
"""(policy version, tokens it wrote), in order."""


@dataclass(slots=True, eq=False)
class Prompt:
    """The ids that completions came after; shared by all completions of the same prompt."""

    key: int
    ids: bytes
    spans: OrderedDict[int, SpanRecord]

    @property
    def length(self) -> int:
        return len(self.ids) // ID_BYTES


@dataclass(slots=True, eq=False)
class SpanRecord:
    """One completion: what the engine wrote after a prompt in one go."""

    order: int
    """Counts the records of this ledger, in the order in which they ended."""
    request: int
    """Completions of one request share it."""
    prompt: Prompt
    ids: bytes
    """Token ids, int32."""
    logprobs: NDArray[np.float32]
    runs: Runs
    """(policy version, tokens it wrote), in order."""
    temperature: float
    end_key: int
    uses: int = 0
    """How many looked-up sequences are known to hold it."""
    branch: tuple[int, int] | None = None
    """(restart, policy version): that restart went on at a version before some of ``runs``; the weights that these
    name were lost, and other ones have their numbers now."""

    @property
    def length(self) -> int:
        return len(self.ids) // ID_BYTES

    @property
    def start(self) -> int:
        """Its first token's position in a sequence that holds it."""
        return self.prompt.length

    @property
    def nbytes(self) -> int:
        return len(self.ids) + self.logprobs.nbytes + OVERHEAD_BYTES

    @property
    def policies(self) -> tuple[Runs, tuple[int, int] | None]:
        """Equal for records that the same weights wrote, token by token."""
        return self.runs, self.branch

    def written_by(self) -> NDArray[np.int64]:
        """Policy version of each token, as the process that wrote it counted."""
        return np.repeat([v for v, _ in self.runs], [n for _, n in self.runs]).astype(np.int64)

    def versions(self) -> NDArray[np.int64]:
        """Policy version of each token. Lost weights count as the ones that they were trained from and that a later
        process went on with: their age grows with every step since, and no weights of now are taken for them."""
        written = self.written_by()
        return written if self.branch is None else np.minimum(written, self.branch[1])


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Tokens ``[start, stop)`` of a looked-up sequence, and the records that hold exactly these tokens there.

    No candidate: nobody knows who wrote them.
    """

    start: int
    stop: int
    candidates: tuple[SpanRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class Resume:
    """A process went on at ``policy_version``; records up to ``last_order`` are of processes before it."""

    policy_version: int
    last_order: int


def note_branches(records: Iterable[SpanRecord], resumes: Sequence[Resume]) -> None:
    """Mark the records that name weights which a restart lost.

    Args:
        resumes: in the order in which they happened.
    """
    lasts = [resume.last_order for resume in resumes]
    lowest = [min(resume.policy_version for resume in resumes[number:]) for number in range(len(resumes))]
    for record in records:
        outlived = bisect_left(lasts, record.order)
        newest = max(version for version, _ in record.runs)
        if outlived < len(resumes) and newest > lowest[outlived]:
            restart = next(n for n in range(outlived, len(resumes)) if newest > resumes[n].policy_version)
            record.branch = (restart, lowest[outlived])
