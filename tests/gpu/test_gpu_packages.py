"""The packages that a GPU machine has (``make gpu-check STACK=vllm`` or ``sglang``), as far as no GPU is needed.

Skipped without ``ATROPOS_VERL_STACK``. Every import is in a process of its own: libraries change each other.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

import atropos_verl

STACK = os.environ.get("ATROPOS_VERL_STACK", "")
pytestmark = [
    pytest.mark.skipif(not STACK, reason="ATROPOS_VERL_STACK names no stack: see `make gpu-check`"),
    pytest.mark.slow,
]

_OPTIONAL = ("vllm", "sglang", "mooncake", "nixl", "checkpoint_engine", "torch_npu", "prefix_grouper")
"""Packages that a module of verl may lack: the other engine, other transports, and what no file here uses."""
_VERL = (
    "verl.checkpoint_engine",
    "verl.single_controller.ray",
    "verl.trainer.main_ppo",
    "verl.trainer.ppo",
    "verl.utils.checkpoint.fsdp_checkpoint_manager",
    "verl.workers.engine.fsdp",
    "verl.workers.engine_workers",
    "verl.workers.rollout.llm_server",
    "verl.workers.rollout.replica",
    f"verl.workers.rollout.{STACK}_rollout",
    f"verl.utils.{STACK}",
)
_DRIVER_FUNCTIONS = (
    "cuGetErrorString",
    "cuMemAddressFree",
    "cuMemGetAddressRange_v2",
    "cuMemRelease",
    "cuMemRetainAllocationHandle",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuPointerGetAttribute",
)
"""Those that sgl_kernel 0.4.2 is linked with."""
_IMPORT = """
import importlib, json, sys
from atropos_verl.backends.ray.run import set_environment
set_environment("cuda")
failures = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        failures[name] = [getattr(error, "name", None) or "", f"{type(error).__name__}: {error}"]
print("\\n" + json.dumps(failures))
"""


def _modules(package: str) -> Iterator[str]:
    """``package`` and every module below it, found without importing more than its parents."""
    yield package
    spec = importlib.util.find_spec(package)
    for found in pkgutil.iter_modules((spec and spec.submodule_search_locations) or ()):
        yield from _modules(f"{package}.{found.name}")


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a process. Without NVIDIA's driver SGLang's kernels are linked with one that says that there is no device."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1" if STACK == "sglang" else None)
        return dict(os.environ)
    directory = tmp_path_factory.mktemp("driver")
    source = "".join(f"int {name}(void) {{ return 100; }}\n" for name in _DRIVER_FUNCTIONS)
    (directory / "driver.c").write_text(source)
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1", "driver.c"]
    subprocess.run(command, cwd=directory, check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(directory)}


def _failures(variables: dict[str, str], *names: str) -> dict[str, str]:
    command = [sys.executable, "-c", _IMPORT, *names]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, env=variables)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    optional = tuple(package for package in _OPTIONAL if package != STACK)
    failures = json.loads(result.stdout.splitlines()[-1])
    return {name: text for name, (missing, text) in failures.items() if not missing.startswith(optional)}


def test_every_module_of_ours_is_imported(variables: dict[str, str]) -> None:
    names = [found.name for found in pkgutil.walk_packages(atropos_verl.__path__, "atropos_verl.")]
    # Adapters of other ecosystems run in interpreters of their own.
    other = re.compile(r"\.assets\.environments|\.(verifiers|openenv|nemo_gym|harbor)[^.]*$")
    names = [name for name in names if not other.search(name)]
    assert len(names) > 100
    assert _failures(variables, *names) == {}


@pytest.mark.parametrize("package", _VERL)
def test_the_modules_of_verl_that_a_run_uses_are_imported(package: str, variables: dict[str, str]) -> None:
    # Not verl's optional ones for other hardware.
    names = [name for name in _modules(package) if not re.search("npu|hccl|rocm|turbo", name)]
    assert _failures(variables, *names) == {}
