"""Checkpoints of both backends: verl's files, our state beside them, a manifest by which damage is found
(docs/internals.md has the layout and the order of the writes)."""

import errno
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import CheckpointError, ConfigError
from atropos_verl.storage import sync_to_disk, write_atomic
from atropos_verl.training.advantages import RunningMoments
from atropos_verl.training.step import RunTotals

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
"""verl's name of the newest one; manifests say which that is."""
_STATE = "atropos.json"
_MANIFEST = "manifest.json"
_BEST = "best"
_REPLACED = "replaced"
_NAME = re.compile(r"global_step_(\d+)")
_PROBE_BYTES = 1 << 20
_OF_ONE_START = ("run_dir", "resume", "atropos.api_url", "atropos.token", "atropos.headers", "gateway.", "eval.command")
"""Settings that begin so may differ from start to start of one run."""
_WITHOUT_EFFECT = {"model.path": "the weights are the checkpoint's", "eval.before": "the run has begun"}
"""Settings that a resumed run cannot honour, with the reason. All others hold from the resume on."""


@dataclass
class RunState:
    """What a resumed run needs besides verl's own state."""

    step: int = 0
    policy_version: int = 0  # optimiser steps since the run began, resumes included
    moments: RunningMoments = field(default_factory=RunningMoments)
    totals: RunTotals = field(default_factory=RunTotals)
    held_out: dict[str, float | None] = field(default_factory=dict)  # ``HeldOut.scores``

    def save(self, directory: Path, config: RunConfig) -> None:
        """Writes ``directory/atropos.json``, with what ``changed_settings`` compares. Raises ``OSError``."""
        content = {**asdict(self), "settings": _comparable(config)}
        write_atomic(directory / _STATE, json.dumps(content, indent=1), durable=True)

    def restore(self, directory: Path) -> dict[str, Any]:
        """Reads ``directory/atropos.json``; returns all of it. Raises ``CheckpointError`` when that cannot be done."""
        try:
            saved: dict[str, Any] = json.loads((directory / _STATE).read_text())
            self.step, self.policy_version = int(saved["step"]), int(saved["policy_version"])
            self.moments.load_state_dict(saved["moments"])
            self.totals.load(saved["totals"])
            self.held_out.update(saved.get("held_out") or {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"cannot read {directory / _STATE}: {error}; a checkpoint of verl alone does not say which batches "
                "were trained. Choose another checkpoint directory, or disable resuming"
            ) from error
        return saved


def changed_settings(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """``KEY OLD → NEW`` for each setting that the run which wrote a checkpoint (``RunState.restore``) had otherwise."""
    before, now = saved.get("settings") or {}, _comparable(config)
    effects = {key: f" (no effect: {reason})" for key, reason in _WITHOUT_EFFECT.items()}
    return [
        f"{key} {json.dumps(before[key])} → {json.dumps(value)}{effects.get(key, '')}"
        for key, value in now.items()
        if before.get(key, value) != value
    ]


def _comparable(config: RunConfig) -> dict[str, Any]:
    """Dotted key → value, without secrets, of every setting that means the same at every start of a run."""
    flat: dict[str, Any] = {}
    for name, value in config.public().items():
        flat |= {f"{name}.{key}": entry for key, entry in value.items()} if isinstance(value, dict) else {name: value}
    return {key: value for key, value in flat.items() if not key.startswith(_OF_ONE_START)}


@contextmanager
def new_checkpoint(
    root: Path, step: int, keep: int | None, *, spare: int | None = None, in_place: bool = False
) -> Iterator[Path]:
    """A directory into which the block writes the checkpoint of ``step``; at its end it is the newest one in ``root``.
    Then those beyond the newest ``keep`` go (None, 0 or less: none), but neither the best (``mark_best``) nor that of
    step ``spare``. Raises ``CheckpointError`` when it cannot be written; what was there then stays as it was.
    ``in_place``: it has its final name at once, as disks of other nodes need it, and overwrites one of the same step.
    """
    final, unfinished = root / f"global_step_{step}", root / "unfinished"
    place, replaced = final if in_place else unfinished / final.name, unfinished / _REPLACED / final.name
    try:
        for path in _found(root).values():
            if path.parent != root:  # a process died between the two renames below
                path.rename(root / path.name)
        shutil.rmtree(unfinished, ignore_errors=True)
        place.mkdir(parents=True, exist_ok=True)
        (place / _MANIFEST).unlink(missing_ok=True)
        yield place
        _write_manifest(place, 1 + max((_sequence(path) or 0 for path in _found(root).values()), default=0))
        if not in_place:
            if final.exists():  # the run was rolled back to a step before it
                replaced.parent.mkdir()
                sync_to_disk(unfinished, root)  # or a power cut could leave neither name of it
                final.rename(replaced)
            place.rename(final)
        sync_to_disk(root, root.parent)
        write_atomic(root / TRACKER, str(step), durable=True)
    except (OSError, RuntimeError) as error:
        cause = _why_nothing_can_be_written(root) or error
        if replaced.exists():
            shutil.rmtree(final, ignore_errors=True)
            replaced.rename(final)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(f"cannot write the checkpoint {final}: {cause}") from error
    shutil.rmtree(unfinished, ignore_errors=True)
    # Those of later steps count as older: the run was rolled back, and they are not of its past.
    found = _found(root)
    for old in sorted(found, key=lambda other: (other > step, -other))[keep if keep and keep > 0 else len(found) :]:
        if old != spare and found[old].resolve() != (root / _BEST).resolve():
            shutil.rmtree(found[old], onerror=lambda _, path, error: logger.warning("%s stays: %s", path, error[1]))


def mark_best(root: Path, step: int) -> None:
    """Makes ``root/best`` a link to the checkpoint of ``step``, if there is one, which is then kept."""
    if (root / f"global_step_{step}").is_dir():
        link = root / "unfinished-best"
        link.unlink(missing_ok=True)
        link.symlink_to(f"global_step_{step}")
        link.replace(root / _BEST)


def _found(root: Path) -> dict[int, Path]:
    """Step → checkpoint, also of one that was about to be replaced."""
    paths = [*root.glob(f"unfinished/{_REPLACED}/global_step_*"), *root.glob("global_step_*")]
    return {int(match[1]): path for path in paths if (match := _NAME.fullmatch(path.name))}


def _why_nothing_can_be_written(root: Path) -> str | None:
    """The error of a small write now: ``torch.save`` says "unexpected pos" for a full disk."""
    try:
        write_atomic(root / ".probe", bytes(_PROBE_BYTES), durable=True)
        (root / ".probe").unlink()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            return error.strerror
        return f"{error.strerror} ({shutil.disk_usage(root).free / 1e6:.1f} MB are free there)"
    return None


def _write_manifest(directory: Path, sequence: int) -> None:
    paths = sorted(directory.rglob("*"))
    sync_to_disk(*paths, directory)
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "xxh3": _checksum.__wrapped__(path, 0, 0)}
        for path in paths
        if path.is_file()
    }
    write_atomic(directory / _MANIFEST, json.dumps({"sequence": sequence, "files": files}, indent=1), durable=True)


