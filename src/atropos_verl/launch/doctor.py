"""``atropos-verl doctor``: says what this machine can run. Nothing is started, and no library imported, for it."""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from packaging.requirements import Requirement
from packaging.version import InvalidVersion

from atropos_verl.config.composition import SHIPPED
from atropos_verl.config.launch_schema import LaunchConfig
from atropos_verl.config.model_checks import Finding, check_model, finding, weight_bytes
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import AtroposAPIError, ConfigError
from atropos_verl.launch.launch import RayLaunch, build_plan, load_settings
from atropos_verl.launch.plan import make_plan, one_environment

_SECTIONS = ("configuration", "plan", "software", "machine", "placement", "model", "memory", "network")
"""In the order of showing."""
_ANY_URL = "http://127.0.0.1:1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings, as for train and launch")
    parser.add_argument("--config-name", help="a file of the configuration directory (default: the demo)")
    parser.add_argument("--config-dir", type=Path, help="another config directory")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--memory", action="store_true", help="predict the peak memory of a rank in every phase")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="--memory for a card of this size, not this one")


def run(options: argparse.Namespace) -> int:
    """Returns 0: everything is there; 1: something is missing."""
    directory: Path = options.config_dir or SHIPPED
    default = "local_demo" if directory == SHIPPED else None
    try:
        config, launch, ray = load_settings(options.words, directory, options.config_name, default)
        verl = ray.verl if ray is not None else {}
        findings = [*_check_plan(config, launch, ray), *_examine(config, launch, verl)]
        if options.memory:
            findings += _examine_memory(config, launch, verl, options.gpu_memory)
        findings.sort(key=lambda found: _SECTIONS.index(found.section))
    except ConfigError as error:
        todo = "correct it; --help of train and launch"
        findings = [finding("configuration", error.key or "file", str(error), missing=todo)]
    is_ready = all(found.status != "missing" for found in findings)
    answer = {"ok": is_ready, "findings": [asdict(found) for found in findings]}
    sys.stdout.write(json.dumps(answer, indent=1) + "\n" if options.json else _text(findings))
    return 0 if is_ready else 1


def _check_plan(config: RunConfig, launch: LaunchConfig, ray: RayLaunch | None) -> list[Finding]:
    """What a start would refuse, first of all, and what it would warn of: scripts, ports, shares, keys."""
    try:
        if config.env.model_dump(include={"script", "module", "python"}, exclude_none=True):  # main_atropos.py's one
            filled = config.with_values(atropos={"api_url": _ANY_URL}, gateway={"advertise_url": _ANY_URL})
            plan = make_plan(filled, one_environment(config), own_api=True, probe_url=None, trains_here=True)
        else:
            plan = build_plan(config, launch, ray)
    except ConfigError as error:
        text = str(error).removeprefix(f"{error.key}: ")
        return [finding("plan", error.key or "settings", text, missing="correct it; --help of train and launch")]
    processes = finding("plan", "processes", ", ".join(spec.name for spec in plan.services))
    return [
        processes,
        *(finding("plan", "warning", text, warning="the run starts all the same") for text in plan.warnings),
    ]


def _examine(config: RunConfig, launch: LaunchConfig, verl: Mapping[str, Any]) -> list[Finding]:
    """Checks of this machine. ``verl``: its own settings, on Ray."""
    on_ray, trainer = launch.backend == "ray", _section(verl, "trainer")
    device = str(trainer.get("device") or "cuda") if on_ray else config.trainer.device
    ranks = int(trainer.get("n_gpus_per_node") or 1) if on_ray else launch.trainer_process.nproc
    gpus, cores, memory = list_gpus(), len(os.sched_getaffinity(0)), psutil.virtual_memory()
    python = f"{sys.version_info.major}.{sys.version_info.minor} ({sys.executable})"
    findings = [finding("software", "python", python), *check_packages(requirements_of(), backend=launch.backend)]
    rollout = _section(verl, "actor_rollout_ref", "rollout").get("name")
    if rollout in ("vllm", "sglang") and find_spec(rollout) is None:
        todo = f"pip install --no-deps -r requirements/gpu-{rollout}.txt, in a checkout (docs/cluster.md)"
        findings.append(finding("software", rollout, "not installed, rollout.name wants it", missing=todo))
    text = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available, {cores} cores"
    little = "the demo takes about 2 GB; end something else" if memory.available < 2e9 else ""
    findings += [finding("machine", "memory", text, warning=little), check_gpus(gpus, device=device, needed=ranks)]
    asked = _section(verl, "ray_kwargs", "ray_init").get("object_store_memory")
    findings += [*([check_shared_memory(asked)] if on_ray else []), *_check_model_and_disk(config)]
    if config.atropos.api_url is not None:
        findings.append(check_api(config.atropos.api_url, config.atropos.token))
    if on_ray:
        findings += check_placement(verl, gpus=len(gpus or ()), cores=cores)
    return findings


