"""``atropos-verl doctor``: says what this machine can run. Nothing is started, and no library imported, for it."""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from atropos_verl.launch.launch import build_plan, load_settings
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
        config, launch, composed = load_settings(options.words, directory, options.config_name, default)
        verl = composed or {}
        findings = [*_check_plan(config, launch, composed), *_examine(config, launch, verl)]
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


def _check_plan(config: RunConfig, launch: LaunchConfig, verl: Mapping[str, Any] | None) -> list[Finding]:
    """What a start would refuse, first of all, and what it would warn of: scripts, ports, shares, keys."""
    try:
        if config.env.model_dump(include={"script", "module", "python"}, exclude_none=True):  # main_atropos.py's one
            filled = config.with_values(atropos={"api_url": _ANY_URL}, gateway={"advertise_url": _ANY_URL})
            plan = make_plan(filled, one_environment(config), own_api=True, probe_url=None, trains_here=True)
        else:
            plan = build_plan(config, launch, verl)
    except ConfigError as error:
        text = str(error).removeprefix(f"{error.key}: ")
        return [finding("plan", error.key or "settings", text, missing="correct it; --help of train and launch")]
    warnings = [finding("plan", "warning", text, warning="the run starts all the same") for text in plan.warnings]
    return [finding("plan", "processes", ", ".join(spec.name for spec in plan.services)), *warnings]


def _examine(config: RunConfig, launch: LaunchConfig, verl: Mapping[str, Any]) -> list[Finding]:
    device, ranks = str(config.trainer.device), launch.trainer_process.nproc
    if on_ray := launch.backend == "ray":
        device, ranks = str(_value(verl, "trainer.device") or "cuda"), _number(verl, "trainer.n_gpus_per_node")
    gpus, cores, memory = list_gpus(), len(os.sched_getaffinity(0)), psutil.virtual_memory()
    python = f"{sys.version_info.major}.{sys.version_info.minor} ({sys.executable})"
    findings = [finding("software", "python", python), *check_packages(requirements_of(), backend=launch.backend)]
    rollout = _value(verl, "actor_rollout_ref.rollout.name")
    if rollout in ("vllm", "sglang") and find_spec(rollout) is None:
        todo = f"pip install --no-deps -r requirements/gpu-{rollout}.txt, in a checkout (docs/cluster.md)"
        findings.append(finding("software", rollout, "not installed, rollout.name wants it", missing=todo))
    text = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available, {cores} cores"
    little = "the demo takes about 2 GB; end something else" if memory.available < 2e9 else ""
    findings += [finding("machine", "memory", text, warning=little), check_gpus(gpus, device=device, needed=ranks)]
    findings += _check_model_and_disk(config)
    if config.atropos.api_url is not None:
        findings.append(check_api(config.atropos.api_url, config.atropos.token))
    if on_ray:
        findings.append(check_shared_memory(_value(verl, "ray_kwargs.ray_init.object_store_memory")))
        findings += check_placement(verl, gpus=len(gpus or ()), cores=cores)
    return findings


def _examine_memory(
    config: RunConfig, launch: LaunchConfig, verl: Mapping[str, Any], gpu_memory: float | None
) -> list[Finding]:
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
        try:
            found = metadata.version(each.name)
            fits = each.specifier.contains(found, prereleases=True)
        except (metadata.PackageNotFoundError, InvalidVersion):
            found, fits = "not installed", False
        if not fits:
            found = f"{found}, {each.specifier or 'any version'} is needed"
            todo = f"pip install '{each.name}{each.specifier}'"
            is_for_ray = each.name.lower() == "transferqueue" and backend == "local"
            warning = f"only backend=ray needs it; {todo}" if is_for_ray else ""
            findings.append(finding("software", each.name, found, warning=warning, missing="" if is_for_ray else todo))
        elif each.name.lower() in _SHOWN:
            findings.append(finding("software", each.name, found))
    todo = "install it: make install, or pip install -e . in a checkout"
    unknown = finding("software", "atropos-verl", "its metadata is not installed: no versions known", warning=todo)
    return findings or [unknown]


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
        text += "; not used (trainer.device=cpu)"
    elif device == "cuda" and count < max(1, needed):
        text += f"; the configuration needs {max(1, needed)}"
        todo = "lower the number of processes, free GPUs (CUDA_VISIBLE_DEVICES), or trainer.device=cpu"
    elif device == "auto" and 0 < count < needed:
        text, todo = f"{text}; {needed} ranks would share them", "fewer ranks, or trainer.device=cpu"
    elif not count:
        text += "; the run uses the CPU"
    return finding("machine", "GPUs", text, missing=todo)


