"""Settings classes in the words of whoever sets them: what is wrong by key, environment variables, rows of ``--help``.

Part of ``atropos_verl.config.schema``, which names these as its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from atropos_verl.errors import ConfigError

__all__ = ["apply_environment", "as_config_error", "describe_model"]


def as_config_error(error: ValidationError, prefix: str = "") -> ConfigError:
    """pydantic's error, every wrong key by its dotted name (below ``prefix``, which ends in a dot)."""
    lines = []
    first = ""
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("function-", "constrained-")))
        key = f"{prefix}{key}".rstrip(".")
        message = str(item["msg"]).removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key; --help lists all keys"
        elif item["type"] != "value_error":
            message = f"{message}, got {item['input']!r}"
        first = first or key
        lines.append(f"{key}: {message}" if key else message)
    if len(lines) == 1 and first:
        return ConfigError(lines[0].removeprefix(f"{first}: "), first)
    result = ConfigError("\n".join(lines))
    result.key = first
    return result


def apply_environment(
    values: dict[str, Any], environ: Mapping[str, str] | None = None, command_line_keys: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Put ``ATROPOS_API_URL``, ``ATROPOS_TIMEOUT``, ``ATROPOS_API_TOKEN`` and ``ATROPOS_GATEWAY_KEY`` over the file's.

    Keys that the command line set (``command_line_keys``, dotted) win over the environment.
    """
    environ = os.environ if environ is None else environ
    names = {"ATROPOS_API_URL": "api_url", "ATROPOS_TIMEOUT": "timeout", "ATROPOS_API_TOKEN": "token"}
    section = dict(values.get("atropos") or {})
    for variable, key in names.items():
        value = environ.get(variable, "").strip()
        if not value or f"atropos.{key}" in command_line_keys:
            continue
        if key == "timeout":
            try:
                float(value)
            except ValueError:
                raise ConfigError(f"environment variable {variable}={value!r} is not a number of seconds") from None
        section[key] = value
    result = {**values, "atropos": section}
    gateway_key = environ.get("ATROPOS_GATEWAY_KEY", "").strip()
    if gateway_key and "gateway.api_key" not in command_line_keys:
        result["gateway"] = {**(values.get("gateway") or {}), "api_key": gateway_key}
    return result


def describe_model(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str, Any, str]]:
    """``describe`` for any settings class; names below ``prefix`` (which ends in a dot)."""
    rows: list[tuple[str, str, Any, str]] = []
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            rows += describe_model(annotation, f"{prefix}{name}.")
            continue
        text = getattr(annotation, "__name__", None) if isinstance(annotation, type) else None
        kind = text or str(annotation).replace("typing.", "").replace("NoneType", "None")
        rows.append((f"{prefix}{name}", kind, info.get_default(call_default_factory=True), info.description or ""))
    return rows