def _examine_memory(
    config: RunConfig, launch: LaunchConfig, verl: Mapping[str, Any], gpu_memory: float | None
) -> list[Finding]:
    from atropos_verl.launch.memory import check_memory, plan_of, shape_of

    try:
        gpus, plan = list_gpus() or [], plan_of(config, launch, verl)
        on_cpu = plan.on_cpu or (config.trainer.device == "auto" and not verl and not gpus and gpu_memory is None)
        plan = replace(plan, on_cpu=on_cpu)
        room, place = gpu_memory and gpu_memory * 1e9, "a card of that size"
        if room is None and on_cpu:
            room, place = psutil.virtual_memory().available / plan.ranks, "this machine"
        elif room is None and gpus:
            room, place = float(min(gpu.free_bytes for gpu in gpus)), gpus[0].name
        elif room is None:
            return [finding("memory", "card", "there is no GPU here", warning="give the size of one: --gpu-memory 80")]
        shape = shape_of(config.resolve_model_path(), plan.compute, trust_remote_code=config.model.trust_remote_code)
        return check_memory(shape, plan, room, place)
    except ConfigError as error:
        return [finding("memory", error.key or "model", str(error), warning="it cannot be predicted")]


def _text(findings: Sequence[Finding]) -> str:
    """A line per finding, the remedies, and the verdict."""
    lines, width = [], max(len(found.name) for found in findings)
    for section, group in itertools.groupby(findings, key=lambda found: found.section):
        lines += [section, *(f"{found.status:<9} {found.name:<{width}}  {found.found}" for found in group)]
    todo = sorted((found for found in findings if found.todo), key=lambda found: found.status)  # missing, warning
    for found in todo:
        lines += ["", f"{found.status}: {found.section}, {found.name}: {found.found}", f"  {found.todo}"]
    lacking = sum(found.status == "missing" for found in todo)
    counts = f"{len(findings) - len(todo)} ok, {len(todo) - lacking} warnings, {lacking} missing"
    return "\n".join([*lines, "", f"{'this run would fail' if lacking else 'ready'}: {counts}", ""])


_SHOWN = ("verl", "atroposlib", "torch", "transformers", "tensordict", "transferqueue")
"""Always listed; others only when something is wrong with them."""


def requirements_of(package: str = "atropos-verl") -> list[Requirement]:
    """Lists what ``package`` demands without its extras; empty where its metadata is not installed."""
    try:
        parsed = [Requirement(text) for text in metadata.requires(package) or ()]
    except metadata.PackageNotFoundError:
        return []
    return [each for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})]


def check_packages(requirements: Iterable[Requirement], *, backend: str = "local") -> list[Finding]:
    """Returns one finding per package that matters or is wrong. With ``local``, packages of Ray only are no error."""
    findings = []
    for each in requirements:
        todo = warning = ""
        try:
            found = metadata.version(each.name)
            fits = each.specifier.contains(found, prereleases=True)
        except (metadata.PackageNotFoundError, InvalidVersion):
            found, fits = "not installed", False
        if not fits:
            found = f"{found}, {each.specifier or 'any version'} is needed"
            todo = f"pip install '{each.name}{each.specifier}'"
            if each.name.lower() == "transferqueue" and backend == "local":
                todo, warning = "", f"only backend=ray needs it; {todo}"
        if not fits or each.name.lower() in _SHOWN:
            findings.append(finding("software", each.name, found, missing=todo, warning=warning))
    if not findings:
        text = "its package metadata is not installed: no versions known"
        todo = "install it: make install, or pip install -e . in a checkout"
        return [finding("software", "atropos-verl", text, warning=todo)]
    return findings