def check_shared_memory(object_store: int | None = None, place: str = "/dev/shm") -> Finding:
    """Checks where Ray's object store is (bytes); a container has 64 MB."""
    if not Path(place).is_dir():  # Ray then takes its temporary directory
        return finding(
            "machine", "shared memory", f"there is no {place}", warning="Ray's object store is on a disk: slow"
        )
    free, needed = shutil.disk_usage(place).free, object_store or _SHARED_MEMORY
    todo = f"Ray's object store takes {needed / 1e9:.2f} GB there: docker --shm-size=8g, or a smaller one"
    text = f"{free / 1e9:.2f} GB free in {place}"
    return finding("machine", "shared memory", text, missing=todo if free < needed else "")


def check_disk(run_dir: Path, *, model_bytes: int, checkpoints: int | None) -> list[Finding]:
    """Checks that the run directory can be written, and that its disk takes the checkpoints. One is taken as three
    times ``model_bytes`` (weights, AdamW's two moments), and exists beside those that are kept."""
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
    """Checks whether one fresh Ray node on this machine can hold what ``settings`` (verl's ppo_trainer) asks for. verl
    itself compares GPUs, after a minute of imports. Nobody compares CPUs: Ray waits for ever, without a message, for
    what no node has. Of a run that attaches to a cluster (``ray_kwargs.ray_init.address``) only the divisions are
    checked. ``gpus`` and ``cores`` are those of this machine."""
    nodes, per_node = (_number(settings, f"trainer.{name}") for name in ("nnodes", "n_gpus_per_node"))
    rollout, world = "actor_rollout_ref.rollout", nodes * per_node
    size = _number(settings, f"{rollout}.tensor_model_parallel_size")
    size *= _number(settings, f"{rollout}.pipeline_model_parallel_size")
    sequences = _number(settings, "data.train_batch_size", 0) * _number(settings, f"{rollout}.n")
    text, todo = f"{world} processes, rollout replicas of {size}, {sequences} sequences a step", ""
    if world % size:
        todo = "n_gpus_per_node x nnodes must be a multiple of rollout.tensor_model_parallel_size x pipeline_…"
    elif sequences % world:
        todo = "data.train_batch_size x actor_rollout_ref.rollout.n must be a multiple of the number of processes"
    findings = [finding("placement", "replicas", text, missing=todo)]
    if (address := _value(settings, "ray_kwargs.ray_init.address")) is not None:
        text = f"{nodes} x {per_node}, on the cluster at {address} (not asked)"
        return [*findings, finding("placement", "nodes", text)]
    if nodes > 1:
        todo = "start Ray on every node (ray start --head, ray start --address=...), then set "
        text = f"trainer.nnodes={nodes}, but Ray is started on this machine alone"
        return [*findings, finding("placement", "nodes", text, missing=f"{todo}ray_kwargs.ray_init.address=auto")]
    workers = per_node
    if _value(settings, "trainer.v1.trainer_mode") == "separate_async":  # its replicas share no GPU
        workers += _number(settings, f"{rollout}.nnodes", 0) * _number(settings, f"{rollout}.n_gpus_per_node", 0)
    # The runner, TransferQueue's controller and its storage ask for one each; agents and replicas ask for none.
    needed = 2 + _number(settings, "transfer_queue.backend.SimpleStorage.num_data_storage_units")
    needed, have = needed + _CPUS_PER_WORKER * workers, _number(settings, "ray_kwargs.ray_init.num_cpus", cores)
    text = f"{needed} CPUs for {workers} processes ({_CPUS_PER_WORKER} each), runner and queue; Ray counts {have}"
    todo = f"ray_kwargs.ray_init.num_cpus={needed} or more: Ray counts CPUs, it does not pin them"
    findings.append(finding("placement", "CPUs", text, missing=todo if have < needed else ""))
    if _value(settings, "trainer.device") != "cpu":
        text = f"{workers} processes with a GPU each, {gpus} GPUs here"
        todo = "lower trainer.n_gpus_per_node (and actor_rollout_ref.rollout.nnodes), or trainer.device=cpu"
        findings.append(finding("placement", "GPUs", text, missing=todo if gpus < workers else ""))
    return findings


