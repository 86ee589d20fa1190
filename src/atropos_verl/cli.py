"""``atropos-verl``: the command line. Nothing heavy is imported before the subcommand is known."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]

_TRAIN_HELP = "train a policy on an Atropos environment; key=value settings as in verl (train --help lists them)"
_SERVE_HELP = "serve the trajectory API that environments post to and a trainer fetches batches from"
_LAUNCH_HELP = "start and watch everything of a run: API, trainer, environments (launch --help lists the settings)"
_DOCTOR_HELP = "check a machine and a configuration before a run"
_SIMULATE_HELP = "predict throughput, idle shares and staleness of a configuration, on a virtual clock"
_INSPECT_HELP = "show what the trainer would see in a batch, groups, a quarantine file, or at an API"
_REPORT_HELP = "show the result of a run, or compare several; --html FILE writes a page with every curve"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code. 0: done; 1: it failed; 2: the command is wrong; 130: Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"]:
        from atropos_verl.launch.train import main as train

        return train(words[1:])  # all its words are its own, --help included
    if words[:1] == ["launch"]:
        from atropos_verl.launch.launch import main as launch

        return launch(words[1:])
    options = _parser(words).parse_args(words)
    if options.command is None:
        _parser(words).print_help()
        return 2
    if options.command == "serve-api":
        from atropos_verl.server.main import run

        return run(options)
    if options.command == "report":
        return _report(options)
    if options.command == "doctor":
        return _doctor(options)
    if options.command == "simulate":
        return int(_simulator().run(options))
    return _inspect(options)


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    from atropos_verl import __version__

    parser = argparse.ArgumentParser(
        prog="atropos-verl", description="Train language models with verl on Atropos RL environments."
    )
    parser.add_argument("--version", action="version", version=f"atropos-verl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("train", help=_TRAIN_HELP, add_help=False)
    commands.add_parser("launch", help=_LAUNCH_HELP, add_help=False)
    serve = commands.add_parser("serve-api", help=_SERVE_HELP, description=_SERVE_HELP)
    if words[:1] == ["serve-api"]:
        from atropos_verl.server.main import add_arguments as add_server_arguments

        add_server_arguments(serve)
    doctor = commands.add_parser("doctor", help=_DOCTOR_HELP, description=_DOCTOR_HELP)
    if words[:1] == ["doctor"]:
        from atropos_verl.launch.doctor import add_arguments as add_doctor_arguments

        add_doctor_arguments(doctor)
    inspect = commands.add_parser("inspect", help=_INSPECT_HELP, description=_INSPECT_HELP)
    if words[:1] == ["inspect"]:  # its options come with numpy and the decoder of groups
        from atropos_verl.report.inspect import add_arguments

        add_arguments(inspect)
    simulate = commands.add_parser("simulate", help=_SIMULATE_HELP, description=_SIMULATE_HELP)
    if words[:1] == ["simulate"]:
        _simulator().add_arguments(simulate)
    report = commands.add_parser("report", help=_REPORT_HELP, description=_REPORT_HELP)
    if words[:1] == ["report"]:
        from atropos_verl.report.run_report import add_arguments as add_report_arguments

        add_report_arguments(report)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from atropos_verl.launch.doctor import run
    from atropos_verl.launch.launch import load_subject

    return run(options, load_subject)


def _report(options: argparse.Namespace) -> int:
    from atropos_verl.errors import ConfigError
    from atropos_verl.report.run_report import run

    try:
        return run(options)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def _inspect(options: argparse.Namespace) -> int:
    from atropos_verl.report.inspect import run

    # What the pipeline logs about the groups is shown in place, once.
    logging.basicConfig(level=logging.ERROR)
    try:
        code = run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head`: what was wanted has been read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _simulator() -> Any:
    """Imports the simulator, which is in a checkout and not in a wheel. Exits with 2 where it is not there."""
    tools = Path(__file__).resolve().parents[2] / "tools"
    if (tools / "simulate").is_dir():
        sys.path.append(str(tools))
    try:
        return importlib.import_module("simulate.main")
    except ModuleNotFoundError as error:
        if error.name not in ("simulate", "simulate.main"):
            raise
        sys.stderr.write("no simulator here: it is part of a checkout (tools/simulate/), not of the wheel\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    sys.exit(main())
