"""What verl needs to run where we run it: a CPU platform, engines, trackers. Registrations only, failing loudly.

``activate(device)`` prepares the environment variables verl reads at import; call it before the first verl import.
"""

from __future__ import annotations

import importlib
import os
import sys

__all__ = ["activate"]


def activate(device: str) -> None:
    """Make verl use ``device`` (``"cpu"`` or ``"cuda"``) in this process and in its children.

    verl loads ``VERL_USE_EXTERNAL_MODULES`` when it is imported, and picks its platform from ``VERL_PLATFORM`` when it
    first needs it. (Plugins found by entry point fail silently in verl 0.9.1; those named by this variable raise.)

    Raises:
        RuntimeError: verl has already picked another device in this process.
    """
    os.environ["VERL_PLATFORM"] = {"cpu": "cpu", "cuda": "nvidia"}[device]
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
    modules = [name for name in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",") if name]
    if device == "cpu" and module not in modules:
        os.environ["VERL_USE_EXTERNAL_MODULES"] = ",".join([*modules, module])
    # Nothing here may be fetched from a hub behind the user's back, and Ray must not phone home.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
