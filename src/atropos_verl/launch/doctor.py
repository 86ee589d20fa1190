"""``atropos-verl doctor``: says what this machine can run. Nothing is started, and no library imported, for it."""

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from packaging.requirements import Requirement
from packaging.version import InvalidVersion
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atropos_verl.config.composition import SHIPPED
from atropos_verl.config.launch_schema import EnvironmentConfig, LaunchConfig
from atropos_verl.config.model_checks import Finding, check_model, finding, weight_bytes
from atropos_verl.config.schema import RunConfig
from atropos_verl.errors import AtroposAPIError, AtroposHTTPStatusError, ConfigError
from atropos_verl.launch.environment_script import look, notes_of, source_of, what_lacks
from atropos_verl.launch.environments import interpreter, program_of
from atropos_verl.launch.launch import load_settings
from atropos_verl.launch.probes import free_port

_SECTIONS = ("configuration", "software", "machine", "placement", "model", "memory", "network", "environments")
"""In the order of showing."""
_STYLES = {"ok": "green", "warning": "yellow", "missing": "bold red"}


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
        findings = _examine(config, launch, verl)
        if options.memory:
            findings += _examine_memory(config, launch, verl, options.gpu_memory)
            findings.sort(key=lambda found: _SECTIONS.index(found.section))
    except ConfigError as error:
        todo = "correct it; --help of train and launch"
        findings = [finding("configuration", error.key or "file", str(error), missing=todo)]
    is_ready = all(found.status != "missing" for found in findings)
    if options.json:
        answer = {"ok": is_ready, "findings": [asdict(found) for found in findings]}
        sys.stdout.write(json.dumps(answer, indent=1) + "\n")
    else:
        _show(findings, Console())
    return 0 if is_ready else 1


def _examine(config: RunConfig, launch: LaunchConfig, verl: Mapping[str, Any]) -> list[Finding]:
    """Runs every check that applies; the slow ones at the same time. ``verl``: its own settings, on Ray."""
    chosen, env = launch.chosen, config.env
    if env.script is not None or env.module is not None or env.python is not None:  # main_atropos.py's one environment
        shared = {name: getattr(env, name) for name in ("script", "module", "python", "args", "env", "cwd")}
        chosen = {"environment": EnvironmentConfig(**shared)}
    on_ray, trainer = launch.backend == "ray", _section(verl, "trainer")
    device = str(trainer.get("device") or "cuda") if on_ray else config.trainer.device
    ranks = int(trainer.get("n_gpus_per_node") or 1) if on_ray else launch.trainer_process.nproc
    with ThreadPoolExecutor(max_workers=8) as pool:
        listing = pool.submit(list_gpus)
        environments = [
            pool.submit(check_environment, name, settings, config)
            for name, settings in (chosen if launch.starts("environments") else {}).items()
        ]
        api = pool.submit(_check_own_or_given_api, config, launch)
        findings = [check_python(), *check_packages(requirements_of(), backend=launch.backend)]
        rollout = _section(verl, "actor_rollout_ref", "rollout").get("name")
        if rollout in ("vllm", "sglang") and find_spec(rollout) is None:
            todo = f"pip install --no-deps -r requirements/gpu-{rollout}.txt, in a checkout (docs/cluster.md)"
            findings.append(finding("software", rollout, "not installed, rollout.name wants it", missing=todo))
        compiles = on_ray and device == "cpu" and rollout == "vllm"
        findings.append(_check_compiler(needed_for="vLLM on a CPU" if compiles else ""))
        gpus = listing.result()
        findings += [*_check_machine(), check_gpus(gpus, device=device, needed=ranks), check_limits()]
        asked = _section(verl, "ray_kwargs", "ray_init").get("object_store_memory")
        findings.append(check_shared_memory(object_store=asked, ray=on_ray))
        findings += _check_model_and_disk(config)
        if launch.starts("trainer"):
            findings.append(check_port("gateway.port", config.gateway.host, config.gateway.port))
        findings.append(api.result())
        if on_ray:
            findings += check_placement(verl, gpus=len(gpus or ()), cores=_cores())
        findings += [future.result() for future in environments]
    return sorted(findings, key=lambda found: _SECTIONS.index(found.section))


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


