"""A trajectory API whose batches the test writes: the same ones in the same order, whoever asks and however often."""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from support.http_faults import FaultServer, answer
from support.malformed import good_group


@contextmanager
def scripted_api(bodies: Sequence[bytes], *, batch_size: int, max_token_len: int) -> Iterator[FaultServer]:
    """Serves ``bodies`` one by one to GET /batch, then ``{"batch": null}`` for ever.

    The first GET /batch is how a trainer starts an API; it is answered with null, as upstream does.
    """
    none_yet = answer({"batch": None})
    with FaultServer() as server:
        server.script("/status", answer({"current_step": 0, "queue_size": 0}))
        server.script("/info", answer({"batch_size": batch_size, "max_token_len": max_token_len + 1}))
        server.script("/register", answer({"uuid": "1"}))
        server.script("/batch", none_yet, *map(answer, bodies), none_yet)
        yield server


def batch_of(groups: Sequence[Any]) -> bytes:
    """The body of GET /batch. NaN and Infinity are written as Python's dialect of JSON has them."""
    return json.dumps({"batch": list(groups)}).encode()


def random_batches(count: int, *, groups: int, group_size: int, seed: int = 0) -> list[bytes]:
    """``count`` batches of good groups (ids below 256, at most 12 tokens)."""
    rng = random.Random(seed)
    return [batch_of([good_group(rng, group_size=group_size) for _ in range(groups)]) for _ in range(count)]
