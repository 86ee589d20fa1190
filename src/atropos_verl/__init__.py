"""Atropos-VERL: train language models in verl on rollouts that Atropos environments generate and score.

Names are imported on first use, so ``import atropos_verl`` needs neither torch nor verl.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atropos_verl.backends.local.trainer import AtroposTrainer
    from atropos_verl.config.schema import RunConfig
    from atropos_verl.errors import AtroposAPIError, AtroposVerlError
    from atropos_verl.protocol.client import AtroposClient
    from atropos_verl.protocol.wire import decode_batch
    from atropos_verl.training.samples import build_samples
    from atropos_verl.training.weight_sync import AtroposShardingManager
    from atropos_verl.types import SampleReport, SampleSettings, ScoredGroup, TrainingBatch, TrainingSample

__all__ = [
    "AtroposAPIError",
    "AtroposClient",
    "AtroposShardingManager",
    "AtroposTrainer",
    "AtroposVerlError",
    "RunConfig",
    "SampleReport",
    "SampleSettings",
    "ScoredGroup",
    "TrainingBatch",
    "TrainingSample",
    "__version__",
    "build_samples",
    "decode_batch",
]

__version__ = "0.1.0"

_HOMES = {
    "AtroposAPIError": "errors",
    "AtroposClient": "protocol.client",
    "AtroposShardingManager": "training.weight_sync",
    "AtroposTrainer": "backends.local.trainer",
    "AtroposVerlError": "errors",
    "RunConfig": "config.schema",
    "SampleReport": "types",
    "SampleSettings": "types",
    "ScoredGroup": "types",
    "TrainingBatch": "types",
    "TrainingSample": "types",
    "build_samples": "training.samples",
    "decode_batch": "protocol.wire",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