_SHARED_MEMORY = 1 << 30


class Gpu(NamedTuple):
    name: str
    free_bytes: int


def list_gpus() -> list[Gpu] | None:
    """Lists what ``nvidia-smi`` shows and ``CUDA_VISIBLE_DEVICES`` leaves; None: it is not there or fails."""
    command = ["nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10.0, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[word.strip() for word in line.split(",")] for line in answer.stdout.splitlines()]
    gpus = [Gpu(row[0], int(row[1]) << 20) for row in rows if len(row) == 2 and row[1].isdigit()]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "all").replace(" ", "").split(",")
    if not all(word.isdigit() for word in chosen if word):  # the variable may also name GPUs by UUID
        return gpus
    return [gpus[int(word)] for word in chosen if word and int(word) < len(gpus)]


def check_gpus(gpus: list[Gpu] | None, *, device: str, needed: int) -> Finding:
    """Compares the GPUs with the ``needed`` processes on this machine; ``device``: ``auto``, ``cpu`` or ``cuda``."""
    count, text, todo = len(gpus or ()), "no nvidia-smi" if gpus is None else "none", ""
    if gpus:
        smallest = min(gpu.free_bytes for gpu in gpus)
        text = f"{count} x {gpus[0].name}, least free memory {smallest / 2**30:.0f} GiB"
    if device == "cpu":
        text = f"{text}; not used (trainer.device=cpu)"
    elif device == "cuda" and count < max(1, needed):
        text = f"{text}; the configuration needs {max(1, needed)}"
        todo = "lower the number of processes, free GPUs (CUDA_VISIBLE_DEVICES), or trainer.device=cpu"
    elif device == "auto" and 0 < count < needed:
        text, todo = f"{text}; {needed} ranks would share them", "fewer ranks, or trainer.device=cpu"
    elif not count:
        text = f"{text}; the run uses the CPU"
    return finding("machine", "GPUs", text, missing=todo)


def check_shared_memory(object_store: int | None = None) -> Finding:
    """Checks ``/dev/shm``, which holds Ray's object store (bytes); a container has 64 MB."""
    free, needed = shutil.disk_usage("/dev/shm").free, object_store or _SHARED_MEMORY
    todo = f"Ray's object store takes {needed / 1e9:.2f} GB there: docker --shm-size=8g, or a smaller one"
    text = f"{free / 1e9:.2f} GB free in /dev/shm"
    return finding("machine", "shared memory", text, missing=todo if free < needed else "")


def check_disk(run_dir: Path, *, model_bytes: int, checkpoints: int | None) -> list[Finding]:
    """Checks that the run directory can be written, and that its disk takes the checkpoints.

    One is taken as three times ``model_bytes`` (weights, AdamW's two moments), and exists beside those that are kept.
    """
    place = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-"):
            pass
    except OSError as error:
        text = f"cannot write to {place}: {error.strerror}" if place.is_dir() else f"{place} is a file"
        return [finding("machine", "run directory", text, missing="choose another run_dir")]
    free = shutil.disk_usage(place).free
    needed = 3 * model_bytes * ((checkpoints or 1) + 1) + (100 << 20)
    text = f"{free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB for {checkpoints or 1} + 1 checkpoints and logs"
    todo = "make room, choose another run_dir, or lower trainer.max_ckpt_to_keep" if free < needed else ""
    writable = finding("machine", "run directory", f"{run_dir} can be written")
    return [writable, finding("machine", "disk", text, missing=todo)]


def _check_model_and_disk(config: RunConfig) -> list[Finding]:
    size = 0
    try:
        model_path = config.resolve_model_path()
        findings = check_model(config, model_path)
        size = weight_bytes(model_path) if config.save_freq > 0 else 0
    except (ConfigError, FileNotFoundError) as error:
        findings = [finding("model", "path", str(error), missing="set model.path to a Hugging Face directory")]
    return findings + check_disk(
        config.resolve_run_dir(), model_bytes=size, checkpoints=config.trainer.max_ckpt_to_keep
    )


_CPUS_PER_WORKER = 3
"""Every process's bundle asks for so many (verl 0.9.1, ``ResourcePoolManager.max_colocate_count``)."""


