"""Functions of the user, named by a key: ``package.module:function``.

``docs/extensions.md`` gives arguments, results, shapes, dtypes and units; ``examples/extensions/`` has one module each.
The module is looked for on PYTHONPATH and in the directory in which the command was started, which the processes of the
run, which work in other directories, know from ``ATROPOS_VERL_LAUNCH_DIRECTORY``.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atropos_verl.config.launch_schema import LAUNCH_DIRECTORY
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.types import NOT_TRAINED, FloatArray, LossOutput, ScoredGroup

if TYPE_CHECKING:
    import torch

_ARGUMENTS = {
    "loss.path": (
        ("logprobs", "advantages", "loss_mask", "num_loss_tokens"),
        ("old_logprobs", "rollout_logprobs", "sequence_ids"),
    ),
    "algorithm.advantage_path": (("scores", "group"), ()),
    "data.filter_path": (("groups",), ()),
    "reward.path": (("prompts", "completions"), ()),
    "agent": (("task", "session"), ()),
    "scorer": (("task", "output"), ()),
}
"""Key → the positional arguments and the keyword arguments that its function is called with."""


def check_extensions(config: RunConfig, prefix: str = "") -> None:
    """Loads every function that ``config`` names, before anything slow starts. ``prefix``: ``atropos.`` where the keys
    are in that block (Ray). Raises as ``load_function``."""
    for key in _ARGUMENTS:
        if "." in key and (path := attrgetter(key)(config)) is not None:
            load_function(key, path, prefix)


def split_path(key: str, path: str) -> tuple[str, str]:
    """Module and function. Raises ``ConfigError``, which names ``key``."""
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{path!r} is not of the form package.module:function", key)
    return module_name, name


def search_launch_directory() -> str:
    """The directory of the launch: modules of the user are found there from now on."""
    directory = os.environ.setdefault(LAUNCH_DIRECTORY, str(Path.cwd()))
    if directory not in sys.path:
        sys.path.append(directory)
    return directory


def load_function(key: str, path: str, prefix: str = "") -> Callable[..., Any]:
    """The function that ``path`` names. Raises ``ConfigError``, which names the key as ``prefix`` and ``key``, when it
    cannot be imported, is no function, or does not take the arguments of ``key``."""
    positional, keywords = _ARGUMENTS[key]
    key = prefix + key
    module_name, name = split_path(key, path)
    directory = search_launch_directory()
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        where = f"it is looked for in {directory} and on PYTHONPATH"
        raise ConfigError(f"cannot import {module_name}: {error}; {where}", key) from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"importing {module_name} raised {type(error).__name__}: {error}", key) from error
    try:
        function: Callable[..., Any] = attrgetter(name)(module)
    except AttributeError:
        raise ConfigError(f"{module_name} has no {name!r}", key) from None
    if not callable(function):
        raise ConfigError(f"{path} is a {type(function).__name__}, not a function", key)
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin does not say what it takes
        return function
    try:
        signature.bind(*positional, **dict.fromkeys(keywords))
    except TypeError as error:
        call = ", ".join([*positional, *(f"{name}=…" for name in keywords)])
        raise ConfigError(f"{path}{signature} cannot be called as f({call}): {error}", key) from None
    return function


def _result(key: str, path: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """What the user's function returns. Raises ``ConfigError``, with the line in the user's code, when it raises."""
    try:
        return function(*arguments, **keywords)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename}:{place.lineno}"
        raise ConfigError(f"{path} raised {type(error).__name__}: {error} ({where})", key) from error


def _entries(key: str, path: str, result: Any, count: int, what: str, fewer: int | None = None) -> list[Any]:
    """The ``count`` entries of a user's result, which may be ``fewer`` instead."""
    try:
        if isinstance(result, str | bytes | Mapping):
            raise TypeError
        entries = list(result)
    except TypeError:  # None, a number, an array without dimensions
        raise ConfigError(f"{path} returned {_shown(result)}, not a list of {count} {what}", key) from None
    if len(entries) not in (count, fewer):
        raise ConfigError(f"{path} returned {len(entries)} {what}, not {count}: {_shown(entries)}", key)
    return entries


def _numbers(key: str, path: str, value: Any, shapes: tuple[tuple[int, ...], ...], what: str) -> FloatArray:
    """``value`` as float64, finite and of one of ``shapes``."""
    try:
        found = np.array(None if isinstance(value, str | bytes) else value, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):  # torch: a tensor with a graph
        found = np.array(np.nan)
    if value is None or found.shape not in shapes or not np.isfinite(found).all():
        expected = " or ".join(str(shape) if shape else "a number" for shape in shapes)
        raise ConfigError(f"{path} returned {_shown(value)} as {what}; it must be finite, and {expected}", key)
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 200 else f"{type(value).__name__} {text[:200]}…"


