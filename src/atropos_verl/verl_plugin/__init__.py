"""Registers with verl what it lacks: a CPU platform, engines, rollout names. A registration that fails raises.

``activate(device)`` prepares the environment variables verl reads at import; call it before the first verl import.
"""

import importlib
import logging
import os
import sys

from atropos_verl.errors import ConfigError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells a process of its ranks. Other launchers leave them to what they start, whole or in part."""
DROPOUT_VARIABLE = "ATROPOS_VERL_DROPOUT"
"""``1`` in the environment of a training process of Ray: dropout is on in the update (``atropos.model.dropout``)."""
_PLATFORMS = {"cpu": "cpu", "cuda": "nvidia"}


def _with_module(module: str) -> str:
    """Returns ``VERL_USE_EXTERNAL_MODULES`` with ``module`` in it, once."""
    modules = [name for name in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",") if name]
    return ",".join(dict.fromkeys([*modules, module]))


def own_rank() -> tuple[int, int]:
    """This process's rank and the number of ranks, by what torchrun put into the environment; (0, 1) without it.

    Raises ``ConfigError``, which names the variables, when they cannot be those of one run.
    """
    try:
        world_size = _number("WORLD_SIZE", 1)
        rank, local_rank = _number("RANK", 0), _number("LOCAL_RANK", 0)
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if world_size > 1 and missing:
            raise ValueError(f"WORLD_SIZE={world_size} comes without {', '.join(missing)}")
        for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
            if not 0 <= value < world_size:
                raise ValueError(f"{name}={value} is none of the {world_size} ranks that WORLD_SIZE means")
    except ValueError as error:
        raise ConfigError(f"{error}; {rank_remedy()}") from None
    return rank, world_size


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a number") from None


def rank_remedy() -> str:
    """What to do about the rank variables that are set, by name."""
    given = [name for name in RANK_VARIABLES if name in os.environ]
    return f"start every rank with torchrun, or remove what another launcher left: unset {' '.join(given)}"


def activate(device: str) -> None:
    """Makes verl use ``device`` (``"cpu"`` or ``"cuda"``) in this process and in its children.

    verl loads ``VERL_USE_EXTERNAL_MODULES`` when it is imported, and picks its platform from ``VERL_PLATFORM`` when it
    first needs it. (Plugins found by entry point fail silently in verl 0.9.1; those named by this variable raise.)

    Raises:
        RuntimeError: verl has already picked another device in this process.
    """
    os.environ["VERL_PLATFORM"] = _PLATFORMS[device]
    module = "atropos_verl.verl_plugin.platform_cpu"
    if "verl" in sys.modules:
        from verl.plugin.platform import platform_manager

        # verl has no question for "picked already?"; asking get_platform() would pick.
        current = platform_manager._current_platform
        if current is not None and current.device_name != device:
            raise RuntimeError(
                f"verl has already picked {current.device_name!r} in this process; build the trainer ({device!r}) "
                "before anything else that uses verl"
            )
        if device == "cpu":
            importlib.import_module(module)
    if device == "cpu":
        os.environ["VERL_USE_EXTERNAL_MODULES"] = _with_module(module)
    # Nothing here may be fetched from a hub behind the user's back, and Ray must not phone home.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # verl's own default lets some of its modules say on standard error what they do.
    os.environ.setdefault("VERL_LOGGING_LEVEL", "WARN")
    logging.getLogger("torch.fx._symbolic_trace").addFilter(
        lambda record: "is_fx_tracing will return true" not in record.getMessage()
    )


def ray_environment(device: str) -> dict[str, str]:
    """Returns the variables that every process of a Ray run needs, the driver included (before its first verl import).

    Put them into ``os.environ`` of the driver and into Ray's ``runtime_env``. ``device``: ``"cpu"`` or ``"cuda"``.
    """
    variables = {
        "VERL_PLATFORM": _PLATFORMS[device],
        "VERL_USE_EXTERNAL_MODULES": _with_module("atropos_verl.verl_plugin.plugin"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        # Threads that spin while they wait take the cores from the other processes of the same machine.
        variables["OMP_WAIT_POLICY"] = "PASSIVE"
        # Ray would hide devices from actors that ask for none, and warn about it; logical GPUs have no devices.
        variables["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    return variables
