"""The scripts under ``examples/`` as modules."""

import sys
from importlib import util
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load_example(name: str) -> ModuleType:
    """``examples/NAME`` executed as a module of its own; it is no package, so nothing could import it."""
    path = EXAMPLES / name
    spec = util.spec_from_file_location(f"_demo_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
