"""The command: gather every finding for one configuration, show them, exit 0 or 1."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from atropos_verl.config.findings import SECTIONS, Finding, as_json, exit_code, missing, show
from atropos_verl.config.launch_schema import EnvironmentConfig, LaunchConfig
from atropos_verl.config.model_checks import check_model, weight_bytes
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import ConfigError
from atropos_verl.launch.doctor.environments import check_environment
from atropos_verl.launch.doctor.machine import (
    check_disk,
    check_gpus,
    check_limits,
    check_machine,
    check_shared_memory,
    list_gpus,
)
from atropos_verl.launch.doctor.network import check_api, check_port
from atropos_verl.launch.doctor.placement import check_placement
from atropos_verl.launch.doctor.software import check_compiler, check_packages, check_python, requirements_of
from atropos_verl.launch.environments import interpreter, program_of

__all__ = ["Subject", "add_arguments", "examine", "run"]


@dataclass(frozen=True, slots=True)
class Subject:
    """The configuration that is looked at."""

    config: RunConfig
    launch: LaunchConfig
    backend: str = "local"
    verl: Mapping[str, Any] = field(default_factory=dict)
    """verl's own settings, with ``backend=ray``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings, as for train and launch")
    parser.add_argument("--config-name", help="a file of the configuration directory (default: the demo)")
    parser.add_argument("--config-dir", type=Path, help="another config directory")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, load: Callable[[Sequence[str], Path | None, str | None], Subject]) -> int:
    """0: everything is there; 1: something is missing.

    Args:
        load: words, config directory and name → what they mean; raises ``ConfigError``.
    """
    try:
        findings = examine(load(options.words, options.config_dir, options.config_name))
    except ConfigError as error:
        findings = [missing("configuration", error.key or "file", str(error), "correct it; --help of train and launch")]
    if options.json:
        sys.stdout.write(as_json(findings) + "\n")
    else:
        show(findings, Console())
    return exit_code(findings)


def examine(subject: Subject) -> list[Finding]:
    """Every check that applies; the slow ones (subprocesses, HTTP) at the same time."""
    config, launch = subject.config, subject.launch
    with ThreadPoolExecutor(max_workers=8) as pool:
        gpus = pool.submit(list_gpus)
        environments = [
            pool.submit(_environment, name, settings)
            for name, settings in (launch.chosen if launch.starts("environments") else {}).items()
        ]
        api = pool.submit(_api, subject)
        findings = [check_python(), *check_packages(requirements_of(), backend=subject.backend)]
        findings.append(check_compiler(needed_for=_compiles(subject)))
        findings += check_machine()
        found = gpus.result()
        findings.append(check_gpus(found, device=_device(subject), needed=_ranks(subject)))
        findings.append(check_limits())
        findings.append(_shared_memory(subject))
        findings += _model_and_disk(subject)
        if launch.starts("trainer"):
            findings.append(check_port("gateway.port", config.gateway.host, config.gateway.port))
        findings.append(api.result())
        if subject.backend == "ray":
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            findings += check_placement(subject.verl, gpus=len(found or ()), cores=cores)
        for future in environments:
            findings += future.result()
    return sorted(findings, key=lambda finding: SECTIONS.index(finding.section))


def _environment(name: str, settings: EnvironmentConfig) -> list[Finding]:
    try:
        python = interpreter(settings.python, f"environments.{name}.python")
        program = program_of(name, settings)
    except ConfigError as error:
        return [missing("environments", name, str(error), "correct the path")]
    script = None if program[0] == "-m" else Path(program[0])
    variables = {**os.environ, **settings.env}
    return check_environment(name, python, script, module=settings.module, variables=variables)


def _api(subject: Subject) -> Finding:
    config, api = subject.config.atropos, subject.launch.api
    if config.api_url is not None:
        return check_api(config.api_url, config.token)
    if not subject.launch.starts("api"):
        return missing("network", "trajectory API", "no URL, and only= leaves it out", "set atropos.api_url")
    return check_port("api.port", api.host, api.port)


def _model_and_disk(subject: Subject) -> list[Finding]:
    config, findings, size = subject.config, [], 0
    try:
        model_path = config.resolve_model_path()
    except (ConfigError, FileNotFoundError) as error:
        findings.append(missing("model", "path", str(error), "set model.path to a Hugging Face directory"))
    else:
        findings += check_model(config, model_path)
        size = weight_bytes(model_path)
    saves = config.save_freq > 0
    kept = config.trainer.max_ckpt_to_keep
    return [*findings, *check_disk(config.resolve_run_dir(), model_bytes=size if saves else 0, checkpoints=kept)]


def _device(subject: Subject) -> str:
    if subject.backend == "ray":
        return str(subject.verl.get("trainer", {}).get("device") or "cuda")
    return subject.config.trainer.device


def _ranks(subject: Subject) -> int:
    if subject.backend == "ray":
        return int(subject.verl.get("trainer", {}).get("n_gpus_per_node") or 1)
    return subject.launch.trainer_process.nproc


def _shared_memory(subject: Subject) -> Finding:
    if subject.backend != "ray":
        return check_shared_memory()
    asked = subject.verl.get("ray_kwargs", {}).get("ray_init", {}).get("object_store_memory")
    return check_shared_memory(object_store=asked, ray=True)


def _compiles(subject: Subject) -> str:
    if subject.backend != "ray" or _device(subject) != "cpu":
        return ""
    rollout = subject.verl.get("actor_rollout_ref", {}).get("rollout", {})
    return "vLLM on a CPU" if rollout.get("name") == "vllm" else ""