def _value(settings: Any, key: str) -> Any:
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, Mapping) else None
    return settings


def _number(settings: Mapping[str, Any], key: str, default: int = 1) -> int:
    return int(_value(settings, key) or default)


def check_api(url: str, token: str | None, *, timeout: float = 3.0) -> Finding:
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


_PROBE_TOKENS = 256
_CODE = 2.5e8
"""Bytes of what torch, verl and transformers load when they begin to work: measured on a CPU with two models, where it
was 0.25 to 0.3 GB (``benchmarks/bench_memory.py``). On a card it stands for CUDA's and NCCL's own: not measured."""
_BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}
Phases = dict[str, dict[str, float]]
"""Phase → part → bytes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A causal language model; ``layer`` and ``rest`` (embedding, head, last norm) in parameters."""

    layers: int
    layer: int
    rest: int
    head: int
    hidden: int
    vocabulary: int
    kept_layer: float
    """Bytes that a layer keeps for the backward, per token."""
    kept_rest: float
    kv: float
    """Bytes of keys and values of all layers, per token."""
    adapters: int = 0
    """Parameters of LoRA adapters on every linear layer of a layer, per unit of rank."""

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.rest


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rank holds. ``tokens``: distinct ones of a micro-batch; ``trained``: share of them that is trained."""

    ranks: int = 1
    tokens: int = 16384
    trained: float = 1.0
    master: int = 4
    """Bytes of a weight, of its gradient, and of each of its moments."""
    compute: int = 2
    checkpointing: bool = False
    lora_rank: int = 0
    offload: bool = False
    """Weights and moments are on the host while rollouts are made."""
    on_cpu: bool = False
    overlap: bool = False
    keeps_engine: bool = False
    """The embedded engine's weights stay while the trainer trains."""
    running: int = 64
    """Sequences that the embedded engine generates together, and their ``context`` in tokens."""
    context: int = 2048
    engine_share: float | None = None
    """Of the card, that a replica of vLLM or SGLang takes; None: the embedded engine."""


