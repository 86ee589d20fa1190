"""Atropos-VERL: train language models in verl on rollouts that Atropos environments generate and score.

Names are imported on first use, so ``import atropos_verl`` needs neither torch nor verl. Their types are in
``__init__.pyi``, so that this module, which every other one runs first, imports none of them."""

from importlib import import_module

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
    "TrainingSample": "types",
    "build_samples": "training.samples",
    "decode_batch": "protocol.wire",
}

__version__ = "0.3.0.dev0"
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return list(__all__)
