"""Fixtures of all tests. Its place puts ``tests/`` on the import path: ``from support.tiny_model import ...``."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# As the training command does (launch/train.py): spinning OpenMP threads of two test processes on two cores made a
# training step ten times slower. Before anything imports torch; child processes inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# verl picks its platform for the life of a process when something first asks, which may be the import of any test file
# of this process. A test that wants another platform runs in a process of its own.
os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("VERL_USE_EXTERNAL_MODULES", "atropos_verl.verl_plugin.plugin")

# A shell that runs the suite in the background hands down an ignored SIGINT (nohup: SIGHUP), and so would every process
# we start: the tests of Ctrl-C and of a terminal that closes need them as a terminal gives them.
if threading.current_thread() is threading.main_thread():
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)

import pytest
from support.http_faults import FaultServer
from support.trajectory_server import UpstreamApi

if TYPE_CHECKING:
    from support.lab import Lab


@pytest.fixture
def fault_server() -> Iterator[FaultServer]:
    """An HTTP server whose behaviour the test scripts."""
    with FaultServer() as server:
        yield server


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory where there is one, for thousands of small files."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as made:
        yield Path(made)


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpstreamApi]:
    """The real trajectory API, one process for the whole session: start a test with ``reset_data``."""
    with UpstreamApi(tmp_path_factory.mktemp("upstream")) as api:
        yield api


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights and its tokenizer, to be read only."""
    from support.tiny_model import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def lab(model_path: Path, tmp_path: Path) -> Lab:
    """Makes trainers in this process on batches that the test writes."""
    from support.lab import Lab

    return Lab(model_path, tmp_path)