def _show(findings: Sequence[Finding], console: Console) -> None:
    """Prints a table, and the remedies below it."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("checked", no_wrap=True)
    table.add_column("found", overflow="fold")
    for section, group in itertools.groupby(findings, key=lambda found: found.section):
        table.add_row("", Text(section, style="bold"), "")
        for found in group:
            table.add_row(Text(found.status, style=_STYLES[found.status]), Text(f"  {found.name}"), Text(found.found))
    console.print(table)
    todo = [found for found in findings if found.status != "ok"]
    for found in sorted(todo, key=lambda found: found.status != "missing"):
        console.print(Text(f"\n{found.status}: {found.section}, {found.name}: {found.found}", style="bold"))
        console.print(Text(f"  {found.todo}"))
    lacking = sum(found.status == "missing" for found in findings)
    verdict = "this run would fail" if lacking else "ready"
    counts = f"{len(findings) - len(todo)} ok, {len(todo) - lacking} warnings, {lacking} missing"
    console.print(Text(f"\n{verdict}: {counts}"))


_SHOWN = ("verl", "atroposlib", "torch", "transformers", "tensordict", "transferqueue")
"""Always listed; others only when something is wrong with them."""


def check_python(version: tuple[int, int] | None = None) -> Finding:
    version = version or (sys.version_info.major, sys.version_info.minor)
    fits = (3, 11) <= version <= (3, 12)
    todo = "" if fits else "use Python 3.11 or 3.12: verl 0.9.1's dependencies have wheels for these"
    return finding("software", "python", f"{version[0]}.{version[1]} ({sys.executable})", missing=todo)


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
        name, wanted, command = each.name.lower(), str(each.specifier), f"pip install '{each.name}{each.specifier}'"
        try:
            version = metadata.version(each.name)
            found = version if each.specifier.contains(version, prereleases=True) else f"{version}, {wanted} is needed"
        except metadata.PackageNotFoundError:
            found = f"not installed, {wanted or 'any version'} is needed"
        except InvalidVersion:
            found = f"{version}, {wanted} is needed"
        if not found.endswith("is needed"):
            if name in _SHOWN:
                findings.append(finding("software", each.name, found))
        elif name == "transferqueue" and backend == "local":
            findings.append(finding("software", each.name, found, warning=f"only backend=ray needs it; {command}"))
        else:
            findings.append(finding("software", each.name, found, missing=command))
    if not findings:
        text = "its package metadata is not installed: no versions known"
        todo = "install it: make install, or pip install -e . in a checkout"
        return [finding("software", "atropos-verl", text, warning=todo)]
    return findings


def _check_compiler(*, needed_for: str = "") -> Finding:
    """Looks for a C++ compiler: torch.compile and vLLM's CPU backend call one."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    path = next((path for name in names if name and (path := shutil.which(name))), None)
    todo = f"{needed_for} compiles kernels: install g++ (apt install g++)" if needed_for and path is None else ""
    none = "none" if needed_for else "none (needed by torch.compile and by vLLM on a CPU only)"
    return finding("software", "C++ compiler", path or none, missing=todo)


_OPEN_FILES = 4096
_SHARED_MEMORY = 1 << 30


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_machine() -> list[Finding]:
    memory = psutil.virtual_memory()
    text = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available"
    few = "trainer and environment share it: the demo takes minutes" if _cores() < 2 else ""
    little = "the demo takes about 2 GB; end something else" if memory.available < 2e9 else ""
    return [
        finding("machine", "cores", str(_cores()), warning=few),
        finding("machine", "memory", text, warning=little),
    ]


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
    chosen = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",") if word.strip()]
    if not all(word.isdigit() for word in chosen):  # the variable may also name GPUs by UUID
        return gpus
    return [gpus[int(word)] for word in chosen if int(word) < len(gpus)]


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


