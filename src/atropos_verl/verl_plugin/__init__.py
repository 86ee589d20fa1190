"""Registers with verl what it lacks: a CPU platform, engines, rollout names. A registration that fails raises.

``activate(device)`` prepares the environment variables verl reads at import; call it before the first verl import.
"""

import importlib
import os
import sys

_PLATFORMS = {"cpu": "cpu", "cuda": "nvidia"}


def _with_module(module: str) -> str:
    """Returns ``VERL_USE_EXTERNAL_MODULES`` with ``module`` in it, once."""
    modules = [name for name in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",") if name]
    return ",".join(dict.fromkeys([*modules, module]))


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