def shape_of(model_path: Path, compute: int, *, trust_remote_code: bool = False) -> Shape:
    """Takes seconds: torch, transformers and verl are imported. Raises ``ConfigError`` for what cannot be run so."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig, AutoModelForCausalLM

    from atropos_verl import verl_plugin

    verl_plugin.activate("cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* engine is not available")  # verl's, of packages nobody asked for
        from atropos_verl.verl_plugin.engines import install_packed_attention, keep_less
    from atropos_verl.verl_plugin.prefix_forest import joined

    how: dict[str, Any] = {"attn_implementation": "sdpa", "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(str(model_path), trust_remote_code=trust_remote_code)
    text, dtype = config.get_text_config(decoder=True), {2: torch.bfloat16, 4: torch.float32}[compute]
    layers, kinds = int(text.num_hidden_layers), getattr(text, "layer_types", None)
    found: list[tuple[int, float]] = []
    for count in (1, 2):
        text.num_hidden_layers = count
        if kinds:
            text.layer_types = list(kinds[:count])
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, torch.UntypedStorage] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, **how).eval()
                keep_less(model)
                packed = {"packed_row": joined([_PROBE_TOKENS])} if install_packed_attention(model) else {}
                ids, positions = torch.ones(1, _PROBE_TOKENS, dtype=torch.int64), torch.arange(_PROBE_TOKENS)[None]
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    output = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1, **packed)
                weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
                size = sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
                found.append((sum(parameter.numel() for parameter in model.parameters()), size / _PROBE_TOKENS))
                del output
        except Exception as error:
            text_of = f"{config.model_type} cannot be run on tensors without content: {error}".splitlines()[0]
            raise ConfigError(text_of[:300], "model.path") from error
    (one, kept_one), (two, kept_two) = found
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()]
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or hidden // heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return Shape(
        layers=layers,
        layer=two - one,
        rest=2 * one - two,
        head=vocabulary * hidden,
        hidden=hidden,
        vocabulary=vocabulary,
        kept_layer=kept_two - kept_one,
        kept_rest=2 * kept_one - kept_two,
        kv=2.0 * layers * kv_heads * width * compute,
        adapters=sum(part.in_features + part.out_features for part in linear) // 2,
    )


def predict(shape: Shape, plan: Plan, card: float = 0.0) -> Phases:
    """Largest memory of each phase. ``card``: bytes of the card, of which a replica takes its share."""
    from atropos_verl.training.lm_head import KEEP_BYTES

    trainable = plan.lora_rank * shape.adapters * shape.layers if plan.lora_rank else shape.parameters
    frozen = shape.parameters if plan.lora_rank else 0
    weights = plan.master * (trainable + frozen) / plan.ranks
    gradients = plan.master * trainable / plan.ranks
    held = {"code": _CODE, "weights": weights, "moments": 2 * gradients}
    embedded = plan.engine_share is None
    engine = {"engine's weights": float(plan.compute * shape.parameters)} if embedded else {}
    if embedded and plan.on_cpu:  # oneDNN's layout of every matrix is a second copy
        engine["its packed copies"] = plan.compute * (shape.parameters - shape.rest + shape.head)
    running = dict(engine)
    if embedded:
        if plan.overlap:
            running["weights to swap in"] = sum(engine.values())
        running["KV, at most"] = 2 * shape.kv * plan.running * plan.context  # slots, and what is stored of them
    else:
        running["replica"] = (plan.engine_share or 0.0) * card
    beside = running if embedded and plan.overlap else engine if embedded and plan.keeps_engine else {}

    kept = shape.layers * shape.kept_layer + shape.kept_rest
    if plan.checkpointing:  # the input of every layer, and one layer at a time
        kept = shape.layers * shape.hidden * plan.compute + shape.kept_layer + shape.kept_rest
    logits = plan.tokens * plan.trained * shape.vocabulary * plan.compute
    bounds = {key.itemsize: bound for key, bound in KEEP_BYTES.items()}
    train = {
        **held,
        "gradients": gradients,
        "activations": plan.tokens * kept,
        # Its gradient takes the place of what was kept, block by block.
        "LM head": max(min(logits, bounds[plan.compute]), 0 if plan.lora_rank else shape.head * plan.compute),
    }
    if plan.ranks > 1 or plan.compute != plan.master:  # FSDP2: the root, and the layer at hand and the next, gathered
        gathered = plan.compute * (shape.rest + 2 * shape.layer)
        train["gathered layers"] = gathered + (0 if plan.lora_rank else 4 * shape.layer)
    update = {**held, "gradients": gradients}
    if not plan.on_cpu:
        update["AdamW's intermediates"] = gradients
    resting = {"code": _CODE} if plan.offload else held
    return {
        "rollout": {**resting, **running},
        "forward and backward": {**train, **beside},
        "optimiser step": {**update, **beside},
        "weight sync": {**held, **(running if plan.overlap else engine), "one tensor": 4.0 * shape.head},
    }


def peak(phases: Phases) -> float:
    return max(sum(parts.values()) for parts in phases.values())


def longest_micro_batch(shape: Shape, plan: Plan, room: float) -> int:
    """Most tokens of a micro-batch with which everything stays within ``room`` bytes; 0: nothing does."""
    sizes = range(1, 1 << 22)
    return bisect(sizes, room, key=lambda tokens: peak(predict(shape, replace(plan, tokens=tokens), room)))


def plan_of(config: RunConfig, launch: LaunchConfig, verl: Mapping[str, Any]) -> Plan:
    """The plan of a local run, or with verl's own settings (``verl``) of one on Ray."""
    if not verl:
        model, longest = config.model, config.max_token_len
        return Plan(
            ranks=launch.trainer_process.nproc,
            tokens=config.trainer.max_token_len_per_gpu,
            trained=min(1.0, config.max_response_length / longest),
            master=_BYTES[model.dtype],
            compute=_BYTES[model.compute_dtype],
            checkpointing=model.enable_gradient_checkpointing,
            on_cpu=config.trainer.device == "cpu",
            overlap=config.is_overlapped,
            keeps_engine=not config.inference.release_weights,
            running=min(config.inference.max_running, config.batch_size),
            context=config.inference.max_context_len or longest,
        )

    def of(key: str) -> Any:
        return _value(verl, f"actor_rollout_ref.{key}")

    prompt, answer = (_number(verl, f"data.max_{name}_length", 1024) for name in ("prompt", "response"))
    ulysses = int(of("actor.ulysses_sequence_parallel_size") or 1)
    return Plan(
        ranks=_number(verl, "trainer.nnodes") * _number(verl, "trainer.n_gpus_per_node"),
        tokens=int(of("actor.ppo_max_token_len_per_gpu") or 16384) // ulysses,
        trained=answer / (prompt + answer),
        master=_BYTES[str(of("actor.fsdp_config.model_dtype") or "fp32")],
        compute=_BYTES[str(of("actor.fsdp_config.dtype") or "bfloat16")],
        checkpointing=bool(of("model.enable_gradient_checkpointing")),
        lora_rank=int(of("model.lora_rank") or 0),
        offload=bool(of("actor.fsdp_config.param_offload") and of("actor.fsdp_config.optimizer_offload")),
        on_cpu=_value(verl, "trainer.device") == "cpu",
        engine_share=float(of("rollout.gpu_memory_utilization") or 0.5),
    )


