"""``atropos-verl``: the command line. Nothing heavy is imported before Ctrl-C is heeded and the subcommand is known."""

import atexit
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from types import ModuleType

from atropos_verl import __version__
from atropos_verl.errors import ConfigError

_COMMANDS = {
    "train": ("launch.train", "train a policy on an Atropos environment; train --help lists its key=value settings"),
    "launch": ("launch.launch", "start and watch all of a run: API, trainer, environments; launch --help lists keys"),
    "serve-api": ("server.app", "serve the trajectory API that environments post to and a trainer takes batches from"),
    "doctor": ("launch.doctor", "say what this machine can run and what is missing, before anything slow starts"),
    "inspect": ("report.inspect", "show what the trainer would see in a run, a batch, groups or a quarantine file"),
    "simulate": ("", "predict throughput, idle shares and staleness of a configuration, on a virtual clock"),
    "agents": ("agents.runner", "run your agent on tasks, for a run that trains on its rollouts; or evaluate it"),
    "environments": ("environments.serve", "serve one of verifiers, OpenEnv, NeMo Gym or Harbor to the trainer"),
    "report": ("report.run_report", "show what came of a run, or compare; --survivors: rollouts never trained on"),
    "view": ("report.view", "serve a page of runs, live and afterwards: curves, processes, rollouts token by token"),
}
"""Subcommand → its module, which has ``add_arguments`` and ``run``, or a ``main`` for words of its own; its help."""


def main(argv: Sequence[str] | None = None, config_name: str | None = None) -> int:
    """Run a subcommand; returns the exit code. 0: done; 1: it failed; 2: the command is wrong; 130: Ctrl-C. Without a
    file in their words, ``train`` and ``launch`` take ``config_name``."""
    words, code = list(sys.argv[1:] if argv is None else argv), 0
    on_interrupt = signal.getsignal(signal.SIGINT)
    if on_interrupt is signal.default_int_handler:  # a shell has it ignored in what runs in the background
        signal.signal(signal.SIGINT, _end_at_once)
    try:
        command = _load(words, config_name)
        if words[:1] not in (["train"], ["launch"]):  # which read settings first, and heed it when they have begun
            signal.signal(signal.SIGINT, on_interrupt)
        code = command()
        sys.stdout.flush()
    except ConfigError as error:
        # A verb that only looks has no configuration: what it was shown is not there yet, or is something else.
        starts = words[0] in ("serve-api", "agents", "environments")
        sys.stderr.write(f"{'CONFIGURATION ERROR: ' if starts else ''}{error}\n")
        code = 2
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        code = 130
    except BrokenPipeError:  # `| head`: what was wanted has been read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
    # What libraries do at the end takes a second. Theirs run after this one, the last that is registered.
    atexit.register(signal.signal, signal.SIGINT, lambda *_: os._exit(code))
    return code


def _end_at_once(*_: object) -> None:
    """There is nothing to put away yet, and an exception in the middle of an import is lost now and then."""
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


def _load(words: list[str], config_name: str | None) -> Callable[[], int]:
    """What ``words`` mean, its module imported. Raises ``SystemExit`` for ``--help`` and words that are wrong."""
    import argparse

    parser = argparse.ArgumentParser(
        "atropos-verl", description="Train language models with verl on Atropos RL environments.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"atropos-verl {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, (module_name, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if words[:1] == [name]:
            module = _simulator() if name == "simulate" else import_module(f"atropos_verl.{module_name}")
            if hasattr(module, "main"):
                return partial(module.main, words[1:], config_name)
            module.add_arguments(command)
            return partial(module.run, command.parse_intermixed_args(words[1:]))
    parser.parse_args(words)
    parser.print_help()
    return lambda: 2


def _simulator() -> ModuleType:
    """Imports the simulator, which is in a checkout and not in a wheel. Exits with 2 where it is not there."""
    from pathlib import Path

    sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
    try:
        return import_module("simulate.main")
    except ModuleNotFoundError as error:  # a directory of that name, somebody's, is a package without it
        if error.name not in ("simulate", "simulate.main"):
            raise
        sys.stderr.write("no simulator here: it is part of a checkout (tools/simulate/), not of the wheel\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    sys.exit(main())
