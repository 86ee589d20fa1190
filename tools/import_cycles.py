"""Finds import cycles of a package: ``python tools/import_cycles.py [PACKAGE]``. The exit code is 1 when there is one.

The graph has an edge from A to B when

- A imports B anywhere: at module level, inside a function, or under ``TYPE_CHECKING``. grimp finds all three.
- B is the package that A lies in. Importing ``a.b.c`` runs ``a/__init__.py`` and ``a/b/__init__.py`` first, which grimp
  leaves out. Such an edge closes a cycle only when that ``__init__`` imports something itself, so the ``__init__`` of
  a package imports nothing of its own package. This includes the root: it loads its exports by name on first use, and
  their types are in ``__init__.pyi``, which no interpreter runs.

Modules that are named by a string (``importlib``, ``python -m``, worker classes in settings of verl) are no edges,
because only the run decides whether they are loaded. They are listed for the reader.
"""

import argparse
import ast
import graphlib
import importlib.util
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import grimp


def find_cycles(package: str) -> list[str]:
    """Cycles of the package, one line per import with its place in the source. No two of them share an import.

    ``package`` must be importable; it is not imported.
    """
    graph = grimp.build_graph(package, include_external_packages=False, cache_dir=None)
    edges = {
        module: graph.find_modules_directly_imported_by(module) | ({module.rpartition(".")[0]} - {""})
        for module in graph.modules
    }
    cycles = []
    while True:
        try:
            graphlib.TopologicalSorter(edges).prepare()
            return cycles
        except graphlib.CycleError as error:
            path: list[str] = error.args[1][::-1]  # graphlib names the imported module first
        lines = []
        for importer, imported in itertools.pairwise(path):
            details = graph.get_import_details(importer=importer, imported=imported)
            reason = f"line {details[0]['line_number']}: {details[0]['line_contents']}" if details else "lies in it"
            lines.append(f"  {importer} -> {imported}  ({reason})")
            if imported != importer.rpartition(".")[0]:
                edges[importer].discard(imported)
        cycles.append("\n".join(lines))


def named_by_strings(root: Path) -> Iterator[tuple[str, str]]:
    """``(file, module)`` for each module of the package that a string in its Python or YAML files names."""
    package = root.name
    names = re.compile(rf"(?<![\w.]){package}(?:\.\w+)+")
    for file in sorted(root.rglob("*")):
        if file.suffix == ".py":
            nodes = list(ast.walk(ast.parse(file.read_bytes())))
            docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            constants = (node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings)
            texts = [value for value in constants if isinstance(value, str)]
        elif file.suffix in (".yaml", ".yml"):
            texts = [line.partition("#")[0] for line in file.read_text().splitlines()]
        else:
            continue
        found = {_module_of(name, root) for text in texts for name in names.findall(text)}
        yield from ((str(file.relative_to(root)), module) for module in sorted(found - {""}))


def _module_of(name: str, root: Path) -> str:
    """The longest beginning of a dotted name that is a module below ``root``; "" when none is."""
    parts = name.split(".")
    for end in range(len(parts), 1, -1):
        path = root.joinpath(*parts[1:end])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return ".".join(parts[:end])
    return ""


def main(words: Sequence[str] | None = None) -> int:
    """Prints the cycles and the modules named by strings. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Find import cycles of a package; the exit code is 1 when there is one.", allow_abbrev=False
    )
    parser.add_argument("package", nargs="?", default="atropos_verl", help="default: %(default)s")
    package = parser.parse_args(words).package
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        parser.error(f"{package} is not importable")
    cycles = find_cycles(package)
    for number, cycle in enumerate(cycles, start=1):
        sys.stdout.write(f"import cycle {number}\n{cycle}\n")
    for file, module in named_by_strings(Path(spec.origin).parent):
        sys.stdout.write(f"named by a string: {module} in {file}\n")
    sys.stdout.write(f"{len(cycles)} import cycles in {package}\n")
    return 1 if cycles else 0


if __name__ == "__main__":
    sys.exit(main())
