"""Shared by the integration tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import build_tiny_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose tokenizer ``AutoTokenizer`` can load, as clients do; it holds no weights."""
    path = tmp_path_factory.mktemp("tiny")
    build_tiny_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    """The one of ``model_dir``."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """A Ray of this test file."""
    from support.ray_cluster import ray_session

    with ray_session():
        yield
