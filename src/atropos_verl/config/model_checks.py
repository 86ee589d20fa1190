"""The model directory: files, tokenizer against embedding, context. JSON only; no weights are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from atropos_verl.config.findings import Finding, missing, ok, warning
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError

__all__ = ["check_model", "check_vocabulary", "tokenizer_size", "weight_bytes"]

_SECTION = "model"
_NAMES_OF_TRANSFORMERS_5 = frozenset({"TokenizersBackend", "SentencePieceBackend", "PythonBackend"})


def check_model(config: RunConfig, model_path: Path) -> list[Finding]:
    """Everything about ``model_path`` and the tokenizer that can be read in milliseconds."""
    settings, problem = _read(model_path / "config.json")
    if problem:
        return [
            missing(_SECTION, "config.json", problem, f"give a Hugging Face directory as model.path, not {model_path}")
        ]
    tokenizer_dir = Path(config.model.tokenizer_path or model_path).expanduser()
    findings = [ok(_SECTION, "architecture", f"{settings.get('model_type', 'unknown')} in {model_path}")]
    findings += _check_weights(model_path)
    findings.append(_check_vocabulary(settings, tokenizer_dir))
    findings += _check_tokenizer(tokenizer_dir)
    findings += _check_context(config, settings)
    return findings


def check_vocabulary(config: RunConfig, model_path: Path, prefix: str = "") -> None:
    """Raises ``ConfigError`` when the tokenizer has ids that the model has no embedding for.

    Cheap enough for the start of every run; without it the failure is an index error in the embedding, after the
    model was loaded, or (on a GPU) a device assert that names nothing.

    ``prefix`` is what the backend has before its keys.
    """
    settings, problem = _read(model_path / "config.json")
    if problem:
        return  # the loader's message is better
    tokenizer_dir = Path(config.model.tokenizer_path or model_path).expanduser()
    finding = _check_vocabulary(settings, tokenizer_dir)
    if finding.status == "missing":
        key = "model.tokenizer_path" if config.model.tokenizer_path else "model.path"
        raise ConfigError(f"{finding.found}; {finding.todo}", f"{prefix}{key}")


def tokenizer_size(directory: Path) -> int | None:
    """One more than the largest id of ``tokenizer.json``; None: there is none (a slow tokenizer)."""
    content, problem = _read(directory / "tokenizer.json")
    if problem:
        return None
    ids = [item.get("id") for item in content.get("added_tokens") or () if isinstance(item, Mapping)]
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        ids += vocabulary.values()
    elif isinstance(vocabulary, list):  # unigram: pairs of token and score, in the order of ids
        ids.append(len(vocabulary) - 1)
    known = [number for number in ids if isinstance(number, int)]
    return max(known) + 1 if known else None


def weight_bytes(model_path: Path) -> int:
    """Bytes of the weight files."""
    return sum(path.stat().st_size for path in (*model_path.glob("*.safetensors"), *model_path.glob("*.bin")))


def _check_weights(model_path: Path) -> Iterator[Finding]:
    shards = _shards(model_path)
    lacking = sorted(name for name in shards if not (model_path / name).is_file())
    if lacking:
        shown = ", ".join(lacking[:3]) + (" …" if len(lacking) > 3 else "")
        yield missing(
            _SECTION, "weights", f"{len(lacking)} of {len(shards)} files are not there: {shown}", "download again"
        )
    elif size := weight_bytes(model_path):
        yield ok(_SECTION, "weights", f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB")
    else:
        todo = "put model.safetensors there, or choose another model.path"
        yield missing(_SECTION, "weights", f"no .safetensors or .bin file in {model_path}", todo)


def _shards(model_path: Path) -> set[str]:
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        content, problem = _read(model_path / name)
        if not problem and isinstance(content.get("weight_map"), Mapping):
            return {str(file) for file in content["weight_map"].values()}
    return set()


def _check_vocabulary(settings: Mapping[str, Any], tokenizer_dir: Path) -> Finding:
    text = settings.get("text_config")
    embedding = settings.get("vocab_size") or (text.get("vocab_size") if isinstance(text, Mapping) else None)
    size = tokenizer_size(tokenizer_dir)
    if size is None:
        files = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
        if any((tokenizer_dir / name).is_file() for name in files):
            return ok(_SECTION, "tokenizer", f"a slow one in {tokenizer_dir}; its size is not checked")
        return missing(_SECTION, "tokenizer", f"no tokenizer.json in {tokenizer_dir}", "set model.tokenizer_path")
    if not isinstance(embedding, int):
        return warning(_SECTION, "tokenizer", f"{size} ids; config.json names no vocab_size", "compare by hand")
    if size > embedding:
        return missing(
            _SECTION,
            "tokenizer",
            f"the tokenizer of {tokenizer_dir} has {size} ids, the model embeds {embedding}",
            "take the model's own tokenizer, or resize its embedding (model.resize_token_embeddings) and save it",
        )
    return ok(_SECTION, "tokenizer", f"{size} ids, {embedding} embedded")


def _check_tokenizer(directory: Path) -> Iterator[Finding]:
    settings, problem = _read(directory / "tokenizer_config.json")
    if problem:
        return
    name = settings.get("tokenizer_class")
    if name in _NAMES_OF_TRANSFORMERS_5:
        yield warning(
            _SECTION,
            "tokenizer class",
            f"{name}, which transformers 4 does not know, and most environments run on that",
            'write "tokenizer_class": "PreTrainedTokenizerFast" into tokenizer_config.json; both versions load it',
        )
    if "chat_template" not in settings and not any(directory.glob("chat_template*")):
        yield warning(_SECTION, "chat template", f"none in {directory}", "environments that chat need one; add it")


def _check_context(config: RunConfig, settings: Mapping[str, Any]) -> Iterator[Finding]:
    context = settings.get("max_position_embeddings")
    if not isinstance(context, int):
        return
    if config.max_token_len > context:
        yield missing(
            _SECTION,
            "context",
            f"sequences of up to {config.max_token_len} tokens, the model has {context} positions",
            "lower data.max_prompt_length, max_response_length or data.max_token_len",
        )
    else:
        yield ok(_SECTION, "context", f"{context} positions, sequences of up to {config.max_token_len} tokens")


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """(content, what is wrong)."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        return {}, f"cannot read {path}: {error.strerror if isinstance(error, OSError) else error}"
    return (content, "") if isinstance(content, dict) else ({}, f"{path} is no JSON object")
