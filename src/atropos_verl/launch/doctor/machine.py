"""Cores, memory, GPUs, limits, shared memory, disk, run directory."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from atropos_verl.config.findings import Finding, missing, ok, warning

__all__ = ["Gpu", "check_disk", "check_gpus", "check_limits", "check_machine", "check_shared_memory", "list_gpus"]

_SECTION = "machine"
_OPEN_FILES = 4096
_SHARED_MEMORY = 1 << 30
_GPU_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    free_bytes: int
    total_bytes: int


def list_gpus() -> list[Gpu] | None:
    """What ``nvidia-smi`` lists, those that ``CUDA_VISIBLE_DEVICES`` leaves; None: it is not there or fails."""
    command = ["nvidia-smi", "--query-gpu=name,memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_GPU_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode != 0:
        return None
    gpus = []
    for line in answer.stdout.splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) == 3 and words[1].isdigit() and words[2].isdigit():
            gpus.append(Gpu(words[0], int(words[1]) << 20, int(words[2]) << 20))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpus
    chosen = [word.strip() for word in visible.split(",") if word.strip()]
    numbers = [int(word) for word in chosen if word.isdigit()]
    return [gpus[number] for number in numbers if number < len(gpus)] if len(numbers) == len(chosen) else gpus


def check_machine() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    findings = [ok(_SECTION, "cores", str(cores))]
    if cores < 2:
        findings = [warning(_SECTION, "cores", "1", "trainer and environment share it: the demo takes minutes")]
    text = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available"
    if memory.available < 2e9:
        findings.append(warning(_SECTION, "memory", text, "the demo takes about 2 GB; end something else"))
    else:
        findings.append(ok(_SECTION, "memory", text))
    return findings


def check_gpus(gpus: list[Gpu] | None, *, device: str, needed: int) -> Finding:
    """Whether there are as many GPUs as the run places processes on.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        needed: GPUs of this machine that the configuration asks for; with ``auto`` none are needed.
    """
    found = "no nvidia-smi" if gpus is None else _listed(gpus)
    if device == "cpu":
        return ok(_SECTION, "GPUs", f"{found}; not used (trainer.device=cpu)")
    count = len(gpus or ())
    if device == "cuda" and count < max(1, needed):
        todo = "lower the number of processes, free GPUs (CUDA_VISIBLE_DEVICES), or trainer.device=cpu"
        return missing(_SECTION, "GPUs", f"{found}; the configuration needs {max(1, needed)}", todo)
    if device == "auto" and 0 < count < needed:
        todo = "fewer ranks, or trainer.device=cpu"
        return missing(_SECTION, "GPUs", f"{found}; {needed} ranks would share them", todo)
    return ok(_SECTION, "GPUs", found if count else f"{found}; the run uses the CPU")


def check_limits(soft: int | None = None) -> Finding:
    """``ulimit -n``: every request of an environment, and every process of Ray, is a file."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if soft is None else soft
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        todo = f"up to 512 requests are open at a time, Ray wants more: ulimit -n {_OPEN_FILES * 16}"
        return warning(_SECTION, "open files (ulimit -n)", str(soft), todo)
    return ok(_SECTION, "open files (ulimit -n)", "unlimited" if soft == resource.RLIM_INFINITY else str(soft))


def check_shared_memory(
    path: Path = Path("/dev/shm"), *, object_store: int | None = None, ray: bool = False
) -> Finding:
    """``/dev/shm``, where Ray's object store and the tensors between processes lie; 64 MB in a plain container."""
    try:
        free = shutil.disk_usage(path).free
    except OSError:
        return ok(_SECTION, "shared memory", f"there is no {path}")
    text = f"{free / 1e9:.2f} GB free in {path}"
    needed = object_store or (_SHARED_MEMORY if ray else 0)
    if free < needed:
        todo = f"Ray's object store takes {needed / 1e9:.2f} GB there: docker --shm-size=8g, or a smaller one"
        return missing(_SECTION, "shared memory", text, todo)
    if free < _SHARED_MEMORY // 4:
        return warning(_SECTION, "shared memory", text, "docker run --shm-size=2g: torch passes tensors through it")
    return ok(_SECTION, "shared memory", text)


def check_disk(run_dir: Path, *, model_bytes: int, checkpoints: int | None) -> list[Finding]:
    """The run directory can be written, and its disk takes the checkpoints.

    Args:
        model_bytes: of the weight files. A checkpoint is taken as three times them (weights and AdamW's two moments).
        checkpoints: kept at a time; one more exists while the newest is written. None: all are kept.
    """
    place = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not place.is_dir():
        return [missing(_SECTION, "run directory", f"{place} is a file", "choose another run_dir")]
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-"):
            pass
    except OSError as error:
        return [
            missing(_SECTION, "run directory", f"cannot write to {place}: {error.strerror}", "choose another run_dir")
        ]
    findings = [ok(_SECTION, "run directory", f"{run_dir} can be written")]
    free = shutil.disk_usage(place).free
    needed = 3 * model_bytes * ((checkpoints or 1) + 1) + (100 << 20)
    kept = f"{checkpoints or 1} + 1 checkpoints"
    text = f"{free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB for {kept} and logs"
    if free < needed:
        todo = "make room, choose another run_dir, or lower trainer.max_ckpt_to_keep"
        return [*findings, missing(_SECTION, "disk", text, todo)]
    return [*findings, ok(_SECTION, "disk", text)]


def _listed(gpus: list[Gpu]) -> str:
    if not gpus:
        return "none"
    smallest = min(gpus, key=lambda gpu: gpu.free_bytes)
    return f"{len(gpus)} x {gpus[0].name}, least free memory {smallest.free_bytes / 2**30:.0f} GiB"