def check_placement(settings: Mapping[str, Any], *, gpus: int, cores: int) -> list[Finding]:
    """Checks whether one fresh Ray node on this machine can hold what ``settings`` (verl's ppo_trainer) asks for.

    verl itself compares GPUs, after a minute of imports. Nobody compares CPUs: Ray waits for ever, without a message,
    for what no node has. Of a run that attaches to a cluster (``ray_kwargs.ray_init.address``) only the divisions are
    checked. ``gpus`` and ``cores`` are those of this machine.
    """
    trainer, init = _section(settings, "trainer"), _section(settings, "ray_kwargs", "ray_init")
    nodes, per_node = int(trainer.get("nnodes") or 1), int(trainer.get("n_gpus_per_node") or 1)
    rollout, world = _section(settings, "actor_rollout_ref", "rollout"), nodes * per_node
    size = int(rollout.get("tensor_model_parallel_size") or 1) * int(rollout.get("pipeline_model_parallel_size") or 1)
    sequences = int(_section(settings, "data").get("train_batch_size") or 0) * int(rollout.get("n") or 1)
    text, todo = f"{world} processes, rollout replicas of {size}, {sequences} sequences a step", ""
    if world % size:
        todo = "n_gpus_per_node x nnodes must be a multiple of rollout.tensor_model_parallel_size x pipeline_…"
    elif sequences % world:
        todo = "data.train_batch_size x actor_rollout_ref.rollout.n must be a multiple of the number of processes"
    findings = [finding("placement", "replicas", text, missing=todo)]
    if init.get("address") is not None:
        text = f"{nodes} x {per_node}, on the cluster at {init['address']} (not asked)"
        return [*findings, finding("placement", "nodes", text)]
    if nodes > 1:
        todo = "start Ray on every node (ray start --head, ray start --address=...), then set "
        todo += "ray_kwargs.ray_init.address=auto"
        text = f"trainer.nnodes={nodes}, but Ray is started on this machine alone"
        return [*findings, finding("placement", "nodes", text, missing=todo)]
    workers = per_node
    if _section(settings, "trainer", "v1").get("trainer_mode") == "separate_async":  # its replicas share no GPU
        workers += int(rollout.get("nnodes") or 0) * int(rollout.get("n_gpus_per_node") or 0)
    storage = _section(settings, "transfer_queue", "backend", "SimpleStorage").get("num_data_storage_units")
    # The runner, TransferQueue's controller and its storage ask for one each; agents and replicas ask for none.
    needed, have = _CPUS_PER_WORKER * workers + 2 + int(storage or 1), int(init.get("num_cpus") or cores)
    text = f"{needed} CPUs for {workers} processes ({_CPUS_PER_WORKER} each), runner and queue; Ray counts {have}"
    todo = f"ray_kwargs.ray_init.num_cpus={needed} or more: Ray counts CPUs, it does not pin them"
    findings.append(finding("placement", "CPUs", text, missing=todo if have < needed else ""))
    if str(trainer.get("device") or "cuda") != "cpu":
        text = f"{workers} processes with a GPU each, {gpus} GPUs here"
        todo = "lower trainer.n_gpus_per_node (and actor_rollout_ref.rollout.nnodes), or trainer.device=cpu"
        findings.append(finding("placement", "GPUs", text, missing=todo if gpus < workers else ""))
    return findings


def _section(settings: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    node: Any = settings
    for name in names:
        node = node.get(name) if isinstance(node, Mapping) else None
    return node if isinstance(node, Mapping) else {}


def check_api(url: str, token: str | None, *, timeout: float = 3.0) -> Finding:
    """Asks the trajectory API for its status, with the run's token."""
    from atropos_verl.protocol.client import AtroposClient

    name = "trajectory API"
    try:
        with AtroposClient(url, timeout=timeout, token=token, retry_attempts=1) as client:
            status = client.status()
    except AtroposAPIError as error:
        todo = "start it, or correct atropos.api_url and ATROPOS_API_TOKEN (or atropos.token)"
        return finding("network", name, f"{url}: {error.reason}", missing=todo)
    text = f"{url}: step {status.current_step}, {status.queue_size} groups queued"
    todo = "an earlier run's groups would be trained first; atropos.reset=true forgets them"
    return finding("network", name, text, warning=todo if status.queue_size else "")
