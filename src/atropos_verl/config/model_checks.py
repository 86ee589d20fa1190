"""Checks of the model directory: files, tokenizer against embedding, context. Only JSON is read, no weights."""

import contextlib
import ctypes
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atropos_verl.assets import SMOLLM2, SMOLLM2_CONTEXT, SMOLLM2_PARAMETERS
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError

_SECTION = "model"
_SMALL = 20e6
"""Parameters up to which a model is trained with the settings of the demo's."""
_LEARNING_RATES = ((300e6, 2e-5), (3e9, 5e-6), (float("inf"), 1e-6))
"""Parameters at most, and a learning rate: the first is SmolLM2-135M's in the shipped configuration, the last what
verl's examples have for models of 7 B; in between it falls about as the inverse of the size."""
_LONGEST = 1024
"""Tokens of a prompt, and of a completion, at most, where nobody says."""
NAMES_OF_TRANSFORMERS_5 = frozenset({"TokenizersBackend", "SentencePieceBackend", "PythonBackend"})
_SLOW_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. ``todo`` is the remedy; it is empty with ``ok``."""

    section: str
    name: str
    status: Literal["ok", "warning", "missing"]
    """``warning``: it runs, but slower, or with a limit; ``missing``: the run would fail."""
    found: str
    todo: str = ""


def finding(section: str, name: str, found: str, *, missing: str = "", warning: str = "") -> Finding:
    """Builds a finding. ``missing`` and ``warning`` are remedies; the first that is not empty decides the status."""
    status: Literal["ok", "warning", "missing"] = "missing" if missing else "warning" if warning else "ok"
    return Finding(section, name, status, found, missing or warning)


def check_model(config: RunConfig, model_path: Path) -> list[Finding]:
    """Checks everything about ``model_path`` and the tokenizer that can be read in milliseconds."""
    settings, problem = read_json(model_path / "config.json")
    if problem:
        todo = f"give a Hugging Face directory as model.path, not {model_path}"
        return [finding(_SECTION, "config.json", problem, missing=todo)]
    tokenizer_dir = Path(config.model.tokenizer_path or model_path).expanduser()
    architecture = f"{settings.get('model_type', 'unknown')} in {model_path}"
    findings = [finding(_SECTION, "architecture", architecture), _check_weights(model_path)]
    findings += [_compare_vocabulary(settings, tokenizer_dir), *check_tokenizer(tokenizer_dir)]
    context = _of_text(settings, "max_position_embeddings")
    if isinstance(context, int):
        text = f"sequences of up to {config.max_token_len} tokens, the model has {context} positions"
        todo = "lower data.max_prompt_length, max_response_length or data.max_token_len"
        findings.append(finding(_SECTION, "context", text, missing=todo if config.max_token_len > context else ""))
    return findings


def check_usable(config: RunConfig, model_path: Path, prefix: str = "") -> None:
    """Raises ``ConfigError`` when there are no weights, or the tokenizer has ids that the model has no embedding for.
    Without this the failure comes when everything else has started, or is an index error in the embedding, or (on a
    GPU) a device assert that names nothing. ``prefix`` is what the backend has before its keys."""
    for found in check_model(config, model_path):
        if found.status == "missing" and found.name in ("weights", "tokenizer"):
            is_own = found.name == "tokenizer" and config.model.tokenizer_path
            raise ConfigError(f"{found.found}; {found.todo}", f"{prefix}model.{'tokenizer_path' if is_own else 'path'}")


def defaults_for(path: str | None) -> dict[str, Any]:
    """Dotted key → default where the schema's suits the demo only; {}: ``path`` is as small, or cannot be read."""
    settings: dict[str, Any]
    if path is None:
        return {}
    if path == SMOLLM2:  # it may not have been made yet
        size, settings = SMOLLM2_PARAMETERS, {"max_position_embeddings": SMOLLM2_CONTEXT}
    else:
        directory = Path(path).expanduser()
        settings, _ = read_json(directory / "config.json")
        dtype = str(settings.get("dtype") or settings.get("torch_dtype"))
        size = weight_bytes(directory) // (4 if dtype == "float32" else 2)
    context = _of_text(settings, "max_position_embeddings")
    if size <= _SMALL or not isinstance(context, int):
        return {}
    length = min(_LONGEST, context // 2)
    lr = next(lr for most, lr in _LEARNING_RATES if size <= most)
    return {"optim.lr": lr, "data.max_prompt_length": length, "max_response_length": length}


def check_gpu(config: RunConfig) -> None:
    """Raises ``ConfigError`` without the GPU that ``trainer.device=cuda`` asks for; asks NVIDIA's driver, not torch."""
    if config.trainer.device != "cuda":
        return
    count = ctypes.c_int()
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0:
            driver.cuDeviceGetCount(ctypes.byref(count))
    if not count.value:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = "the driver shows none" if visible is None else f"CUDA_VISIBLE_DEVICES={visible!r} leaves none"
        raise ConfigError(f"there is no GPU here ({reason}); trainer.device=cpu trains without", "trainer.device")


def tokenizer_size(directory: Path) -> int | None:
    """Returns one more than the largest id of ``tokenizer.json``; None: there is none (a slow tokenizer)."""
    content, problem = read_json(directory / "tokenizer.json")
    if problem:
        return None
    ids = [item.get("id") for item in content.get("added_tokens") or () if isinstance(item, Mapping)]
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        ids += vocabulary.values()
    elif isinstance(vocabulary, list):  # unigram: pairs of token and score, in the order of ids
        ids.append(len(vocabulary) - 1)
    return max((number + 1 for number in ids if isinstance(number, int)), default=None)


def embedded_ids(settings: Mapping[str, Any]) -> int | None:
    """The ``vocab_size`` of the content of ``config.json``, or of its ``text_config``."""
    size = _of_text(settings, "vocab_size")
    return size if isinstance(size, int) else None


def _of_text(settings: Mapping[str, Any], name: str) -> Any:
    text = settings.get("text_config")
    return settings.get(name) or (text.get(name) if isinstance(text, Mapping) else None)


def weight_bytes(model_path: Path) -> int:
    return sum(path.stat().st_size for path in (*model_path.glob("*.safetensors"), *model_path.glob("*.bin")))


def _check_weights(model_path: Path) -> Finding:
    shards: set[str] = set()
    for name in ("pytorch_model.bin.index.json", "model.safetensors.index.json"):
        content, _ = read_json(model_path / name)
        if isinstance(content.get("weight_map"), Mapping):
            shards = {str(file) for file in content["weight_map"].values()}
    lacking = sorted(name for name in shards if not (model_path / name).is_file())
    if lacking:
        text = f"{len(lacking)} of {len(shards)} files are not there: {', '.join(lacking[:3])}"
        return finding(_SECTION, "weights", text, missing="download again")
    if size := weight_bytes(model_path):
        return finding(_SECTION, "weights", f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB")
    todo = "put model.safetensors there, or choose another model.path"
    return finding(_SECTION, "weights", f"no .safetensors or .bin file in {model_path}", missing=todo)


def _compare_vocabulary(settings: Mapping[str, Any], tokenizer_dir: Path) -> Finding:
    embedding, size, todo, warning = embedded_ids(settings), tokenizer_size(tokenizer_dir), "", ""
    if size is None and any((tokenizer_dir / file).is_file() for file in _SLOW_TOKENIZERS):
        text = f"a slow one in {tokenizer_dir}; its size is not checked"
    elif size is None:
        text, todo = f"no tokenizer.json in {tokenizer_dir}", "set model.tokenizer_path"
    elif embedding is None:
        text, warning = f"{size} ids; config.json names no vocab_size", "compare by hand"
    elif size > embedding:
        text = f"the tokenizer of {tokenizer_dir} has {size} ids, the model embeds {embedding}"
        todo = "take the model's own tokenizer, or resize its embedding (model.resize_token_embeddings) and save it"
    else:
        text = f"{size} ids, {embedding} embedded"
    return finding(_SECTION, "tokenizer", text, missing=todo, warning=warning)


def check_tokenizer(directory: Path) -> list[Finding]:
    """Checks whether environments can load the tokenizer, and chat with it."""
    settings, problem = read_json(directory / "tokenizer_config.json")
    if problem:
        return []
    findings, name = [], settings.get("tokenizer_class")
    if name in NAMES_OF_TRANSFORMERS_5:
        found, todo = f"{name}, of transformers 5; environments get a form that transformers 4 loads as well", ""
        if not (directory / "tokenizer.json").is_file():
            found = f"{name}, which transformers 4 does not know, and most environments run on that"
            todo = "save it with a tokenizer.json, from which a form for transformers 4 is made"
        findings.append(finding(_SECTION, "tokenizer class", found, warning=todo))
    if "chat_template" not in settings and not any(directory.glob("chat_template*")):
        todo = "environments that chat need one; add it"
        findings.append(finding(_SECTION, "chat template", f"none in {directory}", warning=todo))
    return findings


def read_json(path: Path) -> tuple[dict[str, Any], str]:
    """Returns the object in a file and the problem, one of them empty."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        return {}, f"cannot read {path}: {error.strerror if isinstance(error, OSError) else error}"
    return (content, "") if isinstance(content, dict) else ({}, f"{path} is no JSON object")