def check_limits(soft: int | None = None) -> Finding:
    """Checks ``ulimit -n``: every request of an environment, and every process of Ray, is a file."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if soft is None else soft
    text, todo = str(soft), ""
    if soft == resource.RLIM_INFINITY:
        text = "unlimited"
    elif soft < _OPEN_FILES:
        todo = f"up to 512 requests are open at a time, Ray wants more: ulimit -n {_OPEN_FILES * 16}"
    return finding("machine", "open files (ulimit -n)", text, warning=todo)


def check_shared_memory(*, object_store: int | None = None, ray: bool = False) -> Finding:
    """Checks ``/dev/shm``, which holds Ray's object store and tensors between processes; a container has 64 MB."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return finding("machine", "shared memory", "there is no /dev/shm")
    needed = (object_store or _SHARED_MEMORY) if ray else 0
    text, lacking = f"{free / 1e9:.2f} GB free in /dev/shm", ""
    little = "docker run --shm-size=2g: torch passes tensors through it" if free < _SHARED_MEMORY // 4 else ""
    if free < needed:
        lacking = f"Ray's object store takes {needed / 1e9:.2f} GB there: docker --shm-size=8g, or a smaller one"
    return finding("machine", "shared memory", text, missing=lacking, warning=little)


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
    findings = _check_divisions(settings, nodes * per_node)
    if init.get("address") is not None:
        text = f"{nodes} x {per_node}, on the cluster at {init['address']} (not asked)"
        return [*findings, finding("placement", "nodes", text)]
    if nodes > 1:
        todo = "start Ray on every node (ray start --head, ray start --address=...), then set "
        todo += "ray_kwargs.ray_init.address=auto"
        text = f"trainer.nnodes={nodes}, but Ray is started on this machine alone"
        return [*findings, finding("placement", "nodes", text, missing=todo)]
    workers, rollout = per_node, _section(settings, "actor_rollout_ref", "rollout")
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


def _check_divisions(settings: Mapping[str, Any], world: int) -> list[Finding]:
    """Checks that processes divide into replicas, a step's sequences and each micro-batch into equal shares."""
    actor, rollout = (_section(settings, "actor_rollout_ref", name) for name in ("actor", "rollout"))
    size = int(rollout.get("tensor_model_parallel_size") or 1) * int(rollout.get("pipeline_model_parallel_size") or 1)
    batch, n = int(_section(settings, "data").get("train_batch_size") or 0), int(rollout.get("n") or 1)
    text, todo = f"{world} processes, rollout replicas of {size}", ""
    if world % size:
        todo = "n_gpus_per_node x nnodes must be a multiple of rollout.tensor_model_parallel_size x pipeline_…"
    elif batch * n % world:
        text = f"{text}; {batch * n} sequences a step do not divide by {world}"
        todo = "data.train_batch_size x actor_rollout_ref.rollout.n must be a multiple of the number of processes"
    findings = [finding("placement", "replicas", text, missing=todo)]
    micro = int(actor.get("ppo_micro_batch_size_per_gpu") or 0)
    if micro and not actor.get("use_dynamic_bsz", True):
        share = int(actor.get("ppo_mini_batch_size") or batch) * n / world
        text = f"{share:g} sequences of a mini-batch per process, micro-batches of {micro}"
        todo = "choose an actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu that divides them, "
        todo += "or use_dynamic_bsz=true"
        findings.append(finding("placement", "micro-batches", text, missing=todo if share % micro else ""))
    return findings


