"""Engines in a thread of the tests' process and in a process of their own."""

from __future__ import annotations

import functools

import pytest
from support.engines import Placed, placed_engine


@pytest.fixture(params=["thread", "process"])
def placed(request: pytest.FixtureRequest) -> Placed:
    return functools.partial(placed_engine, request.param)
