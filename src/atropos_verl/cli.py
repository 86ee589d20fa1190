"""``atropos-verl``: the command line. Nothing heavy is imported before the subcommand is known."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_OWN_WORDS = {
    "train": "train a policy on an Atropos environment; key=value settings as in verl (train --help lists them)",
    "launch": "start and watch everything of a run: API, trainer, environments (launch --help lists the settings)",
}
"""Subcommands whose words are all their own, --help included, and their help."""
_COMMANDS = {
    "serve-api": ("server.app", "serve the trajectory API that environments post to and a trainer takes batches from"),
    "doctor": ("launch.doctor", "say what this machine can run and what is missing, before anything slow starts"),
    "inspect": ("report.inspect", "show what the trainer would see in a run, a batch, groups or a quarantine file"),
    "simulate": ("", "predict throughput, idle shares and staleness of a configuration, on a virtual clock"),
    "agents": ("agents.runner", "run an agent that exists already on tasks, its rollouts trained on; or evaluate it"),
    "environments": ("environments.serve", "serve one of verifiers, OpenEnv, NeMo Gym or Harbor to the trainer"),
    "report": ("report.run_report", "show what came of a run, or compare; --survivors: rollouts never trained on"),
    "view": ("report.view", "serve a page of runs, live and afterwards: curves, processes, rollouts token by token"),
}
"""Subcommand → its module, which has ``add_arguments`` and ``run``, and its help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code. 0: done; 1: it failed; 2: the command is wrong; 130: Ctrl-C."""
    from atropos_verl import __version__
    from atropos_verl.errors import ConfigError

    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in _OWN_WORDS:
        return int(importlib.import_module(f"atropos_verl.launch.{words[0]}").main(words[1:]))
    parser = argparse.ArgumentParser(
        prog="atropos-verl", description="Train language models with verl on Atropos RL environments."
    )
    parser.add_argument("--version", action="version", version=f"atropos-verl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in _OWN_WORDS.items():
        commands.add_parser(name, help=text, add_help=False)
    module: Any = None
    for name, (module_name, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if words[:1] == [name]:
            module = _simulator() if name == "simulate" else importlib.import_module(f"atropos_verl.{module_name}")
            module.add_arguments(command)
    options = parser.parse_args(words)
    if module is None:
        parser.print_help()
        return 2
    if options.command == "inspect":
        # What the pipeline logs about the groups is shown in place, once.
        logging.basicConfig(level=logging.ERROR)
    try:
        code = int(module.run(options))
        sys.stdout.flush()
    except ConfigError as error:
        # A verb that only looks has no configuration: what it was shown is not there yet, or is something else.
        starts = words[0] in ("serve-api", "agents", "environments")
        sys.stderr.write(f"{'CONFIGURATION ERROR: ' if starts else ''}{error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head`: what was wanted has been read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _simulator() -> Any:
    """Imports the simulator, which is in a checkout and not in a wheel. Exits with 2 where it is not there."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
    try:
        return importlib.import_module("simulate.main")
    except ModuleNotFoundError as error:
        if error.name not in ("simulate", "simulate.main"):
            raise
        sys.stderr.write("no simulator here: it is part of a checkout (tools/simulate/), not of the wheel\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    sys.exit(main())