def check_memory(shape: Shape, plan: Plan, room: float, place: str) -> list[Finding]:
    """One finding per phase, one of the longest micro-batch. ``room``: bytes that there are; ``place``: where."""
    on_ray, longest = plan.engine_share is not None, longest_micro_batch(shape, plan, room)
    prefix = "actor_rollout_ref." if on_ray else ""
    key = f"{prefix}actor.ppo_max_token_len_per_gpu" if on_ray else "trainer.max_token_len_per_gpu"
    remedies = {  # the least costly first
        f"{key}={longest}": longest > 0,
        f"{prefix}model.enable_gradient_checkpointing=true": not plan.checkpointing,
        "bfloat16 compute": plan.compute == 4 and not plan.on_cpu,
        "mode=sync": plan.overlap,
        "actor.fsdp_config.param_offload=true and optimizer_offload=true": on_ray and not plan.offload,
        "a smaller rollout.gpu_memory_utilization": on_ray,
        "model.lora_rank=32": on_ray and not plan.lora_rank,
        "more ranks, or a smaller model": True,
    }
    todo = f"one or more of: {'; '.join(remedy for remedy, helps in remedies.items() if helps)}"
    findings = []
    for phase, parts in predict(shape, plan, room).items():
        total = sum(parts.values())
        text = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7)
        text = f"{total / 1e9:.1f} GB of {room / 1e9:.1f} ({place}): {text}"
        findings.append(finding("memory", phase, text, missing=todo if total > room else ""))
    text = f"{longest} tokens ({key}, now {plan.tokens})" if longest else "none fits"
    return [*findings, finding("memory", "longest micro-batch", text)]
