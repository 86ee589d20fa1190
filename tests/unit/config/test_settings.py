"""Command line and YAML → RunConfig."""

from __future__ import annotations

from pathlib import Path

import pytest

from atropos_verl.config.composition import SHIPPED, load_config, train_help
from atropos_verl.errors import ConfigError
from atropos_verl.launch.train import main

RECIPE = SHIPPED


TRAINING_FILES = [RECIPE / "atropos.yaml"]
"""The others are the launcher's (they name its schema), composed in tests/unit/launch."""


@pytest.mark.parametrize("path", TRAINING_FILES, ids=lambda path: path.stem)
def test_every_shipped_yaml_is_valid(path: Path) -> None:
    config = load_config([], path.parent, path.stem)
    assert config.steps > 0


def test_the_demo() -> None:
    config = load_config([], RECIPE, "atropos")
    assert (config.steps, config.batch_size, config.group_size, config.optim.lr) == (40, 64, 8, 2e-4)
    assert config.max_token_len == 64
    assert not config.is_attached


def test_overrides_reach_nested_keys_lists_and_open_sections() -> None:
    words = ["optim.lr=0.1", "advantage_clipping=[-2,2]", "atropos.headers.X-Key=abc", "model.override_config.eps=1e-3"]
    config = load_config(words, RECIPE, "atropos")
    assert config.optim.lr == 0.1
    assert config.advantage_clipping == (-2.0, 2.0)
    assert config.atropos.headers == {"X-Key": "abc"}
    assert config.model.override_config == {"eps": 1e-3}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("steps", "'steps' is not of the form key=value"),
        ("steps=many", "steps: Input should be a valid integer"),
        ("steps=[", "'steps=[' cannot be read"),
    ],
)
def test_a_bad_word_is_named(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([word], RECIPE, "atropos")
    assert message in str(caught.value)


def test_a_missing_yaml_is_named() -> None:
    with pytest.raises(ConfigError, match="no_such_file"):
        load_config([], RECIPE, "no_such_file")


def test_command_line_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [atropos_schema, _self_]\natropos: {api_url: http://file:1, timeout: 9}\n"
    )
    monkeypatch.delenv("ATROPOS_TIMEOUT", raising=False)
    monkeypatch.setenv("ATROPOS_API_URL", "http://environment:1")
    assert load_config([], tmp_path, "mine").atropos.api_url == "http://environment:1"
    assert load_config(["atropos.api_url=http://line:1"], tmp_path, "mine").atropos.api_url == "http://line:1"
    assert load_config([], tmp_path, "mine").atropos.timeout == 9
    monkeypatch.delenv("ATROPOS_API_URL")
    assert load_config([], tmp_path, "mine").atropos.api_url == "http://file:1"


def test_help_names_every_key_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.strip() == train_help("python recipe/atropos/main_atropos.py").strip()
    for key in ("optim.lr", "atropos.api_url", "batch_max_wait_time", "gateway.port"):
        assert f"\n  {key} " in text


def test_a_configuration_error_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stepz=3"], RECIPE, "atropos") == 2
    assert (
        capsys.readouterr().err
        == "CONFIGURATION ERROR: stepz: unknown key; did you mean steps? (--help lists all keys)\n"
    )
