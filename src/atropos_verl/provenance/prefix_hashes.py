"""Hashes of every prefix of a token sequence at once: what the ledger finds its records by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["MASK", "prefix_hashes"]

MASK = (1 << 64) - 1
"""Sums of hashes are taken modulo 2^64."""
_TOKEN_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_POSITION_FACTOR = np.uint64(0xD1B54A32D192ED03)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)


def prefix_hashes(token_ids: NDArray[np.int32], offset: int = 0) -> NDArray[np.uint64]:
    """64-bit hashes of all prefixes: entry p is that of the first p tokens, ``[T + 1]``.

    The sum, modulo 2^64, of a well mixed value of each (token, position) pair (splitmix64's finaliser, Steele et al.
    2014), so that all prefixes come from one cumulative sum, and that of a prompt plus that of what follows it
    (``offset`` = length of the prompt) is that of both.
    """
    count = len(token_ids)
    mixed = token_ids.astype(np.uint64) * _TOKEN_FACTOR
    mixed += np.arange(offset + 1, offset + count + 1, dtype=np.uint64) * _POSITION_FACTOR
    mixed ^= mixed >> _S30
    mixed *= _MIX_1
    mixed ^= mixed >> _S27
    mixed *= _MIX_2
    mixed ^= mixed >> _S31
    hashes = np.zeros(count + 1, dtype=np.uint64)
    np.cumsum(mixed, out=hashes[1:])
    return hashes
