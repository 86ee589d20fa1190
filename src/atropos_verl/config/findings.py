"""One finding of the doctor, and how all of them are shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["SECTIONS", "Finding", "as_json", "exit_code", "missing", "ok", "show", "warning"]

Status = Literal["ok", "warning", "missing"]
SECTIONS = ("configuration", "software", "machine", "placement", "model", "network", "environments")
"""In the order of showing."""
_STYLES = {"ok": "green", "warning": "yellow", "missing": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, what was found, and what to do about it."""

    section: str
    name: str
    status: Status
    found: str
    todo: str = ""


def ok(section: str, name: str, found: str) -> Finding:
    return Finding(section, name, "ok", found)


def warning(section: str, name: str, found: str, todo: str) -> Finding:
    """It runs, but slower, or with a limit."""
    return Finding(section, name, "warning", found, todo)


def missing(section: str, name: str, found: str, todo: str) -> Finding:
    """The run would fail."""
    return Finding(section, name, "missing", found, todo)


def exit_code(findings: Sequence[Finding]) -> int:
    """1 when something is missing."""
    return int(any(finding.status == "missing" for finding in findings))


def as_json(findings: Sequence[Finding]) -> str:
    return json.dumps({"ok": exit_code(findings) == 0, "findings": [asdict(finding) for finding in findings]}, indent=1)


def show(findings: Sequence[Finding], console: Console) -> None:
    """A table, and below it what to do."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("checked", no_wrap=True)
    table.add_column("found", overflow="fold")
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            table.add_row("", Text(section, style="bold"), "")
        status = Text(finding.status, style=_STYLES[finding.status])
        table.add_row(status, Text(f"  {finding.name}"), Text(finding.found))
    console.print(table)
    todo = [finding for finding in findings if finding.status != "ok"]
    for finding in sorted(todo, key=lambda finding: finding.status != "missing"):
        console.print(Text(f"\n{finding.status}: {finding.section}, {finding.name}: {finding.found}", style="bold"))
        console.print(Text(f"  {finding.todo}"))
    lacking = sum(finding.status == "missing" for finding in findings)
    warned = len(todo) - lacking
    verdict = "this run would fail" if lacking else "ready"
    console.print(Text(f"\n{verdict}: {len(findings) - len(todo)} ok, {warned} warnings, {lacking} missing"))
