"""A gateway over real HTTP in front of the fake engine, one for each file."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.fake_engine import FakeEngine
from support.serving import serving
from support.tiny_model import build_tiny_tokenizer


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FakeEngine, httpx.Client]]:
    engine = FakeEngine()
    with serving(engine, build_tiny_tokenizer()) as client:
        yield engine, client


@pytest.fixture
def engine(served: tuple[FakeEngine, httpx.Client]) -> FakeEngine:
    """As new. A file may have another one, with the replies that its tests expect."""
    served[0].reset()
    return served[0]


@pytest.fixture
def client(served: tuple[FakeEngine, httpx.Client], engine: Any) -> httpx.Client:
    return served[1]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads those of the shell."""
    for name in ("API_URL", "API_TOKEN", "TIMEOUT", "GATEWAY_URL", "GATEWAY_KEY"):
        monkeypatch.delenv(f"ATROPOS_{name}", raising=False)
