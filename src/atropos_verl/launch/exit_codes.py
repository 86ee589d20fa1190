"""How a training command ends: one message, and the exit code that belongs to it.

Exit codes: 0 done; 1 the run failed (API, a service, diverged, …); 2 the configuration is wrong; 130 Ctrl-C.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from types import FrameType

from atropos_verl.errors import AtroposVerlError, ConfigError

__all__ = ["exit_code_of"]

logger = logging.getLogger(__name__)


def exit_code_of(run: Callable[[], int]) -> int:
    """Run a command's body; what it raises becomes a message on standard error and an exit code.

    From here on a plain ``kill`` ends the process as Ctrl-C does: every ``finally`` runs, and so the children end.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return run()
    except KeyboardInterrupt as error:
        _say("interrupted", error)
        return 130
    except ConfigError as error:
        _say(f"CONFIGURATION ERROR: {error}", error)
        return 2
    except (AtroposVerlError, OSError) as error:
        logger.error("the run failed", exc_info=error)
        _say(str(error), error)
        return 1


def _say(text: str, error: BaseException) -> None:
    notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", []))
    sys.stderr.write(f"\n{text}{notes}\n")


def _terminate(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    raise KeyboardInterrupt