def scores_of(
    path: str, function: Callable[..., Any], prompts: list[str], texts: list[str], key: str = "reward_fn"
) -> FloatArray:
    """Scores of ``texts``, float64 [N], by the user's reward function, whose name is ``path``. Raises ``ConfigError``,
    which names the function and what it returned or raised."""
    entries = _entries(key, path, _result(key, path, function, prompts, texts), len(texts), "scores")
    return np.array([_numbers(key, path, score, ((),), f"score {i}") for i, score in enumerate(entries)])


def load_loss(path: str) -> Callable[..., LossOutput]:
    """``loss.path`` as a function with the arguments of ``_ARGUMENTS`` that returns a ``LossOutput``."""
    function = load_function(key := "loss.path", path)

    def loss(logprobs: torch.Tensor, *arguments: Any, **keywords: Any) -> LossOutput:
        import torch

        result = _result(key, path, function, logprobs, *arguments, **keywords)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
            raise ConfigError(f"{path} returned {_shown(result)}, not (loss, metrics)", key)
        value, metrics = result
        if not isinstance(value, torch.Tensor) or value.dim() != 0:
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ConfigError(f"{path} returned a loss of {shape}, not a tensor without dimensions", key)
        if not value.requires_grad:  # a constant: its gradient is 0, and verl needs a graph
            value = value.to(logprobs) + torch.zeros_like(logprobs).mul(logprobs.nan_to_num()).sum()
        try:
            figures = {str(name): float(number) for name, number in metrics.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{path} returned metrics {_shown(metrics)}: {error}", key) from None
        return LossOutput(loss=value, metrics=figures)

    return loss


def load_advantage(path: str) -> Callable[[ScoredGroup], list[FloatArray]]:
    """``algorithm.advantage_path`` as a function that returns float64 [T_i] for each sequence of a group. The user's is
    given the scores of the rollouts, and returns one entry of each, or one of each sequence."""
    function = load_function(key := "algorithm.advantage_path", path)

    def advantages(group: ScoredGroup) -> list[FloatArray]:
        scores = group.rollout_scores
        result = _result(key, path, function, scores, group)
        rows = _entries(key, path, result, len(group), "advantages", len(scores))
        rows = rows if len(rows) == len(group) else [rows[number] for number in group.rollouts]
        lengths = [len(tokens) for tokens in group.token_ids]
        return [
            np.broadcast_to(_numbers(key, path, row, ((), (length,)), f"advantage of sequence {i}"), (length,))
            for i, (row, length) in enumerate(zip(rows, lengths, strict=True))
        ]

    return advantages


def load_filter(path: str) -> Callable[[Sequence[ScoredGroup]], list[bool]]:
    """``data.filter_path`` as a function that says of each group whether it is kept."""
    function = load_function(key := "data.filter_path", path)

    def keeps(groups: Sequence[ScoredGroup]) -> list[bool]:
        entries = _entries(key, path, _result(key, path, function, list(groups)), len(groups), "values")
        values = [float(_numbers(key, path, entry, ((),), f"value {i}")) for i, entry in enumerate(entries)]
        if wrong := [(i, value) for i, value in enumerate(values) if value not in (0, 1)]:
            raise ConfigError(f"{path} returned {wrong[0][1]} as value {wrong[0][0]}, not True or False", key)
        return [bool(value) for value in values]

    return keeps


def load_rescoring(path: str, decode: Callable[..., str]) -> Callable[[ScoredGroup], ScoredGroup]:
    """``reward.path`` as a function that gives a group new scores; ``decode`` is the tokenizer's. The prompt of a
    sequence ends at its first trained token; a rollout has the score of its last row."""
    function = load_function(key := "reward.path", path)

    def rescored(group: ScoredGroup) -> ScoredGroup:
        starts = [int(np.argmax(np.append(mask != NOT_TRAINED, True))) for mask in group.masks]
        pairs = list(zip(group.token_ids, starts, strict=True))
        prompts = [decode(tokens[:start].tolist()) for tokens, start in pairs]
        completions = [decode(tokens[start:].tolist(), skip_special_tokens=True) for tokens, start in pairs]
        scores = scores_of(path, function, prompts, completions, key)
        last = dict(zip(group.rollouts, scores, strict=True))
        return replace(group, scores=np.array([last[number] for number in group.rollouts]))

    return rescored
