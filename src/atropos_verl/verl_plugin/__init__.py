"""Tells verl what it lacks: a CPU platform, engines, rollout names. A registration that fails raises."""

import importlib
import logging
import os
import sys

from atropos_verl.errors import ConfigError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells a process of its ranks. Other launchers leave them to what they start, whole or in part."""
DROPOUT_VARIABLE = "ATROPOS_VERL_DROPOUT"
"""``1`` in the environment of a training process of Ray: dropout is on in the update (``atropos.model.dropout``)."""
_PLUGIN = "atropos_verl.verl_plugin.plugin"
_PLATFORMS = {"cpu": "cpu", "cuda": "nvidia"}
# Nothing may be fetched from a hub behind the user's back, and Ray must not phone home. verl's own default lets some of
# its modules say on standard error what they do; below WARN its logger.info(..., flush=True) raises (separate_async).
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false", "VERL_LOGGING_LEVEL": "WARN"}


def _with_plugin() -> str:
    """Returns ``VERL_USE_EXTERNAL_MODULES`` with ours in it, once."""
    modules = [name for name in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",") if name]
    return ",".join(dict.fromkeys([*modules, _PLUGIN]))


def own_rank() -> tuple[int, int]:
    """This process's rank and the number of ranks, as torchrun put them into the environment; (0, 1) without it. Raises
    ``ConfigError``, which names the variables, when they cannot be those of one run."""
    number = {}
    for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name) or default
        try:
            number[name] = int(text)
        except ValueError:
            raise ConfigError(f"{name}={text!r} is not a number; {rank_remedy()}") from None
    world_size = number.pop("WORLD_SIZE")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world_size > 1 and missing:
        raise ConfigError(f"WORLD_SIZE={world_size} comes without {', '.join(missing)}; {rank_remedy()}")
    for name, value in number.items():
        if not 0 <= value < world_size:
            text = f"{name}={value} is none of the {world_size} ranks that WORLD_SIZE means"
            raise ConfigError(f"{text}; {rank_remedy()}")
    return number["RANK"], world_size


def rank_remedy() -> str:
    """What to do about the rank variables that are set, by name."""
    given = [name for name in RANK_VARIABLES if name in os.environ]
    return f"start every rank with torchrun, or remove what another launcher left: unset {' '.join(given)}"


def activate(device: str) -> None:
    """Makes verl use ``device`` (``"cpu"`` or ``"cuda"``) in this process and in its children: it loads
    ``VERL_USE_EXTERNAL_MODULES`` when it is imported, and picks its platform from ``VERL_PLATFORM`` when it first needs
    it. Raises ``RuntimeError`` when verl has already picked another device in this process."""
    os.environ["VERL_PLATFORM"] = _PLATFORMS[device]
    if "verl" in sys.modules:
        from verl.plugin.platform import platform_manager

        # verl has no question for "picked already?"; asking get_platform() would pick.
        current = platform_manager._current_platform
        if current is not None and current.device_name != device:
            text = f"verl has already picked {current.device_name!r} in this process"
            raise RuntimeError(f"{text}; build the trainer ({device!r}) before anything else that uses verl")
        importlib.import_module(_PLUGIN)
    os.environ["VERL_USE_EXTERNAL_MODULES"] = _with_plugin()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("torch.fx._symbolic_trace").addFilter(
        lambda record: "is_fx_tracing will return true" not in record.getMessage()
    )


def ray_environment(device: str) -> dict[str, str]:
    """Returns the variables that every process of a run on ``"cpu"`` or ``"cuda"`` needs. Put them into the driver's
    ``os.environ``, before its first import of verl, and into Ray's ``runtime_env``."""
    defaults = _QUIET | {
        # Threads that spin while they wait take the cores from the other processes of the same machine.
        "OMP_WAIT_POLICY": "PASSIVE",
        # Ray would hide devices from actors that ask for none, and warn about it; logical GPUs have no devices.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # TransferQueue warns at every message of more threads than there are physical cores.
        "TQ_NUM_THREADS": str(max(1, min(8, (os.cpu_count() or 1) // 2))),
    }
    return {name: os.environ.get(name, value) for name, value in defaults.items()} | {
        "VERL_PLATFORM": _PLATFORMS[device],
        "VERL_USE_EXTERNAL_MODULES": _with_plugin(),
    }