def _section(settings: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    node: Any = settings
    for name in names:
        node = node.get(name) if isinstance(node, Mapping) else None
    return node if isinstance(node, Mapping) else {}


def check_port(name: str, host: str, port: int) -> Finding:
    """Checks whether ``host``:``port`` can be listened on now; 0 is any free port."""
    if port == 0:
        return finding("network", name, f"any free port of {host}")
    try:
        free_port(host, port)
    except OSError as error:
        text = f"cannot listen on {host}:{port}: {error.strerror or error}"
        return finding("network", name, text, missing=f"set {name} to a free port, or to 0 for any")
    return finding("network", name, f"{host}:{port} is free")


def check_api(url: str, token: str | None, *, timeout: float = 3.0) -> Finding:
    """Asks the trajectory API for its status, with the run's token."""
    from atropos_verl.protocol.client import AtroposClient

    name = "trajectory API"
    try:
        with AtroposClient(url, timeout=timeout, token=token, retry_attempts=1) as client:
            status = client.status()
    except AtroposHTTPStatusError as error:
        if error.status_code in (401, 403):
            text = f"{url}: {error.status_code}, {'the token was refused' if token else 'it demands a token'}"
            return finding("network", name, text, missing="set ATROPOS_API_TOKEN (or atropos.token)")
        text = f"{url}/status answers {error.status_code}"
        return finding("network", name, text, missing="is it an Atropos API? see its log")
    except AtroposAPIError as error:
        todo = "start it, or correct atropos.api_url"
        return finding("network", name, f"{url} does not answer as an Atropos API: {error.reason}", missing=todo)
    queued, todo = "queue empty", ""
    if status.queue_size:
        queued = f"{status.queue_size} groups queued"
        todo = "an earlier run's groups would be trained first; atropos.reset=true forgets them"
    return finding("network", name, f"{url}: step {status.current_step}, {queued}", warning=todo)


def _check_own_or_given_api(config: RunConfig, launch: LaunchConfig) -> Finding:
    if config.atropos.api_url is not None:
        return check_api(config.atropos.api_url, config.atropos.token)
    if launch.starts("api"):
        return check_port("api.port", launch.api.host, launch.api.port)
    return finding("network", "trajectory API", "no URL, and only= leaves it out", missing="set atropos.api_url")


_ATROPOSLIB = "0.4.0"


def check_environment(name: str, settings: EnvironmentConfig, config: RunConfig) -> Finding:
    """Checks what its interpreter would find when it runs its program, which itself is not run."""
    todo = warning = ""
    try:
        python = interpreter(settings.python, f"environments.{name}.python")
        program = program_of(name, settings)
        seen = look(python, program, settings, config.resolve_run_dir())
    except ConfigError as error:
        return finding("environments", name, str(error), missing="correct the path")
    except SyntaxError as error:
        return finding(
            "environments", name, f"{program[-1]}, line {error.lineno}: {error.msg}", missing="mend the script"
        )
    except (OSError, subprocess.TimeoutExpired, ValueError, RecursionError) as error:
        broken, why = python, "it prints no answer"
        if isinstance(error, OSError):
            broken, why = error.filename, error.strerror or str(error)
        todo = f"set environments.{name}.{'python' if broken == python else 'script'}"
        return finding("environments", name, f"{broken} cannot be used: {why}", missing=todo)
    atroposlib, transformers = seen["versions"]["atroposlib"], seen["versions"]["transformers"] or "none"
    text = f"python {seen['python']}, atroposlib {atroposlib}, transformers {transformers}"
    refused, notes = what_lacks(seen, python)
    if atroposlib is None:
        text, todo = f"{python} has no atroposlib", f"{python} -m pip install atroposlib=={_ATROPOSLIB}"
    elif refused:
        text, todo = f"the script {'; '.join(refused)}", f"provide it, or leave out environments.{name}"
    elif atroposlib != _ATROPOSLIB:
        warning = f"the launcher's arguments are those of {_ATROPOSLIB}; "
        warning += f"environments.{name}.omit leaves out what it lacks"
    elif b"tokenize_for_trainer" in source_of(program, settings) and transformers.startswith("5"):
        todo = f"the script's tokenize_for_trainer needs transformers 4: give it environments.{name}.python of its own"
    if not todo and (notes := notes_of(config, settings, program) + notes):
        warning = "; ".join(notes)
    return finding("environments", name, text, missing=todo, warning=warning)
