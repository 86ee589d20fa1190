"""Each environment's interpreter: is it there, and has it what the script imports? The script itself is not run."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from atropos_verl.config.findings import Finding, missing, ok, warning

__all__ = ["check_environment", "imported_modules"]

_SECTION = "environments"
_SECONDS = 20.0
_ATROPOSLIB = "0.4.0"
_LOOK = """
import importlib.util, json, sys
from importlib import metadata
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
sys.path.insert(0, sys.argv[1])
print(json.dumps({
    "python": sys.version.split()[0],
    "versions": {name: version(name) for name in ("atroposlib", "transformers")},
    "lacking": [name for name in sys.argv[2:] if not there(name)],
}))
"""


def check_environment(
    name: str,
    python: str,
    script: Path | None,
    *,
    module: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> list[Finding]:
    """What ``python`` would find when it runs ``script`` (or ``module``).

    Args:
        name: of the environment.
        variables: its process environment; None: ours.
    """
    modules: Sequence[str] = [module.split(".")[0]] if module else []
    source = b""
    if script is not None:
        try:
            source = script.read_bytes()
            modules = imported_modules(source, script)
        except OSError as error:
            return [
                missing(_SECTION, name, f"cannot read {script}: {error.strerror}", f"set environments.{name}.script")
            ]
        except SyntaxError as error:
            return [missing(_SECTION, name, f"{script}, line {error.lineno}: {error.msg}", "mend the script")]
    directory = str(script.parent) if script is not None else ""
    command = [python, "-c", _LOOK, directory, *modules]
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            env=None if variables is None else dict(variables),
        )
        seen = json.loads(answer.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it prints no answer"
        return [missing(_SECTION, name, f"{python} cannot be used: {why}", f"set environments.{name}.python")]
    return _judge(name, python, seen, uses_tokenize=b"tokenize_for_trainer" in source)


def imported_modules(source: bytes, script: Path) -> list[str]:
    """Top-level modules that ``script`` imports when it is loaded, the standard library's left out.

    Imports inside functions and under ``try`` may be optional and are not counted. Raises ``SyntaxError``.
    """
    found: dict[str, None] = {}
    for node in ast.parse(source, str(script)).body:
        if isinstance(node, ast.Import):
            found.update(dict.fromkeys(alias.name.split(".")[0] for alias in node.names))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found[node.module.split(".")[0]] = None
    return [name for name in found if name not in sys.stdlib_module_names and name != "__future__"]


def _judge(name: str, python: str, seen: Mapping[str, object], *, uses_tokenize: bool) -> list[Finding]:
    versions = seen["versions"]
    assert isinstance(versions, Mapping)
    lacking = [str(module) for module in seen["lacking"]] if isinstance(seen["lacking"], list) else []
    atroposlib, transformers = versions.get("atroposlib"), versions.get("transformers")
    install = f"{python} -m pip install"
    if atroposlib is None:
        return [missing(_SECTION, name, f"{python} has no atroposlib", f"{install} atroposlib=={_ATROPOSLIB}")]
    if lacking:
        text = f"the script imports {', '.join(lacking)}, which {python} has not"
        return [missing(_SECTION, name, text, f"{install} what provides them, or set environments.{name}.python")]
    text = f"python {seen['python']}, atroposlib {atroposlib}, transformers {transformers or 'none'}"
    if atroposlib != _ATROPOSLIB:
        todo = f"the launcher's arguments are those of {_ATROPOSLIB}; environments.{name}.omit leaves out what it lacks"
        return [warning(_SECTION, name, text, todo)]
    if uses_tokenize and str(transformers or "").startswith("5"):
        todo = f"the script's tokenize_for_trainer needs transformers 4: give it environments.{name}.python of its own"
        return [missing(_SECTION, name, text, todo)]
    return [ok(_SECTION, name, text)]
