"""Fixtures of all tests. Its place puts ``tests/`` on the import path: ``from support.tiny_model import ...``."""

from __future__ import annotations

import os
from collections.abc import Iterator

# As the training command does (local/main.py): spinning OpenMP threads of two test processes on two cores made a
# training step ten times slower. Before anything imports torch; child processes inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from support.http_faults import FaultServer
from support.upstream_api import UpstreamApi, upstream_api


@pytest.fixture
def fault_server() -> Iterator[FaultServer]:
    """An HTTP server whose behaviour the test scripts."""
    with FaultServer() as server:
        yield server


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpstreamApi]:
    """The real trajectory API, one process for the whole session: start a test with ``reset_data``."""
    with upstream_api(tmp_path_factory.mktemp("upstream")) as api:
        yield api
