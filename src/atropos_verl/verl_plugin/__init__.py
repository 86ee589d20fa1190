"""What verl needs to run where we run it: a CPU platform, engines, trackers. Registrations only, failing loudly.

``activate(device)`` prepares the environment variables verl reads at import; call it before the first verl import.
"""

from __future__ import annotations

import os
import sys

__all__ = ["activate"]


def activate(device: str) -> None:
    """Make verl use ``device`` (``"cpu"`` or ``"cuda"``) in this process and in its children.

    verl picks its platform once, at import, from ``VERL_PLATFORM`` and loads ``VERL_USE_EXTERNAL_MODULES`` then.
    (Plugins found by entry point fail silently in verl 0.9.1; those named by this variable raise.)

    Raises:
        RuntimeError: verl was imported before, for another device.
    """
    platform = {"cpu": "cpu", "cuda": "nvidia"}[device]
    if "verl" in sys.modules and os.environ.get("VERL_PLATFORM") != platform:
        raise RuntimeError(f"verl was imported before atropos_verl could choose device {device!r}; import it later")
    os.environ["VERL_PLATFORM"] = platform
    module = "atropos_verl.verl_plugin.platform_cpu"
    modules = [name for name in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",") if name]
    if device == "cpu" and module not in modules:
        os.environ["VERL_USE_EXTERNAL_MODULES"] = ",".join([*modules, module])
    # Nothing here may be fetched from a hub behind the user's back, and Ray must not phone home.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
