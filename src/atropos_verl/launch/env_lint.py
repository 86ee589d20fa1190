"""A static look at an environment for the mistake that costs most time.

An environment whose ``config_init`` returns ``(config, APIServerConfig(...))`` instead of
``(config, [APIServerConfig(...)])`` ignores ``--openai.base_url``: Atropos then asks localhost:9004-9007 for ever.
Nothing is imported or run: environments need packages that this interpreter may not have.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

__all__ = ["bare_server_config"]


def bare_server_config(script: Path) -> int | None:
    """The line of ``script`` where a ``config_init`` returns a bare ``APIServerConfig``; None: none was found.

    Followed are literal tuples and names assigned in the same function; anything cleverer passes unseen. A file that
    is no Python (it fails soon enough by itself) gives None.
    """
    try:
        tree = ast.parse(script.read_bytes(), str(script))
    except (OSError, SyntaxError, ValueError):
        return None
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and function.name == "config_init":
            for line in _bare_returns(function):
                return line
    return None


def _bare_returns(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[int]:
    assigned: dict[str, ast.expr] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    assigned[target.id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            assigned[node.target.id] = node.value
    for node in ast.walk(function):
        if not isinstance(node, ast.Return) or node.value is None:
            continue
        value = _followed(node.value, assigned)
        if isinstance(value, ast.Tuple) and len(value.elts) == 2:
            server = _followed(value.elts[1], assigned)
            if isinstance(server, ast.Call) and _called(server) == "APIServerConfig":
                yield node.lineno


def _followed(value: ast.expr, assigned: dict[str, ast.expr]) -> ast.expr:
    return assigned.get(value.id, value) if isinstance(value, ast.Name) else value


def _called(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