def _sequence(directory: Path) -> int | None:
    """A checkpoint's number in the order in which they were written; None: its manifest does not say."""
    try:
        return int(json.loads((directory / _MANIFEST).read_bytes())["sequence"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@lru_cache(maxsize=4096)
def _checksum(path: Path, size: int, changed_ns: int) -> str:
    """Of a file; it is not read again while it has this size and time. Raises ``OSError``."""
    del size, changed_ns
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def find_damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None: every file is as it was written."""
    manifest = directory / _MANIFEST
    try:
        entries = json.loads(manifest.read_bytes())["files"]
        files = {directory / name: (entry["bytes"], entry["xxh3"]) for name, entry in entries.items()}
    except FileNotFoundError:
        return f"{directory} {'has no manifest.json' if directory.is_dir() else 'does not exist'}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest} cannot be read: {error!r}"
    for path, (size, checksum) in files.items():
        try:
            status = path.stat()
            if status.st_size != size:
                return f"{path} has {status.st_size} bytes, but {size} were written"
            if _checksum(path, status.st_size, status.st_mtime_ns) != checksum:
                return f"{path} is damaged: its checksum is not that of what was written"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
    return None


def find_checkpoint(root: Path, resume: str, tell: Callable[[str], None] = logger.info) -> Path | None:
    """The checkpoint in ``root`` that ``resume`` means, checked; None: there is none, so the run starts anew. ``auto``:
    the newest one, or the one before it where that one is damaged; ``tell`` is called with what was found. Raises
    ``ConfigError`` when ``resume`` is a path, and no checkpoint is there; ``CheckpointError`` when it, or every one in
    ``root``, is damaged."""
    if resume == "disable":
        return None
    if resume != "auto":
        directory = Path(resume).expanduser().absolute()
        if not (directory / _STATE).is_file():
            raise ConfigError(
                f"{directory} is not a checkpoint of this project (no {_STATE}); or auto, disable", "resume"
            )
        if not (directory / _MANIFEST).exists():
            tell(f"{directory} has no {_MANIFEST} (earlier versions wrote none): it is used unchecked")
        elif damage := find_damage(directory):
            raise CheckpointError(f"{damage}. Resume from another checkpoint, or with resume=auto")
        return directory
    paths = _found(root)
    numbers = {step: _sequence(path) for step, path in paths.items()}
    damages: dict[int, str] = {}
    # One whose manifest cannot be read may be the newest. One of a later step than a damaged one is not before it: the
    # run was rolled back meanwhile.
    for step in sorted(paths, key=lambda step: (numbers[step] is None, numbers[step], step), reverse=True):
        damage = find_damage(paths[step])
        if damage is not None:
            damages[step] = damage
        elif all(step < other for other in damages if numbers[other] is not None):
            for text in (text for other, text in damages.items() if other > step):
                tell(f"{text}; {paths[step].name} is used")
            return paths[step]
    if not paths and not (root / TRACKER).exists():
        return None
    listed = "; ".join(damages.values()) or f"{root / TRACKER} is there, but none that it could name"
    raise CheckpointError(
        f"no checkpoint in {root} is complete: {listed}. resume=PATH takes one of an earlier version, which has no "
        "manifest; another run_dir starts a new run"
    )


def saved_step(root: Path, resume: str) -> int:
    """The step that a run goes on from; 0 for a fresh start. Raises as ``find_checkpoint`` and ``RunState.restore``."""
    state = RunState()
    directory = find_checkpoint(root, resume)
    if directory is not None:
        state.restore(directory)
    return state.step
