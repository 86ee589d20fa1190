"""Versions: what is installed against what our own package metadata demands. Nothing is imported for it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion

from atropos_verl.config.findings import Finding, missing, ok, warning

__all__ = ["check_compiler", "check_packages", "check_python", "requirements_of"]

_SECTION = "software"
_SHOWN = ("verl", "atroposlib", "torch", "transformers", "tensordict", "transferqueue")
"""Always listed; others only when something is wrong with them."""
_CLUSTER_ONLY = frozenset({"transferqueue"})
_PYTHON = ((3, 11), (3, 12))


def check_python(version: tuple[int, int] | None = None) -> Finding:
    version = version or (sys.version_info.major, sys.version_info.minor)
    found = f"{version[0]}.{version[1]} ({sys.executable})"
    if _PYTHON[0] <= version <= _PYTHON[1]:
        return ok(_SECTION, "python", found)
    return missing(
        _SECTION, "python", found, "use Python 3.11 or 3.12: verl 0.9.1's dependencies have wheels for these"
    )


def requirements_of(package: str = "atropos-verl", path: Sequence[str] | None = None) -> list[Requirement]:
    """What ``package`` demands without its extras; empty where its metadata is not installed."""
    found = _distribution(package, path)
    parsed = []
    for text in (found.requires if found is not None else None) or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            parsed.append(requirement)
    return parsed


def check_packages(
    requirements: Iterable[Requirement], *, backend: str = "local", path: Sequence[str] | None = None
) -> list[Finding]:
    """One finding per package that matters or is wrong.

    Args:
        backend: packages that only Ray's backend imports are no error with ``local``.
        path: where to look for distributions; None: ``sys.path``.
    """
    findings = []
    for requirement in requirements:
        name = requirement.name.lower()
        finding = _check(requirement, path)
        if finding.status == "missing" and name in _CLUSTER_ONLY and backend == "local":
            finding = warning(_SECTION, requirement.name, finding.found, f"only backend=ray needs it; {finding.todo}")
        if finding.status != "ok" or name in _SHOWN:
            findings.append(finding)
    if not findings:
        todo = "install it: make install, or pip install -e . in a checkout"
        return [warning(_SECTION, "atropos-verl", "its package metadata is not installed: no versions known", todo)]
    return findings


def check_compiler(*, needed_for: str = "") -> Finding:
    """A C++ compiler: torch.compile and vLLM's CPU backend call one."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is not None:
        return ok(_SECTION, "C++ compiler", found)
    if needed_for:
        return missing(
            _SECTION, "C++ compiler", "none", f"{needed_for} compiles kernels: install g++ (apt install g++)"
        )
    return ok(_SECTION, "C++ compiler", "none (needed by torch.compile and by vLLM on a CPU only)")


def _check(requirement: Requirement, path: Sequence[str] | None) -> Finding:
    installed = _distribution(requirement.name, path)
    wanted = str(requirement.specifier) or "any version"
    command = f"pip install '{requirement.name}{requirement.specifier}'"
    if installed is None:
        return missing(_SECTION, requirement.name, f"not installed, {wanted} is needed", command)
    version = installed.version
    try:
        fits = requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        fits = False
    if not fits:
        return missing(_SECTION, requirement.name, f"{version}, {wanted} is needed", command)
    return ok(_SECTION, requirement.name, version)


def _distribution(name: str, path: Sequence[str] | None) -> metadata.Distribution | None:
    if path is None:
        try:
            return metadata.distribution(name)
        except metadata.PackageNotFoundError:
            return None
    return next(iter(metadata.distributions(name=name, path=list(path))), None)
